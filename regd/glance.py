"""The report at a glance: one statement, the chores it leaves to people, each session in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

Facts = Mapping[str, Any]

LISTED = 200
"""The most entries of one kind that are shown; more than that, nobody reads."""
_SHOWN_OF_A_CHORE = 50
_ON_THE_WAY = ("settling", "ready", "placing")
# a command in a hint, up to the next comma or semicolon that is not within quotes
_COMMAND = re.compile(
    r"(?:^|(?<=[:,;] ))(?:sudo|regd|systemctl|sysctl|chmod|rm) (?:'[^']*'|[^';,])+"
)


def glance(facts: Facts) -> dict[str, Any]:
    """Return a report with what a page shows of it, and no more of each kind than `LISTED`.

    Args:
        facts: As `regd.status.report` returns it.

    Returns:
        All of it, and: ``statement`` (as `statement` returns it),
        ``chores`` (what a person has to do, each with ``what``, ``reason``, ``hint``,
        ``commands``, ``count`` and ``items``), ``more_chores`` (how many are not listed), and in
        each session ``words`` (its state).
    """
    all_chores = chores(facts)
    shown: dict[str, Any] = {
        key: value[:LISTED] if isinstance(value, list) else value for key, value in facts.items()
    }
    for kind in ("today", "working", "waiting", "held", "parked"):
        shown[kind] = [{**s, "words": in_words(s, facts["away"])} for s in shown[kind]]
    shown["statement"] = statement(facts, len(all_chores))
    shown["chores"] = all_chores[:LISTED]
    not_told = facts["needs_human"] - len(facts["problems"])  # there are too many
    shown["more_chores"] = len(all_chores) - len(shown["chores"]) + not_told
    return shown


def statement(facts: Facts, chores: int) -> dict[str, Any]:
    """Return how things stand, in a sentence that is read from across the room.

    Args:
        facts: The report.
        chores: How many things a person has to do.

    Returns:
        ``state``: 'alarm' (a person is needed), 'waiting' (for Alyx), 'busy' or 'good';
        ``title``; ``text``; ``since`` (seconds since 1970, or None) with ``what_since`` (what that
        is); ``detail`` (what exactly is wrong, or None).
    """
    away = facts["away"]
    outage = away if away and away["kind"] == "alyx" else None
    left = facts["sessions"]["waiting"] + facts["sessions"]["working"]
    if chores:
        needs = "needs" if chores == 1 else "need"
        if outage:
            rest = "Besides, Alyx does not work; recordings are safe."
        elif facts["away"]:
            rest = "Until then nothing is registered; recordings are safe."
        elif left:
            rest = f"Everything else goes on: {_left(facts)}."
        elif facts["sessions"]["held"]:
            rest = "Everything else that is flagged is registered."
        else:
            rest = "Everything else is registered."
        title = f"{count(chores, 'thing')} {needs} you"
        return _statement("alarm", title, rest)
    if outage:
        text = "Recordings are safe. Nothing to do: regd goes on by itself."
        detail = " - ".join(filter(None, (outage["reason"], outage["hint"])))
        since = ("Since", outage["since"])
        return _statement("waiting", "Waiting for Alyx", text, since, detail)
    if left:
        text = "Files are registered once they are finished. Nothing to do."
        since = ("The oldest of it came up", facts["waiting_since"])
        return _statement("busy", f"Registering: {_left(facts)}", text, since)
    registered = count(facts["files"]["registered"], "file")
    if held := facts["sessions"]["held"]:
        none = "has no flag yet" if held == 1 else "have no flag yet"
        text = f"{registered} in all. On hold: {count(held, 'session')} that {none}."
        return _statement("good", "All that is flagged is registered", text)
    if not facts["sessions"]["done"]:
        text = "What is recorded appears here by itself."
        return _statement("good", "Nothing recorded yet", text)
    return _statement("good", "All registered", f"{registered} in all. Nothing to do.")


def _statement(
    state: str,
    title: str,
    text: str,
    since: tuple[str | None, float | None] = (None, None),
    detail: str | None = None,
) -> dict[str, Any]:
    return {
        "state": state,
        "title": title,
        "text": text,
        "what_since": since[0],
        "since": since[1],
        "detail": detail,
    }


def _left(facts: Facts) -> str:
    """Return what is still to be done: '3 sessions, 41 files left'."""
    sessions = facts["sessions"]["waiting"] + facts["sessions"]["working"]
    listed = [*facts["waiting"], *facts["working"]]
    files = sum(session["files"].get(state, 0) for session in listed for state in _ON_THE_WAY)
    if not files:  # its folder has not been looked at yet
        return f"{count(sessions, 'session')} left"
    more = "more than " if sessions > len(listed) else ""
    return f"{count(sessions, 'session')}, {more}{count(files, 'file')} left"


def in_words(session: Facts, away: Facts | None) -> str:
    """Return what is going on with one session of a report, and what all work waits for."""
    refused = session["files"].get("refused", 0)
    match session["state"]:
        case "done" if session["reason"]:  # the one there is
            return "its folder is gone"
        case "done" if refused:
            return f"registered, but for {count(refused, 'file')}"
        case "done":
            return "registered"
        case "working":
            return "being registered"
        case "held":
            return "on hold: it has no flag yet"
        case "parked":
            return "needs you"
    if away:
        return f"waits for {waits_for(away)}"
    if session["hint"] is not None:  # it failed
        return f"tried again: {session['reason']}"
    if session["reason"]:
        return f"waits: {session['reason']}"
    if session["files"].get("settling"):
        return "waits until its files are finished"
    return "next in line"


def chores(facts: Facts) -> list[dict[str, Any]]:
    """Return what a person has to do; files of one session that need the same are one chore."""
    of_session = {
        f"{file['session']}/{file['path']}": file["session"]
        for file in (*facts["refused"], *facts["unfinished"])
    }
    parked = {session["session"] for session in facts["parked"]}
    strays = {stray["path"] for stray in facts["strays"]}
    groups: dict[tuple[str, str], list[Facts]] = {}
    for problem in facts["problems"]:
        what = problem["what"]
        if what in parked:
            together = "sessions"
        elif what in of_session:
            together = f"files of {of_session[what]}"
        elif what in strays:
            together = "files or folders outside any session"
        else:
            together = what
        groups.setdefault((together, problem["hint"] or ""), []).append(problem)
    return [_chore(together, hint, group) for (together, hint), group in groups.items()]


def _chore(together: str, hint: str, group: Sequence[Facts]) -> dict[str, Any]:
    first = group[0]
    items = [{"what": p["what"], "reason": p["reason"]} for p in group[:_SHOWN_OF_A_CHORE]]
    return {
        "what": first["what"] if len(group) == 1 else f"{len(group)} {together}",
        "reason": first["reason"],
        "hint": hint,
        "commands": commands(hint),
        "count": len(group),
        "items": items if len(group) > 1 else [],
    }


def commands(hint: str) -> list[str]:
    """Return the commands that a hint says to type."""
    return [command.strip() for command in _COMMAND.findall(hint)]


_WAITS_FOR = {
    "alyx": "Alyx",
    "credentials": "credentials that Alyx takes",
    "root": "the data folder",
    "owner": "another regd to be gone",
}
_AWAY = {
    "alyx": "Alyx away",
    "credentials": "Alyx refuses the credentials",
    "root": "data folder away",
    "owner": "waits for another regd to be gone",
}


def waits_for(away: Facts) -> str:
    """Return what all work waits for."""
    return _WAITS_FOR[away["kind"]]


def is_away(away: Facts) -> str:
    """Return that, as what is the matter."""
    return _AWAY[away["kind"]]


def count(number: int, noun: str) -> str:
    """Return '1 file', '2 files', '12,000 files'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Situation:
    """What a running regd says of itself in one line.

    Attributes:
        working: Sessions that a worker is at.
        waiting: Those that wait.
        held: Those on hold until they have a flag.
        people: Sessions, files and strays that need a person.
        files_left: Files on their way to Alyx.
        registered: Files that are there.
        away: What all work waits for, as the journal's fact of that name says, or None.
        doing: What goes on beside the work, such as 'watching'.
    """

    working: int = 0
    waiting: int = 0
    held: int = 0
    people: int = 0
    files_left: int = 0
    registered: int = 0
    away: Facts | None = None
    doing: str = "watching"


def in_one_line(situation: Situation, now: float) -> str:
    """Return a situation in one line for people: ``3 sessions waiting, Alyx away since 14:02``.

    Args:
        situation: What to say.
        now: Seconds since 1970; a time of another day is told with its date.
    """
    s = situation
    parts = []
    if s.working:
        parts.append(f"{count(s.working, 'session')} in work")
    if s.waiting:
        parts.append(f"{s.waiting if s.working else count(s.waiting, 'session')} waiting")
    if parts and s.files_left:
        parts[-1] += f" ({count(s.files_left, 'file')} left)"
    if not parts:
        parts = ["all else registered" if s.people else "all registered"]
        if not (s.registered or s.held or s.people):
            parts = ["nothing recorded yet"]
    if s.held:
        parts.append(f"{s.held} held without a flag")
    if s.people:
        parts.append(f"{s.people} {'needs' if s.people == 1 else 'need'} a person: regd status")
    if s.away is not None:
        parts.append(f"{is_away(s.away)} since {_clock_time(s.away['since'], now)}")
    else:
        parts.append(s.doing)
    return ", ".join(parts)


def _clock_time(at: float, now: float) -> str:
    then, today = datetime.fromtimestamp(at), datetime.fromtimestamp(now)
    return then.strftime("%H:%M" if then.date() == today.date() else "%Y-%m-%d %H:%M")
