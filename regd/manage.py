"""What a person does to a session: name it, put it back to work, forget it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from regd.errors import DataRootAway, InvalidInput, NeedsHuman, printable
from regd.journal import UNKNOWN_OUTCOME_S, Journal, SessionRow
from regd.paths import Ignored, session_depth
from regd.settings import Settings
from regd.worker import check_root

_NAMED = 8  # sessions that may have been meant


def find(settings: Settings, journal: Journal, name: str, *, whole: bool = False) -> SessionRow:
    """Return the session that a person means.

    Args:
        settings: Where the data root is.
        journal: What is known.
        name: Its folder, or a file in it, here or below the data root; its UUID on Alyx; subject,
            date and number; or a part of its folder that no other has.
        whole: Whether a file in it does not stand for it.

    Raises:
        InvalidInput: There is none of that name, or several.
    """
    for path in _paths(settings, name):
        parts = path.split("/")
        depth = session_depth(tuple(parts)) or len(parts)
        found = journal.find("/".join(parts[:depth]), _NAMED + 1)
        if not found:
            continue
        if len(found) > 1:
            some = ", ".join(row.folder for row in found[:_NAMED])
            more = ", ..." if len(found) > _NAMED else ""
            raise InvalidInput(f"{name} may be several sessions", hint=f"name one: {some}{more}")
        if whole and depth < len(parts):
            raise InvalidInput(f"{name} is in a session", hint=f"name it: {found[0].folder}")
        return found[0]
    raise InvalidInput(
        f"regd knows no session {name}",
        hint="`regd status` shows how it is called; one that is old and has no flag is left alone",
    )


def _paths(settings: Settings, name: str) -> list[str]:
    """Return what a name may be below the data root, the likeliest first."""
    path = Path(name)
    # no session is called otherwise
    paths = [] if path.is_absolute() else [printable(name).rstrip("/")]
    if settings.data_root is not None:
        root = settings.data_root.resolve()
        here = Path(printable(str(path.absolute())))
        paths += [
            path.relative_to(root).as_posix()
            for path in (here, here.resolve())  # from the folder that the person is in
            if path.is_relative_to(root) and path != root
        ]
    return list(filter(None, paths))


def retry(settings: Settings, journal: Journal, names: Sequence[str]) -> int:
    """Put sessions back to work, and return how many those are.

    Raises:
        InvalidInput: One is not known; then none is put back.
        NeedsHuman: One is in work.
    """
    rows = {row.folder: row for row in (find(settings, journal, name) for name in names)}
    for folder in rows:
        if not journal.retry(folder):
            raise NeedsHuman(f"{folder} is in work already", hint=f"see: regd show {folder}")
    return len(rows)


def forget(settings: Settings, journal: Journal, name: str, *, force: bool) -> str:
    """Forget a session, or what lies in none; on the disk and on Alyx all stays as it is.

    Args:
        settings: Where the data root is, and what is ignored in it.
        journal: What is known.
        name: As for `find`, but no file in a session; or a path that `regd status` names.
        force: Whether to forget it even if the next scan will find it again.

    Returns:
        Its path below the data root.

    Raises:
        InvalidInput: It is not known.
        NeedsHuman: It would be found again, or must not be forgotten now.
        DataRootAway: Whether it would be found again cannot be told.
    """
    strays = {path for path, _, _ in journal.strays()}
    stray = next((path for path in _paths(settings, name) if path in strays), None)
    row = None if stray is not None else find(settings, journal, name, whole=True)
    path = stray if row is None else row.folder
    assert path is not None
    if settings.data_root is not None and not force:
        check_root(settings.data_root, journal)
    if stays(settings, path):
        if not force:
            raise NeedsHuman(
                f"{path} is still there, and the next scan would find it again",
                hint=f"move it away; or add {path} to watch.ignore and restart regd; --force"
                " forgets it all the same",
            )
        if row is not None:
            _check_arrived(settings, row)
    if row is None:
        journal.forget_stray(path)
    else:
        journal.forget(row.id, is_gone=_is_gone(settings, journal, path))
    return path


def _is_gone(settings: Settings, journal: Journal, path: str) -> bool:
    """Say whether a session's folder is surely no longer there, and its disk is."""
    if settings.data_root is None or os.path.lexists(settings.data_root / path):
        return False
    try:
        check_root(settings.data_root, journal)
    except DataRootAway:
        return False
    return True


def stays(settings: Settings, path: str) -> bool:
    """Say whether something is on the disk, and not ignored."""
    if settings.data_root is None or not os.path.lexists(settings.data_root / path):
        return False
    ignored = Ignored(settings.watch.ignore)
    parts = path.split("/")
    return not any(ignored("/".join(parts[: n + 1])) for n in range(len(parts)))


def _check_arrived(settings: Settings, row: SessionRow) -> None:
    """Raise NeedsHuman if what was sent of a session may still arrive: only the journal knows."""
    arrives_s = max(UNKNOWN_OUTCOME_S, settings.alyx.timeout_s + 15.0)
    until = row.not_before if row.creating_at is None else row.creating_at + arrives_s
    wait_s = until - time.time()
    if wait_s > 0:
        raise NeedsHuman(
            f"what regd sent of {row.folder} may still arrive on Alyx",
            hint=f"wait {wait_s:.0f} s, then forget it",
        )
