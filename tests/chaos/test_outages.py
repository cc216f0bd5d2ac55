"""What must hold when Alyx is away for long, or refuses who asks: nothing is lost, and it is told.

Where a time is made up (`Clock`), regd is driven by hand in it. Where the daemon itself runs, its
clocks run fast.
"""

from __future__ import annotations

import logging
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import regd.sandbox.server
from regd.alyx import AlyxClient
from regd.errors import AlyxAway, AlyxOdd, Unauthorized
from regd.model import SessionPath, SessionState
from regd.registration import RegistrationClient
from regd.sandbox.server import Server
from regd.sandbox.store import hash_password
from regd.sandbox.throttle import Throttle
from regd.service import Service
from regd.settings import Settings, load
from regd.status import report
from tests import chaos
from tests.chaos.proxy import Proxy
from tests.chaos.test_network import is_left
from tests.conftest import INITIAL
from tests.rig import DATASETS, Clock, Lab, Rig, until

HOURS = 4 if chaos.TIMES is None else 60
FAST = 20.0  # so much faster than time do the daemon's clocks run
TWO = DATASETS[:2]


@pytest.fixture(autouse=True)
def hear(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "regd")


@pytest.fixture
def lab(sandbox: Server) -> Iterator[Lab]:
    """The sandbox: what is tried here is not to be tried on people's Alyx."""
    lab = Lab(sandbox.url, "rig_user", "rig-password", "ZM_1085", "mainenlab", "mainenlab_local")
    with lab.client:
        yield lab


@pytest.fixture
def proxy(lab: Lab) -> Iterator[Proxy]:
    with Proxy(lab.url) as proxy:
        yield proxy


def said(caplog: pytest.LogCaptureFixture, *events: str) -> list[dict[str, Any]]:
    """Return what was logged of these events."""
    lines = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    return [line for line in lines if line["event"] in events]


def alyx_at(lab: Lab, url: str, **more: Any) -> dict[str, Any]:
    return {
        "url": url,
        "username": lab.username,
        "password": lab.password,
        "requests_per_minute": None,
        **more,
    }


def work(service: Service, clock: Clock, hours: float, *, tick_s: float = 30.0) -> None:
    """Have so much time pass, or as much as there is work for."""
    end = clock() + hours * 3600
    while clock() < end and (service.step() or is_left(service)):
        clock.sleep(tick_s)


def finish(service: Service, clock: Clock) -> None:
    work(service, clock, 10, tick_s=0.5)
    assert not is_left(service), service.journal.sessions()


# --- nobody answers ------------------------------------------------------------------------------


LONG = ("drop", "503")
SHORT = ("500", "500 in JSON", "redirect", "login page", "other JSON", "404", "403", "401")


@pytest.mark.parametrize("how", [*LONG, *SHORT, "429 after hours"])
def test_a_weekend_without_alyx(
    how: str, proxy: Proxy, lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    lab.client.greet()
    token = lab.client._login.token  # so that it is not the log-in alone that fails
    rig = Rig(tmp_path, lab, alyx=alyx_at(lab, proxy.url, token=token))
    hours = HOURS if how in LONG else 1
    with rig.by_hand(clock) as service:
        proxy.plan = lambda *_: how
        for hour in range(1, hours + 1):
            rig.record(hour, names=TWO)
            service.scanner.scan(clock())
            work(service, clock, 1)
            rows = service.journal.sessions()
            assert len(rows) == hour
            assert {(row.state, row.attempt) for row in rows} == {("waiting", 0)}
        away = said(caplog, "alyx.away")
        assert len(away) in (hours, hours + 1)  # at its start, then every hour
        assert away[0]["failures"] == 1
        assert away[0]["reason"]
        assert report(rig.settings, service.journal)["alyx"]["reachable"] is False
        proxy.plan = lambda *_: None
        finish(service, clock)
    assert len(said(caplog, "alyx.back")) == 1
    assert not said(caplog, "session.parked", "session.retried", "file.refused")
    assert [s["number"] for s in lab.sessions(rig.date)] == [*range(1, hours + 1)]
    for number in range(1, hours + 1):
        assert set(rig.held(number)) == set(TWO)
        assert not (rig.folder(number) / "create_me.flag").exists()


def test_a_name_that_no_server_knows_is_an_outage(
    rig: Rig, tmp_path: Path, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    rig = Rig(tmp_path, lab, alyx=alyx_at(lab, "http://alyx.invalid"))
    rig.record()
    with rig.by_hand(clock) as service:
        service.scanner.scan(clock())
        work(service, clock, 0.01)
        (row,) = service.journal.sessions()
        assert (row.state, row.attempt) == ("waiting", 0)
    (away,) = said(caplog, "alyx.away")
    assert "alyx.url" in away["hint"]


def test_what_several_workers_find_at_once_is_one_failure(rig: Rig) -> None:
    clock = Clock()
    with rig.by_hand(clock) as service:
        for error, wait_s in ((AlyxAway("down"), 2), (Unauthorized("wrong"), 60)):
            for _ in range(8):
                service.gate.close(error)
            assert not service.gate.take_probe()
            clock.sleep(wait_s)
            assert service.gate.take_probe()
            assert not service.gate.take_probe()


# --- it answers, and takes nothing ---------------------------------------------------------------


def no_writes(how: str) -> Callable[[int, str, str], str | None]:
    return lambda _, method, path: how if path in WRITES and method == "POST" else None


WRITES = ("/sessions", "/register-file")


@pytest.mark.parametrize("how", ["503", "500 in JSON", "drop", "half a JSON"])
def test_a_weekend_with_an_alyx_that_takes_nothing(
    how: str, proxy: Proxy, lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    rig = Rig(tmp_path, lab, alyx=alyx_at(lab, proxy.url))
    for number in (1, 2, 3, 4):
        rig.record(number, names=TWO)
    with rig.by_hand(clock) as service:
        proxy.plan = no_writes(how)
        service.scanner.scan(clock())
        work(service, clock, 3)
        assert service.gate.error is not None
        assert "takes nothing" in service.gate.error.reason
        for row in service.journal.sessions():
            assert row.state == "waiting"
            assert row.attempt <= 1
        sent = [asked for asked in proxy.asked if asked[1] in WRITES and asked[0] == "POST"]
        assert 60 < len(sent) < 200  # one session a minute tries
        assert 3 <= len(said(caplog, "alyx.away")) <= 4
        assert not said(caplog, "alyx.back")
        proxy.plan = lambda *_: None
        finish(service, clock)
    assert len(said(caplog, "alyx.back")) == 1
    assert not said(caplog, "session.parked")
    assert [s["number"] for s in lab.sessions(rig.date)] == [1, 2, 3, 4]
    assert all(set(rig.held(number)) == set(TWO) for number in (1, 2, 3, 4))


def bad_files(monkeypatch: pytest.MonkeyPatch, *numbers: str, after_s: float | None = None) -> None:
    """Have Alyx fail on the files of some sessions, while it works for all others."""
    real = RegistrationClient.post_files

    def post_files(self: RegistrationClient, session: SessionPath, *rest: Any, **more: Any) -> Any:
        if session.number in numbers:
            raise AlyxOdd("answered 503", after_s=after_s, unknown_outcome=True)
        return real(self, session, *rest, **more)

    monkeypatch.setattr(RegistrationClient, "post_files", post_files)


@pytest.mark.parametrize("others", [0, 5])
def test_one_session_that_alyx_fails_on_is_parked_and_is_no_outage(
    others: int, rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    bad_files(monkeypatch, "001")
    with rig.by_hand(clock) as service:
        for number in range(1, others + 2):
            rig.record(number, names=TWO)
            service.scanner.scan(clock())
            work(service, clock, 0.05)
        finish(service, clock)
        (parked,) = service.journal.sessions(SessionState.PARKED)
    assert parked.folder.endswith("/001")
    assert not said(caplog, "alyx.away")
    assert all(set(rig.held(number)) == set(TWO) for number in range(2, others + 2))


def test_a_good_session_gets_through_between_many_that_alyx_fails_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    bad_files(monkeypatch, "001", "002", "003", "004")
    with rig.by_hand(clock) as service:
        for number in (1, 2, 3, 4):
            rig.record(number, names=TWO)
        service.scanner.scan(clock())
        work(service, clock, 0.5)
        assert service.gate.error is not None
        for number in (5, 6, 7, 8, 9, 10):
            rig.record(number, names=TWO)
            service.scanner.scan(clock())
            work(service, clock, 0.3)
            assert set(rig.held(number)) == set(TWO)
        assert service.journal.sessions(SessionState.PARKED)


@pytest.mark.parametrize(("after_s", "wait_s"), [(None, 75), (10.0, 75), (3600.0, 3600)])
def test_the_longer_of_two_waits_holds(
    after_s: float | None, wait_s: float, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    rig.record(names=TWO)
    bad_files(monkeypatch, "001", after_s=after_s)
    with rig.by_hand(clock) as service:
        service.scanner.scan(clock())
        service.step()
        (row,) = service.journal.sessions()
        assert row.attempt == 1
        assert row.due_at - clock() == row.not_before - clock() == pytest.approx(wait_s, abs=1)


def test_a_session_that_alyx_answers_oddly_about_is_parked_and_is_no_outage(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its time zone is not the rig's: asked for a day, it lists one of another."""
    clock = Clock()
    real = AlyxClient.pages

    def pages(self: AlyxClient, path: str, *query: Any, **more: Any) -> Iterator[Any]:
        if path != "/sessions" or query[0].get("number") != 1:
            yield from real(self, path, *query, **more)
            return
        start = "1999-01-01T23:30:00"
        yield {"id": "x", "url": "y", "subject": rig.lab.subject, "number": 1, "start_time": start}

    monkeypatch.setattr(AlyxClient, "pages", pages)
    rig.record(1, names=TWO)
    rig.record(2, names=TWO)
    with rig.by_hand(clock) as service:
        service.scanner.scan(clock())
        finish(service, clock)
        (parked,) = service.journal.sessions(SessionState.PARKED)
    assert "others than were asked for" in (parked.reason or "")
    assert not said(caplog, "alyx.away")


def test_an_outage_does_not_hurry_the_looks_for_a_held_session(
    proxy: Proxy, lab: Lab, tmp_path: Path
) -> None:
    clock = Clock()
    rig = Rig(tmp_path, lab, alyx=alyx_at(lab, proxy.url))
    rig.record(flag=False, names=TWO)
    with rig.by_hand(clock) as service:
        service.scanner.scan(clock())
        for _ in range(4):
            while not service.step():
                clock.sleep(30)
        looked = service.journal.sessions()[0].looked
        assert looked > 2
        proxy.plan = lambda *_: "drop"
        while service.gate.error is None:
            clock.sleep(30)
            service.step()
        assert service.journal.sessions()[0].looked == looked
        proxy.plan = lambda *_: None


# --- a rush on its return ------------------------------------------------------------------------


@pytest.mark.parametrize("limited", [True, False], ids=["by regd too", "by Alyx alone"])
def test_the_rush_after_an_outage_keeps_to_the_limit(
    limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four workers of the daemon itself, in minutes of a second each."""

    def fast() -> float:
        return time.monotonic() * 60

    monkeypatch.setattr(regd.sandbox.server, "Throttle", partial(Throttle, clock=fast))
    with Server(load=INITIAL, rate_limit="60/minute") as server:
        lab = Lab(server.url, "rig_user", "rig-password", "ZM_1085", "mainenlab", "mainenlab_local")
        rig = Rig(tmp_path, lab)
        alyx = AlyxClient(
            lab.url,
            lab.username,
            lab.password,
            requests_per_minute=50 if limited else None,
            clock=fast,
            sleep=lambda seconds: time.sleep(seconds / 60),
        )
        for number in range(1, 41):
            rig.record(number, names=TWO)
        with rig.running(client=RegistrationClient(alyx)) as service:
            until(lambda: service.journal.counts()[0][SessionState.DONE] == 40, 60)
        refused = [asked for asked in server.requests if asked.status == 429]
        assert bool(refused) is not limited
        done = [(asked.method, asked.path) for asked in server.requests if asked.status == 201]
        assert done.count(("POST", "/sessions")) == 40
        assert done.count(("POST", "/register-file")) == 40


# --- Alyx refuses who asks -----------------------------------------------------------------------


def fast() -> float:
    return time.monotonic() * FAST


class Refused:
    """A rig whose settings stand in a file, as a person mends them."""

    def __init__(self, folder: Path, server: Server, lab: Lab, **alyx: Any) -> None:
        self.server = server
        self.rig = Rig(folder, lab)
        self.file = folder / "regd.yaml"
        self.file.touch(mode=0o600)
        self.say(**alyx)

    def say(self, **alyx: Any) -> None:
        """Write the settings."""
        given = self.rig.settings
        values = {
            "data_root": str(given.data_root),
            "state_dir": str(given.state_dir),
            "repository": given.repository,
            "settle": given.settle.model_dump(),
            "alyx": {"url": self.server.url, **alyx},
            "log": {"format": "json"},
        }
        self.file.write_text(yaml.safe_dump(values))

    def read(self) -> Settings:
        return load(self.file).settings

    @contextmanager
    def running(self) -> Iterator[Service]:
        self.rig.settings = self.read()
        with self.rig.running(reread=self.read, clock=fast) as service:
            yield service

    def on_alyx(self, **values: str | None) -> None:
        """Change the daemon's user there."""
        user = self.server.store.first("labmember", username="test_user")
        assert user is not None
        self.server.store.update("labmember", user["id"], values)

    def is_registered(self, number: int) -> bool:
        return not (self.rig.folder(number) / "create_me.flag").exists()

    def logins(self) -> int:
        return sum(asked.path == "/auth-token" for asked in self.server.requests)


def no_attempt_was_counted(service: Service) -> None:
    for row in service.journal.sessions():
        assert row.state in ("waiting", "working", "done")
        assert row.attempt == 0


def test_a_token_that_was_revoked(
    sandbox: Server,
    lab: Lab,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = tmp_path / "secrets" / "alyx__token"
    secret.parent.mkdir()
    secret.touch(mode=0o600)
    secret.write_text("first\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(secret.parent))
    place = Refused(tmp_path, sandbox, lab, username="test_user")
    place.on_alyx(token="first")
    with place.running() as service:
        place.rig.record(1, names=TWO)
        until(lambda: place.is_registered(1))
        place.on_alyx(token="second")
        place.rig.record(2, names=TWO)
        (away,) = until(lambda: said(caplog, "alyx.away"))
        assert str(secret) in away["hint"]
        assert "systemctl restart regd" in away["hint"]
        place.rig.record(3, names=TWO)
        until(lambda: len(service.journal.sessions()) == 3)
        no_attempt_was_counted(service)
        mended = secret.with_name(".new")
        mended.touch(mode=0o600)
        mended.write_text("second\n")
        mended.rename(secret)  # at once, as editors do: half of it would be told, too
        until(lambda: place.is_registered(2) and place.is_registered(3))
    for event in ("alyx.away", "credentials.changed", "alyx.back"):
        assert len(said(caplog, event)) == 1
    assert not said(caplog, "session.parked", "session.retried")
    assert len(place.rig.lab.sessions(place.rig.date)) == 3


def test_a_password_that_was_changed_and_settings_that_are_wrong_for_a_while(
    sandbox: Server, lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = sandbox.passwords["test_user"]
    place = Refused(tmp_path, sandbox, lab, username="test_user", password=old)
    with place.running() as service:
        place.rig.record(1, names=TWO)
        until(lambda: place.is_registered(1))
        place.on_alyx(password=hash_password("new-password"), token="new")
        place.rig.record(2, names=TWO)
        (away,) = until(lambda: said(caplog, "alyx.away"))
        assert f"alyx.password ({place.file})" in away["hint"]
        assert "restart" not in away["hint"]
        place.file.write_text("alyx: [")
        (failed,) = until(lambda: said(caplog, "settings.failed"))
        assert str(place.file) in failed["reason"]
        told = report(service.settings, service.journal)["alyx"]
        assert str(place.file) in told["hint"]
        no_attempt_was_counted(service)
        place.say(username="test_user", password="a wrong one")
        until(lambda: len(said(caplog, "alyx.away")) == 2)  # who mended it is told at once
        place.say(username="test_user", password="new-password")
        until(lambda: place.is_registered(2))
        no_attempt_was_counted(service)
    assert len(said(caplog, "credentials.changed")) == 2
    assert len(said(caplog, "settings.failed")) == len(said(caplog, "settings.mended")) == 1
    assert len(said(caplog, "alyx.back")) == 1


def test_a_wrong_password_is_tried_seldom_and_works_once_alyx_takes_it(
    sandbox: Server, lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    place = Refused(tmp_path, sandbox, lab, username="test_user", password="not yet")
    place.rig.settings = place.read()
    place.rig.record(1, names=TWO)
    with place.rig.by_hand(clock) as service:
        service.scanner.scan(clock())
        work(service, clock, 1)
        assert 3 <= place.logins() <= 9
        work(service, clock, 9)
        assert place.logins() <= 9 + 9 * 5
        no_attempt_was_counted(service)
        assert 8 <= len(said(caplog, "alyx.away")) <= 11  # by the hour, as far as it is tried
        place.on_alyx(password=hash_password("not yet"))
        mended_at = clock()
        finish(service, clock)
        assert clock() - mended_at < 1000
    assert place.is_registered(1)
    assert len(said(caplog, "alyx.back")) == 1


def test_workers_that_start_together_try_a_wrong_password_once(
    sandbox: Server, lab: Lab, tmp_path: Path
) -> None:
    place = Refused(tmp_path, sandbox, lab, username="test_user", password="wrong")
    place.rig.settings = place.read()
    for number in range(1, 9):
        place.rig.record(number, names=TWO)
    with place.rig.running() as service:
        until(lambda: service.gate.error)
        service.stop.wait(1.0)  # time enough to do it wrong
        assert place.logins() == 1
        no_attempt_was_counted(service)


def test_the_command_takes_up_a_mended_file_and_shows_no_secret(
    sandbox: Server, lab: Lab, tmp_path: Path
) -> None:
    place = Refused(tmp_path, sandbox, lab, token="an-old-secret")
    place.on_alyx(token="the-new-secret")
    place.rig.record(1, names=TWO)
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "regd", "run", "-c", place.file],
            stderr=stderr,
            env={k: v for k, v in os.environ.items() if not k.startswith("REGD_")},
        )
        try:
            until(lambda: "alyx.away" in log.read_text())
            place.say(token="the-new-secret")
            until(lambda: place.is_registered(1), 30)
        finally:
            process.terminate()
            assert process.wait(timeout=10) == 0
    assert "credentials.changed" in log.read_text()
    assert "secret" not in log.read_text().replace("secret file", "")


# --- certificates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("days", "host", "trusted", "hint"),
    [
        (1, "localhost", False, "alyx.ca_file"),
        (1, "127.0.0.1", True, "alyx.url to the name"),
        (-1, "localhost", True, "clock"),
        (1, "localhost", True, None),
    ],
    ids=["unknown authority", "another name", "expired", "good"],
)
def test_a_certificate(
    days: int, host: str, trusted: bool, hint: str | None, tmp_path: Path
) -> None:
    key, wish, certificate = (tmp_path / name for name in ("key", "wish", "certificate"))
    ask = "openssl req -new -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1"
    ask += " -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    sign = f"openssl x509 -req -copy_extensions copy -days {days}"
    for command in (
        [*ask.split(), "-keyout", key, "-out", wish],
        [*sign.split(), "-in", wish, "-signkey", key, "-out", certificate],
    ):
        subprocess.run(command, check=True, capture_output=True)

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"results": []}')

        def log_message(self, *_: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        server.handle_error = lambda *_: None  # a client that hangs up is what is wanted
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with AlyxClient(
            f"https://{host}:{server.server_port}",
            token="t",
            ca_file=certificate if trusted else None,
            sleep=lambda _: None,
        ) as client:
            if hint is None:
                client.greet()
            else:
                with pytest.raises(AlyxAway) as error:
                    client.greet()
                assert hint in error.value.hint
        server.shutdown()
