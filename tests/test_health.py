"""What a container's health check finds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regd.health import LOCK, SILENT_S, main, trouble
from regd.journal import FILE_NAME, Journal
from regd.service import lock


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state folder of a daemon that runs, as far as can be seen."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    Journal(folder / FILE_NAME, now=time.time).close()
    return folder


def test_no_daemon(state: Path) -> None:
    assert trouble(state, time.time()) == f"no regd has worked with {state}"
    with lock(state):
        assert trouble(state, time.time()) is None
    assert trouble(state, time.time()) == f"no regd works with {state}"


@pytest.mark.parametrize("by_s", [SILENT_S + 1, -SILENT_S - 1])
def test_one_that_does_not_advance(state: Path, by_s: float) -> None:
    with lock(state):
        at = (state / LOCK).stat().st_mtime
        assert trouble(state, at + by_s) == f"regd has not advanced for {SILENT_S + 1:.0f} s"
        assert trouble(state, at + by_s * 0.9) is None


def _nothing(journal: Path) -> None:
    journal.unlink()


def _garbage(journal: Path) -> None:
    journal.write_bytes(b"no journal" * 1000)


def _empty(journal: Path) -> None:
    journal.write_bytes(b"")


@pytest.mark.parametrize("spoil", [_nothing, _garbage, _empty])
def test_a_journal_that_cannot_be_read(state: Path, spoil: Callable[[Path], None]) -> None:
    spoil(state / FILE_NAME)
    with lock(state):
        assert "the journal cannot be read" in (trouble(state, time.time()) or "")
    assert not (state / f"{FILE_NAME}-wal").exists()


def test_the_program(state: Path) -> None:
    def ask(**environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "regd.health"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    assert ask(REGD_STATE_DIR=str(state)) == (1, f"no regd has worked with {state}\n")
    with lock(state):
        assert ask(REGD_STATE_DIR=str(state)) == (0, "regd is at work\n")
    assert ask(REGD_STATE_DIR="")[0] == 1


def test_a_folder_that_may_not_be_read_is_told(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setenv("REGD_STATE_DIR", str(state))
    monkeypatch.setattr(Path, "stat", refuse)
    assert main() == 1
    assert capsys.readouterr().out == f"{state / LOCK}: Permission denied\n"


def test_the_daemon_is_well_while_alyx_is_away(tmp_path: Path) -> None:
    """As a container runs it: what it is told is in the environment, and nobody listens."""
    (tmp_path / "data").mkdir()
    state = tmp_path / "state"
    told = {
        "DATA_ROOT": str(tmp_path / "data"),
        "STATE_DIR": str(state),
        "ALYX__URL": "http://127.0.0.1:9",
        "ALYX__TOKEN": "0" * 40,
    }
    with subprocess.Popen(
        [sys.executable, "-m", "regd", "run"],
        env={**os.environ, **{f"REGD_{key}": value for key, value in told.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as daemon:
        try:
            assert daemon.stdout
            next(line for line in daemon.stdout if '"alyx.away"' in line)
            assert trouble(state, time.time()) is None
        finally:
            daemon.kill()
    assert trouble(state, time.time()) == f"no regd works with {state}"
