"""Registering: new sessions, many at once, and one that is very large."""

from __future__ import annotations

import datetime
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from bench import alyx
from bench.alyx import REGD
from bench.measure import (
    PROJECT,
    Bench,
    Failed,
    Line,
    PeerMissing,
    Ran,
    mb,
    peak_bytes,
    run,
    running,
    s,
    until,
    until_logged,
)

WORKERS = 4  # regd's default, and as many connections for the bare requests
_CHUNK = 100  # files in a request, regd's default


def new_sessions(bench: Bench) -> Iterator[Line]:
    """20 new sessions of 20 files: against ONE, and against the bare requests."""
    sessions, files = bench.size(20, 4), 20
    what = f"{sessions} new sessions of {files} files of 20 kB"
    has_one = importlib.util.find_spec("one.registration") is not None
    ours, without_start, one, bare = [], [], [], []
    with bench.scratch("new-sessions") as folder:
        root = folder / "data"
        at_start = in_all = 0
        for _ in range(bench.runs):
            _fresh(root, sessions, files)
            with alyx.sandbox(folder / "alyx.log") as url:
                config = _configure(folder, root, url)
                ours.append(run([*REGD, "scan", "-c", str(config)], folder / "regd.log").took_s)
            alyx.check_done(folder / "regd.log", sessions, sessions * files)
            if has_one:
                _fresh(root, sessions, files)
                with alyx.sandbox(folder / "alyx.log") as url:
                    took_s, at_start, in_all = _run_one(folder, root, url)
                    one.append(took_s)
            _fresh(root, sessions, files)
            with alyx.sandbox(folder / "alyx.log") as url:
                recording = alyx.record_requests(_configure(folder, root, url))
                without_start.append(recording.took_s)
            with alyx.sandbox(folder / "alyx.log") as url:
                bare.append(alyx.replay(url, recording, WORKERS).took_s)
    scan_s, work_s, bare_s = median(ours), median(without_start), median(bare)
    if has_one:
        one_s = median(one)
        yield Line(
            f"{what}: `regd scan`, whole process", s(scan_s), f"ONE: {s(one_s)}",
            one_s / scan_s, 15, "times faster", least=True,
        )  # fmt: skip
    else:
        yield _no_one(f"{what}: `regd scan`, whole process", 15, "times faster")
    yield Line(
        f"{what}: start-up left out", s(work_s),
        f"the same requests bare, {WORKERS} connections: {s(bare_s)}",
        work_s / bare_s, 1.25, note="in a process that has its imports done",
    )  # fmt: skip
    opening, rest = len(recording.opening()), sum(map(len, recording.sessions()))
    yield Line(
        "requests for a new session", f"{rest / sessions:.2f}",
        f"ONE: {(in_all - at_start) / sessions:.2f}" if has_one else "ONE: not here",
        rest / sessions, 3, "requests",
        note=f"once a run besides: regd {opening}, ONE {at_start}; with these, a session of "
        f"{sessions}: regd {(rest + opening) / sessions:.2f}, ONE {in_all / sessions:.2f}",
    )  # fmt: skip


def _no_one(what: str, bar: float, unit: str) -> Line:
    missing = PeerMissing("ONE is not here: pip install ONE-api")
    return Line(what, "-", str(missing), None, bar, unit, least=True)


def _fresh(root: Path, sessions: int, files: int, size: int = 20_000) -> None:
    """Write the sessions anew, and forget what regd knew of them."""
    for name in (root, root.parent / "state"):
        shutil.rmtree(name, ignore_errors=True)
    alyx.record(root, sessions, files, size)


def _configure(folder: Path, root: Path, url: str) -> Path:
    shutil.rmtree(folder / "state", ignore_errors=True)
    return alyx.configure(folder, root, url)


def _run_one(folder: Path, root: Path, url: str) -> tuple[float, int, int]:
    """Return how long ONE's client took, and its requests: at its start, and in all."""
    home, count, log = folder / "home", folder / "count.json", folder / "one.log"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    script = str(PROJECT / "bench" / "one_client.py")
    took = run([sys.executable, script, url, str(root), str(home), str(count)], log)
    if left := list(root.rglob("create_me.flag")):
        raise Failed(f"ONE left {len(left)} sessions: {log.read_text()[-2000:]}")
    at_start, in_all = json.loads(count.read_text())
    return took.took_s, at_start, in_all


def drop(bench: Bench) -> Iterator[Line]:
    """Many sessions that appear at once beside a running daemon."""
    sessions, files = bench.size(2000, 60), 10
    ours, bare, peaks = [], [], []
    with bench.scratch("drop") as folder:
        for _ in range(bench.runs):
            _fresh(folder / "data", sessions, files)
            with alyx.sandbox(folder / "alyx.log") as url:
                took_s, peak = _drop(folder, url, sessions, files)
                ours.append(took_s)
                peaks.append(peak)
            _fresh(folder / "data", sessions, files)
            with alyx.sandbox(folder / "alyx.log") as url:
                config = _configure(folder, folder / "data", url)
                recording = alyx.record_requests(config)
            with alyx.sandbox(folder / "alyx.log") as url:
                bare.append(alyx.replay(url, recording, WORKERS).took_s)
    what = f"{sessions} sessions of {files} files at once"
    yield Line(
        f"{what}, each registered once", s(median(ours)),
        f"the same requests bare, {WORKERS} connections: {s(median(bare))}",
        median(ours) / median(bare), 1.3,
    )  # fmt: skip
    yield Line(f"{what}: peak memory", mb(max(peaks)), "-", max(peaks) / 1e6, 200, "MB")


def _drop(folder: Path, url: str, sessions: int, files: int) -> tuple[float, int]:
    """Return how long a running daemon took for sessions moved into its root, and its peak."""
    staged = folder / "data" / alyx.LAB / "Subjects" / alyx.SUBJECT
    aside = folder / "aside"
    staged.rename(aside)
    config = _configure(folder, folder / "data", url)
    log = folder / "regd.log"
    with running([*REGD, "run", "-c", str(config)], log) as process:
        until_logged(process, log, b"scan.finished")
        counted = alyx.Counted(log, b'"flag.removed"', b'"file.registered"')
        started_at = time.time()
        aside.rename(staged)
        until(lambda: counted() == [sessions, sessions * files], 900, 0.2)
        peak = peak_bytes(process.pid)
    alyx.check_done(log, sessions, sessions * files)
    last = [f["timestamp"] for f in alyx.logged(log) if f["event"] == "flag.removed"][-1]
    return datetime.datetime.fromisoformat(last).timestamp() - started_at, peak


def long_session(bench: Bench) -> Iterator[Line]:
    """One session of very many files: whether the last ones take longer than the first."""
    files, runs = bench.size(100_000, 4_000), bench.runs
    ours, bare, whole, fewer, start = [], [], [], [], []
    with bench.scratch("long") as folder:
        for _ in range(runs):
            start.append(_start(folder).cpu_s)
            fewer.append(_register_long(folder, files // 10)[0])
            cpu_s, ends = _register_long(folder, files)
            whole.append(cpu_s)
            ours.append((*_tenths(ends[::_CHUNK]), ends[-1] - ends[0]))
        _fresh(folder / "data", 1, files, 64)
        with alyx.sandbox(folder / "alyx.log") as url:
            recording = alyx.record_requests(_configure(folder, folder / "data", url))
        for _ in range(runs):
            with alyx.sandbox(folder / "alyx.log") as url:
                replayed = alyx.replay(url, recording, 1)
                bare.append((*_tenths(replayed.ends_s), replayed.took_s))
    first, last, took_s = sorted(ours, key=_growth)[len(ours) // 2]
    first_bare, last_bare, bare_s = sorted(bare, key=_growth)[len(bare) // 2]
    yield Line(
        f"{files} files in one session: a file of the last tenth against the first",
        f"{s(last / _CHUNK)} against {s(first / _CHUNK)}",
        f"the same requests bare: {s(last_bare / _CHUNK)} against {s(first_bare / _CHUNK)}",
        last / first, 1.1,
        note=f"the stand-in itself grows by {last_bare / first_bare:.2f}",
    )  # fmt: skip
    whole_s, fewer_s = (median(cpu_s) - median(start) for cpu_s in (whole, fewer))
    yield Line(
        f"regd's own work on a file, of {files} in one session", s(whole_s / files),
        f"of {files // 10}: {s(fewer_s / (files // 10))}", whole_s / fewer_s / 10, 1.1,
        note=f"processor time of `regd scan`, start-up left out; the whole run took "
        f"{s(took_s)} from the first file registered, bare {s(bare_s)}",
    )  # fmt: skip


def _growth(run: tuple[float, float, float]) -> float:
    first, last, _ = run
    return last / first


def _start(folder: Path) -> Ran:
    """Run `regd scan` on an empty data root."""
    (folder / "empty").mkdir(exist_ok=True)
    config = _configure(folder, folder / "empty", "http://127.0.0.1:9")
    return run([*REGD, "scan", "-c", str(config)], folder / "empty.log")


def _register_long(folder: Path, files: int) -> tuple[float, list[float]]:
    """Register one session; return regd's processor time, and when each file was registered."""
    log = folder / "regd.log"
    _fresh(folder / "data", 1, files, 64)
    with alyx.sandbox(folder / "alyx.log") as url:
        config = _configure(folder, folder / "data", url)
        ran = run([*REGD, "scan", "-c", str(config)], log)
    alyx.check_done(log, 1, files)
    return ran.cpu_s, [
        datetime.datetime.fromisoformat(facts["timestamp"]).timestamp()
        for facts in alyx.logged(log)
        if facts["event"] == "file.registered"
    ]


def _tenths(ends_s: list[float]) -> tuple[float, float]:
    """Return the time a request took among the first and among the last tenth."""
    count = max(2, len(ends_s) // 10)
    first, last = ends_s[: count + 1], ends_s[-count - 1 :]
    return (first[-1] - first[0]) / count, (last[-1] - last[0]) / count
