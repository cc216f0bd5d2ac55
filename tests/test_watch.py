"""Hints from the real kernel. Whatever waits, waits on the queue, with a limit."""

import errno
import logging
import os
import queue
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from watchdog.observers.inotify import InotifyObserver
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


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_instance(_: type) -> int:
    raise OSError(errno.EMFILE, "inotify instance limit reached")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a Path would hide what is counted


def assert_explained(error: NeedsHuman, key: str, root: Path) -> None:
    """What is wrong is in the reason; what to do about it in the hint, and only there."""
    assert key in error.reason
    assert str(root) in error.reason
    assert "goes on by scanning" in error.reason
    assert "sysctl" not in error.reason
    match = re.fullmatch(rf"raise it: sysctl {re.escape(key)}=(\d+)", error.hint)
    assert match
    assert int(match[1]) > int(Path("/proc/sys", key.replace(".", "/")).read_text())


def assert_no_thread_since(before: set[threading.Thread]) -> None:
    """No thread but those from before is there, or still is in a moment."""
    for thread in set(threading.enumerate()) - before:
        thread.join(WITHIN_S)
        assert not thread.is_alive()


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

    def start(_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(InotifyObserver, "start", start)
    before = set(threading.enumerate())
    with pytest.raises(NeedsHuman) as caught:
        watcher.start()
    assert_explained(caught.value, key, root)
    assert_no_thread_since(before)
    assert not watcher.is_alive()
    assert not any(
        isinstance(f, watch._OverflowFilter)
        for name in watch._WATCHDOG_LOGGERS
        for f in logging.getLogger(name).filters
    )


def test_a_watcher_that_was_not_started(root: Path) -> None:
    before = set(threading.enumerate())
    watcher = Watcher(root, "inotify", Hints().queue)
    assert watcher._observer is None
    assert not watcher.is_alive()
    watcher.stop()
    assert set(threading.enumerate()) <= before


def test_a_watcher_can_be_started_once_it_could_not_be(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hints = Hints()
    watcher = Watcher(root, "inotify", hints.queue)
    with monkeypatch.context() as patch:
        patch.setattr(InotifyFD, "add_callback", no_space)
        with pytest.raises(NeedsHuman):
            watcher.start()
    watcher.start()
    try:
        assert watcher.is_alive()
        assert hints.up_to_mark(root) == []
    finally:
        watcher.stop()


def test_a_watcher_that_could_not_start_leaves_no_thread(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InotifyFD, "add_callback", no_space)
    before = set(threading.enumerate())
    watcher = Watcher(root, "inotify", Hints().queue)
    with pytest.raises(NeedsHuman) as caught:
        watcher.start()
    assert_explained(caught.value, "fs.inotify.max_user_watches", root)
    assert_no_thread_since(before)


def test_a_folder_below_the_root_that_gets_no_watch_is_told(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, granted = InotifyFD.add_callback, []

    def add_callback(self: InotifyFD, path: bytes, *more: Any) -> Any:
        if granted:  # the limit is reached after the first one
            raise OSError(errno.ENOSPC, "No space left on device")
        granted.append(os.fsdecode(path))
        return add(self, path, *more)

    monkeypatch.setattr(InotifyFD, "add_callback", add_callback)
    with watching(root) as (watcher, hints):
        assert granted == [str(root)]  # watchdog has said nothing of the folders below
        before = set(threading.enumerate())
        for _ in range(3):
            with pytest.raises(NeedsHuman) as caught:
                watcher.check_limit()
            assert_explained(caught.value, "fs.inotify.max_user_watches", root)
        assert_no_thread_since(before)
        assert watcher.is_alive()  # what is watched stays so
        assert hints.up_to_mark(root) == []


UNDER_A_LIMIT = """
    import queue, sys
    from pathlib import Path
    from regd.errors import NeedsHuman
    from regd.watch import Watcher

    def says() -> str:
        try:
            watcher.check_limit()
        except NeedsHuman as error:
            return error.hint
        return "enough"

    limit = Path("/proc/sys/user/max_inotify_watches")
    limit.write_text("3")
    watcher = Watcher(Path(sys.argv[1]), "inotify", queue.SimpleQueue())
    watcher.start()
    print(says(), flush=True)
    limit.write_text("100")
    print(says(), flush=True)
    watcher.stop()
"""


def test_the_kernels_own_limit(root: Path) -> None:
    # the limit of a user namespace of its own is nobody else's
    unshare = ["unshare", "--user", "--map-root-user"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], check=False).returncode
    ):
        pytest.skip("needs a user namespace, which this machine does not grant")
    script = [sys.executable, "-c", textwrap.dedent(UNDER_A_LIMIT), str(root)]
    done = subprocess.run([*unshare, *script], check=True, capture_output=True, text=True)
    few, enough = done.stdout.splitlines()
    assert few.startswith("raise it: sysctl fs.inotify.max_user_watches=")
    assert enough == "enough"


def test_enough_watches(root: Path) -> None:
    with watching(root) as (watcher, hints):
        before, descriptors = set(threading.enumerate()), open_descriptors()
        for _ in range(3):
            watcher.check_limit()
        assert_no_thread_since(before)
        deadline = time.monotonic() + WITHIN_S
        while open_descriptors() > descriptors and time.monotonic() < deadline:
            time.sleep(0.01)
        assert open_descriptors() == descriptors
        assert hints.up_to_mark(root) == []


def test_a_limit_of_instances_that_is_reached_later(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watching(root) as (watcher, _):
        monkeypatch.setattr(InotifyFD, "_create_inotify_fd", classmethod(no_instance))
        with pytest.raises(NeedsHuman) as caught:
            watcher.check_limit()
        assert_explained(caught.value, "fs.inotify.max_user_instances", root)


def test_polling_knows_no_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InotifyFD, "add_callback", no_space)
    Watcher(root, "polling", Hints().queue).check_limit()


def test_too_many_instances_are_explained(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InotifyFD, "_create_inotify_fd", classmethod(no_instance))
    before = set(threading.enumerate())
    with pytest.raises(NeedsHuman) as caught:
        Watcher(root, "inotify", Hints().queue).start()
    assert_explained(caught.value, "fs.inotify.max_user_instances", root)
    assert_no_thread_since(before)


def test_a_root_that_is_gone(root: Path) -> None:
    shutil.rmtree(root)
    watcher = Watcher(root, "inotify", Hints().queue)
    before = set(threading.enumerate())
    with pytest.raises(NeedsHuman, match="goes on by scanning") as caught:
        watcher.start()
    assert str(root) in caught.value.reason
    assert "sysctl" not in str(caught.value)
    assert caught.value.hint
    assert_no_thread_since(before)


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
