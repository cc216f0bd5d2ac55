"""Hints from the real kernel. Whatever waits, waits on the queue, with a limit."""

import errno
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from watchdog.observers.inotify_c import InotifyFD

from regd import watch
from regd.errors import NeedsHuman
from regd.watch import Hint, Watcher

WITHIN_S = 10.0  # far more than any hint takes, so that a busy machine fails no test
QUEUED_EVENTS = Path("/proc/sys/fs/inotify/max_queued_events")


class Hints:
    """A queue of hints, and what has come of it."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Hint] = queue.SimpleQueue()
        self.seen: list[Hint] = []

    def until(self, wanted: Callable[[Hint], bool]) -> Hint:
        """Return the first hint that is wanted, as soon as it comes."""
        deadline = time.monotonic() + WITHIN_S
        while True:
            try:
                hint = self.queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no such hint; the last that came: {self.seen[-20:]}")
            self.seen.append(hint)
            if wanted(hint):
                return hint

    def of(self, path: str, **more: bool) -> Hint:
        """Return the first hint of that path with those attributes."""
        return self.until(
            lambda h: h.path == path and all(getattr(h, k) is v for k, v in more.items())
        )

    def up_to_mark(self, root: Path) -> list[Hint]:
        """Return all that came before a file made now; the kernel keeps the order."""
        self.seen.clear()
        (root / "mark").write_bytes(b"")
        self.of("mark", finished=True)
        return [h for h in self.seen if h.path != "mark"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "a/2020-01-01/001/alf").mkdir(parents=True)
    return folder.resolve()


@contextmanager
def watching(root: Path, observer: str = "inotify") -> Iterator[tuple[Watcher, Hints]]:
    hints = Hints()
    watcher = Watcher(root, observer, hints.queue)
    watcher.start()
    try:
        yield watcher, hints
    finally:
        watcher.stop()


@pytest.fixture
def hints(root: Path) -> Iterator[Hints]:
    with watching(root) as (_, hints):
        yield hints


ALF = "a/2020-01-01/001/alf"


# --- the kernel's events -------------------------------------------------------------------------


def test_a_file_that_appears_and_one_that_is_closed(root: Path, hints: Hints) -> None:
    with (root / ALF / "x.npy").open("wb") as file:
        assert hints.of(f"{ALF}/x.npy") == Hint(f"{ALF}/x.npy")
        file.write(b"1")
    assert hints.of(f"{ALF}/x.npy", finished=True) == Hint(f"{ALF}/x.npy", finished=True)


def test_a_file_opened_again_to_be_written(root: Path, hints: Hints) -> None:
    (root / ALF / "x.npy").write_bytes(b"1")
    hints.of(f"{ALF}/x.npy", finished=True)
    with (root / ALF / "x.npy").open("ab") as file:
        file.write(b"2")
    hints.of(f"{ALF}/x.npy", finished=True)


def test_a_file_moved_into_place(root: Path, hints: Hints) -> None:
    (root / ALF / "x.npy.part").write_bytes(b"1")
    (root / ALF / "x.npy.part").rename(root / ALF / "x.npy")
    assert hints.of(f"{ALF}/x.npy") == Hint(f"{ALF}/x.npy", finished=True)


def test_a_file_moved_in_from_elsewhere(root: Path, hints: Hints) -> None:
    (root.parent / "x.npy").write_bytes(b"1")
    (root.parent / "x.npy").rename(root / ALF / "x.npy")
    hints.of(f"{ALF}/x.npy")


def test_a_folder_that_appears_is_watched(root: Path, hints: Hints) -> None:
    (root / "b").mkdir()
    assert hints.of("b") == Hint("b", is_folder=True)
    (root / "b/2020-01-01").mkdir()
    assert hints.of("b/2020-01-01", is_folder=True)
    (root / "b/2020-01-01/001").mkdir()
    hints.of("b/2020-01-01/001", is_folder=True)
    (root / "b/2020-01-01/001/x.npy").write_bytes(b"1")
    hints.of("b/2020-01-01/001/x.npy", finished=True)


def test_a_whole_tree_moved_within_the_root(root: Path, hints: Hints) -> None:
    (root / ALF / "x.npy").write_bytes(b"1")
    (root / "a").rename(root / "b")
    moved = hints.of("b", is_folder=True)
    assert moved.finished
    hints.of("b/2020-01-01/001/alf/x.npy", finished=True)
    (root / "b/2020-01-01/001/alf/y.npy").write_bytes(b"1")
    hints.of("b/2020-01-01/001/alf/y.npy", finished=True)  # under its new name


def test_a_whole_tree_moved_in_from_elsewhere(root: Path, hints: Hints) -> None:
    new = root.parent / "new/2020-01-01/001"
    new.mkdir(parents=True)
    (new / "x.npy").write_bytes(b"1")
    (root.parent / "new").rename(root / "new")
    hints.of("new", is_folder=True)
    hints.of("new/2020-01-01/001/x.npy")
    (root / "new/2020-01-01/001/y.npy").write_bytes(b"1")
    hints.of("new/2020-01-01/001/y.npy", finished=True)


def test_a_name_that_is_not_utf8(root: Path, hints: Hints) -> None:
    name = os.fsencode(root / ALF) + b"/\xff.npy"
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
    hint = hints.of(f"{ALF}/\udcff.npy", finished=True)
    assert os.fsencode(hint.path).endswith(b"/\xff.npy")


def test_what_is_no_news_is_not_told(root: Path, hints: Hints) -> None:
    file = root / ALF / "x.npy"
    file.write_bytes(b"1")
    hints.of(f"{ALF}/x.npy", finished=True)
    hints.up_to_mark(root)
    file.read_bytes()
    file.chmod(0o600)
    os.utime(file)
    list((root / ALF).iterdir())
    with file.open("r+b") as opened:
        opened.write(b"2")
        opened.flush()
        os.fsync(opened.fileno())
        while_open = hints.up_to_mark(root)
    file.unlink()
    (root / ALF).rmdir()
    assert while_open == []
    assert hints.up_to_mark(root) == [Hint(f"{ALF}/x.npy", finished=True)]  # the closing


def test_what_leaves_the_root_is_not_told(root: Path, hints: Hints) -> None:
    (root / ALF / "x.npy").write_bytes(b"1")
    hints.of(f"{ALF}/x.npy", finished=True)
    (root / ALF / "x.npy").rename(root.parent / "x.npy")
    shutil.move(root / ALF, root.parent / "alf")
    assert hints.up_to_mark(root) == []


def test_what_is_there_already_is_not_told(root: Path) -> None:
    (root / ALF / "x.npy").write_bytes(b"1")
    with watching(root, "auto") as (_, hints):
        assert hints.up_to_mark(root) == []


def test_a_link_is_not_followed(root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (root / "link").symlink_to(outside)
    with watching(root) as (_, hints):
        (outside / "x.npy").write_bytes(b"1")
        assert hints.up_to_mark(root) == []


def test_nothing_comes_after_stop(root: Path) -> None:
    threads = threading.active_count()
    with watching(root) as (watcher, hints):
        hints.up_to_mark(root)
        watcher.stop()
    assert threading.active_count() == threads
    (root / "after").touch()
    logging.getLogger("watchdog.observers.inotify").warning("Inotify queue overflowed")
    assert hints.queue.empty()


def test_a_root_whose_name_begins_like_anothers(root: Path, hints: Hints) -> None:
    (root.parent / "data2").mkdir()
    (root.parent / "data2/x").touch()
    assert hints.up_to_mark(root) == []


# --- events that are lost ------------------------------------------------------------------------


def overflow(root: Path) -> list[Hint]:
    """Make more events than the kernel keeps, while nobody reads them.

    Returns:
        What was told of lost events, with Hint('rebuilt') where the watches stood again.
    """
    limit = int(QUEUED_EVENTS.read_text())
    if limit > 40_000:
        pytest.skip(f"it takes too long to make {limit} events")
    with watching(root) as (watcher, hints):
        (emitter,) = watcher._observer.emitters
        group: Any = emitter._inotify  # type: ignore[attr-defined]
        add_all = group._add_all_callbacks

        def rebuild(path: bytes) -> None:
            add_all(path)
            hints.queue.put(Hint("rebuilt"))

        group._add_all_callbacks = rebuild
        with group._lock:  # the reader stops at the first event
            for n in range(limit // 2 + 2000):  # each makes two events, and some are in the reader
                os.close(os.open(root / ALF / f"{n}.npy", os.O_CREAT | os.O_WRONLY))
        hints.of("rebuilt")
        told = hints.seen
        # the watches still stand, and in new folders, too
        (root / ALF / "deeper").mkdir()
        hints.of(f"{ALF}/deeper", is_folder=True)
        (root / ALF / "deeper/x.npy").touch()
        hints.of(f"{ALF}/deeper/x.npy", finished=True)
        return [h for h in told if h.overflow or h.path == "rebuilt"]


def test_lost_events_are_told_as_an_overflow(root: Path) -> None:
    assert Hint("", overflow=True) in overflow(root)


@pytest.mark.xfail(
    strict=True, reason="it is told before: a scan may be over before the watches stand again"
)
def test_lost_events_are_told_once_the_watches_stand_again(root: Path) -> None:
    told = overflow(root)
    assert told.index(Hint("rebuilt")) < len(told) - 1 - told[::-1].index(Hint("", overflow=True))


def test_lost_events_are_told_however_little_is_logged(root: Path) -> None:
    top, chatty = logging.getLogger(), logging.getLogger("watchdog")
    before = top.level, chatty.level
    try:  # as `log.level: error` sets it
        top.setLevel(logging.ERROR)
        chatty.setLevel(logging.WARNING)
        assert Hint("", overflow=True) in overflow(root)
    finally:
        top.setLevel(before[0])
        chatty.setLevel(before[1])


def test_two_watchers_tell_their_own_queues(root: Path) -> None:
    with watching(root) as (_, two):
        with watching(root) as (_, one):
            pass
        logging.getLogger("watchdog.observers.inotify_c").warning("Inotify queue overflowed; lost")
        assert two.until(lambda h: h.overflow)
        assert one.queue.empty()


# --- watches that cannot be had ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "key"),
    [
        (errno.ENOSPC, "fs.inotify.max_user_watches"),
        (errno.EMFILE, "fs.inotify.max_user_instances"),
    ],
)
def test_too_few_watches_are_explained(
    root: Path, monkeypatch: pytest.MonkeyPatch, code: int, key: str
) -> None:
    watcher = Watcher(root, "inotify", Hints().queue)

    def start() -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(watcher._observer, "start", start)
    with pytest.raises(NeedsHuman) as caught:
        watcher.start()
    assert f"sysctl {key}=" in str(caught.value)
    assert str(root) in str(caught.value)
    assert not any(
        isinstance(f, watch._OverflowFilter)
        for name in watch._WATCHDOG_LOGGERS
        for f in logging.getLogger(name).filters
    )
    watcher._observer._inotify_fd.stop()  # type: ignore[attr-defined]


@pytest.mark.xfail(strict=True, reason="watchdog's reader, started by its constructor, goes on")
def test_a_watcher_that_could_not_start_leaves_no_thread(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_callback(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(InotifyFD, "add_callback", add_callback)
    before = set(threading.enumerate())
    watcher = Watcher(root, "inotify", Hints().queue)
    with pytest.raises(NeedsHuman, match="max_user_watches"):
        watcher.start()
    left = set(threading.enumerate()) - before
    if left:
        watcher._observer._inotify_fd.stop()  # type: ignore[attr-defined]
    assert not left


@pytest.mark.xfail(
    strict=True, raises=pytest.fail.Exception, reason="watchdog says nothing of folders below"
)
def test_a_folder_below_the_root_that_gets_no_watch_is_told(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = InotifyFD.add_callback

    def add_callback(self: InotifyFD, path: bytes, *more: Any) -> Any:
        if os.fsdecode(path) != str(root):  # the limit is reached after the first one
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(self, path, *more)

    monkeypatch.setattr(InotifyFD, "add_callback", add_callback)
    watcher = Watcher(root, "inotify", Hints().queue)
    try:
        with pytest.raises(NeedsHuman, match="max_user_watches"):
            watcher.start()
    finally:
        watcher.stop()


@pytest.mark.xfail(
    strict=True, raises=OSError, reason="the kernel refuses in the constructor, which lets it out"
)
def test_too_many_instances_are_explained(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(_: type) -> int:
        raise OSError(errno.EMFILE, "inotify instance limit reached")

    monkeypatch.setattr(InotifyFD, "_create_inotify_fd", classmethod(create))
    with pytest.raises(NeedsHuman, match="max_user_instances"):
        Watcher(root, "inotify", Hints().queue).start()


def test_a_root_that_is_gone(root: Path) -> None:
    shutil.rmtree(root)
    watcher = Watcher(root, "inotify", Hints().queue)
    with pytest.raises(NeedsHuman, match="goes on by scanning"):
        watcher.start()
    watcher._observer._inotify_fd.stop()  # type: ignore[attr-defined]


# --- without events ------------------------------------------------------------------------------


def test_polling(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLLING_S", 0.05)
    with watching(root, "polling") as (_, hints):
        (root / ALF / "x.npy").write_bytes(b"1")
        assert hints.of(f"{ALF}/x.npy") == Hint(f"{ALF}/x.npy")
        (root / "b").mkdir()
        assert hints.of("b") == Hint("b", is_folder=True)
        (root / ALF / "x.npy").rename(root / ALF / "y.npy")
        hints.of(f"{ALF}/y.npy")
