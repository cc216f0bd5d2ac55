"""regd under a systemd that really booted, in the sandbox of its unit: `make test-systemd`.

The tests are one story, told in order. SUITE names the Debian to boot, such as trixie.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import os
import re
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.rig import Lab
from tests.rig import until as until_within
from tests.systemd.container import (
    CACHE,
    VENV,
    Container,
    booted,
    missing,
    prepared,
    wheel,
)

SUITE = os.environ.get("SUITE", "bookworm")
HOME = "/home/rig"
ROOT = f"{HOME}/recordings"
SESSION = "mainenlab/Subjects/ZM_1085/2026-01-31"
WHEEL = "alf/_ibl_wheel.position.npy"
WATCHDOG_S = 4  # of the service while these tests look at what hangs
PTRACE_CONT, PTRACE_SEIZE, PTRACE_INTERRUPT = 7, 0x4206, 0x4207
WALL = 0x40000000  # of waitpid(2): a thread that is traced

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


def until(happened: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """Wait until something is true, on a computer that may be busy, and return it."""
    return until_within(happened, timeout_s)


class Rig:
    """An acquisition PC: its own user records, regd runs as another of the same group."""

    def __init__(self, machine: Container, port: int) -> None:
        self.machine = machine
        self.port = port
        self.lab = Lab(
            f"http://127.0.0.1:{port}",
            *("rig_user", "rig-password", "ZM_1085", "mainenlab", "mainenlab_local"),
        )

    def sh(self, script: str, user: str = "root") -> str:
        return self.machine.run("sh", "-euc", f"umask 002; {script}", user=user)

    def record(self, number: int, name: str = WHEEL, content: str = "recorded") -> None:
        """Have the rig's user record a session, and flag it."""
        folder = f"{ROOT}/{SESSION}/{number:03d}"
        script = f"mkdir -p $(dirname {folder}/{name}); printf '{content}' > {folder}/{name}"
        self.sh(f"{script}; touch {folder}/create_me.flag", user="rig")

    def is_done(self, number: int) -> bool:
        folder = f"{ROOT}/{SESSION}/{number:03d}"
        return self.sh(f"test -e {folder}/create_me.flag || echo gone") == "gone"

    def held(self, number: int = 1) -> dict[str, dict[str, Any]]:
        """Return what Alyx holds of a session, by path; nothing before it is there."""
        sessions = [s for s in self.lab.sessions(SESSION[-10:]) if s["number"] == number]
        assert len(sessions) < 2
        return self.lab.datasets(sessions[0]["id"]) if sessions else {}

    def systemctl(self, *words: str) -> None:
        self.machine.run("systemctl", *words)

    def service(self) -> dict[str, str]:
        names = ["ActiveState", "SubState", "StatusText", "NRestarts", "MainPID", "Result"]
        return self.machine.show("regd", *names)

    @property
    def status(self) -> str:
        return self.service()["StatusText"]

    @property
    def restarts(self) -> int:
        return int(self.service()["NRestarts"])

    def log(self) -> list[dict[str, Any]]:
        """Return the lines that regd has written, as the journal of systemd has them."""
        lines = self.machine.run(
            *("journalctl", "-u", "regd", "-o", "json", "--output-fields=MESSAGE,PRIORITY")
        )
        return [json.loads(line) for line in lines.splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return what regd has logged of one kind."""
        found = []
        for line in self.log():
            with contextlib.suppress(ValueError, TypeError):
                event = json.loads(line["MESSAGE"])
                if event.get("event") == name:
                    found.append(event)
        return found

    def drop_in(self, name: str, *lines: str) -> None:
        """Add lines to the service; they hold from its next start on."""
        folder = "/etc/systemd/system/regd.service.d"
        text = "\n".join(["[Service]", *lines])
        self.sh(f"mkdir -p {folder}; echo '{text}' > {folder}/{name}.conf")
        self.systemctl("daemon-reload")


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    root = prepared(SUITE)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=CACHE))
    # an end from outside leaves nothing behind, either
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("ended by SIGTERM"))
    try:
        home = folder / "home"  # on a real disk: what is in memory has no leases, and no size
        home.mkdir()
        wheels = folder / "wheels"
        wheels.mkdir()
        wheel(wheels)
        binds = {home: HOME, wheels: "/wheels"}
        with booted(root, folder / "console", binds) as machine:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            rig = Rig(machine, port)
            _install(rig)
            with rig.lab.client:
                yield rig
    finally:
        shutil.rmtree(folder)


def _install(rig: Rig) -> None:
    """Do what docs/install.md says; only what makes the tests wait for less is added."""
    rig.sh(f"{VENV}/bin/pip install -q --no-index --no-deps /wheels/*.whl")
    rig.sh(
        f"useradd --home-dir {HOME} rig; chown rig:rig {HOME}; chmod 0750 {HOME};"
        f"install -d -o rig -g rig -m 2775 {ROOT};"
        "useradd --system --shell /usr/sbin/nologin --groups rig regd"
    )
    start_alyx(rig)
    token = until(lambda: _token(rig))
    rig.sh(
        f"umask 077; echo {token} > /root/token; {VENV}/bin/regd install --no-start"
        f" --data-root {ROOT} --alyx-url {rig.lab.url} --username {rig.lab.username}"
        f" --repository {rig.lab.repository} --token-file /root/token"
    )
    quick = ["ALYX__TIMEOUT_S=2", "SETTLE__QUIET_S=1", "SETTLE__CLOSED_QUIET_S=0.2"]
    rig.drop_in("quick", *(f"Environment=REGD_{setting}" for setting in quick))


def _token(rig: Rig) -> str | None:
    """Return the token of the lab's user, or None while Alyx starts."""
    user = {"username": rig.lab.username, "password": rig.lab.password}
    with contextlib.suppress(httpx.TransportError):
        return str(httpx.post(f"{rig.lab.url}/auth-token", data=user).json()["token"])
    return None


def start_alyx(rig: Rig) -> None:
    rig.machine.run(
        *("systemd-run", "--quiet", "--collect", "--unit=alyx"),
        *(f"{VENV}/bin/regd", "sandbox", "--port", rig.port, "--db", "/var/lib/alyx.db"),
        *("--rate-limit", "none"),
    )


def is_active(rig: Rig) -> bool:
    return rig.service()["ActiveState"] == "active"


def test_it_says_nothing_odd_of_the_rig(rig: Rig) -> None:
    """`regd check`, as root and before the first start."""
    print(rig.machine.run(f"{VENV}/bin/regd", "check", check=False))


def test_it_starts_and_says_so(rig: Rig) -> None:
    rig.systemctl("start", "regd")
    service = rig.service()
    assert (service["ActiveState"], service["SubState"]) == ("active", "running")
    assert rig.events("watch.started"), "ready only when the watches stand"
    until(lambda: rig.status == "nothing recorded yet, watching")
    assert rig.machine.run("systemctl", "show", "regd", "-p", "User", "--value") == "regd"


def test_a_session_of_another_user_of_the_group_is_registered(rig: Rig) -> None:
    rig.record(1)
    until(lambda: rig.is_done(1) and set(rig.held()) == {WHEEL})
    until(lambda: rig.status == "all registered, watching")


def test_a_file_that_the_rig_has_open_is_not_registered(rig: Rig) -> None:
    """The service's right to ask the kernel (CAP_LEASE) reaches files that are another user's."""
    path = f"{SESSION}/001/alf/_ibl_wheel.velocity.npy"
    rig.sh(
        f"setsid sh -c 'exec 3> {ROOT}/{path}; printf half >&3; touch {HOME}/open;"
        f" while [ -e {HOME}/open ]; do sleep 0.1; done' >/dev/null 2>&1 &"
        f" while [ ! -e {HOME}/open ]; do sleep 0.1; done",
        user="rig",
    )
    time.sleep(4)  # four times as long as any file must stand still
    assert "alf/_ibl_wheel.velocity.npy" not in rig.held()
    until(lambda: rig.status == "1 session waiting (1 file left), watching")
    rig.sh(f"rm {HOME}/open")
    until(lambda: "alf/_ibl_wheel.velocity.npy" in rig.held())


def test_a_protected_file_moves_within_the_sandbox_of_the_unit(rig: Rig) -> None:
    (session,) = rig.lab.sessions(SESSION[-10:])
    rig.lab.protect(session["id"], WHEEL)
    rig.record(1, content="recomputed")
    moved = f"alf/#{datetime.date.today().isoformat()}#/_ibl_wheel.position.npy"
    until(lambda: moved in rig.held())
    folder = f"{ROOT}/{SESSION}/001"
    assert rig.sh(f"cat '{folder}/{moved}'") == "recomputed"
    owner = rig.sh(f"stat -c '%U %G %a' '{folder}/{moved}'")
    assert owner == "rig rig 664"
    above = rig.sh(f"stat -c '%U %G %A' '{folder}/{Path(moved).parent}'")
    assert above == "regd rig drwxrwsr-x"
    until(lambda: rig.is_done(1))


def test_an_outage_is_told_in_the_status(rig: Rig) -> None:
    rig.systemctl("stop", "alyx")
    rig.record(2)
    text = until(lambda: "Alyx away since" in (now := rig.status) and "waiting" in now and now)
    hour_minute = rig.machine.run("date", "+%H:%M")
    assert re.fullmatch(r"1 session waiting, Alyx away since \d\d:\d\d", text)
    assert abs(_minutes(text[-5:]) - _minutes(hour_minute)) <= 2
    start_alyx(rig)
    until(lambda: rig.is_done(2) and set(rig.held(2)) == {WHEEL})
    until(lambda: rig.status == "all registered, watching")


def _minutes(hour_minute: str) -> int:
    hour, _, minute = hour_minute.partition(":")
    return int(hour) * 60 + int(minute)


def test_it_returns_after_kill_9(rig: Rig) -> None:
    before = rig.service()
    rig.record(3)
    rig.sh(f"kill -9 {before['MainPID']}")
    until(lambda: is_active(rig) and rig.restarts == int(before["NRestarts"]) + 1)
    # what was on its way to Alyx just then is waited for, 75 s
    until(lambda: rig.is_done(3) and set(rig.held(3)) == {WHEEL}, 120)


def test_a_wrong_setting_is_told_and_mended_without_a_hand(rig: Rig) -> None:
    rig.sh("cp /etc/regd/regd.yaml /root/good; sed -i s/^data_root/data_rot/ /etc/regd/regd.yaml")
    rig.machine.run("systemctl", "restart", "regd", check=False)
    until(lambda: "data_rot" in rig.status)
    assert not is_active(rig)
    rig.sh("cp /root/good /etc/regd/regd.yaml")
    until(lambda: is_active(rig))


@contextlib.contextmanager
def large_recording(rig: Rig, number: int, seconds: float) -> Iterator[None]:
    """Record a file that takes at least so long to be hashed; it takes no space."""
    began_at = time.monotonic()
    rig.sh("head -c 1G /dev/zero | nice md5sum")  # with the priority of regd
    size = int(2**30 * seconds / (time.monotonic() - began_at))
    path = f"{ROOT}/{SESSION}/{number:03d}/alf/_ibl_wheel.position.npy"
    rig.sh(f"mkdir -p $(dirname {path}); truncate -s {size} {path}", user="rig")
    try:
        rig.sh(f"touch {ROOT}/{SESSION}/{number:03d}/create_me.flag", user="rig")
        yield
    finally:
        rig.sh(f"rm -r {ROOT}/{SESSION}/{number:03d}")


def test_hashing_a_large_file_is_no_standstill(rig: Rig) -> None:
    rig.drop_in("hasty", f"WatchdogSec={WATCHDOG_S}")
    rig.systemctl("restart", "regd")
    restarts = rig.restarts
    began_at = time.monotonic()
    with large_recording(rig, 4, seconds=4 * WATCHDOG_S):
        until(lambda: rig.held(4), 600)
        assert time.monotonic() - began_at > 2 * WATCHDOG_S, "or this shows nothing"
    assert rig.restarts == restarts
    assert not rig.events("work.stuck")


def test_a_stuck_worker_has_the_service_restarted(rig: Rig) -> None:
    before = rig.service()
    with large_recording(rig, 5, seconds=8 * WATCHDOG_S):
        pid = rig.machine.pid_outside(int(before["MainPID"]))
        with one_thread_held(pid) as let_die:
            told = until(lambda: "stuck for" in (now := rig.status) and now)
            assert f"{SESSION}/005" in told
            until(lambda: let_die() or rig.restarts == int(before["NRestarts"]) + 1)
        (stuck,) = rig.events("work.stuck")
        assert (stuck["work"], stuck["level"]) == (f"{SESSION}/005/{WHEEL}", "error")
        assert stuck["thread"].startswith("hasher-")
        assert "regd/files.py" in stuck["stack"]
        assert any("watchdog" in str(line["MESSAGE"]).lower() for line in rig.log())
        until(lambda: is_active(rig))
    until(lambda: "watching" in rig.status)


@contextlib.contextmanager
def one_thread_held(pid: int) -> Iterator[Callable[[], None]]:
    """Stop the thread of a process that works hardest, as a disk that does not answer would.

    Yields a function to call again and again once it may end: as a debugger, who has to know first.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long] * 4

    def ptrace(request: int, thread: int) -> None:
        if libc.ptrace(request, thread, 0, 0) < 0:
            raise OSError(ctypes.get_errno(), "ptrace")

    def turns(thread: Path) -> int:
        (line,) = [s for s in (thread / "status").read_text().splitlines() if s[:3] == "vol"]
        return int(line.split()[1])

    busiest = until(lambda: _busiest(pid))
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    ptrace(PTRACE_SEIZE, busiest)
    for _ in range(20):
        ptrace(PTRACE_INTERRUPT, busiest)
        os.waitpid(busiest, WALL)
        others = [thread for thread in threads if thread.name != str(busiest)]
        seen = sum(map(turns, others))
        time.sleep(3)  # some thread wakes each second, unless all wait for the interpreter's lock
        if sum(map(turns, others)) - seen > 2:
            break
        ptrace(PTRACE_CONT, busiest)  # it was stopped with that lock: again
        time.sleep(0.01)

    def let_die() -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(busiest, WALL | os.WNOHANG)

    yield let_die


def _busiest(pid: int) -> int | None:
    """Return the thread of a process that does most, or None if none does much."""
    threads = list(Path(f"/proc/{pid}/task").iterdir())

    def ticks(thread: Path) -> int:
        return int((thread / "stat").read_text().rpartition(")")[2].split()[11])

    before = {thread: ticks(thread) for thread in threads}
    time.sleep(1)  # of work, to see whose it is
    worked, thread = max((ticks(thread) - before[thread], thread) for thread in threads)
    return int(thread.name) if worked > 20 else None


def test_a_frozen_process_is_restarted(rig: Rig) -> None:
    before = rig.service()
    os.kill(rig.machine.pid_outside(int(before["MainPID"])), signal.SIGSTOP)
    until(lambda: rig.restarts == int(before["NRestarts"]) + 1)
    until(lambda: is_active(rig))
    rig.record(6)
    until(lambda: rig.is_done(6) and set(rig.held(6)) == {WHEEL})


def test_lines_carry_their_priority(rig: Rig) -> None:
    of = {line["PRIORITY"] for line in rig.log() if '"event": "alyx.away"' in str(line["MESSAGE"])}
    assert of == {"4"}


def test_all_of_it_is_registered_once(rig: Rig) -> None:
    sessions = rig.lab.sessions(SESSION[-10:])
    assert [s["number"] for s in sessions if s["number"] not in (4, 5)] == [1, 2, 3, 6]
    until(lambda: rig.status == "all registered, watching")


def test_it_stops_soon_and_in_order(rig: Rig) -> None:
    began_at = time.monotonic()
    rig.systemctl("stop", "regd")
    assert time.monotonic() - began_at < 10
    service = rig.service()
    assert (service["ActiveState"], service["Result"]) == ("inactive", "success")
    assert rig.events("regd.stopped")


def test_the_exposure_is_what_it_was_made_to_be(rig: Rig) -> None:
    """As that systemd sees it, with what a rig adds."""
    table = rig.machine.run("systemd-analyze", "security", "--threshold=15", "regd.service")
    print(table.splitlines()[-1], rig.machine.run("systemctl", "--version").splitlines()[0])
