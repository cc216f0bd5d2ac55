"""A pass over the data root that finds whatever no event has told."""

from __future__ import annotations

import marshal
import os
import threading
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from regd import files
from regd.errors import InvalidPath, printable
from regd.files import Fields, Found
from regd.journal import FileRow, Journal, SessionRow
from regd.logs import get_logger
from regd.model import FileState, SessionPath, SessionState
from regd.paths import (
    SESSION_FORM,
    Ignored,
    could_become_session,
    is_date,
    is_utf8,
    parse_session,
)
from regd.pulse import Pulse
from regd.settings import Settings

_DAY_S = 86400.0
_log = get_logger()


@dataclass(slots=True)
class ScanResult:
    """What a scan counted.

    Attributes:
        sessions: Session folders seen.
        files: Files seen in them.
        noted: Folders of the sessions that need work.
        backlog_sessions: Old sessions, without a flag and unknown, that were left alone.
        backlog_files: The files in those.
        strays: What lies in no session: path, reason, hint.
    """

    sessions: int = 0
    files: int = 0
    noted: list[str] = field(default_factory=list)
    backlog_sessions: int = 0
    backlog_files: int = 0
    strays: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(slots=True)
class _Pass:
    """One scan: how it looks at things, and what it has seen."""

    now: float
    everything: bool
    rebuild: bool
    dry: bool
    result: ScanResult = field(default_factory=ScanResult)
    unchanged: list[tuple[int, float, bytes]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scanner:
    """Compares a data root with the journal.

    Attributes:
        root: The data root, resolved.
        settings: What to look for.
        journal: What is known.
        ignored: Says of a path below the root whether it is never looked at.
        stop: Set to end a scan early.
        between: Called between two folders; a scan of a large root takes long.
        pulse: Told that the scan advances.
    """

    root: Path
    settings: Settings
    journal: Journal
    ignored: Ignored
    stop: threading.Event
    between: Callable[[], None] = lambda: None
    pulse: Pulse = field(default_factory=Pulse)

    def scan(
        self,
        now: float,
        *,
        below: str = "",
        everything: bool = False,
        rebuild: bool = False,
        dry: bool = False,
    ) -> ScanResult:
        """Note every session below a folder that needs work.

        Args:
            now: Seconds since 1970.
            below: A folder below the data root; '' for all of it.
            everything: Whether to take old sessions, too, that have no flag and are unknown.
            rebuild: Whether to look at those, too, but take only those that Alyx knows.
            dry: Only count; the journal stays as it is.

        Raises:
            OSError: The folder cannot be read.
        """
        this = _Pass(now, everything, rebuild, dry)
        result = this.result
        try:
            with files.open_folder(self.root, below) as descriptor:
                self._enter(descriptor, below, this)
        except (FileNotFoundError, NotADirectoryError):
            if not below:
                raise
            return result  # it went away again
        if dry:
            return result
        self.journal.note_unchanged(this.unchanged)
        if self.stop.is_set():
            return result
        number = int(self.journal.fact("scan") or 0) + (0 if below else 1)
        for path, reason, hint in self.journal.write_strays(number, result.strays):
            _log.warning("stray.found", path=path, reason=reason, hint=hint)
        if not below:
            for row in self.journal.sessions(SessionState.PARKED, SessionState.HELD):
                if not os.path.lexists(self.root / row.folder):
                    self.journal.retry(row.folder)  # renamed or removed, maybe as it was asked for
            self.journal.drop_strays_before(number)
            self.journal.set_fact("scan", number)
            backlog = {"sessions": result.backlog_sessions, "files": result.backlog_files}
            self.journal.set_fact("backlog", {**backlog, "at": now})
        return result

    def _enter(self, descriptor: int, folder: str, this: _Pass) -> None:
        """Look at an open folder: a session, one that holds sessions, or one that is none."""
        parts = tuple(filter(None, folder.split("/")))
        try:
            session = parse_session(parts)
        except InvalidPath as error:
            if could_become_session(parts) and is_utf8(folder):
                self._look_inside(descriptor, folder, this)
            elif example := self._first_file(descriptor, folder):
                reason = f"{printable(folder)} is no session folder, but holds {example}"
                hint = error.hint if len(parts) in (3, 5) else f"sessions are {SESSION_FORM}"
                hint = f"rename it ({hint}), or name it in watch.ignore"
                this.result.strays.append((printable(folder), reason, hint))
        else:
            self._look(session, self._list(descriptor, folder), this)

    def _look_inside(self, descriptor: int, folder: str, this: _Pass) -> None:
        """Look at the folders in an open one that holds sessions, or folders of sessions."""
        self.between()
        holds_sessions = is_date(folder.rpartition("/")[2])
        seen = self.journal.listings(folder) if holds_sessions else {}
        with os.scandir(descriptor) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
        for entry in entries:
            if self.stop.is_set():
                return
            path = f"{folder}/{entry.name}" if folder else entry.name
            if self.ignored(path) and entry.name != self.settings.flag:
                continue
            if not entry.is_dir(follow_symlinks=False):
                this.result.strays.append(self._stray(path, is_link=entry.is_symlink()))
                continue
            try:
                inner = files.open_inner(descriptor, entry.name)
                try:
                    if (listing := seen.get(path)) is not None:
                        found = self._list(inner, path)
                        if self._digest(found) == listing:
                            this.result.sessions += 1
                            this.result.files += len(found)
                            continue
                    self._enter(inner, path, this)
                finally:
                    os.close(inner)
            except (FileNotFoundError, NotADirectoryError):
                continue  # it went away since it was listed
            except OSError as error:
                hint = "give regd's user the right to read it"
                shown = printable(path)
                this.result.strays.append((shown, f"{shown}: {error.strerror}", hint))

    def _stray(self, path: str, *, is_link: bool) -> tuple[str, str, str]:
        shown = printable(path)
        if is_link:
            reason = f"{shown} is a symbolic link, and links are not followed"
            hint = "use a mount"
        else:
            reason, hint = f"{shown} is in no session folder", f"sessions are {SESSION_FORM}"
        return shown, reason, f"{hint}; or name it in watch.ignore"

    def _first_file(self, descriptor: int, folder: str) -> str | None:
        """Return the path, below an open folder, of one file in it, or None."""
        flag = self.settings.flag
        ignored = copy(self.ignored)  # but for the flag, wherever it is
        ignored.fits_name = lambda name: name != flag and self.ignored.fits_name(name)
        paths = [
            path for path, *_ in files.list_open(descriptor, folder, ignored, beat=self.pulse.beat)
        ]
        return flag if flag in paths else printable(paths[0]) if paths else None

    def _list(self, descriptor: int, folder: str) -> list[Fields]:
        flag = self.settings.flag
        return files.list_open(descriptor, folder, self.ignored, flag, self.pulse.beat)

    def _digest(self, found: list[Fields]) -> bytes:
        """Return what is the same for a session folder in which nothing has changed."""
        # version 2 of the format: later ones depend on what else refers to a string
        content = marshal.dumps((found, self.settings.flag, self.settings.register.files), 2)
        return blake2b(content, digest_size=8).digest()

    def _look(self, session: SessionPath, listing: list[Fields], this: _Pass) -> None:
        """Count one session folder and note it if it needs work."""
        result = this.result
        flag = self.settings.flag
        found = [Found._make(fields) for fields in listing if fields[0] != flag]
        flagged = len(found) < len(listing)
        result.sessions += 1
        result.files += len(found)
        known = self.journal.known(session.folder)
        old = False
        if known is None:
            if not flagged and not found:
                return
            readable = [f for f in found if f.kind not in ("unreadable", "failing", "deep")]
            newest_s = max((f.modified_s for f in readable), default=this.now)
            old = this.now - newest_s > self.settings.scan.backlog_days * _DAY_S and not flagged
            if old and not this.everything and not this.rebuild:
                result.backlog_sessions += 1
                result.backlog_files += len(found)
                return
        elif not self._needs_work(*known, flagged, found):
            if known[0].state is SessionState.DONE:
                this.unchanged.append((known[0].id, known[0].changed_at, self._digest(listing)))
            return
        if this.dry:
            result.noted.append(session.folder)
            return
        other = self.journal.note(
            session,
            due_at=this.now,
            flagged=flagged,
            new_flag=flagged and not (known and known[0].flagged),
            asked=old and this.everything,  # never to be created only because the journal was lost
            held_until=this.now + self.settings.scan.every_s,
        )
        if other is None:
            result.noted.append(session.folder)
        else:
            reason = f"{session.folder} is the same session on Alyx as {other}"
            result.strays.append((session.folder, reason, "rename or merge one of the two folders"))

    def _needs_work(
        self,
        row: SessionRow,
        known: dict[str, FileRow],
        flagged: bool,
        found: list[Found],
    ) -> bool:
        if flagged and (not row.flagged or row.state is SessionState.DONE):
            return True
        if not self.settings.register.files:
            return False
        there = {f.path if is_utf8(f.path) else printable(f.path): f.signature for f in found}
        for path, signature in there.items():
            old = known.get(path)
            if old is None or old.signature != signature:
                return True
            if row.state is SessionState.DONE and old.state not in (
                FileState.REGISTERED,
                FileState.REFUSED,
            ):
                return True  # it was of no interest when its session was done
        # what was to be registered is gone, or was mended under another name
        return any(
            old.state is not FileState.REGISTERED and path not in there
            for path, old in known.items()
        )
