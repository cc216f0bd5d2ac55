"""The nouns of regd: what a session, a file, a revision and a dataset are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple


class SessionState(StrEnum):
    """Where a session's job stands.

    ::

        waiting ──claim──> working ──> done      nothing left to do
           ^                  │ ├────> held      not on Alyx and no flag: looked at again later
           │                  │ └────> parked    needs a person; `regd retry` or a new flag
           └──── not yet ─────┘
        done, held ──new file, flag──> waiting
    """

    WAITING = "waiting"
    WORKING = "working"
    DONE = "done"
    HELD = "held"
    PARKED = "parked"


class FileState(StrEnum):
    """Where a file stands.

    ::

        settling ──still long enough, hashed──> ready ──posted──> registered
           │  ^                                 │   ^                  │
           │  └───────────── written to ────────┼───┼──────────────────┘
           │                        protected ──┴─> placing (moving into a revision folder)
           └──> refused: Alyx would not take it, or regd must not send it; the reason is kept
    """

    SETTLING = "settling"
    READY = "ready"
    PLACING = "placing"
    REGISTERED = "registered"
    REFUSED = "refused"


class Happening(StrEnum):
    """What the journal remembers of a session, for people."""

    CREATED = "created"
    """on Alyx, by regd"""
    FOUND = "found"
    """on Alyx"""
    LOST = "lost"
    """Alyx has it no longer"""
    FAILED = "failed"
    """to be tried again"""
    HELD = "held"
    PARKED = "parked"
    RESUMED = "resumed"
    """put back to work after it was mended, renamed or removed"""
    INTERRUPTED = "interrupted"
    """regd ended while at it"""
    MOVED = "moved"
    """one of its files, into a revision folder"""
    UNFLAGGED = "unflagged"
    """the flag is gone"""
    DONE = "done"


@dataclass(frozen=True, slots=True)
class SessionPath:
    """A session folder, by the parts of its ALF path.

    Attributes:
        folder: Its path below the data root, with '/' between the parts.
        number: As the folder is named, e.g. '001'.
        lab: The lab of ``<lab>/Subjects/…``, or None.
    """

    folder: str
    subject: str
    date: str
    number: str
    lab: str | None = None

    @property
    def alyx_path(self) -> str:
        """``<subject>/<date>/<number>``, the `path` of Alyx's /register-file."""
        return f"{self.subject}/{self.date}/{self.number}"

    @property
    def key(self) -> tuple[str, str, int]:
        """What makes a session one on Alyx: subject, date and number as an integer."""
        return self.subject, self.date, int(self.number)


@dataclass(frozen=True, slots=True)
class DatasetPath:
    """A file's place in its session; empty strings where there is no collection or revision."""

    collection: str
    revision: str
    name: str

    @property
    def path(self) -> str:
        """Its path below the session folder, from which `paths.parse_dataset` makes this again."""
        revision = f"#{self.revision}#" if self.revision else ""
        return "/".join(filter(None, (self.collection, revision, self.name)))


class Signature(NamedTuple):
    """What tells whether a file was written to, without reading it."""

    size: int
    """bytes"""
    mtime_ns: int
    """last modification, nanoseconds since 1970"""


@dataclass(frozen=True, slots=True)
class Revision:
    """One entry of a dataset's history on Alyx; the name '' is the original."""

    name: str
    protected: bool


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset as `GET /datasets` lists it."""

    id: str
    place: DatasetPath
    md5: str
    size: int | None
    protected: bool


@dataclass(frozen=True, slots=True)
class FileToPost:
    """What Alyx is told of one file."""

    path: str
    """below the session folder"""
    size: int
    """bytes"""
    md5: str | None = None
    """None where the file is too large to be hashed"""
    version: str | None = None
    """of the software that made it"""
    more: tuple[tuple[str, Any], ...] = ()
    """further fields of /register-file that have one value a file, such as qc"""
