"""The pages say what is: tables and examples are held to the code, and links lead somewhere."""

from __future__ import annotations

import importlib
import inspect
import operator
import re
from enum import StrEnum
from pathlib import Path

import pytest

from regd.model import FileState, SessionState
from regd.sandbox.server import Server
from regd.settings import markdown_table
from tests.test_layout import ORDER

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "bench/RESULTS.md"))]
PAGES += sorted(DOCS.glob("*.md"))


def between(mark: str) -> str:
    """Return what stands between the marks of that name, on whatever page it is."""
    text = "\n".join(page.read_text() for page in PAGES)
    (found,) = re.findall(f"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", text, re.DOTALL)
    return str(found)


def test_settings_table() -> None:
    assert between("settings") == markdown_table()


def test_events_table() -> None:
    """Every event that the daemon's code can log is in the table, and nothing else."""
    daemon = [ROOT / "regd" / f"{m}.py" for m in ("service", "worker", "scan", "alyx")]
    code = "\n".join(path.read_text() for path in daemon)
    logged = set(re.findall(r'_log\.\w+\(\s*"([a-z]+\.[a-z_]+)"', code))
    for kind in ("alyx", "root"):
        logged |= {f"{kind}.away", f"{kind}.back"}
    for kind in ("watch", "settings"):
        logged |= {f"{kind}.failed", f"{kind}.mended"}
    listed = set(
        re.findall(
            r"`([a-z]+\.[a-z_]+)`",
            "".join(line.split("|")[1] for line in between("events").splitlines()),
        )
    )
    assert listed == logged


def test_promises() -> None:
    """Every promise names tests that are there."""
    for line in between("promises").splitlines()[2:]:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line)
        assert named, line
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests/chaos" / file).read_text(), test


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


def links(page: Path) -> list[str]:
    """Return the targets of a page's links that lead to files of this repository."""
    return re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        file = target.split("#")[0]
        assert (page.parent / file).exists(), target
