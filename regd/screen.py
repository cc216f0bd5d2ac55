"""How things look on a terminal: reports in, rich renderables out; nothing is read or decided."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape as escape_markup
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from regd.errors import RegdError, printable
from regd.glance import count, is_away, waits_for

Report = dict[str, Any]
_STYLES = {"done": "green", "parked": "bold red", "held": "yellow"}


def escape(text: str) -> str:
    """Return a text from elsewhere as it may be shown, whatever a file is called."""
    return escape_markup(printable(text))


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


# --- regd status ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Most:
    """How many entries of each kind are shown; None for all, 0 for nothing of that kind."""

    today: int | None = None
    others: int | None = None
    waits: int | None = None
    people: int | None = None


ALL = Most()
FITTING = (
    *(Most(n, n, n, n) for n in (50, 20, 10)),
    *(Most(*n) for n in ((8, 4, 4, 6), (6, 2, 2, 4), (5, 0, 1, 3), (4, 0, 0, 3), (3, 0, 0, 2))),
    Most(2, 0, 0, 1),
)
"""What to try until all of it fits on the screen; what needs a person stays longest."""


def status(facts: Report, most: Most = ALL) -> Group:
    """Return what `regd.status.report` says: first whether all is well, in one line.

    Args:
        facts: As `report` returns them.
        most: How much of it is shown.
    """
    of_today = sum(facts["today_sessions"].values())
    today = _rows(facts["today"], facts, most.today, of_today)
    listed = {s["session"] for s in facts["today"]}
    others = [s for s in (*facts["working"], *facts["waiting"]) if s["session"] not in listed]
    waits = list(_waits(facts))
    parts: list[RenderableType] = [_headline(facts), *_about(facts)]
    if today:
        parts += [_title(f"Today, {facts['day']}"), *today]
    elif any(facts["sessions"].values()):
        parts += [_title(f"Today, {facts['day']}"), Text("  nothing recorded yet")]
    if others and most.others != 0:
        in_all, then = facts["sessions"], facts["today_sessions"]
        in_work = sum(in_all[s] - then[s] for s in ("working", "waiting"))
        rows = _rows(others, facts, most.others, in_work)
        parts += [_title("Other sessions in work"), *rows]
    if waits and most.waits != 0:
        parts += [_title("Waiting"), *_groups(waits, most.waits)]
    if facts["problems"]:
        more = facts["needs_human"] - len(facts["problems"])
        title = _title("Needs a person", "bold yellow")
        parts += [title, *_groups(facts["problems"], most.people, more)]
    return Group(*parts)


def trouble(error: RegdError) -> Group:
    """Return why there is nothing to show."""
    title = Text("regd's journal cannot be read", "bold yellow")
    return Group(title, *_why(error.reason, error.hint))


def _headline(facts: Report) -> Text:
    """Return the one line that says whether all is well."""
    away, people = facts["away"], facts["needs_human"]
    waiting = facts["sessions"]["waiting"] + facts["sessions"]["working"]
    if people:
        needs = "1 thing needs" if people == 1 else f"{people} things need"
        return Text(f"{needs} a person, see below", "bold red")
    if away:
        since = when(away["since"], facts["at"])
        waits = f": {count(waiting, 'session')} wait" + ("s" if waiting == 1 else "")
        return Text(f"{is_away(away)} since {since}{waits if waiting else ''}", "bold yellow")
    if not facts["daemon"]["running"]:
        start = "sudo systemctl start regd"
        return Text(
            f"regd does not run, so nothing is registered; start it: {start}", "bold yellow"
        )
    if not facts["alyx"]["reachable"]:
        return Text("Alyx does not answer", "bold yellow")
    if not any(facts["sessions"].values()):
        return Text("All is well: regd runs, and has seen no session yet", "bold green")
    today = facts["today_sessions"]
    sessions = sum(today.values())
    if not sessions:
        said = "nothing was recorded today"
    elif today["done"] == sessions:
        said = "the session of today is registered"
        if sessions > 1:
            said = f"all {sessions} sessions of today are registered"
    else:
        is_are = "is" if today["done"] == 1 else "are"
        said = f"{today['done']:,} of {count(sessions, 'session')} of today {is_are} registered"
    return Text(f"All is well: {said}", "bold green")


def _about(facts: Report) -> Iterable[RenderableType]:
    """Yield what regd works on, and how much of it there is."""
    alyx = facts["alyx"]
    yield _labelled("regd", "runs" if facts["daemon"]["running"] else "does not run")
    yield _labelled("data", str(facts["data_root"] or "none yet"))
    said = f"{alyx['url']}: answers" if alyx["asked"] else str(alyx["url"])
    away = facts["away"]
    if away and away["kind"] == "alyx":  # told below
        said = f"{alyx['url']}: away since {when(away['since'], facts['at'])}"
    elif alyx["reason"] is not None:
        state = "answers, but: " if alyx["reachable"] else "not reachable: "
        hint = f" ({alyx['hint']})" if alyx["hint"] else ""
        since = f", since {when(alyx['since'], facts['at'])}" if "since" in alyx else ""
        said = f"{state}{alyx['reason']}{hint}{since}"
    yield _labelled("Alyx", said)
    for kind in ("sessions", "files"):
        counts = ", ".join(f"{n} {state}" for state, n in facts[kind].items() if n)
        yield _labelled(kind, counts or "none yet")
    if old := facts["backlog"]["sessions"]:
        takes = "without a flag left alone; `regd scan --all` takes"
        said = f"{count(old, 'session')} {takes} {'it' if old == 1 else 'them'}"
        yield _labelled("old", said)


def _rows(
    sessions: Sequence[Report], facts: Report, most: int | None, of: int
) -> list[RenderableType]:
    """Return how far sessions are; of too many, `of` in all, those not done, then the latest."""
    chosen = sessions
    if most is not None and len(sessions) > most:
        first = sorted(sessions, key=lambda s: (s["state"] == "done", -s["since"]))
        chosen = sorted(first[:most], key=lambda s: str(s["session"]))
    if not chosen:
        return []
    rows: list[RenderableType] = [
        _Aligned(
            [(short(s["session"]), *_progress(s), _state(s, facts)) for s in chosen],
            [_STYLES.get(s["state"], "") for s in chosen],
        )
    ]
    if more := of - len(chosen):
        rows.append(_more(more))
    return rows


def short(folder: str) -> str:
    """Return subject, date and number alone: what `regd show` knows it by, too."""
    return "/".join(folder.split("/")[-3:])


def _progress(session: Report) -> tuple[str, str]:
    """Return how many files and bytes of a session are registered, of how many."""
    files, done = sum(session["files"].values()), session["files"].get("registered", 0)
    if not files:
        return "no files", ""
    in_all = size(session["size_bytes"])
    number, unit = in_all.split()
    registered, _ = size(session["registered_bytes"], unit).split()
    if registered != number:
        number = f"{registered}/{number}"
    return f"{done}/{files} {'file' if files == 1 else 'files'}", f"{number} {unit}"


def _state(session: Report, facts: Report) -> str:
    """Return the state of a session in words, and since when it is in it."""
    state, away = session["state"], facts["away"]
    since = when(session["since"], facts["at"])
    if state == "done":
        refused = session["files"].get("refused", 0)
        if session["reason"]:  # the one there is
            return f"folder gone since {since}"
        return f"registered, but {refused} refused" if refused else f"registered {since}"
    if state == "parked":
        return f"needs a person since {since}"
    if state == "held":
        return f"held since {since}"
    if not facts["daemon"]["running"]:
        return f"waits for regd since {since}"
    if state == "working":
        return f"in work since {since}"
    if away:
        return f"waits for {waits_for(away)} since {since}"
    if session["hint"] is not None:  # it failed
        return f"failed, again at {when(session['due_at'], facts['at'])}"
    written = session["files"].get("settling", 0)
    return f"{'being written' if written else 'waits'} since {since}"


def _waits(facts: Report) -> Iterable[Report]:
    """Yield what waits by itself, for what, and since when, as `problems` are."""
    at, away = facts["at"], facts["away"]
    if away and away["kind"] in ("alyx", "root"):
        what = f"{is_away(away)} since {when(away['since'], at)}"
        hint = away["hint"] or "nothing: regd goes on when it is back"
        yield {"what": what, "reason": away["reason"], "hint": hint}
    else:
        for s in facts["waiting"]:
            if s["hint"] is not None:
                what = f"{s['session']}  since {when(s['since'], at)}"
                hint = s["hint"] or "nothing: regd tries it again"
                yield {"what": what, "reason": s["reason"], "hint": hint}
    for s in facts["held"]:
        what = f"{s['session']}  held since {when(s['since'], at)}"
        yield {"what": what, "reason": s["reason"], "hint": s["hint"]}


def problems(title: str, found: Sequence[Report], most: int | None = None) -> Group:
    """Return what a person has to mend: what it is on a line of its own, to be copied.

    Args:
        title: Above all of it.
        found: Each with ``what``, ``reason`` and ``hint``; those of one reason are told once.
        most: How many are shown; None for all.
    """
    return Group(_title(title, "bold yellow"), *_groups(found, most))


def _groups(found: Sequence[Report], most: int | None, more: int = 0) -> list[RenderableType]:
    """Return problems, those that have the same reason and the same remedy together.

    Args:
        found: As for `problems`.
        most: How many groups are shown, and how many of one group.
        more: How many there are beside `found`.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for problem in found:
        key = str(problem["reason"] or ""), str(problem["hint"] or "")
        groups.setdefault(key, []).append(str(problem["what"]))
    lines: list[RenderableType] = []
    for (reason, hint), names in list(groups.items())[:most]:
        lines += [Padding(_copied(name), (0, 0, 0, 2), expand=False) for name in names[:most]]
        if most is not None and len(names) > most:
            lines.append(_more(len(names) - most))
        lines += [
            _labelled(label, text, 4) for label, text in (("why", reason), ("do", hint)) if text
        ]
    left = list(groups.values())[most:] if most is not None else []
    if more := more + sum(map(len, left)):
        lines.append(_more(more))
    return lines


def _why(reason: str, hint: str) -> list[RenderableType]:
    return [_labelled(label, text, 4) for label, text in (("why", reason), ("do", hint)) if text]


# --- regd show -----------------------------------------------------------------------------------

_TOLD = {
    "created": "created on Alyx",
    "found": "found on Alyx",
    "lost": "no longer on Alyx",
    "failed": "put off",
    "held": "held",
    "parked": "needs a person",
    "resumed": "put back to work",
    "interrupted": "regd ended while at it",
    "unflagged": "the flag is gone",
    "done": "all done",
}


def story(facts: Report) -> Group:
    """Return what `regd.status.story` says."""
    at = facts["at"]
    files, in_bytes = _progress(facts)
    state = facts["state"]
    lines: list[RenderableType] = [
        _copied(facts["session"]),
        _labelled("state", f"{state} since {when(facts['since'], at)}", 2),
        _labelled("files", ", ".join(filter(None, (f"{files} registered", in_bytes))), 2),
        _labelled("Alyx", facts["url"] or facts["eid"] or "not known there", 2),
    ]
    if state in ("waiting", "held"):
        lines.append(_labelled("next", when(facts["due_at"], at), 2))
    lines += [
        _labelled(label, facts[key], 2)
        for label, key in (("why", "reason"), ("do", "hint"))
        if facts[key]
    ]
    if not facts["is_there"]:
        lines.append(_labelled("note", "its folder is not there", 2))
    lines += [_title("History"), _happened(facts["first_seen_at"], "first seen")]
    lines += [_event(event) for event in facts["history"]]
    if facts["by_file"]:
        lines.append(_title("Files, with state, size, MD5 and dataset id"))
    for file in facts["by_file"]:
        lines += _file(file)
    return Group(*lines)


def _event(event: Report) -> RenderableType:
    if event["what"] == "moved":
        return _happened(event["first_at"], f"{event['about']} moved to {event['target']}")
    said = _TOLD[event["what"]]
    if event["about"]:
        said += f": {event['about']}"
    if event["times"] > 1:
        said += f" ({event['times']} times, the last {moment(event['last_at'])})"
    return _happened(event["first_at"], said)


def _happened(at: float, what: str) -> RenderableType:
    return _labelled(moment(at), what, 2)


def _file(file: Report) -> Iterable[RenderableType]:
    """Yield the lines of a file: its path, what became of it, and its hash and id."""
    yield Padding(_copied(file["path"]), (0, 0, 0, 2), expand=False)
    said = [f"{file['state']} {moment(file['changed_at'])}", size(file["size_bytes"])]
    if file["revision"]:
        said.append(f"revision {file['revision']}")
    if file["move_to"]:
        said.append(f"to {file['move_to']}")
    yield Padding(Text(printable("  ".join(said)), overflow="fold"), (0, 0, 0, 4), expand=False)
    if ids := "  ".join(filter(None, (file["md5"], file["dataset_id"]))):
        yield Padding(Text(ids, overflow="fold"), (0, 0, 0, 4), expand=False)
    yield from _why(file["reason"] or "", file["hint"] or "")


# --- the parts of it -----------------------------------------------------------------------------


def when(at: float, now: float) -> str:
    """Return a time as the clock on the wall says it, with its day if that is not today."""
    then, today = time.localtime(at), time.localtime(now)
    same = then[:3] == today[:3]
    return time.strftime("%H:%M" if same else "%Y-%m-%d %H:%M", then)


def moment(at: float) -> str:
    """Return a time to the second, with its day."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def size(number: int, unit: str | None = None) -> str:
    """Return a number of bytes with its unit, or with the one that is asked for."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    if unit is None:
        unit = next((u for n, u in enumerate(units) if number < 999.5 * 1000**n), units[-1])
    shown = number / 1000 ** units.index(unit)
    return f"{shown:.{0 if unit == 'B' or shown >= 9.95 or not shown else 1}f} {unit}"


def _title(text: str, style: str = "bold") -> Text:
    return Text(f"\n{printable(text)}", style)


def _copied(text: str) -> Text:
    """Return a name that is not wrapped between words, so that it can be copied."""
    return Text(printable(text), "bold", overflow="fold")


def _more(number: int) -> Text:
    return Text(f"  ... and {number} more (all of them: regd status | less)", "dim")


def _labelled(label: str, text: str, indent: int = 0) -> RenderableType:
    """Return a text beside its label; further lines begin below its first."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True, min_width=8 - indent)
    grid.add_column(overflow="fold")
    grid.add_row(Text(label), Text(printable(text)))
    return Padding(grid, (0, 0, 0, indent), expand=False)


class _Aligned:
    """Rows in columns where all of them fit on a line, and else each with its name above it."""

    def __init__(self, rows: Sequence[Sequence[str]], styles: Sequence[str]) -> None:
        self._rows = [[printable(cell) for cell in row] for row in rows]
        self._styles = styles

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [max(map(cell_len, column)) for column in zip(*self._rows, strict=True)]
        on_a_line = sum(widths) + 2 * len(widths) <= options.max_width
        for (name, *cells, last), style in zip(self._rows, self._styles, strict=True):
            if on_a_line:
                columns = zip((name, *cells), widths, strict=False)
                row = "  ".join(set_cell_size(cell, width) for cell, width in columns)
                yield Text.assemble("  ", row, "  ", (last, style))
            else:
                yield Padding(Text(name, overflow="fold"), (0, 0, 0, 2), expand=False)
                parts = (*map(Text, filter(None, cells)), Text(last, style))
                yield Padding(Text(", ").join(parts), (0, 0, 0, 6), expand=False)


# --- the other commands --------------------------------------------------------------------------


def retried(number: int, running: bool, away: Report | None) -> Text:
    """Return what comes next for so many sessions that were put back to work."""
    if not number:
        return Text("nothing is parked, held, waiting or refused")
    if not running:
        then = "regd does not run; start it: sudo systemctl start regd; or, once: regd scan"
    elif away:
        then = f"regd waits for {waits_for(away)}"
    else:
        then = "regd is at it; see: regd status"
    return Text(f"{count(number, 'session')} put back to work: {then}", overflow="ignore")


def forgotten(path: str, *, stays: bool) -> Text:
    """Return what comes of something that was forgotten."""
    then = "; it is still there, and the next scan finds it again" if stays else ""
    return Text(f"forgotten: {printable(path)}{then}", overflow="ignore")


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


def step(done: str, what: str, note: str = "", shown: str = "") -> Group:
    """Return one thing of what `regd install` does.

    Args:
        done: 'done', 'would do', 'kept', 'to do', 'wrong' or 'failed'.
        what: What it is about.
        note: Why, or what to type.
        shown: What a dry run prints of it.
    """
    colours = {"done": "green", "would do": "bold", "to do": "yellow"}
    colours |= {"failed": "red", "wrong": "red"}
    colour = colours.get(done, "dim")
    about = escape(what) + (f": {escape(note)}" if note else "")
    lines = [line(f"[{colour}]{done:8}[/{colour}] {about}")]
    lines += [line(f"         [dim]|[/dim] {escape(text)}") for text in shown.splitlines()]
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
