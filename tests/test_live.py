"""The report kept on the screen: drawn when something changed, whatever becomes of the journal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from regd.journal import FILE_NAME, Journal, set_aside
from regd.live import Board, draw
from regd.paths import parse_session
from regd.settings import Settings
from tests.rig import until


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "data" / "mouse").mkdir(parents=True)
    (tmp_path / "state").mkdir(mode=0o700)
    return Settings(data_root=tmp_path / "data", state_dir=tmp_path / "state")


@pytest.fixture
def board(settings: Settings, clock: Clock) -> Iterator[Board]:
    board = Board(settings, clock=clock)
    yield board
    board.close()


def journal_of(settings: Settings) -> Journal:
    return Journal(settings.state_dir / FILE_NAME, now=lambda: 1000.0)


def note(journal: Journal, number: int) -> None:
    journal.note(parse_session(("mouse", "2023-11-14", f"{number:03d}")), due_at=0)


def waiting(board: Board) -> int:
    assert board.facts is not None
    return int(board.facts["sessions"]["waiting"])


def test_it_is_read_again_when_the_journal_changed(
    settings: Settings, board: Board, clock: Clock
) -> None:
    with journal_of(settings) as journal:
        note(journal, 1)
        assert board.step()
        assert waiting(board) == 1
        clock.now += 5
        assert not board.step()
        note(journal, 2)
        assert board.step()
        assert waiting(board) == 2
        note(journal, 3)
        assert not board.step(), "so soon after the last one"
        clock.now += 1
        assert board.step()
        assert waiting(board) == 3
        clock.now += 31
        assert board.step(), "the data folder changes without the journal"


def test_one_that_takes_long_is_read_less_often(
    settings: Settings, board: Board, clock: Clock
) -> None:
    with journal_of(settings) as journal:
        note(journal, 1)
        assert board.step()
        board.took_s = 0.5
        note(journal, 2)
        clock.now += 9
        assert not board.step()
        clock.now += 1
        assert board.step()


def test_a_daemon_that_starts_or_ends_is_seen(
    settings: Settings, board: Board, clock: Clock
) -> None:
    journal_of(settings).close()
    assert board.step()
    assert board.facts is not None
    with (settings.state_dir / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        clock.now += 2
        assert board.step()
        assert board.facts["daemon"]["running"]
    clock.now += 2
    assert board.step()
    assert not board.facts["daemon"]["running"]


def test_a_journal_that_vanishes_is_replaced_or_comes_later(
    settings: Settings, board: Board, clock: Clock
) -> None:
    file = settings.state_dir / FILE_NAME

    def text() -> str:
        console = Console(file=io.StringIO(), width=80)
        console.print(draw(board, console))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    assert board.step()
    assert "there is no journal" in text()
    clock.now += 2
    assert not board.step(), "the same error is no news"
    with journal_of(settings) as journal:
        note(journal, 1)
    clock.now += 2
    assert board.step()
    assert waiting(board) == 1
    set_aside(file, 0.0)
    clock.now += 2
    assert board.step()
    assert "there is no journal" in text()
    file.write_bytes(b"no journal at all " * 100)
    clock.now += 2
    assert board.step()
    assert "damaged" in text()
    file.unlink()
    with journal_of(settings) as journal:
        note(journal, 1)
        note(journal, 2)
        clock.now += 2
        assert board.step()
        assert waiting(board) == 2
    set_aside(file, 0.0)
    with journal_of(settings) as journal:
        clock.now += 2
        assert board.step()
        assert waiting(board) == 0


# --- as a person sees it -------------------------------------------------------------------------


class Terminal:
    """`regd status --watch` on a terminal of 80 columns and 24 lines."""

    def __init__(self, config: Path) -> None:
        self.screen, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(inner)
        self.inner = inner
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "regd", "status", "--watch", "-c", str(config)],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**os.environ, "TERM": "xterm"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        self._end = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while not self._end.is_set():
            if select.select([self.screen], [], [], 0.1)[0]:
                self.shown += os.read(self.screen, 10_000).decode(errors="replace")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._end.set()
        self._reader.join()
        os.close(self.inner)
        os.close(self.screen)


@pytest.fixture
def terminal(settings: Settings, tmp_path: Path) -> Iterator[Terminal]:
    with journal_of(settings) as journal:
        note(journal, 1)
    config = tmp_path / "regd.yaml"
    config.write_text(f"data_root: {settings.data_root}\nstate_dir: {settings.state_dir}\n")
    terminal = Terminal(config)
    yield terminal
    terminal.close()


@pytest.mark.parametrize("end", ["q", "\x03", signal.SIGTERM, signal.SIGINT])
def test_it_shows_what_changes_and_leaves_the_terminal_as_it_was(
    settings: Settings, terminal: Terminal, end: str | signal.Signals
) -> None:
    until(lambda: "mouse/2023-11-14/001" in terminal.shown)
    with journal_of(settings) as journal:
        note(journal, 2)
    until(lambda: "mouse/2023-11-14/002" in terminal.shown)
    if isinstance(end, str):
        os.write(terminal.screen, end.encode())
    else:
        terminal.process.send_signal(end)
    assert terminal.process.wait(timeout=5) == 0
    assert termios.tcgetattr(terminal.inner) == terminal.before
    until(lambda: "\x1b[?1049l" in terminal.shown)
    assert terminal.shown.rindex("\x1b[?25h") > terminal.shown.rindex("\x1b[?25l"), "its cursor"
    assert terminal.shown.count("\x1b[?1049h") == terminal.shown.count("\x1b[?1049l") == 1
    assert "Traceback" not in terminal.shown
