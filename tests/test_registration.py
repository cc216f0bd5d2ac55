"""The registration library by itself: its errors, its results, what it asks and what it leaves."""

from __future__ import annotations

import datetime
import math
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import one.registration
import pytest
import structlog
from hypothesis import example, given, settings
from hypothesis import strategies as st

import regd.files
import regd.registration
from regd import AlyxClient, RegistrationClient
from regd.errors import (
    AlyxAway,
    AlyxRefused,
    DatasetsProtected,
    FileChanged,
    FileRefused,
    InvalidInput,
    InvalidPath,
    MemberNotFound,
    NeedsHuman,
    NoDatasetType,
    PathTaken,
    RegdError,
    RevisionProtected,
    SessionNotFound,
    SubjectNotFound,
    Unauthorized,
)
from regd.model import FileToPost, Revision
from regd.paths import find_session
from regd.revisions import choose_destination, next_revision, own_revision
from regd.sandbox.server import Server
from tests.against_one.pair import PASSWORD, USER, connect_one, home_for_one

SESSION = "ZM_1085/2024-05-17/001"
POSITION = "alf/_ibl_wheel.position.npy"
VELOCITY = "alf/_ibl_wheel.velocity.npy"
TIMES = "alf/_ibl_wheel.timestamps.npy"
TODAY = datetime.date(2024, 5, 17)


class Transport(httpx.HTTPTransport):
    """The network, with a hook that may answer or break before and after a request."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[httpx.Request], httpx.Response | None] = lambda _: None
        self.after: Callable[[httpx.Request], None] = lambda _: None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self.before(request)
        if answer is not None:
            return answer
        answer = super().handle_request(request)
        try:
            self.after(request)
        except httpx.TransportError:
            answer.close()
            raise
        return answer


class Lab:
    """A sandbox, a folder of recordings, and a client between them."""

    def __init__(self, server: Server, root: Path) -> None:
        self.server = server
        self.root = root
        self.transport = Transport()
        self.alyx = AlyxClient(
            server.url, USER, PASSWORD, requests_per_minute=None, transport=self.transport,
            sleep=lambda _: None,
        )  # fmt: skip
        self.client = self.make()
        self.alyx.post("/tags", {"name": "protected_tag", "protected": True})

    def make(self, **options: Any) -> RegistrationClient:
        return RegistrationClient(self.alyx, data_root=self.root, today=lambda: TODAY, **options)

    def write(self, *relative: str, content: str = "") -> list[Path]:
        paths = [self.root / SESSION / path for path in relative]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content or f"bytes of {path.name}")
        return paths

    def create(self) -> str:
        return str(self.client.register_session(self.root / SESSION, file_list=False)[0]["id"])

    def protect(self, dataset: str) -> None:
        self.alyx.patch(f"/datasets/{dataset}", {"tags": ["protected_tag"]})

    def protected(self, path: str) -> Path:
        """A file that is registered, protected, and then changed."""
        (file,) = self.write(path)
        self.protect(self.client.register_files(file)["id"])
        file.write_text("changed")
        return file

    def datasets(self) -> dict[str, dict[str, Any]]:
        eid = self.client.to_eid(self.root / SESSION)
        listed = self.alyx.pages("/datasets", {"session": eid})
        return {f"{r['collection']}#{r['revision'] or ''}#{r['name']}": r for r in listed}

    def files(self) -> set[str]:
        folder = self.root / SESSION
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}

    def asked(self) -> list[str]:
        return [f"{one.method} {one.path}" for one in self.server.requests]


@pytest.fixture
def place(sandbox: Server, tmp_path: Path) -> Iterator[Lab]:
    sandbox._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    (tmp_path / "data" / SESSION).mkdir(parents=True)
    lab = Lab(sandbox, tmp_path / "data")
    with lab.alyx:
        yield lab


# --- every error by its name ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"users": "nobody"}, MemberNotFound),
        ({"users": ["test_user", "nobody"]}, MemberNotFound),
        ({"lab": "nolab"}, MemberNotFound),
        ({"projects": "none"}, MemberNotFound),
        ({"procedures": ["none"]}, MemberNotFound),
        ({"location": "nowhere"}, MemberNotFound),
        ({"start_time": "2024-05-18T00:00:00"}, InvalidInput),
        ({"start_time": "noon"}, InvalidInput),
        ({"end_time": "later"}, InvalidInput),
        ({"subject": "KS005"}, InvalidInput),
        ({"number": 2}, InvalidInput),
        ({"n_trials": "many"}, AlyxRefused),
        ({"n_trials": object()}, InvalidInput),
        ({"task_protocol": "x" * 100_000}, AlyxRefused),
    ],
    ids=str,
)
@pytest.mark.parametrize("there", [False, True])
def test_a_session_that_cannot_be(
    place: Lab, fields: dict[str, Any], expected: type[Exception], there: bool
) -> None:
    before = [place.create()] if there else []
    with pytest.raises(expected) as caught:
        place.client.register_session(place.root / SESSION, file_list=False, **fields)
    assert type(caught.value) is expected
    assert caught.value.reason
    subject = {"subject": "ZM_1085", "date_range": "2024-05-17,2024-05-17"}
    assert [found["id"] for found in place.alyx.pages("/sessions", subject)] == before


@pytest.mark.parametrize(
    "path",
    ["KS005/2024-05-17", "KS005/2024-02-30/001", "KS005/2024-05-17/0001", "x", "",
     "-x/2024-05-17/001"],
)  # fmt: skip
def test_a_folder_that_is_no_session(place: Lab, path: str) -> None:
    with pytest.raises(InvalidPath):
        place.client.register_session(place.root / path)
    assert place.client.register_files([place.root / path / POSITION]) == [None]


def test_a_lab_other_than_the_paths(place: Lab) -> None:
    path = place.root / "cortexlab/Subjects/KS005/2024-05-17/001"
    with pytest.raises(InvalidInput, match='"mainenlab" does not match lab name in path'):
        place.client.register_session(path, lab="mainenlab")


def test_an_unknown_subject(place: Lab) -> None:
    path = place.root / "nobody/2024-05-17/001"
    (path / "alf").mkdir(parents=True)
    (path / POSITION).write_text("x")
    for action in (
        lambda: place.client.register_session(path),
        lambda: place.client.create_new_session("nobody"),
        lambda: place.client.register_files(path / POSITION),
        lambda: place.client.check_protected_files(path / POSITION),
        lambda: place.client.register_weight("nobody", 1),
        lambda: place.client.register_water_administration("nobody", 1),
        lambda: place.client.assert_exists("nobody", "subjects"),
    ):
        with pytest.raises(SubjectNotFound, match=r"nobody|Subject"):
            action()


def test_files_of_a_session_that_alyx_does_not_know(place: Lab) -> None:
    (file,) = place.write(POSITION)
    for action in (
        place.client.register_files,
        place.client.check_protected_files,
        lambda file: place.client.to_eid(file),
        lambda file: place.client.register_water_administration("KS005", 1, session=file),
    ):
        with pytest.raises(SessionNotFound):
            action(file)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"repository": "nowhere"}, MemberNotFound),
        ({"created_by": "nobody"}, MemberNotFound),
        ({"labs": "nolab"}, MemberNotFound),
        ({"qc": "SPLENDID"}, AlyxRefused),
        ({"versions": "v" * 1000}, AlyxRefused),
        ({"name": {1, 2}}, InvalidInput),
    ],
    ids=str,
)
def test_options_that_cannot_be(
    place: Lab, options: dict[str, Any], expected: type[Exception]
) -> None:
    place.create()
    with pytest.raises(expected):
        place.client.register_files(place.write(POSITION), **options)


def test_a_file_that_alyx_refuses(place: Lab) -> None:
    """Between two looks at its dataset types, Alyx got a second one for a name."""
    place.create()
    assert place.client.file_extensions
    record = {"name": "second.position", "filename_pattern": "*wheel.position*"}
    place.alyx.post("/dataset-types", record)
    with pytest.raises(FileRefused) as caught:
        place.client.register_files(place.write(VELOCITY, POSITION, TIMES))
    assert caught.value.name == "_ibl_wheel.position.npy"
    assert list(place.datasets()) == ["alf##_ibl_wheel.velocity.npy"]


def test_protection_as_it_is_answered(place: Lab) -> None:
    place.create()
    place.protected(POSITION)
    found = find_session(place.root / SESSION)
    assert found is not None
    items = [FileToPost(POSITION, 7, "0" * 32), FileToPost(VELOCITY, 7)]
    with pytest.raises(DatasetsProtected) as refused:
        place.client.post_files(found[1], items, checked=True, options={})
    assert refused.value.details == [{POSITION: [{"": True}]}, {VELOCITY: []}]
    with pytest.raises(RevisionProtected):
        place.client.post_files(found[1], items, checked=False, options={})


@pytest.mark.parametrize(
    "name", ["alf/unheard.of.npy", "alf/ambiguous.thing.npy", "alf/_ibl_wheel.position.xyz",
             "alf/_ibl_wheel"]
)  # fmt: skip
def test_a_name_without_a_dataset_type(place: Lab, name: str) -> None:
    with pytest.raises(NoDatasetType) as caught:
        place.client.check_name(name)
    assert caught.value.hint
    assert isinstance(caught.value, ValueError)


def test_a_file_written_to_while_it_is_read(place: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    place.create()
    (file,) = place.write(POSITION)
    digest = regd.files._digest

    def slow(opened: Any) -> Any:
        file.write_text("more")
        return digest(opened)

    monkeypatch.setattr(regd.files, "_digest", slow)
    with pytest.raises(FileChanged):
        place.client.register_files(file)
    assert place.datasets() == {}


def test_a_file_that_appears_where_another_is_to_go(
    place: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.create()
    file = place.protected(POSITION)

    def choose(*args: Any) -> PurePosixPath:
        chosen = choose_destination(*args)
        place.write(chosen.as_posix(), content="faster")
        return chosen

    monkeypatch.setattr(regd.registration, "choose_destination", choose)
    with pytest.raises(PathTaken):
        place.client.register_files(file)
    assert file.read_text() == "changed"
    assert (file.parent / "#2024-05-17#" / file.name).read_text() == "faster"


def test_nobody_there_and_nobody_let_in(place: Lab) -> None:
    wrong = AlyxClient(place.server.url, USER, "wrong")
    with wrong, pytest.raises(Unauthorized):
        RegistrationClient(wrong).dtypes  # noqa: B018 - it asks Alyx
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    away = AlyxClient(f"http://127.0.0.1:{port}", token="x", sleep=lambda _: None)
    with away, pytest.raises(AlyxAway):
        RegistrationClient(away).register_weight("KS005", 1)


@pytest.mark.parametrize("amount", [0, -1, math.nan, -math.inf])
def test_an_amount_that_is_none(place: Lab, amount: float) -> None:
    for method in (place.client.register_weight, place.client.register_water_administration):
        with pytest.raises(InvalidInput, match="greater than zero"):
            method("KS005", amount)
    assert not any("weighings" in asked or "water" in asked for asked in place.asked())


def test_water_of_a_kind_or_by_a_user_that_alyx_does_not_know(place: Lab) -> None:
    for options in ({"water_type": "Wine"}, {"user": "nobody"}, {"session": str(uuid4())}):
        with pytest.raises((MemberNotFound, SessionNotFound)):
            place.client.register_water_administration("KS005", 1, **options)
    with pytest.raises(InvalidInput):
        place.client.register_water_administration("KS005", 1, session="no session")


@pytest.mark.parametrize("date", ["", "today", "2024-13-01", "2024-05-17T25:00"])
def test_a_date_that_is_none(date: str) -> None:
    with pytest.raises(InvalidInput):
        RegistrationClient.ensure_ISO8601(date)


@pytest.mark.parametrize("date", [5, 1.5, [], {}])
def test_a_date_of_another_type(date: Any) -> None:
    with pytest.raises(InvalidInput):
        RegistrationClient.ensure_ISO8601(date)


def test_a_day_that_is_full(place: Lab) -> None:
    (place.root / "KS005/2024-05-17/999").mkdir(parents=True)
    with pytest.raises(InvalidInput, match="no session number left"):
        place.client.create_new_session("KS005", date="2024-05-17")


def test_a_new_session_needs_a_root(place: Lab) -> None:
    with pytest.raises(InvalidInput, match="session_root"):
        RegistrationClient(place.alyx).create_new_session("KS005")


# --- what it is given to work with ----------------------------------------------------------------


def test_a_one_instance_lends_its_server_and_login(place: Lab, tmp_path: Path) -> None:
    place.create()
    with home_for_one(tmp_path / "home"):
        lent = connect_one(place.server.url, tmp_path / "cache")
    client = RegistrationClient(lent)
    assert client.one is lent
    assert client.alyx.user == USER
    assert client.data_root == lent.alyx.cache_dir
    assert client.register_files(place.write(POSITION))[0]["created_by"] == USER
    folder, eid = client.create_new_session("KS005")
    assert folder.is_relative_to(tmp_path / "cache")
    assert isinstance(eid, UUID)
    assert client.register_weight("KS005", 20)["user"] == USER
    client.alyx.close()


def test_the_environment_says_which_alyx(
    place: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "ALYX__URL": place.server.url, "ALYX__USERNAME": USER, "ALYX__PASSWORD": PASSWORD,
        "DATA_ROOT": str(place.root), "STATE_DIR": str(tmp_path / "state"),
    }.items():  # fmt: skip
        monkeypatch.setenv(f"REGD_{name}", value)
    client = RegistrationClient()
    assert client.one is None
    assert client.data_root == place.root
    assert client.register_weight("KS005", 20)["user"] == USER
    client.alyx.close()


def test_without_any_alyx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGD_ALYX__URL", raising=False)
    monkeypatch.delenv("REGD_CONFIG", raising=False)
    with pytest.raises(InvalidInput, match=r"alyx\.url"):
        RegistrationClient()


@pytest.mark.parametrize(
    "given", ["https://alyx.example.org", SimpleNamespace(), SimpleNamespace(alyx=None), 1]
)
def test_something_that_is_no_alyx(given: Any) -> None:
    with pytest.raises(InvalidInput, match="AlyxClient"):
        RegistrationClient(given)


def test_the_forms_of_a_session(place: Lab) -> None:
    eid = place.create()
    record, _ = place.client.register_session(place.root / SESSION, file_list=False)
    forms = [
        eid, UUID(eid), record, record["url"], f"{record['url']}/", {"url": record["url"]},
        place.root / SESSION, str(place.root / SESSION), place.root / SESSION / POSITION,
        f"/mnt/x/mainenlab/Subjects/{SESSION}", SESSION,
    ]  # fmt: skip
    assert {place.client.to_eid(form) for form in forms} == {eid}
    for form in ("", None, "x", {}, {"subject": "KS005"}, place.root, 7, "KS005/2024-02-30/001"):
        with pytest.raises(InvalidInput):
            place.client.to_eid(form)
    with pytest.raises(SessionNotFound):
        place.client.to_eid(place.root / "KS005/2024-05-17/002")


def test_another_subject_with_a_name_alike_is_not_meant(place: Lab) -> None:
    place.create()
    found = find_session(Path("ZM_108/2024-05-17/001"))
    assert found is not None
    assert place.client.search_sessions(found[1]) == []


# --- what it asks, and what becomes of it ---------------------------------------------------------


def test_a_new_session_with_files_takes_three_requests(place: Lab) -> None:
    place.write(POSITION, VELOCITY, TIMES)
    assert place.client.dtypes
    place.server.requests.clear()
    place.client.register_session(place.root / SESSION)
    assert place.asked() == ["GET /sessions", "POST /sessions", "POST /register-file"]


def test_types_are_asked_for_once_in_a_while(place: Lab) -> None:
    now = [0.0]
    client = place.make(clock=lambda: now[0])
    place.server.requests.clear()
    for now[0] in (0.0, 1.0, 500.0):
        assert client.check_name(POSITION)
    assert place.asked() == ["GET /dataset-types", "GET /data-formats"]
    now[0] = 601.0
    assert client.check_name(POSITION)
    assert len(place.asked()) == 4
    client.forget_types()
    assert client.file_extensions
    assert len(place.asked()) == 6


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_many_files_go_in_chunks(place: Lab, count: int) -> None:
    place.create()
    client = place.make(chunk_files=2)
    files = place.write(*[f"alf/p{i}/spikes.times.npy" for i in range(count)])
    records = client.register_files(files)
    assert [record["collection"] for record in records] == [f"alf/p{i}" for i in range(count)]
    assert place.asked().count("POST /register-file") == math.ceil(count / 2)


def test_a_list_of_qc_keeps_to_its_files_over_chunks(place: Lab) -> None:
    place.create()
    client = place.make(chunk_files=2)
    files = place.write(POSITION, VELOCITY, TIMES)
    records = client.register_files(files, qc=["PASS", "WARNING", "FAIL"])
    assert [record["qc"] for record in records] == [10, 30, 40]


def test_a_list_of_qc_keeps_to_its_files_after_a_refusal(place: Lab) -> None:
    place.create()
    file = place.protected(VELOCITY)
    files = [*place.write(POSITION), file, *place.write(TIMES)]
    records = place.client.register_files(files, qc=["PASS", "WARNING", "FAIL"])
    assert [record["qc"] for record in records] == [10, 30, 40]


@pytest.mark.parametrize("how", ["lost", "502", "not JSON"])
@pytest.mark.parametrize("arrived", [True, False])
def test_a_session_whose_answer_is_lost_is_created_once(
    place: Lab, how: str, arrived: bool
) -> None:
    def lose(request: httpx.Request) -> httpx.Response | None:
        if (request.method, request.url.path) != ("POST", "/sessions"):
            return None
        if arrived:
            httpx.HTTPTransport.handle_request(place.transport, request).close()
        if how == "lost":
            raise httpx.ReadTimeout("", request=request)
        return httpx.Response(502 if how == "502" else 200, text="<html>")

    place.transport.before = lose
    path = place.root / SESSION
    if arrived:
        record, _ = place.client.register_session(path, file_list=False)
    else:
        with pytest.raises(AlyxAway) as caught:
            place.client.register_session(path, file_list=False)
        assert caught.value.unknown_outcome
        place.transport.before = lambda _: None
        record, _ = place.client.register_session(path, file_list=False)
    found = find_session(path)
    assert found is not None
    assert [one["id"] for one in place.client.search_sessions(found[1])] == [record["id"]]


def test_a_registration_whose_answer_is_lost_can_be_made_again(place: Lab) -> None:
    place.create()
    files = place.write(POSITION, VELOCITY)

    def lose(request: httpx.Request) -> None:
        if request.url.path == "/register-file":
            raise httpx.RemoteProtocolError("gone", request=request)

    place.transport.after = lose
    with pytest.raises(AlyxAway) as caught:
        place.client.register_files(files)
    assert caught.value.unknown_outcome
    place.transport.after = lambda _: None
    assert len(place.client.register_files(files)) == len(place.datasets()) == 2


def test_nothing_is_patched_where_nothing_is_given(place: Lab) -> None:
    place.create()
    place.server.requests.clear()
    place.create()
    assert [asked.split()[0] for asked in place.asked()] == ["GET", "GET"]


def test_the_order_of_results(place: Lab) -> None:
    place.create()
    other = place.root / "KS005/2024-05-17/003"
    place.client.register_session(other, file_list=False)
    (other / "alf").mkdir(parents=True)
    (other / TIMES).write_text("x")
    position, velocity, notes = place.write(POSITION, VELOCITY, "notes.txt")
    given = [notes, velocity, other / TIMES, place.root / "x.y.npy", position]
    records = place.client.register_files(given)
    assert [r and (r["subject"], r["name"]) for r in records] == [
        None, ("ZM_1085", "_ibl_wheel.velocity.npy"), ("KS005", "_ibl_wheel.timestamps.npy"),
        None, ("ZM_1085", "_ibl_wheel.position.npy"),
    ]  # fmt: skip
    bodies = place.client.register_files(given, dry=True)
    assert [body["path"] for body in bodies] == [SESSION, "KS005/2024-05-17/003"]
    assert place.client.register_files(notes) is None
    assert place.client.register_files(notes, dry=True) is None


def test_a_mix_of_protected_unchanged_and_new_files(place: Lab) -> None:
    place.create()
    changed, same, new = place.protected(POSITION), *place.write(VELOCITY, TIMES)
    held = place.client.register_files(same)
    place.protect(held["id"])
    before = (same.stat().st_ino, same.stat().st_mtime_ns)
    records = place.client.register_files([new, same, changed], versions=["1", "2", "3"])
    assert [record["revision"] for record in records] == ["", "", "2024-05-17"]
    assert records[1]["id"] == held["id"]
    assert (same.stat().st_ino, same.stat().st_mtime_ns) == before
    assert place.files() == {VELOCITY, TIMES, "alf/#2024-05-17#/_ibl_wheel.position.npy"}
    versions = {path: record["version"] for path, record in place.datasets().items()}
    assert versions["alf#2024-05-17#_ibl_wheel.position.npy"] == "3"
    assert versions["alf##_ibl_wheel.timestamps.npy"] == "1"


def test_a_refused_file_leaves_no_protected_one_moved_and_unregistered(place: Lab) -> None:
    place.create()
    changed = place.protected(POSITION)
    record = {"name": "second.velocity", "filename_pattern": "*wheel.velocity*"}
    place.alyx.post("/dataset-types", record)
    with pytest.raises(FileRefused):
        place.client.register_files([changed, *place.write(VELOCITY)])
    moved = "alf#2024-05-17#_ibl_wheel.position.npy"
    assert changed.exists() or moved in place.datasets()


def test_an_open_revision_takes_new_options_though_another_one_is_protected(place: Lab) -> None:
    place.create()
    place.protect(place.client.register_files(place.write(POSITION)[0])["id"])
    (copy,) = place.write("alf/#2024-05-01#/_ibl_wheel.position.npy", content="another")
    for version in ("1", "2"):  # with no other revision protected, Alyx takes the second one
        place.client.register_files(copy, versions=version)
    assert place.datasets()["alf#2024-05-01#_ibl_wheel.position.npy"]["version"] == "2"


def test_a_file_given_twice(place: Lab) -> None:
    place.create()
    (file,) = place.write(POSITION)
    first, second = place.client.register_files([file, file])
    assert first["id"] == second["id"]


def test_a_protected_file_given_twice(place: Lab) -> None:
    place.create()
    file = place.protected(POSITION)
    first, second = place.client.register_files([file, file])
    assert first["id"] == second["id"]


def test_a_missing_file_is_said_to_be_missing(place: Lab) -> None:
    place.create()
    with pytest.raises(FileNotFoundError):
        place.client.register_files(place.root / SESSION / POSITION)


def test_failures_are_listed_and_their_flags_stay(place: Lab) -> None:
    other = place.root / "KS005/2024-05-17/001"
    other.mkdir(parents=True)
    for folder in (place.root / SESSION, other):
        (folder / "create_me.flag").touch()

    def refuse(request: httpx.Request) -> httpx.Response | None:
        if request.method == "POST" and b"KS005" in request.read():
            return httpx.Response(500, json={"detail": "no space left", "status_code": 500})
        return None

    place.transport.before = refuse
    paths, records = place.client.create_sessions(place.root)
    assert paths == [place.root / SESSION]
    assert [record["subject"] for record in records if record] == ["ZM_1085"]
    assert [path for path, _ in place.client.failures] == [other]
    assert "no space left" in str(place.client.failures[0][1])
    assert (other / "create_me.flag").exists()
    place.transport.before = lambda _: None
    assert place.client.create_sessions(place.root)[0] == [other]
    assert place.client.failures == []


# --- nothing but errors with a name ---------------------------------------------------------------

ANSWERS: list[Any] = [
    httpx.Response(200, json=[]),
    httpx.Response(200, json={}),
    httpx.Response(200, json="text"),
    httpx.Response(200, json=[1]),
    httpx.Response(200, json=[{}]),
    httpx.Response(200, json={"results": [{}], "next": None}),
    httpx.Response(200, text="<html>"),
    httpx.Response(204),
    httpx.Response(302, headers={"Location": "/login"}),
    httpx.Response(403, json={"error": "One or more datasets is protected", "details": [1]}),
    httpx.Response(403, json={"error": "One or more datasets is protected", "details": [{}]}),
    httpx.Response(403, json={"error": "One or more datasets is protected"}),
    httpx.Response(404, text="no"),
    httpx.Response(500, json={"detail": "?"}),
    httpx.Response(500, json=[]),
    httpx.ReadError("lost"),
    httpx.ConnectError("away"),
    httpx.DecodingError("odd"),
]
METHODS: dict[str, Callable[[RegistrationClient, Path], Any]] = {
    "register_session": lambda client, file: client.register_session(file.parents[1]),
    "register_files": lambda client, file: client.register_files([file]),
    "check_protected": lambda client, file: client.check_protected_files(file),
    "find_files": lambda client, file: list(client.find_files(file.parents[1])),
    "create_new": lambda client, _: client.create_new_session("KS005"),
    "water": lambda client, file: client.register_water_administration("KS005", 1, session=file),
    "weight": lambda client, _: client.register_weight("KS005", 1),
    "assert_exists": lambda client, _: client.assert_exists(["KS005"], "subjects"),
    "datasets": lambda client, _: client.datasets("x"),
}


def _unnamed(place: Lab, file: Path, method: str, path: str, answer: Any) -> str | None:
    """What gets out that is no error of regd, when each request to `path` is so answered."""

    def reply(request: httpx.Request) -> httpx.Response | None:
        if request.url.path != path or request.method not in ("GET", "POST"):
            return None
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    place.transport.before = reply
    try:
        METHODS[method](place.make(), file)
    except RegdError:
        return None
    except Exception as error:
        return f"{method}: {path} answers {answer!r} {getattr(answer, 'text', '')}: {error!r}"
    finally:
        place.transport.before = lambda _: None
    return None


def test_whatever_is_answered_the_error_has_a_name(place: Lab) -> None:
    place.create()
    (file,) = place.write(POSITION)
    paths = ["/dataset-types", "/data-formats", "/sessions", "/register-file", "/datasets",
             "/check-protected", "/weighings", "/water-administrations",
             "/subjects/KS005"]  # fmt: skip
    found = [
        said
        for method in METHODS
        for path in paths
        for answer in ANSWERS
        if (said := _unnamed(place, file, method, path, answer))
    ]
    assert not found, "\n".join(found)


def test_whatever_goes_wrong_on_the_way_the_error_has_a_name(place: Lab) -> None:
    """The same where Alyx does not answer in JSON, or with an error."""
    place.create()
    (file,) = place.write(POSITION)
    paths = ["/dataset-types", "/data-formats", "/sessions", "/register-file",
             "/check-protected", "/weighings", "/water-administrations",
             "/subjects/KS005"]  # fmt: skip
    answers = [
        a
        for a in ANSWERS
        if isinstance(a, Exception) or a.status_code not in (200, 204, 403) or "<" in a.text
    ]
    for method in METHODS:
        for path in paths:
            for answer in answers:
                assert _unnamed(place, file, method, path, answer) is None


def test_no_secret_is_shown(place: Lab) -> None:
    place.create()
    token = str(place.alyx._login.token)
    assert len(token) > 20
    with structlog.testing.capture_logs() as logs:
        place.client.register_session(place.root / SESSION)
        shown = [repr(place.client), str(place.client), repr(vars(place.client)), repr(place.alyx)]
        for answer in ANSWERS:
            place.transport.before = lambda _, a=answer: (
                httpx.Response(a.status_code, headers=a.headers, content=a.content)
                if isinstance(a, httpx.Response)
                else None
            )
            try:
                place.client.register_weight("KS005", 1)
            except Exception as error:
                shown += [repr(error), str(error), getattr(error, "hint", "")]
    for text in (*shown, *map(repr, logs)):
        assert token not in text
        assert PASSWORD not in text


# --- where a protected file goes ------------------------------------------------------------------

_DAYS = st.dates(datetime.date(2020, 1, 1), datetime.date(2026, 1, 1))
_SUFFIX = st.one_of(
    st.just(""), st.sampled_from("abcxyz"), st.sampled_from(["za", "zz", "zzb", "ba", "-x", "1"])
)
_NAMES = st.one_of(
    st.just(""),
    _SUFFIX.map(lambda suffix: f"{TODAY}{suffix}"),
    st.tuples(_DAYS, _SUFFIX).map(lambda both: f"{both[0]}{both[1]}"),
    st.sampled_from(["v1", "v1a", "final", "2024", "a.b"]),
)
_HISTORIES = st.lists(
    st.builds(Revision, _NAMES, st.booleans()), max_size=8, unique_by=lambda revision: revision.name
)
_FILES = _NAMES.map(
    lambda name: PurePosixPath("alf", *([f"#{name}#"] if name else []), "spikes.times.npy")
)


@given(file=_FILES, history=_HISTORIES, occupied=st.sets(_NAMES.filter(bool), max_size=5))
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_a_destination_is_free(
    file: PurePosixPath, history: list[Revision], occupied: set[str]
) -> None:
    chosen = choose_destination(file, history, TODAY, occupied)
    assert chosen == choose_destination(file, history, TODAY, sorted(occupied))
    assert chosen.name == file.name
    name = own_revision(chosen) or ""
    base = file.parent.parent if own_revision(file) else file.parent
    assert chosen == (base / f"#{name}#" / file.name if name else base / file.name)
    protected = {revision.name for revision in history if revision.protected}
    assert name not in protected
    if chosen != file:
        assert name not in occupied
        assert name
    own = own_revision(file)
    if own is not None:
        assert name.startswith(own)
        assert name >= own
        assert (chosen == file) == (own not in protected)
    elif chosen != file and history and history[0].name.startswith(str(TODAY)):
        # what is new sorts after what is newest, as ONE and Alyx sort revisions
        assert name > history[0].name or not history[0].protected


@given(
    base=st.sampled_from(["2024-05-17", "v1", "x"]),
    count=st.integers(0, 200),
    gaps=st.sets(st.integers(0, 199)),
)
@example(base="2024-05-17", count=26, gaps=set())
@example(base="2024-05-17", count=52, gaps={30})
@settings(deadline=None, derandomize=True)
def test_the_next_name_is_the_first_free_one_and_sorts_after_those_before(
    base: str, count: int, gaps: set[int]
) -> None:
    names: list[str] = []
    for _ in range(count):
        names.append(next_revision(base, names))
    assert names == sorted(names)
    assert len(set(names)) == count
    taken = [name for index, name in enumerate(names) if index not in gaps]
    expected = next((n for n in names if n not in taken), next_revision(base, names))
    assert next_revision(base, taken) == expected
    if names:
        assert next_revision(base, [], after=names[-1]) > names[-1]


@given(reserved=st.sets(st.sampled_from([f"2024-05-17{chr(c)}" for c in range(97, 122)])))
@settings(derandomize=True, deadline=None)
def test_names_up_to_z_are_ones(reserved: Sequence[str]) -> None:
    theirs = one.registration.RegistrationClient._next_revision("2024-05-17", reserved)
    assert next_revision("2024-05-17", reserved) == theirs


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], ""),
        ([("", False)], ""),
        ([("", True)], "2024-05-17"),
        ([("2022-10-31", False), ("2022-05-31", True), ("", True)], "2022-10-31"),
        ([("2022-10-31", True), ("", True)], "2024-05-17"),
        ([("manual", False), ("", True)], "2024-05-17"),
        ([("manual", True), ("", True)], "2024-05-17"),
        ([("2024-05-17", True), ("", True)], "2024-05-17a"),
        ([("2024-05-17c", True), ("2024-05-17", True), ("", True)], "2024-05-17d"),
        ([("2024-05-17z", True), ("2024-05-17", True)], "2024-05-17za"),
        ([("2024-05-17zz", True)], "2024-05-17zza"),
        ([("2024-05-17", False), ("", True)], "2024-05-17"),
    ],
)
def test_the_rules_for_a_file_outside_any_revision(
    history: list[tuple[str, bool]], expected: str
) -> None:
    revisions = [Revision(*entry) for entry in history]
    chosen = choose_destination(PurePosixPath("alf/a.b.npy"), revisions, TODAY)
    assert (own_revision(chosen) or "") == expected


def test_names_come_to_an_end() -> None:
    names: list[str] = []
    while len(names) < 1040:
        names.append(next_revision("2024-05-17", set(names)))
    with pytest.raises(NeedsHuman, match="no revision name is left"):
        next_revision("2024-05-17", names)
