"""What the kernel tells about the data root, as hints on a queue. Nothing here reads a file."""

from __future__ import annotations

import errno
import logging
import os
import queue
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)

from regd.errors import NeedsHuman

if TYPE_CHECKING:
    from watchdog.observers.api import BaseObserver

# With every kind of event, the walk that sets up the watches of a large root floods watchdog's own
# queue with "opened" and "closed without writing", again and again.
_EVENTS: list[type[FileSystemEvent]] = [
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
]
_WATCHDOG_LOGGERS = ("watchdog.observers.inotify", "watchdog.observers.inotify_c")
POLLING_S = 5.0
"""How often a file system without events is compared with itself, in seconds."""


@dataclass(frozen=True, slots=True)
class Hint:
    """Something happened at a path.

    Attributes:
        path: Below the data root; '' for all of it.
        finished: Whether a writer closed the file, or it was moved into place.
        is_folder: Whether it is a folder that appeared.
        overflow: Whether events were lost, so that anything may have happened.
    """

    path: str
    finished: bool = False
    is_folder: bool = False
    overflow: bool = False


class _Handler(FileSystemEventHandler):
    def __init__(self, root: Path, hints: queue.SimpleQueue[Hint]) -> None:
        self._prefix = os.fsencode(root) + b"/"
        self._hints = hints

    def dispatch(self, event: FileSystemEvent) -> None:
        moved = isinstance(event, (FileMovedEvent, DirMovedEvent))
        path = os.fsencode(event.dest_path if moved else event.src_path)
        if not path.startswith(self._prefix):
            return
        inner = os.fsdecode(path[len(self._prefix) :])
        finished = moved or isinstance(event, FileClosedEvent)
        self._hints.put(Hint(inner, finished=finished, is_folder=event.is_directory))


class _OverflowFilter(logging.Filter):
    """Sees watchdog's log line about a lost event: it tells nobody else."""

    def __init__(self, hints: queue.SimpleQueue[Hint]) -> None:
        super().__init__()
        self._hints = hints

    def filter(self, record: logging.LogRecord) -> bool:
        if "overflow" in str(record.msg).lower():
            self._hints.put(Hint("", overflow=True))
        return True


class Watcher:
    """Puts a `Hint` on a queue for whatever appears or is finished below the data root.

    Args:
        root: The data root, resolved.
        observer: 'inotify' for the kernel's events, 'polling' to compare listings.
        hints: The queue.
    """

    def __init__(self, root: Path, observer: str, hints: queue.SimpleQueue[Hint]) -> None:
        self._root = root
        self._filter = _OverflowFilter(hints)
        self._kind = observer
        self._observer: BaseObserver | None = None
        self._handler = _Handler(root, hints)

    def start(self) -> None:
        """Set up the watches; returns when all stand.

        Raises:
            NeedsHuman: The kernel does not grant that many watches.
        """
        for name in _WATCHDOG_LOGGERS:
            logging.getLogger(name).addFilter(self._filter)
        # A folder whose watch is set twice, by its event and by the walk of its parent, is well;
        # the warning would reach nobody who can act on it.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
        try:
            self._observer = _make_observer(self._kind)
            self._observer.schedule(
                self._handler, str(self._root), recursive=True, event_filter=_EVENTS
            )
            self._observer.start()
        except OSError as error:
            self.stop()
            raise _explain(error, self._root) from None

    def is_alive(self) -> bool:
        """Say whether every thread that carries events is still there."""
        if self._observer is None:
            return False
        threads = [self._observer, *self._observer.emitters]
        # the thread that reads from the kernel; watchdog does not show it
        reader = getattr(self._observer, "_inotify_fd", None)
        return all(t.is_alive() for t in (*threads, reader) if t is not None)

    def stop(self) -> None:
        """Take the watches down."""
        for name in _WATCHDOG_LOGGERS:
            logging.getLogger(name).removeFilter(self._filter)
        observer, self._observer = self._observer, None
        if observer is not None:
            running = observer.is_alive()
            observer.stop()  # its reader runs from the start, even if the rest has failed
            if running:
                observer.join(timeout=2.0)

    def check_limit(self) -> None:
        """Return if the kernel grants one more watch; watchdog passes over folders it could not.

        Raises:
            NeedsHuman: It does not, so that some folders may not be watched.
        """
        if self._kind == "polling":
            return
        one_more: BaseObserver | None = None
        try:
            one_more = _make_observer(self._kind)
            one_more.schedule(FileSystemEventHandler(), str(self._root), event_filter=_EVENTS)
            one_more.start()
        except OSError as error:
            raise _explain(error, self._root) from None
        finally:
            if one_more is not None:
                one_more.stop()


def _make_observer(kind: str) -> BaseObserver:
    if kind == "polling":
        from watchdog.observers.polling import PollingObserver

        return PollingObserver(timeout=POLLING_S)
    from watchdog.observers import Observer

    return Observer()


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
