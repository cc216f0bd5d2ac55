"""A crash or a power cut at any point loses nothing, and does nothing twice."""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import datetime
import itertools
import multiprocessing
import os
import random
import shutil
import sqlite3
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    rule,
    run_state_machine_as_test,
)
from starlette.middleware import Middleware

from regd.files import moving_name
from regd.journal import SessionRow
from regd.model import FileState, SessionState
from regd.sandbox.server import Server
from tests import chaos
from tests.chaos.victim import TODAY, Door, Plan, Victim
from tests.conftest import INITIAL
from tests.rig import DATASETS, Lab, Rig, md5, write

SETTINGS: dict[str, Any] = {
    "settle": {"quiet_s": 0.05, "closed_quiet_s": 0.02},
    "retry": {"first_s": 0.05, "longest_s": 0.2, "attempts": 12},
}
TAKEN = "spikes.times.npy"
VARIANTS = {
    "scan": Plan(),
    "scan, by link": Plan(by_link=True),
    "daemon": Plan(daemon=True, taken=TAKEN),
    "daemon, by link": Plan(daemon=True, by_link=True, taken=TAKEN),
}
Lives = tuple[Plan, ...]  # one after another, each with its death
Death = tuple[Lives, bool, dict[str, Any]]  # and whether changes are undone, and the outcome
SHORT, SHORT_KILLS = 12, 12  # in `make test`
LANES = 4  # side by side at full length; most of the time each waits
EXAMPLES, STEPS = 3, 12  # for each seed of the random part
FLAGGED = (2, 3, 4)
EMPTY = "d41d8cd98f00b204e9800998ecf8427e"
LATE_S = 2.0  # longer than regd takes to start, also on a busy machine
UNKNOWN_S = 0.3
PROTECTED, PLAIN, LATER = DATASETS[0], DATASETS[1], "alf/_ibl_wheel.velocity.npy"
REFUSED = "alf/sp ace/spikes.times.npy"


@contextlib.contextmanager
def an_alyx() -> Iterator[tuple[Server, Lab, Door]]:
    """Start a sandbox, and yield it with the door before it."""
    door = Door()
    between = [Middleware(door.before)]
    with Server(load=INITIAL, rate_limit=None, middleware=between) as server:
        lab = Lab(server.url, "rig_user", "rig-password", "ZM_1085", "mainenlab", "mainenlab_local")
        with lab.client:
            yield server, lab, door


class Scene:
    """A rig and an Alyx that can be put back to where they were, as often as one likes."""

    def __init__(self, folder: Path, server: Server, lab: Lab, door: Door) -> None:
        self.rig = Rig(folder / "rig", lab, workers=1, **SETTINGS)
        self.rig.date = "2001-02-03"  # the same in all scenes
        self.door = door
        self._rig, self._kept, self._store = folder / "rig", folder / "kept", server.store
        self._scratch = folder / "scratch"
        rig = self.rig
        rig.record(1, flag=False)
        for number in (2, 3):
            write(rig.record(number) / REFUSED, b"no ALF path")
        self.run(Plan())
        lab.protect(rig.eid(2), PROTECTED, *DATASETS[2:4])
        lab.protect(rig.eid(3), PROTECTED)
        for name in (PROTECTED, PLAIN, DATASETS[2]):
            write(rig.folder(2) / name, b"recomputed " + name.encode())
        write(rig.folder(2) / LATER, b"later")
        (rig.folder(2) / "create_me.flag").touch()
        write(rig.folder(3) / DATASETS[4], b"recomputed, without a flag")
        write(rig.record(4) / "alf" / "odd.thing.npy", b"of no dataset type")
        rig.record(5, flag=False)
        self._recorded = {*contents(rig).values()} - {EMPTY}
        shutil.copytree(self._rig, self._kept)
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        server.store.db.backup(self._database)

    def reset(self) -> None:
        shutil.rmtree(self._rig)
        shutil.rmtree(self._scratch)
        shutil.copytree(self._kept, self._rig)
        self._database.backup(self._store.db)
        self._store._slugs.clear()
        self._store.cache.clear()
        self.door.clear()

    def victim(self, plan: Plan) -> Victim:
        return Victim(self.rig.settings, plan, self._scratch)

    def run(self, plan: Plan) -> tuple[bool, Victim]:
        victim = self.victim(plan)
        return victim.end(), victim

    def check_nothing_is_forgotten(self) -> None:
        """Check what must hold while regd is dead: of a session without a flag all is known."""
        there = contents(self.rig)
        assert self._recorded <= {*there.values()}, "bytes were lost"
        with self.rig.journal() as journal:
            for number in FLAGGED:
                folder = self.rig.folder(number).relative_to(self.rig.root).as_posix()
                if f"{folder}/create_me.flag" in there:
                    continue
                row = journal.session(folder)
                assert row is not None, f"{folder} has no flag, and is not in the journal"
                rows = journal.files(row.id)
                moves = {(path, file.move_to) for path, file in rows.items() if file.move_to}
                known = {*rows, *(end for path, to in moves for end in (to, moving_name(path)))}
                unknown = {
                    path
                    for path, digest in there.items()
                    if path.startswith(f"{folder}/") and digest != EMPTY
                    if path.removeprefix(f"{folder}/") not in known
                }
                assert not unknown, f"{unknown} may never be registered"

    def check_death(self, lives: Lives, expected: dict[str, Any], *, undo: bool) -> int:
        """Die as planned and go on; return how often it has died, and see all is as expected."""
        self.reset()
        death = f"{lives}, {undo=}"
        killed = 0
        try:
            for plan in lives:
                victim = self.victim(plan)
                killed += victim.end(undo=undo)
                self.check_nothing_is_forgotten()
                if not plan.late_s:
                    self.door.rest()
            victim = self.victim(replace(plan, at=None, late_s=0.0))
            assert not victim.end()
            self.door.rest()  # what is late may come after that
            wrong = differences(self.outcome(), expected)
            assert not wrong, f"what it is, and what it should be: {wrong}"
            assert not self.door.twice(), f"registered again: {self.door.twice()}"
        except AssertionError as error:
            raise AssertionError(f"{death}\n{error}\n{victim.log()}") from error
        return killed

    def outcome(self) -> dict[str, Any]:
        """Return all that must be the same, whatever happened on the way."""
        on_alyx = self.rig.lab.sessions(self.rig.date)
        with self.rig.journal() as journal:
            rows = journal.sessions()
            return {
                "numbers": collections.Counter(session["number"] for session in on_alyx),
                "disk": contents(self.rig),
                "alyx": {
                    (session["number"], path): (
                        record["hash"],
                        record["file_size"],
                        record["default_dataset"],
                        record["protected"],
                        [r["exists"] for r in record["file_records"]],
                    )
                    for session in on_alyx
                    for path, record in self.rig.lab.datasets(session["id"]).items()
                },
                "sessions": {r.folder[-3:]: (rests(r), r.flagged, r.eid is None) for r in rows},
                "files": {
                    (r.folder[-3:], path): (f.state, f.signature.size, f.md5, f.move_to, f.reason)
                    for r in rows
                    for path, f in journal.files(r.id).items()
                },
            }

    def close(self) -> None:
        self._database.close()


def rests(row: SessionRow) -> SessionState:
    """Return a session's state, but for that a hint of regd's own last move may have come since."""
    hinted = row.state is SessionState.WAITING and row.attempt == 0 and row.reason is None
    return SessionState.DONE if hinted else row.state


def contents(rig: Rig) -> dict[str, str]:
    """Return the MD5 of every file below the data root."""
    files = (path for path in rig.root.rglob("*") if path.is_file())
    return {path.relative_to(rig.root).as_posix(): md5(path) for path in files}


@contextlib.contextmanager
def a_scene(folder: Path) -> Iterator[Scene]:
    with an_alyx() as alyx, contextlib.closing(Scene(folder, *alyx)) as scene:
        yield scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with a_scene(tmp_path_factory.mktemp("crashes")) as scene:
        yield scene


def undisturbed(scene: Scene, plan: Plan) -> tuple[dict[str, Any], list[tuple[str, bool]]]:
    scene.reset()
    killed, victim = scene.run(plan)
    assert not killed
    return scene.outcome(), victim.passed()


def deaths(plan: Plan, passed: list[tuple[str, bool]]) -> Iterator[tuple[Lives, bool]]:
    """Yield every way to die at those points, and whether changes of folders are undone then."""
    cut = replace(plan, power_cut=True)
    seen: collections.Counter[str] = collections.Counter()
    for label, exposed in passed:
        seen[label] += 1
        # not its number: threads may change the order
        at = (label, seen[label])
        yield (replace(plan, at=at),), False
        yield (replace(cut, at=at),), True
        if exposed:
            yield (replace(cut, at=at),), False
            # a crash, and a power cut soon after
            soon = ("POST /register-file: after", 1 + seen[label] % 3)
            yield (replace(plan, at=at), replace(cut, at=soon)), True
        if label in ("POST /sessions: sent", "POST /register-file: sent"):
            yield (replace(plan, at=at, late_s=LATE_S, unknown_outcome_s=LATE_S + 0.5),), False


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[tuple[str, Any], Any]:
    """Return what is not as expected: what it is, and what it should be."""
    return {
        (part, key): (found[part].get(key), expected[part].get(key))
        for part in expected
        for key in {*found[part], *expected[part]}
        if found[part].get(key) != expected[part].get(key)
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_points_are_of_every_kind(scene: Scene, variant: str) -> None:
    plan = VARIANTS[variant]
    outcome, passed = undisturbed(scene, plan)
    move = {"link", "rename"} if plan.by_link else {"renameat2"}
    effects = {
        *("mkdir", "unlink flag", "unlink", *move),
        *("fsync folder", "fsync file", "fsync journal", "COMMIT"),
    }
    requests = {
        *("GET /sessions", "POST /sessions", "GET /datasets", "GET /dataset-types"),
        *("GET /data-formats", "POST /register-file", "POST /auth-token"),
        *(("GET /data-repository/mainenlab_local",) if plan.daemon else ()),
    }
    assert {label for label, _ in passed} == {
        *(f"{effect}: {when}" for effect in effects for when in ("before", "after")),
        *(f"{request}: {when}" for request in requests for when in ("before", "sent", "after")),
    }
    # the scene holds what it says
    moved = {path for number, path in outcome["alyx"] if "#" in path}
    other = f"alf/#{TODAY}a#/{TAKEN}" if plan.taken else f"alf/#{TODAY}#/{TAKEN}"
    assert moved == {f"alf/#{TODAY}#/{Path(PROTECTED).name}", other}
    empty = [path for path, digest in outcome["disk"].items() if digest == EMPTY]
    assert len(empty) == bool(plan.taken)
    assert outcome["sessions"]["005"][0] == "held"
    assert not any(path.endswith(".flag") for path in outcome["disk"])
    refused = {path for (_, path), (state, *_) in outcome["files"].items() if state == "refused"}
    taken = f"alf/#{TODAY}#/{TAKEN}"
    assert refused == {REFUSED, "alf/odd.thing.npy", *([taken] if plan.taken else [])}


def test_regd_goes_on_after_a_crash_or_a_power_cut_at_any_point(
    scene: Scene, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    all_deaths: list[Death] = []
    for plan in VARIANTS.values():
        expected, passed = undisturbed(scene, plan)
        all_deaths += [(death, undo, expected) for death, undo in deaths(plan, passed)]
    if chaos.TIMES is not None:
        killed = sum(side_by_side(die, all_deaths, open_scene, tmp_path))
    else:
        chance = random.Random(pytestconfig.getoption("--hypothesis-seed"))
        every = len(all_deaths) // SHORT
        few = all_deaths[chance.randrange(every) :: every]
        killed = sum(scene.check_death(lives, expected, undo=undo) for lives, undo, expected in few)
    print(f"{killed} kills at {len(all_deaths)} points")


def side_by_side(
    work: Callable[..., int],
    items: Iterable[tuple[Any, ...]],
    setup: Callable[[Path], None],
    folder: Path,
) -> Iterator[int]:
    """Yield what `work` returns for each of the items, done by a few processes after `setup`."""
    processes = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(LANES, processes, setup, (folder,)) as pool:
        begun: collections.deque[Future[int]] = collections.deque()
        try:
            for item in items:
                begun.append(pool.submit(work, *item))
                if len(begun) > 2 * LANES:
                    yield begun.popleft().result()
            for future in begun:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_lane: Any  # the scene or the Alyx of this process, if it is one of several
_ends = contextlib.ExitStack()
atexit.register(_ends.close)


def open_scene(folder: Path) -> None:
    global _lane
    _lane = _ends.enter_context(a_scene(folder / f"{os.getpid()}"))


def die(lives: Lives, undo: bool, expected: dict[str, Any]) -> int:
    return int(_lane.check_death(lives, expected, undo=undo))


# --- at random -----------------------------------------------------------------------------------

NAMES = (*DATASETS[:4], LATER)
NUMBERS = st.integers(1, 3)
_EXCHANGE, _NOREPLACE = 2, 1
_libc = ctypes.CDLL(None, use_errno=True)


Deed = tuple[str, int, int]
DEEDS = st.tuples(
    st.sampled_from(
        ["record", "record", "flag", "change", "change", "save_again", "delete", "protect"]
    ),
    st.integers(1, 3),  # the session's number
    st.integers(0, 1000),  # which of its files, or of all
)
LIFE = {
    "before": st.lists(DEEDS, min_size=1, max_size=6),
    "meanwhile": st.lists(DEEDS, max_size=3),
    "after_s": st.floats(0, 0.2),
    "undo": st.booleans(),
}


def plans(*, daemon: bool) -> st.SearchStrategy[Plan]:
    return st.builds(
        Plan,
        at=st.integers(1, 80),
        power_cut=st.booleans(),
        daemon=st.just(daemon),
        by_link=st.booleans(),
        workers=st.integers(1, 4),
        late_s=st.sampled_from([0.0, 0.0, 0.1]),
        unknown_outcome_s=st.just(UNKNOWN_S),
    )


class Recordings(RuleBasedStateMachine):
    """People record, change, protect and delete, while regd runs, dies and starts again.

    What is done to a file here is done by exchanging names, so that it is always known which bytes
    went, even where regd moves the file at that moment.
    """

    days = itertools.count(1)
    kills = 0

    def __init__(self, folder: Path, server: Server, lab: Lab, door: Door) -> None:
        super().__init__()
        day = next(self.days)
        folder = folder / str(day)
        self.bin, self.scratch = folder / "bin", folder / "scratch"
        self.store, self.door = server.store, door
        self.rig = Rig(folder, lab, **SETTINGS)
        self.rig.date = str(datetime.date(2000, 1, 1) + datetime.timedelta(day))
        self.rig.folder().parent.mkdir(parents=True)
        self.bin.mkdir()
        self.written = itertools.count(1)
        self.asked: set[int] = set()
        self.there: set[str] = set()  # what must be on the disk, by its MD5
        self.recorded: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
        self.protected: dict[tuple[str, str], str] = {}
        self.story: list[str] = []
        door.rest()
        door.clear()

    def teardown(self) -> None:
        self.run_to_the_end(daemon=False, workers=1)

    # --- what people do

    def record(self, number: int, pick: int) -> None:
        path = self.rig.folder(number) / NAMES[pick % len(NAMES)]
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self._write(path, self._news())
        if not _rename(new, path, _NOREPLACE):
            self._gone(new)

    def flag(self, number: int, _pick: int = 0) -> None:
        if self.rig.folder(number).exists():
            self.asked.add(number)
            (self.rig.folder(number) / "create_me.flag").touch()

    def change(self, _number: int, pick: int) -> None:
        self._replace(pick, same=False)

    def save_again(self, _number: int, pick: int) -> None:
        self._replace(pick, same=True)

    def _replace(self, pick: int, *, same: bool) -> None:
        for path in one_of(self._files(), pick):
            with contextlib.suppress(FileNotFoundError):  # regd has just moved it
                content = path.read_bytes() if same else self._news()
                new = self._write(path, content)
                if not _rename(new, path, _EXCHANGE) or new.read_bytes() != content:
                    self._gone(new)

    def delete(self, _number: int, pick: int) -> None:
        for path in one_of(self._files(), pick):
            with contextlib.suppress(FileNotFoundError):
                old = self.bin / f"{next(self.written)}"
                path.rename(old)
                self._gone(old)

    def protect(self, number: int, pick: int) -> None:
        for session in self._sessions(number):
            held = self.rig.lab.datasets(session["id"])
            for path in one_of([path for path in held if not held[path]["protected"]], pick):
                self.rig.lab.protect(session["id"], path)
                # regd may have registered another content a moment ago
                record = self.rig.lab.datasets(session["id"])[path]
                self.protected[session["id"], path] = record["hash"]

    @rule(number=NUMBERS, rarely=st.integers(0, 3))
    def delete_on_alyx(self, number: int, rarely: int) -> None:
        for session in self._sessions(number) if rarely == 0 else []:
            self.store.delete("session", session["id"])
            self.door.clear(f"{self.rig.lab.subject}/{self.rig.date}/{number:03d}")
            self.flag(number)

    # --- what happens to regd

    @rule(plan=plans(daemon=False), **LIFE)
    def scan(self, plan: Plan, **life: Any) -> None:
        self._live(plan, **life)

    @rule(plan=plans(daemon=True), **LIFE)
    def daemon(self, plan: Plan, **life: Any) -> None:
        self._live(plan, **life)

    @rule(plan=plans(daemon=True), killed_after_s=st.floats(0, 0.3), **LIFE)
    def daemon_that_dies_at_any_moment(self, plan: Plan, **life: Any) -> None:
        self._live(replace(plan, at=None), **life)

    def _live(
        self,
        plan: Plan,
        before: list[Deed],
        meanwhile: list[Deed],
        after_s: float,
        undo: bool,
        killed_after_s: float | None = None,
    ) -> None:
        self.story.append(f"{plan} {before=} {after_s=} {meanwhile=} {killed_after_s=} {undo=}")
        for deed, *about in before:
            getattr(self, deed)(*about)
        victim = Victim(self.rig.settings, plan, self.scratch)
        time.sleep(after_s)  # people do not wait for regd to be anywhere
        for deed, *about in meanwhile:
            getattr(self, deed)(*about)
        if killed_after_s is not None:
            time.sleep(killed_after_s)  # nor does a crash
            victim.kill()
        with self._telling():
            type(self).kills += victim.end(undo=undo)
        if plan.power_cut:  # to start again takes a computer longer than Alyx can be late
            self.door.rest()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            error.add_note("\n".join(self.story))
            raise

    @rule()
    def lose_the_journal(self) -> None:
        self.run_to_the_end(daemon=False, workers=2)  # a move by link may be half done before
        self.rig.lose_journal()

    @rule(daemon=st.booleans(), workers=st.integers(1, 4))
    def run_to_the_end(self, daemon: bool, workers: int) -> None:
        plan = Plan(daemon=daemon, workers=workers, unknown_outcome_s=UNKNOWN_S)
        self.story.append(f"to the end: {plan}")
        with self._telling():
            for _ in range(5):
                victim = Victim(self.rig.settings, plan, self.scratch)
                assert not victim.end()
                with self.rig.journal() as journal:
                    if not journal.sessions(SessionState.WAITING, SessionState.WORKING):
                        break
            else:
                raise AssertionError(f"it has not come to an end:\n{victim.log()}")
            self.check()

    # --- what must hold

    def check(self) -> None:
        with self.rig.journal() as journal:
            rows = {int(row.folder[-3:]): row for row in journal.sessions()}
            assert journal._rows("PRAGMA integrity_check") == [("ok",)]
            odd = journal.files_in(FileState.PLACING, FileState.REFUSED, FileState.SETTLING)
        on_alyx = [session["number"] for session in self.rig.lab.sessions(self.rig.date)]
        assert on_alyx == sorted(self.asked), "a session is missing, or there twice"
        for number, row in rows.items():
            state = SessionState.DONE if number in self.asked else SessionState.HELD
            assert (row.state, row.flagged) == (state, False)
        assert not [path for folder, path in odd if int(folder[-3:]) in self.asked]
        assert not list(self.rig.root.rglob("*.flag"))
        assert not list(self.rig.root.rglob(".*"))
        assert {md5(path) for path in self._files()} == self.there, "bytes were lost"
        for number in self.asked:
            self._check_session(number)
        assert not self.door.twice(), "registered again"

    def _check_session(self, number: int) -> None:
        eid, folder = self.rig.eid(number), self.rig.folder(number)
        held = self.rig.lab.datasets(eid)
        for path in self._files():
            if folder in path.parents:
                record = held[path.relative_to(folder).as_posix()]
                assert (record["hash"], record["file_size"]) == (md5(path), path.stat().st_size)
        revisions = collections.defaultdict(list)
        for path, record in held.items():
            revisions[_original(folder / path)].append(record["hash"])
            assert self.protected.get((eid, path), record["hash"]) == record["hash"]
        for original, hashes in revisions.items():
            assert {*hashes} <= self.recorded[original]
            assert len({*hashes}) == len(hashes), "an unchanged file got another revision"

    # --- means

    def _news(self) -> bytes:
        return f"{next(self.written)} ".encode() * 9

    def _sessions(self, number: int) -> list[dict[str, Any]]:
        return [s for s in self.rig.lab.sessions(self.rig.date) if s["number"] == number]

    def _files(self) -> list[Path]:
        files = (path for path in self.rig.root.rglob("[!.]*") if path.is_file())
        return sorted(path for path in files if path.suffix != ".flag")

    def _write(self, path: Path, content: bytes) -> Path:
        """Write what is to be at `path` beside the data root, and remember it."""
        new = self.bin / f"{next(self.written)}"
        new.write_bytes(content)
        self.there.add(md5(new))
        self.recorded[_original(path)].add(md5(new))
        return new

    def _gone(self, old: Path) -> None:
        self.there.discard(md5(old))


def _original(path: Path) -> tuple[str, str]:
    """Return what names a file in all its revisions."""
    folder = path.parent.parent if path.parent.name.startswith("#") else path.parent
    return str(folder), path.name


def _rename(path: Path, to: Path, flags: int) -> bool:
    return _libc.renameat2(-100, bytes(path), -100, bytes(to), flags) == 0


def one_of(things: Sequence[Any], pick: int) -> Sequence[Any]:
    """Return one of some things, or none where there is none."""
    return [things[pick % len(things)]] if things else []


def test_regd_goes_on_after_many_crashes(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    seed = pytestconfig.getoption("--hypothesis-seed")
    first = random.randrange(2**32) if seed is None else int(seed)
    wanted, killed = chaos.times(SHORT_KILLS), 0
    seeds = ((tmp_path, number) for number in itertools.count(first))
    with contextlib.ExitStack() as ends:
        if chaos.TIMES is None:
            alyx = ends.enter_context(an_alyx())
            lives = (live(tmp_path, number, alyx) for _, number in seeds)
        else:
            lives = side_by_side(live, seeds, open_alyx, tmp_path)
        with contextlib.closing(lives):
            while killed < wanted:
                killed += next(lives)
    print(f"{killed} kills at random, from seed {first}")


def open_alyx(_folder: Path) -> None:
    global _lane
    _lane = _ends.enter_context(an_alyx())


def live(folder: Path, seed: int, alyx: Any = None) -> int:
    """Run a few examples, the same for the same seed; return how often regd was killed."""
    rules = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # a shorter way to the failure would take hours to find
        suppress_health_check=list(HealthCheck),
    )
    before = Recordings.kills
    machine = hypothesis.seed(seed)(lambda: Recordings(folder / f"{seed}", *(alyx or _lane)))
    try:
        run_state_machine_as_test(machine, settings=rules)
    except Exception as error:
        story = "".join(traceback.format_exception(error))
        again = f"make chaos PART=crashes SEED={seed}"
        raise AssertionError(f"{story}\nto see it again: {again}") from None
    return Recordings.kills - before
