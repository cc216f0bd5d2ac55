"""Where a protected file has to go. Pure.

The rules are those of ONE's `RegistrationClient`; two are added: no name that is protected or
occupied on the disk is ever chosen, and after ``…z`` comes ``…za``, which sorts after it as ONE
sorts revisions.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import PurePosixPath

from regd.errors import InvalidPath, NeedsHuman
from regd.model import Revision
from regd.paths import parse_dataset

_MOST_TRIED = 26 * 40  # names on one base; nobody protects a dataset a thousand times a day


def choose_destination(
    file: PurePosixPath,
    history: Sequence[Revision],
    today: datetime.date,
    occupied: Collection[str] = (),
) -> PurePosixPath:
    """Return the session-relative path `file` must have to be registered; maybe `file` itself.

    Args:
        file: The file's path below its session folder.
        history: Alyx's list for this dataset, newest first; the name '' is the original, outside
            any revision folder. Empty if Alyx does not know the dataset.
        today: The rig's local date.
        occupied: Names of revisions whose folder already holds a file of this name on the disk.

    Raises:
        NeedsHuman: Every name on that base is protected or occupied, or Alyx names a revision that
            no folder can have.
    """
    target = _choose(file, history, today, occupied)
    try:
        if target != file:  # a name that Alyx gave may be part of it
            parse_dataset(target.as_posix())
    except InvalidPath:
        raise NeedsHuman(
            f"{file} has a revision on Alyx that no folder can be named: {history[0].name[:100]!r}",
            hint="rename that revision on Alyx; then: regd retry --all",
        ) from None
    return target


def _choose(
    file: PurePosixPath,
    history: Sequence[Revision],
    today: datetime.date,
    occupied: Collection[str],
) -> PurePosixPath:
    protected = {r.name for r in history if r.protected}
    own = own_revision(file)
    if own is not None:
        if own not in protected:
            return file
        folder = file.parent.parent
        return _inside(folder, next_revision(own, protected | set(occupied)), file)
    if "" not in protected and (not history or history[0].name == ""):
        return file
    reserved = protected | set(occupied)
    return _inside(file.parent, _for_original(history[0], reserved, today.isoformat()), file)


def own_revision(file: PurePosixPath) -> str | None:
    """Return the revision in whose folder `file` lies, or None."""
    folder = file.parent.name
    return folder[1:-1] if len(folder) > 2 and folder[0] == folder[-1] == "#" else None


def next_revision(base: str, reserved: Collection[str], after: str = "") -> str:
    """Return `base` and the first suffix a, b, … z, za, zb, … that is free.

    Args:
        base: The revision to build on, usually a date.
        reserved: Names that cannot be used.
        after: A name that the new one must sort after, if given.

    Raises:
        NeedsHuman: No such name is left.
    """
    for suffix in islice(_suffixes(), _MOST_TRIED):
        name = base + suffix
        if name > after and name not in reserved:
            return name
    raise NeedsHuman(
        f"no revision name is left after {base}",
        hint="move the file into a revision folder #name# of your own choice",
    )


def _for_original(latest: Revision, reserved: set[str], today: str) -> str:
    """Return the revision for a file outside any revision folder, by the newest one on Alyx."""
    if not latest.protected and _starts_with_date(latest.name):
        # an open revision takes the file, unless that would overwrite the one already in it
        return latest.name if latest.name not in reserved else next_revision(latest.name, reserved)
    if latest.protected and latest.name.startswith(today):
        return next_revision(today, reserved, after=latest.name)
    return today if today not in reserved else next_revision(today, reserved)


def _suffixes() -> Iterator[str]:
    stem = ""
    while True:
        for letter in "abcdefghijklmnopqrstuvwxyz":
            yield stem + letter
        stem += "z"


def _starts_with_date(name: str) -> bool:
    try:
        datetime.datetime.strptime(name[:10], "%Y-%m-%d")
    except ValueError:
        return False
    return True


def _inside(folder: PurePosixPath, revision: str, file: PurePosixPath) -> PurePosixPath:
    return folder / f"#{revision}#" / file.name
