"""From what happens on the disk to the request at the server, on one clock."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware

from bench import alyx
from bench.alyx import REGD
from bench.measure import Bench, Line, percentile, running, s, until, until_logged
from regd.sandbox.server import Server

_CLOSED_QUIET_S = 0.25


class _Arrivals:
    """Middleware that notes when each POST has arrived."""

    def __init__(self, app: Any, posts: queue.SimpleQueue[tuple[str, float]]) -> None:
        self.app = app
        self.posts = posts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("method") == "POST":
            self.posts.put((scope["path"], time.perf_counter()))
        await self.app(scope, receive, send)


def latency(bench: Bench) -> Iterator[Line]:
    """Flags, then files, one after the other, at random moments."""
    count = bench.size(200, 20)
    chance = random.Random(1)
    flags, files = [], []
    posts: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
    with bench.scratch("latency") as folder:
        root, log = folder / "data", folder / "regd.log"
        sessions = [alyx.session_folder(root, n) for n in range(1, count + 1)]
        for session in sessions:
            (session / "alf").mkdir(parents=True)
        middleware = [Middleware(_Arrivals, posts=posts)]
        with Server(rate_limit=None, middleware=middleware) as server:
            settle = {"quiet_s": 30, "closed_quiet_s": _CLOSED_QUIET_S}
            config = alyx.configure(folder, root, server.url, settle=settle)
            with running([*REGD, "run", "-c", str(config)], log) as process:
                until_logged(process, log, b"scan.finished")
                until_logged(process, log, b"alyx.reached")
                for session in sessions:
                    # regd may look at things at fixed intervals: these moments are not in step
                    time.sleep(chance.uniform(0.02, 0.12))
                    flags.append(_flag(session, posts))
                for session in sessions:
                    time.sleep(chance.uniform(0.02, 0.12))
                    files.append(_write(session, posts) - _CLOSED_QUIET_S)
    yield from _lines(f"flag created to POST /sessions, {count} times", flags, 0.020, 0.100)
    what = f"file closed to POST /register-file beyond closed_quiet_s, {count} times"
    yield from _lines(what, files, 0.030, 0.150)


def _flag(session: Path, posts: queue.SimpleQueue[tuple[str, float]]) -> float:
    flag = session / "create_me.flag"
    started_at = time.perf_counter()
    flag.touch()
    took_s = _arrival(posts, "/sessions") - started_at
    until(lambda: not flag.exists(), 30)
    return took_s


def _write(session: Path, posts: queue.SimpleQueue[tuple[str, float]]) -> float:
    with (session / "alf" / "spikes.times.npy").open("wb") as file:
        file.write(f"{session}".encode().ljust(20_000))
        file.close()
        started_at = time.perf_counter()
    return _arrival(posts, "/register-file") - started_at


def _arrival(posts: queue.SimpleQueue[tuple[str, float]], path: str) -> float:
    while True:
        found, at = posts.get(timeout=60)
        if found == path:
            return at


def _lines(what: str, times: list[float], p50_s: float, p99_s: float) -> Iterator[Line]:
    for share, bar in ((0.5, p50_s), (0.99, p99_s)):
        found = percentile(times, share)
        yield Line(
            f"{what}: p{share * 100:.0f}", s(found), "-", found * 1000, bar * 1000, "ms",
            note=f"from {s(min(times))} to {s(max(times))}",
        )  # fmt: skip
