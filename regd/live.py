"""`regd status --watch`: the report on the screen, drawn anew when the journal changed."""

from __future__ import annotations

import contextlib
import os
import select
import sqlite3
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from regd import screen
from regd.errors import NeedsHuman, RegdError
from regd.journal import FILE_NAME, Journal
from regd.settings import Settings
from regd.status import Report, is_running, report

_TICK_S = 0.5  # how often the journal is asked whether it changed: 40 microseconds
_LEAST_S = 1.0  # between two reports
_SHARE = 20  # of the time that reports may take, so that those of a million files cost 5 % at most
_LONGEST_S = 30.0  # what lies in the data folder, and the hour, change without the journal


class Board:
    """The report as it is now, of a journal that may vanish, be replaced, or not be there yet.

    Args:
        settings: Where the journal is.
        now: Seconds since 1970.
        clock: Monotonic seconds.

    Attributes:
        facts: The report, or None while there is none.
        error: Why there is none.
        took_s: How long it took to make.
    """

    def __init__(
        self,
        settings: Settings,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.facts: Report | None = None
        self.error: RegdError | None = None
        self.took_s = 0.0
        self._settings = settings
        self._now, self._clock = now, clock
        self._path = settings.state_dir / FILE_NAME
        self._journal: Journal | None = None
        self._file: tuple[int, int] | None = None  # the one that is open
        self._seen: object = None
        self._read_at = -_LONGEST_S

    def step(self) -> bool:
        """Make the report anew if something changed; return whether it, or the error, is new."""
        elapsed_s = self._clock() - self._read_at
        if elapsed_s < max(_LEAST_S, _SHARE * self.took_s):
            return False
        known = self.facts, self.error
        try:
            journal = self._open()
            seen = self._file, journal.version(), is_running(self._settings.state_dir)
            if seen == self._seen and elapsed_s < _LONGEST_S:
                return False
            started_at = self._clock()
            self.facts = report(self._settings, journal, ask_alyx=False)
            self.error = None
            self._seen, self._read_at = seen, self._clock()
            self.took_s = self._read_at - started_at
        except (RegdError, OSError, sqlite3.Error) as error:
            self.close()
            self.facts, self._seen = None, None
            if not isinstance(error, RegdError):
                error = NeedsHuman(str(error))
            if str(error) != str(self.error):
                self.error = error
        return (self.facts, self.error) != known

    def _open(self) -> Journal:
        """Return the journal, opened anew if another file is in its place."""
        file = None
        with contextlib.suppress(OSError):
            status = self._path.stat()
            file = status.st_dev, status.st_ino
        if self._journal is not None and file == self._file:
            return self._journal
        self.close()
        self._journal = Journal(self._path, now=self._now, read_only=True)
        self._file = file
        return self._journal

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.close()
        self._journal = None


def draw(board: Board, console: Console) -> RenderableType:
    """Return the screen: as much of the report as there is room for, and how to end it."""
    last = Text("q or Ctrl-C ends this", "dim")
    if board.facts is None:
        shown: RenderableType = Text("...") if board.error is None else screen.trouble(board.error)
        return Group(shown, Text(), last)
    changed = time.strftime("%H:%M:%S", time.localtime(board.facts["at"]))
    last = Text(f"as of {changed}; q or Ctrl-C ends this", "dim")
    for most in screen.FITTING:
        shown = screen.status(board.facts, most)
        if len(console.render_lines(shown, pad=False)) <= console.height - 2:
            break
    return Group(shown, Text(), last)


def watch(settings: Settings, console: Console, stop: threading.Event) -> None:
    """Show the report until `stop` is set or a person types q."""
    board = Board(settings)
    size = None
    try:
        with _keys() as typed, Live(console=console, screen=True, auto_refresh=False) as live:
            while not stop.is_set():
                if board.step() or console.size != size:
                    size = console.size
                    live.update(draw(board, console), refresh=True)
                if "q" in typed(_TICK_S).lower():
                    break
    finally:
        board.close()


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that waits so many seconds at most for keys, and returns them."""
    if not sys.stdin.isatty():

        def nothing(wait_s: float) -> str:
            time.sleep(wait_s)
            return ""

        yield nothing
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def typed(wait_s: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], wait_s)
        if not ready:
            return ""
        return os.read(descriptor, 100).decode(errors="replace") or "q"  # the terminal is gone

    try:
        tty.setcbreak(descriptor)
        yield typed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
