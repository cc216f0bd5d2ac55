"""The ALF convention, applied to paths below a data root. Pure: nothing here touches a disk.

The grammar is `one.alf.spec`, which Alyx itself validates with; what is stricter here is stricter
because Alyx would accept the path and register another one (a folder with a space, a number of
four digits).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from functools import lru_cache
from pathlib import PurePath

from one.alf import spec

from regd.errors import InvalidPath, printable
from regd.model import DatasetPath, SessionPath

_PART = dict(spec._DEFAULT)
_SUBJECT = re.compile(f"(?=[a-zA-Z0-9_]){_PART['subject']}")  # Alyx refuses other first letters
_LAB = re.compile(_PART["lab"])
_NUMBER = re.compile(r"[0-9]{1,3}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_FOLDERS = spec.regex(spec.COLLECTION_SPEC)
_FILE = spec.regex(spec.FILE_SPEC)

OWNER_FILE = ".regd-owner"
"""The file in the data root that says which regd works there; others like it come and go."""
SESSION_FORM = "[<lab>/Subjects/]<subject>/<YYYY-MM-DD>/<NNN>"


def is_date(text: str) -> bool:
    """Say whether `text` is a date of the calendar, written YYYY-MM-DD."""
    if not _DATE.fullmatch(text):
        return False
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def session_depth(parts: tuple[str, ...]) -> int | None:
    """Return how many leading `parts` make a session path, or None if they make none yet.

    Args:
        parts: A path below the data root, or an absolute one, split at its slashes.
    """
    for i in range(2, len(parts)):
        if is_date(parts[i - 1]) and _NUMBER.fullmatch(parts[i]):
            return i + 1
    return None


def parse_session(parts: tuple[str, ...]) -> SessionPath:
    """Return the session of a path below the data root that names exactly a session folder.

    Raises:
        InvalidPath: The parts are not ``[<lab>/Subjects/]<subject>/<YYYY-MM-DD>/<NNN>``.
    """
    shown = printable("/".join(parts))
    if len(parts) not in (3, 5) or session_depth(parts) != len(parts):
        raise InvalidPath(
            f"{shown} is no session folder", hint=f"a session folder is {SESSION_FORM}"
        )
    lab = None
    if len(parts) == 5:
        lab = parts[0]
        if parts[1] != "Subjects" or not _LAB.fullmatch(lab) or not is_utf8(lab):
            raise InvalidPath(
                f"{shown} is no session folder", hint=f"a session folder is {SESSION_FORM}"
            )
    subject, date, number = parts[-3:]
    if not _SUBJECT.fullmatch(subject) or not is_utf8(subject):
        raise InvalidPath(
            f"{shown}: {printable(subject)!r} cannot be a subject's name",
            hint="rename the folder to the subject's nickname on Alyx: letters, digits, _ . -",
        )
    return SessionPath("/".join(parts), subject, date, number, lab)


def find_session(path: PurePath) -> tuple[PurePath, SessionPath] | None:
    """Find the session folder in any path, as ONE does: the first date followed by a number.

    Returns:
        The session's own folder and its parts, or None if the path holds no session.

    Raises:
        InvalidPath: There is a date and a number, but what stands before is no subject.
    """
    parts = path.parts
    depth = session_depth(parts)
    if depth is None:
        return None
    with_lab = depth >= 5 and parts[depth - 4] == "Subjects" and _LAB.fullmatch(parts[depth - 5])
    session = parse_session(parts[depth - (5 if with_lab else 3) : depth])
    return type(path)(*parts[:depth]), session


def could_become_session(parts: tuple[str, ...]) -> bool:
    """Say whether a folder below the data root may hold session folders."""
    match parts:
        case ():
            return True
        case (name,):
            return bool(_SUBJECT.fullmatch(name) or _LAB.fullmatch(name))
        case (name, "Subjects"):
            return bool(_LAB.fullmatch(name))
        case (_, "Subjects", name):
            return bool(_SUBJECT.fullmatch(name))
        case (_, date) | (_, "Subjects", _, date):
            return is_date(date)
    return False


@lru_cache(maxsize=4096)  # the same in one session after the other
def parse_dataset(inner: str) -> DatasetPath:
    """Split a file's path below its session folder into collection, revision and name.

    Raises:
        InvalidPath: The name is not UTF-8, or a folder is not what ALF allows. Alyx would accept
            some of these and register the file under another path.
    """
    if not is_utf8(inner):
        raise InvalidPath(
            f"{printable(inner)} is not UTF-8",
            hint="rename it, using letters, digits, _ . -",
        )
    folder, _, name = inner.rpartition("/")
    parts = inner.split("/")
    match = _FOLDERS.fullmatch(f"{folder}/") if folder else _FOLDERS.match("")
    if match is None or {"", ".", ".."} & set(parts):
        raise InvalidPath(
            f"{printable(inner)}: the folder is not as ALF allows",
            hint="rename it: letters, digits, _ . - ; a revision is one last folder #name#",
        )
    if not name.isprintable() or set(name) & set("\\:") or len(folder) > 255 or len(name) > 255:
        raise InvalidPath(
            f"{printable(inner)}: Alyx does not take this name",
            hint="rename it: letters, digits, _ . - ; at most 255 characters",
        )
    return DatasetPath(match["collection"] or "", match["revision"] or "", name)


def object_attribute(name: str) -> str | None:
    """Return ``object.attribute`` of an ALF file name, or None if the name is not ALF."""
    match = _FILE.match(name)
    return f"{match['object']}.{match['attribute']}" if match else None


class Ignored:
    """The patterns of `watch.ignore`; says of a path below the data root whether one fits.

    What regd itself writes into the data root is ignored as well.

    A pattern without a slash is held against the last name alone, one with a slash against the
    whole path; both ignore case, and are shell patterns.

    Args:
        patterns: Such as ``*.tmp`` or ``*/Subjects/*/scratch``.

    Attributes:
        fits_name: Says of a last name whether a pattern without a slash fits.
        fits_path: Says of a whole path whether one with a slash does; None if there is none.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        names = [f"{OWNER_FILE}*"]  # regd's own, whatever the settings say
        paths: list[str] = []
        for pattern in patterns:
            (paths if "/" in pattern else names).append(pattern.strip("/"))
        # the names of recordings come again and again
        self.fits_name: Callable[[str], object] = lru_cache(maxsize=65536)(_any_of(names).match)
        self.fits_path: Callable[[str], object] | None = _any_of(paths).match if paths else None

    def __call__(self, path: str) -> bool:
        """Say whether `path`, with '/' between its parts, fits a pattern."""
        if self.fits_name(path[path.rfind("/") + 1 :]):
            return True
        return self.fits_path is not None and bool(self.fits_path(path))


def _any_of(patterns: list[str]) -> re.Pattern[str]:
    # an empty list must match nothing
    return re.compile("|".join(map(translate, patterns)) or r"(?!)", re.IGNORECASE)


def is_utf8(text: str) -> bool:
    """Say whether a name read from the disk was UTF-8 (undecodable bytes become surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
