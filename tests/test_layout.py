"""The shape of the project: who may import whom, and files that speak of each other."""

import ast
import configparser
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

import regd
from regd.cli import app
from regd.settings import LEAVES, load

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "regd"

PURE = ["model", "records", "errors", "paths", "datasettypes", "settle", "revisions", "retries"]
PURE += ["glance"]
# A module may import those before it, never those after it.
ORDER = [
    *PURE,
    *["health", "settings", "logs", "counts", "pulse", "notify"],
    *["mounts", "host", "files", "hashing", "owner", "journal", "alyx", "watch", "scan"],
    *["registration", "worker", "service"],
    *["status", "web", "metrics", "check", "install", "manage", "screen", "live"],
    *["sandbox", "demo", "cli", "__main__"],
]
# What can neither read a disk or a clock, nor reach a network ...
HARMLESS = {
    *["__future__", "collections", "collections.abc", "dataclasses", "datetime", "email.utils"],
    *["enum", "fnmatch", "functools", "itertools", "math", "pathlib", "re", "typing"],
    *["one.alf.exceptions", "one.alf.spec", "pydantic"],
}
# ... but for these names.
IMPURE_NAMES = {"Path", "open", "print"}
IMPURE_METHODS = {"now", "today", "utcnow"}
HEAVY = {"pandas", "pyarrow", "numba", "boto3", "requests"}
HEAVY |= {"starlette", "uvicorn"}  # but for those who have set web.port


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.glob("*.py") if p.name != "__init__.py")


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of every import in a file, inside functions and for types alike."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import"
            for alias in node.names:
                yield node.module or "", alias.name


def own(file: Path) -> set[str]:
    """Return which modules of regd a file imports."""
    found = set()
    for module, name in imports(file):
        top, *below = module.split(".")
        if top != "regd":
            continue
        if below:
            found.add(below[0])
        elif (PACKAGE / f"{name}.py").exists() or (PACKAGE / name / "__init__.py").exists():
            found.add(name)
    return found


@pytest.mark.parametrize("file", modules(), ids=lambda file: file.stem)
def test_imports_go_one_way(file):
    assert file.stem in ORDER, f"{file.name} has no place in ORDER: give it one"
    later = set(ORDER[ORDER.index(file.stem) :])
    assert not own(file) & later


def test_every_place_in_the_order_is_taken():
    assert sorted(ORDER) == sorted([*(file.stem for file in modules()), "sandbox"])


def test_the_architecture_lists_the_modules_in_this_order():
    page = (PROJECT / "docs" / "architecture.md").read_text()
    listed = page.split("<!-- modules -->")[1].split("<!-- /modules -->")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", listed, re.M)
    assert [module for module, _ in rows] == ORDER


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_reads_no_disk_clock_or_network(name):
    file = PACKAGE / f"{name}.py"
    foreign = [
        module
        for module, imported in imports(file)
        if not module.startswith("regd")
        and module not in HARMLESS
        and f"{module}.{imported}" not in HARMLESS
    ]
    assert foreign == []
    for node in ast.walk(ast.parse(file.read_text())):
        assert not (isinstance(node, ast.Name) and node.id in IMPURE_NAMES)
        assert not (isinstance(node, ast.Attribute) and node.attr in IMPURE_METHODS)


def test_the_sandbox_stands_alone():
    for file in (PACKAGE / "sandbox").glob("*.py"):
        assert own(file) <= {"sandbox"}
        names = {name for module, name in imports(file) if module == "regd"}
        assert names <= {"__version__", "sandbox"}, file.name


def loaded_by(code: str) -> set[str]:
    """Return the modules that a process has loaded after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps([*sys.modules]))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout))


def test_the_daemon_loads_nothing_heavy():
    everything = "import regd.__main__, regd.service, regd.status, regd.registration"
    loaded = loaded_by(everything)
    assert not loaded & {*HEAVY, "numpy._core"}
    assert not loaded & {"regd.metrics", "prometheus_client"}  # only where they are asked for


@pytest.mark.parametrize("use", ["from numpy import linalg", "import numpy.linalg as linalg"])
def test_numpy_is_there_for_who_uses_it(use):
    code = f"import regd.__main__, one.alf.spec, iblutil.util as u; {use}; import numpy as np"
    used = f"{code}; assert linalg.norm(np.arange(5)[3:]) == 5 and u.np.arange(3).sum() == 3"
    assert "numpy._core" in loaded_by(used)


def test_importing_regd_loads_none_of_its_modules():
    assert not [name for name in loaded_by("import regd") if name.startswith("regd.")]


# --- the files around the package ----------------------------------------------------------------


def accepts(words: list[str]) -> None:
    """Raise if `regd` with those arguments would not be understood; nothing is run."""
    name, *arguments = words
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)


def test_the_example_of_the_settings_is_read():
    assert load(PROJECT / "config" / "regd.yaml").settings.flag == "create_me.flag"


def test_the_service_starts_what_there_is():
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read(PROJECT / "systemd" / "regd.service")
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert Path(program).name == "regd"
    accepts(words)
    secret = unit["Service"]["LoadCredential"].split(":")[0]
    assert secret.replace("__", ".") == "alyx.token"


def test_the_container_starts_what_there_is():
    text = (PROJECT / "Dockerfile").read_text()
    assert json.loads(re.search(r"^ENTRYPOINT (.+)$", text, re.M)[1]) == ["regd"]
    accepts(json.loads(re.search(r"^CMD (.+)$", text, re.M)[1]))
    kept = (PROJECT / ".dockerignore").read_text().splitlines()
    for copied in re.findall(r"^COPY (?!--from)(.+)$", text, re.M):
        for source in copied.split()[:-1]:
            assert (PROJECT / source).exists()
            assert f"!{source}" in kept


def test_the_container_has_all_that_the_package_is_built_from():
    text = (PROJECT / "Dockerfile").read_text()
    copied = {
        word for line in re.findall(r"^COPY (?!--)(.+) ", text, re.M) for word in line.split()
    }
    build = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    wheel = build["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"], "pyproject.toml"} <= copied


def test_the_container_asks_for_its_health_what_there_is():
    text = (PROJECT / "Dockerfile").read_text()
    words = json.loads(re.search(r"^HEALTHCHECK .*\\\n  CMD (.+)$", text, re.M)[1])
    assert words[:2] == ["python", "-m"]
    module = words[2].removeprefix("regd.")
    assert re.search(r"^ +REGD_STATE_DIR=/", text, re.M)
    assert own(PACKAGE / f"{module}.py") == set()  # it is started all day


def test_compose_runs_what_there_is_without_rights():
    composed = yaml.safe_load((PROJECT / "compose.yaml").read_text())
    assert {*composed} <= {"x-hardened", "services", "volumes"}
    for name, service in composed["services"].items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        assert "ports" not in service, name
        assert service["image"] == "regd"
        accepts(service.get("command", ["run"]))
        for volume in service.get("volumes", []):
            if isinstance(volume, str):
                assert volume.split(":")[0] in composed["volumes"]
    regd, sandbox = (composed["services"][name] for name in ("regd", "sandbox"))
    assert {*regd["depends_on"]} == {"sandbox"}
    assert sandbox["healthcheck"]["test"][0] == "CMD"
    compile(sandbox["healthcheck"]["test"][3], "healthcheck", "exec")
    lab = json.loads((PACKAGE / "sandbox/data/default_lab.json").read_text())
    keys = {key.lower().removeprefix("regd_").replace("__", ".") for key in regd["environment"]}
    assert keys <= set(LEAVES)
    assert regd["environment"]["REGD_REPOSITORY"] in lab["labs"][1]["repositories"]
    assert regd["environment"]["REGD_ALYX__PASSWORD"] == "rig-password"
    assert regd["environment"]["REGD_ALYX__URL"] == "http://sandbox:8000"
    assert "8000" in sandbox["command"]
    targets = {v["target"] if isinstance(v, dict) else v.split(":")[1] for v in regd["volumes"]}
    image = (PROJECT / "Dockerfile").read_text()
    assert targets == set(json.loads(re.search(r"^VOLUME (.+)$", image, re.M)[1]))


def test_hooks_come_from_nowhere_else():
    hooks = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]


def test_the_changelog_knows_this_version():
    assert f"## [{regd.__version__}]" in (PROJECT / "CHANGELOG.md").read_text()


COMMANDS = sorted(typer.main.get_command(app).commands)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_is_there(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_all_commands_are_there():
    assert COMMANDS == [
        "check",
        "config",
        "demo",
        "forget",
        "install",
        "retry",
        "run",
        "sandbox",
        "scan",
        "show",
        "status",
        "uninstall",
    ]
