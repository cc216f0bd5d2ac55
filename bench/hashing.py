"""Reading files: how fast MD5 is, and what a program that writes beside it notices."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench import alyx
from bench.alyx import REGD
from bench.measure import PROJECT, Bench, Failed, Line, PeerMissing, alternate, run, running, s
from regd import files

_MB = 1_000_000
_RATE_MB_S = 200


def hashing(bench: Bench) -> Iterator[Line]:
    """MD5 of a file in the page cache against md5sum; two at once against one."""
    if not shutil.which("md5sum"):
        raise PeerMissing("md5sum is not here: apt install coreutils")
    size = bench.size(1 << 30, 128 << 20)
    with bench.scratch("hashing") as folder:
        pair = [folder / "a", folder / "b"]
        for file in pair:
            _fill(file, size)

        def ours(count: int = 1) -> float:
            _cache(pair)  # regd drops what it has hashed
            threads = [threading.Thread(target=_md5, args=(file,)) for file in pair[:count]]
            return _time(threads)

        def theirs(count: int = 1) -> float:
            _cache(pair)
            commands = [
                threading.Thread(target=run, args=(["md5sum", str(file)], file.with_suffix(".log")))
                for file in pair[:count]
            ]
            return _time(commands)

        one_s, md5sum_s = alternate(max(bench.runs, 3), ours, theirs)
        two_s, two_md5sum_s = alternate(max(bench.runs, 3), lambda: ours(2), lambda: theirs(2))
    yield Line(
        f"MD5 of {size >> 20} MiB in the page cache", _rate(size, one_s),
        f"md5sum: {_rate(size, md5sum_s)}", md5sum_s / one_s, 0.95, "of its speed", least=True,
    )  # fmt: skip
    yield Line(
        "two such files at once", _rate(2 * size, two_s),
        f"one: {_rate(size, one_s)}", 2 * one_s / two_s, 1.8, "times one", least=True,
        note=f"two md5sum: {2 * md5sum_s / two_md5sum_s:.2f} times one",
    )  # fmt: skip


def _time(threads: list[threading.Thread]) -> float:
    started_at = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started_at


def _cache(files: list[Path]) -> None:
    """Read files into the page cache."""
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.read(8 << 20):
                pass


def _md5(file: Path) -> None:
    expected = files.signature(file.parent, file.name)
    if expected is None:
        raise Failed(f"{file} is gone")
    files.md5(file.parent, file.name, expected, lambda _: None)


def _rate(size: float, took_s: float) -> str:
    return f"{size / took_s / _MB:.0f} MB/s"


def _fill(path: Path, size: int) -> None:
    """Write a file of random bytes, and have them on the disk."""
    block = os.urandom(8 << 20)
    with path.open("wb", buffering=0) as file:
        while (left := size - file.tell()) > 0:
            file.write(block[:left])
        os.fsync(file.fileno())


def writer(bench: Bench) -> Iterator[Line]:
    """What a program that records at 200 MB/s keeps of its rate while regd hashes."""
    wanted = bench.size(50_000, 1_000) * _MB
    seconds = bench.size(40, 3)
    with bench.scratch("writer") as folder:
        # the writer's file, removed before the next one, and a tenth of the disk's free space left
        free = 0.9 * shutil.disk_usage(folder).free - seconds * _RATE_MB_S * _MB
        size = min(wanted, int(free))
        parts = 5
        for n, name in enumerate(alyx.names(parts), 1):
            path = alyx.session_folder(folder / "data", 1) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _fill(path, size // parts + n)
        (alyx.session_folder(folder / "data", 1) / "create_me.flag").touch()
        alone = _write(folder, seconds)
        with alyx.sandbox(folder / "alyx.log") as url:
            config = alyx.configure(folder, folder / "data", url)
            started_at = time.perf_counter()
            with running([*REGD, "scan", "-c", str(config)], folder / "regd.log") as regd:
                beside = _write(folder, seconds)
                through = regd.poll() is not None
                regd.wait(3600)
            took_s = time.perf_counter() - started_at
        alyx.check_done(folder / "regd.log", 1, parts)
        again = _write(folder, seconds)
    alone_rate = (alone[0] + again[0]) / 2
    less = "" if size == wanted else f"; {wanted / 1e9:.0f} GB do not fit on this disk"
    early = "; regd was through before the writer" if through else ""
    yield Line(
        f"a writer at {_RATE_MB_S} MB/s while regd hashes {size / 1e9:.0f} GB",
        f"{beside[0]:.1f} MB/s", f"the writer alone: {alone_rate:.1f} MB/s",
        beside[0] / alone_rate, 0.98, "of its rate", least=True,
        note=f"of what it wrote, in the page cache at its end: alone {alone[1]}, beside regd "
        f"{beside[1]}; its longest write: alone {s(alone[2])}, beside regd {s(beside[2])}; regd: "
        f"{_rate(size, took_s)}{less}{early}",
    )  # fmt: skip


def _write(folder: Path, seconds: int) -> tuple[float, str, float]:
    """Write at a fixed rate; return the rate kept, the share still cached, the longest write."""
    target, facts = folder / "recording.bin", folder / "writer.txt"
    script = str(PROJECT / "bench" / "writing.py")
    run(
        [sys.executable, script, str(target), str(_RATE_MB_S), str(seconds)],
        folder / "writer.log",
        out=facts,
    )
    rate, longest = map(float, facts.read_text().split())
    cached = "unknown (no fincore)"
    if shutil.which("fincore"):
        columns = ["--bytes", "--noheadings", "--output", "RES", str(target)]
        run(["fincore", *columns], folder / "fincore.log", out=facts)
        cached = f"{int(facts.read_text()) / target.stat().st_size:.0%}"
    target.unlink()
    return rate, cached, longest
