"""Processes, medians and lines of the table."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

PROJECT = Path(__file__).parents[1]
HZ = os.sysconf("SC_CLK_TCK")
# A process's peak memory counts from the fork: it must not be this program that forks, which is
# larger than what it measures.
_TIMER = """
import json, os, sys, time
at = time.perf_counter()
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
took = time.perf_counter() - at
cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
facts = [took, cpu, peak, os.waitstatus_to_exitcode(status)]
open(sys.argv[1], "w").write(json.dumps(facts))
"""


class PeerMissing(Exception):
    """What regd is measured against is not on this machine; the text says how to get it."""


class Failed(Exception):
    """Something that is measured did not do its work."""


@dataclass(frozen=True)
class Bench:
    """What all measurements need to know.

    Attributes:
        folder: Where trees and files are kept between runs.
        quick: Whether to use small sizes, to try the program itself.
        runs: How often each side runs.
    """

    folder: Path
    quick: bool
    runs: int

    def size(self, full: int, quick: int) -> int:
        """Return how large something is."""
        return quick if self.quick else full

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Yield an empty folder that is removed afterwards."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        what: The work.
        regd: What regd took, with its unit.
        against: What else, and what that took.
        value: What is held against the bar.
        bar: The limit.
        unit: That of `value` and `bar`, as "times" or "MB".
        least: Whether the value must be at least the bar; else at most.
        note: What a reader has to know.
    """

    what: str
    regd: str
    against: str
    value: float | None
    bar: float | None
    unit: str = "times"
    least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None where nothing could be measured."""
        if self.value is None or self.bar is None:
            return None
        return self.value >= self.bar if self.least else self.value <= self.bar


@dataclass(frozen=True)
class Ran:
    """A process that has ended."""

    took_s: float
    cpu_s: float
    peak_bytes: int


def environment() -> dict[str, str]:
    """Return the environment for a process: this tree's regd, none of this user's settings."""
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith("REGD_")}
    kept.update(PYTHONPATH=str(PROJECT), NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    return kept


def run(
    command: Sequence[str], log: Path, *, statuses: Sequence[int] = (0,), out: Path | None = None
) -> Ran:
    """Run a program to its end.

    Args:
        command: The program and its arguments.
        log: Where its standard error goes.
        statuses: The exit statuses of success.
        out: Where its standard output goes; nowhere by default.

    Raises:
        Failed: It ended with another status.
    """
    facts = log.with_suffix(".facts")
    program = shutil.which(command[0]) or command[0]
    with log.open("wb") as errors, (out or Path(os.devnull)).open("wb") as output:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TIMER, str(facts), program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=environment(),
            check=True,
        )
    took_s, cpu_s, peak, status = json.loads(facts.read_text())
    if status not in statuses:
        tail = log.read_text(errors="replace")[-2000:]
        raise Failed(f"{' '.join(command)} ended with status {status}:\n{tail}")
    return Ran(took_s, cpu_s, peak)


@contextmanager
def running(command: Sequence[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a program that runs until the end of the block; standard error goes to `log`."""
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **options},
            stderr=errors,
            env=environment(),
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()


def until(happened: Callable[[], Any], timeout_s: float, step_s: float = 0.01) -> Any:
    """Return what `happened` returns once that is true.

    Raises:
        Failed: It took longer than `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not (result := happened()):
        if time.monotonic() > deadline:
            raise Failed(f"not within {timeout_s:.0f} s")
        time.sleep(step_s)
    return result


def until_logged(
    process: subprocess.Popen[bytes], log: Path, word: bytes, timeout_s: float = 300
) -> None:
    """Return once a program has written a word into its log.

    Raises:
        Failed: It ended before, or it took longer than `timeout_s`.
    """

    def happened() -> bool:
        ended = process.poll() is not None
        if word in log.read_bytes():
            return True
        if ended:
            raise Failed(f"a program ended too early: {log.read_text(errors='replace')[-2000:]}")
        return False

    until(happened, timeout_s)


def peak_bytes(pid: int) -> int:
    """Return the most memory that a living process ever had resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise Failed(f"process {pid} is gone")


def cpu_s(pid: int) -> float:
    """Return the processor time that a living process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / HZ


def alternate(
    runs: int, ours: Callable[[], float], theirs: Callable[[], float]
) -> tuple[float, float]:
    """Return the medians of two measurements that take turns, so that both meet a slow minute."""
    pairs = [(ours(), theirs()) for _ in range(runs)]
    return median(a for a, _ in pairs), median(b for _, b in pairs)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of all are not above (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def s(seconds: float) -> str:
    """Return a time as text."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def mb(size: float) -> str:
    """Return a size as text, in units of a million bytes."""
    return f"{size / 1e6:.0f} MB"
