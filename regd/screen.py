"""How things look on a terminal: reports in, rich renderables out; nothing is read or decided."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape as escape_markup
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from regd.errors import printable

Report = dict[str, Any]


def escape(text: str) -> str:
    """Return a text from elsewhere as it may be shown, whatever a file is called."""
    return escape_markup(printable(text))


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where that is due."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def line(markup: str) -> Text:
    """Return a line that is not wrapped, so that it can be copied and searched whole.

    What is put into `markup` from elsewhere has gone through `escape`.
    """
    return Text.from_markup(markup, emoji=False, overflow="ignore")


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], style: str = ""
) -> Table:
    """Return a table; long cells are folded, so that nothing of them is lost."""
    shown = Table(*columns, title=title, title_justify="left", title_style=f"bold {style}")
    for column in shown.columns:
        column.overflow = "fold"
    for row in rows:
        shown.add_row(*(escape(str(cell)) for cell in row))
    return shown


def problems(title: str, found: Iterable[Report]) -> Group:
    """Return what a person has to mend: what it is on a line of its own, to be copied.

    Args:
        title: Above all of it.
        found: Each with ``what``, ``reason`` and ``hint``.
    """
    lines: list[RenderableType] = [line(f"\n[bold yellow]{title}[/bold yellow]")]
    for problem in found:
        lines.append(line(f"[bold]{escape(problem['what'])}[/bold]"))
        for label, text in (("why", problem["reason"]), ("do", problem["hint"])):
            lines.append(Padding(f"{label:4}{escape(str(text))}", (0, 0, 0, 2)))
    return Group(*lines)


def status(facts: Report) -> Group:
    """Return what `regd.status.report` says."""
    alyx, daemon = facts["alyx"], facts["daemon"]
    lines: list[RenderableType] = [
        line(f"[bold]{escape(str(facts['data_root']))}[/bold]"),
        line(f"daemon   {'running' if daemon['running'] else '[yellow]not running[/yellow]'}"),
    ]
    if alyx["reason"] is None:
        lines.append(line(f"Alyx     reachable at {escape(str(alyx['url']))}"))
    else:
        what = f"{alyx['reason']} ({alyx['hint']})" if alyx["hint"] else alyx["reason"]
        state = "reachable, but" if alyx["reachable"] else "not reachable:"
        since = ""
        if "since" in alyx:
            since = time.strftime(" since %Y-%m-%d %H:%M", time.localtime(alyx["since"]))
        lines.append(line(f"Alyx     [red]{state}[/red] {escape(str(what))}{since}"))
    for kind in ("sessions", "files"):
        counts = ", ".join(f"{n} {state}" for state, n in facts[kind].items() if n)
        lines.append(line(f"{kind:8} {counts or 'none yet'}"))
    if facts["backlog"]["sessions"]:
        lines.append(
            line(
                f"old      {facts['backlog']['sessions']} sessions without a flag left alone; "
                "regd scan --all takes them"
            )
        )
    at_work = "In work" if daemon["running"] else "In work when regd ended"
    lines += _sessions(at_work, facts["working"])
    lines += _sessions("Waiting", facts["waiting"])
    lines += _sessions("Held: files of sessions that Alyx does not know", facts["held"])
    if facts["problems"]:
        lines.append(problems("Needs a person", facts["problems"]))
    elif not any(facts["sessions"].values()):
        lines.append(line("nothing seen yet"))
    else:
        lines.append(line("[green]nothing needs a person[/green]"))
    return Group(*lines)


def _sessions(title: str, sessions: Iterable[Report]) -> list[Table]:
    rows = [
        (
            s["session"],
            ", ".join(f"{n} {state}" for state, n in s["files"].items()) or "-",
            " - ".join(filter(None, (s["reason"], s["hint"]))) or "-",
        )
        for s in sessions
    ]
    return [table(title, ("session", "files", "why"), rows)] if rows else []


def scanned(facts: Report) -> Group:
    """Return what has come of a scan.

    Args:
        facts: ``known`` (sessions), ``registered`` (files), ``backlog``, ``held``, ``left``
            (sessions), ``people`` (things that need a person).
    """
    done = f"{count(facts['known'], 'session')} known"
    done += f", {count(facts['registered'], 'file')} registered"
    if facts["backlog"]:
        done += f", {facts['backlog']} old sessions left alone (regd scan --all takes them)"
    if facts["held"]:
        done += f", {facts['held']} sessions held until they are flagged"
    lines = [line(done)]
    if facts["left"]:
        left = count(facts["left"], "session")
        lines.append(line(f"[yellow]{left} left: run it again[/yellow]"))
    if people := facts["people"]:
        needs = "needs" if people == 1 else "need"
        lines.append(
            line(f"[yellow]{count(people, 'thing')} {needs} a person: regd status[/yellow]")
        )
    return Group(*lines)


MARKS = {"ok": "✓", "skipped": "-", "warning": "!", "wrong": "✗"}
PLAIN_MARKS = {"ok": "ok", "skipped": "--", "warning": "!!", "wrong": "XX"}
_COLOURS = {"ok": "green", "skipped": "dim", "warning": "yellow", "wrong": "red"}


def checked(facts: Report, *, width: int | None = None, plain: bool = False) -> Group:
    """Return what `regd.check.report_of` says.

    Args:
        facts: The report.
        width: Where to wrap; None for not at all, so that programs find each check on one line.
        plain: Whether the terminal shows ASCII alone.
    """
    marks = PLAIN_MARKS if plain else MARKS
    checks = facts["checks"]
    names = max(len(check["name"]) for check in checks)
    before = len(marks["ok"]) + 1 + names + 2
    lines: list[RenderableType] = [line(f"rights are those of {escape(facts['judged_for'])}")]
    for check in checks:
        state = check["state"]
        colour = _COLOURS[state]
        first, *more = _wrapped(check["found"], width, before)
        mark, name = marks[state], f"{check['name']:{names}}"
        lines.append(line(f"[{colour}]{mark}[/{colour}] {name}  {escape(first)}"))
        lines += [line(" " * before + escape(text)) for text in more]
        if check["hint"]:
            first, *more = _wrapped(check["hint"], width, before + 4)
            lines.append(line(f"{' ' * before}[bold]do:[/bold] {escape(first)}"))
            lines += [line(" " * (before + 4) + escape(text)) for text in more]
    lines.append(line(_summary(checks)))
    return Group(*lines)


def _wrapped(text: str, width: int | None, indent: int) -> list[str]:
    if width is None:
        return [text]
    return textwrap.wrap(
        text, max(30, width - indent), break_long_words=False, break_on_hyphens=False
    ) or [""]


def _summary(checks: Sequence[Report]) -> str:
    wrong, warnings, skipped = (
        sum(check["state"] == state for check in checks)
        for state in ("wrong", "warning", "skipped")
    )
    if not (wrong or warnings or skipped):
        return "[green]all is well[/green]"
    parts = [f"{wrong} wrong"] if wrong else []
    parts += [count(warnings, "warning")] if warnings else []
    parts += [f"{skipped} not looked at"] if skipped else []
    colour = "red" if wrong else "yellow"
    return f"[{colour}]{', '.join(parts)}[/{colour}]"
