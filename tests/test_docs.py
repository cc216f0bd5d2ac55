"""The pages say what is: tables and examples are held to the code, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from regd.sandbox.server import Server
from regd.settings import markdown_table

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
