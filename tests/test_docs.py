"""The pages say what is: they are held to the code, their links lead somewhere, their commands run.

`tests/pages.py` takes the pages apart and is the place where commands run; `tests/stand_in.py` is
what they meet there instead of sudo, systemctl and the like.
"""

from __future__ import annotations

import configparser
import datetime
import importlib
import inspect
import json
import operator
import re
import shlex
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import pytest
import typer
import yaml

from regd import metrics
from regd.cli import app
from regd.model import FileState, SessionState
from regd.sandbox.server import Server
from regd.settings import load, markdown_table
from tests.conftest import INITIAL
from tests.pages import (
    DOCS,
    PAGES,
    PROJECT,
    Place,
    anchors,
    blocks,
    commands,
    links,
    prose,
    spans,
)
from tests.rig import DATASETS, Lab, write
from tests.test_layout import COMMANDS, ORDER, accepts


def name_of(page: Path) -> str:
    return page.relative_to(PROJECT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)

# --- what is held to the code --------------------------------------------------------------------


def between(mark: str) -> str:
    """Return what stands between the marks of that name, on whatever page it is."""
    text = "\n".join(page.read_text() for page in PAGES)
    (found,) = re.findall(f"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", text, re.DOTALL)
    return str(found)


def test_settings_table() -> None:
    assert between("settings") == markdown_table()


def test_metrics_table() -> None:
    assert between("metrics") == metrics.markdown_table()


def test_promises() -> None:
    """Every promise names tests that are there."""
    for line in between("promises").splitlines()[2:]:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line)
        assert named, line
        for file, test in named:
            assert f"def {test}(" in (PROJECT / "tests/chaos" / file).read_text(), test


@pytest.mark.parametrize(
    ("mark", "enumeration"), [("session states", SessionState), ("file states", FileState)]
)
def test_states_are_drawn_as_in_the_code(mark: str, enumeration: type[StrEnum]) -> None:
    drawn = between(mark).removeprefix("```text\n").removesuffix("\n```")
    assert drawn in inspect.getdoc(enumeration).replace("\n    ", "\n")
    assert {state for state in enumeration if state not in drawn} == set()


def test_code_that_the_architecture_names_is_there() -> None:
    """`worker.Gate` on that page is an attribute of regd.worker, and so on."""
    page = re.sub(r"`alyx\.[a-z_]+`", "", (DOCS / "architecture.md").read_text())  # settings
    named = [n for n in re.findall(r"`([a-z_]+)\.([\w.]+)`", page) if n[0] in ORDER]
    assert len(named) > 20
    for module, names in named:
        assert operator.attrgetter(names)(importlib.import_module(f"regd.{module}"))


def test_library_example(sandbox: Server, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "library.md").read_text(), re.DOTALL)
    example = example.replace("http://127.0.0.1:8000", sandbox.url)
    example = example.replace("/tmp/recordings", str(tmp_path))
    known: dict[str, object] = {}
    exec(example, known)
    assert [file["name"] for file in known["files"]] == ["_ibl_wheel.position.npy"]
    known["alyx"].close()


# --- the pages themselves ------------------------------------------------------------------------


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.is_relative_to(PROJECT), target
        assert there.exists(), target
        if anchor:
            assert there.suffix == ".md", target
            assert anchor in anchors(there), target


@each_page
def test_images_say_what_they_show(page: Path) -> None:
    for words, file in re.findall(r"!\[(.*?)\]\((.*?)\)", prose(page), re.S):
        assert len(words) > 20, file
        if file.endswith(".svg"):
            drawn = (page.parent / file).read_text()
            assert "<title" in drawn
            assert "<desc" in drawn
    assert "<img" not in page.read_text()


def test_every_page_is_found_from_the_readme() -> None:
    found, ahead = set(), [PROJECT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in found:
            found.add(page)
            targets = ((page.parent / target.split("#")[0]).resolve() for target in links(page))
            ahead += [target for target in targets if target.suffix == ".md"]
    assert set(PAGES) <= found


@each_page
def test_form(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert len(re.findall(r"^# ", prose(page), re.M)) == 1
    assert lines[0].startswith("# ")
    assert len(lines) <= 250
    assert page.read_text().count("\n```") % 2 == 0


# --- what can be typed ---------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, lab: Lab) -> Iterator[Place]:
    place = Place(tmp_path, lab)
    try:
        yield place
    finally:
        place.end()


def pages_with(language: str) -> pytest.MarkDecorator:
    pages = [p for p in PAGES if any(block.language == language for block in blocks(p))]
    return pytest.mark.parametrize("page", pages, ids=name_of)


@pages_with("sh")
def test_blocks_of_commands(page: Path, place: Place) -> None:
    """Every block of commands runs, one after the other, as a person would who reads the page."""
    for block in blocks(page):
        if block.language == "sh":
            place.run(block.text)


@pages_with("console")
def test_commands_print_what_is_shown(page: Path, worked: Place) -> None:
    """A command after a $ prints the lines below it, 2026-01-31 being today.

    … stands for anything on a line, and alone on one for any lines.
    """
    for block in blocks(page):
        if block.language == "console":
            for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, re.M):
                command, shown = (s.replace("2026-01-31", str(TODAY)) for s in (command, shown))
                shown = worked.here(shown).strip()
                pattern = re.escape(shown).replace("\\\n…\\\n", "\n(?s:.*)\n").replace("…", ".*")
                printed = worked.run(command)
                lines = "\n".join(line.rstrip() for line in printed.strip().splitlines())
                assert re.fullmatch(pattern, lines), printed


@each_page
def test_every_block_is_held_to_something(page: Path) -> None:
    """There is no block of a kind that no test looks into."""
    marked = re.findall(r"<!-- ([\w ]+) -->\n```text\n", page.read_text())
    for language, text, line in blocks(page):
        where = f"{page.name}:{line}"
        if language == "text":
            assert marked, f"{where}: put marks around it, and hold it to the code"
            marked.pop(0)
        elif language == "yaml":
            check_yaml(text)
        elif language == "json":
            json.loads(text)
        elif language == "ini":
            sections = configparser.RawConfigParser(strict=False)
            sections.read_string(text)
            assert set(sections) <= {"DEFAULT", "Unit", "Service", "Install"}, where
        elif language == "python":
            assert page.name == "library.md", f"{where}: no test runs it"
        else:
            assert language in ("sh", "console"), f"{where}: no test knows {language!r}"


def check_yaml(text: str) -> None:
    """Raise if it is neither settings that regd takes nor a part of a known other file."""
    keys = set(yaml.safe_load(text))
    if not keys <= {"scrape_configs", "services", "rule_files"}:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "regd.yaml"
            file.write_text(text)
            load(file)


# The rig's time zone is one in which it is noon or so: no day ends while a test runs.
HOURS = 12 - datetime.datetime.now(datetime.UTC).hour
TODAY = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=HOURS)).date()
SESSION = f"mainenlab/Subjects/ZM_1085/{TODAY}/001"


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A rig where regd runs, and has registered today's session but for one file."""
    with Server(load=INITIAL, rate_limit=None) as server:
        lab = Lab(server.url, "rig_user", "rig-password", "ZM_1085", "mainenlab", "mainenlab_local")
        with lab.client:
            place = Place(tmp_path_factory.mktemp("worked"), lab)
            place.environment["TZ"] = f"RIG{-HOURS:+d}"  # as POSIX counts: + is west
            place.environment["REGD_ALYX__PASSWORD"] = lab.password
            for name in (*DATASETS, "raw_video_data/notes.txt"):
                write(place.root / "data/recordings" / SESSION / name, name.encode())
            (place.root / "data/recordings" / SESSION / "create_me.flag").touch()
            try:
                for block in blocks(DOCS / "install.md"):
                    if block.language == "sh" and "useradd" in block.text:
                        place.run(block.text)
                place.run("systemctl start regd")
                place.run("regd scan || true")  # returns when there is nothing left to do
                yield place
            finally:
                place.end()


TYPED = sorted({command for page in PAGES for command in commands(page)})


@pytest.mark.parametrize("command", TYPED)
def test_commands_in_sentences(command: str, worked: Place) -> None:
    words = shlex.split(command.replace("SESSION", SESSION).replace("FILE", "/etc/regd/regd.yaml"))
    if words[0] == "regd":
        if len(words) == 2:
            assert words[1] in COMMANDS
            return
        accepts(words[1:])
        if words[1] in ("run", "sandbox", "demo", "forget"):
            return  # it is spoken of; blocks, and tests of their own, run it
    worked.run(shlex.join(words))


def test_options_in_sentences() -> None:
    """An option that a page speaks of is one of some command."""
    group = typer.main.get_command(app)
    known = {"--help", "--version"}
    for command in group.commands.values():
        known |= {name for parameter in command.params for name in parameter.opts}
    for page in PAGES:
        for span in spans(page):
            if span.startswith("-"):
                assert span.split()[0] in known, f"{page.name}: {span}"


def test_every_command_and_option_is_told() -> None:
    rows = re.findall(r"^\| `regd (\w+)", (DOCS / "commands.md").read_text(), re.M)
    assert sorted(set(rows)) == COMMANDS
    text = "\n".join(page.read_text() for page in PAGES)
    for name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params:
            if isinstance(parameter, typer.core.TyperOption):
                assert re.search(rf"{parameter.opts[0]}\b", text), (
                    f"regd {name} {parameter.opts[0]}"
                )


def test_make_help_lists_what_there_is() -> None:
    text = (PROJECT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: (.*)$", text, re.M)[0].split()
    told = re.findall(r"^\t@echo \"make ([\w-]+)", text, re.M)
    assert sorted([*told, "help"]) == sorted(targets)
