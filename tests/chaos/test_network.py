"""What must hold when the network lies: requests and answers that get lost, late or forged.

A proxy stands between regd and Alyx and fails by a plan. regd is driven by hand in a time that is
made up, so that its waits take none; the requests and what they do are real.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regd.errors import AlyxAway
from regd.model import FileState, SessionState
from regd.registration import RegistrationClient
from regd.sandbox.server import Server
from regd.service import Service
from tests import chaos
from tests.chaos import times
from tests.chaos.proxy import FAULTS, LATE_S, Plan, Proxy
from tests.conftest import INITIAL
from tests.rig import DATASETS, Clock, Lab, Rig, md5, write

FILE, OTHER = DATASETS[:2]
NEW = "alf/probe01/spikes.times.npy"
TRIES = 60  # more attempts than a run draws faults: whether one parks is not asked here
_DAYS = count()


@pytest.fixture(scope="module")
def alyx() -> Iterator[Lab]:
    """One Alyx for all runs of this module; each has a day of its own."""
    with Server(load=INITIAL, rate_limit=None) as server:
        lab = Lab(server.url, "rig_user", "rig-password", "ZM_1085", "mainenlab", "mainenlab_local")
        with lab.client:
            yield lab


class Run:
    """A rig behind the proxy, worked by hand until nothing is left to do."""

    def __init__(self, folder: Path, lab: Lab, *, stalls: bool = False) -> None:
        self.clock = Clock()
        self.proxy = Proxy(lab.url, clock=self.clock)
        self.rig = Rig(
            folder,
            lab,
            alyx={
                "url": self.proxy.url,
                "username": lab.username,
                "password": lab.password,
                "requests_per_minute": None,
                "timeout_s": 1.0 if stalls else 20.0,
            },
            register={"chunk_files": 4},
            retry={"attempts": TRIES},
        )
        self.rig.date = str(datetime.date(1971, 1, 1) + datetime.timedelta(next(_DAYS)))
        self.recorded: dict[str, bytes] = {}
        self.only_on_alyx: dict[str, bytes] = {}

    def write(self, path: str, content: bytes) -> None:
        write(self.rig.folder() / path, content)
        self.recorded[path] = content

    def flag(self) -> None:
        (self.rig.folder() / "create_me.flag").touch()

    def finish(self, plan: Plan | None = None, *, recover: bool = False) -> int:
        """Have regd start, scan and do all its work; return how many requests that took.

        Args:
            plan: What the proxy fails on.
            recover: Whether regd died before.
        """
        before = len(self.proxy.asked)
        self.proxy.plan = lambda n, *what: plan(n - before, *what) if plan else None
        with self.rig.by_hand(self.clock) as service:
            if recover:
                service._recover()
            service.scanner.scan(self.clock())
            deadline = self.clock() + 6 * 3600
            while service.step() or is_left(service):
                self.proxy.deliver()
                self.clock.sleep(0.5)
                assert self.clock() < deadline, service.journal.sessions()
            for row in service.journal.sessions():
                assert row.state is SessionState.DONE, row
                states = {r.state for r in service.journal.files(row.id).values()}
                assert states <= {FileState.REGISTERED}
        self.clock.sleep(LATE_S)
        self.proxy.deliver()  # the latest of all
        return len(self.proxy.asked) - before

    def check(self) -> None:
        """Hold what Alyx and the disk have against what was recorded."""
        (session,) = self.rig.lab.sessions(self.rig.date)
        folder = self.rig.folder()
        on_disk = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        assert {path: file.read_bytes() for path, file in on_disk.items()} == self.recorded
        records = list(self.rig.lab.client.pages("/datasets", {"session": session["id"]}))
        held = self.rig.held()
        assert len(records) == len(held)
        wanted = {path: (md5(file), file.stat().st_size) for path, file in on_disk.items()}
        found = {path: (record["hash"], record["file_size"]) for path, record in held.items()}
        assert {path for path in found if path not in wanted} == set(self.only_on_alyx)
        assert {path: found[path] for path in wanted} == wanted
        for path, content in self.only_on_alyx.items():
            assert found[path][1] == len(content)


def is_left(service: Service) -> bool:
    sessions, _ = service.journal.counts()
    busy = sessions[SessionState.WAITING] + sessions[SessionState.WORKING]
    return bool(busy) or service.gate.error is not None


def new(run: Run) -> None:
    """A new session, whose files take two requests."""
    for name in DATASETS:
        run.write(name, name.encode())
    run.flag()


def changed(run: Run) -> None:
    """A known session with a changed and a new file."""
    new(run)
    run.finish()
    run.write(FILE, b"made anew")
    run.write(NEW, b"new")


def protected(run: Run) -> None:
    """A flagged session with a protected file that changed, one that did not, and a new one."""
    new(run)
    run.finish()
    run.rig.lab.protect(run.rig.eid(), FILE, OTHER)
    run.only_on_alyx[FILE] = run.recorded.pop(FILE)
    write(run.rig.folder() / FILE, b"recomputed")
    run.recorded[f"alf/#{datetime.date.today()}#/_ibl_wheel.position.npy"] = b"recomputed"
    run.write(NEW, b"new")
    run.flag()


def unknown(run: Run) -> None:
    """A registered session whose journal was lost, with a protected file that did not change."""
    protected(run)
    run.finish()
    run.rig.lose_journal()
    run.write("alf/probe00/spikes.times.npy", b"made anew")


SCENARIOS: tuple[Callable[[Run], None], ...] = (new, changed, protected, unknown)


def disturbed(folder: Path, lab: Lab, scenario: Callable[[Run], None], plan: Plan, **how: bool):
    run = Run(folder, lab, **how)
    with run.proxy:
        scenario(run)
        try:
            run.finish(plan)
            run.check()
        except BaseException as error:
            error.add_note("\n".join(f"{n} {what}" for n, what in enumerate(run.proxy.asked)))
            raise


@pytest.fixture(scope="module")
def requests(
    alyx: Lab, tmp_path_factory: pytest.TempPathFactory
) -> dict[Callable[[Run], None], int]:
    """How many requests each scenario takes where nothing fails."""
    found = {}
    for scenario in SCENARIOS:
        run = Run(tmp_path_factory.mktemp("undisturbed"), alyx)
        with run.proxy:
            scenario(run)
            found[scenario] = run.finish()
            run.check()
    return found


def cases() -> Iterator[Any]:
    """Yield every fault with every scenario; in the short run, with one of them."""
    for number, fault in enumerate(FAULTS):
        for scenario in SCENARIOS:
            if chaos.TIMES is not None or scenario is SCENARIOS[number % len(SCENARIOS)]:
                yield pytest.param(scenario, fault, id=f"{scenario.__name__}-{fault}")


@pytest.mark.parametrize(("scenario", "fault"), list(cases()))
def test_one_fault(
    scenario: Callable[[Run], None],
    fault: str,
    requests: dict[Callable[[Run], None], int],
    alyx: Lab,
    tmp_path: Path,
) -> None:
    """A fault at each request; in the short run, at one of them."""
    points = range(requests[scenario])
    if chaos.TIMES is None:
        points = points[FAULTS.index(fault) // len(SCENARIOS) % len(points) :][:1]
    for point in points:
        disturbed(
            tmp_path / str(point),
            alyx,
            scenario,
            lambda n, *_, at=point: fault if n == at else None,
            stalls=fault == "stall",
        )


@pytest.mark.parametrize("then", ["429", "drop", "redirect", "500 in JSON", None])
def test_a_session_on_its_way_is_waited_for(then: str | None, alyx: Lab, tmp_path: Path) -> None:
    """Its creation is late, and so it stays while Alyx is away or asks to wait."""
    late: list[int] = []

    def plan(n: int, method: str, path: str) -> str | None:
        if (method, path) == ("POST", "/sessions") and not late:
            late.append(n)
            return "late"
        return then if late and n <= late[0] + 6 else None

    disturbed(tmp_path, alyx, new, plan)


class Dies(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("then", [None, "drop"])
def test_a_session_on_its_way_when_regd_dies_is_not_created_again(
    then: str | None, alyx: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RegistrationClient.create_session

    def dies(*what: Any) -> None:
        with contextlib.suppress(AlyxAway):
            real(*what)
        raise Dies

    run = Run(tmp_path, alyx)
    with run.proxy:
        new(run)
        run.proxy.plan = lambda _, *what: "late" if what == ("POST", "/sessions") else None
        with run.rig.by_hand(run.clock) as service, monkeypatch.context() as patched:
            patched.setattr(RegistrationClient, "create_session", dies)
            service.scanner.scan(run.clock())
            with pytest.raises(Dies):
                service.step()
        run.finish(lambda n, *_: then if n < 6 else None, recover=True)
        run.check()
    assert sum(what[:2] == ("POST", "/sessions") for what in run.proxy.asked) == 1


def test_a_file_on_its_way_does_not_arrive_after_a_newer_one(alyx: Lab, tmp_path: Path) -> None:
    late: list[int] = []

    def plan(n: int, method: str, path: str) -> str | None:
        if path != "/register-file" or late:
            return None
        late.append(n)
        run.write(FILE, b"made anew while its registration is on its way")
        return "late"

    run = Run(tmp_path, alyx)
    with run.proxy:
        changed(run)
        run.finish(plan)
        run.check()


@pytest.mark.parametrize("fault", ["drop the answer", "504 after the effect"])
def test_what_alyx_got_is_not_posted_again(fault: str, alyx: Lab, tmp_path: Path) -> None:
    posted: list[int] = []

    def plan(n: int, method: str, path: str) -> str | None:
        if path != "/register-file":
            return None
        posted.append(n)
        return fault if len(posted) == 1 else None

    disturbed(tmp_path, alyx, new, plan)
    assert len(posted) == 2  # what six files take, four at a time


QUICK = tuple(fault for fault in FAULTS if fault not in ("stall", "dribble"))


@given(
    scenario=st.sampled_from(SCENARIOS),
    faults=st.lists(st.none() | st.sampled_from(QUICK), max_size=24),
)
@settings(
    max_examples=times(15),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_many_faults(
    scenario: Callable[[Run], None],
    faults: list[str | None],
    alyx: Lab,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    disturbed(
        tmp_path_factory.mktemp("many"),
        alyx,
        scenario,
        lambda n, *_: faults[n] if n < len(faults) else None,
    )
