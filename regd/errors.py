"""What can go wrong, under names that say who has to act.

Two families cross the border to the worker: `TryLater` (time mends it) and `NeedsHuman` (a person
does, and the hint says how). Where ONE has a class for the same thing, regd's derives from it, so
that a script's ``except`` clauses keep working.
"""

from __future__ import annotations

from collections.abc import Iterable

from one.alf.exceptions import ALFError, ALFInvalid, AlyxSubjectNotFound


def encodable(text: str) -> str:
    """Return `text` with every byte that is not UTF-8 shown escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """Return `text` with every byte that is not UTF-8 and every control character shown escaped."""
    if text.isprintable():
        return text
    text = encodable(text)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class SettingsError(ValueError):
    """One or more settings are wrong; the text has one line for each, with what to do.

    `mistakes` holds these lines.
    """

    def __init__(self, mistakes: Iterable[str]) -> None:
        self.mistakes = tuple(map(encodable, mistakes))
        super().__init__("\n".join(self.mistakes))


class RegdError(Exception):
    """Base of everything regd raises.

    Whatever a file is called and whatever Alyx says, the texts are one line that any journal, log
    and terminal takes.

    Args:
        message: What happened and where, one line.
        hint: What to do about it, one line; may be empty.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.reason = printable(message)
        self.hint = printable(hint)
        super().__init__(self.reason)

    def __str__(self) -> str:
        return f"{self.reason} ({self.hint})" if self.hint else self.reason


class Stopping(RegdError):
    """regd is shutting down; what was in hand goes back to the journal."""


class JournalFailed(RegdError):
    """The journal cannot be used: no session's failure; regd ends, and goes on when restarted."""


class JournalDamaged(JournalFailed):
    """The journal is no journal, or no longer one; whoever holds the lock sets it aside."""


# --- time mends it -------------------------------------------------------------------------------


class TryLater(RegdError):
    """The same work may succeed later.

    Args:
        after_s: Seconds to wait at least, when the other side named a time.
    """

    def __init__(self, message: str, *, hint: str = "", after_s: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.after_s = after_s


class AlyxAway(TryLater):
    """Nothing behind `alyx.url` works as Alyx: an outage, which counts against no session.

    Args:
        unknown_outcome: True if something was to be changed, and may be changed, now or later.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        after_s: float | None = None,
        unknown_outcome: bool = False,
    ) -> None:
        super().__init__(message, hint=hint, after_s=after_s)
        self.unknown_outcome = unknown_outcome


class AlyxOdd(AlyxAway):
    """The answer to this very request was lost, or is none that Alyx gives.

    It is an outage if Alyx does not answer a greeting either; else it lies in what was asked.
    """


class AlyxThrottled(AlyxAway):
    """Alyx answered 429: too many requests by this user; `after_s` is its Retry-After."""


class DataRootAway(TryLater):
    """The data root is gone or empty, as when its disk is not mounted: no file is gone."""


class AlyxFault(TryLater):
    """Alyx answered 500 to this very request, with a reason that does not say it is permanent."""


class FileChanged(TryLater):
    """A file was written to while regd was reading or moving it; it has to settle again."""


class FileHeld(FileChanged):
    """A program has a file open for writing, so that it is not finished however still it is."""


# --- a person mends it ---------------------------------------------------------------------------


class NeedsHuman(RegdError):
    """Trying again will not help until a person acts on the hint."""


class InvalidInput(NeedsHuman, ValueError):
    """An argument or a setting is not what it must be."""


class InvalidPath(NeedsHuman, ALFInvalid):
    """A path does not follow the ALF convention."""


class PathTaken(NeedsHuman, FileExistsError):
    """A move would have overwritten a file; nothing was moved."""


class NoDatasetType(NeedsHuman, ValueError):
    """A file name matches no dataset type on Alyx, or more than one."""


class MemberNotFound(NeedsHuman, ALFError):
    """Alyx has no such user, lab, project, procedure, repository, …"""


class SubjectNotFound(MemberNotFound, AlyxSubjectNotFound):
    """Alyx has no subject of that nickname."""


class SessionNotFound(NeedsHuman, ALFError):
    """Alyx has no session for that subject, date and number."""


class RootTaken(NeedsHuman):
    """Another regd, with another state folder, works on the data root."""


class Unauthorized(NeedsHuman):
    """Alyx does not accept the user name, password or token."""


class AlyxRefused(NeedsHuman):
    """Alyx understood the request and will not do it.

    Args:
        status: The HTTP status of the answer.
    """

    def __init__(self, message: str, *, status: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status


class FileRefused(AlyxRefused):
    """Alyx refuses one file of a registration; those listed before it may be registered.

    Args:
        name: The file as Alyx named it: its name, or its path below the repository; None if Alyx
            did not say which file it was.
    """

    def __init__(self, message: str, *, status: int, name: str | None, hint: str = "") -> None:
        super().__init__(message, status=status, hint=hint)
        self.name = name


class DatasetsProtected(AlyxRefused):
    """At least one of the files posted is protected; nothing was registered.

    Args:
        details: For each file posted, in order, ``{file: [{revision name: protected}, …]}``, the
            newest revision first, as Alyx lists them.
    """

    def __init__(self, message: str, *, details: list[dict[str, list[dict[str, bool]]]]) -> None:
        super().__init__(message, status=403)
        self.details = details


class RevisionProtected(AlyxRefused):
    """The very dataset that was to be written became protected meanwhile."""
