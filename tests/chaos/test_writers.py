"""Writers as they are: they pause, map, preallocate, copy, rename and delete, at any moment.

regd runs on the test's own thread here, and its time passes when it is told to (`Bench.wait`). What
is to happen in the middle of its work is done from inside: by the transport, while a request is on
its way, or by the hash function.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import itertools
import json
import mmap
import os
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regd import files
from regd.alyx import AlyxClient
from regd.errors import AlyxAway
from regd.journal import Journal
from regd.model import FileState, SessionState
from regd.registration import RegistrationClient
from regd.sandbox.server import Server
from regd.service import Service, lock
from regd.status import report
from regd.watch import Hint
from tests.chaos import times
from tests.conftest import INITIAL
from tests.rig import DATASETS, Lab, Rig, idle, md5, until, write

FILE = DATASETS[0]
PROBE = "alf/probe00/spikes.times.npy"
QUIET_S, CLOSED_QUIET_S, MAX_WAIT_S = 30.0, 2.0, 3600.0
Action = Callable[[], Any]
DAYS = itertools.count()
UNDONE = set(FileState) - {FileState.REGISTERED}


class Bench:
    """regd with a hand on its clock, and on every moment that something else could act in."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.later_s = 0.0
        self.posted: dict[str, list[str | None]] = defaultdict(list)
        self.before: dict[str, Action] = {}  # by method and path of the request; each done once
        self.after: dict[str, Action] = {}
        self.on_moment: Action = lambda: None
        self.on_post: Callable[[str, str | None], None] = lambda *_: None
        settle = {"quiet_s": QUIET_S, "closed_quiet_s": CLOSED_QUIET_S, "max_wait_s": MAX_WAIT_S}
        rig.settings = rig.settings.model_copy(
            update={"settle": rig.settings.settle.model_copy(update=settle)}
        )
        self._lock = lock(rig.settings.state_dir)
        self._lock.__enter__()
        self.service = Service(
            rig.settings,
            Moments(self),
            client=self._client(),
            now=lambda: time.time() + self.later_s,
            clock=lambda: time.monotonic() + self.later_s,
            chance=lambda: 0.5,
        )

    def _client(self) -> RegistrationClient:
        lab = self.rig.lab
        alyx = AlyxClient(
            lab.url,
            lab.username,
            lab.password,
            requests_per_minute=None,
            transport=Wire(self),
            sleep=lambda _: None,
        )
        return RegistrationClient(alyx)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        self.service.__exit__()
        self._lock.__exit__(None, None, None)

    @property
    def journal(self) -> Journal:
        return self.service.journal

    def wait(self, seconds: float = QUIET_S + 1) -> None:
        self.later_s += seconds
        # a file system's time stamps move on once in 4 or 10 ms, and time has passed here
        time.sleep(0.011)

    def closed(self, path: Path) -> None:
        """Tell regd that a writer has closed a file, as the kernel does."""
        self.service._hints.put(Hint(str(path.relative_to(self.rig.root)), finished=True))
        self.service._take_hints()

    def go(self) -> None:
        """Scan, and do all that is due."""
        self.service.scanner.scan(time.time() + self.later_s)
        while self.service.worker.step():
            pass

    def finish(self) -> None:
        """Go on until nothing waits any more."""
        for _ in range(20):
            self.wait()
            self.go()
            if not self.journal.sessions(SessionState.WAITING, SessionState.WORKING):
                return
        raise AssertionError(f"never done: {self.journal.sessions()}")

    def states(self) -> dict[str, SessionState]:
        return {row.folder[-14:]: row.state for row in self.journal.sessions()}


class Moments(threading.Event):
    """regd asks it again and again whether to stop: each time is a moment to act in."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self._bench = bench

    def is_set(self) -> bool:
        self._bench.on_moment()
        return super().is_set()


class Wire(httpx.BaseTransport):
    """The way to Alyx: notes each hash that is posted, and acts before and after a request."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._network = httpx.HTTPTransport(verify=False)  # plain HTTP; certificates take 60 ms

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        key = f"{request.method} {request.url.path}"
        self._bench.on_moment()
        self._bench.before.pop(key, lambda: None)()
        if key == "POST /register-file":
            self._note(json.loads(request.content))
        response = self._network.handle_request(request)
        response.read()
        self._bench.on_moment()
        self._bench.after.pop(key, lambda: None)()
        return response

    def _note(self, body: dict[str, Any]) -> None:
        for name, digest in zip(body["filenames"], body["hashes"], strict=True):
            self._bench.posted[f"{body['path']}/{name}"].append(digest)
            self._bench.on_post(name, digest)

    def close(self) -> None:
        self._network.close()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One sandbox for all tests here, each on a day of its own: to start one takes its time."""
    with Server(load=INITIAL, rate_limit=None) as server:
        lab = Lab(server.url, "rig_user", "rig-password", "ZM_1085", "mainenlab", "mainenlab_local")
        with lab.client:
            yield lab


def new_rig(folder: Path, lab: Lab, **settings: Any) -> Rig:
    rig = Rig(folder, lab, **settings)
    rig.date = str(datetime.date(1990, 1, 1) + datetime.timedelta(days=next(DAYS)))
    return rig


@pytest.fixture
def rig(tmp_path: Path, lab: Lab) -> Rig:
    return new_rig(tmp_path, lab)


@pytest.fixture
def bench(rig: Rig) -> Iterator[Bench]:
    with Bench(rig) as bench:
        yield bench


def posts(bench: Bench, path: Path) -> list[str | None]:
    """Return the hashes that were posted for a file, in order."""
    parts = path.relative_to(bench.rig.root).parts
    return bench.posted["/".join(parts[2:])]  # as Alyx names it: without <lab>/Subjects


def check_all_there(bench: Bench, number: int = 1) -> None:
    """Alyx holds every file of a session as it is now, but for empty ones."""
    folder = bench.rig.folder(number)
    there = {
        path.relative_to(folder).as_posix(): md5(path)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".flag" and path.stat().st_size
    }
    held = {path: record["hash"] for path, record in bench.rig.held(number).items()}
    assert {path: held.get(path) for path in there} == there
    assert not os.path.lexists(folder / "create_me.flag")


# --- tools ---------------------------------------------------------------------------------------
# Each writes a file as the program of that name does, and yields wherever that program may take
# its time: longer than quiet_s, whatever that is.

Pauses = Iterator[None]
Tool = Callable[[Path], Pauses]
LONG_AGO = (1.5e9, 1.5e9)


def rsync(path: Path) -> Pauses:
    temporary = path.with_name(f".{path.name}.Xa3f9Q")
    with temporary.open("wb", buffering=0) as file:
        file.write(b"first half, ")
        yield
        file.write(b"second half")
    os.utime(temporary, LONG_AGO)
    yield
    temporary.rename(path)


def rsync_inplace(path: Path) -> Pauses:
    with path.open("wb", buffering=0) as file:
        file.write(b"first half, ")
        yield
        file.write(b"second half")
        yield
        os.utime(path, LONG_AGO)
        yield


def robocopy(path: Path) -> Pauses:
    with path.open("wb", buffering=0) as file:
        file.truncate(3000)
        yield
        for part in range(3):
            file.write(b"%d" % part * 1000)
            yield
        os.utime(file.fileno(), LONG_AGO)
        yield


def scp(path: Path) -> Pauses:
    with path.open("wb", buffering=0) as file:
        for part in range(4):
            file.write(b"%d" % part * 1000)
            yield  # the network stalls


def sparse(path: Path) -> Pauses:
    with path.open("wb") as file:
        file.truncate(1 << 20)
        yield
        os.pwrite(file.fileno(), b"the end", (1 << 20) - 7)
        yield
        os.pwrite(file.fileno(), b"the header", 0)
        yield


def mapped(path: Path) -> Pauses:
    with path.open("w+b") as file:
        file.truncate(8192)
        with mmap.mmap(file.fileno(), 8192) as memory:
            for part in range(3):
                memory[part * 8 : part * 8 + 8] = b"trial %02d" % part
                yield


def mapped_without_descriptor(path: Path) -> Pauses:
    with path.open("w+b") as file:
        file.truncate(8192)
        memory = mmap.mmap(file.fileno(), 8192)
    with memory:
        for part in range(3):
            memory[part * 8 : part * 8 + 8] = b"trial %02d" % part
            yield


def two_programs(path: Path) -> Pauses:
    with path.open("ab", buffering=0) as first:
        with path.open("ab", buffering=0) as second:
            second.write(b"second, ")
            yield
        first.write(b"first")
        yield


def shell(path: Path) -> Pauses:
    """Another process holds it, and says nothing for a while."""
    script = 'exec 3>"$0"; echo one >&3; echo; read go; echo two >&3; echo; read go'
    with subprocess.Popen(
        ["/bin/sh", "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
            yield
            process.stdin.write(b"\n")
            process.stdin.flush()


TOOLS: list[Tool] = [
    rsync,
    rsync_inplace,
    robocopy,
    scp,
    sparse,
    mapped,
    mapped_without_descriptor,
    two_programs,
    shell,
]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_only_the_finished_file_is_registered_whatever_tool_writes_it(
    bench: Bench, tool: Tool
) -> None:
    path = bench.rig.record() / PROBE
    path.unlink()
    for _ in tool(path):
        for _ in range(2):  # once new, once known to settle
            bench.wait()
            bench.go()
        assert posts(bench, path) == []
        assert not (path.parent.parent.parent / "create_me.flag").exists()  # it waits for nobody
    bench.closed(path)
    bench.wait(CLOSED_QUIET_S + 0.1)
    bench.go()
    assert posts(bench, path) == [md5(path)]
    bench.finish()
    assert posts(bench, path) == [md5(path)]
    check_all_there(bench)


def test_all_tools_at_once_beside_a_running_daemon(tmp_path: Path, lab: Lab) -> None:
    rig = new_rig(tmp_path, lab, settle={"quiet_s": 0.3, "closed_quiet_s": 0.05})
    folder = rig.record()
    paths = {tool: folder / f"alf/{tool.__name__}/spikes.times.npy" for tool in TOOLS}

    def play(tool: Tool) -> None:
        paths[tool].parent.mkdir()
        for _ in tool(paths[tool]):
            time.sleep(0.5)  # the writer's own pace: it pauses for longer than quiet_s

    with rig.running() as service:
        writers = [threading.Thread(target=play, args=(tool,)) for tool in TOOLS]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        names = {path.relative_to(folder).as_posix() for path in paths.values()}
        until(lambda: names <= set(rig.held()) and idle(service))
        held = rig.held()
    for path in paths.values():
        record = held[path.relative_to(folder).as_posix()]
        assert (record["hash"], record["file_size"]) == (md5(path), path.stat().st_size)


def test_a_file_held_open_for_very_long_is_reported_once_and_registered_in_the_end(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bench.rig.record() / FILE
    with path.open("ab", buffering=0) as file:
        bench.go()
        for _ in range(4):
            bench.wait(MAX_WAIT_S / 2)
            bench.go()
        (entry,) = report(bench.rig.settings, bench.journal)["unfinished"]
        assert "has it open for writing" in entry["reason"]
        file.write(b"now it grows")
        bench.go()
        (entry,) = report(bench.rig.settings, bench.journal)["unfinished"]
        assert "still being written" in entry["reason"]
    bench.finish()
    assert posts(bench, path) == [md5(path)]
    check_all_there(bench)


def test_a_large_file_without_a_hash_is_not_registered_while_it_is_held_open(
    tmp_path: Path, lab: Lab
) -> None:
    rig = new_rig(tmp_path, lab, register={"max_md5_size": 10})
    with Bench(rig) as bench:
        path = rig.record(names=(FILE,)) / FILE
        write(path, bytes(1000))
        with path.open("r+b", buffering=0):
            bench.wait()
            bench.go()
            assert posts(bench, path) == []
        bench.finish()
        assert posts(bench, path) == [None]
        assert rig.held()[FILE]["file_size"] == 1000


@pytest.mark.parametrize("protected", [False, True])
def test_a_file_opened_again_after_it_was_registered_is_registered_again_once(
    bench: Bench, protected: bool
) -> None:
    folder = bench.rig.record()
    path = folder / FILE
    bench.finish()
    first = md5(path)
    assert posts(bench, path) == [first]
    if protected:
        bench.rig.lab.protect(bench.rig.eid(), FILE)
    with path.open("ab", buffering=0) as file:
        for part in range(3):
            file.write(b"appended %d" % part)
            bench.wait()
            bench.go()
        assert posts(bench, path) == [first]
    final = md5(path)
    bench.finish()
    if protected:
        moved = folder / "alf" / f"#{datetime.date.today()}#" / path.name
        assert (md5(moved), path.exists()) == (final, False)
        # asked for where it was, refused, and registered where it is now
        assert posts(bench, path) == [first, final]
        assert posts(bench, moved) == [final]
        assert bench.rig.held()[FILE]["hash"] == first
    else:
        assert posts(bench, path) == [first, final]
    check_all_there(bench)


# --- changes at every moment ---------------------------------------------------------------------

MOMENTS = [
    "before GET /sessions",
    "after POST /sessions",
    "before the hash",  # the walk has seen it
    "before the reading",
    "after the reading",
    "after the hash",
    "before POST /register-file",
    "after POST /register-file",
]


def at(moment: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, act: Action) -> None:
    """Have `act` done once, at that moment of regd's next work."""
    when, _, what = moment.partition(" ")
    if what.startswith(("GET", "POST")):
        (bench.before if when == "before" else bench.after)[what] = act
        return
    name = "_digest" if what == "the reading" else "md5_in_blocks"
    real, todo = getattr(files, name), [act]

    def wrapper(*args: Any) -> Any:
        actions = [todo.pop()] if todo else []
        if when == "before" and actions:
            actions.pop()()
        found = yield from real(*args)
        if actions:
            actions.pop()()
        return found

    monkeypatch.setattr(files, name, wrapper)


def rewrite(path: Path) -> None:
    path.write_bytes(b"written over")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"appended")


def replace(path: Path) -> None:
    new = path.with_name(".new")
    new.write_bytes(b"another file")
    os.utime(new, LONG_AGO)
    new.replace(path)


def delete(path: Path) -> None:
    path.unlink()


def become_folder(path: Path) -> None:
    path.unlink()
    write(path / "spikes.times.npy", b"a file in a folder of that name")


def become_link(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere.npy")
    path.symlink_to(path.parents[2] / "elsewhere.npy")


def become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "change", [rewrite, append, replace, delete, become_folder, become_link, become_pipe]
)
def test_a_file_that_changes_at_any_moment_is_known_as_it_is_in_the_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], moment: str
) -> None:
    folder = bench.rig.record(names=(FILE,))
    path = folder / FILE
    contents = {md5(path)}
    bench.wait()
    at(moment, bench, monkeypatch, lambda: change(path))
    bench.go()
    bench.finish()
    if path.is_file() and not path.is_symlink():
        contents.add(md5(path))
        check_all_there(bench)
    assert set(posts(bench, path)) <= contents
    assert len(posts(bench, path)) == len(set(posts(bench, path)))
    if moment in MOMENTS[:6] and change in (delete, become_folder, become_link, become_pipe):
        assert FILE not in bench.rig.held()
    refused = [row.path for _, row in bench.journal.files_in(FileState.REFUSED)]
    assert refused == ([FILE] if change in (become_link, become_pipe) else [])
    assert bench.states() == {f"{bench.rig.date}/001": SessionState.DONE}
    assert not (folder / "create_me.flag").exists()


@pytest.mark.parametrize("moment", ["before the hash", "after the hash"])
@pytest.mark.parametrize("where", ["below", "session", "subject"])
def test_files_that_go_away_before_they_are_registered_are_no_failure(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str, moment: str
) -> None:
    folder = bench.rig.record(names=DATASETS[:3])  # all in one folder
    lost = {"below": folder / "alf", "session": folder, "subject": folder.parents[1]}[where]
    bench.wait()
    at(moment, bench, monkeypatch, lambda: lost.rename(bench.rig.root.parent / "lost"))
    (bench.rig.root / "keeps-the-root-from-being-empty").mkdir()
    bench.go()
    bench.go()
    (row,) = bench.journal.sessions()
    assert (row.state, row.attempt) == (SessionState.DONE, 0)
    assert not [row for _, row in bench.journal.files_in(*UNDONE)]


def test_a_file_of_the_same_size_and_time_put_in_place_while_it_is_hashed_is_noticed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.rig.record(names=(FILE,)) / FILE
    status = path.stat()

    def put() -> None:
        new = path.with_name(".new")
        new.write_bytes(bytes(status.st_size))
        os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
        new.replace(path)

    bench.wait()
    at("after the reading", bench, monkeypatch, put)
    bench.go()
    bench.finish()
    assert posts(bench, path) == [md5(path)]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_writer_that_begins_at_any_moment_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = bench.rig.record(names=(FILE,)) / FILE
    old = md5(path)
    bench.wait()
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            file = stack.enter_context(path.open("ab", buffering=0))
            file.write(b"a beginning")

        at(moment, bench, monkeypatch, begin)
        for _ in range(3):
            bench.go()
            bench.wait()
    half = md5(path)
    append(path)
    bench.finish()
    assert half not in posts(bench, path)
    assert set(posts(bench, path)) <= {old, md5(path)}
    check_all_there(bench)


# --- opened again between the hash and what is done with it --------------------------------------


def protected_and_changed(bench: Bench) -> Path:
    """Return a file whose new content must go into a revision folder."""
    path = bench.rig.record(names=(FILE,)) / FILE
    bench.finish()
    bench.rig.lab.protect(bench.rig.eid(), FILE)
    path.write_bytes(b"a second version ")
    return path


def in_one_piece(bench: Bench, path: Path) -> None:
    """Append by path, as a task does each trial, and see all of it registered as one file."""
    for _ in range(2):
        with path.open("ab") as out:
            out.write(b"a trial ")
    bench.finish()
    (moved,) = (p for p in bench.rig.folder().rglob(path.name) if p.is_file())
    assert moved.read_bytes() == b"a second version a trial a trial "
    assert moved.parent.name.startswith("#")
    check_all_there(bench)


def test_a_file_opened_again_during_an_outage_is_not_moved(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = protected_and_changed(bench)
    hashed_in_an_outage(bench, monkeypatch)
    with path.open("ab"):  # it has not written yet: size and time are as they were
        bench.service.gate.open()
        bench.wait()
        bench.go()
        assert path.exists()
    in_one_piece(bench, path)


def test_a_file_opened_again_during_an_outage_is_not_posted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.rig.record(names=(FILE,)) / FILE
    half = md5(path)
    hashed_in_an_outage(bench, monkeypatch)
    with path.open("ab") as out:
        bench.service.gate.open()
        for _ in range(2):
            bench.wait()
            bench.go()
        assert half not in posts(bench, path)
        out.write(b"a trial ")
    bench.finish()
    check_all_there(bench)


def hashed_in_an_outage(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def post_files(*_: Any, **__: Any) -> None:
        raise AlyxAway("Alyx does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(RegistrationClient, "post_files", post_files)
        bench.wait()
        bench.go()
    assert [f.state for _, f in bench.journal.files_in(*UNDONE)] == [FileState.READY]


def test_a_file_opened_again_while_alyx_says_that_it_is_protected_is_not_moved(
    bench: Bench,
) -> None:
    path = protected_and_changed(bench)
    with contextlib.ExitStack() as stack:
        bench.after["POST /register-file"] = lambda: stack.enter_context(path.open("ab"))
        bench.wait()
        bench.go()
        assert path.exists()
        (row,) = (f for _, f in bench.journal.files_in(*UNDONE))
        assert (row.state, row.move_to) == (FileState.SETTLING, None)
    in_one_piece(bench, path)


def test_a_move_that_was_begun_before_a_file_was_opened_again_is_given_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = protected_and_changed(bench)
    with monkeypatch.context() as patch:

        def move(*_: Any, **__: Any) -> None:
            raise OSError(errno.EIO, "the disk fails")

        patch.setattr(files, "move", move)
        bench.wait()
        bench.go()
    assert {f.state for _, f in bench.journal.files_in(*UNDONE)} == {FileState.PLACING}
    with path.open("ab"):
        for _ in range(2):
            bench.wait()
            bench.go()
        assert path.exists()
        assert {f.state for _, f in bench.journal.files_in(*UNDONE)} == {FileState.SETTLING}
    in_one_piece(bench, path)


def test_a_session_that_went_away_in_the_middle_of_a_move_and_came_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = protected_and_changed(bench)
    with monkeypatch.context() as patch:

        def move(root: Path, folder: str, source: str, target: str, **_: Any) -> None:
            (root / folder / target).parent.mkdir()
            (root / folder / target).hardlink_to(root / folder / source)
            raise OSError(errno.ESTALE, "the server went away")

        patch.setattr(files, "move", move)
        bench.wait()
        bench.go()
    folder = bench.rig.folder()
    elsewhere = bench.rig.root.parent / "elsewhere"
    folder.rename(elsewhere)
    bench.finish()
    elsewhere.rename(folder)
    bench.finish()
    (moved,) = (p for p in folder.rglob(path.name) if p.is_file())
    assert moved.parent.name.startswith("#")
    assert len(bench.rig.held()) == 2
    check_all_there(bench)


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("which", ["to another number", "away", "away with its subject"])
def test_a_session_folder_renamed_in_work_and_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, which: str, moment: str
) -> None:
    rig = bench.rig
    folder = rig.record(names=DATASETS[:3])
    source, target = folder, rig.root.parent / "away"
    if which == "to another number":
        target = rig.folder(2)
    elif which == "away with its subject":
        source = folder.parents[1]
    bench.wait()
    at(moment, bench, monkeypatch, lambda: source.rename(target))
    bench.go()
    (rig.root / "keeps-the-root-from-being-empty").mkdir(exist_ok=True)
    bench.finish()
    assert set(bench.states().values()) == {SessionState.DONE}
    if which == "to another number":
        check_all_there(bench, 2)
    target.rename(source)
    bench.finish()
    assert set(bench.states().values()) == {SessionState.DONE}
    check_all_there(bench)
    hashes = {md5(path) for path in folder.rglob("*.npy")}
    assert {h for found in bench.posted.values() for h in found} == hashes


def test_a_subject_folder_renamed_to_one_that_alyx_does_not_know_needs_a_person(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = bench.rig
    subject = rig.record().parents[1]
    bench.wait()
    at("before the hash", bench, monkeypatch, lambda: subject.rename(subject.with_name("nobody")))
    bench.go()
    write(subject.with_name("nobody") / rig.date / "001/create_me.flag", b"")
    bench.finish()
    (parked,) = bench.journal.sessions(SessionState.PARKED)
    assert parked.folder.endswith(f"nobody/{rig.date}/001")
    assert "nobody" in (parked.reason or "")
    subject.with_name("nobody").rename(subject)
    bench.finish()
    check_all_there(bench)


def test_a_file_moved_from_one_session_into_another_is_registered_there(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = bench.rig.record(1), bench.rig.record(2, names=DATASETS[:1])
    old, new = one / PROBE, two / "alf/probe01/spikes.times.npy"
    new.parent.mkdir()
    bench.wait()
    at("before POST /register-file", bench, monkeypatch, lambda: old.rename(new))
    bench.go()
    bench.finish()
    assert posts(bench, new) == [md5(new)]
    for number in (1, 2):
        check_all_there(bench, number)


# --- flags ---------------------------------------------------------------------------------------


def test_flags_of_two_sessions_at_once(bench: Bench) -> None:
    for number in (1, 2):
        bench.rig.record(number)
    bench.finish()
    for number in (1, 2):
        check_all_there(bench, number)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_flag_put_again_while_its_session_is_in_work(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder = bench.rig.record(names=(FILE,))

    def again() -> None:
        (folder / "create_me.flag").unlink()
        write(folder / PROBE, b"it came with the second flag")
        (folder / "create_me.flag").touch()

    bench.wait()
    at(moment, bench, monkeypatch, again)
    bench.go()
    bench.finish()
    assert len(bench.rig.lab.sessions(bench.rig.date)) == 1
    check_all_there(bench)


def test_two_folders_of_one_session_make_one_session_and_a_person_is_told(bench: Bench) -> None:
    folder = bench.rig.record()
    other = folder.with_name("1")
    write(other / FILE, b"another file of that name")
    (other / "create_me.flag").touch()
    bench.finish()
    assert len(bench.rig.lab.sessions(bench.rig.date)) == 1
    (stray,) = bench.journal.strays()
    assert "is the same session on Alyx as" in stray[1]
    flagged = [path for path in (folder, other) if (path / "create_me.flag").exists()]
    (done,) = {folder, other} - set(flagged)
    assert bench.rig.held()[FILE]["hash"] == md5(done / FILE)


@pytest.mark.parametrize("kind", ["dangling link", "link", "link to a folder", "full", "no rights"])
def test_whatever_a_flag_is_only_the_flag_goes(bench: Bench, kind: str) -> None:
    folder = bench.rig.record(flag=False)
    flag, outside = folder / "create_me.flag", bench.rig.root.parent / "outside"
    if kind == "dangling link":
        flag.symlink_to(outside / "nowhere")
    elif kind == "link":
        write(outside / "precious", b"keep me")
        flag.symlink_to(outside / "precious")
    elif kind == "link to a folder":
        write(outside / "precious", b"keep me")
        flag.symlink_to(outside)
    elif kind == "full":
        flag.write_bytes(b"some programs write the time into it")
    else:
        flag.touch(0o000)
    bench.finish()
    check_all_there(bench)
    if "link" in kind and kind != "dangling link":
        assert (outside / "precious").read_bytes() == b"keep me"


def test_a_flag_that_is_a_folder_needs_a_person_and_stays(bench: Bench) -> None:
    folder = bench.rig.record(flag=False)
    write(folder / "create_me.flag" / "notes.txt", b"keep me")
    bench.rig.record(2)
    bench.finish()
    (parked,) = bench.journal.sessions(SessionState.PARKED)
    assert "is a folder" in (parked.reason or "")
    assert (folder / "create_me.flag" / "notes.txt").read_bytes() == b"keep me"
    check_all_there(bench, 2)


# --- links and special files ---------------------------------------------------------------------


def test_hard_links_of_a_file_are_files_of_their_own(bench: Bench) -> None:
    rig = bench.rig
    folder = rig.record()
    outside = rig.root.parent / "backup.npy"
    outside.hardlink_to(folder / FILE)
    (folder / "alf/probe01").mkdir()
    second = folder / "alf/probe01/spikes.times.npy"
    second.hardlink_to(folder / PROBE)
    bench.finish()
    check_all_there(bench)
    rig.lab.protect(rig.eid(), FILE, PROBE)
    for path in (outside, second):  # written to by its other name
        path.write_bytes(b"recomputed " + path.name.encode())
    bench.finish()
    check_all_there(bench)
    today = f"#{datetime.date.today()}#"
    assert md5(folder / "alf" / today / Path(FILE).name) == md5(outside)
    assert md5(folder / "alf/probe00" / today / "spikes.times.npy") == md5(second)
    assert not (folder / FILE).exists()


def test_special_files_stop_nobody(bench: Bench) -> None:
    folder = bench.rig.record()
    names = {kind: f"alf/{kind}/spikes.times.npy" for kind in ("pipe", "socket", "device")}
    for name in names.values():
        (folder / name).parent.mkdir()
    os.mkfifo(folder / names["pipe"])
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(folder / "alf/socket", os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/spikes.times.npy")  # a socket's path has to be short
        os.close(here)
    try:
        os.mknod(folder / names["device"], stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:  # only root makes one
        names.pop("device")
    bench.finish()
    refused = {row.path for _, row in bench.journal.files_in(FileState.REFUSED)}
    assert refused == set(names.values())
    assert set(bench.rig.held()) == set(DATASETS)
    assert not (folder / "create_me.flag").exists()


# --- generated schedules -------------------------------------------------------------------------


@dataclass
class Handle:
    """A program's hold on a file: a descriptor, a mapping of it, or both."""

    file: FileIO
    inode: int
    memory: mmap.mmap | None = None

    @property
    def is_closed(self) -> bool:
        return self.file.closed and self.memory is None

    def close(self) -> None:
        self.file.close()
        if self.memory is not None:
            self.memory.close()
            self.memory = None


class Writers:
    """Programs that write to three names in a session, and what of it was ever finished.

    Attributes:
        finished: For each name, the MD5s of what it held while no program had it open.
    """

    NAMES = (FILE, PROBE, DATASETS[2])

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._folder = bench.rig.folder()
        self._handles: list[Handle] = []
        self._count = itertools.count(1)
        self.finished: dict[str, set[str]] = defaultdict(set)

    def do(self, what: str, n: int) -> None:
        """Take one step, and note what every file holds after it."""
        path = self._folder / self.NAMES[n]
        path.parent.mkdir(parents=True, exist_ok=True)
        if what in ("write", "overwrite", "truncate", "map", "close descriptor", "close"):
            if self._handles:
                self._do_to(self._handles[n % len(self._handles)], what)
        elif what == "open anew" and not self._is_mapped(path):  # else it would end the mapper
            self._open(path, os.O_TRUNC)
        elif what in ("open", "open anew"):
            self._open(path, 0)
        elif what == "replace":
            new = path.with_name(".new")
            new.write_bytes(self._word())
            self._set_back(new)
            new.replace(path)
        elif what == "flag":
            (self._folder / "create_me.flag").touch()
        elif what == "wait":
            self._bench.wait((CLOSED_QUIET_S, QUIET_S, QUIET_S)[n] + 0.1)
        elif path.exists():
            if what == "unlink":
                path.unlink()
            elif what == "rename":
                path.rename(self._folder / self.NAMES[n - 1])
            elif what == "set back":
                self._set_back(path)
            elif what == "protect":
                self._protect(self.NAMES[n])
        self._note()

    def end(self) -> None:
        """Have every program close what it has open."""
        for handle in self._handles:
            handle.close()
        self._handles = []
        self._note()

    def _open(self, path: Path, flags: int) -> None:
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | flags), "r+")
        self._handles.append(Handle(file, os.fstat(file.fileno()).st_ino))

    def _do_to(self, handle: Handle, what: str) -> None:
        file, memory = handle.file, handle.memory
        if what == "close":
            handle.close()
        elif what == "close descriptor":
            file.close()
        elif what == "map" and memory is not None:
            memory[:8] = self._word()
        elif file.closed:
            pass
        elif what == "map" and os.fstat(file.fileno()).st_size >= 8:
            handle.memory = mmap.mmap(file.fileno(), 8)
            handle.memory[:8] = self._word()
        elif what == "write":
            file.seek(0, os.SEEK_END)
            file.write(self._word())
        elif what == "overwrite":
            os.pwrite(file.fileno(), self._word(), 0)
        elif what == "truncate" and not any(h.memory for h in self._handles):
            file.truncate(4)
        self._handles = [h for h in self._handles if not h.is_closed]

    def _is_mapped(self, path: Path) -> bool:
        inodes = {handle.inode for handle in self._handles if handle.memory is not None}
        return path.exists() and path.stat().st_ino in inodes

    def _word(self) -> bytes:
        return b"%08d" % next(self._count)  # no content comes twice

    def _set_back(self, path: Path) -> None:
        os.utime(path, (1.5e9 + next(self._count),) * 2)

    def _protect(self, name: str) -> None:
        rig = self._bench.rig
        if rig.lab.sessions(rig.date) and name in rig.held():
            rig.lab.protect(rig.eid(), name)

    def _note(self) -> None:
        inodes = {handle.inode for handle in self._handles}
        for path in self._folder.rglob("[!.]*.npy"):
            if path.stat().st_ino not in inodes:
                self.finished[base_name(path.relative_to(self._folder))].add(md5(path))


def base_name(path: Path | str) -> str:
    """Return a path below the session without its revision folder."""
    return "/".join(part for part in Path(path).parts if part[0] != "#")


OFTEN = ("open", "write", "close", "wait", "go", "go", "wait")
SELDOM = (
    "open anew",
    "overwrite",
    "truncate",
    "map",
    "close descriptor",
    "replace",
    "unlink",
    "rename",
    "set back",
    "flag",
    "protect",
)
# what is done, to which file or handle, and how many moments of regd's work later
STEPS = st.tuples(st.sampled_from(OFTEN + SELDOM), st.integers(0, 2), st.integers(0, 9))


@settings(max_examples=times(25), deadline=None)
@given(st.lists(STEPS, min_size=30, max_size=80))
def test_whatever_writers_do_alyx_gets_finished_files_only_and_in_the_end_all_of_them(
    lab: Lab, steps: list[tuple[str, int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as place, Bench(new_rig(Path(place), lab)) as bench:
        bench.rig.record(names=Writers.NAMES)
        writers = Writers(bench)
        writers.do("flag", 0)
        left = deque(steps)
        moments_left = 0
        unfinished = []

        def moment() -> None:
            """Take the steps that come before regd is to go on."""
            nonlocal moments_left
            while moments_left == 0 and left and left[0][0] != "go":
                what, n, _ = left.popleft()
                writers.do(what, n)
                moments_left = left[0][2] if left else 0
            moments_left = max(0, moments_left - 1)

        def check(name: str, digest: str | None) -> None:
            if digest not in writers.finished[base_name(name)]:
                unfinished.append((name, digest))

        bench.on_post = check
        while left:
            what, n, moments_left = left.popleft()
            if what == "go":
                bench.on_moment = moment
                bench.go()
                bench.on_moment = lambda: None
            else:
                writers.do(what, n)
        writers.end()
        bench.finish()
        assert unfinished == []
        assert bench.states() == {f"{bench.rig.date}/001": SessionState.DONE}
        check_all_there(bench)
