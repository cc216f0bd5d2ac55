"""Dates and times as Django reads them: ISO 8601, and digits without leading zeros."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime

_DAY = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})$")
_MOMENT = re.compile(
    r"(\d{4})-(\d{1,2})-(\d{1,2})[T ](\d{1,2}):(\d{1,2})(?::(\d{1,2})(?:[.,](\d{1,6})\d{0,6})?)?$"
)


def parse_day(text: str) -> str:
    """A date as the database holds it. Raises ValueError or TypeError."""
    if found := _DAY.match(text):
        return date(*(int(part) for part in found.groups())).isoformat()
    return date.fromisoformat(text).isoformat()


def parse_moment(text: str) -> str:
    """A time as the database holds it: in UTC, with no zone. Raises ValueError or TypeError."""
    if found := _MOMENT.match(text):
        year, month, day, hour, minute, second, fraction = found.groups(default="0")
        moment = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second))
        moment = moment.replace(microsecond=int(fraction.ljust(6, "0")))
    else:
        moment = datetime.fromisoformat(text)
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC).replace(tzinfo=None)
    return moment.isoformat()


def utc_now() -> str:
    """The time now, as the database holds it."""
    return datetime.now(UTC).replace(tzinfo=None).isoformat()
