"""What starting costs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from statistics import median

from bench.alyx import REGD
from bench.measure import Bench, Line, alternate, mb, run, s


def start(bench: Bench) -> Iterator[Line]:
    """`regd --help`, and what the daemon holds before it has begun."""
    python = [sys.executable, "-c", "pass"]
    daemon = "import regd.__main__, regd.settings, regd.logs, regd.service"
    with bench.scratch("start") as folder:
        log = folder / "log"
        ours, theirs = alternate(
            max(bench.runs, 5),
            lambda: run([*REGD, "--help"], log).took_s,
            lambda: run(python, log).took_s,
        )
        yield Line("regd with `--help`", s(ours), f"python: {s(theirs)}", ours, 0.3, "s")
        peaks = [run([sys.executable, "-c", daemon], log).peak_bytes for _ in range(bench.runs)]
        bare = run(python, log).peak_bytes
        yield Line(
            "memory of the daemon's imports", mb(median(peaks)), f"python: {mb(bare)}",
            median(peaks) / 1e6, 60, "MB",
        )  # fmt: skip
