"""Two regd on one data root by mistake: one works, the other says so; no session is made twice.

Real files, locks, processes and signals. A file server that passes no locks on is a `flock` that
always succeeds; heartbeats are made short in the processes under test, or their clock is the
test's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from regd import owner as module
from regd import service as service_module
from regd.alyx import AlyxClient
from regd.errors import DataRootAway, RootTaken
from regd.model import SessionState
from regd.owner import HEARTBEAT_S, SILENT_BEATS, Holder, Owner, read_holder
from regd.paths import OWNER_FILE
from regd.registration import RegistrationClient
from regd.worker import check_root
from tests.chaos import times
from tests.rig import DATASETS, Rig, idle, until
from tests.test_cli import environment

TAKES_S = (SILENT_BEATS + 1) * HEARTBEAT_S


def holder(name: str, pid: int = 1) -> Holder:
    return Holder(name, f"{name}-pc", pid, f"/var/lib/{name}", "regd", "2026-01-31 12:00:00")


@dataclass
class Clock:
    """Seconds that pass when the test says so."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks that do not reach the other computer."""
    monkeypatch.setattr(module, "fcntl", without_locks())


def without_locks() -> types.SimpleNamespace:
    return types.SimpleNamespace(flock=lambda *_: None, LOCK_EX=0, LOCK_NB=0)


def pass_time(clock: Clock, seconds: float, *owners: Owner) -> None:
    """Let time pass as it does in the service: whoever is due looks, every second."""
    for _ in range(round(seconds)):
        clock.now += 1
        for each in owners:
            if each.is_due():
                each.step()


def written(root: Path) -> Holder | None:
    return read_holder((root / OWNER_FILE).read_bytes())


# --- one owner, step by step ---------------------------------------------------------------------


def test_the_lock_keeps_out_the_second_at_once_and_names_the_first(
    tmp_path: Path, clock: Clock
) -> None:
    first, second = (Owner(tmp_path, holder(n), clock) for n in ("one", "two"))
    first.step()
    with pytest.raises(RootTaken, match=r"one-pc \(process 1 of regd, state_dir /var/lib/one"):
        second.step()
    assert first.holds
    assert not second.holds
    first.close(clean=True)
    assert not list(tmp_path.iterdir())
    second.step()
    assert second.holds, "after an orderly end nobody waits"


def test_a_file_that_is_given_back_while_it_is_opened_keeps_nobody_waiting(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Owner(tmp_path, holder(n), clock) for n in ("one", "two"))
    first.step()
    real = module._is_locked

    def late(file: int) -> bool:
        first.close(clean=True)
        return real(file)

    monkeypatch.setattr(module, "_is_locked", late)
    second.step()
    assert second.holds
    assert written(tmp_path) == holder("two")


def test_without_locks_the_heartbeat_keeps_out_the_second(
    tmp_path: Path, clock: Clock, no_locks: None
) -> None:
    first, second = (Owner(tmp_path, holder(n), clock) for n in ("one", "two"))
    first.step()
    second.step()
    assert not second.holds
    assert "one-pc" in (second.waits_for or "")
    with pytest.raises(RootTaken, match="one-pc"):
        pass_time(clock, HEARTBEAT_S + HEARTBEAT_S / 4 + 1, first, second)
    assert first.holds


@pytest.mark.parametrize("locks", [True, False])
def test_after_a_crash_another_waits_and_the_same_does_not(
    tmp_path: Path, clock: Clock, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:
        monkeypatch.setattr(module, "fcntl", without_locks())
    first = Owner(tmp_path, holder("one"), clock)
    first.step()
    first.close()
    other = Owner(tmp_path, holder("two"), clock)
    other.step()
    pass_time(clock, SILENT_BEATS * HEARTBEAT_S - 1, other)
    assert not other.holds
    again = Owner(tmp_path, holder("one", pid=2), clock)
    again.step()
    assert again.holds
    again.close()
    with pytest.raises(RootTaken):  # it was there
        pass_time(clock, HEARTBEAT_S, other)
    pass_time(clock, TAKES_S + HEARTBEAT_S, other)
    assert other.holds
    assert written(tmp_path) == holder("two")


def test_what_a_start_left_half_made_goes_with_the_next_start(tmp_path: Path, clock: Clock) -> None:
    first = Owner(tmp_path, holder("one"), clock)
    first.step()
    first.close()
    # without renameat2 a power cut may leave both names
    (tmp_path / f"{OWNER_FILE}-one").hardlink_to(tmp_path / OWNER_FILE)
    again = Owner(tmp_path, holder("one", pid=2), clock)
    again.step()
    assert again.holds
    assert [path.name for path in tmp_path.iterdir()] == [OWNER_FILE]


def test_two_that_take_over_at_the_same_moment_without_locks(
    tmp_path: Path, clock: Clock, no_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have seen the silence before either has written; the later writer wins."""
    (tmp_path / OWNER_FILE).write_bytes(b"{}")
    one, two = (Owner(tmp_path, holder(n), clock) for n in ("one", "two"))
    one.step()
    two.step()
    clock.now += SILENT_BEATS * HEARTBEAT_S
    real = Owner._write

    def slow(self: Owner, file: int, **how: Any) -> None:
        monkeypatch.setattr(Owner, "_write", real)
        two.step()
        real(self, file, **how)

    monkeypatch.setattr(Owner, "_write", slow)
    one.step()
    assert not one.holds
    assert not two.holds
    with pytest.raises(RootTaken, match="one-pc"):
        pass_time(clock, HEARTBEAT_S + 1, two)
    pass_time(clock, 1, one)
    assert one.holds


def test_an_owner_that_slept_looks_before_it_works(
    tmp_path: Path, clock: Clock, no_locks: None
) -> None:
    slept, other = (Owner(tmp_path, holder(n), clock) for n in ("one", "two"))
    slept.step()
    other.step()
    pass_time(clock, TAKES_S + HEARTBEAT_S, other)
    assert other.holds
    assert not slept.holds
    with pytest.raises(RootTaken, match="two-pc"):
        slept.step()
    slept.close(clean=True)
    assert written(tmp_path) == holder("two"), "what is another's stays"


def test_the_owner_ends_when_another_wrote_into_its_file(tmp_path: Path, clock: Clock) -> None:
    first = Owner(tmp_path, holder("one"), clock)
    first.step()
    # a copy of the computer's disk: the same identity, and even the same name
    clone = json.dumps({n: getattr(holder("one", 77), n) for n in Holder.__slots__})
    (tmp_path / OWNER_FILE).write_text(clone)
    with pytest.raises(RootTaken, match="process 77"):
        pass_time(clock, HEARTBEAT_S, first)
    assert not first.holds


@pytest.mark.parametrize("content", [b"", b"garbage", b"[" * 4000, b"\xff\x00", b'{"identity": 1}'])
def test_garbage_is_watched_and_replaced(tmp_path: Path, clock: Clock, content: bytes) -> None:
    (tmp_path / OWNER_FILE).write_bytes(content)
    one = Owner(tmp_path, holder("one"), clock)
    one.step()
    assert one.waits_for
    pass_time(clock, TAKES_S + HEARTBEAT_S, one)
    assert one.holds
    assert written(tmp_path) == holder("one")
    (tmp_path / OWNER_FILE).write_bytes(content)
    pass_time(clock, HEARTBEAT_S, one)
    assert one.holds
    assert written(tmp_path) == holder("one")
    (tmp_path / OWNER_FILE).unlink()
    pass_time(clock, HEARTBEAT_S, one)
    assert one.holds
    assert written(tmp_path) == holder("one")


def a_folder(path: Path, outside: Path) -> None:
    path.mkdir()


def a_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def a_dangling_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside.with_name("nothing"))


def a_pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def a_huge_file(path: Path, outside: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


STRANGE = [a_folder, a_link, a_dangling_link, a_pipe, a_huge_file]


@pytest.mark.parametrize("make", STRANGE)
def test_what_is_no_file_of_regds_is_left_alone(
    tmp_path: Path, clock: Clock, make: Callable[[Path, Path], None]
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.write_bytes(b"elsewhere")
    make(root / OWNER_FILE, outside)
    before = os.lstat(root / OWNER_FILE)
    one = Owner(root, holder("one"), clock)
    pass_time(clock, 3 * HEARTBEAT_S, one)
    assert one.holds
    assert "move it away" in str(one.unguarded)
    after = os.lstat(root / OWNER_FILE)
    assert (after.st_mode, after.st_size, after.st_mtime_ns) == (
        before.st_mode,
        before.st_size,
        before.st_mtime_ns,
    )
    assert [p.name for p in root.iterdir()] == [OWNER_FILE]
    assert outside.read_bytes() == b"elsewhere"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outside", "root"]
    if make is not a_folder:
        (root / OWNER_FILE).unlink()
    else:
        (root / OWNER_FILE).rmdir()
    pass_time(clock, HEARTBEAT_S, one)
    assert one.holds
    assert one.unguarded is None
    make(root / "again", outside)  # and in the middle of its work
    (root / OWNER_FILE).unlink()
    (root / "again").rename(root / OWNER_FILE)
    pass_time(clock, HEARTBEAT_S, one)
    assert one.holds
    assert one.unguarded is not None


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Be a user whom the rights of files and folders concern."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that other users can reach."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)
        Path(name).chmod(0o777)


def test_a_root_that_cannot_be_written_is_not_guarded(public: Path, clock: Clock) -> None:
    public.chmod(0o555)
    one = Owner(public, holder("one"), clock)
    with unprivileged():
        one.step()
        assert one.holds
        assert isinstance(one.unguarded, PermissionError)
    public.chmod(0o777)
    with unprivileged():
        pass_time(clock, HEARTBEAT_S, one)
    assert one.holds
    assert one.unguarded is None


@pytest.mark.parametrize("locks", [True, False])
def test_the_file_of_another_user_keeps_out_all_the_same(
    public: Path, clock: Clock, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:
        monkeypatch.setattr(module, "fcntl", without_locks())
    first, second = (Owner(public, holder(n), clock) for n in ("one", "two"))
    first.step()
    (public / OWNER_FILE).chmod(0o444)
    with pytest.raises(RootTaken, match="one-pc"), unprivileged():
        pass_time(clock, 2 * HEARTBEAT_S, first, second)
    assert not second.holds
    first.close()
    with unprivileged():
        second.step()
        pass_time(clock, TAKES_S + HEARTBEAT_S, second)
    assert second.holds
    assert isinstance(second.unguarded, OSError), "it is gone, but its file cannot be written"


def test_a_file_that_is_locked_and_cannot_be_read_keeps_out(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on SMB, where a lock also keeps others from reading."""
    first = Owner(tmp_path, holder("one"), clock)
    first.step()

    def refuse(*_: Any) -> bytes:
        raise PermissionError(13, "Permission denied")

    second = Owner(tmp_path, holder("two"), clock)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", refuse)
        with pytest.raises(RootTaken, match="does not say"):
            second.step()
    assert not second.holds


class OneOwner(RuleBasedStateMachine):
    """Whatever happens to four regd and their file, at most one works.

    A person who edits the file may break that for a heartbeat; then it holds again.
    """

    @initialize(locks=st.booleans())
    def begin(self, locks: bool) -> None:
        # in memory, where it can be: thousands of heartbeats reach the disk
        self.root = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.clock = Clock()
        self.real = module.fcntl, module.time
        # nobody else acts between two attempts to lock
        module.time = types.SimpleNamespace(sleep=lambda _: None)  # type: ignore[assignment]
        if not locks:
            module.fcntl = without_locks()  # type: ignore[assignment]
        self.running: dict[str, Owner] = {}
        self.asleep: set[str] = set()
        self.pid = 0
        self.edited_at = -1e9
        self.longest = 0

    def teardown(self) -> None:
        if hasattr(self, "real"):
            for each in self.running.values():
                each.close()
            module.fcntl, module.time = self.real
            shutil.rmtree(self.root)

    names = st.sampled_from(["one", "two", "three", "four"])

    @rule(name=names)
    def start(self, name: str) -> None:
        if name not in self.running:
            self.pid += 1
            self.running[name] = Owner(self.root, holder(name, self.pid), self.clock)
            self.look(name)

    @rule(name=names, clean=st.booleans())
    def end(self, name: str, clean: bool) -> None:
        if name in self.running and not (clean and name in self.asleep):
            self.running.pop(name).close(clean=clean)
            self.asleep.discard(name)

    @rule(name=names)
    def suspend(self, name: str) -> None:
        if name in self.running:
            self.asleep.add(name)

    @rule(name=names)
    def wake(self, name: str) -> None:
        self.asleep.discard(name)

    @rule(seconds=st.integers(1, 100), order=st.permutations(["one", "two", "three", "four"]))
    def time_passes(self, seconds: int, order: list[str]) -> None:
        for _ in range(seconds):
            self.clock.now += 1
            for name in order:
                self.look(name)
            self.at_most_one_works()

    @rule(content=st.sampled_from([None, b"", b"garbage", b"{}"]))
    def a_person_edits_the_file(self, content: bytes | None) -> None:
        self.edited_at = self.clock.now
        path = self.root / OWNER_FILE
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)

    def look(self, name: str) -> None:
        each = self.running.get(name)
        if each is not None and name not in self.asleep and each.is_due():
            try:
                each.step()
            except RootTaken:
                self.running.pop(name).close(clean=True)

    @precondition(lambda self: hasattr(self, "running"))
    @invariant()
    def at_most_one_works(self) -> None:
        working = [name for name, o in self.running.items() if o.holds and name not in self.asleep]
        if self.clock.now - self.edited_at > SILENT_BEATS * HEARTBEAT_S:
            assert len(working) <= 1
        assert not [o.unguarded for o in self.running.values() if o.unguarded]

    @rule(order=st.permutations(["one", "two", "three", "four"]))
    def in_the_end_one_works(self, order: list[str]) -> None:
        """Nobody waits for ever, and if all have ended, one can be started."""
        self.asleep.clear()
        for _ in range(2):  # the first may have been told off by what a person had just edited
            self.start(order[0])
            self.time_passes(round(TAKES_S + 2 * HEARTBEAT_S), order)
        assert [name for name, o in self.running.items() if o.holds] == list(self.running)
        assert len(self.running) == 1


TestOneOwner = OneOwner.TestCase
TestOneOwner.settings = settings(max_examples=times(25), stateful_step_count=25, deadline=None)


# --- many processes at the same moment -----------------------------------------------------------

CONTENDERS = 8
_AT_ONCE = """
import os, sys, types
from pathlib import Path
from regd import owner
from regd.errors import RootTaken
owner.HEARTBEAT_S = 0.1
root, rounds, count, locks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if locks == "no":
    owner.fcntl = types.SimpleNamespace(flock=lambda *_: None, LOCK_EX=0, LOCK_NB=0)
for turn in range(rounds):
    go, gone, say = os.pipe(), os.pipe(), os.pipe()
    for n in range(count):
        if os.fork() == 0:
            os.close(go[1]), os.close(gone[1])
            os.read(go[0], 1)  # until all are there
            mine = owner.Owner(root, owner.Holder(f"{turn}-{n}", "pc", 1, "", "", ""))
            try:
                mine.step()
            except RootTaken:
                pass
            os.write(say[1], b"1" if mine.holds else b"0")
            os.read(gone[0], 1)  # until all have said it
            os._exit(0)  # as a crash does
    os.close(go[1])
    said = b""
    while len(said) < count:
        said += os.read(say[0], count)
    print(said.count(b"1"), *sorted(p.name for p in root.iterdir()), flush=True)
    os.close(gone[1])
    for _ in range(count):
        os.wait()
    for end in (go[0], gone[0], *say):
        os.close(end)
    (root / ".regd-owner").unlink()
"""


@pytest.mark.parametrize("locks", ["yes", "no"])
def test_of_many_that_start_at_the_same_moment_one_works(tmp_path: Path, locks: str) -> None:
    """Making the file is one act on any file server, with locks or without."""
    rounds = times(10)
    done = subprocess.run(
        [sys.executable, "-c", _AT_ONCE, tmp_path, str(rounds), str(CONTENDERS), locks],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [f"1 {OWNER_FILE}"] * rounds


# --- whole processes -----------------------------------------------------------------------------

_QUICK = """
import sys, types
from regd import owner
owner.HEARTBEAT_S = 0.3
if sys.argv.pop(1) == "no-locks":
    owner.fcntl = types.SimpleNamespace(flock=lambda *_: None, LOCK_EX=0, LOCK_NB=0)
from regd.__main__ import main
main()
"""


class Daemon:
    """`regd run`, with a state folder of its own and quick heartbeats."""

    def __init__(self, rig: Rig, name: str, locks: str = "locks") -> None:
        folder = rig.root.parent / name
        folder.mkdir(exist_ok=True)
        self.state_dir = folder / "state"
        self.log = folder / "log"
        config = folder / "regd.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "data_root": str(rig.root),
                    "state_dir": str(self.state_dir),
                    "repository": rig.lab.repository,
                    "alyx": {"url": rig.lab.url, "username": rig.lab.username},
                    "settle": {"quiet_s": 0.6, "closed_quiet_s": 0.1},
                    "log": {"format": "json"},
                    "watch": {"ignore": []},
                }
            )
        )
        self.start = self._seen()
        with self.log.open("a") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _QUICK, locks, "run", "-c", str(config)],
                stderr=stderr,
                env=environment(rig),
            )

    def _seen(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()[self.start :]

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.lines() if line.startswith("{")]

    def says(self, event: str) -> bool:
        return until(lambda: event in self.events() or self.process.poll() is not None, 30) and (
            event in self.events()
        )

    def ends(self) -> int:
        return self.process.wait(timeout=30)


@pytest.fixture
def daemons(rig: Rig) -> Iterator[Callable[..., Daemon]]:
    started: list[Daemon] = []

    def start(name: str, locks: str = "locks") -> Daemon:
        started.append(Daemon(rig, name, locks))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def assert_once(rig: Rig, *numbers: int) -> None:
    assert [s["number"] for s in rig.lab.sessions(rig.date)] == list(numbers)
    for number in numbers:
        assert set(rig.held(number)) == set(DATASETS)


def registered(rig: Rig, number: int) -> None:
    folder = rig.record(number)
    until(lambda: not (folder / "create_me.flag").exists(), 30)
    until(lambda: set(rig.held(number)) == set(DATASETS), 30)


def test_the_second_is_refused_and_takes_over_when_the_first_is_killed(
    rig: Rig, daemons: Callable[..., Daemon]
) -> None:
    first = daemons("first")
    assert first.says("scan.finished")
    second = daemons("second")
    assert second.ends() == 2
    (line,) = [line for line in second.lines() if "another regd works" in line]
    assert f"process {first.process.pid} " in line
    assert str(first.state_dir) in line
    assert "stop one of the two" in line
    registered(rig, 1)
    first.process.kill()
    first.ends()
    first = daemons("first")  # the same one, at once
    assert first.says("scan.finished")
    registered(rig, 2)
    assert "root.awaited" not in first.events()
    first.process.kill()
    first.ends()
    folder = rig.record(3)
    second = daemons("second")
    assert second.says("root.taken")
    until(lambda: not (folder / "create_me.flag").exists(), 30)
    told = second.events()
    assert told.index("root.awaited") < told.index("root.taken") < told.index("session.created")
    second.process.send_signal(signal.SIGTERM)
    assert second.ends() == 0
    assert not (rig.root / OWNER_FILE).exists()
    assert_once(rig, 1, 2, 3)


def test_without_locks_the_second_is_refused_and_a_stolen_root_is_noticed(
    rig: Rig, daemons: Callable[..., Daemon]
) -> None:
    first = daemons("first", "no-locks")
    assert first.says("scan.finished")
    second = daemons("second", "no-locks")
    assert second.ends() == 2
    assert "root.awaited" in second.events()
    assert "another regd works" in second.lines()[-1]
    registered(rig, 1)
    fields = {name: getattr(holder("thief"), name) for name in Holder.__slots__}
    (rig.root / OWNER_FILE).write_text(json.dumps(fields))
    assert first.ends() == 2
    assert "root.shared" in first.events()
    assert "thief-pc" in first.lines()[-1]
    assert (rig.root / OWNER_FILE).read_text() == json.dumps(fields)
    assert_once(rig, 1)


@pytest.mark.parametrize("locks", ["locks", "no-locks"])
def test_of_daemons_started_at_once_one_registers(
    rig: Rig, daemons: Callable[..., Daemon], locks: str
) -> None:
    folder = rig.record()
    started = [daemons(name, locks) for name in ("first", "second", "third")]
    until(lambda: not (folder / "create_me.flag").exists(), 40)
    until(lambda: sum(d.process.poll() is None for d in started) == 1, 40)
    assert sorted(d.process.poll() or 0 for d in started) == [0, 2, 2]
    assert sum("session.created" in d.events() for d in started) == 1
    assert_once(rig, 1)


def test_a_daemon_that_waits_stops_at_once(rig: Rig, daemons: Callable[..., Daemon]) -> None:
    (rig.root / OWNER_FILE).write_text("{}")
    one = daemons("one")
    assert one.says("root.awaited")
    one.process.send_signal(signal.SIGTERM)
    assert one.ends() == 0
    assert (rig.root / OWNER_FILE).read_text() == "{}"


# --- in the service ------------------------------------------------------------------------------


def test_a_scan_beside_another_daemon_is_refused_and_touches_nothing(rig: Rig) -> None:
    other = Rig(rig.root.parent / "other", rig.lab)
    state_dir = other.settings.state_dir
    other.settings = rig.settings.model_copy(update={"state_dir": state_dir})
    with rig.running():
        until(lambda: (rig.root / OWNER_FILE).exists())
        with pytest.raises(RootTaken):
            other.scan()
    other.scan().close()


@pytest.mark.parametrize("make", [a_folder, a_link])
def test_its_file_is_no_recording_whatever_is_ignored(
    rig: Rig, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    rig = Rig(tmp_path / "again", rig.lab, watch={"ignore": []})
    (tmp_path / "outside").mkdir()
    rig.record()
    with rig.running() as service:
        until(lambda: (rig.root / OWNER_FILE).exists())
        until(lambda: rig.lab.sessions(rig.date) and idle(service))
        service._scan()
        assert service.journal.strays() == []
        until(lambda: service._hints.empty())
        before = service._news_count
        for _ in range(5):
            service.owner._next_at = 0.0
            service._own()
        assert service._hints.empty(), "a heartbeat wakes nobody"
        assert service._news_count == before
    make(rig.root / OWNER_FILE, tmp_path / "outside" / "file")
    (rig.root / f"{OWNER_FILE}-left-over").touch()
    with rig.scan() as journal:
        assert journal.strays() == []
    assert_once(rig, 1)
    assert not list((tmp_path / "outside").iterdir())


def test_a_root_that_is_unmounted_and_mounted(rig: Rig) -> None:
    mounted = rig.root.with_name("mounted")
    with rig.running() as service:
        registered(rig, 1)
        rig.root.rename(mounted)
        rig.root.mkdir()  # the folder that the disk was mounted on
        until(lambda: not service.owner.holds)
        (rig.root / OWNER_FILE).touch()  # as an older mistake left it
        with pytest.raises(DataRootAway):
            check_root(rig.root, service.journal)
        service._own()
        assert not service.owner.holds
        assert not (mounted / OWNER_FILE).exists()
        assert (rig.root / OWNER_FILE).read_bytes() == b""
        (rig.root / OWNER_FILE).unlink()
        rig.root.rmdir()
        mounted.rename(rig.root)
        until(lambda: service.owner.holds)
        assert written(rig.root) is not None
        registered(rig, 2)
    assert_once(rig, 1, 2)
    assert not (rig.root / OWNER_FILE).exists()


def test_what_is_in_hand_at_the_end_keeps_others_waiting(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "STOP_WITHIN_S", 0.2)
    asked, answer = threading.Event(), threading.Event()

    class Slow(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            if (request.method, request.url.path) == ("POST", "/sessions"):
                asked.set()
                answer.wait(20)
                raise httpx.ReadError("the process has ended", request=request)
            return super().handle_request(request)

    lab = rig.lab
    alyx = AlyxClient(lab.url, lab.username, lab.password, transport=Slow())
    rig.record()
    with rig.running(client=RegistrationClient(alyx)):
        assert asked.wait(20)
    assert (rig.root / OWNER_FILE).exists()
    answer.set()
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("worker-")])


def test_a_session_that_is_on_alyx_twice_is_parked_with_both(rig: Rig) -> None:
    """Somebody's script has made it besides."""
    folder = rig.record()
    fields = {"subject": rig.lab.subject, "number": 1, "start_time": f"{rig.date}T00:00:00"}
    eids = [rig.lab.client.post("/sessions", fields)["url"][-36:] for _ in range(2)]
    with rig.scan() as journal:
        (row,) = journal.sessions()
    assert row.state is SessionState.PARKED
    assert all(eid in (row.reason or "") for eid in eids)
    assert "delete or renumber" in (row.hint or "")
    assert (folder / "create_me.flag").exists()
