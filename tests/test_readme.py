"""The README is a short way in: what to type first, and where the rest is."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_short() -> None:
    assert len(README.encode()) < 7_000
    assert len(README.splitlines()) < 120


def test_it_leads_to_every_page() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"](docs/{page.name})" in README, page.name


def test_it_names_the_command_that_runs_all_tests() -> None:
    assert "\nmake test " in README
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec make test")
