"""What must hold when Alyx, the disk or a writer does what it should not."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from regd import files
from regd.alyx import AlyxClient
from regd.errors import TryLater
from regd.journal import Journal
from regd.model import FileState, SessionState
from regd.registration import RegistrationClient
from tests.rig import DATASETS, Rig, md5, until, write

FILE = DATASETS[0]
Answer = Callable[[httpx.Request], httpx.Response | None]


class Between(httpx.BaseTransport):
    """Stands between regd and Alyx, and answers in its place where `answer` does."""

    def __init__(self, answer: Answer) -> None:
        self._network = httpx.HTTPTransport()
        self._answer = answer
        self.asked: list[tuple[str, str]] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.asked.append((request.method, request.url.path))
        return self._answer(request) or self._network.handle_request(request)

    def close(self) -> None:
        self._network.close()


def client(rig: Rig, answer: Answer) -> tuple[Between, RegistrationClient]:
    between = Between(answer)
    lab = rig.lab
    alyx = AlyxClient(
        lab.url,
        lab.username,
        lab.password,
        requests_per_minute=None,
        transport=between,
        sleep=lambda _: None,  # blips are not what is tested here
    )
    return between, RegistrationClient(alyx)


def test_a_change_that_alyx_never_got_is_not_forgotten_when_the_file_is_touched(rig: Rig) -> None:
    folder = rig.record()
    rig.scan().close()
    write(folder / FILE, b"never seen by Alyx")

    def away(request: httpx.Request) -> httpx.Response | None:
        return httpx.Response(503) if request.url.path == "/register-file" else None

    with contextlib.suppress(TryLater):
        rig.scan(client=client(rig, away)[1], arrives_s=0.1).close()  # nothing is late here
    os.utime(folder / FILE)
    with Journal(rig.journal().path, now=lambda: 0.0) as journal:
        journal.retry(None)
    rig.scan().close()
    assert rig.held()[FILE]["hash"] == md5(folder / FILE)


def test_a_session_whose_creation_is_on_its_way_is_not_created_again(rig: Rig) -> None:
    """A proxy gives up with 504; Alyx creates the session seconds later; files keep arriving."""
    late: list[threading.Timer] = []

    def slow(request: httpx.Request) -> httpx.Response | None:
        if (request.method, request.url.path) != ("POST", "/sessions") or late:
            return None
        again = httpx.Request("POST", request.url, headers=request.headers, content=request.content)

        def arrive() -> None:
            with httpx.HTTPTransport() as network:
                network.handle_request(again).read()

        timer = threading.Timer(3.0, arrive)
        timer.start()
        late.append(timer)  # only now: the test waits for it, and asks whether it is alive
        return httpx.Response(504)

    between, slow_client = client(rig, slow)
    folder = rig.record()
    with rig.running(client=slow_client) as service:
        until(lambda: late)
        while late[0].is_alive():
            write(folder / "alf" / "_ibl_wheel.velocity.npy", os.urandom(8))
            service.stop.wait(0.3)  # the rig's own pace
        service.stop.wait(1.0)  # time enough to do it wrong
        assert between.asked.count(("POST", "/sessions")) == 1
    assert len(rig.lab.sessions(rig.date)) == 1


def test_files_that_keep_arriving_do_not_use_up_the_attempts(rig: Rig, tmp_path: Path) -> None:
    rig = Rig(tmp_path, rig.lab, retry={"first_s": 5, "longest_s": 900, "attempts": 3})

    def fault(request: httpx.Request) -> httpx.Response | None:
        if request.url.path != "/register-file":
            return None
        return httpx.Response(500, json={"detail": "deadlock detected"})

    between, faulty = client(rig, fault)
    folder = rig.record()
    with rig.running(client=faulty) as service:
        until(lambda: ("POST", "/register-file") in between.asked)
        for n in range(8):
            write(folder / f"alf/task_{n:02d}/_ibl_wheel.position.npy", b"%d" % n)
            service.stop.wait(0.3)  # the rig's own pace
        (row,) = service.journal.sessions()
        assert row.attempt <= 2
        assert row.state is not SessionState.PARKED


def test_a_move_that_the_disk_refuses_blocks_only_its_file(rig: Rig) -> None:
    folder = rig.record()
    rig.scan().close()
    rig.lab.protect(rig.eid(), FILE)
    write(folder / FILE, b"recomputed")
    (folder / "alf" / f"#{datetime.date.today()}#").write_bytes(b"a file, not a folder")
    write(folder / "alf" / "probe01" / "spikes.times.npy", b"beside it")
    (folder / "create_me.flag").touch()
    with rig.scan() as journal:
        (row,) = journal.sessions()
        assert row.state is SessionState.WAITING
        assert row.hint == "a folder was replaced by something else; put it back"
        (file,) = (r for _, r in journal.files_in(FileState.PLACING))
        assert (file.path, file.hint) == (FILE, row.hint)
    assert (folder / FILE).read_bytes() == b"recomputed"
    assert "alf/probe01/spikes.times.npy" in rig.held()
    assert not (folder / "create_me.flag").exists()
    (folder / "alf" / f"#{datetime.date.today()}#").unlink()
    with rig.running():  # by itself
        until(lambda: f"alf/#{datetime.date.today()}#/{FILE.removeprefix('alf/')}" in rig.held())
    assert not (folder / FILE).exists()


def test_a_time_stamp_of_another_age_stops_nobody(rig: Rig) -> None:
    odd = rig.record(1)
    os.utime(odd / FILE, (1.04e10, 1.04e10))  # the year 2299
    good = rig.record(2)
    rig.scan().close()
    for number, folder in ((1, odd), (2, good)):
        assert not (folder / "create_me.flag").exists()
        assert len(rig.held(number)) == len(DATASETS)


def test_a_fault_of_one_session_is_no_outage(rig: Rig) -> None:
    def poison(request: httpx.Request) -> httpx.Response | None:
        bad = request.url.path == "/register-file" and b'/001"' in request.content
        return httpx.Response(500, html="<h1>Server Error (500)</h1>") if bad else None

    for number in range(1, 6):
        rig.record(number)
    with rig.scan(client=client(rig, poison)[1]) as journal:
        states = {row.folder[-3:]: (row.state, row.attempt) for row in journal.sessions()}
    assert {state for number, (state, _) in states.items() if number != "001"} == {"done"}
    state, attempt = states["001"]
    assert state in ("waiting", "parked")
    assert attempt > 0


def test_a_fault_of_regd_in_one_session_parks_that_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RegistrationClient.create_session

    def faulty(self, session, fields):
        if session.number == "001":
            raise ZeroDivisionError
        return real(self, session, fields)

    monkeypatch.setattr(RegistrationClient, "create_session", faulty)
    rig.record(1)
    rig.record(2)
    with rig.scan() as journal:
        (parked,) = journal.sessions(SessionState.PARKED)
    assert "ZeroDivisionError" in (parked.reason or "")
    assert len(rig.held(2)) == len(DATASETS)


def test_a_file_saved_anew_during_a_move_by_link_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = tmp_path / "s/2020-01-01/001"
    write(session / "alf/a.b.npy", b"hashed")
    monkeypatch.setattr(files, "_libc", object())  # as where renameat2 is missing
    real = os.fsync
    synced = []

    def slow(descriptor: int) -> None:
        real(descriptor)
        synced.append(descriptor)
        if len(synced) == 2:  # between the link and the unlink
            (session / "new").write_bytes(b"newer")
            (session / "new").replace(session / "alf/a.b.npy")

    monkeypatch.setattr(os, "fsync", slow)
    files.move(tmp_path, "s/2020-01-01/001", "alf/a.b.npy", "alf/#2020-01-02#/a.b.npy")
    found = {p.relative_to(session).as_posix(): p.read_bytes() for p in session.rglob("*.npy")}
    assert found == {"alf/a.b.npy": b"newer", "alf/#2020-01-02#/a.b.npy": b"hashed"}


def test_old_data_is_registered_when_all_of_it_is_asked_for(rig: Rig) -> None:
    folder = rig.record(flag=False)
    month_ago = datetime.datetime.now().timestamp() - 30 * 86400
    for path in folder.rglob("*.*"):
        if path.is_file():
            os.utime(path, (month_ago, month_ago))
    rig.scan().close()
    assert rig.lab.sessions(rig.date) == []
    rig.scan(everything=True).close()
    assert set(rig.held()) == set(DATASETS)
