"""Large files are hashed aside: right, fairly, and never in the way of small ones."""

from __future__ import annotations

import hashlib
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from regd import files, hashing, worker
from regd.errors import FileChanged, Stopping
from regd.files import Found
from regd.hashing import Hasher
from tests.rig import Rig, idle, md5, until, write

BLOCK = files._BLOCK


class Gate:
    """Lets a reader go on block by block."""

    def __init__(self) -> None:
        self.waiting = threading.Semaphore(0)
        self.passes = threading.Semaphore(0)
        self.is_open = False

    def __call__(self, _: int) -> None:
        if not self.is_open:
            self.waiting.release()
            assert self.passes.acquire(timeout=20)

    def arrived(self) -> None:
        """Wait until the reader has read one more block."""
        assert self.waiting.acquire(timeout=20)

    def open(self) -> None:
        """Let it read all."""
        self.is_open = True
        for _ in range(100):  # those that wait
            self.passes.release()


@contextmanager
def hasher(
    root: Path, on_read: Callable[[int], object] = lambda _: None, threads: int = 1
) -> Iterator[tuple[Hasher, queue.SimpleQueue[str]]]:
    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    made = Hasher(root, on_read, done.put, threads)
    yield made, done
    made.close()
    for thread in made._started:
        thread.join(timeout=20)
        assert not thread.is_alive()


def found(root: Path, relative: str) -> Found:
    folder, _, name = relative.rpartition("/")
    (one,) = [f for f in files.walk(root, folder) if f.path == name]
    return one


def put(root: Path, relative: str, size: int) -> Path:
    path = root / relative
    write(path, os.urandom(size))
    return path


def test_the_hash_of_a_file_comes_later(tmp_path: Path) -> None:
    path = put(tmp_path, "s/a", 3 * BLOCK + 1)
    with hasher(tmp_path) as (aside, done):
        assert aside.md5("s/a", found(tmp_path, "s/a")) is None
        assert done.get(timeout=20) == "s/a"
        assert aside.is_busy()  # it waits for who asked
        assert aside.md5("s/a", found(tmp_path, "s/a")) == md5(path)
        assert not aside.is_busy()


def test_whatever_is_asked_for_in_whatever_order_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_SLICE", BLOCK)
    chance = random.Random(3)
    names = [f"s/{n}" for n in range(40)]
    paths = {name: put(tmp_path, name, chance.randrange(1, 9 * BLOCK)) for name in names}
    with hasher(tmp_path, threads=3) as (aside, done):
        for name in names:
            aside.md5(name, found(tmp_path, name))
        assert sorted(done.get(timeout=20) for _ in names) == sorted(names)
        assert {n: aside.md5(n, found(tmp_path, n)) for n in names} == {
            n: md5(path) for n, path in paths.items()
        }
    assert open_files(tmp_path) == []


def test_the_file_with_the_least_left_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_SLICE", 2 * BLOCK)
    sizes = {"s/huge": 20, "s/large": 8, "s/small": 3, "s/late": 1}
    for name, blocks in sizes.items():
        put(tmp_path, name, blocks * BLOCK)
    gate = Gate()
    with hasher(tmp_path, gate) as (aside, done):
        aside.md5("s/huge", found(tmp_path, "s/huge"))
        gate.arrived()
        for name in ("s/large", "s/small"):
            aside.md5(name, found(tmp_path, name))
        gate.passes.release()
        gate.arrived()  # its first slice has been read
        gate.passes.release()
        gate.arrived()  # in the small one
        aside.md5("s/late", found(tmp_path, "s/late"))
        gate.open()
        order = [done.get(timeout=20) for _ in sizes]
    # the small one had less left than the late one when its slice was over
    assert order == ["s/small", "s/late", "s/large", "s/huge"]


def test_a_file_that_changed_is_hashed_again(tmp_path: Path) -> None:
    put(tmp_path, "s/a", 2 * BLOCK)
    with hasher(tmp_path) as (aside, done):
        aside.md5("s/a", found(tmp_path, "s/a"))
        done.get(timeout=20)
        path = put(tmp_path, "s/a", 2 * BLOCK)
        assert aside.md5("s/a", found(tmp_path, "s/a")) is None
        done.get(timeout=20)
        assert aside.md5("s/a", found(tmp_path, "s/a")) == md5(path)


def test_a_file_of_the_same_size_and_time_is_hashed_again(tmp_path: Path) -> None:
    old = put(tmp_path, "s/a", BLOCK).stat()
    with hasher(tmp_path) as (aside, done):
        aside.md5("s/a", found(tmp_path, "s/a"))
        done.get(timeout=20)
        path = put(tmp_path, "s/a", BLOCK)
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
        assert aside.md5("s/a", found(tmp_path, "s/a")) is None


def test_what_hinders_is_raised_to_who_asks_and_tried_again(tmp_path: Path) -> None:
    path = put(tmp_path, "s/a", 4 * BLOCK)
    gate = Gate()
    with hasher(tmp_path, gate) as (aside, done):
        before = found(tmp_path, "s/a")
        aside.md5("s/a", before)
        gate.arrived()
        with path.open("ab") as writer:
            gate.open()
            assert done.get(timeout=20) == "s/a"
            with pytest.raises(files.FileHeld):
                aside.md5("s/a", before)
            writer.write(b"more")
        assert not aside.is_busy()
        aside.md5("s/a", before)  # the worker has not seen yet that it grew
        done.get(timeout=20)
        with pytest.raises(FileChanged):
            aside.md5("s/a", before)


def test_what_nobody_asks_for_any_more_is_not_read_on(tmp_path: Path) -> None:
    for name in ("a/1", "a/2", "ab/1"):
        put(tmp_path, name, 50 * BLOCK)
    gate = Gate()
    read: list[int] = []

    def on_read(size: int) -> None:
        read.append(size)
        gate(size)

    with hasher(tmp_path, on_read) as (aside, done):
        for name in ("a/1", "a/2"):
            aside.md5(name, found(tmp_path, name))
        gate.arrived()
        aside.forget("a")
        assert not aside.is_busy()
        aside.md5("ab/1", found(tmp_path, "ab/1"))
        gate.open()
        assert done.get(timeout=20) == "ab/1"
        assert len(read) == 51
        assert open_files(tmp_path) == []


def test_the_end_of_regd_ends_it(tmp_path: Path) -> None:
    put(tmp_path, "a/1", 50 * BLOCK)
    stop = threading.Event()

    def on_read(_: int) -> None:
        stop.set()
        raise Stopping("stopped")

    with hasher(tmp_path, on_read) as (aside, _):
        aside.md5("a/1", found(tmp_path, "a/1"))
        assert stop.wait(20)
    assert open_files(tmp_path) == []


def open_files(root: Path) -> list[str]:
    links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return [link for link in links if link.startswith(f"{root}/")]


# --- with the workers ----------------------------------------------------------------------------


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> int:
    """Files of that many bytes count as large."""
    monkeypatch.setattr(worker, "LARGE", 1000)
    return 1000


def test_a_large_file_keeps_nothing_small_waiting(rig: Rig, small_is_large: int) -> None:
    gate = Gate()
    large = ["alf/probe00/spikes.times.npy", "alf/spikes.times.npy"]
    for number in range(1, 7):  # more sessions than workers
        write(rig.record(number) / large[0], os.urandom(2 * small_is_large))
        write(rig.folder(number) / large[1], os.urandom(3 * small_is_large))
    with rig.running() as daemon:
        on_read = daemon.hasher.on_read

        def stands_still(size: int) -> None:
            if threading.current_thread().name.startswith("hasher"):
                gate(size)
            on_read(size)

        daemon.hasher.on_read = stands_still
        gate.arrived()
        write(rig.record(7) / "alf/spikes.times.npy", b"small")
        until(lambda: not list(rig.root.rglob("create_me.flag")))
        for number in range(1, 7):
            until(lambda n=number: len(rig.held(n)) == 4)
        until(lambda: len(rig.held(7)) == 6)
        gate.open()
        until(lambda: idle(daemon))
        assert not daemon.hasher.is_busy()
    for number in range(1, 7):
        held = rig.held(number)
        assert {name: held[name]["hash"] for name in large} == {
            name: md5(rig.folder(number) / name) for name in large
        }


def test_a_large_file_is_registered_beside_one_that_fails(rig: Rig, small_is_large: int) -> None:
    """A scan does not end before what it has hashed is registered."""
    folder = rig.record()
    write(folder / "alf/spikes.times.npy", os.urandom(2 * small_is_large))
    real = files.md5

    def fails(root: Path, relative: str, *rest: Any) -> str:
        if relative.endswith("wheel.position.npy"):
            raise OSError(5, "the disk fails")
        return real(root, relative, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "md5", fails)
        rig.scan().close()
    assert rig.held()["alf/spikes.times.npy"]["hash"] == md5(folder / "alf/spikes.times.npy")
    assert "alf/_ibl_wheel.position.npy" not in rig.held()


def test_a_large_file_that_is_written_to_after_it_was_hashed(rig: Rig, small_is_large: int) -> None:
    path = rig.record() / "alf/spikes.times.npy"
    write(path, os.urandom(2 * small_is_large))
    real = files.check_finished
    todo = [path]

    def written_first(root: Path, relative: str, expected: files.Signature) -> None:
        if relative.endswith(path.name) and todo:
            write(todo.pop(), os.urandom(3 * small_is_large))
        real(root, relative, expected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "check_finished", written_first)
        rig.scan().close()
    held = rig.held()["alf/spikes.times.npy"]
    assert (held["hash"], held["file_size"]) == (hashlib.md5(path.read_bytes()).hexdigest(), 3000)
