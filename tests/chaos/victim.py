"""A regd in a process of its own that dies by SIGKILL at a chosen point, and the disk it leaves.

A point lies before, within and after each effect: a request, a change of a folder, an fsync, a
COMMIT. The process wraps those functions for itself; regd knows nothing of it. After a power cut,
what was not yet fsynced is gone, too. Within a request is when Alyx has all of it: `Door` stands
before the sandbox and says so.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import datetime
import errno
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest  # noqa: F401 - a child imports the main module, which is pytest's

from regd import files, logs, service
from regd.alyx import AlyxClient
from regd.journal import FILE_NAME
from regd.model import SessionState
from regd.paths import OWNER_FILE
from regd.registration import RegistrationClient
from regd.service import Service, lock
from regd.settings import Settings
from tests.rig import until

TODAY = datetime.date(2026, 2, 3)
UNKNOWN_OUTCOME_S = 0.2  # instead of 75 s: the sandbox answers within milliseconds
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")
_TICK_S = 0.05  # how soon a daemon sees that it is asked for a scan, instead of 1 s
_IDLE_S = 0.02
_ARRIVED, _LATE_S = "x-arrived", "x-late-s"  # what a victim tells the door with a request

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Plan:
    """How a process works and dies.

    Attributes:
        at: The point to die at: its number, or its label and how often that has come; None for
            no death.
        power_cut: Whether the machine dies with it.
        daemon: Whether it is `regd run`; else it is `regd scan`.
        by_link: Whether the kernel lacks renameat2.
        workers: How many.
        late_s: How long Alyx has what is posted before it does anything about it; where the label
            of the point is given, only what is posted there.
        taken: A name of a file. Just before one of that name is moved into today's revision,
            somebody puts another one there, which is empty.
        unknown_outcome_s: How long it waits for what an earlier one sent.
    """

    at: int | tuple[str, int] | None = None
    power_cut: bool = False
    daemon: bool = False
    by_link: bool = False
    workers: int = 1
    late_s: float = 0.0
    taken: str = ""
    unknown_outcome_s: float = UNKNOWN_OUTCOME_S


@dataclass(frozen=True)
class Change:
    """An entry of a folder that has come or gone, and is not on the disk yet.

    Attributes:
        path: The entry.
        added: Whether it has come.
        inode: What it names, or named.
        twin: Another path of that.
        content: What it held, in Latin-1, if it has gone and was the last of its paths.
    """

    path: str
    added: bool
    inode: int
    twin: str | None = None
    content: str | None = None


@dataclass
class Cache:
    """What a power cut would lose.

    Attributes:
        wal: The salt and the length of the journal's WAL when it was last fsynced.
        changes: Of folders, oldest first.
        twins: The last path that came to an inode.
        safe: The inodes of those of regd's own files that hold something after it.
    """

    wal: tuple[str, int] = ("", 0)
    changes: list[Change] = field(default_factory=list)
    twins: dict[int, str] = field(default_factory=dict)
    safe: list[int] = field(default_factory=list)

    @classmethod
    def told(cls, report: Path) -> Cache:
        """Return the one that a process has left."""
        told = json.loads(report.read_text())["cache"]
        changes = [Change(**change) for change in told["changes"]]
        twins = {int(inode): path for inode, path in told["twins"].items()}
        return cls(tuple(told["wal"]), changes, twins, told["safe"])

    @classmethod
    def flushed(cls, root: Path, state_dir: Path) -> Cache:
        """Return one with nothing in it: all that is there is on the disk."""
        cache = cls()
        for path in (state_dir / f"{FILE_NAME}-wal", *_written(root, state_dir)):
            if path.exists():
                with path.open("rb") as file:
                    cache.synced(file.fileno())
        return cache

    def synced(self, descriptor: int) -> None:
        path = _path(descriptor)
        if path.endswith("-wal"):
            self.wal = (os.pread(descriptor, 8, 16).hex(), os.fstat(descriptor).st_size)
        self.changes = [c for c in self.changes if os.path.dirname(c.path) != path]  # noqa: PTH120
        self.safe.append(os.fstat(descriptor).st_ino)

    def lose(self, root: Path, state_dir: Path, *, folders: bool) -> None:
        """Leave on the disk what a power cut leaves; `folders`: undo what was not fsynced, too."""
        for path in _written(root, state_dir):
            if _inode(path) not in self.safe:
                os.truncate(path, 0)
        wal = state_dir / f"{FILE_NAME}-wal"
        if wal.exists():
            salt, length = self.wal
            with wal.open("rb+") as file:
                head = file.read(24)
                file.truncate(length if head[16:].hex() == salt else 0)
        (state_dir / f"{FILE_NAME}-shm").unlink(missing_ok=True)
        if not folders:
            return
        for change in self.changes:
            path = Path(change.path)
            if change.added or os.path.lexists(path) or not path.parent.exists():
                continue
            if change.content is not None:
                path.write_bytes(change.content.encode("latin-1"))
            elif change.twin is not None and _inode(change.twin) == change.inode:
                os.link(change.twin, path)
        for change in reversed(self.changes):
            path = Path(change.path)
            if not change.added or _inode(path) != change.inode:
                continue
            if not path.is_dir():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()


def _written(root: Path, state_dir: Path) -> list[Path]:
    """Return the files that regd writes, but for the journal and its log."""
    return [*root.glob(f"{OWNER_FILE}*"), *state_dir.glob("identity")]


def _inode(path: str | Path) -> int | None:
    try:
        return os.lstat(path).st_ino
    except OSError:
        return None


def _path(descriptor: int | None, name: str = "") -> str:
    folder = Path(f"/proc/self/fd/{descriptor}").readlink() if descriptor is not None else Path()
    return str((folder / name).absolute())


class Effects:
    """Counts the points that the process passes, and ends it at the planned one."""

    def __init__(self, plan: Plan, report: Path, cache: Cache) -> None:
        self._plan = plan
        self._report = report
        self._lock = threading.RLock()
        self._passed: list[str] = []
        self._exposed: list[bool] = []
        self._cache = cache

    def point(self, label: str, arrived: Path | None = None) -> None:
        """Pass a point; if it is the planned one, die, once `arrived` is there."""
        with self._lock:
            self._passed.append(label)
            self._exposed.append(bool(self._cache.changes))
            here = (len(self._passed), (label, self._passed.count(label)))
            if self._plan.at in here:
                if arrived is not None:
                    until(arrived.exists)
                self.tell()
                os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()  # until it arrives: nothing more may happen in this thread

    def may_die_at(self, label: str) -> bool:
        """Say whether the next point of that label may be the planned one."""
        at = self._plan.at
        return not isinstance(at, tuple) or at == (label, self._passed.count(label) + 1)

    def tell(self) -> None:
        report = {"passed": self._passed, "exposed": self._exposed, "cache": asdict(self._cache)}
        self._report.write_text(json.dumps(report))

    def install(self) -> None:
        real = {name: getattr(os, name) for name in ("mkdir", "link", "unlink", "rename")}
        renameat2 = files._libc.renameat2

        def mkdir(name: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            def do() -> None:
                real["mkdir"](name, mode, dir_fd=dir_fd)
                self._came(_path(dir_fd, name))

            self._around("mkdir", do)

        def link(
            name: Any, new: Any, *, src_dir_fd: int, dst_dir_fd: int, follow_symlinks: bool
        ) -> None:
            def do() -> None:
                self._take(_path(dst_dir_fd, new))
                real["link"](
                    name, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd,
                    follow_symlinks=follow_symlinks,
                )  # fmt: skip
                self._came(_path(dst_dir_fd, new))

            self._around("link", do)

        def unlink(name: Any, *, dir_fd: int | None = None) -> None:
            path = _path(dir_fd, name)

            def do() -> None:
                inode = _inode(path) or 0
                last = inode and os.lstat(path).st_nlink == 1  # a flag, or regd's own
                content = Path(path).read_bytes().decode("latin-1") if last else None
                real["unlink"](name, dir_fd=dir_fd)
                self._went(path, inode, content)

            self._around("unlink flag" if path.endswith(".flag") else "unlink", do)

        def fsync(descriptor: int) -> None:
            def do() -> None:
                self._cache.synced(descriptor)  # the disk itself loses no power here: no real one

            wal = _path(descriptor).endswith("-wal")
            kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
            self._around(f"fsync {'journal' if wal else kind}", do)

        def rename(
            name: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
        ) -> None:
            def do() -> None:
                source, target = _path(src_dir_fd, name), _path(dst_dir_fd, new)
                inode = _inode(source) or 0
                real["rename"](name, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
                self._came(target, for_a_moment=True)
                self._went(source, inode)

            self._around("rename", do)

        def rename_or_fail(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> int:
            def do() -> int:
                source, target = _path(old_fd, os.fsdecode(old)), _path(new_fd, os.fsdecode(new))
                inode = _inode(source) or 0
                self._take(target)
                failed = int(renameat2(old_fd, old, new_fd, new, flags))
                if not failed:
                    self._came(target)
                    self._went(source, inode)
                return failed

            return int(self._around("renameat2", do))

        def missing(*_: Any) -> int:
            ctypes.set_errno(errno.ENOSYS)
            return -1

        os.mkdir, os.link, os.unlink, os.fsync = mkdir, link, unlink, fsync  # type: ignore[assignment]
        os.fdatasync = fsync  # type: ignore[assignment]
        os.rename = rename  # type: ignore[assignment]
        libc = SimpleNamespace(
            renameat2=missing if self._plan.by_link else rename_or_fail,
            fstatfs=files._libc.fstatfs,
        )
        files._libc = libc  # type: ignore[assignment]
        sqlite3.connect = partial(sqlite3.connect, factory=partial(_Connection, self))  # type: ignore[assignment]

    def _around(self, label: str, do: Callable[[], Any]) -> Any:
        self.point(f"{label}: before")
        with self._lock:
            result = do()
        self.point(f"{label}: after")
        return result

    def _take(self, target: str) -> None:
        path = Path(target)
        if path.name == self._plan.taken and path.parent.name == f"#{TODAY}#":
            with contextlib.suppress(FileExistsError):
                path.touch(exist_ok=False)

    def _came(self, path: str, *, for_a_moment: bool = False) -> None:
        inode = _inode(path) or 0
        if not for_a_moment:
            self._cache.twins[inode] = path
        self._cache.changes.append(Change(path, True, inode))

    def _went(self, path: str, inode: int, content: str | None = None) -> None:
        twin = self._cache.twins.get(inode)
        self._cache.changes.append(Change(path, False, inode, twin, content))
        if content is not None:  # another file may have its number soon
            self._cache.safe = [safe for safe in self._cache.safe if safe != inode]


class _Connection(sqlite3.Connection):
    def __init__(self, effects: Effects, *args: Any, **options: Any) -> None:
        self._effects = effects
        super().__init__(*args, **options)
        # a checkpoint fsyncs beneath Python, where nobody sees it
        super().execute("PRAGMA wal_autocheckpoint = 0")

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if sql != "COMMIT":
            return super().execute(sql, *values)
        self._effects.point("COMMIT: before")
        cursor = super().execute(sql, *values)
        self._effects.point("COMMIT: after")
        return cursor


class _Network(httpx.BaseTransport):
    def __init__(self, effects: Effects, late_s: float, arrivals: Path) -> None:
        self._effects = effects
        self._late_s = late_s
        self._arrivals = arrivals
        self._numbers = itertools.count(1)
        self._network = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        label = f"{request.method} {_UUID.sub('*', request.url.path)}"
        arrived = self._arrivals / str(next(self._numbers))
        request.headers[_ARRIVED] = str(arrived)
        if request.method == "POST" and self._effects.may_die_at(f"{label}: sent"):
            request.headers[_LATE_S] = str(self._late_s)

        def trace(event: str, _about: Any) -> None:
            if event == "http11.send_request_body.complete":
                self._effects.point(f"{label}: sent", arrived)

        self._effects.point(f"{label}: before")
        request.extensions = {**request.extensions, "trace": trace}
        response = self._network.handle_request(request)
        self._effects.point(f"{label}: after")
        return response

    def close(self) -> None:
        self._network.close()


class Door:
    """Stands before the sandbox: holds what is late, and counts the files that Alyx took.

    Attributes:
        counts: How often each was taken, by session, path and MD5.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self._inside = 0

    def twice(self) -> list[tuple[str, str, str]]:
        """Return what was registered again, though nothing had changed."""
        return [post for post, count in self.counts.items() if count > 1]

    def clear(self, session: str = "") -> None:
        """Forget what was posted in a session that is no longer there, or in all."""
        for post in [post for post in self.counts if session in ("", post[0])]:
            del self.counts[post]

    def rest(self) -> None:
        """Return once all that was sent has had its effect."""
        until(lambda: not self._inside)

    def before(self, app: Any) -> Any:
        """Return an application that does what `app` does, even if who asked is dead by then."""

        async def enter(scope: Any, receive: Any, send: Any) -> None:
            body, more = b"", True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return  # not all of it came
                body += message.get("body", b"")
                more = message.get("more_body", False)
            self._inside += 1
            try:
                await asyncio.sleep(has_arrived(scope))
                await app(scope, whole(body, receive), heard(scope, body, send))
            finally:
                self._inside -= 1

        def has_arrived(scope: Any) -> float:
            """Tell the victim, and return how long Alyx takes."""
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            if _ARRIVED in headers:
                Path(headers[_ARRIVED]).touch()
            return float(headers.get(_LATE_S, 0))

        def whole(body: bytes, receive: Any) -> Any:
            given = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def listen() -> Any:
                return next(given, None) or await receive()

            return listen

        def heard(scope: Any, body: bytes, send: Any) -> Any:
            async def answer(message: Any) -> None:
                if scope["path"] == "/register-file" and message.get("status") == 201:
                    told = json.loads(body)
                    for path, digest in zip(told["filenames"], told["hashes"], strict=True):
                        self.counts[told["path"], path, digest] += 1
                await send(message)

            return answer

        return enter


def _live(
    settings: Settings, plan: Plan, report: Path, finish: Connection | None, before: Path
) -> None:
    with (report.parent / "log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logs.configure(format="json", stream=sys.stderr)
    service._TICK_S = _TICK_S
    settings = settings.model_copy(update={"workers": plan.workers})
    places = settings.data_root, settings.state_dir
    effects = Effects(
        plan, report, Cache.told(before) if before.exists() else Cache.flushed(*places)
    )
    effects.install()
    network = _Network(effects, plan.late_s, report.parent / "arrived")
    alyx = AlyxClient.from_settings(settings, transport=network)
    client = RegistrationClient(alyx, chunk_files=settings.register.chunk_files)
    stop = threading.Event()
    with (
        lock(settings.state_dir),
        Service(settings, stop, client=client, arrives_s=plan.unknown_outcome_s) as regd,
    ):
        regd.worker.today = lambda: TODAY
        if finish is None:
            regd.run_once(everything=False)
        else:
            threading.Thread(target=_end, args=(regd, finish), daemon=True).start()
            regd.run()
    effects.tell()


def _end(regd: Service, finish: Connection) -> None:
    """End the daemon once it is told to and has nothing left to do."""
    finish.poll(None)
    request = regd.journal.ask_scan(everything=False)
    waits = SessionState.WAITING, SessionState.WORKING
    while not regd.journal.scan_done(request) or regd.journal.sessions(*waits):
        time.sleep(_IDLE_S)  # other threads are at work, and nothing tells of their end
    regd.end()


class Victim:
    """A regd in a process of its own.

    Args:
        settings: Of the rig.
        plan: How it works and dies.
        scratch: A folder for its log and its report.
    """

    def __init__(self, settings: Settings, plan: Plan, scratch: Path) -> None:
        scratch.mkdir(exist_ok=True)
        self._settings = settings
        self._plan = plan
        self._report = scratch / "report.json"
        before = scratch / "before.json"
        before.unlink(missing_ok=True)
        # after a power cut there is none, and of one that was killed at any moment nobody knows
        if self._report.exists():
            self._report.rename(before)
        shutil.rmtree(scratch / "arrived", ignore_errors=True)
        (scratch / "arrived").mkdir()
        self._log = scratch / "log"
        # no Event: its lock stays taken where the process dies with it
        told, self._finish = _processes.Pipe(duplex=False)
        self._process: ForkServerProcess = _processes.Process(
            target=_live,
            args=(settings, plan, self._report, told if plan.daemon else None, before),
        )
        self._process.start()
        told.close()

    def kill(self) -> None:
        """Kill it now, wherever it is."""
        self._process.kill()

    def end(self, *, undo: bool = True) -> bool:
        """Have it finish what there is to do, and wait for its end; return whether it was killed.

        Args:
            undo: Whether a power cut undoes changes of folders that were not fsynced.
        """
        with contextlib.suppress(BrokenPipeError):  # it is dead already
            self._finish.send(None)
        self._finish.close()
        self._process.join(60.0)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        self._process.close()
        killed = code == -signal.SIGKILL
        assert killed or code == 0, f"exit code {code}; its log ends in:\n{self.log()}"
        if killed and self._plan.power_cut and self._report.exists():
            places = self._settings.data_root, self._settings.state_dir
            Cache.told(self._report).lose(*places, folders=undo)
            self._report.unlink()
        return killed

    def passed(self) -> list[tuple[str, bool]]:
        """Return the points it has passed, after its end: the label, and what was at stake.

        That is whether a change of a folder had not been fsynced there.
        """
        report = json.loads(self._report.read_text())
        return list(zip(report["passed"], report["exposed"], strict=True))

    def log(self) -> str:
        return "\n".join(self._log.read_text().splitlines()[-15:])
