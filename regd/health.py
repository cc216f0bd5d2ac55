"""Says whether the daemon on a state folder is at work, cheaply enough to be asked all day.

`python -m regd.health` is the health check of the container. It imports nothing of regd's, and asks
neither Alyx nor the data folder: a daemon that waits for these is well, and a new one could do no
better.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import sys
import time
from pathlib import Path

BEAT_S = 10.0
"""How often the daemon says that no work in hand is stuck, in seconds."""
SILENT_S = 60.0
"""A daemon that has not said so for longer is stuck, or gone."""
LOCK = "lock"
"""The file in the state folder that the daemon locks, and whose time stamp it renews."""


def is_running(state_dir: Path) -> bool:
    """Say whether a regd works with that state folder."""
    try:
        with (state_dir / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def trouble(state_dir: Path, now: float) -> str | None:
    """Return what keeps the daemon from its work, or None.

    Args:
        state_dir: Its state folder.
        now: Seconds since 1970.

    Raises:
        OSError: The state folder is not this user's.
    """
    try:
        beaten_at = (state_dir / LOCK).stat().st_mtime
    except FileNotFoundError:
        return f"no regd has worked with {state_dir}"
    if not is_running(state_dir):
        return f"no regd works with {state_dir}"
    silent_s = abs(now - beaten_at)  # the clock may have been set
    if silent_s > SILENT_S:
        return f"regd has not advanced for {silent_s:.0f} s"
    journal = (state_dir / "journal.sqlite").absolute().as_uri()
    try:
        db = sqlite3.connect(f"{journal}?mode=ro", uri=True, timeout=5.0)
        try:
            db.execute("SELECT count(*) FROM fact").fetchone()
        finally:
            db.close()
    except sqlite3.Error as error:
        return f"the journal cannot be read: {error}"
    return None


def main() -> int:
    """Print whether the daemon is well; return 0 if it is, or else 1."""
    state_dir = os.environ.get("REGD_STATE_DIR")
    if not state_dir:
        print("REGD_STATE_DIR is not set: name regd's state folder there")
        return 1
    try:
        found = trouble(Path(state_dir), time.time())
    except OSError as error:
        found = f"{error.filename}: {error.strerror}"
    print(found or "regd is at work")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
