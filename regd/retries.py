"""How long to wait before trying again. Pure: time and chance are arguments."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from email.utils import parsedate_to_datetime

LONGEST_AFTER_S = 3600.0
"""The longest wait that a server can ask for, in seconds."""


def backoff_s(attempt: int, first_s: float, longest_s: float, chance: Callable[[], float]) -> float:
    """Return the wait before attempt number `attempt` + 1, in seconds.

    The wait doubles from `first_s` up to `longest_s`; a random tenth is taken off, so that many
    rigs that lost the same server do not come back in step.

    Args:
        attempt: How many attempts have failed, from 1.
        chance: Returns a number in [0, 1), such as `random.random`.
    """
    wait_s = min(longest_s, first_s * 2.0 ** min(max(attempt, 1) - 1, 60))
    return wait_s * (1 - 0.1 * chance())


def retry_after_s(value: str | None, now: datetime.datetime) -> float | None:
    """Return the seconds a Retry-After header asks for, or None if it says nothing usable.

    Args:
        value: The header: a number of seconds, or an HTTP date (RFC 9110, 10.2.3).
        now: The current time, with its zone.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - now).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    # a server that is wrong about this must not put a rig to sleep for good
    return min(max(seconds, 0.0), LONGEST_AFTER_S) if seconds == seconds else None
