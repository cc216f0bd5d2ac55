"""The daemon: watcher, scanner and workers around one journal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import queue
import random
import shlex
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from regd import mounts
from regd.alyx import AlyxClient
from regd.errors import (
    DataRootAway,
    InvalidInput,
    InvalidPath,
    JournalDamaged,
    JournalFailed,
    MemberNotFound,
    NeedsHuman,
    RegdError,
    RootTaken,
    SettingsError,
    Stopping,
    TryLater,
    Unauthorized,
)
from regd.hashing import Hasher
from regd.health import LOCK
from regd.journal import FILE_NAME, UNKNOWN_OUTCOME_S, Journal, asides, set_aside
from regd.logs import Recurring, get_logger
from regd.model import SessionPath
from regd.owner import HEARTBEAT_S, SILENT_BEATS, Owner, myself
from regd.paths import Ignored, could_become_session, parse_session, session_depth
from regd.pulse import Pulse
from regd.registration import RegistrationClient
from regd.retries import LONGEST_AFTER_S
from regd.scan import Scanner, ScanResult
from regd.settings import Settings, credentials, credentials_hint
from regd.settle import Steadiness, Stillness
from regd.watch import Hint, Watcher
from regd.worker import HELD_LONGEST_S, Gate, Worker, check_root

STOP_WITHIN_S = 4.0
"""How long what is in hand may take to finish after SIGTERM, in seconds."""
_MARGIN_S = 15.0  # beyond alyx.timeout_s
_TICK_S = 1.0  # how often the journal is asked for what other processes want
_NOTED_AT_ONCE = 50  # sessions, in one transaction, of a great many that appear at once
_IDLE_S = 30.0  # a worker with nothing to do is told of news; this is how long it believes that
_REMIND_S = 3600.0
_HELD_UP_S = 0.5
_FIRST_LISTING_S = 3600.0  # most that a polling observer takes, which does not say how far it is
_REREAD_S = 5.0  # how often the settings are read while Alyx refuses the credentials in them
_log = get_logger()


class AlreadyRunning(NeedsHuman):
    """Another regd works with this state folder."""


def check_state_dir(folder: Path) -> None:
    """Make the state folder if it is missing, and see that it is this user's alone.

    Raises:
        NeedsHuman: It is another's, or no folder, or others can reach into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if status.st_uid != os.geteuid():
            # what root writes there, the daemon could not open
            raise _unfit(folder, f"belongs to user {_name_of(status.st_uid)}", _as_user(status))
        if others := stat.S_IMODE(status.st_mode) & 0o077:
            reason = f"can be reached by other users (mode {others:03o} beyond its owner's)"
            raise _unfit(folder, reason, f"chmod 700 {shlex.quote(str(folder))}")
    except FileExistsError:
        hint = "move it away, or set another state_dir"
        raise _unfit(folder, "is no folder", hint) from None
    except OSError as error:
        hint = "name a folder in state_dir that can be made, and that regd's user can write in"
        raise _unfit(folder, f"cannot be used: {error.strerror}", hint) from None


def _unfit(folder: Path, reason: str, hint: str) -> NeedsHuman:
    return NeedsHuman(f"state_dir {folder} {reason}", hint=hint)


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def _as_user(status: os.stat_result) -> str:
    user = shlex.quote(_name_of(status.st_uid))
    return f"run this as that user, such as: sudo -u {user} regd scan"


@contextlib.contextmanager
def lock(state_dir: Path) -> Iterator[None]:
    """Hold the state folder for this process; make it if it is missing.

    Raises:
        AlreadyRunning: Another process holds it.
        NeedsHuman: It cannot be made or written, or is another user's.
    """
    check_state_dir(state_dir)
    try:
        file = os.open(state_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        hint = "let regd's user write there; if the disk is full, free some space"
        raise _unfit(state_dir, f"cannot be used: {error.strerror}", hint) from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 100, 0).decode() or "unknown"
            raise AlreadyRunning(
                f"another regd (process {holder}) works with {state_dir}",
                hint="stop it, or give this one its own state_dir and data_root",
            ) from None
        os.ftruncate(file, 0)
        with contextlib.suppress(OSError):  # on a full disk it is held all the same
            os.write(file, str(os.getpid()).encode())
        yield
    finally:
        os.close(file)


def unfinished(journal: Journal) -> bool:
    """Say whether any session is in work, is due, or waits but not for another attempt."""
    return journal.is_unfinished()


@dataclass(slots=True)
class _Note:
    """What the hints of one moment say of a session."""

    session: SessionPath
    due_at: float
    flagged: bool = False


class Service:
    """Everything that runs, from settings alone; one at a time on a state folder.

    Args:
        settings: Complete for the daemon, as `regd.settings.check_for_daemon` checks.
        stop: Set to end it.
        reread: Reads the settings again, for credentials that a person has mended.
        client: The way to Alyx, if not by the settings.
        now: Seconds since 1970.
        clock: Monotonic seconds.
        chance: A number in [0, 1), for jitter.
        arrives_s: How long a request whose outcome is unknown may still take to have an effect, if
            not by the settings.
        pulse: Where the threads say that they advance.

    Attributes:
        scanning: Whether the whole data root is being gone through.

    Raises:
        NeedsHuman: The journal cannot be used.
        InvalidInput: The settings contradict the journal.
    """

    def __init__(
        self,
        settings: Settings,
        stop: threading.Event,
        *,
        reread: Callable[[], Settings] | None = None,
        client: RegistrationClient | None = None,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        arrives_s: float | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        if settings.data_root is None:
            raise InvalidInput("data_root is not set", hint="set it in the settings file")
        self.settings = settings
        self.stop = stop
        self.root = settings.data_root.resolve()
        self.pulse = pulse or Pulse(clock)
        self.scanning = False
        self._now = now
        self._clock = clock
        self._ignored = Ignored(settings.watch.ignore)
        # the files of a folder come one after the other
        self._ignores_folder = lru_cache(maxsize=4096)(self._ignores)
        self.journal = self._open_journal()
        self.journal.bind_root(self.root)
        self.client = client or RegistrationClient(
            AlyxClient.from_settings(settings, clock=clock, sleep=self._sleep, pulse=self.pulse),
            chunk_files=settings.register.chunk_files,
        )
        self.owner = Owner(self.root, myself(settings.state_dir))
        self.gate = Gate(clock, chance)
        self.scanner = Scanner(
            self.root, settings, self.journal, self._ignored, stop, self._note_hints, self.pulse
        )
        self.hasher = Hasher(self.root, self._on_read, self._on_hashed, pulse=self.pulse)
        self.worker = Worker(
            self.root,
            settings,
            self.journal,
            self.client,
            self.hasher,
            Stillness(settings.settle.quiet_s, settings.settle.closed_quiet_s),
            self._ignored,
            self.gate,
            stop,
            now=now,
            clock=clock,
            chance=chance,
            # nobody waits for it any longer then, regd or what stands between it and Alyx
            arrives_s=max(UNKNOWN_OUTCOME_S, settings.alyx.timeout_s + _MARGIN_S)
            if arrives_s is None
            else arrives_s,
            pulse=self.pulse,
        )
        self._hints: queue.SimpleQueue[Hint] = queue.SimpleQueue()
        self._to_scan: set[str] = set()  # folders that a hint named, outside any session
        self._overflowed = False
        self._news = threading.Condition()
        self._news_count = 0
        self._idle = threading.Event()  # set when a worker found nothing to do
        self._failed: BaseException | None = None
        self._steadiness = Steadiness()
        self._steadiness_lock = threading.Lock()
        self._check_clock()
        self._away = {
            "alyx": Recurring(_log, "alyx.away", "alyx.back", every_s=_REMIND_S, clock=clock),
            "root": Recurring(_log, "root.away", "root.back", every_s=_REMIND_S, clock=clock),
        }
        self._watcher: Watcher | None = None
        self._watching: mounts.Watching | None = None
        self._scan_took_s = 0.0
        self._watch_trouble = Recurring(
            _log, "watch.failed", "watch.mended", every_s=_REMIND_S, clock=clock
        )
        self._told: RegdError | None = None  # the last outage that was logged
        self._reread = reread
        self._reread_at = 0.0
        self._read = settings  # where the credentials in use are from
        self._refused: Settings | None = None  # those whose refusal was logged
        self._mistaken = Recurring(
            _log, "settings.failed", "settings.mended", every_s=_REMIND_S, clock=clock
        )
        self._mistakes = ""  # those of the settings that were logged last
        self._waits_for: str | None = None  # of the owner, as it was logged last
        self._unguarded = ""

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc: object) -> None:
        self.owner.close()
        self.client.alyx.close()
        self.journal.close()
        if self.journal.damaged:  # found in the middle of work: the next start builds a new one
            self._set_aside("it was found damaged in the middle of work")

    def _open_journal(self) -> Journal:
        """Open the journal, or a new one in place of one that is damaged."""
        path = self.settings.state_dir / FILE_NAME
        try:
            return Journal(path, now=self._now, check=True)
        except JournalDamaged as error:
            self._set_aside(error.reason)
        return Journal(path, now=self._now)

    def _set_aside(self, reason: str) -> None:
        aside = set_aside(self.settings.state_dir / FILE_NAME, self._now())
        _log.error(
            "journal.damaged",
            reason=reason,
            aside=str(aside),
            hint="nothing recorded is lost: a new journal is built from the data folder and Alyx; "
            f"check the disk of state_dir, then: rm -r {shlex.quote(str(aside))}*",
        )

    def _rebuilds(self) -> bool:
        """Say whether this journal stands in for a damaged one, and no scan has filled it yet."""
        return self.journal.fact("scan") is None and bool(asides(self.journal.path))

    @property
    def watching(self) -> bool:
        """Whether changes are noticed at once, and not by scans alone."""
        return self._watcher is not None

    def end(self) -> None:
        """Have `run` or `run_once` return soon; for signal handlers."""
        self.stop.set()
        self._hints.put(Hint(""))

    # --- running ---------------------------------------------------------------------------------

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Work until `stop` is set.

        Args:
            ready: Called once the watches stand, and all that is recorded from then on is noticed.

        Raises:
            RootTaken: Another regd works on the data root.
            JournalFailed: The journal became unusable: let systemd start a new process.
        """
        self.journal.set_fact("away", None)
        self._own()
        recovered = self._recover()
        _log.info(
            "regd.started",
            data_root=str(self.root),
            alyx=self.client.alyx.base_url,
            pid=os.getpid(),
            recovered=recovered,
        )
        if self.settings.repository is None:
            _log.warning(
                "repository.unset",
                reason="Alyx will mark every file as existing nowhere",
                hint="set `repository` to the name of this disk's data repository on Alyx",
            )
        self._watcher = self._watch()
        workers = self._start_workers()
        threading.Thread(target=self._greet, name="greet", daemon=True).start()
        ready()
        try:
            with self.pulse.watched():
                self._loop()
        except Exception as error:
            self._fail(error)
        finally:
            self.stop.set()
            self._tell()
            if self._watcher is not None:
                self._watcher.stop()
            self._end(workers)
        if self._failed is not None:
            raise self._failed

    def run_once(
        self, *, everything: bool, report: Callable[[int, int], None] = lambda *_: None
    ) -> ScanResult:
        """Scan once, and work until nothing is left that time alone will finish.

        Args:
            everything: Whether to take old sessions, too, that have no flag and are unknown.
            report: Called several times a second with what `Journal.left` says.

        Raises:
            RootTaken: Another regd works on the data root.
            TryLater: Alyx or the data root is away; what is left waits in the journal.
            Unauthorized: Alyx does not accept the credentials.
        """
        check_root(self.root, self.journal)
        self._own()
        self._recover()
        result = self.scanner.scan(self._now(), everything=everything, rebuild=self._rebuilds())
        workers = self._start_workers()
        try:
            while not self.stop.is_set() and self._failed is None:
                began_at = self._clock()
                report(*self.journal.left())
                report_s = self._clock() - began_at
                if self.gate.error is not None:
                    raise self.gate.error
                # a session with a hash to come may wait for another attempt, because of other files
                if not self.journal.is_unfinished() and not self.hasher.is_busy():
                    break
                # a person watches the bar, and counting very many files is not to slow them down
                self._idle.wait(min(1.0, max(0.05, 50 * report_s)))
                self._idle.clear()
        finally:
            self.stop.set()
            self._tell()
            self._end(workers)
        if self._failed is not None:
            raise self._failed
        report(*self.journal.left())
        return result

    def _recover(self) -> int:
        """Take on the work that the process before left; return how much of it was in hand."""
        recovered = self.journal.recover(self.worker.arrives_s)
        self.journal.doubt_all()
        self._clamp()
        return recovered

    def _clamp(self) -> None:
        waiting_s = max(
            LONGEST_AFTER_S, self.settings.retry.longest_s, self.settings.settle.quiet_s
        )
        self.journal.clamp(waiting_s, HELD_LONGEST_S)

    def _check_clock(self) -> None:
        """See whether the wall clock was set; if it was, keep the waits as long as they were."""
        with self._steadiness_lock:
            now = self._clock()
            wall = self._now()
            if self._clock() - now > _HELD_UP_S:
                return  # the two were not read at the same time
            by_s = self._steadiness.jump_s(wall, now)
            with self.worker.stillness_lock:
                self.worker.stillness.see_clocks(wall, now)
            if by_s:
                _log.warning(
                    "clock.jumped", by_s=round(by_s, 1), reason="the clock was set, or all slept"
                )
                self.journal.shift(by_s)
                self._clamp()
        if by_s:
            self._tell()

    # --- threads ---------------------------------------------------------------------------------

    def _start_workers(self) -> list[threading.Thread]:
        threads = [
            # a thread in the middle of a request must not keep the process from ending
            threading.Thread(target=self._work, name=f"worker-{n}", daemon=True)
            for n in range(self.settings.workers)
        ]
        for thread in threads:
            thread.start()
        threading.Thread(target=self._keep_owning, name="owner", daemon=True).start()
        return threads

    def _work(self) -> None:
        try:
            with self.pulse.watched():
                self._work_on()
        except Exception as error:
            if not self.stop.is_set():
                self._fail(error)

    def _work_on(self) -> None:
        while not self.stop.is_set():
            self.pulse.beat()
            self._check_clock()
            seen = self._news_count
            if self.step() if self.owner.holds else self._probe():
                continue
            idle_s = self._idle_s()
            self._idle.set()
            with self._news:
                if self._news_count == seen:
                    with self.pulse.resting():
                        self._news.wait(idle_s)

    def _fail(self, error: Exception) -> None:
        """End all of it because of an error that is no session's. Only the first is told."""
        with self._news:
            if self._failed is not None:
                return
            self._failed = error
        if isinstance(error, JournalFailed):
            _log.error("journal.failed", reason=error.reason, hint=error.hint)
        elif isinstance(error, RootTaken):
            _log.error("root.shared", reason=error.reason, hint=error.hint)
        else:
            hint = "systemd starts regd again; report this to regd's makers"
            _log.error("worker.died", exc_info=error, hint=hint)
        self.end()

    def step(self) -> bool:
        """Try Alyx again if it was away, or do the job of one session; False if nothing was due.

        Raises:
            sqlite3.Error: The journal is unusable.
        """
        return self._probe() or self.worker.step()

    def _idle_s(self) -> float:
        if self.gate.error is not None or not self.owner.holds:
            return _TICK_S
        due_at = self.journal.next_due_at()
        if due_at is None:
            return _IDLE_S
        return min(_IDLE_S, max(0.0, due_at - self._now()))

    def _tell(self) -> None:
        """Wake the workers: there may be something to do."""
        with self._news:
            self._news_count += 1
            self._news.notify_all()

    def _end(self, workers: list[threading.Thread]) -> None:
        """Give work in hand a few seconds, and put back what is left."""
        self.hasher.close()
        deadline = time.monotonic() + STOP_WITHIN_S
        for thread in workers:
            thread.join(max(0.0, deadline - time.monotonic()))
        put_back = 0
        with contextlib.suppress(JournalFailed, sqlite3.Error):
            put_back = self.journal.recover(self.worker.arrives_s)
        # what is still in hand may have an effect later: the next regd has to wait for that
        self.owner.close(clean=not any(thread.is_alive() for thread in workers))
        _log.info("regd.stopped", put_back=put_back)

    def _on_read(self, size: int) -> None:
        """Count what is hashed; the end of a large file may be far away."""
        if self.stop.is_set():
            raise Stopping("stopped while hashing")
        self.pulse.beat()
        self.client.alyx.counts.add(hashed_bytes=size)

    def _on_hashed(self, relative: str) -> None:
        """Have the session of a file looked at that was hashed aside."""
        parts = tuple(relative.split("/"))
        try:
            self.journal.hurry("/".join(parts[: session_depth(parts)]))
        except Exception as error:
            if not self.stop.is_set():
                self._fail(error)
        self._tell()

    def _sleep(self, seconds: float) -> None:
        if self._rest(seconds):
            raise Stopping("stopped while waiting for Alyx")

    def _rest(self, seconds: float) -> bool:
        """Wait that long, on purpose, or until regd is to end; return whether it is."""
        with self.pulse.resting():
            return self.stop.wait(seconds)

    # --- one regd a data root --------------------------------------------------------------------

    def _own(self) -> None:
        """Take the data root or keep it, and say what is odd about that.

        Raises:
            RootTaken: Another regd works on it.
        """
        owner = self.owner
        try:
            check_root(self.root, self.journal)
        except DataRootAway as error:
            owner.release()  # not into the folder that its disk is mounted on
            if not isinstance(self.gate.error, DataRootAway):
                self._close_gate(error)
            return
        owner.step()
        if owner.waits_for and owner.waits_for != self._waits_for:
            reason = f"{owner.waits_for} worked here, and did not stop in an orderly way"
            hint = "wait: this regd begins when that one is seen to be gone"
            wait_s = (SILENT_BEATS + 1) * HEARTBEAT_S
            _log.warning("root.awaited", reason=reason, hint=hint, wait_s=wait_s)
            self._note_away("owner", reason, hint)
            self._waits_for = owner.waits_for
        if self._waits_for and owner.holds:
            _log.info("root.taken", previous=self._waits_for)
            self.journal.set_fact("away", None)
            self._waits_for = None
        why = owner.unguarded
        if why is not None and str(why) != self._unguarded:
            reason = why.reason if isinstance(why, RegdError) else str(why)
            _log.warning(
                "root.unguarded",
                reason=f"a second regd on this data root would not be noticed: {reason}",
                hint=(why.hint if isinstance(why, RegdError) else "")
                or "let regd's user write in the data root, or see that there is only one regd",
            )
        self._unguarded = str(why or "")

    def _keep_owning(self) -> None:
        try:
            with self.pulse.watched():
                while not self._rest(min(_TICK_S, HEARTBEAT_S / 4)):
                    if not self.owner.is_due():
                        continue
                    held = self.owner.holds
                    self._own()
                    if self.owner.holds and not held:
                        self._tell()
        except Exception as error:
            if not self.stop.is_set():
                self._fail(error)

    # --- Alyx away -------------------------------------------------------------------------------

    def _probe(self) -> bool:
        """Try Alyx again if it was away and it is time; return whether it was tried."""
        error = self.gate.error
        if error is None:
            return False
        if error is not self._told:
            self._told = error
            self._tell_away(error)
        if not self.gate.take_probe():
            return False
        try:
            check_root(self.root, self.journal)
            self.client.alyx.greet()
            while self.gate.takes_nothing:  # only something that it takes shows that it works
                if not (self.gate.is_probing and self.worker.step(trial=True)):
                    return True
        except Stopping:
            return False
        except JournalFailed:
            raise
        except (TryLater, Unauthorized) as again:
            self.gate.close(again)
        except RegdError as other:
            self.gate.close(TryLater(other.reason, hint=other.hint))
        else:
            self.gate.open()
            for away in self._away.values():
                away.recovered()
            self._refused = None
            self.journal.set_fact("away", None)
            self._tell()
        return True

    def _close_gate(self, error: TryLater | Unauthorized) -> None:
        self.gate.close(error)
        self._tell()  # the workers say so, and find out when it is over

    def _tell_away(self, error: RegdError) -> None:
        kind, hint, at_once = "alyx", error.hint, False
        if isinstance(error, DataRootAway):
            kind = "root"
        elif isinstance(error, Unauthorized):
            hint = credentials_hint(self._read)
            # a person waits for the answer to what was mended; an outage may end with this
            at_once = self._refused is not self._read
            self._refused = self._read
        self._away[kind].failed(at_once=at_once, reason=error.reason, hint=hint)
        refused = isinstance(error, Unauthorized)
        self._note_away("credentials" if refused else kind, error.reason, hint)

    def _take_credentials(self) -> None:
        """Use what the settings say now, if Alyx refuses what they said before."""
        refusal = self.gate.error
        if not isinstance(refusal, Unauthorized) or self._reread is None:
            return
        if self._clock() < self._reread_at:
            return
        self._reread_at = self._clock() + _REREAD_S
        try:
            settings = self._reread()
        except (SettingsError, OSError) as error:
            mistakes = "; ".join(str(error).splitlines())
            another = (
                mistakes != self._mistakes
            )  # a person has mended one, and waits for the answer
            self._mistakes = mistakes
            hint = "correct it; regd keeps what it has"
            self._mistaken.failed(at_once=another, reason=mistakes, hint=hint)
            self._note_away("credentials", refusal.reason, f"correct the settings: {mistakes}")
            return
        if self._mistaken.recovered():
            self._mistakes = ""
            self._note_away("credentials", refusal.reason, credentials_hint(self._read))
        if credentials(settings) != credentials(self._read):
            self._read = settings
            self.client.alyx.use_credentials(*credentials(settings))
            _log.info("credentials.changed", alyx=self.client.alyx.base_url)
            self.gate.hurry()
            self._tell()

    def _greet(self) -> None:
        """Find out at start, not with the first recording, whether Alyx and the settings work."""
        try:
            self.client.alyx.greet()
            _log.info("alyx.reached", alyx=self.client.alyx.base_url)
            if self.settings.repository is not None:
                self.client.assert_exists(self.settings.repository, "data-repository")
        except Stopping:
            return
        except MemberNotFound as error:
            hint = "correct `repository`, or create it on Alyx"
            _log.error("repository.unknown", reason=error.reason, hint=hint)
        except (TryLater, Unauthorized) as error:
            self._close_gate(error)
        except RegdError as error:
            _log.error("alyx.odd", reason=error.reason, hint=error.hint)

    def _note_away(self, kind: str, reason: str, hint: str) -> None:
        """Write down for `regd status`, which may run without the credentials, why all waits.

        Args:
            kind: What it waits for: 'alyx', 'credentials', 'root' or 'owner'.
            reason: What happened.
            hint: What to do.
        """
        known = self.journal.fact("away")
        since = known["since"] if known and known["kind"] == kind else self._now()
        away = {"kind": kind, "reason": reason, "hint": hint, "since": since}
        self.journal.set_fact("away", away)

    # --- the loop --------------------------------------------------------------------------------

    def _choose(self) -> mounts.Watching:
        """Return how to notice changes; it may be another disk that is mounted now."""
        wanted = self.settings.watch.observer
        chosen = mounts.choose(wanted, PurePosixPath(self.root), mounts.read())
        if chosen != self._watching:
            _log.info(
                "watch.chosen",
                observer=chosen.observer,
                file_system=chosen.file_system,
                scans_sooner=chosen.scans_sooner,
                reason=chosen.reason or f"watch.observer is {wanted}",
            )
        self._watching = chosen
        return chosen

    def _watch(self) -> Watcher | None:
        observer = self._choose().observer
        if observer == "none":
            return None
        watcher = Watcher(self.root, observer, self._hints, self.pulse)
        started_at = self._clock()
        self.pulse.beat(_FIRST_LISTING_S)
        try:
            watcher.start()
        except NeedsHuman as error:
            self._watch_trouble.failed(reason=error.reason, hint=error.hint)
            return None
        self._check_limit(watcher)
        _log.info("watch.started", took_s=round(self._clock() - started_at, 2))
        return watcher

    def _check_limit(self, watcher: Watcher) -> None:
        try:
            watcher.check_limit()
        except NeedsHuman as error:
            self._watch_trouble.failed(reason=error.reason, hint=error.hint)
        else:
            self._watch_trouble.recovered()

    def _loop(self) -> None:
        """Take hints, requests and the time as they come."""
        next_scan_at = self._clock()
        known_root = _identity(self.root)
        version = (-1, 0)
        everything = False
        while not self.stop.is_set():
            self.pulse.beat()
            self._check_clock()
            if (identity := _identity(self.root)) != known_root:
                known_root = identity
                next_scan_at = self._clock()
                if identity is None:
                    self._close_gate(DataRootAway(f"the data root {self.root} is gone"))
                else:  # another folder is there now: watch that
                    if self._watcher is not None:
                        self._watcher.stop()
                    self._watcher = self._watch()
            if self._watcher is not None and not self._watcher.is_alive():
                reason = "the watcher ended by itself: a new one is started"
                hint = "nothing; if it comes again, report it to regd's makers"
                _log.error("watch.died", reason=reason, hint=hint)
                self._watcher.stop()
                self._watcher = self._watch()
                next_scan_at = self._clock()
            if self._clock() >= next_scan_at:
                if self._watcher is None:
                    self._watcher = self._watch()  # the limit may have been raised meanwhile
                else:
                    self._check_limit(self._watcher)
                self._scan(everything=everything)
                self.journal.finish_scans()
                with self.worker.stillness_lock:
                    self.worker.stillness.expire(self._clock())
                next_scan_at = self._clock() + self._pause_s()
                everything = False
            overflow = self._take_hints()
            if overflow:
                self.client.alyx.counts.add(overflows=1)
                _log.warning("watch.overflowed", reason="events were lost: scanning")
                next_scan_at = self._clock()
            if (latest := self.journal.version()) != version:
                version = latest
                asked = self.journal.take_scan()
                if asked is not None:
                    next_scan_at, everything = self._clock(), asked
                self._tell()
            self._take_credentials()

    def _scan(self, *, everything: bool = False, below: str = "") -> None:
        started_at = self._clock()
        self.scanning = not below
        try:
            check_root(self.root, self.journal)
            rebuild = not below and self._rebuilds()
            result = self.scanner.scan(
                self._now(), below=below, everything=everything, rebuild=rebuild
            )
        except DataRootAway as error:
            self._close_gate(error)
            return
        except OSError as error:
            hint = "let regd's user read it; if its disk fails, mend that"
            _log.warning("scan.failed", path=below, reason=str(error), hint=hint)
            return
        finally:
            self.scanning = False
        self._tell()
        if below:
            return
        self._scan_took_s = self._clock() - started_at
        self.client.alyx.counts.scanned(self._scan_took_s)
        _log.info(
            "scan.finished",
            sessions=result.sessions,
            files=result.files,
            noted=len(result.noted),
            strays=len(result.strays),
            backlog_sessions=result.backlog_sessions,
            took_s=round(self._scan_took_s, 3),
        )

    def _pause_s(self) -> float:
        every_s = self.settings.scan.every_s
        return self._watching.pause_s(every_s, self._scan_took_s) if self._watching else every_s

    def _take_hints(self) -> bool:
        """Wait for hints for one tick at most, do what they say; return True on an overflow."""
        # what was noted during a scan is done now, even if nothing comes after it
        with contextlib.suppress(queue.Empty):
            timeout_s = 0 if self._to_scan or self._overflowed else _TICK_S
            with self.pulse.resting():
                first = self._hints.get(timeout=timeout_s)
            self._note_hints(first)
        folders, self._to_scan = self._to_scan, set()
        for folder in folders - {""}:  # a file in the root itself is named by the next whole scan
            self._scan(below=folder)
        overflowed, self._overflowed = self._overflowed, False
        return overflowed

    def _note_hints(self, hint: Hint | None = None) -> None:
        """Note the sessions of all hints that are there, each session once."""
        if hint is None and self._hints.empty():
            return
        notes: dict[str, _Note] = {}
        told = 0
        while True:
            self.pulse.beat()  # there may be no end of them
            if hint is not None:
                told += bool(hint.path)
                self._overflowed |= hint.overflow
                if hint.path and not self._ignores(hint.path):
                    self._take_hint(hint, notes)
                    if len(notes) >= _NOTED_AT_ONCE:  # the workers wait for them
                        self._write_notes(notes)
                        notes = {}
            try:
                hint = self._hints.get_nowait()
            except queue.Empty:
                break
        self.client.alyx.counts.add(hints=told)
        self._write_notes(notes)

    def _write_notes(self, notes: Mapping[str, _Note]) -> None:
        with self.journal.together():
            for note in notes.values():
                other = self.journal.note(
                    note.session,
                    due_at=note.due_at,
                    flagged=note.flagged,
                    new_flag=note.flagged,
                    held_until=self._now() + self.settings.scan.every_s,
                )
                if other is not None:  # the scan says so in the one place where that is said
                    self._to_scan.add(note.session.folder)
        self._tell()

    def _ignores(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if folder and self._ignores_folder(folder):
            return True
        return name != self.settings.flag and self._ignored(path)

    def _take_hint(self, hint: Hint, notes: dict[str, _Note]) -> None:
        """Add the session of a hint to the notes, or the folder of one outside any to the scans."""
        folder, _, name = hint.path.rpartition("/")
        session = _session_of(folder) or _session_of(hint.path)
        if session is None:
            parts = tuple(hint.path.split("/"))
            # the highest folder that can hold no session is the one to name to a person
            wrong = (n for n in range(1, len(parts)) if not could_become_session(parts[:n]))
            end = next(wrong, len(parts) if hint.is_folder else -1)
            # of what lies in a folder that may hold sessions there are hints as well
            if end < len(parts) or hint.unseen or not could_become_session(parts):
                self._to_scan.add("/".join(parts[:end]))
            return
        settle = self.settings.settle
        now = self._now()
        is_flag = name == self.settings.flag and folder == session.folder
        if is_flag:
            due_at = now
        elif hint.finished:
            with self.worker.stillness_lock:
                self.worker.stillness.closed(hint.path, self._clock())
            due_at = now + (0.0 if hint.is_folder else settle.closed_quiet_s)
        else:
            due_at = now + settle.quiet_s
        note = notes.setdefault(session.folder, _Note(session, due_at))
        note.due_at = min(note.due_at, due_at)
        note.flagged |= is_flag


@lru_cache(maxsize=4096)  # the files of a folder come one after the other
def _session_of(folder: str) -> SessionPath | None:
    """Return the session that a folder is, or is in; None if it is in none."""
    parts = tuple(folder.split("/"))
    try:
        return parse_session(parts[: session_depth(parts)])
    except InvalidPath:
        return None


def _identity(root: Path) -> tuple[int, int] | None:
    """Return what tells one folder from another of the same name, or None if there is none."""
    try:
        status = root.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
