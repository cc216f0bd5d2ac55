"""What regd knows and has yet to do, in one SQLite file that survives a crash.

Every change of a state names the state it expects, and is one transaction. Another process may
read, ask for a scan, or put parked sessions back to work while the daemon runs.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from regd.errors import InvalidInput, NeedsHuman
from regd.model import FileState, SessionPath, SessionState, Signature
from regd.paths import parse_session

SCHEMA_VERSION = 1
UNKNOWN_OUTCOME_S = 15.0
"""How long a request whose outcome is unknown may still take to have an effect, in seconds."""
FILE_NAME = "journal.sqlite"


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
    reason: str | None
    hint: str | None
    changed_at: float

    @property
    def path(self) -> SessionPath:
        """The session's parts."""
        return parse_session(tuple(self.folder.split("/")))


@dataclass(frozen=True, slots=True)
class FileRow:
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


_SESSION_COLUMNS = (
    "id, folder, state, flagged, asked, eid, doubt, due_at, attempt, reason, hint, changed_at"
)
_FILE_COLUMNS = (
    "path, state, size, mtime_ns, md5, dataset_id, move_to, reason, hint, first_seen_at, changed_at"
)


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

    Raises:
        NeedsHuman: The file is of a newer regd, or cannot be opened.
        sqlite3.DatabaseError: It is no journal, or is damaged.
    """

    def __init__(self, path: Path, *, now: Callable[[], float], read_only: bool = False) -> None:
        self.path = path
        self._now = now
        self._lock = threading.RLock()
        if read_only and not path.exists():
            raise NeedsHuman(
                f"there is no journal at {path}", hint="has `regd run` or `regd scan` run yet?"
            )
        try:
            self._db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}",
                uri=True,
                timeout=30.0,
                isolation_level=None,
                check_same_thread=False,
            )
        except sqlite3.OperationalError as error:
            raise NeedsHuman(
                f"the journal {path} cannot be opened: {error}",
                hint="check the rights and the free space of state_dir",
            ) from None
        try:
            self._db.execute("PRAGMA foreign_keys = ON")
            if read_only:
                self._check_version()
            else:
                self._prepare()
        except sqlite3.OperationalError as error:
            self._db.close()
            raise NeedsHuman(
                f"the journal {path} cannot be used: {error}",
                hint="run this as regd's user; check the rights and the free space of state_dir",
            ) from None
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        # a power cut may undo the last commits, never damage the file; see durable()
        self._db.execute("PRAGMA synchronous = NORMAL")
        with self._write():
            if self._check_version() == 0:
                schema = package_files("regd").joinpath("schema.sql").read_text()
                for statement in _statements(schema):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _check_version(self) -> int:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA_VERSION):
            raise NeedsHuman(
                f"the journal {self.path} is of another version of regd ({version})",
                hint="install that version, or move the journal away: a scan rebuilds it",
            )
        return int(version)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have ended it already
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def durable(self) -> None:
        """Return once all that was committed is on the disk, whatever happens to the power."""
        with self._lock:
            try:
                wal = os.open(f"{self.path}-wal", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return  # all of it has reached the file itself
        try:
            os.fsync(wal)
        finally:
            os.close(wal)

    def version(self) -> int:
        """Return a number that changes whenever another process has changed the journal."""
        (number,) = self._rows("PRAGMA data_version")[0]
        return int(number)

    # --- facts and requests ----------------------------------------------------------------------

    def fact(self, name: str) -> Any:
        """Return the fact of that name, or None."""
        rows = self._rows("SELECT value FROM fact WHERE name = ?", name)
        return json.loads(rows[0][0]) if rows else None

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
                    (folder, subject, date, number, flagged, asked, due_at, changed_at)
                VALUES (:folder, :subject, :date, :number, :flagged, :asked, :due_at, :now)
                ON CONFLICT (folder) DO UPDATE SET
                    flagged    = flagged OR :flagged,
                    asked      = asked OR :asked,
                    state      = CASE WHEN {_WAKES} THEN 'waiting' ELSE state END,
                    attempt    = CASE WHEN {_WAKES} THEN 0 ELSE attempt END,
                    changed_at = CASE WHEN {_WAKES} THEN :now ELSE changed_at END,
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

    def claim(self) -> SessionRow | None:
        """Take the session that has been due longest; return None if none is due."""
        with self._write() as db:
            row = db.execute(
                f"""
                UPDATE session SET state = 'working', hinted_at = NULL, changed_at = :now
                WHERE id = (
                    SELECT id FROM session WHERE state IN ('waiting', 'held') AND due_at <= :now
                    ORDER BY due_at LIMIT 1
                ) AND state IN ('waiting', 'held')
                RETURNING {_SESSION_COLUMNS}
                """,  # noqa: S608 - the columns are a constant
                {"now": self._now()},
            ).fetchone()
        return _session(row) if row else None

    def next_due_at(self) -> float | None:
        """Return when the next waiting or held session is due, or None if there is none."""
        due_at: float | None
        ((due_at,),) = self._rows(
            "SELECT min(due_at) FROM session WHERE state IN ('waiting', 'held')"
        )
        return due_at

    def release(
        self,
        session: int,
        state: SessionState,
        *,
        due_at: float = 0.0,
        not_before: float = 0.0,
        attempt: int = 0,
        reason: str | None = None,
        hint: str | None = None,
    ) -> None:
        """Give a claimed session back in its next state; what came up meanwhile keeps it due.

        Not where it is parked: a person is asked once, not with every file that is written.
        """
        with self._write() as db:
            db.execute(
                """
                UPDATE session SET
                    state = CASE WHEN hinted_at IS NULL OR :state = 'parked' THEN :state
                                 ELSE 'waiting' END,
                    due_at = CASE WHEN hinted_at IS NULL THEN :due_at
                                  WHEN :state = 'waiting'
                                  THEN max(:not_before, min(hinted_at, :due_at))
                                  ELSE hinted_at END,
                    not_before = :not_before, hinted_at = NULL, attempt = :attempt,
                    reason = :reason, hint = :hint,
                    changed_at = :now
                WHERE id = :id AND state = 'working'
                """,
                {
                    "id": session,
                    "state": state,
                    "due_at": due_at,
                    "not_before": not_before,
                    "attempt": attempt,
                    "reason": reason,
                    "hint": hint,
                    "now": self._now(),
                },
            )

    def recover(self) -> int:
        """Put back what a process that is gone had in work; return how many sessions that were."""
        with self._write() as db:
            return db.execute(
                """
                UPDATE session SET state = 'waiting', doubt = 1,
                    -- its creation may be on its way: look only when it must have arrived
                    not_before = CASE WHEN eid IS NULL THEN :now + :settle_s ELSE 0 END,
                    due_at = CASE WHEN eid IS NULL THEN :now + :settle_s ELSE :now END
                WHERE state = 'working'
                """,
                {"now": self._now(), "settle_s": UNKNOWN_OUTCOME_S},
            ).rowcount

    def identify(self, session: int, eid: str, *, doubt: bool) -> None:
        """Write down a session's UUID, and whether Alyx may hold datasets of it already."""
        with self._write() as db:
            db.execute(
                "UPDATE session SET eid = ?, doubt = ? WHERE id = ? AND state = 'working'",
                (eid, doubt, session),
            )

    def forget_alyx(self, session: int) -> None:
        """Forget what was known of a session on Alyx, where it is no longer."""
        with self._write() as db:
            db.execute("UPDATE session SET eid = NULL, doubt = 1 WHERE id = ?", (session,))
            db.execute("DELETE FROM file WHERE session_id = ? AND state <> 'placing'", (session,))

    def set_doubt(self, session: int, doubt: bool) -> None:
        """Note whether Alyx may hold datasets of the session that the journal does not know."""
        with self._write() as db:
            db.execute("UPDATE session SET doubt = ? WHERE id = ?", (doubt, session))

    def unflagged(self, session: int) -> None:
        """Note that the session's flag is gone."""
        with self._write() as db:
            db.execute("UPDATE session SET flagged = 0 WHERE id = ?", (session,))

    def retry(self, folder: str | None) -> int:
        """Put parked and held sessions back to work, with their refused files.

        Args:
            folder: One session's folder, or None for all.

        Returns:
            How many sessions that were.
        """
        with self._write() as db:
            sessions = db.execute(
                """
                UPDATE session SET state = 'waiting', due_at = max(:now, not_before), attempt = 0,
                    changed_at = :now
                WHERE (:folder IS NULL OR folder = :folder) AND state <> 'working' AND (
                    state IN ('parked', 'held', 'waiting') OR :folder IS NOT NULL
                    OR id IN (SELECT session_id FROM file WHERE state = 'refused'))
                RETURNING id
                """,
                {"now": self._now(), "folder": folder},
            ).fetchall()
            db.executemany("DELETE FROM file WHERE session_id = ? AND state = 'refused'", sessions)
        return len(sessions)

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

    # --- files -----------------------------------------------------------------------------------

    def files(self, session: int) -> dict[str, FileRow]:
        """Return what is known of a session's files, by their path below it."""
        rows = self._rows(
            f"SELECT {_FILE_COLUMNS} FROM file WHERE session_id = ?",  # noqa: S608
            session,
        )
        return {row[0]: _file(row) for row in rows}

    def ready_files(self, session: int, limit: int) -> list[FileRow]:
        """Return at most `limit` files that are ready to be registered; all of them if it is -1."""
        rows = self._rows(
            f"SELECT {_FILE_COLUMNS} FROM file"  # noqa: S608
            " WHERE state = 'ready' AND session_id = ? ORDER BY path LIMIT ?",
            session,
            limit,
        )
        return [_file(row) for row in rows]

    def known(self, folder: str) -> tuple[SessionRow, dict[str, FileRow]] | None:
        """Return a session and its files, or None if it is not known."""
        with self._lock:
            row = self.session(folder)
            return (row, self.files(row.id)) if row else None

    def write_files(self, session: int, rows: Iterable[FileRow], gone: Iterable[str] = ()) -> None:
        """Write files as they are now, and forget those that are `gone`, in one transaction."""
        now = self._now()
        with self._write() as db:
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

    def files_in(self, *states: FileState) -> list[tuple[str, FileRow]]:
        """Return every file in those states, with its session's folder."""
        return [
            (row[0], _file(row[1:]))
            for row in self._rows(
                f"SELECT folder, {', '.join('file.' + c for c in _FILE_COLUMNS.split(', '))}"  # noqa: S608
                f" FROM file JOIN session ON session.id = session_id"
                f" WHERE file.state IN ({','.join('?' * len(states))}) ORDER BY folder, path",
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

    def strays(self) -> list[tuple[str, str, str]]:
        """Return path, reason and hint of all that lies outside any session."""
        return [tuple(row) for row in self._rows("SELECT path, reason, hint FROM stray")]

    def counts(self) -> tuple[dict[SessionState, int], dict[FileState, int]]:
        """Return how many sessions and how many files are in each state."""
        sessions = dict(self._rows("SELECT state, count(*) FROM session GROUP BY state"))
        files = dict(self._rows("SELECT state, count(*) FROM file GROUP BY state"))
        return (
            {state: sessions.get(state, 0) for state in SessionState},
            {state: files.get(state, 0) for state in FileState},
        )


def _statements(script: str) -> Iterator[str]:
    """Split a script into statements; sqlite3's own executescript would end the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
