"""Nothing waits in silence: what keeps all of regd from working is told, with what to do."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from regd.errors import DataRootAway
from regd.journal import FILE_NAME, Journal
from regd.model import FileState, SessionState
from regd.paths import OWNER_FILE
from regd.sandbox.server import Server
from regd.service import Service
from regd.settings import Settings
from regd.status import report
from regd.watch import Hint
from tests.rig import DATASETS, Clock, Lab, Rig, write


@pytest.fixture
def lab(sandbox: Server) -> Iterator[Lab]:
    """The sandbox: sessions are deleted in it."""
    lab = Lab(sandbox.url, "rig_user", "rig-password", "ZM_1085", "mainenlab", "mainenlab_local")
    with lab.client:
        yield lab


def work(service: Service) -> None:
    """Do all that is due."""
    while service.step():
        pass


def problems(rig: Rig) -> dict[str, dict[str, Any]]:
    with rig.journal() as journal:
        facts = report(rig.settings, journal)
    assert facts["needs_human"] == len(facts["problems"])
    assert all(p["reason"] and p["hint"] for p in facts["problems"])
    return {p["what"]: p for p in facts["problems"]}


def test_a_scan_of_a_data_root_that_is_not_mounted_fails(rig: Rig) -> None:
    rig.record()
    rig.scan().close()
    disk = rig.root.rename(rig.root.with_name("disk"))
    rig.root.mkdir()
    with pytest.raises(DataRootAway, match="is empty"):
        rig.scan()
    assert "is its disk mounted" in problems(rig)[str(rig.root)]["hint"]
    rig.root.rmdir()
    disk.rename(rig.root)
    rig.scan().close()
    assert problems(rig) == {}


def test_a_daemon_that_is_not_running_is_told_while_sessions_wait(rig: Rig) -> None:
    rig.record()
    clock = Clock()
    with rig.by_hand(clock) as service:
        service.scanner.scan(clock())
    assert "1 session waits" in problems(rig)["regd"]["reason"]
    rig.scan().close()
    assert problems(rig) == {}


def test_refused_credentials_are_a_persons_and_no_outage(rig: Rig, tmp_path: Path) -> None:
    alyx = {**rig.settings.alyx.model_dump(), "password": "another"}
    rig = Rig(tmp_path, rig.lab, alyx=alyx)
    rig.record()
    with rig.by_hand(Clock()) as service:
        service._own()
        service.scanner.scan(0.0)
        work(service)
        service.step()
        facts = report(rig.settings, service.journal)
    assert facts["alyx"]["reachable"]
    assert "password" in facts["alyx"]["reason"]
    assert "Alyx" in {p["what"] for p in facts["problems"]}


def test_an_owner_file_that_cannot_be_looked_at_stops_no_work(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def fail(path: Any, *args: Any, **more: Any) -> int:
        if path == OWNER_FILE:
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **more)

    with rig.by_hand(Clock()) as service:
        service._own()
        monkeypatch.setattr(os, "open", fail)
        for _ in range(10):
            service._own()
        assert service.owner.holds
    told = [r.msg for r in caplog.records if isinstance(r.msg, dict)]
    assert [line["event"] for line in told if line["event"].startswith("root.")] == [
        "root.unguarded"
    ]


def test_what_is_noted_during_a_scan_is_done_though_nothing_comes_after_it(rig: Rig) -> None:
    with rig.by_hand(Clock()) as service:
        service._hints.put(Hint("newsubject", is_folder=True))
        service._hints.put(Hint("", overflow=True))
        service._note_hints()  # as a scan does between two folders
        assert service._take_hints() is True
        assert not service._to_scan
        service._hints.put(Hint(""))
        assert service._take_hints() is False


def test_files_that_were_of_no_interest_are_registered_once_they_are(rig: Rig) -> None:
    folder = rig.record(flag=False)
    rig.scan().close()  # held, with its files written down
    settings = rig.settings
    register = {**settings.register.model_dump(), "files": False}
    rig.settings = Settings(**{**settings.model_dump(), "register": register})
    (folder / settings.flag).touch()
    rig.scan().close()
    assert rig.held() == {}
    rig.settings = settings
    rig.scan().close()
    assert set(rig.held()) == set(DATASETS)


def test_retry_of_a_session_compares_all_of_it_with_alyx(rig: Rig, sandbox: Server) -> None:
    """As after a database that was restored from an older copy."""
    folder = rig.record()
    rig.scan().close()
    sandbox.store.delete("session", rig.eid())
    session = folder.relative_to(rig.root).as_posix()

    def retry() -> None:
        with Journal(rig.settings.state_dir / FILE_NAME, now=time.time) as journal:
            assert journal.retry(session) == 1

    retry()
    with rig.scan() as journal:
        (row,) = journal.sessions()
        assert row.state is SessionState.HELD  # Alyx does not know it, and it has no flag
    (folder / rig.settings.flag).touch()
    rig.scan().close()
    assert set(rig.held()) == set(DATASETS)
    sent = len([r for r in sandbox.requests if r.path == "/register-file"])
    retry()
    with rig.scan() as journal:
        assert len(journal.files_in(FileState.REGISTERED)) == len(DATASETS)
    assert len([r for r in sandbox.requests if r.path == "/register-file"]) == sent


def test_a_parked_session_whose_folder_was_renamed_is_no_longer_a_persons(rig: Rig) -> None:
    wrong = rig.root / rig.lab.lab / "Subjects" / "nobody" / rig.date / "001"
    write(wrong / DATASETS[0], b"x")
    write(wrong / rig.settings.flag, b"")
    with rig.scan() as journal:
        assert [row.state for row in journal.sessions()] == [SessionState.PARKED]
    rig.folder().parent.mkdir(parents=True)
    shutil.move(wrong, rig.folder())
    rig.scan().close()
    assert problems(rig) == {}
    assert set(rig.held()) == {DATASETS[0]}


def test_one_fault_is_one_alarm(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "regd")
    wrong = rig.root / rig.lab.lab / "Subjects" / "nobody" / rig.date / "001"
    write(wrong / rig.settings.flag, b"")
    session = wrong.relative_to(rig.root).as_posix()

    def alarms() -> int:
        return sum(
            r.msg["event"] == "session.parked" for r in caplog.records if isinstance(r.msg, dict)
        )

    clock = Clock()
    with rig.by_hand(clock) as service:
        service._own()
        service.scanner.scan(clock())
        work(service)
        assert alarms() == 1
        service._note_hints(Hint(f"{session}/{rig.settings.flag}"))  # its event, late
        work(service)
        assert alarms() == 1
        service.journal.retry(session)
        work(service)
        assert alarms() == 2


def test_a_change_in_a_session_that_alyx_no_longer_has_holds_it(rig: Rig, sandbox: Server) -> None:
    folder = rig.record()
    rig.scan().close()
    sandbox.store.delete("session", rig.eid())
    write(folder / DATASETS[0], b"changed")
    with rig.scan() as journal:
        (row,) = journal.sessions()
    assert "no longer has this session" in (row.reason or "")
    (folder / rig.settings.flag).touch()
    time.sleep(rig.settings.retry.longest_s)  # a scan does not wait for the next attempt
    rig.scan().close()
    assert set(rig.held()) == set(DATASETS)
