"""An acquisition PC for tests: a data root, settings, and an Alyx to register on.

The Alyx is the sandbox, or the one that REGD_TEST_ALYX_URL names (with REGD_TEST_ALYX_USER and
REGD_TEST_ALYX_PASSWORD): a database for trials, since sessions are made in it and stay.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regd.alyx import AlyxClient
from regd.journal import FILE_NAME, Journal
from regd.registration import RegistrationClient
from regd.service import Service, lock, unfinished
from regd.settings import Settings

QUIET_S, CLOSED_QUIET_S = 0.6, 0.1
DATASETS = (
    "alf/_ibl_wheel.position.npy",
    "alf/_ibl_wheel.timestamps.npy",
    "alf/spikes.times.npy",
    "alf/probe00/spikes.times.npy",
    "raw_behavior_data/_iblrig_taskData.raw.jsonable",
    "_ibl_experiment.description.yaml",
)


@dataclass
class Lab:
    """An Alyx, and what of it the tests use."""

    url: str
    username: str
    password: str
    subject: str
    lab: str
    repository: str
    client: AlyxClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = AlyxClient(
            self.url, self.username, self.password, requests_per_minute=None, timeout_s=30
        )

    def sessions(self, date: str) -> list[dict[str, Any]]:
        query = {"subject": self.subject, "date_range": f"{date},{date}"}
        return sorted(self.client.pages("/sessions", query), key=lambda s: s["number"])

    def datasets(self, eid: str) -> dict[str, dict[str, Any]]:
        """Return a session's datasets by their path below it."""
        found = {}
        for record in self.client.pages("/datasets", {"session": eid}):
            revision = f"#{record['revision']}#/" if record["revision"] else ""
            folder = f"{record['collection']}/" if record["collection"] else ""
            found[f"{folder}{revision}{record['name']}"] = record
        return found

    def protect(self, eid: str, *paths: str) -> None:
        """Tag datasets so that they may not be overwritten."""
        tag = f"regd-test-{uuid.uuid4()}"  # hypothesis has `random` repeat itself
        self.client.post("/tags", {"name": tag, "protected": True})
        datasets = self.datasets(eid)
        for path in paths:
            self.client.patch(f"/datasets/{datasets[path]['url'][-36:]}", {"tags": [tag]})


def real_lab() -> Lab | None:
    """Return the Alyx that the environment names, or None."""
    url = os.environ.get("REGD_TEST_ALYX_URL")
    if not url:
        return None
    user = os.environ.get("REGD_TEST_ALYX_USER", "test_user")
    password = os.environ["REGD_TEST_ALYX_PASSWORD"]
    with AlyxClient(url, user, password) as client:
        for subject in client.pages("/subjects"):
            if not subject["lab"]:
                continue
            repositories = client.get(f"/labs/{subject['lab']}")["repositories"]
            if repositories:
                lab = subject["lab"]
                return Lab(url, user, password, subject["nickname"], lab, repositories[-1])
    raise RuntimeError(f"{url} has no subject whose lab has a data repository")


class Rig:
    """A data root, the daemon's settings for it, and ways to record into it."""

    def __init__(self, folder: Path, lab: Lab, **settings: Any) -> None:
        self.lab = lab
        self.root = folder / "data"
        self.root.mkdir(parents=True, exist_ok=True)
        day = random.randrange(0, 40 * 365)  # so that runs against one Alyx do not meet
        self.date = time.strftime("%Y-%m-%d", time.gmtime(day * 86400))
        values: dict[str, Any] = {
            "data_root": self.root,
            "state_dir": folder / "state",
            "repository": lab.repository,
            "alyx": {
                "url": lab.url,
                "username": lab.username,
                "password": lab.password,
                "requests_per_minute": None,
            },
            "settle": {"quiet_s": QUIET_S, "closed_quiet_s": CLOSED_QUIET_S},
            "retry": {"first_s": 0.05, "longest_s": 0.2, "attempts": 3},
        }
        self.settings = Settings(**{**values, **settings})

    def folder(self, number: int = 1) -> Path:
        """Return a session's folder, not yet made."""
        lab, subject = self.lab.lab, self.lab.subject
        return self.root / lab / "Subjects" / subject / self.date / f"{number:03d}"

    def record(self, number: int = 1, *, flag: bool = True, names: Any = DATASETS) -> Path:
        """Record a session as a rig does: files, then the flag."""
        folder = self.folder(number)
        for name in names:
            write(folder / name, f"{number} {name}".encode())
        if flag:
            (folder / "create_me.flag").touch()
        return folder

    @contextmanager
    def running(self, **injected: Any) -> Iterator[Service]:
        """Run the daemon in this process."""
        stop = threading.Event()
        with lock(self.settings.state_dir), Service(self.settings, stop, **injected) as service:
            thread = threading.Thread(target=service.run)
            thread.start()
            try:
                yield service
            finally:
                stop.set()
                thread.join(timeout=10)
                assert not thread.is_alive()

    def scan(self, *, everything: bool = False, **injected: Any) -> Journal:
        """Do what `regd scan` does, and return the journal for reading."""
        stop = threading.Event()
        with lock(self.settings.state_dir), Service(self.settings, stop, **injected) as service:
            service.run_once(everything=everything)
        return self.journal()

    @contextmanager
    def by_hand(self, clock: Clock, now: Callable[[], float] | None = None) -> Iterator[Service]:
        """Yield the daemon, which does nothing but what `step` is called for, in that time.

        Args:
            now: The wall clock, where it is not as steady as `clock`.
        """
        alyx = AlyxClient.from_settings(
            self.settings, clock=clock, sleep=clock.sleep, chance=lambda: 0.5
        )
        client = RegistrationClient(alyx, chunk_files=self.settings.register.chunk_files)
        stop = threading.Event()
        with (
            lock(self.settings.state_dir),
            Service(
                self.settings,
                stop,
                client=client,
                now=now or clock,
                clock=clock,
                chance=lambda: 0.5,
            ) as service,
        ):
            yield service

    def journal(self) -> Journal:
        return Journal(self.settings.state_dir / FILE_NAME, now=time.time, read_only=True)

    def lose_journal(self) -> None:
        for file in self.settings.state_dir.glob(FILE_NAME + "*"):
            file.unlink()

    def eid(self, number: int = 1) -> str:
        (session,) = [s for s in self.lab.sessions(self.date) if s["number"] == number]
        return str(session["id"])

    def held(self, number: int = 1) -> dict[str, dict[str, Any]]:
        """Return what Alyx holds of a session, by path."""
        return self.lab.datasets(self.eid(number))


def write(path: Path, content: bytes) -> None:
    """Write a file, making its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def until(happened: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + timeout_s
    while not (result := happened()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)  # another thread or process is at work, and nothing tells of its end
    return result


def idle(service: Service) -> bool:
    """Say whether the daemon has nothing left that time alone will finish."""
    return not unfinished(service.journal)


class Clock:
    """Time that passes only when it is told to, so that a weekend takes no time."""

    def __init__(self) -> None:
        self._now = time.time() + 3600  # what is recorded now has settled

    def __call__(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds
