"""Who works on a data root: one regd at a time, wherever its state folder is.

Two that do not know of each other would create each session twice: Alyx does not prevent it. The
one that works keeps a small file in the data root, locked, and writes to it every `HEARTBEAT_S`.
The lock keeps out every other regd of this computer, and of others where the file server passes
locks on. Where it does not, the other one sees the file change, and keeps out as well.
No clock is compared with another computer's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import pwd
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from regd import files
from regd.errors import NeedsHuman, RootTaken, printable
from regd.paths import OWNER_FILE

HEARTBEAT_S = 20.0
"""How often the owner writes to its file, in seconds."""
SILENT_BEATS = 3
"""An owner that was silent for so many heartbeats is no longer there."""
_LARGEST = 4096  # bytes; a larger file is none of regd's, and is left alone
_BLOCK = 512  # bytes, of which a power cut leaves all or none
_LOOKS = 50  # at a file that comes and goes while others start and stop
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Holder:
    """A regd, as it tells others about itself; only `identity` and `host` say who it is.

    Attributes:
        identity: The UUID of its state folder.
        host: The name of its computer; a copy of a computer's disk has the same identity.
        pid: Its process there.
        state_dir: Its state folder there.
        user: Its user there.
        since: When it started, by its own clock.
    """

    identity: str
    host: str
    pid: int
    state_dir: str
    user: str
    since: str

    def is_same(self, other: Holder) -> bool:
        """Say whether both are one regd, before and after it was started again."""
        return (self.identity, self.host) == (other.identity, other.host)

    def __str__(self) -> str:
        return printable(
            f"regd on {self.host} (process {self.pid} of {self.user}, state_dir {self.state_dir},"
            f" since {self.since})"
        )


def myself(state_dir: Path) -> Holder:
    """Return what this process tells others about itself.

    Args:
        state_dir: Its state folder, which it has locked.
    """
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # as in a container that was given any number
        user = str(os.getuid())
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    host = socket.gethostname()
    return Holder(_identity(state_dir), host, os.getpid(), str(state_dir), user, since)


def _identity(state_dir: Path) -> str:
    """Return the UUID of a state folder; it outlives the journal, which may be set aside."""
    path = state_dir / "identity"
    try:
        return str(uuid.UUID(path.read_text()))
    except (OSError, ValueError):
        made = str(uuid.uuid4())
    with contextlib.suppress(OSError), path.open("w") as file:
        # on a full disk it lasts until this process ends
        file.write(made)
        file.flush()
        os.fsync(file.fileno())  # after a power cut it would be another's owner file that is there
    return made


def read_holder(content: bytes) -> Holder | None:
    """Return who wrote an owner file, or None if it was no regd, or is not all there."""
    try:
        fields = json.loads(content)
        holder = Holder(**{name: fields[name] for name in Holder.__slots__})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = (holder.identity, holder.host, holder.state_dir, holder.user, holder.since)
    return holder if all(isinstance(text, str) for text in texts) else None


def _since_boot() -> float:
    # unlike time.monotonic it goes on while the computer is suspended, as the others do
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class _Look:
    """An owner file at one moment; two looks that differ mean that somebody is alive."""

    device: int
    inode: int
    mtime_ns: int
    content: bytes

    @property
    def holder(self) -> Holder | None:
        return read_holder(self.content)


class Owner:
    """This process's claim to a data root; it stands while `step` is called again and again.

    Args:
        root: The data root, resolved.
        me: What the others are told.
        clock: Seconds that also count while the computer is suspended.

    Attributes:
        waits_for: Who worked here last, while it is found out whether that one is still there.
        unguarded: Why nobody is kept out, where the file cannot be kept.
    """

    def __init__(self, root: Path, me: Holder, clock: Callable[[], float] = _since_boot) -> None:
        self._root = root
        self._me = me
        self._new_name = f"{OWNER_FILE}-{me.identity}"  # of the file until it is complete
        self._clock = clock
        self._lock = threading.Lock()
        self._closed = False
        self._folder: int | None = None  # the data root as it was when the file was taken
        self._file: int | None = None  # open and locked while the file is this regd's
        self._confirmed_at: float | None = None  # when it was last seen to be this regd's
        self._watched: tuple[_Look, float] | None = None  # another's file, and since when it is so
        self._next_at = -math.inf
        self._beat = 0
        self.waits_for: str | None = None
        self.unguarded: NeedsHuman | OSError | None = None

    @property
    def holds(self) -> bool:
        """Whether this regd may work on the data root now."""
        if self._file is None:
            return self.unguarded is not None
        # others may have taken over during a suspension: not before the file is looked at
        at = self._confirmed_at
        return at is not None and self._clock() - at < SILENT_BEATS * HEARTBEAT_S

    def is_due(self) -> bool:
        """Say whether it is time for `step`."""
        return self._clock() >= self._next_at or self._root_changed()

    def step(self) -> None:
        """Take the data root if nobody has it, or say to the others that it is taken.

        Raises:
            RootTaken: Another regd works on it.
        """
        with self._lock:
            if self._closed:
                return
            if self._root_changed():
                self._give_back()
            try:
                if self._file is None:
                    self._take()
                else:
                    self._renew()
            except RootTaken:
                self._drop()
                raise
            except (OSError, NeedsHuman) as error:
                if self._file is not None:
                    self._drop()  # or it would be held, unconfirmed, and no work be done
                self.unguarded = error
            else:
                self.unguarded = None
            # a watched file is looked at more often, to say soon that its owner is there
            pause_s = HEARTBEAT_S / 4 if self.waits_for else HEARTBEAT_S
            self._next_at = self._clock() + pause_s

    def release(self) -> None:
        """Give the data root back, so that the next regd need not wait."""
        with self._lock:
            self._give_back()

    def close(self, *, clean: bool = False) -> None:
        """End: give the data root back if it is a `clean` end, or let go of it as a crash does."""
        with self._lock:
            if clean:
                self._give_back()
            self._drop()
            self._closed = True

    # --- taking it -------------------------------------------------------------------------------

    def _take(self) -> None:
        try:
            folder = os.open(self._root, _FOLDER)
        except OSError:
            return  # it is away, and others say so
        try:
            with contextlib.suppress(OSError):
                # of this very regd, killed in `_create`; whether or not there is a file now
                os.unlink(self._new_name, dir_fd=folder)
            for _ in range(_LOOKS):
                if self._create(folder) or self._take_over(folder):
                    return
        finally:
            if self._folder != folder:
                os.close(folder)
        raise NeedsHuman(
            f"{OWNER_FILE} in the data root is another file each time it is opened",
            hint="mount the file server with stable inode numbers (for SMB: serverino)",
        )

    def _create(self, folder: int) -> bool:
        """Make the file, which appears locked and written at once; False if there is one."""
        if _stat(folder) is not None:
            return False
        name = self._new_name
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FILE, 0o644, dir_fd=folder)
        try:
            _is_locked(file)
            self._write(file, first=True)
            files.rename_noreplace(folder, name, folder, OWNER_FILE)
        except BaseException as error:
            os.close(file)
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=folder)
            if isinstance(error, FileExistsError):
                return False
            raise
        self._keep(folder, file)
        self._confirmed_at = self._clock()
        return True

    def _take_over(self, folder: int) -> bool:
        """Take the file that is there, or watch whether its owner is; False to look again."""
        file = _open(folder)
        if file is None:
            return False
        try:
            if _is_locked(file):
                raise self._taken(_try_read(file))
            look, there = _read(file), _stat(folder)
            if there is None or there.st_ino != look.inode:
                return False  # given back before it was locked
            now = self._clock()
            own = look.holder is not None and look.holder.is_same(self._me)
            if not own and self._is_awaited(look, now):
                return True
            self.waits_for = None
            try:
                self._write(file, first=True)
            except OSError as error:
                if error.errno != errno.EBADF:
                    raise
                text = "is another user's, who is gone: remove it"  # it could be read alone
                raise PermissionError(errno.EACCES, text, OWNER_FILE) from None
            self._keep(folder, file)
            # without locks another may do the same now: a heartbeat later it is seen whose it is
            self._confirmed_at = now if own else None
            return True
        finally:
            if self._file != file:
                os.close(file)

    def _is_awaited(self, look: _Look, now: float) -> bool:
        """Say whether another's file must be watched for longer; raise if that one is alive."""
        seen, since = self._watched or (look, now)
        if look.device != seen.device:
            seen, since = look, now  # another disk was mounted meanwhile
        self._watched = seen, since
        if look != seen:
            raise self._taken(look)
        awaited = now - since < SILENT_BEATS * HEARTBEAT_S
        if awaited:
            self.waits_for = str(look.holder or "an unknown program")
        return awaited

    def _keep(self, folder: int, file: int) -> None:
        self._folder, self._file, self._watched = folder, file, None

    # --- keeping it ------------------------------------------------------------------------------

    def _renew(self) -> None:
        """Look whether the file is still this process's, and write to it."""
        assert self._folder is not None
        assert self._file is not None
        look = _look(self._folder, self._file)
        if look is not None and look.holder is not None and look.holder != self._me:
            raise self._taken(look)
        if look is None or look.inode != os.fstat(self._file).st_ino:
            self._drop()  # removed, or put back from a copy
            return self._take()
        self._confirmed_at = self._clock()
        self._write(self._file)
        return None

    def _write(self, file: int, *, first: bool = False) -> None:
        self._beat += 1
        content = json.dumps({**asdict(self._me), "beat": self._beat}).encode()
        # as long as the last one: a power cut leaves one of the two
        blocks = math.ceil((len(content) + 1) / _BLOCK)
        content = content.ljust(blocks * _BLOCK - 1) + b"\n"
        os.pwrite(file, content, 0)
        os.ftruncate(file, len(content))
        # or a power cut would leave it empty, as nobody's, and whoever comes next would wait; on
        # another computer, the others would see each heartbeat much later
        if first or not files.is_local(file):
            os.fsync(file)

    def _root_changed(self) -> bool:
        """Say whether another folder is now where the data root was, as after a mount."""
        folder = self._folder
        if folder is None:
            return False
        try:
            return not os.path.samestat(os.fstat(folder), self._root.stat())
        except OSError:
            return True

    def _give_back(self) -> None:
        if self._folder is not None and self._file is not None:
            with contextlib.suppress(OSError, NeedsHuman):
                look = _look(self._folder, self._file)
                if look is not None and look.holder == self._me:
                    os.unlink(OWNER_FILE, dir_fd=self._folder)
        self._drop()

    def _drop(self) -> None:
        descriptors = self._file, self._folder
        self._file = self._folder = self._confirmed_at = self._watched = None
        self.waits_for = self.unguarded = None
        self._next_at = -math.inf
        for descriptor in descriptors:
            if descriptor is not None:
                with contextlib.suppress(OSError):  # of a disk that was pulled out
                    os.close(descriptor)

    def _taken(self, look: _Look | None) -> RootTaken:
        holder = look.holder if look else None
        return RootTaken(
            f"another regd works on {self._root}: {holder or 'which one, its file does not say'}",
            hint="stop one of the two: a data root has one regd. For a scan at once, run"
            " `regd scan` where that one runs, with its settings",
        )


# --- the file ------------------------------------------------------------------------------------


def _stat(folder: int) -> os.stat_result | None:
    """Return the status of the owner file, or None if there is none.

    Raises:
        NeedsHuman: What has its name is something else, which is left alone.
    """
    try:
        status = os.stat(OWNER_FILE, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
        raise NeedsHuman(
            f"{OWNER_FILE} in the data root is not what regd writes there",
            hint="move it away: regd keeps a small file of that name",
        )
    return status


def _open(folder: int, *, write: bool = True) -> int | None:
    """Open the owner file, to read alone where that is all that is allowed; None without one."""
    if _stat(folder) is None:
        return None
    try:
        return os.open(OWNER_FILE, (os.O_RDWR if write else os.O_RDONLY) | _FILE, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError:
        if not write:
            raise
        return _open(folder, write=False)


def _read(file: int) -> _Look:
    status = os.fstat(file)
    content = os.pread(file, _LARGEST, 0)
    return _Look(status.st_dev, status.st_ino, status.st_mtime_ns, content)


def _try_read(file: int) -> _Look | None:
    try:
        return _read(file)
    except OSError:  # on SMB nobody else can read what one has locked
        return None


def _look(folder: int, locked: int) -> _Look | None:
    """Read the owner file afresh by its name, as a file server wants it; None without one."""
    file = _open(folder, write=False)
    if file is None:
        return None
    try:
        return _try_read(file) or _read(locked)
    finally:
        os.close(file)


def _is_locked(file: int) -> bool:
    """Lock a file, or say that another has it locked. Where there are no locks, none has."""
    for _ in range(3):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            time.sleep(0.05)  # maybe another one that starts, and only looks
        except OSError:
            return False
        else:
            return False
    return True
