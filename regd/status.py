"""What a person is told: one report from the journal, for people and for programs."""

from __future__ import annotations

import datetime
import os
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from regd.alyx import AlyxClient
from regd.errors import (
    DataRootAway,
    InvalidPath,
    RegdError,
    Unauthorized,
)
from regd.glance import Situation, in_one_line
from regd.health import is_running as is_running
from regd.journal import FileRow, Journal, SessionRow, asides
from regd.model import FileState, SessionState
from regd.paths import parse_dataset
from regd.settings import Settings
from regd.worker import check_root

if TYPE_CHECKING:
    from regd.service import Service

_LISTED = 200  # sessions of one state that are listed one by one
_ALYX_WITHIN_S = 5.0
_QUEUED = (FileState.SETTLING, FileState.READY, FileState.PLACING)

Report = dict[str, Any]


def report(
    settings: Settings,
    journal: Journal,
    *,
    ask_alyx: bool = True,
    today: datetime.date | None = None,
) -> Report:
    """Return all that `regd status` shows.

    Args:
        settings: Where Alyx and the state folder are.
        journal: What is known.
        ask_alyx: Whether to find out if Alyx answers; without it, what the daemon knows counts.
        today: The rig's local date, if not by its clock.

    Returns:
        A dict that JSON can hold: ``at`` (when that was), ``data_root``, ``daemon``, ``alyx``,
        ``away`` (what all work waits for, or None), ``sessions`` and ``files`` (how many are in
        each state), ``day``, ``today`` (sessions recorded on it), ``today_sessions`` (how many of
        them are in each state), ``waiting``, ``working``, ``held``, ``parked`` (sessions),
        ``waiting_since`` (when the work came up that has waited longest), ``refused``,
        ``unfinished`` (files; the latter are written to for very long, or the disk fails on them),
        ``strays``, ``backlog``, ``problems`` (each a ``what``, ``reason`` and ``hint``: all that a
        person has to mend), ``needs_human`` (how many those are). Of sessions in one state 200 are
        listed at most. Times are seconds since 1970.
    """
    at = time.time()
    day = today or datetime.date.today()  # sessions are named by the local date
    sessions, in_files = journal.counts()
    refused = list(_grouped(journal.files_in(FileState.REFUSED)))
    strays = [
        {"path": path, "reason": reason, "hint": hint} for path, reason, hint in journal.strays()
    ]
    if settings.data_root is not None and settings.data_root.is_dir():
        # mended since the last scan
        refused = [f for f in refused if _is_there(settings, f"{f['session']}/{f['path']}")]
        strays = [s for s in strays if _is_there(settings, s["path"])]
    unfinished = list(_grouped(journal.files_in(*_QUEUED, hinted=True)))
    parked = _sessions(journal, SessionState.PARKED)
    running = is_running(settings.state_dir)
    away = journal.fact("away") if running else None
    problems = [
        *_of_the_whole(settings, journal, running, away),
        *({"what": s["session"], **s} for s in parked),
        *({"what": f"{f['session']}/{f['path']}", **f} for f in (*refused, *unfinished)),
        *({"what": s["path"], **s} for s in strays),
    ]
    return {
        "at": at,
        "data_root": journal.fact("data_root"),
        "daemon": {"running": running},
        "alyx": {"asked": ask_alyx or running, **_alyx(settings, away, ask=ask_alyx)},
        "away": away,
        "sessions": _named(sessions),
        "files": _named(in_files),
        "day": day.isoformat(),
        "today": _shown(journal, journal.sessions_of(day.isoformat(), limit=_LISTED)),
        "today_sessions": _named(journal.counts_of(day.isoformat())),
        "working": _sessions(journal, SessionState.WORKING),
        "waiting": _sessions(journal, SessionState.WAITING),
        "held": _sessions(journal, SessionState.HELD),
        "parked": parked,
        "refused": refused,
        "unfinished": unfinished,
        "strays": strays,
        "waiting_since": journal.waiting_since(),
        "backlog": journal.fact("backlog") or {"sessions": 0, "files": 0},
        "problems": [{key: p[key] for key in ("what", "reason", "hint")} for p in problems],
        "needs_human": len(problems) + sessions[SessionState.PARKED] - len(parked),
    }


def _named(counts: Mapping[Any, int]) -> dict[str, int]:
    return {str(state): count for state, count in counts.items()}


def _of_the_whole(
    settings: Settings, journal: Journal, running: bool, away: Report | None
) -> Iterable[Report]:
    """Yield what a person has to mend before any session can go on."""
    left, _ = journal.left()
    if left and not running:
        waits = "1 session waits" if left == 1 else f"{left} sessions wait"
        hint = "start it: sudo systemctl start regd; or, once: regd scan"
        yield {"what": "regd", "reason": f"the daemon is not running, and {waits}", "hint": hint}
    try:
        if settings.data_root is not None:
            check_root(settings.data_root, journal)
    except DataRootAway as error:
        yield {"what": str(settings.data_root), "reason": error.reason, "hint": error.hint}
    if away and away["kind"] in ("credentials", "owner"):
        yield {"what": {"credentials": "Alyx", "owner": "regd"}[away["kind"]], **away}
    for aside in asides(journal.path):
        hint = f"check the disk of state_dir, then: rm -r {shlex.quote(str(aside))}*"
        yield {
            "what": str(aside),
            "reason": "the journal was damaged; it was set aside, and a new one is built",
            "hint": hint,
        }


def story(settings: Settings, journal: Journal, row: SessionRow) -> Report:
    """Return all that is known of one session.

    Returns:
        A dict that JSON can hold: what `report` says of a session, and ``first_seen_at``, ``url``
        (its record on Alyx), ``history`` (each a ``what`` of `model.Happening`, ``about``,
        ``target``, ``times``, ``first_at``, ``last_at``), ``is_there`` (whether its folder is),
        and ``by_file``: of each file what the journal has of it, and its ``revision``.
    """
    (shown,) = _shown(journal, [row])
    url = f"{settings.alyx.url}/sessions/{row.eid}" if settings.alyx.url and row.eid else None
    there = settings.data_root is not None and _is_there(settings, row.folder)
    return {
        "at": time.time(),
        **shown,
        "url": url,
        "is_there": there,
        "first_seen_at": row.first_seen_at,
        "history": [
            {
                "what": str(event.name),
                "about": event.about,
                "target": event.target,
                "times": event.times,
                "first_at": event.first_at,
                "last_at": event.last_at,
            }
            for event in journal.history(row.id)
        ],
        "by_file": [
            {
                "path": file.path,
                "state": str(file.state),
                "size_bytes": file.signature.size,
                "md5": file.md5,
                "dataset_id": file.dataset_id,
                "revision": _revision(file.path),
                "move_to": file.move_to,
                "reason": file.reason,
                "hint": file.hint,
                "modified_at": file.signature.mtime_ns / 1e9,
                "first_seen_at": file.first_seen_at,
                "changed_at": file.changed_at,
            }
            for _, file in sorted(journal.files(row.id).items())
        ],
    }


def _revision(path: str) -> str | None:
    try:
        return parse_dataset(path).revision or None
    except InvalidPath:
        return None


def _is_there(settings: Settings, path: str) -> bool:
    # a name that is shown escaped cannot be looked up
    return "\\" in path or os.path.lexists(f"{settings.data_root}/{path}")


def _sessions(journal: Journal, state: SessionState) -> list[Report]:
    return _shown(journal, journal.sessions(state, limit=_LISTED))


def _shown(journal: Journal, rows: Sequence[SessionRow]) -> list[Report]:
    totals = journal.file_totals([row.id for row in rows])
    return [
        {
            "session": row.folder,
            "eid": row.eid,
            "state": str(row.state),
            "flagged": row.flagged,
            "attempt": row.attempt,
            "due_at": row.due_at,
            "since": row.waiting_since or row.changed_at,
            "files": {str(state): count for state, (count, _) in totals[row.id].items()},
            "size_bytes": sum(size for _, size in totals[row.id].values()),
            "registered_bytes": totals[row.id].get(FileState.REGISTERED, (0, 0))[1],
            "reason": row.reason,
            "hint": row.hint,
        }
        for row in rows
    ]


def _grouped(rows: list[tuple[str, FileRow]]) -> Iterable[Report]:
    """Yield the files with their session; a thousand of one kind stay a thousand entries."""
    for folder, group in groupby(rows, key=lambda pair: pair[0]):
        for _, row in group:
            yield {"session": folder, "path": row.path, "reason": row.reason, "hint": row.hint}


def _alyx(settings: Settings, away: Report | None, *, ask: bool) -> Report:
    """Return whether Alyx answers, and what is wrong with it or with the credentials.

    Who asks may lack the daemon's credentials; then what the daemon knows counts, or else that
    Alyx answers at all.
    """
    about = {"url": settings.alyx.url, "reachable": True, "reason": None, "hint": None}
    if away and away["kind"] in ("alyx", "credentials"):
        return {**about, "reachable": away["kind"] == "credentials", **away}
    if not ask:
        return about
    try:
        alyx = settings.alyx.model_copy(update={"timeout_s": _ALYX_WITHIN_S})
        quick = settings.model_copy(update={"alyx": alyx})
        with AlyxClient.from_settings(quick, sleep=_give_up) as client:
            if client.has_credentials:
                client.greet()
            else:
                client.ping()
    except RegdError as error:
        answers = isinstance(error, Unauthorized)
        return {**about, "reachable": answers, "reason": error.reason, "hint": error.hint}
    return about


def _give_up(_seconds: float) -> None:
    """Stand in for a wait: a person at the rig wants an answer now."""


# --- in one line ---------------------------------------------------------------------------------


class Summary:
    """The line that a running regd says of itself; cheap to ask for while nothing changes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._journal = service.journal
        self._changes: tuple[int, int] | None = None
        self._counted = Situation()

    def __call__(self) -> str:
        """Return the line as it is now."""
        if (changes := self._journal.changes()) != self._changes:
            self._counted = self._count()
            self._changes = changes
        return in_one_line(replace(self._counted, doing=self._doing()), time.time())

    def _doing(self) -> str:
        if self._service.scanning:
            return "scanning"
        if self._service.watching:
            return "watching"
        return "going by scans"

    def _count(self) -> Situation:
        sessions, in_files = self._journal.counts()
        strays = len(self._journal.strays())
        return Situation(
            working=sessions[SessionState.WORKING],
            waiting=sessions[SessionState.WAITING],
            held=sessions[SessionState.HELD],
            people=sessions[SessionState.PARKED] + in_files[FileState.REFUSED] + strays,
            files_left=sum(in_files[state] for state in _QUEUED),
            registered=in_files[FileState.REGISTERED],
            away=self._journal.fact("away"),
        )
