"""Hints from the real kernel. Whatever waits, waits on the queue, with a limit."""

import ctypes
import errno
import os
import queue
import random
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
from watchdog.observers.inotify_c import InotifyEvent, InotifyFD

from regd import watch
from regd.errors import NeedsHuman
from regd.watch import Hint, Watcher, _Inotify

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
    (root / "b/2020-01-01/001/x.npy").write_bytes(b"1")  # maybe before that folder is watched
    hints.of("b/2020-01-01/001/x.npy")


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
    assert hints.queue.empty()


def test_a_root_whose_name_begins_like_anothers(root: Path, hints: Hints) -> None:
    (root.parent / "data2").mkdir()
    (root.parent / "data2/x").touch()
    assert hints.up_to_mark(root) == []


# --- events that are lost ------------------------------------------------------------------------


@contextmanager
def nobody_reads(watcher: Watcher) -> Iterator[None]:
    """Have the kernel's events read only afterwards."""
    inotify = watcher._observer
    assert isinstance(inotify, _Inotify)
    gate = threading.Event()
    handle = inotify.handle_event

    def held(event: InotifyEvent) -> None:
        gate.wait()
        handle(event)

    inotify.handle_event = held  # type: ignore[method-assign]
    try:
        yield
    finally:
        gate.set()


def overflow(root: Path) -> None:
    """Make more events than the kernel keeps."""
    limit = int(QUEUED_EVENTS.read_text())
    if limit > 40_000:
        pytest.skip(f"it takes too long to make {limit} events")
    for n in range(limit // 2 + 2000):  # each makes two events, and some are in the reader
        os.close(os.open(root / ALF / f"{n}.npy", os.O_CREAT | os.O_WRONLY))


def test_lost_events_are_told_once_all_folders_are_watched_again(root: Path) -> None:
    with watching(root) as (watcher, hints):
        with nobody_reads(watcher):
            overflow(root)
            (root / ALF / "lost/deep").mkdir(parents=True)  # of this nothing is told
        hints.until(lambda h: h.overflow)
        assert not [h for h in hints.seen if "lost" in h.path]
        (root / ALF / "lost/deep/x.npy").touch()
        hints.of(f"{ALF}/lost/deep/x.npy", finished=True)
        (root / ALF / "deeper").mkdir()
        hints.of(f"{ALF}/deeper", is_folder=True)
        (root / ALF / "deeper/x.npy").touch()  # maybe before that folder is watched
        hints.of(f"{ALF}/deeper/x.npy")


def test_a_folder_moved_while_events_are_lost_is_known_where_it_is(root: Path) -> None:
    with watching(root) as (watcher, hints):
        with nobody_reads(watcher):
            overflow(root)
            (root / "a/2020-01-01").rename(root / "a/2020-01-02")
            (root / "b/2020-01-01").mkdir(parents=True)
            shutil.move(root / "b", root.parent / "b")
        hints.until(lambda h: h.overflow)
        (root / "a/2020-01-02/001/alf/x.npy").touch()
        (root.parent / "b/2020-01-01/x.npy").touch()
        assert hints.of("a/2020-01-02/001/alf/x.npy", finished=True)
        assert not [h for h in hints.up_to_mark(root) if h.path.startswith("b/")]


def test_two_watchers_tell_their_own_queues(root: Path) -> None:
    other = root.parent / "other"
    other.mkdir()
    with watching(root) as (_, one), watching(other) as (_, two):
        (other / "x").touch()
        two.of("x", finished=True)
        assert one.up_to_mark(root) == []


# --- folders that come, go and are renamed, at every moment --------------------------------------


def test_whatever_is_done_to_folders_each_is_known_where_it_is(root: Path) -> None:
    """At random; then each folder's path is asked for by a file in it."""
    chance = random.Random(7)
    with watching(root) as (watcher, hints):
        folders = [root / "a"]
        outside = root.parent / "outside"
        outside.mkdir()
        for n in range(400):
            folder = chance.choice(folders)
            match chance.randrange(6):
                case 0 | 1 | 2:
                    (folder / f"n{n}/deep").mkdir(parents=True, exist_ok=True)
                case 3 if folder != root / "a":
                    folder.rename(root / "a" / f"m{n}")
                case 4 if folder != root / "a":
                    folder.rename(outside / f"o{n}")
                    if chance.random() < 0.5:
                        (outside / f"o{n}").rename(root / "a" / f"b{n}")
                case 5 if folder != root / "a":
                    shutil.rmtree(folder)
            folders = [root / "a", *(p for p in (root / "a").rglob("*") if p.is_dir())]
            if n % 20 == 0:
                hints.up_to_mark(root)  # at times the reader is behind, at times it is not
        hints.up_to_mark(root)
        for folder in folders:
            (folder / "x.npy").touch()
        told = {h.path for h in hints.up_to_mark(root) if h.finished}
        assert told == {str((folder / "x.npy").relative_to(root)) for folder in folders}
        inotify = watcher._observer
        assert isinstance(inotify, _Inotify)
        all_of_them = [root, *(p for p in root.rglob("*") if p.is_dir())]
        assert len(inotify._folders) == len(all_of_them)
        for folder in outside.rglob("*"):
            if folder.is_dir():
                (folder / "y.npy").touch()
        assert hints.up_to_mark(root) == []


@pytest.mark.parametrize("fails", ["watch", "list"])
def test_a_folder_that_cannot_be_seen_into_is_told_as_such(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    outside = tmp_path / "outside"
    for name in ("b/2020-01-01", "c/2020-01-01"):
        (outside / name).mkdir(parents=True)
    scandir, add_watch = os.scandir, watch.inotify_add_watch

    def list_some(path: Any) -> Any:
        if os.fsencode(path).endswith(b"/b"):
            raise OSError(errno.EIO, "the disk fails")
        return scandir(path)

    def watch_some(descriptor: Any, path: bytes, mask: Any) -> int:
        return no_space() if path.endswith(b"/b") else add_watch(descriptor, path, mask)

    with watching(root) as (_, hints):
        if fails == "watch":
            monkeypatch.setattr(watch, "inotify_add_watch", watch_some)
        else:
            monkeypatch.setattr(os, "scandir", list_some)
        outside.rename(root / "new")
        wanted = {("new/b", True), ("new/c", False), ("new/c/2020-01-01", False)}
        hints.until(lambda _: wanted <= {(h.path, h.unseen) for h in hints.seen})


# --- watches that cannot be had ------------------------------------------------------------------


def no_space(*_: object) -> int:
    ctypes.set_errno(errno.ENOSPC)
    return -1


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
        patch.setattr(watch, "inotify_add_watch", no_space)
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
    monkeypatch.setattr(watch, "inotify_add_watch", no_space)
    before = set(threading.enumerate())
    watcher = Watcher(root, "inotify", Hints().queue)
    with pytest.raises(NeedsHuman) as caught:
        watcher.start()
    assert_explained(caught.value, "fs.inotify.max_user_watches", root)
    assert_no_thread_since(before)


def test_a_folder_below_the_root_that_gets_no_watch_is_told_until_it_gets_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, granted = watch.inotify_add_watch, []

    def add_watch(inotify: int, path: bytes, mask: Any) -> int:
        if granted:  # the limit is reached after the first one
            return no_space()
        granted.append(os.fsdecode(path))
        return add(inotify, path, mask)

    monkeypatch.setattr(watch, "inotify_add_watch", add_watch)
    with watching(root) as (watcher, hints):
        before = set(threading.enumerate())
        for _ in range(3):
            granted.clear()
            with pytest.raises(NeedsHuman) as caught:
                watcher.check_limit()
            assert granted == [str(root)]
            assert_explained(caught.value, "fs.inotify.max_user_watches", root)
        assert_no_thread_since(before)
        assert watcher.is_alive()  # what is watched stays so
        assert hints.up_to_mark(root) == []
        monkeypatch.undo()
        watcher.check_limit()
        (root / ALF / "x.npy").touch()
        hints.of(f"{ALF}/x.npy", finished=True)


def test_a_new_folder_that_gets_no_watch_is_told(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watching(root) as (watcher, hints):
        watcher.check_limit()
        monkeypatch.setattr(watch, "inotify_add_watch", no_space)
        (root / "b").mkdir()
        hints.of("b", is_folder=True)
        hints.up_to_mark(root)
        with pytest.raises(NeedsHuman):
            watcher.check_limit()


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


def test_polling_knows_no_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "inotify_add_watch", no_space)
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
        assert hints.of("b") == Hint("b", is_folder=True, unseen=True)
        (root / ALF / "x.npy").rename(root / ALF / "y.npy")
        hints.of(f"{ALF}/y.npy")
