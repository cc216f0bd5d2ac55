"""The Alyx stand-in as a process, settings for it, and requests recorded and replayed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import httpx

from bench.measure import PROJECT, Failed, running
from regd.alyx import AlyxClient
from regd.logs import configure as configure_logs
from regd.registration import RegistrationClient
from regd.service import Service, lock
from regd.settings import Settings, load

USER, PASSWORD = "test_user", "test-password"
LAB, SUBJECT, REPOSITORY = "cortexlab", "KS005", "cortexlab_local"
DATE = "2024-05-17"
REGD = (sys.executable, "-m", "regd")
# what a session of each run needs, whatever it registers
_OPENING = ("/auth-token", "/dataset-types", "/data-formats")


@contextmanager
def sandbox(log: Path) -> Iterator[str]:
    """Yield the address of a stand-in with an empty database, in a process of its own."""
    lab = PROJECT / "regd" / "sandbox" / "data" / "default_lab.json"
    command = [*REGD, "sandbox", "--port", "0", "--rate-limit", "none", "--load", str(lab)]
    with running(command, log, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.readline().decode()
        found = re.search(r"http://\S+", first)
        if not found:
            raise Failed(f"the stand-in did not start: {log.read_text()}")
        yield found[0]


def configure(folder: Path, root: Path, url: str, **sections: Any) -> Path:
    """Write settings for regd with its state in `folder`; return the file.

    Files count as finished at once: what is measured is regd's work, not its patience.
    """
    values: dict[str, Any] = {
        "data_root": str(root),
        "state_dir": str(folder / "state"),
        "repository": REPOSITORY,
        "alyx": {
            "url": url,
            "username": USER,
            "password": PASSWORD,
            "requests_per_minute": None,
        },
        "settle": {"quiet_s": 0, "closed_quiet_s": 0},
        "log": {"format": "json"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "regd.yaml"
    path.write_text(json.dumps({**values, **sections}))  # JSON is YAML
    path.chmod(0o600)
    return path


def names(count: int) -> list[str]:
    """Return that many paths of datasets below a session, all of which the stand-in takes."""
    objects = {
        "alf": (
            *("trials.intervals", "trials.choice", "trials.feedbackType", "trials.rewardVolume"),
            *("wheel.position", "wheel.timestamps", "licks.times", "trials.goCue_times"),
        ),
        "alf/probe00": (
            *("spikes.times", "spikes.clusters", "spikes.amps", "spikes.depths"),
            *("clusters.channels", "clusters.depths", "clusters.peakToTrough", "clusters.amps"),
        ),
        "alf/mesoscope": (
            *("mpci.times", "mpci.badFrames", "mpciROIs.masks", "mpciROIs.uuids"),
            *("mpciROIs.stackPos", "mpciMeanImage.images"),
        ),
    }
    each = [f"{collection}/{name}.npy" for collection in objects for name in objects[collection]]
    rounds = range(-(-count // len(each)))
    numbered = [
        re.sub("^alf", f"alf{n:04d}" if n else "alf", path) for n in rounds for path in each
    ]
    return numbered[:count]


def record(root: Path, sessions: int, files: int, size: int, *, flag: bool = True) -> None:
    """Write sessions below a data root, as a rig leaves them."""
    content = bytes(range(256)) * (size // 256 + 1)
    for number in range(1, sessions + 1):
        folder = session_folder(root, number)
        for n, name in enumerate(names(files)):
            path = folder / name
            if not path.parent.exists():
                path.parent.mkdir(parents=True)
            # no two files are the same
            path.write_bytes(f"{number} {n} ".encode().ljust(24) + content[: size - 24])
        if flag:
            (folder / "create_me.flag").touch()


def session_folder(root: Path, number: int) -> Path:
    """Return the folder of the session of that number, 999 of them a day."""
    day, number = divmod(number - 1, 999)
    date = f"{2024 + day // 28:04d}-05-{day % 28 + 1:02d}"
    return root / LAB / "Subjects" / SUBJECT / date / f"{number + 1:03d}"


@dataclass
class Recording(httpx.BaseTransport):
    """Sends requests as usual, and keeps them by the thread that sent them."""

    inner: httpx.BaseTransport = field(default_factory=httpx.HTTPTransport)
    kept: list[tuple[str, httpx.Request]] = field(default_factory=list)
    took_s: float = 0.0
    """What regd took for all of it, start-up left out."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.kept.append((threading.current_thread().name, request))
        return self.inner.handle_request(request)

    def opening(self) -> list[httpx.Request]:
        """Return the requests that are sent once a run."""
        return [request for _, request in self.kept if request.url.path in _OPENING]

    def sessions(self) -> list[list[httpx.Request]]:
        """Return the other requests, in order, for each session."""
        found: list[list[httpx.Request]] = []
        latest: dict[str, list[httpx.Request]] = {}
        for thread, request in self.kept:
            if request.url.path in _OPENING:
                continue
            if (request.method, request.url.path) == ("GET", "/sessions"):
                latest[thread] = []
                found.append(latest[thread])
            latest[thread].append(request)
        return found


def record_requests(config: Path) -> Recording:
    """Do what `regd scan` does, in this process, and return the requests it sent."""
    settings: Settings = load(config).settings
    log = (config.parent / "recorded.log").open("w")
    configure_logs("info", "json", stream=log)
    recording = Recording()
    alyx = AlyxClient.from_settings(settings, transport=recording)
    client = RegistrationClient(alyx, chunk_files=settings.register.chunk_files)
    stop = threading.Event()
    with lock(settings.state_dir), Service(settings, stop, client=client) as service:
        started_at = time.perf_counter()
        service.run_once(everything=False)
        recording.took_s = time.perf_counter() - started_at
    configure_logs("error", "json")
    log.close()
    return recording


@dataclass(frozen=True)
class Replayed:
    """What it took to send requests bare.

    Attributes:
        took_s: Seconds for all of them.
        ends_s: When each of the last session's requests was answered, seconds after the start.
    """

    took_s: float
    ends_s: list[float]


def replay(url: str, recording: Recording, connections: int) -> Replayed:
    """Send recorded requests bare: nothing but httpx, a session's requests in their order.

    Raises:
        Failed: The stand-in refused one.
    """
    sessions: SimpleQueue[list[httpx.Request]] = SimpleQueue()
    for each in recording.sessions():
        sessions.put(each)
    ends: list[float] = []
    wrong: list[str] = []
    with httpx.Client(base_url=url, timeout=60) as client:
        started_at = time.perf_counter()
        token = ""
        for request in recording.opening():
            answer = _send(client, request, token)
            if request.url.path == "/auth-token":
                token = answer.json()["token"]

        def work(client: httpx.Client) -> None:
            while True:
                try:
                    requests = sessions.get_nowait()
                except Empty:
                    return
                for request in requests:
                    answer = _send(client, request, token)
                    ends.append(time.perf_counter() - started_at)
                    if not answer.is_success:
                        wrong.append(f"{request.method} {request.url.path}: {answer.text[:300]}")

        clients = [httpx.Client(base_url=url, timeout=60) for _ in range(connections)]
        threads = [threading.Thread(target=work, args=(each,)) for each in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took_s = time.perf_counter() - started_at
        for one in clients:
            one.close()
    if wrong:
        raise Failed(f"{len(wrong)} requests were refused, the first: {wrong[0]}")
    return Replayed(took_s, ends)


def _send(client: httpx.Client, request: httpx.Request, token: str) -> httpx.Response:
    headers = {"Content-Type": request.headers["Content-Type"]} if request.content else {}
    if token:
        headers["Authorization"] = f"Token {token}"
    return client.request(
        request.method, request.url.raw_path.decode(), content=request.content, headers=headers
    )


def logged(log: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of regd's log."""
    with log.open("rb") as lines:
        for line in lines:
            if line.startswith(b"{"):
                yield json.loads(line)


def check_done(log: Path, sessions: int, files: int) -> None:
    """Raise Failed unless regd created so many sessions and registered so many files, each once."""
    seen: dict[str, list[tuple[Any, ...]]] = {"session.created": [], "file.registered": []}
    for facts in logged(log):
        if facts["event"] in seen:
            seen[facts["event"]].append((facts.get("session"), facts.get("path")))
    for event, count in (("session.created", sessions), ("file.registered", files)):
        got = seen[event]
        if len(got) != count or len(set(got)) != count:
            raise Failed(
                f"{event}: {len(got)} times, {len(set(got))} of them different; not {count}"
            )


class Counted:
    """How often each of some words was seen in a log, which is read once as it grows."""

    def __init__(self, log: Path, *words: bytes) -> None:
        self._log = log
        self._counts = dict.fromkeys(words, 0)
        self._read = 0

    def __call__(self) -> list[int]:
        """Return the counts, in whole lines so far."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            lines = log.read().rpartition(b"\n")[0]
        self._read += len(lines)
        for word in self._counts:
            self._counts[word] += lines.count(word)
        return [*self._counts.values()]
