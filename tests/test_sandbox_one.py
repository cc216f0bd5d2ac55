"""Unmodified ONE-api works against the sandbox."""

import hashlib
from pathlib import Path

import one.params
import pytest
import requests
from one.api import ONE
from one.registration import RegistrationClient

from regd.sandbox.server import Server

# ONE's `requests` leaves its connections for the garbage collector to close
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def client(sandbox: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RegistrationClient:
    monkeypatch.setenv("HOME", str(tmp_path))  # ONE makes folders there
    monkeypatch.setattr(one.params.iopar, "getfile", lambda name: str(tmp_path / f".{name}"))
    api = ONE(
        base_url=sandbox.url,
        username="test_user",
        password="test-password",
        cache_dir=tmp_path / "cache",
        cache_rest=None,
        silent=True,
    )
    return RegistrationClient(api)


def record(session: Path, *names: str) -> list[Path]:
    for name in names:
        file = session / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    return [session / name for name in names]


def test_the_api_description_is_served(client: RegistrationClient) -> None:
    assert {"sessions", "datasets", "register-file", "tags"} <= set(
        client.one.alyx.rest_schemes.endpoints
    )


def test_a_session_and_its_files(client: RegistrationClient, tmp_path: Path) -> None:
    session = tmp_path / "cache" / "ZM_1085" / "2024-03-04" / "001"
    files = record(session, "alf/spikes.times.npy", "alf/_ibl_wheel.position.npy")
    created, records = client.register_session(
        session,
        users="rig_user",
        projects="practice",
        procedures="Imaging",
        n_trials=10,
        n_correct_trials=7,
        start_time="2024-03-04T10:11:12",
        file_list=files,
    )
    assert created["users"] == ["rig_user"]
    assert created["start_time"] == "2024-03-04T10:11:12"
    assert [one["name"] for one in records] == [file.name for file in files]
    held = client.one.alyx.rest("datasets", "list", session=created["id"])
    digests = {row["name"]: row["hash"] for row in held}
    assert digests == {f.name: hashlib.md5(f.read_bytes()).hexdigest() for f in files}


def test_create_sessions_by_flag(client: RegistrationClient, tmp_path: Path) -> None:
    session = tmp_path / "cache" / "KS005" / "2024-03-04" / "002"
    record(session, "create_me.flag")
    paths, created = client.create_sessions(tmp_path / "cache")
    assert [str(path) for path in paths] == [str(session)]
    assert created[0]["number"] == 2
    assert not (session / "create_me.flag").exists()


def test_protected_files_go_to_a_revision(client: RegistrationClient, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    session, _ = client.create_new_session("ZM_1085", session_root=root, date="2024-03-05")
    (file,) = record(session, "alf/spikes.times.npy")
    (first,) = client.register_files([file])
    client.one.alyx.rest("tags", "create", data={"name": "frozen", "protected": True})
    client.one.alyx.rest("datasets", "partial_update", id=first["id"], data={"tags": ["frozen"]})
    assert client.check_protected_files([file])[0]["status_code"] == 403
    (second,) = client.register_files([file])
    assert second["revision"] != ""
    assert not file.exists()
    revisions = client.one.alyx.rest("revisions", "list")
    assert [row["name"] for row in revisions] == [second["revision"]]


def test_search_finds_it(client: RegistrationClient, tmp_path: Path) -> None:
    session = tmp_path / "cache" / "flowers" / "2024-03-06" / "003"
    created, _ = client.register_session(session, projects=["practice"], procedures=["Imaging"])
    for terms in (
        {"subject": "flowers"},
        {"subject": "flowers", "date_range": ["2024-03-06", "2024-03-06"], "number": 3},
        {"lab": "mainenlab", "projects": "practice"},
        {"users": "test_user", "procedures": "imaging"},
        {"django": "subject__nickname__icontains,flow"},
    ):
        assert [str(eid) for eid in client.one.search(query_type="remote", **terms)] == [
            created["id"]
        ]
    assert list(client.one.search(subject="KS005", query_type="remote")) == []
    assert str(client.one.path2eid(session)) == created["id"]


def test_weight_and_water(client: RegistrationClient) -> None:
    assert client.register_weight("flowers", 25.31)["weight"] == 25.31
    given = client.register_water_administration("flowers", 1.25)
    assert given["water_type"] == "Water"


def test_rest_create_read_update(client: RegistrationClient) -> None:
    alyx = client.one.alyx
    made = alyx.rest("subjects", "create", data={"nickname": "new-1", "lab": "mainenlab"})
    assert alyx.rest("subjects", "read", id="new-1")["id"] == made["id"]
    updated = alyx.rest("subjects", "partial_update", id="new-1", data={"sex": "F"})
    assert updated["sex"] == "F"
    assert len(alyx.rest("dataset-types", "list")) == 131
    alyx.rest("subjects", "delete", id="new-1")
    with pytest.raises(requests.HTTPError, match="No Subject matches"):
        alyx.rest("subjects", "read", id="new-1")
