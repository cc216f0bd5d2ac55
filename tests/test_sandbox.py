"""The sandbox beyond the recorded exchanges: the rules, and the server itself."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from regd.sandbox.register import TypeMatcher
from regd.sandbox.server import PortInUseError, Server
from regd.sandbox.store import LoadError
from regd.sandbox.throttle import RateError, Throttle
from tests.conftest import INITIAL

SESSION = "ZM_1085/2024-05-06/001"


@contextmanager
def login(
    server: Server, user: str = "rig_user", password: str = "rig-password"
) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, verify=False) as client:
        answer = client.post("/auth-token", data={"username": user, "password": password})
        client.headers["Authorization"] = f"Token {answer.json()['token']}"
        yield client


@pytest.fixture
def alyx(sandbox: Server) -> Iterator[httpx.Client]:
    with login(sandbox) as client:
        yield client


def make_session(client: httpx.Client, **values: Any) -> Any:
    start = {"subject": "ZM_1085", "number": 1, "start_time": "2024-05-06T10:00:00"}
    return client.post("/sessions", json={**start, **values}).json()


def register(client: httpx.Client, *files: str, **values: Any) -> httpx.Response:
    return client.post(
        "/register-file", json={"path": SESSION, "filenames": files, "labs": "mainenlab", **values}
    )


# -- sessions


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("2024-05-06", "2024-05-06T00:00:00"),
        ("2024-5-6 7:08", "2024-05-06T07:08:00"),
        ("2024-05-06T10:00:00+02:00", "2024-05-06T08:00:00"),
        ("2024-05-06T10:00:00.1234567Z", "2024-05-06T10:00:00.123456"),
    ],
)
def test_times_are_kept_in_utc_without_a_zone(alyx: httpx.Client, sent: str, kept: str) -> None:
    assert make_session(alyx, start_time=sent)["start_time"] == kept


@pytest.mark.parametrize(
    ("values", "field", "reason"),
    [
        ({"number": "1.5"}, "number", "A valid integer is required."),
        ({"number": 2**31}, "number", "Ensure this value is less than or equal to 2147483647."),
        ({"users": "rig_user"}, "users", 'Expected a list of items but got type "str".'),
        ({"lab": ""}, "lab", "This field may not be null."),
        ({"type": []}, "type", "Not a valid string."),
        ({"task_protocol": "x" * 1024}, "task_protocol",
         "Ensure this field has no more than 1023 characters."),
        ({"parent_session": "x"}, "parent_session", "Invalid hyperlink - No URL match."),
    ],
)  # fmt: skip
def test_bad_values_are_named(
    alyx: httpx.Client, values: dict[str, Any], field: str, reason: str
) -> None:
    assert make_session(alyx, **values) == {field: [reason], "status_code": 400}


def test_put_asks_for_what_is_required_and_patch_does_not(alyx: httpx.Client) -> None:
    session = make_session(alyx, n_trials=5)
    missing = alyx.put(session["url"], json={"n_trials": 6})
    assert missing.json()["subject"] == ["This field is required."]
    assert alyx.patch(session["url"], json={"n_trials": 6}).json()["n_trials"] == 6


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ({"subject": "zm_1085"}, 2),
        ({"date_range": "2024-05-06,2024-05-06"}, 1),
        ({"users": "rig_user,test_user"}, 1),
        ({"users": "rig_user"}, 2),
        ({"projects": "PRACT"}, 1),
        ({"project": "_"}, 1),
        ({"procedures": "imag"}, 1),
        ({"location": "rig1"}, 1),
        ({"number": "002"}, 1),
        ({"qc": "pass"}, 1),
        ({"json": "depth__um__gte,100"}, 1),
        ({"performance_gte": "70"}, 1),
        ({"django": "start_time__date__gt,2024-05-06"}, 1),
        ({"django": "~projects__name,ibl_neuropixel_brainwide_01"}, 1),
        ({"django": 'subject__nickname__in,["ZM_1085","x"],number,2'}, 1),
        ({"django": "users__username__regex,^test"}, 1),
        ({"histology": "True"}, 0),
        ({"no_such_filter": "x"}, 2),
    ],
)
def test_session_filters(alyx: httpx.Client, query: dict[str, str], count: int) -> None:
    make_session(alyx)
    make_session(
        alyx, number=2, start_time="2024-05-07T10:00:00", users=["rig_user", "test_user"],
        projects=["ibl_neuropixel_brainwide_01", "practice"], procedures=["Imaging"],
        location="mainenlab_rig1", qc="PASS", json={"depth": {"um": 120}}, n_trials=10,
        n_correct_trials=8,
    )  # fmt: skip
    assert alyx.get("/sessions", params=query).json()["count"] == count


@pytest.mark.parametrize(
    ("query", "status", "reason"),
    [
        ("number=x", 400, "Enter a number."),
        ("parent_session=x", 400, "“x” is not a valid UUID."),
        ("date_range=2024-05-06", 500, "list index out of range"),
        ("date_range=x,y", 500, "“x” value has an invalid date format"),
        ("django=nothing,1", 500, "Cannot resolve keyword 'nothing' into field."),
        ("django=number__odd,1", 500, "Unsupported lookup 'odd' for IntegerField"),
    ],
)
def test_bad_filters(alyx: httpx.Client, query: str, status: int, reason: str) -> None:
    answer = alyx.get(f"/sessions?{query}")
    assert answer.status_code == status
    assert reason in answer.text


def test_paging_keeps_the_query_and_its_bounds(alyx: httpx.Client) -> None:
    for number in range(3):
        make_session(alyx, number=number)
    first = alyx.get("/sessions?subject=ZM_1085&limit=2").json()
    assert first["count"] == 3
    assert first["next"].endswith("/sessions?limit=2&offset=2&subject=ZM_1085")
    last = alyx.get(first["next"]).json()
    assert (len(last["results"]), last["next"]) == (1, None)
    assert last["previous"].endswith("/sessions?limit=2&subject=ZM_1085")
    assert len(alyx.get("/dataset-types?limit=5000").json()["results"]) == 131


def test_deleting_a_session_deletes_its_datasets(alyx: httpx.Client) -> None:
    session = make_session(alyx)
    assert register(alyx, "alf/spikes.times.npy").status_code == 201
    deleted = alyx.delete(session["url"])
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert alyx.get("/datasets").json()["count"] == 0
    assert alyx.get("/files").json()["count"] == 0


# -- registration


def test_a_hash_that_changes_unsets_exists(alyx: httpx.Client) -> None:
    make_session(alyx)
    name = "flatiron_mainenlab"

    def exists(**values: Any) -> dict[str, bool]:
        (row,) = register(alyx, "alf/spikes.times.npy", **values).json()
        return {one["data_repository"]: one["exists"] for one in row["file_records"]}

    assert exists(hashes=["a"], name=name) == {name: True, "mainenlab_local": False}
    assert exists(hashes=["a"]) == {name: True, "mainenlab_local": False}
    assert exists(hashes=["b"]) == {name: False, "mainenlab_local": False}


def test_forms_and_comma_lists_register_too(alyx: httpx.Client) -> None:
    make_session(alyx)
    answer = alyx.post(
        "/register-file",
        data={"path": SESSION, "filenames": "spikes.times.npy,spikes.amps.npy",
              "hashes": "a,b", "filesizes": "1,2", "default": "False"},
    )  # fmt: skip
    assert [(one["name"], one["file_size"], one["default"]) for one in answer.json()] == [
        ("spikes.times.npy", 1, False),
        ("spikes.amps.npy", 2, False),
    ]


def test_registering_makes_the_day_s_sessions_children_of_one(alyx: httpx.Client) -> None:
    for number in (1, 2):
        make_session(alyx, number=number)
    for number in (1, 2):
        alyx.post("/register-file", json={"path": f"ZM_1085/2024-05-06/{number}", "filenames": []})
    found = alyx.get("/sessions").json()["results"]
    parents = [alyx.get(one["url"]).json()["parent_session"] for one in found]
    assert sorted(parent is None for parent in parents) == [False, True]


@pytest.mark.parametrize(
    ("file", "status", "reason"),
    [
        ("alf/#a b#/spikes.times.npy", 201, ""),
        ("alf/#r#/deeper/spikes.times.npy", 400, "only 1 revision"),
        ("alf/spikes.nothing.npy", 500, "No dataset type found"),
        ("alf/wheel.position.none", 500, "DataFormat matching query does not exist."),
        ("alf\\spikes.times.npy", 400, "Invalid path"),
        ("a" * 256 + "/spikes.times.npy", 500, "value too long"),
    ],
)
def test_odd_files(alyx: httpx.Client, file: str, status: int, reason: str) -> None:
    make_session(alyx)
    answer = register(alyx, file)
    assert (answer.status_code, reason in answer.text) == (status, True), answer.text


def test_other_objects_have_datasets(alyx: httpx.Client) -> None:
    subject = alyx.get("/subjects/ZM_1085").json()["id"]
    values = {"content_type": "subject", "object_id": subject, "path": "Subjects/ZM_1085"}
    assert "valid repository" in register(alyx, "spikes.times.npy", **values).text
    (row,) = register(alyx, "spikes.times.npy", name="mainenlab_local", **values).json()
    assert (row["collection"], row["content_type"]) == ("Subjects/ZM_1085", "subjects.subject")


def test_a_protected_dataset_cannot_be_deleted(alyx: httpx.Client) -> None:
    make_session(alyx)
    (row,) = register(alyx, "alf/spikes.times.npy").json()
    alyx.post("/tags", json={"name": "kept", "protected": True})
    alyx.patch(f"/datasets/{row['id']}", json={"tags": ["kept"]})
    refused = alyx.delete(f"/datasets/{row['id']}")
    assert (refused.status_code, '"kept"' in refused.json()["detail"]) == (403, True)
    assert alyx.get("/datasets?protected=True").json()["count"] == 1
    assert alyx.delete("/tags/kept").status_code == 204
    assert alyx.delete(f"/datasets/{row['id']}").status_code == 204


# -- who may, and how


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("", "Authentication credentials were not provided."),
        ("Bearer abc", "Authentication credentials were not provided."),
        ("Token", "Invalid token header. No credentials provided."),
        ("Token a b", "Invalid token header. Token string should not contain spaces."),
        ("Token abc", "Invalid token."),
    ],
)
def test_refused_tokens(sandbox: Server, header: str, reason: str) -> None:
    answer = httpx.get(f"{sandbox.url}/sessions", headers={"Authorization": header})
    assert answer.json() == {"detail": reason, "status_code": 403}


def test_public_users_read_only(sandbox: Server) -> None:
    with login(sandbox, "public_user", "public-password") as public:
        assert public.get("/labs").status_code == 200
        assert public.delete("/labs/mainenlab").status_code == 403


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/sessions", 405),
        ("POST", "/locations", 405),
        ("PATCH", "/weighings/00000000-0000-4000-8000-000000000000", 405),
        ("GET", "/register-file", 405),
        ("GET", "/sessions/", 404),
        ("GET", "/sessions/1", 404),
        ("GET", "/procedures/Imaging", 404),
        ("HEAD", "/labs", 200),
        ("OPTIONS", "/labs", 200),
    ],
)
def test_methods_and_addresses(alyx: httpx.Client, method: str, path: str, status: int) -> None:
    assert alyx.request(method, path).status_code == status


@pytest.mark.parametrize(
    ("content", "kind", "status", "reason"),
    [
        (b"{", "application/json", 400, "JSON parse error"),
        (b"[]", "application/json", 400, "Expected a dictionary, but got list."),
        (b"null", "application/json", 400, "No data provided"),
        (b"x", "text/plain", 415, "Unsupported media type"),
    ],
)
def test_bodies(alyx: httpx.Client, content: bytes, kind: str, status: int, reason: str) -> None:
    answer = alyx.post("/tags", content=content, headers={"content-type": kind})
    assert (answer.status_code, reason in answer.text) == (status, True), answer.text


def test_a_browser_is_told_what_it_is(sandbox: Server) -> None:
    answer = httpx.get(sandbox.url)
    assert "trials and tests" in answer.text
    assert answer.headers["content-type"].startswith("text/html")


# -- the limit


def test_the_window_slides() -> None:
    now = [100.0]
    throttle = Throttle("2/minute", clock=lambda: now[0])
    assert throttle.wait("a") is None
    now[0] += 20
    assert throttle.wait("a") is None
    now[0] += 0.5
    assert (throttle.wait("a"), throttle.wait("b")) == (40, None)
    now[0] += 39.5
    assert throttle.wait("a") is None
    assert throttle.wait("a") == 20


def test_too_many_requests_are_told_when_to_come_back() -> None:
    with Server(rate_limit="1/hour") as server, login(server) as client:
        assert client.get("/labs").status_code == 200
        refused = client.get("/labs")
    assert refused.status_code == 429
    assert 3590 < int(refused.headers["retry-after"]) <= 3600


# -- the server


def test_a_file_keeps_what_was_registered(tmp_path: Path) -> None:
    db = tmp_path / "alyx.sqlite"
    with Server(db=db, rate_limit=None) as server, login(server) as client:
        url = make_session(client)["url"].removeprefix(server.url)
    with Server(db=db, load=INITIAL, rate_limit=None) as server, login(server) as client:
        assert client.get(url).json()["number"] == 1


def test_the_built_in_lab_has_one_type_for_each_name() -> None:
    with Server(rate_limit=None) as server, login(server) as client:
        make_session(client)
        answer = register(client, "alf/_ibl_trials.table.pqt", "_iblrig_leftCamera.raw.mp4")
        assert answer.status_code == 201, answer.text
        assert "ambiguous" not in client.get("/dataset-types").text


def test_it_remembers_what_was_asked(sandbox: Server) -> None:
    with login(sandbox) as client:
        client.get("/labs/nowhere")
    seen = [(one.method, one.path, one.status) for one in sandbox.requests]
    assert seen == [("POST", "/auth-token", 200), ("GET", "/labs/nowhere", 404)]


class Broken:
    """Middleware that answers 503 in place of everything."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def test_faults_can_be_put_in_front() -> None:
    with Server(middleware=[Middleware(Broken)]) as server:
        assert httpx.get(server.url).status_code == 503


def test_many_clients_at_once(sandbox: Server) -> None:
    with login(sandbox) as client:
        make_session(client)

        def post(number: int) -> int:
            return register(client, f"alf/p{number}/spikes.times.npy").status_code

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(post, range(64))) == {201}
        assert client.get("/datasets").json()["count"] == 64


@pytest.mark.parametrize("rate", ["fast", "5", "0/minute", "5/fortnight", "-1/s"])
def test_a_rate_limit_that_cannot_be_read(rate: str) -> None:
    with pytest.raises(RateError, match="550/minute"):
        Server(rate_limit=rate)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot read"), ("{", "not JSON"), ("[]", "one JSON object"), ("{}", "'users'")],
)
def test_a_lab_that_cannot_be_loaded(tmp_path: Path, content: str | None, reason: str) -> None:
    file = tmp_path / "lab.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(LoadError, match=reason):
        Server(load=file)


def test_a_lab_that_names_what_it_does_not_hold() -> None:
    lab = json.loads(INITIAL.read_text())
    lab["subjects"][0]["lab"] = "elsewhere"
    with pytest.raises(LoadError, match="elsewhere is used but not listed"):
        Server(load=lab)


@pytest.mark.parametrize("name", ["not-a-database", "no/such/folder"])
def test_a_database_file_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    (tmp_path / "not-a-database").write_bytes(b"something else" * 100)
    with pytest.raises(LoadError, match="cannot be used"):
        Server(db=tmp_path / name)


def test_a_port_in_use(sandbox: Server) -> None:
    with pytest.raises(PortInUseError, match="another --port"):
        Server(port=sandbox.port)


def test_the_command_says_who_may_log_in_and_stops_when_told() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from regd.sandbox.server import serve; serve(port={port})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = b"".join(iter(process.stdout.readline, b"\n")).decode()
        assert httpx.get(f"http://127.0.0.1:{port}/auth-token").status_code == 405
        process.terminate()
        assert process.wait(5) == 0
    assert f"http://127.0.0.1:{port}" in said
    assert "rig_user" in said
    assert "rig-password" in said
    assert "not a database to keep data in" in said


def test_who_goes_away_in_the_middle_of_a_request_is_no_fault() -> None:
    command = [sys.executable, "-m", "regd", "sandbox", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        url = next(
            word for line in process.stdout for word in line.split() if word.startswith("http://")
        )
        url = url.rstrip("/.,")
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        for _ in range(5):
            with socket.create_connection(address) as gone:
                head = "POST /sessions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
                gone.sendall(f"{head}{{".encode())
        assert httpx.get(f"{url}/data-formats").status_code == 403
        process.terminate()
        assert "Traceback" not in process.stdout.read()


def test_no_name_fits_two_types_of_the_built_in_lab() -> None:
    with Server() as server:
        types = server.store.find("datasettype")
        matcher = TypeMatcher(server.store)
        for row in types:
            pattern = row["filename_pattern"] or f"{row['name']}.npy"
            for filling in ("", "x"):
                name = pattern.replace("?", "x").removesuffix("*").replace("*", filling)
                assert [one["name"] for one in matcher.match(name)] == [row["name"]], name
