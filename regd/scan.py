"""A pass over the data root that finds whatever no event has told."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from regd import files
from regd.errors import InvalidPath, printable
from regd.journal import FileRow, Journal, SessionRow
from regd.logs import get_logger
from regd.model import FileState, SessionPath, SessionState
from regd.paths import (
    SESSION_FORM,
    Ignored,
    could_become_session,
    is_utf8,
    parse_session,
)
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


@dataclass(frozen=True, slots=True)
class Scanner:
    """Compares a data root with the journal.

    Attributes:
        root: The data root, resolved.
        settings: What to look for.
        journal: What is known.
        ignored: Says of a path below the root whether it is never looked at.
        stop: Set to end a scan early.
    """

    root: Path
    settings: Settings
    journal: Journal
    ignored: Ignored
    stop: threading.Event

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
        result = ScanResult()
        for session in self._sessions(below, result):
            if self.stop.is_set():
                return result
            self._look(session, now, result, everything=everything, rebuild=rebuild, dry=dry)
        if not dry:
            number = int(self.journal.fact("scan") or 0) + (0 if below else 1)
            for path, reason, hint in self.journal.write_strays(number, result.strays):
                _log.warning("stray.found", path=path, reason=reason, hint=hint)
            if not below:
                self.journal.drop_strays_before(number)
                self.journal.set_fact("scan", number)
                backlog = {"sessions": result.backlog_sessions, "files": result.backlog_files}
                self.journal.set_fact("backlog", {**backlog, "at": now})
        return result

    def _sessions(self, below: str, result: ScanResult) -> Iterator[SessionPath]:
        """Yield the session folders below a folder, and add what belongs to none to the strays."""
        stack = [below]
        while stack:
            folder = stack.pop()
            parts = tuple(filter(None, folder.split("/")))
            try:
                yield parse_session(parts)
            except InvalidPath as error:
                if could_become_session(parts) and is_utf8(folder):
                    stack.extend(self._open(folder, result))
                elif example := self._first_file(folder):
                    reason = f"{printable(folder)} is no session folder, but holds {example}"
                    hint = error.hint if len(parts) in (3, 5) else f"sessions are {SESSION_FORM}"
                    hint = f"rename it ({hint}), or name it in watch.ignore"
                    result.strays.append((printable(folder), reason, hint))

    def _open(self, folder: str, result: ScanResult) -> Iterator[str]:
        """Yield the folders in one that holds sessions, and add its files to the strays."""
        try:
            with files.open_folder(self.root, folder) as descriptor, os.scandir(descriptor) as all_:
                entries = sorted(all_, key=lambda e: e.name, reverse=True)
                yield from self._sort_out(folder, entries, result)
        except (FileNotFoundError, NotADirectoryError):
            if not folder:
                raise
        except OSError as error:
            if not folder:
                raise
            hint = "give regd's user the right to read it"
            result.strays.append((folder, f"{folder}: {error.strerror}", hint))

    def _sort_out(
        self, folder: str, entries: list[os.DirEntry[str]], result: ScanResult
    ) -> Iterator[str]:
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            is_flag = entry.name == self.settings.flag
            if self.ignored(path) and not is_flag:
                continue
            if entry.is_dir(follow_symlinks=False):
                yield path
                continue
            shown = printable(path)
            if entry.is_symlink():
                reason = f"{shown} is a symbolic link, and links are not followed"
                hint = "use a mount"
            else:
                reason, hint = f"{shown} is in no session folder", f"sessions are {SESSION_FORM}"
            hint = f"{hint}; or name it in watch.ignore"
            result.strays.append((shown, reason, hint))

    def _first_file(self, folder: str) -> str | None:
        """Return the path, below `folder`, of one file in it, or None."""
        flag = self.settings.flag
        try:
            if files.signature(self.root, f"{folder}/{flag}") is not None:
                return flag
            found = next(self._walk(folder), None)
        except OSError:
            return None
        return printable(found.path) if found else None

    def _walk(self, folder: str) -> Iterator[files.Found]:
        return files.walk(self.root, folder, self._is_ignored)

    def _is_ignored(self, path: str) -> bool:
        return self.ignored(path) and not path.endswith(f"/{self.settings.flag}")

    def _look(
        self,
        session: SessionPath,
        now: float,
        result: ScanResult,
        *,
        everything: bool,
        rebuild: bool,
        dry: bool,
    ) -> None:
        """Count one session folder and note it if it needs work."""
        try:
            found = list(self._walk(session.folder))
        except (FileNotFoundError, NotADirectoryError):
            return  # it went away since it was listed
        except OSError as error:
            reason = f"{session.folder}: {error.strerror}"
            result.strays.append((session.folder, reason, "give regd's user the right to read it"))
            return
        flagged = any(f.path == self.settings.flag for f in found)
        found = [f for f in found if f.path != self.settings.flag]
        result.sessions += 1
        result.files += len(found)
        known = self.journal.known(session.folder)
        old = False
        if known is None:
            if not flagged and not found:
                return
            readable = [f for f in found if f.kind not in ("unreadable", "deep")]
            newest_s = max((f.modified_s for f in readable), default=now)
            old = now - newest_s > self.settings.scan.backlog_days * _DAY_S and not flagged
            if old and not everything and not rebuild:
                result.backlog_sessions += 1
                result.backlog_files += len(found)
                return
        elif not self._needs_work(*known, flagged, found):
            return
        if dry:
            result.noted.append(session.folder)
            return
        other = self.journal.note(
            session,
            due_at=now,
            flagged=flagged,
            new_flag=flagged and not (known and known[0].flagged),
            asked=old and everything,  # never to be created only because the journal was lost
            held_until=now + self.settings.scan.every_s,
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
        found: list[files.Found],
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
        # what was to be registered is gone, or was mended under another name
        return any(
            old.state is not FileState.REGISTERED and path not in there
            for path, old in known.items()
        )
