"""`regd demo`: a recording's way from a rig to Alyx in half a minute, on this computer alone.

The Alyx stand-in runs in this process, the daemon in one of its own, as it would on a rig.
Everything shown is checked at the end: the demo fails if Alyx does not hold what is on the disk.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from regd.alyx import AlyxClient
from regd.errors import InvalidInput, RegdError
from regd.journal import FILE_NAME, FileRow, Journal
from regd.model import DatasetPath, FileState, SessionState
from regd.sandbox.server import Server
from regd.status import is_running

MARKER = ".regd-demo"
"""The file that tells a demo's folder from any other: without it, nothing is ever deleted."""
_WITHIN_S = 30.0  # more than ten times what a step takes, for computers that are busy
_STOP_WITHIN_S = 10.0
_POLL_S = 0.05

# Who is who in the stand-in's built-in lab; these passwords open nothing else.
_RIG_USER, _RIG_PASSWORD = "rig_user", "rig-password"
_ADMIN, _ADMIN_PASSWORD = "test_user", "test-password"
_LAB, _SUBJECT, _REPOSITORY = "cortexlab", "KS005", "cortexlab_local"
_TAG = "paper-2026"

_CHOICE = "alf/_ibl_trials.choice.npy"
_VIDEO = "raw_video_data/_iblrig_leftCamera.raw.mp4"
_UNKNOWN = "raw_behavior_data/_rig_thermometer.raw.csv"
_PROBE = "raw_ephys_data/probe00/_spikeglx_ephysData_g0_t0.imec0.ap"
_VIDEO_BYTES, _VIDEO_CHUNKS, _VIDEO_S = 6_000_000, 12, 2.0
_SAMPLE_RATE_HZ = 30_000


class DemoFailed(RegdError):
    """What the demo shows did not come about."""


def run(folder: Path, console: Console, *, remove_after: bool = False) -> None:
    """Show a session being registered, and a protected dataset being revised.

    Args:
        folder: Where everything is kept; made, and made anew if an earlier demo left it.
        console: Where to show it.
        remove_after: Delete the folder at the end, unless something failed.

    Raises:
        InvalidInput: The folder exists and is not a demo's, or a daemon runs on it.
        DemoFailed: Something did not come about, or not in time; the folder is left to look at.
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP came; everything has been stopped.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    remove(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("Made by `regd demo`, which may delete this folder.\n")
    try:
        with ExitStack() as stack:
            url = _Demo(folder.resolve(), console, stack).play()
    except KeyboardInterrupt:
        if remove_after:
            remove(folder)
        raise
    if remove_after:
        remove(folder)
        console.print(f"{folder} is removed again.", soft_wrap=True)
    else:
        _show_what_next(console, folder, url)


def remove(folder: Path) -> bool:
    """Delete what a demo left in `folder`; return whether there was anything.

    Raises:
        InvalidInput: It is not a demo's folder, or a daemon runs on it.
    """
    if not os.path.lexists(folder):
        return False
    if folder.is_symlink() or not (folder / MARKER).is_file():
        raise InvalidInput(
            f"{folder} exists and was not made by a demo: it is left alone",
            hint="name another one with --folder",
        )
    if is_running(folder / "state"):
        raise InvalidInput(f"a daemon is running on {folder}", hint="stop it first")
    # the marker goes last: a removal that is interrupted can be done again
    for entry in folder.iterdir():
        if entry.name != MARKER:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    shutil.rmtree(folder)
    return True


# --- what the rig writes -------------------------------------------------------------------------


def recording() -> dict[str, bytes]:
    """Return the files of a session, the video aside, by their paths below its folder."""
    trials = range(400)
    starts = [2.7 * n for n in trials]
    wheel_times = [n / 100 for n in range(20_000)]
    settings = {
        "PYBPOD_SUBJECTS": [_SUBJECT],
        "PYBPOD_PROTOCOL": "_iblrig_tasks_ephysChoiceWorld",
        "IBLRIG_VERSION": "8.27.0",
        "NTRIALS": len(trials),
    }
    task_data = [{"trial_num": n + 1, "trial_start": starts[n]} for n in trials]
    ephys = os.urandom(4_000_000)
    meta = {"typeThis": "imec", "imSampRate": _SAMPLE_RATE_HZ, "nSavedChans": 385}
    blocks = {"version": "1.0", "sample_rate": _SAMPLE_RATE_HZ, "chunk_offsets": [0, len(ephys)]}
    return {
        "alf/_ibl_trials.intervals.npy": npy([t for s in starts for t in (s, s + 1.9)], columns=2),
        "alf/_ibl_trials.probabilityLeft.npy": npy([(0.2, 0.5, 0.8)[n // 50 % 3] for n in trials]),
        _CHOICE: npy([-1.0 if n % 3 else 1.0 for n in trials]),
        "alf/_ibl_wheel.position.npy": npy([math.sin(t / 7) * 3.1 for t in wheel_times]),
        "alf/_ibl_wheel.timestamps.npy": npy(wheel_times),
        "raw_behavior_data/_iblrig_taskSettings.raw.json": json.dumps(settings, indent=1).encode(),
        "raw_behavior_data/_iblrig_taskData.raw.jsonable": "".join(
            json.dumps(trial) + "\n" for trial in task_data
        ).encode(),
        f"{_PROBE}.cbin": ephys,
        f"{_PROBE}.ch": json.dumps(blocks).encode(),
        f"{_PROBE}.meta": "".join(f"{key}={value}\n" for key, value in meta.items()).encode(),
        _UNKNOWN: b"time,celsius\n0,21.5\n60,21.7\n",
    }


def npy(values: Sequence[float], columns: int = 1) -> bytes:
    """Return numbers as a NumPy file (format 1.0): float64, with one column or several."""
    shape = (len(values),) if columns == 1 else (len(values) // columns, columns)
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}"
    padding = " " * (-(len(header) + 11) % 64)  # magic, version, length and newline take 11 bytes
    text = f"{header}{padding}\n".encode()
    packed = struct.pack(f"<{len(values)}d", *values)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + packed


# --- the daemon, in a process of its own ---------------------------------------------------------


class _Daemon:
    """`regd run` as a process; each of its log lines is kept in a file and shown as it comes."""

    def __init__(self, config: Path, log: Path, show: Callable[[dict[str, Any]], None]) -> None:
        self._log = log
        self._show = show
        self._events: list[str] = []
        self._process = subprocess.Popen(  # noqa: S603 - this very program
            [sys.executable, "-m", "regd", "run", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(),
        )
        self._reader = threading.Thread(target=self._read, name="log", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("ab", buffering=0) as log:
            for line in self._process.stdout:
                log.write(line)
                facts = _facts(line.decode("utf-8", "replace").rstrip())
                self._show(facts)
                self._events.append(facts["event"])

    def logged(self, event: str) -> bool:
        """Say whether a line of that event was shown."""
        return event in self._events

    def wait_for(self, what: str, done: Callable[[], bool]) -> None:
        """Return as soon as `done()` is true.

        Raises:
            DemoFailed: The daemon ended before, or it took too long; `what` is in the message.
        """
        deadline = time.monotonic() + _WITHIN_S
        while not done():
            if (status := self._process.poll()) is not None:
                self._reader.join()
                raise DemoFailed(
                    f"the daemon ended with status {status} before {what}", hint=f"see {self._log}"
                )
            if time.monotonic() > deadline:
                raise DemoFailed(
                    f"{_WITHIN_S:.0f} s went by without this: {what}", hint=f"see {self._log}"
                )
            time.sleep(_POLL_S)

    def stop(self) -> tuple[int, float]:
        """Stop it as systemd would, with SIGTERM; return its status, and how long it took in s."""
        started_at = time.monotonic()
        self._process.terminate()
        try:
            status = self._process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"the daemon did not stop within {_STOP_WITHIN_S:.0f} s") from None
        self._reader.join()
        return status, time.monotonic() - started_at

    def close(self) -> None:
        """Leave no process behind, whatever happened."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join()


def _environment() -> dict[str, str]:
    """Return the environment without settings of a regd that is not this one."""
    foreign = ("CREDENTIALS_DIRECTORY", "STATE_DIRECTORY")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith("REGD_") and name not in foreign
    }
    # a proxy cannot reach this computer's own loopback address
    no_proxy = ",".join(filter(None, (kept.get("NO_PROXY") or kept.get("no_proxy"), "127.0.0.1")))
    return {**kept, "NO_PROXY": no_proxy, "no_proxy": no_proxy}


def _facts(line: str) -> dict[str, Any]:
    """Return a log line's keys; a line that is no JSON, as of a crash, is all event."""
    try:
        facts = json.loads(line)
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or not isinstance(facts.get("event"), str):
        return {"event": line, "level": "error"}
    return facts


# --- the play ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Held:
    """What Alyx holds of the demo's session."""

    sessions: list[dict[str, Any]]
    datasets: list[dict[str, Any]]


class _Demo:
    """One demo: the folder, the stand-in and the daemon, which `stack` takes down."""

    def __init__(self, folder: Path, console: Console, stack: ExitStack) -> None:
        self.console = console
        self._stack = stack
        self._log = folder / "regd.log"
        self._config = folder / "regd.yaml"
        self._data = folder / "data"
        self._state = folder / "state"
        self._name = f"{_LAB}/Subjects/{_SUBJECT}/{datetime.date.today().isoformat()}/001"
        self._session = self._data / self._name
        self._flag = self._session / "create_me.flag"
        self._database = folder / "alyx.sqlite"

    def play(self) -> str:
        """Show everything, check it, and return the address that the stand-in had."""
        self._heading("A rig, regd and Alyx")
        alyx = self._start_alyx()
        daemon = self._start_daemon(alyx.base_url)
        journal = self._stack.enter_context(
            closing(Journal(self._state / FILE_NAME, now=time.time, read_only=True))
        )
        self._heading("A session is recorded and registered")
        self._record(daemon, journal)
        self._heading("A protected dataset is revised")
        original = self._protect(alyx)
        self._revise(daemon, journal)
        held = self._ask(alyx)
        self._heading("What is on the disk")
        self._show_tree()
        self._heading("What Alyx holds")
        self._show_alyx(held)
        self._heading("regd status")
        self._show_status()
        self._heading("The end")
        self._say("demo", "stops the daemon with SIGTERM, as systemd does")
        status, took_s = daemon.stop()
        self._heading("Checked")
        checks = list(self._checks(held, original, journal))
        checks.append((f"on SIGTERM the daemon ended within {took_s:.1f} s, status 0", status == 0))
        self._show_checks(checks)
        return alyx.base_url

    def _start_alyx(self) -> AlyxClient:
        server = self._stack.enter_context(Server(db=self._database))
        self._say("Alyx", f"a stand-in answers at {server.url}, with the built-in lab {_LAB}")
        # given a transport, it leaves out the proxies of the environment
        client = AlyxClient(server.url, _ADMIN, _ADMIN_PASSWORD, transport=httpx.HTTPTransport())
        return self._stack.enter_context(client)

    def _start_daemon(self, url: str) -> _Daemon:
        self._data.mkdir()
        self._config.touch(mode=0o600)  # it holds a password
        self._config.write_text(_settings(self._data, self._state, url))
        daemon = _Daemon(self._config, self._log, self._show_log)
        self._stack.callback(daemon.close)
        daemon.wait_for("its first scan", lambda: daemon.logged("scan.finished"))
        return daemon

    def _record(self, daemon: _Daemon, journal: Journal) -> None:
        """Write a session as a rig does: the camera is the last to finish."""
        files = recording()
        self._say("rig", f"writes {len(files)} files and a video to {self._name}/")
        for name, content in files.items():
            _write(self._session / name, content)
        video = self._session / _VIDEO
        video.parent.mkdir(parents=True)
        with video.open("wb", buffering=0) as file:
            for n in range(1, _VIDEO_CHUNKS + 1):
                file.write(os.urandom(_VIDEO_BYTES // _VIDEO_CHUNKS))
                if n == 1:
                    self._flag.touch()
                    self._say("rig", "puts create_me.flag; the camera still writes its video")
                elif n % (_VIDEO_CHUNKS // 3) == 0:
                    written = f"{_size(file.tell())} of {_size(_VIDEO_BYTES)}"
                    self._say("rig", f"the camera has written {written}")
                time.sleep(_VIDEO_S / _VIDEO_CHUNKS)  # the pace of a camera
        self._say("rig", "the camera has closed its file")
        wanted = dict.fromkeys([*files, _VIDEO], FileState.REGISTERED)
        wanted[_UNKNOWN] = FileState.REFUSED
        daemon.wait_for(
            "the session is registered and its flag removed",
            lambda: (
                daemon.logged("flag.removed") and self._is_done(journal) and not self._flag.exists()
                and {row.path: row.state for row in self._rows(journal)} == wanted
            ),
        )  # fmt: skip

    def _protect(self, alyx: AlyxClient) -> dict[str, Any]:
        """Protect a dataset on Alyx, and return it."""
        collection, name = _CHOICE.split("/")
        found = alyx.rest("datasets", "list", name=name, collection=collection)
        if len(found) != 1:
            raise DemoFailed(f"Alyx holds {len(found)} datasets {_CHOICE}, not one")
        alyx.rest("tags", "create", data={"name": _TAG, "protected": True})
        alyx.rest("datasets", "partial_update", id=found[0]["url"], data={"tags": [_TAG]})
        self._say("Alyx", f"{_CHOICE} now has the tag {_TAG}, which protects it")
        return dict(found[0])

    def _revise(self, daemon: _Daemon, journal: Journal) -> None:
        self._say("rig", f"writes new content to {_CHOICE}")
        _write(self._session / _CHOICE, npy([-1.0 if n % 4 else 1.0 for n in range(400)]))

        def revised() -> bool:
            rows = {row.path: row.state for row in self._rows(journal)}
            revisions = [path for path in rows if _is_revision(path)]
            return (
                daemon.logged("file.moved") and self._is_done(journal) and _CHOICE not in rows
                and [rows[path] for path in revisions] == [FileState.REGISTERED]
            )  # fmt: skip

        daemon.wait_for("the new content is registered as a revision", revised)

    def _rows(self, journal: Journal) -> list[FileRow]:
        known = journal.known(self._name)
        return list(known[1].values()) if known else []

    def _is_done(self, journal: Journal) -> bool:
        row = journal.session(self._name)
        return row is not None and row.state is SessionState.DONE

    def _ask(self, alyx: AlyxClient) -> _Held:
        found = alyx.rest("sessions", "list", subject=_SUBJECT)
        sessions = [alyx.rest("sessions", "read", id=s["url"]) for s in found]
        datasets = alyx.rest("datasets", "list")
        datasets.sort(key=lambda d: (d["collection"], d["name"], d["revision"] or ""))
        return _Held(sessions, datasets)

    def _on_disk(self) -> list[Path]:
        return sorted(path for path in self._session.rglob("*") if path.is_file())

    def _checks(
        self, held: _Held, original: dict[str, Any], journal: Journal
    ) -> Iterator[tuple[str, bool]]:
        """Yield everything that must be so, and whether it is."""
        recorded = {path.relative_to(self._session).as_posix(): path for path in self._on_disk()}
        refused = [row.path for row in self._rows(journal) if row.state is FileState.REFUSED]
        registered = {name: path for name, path in recorded.items() if name != _UNKNOWN}
        on_alyx = {_path(dataset): dataset for dataset in held.datasets}
        yield "the session is on Alyx, once", len(held.sessions) == 1
        yield (
            f"{len(registered)} files and the protected original are on Alyx, each once",
            sorted([*registered, _CHOICE]) == sorted(map(_path, held.datasets)),
        )
        yield (
            "each has the size and the MD5 of the file on the disk",
            all(_agrees(on_alyx.get(name), path) for name, path in registered.items()),
        )
        kept = on_alyx.get(_CHOICE, {})
        yield (
            "the protected original is as it was",
            bool(kept.get("protected")) and kept.get("hash") == original["hash"],
        )
        revisions = [on_alyx[path] for path in on_alyx if _is_revision(path)]
        yield (
            "its revision is the one that is loaded from now on",
            [d["default_dataset"] for d in revisions] == [True] and not kept["default_dataset"],
        )
        yield "the flag is gone", not self._flag.exists()
        yield "the file of unknown type is left alone and reported", refused == [_UNKNOWN]

    # --- showing ---------------------------------------------------------------------------------

    def _heading(self, text: str) -> None:
        self.console.print()
        self.console.rule(f"[bold]{escape(text)}", align="left", style="dim")

    def _say(self, who: str, text: str) -> None:
        grid = _grid(4, 8)
        grid.add_row(f"[bold cyan]{who}[/]", f"[dim]{_clock()}[/]", escape(text))
        self.console.print(grid)

    def _show_log(self, facts: dict[str, Any]) -> None:
        grid = _grid(4, 8, 15)
        style = {"warning": "yellow", "error": "red"}.get(str(facts.get("level")), "green")
        grid.add_row(
            "[bold]regd[/]",
            f"[dim]{_clock(facts.get('timestamp'))}[/]",
            f"[{style}]{escape(facts['event'])}[/]",
            escape(_details(facts, self.console.width - 31)),
        )
        self.console.print(grid)

    def _show_tree(self) -> None:
        tree = Tree(f"[bold]{self._name}[/]", guide_style="dim")
        branches: dict[Path, Tree] = {self._session: tree}
        for path in self._on_disk():
            name = path.relative_to(self._session).as_posix()
            note = "  [yellow]not registered: unknown type[/]" if name == _UNKNOWN else ""
            style = "green" if _is_revision(name) else ""
            label = f"[{style or 'none'}]{escape(path.name)}[/]"
            size = f"[dim]{_size(path.stat().st_size)}[/]"
            _branch(branches, path.parent).add(f"{label}  {size}{note}")
        self.console.print(tree)

    def _show_alyx(self, held: _Held) -> None:
        sessions = _table("session", "lab", "users", "id")
        for s in held.sessions:
            place = f"{s['subject']}/{s['start_time'][:10]}/{s['number']:03d}"
            sessions.add_row(place, s["lab"], ", ".join(s["users"]), s["id"])
        self.console.print(sessions)
        self.console.print()
        wide = self.console.width >= 120
        datasets = _table("dataset", "revision", "size", "MD5", "marked")
        datasets.columns[2].justify = "right"
        collection = None
        for d in held.datasets:
            if d["collection"] != collection:
                collection = d["collection"]
                datasets.add_row(f"[bold]{escape(collection)}/[/]")
            marks = {"protected": d["protected"], "default": d["default_dataset"]}
            datasets.add_row(
                f" {escape(d['name'])}",
                escape(d["revision"] or ""),
                _size(d["file_size"]),
                d["hash"] if wide else d["hash"][:6],
                ", ".join(word for word, holds in marks.items() if holds),
                style="green" if d["revision"] else "",
            )
        self.console.print(datasets)

    def _show_status(self) -> None:
        done = subprocess.run(  # noqa: S603 - this very program
            [sys.executable, "-m", "regd", "status", "--config", str(self._config)],
            env={**_environment(), "COLUMNS": str(self.console.width)},
            check=False,
        )
        if done.returncode:
            raise DemoFailed(f"regd status ended with status {done.returncode}")

    def _show_checks(self, checks: Sequence[tuple[str, bool]]) -> None:
        for text, holds in checks:
            self.console.print(f"{'[green]yes[/]' if holds else '[bold red]NO [/]'} {escape(text)}")
        wrong = [text for text, holds in checks if not holds]
        if wrong:
            raise DemoFailed(f"this is not so: {'; '.join(wrong)}", hint=f"see {self._log}")


def _settings(data: Path, state: Path, url: str) -> str:
    """Return the settings file of the demo; a path in JSON's quotes is a path in YAML's."""
    return f"""\
# Settings of the demo. What is not here is as on a rig; waiting times are shorter, to be seen.
data_root: {json.dumps(str(data))}
state_dir: {json.dumps(str(state))}
repository: {_REPOSITORY}
alyx:
  url: {url}
  username: {_RIG_USER}
  password: {_RIG_PASSWORD}  # opens nothing but a sandbox; a real one goes into a secret file
settle:
  quiet_s: 2
  closed_quiet_s: 0.5
scan:
  every_s: 5
log:
  format: json
"""


def _show_what_next(console: Console, folder: Path, url: str) -> None:
    beside = Path(sys.executable).with_name("regd")
    regd = _shown(beside) if beside.exists() else f"{_shown(Path(sys.executable))} -m regd"
    port = url.rpartition(":")[2]
    console.print()
    console.rule("[bold]Where to look next", align="left", style="dim")
    for line in (
        f"What the daemon logged:  {folder / 'regd.log'}",
        f"Its settings:            {folder / 'regd.yaml'}",
        f"To go on by hand, start these two, and write to {folder / 'data'}:",
        f"    {regd} sandbox --db {folder / 'alyx.sqlite'} --port {port}",
        f"    {regd} run --config {folder / 'regd.yaml'}",
        f"To remove it all:        {regd} demo --clean --folder {folder}",
    ):
        console.print(escape(line), soft_wrap=True)


def _shown(path: Path) -> str:
    """Return a path as it is typed from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _path(dataset: dict[str, Any]) -> str:
    """Return a dataset's path below its session folder."""
    return DatasetPath(dataset["collection"], dataset["revision"] or "", dataset["name"]).path


def _is_revision(path: str) -> bool:
    """Say whether a path is that of a revision of the dataset that the demo protects."""
    folder, name = _CHOICE.split("/")
    parts = path.split("/")
    return len(parts) == 3 and (parts[0], parts[2]) == (folder, name) and parts[1].startswith("#")


def _agrees(dataset: dict[str, Any] | None, path: Path) -> bool:
    if dataset is None or dataset["file_size"] != path.stat().st_size:
        return False
    with path.open("rb") as file:  # by itself: what regd makes of a file is what is checked
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    return bool(dataset["hash"] == md5.hexdigest())


def _branch(branches: dict[Path, Tree], folder: Path) -> Tree:
    if folder not in branches:
        parent = _branch(branches, folder.parent)
        style = "green" if folder.name.startswith("#") else "bold"
        branches[folder] = parent.add(f"[{style}]{escape(folder.name)}/[/]")
    return branches[folder]


def _grid(*widths: int) -> Table:
    """Return a line of columns; the last one takes what is left, and wraps within itself."""
    grid = Table.grid(padding=(0, 1))
    for width in widths:
        grid.add_column(min_width=width, no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for column in table.columns:
        column.overflow = "fold"
    return table


def _details(facts: dict[str, Any], width: int) -> str:
    """Return what a log line says beside its event, without what is the same all the time."""
    same = {"timestamp", "level", "event", "logger", "session", "eid", "attempt", "id", "path"}
    words = [_broken(str(facts["path"]), width)] if "path" in facts else []
    if facts["event"] == "session.created":
        words += [str(facts.get("session")), f"eid={facts.get('eid')}"]
    for key, value in facts.items():
        if key == "size_bytes":
            words.append(_size(value))
        elif key == "target":
            words.append(f"to {value}")
        elif key not in same:
            words.append(f"{key}={value}")
    return " ".join(words)


def _broken(path: str, width: int) -> str:
    """Return a path that is too long for a line with its name on a line of its own."""
    folder, slash, name = path.rpartition("/")
    return path if len(path) <= width else f"{folder}{slash}\n{name}"


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} GB"


def _clock(timestamp: object = None) -> str:
    now = datetime.datetime.now().astimezone()
    moment = datetime.datetime.fromisoformat(timestamp) if isinstance(timestamp, str) else now
    return moment.astimezone().strftime("%H:%M:%S")
