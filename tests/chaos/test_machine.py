"""The machine fails: disks fill up, break, vanish and come back, the journal rots, clocks jump.

What takes a mount is done in a mount namespace of its own, so that nothing of it is left behind.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from regd import files
from regd.errors import JournalDamaged, NeedsHuman
from regd.journal import FILE_NAME, Journal, asides
from regd.model import FileState, SessionState
from regd.sandbox.server import Server
from regd.service import Service, lock
from regd.status import report
from tests import chaos
from tests.chaos import times
from tests.chaos.proxy import Proxy
from tests.conftest import INITIAL
from tests.rig import DATASETS, Clock, Lab, Rig, idle, md5, write
from tests.rig import until as until_

FILE = DATASETS[0]
TODAY = str(datetime.date.today())
MOVED = f"alf/#{TODAY}#/{FILE.removeprefix('alf/')}"
NOBODY = 65534
_DAYS = count()
# regd, but for how long it waits after a crash for what was sent: here nothing is late
PROMPT = """
from regd import cli, service
service.UNKNOWN_OUTCOME_S, service._MARGIN_S = 0.5, -59.5
cli.main()
"""
until = partial(until_, timeout_s=60)  # processes start, and other tests run beside


def can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs the right to mount in a namespace")


# --- a rig, an Alyx that notes what it is sent, regd as a process, disks of its own --------------


class Wire(Proxy):
    """The way to Alyx, which notes every file that is posted."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.posted: Counter[tuple[str, str, str | None]] = Counter()

    def _pass_on(self, request: Any) -> tuple[int, dict[str, str], bytes]:
        answer = super()._pass_on(request)
        if request.path.endswith("/register-file") and answer[0] == 201:
            body = json.loads(request.body)
            for name, hash_ in zip(body["filenames"], body["hashes"], strict=True):
                self.posted[body["path"], name, hash_] += 1
        return answer


@pytest.fixture(scope="module")
def alyx() -> Iterator[Lab]:
    with Server(load=INITIAL, rate_limit=None) as server:
        lab = Lab(server.url, "rig_user", "rig-password", "ZM_1085", "mainenlab", "mainenlab_local")
        with lab.client:
            yield lab


class Machine(Rig):
    """An acquisition PC, whose regd runs in this process or in one of its own."""

    def __init__(self, folder: Path, lab: Lab, wire: Wire, **more: Any) -> None:
        alyx = {
            "url": wire.url,
            "username": lab.username,
            "password": lab.password,
            "requests_per_minute": None,
        }
        super().__init__(folder, lab, alyx=alyx, **more)
        self.wire = wire
        self.date = str(datetime.date(1972, 1, 1) + datetime.timedelta(next(_DAYS)))
        self.config = folder / "regd.yaml"
        self.log = folder / "regd.log"
        values = self.settings.model_dump(mode="json", exclude={"alyx": {"password", "token"}})
        self.config.write_text(yaml.safe_dump({**values, "log": {"format": "json"}}))
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("REGD_")},
            "REGD_ALYX__PASSWORD": lab.password,
            "COLUMNS": "300",
        }

    @property
    def state(self) -> Path:
        return self.settings.state_dir

    @property
    def journal_file(self) -> Path:
        return self.state / FILE_NAME

    def command(self, what: str, *more: str) -> list[str]:
        return [sys.executable, "-c", PROMPT, what, "-c", str(self.config), *more]

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in found if line["event"] == name]

    @contextlib.contextmanager
    def daemon(self, space: Namespace | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """Run `regd run`, and see that SIGTERM ends it within the 5 s that are promised."""
        command = self.command("run")
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                space.command(*command) if space else command, stderr=log, env=self.environment
            )
        try:
            until(lambda: self.events("regd.started") or process.poll() is not None)
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=8) == 0

    def is_done(self, *numbers: int) -> bool:
        return not any((self.folder(n) / "create_me.flag").exists() for n in numbers)

    def check(self, *numbers: int, root: Path | None = None) -> None:
        """Hold Alyx against the disk: everything is there, once, and was posted once."""
        sessions = self.lab.sessions(self.date)
        assert sorted(s["number"] for s in sessions) == sorted(numbers)
        for number in numbers:
            folder = (root or self.root) / self.folder(number).relative_to(self.root)
            paths = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".flag")
            on_disk = {p.relative_to(folder).as_posix(): md5(p) for p in paths}
            held = {path: r["hash"] for path, r in self.held(number).items()}
            assert on_disk.items() <= held.items()
        assert not self.posted_again()

    def posted_again(self) -> list[tuple[str, str, str | None]]:
        return [what for what, n in self.wire.posted.items() if n > 1 and self.date in what[0]]


Make = Callable[..., Machine]


@pytest.fixture(scope="module")
def make(alyx: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """A way to make a machine in a folder of its own."""
    with Wire(alyx.url) as wire:

        def machine(**more: Any) -> Machine:
            return Machine(tmp_path_factory.mktemp("machine"), alyx, wire, **more)

        yield machine


@pytest.fixture
def machine(make: Make) -> Machine:
    return make()


class Namespace:
    """A mount namespace: what is mounted in it is seen by what runs in it alone."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sleep", "600"]
        )
        self._pid = str(self._holder.pid)
        own = Path("/proc/self/ns/mnt").readlink()
        until(lambda: Path(f"/proc/{self._pid}/ns/mnt").readlink() != own)
        until(lambda: Path(f"/proc/{self._pid}/comm").read_text() == "sleep\n")

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *exc: object) -> None:
        self._holder.kill()
        self._holder.wait()

    def command(self, *words: object) -> list[str]:
        return ["nsenter", "-t", self._pid, "-m", "--", *map(str, words)]

    def run(self, *words: object) -> None:
        subprocess.run(self.command(*words), check=True, capture_output=True)

    def regd(self, machine: Machine, what: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*machine.command(what, *more)),
            capture_output=True, text=True, timeout=60, env=machine.environment,
        )  # fmt: skip

    def inside(self, path: Path) -> Path:
        return Path(f"/proc/{self._pid}/root{path}")

    def disk(self, path: Path, options: str) -> Path:
        """Mount a small disk at a path, and return where it is seen from outside."""
        path.mkdir(parents=True, exist_ok=True)
        self.run("mount", "-t", "tmpfs", "-o", options, "tmpfs", path)
        return self.inside(path)


@pytest.fixture
def space() -> Iterator[Namespace]:
    with Namespace() as space:
        yield space


def logged(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    lines = [r.msg for r in caplog.records if isinstance(r.msg, dict)]
    return [line for line in lines if line["event"] == event]


def fill(disk: Path, leave: int = 0) -> Path:
    """Take all of a disk but some bytes."""
    file = disk / "other data"
    with file.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while out.write(bytes(4096)) == 4096:
            pass
    os.truncate(file, max(0, file.stat().st_size - leave))
    return file


def finish(service: Service, clock: Clock, timeout_s: float = 6 * 3600) -> None:
    """Scan, and work until nothing waits."""
    service._scan()
    deadline = clock() + timeout_s
    waiting = (SessionState.WAITING, SessionState.WORKING)
    while service.step() or service.journal.sessions(*waiting):
        clock.sleep(0.5)
        service._check_clock()
        assert clock() < deadline, service.journal.sessions()


# --- the disk of the journal is full -------------------------------------------------------------


@needs_mounts
def test_the_journals_disk_is_full_at_start(machine: Machine, space: Namespace) -> None:
    disk = space.disk(machine.state, "size=256k,mode=0700")
    machine.record()
    other = fill(disk)
    for command in ("run", "scan") if chaos.TIMES else ("run",):
        done = space.regd(machine, command)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("regd: "))
        assert str(machine.state) in line
        assert "free some space" in line
    assert not machine.is_done(1)
    other.unlink()
    assert space.regd(machine, "scan").returncode == 0
    machine.check(1)


@needs_mounts
@settings(max_examples=times(1), deadline=None)
@given(leave=st.integers(0, 48))
def test_the_journals_disk_fills_up_in_the_middle_of_work(make: Make, leave: int) -> None:
    machine = make()
    many = [f"alf/probe{n:03d}/spikes.times.npy" for n in range(60)]
    with Namespace() as space:
        disk = space.disk(machine.state, "size=1m,mode=0700")
        with machine.daemon(space) as process:
            machine.record(1)
            until(lambda: machine.is_done(1))
            other = fill(disk, leave * 1024)
            numbers = range(2, 8)
            for number in numbers:
                machine.record(number, names=many)
            assert process.wait(timeout=30) > 0, "so that systemd starts it again"
        failed = machine.events("journal.failed")
        assert len(failed) == 1
        assert str(machine.state) in failed[0]["reason"]
        assert "free some space" in failed[0]["hint"]
        assert "Traceback" not in machine.log.read_text()
        assert not machine.is_done(*numbers)
        other.unlink()
        space.run("mount", "-o", "remount,size=16m", machine.state)
        assert space.regd(machine, "scan").returncode == 0
    assert machine.is_done(*numbers)
    machine.check(1, *numbers)


# --- the disk of the data fails ------------------------------------------------------------------

DISK_ERRORS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "quota",
    errno.EROFS: "for writing",
    errno.EACCES: "right to write",
    errno.EIO: "check the disk",
}
HURT = ("mkdir", "fsync", "rename", "hash", "list", "look")


def hurt(monkeypatch: pytest.MonkeyPatch, what: str, code: int) -> None:
    """Have one kind of access to FILE, or to the folder that it moves into, fail."""

    def failing(module: Any, name: str, concerns: Callable[..., bool]) -> None:
        real = getattr(module, name)

        def instead(*args: Any, **more: Any) -> Any:
            if concerns(*args):
                raise OSError(code, os.strerror(code), FILE)
            return real(*args, **more)

        monkeypatch.setattr(module, name, instead)

    def is_revision(descriptor: int, *_: Any) -> bool:
        return "#" in str(Path(f"/proc/self/fd/{descriptor}").readlink())

    if what == "mkdir":
        failing(os, "mkdir", lambda path, *_: str(path).startswith("#"))
    elif what == "fsync":  # after the rename: the file is at the other end already
        failing(os, "fsync", is_revision)
    elif what == "rename":
        failing(files, "rename_noreplace", lambda *_: True)
    elif what == "hash":
        failing(files, "md5", lambda _root, path, *_: path.endswith(FILE))
    elif what == "list":
        failing(files, "occupied_revisions", lambda *_: True)
    elif what == "look":
        failing(files, "check_finished", lambda _root, path, *_: path.endswith(FILE))


def disk_cases() -> list[tuple[str, int]]:
    every = [(what, code) for what in HURT for code in DISK_ERRORS]
    return every if chaos.TIMES else every[::6] + every[1:5:2]  # every way, and every error


@pytest.mark.parametrize(("what", "code"), disk_cases())
def test_what_the_disk_fails_on_keeps_its_place_and_goes_on_by_itself(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, what: str, code: int
) -> None:
    folder = machine.record()
    clock = Clock()
    with machine.by_hand(clock) as service:
        finish(service, clock)
        machine.lab.protect(machine.eid(), FILE)
        write(folder / FILE, b"recomputed")
        write(folder / "alf/probe01/spikes.times.npy", b"beside it")
        (folder / "create_me.flag").touch()
        clock.sleep(7200)
        with monkeypatch.context() as patch:
            hurt(patch, what, code)
            service._scan()
            service.step()
            (row,) = service.journal.sessions()
            assert row.state is SessionState.WAITING
            hint = DISK_ERRORS[code]
            if what in ("hash", "look"):
                hint = hint.replace("write", "read")
            assert hint in (row.hint or "")
            assert os.strerror(code) in (row.reason or "")
            assert service.journal.files_in(FileState.REFUSED) == []
            (entry,) = report(machine.settings, service.journal)["unfinished"]
            assert (entry["path"], entry["hint"]) == (FILE, row.hint)
            assert "alf/probe01/spikes.times.npy" in machine.held()
            both = [p for p in (FILE, MOVED) if (folder / p).exists()]
            assert both == [MOVED if what == "fsync" else FILE]
            assert (folder / both[0]).read_bytes() == b"recomputed"
        finish(service, clock, 60)
        assert not service.journal.sessions(SessionState.PARKED)
    assert not (folder / "create_me.flag").exists()
    assert (folder / MOVED).read_bytes() == b"recomputed"
    assert machine.held()[MOVED]["hash"] == md5(folder / MOVED)
    machine.check(1)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_what_lies_in_a_folder_that_cannot_be_listed_is_neither_gone_nor_forgotten(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    known, new = DATASETS[3], "alf/probe00/spikes.clusters.npy"
    inner = known.split("/")[1]
    folder = machine.record()
    clock = Clock()
    real = files.open_inner

    def open_inner(above: int, name: str) -> int:
        if name == inner:
            raise OSError(code, os.strerror(code))
        return real(above, name)

    with machine.by_hand(clock) as service:
        with (folder / known).open("ab"):  # not finished yet
            service._scan()
            service.step()
        write(folder / new, b"later")
        write(folder / "alf/probe01/spikes.times.npy", b"beside it")
        (folder / "create_me.flag").touch()
        clock.sleep(7200)
        with monkeypatch.context() as patch:
            patch.setattr(files, "open_inner", open_inner)
            service._scan()
            service.step()
            (row,) = service.journal.sessions()
            assert row.state is SessionState.WAITING
            assert f"alf/{inner}: {os.strerror(code)}" in (row.reason or "")
            assert row.hint
            assert [f.path for _, f in service.journal.files_in(FileState.SETTLING)] == [known]
            assert "alf/probe01/spikes.times.npy" in machine.held()
            refused = [f.path for _, f in service.journal.files_in(FileState.REFUSED)]
            is_written_down = code == errno.EACCES  # there a person has to do something
            assert refused == ([f"alf/{inner}"] if is_written_down else [])
            assert (folder / "create_me.flag").exists() != is_written_down
        finish(service, clock, 60)
        assert not service.journal.files_in(FileState.SETTLING, FileState.REFUSED)
    assert machine.is_done(1)
    assert {known, new} <= machine.held().keys()
    machine.check(1)


def test_a_disk_that_stays_full_is_a_persons_in_the_end(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = machine.record()
    clock = Clock()
    with machine.by_hand(clock) as service:
        with monkeypatch.context() as patch:
            hurt(patch, "hash", errno.EIO)
            finish(service, clock)
            (row,) = service.journal.sessions()
            assert row.state is SessionState.PARKED
            assert "3 times" in (row.reason or "")
            assert (row.hint or "").endswith("; then: regd retry --all")
        assert service.journal.retry(None) == 1
        finish(service, clock)
    assert not (folder / "create_me.flag").exists()
    machine.check(1)


@needs_mounts
def test_a_data_disk_that_is_read_only_and_then_full(make: Make, space: Namespace) -> None:
    machine = make(retry={"first_s": 0.05, "longest_s": 0.2, "attempts": 1000})
    disk = space.disk(machine.root, "size=1m,nr_inodes=40")
    folder = disk / machine.folder().relative_to(machine.root)
    write(folder / FILE, b"first")
    (folder / "create_me.flag").touch()
    assert space.regd(machine, "scan").returncode == 0
    for name in DATASETS[1:]:
        write(folder / name, name.encode())
    (folder / "create_me.flag").touch()
    space.run("mount", "-o", "remount,ro", machine.root)
    with machine.daemon(space):
        until(lambda: len(machine.held()) == len(DATASETS))
        (told, *_) = until(lambda: machine.events("session.retried"))
        assert told["hint"] == "mount data_root for writing"
        assert "create_me.flag cannot be removed" in told["reason"]
        assert (folder / "create_me.flag").exists()

        space.run("mount", "-o", "remount,rw", machine.root)
        until(lambda: not (folder / "create_me.flag").exists())

        machine.lab.protect(machine.eid(), FILE)
        write(folder / "alf/probe01/spikes.times.npy", b"beside it")
        with contextlib.suppress(OSError):
            for n in range(100):
                (disk / f"{n}.tmp").touch()  # no inode is left, as on a full disk
        (folder / FILE).write_bytes(b"recomputed")
        until(lambda: "alf/probe01/spikes.times.npy" in machine.held())
        until(lambda: any("free" in e["hint"] for e in machine.events("session.retried")))
        assert (folder / FILE).read_bytes() == b"recomputed"
        for n in range(10):
            (disk / f"{n}.tmp").unlink()
        until(lambda: MOVED in machine.held())
    assert (folder / MOVED).read_bytes() == b"recomputed"
    machine.check(1, root=disk)


# --- the state folder ----------------------------------------------------------------------------


def test_what_regd_keeps_is_its_users_alone(machine: Machine) -> None:
    machine.record()
    before = os.umask(0)
    try:
        with machine.running() as service:
            until(lambda: machine.is_done(1))
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in machine.state.iterdir()}
            assert service.journal
    finally:
        os.umask(before)
    assert stat.S_IMODE(machine.state.stat().st_mode) == 0o700
    assert {FILE_NAME, f"{FILE_NAME}-wal", "lock"} <= modes.keys()
    modes.pop("identity", None)  # no secret; the folder keeps others away
    assert modes == dict.fromkeys(modes, 0o600)


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777, 0o720])
def test_a_state_folder_that_others_reach_into(machine: Machine, mode: int) -> None:
    machine.state.mkdir()
    machine.state.chmod(mode)
    with pytest.raises(NeedsHuman) as caught, lock(machine.state):
        pass
    assert caught.value.hint == f"chmod 700 {machine.state}"
    assert list(machine.state.iterdir()) == []


@needs_root
def test_a_state_folder_of_another_user(machine: Machine) -> None:
    machine.record()
    machine.scan().close()
    os.chown(machine.state, NOBODY, -1)
    before = {p: p.stat().st_mtime_ns for p in machine.state.iterdir()}
    for command in (["scan"], ["retry", "--all"]):
        done = subprocess.run(
            machine.command(*command), capture_output=True, text=True, env=machine.environment
        )
        assert done.returncode == 2
        assert f"state_dir {machine.state} belongs to user nobody" in done.stderr
        assert "sudo -u nobody regd scan" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in machine.state.iterdir()}


@needs_root
@pytest.mark.parametrize(
    ("name", "mode", "owner", "said"),
    [
        ("roots", 0o700, 0, "belongs to user root"),
        ("open to all", 0o777, 0, "belongs to user root"),
        ("unwritable", 0o500, NOBODY, "cannot be used: Permission denied"),
        ("none/deeper", None, 0, "cannot be used: Permission denied"),
    ],
)
def test_a_user_without_rights(name: str, mode: int | None, owner: int, said: str) -> None:
    with tempfile.TemporaryDirectory(prefix="regd-test-") as public:
        Path(public).chmod(0o755)  # unlike pytest's own
        folder = Path(public, name)
        if mode is not None:
            folder.mkdir()
            folder.chmod(mode)
            os.chown(folder, owner, -1)
        os.seteuid(NOBODY)
        try:
            with pytest.raises(NeedsHuman, match=said) as caught, lock(folder):
                pass
        finally:
            os.seteuid(0)
        assert caught.value.hint


def test_odd_state_folders(machine: Machine, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    machine.state.symlink_to(elsewhere)  # as systemd does for DynamicUser
    machine.record()
    machine.scan().close()
    machine.check(1)
    assert (elsewhere / FILE_NAME).exists()

    (elsewhere / "lock").unlink()
    (elsewhere / "lock").mkdir()
    with pytest.raises(NeedsHuman, match="cannot be used"), lock(machine.state):
        pass

    machine.state.unlink()
    machine.state.write_text("a file")
    with pytest.raises(NeedsHuman, match="is no folder"), lock(machine.state):
        pass
    assert machine.state.read_text() == "a file"


def test_the_lock_of_a_process_that_is_gone_holds_nobody(machine: Machine) -> None:
    machine.record()
    with machine.daemon() as process:
        until(lambda: (machine.state / "lock").read_text() == str(process.pid))
        process.kill()
        process.wait()
    machine.scan().close()
    machine.check(1)


# --- the journal is damaged ----------------------------------------------------------------------


def known(machine: Machine) -> dict[str, str]:
    """Record and register two sessions, one with a protected file, and an old one by hand."""
    folder = machine.record(1)
    machine.record(2)
    machine.scan().close()
    machine.lab.protect(machine.eid(1), FILE)
    return tree(folder)


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): md5(p) for p in folder.rglob("*") if p.is_file()}


def foreign(path: Path, version: int) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE session (id INTEGER, sport TEXT)")
        db.execute(f"PRAGMA user_version = {version}")
        db.commit()


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "what").write_text("is this?")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "garbage at the start": lambda path: overwrite(path, 0, os.urandom(100)),
    "garbage all over": lambda path: path.write_bytes(os.urandom(50_000)),
    "a text": lambda path: path.write_text("[settings]\n" * 1000),
    "cut in the middle": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut within a page": lambda path: os.truncate(path, 5000),
    "only its first page": lambda path: os.truncate(path, 4096),
    "empty": lambda path: os.truncate(path, 0),
    "a folder": replace_by_folder,
    "another program's": lambda path: foreign(path, 0),
    "another program's, of a version like ours": lambda path: foreign(path, 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_is_set_aside_and_built_anew(
    machine: Machine, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = known(machine)
    posted = machine.wire.posted.copy()
    DAMAGE[damage](machine.journal_file)
    left = machine.journal_file.read_bytes() if machine.journal_file.is_file() else None

    with pytest.raises(JournalDamaged) as caught:  # who may only read says what to do
        machine.journal()
    assert "regd scan" in caught.value.hint

    with machine.scan() as journal:
        (told,) = logged(caplog, "journal.damaged")
        (aside,) = asides(journal.path)
        assert told["aside"] == str(aside)
        assert told["level"] == "error"
        assert str(aside) in [p["what"] for p in report(machine.settings, journal)["problems"]]
        assert {row.state for row in journal.sessions()} == {SessionState.DONE}
        assert len(journal.sessions()) == 2
        assert len(journal.files_in(FileState.REGISTERED)) == 2 * len(DATASETS)
        assert journal.fact("data_root") == str(machine.root)
    if left is not None:
        assert aside.read_bytes() == left
    assert tree(machine.folder()) == before, "no new revision of a file that did not change"
    assert machine.wire.posted == posted
    machine.check(1, 2)

    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    with machine.journal() as journal:
        assert report(machine.settings, journal)["problems"] == []


def test_a_journal_of_a_newer_regd_stays_where_it_is(machine: Machine) -> None:
    known(machine)
    with contextlib.closing(sqlite3.connect(machine.journal_file)) as db:
        db.execute("PRAGMA user_version = 2")
    content = machine.journal_file.read_bytes()
    with pytest.raises(NeedsHuman, match="newer version"):
        machine.scan()
    assert machine.journal_file.read_bytes() == content
    assert asides(machine.journal_file) == []


def test_a_rebuild_knows_old_sessions_and_creates_none(machine: Machine) -> None:
    folder, unknown = machine.record(1), machine.record(2, flag=False)
    month_ago = time.time() - 30 * 86400
    for path in (p for f in (folder, unknown) for p in f.rglob("*") if p.is_file()):
        os.utime(path, (month_ago, month_ago))
    machine.scan().close()
    machine.check(1)
    machine.journal_file.write_bytes(b"no journal")
    with machine.scan() as journal:
        states = {row.folder[-3:]: (row.state, row.asked) for row in journal.sessions()}
        assert states == {"001": (SessionState.DONE, False), "002": (SessionState.HELD, False)}
        assert len(journal.files_in(FileState.REGISTERED)) == len(DATASETS)
    machine.scan().close()
    machine.check(1)


def test_damage_found_in_the_middle_of_work(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    known(machine)
    with (
        lock(machine.state),
        Journal(machine.journal_file, now=time.time) as other,
        Service(machine.settings, threading.Event()) as service,
    ):
        other.ask_scan(everything=False)  # what SQLite remembers of the pages is void now
        size = machine.journal_file.stat().st_size
        overwrite(machine.journal_file, 4096, os.urandom(size - 4096))
        machine.record(3)
        threading.Timer(20, service.end).start()
        with pytest.raises(JournalDamaged):
            service.run()
    assert logged(caplog, "journal.damaged")
    assert not machine.journal_file.exists()
    with machine.scan() as journal:
        assert {row.state for row in journal.sessions()} == {SessionState.DONE}
        assert len(asides(journal.path)) == 1
    machine.check(1, 2, 3)


@pytest.mark.parametrize("beside", ["-wal", "-shm"])
@pytest.mark.parametrize("what", ["garbage", "empty", "torn"] if chaos.TIMES else ["garbage"])
def test_damage_beside_the_journal(machine: Machine, beside: str, what: str) -> None:
    """As a power cut leaves it: what was only in the -wal is lost, or half of it."""
    with machine.running() as service:
        machine.record(1)
        until(lambda: machine.is_done(1) and idle(service))
        saved = {p.name: p.read_bytes() for p in machine.state.iterdir()}
    for name, content in saved.items():
        (machine.state / name).write_bytes(content)
    file = machine.state / f"{FILE_NAME}{beside}"
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes(
        {"garbage": os.urandom(len(content)), "empty": b"", "torn": content[:half]}[what]
    )
    machine.lab.protect(machine.eid(), FILE)
    before = tree(machine.folder())
    machine.record(2)
    with machine.scan() as journal:
        assert {row.state for row in journal.sessions()} == {SessionState.DONE}
    assert tree(machine.folder()) == before
    machine.check(1, 2)


@pytest.fixture(scope="module")
def old(make: Make) -> tuple[Machine, dict[str, bytes]]:
    """A machine with a journal of many pages, and a copy of it."""
    machine = make()
    names = [f"alf/probe{n:02d}/spikes.times.npy" for n in range(30)]
    for number in (1, 2, 3):
        machine.record(number, names=[FILE, *names])
    machine.scan().close()
    machine.lab.protect(machine.eid(1), FILE)
    return machine, {p.name: p.read_bytes() for p in machine.state.iterdir()}


@given(
    page=st.integers(0, 200),
    damage=st.sampled_from(["random", "zeros", "second half", "another page", "one byte"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=times(4), deadline=None)
def test_any_page_of_the_journal_may_be_damaged(
    old: tuple[Machine, dict[str, bytes]], page: int, damage: str, seed: int
) -> None:
    machine, saved = old
    chance = random.Random(seed)
    for path in machine.state.iterdir():
        path.unlink()
    for name, content in saved.items():
        (machine.state / name).write_bytes(content)
    pages = len(saved[FILE_NAME]) // 4096
    at = page % pages * 4096
    other = chance.randrange(pages) * 4096
    overwrite(
        machine.journal_file,
        *{
            "random": (at, chance.randbytes(4096)),
            "zeros": (at, bytes(4096)),
            "second half": (at + 2048, chance.randbytes(2048)),
            "another page": (at, saved[FILE_NAME][other : other + 4096]),
            "one byte": (at + chance.randrange(4096), chance.randbytes(1)),
        }[damage],
    )
    posted = machine.wire.posted.copy()
    before = tree(machine.root)
    write(machine.folder(1) / "alf" / f"task_{next(_DAYS)}" / "spikes.times.npy", b"new")
    if scanned(machine, but=damage in ("one byte", "second half")):
        assert len(tree(machine.root)) == len(before) + 1
        assert before.items() <= tree(machine.root).items()
        assert (machine.wire.posted - posted).total() == 1
        machine.check(1, 2, 3)


def scanned(machine: Machine, *, but: bool) -> bool:
    """Scan, again if damage was found on the way, as systemd does; False if a person is asked.

    Args:
        but: Whether the damage may be such that the journal seems to be another's.
    """
    for _ in range(2):
        try:
            machine.scan().close()
        except JournalDamaged:
            continue
        except NeedsHuman:
            if but:
                return False
            raise
        return True
    raise AssertionError("damaged for good")


# --- a mount vanishes ----------------------------------------------------------------------------


@needs_mounts
@pytest.mark.parametrize("level", ["the root", "a subject"])
def test_a_mount_that_vanishes_and_comes_back(make: Make, space: Namespace, level: str) -> None:
    machine = make(scan={"every_s": 1}, retry={"first_s": 0.05, "longest_s": 0.2, "attempts": 99})
    mount = machine.root if level == "the root" else machine.folder().parent.parent
    mount.mkdir(parents=True, exist_ok=True)
    backing = machine.root.parent / "disk"
    backing.mkdir()

    def folder(number: int) -> Path:
        return backing / machine.folder(number).relative_to(mount)

    def record(number: int, *, flag: bool) -> None:
        for name in DATASETS:
            write(folder(number) / name, f"{number} {name}".encode())
        if flag:
            (folder(number) / "create_me.flag").touch()

    space.run("mount", "--bind", backing, mount)
    with machine.daemon(space) as process:
        record(1, flag=True)
        with machine.journal() as journal:
            until(lambda: len(journal.files_in(FileState.REGISTERED)) == len(DATASETS))
            record(2, flag=False)
            until(lambda: len(journal.sessions()) == 2)
            space.run("umount", "-l", mount)
            if level == "the root":
                until(lambda: machine.events("root.away"))
            else:
                seen = len(machine.events("scan.finished"))
                until(lambda: len(machine.events("scan.finished")) > seen + 1)
            record(3, flag=True)
            write(folder(1) / "alf/probe01/spikes.times.npy", b"recorded meanwhile")
            (folder(2) / "create_me.flag").touch()
            registered = [f for _, f in journal.files_in(FileState.REGISTERED)]
            assert len(registered) == len(DATASETS), "what is registered stays known"
            if level == "the root":
                assert not machine.events("session.vanished")
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=8) == 0
    assert (folder(3) / "create_me.flag").exists()
    with machine.daemon(space):
        space.run("mount", "--bind", backing, mount)
        flags = [folder(n) / "create_me.flag" for n in (2, 3)]
        until(lambda: not any(flag.exists() for flag in flags))
        until(lambda: "alf/probe01/spikes.times.npy" in machine.held(1))
        until(lambda: len(machine.held(2)) == len(machine.held(3)) == len(DATASETS))
    for number in (1, 2, 3):
        held = {path: r["hash"] for path, r in machine.held(number).items()}
        assert held == tree(folder(number))
    assert not machine.posted_again()


# --- a clock is set ------------------------------------------------------------------------------


class WallClock:
    """A clock on the wall that people and NTP set."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return self._clock() + self.ahead_s


HOUR = 3600.0


@pytest.mark.parametrize("by_s", [-8 * HOUR, -1e9, 8 * HOUR, 1e9])
def test_a_jump_leaves_every_wait_as_long_as_it_was(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, by_s: float
) -> None:
    machine = make(retry={"first_s": 60, "longest_s": 60, "attempts": 3})
    machine.record()
    clock = Clock()
    wall = WallClock(clock)
    with machine.by_hand(clock, wall) as service:
        with monkeypatch.context() as patch:
            hurt(patch, "hash", errno.EIO)
            service._scan()
            service.step()
        (row,) = service.journal.sessions(SessionState.WAITING)
        wait_s = row.due_at - wall()
        wall.ahead_s += by_s
        service._check_clock()
        (row,) = service.journal.sessions(SessionState.WAITING)
        assert row.due_at - wall() == pytest.approx(wait_s, abs=1e-3)
        (told,) = logged(caplog, "clock.jumped")
        assert told["by_s"] == by_s
        finish(service, clock, 300)
    machine.check(1)


def test_a_clock_set_back_while_nobody_looked(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.record()
    clock = Clock()
    wall = WallClock(clock)
    wall.ahead_s = 86400.0
    with machine.by_hand(clock, wall) as service, monkeypatch.context() as patch:
        hurt(patch, "hash", errno.EIO)
        service._scan()
        service.step()
    wall.ahead_s = 0.0
    with machine.by_hand(clock, wall) as service:
        service._recover()
        finish(service, clock, 100)
    machine.check(1)


@pytest.mark.parametrize("start", [0.0, 1e9])
def test_a_file_being_written_while_the_clock_is_set_forward(
    machine: Machine, start: float
) -> None:
    """From 1970, as where a computer's battery is empty, or from a date not long ago."""
    clock = Clock()
    wall = WallClock(clock)
    wall.ahead_s = start - clock()
    folder = machine.record()
    file = folder / FILE
    with machine.by_hand(clock, wall) as service:
        for n in range(10):
            write(file, bytes(range(n + 1)))
            os.utime(file, (wall(), wall()))  # its ctime stays: that is of the test's own clock
            if n == 4:
                wall.ahead_s = HOUR  # past every ctime, by far more than quiet_s
            service._scan()
            while service.step():
                pass
            assert not any(FILE in what and machine.date in what[0] for what in machine.wire.posted)
            clock.sleep(0.3)
        finish(service, clock, 60)
    machine.check(1)


def test_a_growing_file_on_a_server_whose_clock_is_behind(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network drive, where the kernel does not say who has the file open either."""
    monkeypatch.setattr(files, "is_local", lambda _: False)
    monkeypatch.setattr(files, "is_open_for_writing", lambda _: None)
    clock = Clock()  # all stamps are an hour older than what it says
    folder = machine.record(names=DATASETS[:2])
    with machine.by_hand(clock) as service, (folder / FILE).open("ab", buffering=0) as out:
        for _ in range(10):
            out.write(b"a trial")
            service._scan()
            while service.step():
                pass
            assert not any(FILE in what and machine.date in what[0] for what in machine.wire.posted)
            clock.sleep(0.4)  # less than quiet_s
        assert DATASETS[1] in machine.held()
        finish(service, clock, 60)
    machine.check(1)


# --- inotify -------------------------------------------------------------------------------------


@needs_mounts
def test_too_few_watches(make: Make) -> None:
    machine = make(scan={"every_s": 1})
    for number in (1, 2, 3):
        machine.record(number)
    limit = 5
    script = f'echo {limit} > /proc/sys/user/max_inotify_watches && exec "$@"'

    class Limited(Namespace):
        def __init__(self) -> None:
            pass

        def command(self, *words: object) -> list[str]:
            return ["unshare", "-Ur", "sh", "-c", script, "sh", *map(str, words)]

    with machine.daemon(Limited()):
        (told,) = until(lambda: machine.events("watch.failed"))
        assert "goes on by scanning" in told["reason"]
        assert "sysctl fs.inotify.max_user_watches=" in told["hint"]
        machine.record(4)
        until(lambda: machine.is_done(1, 2, 3, 4))
        write(machine.folder(4) / "alf/probe01/spikes.times.npy", b"in an unwatched folder")
        until(lambda: "alf/probe01/spikes.times.npy" in machine.held(4))
    machine.check(1, 2, 3, 4)


def test_more_events_than_the_kernel_keeps(machine: Machine) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 50_000:
        pytest.skip("the kernel keeps more events than can be made in a moment")
    folder = machine.record(1)
    with machine.daemon() as process:
        until(lambda: machine.is_done(1))
        process.send_signal(signal.SIGSTOP)
        for _ in range(most):  # twice what it keeps: regd stops a moment after it is told to
            (folder / "noise.tmp").touch()  # created, and closed
            (folder / "noise.tmp").unlink()
        machine.record(2)
        write(folder / "alf/probe01/spikes.times.npy", b"whose event is lost")
        process.send_signal(signal.SIGCONT)
        until(lambda: machine.events("watch.overflowed"))
        until(lambda: machine.is_done(1, 2))
        until(lambda: "alf/probe01/spikes.times.npy" in machine.held(1))
        until(lambda: len(machine.held(2)) == len(DATASETS))
    machine.check(1, 2)
