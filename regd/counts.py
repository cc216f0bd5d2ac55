"""What this process has done since it started, in numbers; cheap enough to be always on."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

SLOW_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the latency histogram's buckets, in seconds; one more has no bound."""


@dataclass(slots=True)
class Durations:
    """How long requests of one kind took.

    Attributes:
        buckets: How many took at most each of `SLOW_S`, and more than the one before; the last
            one counts the longer ones.
        total_s: All of them together.
    """

    buckets: list[int] = field(default_factory=lambda: [0] * (len(SLOW_S) + 1))
    total_s: float = 0.0


Request = tuple[str, str, str]
"""Method, endpoint (``/sessions/{id}``), status (``200``; ``none`` where no whole answer came)."""


class Counts:
    """Counts that many threads add to.

    Args:
        now: Seconds since 1970.

    Attributes:
        hints: Changes that the watcher told of.
        overflows: Times that the kernel dropped some of them.
        scans: Passes over the whole data root that ended.
        scanned_at: When the last one did, in seconds since 1970, or None.
        scan_s: How long it took, in seconds.
        hashed_bytes: Bytes read to be hashed.
        sessions_created: Sessions made on Alyx.
        files_registered: Files that Alyx took.
        registered_bytes: Bytes that these hold.
        answered_at: When Alyx last did what it was asked, in seconds since 1970, or None.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._lock = threading.Lock()
        self.hints = 0
        self.overflows = 0
        self.scans = 0
        self.scanned_at: float | None = None
        self.scan_s = 0.0
        self.hashed_bytes = 0
        self.sessions_created = 0
        self.files_registered = 0
        self.registered_bytes = 0
        self.answered_at: float | None = None
        self._requests: dict[Request, Durations] = {}

    def add(self, **numbers: int) -> None:
        """Add to some of the counts, named as the attributes are."""
        with self._lock:
            for name, number in numbers.items():
                setattr(self, name, getattr(self, name) + number)

    def scanned(self, took_s: float) -> None:
        """Count a pass over the whole data root that has just ended."""
        with self._lock:
            self.scans += 1
            self.scanned_at, self.scan_s = self._now(), took_s

    def requested(
        self, method: str, path: str, status: int | None, took_s: float, *, good: bool
    ) -> None:
        """Count a request to Alyx that has just ended; each attempt is one.

        Args:
            method: Such as GET.
            path: As it was sent.
            status: Of the answer, or None if no whole one came.
            took_s: Until the whole answer was there, or it was given up.
            good: Whether Alyx did what it was asked.
        """
        kind = (method, endpoint(path), "none" if status is None else str(status))
        with self._lock:
            took = self._requests.setdefault(kind, Durations())
            took.buckets[bisect.bisect_left(SLOW_S, took_s)] += 1
            took.total_s += took_s
            if good:
                self.answered_at = self._now()

    def requests(self) -> dict[Request, Durations]:
        """Return how long the requests of each kind took, as it is now."""
        with self._lock:
            return {
                kind: Durations([*took.buckets], took.total_s)
                for kind, took in sorted(self._requests.items())
            }


def endpoint(path: str) -> str:
    """Return what stands for a path in statistics: there are as many as kinds of record.

    ``/sessions/6b0…`` is ``/sessions/{id}``.
    """
    first, _, more = path.strip("/").partition("/")
    return f"/{first}/{{id}}" if more else f"/{first}"
