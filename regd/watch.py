"""What the kernel tells about the data root, as hints on a queue. No content is read here.

Of watchdog this takes what reads the kernel's events, and what compares listings where there are
none. The watches themselves are kept here: regd needs only to know where a watched folder is, which
is a tenth of the memory and half of the time, and it has to know which folders have none, and when
all stand again after events were lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers.inotify_c import (
    InotifyConstants,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchDescriptor,
    inotify_add_watch,
    inotify_rm_watch,
)
from watchdog.utils import BaseThread

from regd.errors import NeedsHuman
from regd.pulse import Pulse

_MASK = Mask(
    InotifyConstants.IN_CREATE
    | InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_MOVED_FROM
    | InotifyConstants.IN_MOVED_TO
    | InotifyConstants.IN_ONLYDIR
    | InotifyConstants.IN_DONT_FOLLOW
)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
_DEEPEST = 200  # folders in one another; nothing that Alyx takes lies so deep
POLLING_S = 5.0
"""How often a file system without events is compared with itself, in seconds."""


@dataclass(frozen=True, slots=True)
class Hint:
    """Something happened at a path.

    Attributes:
        path: Below the data root; '' for all of it.
        finished: Whether a writer closed the file, or it was moved into place.
        is_folder: Whether it is a folder that appeared. Of all that is in it there are hints, too.
        unseen: Whether there are none, because it cannot be watched or read.
        overflow: Whether events were lost, so that anything may have happened.
    """

    path: str
    finished: bool = False
    is_folder: bool = False
    unseen: bool = False
    overflow: bool = False


class _Inotify(InotifyFD):
    """The watches of all folders below a root, and the thread that reads what they tell.

    Each watched folder is known by its watch descriptor, with that of the folder above and its own
    name, so that a folder that is renamed takes all below it along.
    """

    def __init__(self, root: Path, hints: queue.SimpleQueue[Hint], pulse: Pulse) -> None:
        super().__init__()
        self._root = os.fsencode(root)
        self._hints = hints
        self._pulse = pulse
        self._folders: dict[int, tuple[int, bytes]] = {}
        self._names: dict[bytes, bytes] = {}  # one object for all folders of a name
        self._moved_away: set[int] = set()
        self._walking = threading.RLock()
        self.unwatched: OSError | None = None  # why some folders have no watch

    # --- watches ---------------------------------------------------------------------------------

    def watch_all(self) -> None:
        """Watch every folder below the root, and none else.

        Raises:
            OSError: The root itself cannot be watched.
        """
        with self._pulse.holding(self._walking):
            self.unwatched = None
            seen: set[int] = set()
            for _ in self._watch(self._root, 0, b"", seen):
                pass
            if self.unwatched is not None and not seen:
                raise self.unwatched
            with self._lock:
                stale = self._folders.keys() - seen
            self._unwatch(stale)

    def _watch(
        self, path: bytes, above: int, name: bytes, seen: set[int]
    ) -> Iterator[tuple[bytes, bool, bool]]:
        """Watch a folder and all below it; yield what is found.

        That is the path, whether it is a folder, and whether what is in it could not be seen. What
        appears after the watch is set is an event, what was there before is listed: nothing is
        missed, and some things are told twice.
        """
        todo = [(path, above, name, 0)]
        while todo:
            path, above, name, depth = todo.pop()
            self._pulse.beat()
            with self._lock:  # an event must not come before its folder is known
                if self._closed:
                    return
                descriptor = inotify_add_watch(self._inotify_fd, path, _MASK)
                if descriptor >= 0:
                    self._folders[descriptor] = above, self._names.setdefault(name, name)
                    seen.add(descriptor)
            if descriptor < 0:
                code = ctypes.get_errno()
                if code not in _GONE or path == self._root:
                    self.unwatched = OSError(code, os.strerror(code), os.fsdecode(path))
                if code not in (errno.ENOENT, errno.ENOTDIR):
                    yield path, True, True
                continue
            try:
                with os.scandir(path) as listed:
                    for entry in listed:
                        is_folder = entry.is_dir(follow_symlinks=False)
                        yield entry.path, is_folder, False
                        if is_folder and depth < _DEEPEST:
                            todo.append((entry.path, descriptor, entry.name, depth + 1))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError:  # a scan says why
                yield path, True, True

    def _unwatch(self, descriptors: set[int]) -> None:
        with self._lock:
            for descriptor in descriptors:
                if self._folders.pop(descriptor, None) and not self._closed:
                    inotify_rm_watch(self._inotify_fd, WatchDescriptor(descriptor))

    def _path(self, descriptor: int) -> bytes | None:
        """Return where a watched folder is, below the root with a slash at its end, or None."""
        names: list[bytes] = []
        while (folder := self._folders.get(descriptor)) is not None:
            if descriptor in self._moved_away:
                return None
            descriptor, name = folder
            if not descriptor:
                return b"".join(f for name in reversed(names) for f in (name, b"/"))
            names.append(name)
        return None

    # --- events ----------------------------------------------------------------------------------

    def read_events(self, **options: int) -> list[InotifyEvent]:
        """Return what the kernel has to tell next."""
        self._drop_moved_away()
        return super().read_events(**options)

    def handle_event(self, event: InotifyEvent) -> None:
        """Turn an event into hints."""
        if event.is_queue_overflow:
            with contextlib.suppress(OSError):  # the root is gone: who asks about that is told
                self.watch_all()  # of folders that appeared nothing was told
            self._hints.put(Hint("", overflow=True))
            return
        if event.is_ignored:  # its folder is gone
            with self._lock:
                self._folders.pop(event.wd, None)
            return
        folder = self._path(event.wd)
        if folder is None:
            return
        path = folder + event.name
        if event.is_moved_from:
            if event.is_directory:
                self._move_away(event.wd, event.name)
            return
        moved = event.is_moved_to
        finished = moved or event.is_close_write
        self._hints.put(Hint(os.fsdecode(path), finished=finished, is_folder=event.is_directory))
        if event.is_directory:
            self._appeared(path, event.wd, event.name, moved=moved)

    def _appeared(self, path: bytes, above: int, name: bytes, *, moved: bool) -> None:
        """Watch a new folder; what is in it already was made before anybody could tell."""
        start = len(self._root) + 1
        with self._walking:
            seen: set[int] = set()
            found = self._watch(self._root + b"/" + path, above, name, seen)
            for inner, is_folder, unseen in found:
                hint = Hint(os.fsdecode(inner[start:]), moved, is_folder=is_folder, unseen=unseen)
                self._hints.put(hint)
            self._moved_away -= seen

    def _move_away(self, above: int, name: bytes) -> None:
        """Note that a folder is no longer where it was; where it is now, an event tells, if any."""
        with self._lock:
            was = (above, name)
            self._moved_away |= {wd for wd, folder in self._folders.items() if folder == was}

    def _drop_moved_away(self) -> None:
        """Take the watches off folders that were moved out of the root, and all below them."""
        if not self._moved_away:
            return
        with self._lock:
            below: dict[int, list[int]] = {}
            for descriptor, (above, _) in self._folders.items():
                below.setdefault(above, []).append(descriptor)
            gone, todo = set(), [*self._moved_away]
            while todo:
                descriptor = todo.pop()
                gone.add(descriptor)
                todo += below.get(descriptor, [])
            self._moved_away.clear()
        self._unwatch(gone)


class _Handler(FileSystemEventHandler):
    """Turns the events of a polling observer into hints."""

    def __init__(self, root: Path, hints: queue.SimpleQueue[Hint]) -> None:
        self._prefix = os.fsencode(root) + b"/"
        self._hints = hints

    def dispatch(self, event: FileSystemEvent) -> None:
        if event.event_type not in ("created", "moved"):
            return
        moved = event.event_type == "moved"
        path = os.fsencode(event.dest_path if moved else event.src_path)
        if path.startswith(self._prefix):
            inner = os.fsdecode(path[len(self._prefix) :])
            folder = event.is_directory  # what watchdog cannot read of it is told by nobody
            self._hints.put(Hint(inner, finished=moved, is_folder=folder, unseen=folder))


class Watcher:
    """Puts a `Hint` on a queue for whatever appears or is finished below the data root.

    Args:
        root: The data root, resolved.
        observer: 'inotify' for the kernel's events, 'polling' to compare listings.
        hints: The queue.
        pulse: Told of each folder that is watched.
    """

    def __init__(
        self,
        root: Path,
        observer: str,
        hints: queue.SimpleQueue[Hint],
        pulse: Pulse | None = None,
    ) -> None:
        self._root = root
        self._polls = observer == "polling"
        self._hints = hints
        self._pulse = pulse or Pulse()
        self._observer: BaseThread | None = None

    def start(self) -> None:
        """Set up the watches; returns when all stand.

        Raises:
            NeedsHuman: The data root cannot be watched.
        """
        try:
            if self._polls:
                self._observer = self._start_polling()
                return
            self._observer = inotify = _Inotify(self._root, self._hints, self._pulse)
            inotify.start()
            inotify.watch_all()
        except OSError as error:
            self.stop()
            raise _explain(error, self._root) from None

    def _start_polling(self) -> BaseThread:
        from watchdog.observers.polling import PollingObserver

        observer = PollingObserver(timeout=POLLING_S)
        observer.schedule(_Handler(self._root, self._hints), str(self._root), recursive=True)
        observer.start()
        return observer

    def is_alive(self) -> bool:
        """Say whether every thread that carries events is still there."""
        if self._observer is None:
            return False
        emitters = getattr(self._observer, "emitters", ())
        return all(thread.is_alive() for thread in (self._observer, *emitters))

    def stop(self) -> None:
        """Take the watches down."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            if observer is not threading.current_thread():
                observer.join(timeout=2.0)

    def check_limit(self) -> None:
        """Return if all folders are watched; try again to watch those that could not be.

        Raises:
            NeedsHuman: Some cannot be watched.
        """
        if not isinstance(self._observer, _Inotify) or self._observer.unwatched is None:
            return
        try:
            self._observer.watch_all()
        except OSError as error:
            raise _explain(error, self._root) from None
        if self._observer.unwatched is not None:
            raise _explain(self._observer.unwatched, self._root)


def _explain(error: OSError, root: Path) -> NeedsHuman:
    """Return what it means that the watches cannot be set up, and what to do."""
    limits = {errno.ENOSPC: "max_user_watches", errno.EMFILE: "max_user_instances"}
    if error.errno not in limits:
        return NeedsHuman(
            f"{root} cannot be watched: {error.strerror or error}; regd goes on by scanning",
            hint="check that the folder is there and can be read",
        )
    key = limits[error.errno]
    try:
        now = int(Path(f"/proc/sys/fs/inotify/{key}").read_text())
    except (OSError, ValueError):
        now = 8192
    return NeedsHuman(
        f"the kernel's limit fs.inotify.{key} ({now}) is too low to watch {root}; "
        "regd goes on by scanning",
        hint=f"raise it: sysctl fs.inotify.{key}={max(now * 4, 524288)}",
    )
