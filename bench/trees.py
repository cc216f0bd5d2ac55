"""Large data roots: how long a scan with nothing to do takes, and how long setting up watches."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from bench import alyx
from bench.alyx import REGD
from bench.measure import (
    HZ,
    Bench,
    Failed,
    Line,
    PeerMissing,
    Ran,
    cpu_s,
    mb,
    peak_bytes,
    run,
    running,
    s,
    until_logged,
)
from regd import files
from regd.journal import FILE_NAME, FileRow, Journal
from regd.model import FileState, SessionState
from regd.paths import parse_session

_FILES = (
    "_ibl_experiment.description.yaml",
    "alf/_ibl_trials.table.pqt",
    "alf/probe00/spikes.times.npy",
    "raw_behavior_data/_iblrig_taskData.raw.jsonable",
)
_FOLDERS = ("", "alf", "alf/probe00", "raw_behavior_data")
_SUBJECTS, _A_DAY = 50, 2


def scan(bench: Bench) -> Iterator[Line]:
    """`regd scan` of known files, nothing to do, against find; a large root against a small one."""
    large = _tree(bench, bench.size(1_000_000, 20_000))
    small = _tree(bench, bench.size(100_000, 2_000))
    ours: dict[Path, list[Ran]] = {large: [], small: []}
    finds, starts = [], []
    with bench.scratch("scan") as folder:
        (folder / "empty").mkdir()
        empty = alyx.configure(folder, folder / "empty", "http://127.0.0.1:9")
        for tree in (large, small):  # into the caches
            _find(tree, folder)
            _scan(tree, folder)
        for _ in range(bench.runs):
            ours[large].append(_scan(large, folder))
            finds.append(_find(large, folder))
            ours[small].append(_scan(small, folder))
            starts.append(run([*REGD, "scan", "-c", str(empty)], folder / "empty.log").took_s)
    took = {tree: median(ran.took_s for ran in ours[tree]) for tree in ours}
    find_s, start_s = median(finds), median(starts)
    count = {tree: int(tree.name.rpartition("-")[2]) for tree in ours}
    what = f"scan of {count[large]} known files in {count[large] // 4} sessions"
    yield Line(
        f"{what}, nothing to do", s(took[large]), f"find -printf: {s(find_s)}",
        took[large] / find_s, 1.5,
        note=f"start-up ({s(start_s)}) left out: {(took[large] - start_s) / find_s:.2f} times",
    )  # fmt: skip
    peak = max(ran.peak_bytes for ran in ours[large])
    yield Line(f"{what}: peak memory", mb(peak), "-", peak / 1e6, 200, "MB")
    each = {tree: (took[tree] - start_s) / count[tree] for tree in ours}
    yield Line(
        f"a file in a scan of {count[large]}", s(each[large]),
        f"of {count[small]}: {s(each[small])}", each[large] / each[small], 1.15,
        note="start-up left out",
    )  # fmt: skip


def watch(bench: Bench) -> Iterator[Line]:
    """`regd run` until its watches stand, and then idle, against inotifywait."""
    tree = _tree(bench, bench.size(100_000, 2_000))
    folders = sum(len(inner) for _, inner, _ in os.walk(tree / "data"))
    idle_s = bench.size(60, 5)
    has_peer = shutil.which("inotifywait") is not None
    ours, theirs, peaks, idle = [], [], [], []
    with bench.scratch("watch") as folder, alyx.sandbox(folder / "alyx.log") as url:
        config = alyx.configure(tree, tree / "data", url)
        log = folder / "regd.log"
        for n in range(bench.runs):
            started_at = time.perf_counter()
            with running([*REGD, "run", "-c", str(config)], log) as process:
                until_logged(process, log, b"watch.started")
                ours.append(time.perf_counter() - started_at)
                if b"watch.failed" in log.read_bytes():
                    raise Failed(f"not all of it can be watched: {log.read_text()}")
                until_logged(process, log, b"scan.finished")
                time.sleep(1)  # what the start leaves behind is not idling
                if n == 0:
                    before_s = cpu_s(process.pid)
                    time.sleep(idle_s)
                    idle.append((cpu_s(process.pid) - before_s) / idle_s)
                peaks.append(peak_bytes(process.pid))
            if has_peer:
                theirs.append(_inotifywait(tree / "data", folder / "inotifywait.log"))
    took_s = median(ours)
    what = f"`regd run` on {folders} folders"
    if has_peer:
        yield Line(
            f"{what}: until watching", s(took_s), f"inotifywait -r: {s(median(theirs))}",
            took_s / median(theirs), 2,
        )  # fmt: skip
    else:
        missing = PeerMissing("inotifywait is not here: apt install inotify-tools")
        yield Line(f"{what}: until watching", s(took_s), str(missing), None, 2)
    yield Line(f"{what}: peak memory", mb(max(peaks)), "-", max(peaks) / 1e6, 120, "MB")
    yield Line(
        f"{what}: idle over {idle_s} s", f"{idle[0]:.2%} of a core", "-", idle[0] * 100, 0.2,
        "% of a core", note=f"counted in steps of {100 / HZ / idle_s:.3f} %",
    )  # fmt: skip


def _scan(tree: Path, folder: Path) -> Ran:
    out = folder / "out"
    ran = run([*REGD, "scan", "-c", str(tree / "regd.yaml")], folder / "scan.log", out=out)
    if b"known" not in out.read_bytes() or (folder / "scan.log").read_bytes().count(b"session."):
        raise Failed(f"there was something to do in {tree}: {(folder / 'scan.log').read_text()}")
    return ran


def _find(tree: Path, folder: Path) -> float:
    command = ["find", str(tree / "data"), "-type", "f", "-printf", "%s %T@ %p\n"]
    return run(command, folder / "find.log").took_s


def _inotifywait(root: Path, log: Path) -> float:
    started_at = time.perf_counter()
    command = ["inotifywait", "-m", "-r", str(root)]
    with running(command, log) as process:
        until_logged(process, log, b"Watches established")
        return time.perf_counter() - started_at


# --- the trees, kept between runs ----------------------------------------------------------------


def _tree(bench: Bench, count: int) -> Path:
    """Return a folder with a data root of that many files that regd knows, made if it is not there.

    Four files a session, each in a folder of its own.
    """
    tree = bench.folder / f"tree-{count}"
    done = tree / "made"
    if not done.exists():
        print(f"making a data root of {count} files, once: {tree}", file=sys.stderr)
        shutil.rmtree(tree, ignore_errors=True)
        for session in _sessions(count // len(_FILES)):
            _record(tree / "data" / session)
        done.touch()
    alyx.configure(tree, tree / "data", "http://127.0.0.1:9")
    # the journal of another schema is of no use
    code = Path(files.__file__).parent
    wanted = hashlib.sha256((code / "schema.sql").read_bytes()).hexdigest()
    known = tree / "state" / "schema"
    if not known.exists() or known.read_text() != wanted:
        print(f"writing its journal: {tree}", file=sys.stderr)
        shutil.rmtree(tree / "state", ignore_errors=True)
        _write_journal(tree, count // len(_FILES))
        known.write_text(wanted)
    return tree


def _sessions(count: int) -> Iterator[str]:
    for n in range(count):
        rest, number = divmod(n, _A_DAY)
        day, subject = divmod(rest, _SUBJECTS)
        date = f"{2000 + day // 336}-{day // 28 % 12 + 1:02d}-{day % 28 + 1:02d}"
        yield f"{alyx.LAB}/Subjects/KS{subject:03d}/{date}/{number + 1:03d}"


def _record(session: Path) -> None:
    for inner in _FOLDERS:
        (session / inner).mkdir(parents=True)
    for name in _FILES:
        # a size without content: nothing reads these, and the disk is spared
        with (session / name).open("wb") as file:
            file.truncate(20_000)


def _write_journal(tree: Path, sessions: int) -> None:
    """Write down that every file is registered, as regd does after it has registered it."""
    (tree / "state").mkdir(mode=0o700)
    root = tree / "data"
    with Journal(tree / "state" / FILE_NAME, now=time.time) as journal:
        journal.bind_root(root.resolve())
        for n, folder in enumerate(_sessions(sessions)):
            journal.note(parse_session(tuple(folder.split("/"))), due_at=0.0)
            row = journal.claim()
            if row is None or row.folder != folder:
                raise Failed(f"{folder} is not what is due")
            journal.identify(row.id, f"00000000-0000-4000-8000-{n:012d}", doubt=False)
            rows = [
                FileRow(
                    found.path,
                    FileState.REGISTERED,
                    found.signature,
                    md5=f"{n:032x}",
                    dataset_id=f"00000000-0000-4000-8000-{len(_FILES) * n + m:012d}",
                )
                for m, found in enumerate(files.walk(root / folder))
            ]
            journal.write_files(row.id, rows)
            journal.release(row.id, SessionState.DONE)
