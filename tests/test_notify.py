"""What systemd is told: on a real datagram socket, with the real daemon behind it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from regd import notify
from regd.errors import NeedsHuman
from regd.notify import Lifeline, Systemd
from regd.pulse import Pulse
from regd.service import Service, lock
from regd.status import Summary
from tests.rig import DATASETS, Rig, until, write

UNIT = Path(__file__).parents[1] / "systemd" / "regd.service"


class Listener:
    """systemd's end of the socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)
        self.heard: list[str] = []
        self.environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "600000"}

    def lines(self) -> list[str]:
        """Return all that was said until now, a variable a line."""
        while True:
            try:
                self.heard += self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self.heard

    def fed(self) -> int:
        return self.lines().count("WATCHDOG=1")

    def close(self) -> None:
        self._socket.close()


@contextmanager
def listening(address: str) -> Iterator[Listener]:
    listener = Listener(address)
    try:
        yield listener
    finally:
        listener.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Listener]:
    with listening(str(tmp_path / "notify")) as listener:
        yield listener


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_STATUS_S", 0.1)


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_variables_are_lines_whatever_is_in_them(tmp_path: Path) -> None:
    for address in (str(tmp_path / "notify"), f"@{uuid.uuid4()}"):
        with listening(address) as systemd:
            Systemd(systemd.environ).tell(READY=1, STATUS="a\nWATCHDOG=1 \udcff")
            assert systemd.lines() == ["READY=1", r"STATUS=a\nWATCHDOG=1 \udcff"]


def test_a_listener_that_is_gone_is_no_error(tmp_path: Path) -> None:
    Systemd({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).tell(READY=1)


def test_a_file_is_renewed_while_nothing_is_stuck(tmp_path: Path) -> None:
    """That needs no systemd: a container's health check looks at it."""
    time, file = Time(), tmp_path / "lock"
    pulse = Pulse(time)
    lifeline = Lifeline(Systemd({}), pulse)

    def renewed() -> bool:
        os.utime(file, (0, 0))
        lifeline.look()
        return file.stat().st_mtime > 0

    file.touch()
    assert not renewed()  # it may be another regd's
    with lifeline.renewing(file), pulse.watched():
        assert renewed()
        time.now += lifeline.allowed_s + 1
        assert not renewed()
        pulse.beat()
        assert renewed()
        file.rename(tmp_path / "away")
        lifeline.look()
        (tmp_path / "away").rename(file)
    assert not renewed()


def test_without_a_socket_no_status_is_made() -> None:
    with Lifeline(Systemd({}), Pulse()) as lifeline:
        threads = threading.active_count()
        with lifeline.saying(lambda: "x", 60):
            lifeline.ready()
            assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),  # meant for another process
        ({}, None),
    ],
)
def test_the_watchdog_is_as_systemd_says(environ: dict[str, str], watchdog_s: object) -> None:
    assert Systemd(environ).watchdog_s == watchdog_s


def test_the_watchdog_is_fed_while_nothing_is_stuck(
    systemd: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    time = Time()
    pulse = Pulse(time)
    lifeline = Lifeline(Systemd({**systemd.environ, "WATCHDOG_USEC": "10000000"}), pulse)
    lifeline.ready()
    with pulse.watched(), pulse.on("mouse/2026-01-31/001"):
        for _ in range(10):
            time.now += 9
            pulse.beat()
            lifeline.look()
        assert systemd.fed() == 10
        lifeline.say("1 session in work")
        time.now += 11
        for _ in range(3):
            lifeline.look()
            lifeline.say("all is well")
        assert systemd.fed() == 10
        assert systemd.lines()[-1].startswith("STATUS=stuck for 11 s, to be restarted: ")
        (told,) = [r.msg for r in caplog.records if "work.stuck" in str(r.msg)]
        assert told["work"] == "mouse/2026-01-31/001"
        assert "lifeline.look()" in told["stack"]
        pulse.beat()
        lifeline.look()
        lifeline.say("1 session in work")
    assert systemd.lines()[-2:] == ["WATCHDOG=1", "STATUS=1 session in work"]
    assert sum("work.resumed" in str(r.msg) for r in caplog.records) == 1


def test_a_slow_answer_that_the_settings_allow_is_not_stuck(systemd: Listener) -> None:
    lifeline = Lifeline(Systemd({**systemd.environ, "WATCHDOG_USEC": "10000000"}), Pulse())
    with lifeline.saying(lambda: "", answers_within_s=600):
        assert lifeline.allowed_s == 1200


def test_the_start_is_given_time_until_it_is_over(systemd: Listener) -> None:
    time = Time()
    with Lifeline(Systemd(systemd.environ), Pulse(time)) as lifeline:
        until(lambda: [s for s in systemd.lines() if s.startswith("EXTEND_TIMEOUT_USEC=")])
        assert systemd.fed() == 0
        time.now += 3000
        systemd.lines().clear()
        lifeline.look()
        assert systemd.lines()[-1].startswith("EXTEND_TIMEOUT_USEC="), "a million folders"
        time.now += 3000
        lifeline.look()
        assert systemd.lines()[-1].startswith("STATUS=stuck"), "not for ever"


def test_the_end_says_why(systemd: Listener) -> None:
    with pytest.raises(NeedsHuman), Lifeline(Systemd(systemd.environ), Pulse()):
        raise NeedsHuman("state_dir is full", hint="free some space")
    assert "STATUS=state_dir is full (free some space)" in systemd.lines()
    assert "STOPPING=1" in systemd.lines()


# --- the daemon ----------------------------------------------------------------------------------


@contextmanager
def daemon(rig: Rig, systemd: Listener) -> Iterator[Service]:
    """Run what `regd run` runs."""
    pulse = Pulse()
    begun: list[Service] = []

    def run() -> None:
        with (
            Lifeline(Systemd(systemd.environ), pulse) as lifeline,
            lock(rig.settings.state_dir),
            Service(rig.settings, threading.Event(), pulse=pulse) as service,
            lifeline.saying(Summary(service), 0.1),
        ):
            begun.append(service)
            service.run(lifeline.ready)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: begun)
    try:
        yield begun[0]
    finally:
        begun[0].end()
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_it_is_ready_when_the_watches_stand(
    rig: Rig, systemd: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_watch = threading.Event()
    watch: Callable[[Service], object] = Service._watch

    def slowly(self: Service) -> object:
        assert may_watch.wait(10)
        return watch(self)

    monkeypatch.setattr(Service, "_watch", slowly)
    with daemon(rig, systemd):
        until(lambda: any("EXTEND_TIMEOUT_USEC" in line for line in systemd.lines()))
        assert "READY=1" not in systemd.lines()
        assert systemd.fed() == 0
        may_watch.set()
        until(lambda: "READY=1" in systemd.lines())
        until(lambda: systemd.fed() > 1)
        until(lambda: "STATUS=nothing recorded yet, watching" in systemd.lines(), 20)
    assert systemd.lines()[-1] == "STOPPING=1"


def test_a_worker_that_is_stuck_feeds_nobody(
    rig: Rig, systemd: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    held = threading.Event()

    def hang(*_: object) -> None:
        held.set()
        assert go_on.wait(20)

    with daemon(rig, systemd) as service:
        until(lambda: systemd.fed() > 1)
        monkeypatch.setattr(service.client, "search_sessions", hang)
        folder = rig.record()
        assert held.wait(10)
        name = folder.relative_to(rig.root).as_posix()
        stuck = re.compile(f"STATUS=stuck for .* to be restarted: worker-. at {name}$")
        until(lambda: [line for line in systemd.lines() if stuck.match(line)])
        fed = systemd.fed()
        service.stop.wait(1.8)  # three times as long as the watchdog waits
        assert systemd.fed() == fed
        monkeypatch.undo()
        go_on.set()
        until(lambda: systemd.fed() > fed + 1)


def test_a_large_file_that_is_hashed_feeds_it(
    rig: Rig, systemd: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block, for many times as long as a step may take."""
    with daemon(rig, systemd) as service:
        until(lambda: systemd.fed() > 1)
        read = service.hasher.on_read
        blocks = 0

        def slowly(size: int) -> None:
            nonlocal blocks
            blocks += 1
            service.stop.wait(0.1)  # a slow disk; the watchdog waits for 0.6 s
            read(size)

        monkeypatch.setattr(service.hasher, "on_read", slowly)
        folder = rig.folder()
        write(folder / DATASETS[0], b"x" * 2**18 * 20)
        (folder / "create_me.flag").touch()
        until(lambda: rig.lab.sessions(rig.date) and rig.held())
    assert blocks >= 20
    assert not [line for line in systemd.lines() if "stuck" in line]


# --- the unit ------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_the_unit_is_as_closed_as_it_can_be() -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_the_unit_is_understood(tmp_path: Path) -> None:
    copy = tmp_path / "regd.service"
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.M))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    newer = "RestartSteps|RestartMaxDelaySec"  # than some systemd that regd runs under
    odd = [line for line in done.stderr.splitlines() if not re.search(newer, line)]
    assert odd == []
