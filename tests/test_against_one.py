"""regd's registration client held against ONE's own, unmodified, on equal trees and databases."""

from __future__ import annotations

import datetime
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import one.registration
import pytest
import requests
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from one.alf.exceptions import ALFError, AlyxSubjectNotFound

import regd
from regd.errors import (
    InvalidInput,
    InvalidPath,
    MemberNotFound,
    NoDatasetType,
    RegdError,
    SubjectNotFound,
)
from tests.against_one.pair import Pair, Side, open_pair

EXAMPLES = int(os.environ.get("REGD_TEST_EXAMPLES", "200"))
POSITION = "alf/_ibl_wheel.position.npy"
VELOCITY = "alf/_ibl_wheel.velocity.npy"
TIMES = "alf/_ibl_wheel.timestamps.npy"
CAMERA = "raw_video_data/_iblrig_leftCamera.raw.mp4"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with open_pair(tmp_path_factory.mktemp("pair")) as pair:
        yield pair


@pytest.fixture
def pair(both: Pair, tmp_path: Path) -> Pair:
    both.use(tmp_path / "trees")
    both.clock.today = datetime.date(2024, 5, 17)
    return both


_DAY = datetime.timedelta(1)
_sessions = itertools.count()


def new_session(subject: str = "KS005") -> str:
    """A session path that no other test of this module uses."""
    count = next(_sessions)
    return f"{subject}/{datetime.date(1900, 1, 1) + count * _DAY}/{count % 999 + 1:03d}"


@pytest.fixture
def session() -> str:
    return new_session()


Action = Callable[[Side], Any]


def run(pair: Pair, action: Action) -> tuple[Any, Any]:
    """What the action gives on each side: its result, or the exception it ended with."""
    results = []
    for side in pair:
        try:
            results.append(action(side))
        except Exception as error:
            results.append(error)
    return results[0], results[1]


def assert_same_state(pair: Pair, *sessions: str) -> None:
    assert pair.regd.tree() == pair.one.tree()
    for session in sessions:
        assert pair.regd.sessions(session) == pair.one.sessions(session)
        assert pair.regd.datasets(session) == pair.one.datasets(session)


def compare(pair: Pair, action: Action, *sessions: str) -> Any:
    """Run the action on both sides; results, trees and databases must agree. Return regd's."""
    by_one, by_regd = run(pair, action)
    for result in (by_one, by_regd):
        if isinstance(result, Exception):
            raise result
    assert pair.regd.plain(by_regd) == pair.one.plain(by_one)
    assert_same_state(pair, *sessions)
    return by_regd


def write(pair: Pair, session: str, *relative: str, content: str = "") -> None:
    for side in pair:
        for path in relative:
            side.write(f"{session}/{path}", content or f"bytes of {path}")


def create(pair: Pair, session: str, **fields: Any) -> None:
    for side in pair:
        side.create(session, **fields)


# --- revisions, generated -------------------------------------------------------------------------

_example = itertools.count()


@dataclass(frozen=True)
class Step:
    """One dataset of a history: its revision, a kind of name until an example gives it a date."""

    kind: str
    protected: bool
    on_disk: bool

    def name(self, number: int, today: datetime.date) -> str:
        """The revision's name in example `number`.

        Alyx orders a history by when a revision's name was first used, in any session. So names
        are used once only, which leaves each example its own order.
        """
        base, _, suffix = self.kind.partition("+")
        if base == "original":
            return ""
        if base == "named":
            return f"{suffix}{number}"
        return f"{today + int(base) * _DAY}{suffix}"


_LETTERS = ["", "a", "b", "c", "y", "z"]
_KINDS = st.one_of(
    st.just("original"),
    st.sampled_from([f"+0+{letter}"[1:] for letter in _LETTERS]),  # today, and what follows it
    st.sampled_from([f"{days}+{letter}" for days in (-1, -9) for letter in _LETTERS]),
    st.just("3+"),
    st.sampled_from(["named+v", "named+final", "named+a.b-c_", "named+Z"]),
    st.integers(0, 25).map(lambda i: f"0+{chr(ord('a') + i)}"),
)


@st.composite
def histories(draw: st.DrawFn) -> list[Step]:
    kinds = draw(st.lists(_KINDS, max_size=6, unique=True))
    return [
        Step(kind, draw(st.booleans()), draw(st.sampled_from([False, False, True])))
        for kind in kinds
    ]


@st.composite
def changes(draw: st.DrawFn) -> tuple[list[Step], str]:
    """A history, and the kind of the revision whose file is changed and registered again."""
    history = draw(histories())
    inside = [step.kind for step in history if step.kind != "original"]
    place = st.just("original")
    if inside:
        place = st.one_of(place, st.sampled_from(inside), _KINDS)
    return history, draw(place)


def _in(revision: str, file: str) -> str:
    folder, _, name = file.rpartition("/")
    return f"{folder}/#{revision}#/{name}" if revision else file


@dataclass
class Case:
    """One file of an example, its history made on both sides."""

    file: str
    names: list[str]
    protected: set[str]
    changed: str
    """The path, below the session, of the file that is registered again."""
    own: str
    """The revision it lies in."""

    @property
    def newest(self) -> str | None:
        """As Alyx orders them: by their making, the original last."""
        return next((name for name in reversed(self.names) if name), self.names[0]) or ""


def _make(pair: Pair, session: str, file: str, drawn: tuple[list[Step], str], number: int) -> Case:
    history, place = drawn
    today = pair.clock.today
    protected = set()
    for order, step in enumerate(history):
        name = step.name(number, today)
        path = _in(name, file)
        for side in pair:
            dataset = side.register(session, path, f"{order:032x}")
            if step.protected:
                side.protect(dataset)
            if step.on_disk:
                side.write(f"{session}/{path}", f"{path} as it was")
        if step.protected:
            protected.add(name)
    own = Step(place, False, True).name(number, today)
    changed = _in(own, file)
    write(pair, session, changed, content=f"{file} as it is now")
    return Case(file, [s.name(number, today) for s in history], protected, changed, own)


def _register(pair: Pair, session: str, cases: list[Case]) -> tuple[Any, Any]:
    def action(side: Side) -> Any:
        return side.client.register_files([side.root / session / case.changed for case in cases])

    return run(pair, action)


def _expected_difference(pair: Pair, cases: list[Case], by_one: Any, session: str) -> str | None:
    """Say which of the intended differences this example meets, by what ONE did, or None."""
    if not any(case.protected for case in cases):
        return None
    if pair.one.contents(session) != pair.regd.contents(session):
        return "ONE overwrote a file"
    if isinstance(by_one, requests.HTTPError):
        # ONE posts what it does not look for: a revision that is protected but not the newest
        assert any(part in str(by_one) for part in ("is protected, cannot patch", "{")), by_one
        return "ONE chose a name that cannot be registered"
    for case in cases:
        if not case.protected and case.names and case.own == "" and case.newest:
            # a file that Alyx would take where it is, moved for what another file's history says
            return "ONE moved a file that nothing protects"
    if any("{" in path for path in pair.one.tree(session)):
        return "ONE went beyond z"
    return None


def _assert_safe(pair: Pair, session: str, cases: list[Case], by_regd: Any) -> None:
    """What holds for regd whatever ONE did."""
    assert not isinstance(by_regd, Exception), by_regd
    held = pair.regd.contents(session)
    for case, record in zip(cases, by_regd, strict=True):
        assert f"{case.file} as it is now".encode() in held
        assert record["revision"] not in case.protected or not case.protected
        (entry,) = {entry["relative_path"] for entry in record["file_records"]}
        content = (pair.regd.root / entry).read_text()
        assert content == f"{case.file} as it is now"


def _example_of(pair: Pair, drawn: list[tuple[str, tuple[list[Step], str]]]) -> None:
    number = next(_example)
    pair.clock.today = datetime.date(1900, 1, 15) + 20 * number % 2_900_000 * _DAY
    session = new_session()
    create(pair, session)
    cases = [_make(pair, session, file, one, number) for file, one in drawn]
    before = pair.regd.contents(session)
    by_one, by_regd = _register(pair, session, cases)
    _assert_safe(pair, session, cases, by_regd)
    assert before == pair.regd.contents(session)  # nothing is lost
    difference = _expected_difference(pair, cases, by_one, session)
    event(difference or "the same")
    if difference:
        return
    if isinstance(by_one, Exception):
        raise by_one
    assert pair.regd.plain(by_regd) == pair.one.plain(by_one)
    assert pair.regd.tree(session) == pair.one.tree(session)
    assert pair.regd.datasets(session) == pair.one.datasets(session)


_profile = settings(
    max_examples=EXAMPLES,
    deadline=None,  # an example is some thirty requests; how long they take proves nothing
    derandomize=True,
    database=None,
    # the pair is one for all examples by intention: each has a session and revisions of its own
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@_profile
@given(drawn=changes())
def test_revision_of_one_file(pair: Pair, drawn: tuple[list[Step], str]) -> None:
    _example_of(pair, [(POSITION, drawn)])


@settings(_profile, max_examples=max(EXAMPLES // 3, 1))
@given(first=changes(), second=changes())
def test_revisions_of_two_files_at_once(pair: Pair, first: Any, second: Any) -> None:
    _example_of(pair, [(POSITION, first), (VELOCITY, second)])


# --- sessions -------------------------------------------------------------------------------------

EVERY_FIELD = {
    "users": ["rig_user", "test_user"],
    "location": "cortexlab_rig1",
    "procedures": ["Behavior training/tasks", "Imaging"],
    "n_correct_trials": 7,
    "n_trials": 10,
    "json": {"rig": {"gain": 2.5}, "notes": ["a", None]},
    "projects": ["practice", "ibl_neuropixel_brainwide_01"],
    "type": "Base",
    "task_protocol": "choiceWorld 1.0",
    "lab": "cortexlab",
}


@pytest.mark.parametrize("register_files", [False, True])
def test_create_sessions_of_several_flags(pair: Pair, register_files: bool) -> None:
    sessions = [new_session(), f"cortexlab/Subjects/{new_session()}", new_session("ZM_1085")]
    for session in sessions:
        write(pair, session, POSITION, VELOCITY, "alf/notes.txt", "create_me.flag")

    def action(side: Side) -> Any:
        paths, records = side.client.create_sessions(side.root, register_files=register_files)
        # ONE's order is the disk's
        return sorted(zip(paths, map(side.plain, records), strict=True), key=lambda both: both[0])

    made = compare(pair, action, *sessions)
    assert [str(path.relative_to(pair.regd.root)) for path, _ in made] == sorted(sessions)
    assert not list(pair.regd.root.rglob("create_me.flag"))
    assert len(pair.regd.datasets(sessions[0])) == (2 if register_files else 0)


def test_create_sessions_with_a_flag_of_another_name(pair: Pair, session: str) -> None:
    write(pair, session, "extract_me.flag", "create_me.flag", POSITION)
    compare(pair, lambda side: side.client.create_sessions(side.root, "**/extract_me*"), session)
    assert "create_me.flag" in [path.name for path in pair.regd.root.rglob("*.flag")]


def test_create_sessions_dry(pair: Pair, session: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(pair, session, "create_me.flag")
    compare(pair, lambda side: side.client.create_sessions(side.root, dry=True), session)
    by_one, by_regd = capsys.readouterr().out.splitlines()
    assert pair.regd.plain(by_regd) == pair.one.plain(by_one)
    assert pair.regd.sessions(session) == []


@pytest.mark.parametrize(
    "date",
    ["2031-01-04", "2031-01-05T10:11:12", datetime.date(2031, 1, 6),
     datetime.datetime(2031, 1, 7, 23, 59)],
)  # fmt: skip
def test_create_new_session(pair: Pair, date: Any) -> None:
    def action(side: Side) -> Any:
        made = side.client.create_new_session("KS005", side.root, date=date)
        return made, side.client.create_new_session("KS005", side.root, date=date, n_trials=3)

    (_, first), (second_path, second) = compare(pair, action)
    assert isinstance(first, UUID)
    assert first != second
    day = str(date)[:10]
    assert second_path.relative_to(pair.regd.root).as_posix() == f"KS005/{day}/002"
    assert_same_state(pair, f"KS005/{day}/001", f"KS005/{day}/002")


def test_create_new_session_only_on_disk(pair: Pair) -> None:
    write(pair, "KS005/2032-01-01", "007/x", "12/x", "notes/x", ".003/x")
    made = compare(
        pair,
        lambda side: side.client.create_new_session(
            "KS005", str(side.root), date="2032-01-01", register=False
        ),
        "KS005/2032-01-01/013",
    )
    assert made[0].name == "013"
    assert made[1] is None


def test_register_session_with_every_field(pair: Pair, session: str) -> None:
    date = session.split("/")[1]
    fields = {
        **EVERY_FIELD, "start_time": f"{date}T08:30:15.5", "end_time": f"{date}T10:00:00",
    }  # fmt: skip
    write(pair, session, POSITION)

    def action(side: Side) -> Any:
        return side.client.register_session(side.root / session, **fields)

    record, files = compare(pair, action, session)
    assert record["data_dataset_session_related"] == files
    (held,) = pair.regd.sessions(session)
    assert {key: held[key] for key in EVERY_FIELD if key not in ("users", "projects")} == {
        key: value for key, value in EVERY_FIELD.items() if key not in ("users", "projects")
    }
    assert held["start_time"] == f"{date}T08:30:15.500000"


@pytest.mark.parametrize(
    "fields",
    [
        {"users": "rig_user"},
        {"procedures": "Imaging"},
        {"projects": "practice"},
        {"json": '{"a": 1}'},
        {"start_time": None, "end_time": None},
        {"procedures": [], "projects": None, "users": []},
        {"n_trials": 0},
        {"lab": "mainenlab"},
    ],
    ids=str,
)
def test_register_session_with_a_field_in_another_form(
    pair: Pair, session: str, fields: dict[str, Any]
) -> None:
    def action(side: Side) -> Any:
        return side.client.register_session(str(side.root / session), file_list=False, **fields)

    by_one, by_regd = run(pair, action)
    if isinstance(by_one, Exception):
        # what ONE cannot make anything of; regd may, but must not end in an unnamed error
        assert not isinstance(by_regd, Exception) or isinstance(by_regd, RegdError)
        return
    assert pair.regd.plain(by_regd) == pair.one.plain(by_one)
    assert_same_state(pair, session)


@pytest.mark.parametrize("lab", ["cortexlab", "mainenlab"])
def test_register_session_takes_the_lab_from_the_path(pair: Pair, session: str, lab: str) -> None:
    path = f"{lab}/Subjects/{session}"
    write(pair, path, POSITION)
    compare(pair, lambda side: side.client.register_session(side.root / path), session)
    assert [record["lab"] for record in pair.regd.sessions(session)] == [lab]


@pytest.mark.parametrize("given", ["list", "empty", "generator"])
def test_register_session_with_files_given(pair: Pair, session: str, given: str) -> None:
    write(pair, session, POSITION, VELOCITY, TIMES)

    def action(side: Side) -> Any:
        wanted = [side.root / session / path for path in (VELOCITY, POSITION)]
        files = {"list": wanted, "empty": [], "generator": iter(wanted)}[given]
        return side.client.register_session(side.root / session, file_list=files)

    compare(pair, action, session)


@pytest.mark.parametrize("kind", [str, Path])
def test_register_session_with_a_single_file(pair: Pair, session: str, kind: Any) -> None:
    write(pair, session, POSITION)
    _, record = compare(
        pair,
        lambda side: side.client.register_session(
            side.root / session, file_list=kind(side.root / session / POSITION)
        ),
        session,
    )
    assert record["name"] == "_ibl_wheel.position.npy"


def test_register_session_again_changes_what_is_given(pair: Pair, session: str) -> None:
    create(pair, session, lab="cortexlab", type="Experiment")
    date = session.split("/")[1]
    fields = {**EVERY_FIELD, "start_time": f"{date}T09:00:00", "end_time": f"{date}T09:30:00"}

    def action(side: Side) -> Any:
        return side.client.register_session(side.root / session, file_list=False, **fields)

    compare(pair, action, session)


# --- finding and preparing files ------------------------------------------------------------------

ODD_FILES = [
    "alf/ambiguous.thing.npy",  # two dataset types
    "alf/unheard.of.npy",  # none
    "alf/_ibl_wheel.position.xyz",  # no data format
    "notes.txt",
    "alf/a.b.c.d.e",
    "raw/_iblrig_taskData.raw.jsonable",
    "alf/#2020-01-01#/_ibl_wheel.position.npy",
    "alf/probe00/spikes.times.npy",
    "raw/_IBLRIG_TASKDATA.RAW.jsonable",
    "_ibl_experiment.description.yaml",
]


def test_find_files(pair: Pair, session: str) -> None:
    files = [path for path in ODD_FILES if not path.endswith(".xyz")]
    write(pair, session, POSITION, CAMERA, *files)
    for side in pair:
        (side.root / session / "alf/trials.table.pqt").mkdir()
    found = compare(pair, lambda side: list(side.client.find_files(side.root / session)))
    assert len(found) == 7
    compare(pair, lambda side: list(side.client.find_files(str(side.root / session))))
    compare(pair, lambda side: list(side.client.find_files(side.root / session / "alf")))


def test_find_files_leaves_out_what_has_no_data_format(pair: Pair, session: str) -> None:
    """ONE yields it, since some data formats have no extension, and then registers None for it."""
    write(pair, session, "alf/_ibl_wheel.position.xyz", POSITION)
    create(pair, session)
    by_one, by_regd = run(
        pair, lambda side: [p.name for p in side.client.find_files(side.root / session)]
    )
    assert by_one == ["_ibl_wheel.position.npy", "_ibl_wheel.position.xyz"]
    assert by_regd == ["_ibl_wheel.position.npy"]

    def action(side: Side) -> Any:
        return side.client.register_files(list(side.client.find_files(side.root / session)))

    by_one, by_regd = run(pair, action)
    assert by_one[1:] == [None]
    assert pair.regd.plain(by_regd) == pair.one.plain(by_one[:1])
    assert_same_state(pair, session)


@pytest.mark.parametrize("versions", [None, "1.2.3", ["a", "b"], ["a", None, "c", "d"]])
def test_prepare_files(pair: Pair, versions: Any) -> None:
    first, second = new_session(), f"cortexlab/Subjects/{new_session()}"
    write(pair, first, POSITION, *ODD_FILES)
    write(pair, second, POSITION, VELOCITY)

    def action(side: Side) -> Any:
        listed = [side.root / second / POSITION, side.root / "KS005/no-session/a.b.npy"]
        listed += [side.root / first / path for path in [*ODD_FILES, POSITION]]
        listed += [side.root / second / VELOCITY]
        files, versions_of, paths, single = side.client.prepare_files(listed, versions=versions)
        shown = {str(k): [str(p) for p in v] for k, v in files.items()}
        return [
            list(map(side.plain, shown.items())), list(map(side.plain, versions_of.values())),
            side.plain(paths), single,
        ]  # fmt: skip

    compare(pair, action)


@pytest.mark.parametrize("kind", [str, Path])
def test_prepare_a_single_file(pair: Pair, session: str, kind: Any) -> None:
    def action(side: Side) -> Any:
        files, versions, paths, single = side.client.prepare_files(
            kind(side.root / session / POSITION), "v"
        )
        ((folder, inner),) = files.items()
        return str(folder), list(map(str, inner)), list(versions.values()), paths, single

    assert compare(pair, action)[-1] is True


def test_check_protected_files(pair: Pair) -> None:
    sessions = [new_session(), new_session("ZM_1085")]
    for session in sessions:
        create(pair, session)
        write(pair, session, POSITION, VELOCITY, "notes.txt")
    for side in pair:
        side.protect(side.register(sessions[0], POSITION))
        side.register(sessions[0], VELOCITY)

    def plain(answer: dict[str, Any]) -> Any:
        # ONE 3.6 puts the folder and the files it asked about beside Alyx's answer
        return {k: v for k, v in answer.items() if k not in ("shared_path", "files")}

    def action(side: Side) -> Any:
        paths = [side.root / s / p for s in sessions for p in (VELOCITY, POSITION, "notes.txt")]
        client = side.client
        return [
            *map(plain, client.check_protected_files(paths)),
            *map(plain, client.check_protected_files(paths[:1], created_by="rig_user")),
            plain(client.check_protected_files(paths[0])),
            plain(client.check_protected_files(str(paths[4]))),
            client.check_protected_files([]),
            client.check_protected_files([paths[2]]),
        ]

    codes = [a["status_code"] for a in compare(pair, action)[:5]]
    assert codes == [403, 200, 200, 200, 200]


# --- registering files ----------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"versions": "1.0"},
    {"versions": ["1.0", "2.0", "3.0"]},
    {"versions": ["1.0", None]},
    {"default": False},
    {"created_by": "rig_user"},
    {"server_only": True},
    {"repository": "mainenlab_local"},
    {"repository": "flatiron_mainenlab", "exists": False},
    {"repository": "flatiron_mainenlab", "server_only": True},
    {"repository": "cortexlab_local"},
    {"max_md5_size": 0},
    {"max_md5_size": 32},
    {"max_md5_size": 10**9},
    {"labs": "cortexlab"},
    {"labs": ["cortexlab", "mainenlab"]},
    {"qc": "PASS"},
    {"qc": ["PASS", "FAIL", "WARNING"]},
    {"projects": "cortexlab"},
]


@pytest.mark.parametrize("folder", ["", "mainenlab/Subjects/"])
@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_register_files_with_each_option(
    pair: Pair, options: dict[str, Any], dry: bool, folder: str
) -> None:
    session = folder + new_session("ZM_1085")
    create(pair, session)
    files = [POSITION, CAMERA, "_ibl_experiment.description.yaml"]
    write(pair, session, *files)

    def action(side: Side) -> Any:
        paths = [side.root / session / path for path in files]
        return side.client.register_files(paths, dry=dry, **options)

    compare(pair, action, session)
    assert pair.regd.posted() == pair.one.posted()
    if not dry:  # the same again: Alyx patches what it holds
        compare(pair, action, session)


def test_register_files_keeps_the_order_and_marks_what_is_not_valid(pair: Pair) -> None:
    first, second = new_session(), new_session("ZM_1085")
    for session in (first, second):
        create(pair, session)
        write(pair, session, POSITION, VELOCITY, *ODD_FILES)

    def action(side: Side) -> Any:
        inner = [*ODD_FILES[:5], VELOCITY, POSITION, *ODD_FILES[5:]]
        listed = [side.root / s / path for path in inner for s in (second, first)]
        return side.client.register_files([*listed, side.root / "nowhere/a.b.npy"])

    records = compare(pair, action, first, second)
    assert [record is None for record in records] == [True] * 10 + [False] * 14 + [True]


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("dry", [False, True])
def test_register_a_single_file(pair: Pair, session: str, kind: Any, dry: bool) -> None:
    create(pair, session)
    write(pair, session, POSITION)

    def action(side: Side) -> Any:
        return side.client.register_files(kind(side.root / session / POSITION), dry=dry)

    assert isinstance(compare(pair, action, session), dict)


def test_register_files_that_are_none(pair: Pair, session: str) -> None:
    def action(side: Side) -> Any:
        client = side.client
        return [
            client.register_files([]), client.register_files([], dry=True),
            client.register_files(["x"]), client.register_files("x"),
        ]  # fmt: skip

    assert compare(pair, action) == [[], [], [None], None]


def test_register_an_empty_file(pair: Pair, session: str) -> None:
    create(pair, session)
    for side in pair:
        side.write(f"{session}/{POSITION}", b"")
    record = compare(
        pair, lambda side: side.client.register_files(side.root / session / POSITION), session
    )
    assert record["file_size"] == 0


# --- water, weight, members, dates, dataset types -------------------------------------------------

WHEN = ["2030-02-03T04:05:06", "2030-02-03", datetime.date(2030, 2, 3),
        datetime.datetime(2030, 2, 3, 4, 5, 6, 7)]  # fmt: skip


@pytest.mark.parametrize("when", WHEN, ids=str)
def test_water(pair: Pair, session: str, when: Any) -> None:
    create(pair, session)

    def action(side: Side) -> Any:
        client = side.client
        return [
            client.register_water_administration("KS005", 35.10000001, date_time=when),
            client.register_water_administration(
                "ZM_1085", 0.123456, date_time=when, water_type="Hydrogel",
                user="rig_user", adlib=True,
            ),
            client.register_water_administration(
                "KS005", 1, date_time=when, session=side._short(session)[0]["id"]
            ),
            client.register_water_administration(
                "KS005", 2, date_time=when, session=side._short(session)[0]["url"]
            ),
            client.register_water_administration(
                "KS005", 3, date_time=when, session=UUID(side._short(session)[0]["id"])
            ),
        ]  # fmt: skip

    compare(pair, action, session)


@pytest.mark.parametrize("when", WHEN, ids=str)
def test_weight(pair: Pair, when: Any) -> None:
    def action(side: Side) -> Any:
        return [
            side.client.register_weight("KS005", 25.654321, date_time=when),
            side.client.register_weight("ZM_1085", 1e-3, when, "rig_user"),
        ]

    compare(pair, action)


@pytest.mark.parametrize("method", ["register_weight", "register_water_administration"])
def test_now_is_the_time_by_default(pair: Pair, method: str) -> None:
    before = datetime.datetime.now()
    for result in run(pair, lambda side: getattr(side.client, method)("flowers", 20)):
        assert before <= datetime.datetime.fromisoformat(result["date_time"])


@pytest.mark.parametrize(
    ("method", "args", "expected", "theirs"),
    [
        ("register_weight", ("nobody", 1), SubjectNotFound, AlyxSubjectNotFound),
        ("register_weight", ("KS005", 1, None, "nobody"), MemberNotFound, ALFError),
        ("register_weight", ("KS005", 0), InvalidInput, ValueError),
        ("register_weight", ("KS005", 1, "yesterday"), InvalidInput, ValueError),
        ("register_water_administration", ("nobody", 1), SubjectNotFound, AlyxSubjectNotFound),
        ("register_water_administration", ("KS005", 0), InvalidInput, ValueError),
        ("assert_exists", ("nobody", "subjects"), SubjectNotFound, AlyxSubjectNotFound),
        ("assert_exists", (["KS005", "nobody"], "subjects"), SubjectNotFound, ALFError),
        ("assert_exists", ("nobody", "users"), MemberNotFound, ALFError),
        ("ensure_ISO8601", ("2020-13-01",), InvalidInput, ValueError),
        ("create_new_session", ("nobody",), SubjectNotFound, AlyxSubjectNotFound),
        ("create_new_session", ("KS005", None, "never"), InvalidInput, ValueError),
    ],
)
def test_errors_are_of_the_same_family(
    pair: Pair, method: str, args: Any, expected: type[Exception], theirs: type[Exception]
) -> None:
    by_one, by_regd = run(pair, lambda side: getattr(side.client, method)(*args))
    assert isinstance(by_one, theirs)
    assert isinstance(by_regd, theirs)
    assert type(by_regd) is expected
    assert pair.regd.tree() == pair.one.tree() == {}


@pytest.mark.parametrize(
    ("member", "endpoint"),
    [
        ("KS005", "subjects"),
        ("KS-006.b", "subjects"),
        ("test_user", "users"),
        ("mainenlab_local", "data-repository"),
        ("cortexlab", "labs"),
        (["KS005", "ZM_1085"], "subjects"),
        ([], "subjects"),
        (("test_user",), "users"),
    ],
)
def test_assert_exists(pair: Pair, member: Any, endpoint: str) -> None:
    compare(pair, lambda side: side.client.assert_exists(member, endpoint))


def test_assert_exists_by_uuid(pair: Pair, session: str) -> None:
    create(pair, session)

    def action(side: Side) -> Any:
        eid = side._short(session)[0]["id"]
        return [
            side.client.assert_exists(eid, "sessions"),
            side.client.assert_exists(UUID(eid), "sessions"),
            side.client.assert_exists([UUID(eid), eid], "sessions"),
        ]

    compare(pair, action)


@given(
    st.one_of(
        st.datetimes(),
        st.dates(),
        st.datetimes(timezones=st.timezones()),
        st.datetimes().map(str),
        st.datetimes(timezones=st.timezones()).map(datetime.datetime.isoformat),
        st.dates().map(str),
    )
)
@settings(deadline=None, derandomize=True, database=None)
def test_ensure_iso8601(date: Any) -> None:
    theirs = one.registration.RegistrationClient.ensure_ISO8601(date)
    assert regd.RegistrationClient.ensure_ISO8601(date) == theirs


_PARTS = ["_ibl_", "_iblrig_", "wheel", "ambiguous", "thing", "position", "Camera", "trials", "raw",
          "taskData", "leftCamera", ".", "..", ".times", ".npy", ".MP4", "ROIData", "_", "/",
          "x"]  # fmt: skip


@given(name=st.lists(st.sampled_from(_PARTS), min_size=1, max_size=8).map("".join))
@settings(_profile, max_examples=500)
def test_get_dataset_type(pair: Pair, name: str) -> None:
    if not Path(name).name:
        return
    dtypes = pair.one.client.dtypes
    try:
        theirs = one.registration.get_dataset_type(name, dtypes)
    except ValueError:
        with pytest.raises(NoDatasetType):
            regd.get_dataset_type(name, dtypes)
        return
    assert regd.get_dataset_type(name, dtypes) == theirs
    assert regd.get_dataset_type(Path(name), dtypes) == theirs


def test_every_dataset_type_by_an_example_of_its_name(pair: Pair) -> None:
    dtypes = pair.one.client.dtypes
    for dtype in dtypes:
        name = (dtype.filename_pattern or f"{dtype.name}.npy").replace("*", "_a_").replace("?", "x")
        try:
            theirs = one.registration.get_dataset_type(name, dtypes)
        except ValueError:
            with pytest.raises(NoDatasetType):
                regd.get_dataset_type(name, dtypes)
            continue
        assert regd.get_dataset_type(name, dtypes) == theirs


@pytest.mark.parametrize("name", ["dtypes", "registration_patterns", "file_extensions"])
def test_what_alyx_can_hold(pair: Pair, name: str) -> None:
    by_one, by_regd = run(pair, lambda side: side.plain(getattr(side.client, name)))
    assert by_regd == by_one


# --- where regd means to differ -------------------------------------------------------------------


def _post(pair: Pair, session: str, *inner: str) -> tuple[Any, Any]:
    return run(
        pair,
        lambda side: side.client.register_files([side.root / session / path for path in inner]),
    )


def test_a_revision_folder_that_holds_the_file_is_never_overwritten(
    pair: Pair, session: str
) -> None:
    create(pair, session)
    for side in pair:
        side.protect(side.register(session, POSITION))
        side.register(session, _in("2024-05-01", POSITION))
        side.write(f"{session}/{_in('2024-05-01', POSITION)}", "the only copy")
        side.write(f"{session}/{POSITION}", "new")
    by_one, by_regd = _post(pair, session, POSITION)
    assert by_one[0]["revision"] == "2024-05-01"
    assert b"the only copy" not in pair.one.contents()
    assert by_regd[0]["revision"] == "2024-05-01a"
    assert pair.regd.contents() == {b"the only copy", b"new"}


def test_after_z_comes_za(pair: Pair, session: str) -> None:
    create(pair, session)
    for side in pair:
        for name in ("", "2024-05-17", "2024-05-17z"):
            side.protect(side.register(session, _in(name, POSITION)))
    write(pair, session, POSITION)
    by_one, by_regd = _post(pair, session, POSITION)
    assert f"{session}/{_in('2024-05-17{', POSITION)}" in pair.one.tree()
    assert isinstance(by_one, Exception) or by_one[0]["revision"] != "2024-05-17{"
    assert by_regd[0]["revision"] == "2024-05-17za"
    assert "2024-05-17za" > "2024-05-17z"


@pytest.mark.parametrize("place", ["", "2024-05-17"])
def test_a_protected_file_that_did_not_change_stays(pair: Pair, session: str, place: str) -> None:
    create(pair, session)
    path = _in(place, POSITION)
    write(pair, session, path)
    held = _post(pair, session, path)
    for side, records in zip(pair, held, strict=True):
        side.protect(records[0]["id"])
        side.sent.clear()
    before = pair.regd.tree()
    by_one, by_regd = _post(pair, session, path)
    assert by_one[0]["revision"] == ("2024-05-17a" if place else "2024-05-17")
    assert by_regd[0]["id"] == held[1][0]["id"]
    assert by_regd[0]["revision"] == place
    assert pair.regd.tree() == before
    assert len(pair.regd.datasets(session)) == 1
    assert len(pair.regd.posted()) == 1  # and that one was refused


def test_the_record_of_an_unchanged_file_is_like_any_other(pair: Pair, session: str) -> None:
    create(pair, session)
    write(pair, session, POSITION)
    _, (held,) = _post(pair, session, POSITION)
    pair.regd.protect(held["id"])
    (again,) = pair.regd.client.register_files([pair.regd.root / session / POSITION])
    assert again == held


def test_a_protected_revision_that_is_not_the_newest_is_not_chosen(
    pair: Pair, session: str
) -> None:
    create(pair, session)
    for side in pair:
        side.protect(side.register(session, _in("2024-05-17", POSITION)))
        side.register(session, _in("manual", POSITION))  # the newest, not protected, no date
    write(pair, session, POSITION)
    by_one, by_regd = _post(pair, session, POSITION)
    assert isinstance(by_one, requests.HTTPError)
    assert by_one.response.status_code == 403
    assert f"{session}/{_in('2024-05-17', POSITION)}" in pair.one.tree()  # moved all the same
    assert by_regd[0]["revision"] == "2024-05-17a"


def test_a_record_keeps_what_was_not_given(pair: Pair, session: str) -> None:
    date = session.split("/")[1]
    create(pair, session, **EVERY_FIELD, start_time=f"{date}T09:10:11")
    before = pair.regd.sessions(session)
    run(pair, lambda side: side.client.register_session(side.root / session, file_list=False))
    (theirs,) = pair.one.sessions(session)
    assert theirs["start_time"] == f"{date}T00:00:00"
    assert theirs["users"] == ["test_user"]
    assert pair.regd.sessions(session) == before
    run(
        pair,
        lambda side: side.client.register_session(side.root / session, None, False, n_trials=99),
    )
    assert pair.regd.sessions(session) == [{**before[0], "n_trials": 99}]


def test_one_bad_session_does_not_keep_the_others_from_being_created(pair: Pair) -> None:
    good = [new_session() for _ in range(3)]
    bad = [new_session("nobody"), "KS005/not-a-session"]
    for session in (*good, *bad):
        write(pair, session, "create_me.flag")
    by_one, by_regd = run(pair, lambda side: side.client.create_sessions(side.root))
    assert isinstance(by_one, (AlyxSubjectNotFound, ValueError))
    paths, records = by_regd
    assert [path.relative_to(pair.regd.root).as_posix() for path in paths] == good
    assert len(records) == 3
    flags = {path.parent for path in pair.regd.root.rglob("*.flag")}
    assert flags == {pair.regd.root / session for session in bad}
    failures = {path: type(error) for path, error in pair.regd.client.failures}
    assert failures == {
        pair.regd.root / bad[0]: SubjectNotFound, pair.regd.root / bad[1]: InvalidPath,
    }  # fmt: skip
    pair.regd.client.create_sessions(pair.regd.root / "KS005", "no such flag")
    assert pair.regd.client.failures == []


def test_after_a_refusal_only_what_was_decided_goes_unchecked(pair: Pair, session: str) -> None:
    create(pair, session)
    for side in pair:
        side.protect(side.register(session, POSITION))
        side.sent.clear()
    write(pair, session, POSITION, VELOCITY, TIMES)
    by_one, by_regd = _post(pair, session, VELOCITY, POSITION, TIMES)
    assert pair.regd.plain(by_regd) == pair.one.plain(by_one)
    assert_same_state(pair, session)
    moved = _in("2024-05-17", POSITION)

    def unchecked(side: Side) -> list[str]:
        return [
            name
            for body in side.posted()
            if not body["check_protected"]
            for name in body["filenames"]
        ]

    assert unchecked(pair.one) == [VELOCITY, moved, TIMES]
    assert unchecked(pair.regd) == [moved]


def test_a_file_that_nothing_protects_stays_whatever_else_is_registered(
    pair: Pair, session: str
) -> None:
    """ONE moves it into its newest revision if another file of the call is protected."""
    create(pair, session)
    for side in pair:
        side.protect(side.register(session, POSITION))
        side.register(session, VELOCITY)
        side.register(session, _in("2024-05-01", VELOCITY))
    write(pair, session, POSITION, VELOCITY)
    by_one, by_regd = _post(pair, session, VELOCITY, POSITION)
    assert [record["revision"] for record in by_one] == ["2024-05-01", "2024-05-17"]
    assert [record["revision"] for record in by_regd] == ["", "2024-05-17"]


def test_a_time_with_a_zone(pair: Pair, session: str) -> None:
    """Alyx would make UTC of it, maybe on another day: the rig's own clock is what is kept."""
    date = session.split("/")[1]
    given = f"{date}T23:08:12.4465024-05:00"
    _, by_regd = run(
        pair,
        lambda side: side.client.register_session(
            side.root / session, file_list=False, start_time=given, end_time=given
        ),
    )
    record, _ = by_regd
    assert record["start_time"] == record["end_time"] == f"{date}T23:08:12.446502"
    assert len(pair.regd.sessions(session)) == 1
    parsed = pair.regd.client.ensure_ISO8601("2023-03-09T17:08:12.4465024+00:00")
    assert parsed == "2023-03-09T17:08:12.446502+00:00"


@pytest.mark.parametrize(
    "inner", ["alf/sp ace/_ibl_wheel.position.npy", "alf/#a#/b/_ibl_wheel.position.npy"]
)
def test_a_path_that_alyx_would_misregister_is_refused(
    pair: Pair, session: str, inner: str
) -> None:
    create(pair, session)
    write(pair, session, inner, VELOCITY)
    by_one, by_regd = _post(pair, session, inner, VELOCITY)
    if isinstance(by_one, Exception):
        assert pair.one.datasets(session) == {}  # the good file beside it is not registered either
    else:
        (entry,) = {entry["relative_path"] for entry in by_one[0]["file_records"]}
        assert entry != f"{session}/{inner}"
    assert [record and record["name"] for record in by_regd] == [None, "_ibl_wheel.velocity.npy"]
    found = pair.regd.client.find_files(pair.regd.root / session)
    assert [path.name for path in found] == ["_ibl_wheel.velocity.npy"]


@pytest.mark.parametrize(
    ("ending", "theirs", "ours"), [("1", "2", "a"), ("-x", "x", "a"), ("ba", "a", "c")]
)
def test_todays_revision_with_another_ending_than_one_letter(
    pair: Pair, session: str, ending: str, theirs: str, ours: str
) -> None:
    """ONE counts on from the last character alone; regd takes the first suffix that sorts after."""
    create(pair, session)
    for side in pair:
        side.protect(side.register(session, _in(f"2024-05-17{ending}", POSITION)))
    write(pair, session, POSITION)
    by_one, by_regd = _post(pair, session, POSITION)
    assert by_one[0]["revision"] == f"2024-05-17{theirs}"
    assert by_regd[0]["revision"] == f"2024-05-17{ours}"
    assert ours > ending


def test_water_for_a_session_by_its_reference(pair: Pair, session: str) -> None:
    create(pair, session)
    subject, date, number = session.split("/")

    def action(side: Side) -> Any:
        return side.client.register_water_administration(
            subject, 1, date_time="2030-01-01", session=f"{date}_{int(number)}_{subject}"
        )

    compare(pair, action, session)
