"""The HTTP side: against the sandbox where it can be, with made-up answers where it cannot."""

import base64
import datetime
import http.server
import json
import logging
import ssl
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from regd import alyx
from regd.alyx import AlyxClient, RateLimit
from regd.errors import (
    AlyxAway,
    AlyxFault,
    AlyxOdd,
    AlyxRefused,
    AlyxThrottled,
    DatasetsProtected,
    FileRefused,
    InvalidInput,
    MemberNotFound,
    NeedsHuman,
    RegdError,
    RevisionProtected,
    SessionNotFound,
    Stopping,
    SubjectNotFound,
    TryLater,
    Unauthorized,
)
from regd.sandbox.server import Server
from regd.settings import Settings
from tests.conftest import INITIAL

USER, PASSWORD = "rig_user", "rig-password"
SECRET = "5ec2e7" * 7  # a token that is to be seen nowhere

steady = settings(deadline=None, derandomize=True, max_examples=200)

Handler = Callable[[httpx.Request], httpx.Response]


class Fake:
    """An Alyx of made-up answers, and what it was asked."""

    def __init__(self, *answers: httpx.Response | Exception | Handler) -> None:
        self.answers = list(answers)
        self.asked: list[httpx.Request] = []
        self.slept: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            # an answer can be given once only
            return httpx.Response(
                answer.status_code, headers=answer.headers, content=answer.content
            )
        return answer(request)

    def client(self, **more: Any) -> AlyxClient:
        more = {"token": SECRET, "chance": lambda: 0.0, "sleep": self.slept.append, **more}
        return AlyxClient("https://alyx.test", transport=httpx.MockTransport(self), **more)


def reply(status: int = 200, body: Any = None, **headers: str) -> httpx.Response:
    if isinstance(body, bytes):
        return httpx.Response(status, content=body, headers=headers)
    return httpx.Response(status, json=body, headers=headers)


def connect(server: Server, **more: Any) -> AlyxClient:
    more = {"sleep": lambda _: None, "requests_per_minute": None, **more}
    if not {"username", "token"} & set(more):
        more |= {"username": USER, "password": PASSWORD}
    return AlyxClient(server.url, **more)


def paths(server: Server) -> list[str]:
    return [asked.path for asked in server.requests]


# --- credentials ---------------------------------------------------------------------------------


def test_a_token_is_fetched_once(sandbox: Server) -> None:
    with connect(sandbox) as client:
        assert client.user == USER
        for _ in range(3):
            assert client.get("/users")
    assert paths(sandbox) == ["/auth-token", *["/users"] * 3]


def test_the_password_is_sent_as_a_form(sandbox: Server) -> None:
    fake = Fake(reply(body={"token": "t"}), reply(body={}))
    with fake.client(username="ü ser", password="p&ss=wörd", token=None) as client:
        client.get("/users")
    form = fake.asked[0]
    assert form.headers["Content-Type"] == "application/x-www-form-urlencoded"
    assert dict(httpx.QueryParams(form.content.decode())) == {
        "username": "ü ser", "password": "p&ss=wörd",
    }  # fmt: skip
    assert "Authorization" not in form.headers
    assert fake.asked[1].headers["Authorization"] == "Token t"


def test_a_token_alone_is_enough(sandbox: Server) -> None:
    with connect(sandbox) as client:
        client.get("/users")
        token = client._login.token
    sandbox.requests.clear()
    with connect(sandbox, token=token) as client:
        assert client.get("/users")
    assert paths(sandbox) == ["/users"]


def test_a_refused_password_is_not_sent_again_at_once() -> None:
    """Several threads find out at the same time, and accounts get locked."""
    now = [0.0]
    fake = Fake(reply(400, {"non_field_errors": ["Unable to log in."]}))
    with fake.client(token=None, username=USER, password="x", clock=lambda: now[0]) as client:
        for seconds, asked in ((0, 1), (5, 1), (11, 2)):
            now[0] = seconds
            with pytest.raises(Unauthorized):
                client.get("/sessions")
            assert len(fake.asked) == asked


def test_a_wrong_password(sandbox: Server) -> None:
    with (
        connect(sandbox, username=USER, password="wrong") as client,
        pytest.raises(Unauthorized) as e,
    ):
        client.get("/users")
    assert USER in str(e.value)
    assert "alyx.password" in e.value.hint
    assert "wrong" not in str(e.value)
    assert paths(sandbox) == ["/auth-token"]


def test_a_wrong_token_alone(sandbox: Server) -> None:
    with connect(sandbox, token=SECRET) as client, pytest.raises(Unauthorized) as e:
        client.get("/users")
    assert "alyx.token" in e.value.hint
    assert paths(sandbox) == ["/users"]


def test_no_credentials(sandbox: Server) -> None:
    for half in ({"username": USER}, {"username": None, "password": "x"}):
        with connect(sandbox, **half) as client, pytest.raises(Unauthorized) as e:
            client.get("/users")
        assert "alyx.token" in e.value.hint
    assert paths(sandbox) == []


def test_a_refused_token_is_renewed_once(sandbox: Server) -> None:
    with connect(sandbox, token=SECRET, username=USER, password=PASSWORD) as client:
        assert client.get("/users")
        assert client.get("/users")
    assert paths(sandbox) == ["/users", "/auth-token", "/users", "/users"]


def test_a_renewed_token_that_is_refused_too_is_the_end() -> None:
    refused = reply(403, {"detail": "Invalid token."})
    fake = Fake(refused, reply(body={"token": "new"}), refused)
    with fake.client(username="u", password="p") as client, pytest.raises(Unauthorized):
        client.get("/users")
    assert [r.url.path for r in fake.asked] == ["/users", "/auth-token", "/users"]


def test_threads_that_are_refused_together_log_in_once(sandbox: Server) -> None:
    barrier = threading.Barrier(6)
    with connect(sandbox, token=SECRET, username=USER, password=PASSWORD) as client:
        send = client._send

        def together(method: str, path: str, **content: Any) -> httpx.Response:
            answer = send(method, path, **content)
            if content.get("token") == SECRET:
                barrier.wait(timeout=10)
            return answer

        client._send = together  # type: ignore[method-assign]
        threads = [threading.Thread(target=client.get, args=("/users",)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert paths(sandbox).count("/auth-token") == 1
    assert [a.status for a in sandbox.requests].count(403) == 6


@pytest.mark.parametrize("answer", [reply(body={}), reply(body=["token"]), reply(body="token")])
def test_a_log_in_without_a_token_in_the_answer(answer: httpx.Response) -> None:
    fake = Fake(answer)
    with (
        fake.client(username="u", password="p", token=None) as client,
        pytest.raises(AlyxAway, match="without a token"),
    ):
        client.get("/users")


def test_too_many_log_ins_are_waited_for() -> None:
    slow_down = reply(429, {"detail": "throttled"}, **{"Retry-After": "3"})
    fake = Fake(slow_down, reply(body={"token": "t"}), reply(body={"n": 1}))
    with fake.client(username="u", password="p", token=None) as client:
        assert client.get("/users") == {"n": 1}
    assert fake.slept == [3.0]


# --- answers -------------------------------------------------------------------------------------


def test_records_are_made_read_changed_and_listed(sandbox: Server) -> None:
    with connect(sandbox) as client:
        made = client.rest(
            "sessions", "create",
            data={"subject": "ZM_1085", "date": "2024-05-01", "number": 1, "users": [USER],
                  "start_time": "2024-05-01T10:00:00", "lab": "mainenlab"},
        )  # fmt: skip
        eid = made["url"].rsplit("/", 1)[-1]
        assert client.rest("sessions", "read", id=eid)["number"] == 1
        assert client.rest("sessions", "read", id=made["url"])["number"] == 1
        client.rest("/sessions/", "partial_update", id=eid, data={"task_protocol": "p"})
        found = client.rest(
            "sessions", "list", subject="ZM_1085", date_range="2024-05-01,2024-05-01"
        )
        assert [record["task_protocol"] for record in found] == ["p"]
        assert client.rest("sessions", "list", no_cache=False, subject="nobody") == []


def test_rest_refuses_what_it_cannot_do() -> None:
    fake = Fake(reply(body={}))
    with fake.client() as client:
        with pytest.raises(InvalidInput, match="delete"):
            client.rest("sessions", "delete", id="x")
        for action in ("read", "partial_update"):
            with pytest.raises(InvalidInput, match="id"):
                client.rest("sessions", action)
        assert fake.asked == []
        client.rest("subjects", "read", id="a b?c")
    assert fake.asked[0].url.raw_path == b"/subjects/a%20b%3Fc"


def test_nothing_to_say_is_none() -> None:
    assert read(204, b"", {}) is None
    with Fake(httpx.Response(204)).client() as client:
        assert client.patch("/sessions/x", {}, TypeAdapter(None)) is None


@pytest.mark.parametrize(
    "answer", [httpx.Response(204), *map(reply, [200] * 4, ([], "x", 5, [{}]))]
)
def test_an_answer_of_another_form_is_not_alyxs(answer: httpx.Response) -> None:
    for method in ("get", "post", "patch"):
        fake = Fake(answer)
        with fake.client() as client, pytest.raises(AlyxAway, match="/sessions answered") as e:
            getattr(client, method)("/sessions", {})
        assert e.value.unknown_outcome is (method != "get")  # something has been done, or not
        assert "alyx.url" in e.value.hint
        assert len(fake.asked) == 1


def test_a_record_of_another_form_in_a_list_is_not_alyxs() -> None:
    form = TypeAdapter(dict[str, int])
    for answer in (page([{"n": 1}, {"n": "x"}]), reply(body=[{"n": 1}, 5])):
        with Fake(answer).client() as client:
            records = client.pages("/x", form=form)
            assert next(records) == {"n": 1}
            with pytest.raises(AlyxAway, match="/x answered"):
                next(records)


def test_a_long_query_can_be_sent_as_a_body() -> None:
    fake = Fake(reply(body={}))
    with fake.client() as client:
        client.get("/datasets", {"a": 1}, {"b": [2]})
    assert json.loads(fake.asked[0].content) == {"b": [2]}
    assert fake.asked[0].url.query == b"a=1"


@pytest.mark.parametrize(
    ("status", "body", "kind", "hint"),
    [
        (403, {"detail": "Authentication credentials were not provided."}, Unauthorized, "token"),
        (403, {"detail": "Invalid token."}, Unauthorized, "token"),
        (403, {"detail": "User inactive or deleted."}, Unauthorized, "token"),
        (
            403,
            {"detail": "You do not have permission to perform this action."},
            AlyxRefused,
            "right",
        ),
        (
            403,
            {"status_code": 403, "error": "One or more datasets is protected", "details": [{}]},
            DatasetsProtected,
            "",
        ),
        (403, {"detail": "Dataset x is protected, cannot patch"}, RevisionProtected, ""),
        (404, {"detail": "Not found."}, MemberNotFound, "create"),
        (404, b"<h1>Not Found</h1>", AlyxOdd, "alyx.url"),
        (400, {"detail": "The repository does not exist"}, MemberNotFound, "repository"),
        (400, {"users": ["Object with username=x does not exist."]}, MemberNotFound, "Alyx"),
        (400, {"subject": ["Object with nickname=zz does not exist."]}, SubjectNotFound, "subject"),
        (400, {"number": ["A valid integer is required."]}, AlyxRefused, "correct"),
        (400, {"detail": 'The dataset "x.npy" is wrong'}, FileRefused, "retry"),
        (400, b"Bad Request", AlyxOdd, "keeper"),
        (
            500,
            {"detail": 'No dataset type found for filename "x.y.npy"'},
            FileRefused,
            "regd retry",
        ),
        (500, {"detail": "DataFormat matching query does not exist."}, FileRefused, "format"),
        (500, {"detail": "LabMember matching query does not exist."}, MemberNotFound, "created_by"),
        (500, {"detail": "Subject matching query does not exist."}, SubjectNotFound, "subject"),
        (500, {"detail": "A base session for x does not exist"}, SessionNotFound, "flag"),
        (500, {"detail": "Tag matching query does not exist."}, AlyxRefused, "retry"),
        (500, {"detail": "deadlock detected"}, AlyxFault, ""),
        (500, {"error": "out of  memory\n"}, AlyxFault, ""),
        (500, b"<h1>Server Error (500)</h1>", AlyxOdd, ""),
        (500, b"[1, 2]", AlyxOdd, ""),
        (502, b"<html>Bad Gateway</html>", AlyxOdd, ""),
        (503, {"detail": "maintenance"}, AlyxOdd, ""),
        (504, b"", AlyxOdd, ""),
        (301, b"", AlyxOdd, "alyx.url"),
        (302, b"", AlyxOdd, "login page"),
        (304, b"", AlyxOdd, "alyx.url"),
        (418, {"a": [1, {"b": None}], "c": None}, AlyxRefused, ""),
    ],
)
def test_what_a_refusal_means(status: int, body: Any, kind: type[RegdError], hint: str) -> None:
    answer = reply(status, body, Location="/login?next=/x")
    with Fake(answer).client() as client, pytest.raises(RegdError) as e:
        client.post("/register-file", {})
    assert type(e.value) is kind
    assert hint in e.value.hint
    assert "\n" not in str(e.value)
    if isinstance(e.value, AlyxRefused):
        assert e.value.status == status


def test_a_refused_file_is_named() -> None:
    answer = reply(500, {"detail": 'No dataset type found for filename "x.y.npy"'})
    with Fake(answer).client() as client, pytest.raises(FileRefused) as e:
        client.post("/register-file", {})
    assert e.value.name == "x.y.npy"


def test_the_history_of_protected_files_is_kept() -> None:
    details = [{"a.npy": [{"2020-01-01": True}, {"": False}]}]
    body = {"status_code": 403, "error": "One or more datasets is protected", "details": details}
    with Fake(reply(403, body)).client() as client, pytest.raises(DatasetsProtected) as e:
        client.post("/register-file", {})
    assert e.value.details == details


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>log in here</html>", b'{"token": "abc', b"null", b"\xff\xfe", b"\x80", b"{" * 50],
)
def test_a_good_status_without_json_is_no_alyx(body: bytes) -> None:
    fake = Fake(reply(200, body))
    with fake.client() as client:
        with pytest.raises(AlyxAway, match="other than JSON") as e:
            client.post("/sessions", {})
        assert e.value.unknown_outcome  # it may well have been done
        assert "alyx.url" in e.value.hint
        assert len(fake.asked) == 1


@pytest.mark.parametrize("status", [*range(300, 600), 600, 999])
def test_every_other_status_is_an_error_of_regd(status: int) -> None:
    for body in (b"", b'{"detail": "x"}', b"[]", b"null", b'"x"'):
        with pytest.raises(RegdError) as e:
            read(status, body)
        assert isinstance(e.value, (TryLater, NeedsHuman))
        assert "\n" not in str(e.value)


def read(status: int, body: bytes, headers: dict[str, str] | None = None) -> Any:
    return alyx._read(alyx._Answer("POST http://x/y", status, httpx.Headers(headers), body))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters())),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["detail", "error", "details", "status_code", "x"]), inner),
    ),
    max_leaves=8,
)
bodies = st.one_of(st.binary(max_size=60), json_values.map(lambda v: json.dumps(v).encode()))
header_values = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)


@steady
@given(st.integers(200, 599), bodies, st.dictionaries(
    st.sampled_from(["Retry-After", "Location", "Content-Type"]), header_values
))  # fmt: skip
@example(403, b'{"error": "One or more datasets is protected", "details": null}', {})
@example(500, b'{"detail": {"a": 1}, "error": ["b"]}', {})
@example(429, b"", {"Retry-After": "1e999"})
@example(200, b"1" * 5000, {"Content-Type": "text/html; charset=nonsense"})
def test_whatever_comes_it_is_a_value_or_an_error_of_regd(
    status: int, body: bytes, headers: dict[str, str]
) -> None:
    try:
        value = read(status, body, headers)
    except RegdError as caught:
        error = str(caught)
    else:
        error = None
    if error is not None:
        assert "http://x/y" in error or "Alyx" in error
        assert "\n" not in error
        return
    assert 200 <= status < 300
    assert status == 204 or value is not None


def test_an_answer_nested_without_end() -> None:
    for status in (200, 500):
        with pytest.raises(AlyxAway):
            read(status, b"[" * 100_000)


# --- paging --------------------------------------------------------------------------------------


def page(results: list[Any], after: Any = None) -> httpx.Response:
    return reply(body={"count": 9, "next": after, "previous": None, "results": results})


def test_pages_of_the_sandbox(sandbox: Server) -> None:
    with connect(sandbox) as client:
        whole = list(client.pages("/dataset-types"))
        sandbox.requests.clear()
        assert list(client.pages("/dataset-types", {"limit": 50})) == whole
        assert len(whole) == 131
        assert len(sandbox.requests) == 3


def test_pages_follow_the_query_and_never_another_host() -> None:
    fake = Fake(
        page([{"n": 1}], "http://internal:8000/sessions?limit=1000&offset=1&subject=a%20b%26c"),
        page([{"n": 2}], "http://internal:8000/other?limit=1000&offset=2"),
        page([]),
    )
    with fake.client() as client:
        assert list(client.pages("/sessions", {"subject": "a b&c"})) == [{"n": 1}, {"n": 2}]
    assert {r.url.host for r in fake.asked} == {"alyx.test"}
    assert {r.url.path for r in fake.asked} == {"/sessions"}
    queries = [dict(r.url.params) for r in fake.asked]
    assert queries[0] == {"limit": "1000", "subject": "a b&c"}
    assert queries[1] == {"limit": "1000", "subject": "a b&c", "offset": "1"}


def test_a_list_without_pages() -> None:
    fake = Fake(reply(body=[{"n": 1}]))
    with fake.client() as client:
        assert list(client.pages("/x")) == [{"n": 1}]
    assert len(fake.asked) == 1


@pytest.mark.parametrize("body", [{}, {"results": None}, {"results": {}}, "x", 5])
def test_something_that_is_no_list(body: Any) -> None:
    with Fake(reply(body=body)).client() as client, pytest.raises(AlyxAway, match="no list"):
        list(client.pages("/sessions"))


def test_a_page_that_is_lost_is_asked_for_again() -> None:
    fake = Fake(page([{"n": 1}], "/x?offset=1"), httpx.ReadTimeout("slow"), page([{"n": 2}]))
    with fake.client() as client:
        assert list(client.pages("/x")) == [{"n": 1}, {"n": 2}]


def test_every_value_of_a_filter_is_kept_on_the_next_page() -> None:
    fake = Fake(page([{"n": 1}], "https://alyx.test/x?users=a&users=b&offset=1"), page([{"n": 2}]))
    with fake.client() as client:
        assert list(client.pages("/x", {"users": ["a", "b"]})) == [{"n": 1}, {"n": 2}]
    first, second = (r.url.params.get_list("users") for r in fake.asked)
    assert first == second == ["a", "b"]


@pytest.mark.parametrize(
    "after", [5, ["x"], {"offset": 1}, True, "http://[::1", "http://alyx.test/x", "?", "nothing"]
)
def test_a_next_page_that_is_no_address(after: Any) -> None:
    fake = Fake(page([{"n": 1}], after))
    with fake.client() as client, pytest.raises(AlyxAway, match="next page"):
        list(client.pages("/x"))
    assert len(fake.asked) == 1


def test_a_page_that_names_itself_is_not_read_without_end() -> None:
    itself = page([{"n": 1}], "http://alyx.test/x?limit=1000&offset=1")
    fake = Fake(page([{"n": 0}], "http://alyx.test/x?limit=1000&offset=1"), itself)
    with fake.client() as client:
        records = client.pages("/x")
        assert [next(records), next(records)] == [{"n": 0}, {"n": 1}]
        with pytest.raises(AlyxAway, match="in a circle"):
            next(records)
    assert len(fake.asked) == 2
    first = Fake(page([{"n": 0}], "http://alyx.test/x?limit=1000"))
    with first.client() as client, pytest.raises(AlyxAway, match="in a circle"):
        list(client.pages("/x"))
    assert len(first.asked) <= 2


# --- connections ---------------------------------------------------------------------------------

NEVER_SENT = [httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout]
MAYBE_SENT = [
    httpx.ReadTimeout, httpx.WriteTimeout, httpx.ReadError, httpx.WriteError, httpx.CloseError,
    httpx.RemoteProtocolError, httpx.ProxyError, httpx.DecodingError,
]  # fmt: skip


@pytest.mark.parametrize("error", NEVER_SENT)
def test_what_never_arrived_is_sent_again(error: type[httpx.RequestError]) -> None:
    for method in ("get", "post", "patch"):
        fake = Fake(error("no"), error("no"), reply(body={"ok": 1}))
        with fake.client() as client:
            more = () if method == "get" else ({},)
            assert getattr(client, method)("/sessions", *more) == {"ok": 1}
        assert fake.slept == [0.25, 0.5]
        gone = Fake(error("no"))
        with gone.client() as client, pytest.raises(AlyxAway, match="no connection") as e:
            client.post("/sessions", {})
        assert e.value.unknown_outcome is False
        assert len(gone.asked) == 4


@pytest.mark.parametrize("error", MAYBE_SENT)
def test_what_may_have_arrived_is_sent_again_only_if_it_changes_nothing(
    error: type[httpx.RequestError],
) -> None:
    fake = Fake(error(""), error("lost"), reply(body={"ok": 1}))
    with fake.client() as client:
        assert client.get("/sessions") == {"ok": 1}
    for method in ("post", "patch"):
        lost = Fake(error("lost"), reply(body={"ok": 1}))
        with lost.client() as client, pytest.raises(AlyxAway, match="lost") as e:
            getattr(client, method)("/sessions", {})
        assert e.value.unknown_outcome is True
        assert len(lost.asked) == 1
        assert lost.slept == []
        assert e.value.__cause__ is None  # nothing of httpx in a traceback
    gone = Fake(error("lost"))
    with gone.client() as client, pytest.raises(AlyxAway):
        client.get("/sessions")
    assert len(gone.asked) == 4


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_write_that_ended_in_an_outage_is_not_sent_again(status: int) -> None:
    fake = Fake(reply(status, b""))
    with fake.client() as client:
        with pytest.raises(AlyxAway) as e:
            client.post("/sessions", {})
        assert e.value.unknown_outcome is True
        assert len(fake.asked) == 1
        with pytest.raises(AlyxAway):
            client.get("/sessions")
        assert len(fake.asked) == 5


def test_a_failure_of_alyx_itself_is_not_asked_again() -> None:
    fake = Fake(reply(500, {"detail": "deadlock detected"}))
    with fake.client() as client, pytest.raises(AlyxFault):
        client.get("/sessions")
    assert len(fake.asked) == 1


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(sub) for sub in kind.__subclasses__()))


# base classes, what only raise_for_status() raises, and redirects, which are not followed
NOT_RAISED = {httpx.HTTPError, httpx.RequestError, httpx.HTTPStatusError, httpx.TooManyRedirects}
OWN_FAULT = {httpx.LocalProtocolError, httpx.UnsupportedProtocol}  # the request's, not Alyx's


@pytest.mark.parametrize(
    "kind",
    sorted(subclasses(httpx.HTTPError) - NOT_RAISED - OWN_FAULT, key=lambda k: k.__name__),
)
def test_no_error_of_httpx_gets_out(kind: type[Exception]) -> None:
    for method in ("get", "post"):
        fake = Fake(kind("what happened"))
        with fake.client() as client, pytest.raises(AlyxAway) as e:
            getattr(client, method)("/sessions", {})
        assert "/sessions" in str(e.value)


@pytest.mark.parametrize("kind", sorted(OWN_FAULT, key=lambda k: k.__name__))
def test_what_httpx_does_not_send_is_a_persons_to_correct(kind: type[Exception]) -> None:
    for method in ("get", "post"):
        fake = Fake(kind(f"Illegal header value b'Token {SECRET}'"))
        with fake.client() as client, pytest.raises(InvalidInput, match="cannot be sent") as e:
            getattr(client, method)("/sessions", {})
        assert "/sessions" in str(e.value)
        assert "alyx.token" in str(e.value)
        assert SECRET not in "".join(traceback.format_exception(e.value))
        assert len(fake.asked) == 1
        assert fake.slept == []


def test_what_cannot_be_sent_at_all() -> None:
    for data in ({"x": float("nan")}, {"x": object()}, {"x": b"bytes"}):
        with Fake(reply(body={})).client() as client, pytest.raises(InvalidInput, match="be sent"):
            client.post("/sessions", data)
    with Fake(reply(body={})).client() as client, pytest.raises(InvalidInput):
        client.get("/sessions\n\0")


def test_nobody_listens() -> None:
    with Server(load=INITIAL) as server:
        url = server.url
    slept: list[float] = []
    with (
        AlyxClient(url, token="t", sleep=slept.append) as client,
        pytest.raises(AlyxAway, match="no connection") as e,
    ):
        client.post("/sessions", {})
    assert e.value.unknown_outcome is False
    assert "alyx.url" in e.value.hint
    assert len(slept) == 3


class Breaks:
    """Middleware: the request takes effect, then the connection breaks, as often as is said."""

    left = 0

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if Breaks.left <= 0 or scope["path"] == "/auth-token":
            await self.app(scope, receive, send)
            return
        Breaks.left -= 1

        async def swallow(_: Any) -> None:
            pass

        await self.app(scope, receive, swallow)
        # more is promised than is sent, so that the server closes the connection
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"content-length", b"100")]})  # fmt: skip
        await send({"type": "http.response.body", "body": b"{"})


def test_a_connection_lost_after_the_request_took_effect() -> None:
    new = {"subject": "ZM_1085", "date": "2024-05-01", "number": 1, "users": [USER],
           "start_time": "2024-05-01T10:00:00", "lab": "mainenlab"}  # fmt: skip
    with (
        Server(load=INITIAL, rate_limit=None, middleware=[Middleware(Breaks)]) as server,
        connect(server) as client,
    ):
        Breaks.left = 1
        with pytest.raises(AlyxAway) as e:
            client.post("/sessions", new)
        assert e.value.unknown_outcome is True
        Breaks.left = 2
        found = list(client.pages("/sessions", {"date_range": "2024-05-01,2024-05-01"}))
        assert Breaks.left == 0
        assert len(found) == 1  # it was made, and made once


def test_an_answer_that_comes_too_slowly_is_given_up() -> None:
    time_s = [0.0]

    def dribble() -> Iterator[bytes]:
        while True:
            assert time_s[0] < 1000  # else it never ends
            time_s[0] += 50.0
            yield b" "

    fake = Fake(lambda _: httpx.Response(200, content=dribble()))
    with fake.client(timeout_s=60.0, clock=lambda: time_s[0]) as client:
        with pytest.raises(AlyxOdd, match="too slowly") as e:
            client.post("/sessions", {})
        assert e.value.unknown_outcome is True
    assert 600 < time_s[0] < 700


@pytest.mark.parametrize("status", [500, 503])
def test_a_login_that_fails_is_no_fault_of_what_was_asked(status: int) -> None:
    fake = Fake(reply(status, {"detail": "no space left on device"}))
    with fake.client(username="u", password="p", token=None) as client:
        with pytest.raises(AlyxAway) as e:
            client.post("/sessions", {})
        assert type(e.value) is AlyxAway
        assert e.value.unknown_outcome is False


class Stalls:
    """Middleware: waits until it is let go."""

    go = threading.Event()

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while not Stalls.go.is_set():
            message = await receive()
            if message["type"] == "http.disconnect":
                return
        await Response("{}", media_type="application/json")(scope, receive, send)


def test_a_server_that_does_not_answer_is_given_up() -> None:
    with Server(load=INITIAL, rate_limit=None, middleware=[Middleware(Stalls)]) as server:
        with connect(server, token="t", timeout_s=0.2) as client:
            with pytest.raises(AlyxAway, match="timed out") as e:
                client.post("/sessions", {})
            assert e.value.unknown_outcome is True
        Stalls.go.set()


def test_connections_are_kept(sandbox: Server) -> None:
    ports = set()

    def look(answer: httpx.Response) -> None:
        ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))

    with connect(sandbox) as client:
        for _ in range(5):
            client._send("GET", "/", token=None, look=look)
    assert len(ports) == 1


# --- throttling ----------------------------------------------------------------------------------


def test_a_429_waits_as_long_as_it_asks() -> None:
    for method in ("get", "post", "patch"):
        fake = Fake(reply(429, {}, **{"Retry-After": "7"}), reply(body={"ok": 1}))
        with fake.client() as client:
            assert getattr(client, method)("/sessions", {}) == {"ok": 1}
        assert fake.slept == [7.0]


def test_a_429_without_a_time_waits_a_little_longer_each_time() -> None:
    fake = Fake(*[reply(429, b"")] * 3, reply(body={"n": 1}))
    with fake.client() as client:
        assert client.get("/x") == {"n": 1}
    assert fake.slept == [0.25, 0.5, 1.0]


def test_a_429_with_a_date() -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=20)
    slow_down = reply(429, b"", **{"Retry-After": format_datetime(soon, True)})
    fake = Fake(slow_down, reply(body={"n": 1}))
    with fake.client() as client:
        assert client.get("/x") == {"n": 1}
    assert fake.slept[0] == pytest.approx(19, abs=2)


@pytest.mark.parametrize("value", ["61", "3600", "inf", "99999999"])
def test_a_429_that_asks_for_more_than_a_minute_is_for_the_journal(value: str) -> None:
    fake = Fake(reply(429, {}, **{"Retry-After": value}))
    with fake.client() as client, pytest.raises(AlyxThrottled) as e:
        client.post("/x", {})
    assert e.value.after_s == min(float(value), 3600.0)
    assert e.value.unknown_outcome is False
    assert fake.slept == []


def test_a_503_may_name_a_time_too() -> None:
    fake = Fake(reply(503, b"", **{"Retry-After": "120"}))
    with fake.client() as client, pytest.raises(AlyxAway) as e:
        client.get("/x")
    assert e.value.after_s == 120.0


def test_a_429_without_end_is_given_up() -> None:
    fake = Fake(reply(429, {}, **{"Retry-After": "60"}))
    with fake.client() as client, pytest.raises(AlyxThrottled):
        client.get("/x")
    assert fake.slept == [60.0] * 3


def test_waiting_can_be_given_up() -> None:
    class Enough(Exception):
        pass

    def sleep(_: float) -> None:
        raise Enough

    fake = Fake(reply(429, {}, **{"Retry-After": "5"}))
    with fake.client(sleep=sleep) as client, pytest.raises(Enough):
        client.get("/x")


def test_throttled_by_the_sandbox() -> None:
    slept: list[float] = []
    with (
        Server(load=INITIAL, rate_limit="2/minute") as server,
        connect(server, sleep=slept.append) as client,
        pytest.raises(AlyxThrottled),
    ):
        all(client.get("/users") for _ in range(9))
    assert all(0 < wait <= 60 for wait in slept)


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        with self.lock:
            self.now += seconds


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.integers(1, 8), st.lists(st.sampled_from([0.0, 0.0, 0.125, 1.0, 20.0, 59.5]), max_size=40)
)
def test_never_more_than_the_limit_in_any_minute(limit: int, gaps: list[float]) -> None:
    clock = Time()
    limiter = RateLimit(limit, clock=clock, sleep=clock.sleep)
    sent: list[float] = []
    asked = 0.0
    for gap in gaps:
        clock.now += gap
        asked = clock.now
        limiter.wait()
        sent.append(clock.now)
        # nor is more waited than the limit asks for
        floor = sent[-limit - 1] + 60.0 if len(sent) > limit else 0.0
        assert sent[-1] == max(asked, floor)
    for first, last in zip(sent, sent[limit:], strict=False):
        assert last - first >= 60.0


def test_threads_keep_the_limit_together() -> None:
    clock = Time()
    limiter = RateLimit(5, clock=clock, sleep=clock.sleep)
    sent: list[float] = []

    def work() -> None:
        for _ in range(10):
            limiter.wait()
            sent.append(clock.now)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sent) == 40
    assert clock.now >= 60.0 * 7  # eight lots of five


def test_no_limit() -> None:
    limiter = RateLimit(None, clock=lambda: 0.0, sleep=lambda _: pytest.fail("waited"))
    for _ in range(1000):
        limiter.wait()


def test_every_request_counts_against_the_limit() -> None:
    clock = Time()
    fake = Fake(httpx.ReadTimeout(""), reply(403, {"detail": "Invalid token."}),
                reply(body={"token": "t"}), reply(body={"n": 1}))  # fmt: skip
    with fake.client(
        requests_per_minute=3, clock=clock, sleep=clock.sleep, username="u", password="p"
    ) as client:
        assert client.get("/x") == {"n": 1}
    assert len(fake.asked) == 4
    assert clock.now >= 60.0


# --- proxies -------------------------------------------------------------------------------------


@contextmanager
def answering(context: ssl.SSLContext | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield the host and port of a server that answers `{"ok": 1}`, and what it was asked for."""
    asked: list[str] = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "9")
            self.end_headers()
            self.wfile.write(b'{"ok": 1}')

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that hangs up in the handshake is what is tested."""

    with Quiet(("127.0.0.1", 0), Answers) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str]]]:
    """The address of an HTTP proxy that answers in Alyx's place, and what it was asked for."""
    with answering() as proxy:
        yield proxy


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_the_proxy_of_the_environment_is_used(
    proxy: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, name: str, scheme: str
) -> None:
    address, asked = proxy
    monkeypatch.setenv(name, scheme + address)
    with AlyxClient("http://alyx.test:8000", token=SECRET) as client:
        assert client.get("/x", {"a": "b c", "n": [1, 2], "b": True}) == {"ok": 1}
    assert asked == ["http://alyx.test:8000/x?a=b+c&n=1&n=2&b=true"]


def test_no_proxy_for_a_host_that_is_to_have_none(
    proxy: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, sandbox: Server
) -> None:
    address, asked = proxy
    monkeypatch.setenv("http_proxy", f"http://{address}")
    monkeypatch.setenv("no_proxy", "lab.test, 127.0.0.1")
    with connect(sandbox, username=USER, password=PASSWORD) as client:
        assert client.get("/users")
    assert not asked


@pytest.mark.parametrize(
    "spared",
    ["*", "lab.test, *", "alyx.test", ".test", "alyx.test:8000", "http://alyx.test", "ALYX.TEST"],
)
def test_how_a_host_without_a_proxy_is_named(monkeypatch: pytest.MonkeyPatch, spared: str) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.test:3128")
    monkeypatch.setenv("no_proxy", spared)
    assert alyx._proxy("http://alyx.test:8000") is None
    monkeypatch.setenv("no_proxy", "lab.test")
    assert alyx._proxy("http://alyx.test:8000") is not None


def test_an_address_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "http://proxy.test:3128")
    monkeypatch.setenv("no_proxy", "fd00::5")
    assert alyx._proxy("http://[fd00::5]:8000") is None
    assert alyx._proxy("http://[fd00::6]:8000") is not None


def test_a_closed_client_sends_nothing() -> None:
    fake = Fake(reply(body={}))
    client = fake.client(token=SECRET)
    client.close()
    with pytest.raises(Stopping):
        client.post("/register-file", {})
    assert not fake.asked


def test_a_query_that_cannot_be_sent(sandbox: Server) -> None:
    with (
        connect(sandbox, username=USER, password=PASSWORD) as client,
        pytest.raises(InvalidInput, match="cannot be sent"),
    ):
        client.rest("subjects", "list", nickname="\udcff")


def test_a_proxy_that_is_none_is_a_persons_to_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"gopher://rig:{SECRET}@proxy.test")
    with pytest.raises(InvalidInput, match="https_proxy") as e:
        AlyxClient("https://alyx.test", token=SECRET)
    assert SECRET not in repr(e.value)


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture
def https(authority: Path) -> Iterator[str]:
    """The address of a server whose certificate is signed by that authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.pem", authority / "server.key")
    with answering(context) as (address, _):
        yield f"https://{address}"


def test_the_labs_own_authority_is_trusted_if_it_is_named(https: str, authority: Path) -> None:
    for ca_file in (authority / "ca.pem", str(authority / "ca.pem")):
        with AlyxClient(https, token=SECRET, ca_file=ca_file) as client:
            assert client.get("/x") == {"ok": 1}


def test_an_unknown_authority_is_never_trusted(https: str) -> None:
    with (
        AlyxClient(https, token=SECRET, sleep=lambda _: None) as client,
        pytest.raises(AlyxAway, match="certificate verify failed"),
    ):
        client.get("/x")


def test_a_certificate_of_another_host_is_not_trusted(https: str, authority: Path) -> None:
    url = https.replace("127.0.0.1", "localhost")
    with (
        AlyxClient(url, token=SECRET, ca_file=authority / "ca.pem", sleep=lambda _: None) as client,
        pytest.raises(AlyxAway, match="certificate verify failed"),
    ):
        client.get("/x")


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "rubbish"])
def test_a_ca_file_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ca.pem"
    match kind:
        case "folder":
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "rubbish":
            path.write_bytes(b"-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    with pytest.raises(InvalidInput, match="ca_file") as e:
        AlyxClient("https://alyx.test", token=SECRET, ca_file=path)
    assert e.value.hint


# --- secrets -------------------------------------------------------------------------------------


def everything_said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(f"{r.name} {r.getMessage()} {r.args} {vars(r)}" for r in caplog.records)


def test_no_secret_in_any_log_line_error_or_repr(
    sandbox: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "regd"):
        caplog.set_level(logging.DEBUG, name)
    shown = []
    with connect(sandbox, token=SECRET, username=USER, password=PASSWORD) as client:
        client.get("/users")
        fresh = client._login.token
        assert fresh not in (None, SECRET)
        shown += [repr(client), str(client), repr(client.__class__)]
        with pytest.raises(RegdError) as e:
            client.get("/sessions/none")
        shown += [str(e.value), repr(e.value), repr(e.value.__dict__)]
    for bad in ({"username": USER, "password": "wr0ng-secret"}, {"token": SECRET}):
        with connect(sandbox, **bad) as client, pytest.raises(Unauthorized) as u:
            client.get("/users")
        shown += [str(u.value), repr(u.value), repr(client)]
    with connect(sandbox, token=SECRET) as client:
        sandbox_url, client.base_url = client.base_url, "http://x"
        assert sandbox_url not in repr(client)
    shown.append(everything_said(caplog))
    assert "request.sent" in shown[-1]
    for secret in (SECRET, PASSWORD, fresh, "wr0ng-secret"):
        assert secret not in "\n".join(shown)


@pytest.mark.parametrize("character", ["é", "\n", "\r\n", "\0", "\t", "\x7f", "\udcff", "\u2028"])
def test_a_token_that_no_header_can_hold_is_a_persons_to_correct(character: str) -> None:
    with pytest.raises(InvalidInput, match=r"alyx\.token") as e:
        AlyxClient("https://alyx.test", token=f"{SECRET}{character}{SECRET}")
    assert isinstance(e.value, NeedsHuman)
    assert e.value.hint
    assert SECRET not in "".join(traceback.format_exception(e.value)) + repr(e.value)


@pytest.mark.parametrize("token", [f"{SECRET}\n", f" {SECRET}\r\n", f"\t{SECRET} "])
def test_a_token_as_it_is_read_from_a_file(token: str) -> None:
    fake = Fake(reply(body={}))
    with fake.client(token=token) as client:
        client.get("/users")
    assert fake.asked[0].headers["Authorization"] == f"Token {SECRET}"


def test_a_token_of_a_file_that_is_refused_is_not_shown(sandbox: Server) -> None:
    with connect(sandbox, token=f"{SECRET}\n") as client, pytest.raises(Unauthorized) as e:
        client.get("/users")
    assert SECRET not in str(e.value)


@pytest.mark.parametrize("token", ["", " ", "\n"])
def test_an_empty_token_is_none(token: str) -> None:
    fake = Fake(reply(body={}))
    with fake.client(token=token) as client:
        assert client.has_credentials is False
        with pytest.raises(Unauthorized, match="no credentials"):
            client.get("/users")
    assert fake.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://user:pa55word@alyx.test",
        "https://user@alyx.test",
        "http://:pa55word@alyx.test",
        "user:pa55word@alyx.test",
        "ftp://user:pa55word@alyx.test",
        "//user:pa55word@alyx.test",
        "http:/user:pa55word@alyx.test",
        "https:user:pa55word@alyx.test",
        "https//user:pa55word@alyx.test",
        "user:pa55word@https://alyx.test",
        "http://user:pa55word@[::1",
        "http://user:pa55word@h:port",
        "http://user:pa55word@h\n",
    ],
)
def test_an_address_with_a_password_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidInput) as e:
        AlyxClient(url, token="t")
    assert "pa55word" not in "".join(traceback.format_exception(e.value))


@pytest.mark.parametrize(
    "url",
    ["", "alyx.test", "ftp://alyx.test", "http://", "https:///x", "http://[::1", "http://h:port",
     "http://h:99999"],
)  # fmt: skip
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"alyx\.url"):
        AlyxClient(url, token="t")


def test_an_address_with_a_path_and_a_last_slash() -> None:
    fake = Fake(reply(body={}))
    transport = httpx.MockTransport(fake)
    with AlyxClient("https://lab.test/alyx/", token="t", transport=transport) as client:
        client.get("/sessions", {"a": "b c"})
    assert str(fake.asked[0].url) == "https://lab.test/alyx/sessions?a=b+c"


# --- from settings -------------------------------------------------------------------------------


def test_from_settings(sandbox: Server, tmp_path: Path) -> None:
    chosen = Settings(alyx={"url": sandbox.url, "username": USER, "password": PASSWORD})
    with AlyxClient.from_settings(chosen, sleep=lambda _: None) as client:
        assert client.user == USER
        assert client.get("/users")
    with pytest.raises(InvalidInput, match=r"alyx\.url is not set"):
        AlyxClient.from_settings(Settings())


def test_basic_facts_about_the_requests() -> None:
    fake = Fake(reply(body={}))
    with fake.client() as client:
        client.post("/x", {"ä": 1})
    headers = fake.asked[0].headers
    assert headers["User-Agent"].startswith("regd/")
    assert headers["Accept"] == "application/json"
    assert headers["Content-Type"] == "application/json"
    assert json.loads(fake.asked[0].content) == {"ä": 1}
    assert base64.b64encode(SECRET.encode()).decode() not in str(headers)
