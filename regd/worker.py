"""The job of one session, stage by stage: create, collect, compare, place, post, unflag.

Each stage's effect comes before its commit, so a crash between them runs the stage again, and each
can be run again. What a session's failure means is decided in one place, `Worker.step`.
"""

from __future__ import annotations

import datetime
import errno
import os
import random
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from regd import files
from regd.errors import (
    AlyxAway,
    AlyxFault,
    AlyxOdd,
    DataRootAway,
    DatasetsProtected,
    FileChanged,
    FileHeld,
    FileRefused,
    InvalidPath,
    JournalFailed,
    NeedsHuman,
    NoDatasetType,
    PathTaken,
    RegdError,
    RevisionProtected,
    SessionNotFound,
    Stopping,
    TryLater,
    Unauthorized,
    printable,
)
from regd.hashing import LARGE, Hasher
from regd.journal import UNKNOWN_OUTCOME_S, FileRow, Journal, SessionRow
from regd.logs import bound_contextvars, get_logger
from regd.model import (
    Dataset,
    FileState,
    FileToPost,
    Revision,
    SessionPath,
    SessionState,
)
from regd.paths import OWNER_FILE, Ignored, is_utf8, parse_dataset
from regd.pulse import Pulse
from regd.registration import RegistrationClient, is_protected, read_histories
from regd.retries import backoff_s
from regd.revisions import choose_destination
from regd.settings import Settings
from regd.settle import Stillness

NOT_ON_ALYX = "Alyx does not know this session, and it has no flag"
HELD_LONGEST_S = 6 * 3600.0
"""A held session is looked up again after so many seconds at most."""
_PROBE_FIRST_S, _PROBE_LONGEST_S = 2.0, 60.0  # between two attempts to reach Alyx again
# the same for credentials that it refused: each attempt may bring their account nearer to a lock
_LOGIN_FIRST_S, _LOGIN_LONGEST_S = 60.0, 900.0
_LOOK_S = 5.0  # between two looks for a session whose creation may be on its way
_WRITES_FAIL = 3  # sessions, with none that Alyx took anything of in between: it is not their fault
_FLUSH_S = 2.0  # hashes are written down at least this often
_HASHING = "it is being hashed"
_TOGETHER_S = 0.01  # files that were written so shortly after one another go in one request
_TURN_S = 30.0  # after which a session gives way to others that are due
_HASHED_S = 60.0  # the hasher says when it has done a file; this is how long that is believed
_log = get_logger()


class Gate:
    """Keeps all workers from Alyx while it is away; whoever finds out closes it.

    An Alyx may answer and yet take nothing: its database's disk is full, or it is read-only. Then
    one session after the other fails, and only one that does not shows that this is over.

    Args:
        clock: Monotonic seconds.
        chance: A number in [0, 1), for jitter.
    """

    def __init__(self, clock: Callable[[], float], chance: Callable[[], float]) -> None:
        self._clock = clock
        self._chance = chance
        self._lock = threading.Lock()
        self._failures = 0
        self._probing = False
        self._next_probe_at = 0.0
        self._unwritten: set[int] = set()
        self.error: TryLater | Unauthorized | None = None

    def close(self, error: TryLater | Unauthorized, *, answers: bool = False) -> None:
        """Note that Alyx, or the data root, does not work.

        What several workers find at the same time is one failure.

        Args:
            error: What was found.
            answers: Whether Alyx answers all the same, and only takes nothing.
        """
        with self._lock:
            if not answers:  # that explains what failed
                self._unwritten.clear()
            refused = isinstance(error, Unauthorized)
            if self.error is None or refused != isinstance(self.error, Unauthorized):
                self._failures = 1
            elif self._probing:
                self._failures += 1
            self._probing = False
            first_s, longest_s = _PROBE_FIRST_S, _PROBE_LONGEST_S
            if refused:
                first_s, longest_s = _LOGIN_FIRST_S, _LOGIN_LONGEST_S
            wait_s = backoff_s(self._failures, first_s, longest_s, self._chance)
            if isinstance(error, TryLater):
                wait_s = max(wait_s, error.after_s or 0.0)
            self._next_probe_at = self._clock() + wait_s
            self.error = error

    def hurry(self) -> None:
        """Have the next probe made at once: something changed."""
        with self._lock:
            self._next_probe_at = self._clock()

    def open(self) -> None:
        """Note that they work."""
        with self._lock:
            self._open()

    def _open(self) -> None:
        self._failures = 0
        self._probing = False
        self._unwritten.clear()
        self.error = None

    def write_failed(self, session: int) -> None:
        """Note that Alyx failed on what was to be written of a session."""
        with self._lock:
            self._unwritten.add(session)

    def wrote(self) -> None:
        """Note that Alyx took something, and so works."""
        with self._lock:
            if self.takes_nothing:
                self._open()
            self._unwritten.clear()

    @property
    def takes_nothing(self) -> bool:
        """Whether Alyx failed on so many sessions that it cannot lie in them."""
        return len(self._unwritten) >= _WRITES_FAIL

    @property
    def is_probing(self) -> bool:
        """Whether somebody tries, and has not failed yet."""
        return self._probing

    def take_probe(self) -> bool:
        """Say whether it is time to try again, to the first who asks."""
        with self._lock:
            if self.error is None or self._clock() < self._next_probe_at:
                return False
            self._next_probe_at = self._clock() + _PROBE_LONGEST_S
            self._probing = True
            return True


@dataclass(frozen=True, slots=True)
class _Next:
    """What becomes of a session after its job."""

    state: SessionState
    due_at: float = 0.0
    attempt: int = 0
    reason: str | None = None
    hint: str | None = None
    not_before: float = 0.0
    looked: int = 0


@dataclass(slots=True)
class _Turn:
    """One session's turn with a worker.

    Attributes:
        ends_at: When it gives way to other sessions that are due, in monotonic seconds.
        has_begun: Whether anything has been hashed; each turn brings a session on.
        blocked: What keeps a file from being registered in this attempt, by the file's path; for a
            folder that could not be listed, the path ends in '/'.
    """

    ends_at: float
    has_begun: bool = False
    blocked: dict[str, TryLater] = field(default_factory=dict)


@dataclass(slots=True)
class Worker:
    """Does the jobs of sessions; several may share everything but the thread.

    Attributes:
        root: The data root, resolved.
        settings: What to register, and how.
        journal: What is known and due.
        client: The way to Alyx.
        hasher: Hashes large files aside.
        stillness: When files were last seen to change; guarded by `stillness_lock`.
        ignored: Says of a path below the root whether it is never looked at.
        gate: Closed while Alyx is away.
        stop: Set when regd is to end; work in hand is put back.
        now: Seconds since 1970.
        clock: Monotonic seconds.
        today: The rig's local date.
        chance: A number in [0, 1), for jitter.
        arrives_s: How long a request whose outcome is unknown may still take to have an effect.
        pulse: Told that the work advances.
    """

    root: Path
    settings: Settings
    journal: Journal
    client: RegistrationClient
    hasher: Hasher
    stillness: Stillness
    ignored: Ignored
    gate: Gate
    stop: threading.Event
    now: Callable[[], float] = time.time
    clock: Callable[[], float] = time.monotonic
    today: Callable[[], datetime.date] = datetime.date.today
    chance: Callable[[], float] = random.random
    arrives_s: float = UNKNOWN_OUTCOME_S
    pulse: Pulse = field(default_factory=Pulse)
    stillness_lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self, *, trial: bool = False) -> bool:
        """Do the job of one due session, as far as it goes; return False if none was due.

        A session's own failure never escapes: it becomes the row's next state.

        Args:
            trial: Whether to do it even though the gate is closed.

        Raises:
            JournalFailed: The journal is unusable: let systemd start a new process.
        """
        if (self.gate.error is not None and not trial) or self.stop.is_set():
            return False
        row = self.journal.claim()
        if row is None:
            return False
        with (
            bound_contextvars(session=row.folder, attempt=row.attempt + 1),
            self.pulse.on(row.folder),
        ):
            after = self._attempt(row)
        if after.state is not SessionState.WAITING:
            self.hasher.forget(row.folder)
        self.journal.release(
            row.id,
            after.state,
            due_at=after.due_at,
            not_before=after.not_before,
            attempt=after.attempt,
            looked=after.looked,
            reason=after.reason,
            hint=after.hint,
        )
        return True

    def _attempt(self, row: SessionRow) -> _Next:
        try:
            return self._job(row)
        except Stopping:
            return _Next(
                SessionState.WAITING,
                self.now(),
                row.attempt,
                row.reason,
                row.hint,
                row.not_before,
                row.looked,
            )
        except (AlyxAway, AlyxFault, DataRootAway, Unauthorized) as error:
            arrives_s = self._arrives_s(row, error)
            answers = False
            if isinstance(error, (AlyxOdd, AlyxFault)) and (answers := self._alyx_works()):
                wait_s = max(error.after_s or 0.0, arrives_s)
                if not self.gate.takes_nothing:  # it fails on this session alone
                    return self._again(row, TryLater(error.reason, hint=error.hint, after_s=wait_s))
                error = AlyxAway(
                    f"Alyx answers, but takes nothing: {error.reason}",
                    hint=error.hint or "ask Alyx's keeper: is its database full, or read-only?",
                    after_s=error.after_s,
                )
            # an outage: no session's failure, so it counts as no attempt
            self.gate.close(error, answers=answers)
            due_at = self.now() + arrives_s
            return _Next(
                SessionState.WAITING,
                due_at,
                row.attempt,
                error.reason,
                error.hint,
                due_at,
                row.looked,
            )
        except TryLater as error:
            return self._again(row, error)
        except SessionNotFound as error:
            # deleted on Alyx: the next attempt creates it again if it is flagged, or holds it
            self.journal.forget_alyx(row.id)
            return self._again(row, TryLater(error.reason, hint=error.hint))
        except NeedsHuman as error:
            return self._park(row, error.reason, error.hint)
        except OSError as error:
            return self._again(row, _of_disk(error))
        except (JournalFailed, sqlite3.Error):
            raise
        except Exception as error:  # a fault in regd: this session's, not everybody's
            reason = f"regd failed on it: {type(error).__name__}: {error}"
            hint = "report this to regd's makers; then: regd retry --all"
            _log.exception("session.failed", reason=reason, hint=hint)
            return self._park(row, reason, hint)

    def _alyx_works(self) -> bool:
        """Say whether Alyx answers at all; asked once, without patience."""
        try:
            self.client.alyx.ping()
        except (TryLater, NeedsHuman, Stopping):
            return False
        return True

    def _arrives_s(self, row: SessionRow, error: Exception) -> float:
        """Return the seconds until a session may be looked at: files sent may be on their way."""
        if not isinstance(error, AlyxAway) or not error.unknown_outcome:
            return 0.0
        known = self.journal.session(row.folder)
        # without a UUID no file was sent; its creation is waited for before it is sent again
        return self.arrives_s if known is not None and known.eid is not None else 0.0

    @contextmanager
    def _writing(self, row: SessionRow) -> Iterator[None]:
        """Note whether Alyx takes what is sent in the block."""
        try:
            yield
        except (AlyxOdd, AlyxFault):
            self.gate.write_failed(row.id)
            raise
        self.gate.wrote()

    def _again(self, row: SessionRow, error: TryLater) -> _Next:
        attempt = row.attempt + 1
        retry = self.settings.retry
        if attempt >= retry.attempts:
            hint = error.hint
            if "regd retry" not in hint:
                hint = f"{hint}; then: regd retry --all" if hint else ""
            return self._park(row, f"{error.reason} (tried {attempt} times)", hint)
        wait_s = backoff_s(attempt, retry.first_s, retry.longest_s, self.chance)
        wait_s = max(wait_s, error.after_s or 0.0)
        _log.warning(
            "session.retried", reason=error.reason, hint=error.hint, wait_s=round(wait_s, 1)
        )
        due_at = self.now() + wait_s
        return _Next(
            SessionState.WAITING, due_at, attempt, error.reason, error.hint, due_at, row.looked
        )

    def _park(self, row: SessionRow, reason: str, hint: str) -> _Next:
        if reason != row.reason:  # its flag, seen a second time, makes no second alarm
            _log.error("session.parked", reason=reason, hint=hint)
        return _Next(
            SessionState.PARKED, 0.0, row.attempt, reason, hint or "then: regd retry --all"
        )

    # --- the job ---------------------------------------------------------------------------------

    def _job(self, row: SessionRow) -> _Next:
        session = row.path
        try:
            flagged = self._sees_flag(row)
        except FileNotFoundError:
            return self._gone(row)
        if row.flagged and not flagged:  # a person, or regd before a power cut, removed it
            self.journal.unflagged(row.id)
        if row.eid is None or flagged:  # a flag asks for the session to be there, whatever was
            found = self._identify(row, session)
            if found is None:
                if not (flagged or row.asked):
                    return self._hold(row)
                if row.creating_at is not None:
                    arrived_at = row.creating_at + self.arrives_s
                    if self.now() < arrived_at:
                        return self._look_again(row, arrived_at)
                found = self._create(row, session)
            row = found
        turn = _Turn(self.clock() + _TURN_S)
        with bound_contextvars(eid=row.eid):
            wait_s = left = None
            if self.settings.register.files:
                wait_s = self._collect(row, turn)
                left = self._register(row, session, turn)
                if left is None:
                    return _Next(SessionState.WAITING, self.now(), row.attempt)
                if wait_s is None and FileState.SETTLING in left:
                    wait_s = 0.0  # written to, or gone, since it was hashed: look again
                if row.doubt and wait_s is None and not turn.blocked:
                    self.journal.set_doubt(row.id, False)  # every file has been compared
            # what lies in a folder that could not be listed is written down nowhere yet
            if flagged and not any(path.endswith("/") for path in turn.blocked):
                self._unflag(row, known=not left)
        for error in turn.blocked.values():  # all beside those files is done
            raise error
        if wait_s is None:
            return _Next(SessionState.DONE)
        reason = "files are being written, or hashed"
        due_at = self.now() + (wait_s and wait_s + _TOGETHER_S)
        return _Next(SessionState.WAITING, due_at, reason=reason)

    def _gone(self, row: SessionRow) -> _Next:
        """Say what becomes of a session whose folder is not there."""
        check_root(self.root, self.journal)
        _log.warning("session.vanished")
        unfinished = [
            r.path
            for r in self.journal.files(row.id).values()
            # a move may be half done, and its folder come back
            if r.state not in (FileState.REGISTERED, FileState.PLACING)
        ]
        self.journal.write_files(row.id, [], unfinished)
        return _Next(SessionState.DONE, reason="its folder is no longer there")

    def _sees_flag(self, row: SessionRow) -> bool:
        with files.open_folder(self.root, row.folder) as descriptor:
            try:
                flag = os.stat(self.settings.flag, dir_fd=descriptor, follow_symlinks=False)
            except FileNotFoundError:
                return False
        if stat.S_ISDIR(flag.st_mode):
            raise NeedsHuman(
                f"the flag {self.settings.flag} is a folder",
                hint="remove it, then: regd retry --all",
            )
        return True

    # --- create ----------------------------------------------------------------------------------

    def _identify(self, row: SessionRow, session: SessionPath) -> SessionRow | None:
        """Find the session on Alyx; None if it is not there."""
        found = self.client.search_sessions(session)
        if len(found) > 1:
            eids = ", ".join(str(record["id"]) for record in found)
            raise NeedsHuman(
                f"Alyx has {len(found)} sessions {session.alyx_path}: {eids}",
                hint="delete or renumber all but one on Alyx, then: regd retry --all",
            )
        if found and found[0]["id"] == row.eid:
            return row
        if row.eid is not None:  # it was deleted on Alyx, and all that was registered with it
            self.journal.forget_alyx(row.id)
        if not found:
            return None
        eid = str(found[0]["id"])
        self.journal.identify(row.id, eid, doubt=True)
        return replace(row, eid=eid, doubt=True)

    def _create(self, row: SessionRow, session: SessionPath) -> SessionRow:
        """Create a session that Alyx does not have, and that is not on its way there."""
        users = self.settings.register.users
        self.journal.set_creating(row.id, True)
        self.journal.durable()  # whatever happens now, it may be created: later, too
        try:
            with self._writing(row):
                record = self.client.create_session(session, {"users": users} if users else {})
        except RegdError as error:
            # it may have been sent long after it was noted: the limit of requests makes it wait
            unknown = isinstance(error, AlyxAway) and error.unknown_outcome
            self.journal.set_creating(row.id, unknown)
            raise
        eid = str(record["id"])
        self.client.alyx.counts.add(sessions_created=1)
        _log.info("session.created", eid=eid)
        # a session just created holds nothing that the journal could not know
        self.journal.identify(row.id, eid, doubt=False)
        return replace(row, eid=eid, doubt=False)

    def _look_again(self, row: SessionRow, arrived_at: float) -> _Next:
        """Say when to look for a session whose creation may be on its way: not to create it."""
        due_at = min(self.now() + _LOOK_S, arrived_at)
        reason = "Alyx may still create it, as it was asked before"
        return _Next(
            SessionState.WAITING, due_at, row.attempt, reason, not_before=due_at, looked=row.looked
        )

    def _hold(self, row: SessionRow) -> _Next:
        known = self.journal.files(row.id)
        if self.settings.register.files:
            with files.open_folder(self.root, row.folder) as top:
                seen = [
                    FileRow(f.path, FileState.SETTLING, f.signature, reason="its session is held")
                    for f in self._list(top, row.folder)
                    if f.kind == "file" and is_utf8(f.path) and f.path not in known
                ]
            self.journal.write_files(row.id, seen)
        hint = f"put a {self.settings.flag} into its folder, or create it on Alyx"
        if row.reason != NOT_ON_ALYX:
            _log.info("session.held", reason=NOT_ON_ALYX, hint=hint)
        looked = row.looked + 1
        wait_s = backoff_s(looked, self.settings.scan.every_s, HELD_LONGEST_S, self.chance)
        due_at = self.now() + wait_s
        return _Next(SessionState.HELD, due_at, reason=NOT_ON_ALYX, hint=hint, looked=looked)

    # --- collect ---------------------------------------------------------------------------------

    def _list(self, top: int, folder: str) -> Iterable[files.Found]:
        """Yield what lies in a session's folder, which is open, but for the flag."""
        flag = self.settings.flag
        for fields in files.list_open(top, folder, self.ignored, beat=self.pulse.beat):
            self.pulse.beat()
            if fields[0] != flag:
                yield files.Found._make(fields)

    def _collect(self, row: SessionRow, turn: _Turn) -> float | None:
        """Bring the journal up to date with the session's folder, hashing what has settled.

        Returns:
            The seconds until the next file may have settled, or None if none is being written.
        """
        known = self._finish_moves(row, turn)
        # a move that the disk has not let end yet: none of its names is a new file
        moving = {
            end
            for r in known.values()
            if r.move_to
            for end in (r.path, r.move_to, files.moving_name(r.path))
        }
        seen: set[str] = set()
        unseen: dict[str, TryLater] = {}  # what lies below these folders, and why
        rows: list[FileRow] = []
        wait_s: float | None = None
        flushed_at = self.clock()
        with files.open_below(self.root, row.folder) as top:
            # elsewhere they are of another computer's clock, which may be wrong
            stamped_here = files.is_local(top.number)
            listed = list(self._list(top.number, row.folder))
            turn.ends_at = self.clock() + _TURN_S  # a folder that is slow to list has its turn, too
            for found in listed:
                key = found.path if is_utf8(found.path) else printable(found.path)
                seen.add(key)
                if found.kind in ("unreadable", "failing"):
                    code = found.size if found.kind == "failing" else errno.EACCES
                    unseen[f"{key}/"] = _of_disk(OSError(code, os.strerror(code)), key)
                if found.kind == "failing":
                    turn.blocked[f"{key}/"] = unseen[f"{key}/"]
                    continue
                old = known.get(key)
                if key in moving or (
                    old is not None and _is_settled_row(old) and old.signature == found.signature
                ):
                    continue
                looked = self._look(row, top, key, found, old, turn, stamped_here=stamped_here)
                rows.append(looked)
                if looked.state is FileState.SETTLING and key not in turn.blocked:
                    full = f"{row.folder}/{found.path}"
                    remaining_s = _HASHED_S if found.size >= LARGE else 0.0
                    if looked.reason != _HASHING:
                        remaining_s = self._remaining_s(full, found, stamped_here=stamped_here)
                    wait_s = min(wait_s if wait_s is not None else remaining_s, remaining_s)
                if self.clock() - flushed_at > _FLUSH_S:
                    self.journal.write_files(row.id, rows)
                    rows, flushed_at = [], self.clock()
        self.hasher.forget(row.folder, but=seen)
        gone = []
        for path, old in known.items():
            # what was registered stays known: the rig may be cleared, a mount may come back
            if path in seen or path in moving or old.state is FileState.REGISTERED:
                continue
            above = next(filter(path.startswith, unseen), None)
            if above is None:
                gone.append(path)
            elif old.state is not FileState.REFUSED:
                rows.append(_block(old, unseen[above], turn))
        for path in gone:
            _log.info("file.vanished", path=path)
        self.journal.write_files(row.id, rows, gone)
        return wait_s

    def _look(
        self,
        row: SessionRow,
        top: files.Opened,
        key: str,
        found: files.Found,
        old: FileRow | None,
        turn: _Turn,
        *,
        stamped_here: bool,
    ) -> FileRow:
        """Return the row of a file that is new or changed; `top` is its session's folder, open."""
        new = FileRow(
            key,
            FileState.SETTLING,
            found.signature,
            md5=old.md5 if old else None,
            dataset_id=old.dataset_id if old else None,
            first_seen_at=old.first_seen_at
            if old and old.state is FileState.SETTLING
            else self.now(),
        )
        try:
            _check_kind(key, found)
            self.client.check_name(found.path)
            full = f"{row.folder}/{found.path}"
            if self._remaining_s(full, found, stamped_here=stamped_here) > 0:
                return self._still_settling(new, old)
            md5 = None
            if self._is_hashed(found.signature.size):
                md5 = self._md5(top, full, found, turn)
                if md5 is None:
                    return new._replace(reason=_HASHING)
            else:
                with files.open_finished(top, found.path, found.signature):
                    pass
        except (InvalidPath, NoDatasetType) as error:
            return self._refused(new, error, old)
        except FileHeld:
            with self.stillness_lock:
                self.stillness.held(full, self.clock())
            return self._still_settling(new, old, held=True)
        except (FileChanged, FileNotFoundError):  # the next pass sees what is there now
            return self._still_settling(new, old)
        except OSError as error:
            return _block(new, _of_disk(error, key, "read"), turn)
        with self.stillness_lock:
            self.stillness.forget(full)
        if old is not None and old.dataset_id and md5 is not None and old.md5 == md5:
            # touched, or written again with the same content: Alyx has it as it is
            return new._replace(state=FileState.REGISTERED, md5=md5)
        # until it is posted, this content is not what the dataset holds
        return new._replace(state=FileState.READY, md5=md5, dataset_id=None)

    def _md5(self, top: files.Opened, full: str, found: files.Found, turn: _Turn) -> str | None:
        """Return the MD5 of a file; None if it is large and not hashed yet, or the turn is over."""
        if found.size < LARGE:
            if turn.has_begun and self._gives_way(turn):
                return None
            turn.has_begun = True
            return files.md5(top, found.path, found.signature, self.hasher.on_read)
        md5 = self.hasher.md5(full, found)
        if md5 is not None:  # that may have been a while ago
            files.check_finished(top, found.path, found.signature)
        return md5

    def _is_hashed(self, size: int) -> bool:
        limit = self.settings.register.max_md5_size
        return limit is None or size < limit

    def _refused(self, new: FileRow, error: NeedsHuman, old: FileRow | None) -> FileRow:
        if old is None or old.reason != error.reason:
            _log.warning("file.refused", path=new.path, reason=error.reason, hint=error.hint)
        return new._replace(state=FileState.REFUSED, reason=error.reason, hint=error.hint)

    def _still_settling(self, new: FileRow, old: FileRow | None, *, held: bool = False) -> FileRow:
        waited_s = self.now() - new.first_seen_at
        if waited_s < self.settings.settle.max_wait_s:
            return new
        if held:
            reason = f"a program still has it open for writing after {waited_s / 3600:.1f} h"
            hint = "close it there (lsof shows by which program): then it is registered"
        else:
            reason = f"still being written after {waited_s / 3600:.1f} h"
            hint = "is a program still writing to it? It is registered when it stands still"
        if old is None or old.state is not FileState.SETTLING or old.hint is None:
            _log.warning("file.unfinished", path=new.path, reason=reason, hint=hint)
        return new._replace(reason=reason, hint=hint)

    def _remaining_s(self, full: str, found: files.Found, *, stamped_here: bool) -> float:
        wall, now = self.now(), self.clock()
        touched_at = found.touched_ns / 1e9 if stamped_here else None
        with self.stillness_lock:
            untouched_s = self.stillness.untouched_s(touched_at, wall, now)
            return self.stillness.remaining_s(full, found.signature, untouched_s, now)

    def _finish_moves(self, row: SessionRow, turn: _Turn) -> dict[str, FileRow]:
        """Bring to an end every move that was interrupted, and return the session's files then.

        A file that was being moved is found at either end.
        """
        known = self.journal.files(row.id)
        moves = [old for old in known.values() if old.state is FileState.PLACING]
        for old in moves:
            assert old.move_to is not None
            try:
                files.mend_move(self.root, row.folder, old.path, old.move_to, old.signature)
                source = files.signature(self.root, f"{row.folder}/{old.path}")
                target = files.signature(self.root, f"{row.folder}/{old.move_to}")
                if target == old.signature:
                    self._moved(row, old)
                elif source == old.signature and target is None:
                    self._move(row, old, turn)
                else:
                    # changed meanwhile, or the name was taken: look at it afresh
                    self.journal.write_files(row.id, [], [old.path])
            except FileChanged:
                self._unsettle(row, old)
            except PathTaken as error:  # all that is there are files of their own now
                self.journal.write_files(row.id, [], [old.path])
                turn.blocked[old.path] = TryLater(error.reason, hint=error.hint)
            except OSError as error:
                kept = _block(old, _of_disk(error, old.path, "write"), turn)
                self.journal.write_files(row.id, [kept])
        return self.journal.files(row.id) if moves else known

    # --- compare ---------------------------------------------------------------------------------

    def _compare(self, row: SessionRow, rows: Sequence[FileRow]) -> list[FileRow]:
        """Mark as registered what Alyx holds already; return the rest."""
        assert row.eid is not None
        held = {dataset.place: dataset for dataset in self.client.datasets(row.eid)}
        known = [
            r._replace(state=FileState.REGISTERED, dataset_id=dataset.id, reason=None, hint=None)
            for r in rows
            if (dataset := held.get(parse_dataset(r.path))) is not None and _same(r, dataset)
        ]
        self.journal.write_files(row.id, known)
        for r in known:
            _log.debug("file.known", path=r.path, id=r.dataset_id)
        if known:
            _log.info("session.compared", known=len(known), new=len(rows) - len(known))
        paths = {r.path for r in known}
        return [r for r in rows if r.path not in paths]

    # --- place and post --------------------------------------------------------------------------

    def _register(
        self, row: SessionRow, session: SessionPath, turn: _Turn
    ) -> set[FileState] | None:
        """Register every ready file, chunk by chunk.

        Returns:
            The states of those that Alyx has not all the same; None if some wait for another turn.
        """
        # a request that failed may have been too large for a server in between
        size = max(1, self.settings.register.chunk_files >> row.attempt)
        doubt = row.doubt
        while True:
            if self.stop.is_set():
                raise Stopping("stopped between two requests")
            if doubt:
                if ready := self._ready(row, turn):
                    self._compare(row, ready)
                doubt = False
            chunk = self._ready(row, turn, size)
            try:
                if chunk and not self._post_chunk(row, session, chunk, turn):
                    size = max(1, size // 2)
                    doubt = True
            except (AlyxAway, AlyxFault):
                self.journal.set_doubt(row.id, True)
                raise
            left = self.journal.states_left(row.id)
            if not chunk or FileState.READY not in left:
                return left
            # not in doubt: the next turn would post again what is registered of a chunk refused
            if not doubt and self._gives_way(turn):
                return None

    def _gives_way(self, turn: _Turn) -> bool:
        """Say whether a session has had its turn, and another one is due."""
        if self.clock() < turn.ends_at:
            return False
        due_at = self.journal.next_due_at()
        return due_at is not None and due_at <= self.now()

    def _ready(self, row: SessionRow, turn: _Turn, most: int = -1) -> list[FileRow]:
        """Return files that can be posted now: all of them, or at most that many."""
        limit = most if most < 0 else most + len(turn.blocked)
        ready = [r for r in self.journal.ready_files(row.id, limit) if r.path not in turn.blocked]
        return ready if most < 0 else ready[:most]

    def _post_chunk(
        self, row: SessionRow, session: SessionPath, chunk: list[FileRow], turn: _Turn
    ) -> bool:
        """Register some ready files; False if Alyx refused one without saying which."""
        chunk = self._unwritten(row, chunk, turn)
        if not chunk:
            return True
        try:
            self._post(row, session, chunk, checked=True)
        except DatasetsProtected as refusal:
            return self._place_and_post(row, session, chunk, read_histories(refusal), turn)
        except FileRefused as refusal:
            return self._refuse(row, session, chunk, refusal)
        return True

    def _refuse(
        self, row: SessionRow, session: SessionPath, chunk: list[FileRow], refusal: FileRefused
    ) -> bool:
        """Refuse the file that Alyx named; False if it named none of several."""
        bad = [r for r in chunk if refusal.name and _is_named(r, session, refusal.name)]
        if not bad and len(chunk) > 1:
            return False
        bad = bad or chunk
        self.client.forget_types()
        self.journal.write_files(row.id, [self._refused(r, refusal, None) for r in bad])
        # those before the bad file are registered, those after it are not
        self._compare(row, [r for r in chunk if r not in bad])
        return True

    def _unwritten(self, row: SessionRow, chunk: list[FileRow], turn: _Turn) -> list[FileRow]:
        """Return the files that are still what was hashed, and finished; others settle again."""
        same = []
        with ExitStack() as stack:
            above: Path | files.Opened = self.root
            inner = f"{row.folder}/"
            with suppress(OSError):  # where it cannot be opened, each file says so
                above = stack.enter_context(files.open_below(self.root, row.folder))
                inner = ""
            for r in chunk:
                self.pulse.beat()
                try:
                    files.check_finished(above, f"{inner}{r.path}", r.signature)
                except FileChanged:
                    self._unsettle(row, r)
                except OSError as error:
                    kept = _block(r, _of_disk(error, r.path, "read"), turn)
                    self.journal.write_files(row.id, [kept])
                else:
                    same.append(r)
        return same

    def _unsettle(self, row: SessionRow, r: FileRow) -> None:
        """Have a file settle again that was finished when it was hashed."""
        again = r._replace(state=FileState.SETTLING, move_to=None, first_seen_at=self.now())
        self.journal.write_files(row.id, [again])

    def _post(
        self, row: SessionRow, session: SessionPath, rows: Sequence[FileRow], *, checked: bool
    ) -> None:
        register = self.settings.register
        options: dict[str, Any] = {
            "name": self.settings.repository,
            "exists": register.exists,
            "server_only": register.server_only,
            "default": register.default,
        }
        if created_by := register.created_by or self.client.alyx.user:
            options["created_by"] = created_by
        items = [FileToPost(r.path, r.signature.size, r.md5, register.versions) for r in rows]
        with self._writing(row):
            records = self.client.post_files(session, items, checked=checked, options=options)
        done = [
            r._replace(
                state=FileState.REGISTERED,
                dataset_id=str(records[r.path]["id"]),
                reason=None,
                hint=None,
            )
            for r in rows
        ]
        self.journal.write_files(row.id, done)
        size_bytes = sum(r.signature.size for r in done)
        self.client.alyx.counts.add(files_registered=len(done), registered_bytes=size_bytes)
        for r in done:
            _log.info("file.registered", path=r.path, size_bytes=r.signature.size, id=r.dataset_id)

    def _place_and_post(
        self,
        row: SessionRow,
        session: SessionPath,
        chunk: Sequence[FileRow],
        histories: dict[str, list[Revision]],
        turn: _Turn,
    ) -> bool:
        """Move protected files to where Alyx takes them, and register them there.

        The unprotected ones of the chunk stay ready for the next request. False if Alyx refused
        one of several without saying which.
        """
        protected = [r for r in chunk if is_protected(histories.get(r.path, []))]
        if not protected:
            raise AlyxFault("Alyx says that a file is protected, but none of those sent")
        placed = []
        # Alyx checks by name: one that it holds with this very content must not be moved
        for r in self._compare(row, protected):
            self.pulse.beat()
            try:
                target = choose_destination(
                    PurePosixPath(r.path),
                    histories[r.path],
                    self.today(),
                    files.occupied_revisions(self.root, row.folder, r.path),
                ).as_posix()
                if target != r.path:
                    intent = r._replace(state=FileState.PLACING, move_to=target)
                    self.journal.write_files(row.id, [intent])
                    self.journal.durable()  # after a power cut the file is looked for at both ends
                    moved = self._move(row, intent, turn)
                    placed += [moved] if moved else []
                else:
                    placed.append(r)
            except NeedsHuman as error:
                self.journal.write_files(row.id, [self._refused(r, error, None)])
            except OSError as error:
                kept = _block(r, _of_disk(error, r.path, "write"), turn)
                self.journal.write_files(row.id, [kept])
        placed = self._unwritten(row, placed, turn)
        if not placed:
            return True
        try:
            self._post(row, session, placed, checked=False)
        except RevisionProtected as error:
            raise AlyxFault(error.reason) from None
        except FileRefused as refusal:
            return self._refuse(row, session, placed, refusal)
        return True

    def _move(self, row: SessionRow, intent: FileRow, turn: _Turn) -> FileRow | None:
        """Do a move that the journal has; None if the file could not be moved."""
        assert intent.move_to is not None
        try:
            files.move(
                self.root, row.folder, intent.path, intent.move_to, expected=intent.signature
            )
        except FileChanged:
            self._unsettle(row, intent)
            return None
        except PathTaken as error:
            taken = TryLater(error.reason, hint=error.hint)
            kept = _block(intent._replace(state=FileState.READY, move_to=None), taken, turn)
        except NeedsHuman as error:
            kept = self._refused(intent._replace(move_to=None), error, None)
        except OSError as error:
            # the intent stays: the file may be at either end, or at both
            kept = _block(intent, _of_disk(error, intent.path, "write"), turn)
        else:
            return self._moved(row, intent)
        self.journal.write_files(row.id, [kept])
        return None

    def _moved(self, row: SessionRow, intent: FileRow) -> FileRow:
        assert intent.move_to is not None
        new = intent._replace(
            path=intent.move_to,
            state=FileState.READY,
            move_to=None,
            dataset_id=None,
            reason=None,
            hint=None,
        )
        self.journal.moved(row.id, intent.path, new)
        _log.info("file.moved", path=intent.path, target=new.path)
        return new

    # --- unflag ----------------------------------------------------------------------------------

    def _unflag(self, row: SessionRow, *, known: bool) -> None:
        """Remove the flag: all that Alyx is to have is `known` to it, or written down."""
        if not known:
            self.journal.durable()
        try:
            removed = files.remove_flag(self.root, row.folder, self.settings.flag)
        except OSError as error:
            what = f"the flag {self.settings.flag} cannot be removed"
            raise _of_disk(error, what, "write") from None
        self.journal.unflagged(row.id)
        if removed:
            _log.info("flag.removed", path=self.settings.flag)


def check_root(root: Path, journal: Journal) -> None:
    """Raise DataRootAway if the data root is gone, or is empty where sessions were seen before."""
    try:
        with os.scandir(root) as entries:
            # a file that regd left in a mount point is no recording
            empty = all(entry.name.startswith(OWNER_FILE) for entry in entries)
    except OSError as error:
        raise DataRootAway(
            f"the data root {root} cannot be read: {error.strerror}", hint="mount it again"
        ) from None
    if empty and journal.sessions(limit=1):
        raise DataRootAway(
            f"the data root {root} is empty, but held sessions before", hint="is its disk mounted?"
        )


def _is_settled_row(row: FileRow) -> bool:
    return row.state in (FileState.READY, FileState.REGISTERED, FileState.REFUSED)


def _check_kind(key: str, found: files.Found) -> None:
    if found.kind == "link":
        raise InvalidPath(
            f"{key} is a symbolic link, and links are not followed",
            hint="put the file itself here, or name the link in watch.ignore",
        )
    if found.kind == "unreadable":
        raise InvalidPath(f"{key} cannot be read", hint="give regd's user the right to read it")
    if found.kind == "deep":
        raise InvalidPath(
            f"{key}: no file below this folder can be registered: its path is too long",
            hint="move what is below it up, or name it in watch.ignore",
        )
    if found.kind != "file":
        raise InvalidPath(f"{key} is no regular file", hint="remove it, or name it in watch.ignore")
    if found.signature.size == 0:
        raise InvalidPath(
            f"{key} is empty", hint="record it again, delete it, or name it in watch.ignore"
        )


def _same(row: FileRow, dataset: Dataset) -> bool:
    if row.md5 is not None and dataset.md5:
        return row.md5 == dataset.md5
    # one side has no hash (max_md5_size): the size is all there is to go by
    return row.md5 is None and row.signature.size == dataset.size


def _is_named(row: FileRow, session: SessionPath, name: str) -> bool:
    return name in (
        parse_dataset(row.path).name,
        row.path,
        f"{session.alyx_path}/{row.path}",
    )


def _block(row: FileRow, error: TryLater, turn: _Turn) -> FileRow:
    """Return a file as it waits for the next attempt of its session, and note what it waits for."""
    turn.blocked[row.path] = error
    return row._replace(reason=error.reason, hint=error.hint)


def _of_disk(error: OSError, what: str = "", doing: str = "read") -> TryLater:
    """Return what a failure of the disk to `doing` ('read', 'write') means, and what to do."""
    hints = {
        errno.EACCES: f"give regd's user the right to {doing} there",
        errno.EPERM: f"give regd's user the right to {doing} there",
        errno.ENOSPC: "free some space on the disk of data_root",
        errno.EDQUOT: "raise the quota of regd's user on data_root, or free some space",
        errno.EROFS: "mount data_root for writing",
        errno.EMFILE: "raise LimitNOFILE, the number of files that regd may have open",
        errno.EIO: "check the disk of data_root: it fails",
        errno.ESTALE: "mount data_root again: its server lost it",
        errno.ELOOP: "a folder was replaced by a link; put the folder back",
        errno.ENOTDIR: "a folder was replaced by something else; put it back",
    }
    where = printable(os.fsdecode(error.filename)) if error.filename else "the disk"
    hint = hints.get(error.errno or 0, "check the disk of data_root")
    return TryLater(f"{what or where}: {error.strerror or error}", hint=hint)
