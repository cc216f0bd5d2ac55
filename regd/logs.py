"""Log lines: JSON for machines, readable ones on a terminal, secrets in neither.

regd's loggers stand on `logging`, so that in another program's process they follow that program's
settings; only `configure`, called by the command line, decides on the look of lines.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import re
import reprlib
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, MutableMapping
from functools import lru_cache
from typing import Any, Literal, TextIO, cast

import structlog
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.stdlib import BoundLogger, ProcessorFormatter
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import Processor

__all__ = [
    "MASK",
    "BoundLogger",
    "Recurring",
    "bound_contextvars",
    "configure",
    "get_logger",
    "priority",
]

MASK = "********"

_LEVELS = ("debug", "info", "warning", "error")
_FIRST_KEYS = ("timestamp", "level", "event")
_NEXT_KEYS = ("session", "path", "eid", "attempt", "reason", "hint")
_LONGEST_LINE = 40_000  # bytes; journald breaks lines of 48 KiB (LineMax in journald.conf(5))
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}  # sd-daemon(3)
_DEEPEST = 12  # levels of a nested value that are looked into; a chain of exceptions has 6
# One line a request and one a change on disk: of use only to those who look for a fault in them.
_CHATTY = ("httpx", "watchdog", "asyncio")

_SECRET_KEY = re.compile(r"token|passw|secret|authorization|api_?key|cookie", re.IGNORECASE)
# without one of these words no pattern below fits, and a line is many texts
_SUSPECT = ("authorization", "passw", "token", "secret", "bearer", "basic", "://")
_SUSPECT_KEYS = ("api_key", "apikey", "cookie")  # beside those, in what _SECRET_KEY finds
_PLAIN = frozenset({str, int, float, bool, type(None)})
_SECRET_TEXTS = (
    # Authorization: Token 0123..., "password": "...", token=...
    re.compile(
        r"""((?<![-/])\b(?:authorization|password|passwd|token|secret)['"]?\s*[:=]\s*['"]?"""
        r"""(?:(?:token|bearer|basic)\s+)?)[^\s'",&}\])]+""",
        re.IGNORECASE,
    ),
    re.compile(r"(\btoken\s+)[0-9a-f]{8,}\b", re.IGNORECASE),
    re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/-]{12,}=*", re.IGNORECASE),
    re.compile(r"(https?://)[^/\s@]+(?=@)", re.IGNORECASE),
)


def configure(
    level: str = "info",
    format: Literal["auto", "json", "console"] = "auto",
    stream: TextIO | None = None,
    *,
    secrets: Collection[str] = (),
) -> None:
    """Send every log line of the process, other libraries' and warnings too, to one stream.

    Args:
        level: The least severe lines shown: debug, info, warning or error.
        format: One JSON object a line, lines for people, or lines for people on a terminal alone.
        stream: Where lines go; standard error if None. Each line is one write.
        secrets: Texts masked wherever they occur, beside all that looks like a secret.

    May be called again: the last call holds. Raises ValueError for an unknown level or format.
    """
    if level not in _LEVELS or format not in ("auto", "json", "console"):
        raise ValueError(f"no such log level or format: {level}, {format}")
    stream = sys.stderr if stream is None else stream
    readable = format == "console" or (format == "auto" and stream.isatty())
    handler = _Lines(stream)
    handler.setFormatter(_formatter(stream, readable, frozenset(filter(None, secrets))))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Lines)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.NOTSET if level == "debug" else logging.WARNING)
    logging.getLogger("httpcore").setLevel(logging.INFO)  # its debug lines show headers
    logging.captureWarnings(capture=True)
    # no line shows where in the code it was written, or by which thread: to find that out for each
    # takes time; see "Optimization" in Python's logging HOWTO
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def get_logger(name: str = "regd") -> BoundLogger:
    """Return a logger for `log.info("noun.verb_past", key=value)`.

    It adds what `bound_contextvars(session=..., eid=..., attempt=...)` has bound in this thread.
    """
    logger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            merge_contextvars,
            structlog.stdlib.add_log_level,
            ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=BoundLogger,
        cache_logger_on_first_use=True,
    )
    return cast("BoundLogger", logger)


class Recurring:
    """A failure that may come again and again: logged at most every so often, its end once.

    Args:
        log: Where the lines go.
        event: Event of the failure, logged as a warning.
        recovered_event: Event of the recovery, with `failures` and `failed_s`.
        every_s: Least seconds between two lines of the failure.
        clock: Monotonic seconds.

    Safe to use from several threads.
    """

    def __init__(
        self,
        log: BoundLogger,
        event: str,
        recovered_event: str,
        *,
        every_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._event, self._recovered_event = log, event, recovered_event
        self._every_s, self._clock = every_s, clock
        self._lock = threading.Lock()
        self._failures = 0
        self._since = self._logged_at = 0.0

    def failed(self, *, at_once: bool = False, **about: object) -> bool:
        """Count a failure; return whether it was logged. `failures` counts since the last success.

        `at_once` has it logged in any case: it is not the failure as before. `about` holds the
        keys of the line.
        """
        with self._lock:
            now = self._clock()
            self._failures += 1
            failures = self._failures
            if failures == 1:
                self._since = now
            elif now - self._logged_at < self._every_s and not at_once:
                return False
            self._logged_at = now
        self._log.warning(self._event, **{"failures": failures, **about})
        return True

    def recovered(self, **about: object) -> bool:
        """Note a success; return whether it ended a failure and so was logged."""
        with self._lock:
            failures, self._failures = self._failures, 0
            failed_s = round(self._clock() - self._since, 1)
        if not failures:
            return False
        self._log.info(self._recovered_event, failures=failures, failed_s=failed_s, **about)
        return True


def priority(stream: TextIO, level: str) -> str:
    """Return what a line begins with, so that systemd's journal knows how severe it is.

    Nothing where the stream does not go there: $JOURNAL_STREAM names it, as systemd.exec(5) says.
    """
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # it is closed, or none of the system's
        return ""
    if os.environ.get("JOURNAL_STREAM") != f"{status.st_dev}:{status.st_ino}":
        return ""
    return f"<{_PRIORITIES[level]}>"


class _Lines(logging.StreamHandler[TextIO]):
    """regd's own handler, told from those of others by its class."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._priorities = {level: priority(stream, level) for level in _PRIORITIES}

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record: none too long, each with its priority where that counts."""
        before = self._priorities.get(record.levelname.lower(), "")
        return "\n".join(before + _short(line) for line in super().format(record).split("\n"))


class _Formatter(ProcessorFormatter):
    """Renders lines of regd's own without a copy of the record, which takes as long as encoding."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, or lines, of a record."""
        about = record.__dict__
        if "_logger" not in about or not isinstance(record.msg, dict):
            return super().format(record)
        event: Any = {**record.msg, "_record": record, "_from_structlog": True}
        for process in self.processors:
            event = process(about["_logger"], about["_name"], event)
        return cast("str", event)


def _formatter(stream: TextIO, readable: bool, secrets: frozenset[str]) -> logging.Formatter:
    clean = _Cleaner(secrets, _one_line if readable else _encodable)
    return _Formatter(
        foreign_pre_chain=[
            merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
        ],
        processors=[
            ProcessorFormatter.remove_processors_meta,
            *(_for_people(stream, clean) if readable else _for_machines(clean)),
        ],
    )


def _for_people(stream: TextIO, clean: Processor) -> list[Processor]:
    encoding = getattr(stream, "encoding", None) or "utf-8"

    def encodable(_logger: object, _method: str, text: Any) -> str:
        return cast("str", text).encode(encoding, "backslashreplace").decode(encoding)

    return [
        _local_time,
        structlog.processors.format_exc_info,  # to text, so that it is cleaned like any other
        clean,
        structlog.dev.ConsoleRenderer(
            colors=stream.isatty() and not os.environ.get("NO_COLOR"),
            exception_formatter=structlog.dev.plain_traceback,
            sort_keys=False,
        ),
        encodable,
    ]


def _for_machines(clean: _Cleaner) -> list[Processor]:
    # Local variables stay out of tracebacks: they hold recorded paths at best, a token at worst.
    as_dicts = ExceptionDictTransformer(show_locals=False)
    # ASCII alone: no stream refuses it, and no character in it is taken for a line's end.
    # One encoder for all lines: json.dumps would make one for each.
    encode = json.JSONEncoder(ensure_ascii=True, allow_nan=False).encode

    def render(logger: object, method: str, event: MutableMapping[str, Any]) -> str:
        line = None
        # most lines have nothing to clean, which is seen sooner of a line than of all its values
        if _PLAIN.issuperset(map(type, event.values())):
            with contextlib.suppress(ValueError):  # NaN
                line = encode(_ordered(event))
        if line is None or clean.may_change(line):
            line = encode(clean(logger, method, event))
        return _short_json(line)

    return [
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(as_dicts),
        render,
    ]


def _ordered(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a line says, with what it begins with first."""
    return {**{key: event[key] for key in _FIRST_KEYS if key in event}, **event}


def _short_json(line: str) -> str:
    """Return a JSON line, of one that is too long what matters most and how it begins."""
    if len(line) <= _LONGEST_LINE:  # it is ASCII
        return line
    event = json.loads(line)
    keys = (key for key in (*_FIRST_KEYS, *_NEXT_KEYS) if key in event)
    # a character may take 12 bytes, as \\ud83d\\ude00 does
    short = {key: v[:300] if isinstance(v := event[key], str) else v for key in keys}
    return json.dumps({**short, "cut_bytes": len(line), "cut": line[: _LONGEST_LINE // 8]})


def _short(line: str) -> str:
    if len(line) <= _LONGEST_LINE // 4:  # no character takes more than 4 bytes
        return line
    content = line.encode("utf-8", "replace")
    if len(content) <= _LONGEST_LINE:
        return line
    return f"{content[: _LONGEST_LINE - 3].decode('utf-8', 'ignore')}..."


def _local_time(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    # structlog's TimeStamper leaves out the offset of local times.
    now = datetime.datetime.now().astimezone()
    event["timestamp"] = now.isoformat(timespec="milliseconds")
    return event


@lru_cache(maxsize=1024)
def _names_secret(key: str) -> bool:
    return _SECRET_KEY.search(key) is not None


def _encodable(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _one_line(text: str) -> str:
    """Return `text` without what moves a terminal's cursor, or cannot be encoded."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Cleaner:
    """The processor that masks secrets, and turns all values into what a line can hold."""

    def __init__(self, secrets: Collection[str], text: Callable[[str], str]) -> None:
        longest_first = sorted(secrets, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first))) if secrets else None
        in_json = (json.dumps(secret.lower())[1:-1] for secret in secrets)
        self._words = *_SUSPECT, *_SUSPECT_KEYS, *in_json
        self._text = text

    def __call__(
        self, _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        cleaned: dict[str, Any] = {
            self._text(key): self._value(key, value) for key, value in _ordered(event).items()
        }
        for key in ("exception", "stack"):
            if isinstance(event.get(key), str):  # a traceback for people, which has many lines
                cleaned[key] = _encodable(self._masked(event[key]))
        return cleaned

    def may_change(self, line: str) -> bool:
        """Say whether there may be something to clean in a JSON line of plain values."""
        lower = line.lower()
        # an escape is a character that is not ASCII: it may stand for one of a word's
        if "\\u" in lower:
            return True
        for word in self._words:  # noqa: SIM110 - any() takes longer
            if word in lower:
                return True
        return False

    def _value(self, key: str, value: object, depth: int = 0) -> object:
        if value is None or isinstance(value, bool):
            return value
        if _names_secret(key):
            return MASK
        if type(value) is str:
            return self._text(self._masked(value))
        if isinstance(value, int):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)  # JSON has no NaN
        if depth >= _DEEPEST:
            return self._text(self._masked(reprlib.repr(value)))
        if isinstance(value, Mapping):
            return {
                self._text(str(name)): self._value(str(name), below, depth + 1)
                for name, below in value.items()
            }
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self._value("", below, depth + 1) for below in value]
        if isinstance(value, bytes):
            value = value.decode("utf-8", "backslashreplace")
        return self._text(self._masked(str(value)))

    def _masked(self, text: str) -> str:
        if self._known:
            text = self._known.sub(MASK, text)
        lower = text.lower()
        if not any(word in lower for word in _SUSPECT):
            return text
        for pattern in _SECRET_TEXTS:
            text = pattern.sub(lambda found: (found[1] or "") + MASK, text)
        return text
