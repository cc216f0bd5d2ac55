"""The request limit, counted as Django REST framework counts it: a sliding window a user."""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class RateError(ValueError):
    """A rate limit that cannot be read; the message says how one looks."""


class Throttle:
    """Allows `rate` requests (such as `550/minute`) a key; None or `none` allows all."""

    def __init__(self, rate: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises RateError if the rate cannot be read."""
        self._clock = clock
        self._seen: dict[str, deque[float]] = {}
        self._limit, self._window = _parse(rate)

    def wait(self, key: str) -> int | None:
        """Count a request of `key`; None if it may pass, else the seconds it must wait."""
        if not self._limit:
            return None
        now = self._clock()
        seen = self._seen.setdefault(key, deque())
        while seen and seen[0] <= now - self._window:
            seen.popleft()
        if len(seen) >= self._limit:
            return math.ceil(self._window - (now - seen[0]))
        seen.append(now)
        return None


def _parse(rate: str | None) -> tuple[int, int]:
    if rate is None or rate.strip().lower() == "none":
        return 0, 0
    found = re.fullmatch(r"\s*(\d+)\s*/\s*([smhd])[a-z]*\s*", rate.lower())
    if not found or int(found[1]) < 1:
        raise RateError(
            f"the rate limit {rate!r} cannot be read: write it like 550/minute (or second, hour, "
            "day), or none"
        )
    return int(found[1]), _SECONDS[found[2]]
