"""docs/logs.md lists every event that regd can log, with its level and its keys, and no other.

What can be logged is read off the code: every call of a logger, and every `Recurring`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.pages import DOCS, PROJECT

LEVELS = {"debug", "info", "warning", "error", "exception"}
EVERYWHERE = {"session", "eid", "attempt"}  # bound to whatever is logged of a session
# what passes by itself, and tells a person only why something else may be late
PASSING = {"clock.jumped", "watch.overflowed", "session.vanished"}


class Event(NamedTuple):
    """One place where an event is logged."""

    name: str
    level: str
    keys: frozenset[str]


def text(node: ast.expr) -> str:
    """Return a text that is written out: only such an event can be found and held to the table."""
    assert isinstance(node, ast.Constant), ast.unparse(node)
    assert isinstance(node.value, str), ast.unparse(node)
    return node.value


def keys_of(call: ast.Call) -> frozenset[str]:
    assert all(k.arg for k in call.keywords), f"**keys cannot be listed: {ast.unparse(call)}"
    names = {str(k.arg) for k in call.keywords} - {"at_once"}
    return frozenset({"exception" if name == "exc_info" else name for name in names})


def logged(tree: ast.Module) -> Iterator[Event]:
    """Yield what a module logs."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        target = call.func
        if not isinstance(target, ast.Attribute) or ast.unparse(target.value) != "_log":
            continue
        if target.attr in LEVELS:
            keys = keys_of(call)
            if target.attr == "exception":
                yield Event(text(call.args[0]), "error", keys | {"exception"})
            else:
                yield Event(text(call.args[0]), target.attr, keys)
    # which attribute or local each `Recurring` is kept in
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        kept_in = ast.unparse(target)
        for made in ast.walk(node.value):
            if isinstance(made, ast.Call) and ast.unparse(made.func) == "Recurring":
                _, failed, mended = made.args
                told = [
                    keys_of(call)
                    for call in calls
                    if re.fullmatch(
                        rf"{re.escape(kept_in)}(\[.*\])?\.failed", ast.unparse(call.func)
                    )
                ]
                assert told, f"{kept_in}.failed() is called nowhere"
                for keys in told:
                    yield Event(text(failed), "warning", keys | {"failures"})
                yield Event(text(mended), "info", frozenset({"failures", "failed_s"}))


def all_logged() -> list[Event]:
    modules = (PROJECT / "regd").glob("*.py")
    return [
        e for m in sorted(modules) if m.name != "logs.py" for e in logged(ast.parse(m.read_text()))
    ]


def table() -> dict[str, tuple[str, set[str]]]:
    """Return level and keys of each event of the page."""
    page = (DOCS / "logs.md").read_text()
    (found,) = re.findall("<!-- events -->\n(.*?)\n<!-- /events -->", page, re.DOTALL)
    header, _, *lines = found.splitlines()
    assert header == "| event | level | keys | when |"
    rows = {}
    for line in lines:
        name, level, keys, when = (cell.strip() for cell in line.strip("|").split("|"))
        assert when, line
        assert re.fullmatch(r"`[a-z]+\.[a-z_]+`", name), line
        assert name.strip("`") not in rows, f"{name} is there twice"
        rows[name.strip("`")] = level, set(re.findall(r"`(\w+)`", keys))
    return rows


def test_the_table_has_every_event_and_no_other() -> None:
    told: dict[str, tuple[str, set[str]]] = {}
    for event in all_logged():
        level, keys = told.setdefault(event.name, (event.level, set()))
        assert level == event.level, f"{event.name} has two levels"
        keys |= event.keys - EVERYWHERE
    assert table() == told


def test_names_are_nouns_with_what_became_of_them() -> None:
    for event in all_logged():
        assert re.fullmatch(r"[a-z]+\.[a-z]+", event.name)


def test_what_needs_a_person_says_why_and_what_to_do() -> None:
    """Each place that logs a warning or an error, whatever other places say of that event."""
    for event in all_logged():
        if event.level in ("warning", "error") and event.name not in PASSING:
            assert event.keys & {"reason", "exception"}, event
            assert "hint" in event.keys, event


def test_the_walk_finds_every_kind_of_call(tmp_path: Path) -> None:
    """And complains of what it could not read."""
    code = """
_log.info("a.b", x=1)
self.x = Recurring(_log, "f.g", "f.h", every_s=1)
self.y = {"k": Recurring(_log, "p.q", "p.r", every_s=1)}
self.x.failed(reason="r", at_once=True)
self.y["k"].failed(reason="r", hint="h")
try: pass
except E: _log.exception("c.d"); _log.error("c.e", exc_info=error)
"""
    assert {(e.name, e.level, tuple(sorted(e.keys))) for e in logged(ast.parse(code))} == {
        ("a.b", "info", ("x",)),
        ("c.d", "error", ("exception",)),
        ("c.e", "error", ("exception",)),
        ("f.g", "warning", ("failures", "reason")),
        ("f.h", "info", ("failed_s", "failures")),
        ("p.q", "warning", ("failures", "hint", "reason")),
        ("p.r", "info", ("failed_s", "failures")),
    }
