"""What regd knows and has yet to do, in one SQLite file that survives a crash.

Every change of a state names the state it expects, and is one transaction. Another process may
read, ask for a scan, or put parked sessions back to work while the daemon runs.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, NamedTuple

from regd.errors import InvalidInput, InvalidPath, JournalDamaged, JournalFailed, NeedsHuman
from regd.model import FileState, Happening, SessionPath, SessionState, Signature
from regd.paths import parse_session

_STEPS: tuple[str, ...] = ()
"""The SQL that leads from schema version 1 to 2, from 2 to 3, ...; `schema.sql` is the last one."""
SCHEMA_VERSION = 1 + len(_STEPS)
UNKNOWN_OUTCOME_S = 75.0
"""How long a request whose outcome is unknown may still take to have an effect, in seconds."""
FILE_NAME = "journal.sqlite"
_SET_ASIDE = ".damaged-"
_EVENTS = 200  # of a session that are kept, moves left out


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A session as the journal knows it; the fields are the columns of `session`."""

    id: int
    folder: str
    state: SessionState
    flagged: bool
    asked: bool
    eid: str | None
    doubt: bool
    due_at: float
    attempt: int
    looked: int
    reason: str | None
    hint: str | None
    changed_at: float
    not_before: float
    creating_at: float | None
    waiting_since: float | None
    first_seen_at: float

    @property
    def path(self) -> SessionPath:
        """The session's parts."""
        return parse_session(tuple(self.folder.split("/")))


class FileRow(NamedTuple):
    """A file as the journal knows it; the fields are the columns of `file`."""

    path: str
    state: FileState
    signature: Signature
    md5: str | None = None
    dataset_id: str | None = None
    move_to: str | None = None
    reason: str | None = None
    hint: str | None = None
    first_seen_at: float = 0.0
    changed_at: float = 0.0


@dataclass(frozen=True, slots=True)
class EventRow:
    """What happened to a session, so many times on end; the fields are the columns of `event`."""

    name: Happening
    about: str | None
    target: str | None
    times: int
    first_at: float
    last_at: float


_SESSION_COLUMNS = (
    "id, folder, state, flagged, asked, eid, doubt, due_at, attempt, looked, reason, hint,"
    " changed_at, not_before, creating_at, waiting_since, first_seen_at"
)
_FILE_COLUMNS = (
    "path, state, size, mtime_ns, md5, dataset_id, move_to, reason, hint, first_seen_at, changed_at"
)


# SQLite sees that the index will do only if a query says so in the index's own words
_BY_STATE = "INDEXED BY file_state WHERE state <> 'registered'"
_DUE = "INDEXED BY session_due WHERE state IN ('waiting', 'held')"


def _session(row: Sequence[Any]) -> SessionRow:
    id_, folder, state, flagged, asked, eid, doubt, *rest = row
    return SessionRow(
        id_, folder, SessionState(state), bool(flagged), bool(asked), eid, bool(doubt), *rest
    )


def _file(row: Sequence[Any]) -> FileRow:
    path, state, size, mtime_ns, *rest = row
    return FileRow(path, FileState(state), Signature(size, mtime_ns), *rest)


# of the states in which a session rests, those that a note wakes it from
_WAKES = (
    "(state = 'done' OR (state = 'held' AND (:flagged OR :asked))"
    " OR (state = 'parked' AND :new_flag))"
)


class Journal:
    """The journal in one folder; safe to share between threads.

    Args:
        path: The SQLite file, made if it is missing.
        now: Seconds since 1970.
        read_only: Open an existing journal without the right to change it.
        check: Read all of it, to see that it is not damaged (4 s for a million files, from disk).

    Raises:
        NeedsHuman: There is none to read, or it is of another version of regd.
        JournalDamaged: It is no journal, or a damaged one.
        JournalFailed: It cannot be opened or written.
    """

    def __init__(
        self,
        path: Path,
        *,
        now: Callable[[], float],
        read_only: bool = False,
        check: bool = False,
    ) -> None:
        self.path = path
        self.damaged = False
        self._now = now
        self._lock = threading.RLock()
        self._commits = 0  # made by this object, and how many of them are flushed
        self._flushed = -1
        self._flushing = threading.Lock()
        self._asked = 0  # how often through this object, which SQLite does not tell
        if read_only and not self._is_there():
            raise NeedsHuman(
                f"there is no journal at {path}",
                hint="start regd: sudo systemctl start regd, or `regd run`; or, once: regd scan",
            )
        self._check_file(create=not read_only)
        with self._explained():
            self._db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}",
                uri=True,
                timeout=30.0,
                isolation_level=None,
                check_same_thread=False,
            )
        try:
            with self._explained():
                self._db.execute("PRAGMA foreign_keys = ON")
                self._check_version(migrating=not read_only)
                if not read_only:
                    self._prepare()
                if check:
                    self._check_pages()
        except BaseException:
            self._db.close()
            raise

    def _is_there(self) -> bool:
        try:
            return self.path.exists()
        except OSError as error:  # the state folder is its owner's alone
            hint = "run this as regd's user, such as: sudo -u regd regd status"
            raise self._failure(f"{error.strerror}", hint) from None

    def _check_file(self, *, create: bool) -> None:
        try:
            status = self.path.stat()
            if stat.S_ISDIR(status.st_mode):
                raise self._damage("it is a folder")
            if status.st_size == 0:
                raise self._damage("it is empty")
        except FileNotFoundError:
            if not create:
                raise
        except OSError as error:
            raise self._failure(f"{error.strerror}", _FAILURES[sqlite3.SQLITE_CANTOPEN]) from None
        else:
            return
        try:  # with these rights, which SQLite gives to the files beside it, too
            os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
        except OSError as error:
            raise self._failure(f"{error.strerror}", _FAILURES[sqlite3.SQLITE_CANTOPEN]) from None

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        # a power cut may undo the last commits, never damage the file; see durable()
        self._db.execute("PRAGMA synchronous = NORMAL")
        # a session of 100,000 files has 15 MB of rows
        self._db.execute("PRAGMA cache_size = -16384")
        with self._write():
            version = self._check_version(migrating=True)
            if version == SCHEMA_VERSION:
                return
            try:
                for script in _STEPS[version - 1 :] if version else [_schema()]:
                    for statement in _statements(script):
                        self._db.execute(statement)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode == sqlite3.SQLITE_ERROR:  # its tables are others
                    raise self._damage(str(error)) from error
                raise
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._check_version()

    def _check_version(self, *, migrating: bool = False) -> int:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if not 0 <= version <= SCHEMA_VERSION:
            raise NeedsHuman(
                f"the journal {self.path} is of a newer version of regd ({version})",
                hint="install that version, or move the journal away: a scan rebuilds it",
            )
        if 0 < version < SCHEMA_VERSION:
            if migrating:
                return int(version)
            raise NeedsHuman(
                f"the journal {self.path} is of an older version of regd ({version})",
                hint="start the daemon, or run `regd scan`: that brings it up to date",
            )
        columns = _columns(self._db)
        if columns != (_columns_wanted() if version else set()):
            raise self._damage("it holds other tables than regd's")
        return int(version)

    def _check_pages(self) -> None:
        ((found,),) = self._db.execute("PRAGMA integrity_check(1)").fetchall()
        if found != "ok":
            raise self._damage(found)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors that a person or a restart can mend into regd's own."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", None)
            # Python's own complaint about a text that is none has no code
            if code is None and "decode" not in str(error):
                raise
            code = sqlite3.SQLITE_CORRUPT if code is None else code & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self._damage(str(error)) from error
            if hint := _FAILURES.get(code):
                raise self._failure(str(error), hint) from error
            raise

    def _damage(self, what: str) -> JournalDamaged:
        self.damaged = True
        return JournalDamaged(
            f"the journal {self.path} is damaged: {what}",
            hint="start the daemon, or run `regd scan`: the journal is set aside and built anew",
        )

    def _failure(self, what: str, hint: str) -> JournalFailed:
        return JournalFailed(f"the journal {self.path} cannot be used: {what}", hint=hint)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained():
            if self._db.in_transaction:  # this thread is in `together`
                yield self._db
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
                self._commits += 1
            except BaseException:
                if self._db.in_transaction:  # a full disk may have ended it already
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make all changes of this thread in the block one: each alone would take a commit."""
        with self._write():
            yield

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._lock, self._explained():
            return self._db.execute(query, values).fetchall()

    def durable(self) -> None:
        """Return once all that was committed is on the disk, whatever happens to the power."""
        with self._lock:
            wanted = self._commits
        with self._flushing:
            if self._flushed >= wanted:
                return  # the flush that this one waited for took it along
            try:
                with self._lock:
                    commits = self._commits
                    wal = os.open(f"{self.path}-wal", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fdatasync(wal)
                finally:
                    os.close(wal)
            except FileNotFoundError:
                pass  # all of it has reached the file itself
            except OSError as error:
                hint = _FAILURES[sqlite3.SQLITE_IOERR]
                raise self._failure(f"{error.strerror}", hint) from error
            self._flushed = commits

    def version(self) -> tuple[int, int]:
        """Return what changes when another process changed the journal, or a scan was asked for."""
        (number,) = self._rows("PRAGMA data_version")[0]
        return int(number), self._asked

    def changes(self) -> tuple[int, int]:
        """Return what is another after each change of the journal, by this process or by others."""
        (number,) = self._rows("PRAGMA data_version")[0]
        return int(number), self._db.total_changes

    # --- facts and requests ----------------------------------------------------------------------

    def fact(self, name: str) -> Any:
        """Return the fact of that name, or None."""
        rows = self._rows("SELECT value FROM fact WHERE name = ?", name)
        try:
            return json.loads(rows[0][0]) if rows else None
        except ValueError:
            raise self._damage(f"its fact {name} cannot be read") from None

    def set_fact(self, name: str, value: Any) -> None:
        """Write down a fact: anything that JSON can hold."""
        with self._write() as db:
            db.execute(
                "INSERT INTO fact VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value",
                (name, json.dumps(value)),
            )

    def bind_root(self, root: Path) -> None:
        """Tie the journal to one data root.

        Raises:
            InvalidInput: It belongs to another one.
        """
        known = self.fact("data_root")
        if known is None:
            self.set_fact("data_root", str(root))
        elif known != str(root):
            raise InvalidInput(
                f"the journal {self.path} belongs to the data root {known}, not {root}",
                hint="give each data root its own state_dir",
            )

    def ask_scan(self, *, everything: bool) -> int:
        """Ask the daemon for a scan and return the request's number."""
        with self._write() as db:
            cursor = db.execute(
                "INSERT INTO request (kind, everything, asked_at) VALUES ('scan', ?, ?)",
                (everything, self._now()),
            )
            self._asked += 1
            return int(cursor.lastrowid or 0)

    def take_scan(self) -> bool | None:
        """Take all scans asked for; return whether one is of everything, or None if none is."""
        with self._write() as db:
            rows = db.execute(
                "UPDATE request SET state = 'running' WHERE state IN ('asked', 'running')"
                " RETURNING everything"
            ).fetchall()
        return any(everything for (everything,) in rows) if rows else None

    def finish_scans(self) -> None:
        """Note that the scans taken have run."""
        with self._write() as db:
            db.execute("UPDATE request SET state = 'done' WHERE state = 'running'")
            db.execute(
                "DELETE FROM request WHERE state = 'done' AND asked_at < ?", (self._now() - 86400,)
            )

    def scan_done(self, request: int) -> bool:
        """Say whether the scan asked for under that number has run."""
        rows = self._rows("SELECT state FROM request WHERE id = ?", request)
        return not rows or rows[0][0] == "done"

    # --- sessions --------------------------------------------------------------------------------

    def note(
        self,
        session: SessionPath,
        *,
        due_at: float,
        flagged: bool = False,
        new_flag: bool = False,
        asked: bool = False,
        held_until: float | None = None,
    ) -> str | None:
        """Note that a session may need work at `due_at`; make its row if it has none.

        A parked session stays so unless there is a `new_flag`: a person saying go on. A held one
        is looked at again when it has a flag, or else not before `held_until`.

        Returns:
            The folder of another row that is the same session on Alyx, in which case nothing is
            noted; or None.
        """
        subject, date, number = session.key
        with self._write() as db:
            row = db.execute(
                "SELECT folder FROM session WHERE subject = ? AND date = ? AND number = ?",
                (subject, date, number),
            ).fetchone()
            if row is not None and row[0] != session.folder:
                return str(row[0])
            db.execute(
                f"""
                INSERT INTO session
                    (folder, subject, date, number, flagged, asked, due_at, first_seen_at,
                     changed_at, waiting_since)
                VALUES (:folder, :subject, :date, :number, :flagged, :asked, :due_at, :now, :now,
                        :now)
                ON CONFLICT (folder) DO UPDATE SET
                    flagged    = flagged OR :flagged,
                    asked      = asked OR :asked,
                    state      = CASE WHEN {_WAKES} THEN 'waiting' ELSE state END,
                    attempt    = CASE WHEN {_WAKES} THEN 0 ELSE attempt END,
                    changed_at = CASE WHEN {_WAKES} THEN :now ELSE changed_at END,
                    waiting_since = CASE WHEN {_WAKES} THEN :now ELSE waiting_since END,
                    due_at     = CASE WHEN {_WAKES} THEN :due_at
                                      WHEN state = 'held' THEN min(due_at, :held_until)
                                      WHEN state = 'waiting'
                                      THEN max(not_before, min(due_at, :due_at))
                                      ELSE due_at END,
                    hinted_at  = CASE WHEN state = 'working'
                                      THEN min(coalesce(hinted_at, :due_at), :due_at) END
                """,  # noqa: S608
                {
                    "folder": session.folder,
                    "subject": subject,
                    "date": date,
                    "number": number,
                    "flagged": flagged,
                    "new_flag": new_flag,
                    "asked": asked,
                    "due_at": due_at,
                    "held_until": due_at if held_until is None else held_until,
                    "now": self._now(),
                },
            )
        return None

    def hurry(self, folder: str) -> None:
        """Have a session that waits looked at as soon as it may be, or in work once more."""
        with self._write() as db:
            db.execute(
                "UPDATE session SET hinted_at = iif(state = 'working', :now, hinted_at),"
                " due_at = iif(state = 'working', due_at, max(not_before, min(due_at, :now)))"
                " WHERE folder = :folder AND state IN ('waiting', 'working')",
                {"folder": folder, "now": self._now()},
            )

    def claim(self) -> SessionRow | None:
        """Take the session that has been due longest; return None if none is due."""
        with self._write() as db:
            row = db.execute(
                f"""
                UPDATE session SET state = 'working', hinted_at = NULL, listing = NULL,
                    changed_at = :now, waiting_since = coalesce(waiting_since, :now)
                WHERE id = (
                    SELECT id FROM session {_DUE} AND due_at <= :now ORDER BY due_at LIMIT 1
                ) AND state IN ('waiting', 'held')
                RETURNING {_SESSION_COLUMNS}
                """,  # noqa: S608 - the columns are a constant
                {"now": self._now()},
            ).fetchone()
        return _session(row) if row else None

    def listings(self, folder: str) -> dict[str, bytes]:
        """Return the digests that `note_unchanged` wrote of the sessions in one folder."""
        rows = self._rows(
            "SELECT folder, listing FROM session"
            " WHERE folder > ? AND folder < ? AND listing IS NOT NULL",
            f"{folder}/",
            f"{folder}0",  # the character after '/'
        )
        return dict(rows)

    def note_unchanged(self, sessions: Sequence[tuple[int, float, bytes]]) -> None:
        """Write down that nothing is to be done where a session's folder looks as it did.

        Args:
            sessions: Of each its id, its `changed_at` when that was found, and a digest of how its
                folder looked. One that was worked on since then is passed over.
        """
        with self._write() as db:
            db.executemany(
                "UPDATE session SET listing = ? WHERE id = ? AND changed_at = ? AND state = 'done'",
                [(listing, session, changed_at) for session, changed_at, listing in sessions],
            )

    def next_due_at(self) -> float | None:
        """Return when the next waiting or held session is due, or None if there is none."""
        due_at: float | None
        ((due_at,),) = self._rows(f"SELECT min(due_at) FROM session {_DUE}")  # noqa: S608
        return due_at

    def release(
        self,
        session: int,
        state: SessionState,
        *,
        due_at: float = 0.0,
        not_before: float = 0.0,
        attempt: int = 0,
        looked: int = 0,
        reason: str | None = None,
        hint: str | None = None,
    ) -> None:
        """Give a claimed session back in its next state; what came up meanwhile keeps it due.

        Not where it is parked: a person is asked once, not with every file that is written. One
        that waits with a hint (it may be empty) has failed; without one it only waits.
        """
        with self._write() as db:
            given = db.execute(
                """
                UPDATE session SET
                    state = CASE WHEN hinted_at IS NULL OR :state = 'parked' THEN :state
                                 ELSE 'waiting' END,
                    due_at = CASE WHEN hinted_at IS NULL THEN :due_at
                                  WHEN :state = 'waiting'
                                  THEN max(:not_before, min(hinted_at, :due_at))
                                  ELSE hinted_at END,
                    not_before = :not_before, hinted_at = NULL, attempt = :attempt,
                    looked = :looked, reason = :reason, hint = :hint,
                    waiting_since = CASE WHEN :state = 'waiting' THEN waiting_since
                                         WHEN hinted_at IS NULL OR :state = 'parked' THEN NULL
                                         ELSE :now END,
                    changed_at = :now
                WHERE id = :id AND state = 'working'
                """,
                {
                    "id": session,
                    "state": state,
                    "due_at": due_at,
                    "not_before": not_before,
                    "attempt": attempt,
                    "looked": looked,
                    "reason": reason,
                    "hint": hint,
                    "now": self._now(),
                },
            ).rowcount
            if given and (state is not SessionState.WAITING or hint is not None):
                failed = state is SessionState.WAITING
                self._happened(session, Happening.FAILED if failed else Happening(state), reason)

    def recover(self, arrives_s: float = UNKNOWN_OUTCOME_S) -> int:
        """Put back what a process that is gone had in work; return how many sessions that were.

        Args:
            arrives_s: How long what it sent may still take to have an effect.
        """
        with self._write() as db:
            sessions = db.execute(
                """
                UPDATE session SET state = 'waiting', doubt = 1,
                    -- files that were sent may be on their way: none is sent before they arrive;
                    -- without a UUID none was, and its creation is waited for where it is asked for
                    not_before = iif(eid IS NULL, 0, :now + :arrives_s),
                    due_at = iif(eid IS NULL, :now, :now + :arrives_s),
                    creating_at = iif(creating_at IS NULL, NULL, :now),
                    reason = iif(eid IS NULL, reason,
                                 'regd ended while at it, and what it sent may still arrive')
                WHERE state = 'working'
                RETURNING id
                """,
                {"now": self._now(), "arrives_s": arrives_s},
            ).fetchall()
            for (session,) in sessions:
                self._happened(session, Happening.INTERRUPTED)
        return len(sessions)

    def shift(self, by_s: float) -> None:
        """Keep every wait as long as it was, after the clock was set by so many seconds."""
        with self._write() as db:
            db.execute(
                "UPDATE session SET due_at = due_at + :by, hinted_at = hinted_at + :by,"
                " waiting_since = waiting_since + :by,"
                " not_before = CASE WHEN not_before > 0 THEN not_before + :by ELSE 0 END"
                " WHERE state IN ('waiting', 'held', 'working')",
                {"by": by_s},
            )
            db.execute(
                "UPDATE session SET creating_at = creating_at + ? WHERE creating_at IS NOT NULL",
                (by_s,),
            )

    def clamp(self, waiting_s: float, held_s: float) -> int:
        """Have soon what waits longer than anything can; return how many sessions that were.

        The clock was set back while nobody was there to see it.

        Args:
            waiting_s: The longest that a waiting session can wait, in seconds.
            held_s: The longest that a held one can.
        """
        with self._write() as db:
            db.execute(
                "UPDATE session SET creating_at = :now WHERE creating_at > :now",
                {"now": self._now()},
            )
            db.execute(
                "UPDATE session SET waiting_since = :now WHERE waiting_since > :now",
                {"now": self._now()},
            )
            return db.execute(
                "UPDATE session SET due_at = max(:now, min(not_before, :soon)),"
                " not_before = min(not_before, :soon)"
                " WHERE state IN ('waiting', 'held')"
                " AND due_at > :now + CASE state WHEN 'held' THEN :held ELSE :waiting END",
                {
                    "now": self._now(),
                    "soon": self._now() + UNKNOWN_OUTCOME_S,
                    "waiting": waiting_s,
                    "held": held_s,
                },
            ).rowcount

    def doubt_all(self) -> None:
        """Note that Alyx may hold more than the journal says: a power cut undoes commits."""
        with self._write() as db:
            db.execute("UPDATE session SET doubt = 1 WHERE doubt = 0")

    def set_creating(self, session: int, creating: bool) -> None:
        """Note that a session's creation is sent now, or that nothing of it is on its way."""
        with self._write() as db:
            db.execute(
                "UPDATE session SET creating_at = ? WHERE id = ?",
                (self._now() if creating else None, session),
            )

    def identify(self, session: int, eid: str, *, doubt: bool) -> None:
        """Write down a session's UUID, and whether Alyx may hold datasets of it already."""
        with self._write() as db:
            if db.execute(
                "UPDATE session SET eid = ?, doubt = ?, creating_at = NULL"
                " WHERE id = ? AND state = 'working'",
                (eid, doubt, session),
            ).rowcount:
                self._happened(session, Happening.FOUND if doubt else Happening.CREATED, eid)

    def forget_alyx(self, session: int) -> None:
        """Forget what was known of a session on Alyx, where it is no longer."""
        with self._write() as db:
            db.execute("UPDATE session SET eid = NULL, doubt = 1 WHERE id = ?", (session,))
            db.execute("DELETE FROM file WHERE session_id = ? AND state <> 'placing'", (session,))
            self._happened(session, Happening.LOST)

    def set_doubt(self, session: int, doubt: bool) -> None:
        """Note whether Alyx may hold datasets of the session that the journal does not know."""
        with self._write() as db:
            db.execute("UPDATE session SET doubt = ? WHERE id = ?", (doubt, session))

    def unflagged(self, session: int) -> None:
        """Note that the session's flag is gone."""
        with self._write() as db:
            if db.execute(
                "UPDATE session SET flagged = 0 WHERE id = ? AND flagged", (session,)
            ).rowcount:
                self._happened(session, Happening.UNFLAGGED)

    def retry(self, folder: str | None) -> int:
        """Put parked and held sessions back to work, with their refused files.

        Args:
            folder: One session's folder, whatever its state: all of it is compared with Alyx.
                None for all that are parked or held, or have refused files.

        Returns:
            How many sessions that were.
        """
        with self._write() as db:
            sessions = db.execute(
                """
                UPDATE session SET state = 'waiting', due_at = max(:now, not_before), attempt = 0,
                    looked = 0, reason = NULL, hint = NULL, changed_at = :now, waiting_since = :now
                WHERE (:folder IS NULL OR folder = :folder) AND state <> 'working' AND (
                    state IN ('parked', 'held', 'waiting') OR :folder IS NOT NULL
                    OR id IN (SELECT session_id FROM file WHERE state = 'refused'))
                RETURNING id
                """,
                {"now": self._now(), "folder": folder},
            ).fetchall()
            db.executemany("DELETE FROM file WHERE session_id = ? AND state = 'refused'", sessions)
            if folder is not None:  # a person doubts what the journal says: Alyx is asked for all
                db.executemany("UPDATE session SET eid = NULL, doubt = 1 WHERE id = ?", sessions)
                db.executemany(
                    "UPDATE file SET state = 'ready', dataset_id = NULL"
                    " WHERE session_id = ? AND state = 'registered'",
                    sessions,
                )
            for (session,) in sessions:
                self._happened(session, Happening.RESUMED)
        return len(sessions)

    def forget(self, session: int, *, is_gone: bool = False) -> None:
        """Forget a session with its files and its history.

        Args:
            session: Its id.
            is_gone: Whether its folder is surely no longer there, and with it all that is moved.

        Raises:
            NeedsHuman: It is in work, or one of its files is being moved: only the journal knows
                where from and where to.
        """
        with self._write() as db:
            ((folder, state),) = db.execute(
                "SELECT folder, state FROM session WHERE id = ?", (session,)
            ).fetchall()
            if state == SessionState.WORKING:
                hint = "wait until regd has done with it, or stop regd"
                raise NeedsHuman(f"{folder} is being worked on", hint=hint)
            moving = db.execute(
                "SELECT path FROM file WHERE session_id = ? AND state = 'placing'", (session,)
            ).fetchone()
            if moving and not is_gone:
                raise NeedsHuman(
                    f"the move of {folder}/{moving[0]} into a revision folder has not ended, and"
                    " only the journal knows of it",
                    hint=f"let regd end it: regd retry {folder}",
                )
            db.execute("DELETE FROM session WHERE id = ?", (session,))

    def _happened(
        self, session: int, name: Happening, about: str | None = None, target: str | None = None
    ) -> None:
        """Add to a session's history, within a transaction."""
        now = self._now()
        last = self._db.execute(
            "SELECT number, name, about, target FROM event WHERE session_id = ?"
            " ORDER BY number DESC LIMIT 1",
            (session,),
        ).fetchone()
        number = last[0] if last else 0
        if last and last[1:] == (name, about, target):
            self._db.execute(
                "UPDATE event SET times = times + 1, last_at = ?"
                " WHERE session_id = ? AND number = ?",
                (now, session, number),
            )
            return
        self._db.execute(
            "INSERT INTO event (session_id, number, name, about, target, first_at, last_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (session, number + 1, name, about, target, now, now),
        )
        if name is not Happening.MOVED and number >= _EVENTS:
            self._db.execute(
                "DELETE FROM event WHERE session_id = ? AND number <= ? AND name <> 'moved'",
                (session, number + 1 - _EVENTS),
            )

    def history(self, session: int) -> list[EventRow]:
        """Return what happened to a session, the first first."""
        return [
            EventRow(Happening(name), *rest)
            for name, *rest in self._rows(
                "SELECT name, about, target, times, first_at, last_at FROM event"
                " WHERE session_id = ? ORDER BY number",
                session,
            )
        ]

    def session(self, folder: str) -> SessionRow | None:
        """Return the session of that folder, or None."""
        rows = self._rows(
            f"SELECT {_SESSION_COLUMNS} FROM session WHERE folder = ?",  # noqa: S608
            folder,
        )
        return _session(rows[0]) if rows else None

    def sessions(self, *states: SessionState, limit: int = -1) -> list[SessionRow]:
        """Return the sessions in those states (all if none is named), the latest change first."""
        where = f"WHERE state IN ({','.join('?' * len(states))})" if states else ""
        return [
            _session(row)
            for row in self._rows(
                f"SELECT {_SESSION_COLUMNS} FROM session {where}"  # noqa: S608
                " ORDER BY changed_at DESC LIMIT ?",
                *states,
                limit,
            )
        ]

    def sessions_of(self, date: str, limit: int = -1) -> list[SessionRow]:
        """Return the sessions recorded on that day (YYYY-MM-DD), by folder.

        Where there are more than `limit`, those that are not done go first, then the latest.
        """
        found = [
            _session(row)
            for row in self._rows(
                f"SELECT {_SESSION_COLUMNS} FROM session"  # noqa: S608
                " WHERE date = ? ORDER BY state = 'done', changed_at DESC, folder LIMIT ?",
                date,
                limit,
            )
        ]
        return sorted(found, key=lambda row: row.folder)

    def counts_of(self, date: str) -> dict[SessionState, int]:
        """Return how many sessions recorded on that day are in each state."""
        counts = dict(
            self._rows("SELECT state, count(*) FROM session WHERE date = ? GROUP BY state", date)
        )
        return {state: counts.get(state, 0) for state in SessionState}

    def names(self, limit: int) -> list[str]:
        """Return the folders of the sessions that changed last."""
        return [row.folder for row in self.sessions(limit=limit)]

    def problems(self, limit: int) -> list[str]:
        """Return the folders of sessions that are parked or held, and what lies in no session."""
        rows = self.sessions(SessionState.PARKED, SessionState.HELD, limit=limit)
        return [*(row.folder for row in rows), *(path for path, _, _ in self.strays())]

    def find(self, name: str, limit: int = 20) -> list[SessionRow]:
        """Return the sessions that a person may mean, the latest date first.

        Args:
            name: A UUID; or subject, date and number; or how a folder ends; or, if none ends so,
                any part of one: whole names, with '/' between them.
            limit: The most that are returned.
        """
        try:
            subject, date, number = parse_session(tuple(name.split("/"))[-3:]).key
        except InvalidPath:
            pass
        else:
            if rows := self._find("(subject, date, number) = (?, ?, ?)", subject, date, number):
                return rows
        return (
            self._find("eid = ?", name.lower())
            or self._find("substr('/' || folder, -length(?1) - 1) = '/' || ?1", name, limit=limit)
            or self._find("instr('/' || folder || '/', '/' || ? || '/')", name, limit=limit)
        )

    def _find(self, where: str, *values: Any, limit: int = 1) -> list[SessionRow]:
        return [
            _session(row)
            for row in self._rows(
                f"SELECT {_SESSION_COLUMNS} FROM session WHERE {where}"  # noqa: S608
                " ORDER BY date DESC, folder LIMIT ?",
                *values,
                limit,
            )
        ]

    # --- files -----------------------------------------------------------------------------------

    def file_totals(self, sessions: Sequence[int]) -> dict[int, dict[FileState, tuple[int, int]]]:
        """Return how many files, of how many bytes, some sessions have in each state."""
        totals: dict[int, dict[FileState, tuple[int, int]]] = {session: {} for session in sessions}
        rows = self._rows(
            "SELECT session_id, state, count(*), sum(size) FROM file"
            " WHERE session_id IN (SELECT value FROM json_each(?)) GROUP BY session_id, state",
            json.dumps(sessions),
        )
        for session, state, count, size in rows:
            totals[session][FileState(state)] = count, size
        return totals

    def files(self, session: int) -> dict[str, FileRow]:
        """Return what is known of a session's files, by their path below it."""
        rows = self._rows(
            f"SELECT {_FILE_COLUMNS} FROM file WHERE session_id = ?",  # noqa: S608
            session,
        )
        return {row[0]: _file(row) for row in rows}

    def states_left(self, session: int) -> set[FileState]:
        """Return the states of a session's files that Alyx has not, however many they are."""
        rows = self._rows(
            "SELECT one.state FROM"  # noqa: S608
            " (SELECT 'settling' AS state UNION ALL SELECT 'ready' UNION ALL SELECT 'placing'"
            " UNION ALL SELECT 'refused') AS one"
            f" WHERE EXISTS (SELECT 1 FROM file {_BY_STATE}"
            " AND state = one.state AND session_id = ?)",
            session,
        )
        return {FileState(state) for (state,) in rows}

    def ready_files(self, session: int, limit: int) -> list[FileRow]:
        """Return at most `limit` files that are ready to be registered; all of them if it is -1."""
        rows = self._rows(
            f"SELECT {_FILE_COLUMNS} FROM file {_BY_STATE}"  # noqa: S608
            " AND state = 'ready' AND session_id = ? ORDER BY path LIMIT ?",
            session,
            limit,
        )
        return [_file(row) for row in rows]

    def known(self, folder: str) -> tuple[SessionRow, dict[str, FileRow]] | None:
        """Return a session and its files, or None if it is not known."""
        with self._lock:
            row = self.session(folder)
            return (row, self.files(row.id)) if row else None

    def write_files(self, session: int, rows: Iterable[FileRow], gone: Sequence[str] = ()) -> None:
        """Write files as they are now, and forget those that are `gone`, in one transaction."""
        now = self._now()
        with self._write() as db:
            if gone:
                db.executemany(
                    "DELETE FROM file WHERE session_id = ? AND path = ?",
                    [(session, path) for path in gone],
                )
            db.executemany(
                "INSERT OR REPLACE INTO file VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                [
                    (
                        session,
                        r.path,
                        r.state,
                        r.signature.size,
                        r.signature.mtime_ns,
                        r.md5,
                        r.dataset_id,
                        r.move_to,
                        r.reason,
                        r.hint,
                        r.first_seen_at or now,
                        now,
                    )
                    for r in rows
                ],
            )

    def moved(self, session: int, path: str, row: FileRow) -> None:
        """Write a file as it is after its move from `path`."""
        with self._write():
            self.write_files(session, [row], [path])
            self._happened(session, Happening.MOVED, path, row.path)

    def files_in(self, *states: FileState, hinted: bool = False) -> list[tuple[str, FileRow]]:
        """Return every file in those states, with its session's folder.

        Args:
            states: One or more.
            hinted: Whether to return only those that a person can do something about.
        """
        # the index of those that are not registered is used only where SQLite sees that it may be
        indexed = "" if FileState.REGISTERED in states else "AND file.state <> 'registered'"
        return [
            (row[0], _file(row[1:]))
            for row in self._rows(
                f"SELECT folder, {', '.join('file.' + c for c in _FILE_COLUMNS.split(', '))}"  # noqa: S608
                f" FROM file JOIN session ON session.id = session_id"
                f" WHERE file.state IN ({','.join('?' * len(states))}) {indexed}"
                f" {'AND file.hint IS NOT NULL' if hinted else ''} ORDER BY folder, path",
                *states,
            )
        ]

    # --- strays, counts --------------------------------------------------------------------------

    def write_strays(
        self, scan: int, strays: Sequence[tuple[str, str, str]]
    ) -> list[tuple[str, str, str]]:
        """Note what lies outside any session (path, reason, hint); return what is new of it."""
        now = self._now()
        with self._write() as db:
            known = {path for (path,) in db.execute("SELECT path FROM stray")}
            db.executemany(
                "INSERT OR REPLACE INTO stray VALUES (?, ?, ?, ?, ?)",
                [(path, reason, hint, scan, now) for path, reason, hint in strays],
            )
        return [stray for stray in strays if stray[0] not in known]

    def drop_strays_before(self, scan: int) -> None:
        """Forget what a whole scan of that number has not seen again."""
        with self._write() as db:
            db.execute("DELETE FROM stray WHERE scan < ?", (scan,))

    def forget_stray(self, path: str) -> bool:
        """Forget what lies outside any session; return whether it was known."""
        with self._write() as db:
            return bool(db.execute("DELETE FROM stray WHERE path = ?", (path,)).rowcount)

    def strays(self) -> list[tuple[str, str, str]]:
        """Return path, reason and hint of all that lies outside any session."""
        return [tuple(row) for row in self._rows("SELECT path, reason, hint FROM stray")]

    def left(self) -> tuple[int, int]:
        """Return how many sessions wait or are in work, and how many files are on their way."""
        (sessions,) = self._rows(
            "SELECT count(*) FROM session WHERE state IN ('waiting', 'working')"
        )
        (files,) = self._rows(
            f"SELECT count(*) FROM file {_BY_STATE}"  # noqa: S608
            " AND state IN ('settling', 'ready', 'placing')"
        )
        return sessions[0], files[0]

    def waiting_since(self) -> float | None:
        """Return since when the session waits that has waited longest, or None if none does."""
        since: float | None
        ((since,),) = self._rows(
            "SELECT min(waiting_since) FROM session WHERE state IN ('waiting', 'working')"
        )
        return since

    def is_unfinished(self) -> bool:
        """Say whether any session is in work, is due, or waits but not for another attempt."""
        query = (
            "SELECT EXISTS (SELECT 1 FROM session WHERE state = 'working'"
            " OR (state = 'waiting' AND (attempt = 0 OR due_at <= ?)))"
        )
        return bool(self._rows(query, self._now())[0][0])

    def counts(self) -> tuple[dict[SessionState, int], dict[FileState, int]]:
        """Return how many sessions and how many files are in each state."""
        sessions = dict(self._rows("SELECT state, count(*) FROM session GROUP BY state"))
        # few files are in any other state, and these have an index: 44 ms for a million, not 380
        files = dict(
            self._rows(
                "SELECT state, count(*) FROM file WHERE state <> 'registered' GROUP BY state"
                " UNION ALL SELECT 'registered', count(*) FROM file"
            )
        )
        registered = files.pop(FileState.REGISTERED)
        files[FileState.REGISTERED] = registered - sum(files.values())
        return (
            {state: sessions.get(state, 0) for state in SessionState},
            {state: files.get(state, 0) for state in FileState},
        )


def set_aside(path: Path, now: float) -> Path:
    """Rename a damaged journal and its -wal, which nobody has open, and return its new name.

    Raises:
        OSError: It cannot be renamed.
    """
    stamp = datetime.datetime.fromtimestamp(now, datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    name = f"{path.name}{_SET_ASIDE}{stamp}"
    aside = path.with_name(name)
    while os.path.lexists(aside):
        name += "+"
        aside = path.with_name(name)
    with contextlib.suppress(FileNotFoundError):
        path.with_name(f"{path.name}-wal").rename(path.with_name(f"{name}-wal"))
    with contextlib.suppress(FileNotFoundError):
        path.with_name(f"{path.name}-shm").unlink()
    path.rename(aside)
    return aside


def asides(path: Path) -> list[Path]:
    """Return the damaged journals that lie beside one, the oldest first."""
    found = path.parent.glob(f"{path.name}{_SET_ASIDE}*")
    return sorted(file for file in found if not file.name.endswith("-wal"))


# by SQLite's result code: what a person can do about it
_FAILURES = {
    sqlite3.SQLITE_FULL: "free some space on the disk of state_dir; then start regd, or have its"
    " service do it",
    sqlite3.SQLITE_IOERR: "check the disk of state_dir, and free some space on it",
    sqlite3.SQLITE_CANTOPEN: "run this as regd's user; check the rights and the free space of "
    "state_dir",
    sqlite3.SQLITE_READONLY: "run this as regd's user; check that state_dir can be written",
    sqlite3.SQLITE_PERM: "run this as regd's user; check the rights of state_dir",
    sqlite3.SQLITE_BUSY: "end the other program that works on the journal in state_dir",
    sqlite3.SQLITE_LOCKED: "end the other program that works on the journal in state_dir",
    sqlite3.SQLITE_PROTOCOL: "end the other program that works on the journal in state_dir",
}


def _schema() -> str:
    return package_files("regd").joinpath("schema.sql").read_text()


def _columns(db: sqlite3.Connection) -> set[tuple[str, str]]:
    """Return every table of a database with each of its columns."""
    return set(
        db.execute(
            "SELECT t.name, c.name FROM sqlite_schema AS t, pragma_table_info(t.name) AS c"
            " WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
        )
    )


@functools.cache
def _columns_wanted() -> set[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(_schema())
        return _columns(db)


def _statements(script: str) -> Iterator[str]:
    """Split a script into statements; sqlite3's own executescript would end the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
