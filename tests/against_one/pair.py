"""ONE's client and regd's, each with a tree of its own before an Alyx stand-in of its own."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import httpx
import iblutil.io.hashfile
import one.params
import one.registration
import pytest
from one.api import ONE
from starlette.middleware import Middleware

from regd import AlyxClient, RegistrationClient
from regd.sandbox.server import Server

INITIAL = Path(__file__).parent.parent / "contract" / "initial.json"
USER, PASSWORD = "test_user", "test-password"
REGISTER = "/register-file"
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_WHEN_WRITTEN = {"created_datetime", "auto_datetime"}
_BY_CHANCE = {"parent_session"}  # of the sessions of a day, Alyx takes the one of the lowest id
_DROPPED = _WHEN_WRITTEN | _BY_CHANCE
_UNORDERED = {
    "file_records", "users", "tags", "data_dataset_session_related", "weighings",
    "water_administrations",
}  # fmt: skip


class Clock:
    """The date both clients take for today, so that no test minds when it runs."""

    def __init__(self) -> None:
        self.today = datetime.date(2024, 5, 17)

    def __call__(self) -> datetime.date:
        return self.today


class Recorder:
    """Middleware that keeps the body of each request, decoded, beside its method and path."""

    def __init__(self, app: Any, kept: list[tuple[str, str, Any]]) -> None:
        self.app = app
        self.kept = kept

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        with contextlib.suppress(ValueError):
            self.kept.append((scope["method"], scope["path"], json.loads(body or b"null")))
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, again, send)


class Side:
    """One of the two clients, with what it works on."""

    def __init__(
        self, client: Any, server: Server, sent: list[tuple[str, str, Any]], api: httpx.Client
    ) -> None:
        self.client = client
        self.server = server
        self.sent = sent
        self.api = api
        self.root = Path()

    def write(self, relative: str, content: str | bytes) -> Path:
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def tree(self, below: str = "") -> dict[str, bytes | None]:
        """Every folder (None) and file (its bytes) below the root, by relative path."""
        return {
            path.relative_to(self.root).as_posix(): None if path.is_dir() else path.read_bytes()
            for path in (self.root / below).rglob("*")
        }

    def contents(self, below: str = "") -> set[bytes]:
        return {content for content in self.tree(below).values() if content is not None}

    def ask(self, method: str, path: str, **content: Any) -> Any:
        """What the stand-in answers, whichever client is under test."""
        answer = self.api.request(method, path, **content)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def create(self, session: str, **fields: Any) -> dict[str, Any]:
        subject, date, number = session.split("/")[-3:]
        body = {"subject": subject, "start_time": f"{date}T00:00:00", "number": number, **fields}
        return dict(self.ask("POST", "/sessions", json={"users": [USER], **body}))

    def register(self, session: str, relative: str, md5: str = "0" * 32) -> str:
        """Register one file without a client and without a check; return the dataset's id."""
        body = {
            "path": session, "filenames": [relative], "hashes": [md5], "filesizes": [1],
            "check_protected": False,
        }  # fmt: skip
        return str(self.ask("POST", REGISTER, json=body)[0]["id"])

    def protect(self, dataset: str) -> None:
        self.ask("PATCH", f"/datasets/{dataset}", json={"tags": ["protected_tag"]})

    def sessions(self, session: str) -> list[Any]:
        """Alyx's full records of a session: one, if all is well."""
        found = self._short(session)
        return [self.plain(self.ask("GET", f"/sessions/{one['id']}")) for one in found]

    def datasets(self, session: str) -> dict[str, Any]:
        """Alyx's records of a session's datasets, by their place in it."""
        eids = [one["id"] for one in self._short(session)]
        listed = [
            record
            for eid in eids
            for record in self.ask("GET", "/datasets", params={"session": eid, "limit": 1000})[
                "results"
            ]
        ]
        return {
            f"{r['collection']}#{r['revision'] or ''}#{r['name']}": self.plain(r) for r in listed
        }

    def _short(self, session: str) -> list[Any]:
        subject, date, number = session.split("/")[-3:]
        query = {"subject": subject, "date_range": f"{date},{date}", "number": int(number)}
        return list(self.ask("GET", "/sessions", params=query)["results"])

    def posted(self, path: str = REGISTER, method: str = "POST") -> list[Any]:
        """The bodies of the requests to `path` since `sent` was last cleared."""
        return [body for verb, asked, body in self.sent if (verb, asked) == (method, path)]

    def plain(self, value: Any) -> Any:
        """A record without what differs between any two runs: ids, addresses, times of writing."""
        if isinstance(value, Mapping):
            shown = {k: self.plain(v) for k, v in value.items() if k not in _DROPPED}
            return {
                k: sorted(v, key=repr) if k in _UNORDERED and isinstance(v, list) else v
                for k, v in shown.items()
            }
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [self.plain(each) for each in value]
        if isinstance(value, str):
            text = value.replace(self.server.url, "{alyx}").replace(str(self.root), "{root}")
            return _UUID.sub("{id}", text)
        if isinstance(value, UUID):
            return "{UUID}"
        if isinstance(value, Path):
            return self.plain(str(value))
        return value


class Pair:
    """ONE's side and regd's."""

    def __init__(self, one: Side, regd: Side, clock: Clock) -> None:
        self.one = one
        self.regd = regd
        self.clock = clock

    def __iter__(self) -> Iterator[Side]:
        return iter((self.one, self.regd))

    def use(self, folder: Path) -> None:
        """Give each side an empty tree, and forget what was sent."""
        for name, side in (("one", self.one), ("regd", self.regd)):
            side.root = folder / name
            side.root.mkdir(parents=True)
            side.sent.clear()


@contextlib.contextmanager
def home_for_one(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Keep ONE's settings and caches in `folder`: it writes into the home folder otherwise."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setattr(one.params, "CACHE_DIR_DEFAULT", str(folder / "ONE"))
        # the digest is the same; 256 MiB a call would make most of the time these tests take
        patch.setattr(iblutil.io.hashfile, "BUF_SIZE", 2**16)
        yield patch


def connect_one(url: str, cache: Path, user: str = USER, password: str = PASSWORD) -> ONE:
    return ONE(
        base_url=url, username=user, password=password,
        cache_dir=cache, cache_rest=None, silent=True,
    )  # fmt: skip


@contextlib.contextmanager
def open_pair(folder: Path) -> Iterator[Pair]:
    """Two fresh stand-ins, ONE's own client on the one and regd's on the other."""
    clock = Clock()

    class Today(datetime.datetime):
        @classmethod
        def today(cls) -> datetime.datetime:
            return datetime.datetime.combine(clock.today, datetime.time(12))

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(home_for_one(folder / "home"))
        # ONE takes the date from here; nothing else of it is touched
        stand_in = SimpleNamespace(datetime=Today, date=datetime.date)
        patch.setattr(one.registration, "datetime", stand_in)
        sides = []
        for name in ("one", "regd"):
            sent: list[tuple[str, str, Any]] = []
            server = Server(
                load=INITIAL, rate_limit=None, middleware=[Middleware(Recorder, kept=sent)]
            )
            # connections inherit it; without, each answer waits 40 ms for a delayed ACK
            server._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stack.enter_context(server)
            client: Any
            if name == "one":
                client = one.registration.RegistrationClient(
                    connect_one(server.url, folder / "cache")
                )
            else:
                alyx = stack.enter_context(
                    AlyxClient(server.url, USER, PASSWORD, requests_per_minute=None)
                )
                client = RegistrationClient(alyx, today=clock)
            api = stack.enter_context(httpx.Client(base_url=server.url))
            form = {"username": USER, "password": PASSWORD}
            token = api.post("/auth-token", data=form).json()["token"]
            api.headers["Authorization"] = f"Token {token}"
            side = Side(client, server, sent, api)
            side.ask("POST", "/tags", json={"name": "protected_tag", "protected": True})
            sides.append(side)
        yield Pair(*sides, clock)
