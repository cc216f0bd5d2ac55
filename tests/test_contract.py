"""Every exchange recorded from Alyx, replayed against the sandbox."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from regd.sandbox.server import Server
from tests.conftest import INITIAL

SCENARIOS = sorted((INITIAL.parent / "scenarios").glob("*.json"))
PASSWORDS = {
    user["username"]: user["password"] for user in json.loads(INITIAL.read_text())["users"]
}
ANY = {
    "datetime": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z?",
    "seconds": r"\d+",
    "token": r"[0-9a-fA-F]{40}",
    "id": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}
PLACEHOLDER = re.compile(r"\{(id|base|datetime|token|seconds)(?::(\d+))?\}")
UNORDERED = {"data_repository", "collection"}


class Exchanges:
    """A client that fills the placeholders of a request, and learns ids from answers."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.ids: dict[str, str] = {}
        self.tokens: dict[str, str] = {}

    def fill(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self.fill(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.fill(one) for one in value]
        return PLACEHOLDER.sub(self._known, value) if isinstance(value, str) else value

    def _known(self, found: re.Match[str]) -> str:
        if found[1] == "base":
            return str(self.client.base_url).rstrip("/")
        return self.ids.get(found[2], found[0])

    def headers(self, user: str | None) -> dict[str, str]:
        if user is None:
            return {}
        if user == "bad":
            return {"Authorization": "Token " + "0" * 40}
        if user not in self.tokens:
            login = {"username": user, "password": PASSWORDS[user]}
            self.tokens[user] = self.client.post("/auth-token", data=login).json()["token"]
        return {"Authorization": f"Token {self.tokens[user]}"}

    def send(self, request: dict[str, Any]) -> httpx.Response:
        request = self.fill(request)
        return self.client.request(
            request["method"],
            request["path"],
            params=request.get("query"),
            json=request.get("json"),
            data=request.get("form"),
            headers=self.headers(request["user"]),
        )

    def check(self, wanted: Any, got: Any, where: str, partial: bool = False) -> None:
        if isinstance(wanted, dict):
            assert isinstance(got, dict), where
            extra = set() if partial else got.keys() - wanted.keys()
            assert (wanted.keys() - got.keys(), extra) == (set(), set()), where
            for key, value in wanted.items():
                self.check(value, got[key], f"{where}.{key}")
        elif isinstance(wanted, list):
            assert isinstance(got, list), where
            assert len(wanted) == len(got), where
            for index, (one, other) in enumerate(zip(ordered(wanted), ordered(got), strict=True)):
                self.check(one, other, f"{where}[{index}]")
        elif isinstance(wanted, str) and PLACEHOLDER.search(wanted):
            self._check_text(wanted, got, where)
        else:
            assert (wanted, type(wanted)) == (got, type(got)), where

    def _check_text(self, wanted: str, got: Any, where: str) -> None:
        names: list[str] = []
        pattern, start = "", 0
        filled = self.fill(wanted)
        for found in PLACEHOLDER.finditer(filled):
            pattern += (
                re.escape(filled[start : found.start()]) + f"(?P<p{len(names)}>{ANY[found[1]]})"
            )
            names.append(found[2] or "")
            start = found.end()
        found_all = re.fullmatch(pattern + re.escape(filled[start:]), str(got), re.DOTALL)
        assert found_all, f"{where}: expected {wanted}, got {got}"
        self.ids |= {name: found_all[f"p{i}"] for i, name in enumerate(names) if name}


def ordered(rows: list[Any]) -> list[Any]:
    """File records and datasets come in no particular order."""
    if not rows or not isinstance(rows[0], dict) or not UNORDERED & rows[0].keys():
        return rows
    keys = ("data_repository", "collection", "revision", "name")
    return sorted(rows, key=lambda row: str([row.get(key) for key in keys]))


@pytest.fixture
def exchanges(request: pytest.FixtureRequest) -> Iterator[Exchanges]:
    rate = "4/minute" if request.node.callspec.params["path"].stem == "throttled" else None
    with (
        Server(load=INITIAL, rate_limit=rate) as server,
        httpx.Client(base_url=server.url, verify=False) as client,
    ):
        yield Exchanges(client)


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_answers_as_recorded(path: Path, exchanges: Exchanges) -> None:
    for number, step in enumerate(json.loads(path.read_text())["steps"]):
        wanted = step["response"]
        answer = exchanges.send(step["request"])
        where = f"{path.stem} step {number}"
        assert answer.status_code == wanted["status"], f"{where}: {answer.text[:300]}"
        for header in wanted.keys() & {"allow", "retry-after", "www-authenticate"}:
            if wanted["match"] != "status" or header == "retry-after":
                exchanges.check(wanted[header], answer.headers.get(header), f"{where} {header}")
        if wanted["match"] == "status":
            continue
        assert answer.headers["content-type"].split(";")[0] == wanted["content_type"], where
        if wanted["json"] is not None:
            exchanges.check(wanted["json"], answer.json(), where, wanted["match"] == "keys")


def test_the_whole_recording_is_replayed() -> None:
    steps = [len(json.loads(path.read_text())["steps"]) for path in SCENARIOS]
    assert (len(steps), sum(steps)) == (14, 133)
