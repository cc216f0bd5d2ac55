"""The status page: how things stand, live in a browser. It is read-only, and slows no worker."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from email.utils import formatdate
from importlib.resources import files as package_files
from typing import Any, Self

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from regd import __version__
from regd.glance import glance
from regd.journal import FILE_NAME, Journal
from regd.logs import get_logger
from regd.settings import Settings
from regd.status import report

EVERY_S = 1.0
"""Least seconds from one report to the next; ten times what a report takes, if that is longer, but
no more than `_RENEW_S`."""
BEAT_S = 10.0
"""How often a page is told that regd is there, in seconds."""
MOST_PAGES = 200
_MOST_CONNECTIONS = MOST_PAGES + 50  # each takes a file descriptor, which scans need, too
_ASK_WITHIN_S = 10.0  # a connection that asks for nothing is closed
_RENEW_S = 30.0  # what no journal knows changes, too: the disk may be gone, a file be mended
_AGAIN_S = 30.0  # between attempts to listen
_RETRY_MS = 2000
_STOP_WITHIN_S = 1
_FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_log = get_logger()


@dataclass(frozen=True, slots=True)
class _Snapshot:
    id: str
    body: str
    """JSON, in one line"""


class _News:
    """The latest report, for all open pages; all but `wanted` belongs to the loop's thread."""

    def __init__(self) -> None:
        self.wanted = threading.Event()
        """Set while somebody reads, or all ends."""
        self.latest: _Snapshot | None = None
        self.checked_at = 0.0
        """When that was last seen to be how things stand, in seconds since 1970."""
        self._told_at = -EVERY_S
        self.readers = 0
        self.ended = False
        self._told = asyncio.Event()

    def tell(self, snapshot: _Snapshot, checked_at: float) -> None:
        """Hand over what is known now, changed or not."""
        self.latest, self.checked_at = snapshot, checked_at
        self._told_at = asyncio.get_running_loop().time()
        self.wake()

    def end(self) -> None:
        """Have all streams end."""
        self.ended = True
        self.wanted.set()
        self.wake()

    def wake(self) -> None:
        """Have those who wait look at what there is."""
        told, self._told = self._told, asyncio.Event()
        told.set()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        self.readers += 1
        self.wanted.set()
        try:
            yield
        finally:
            self.readers -= 1
            if not self.readers and not self.ended:
                self.wanted.clear()

    async def fresh(self) -> _Snapshot | None:
        """Return how things stand, or stood when that was last found out; None if it never was."""
        if asyncio.get_running_loop().time() - self._told_at < EVERY_S:
            return self.latest
        with self.reading(), contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._told.wait(), BEAT_S)
        return self.latest

    async def stream(self, known: str | None) -> AsyncIterator[str]:
        """Yield events: 'report' for another than is `known`, 'beat' to say that all is as before.

        A page that is slow to read gets the latest report, not each.
        """
        yield f"retry: {_RETRY_MS}\n\n"
        loop = asyncio.get_running_loop()
        beat_at = -BEAT_S
        while not self.ended:
            told = self._told
            latest = self.latest
            if latest is not None and latest.id != known:
                known = latest.id
                yield f"id: {known}\nevent: report\ndata: {latest.body}\n\n"
            elif latest is not None and loop.time() - beat_at >= BEAT_S:
                beat_at = loop.time()
                checked = json.dumps({"checked_at": self.checked_at, "now": time.time()})
                yield f"event: beat\ndata: {checked}\n\n"
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(told.wait(), BEAT_S)


class Reporter:
    """Makes the reports, in a thread of its own, while somebody reads them.

    It reads the journal through a connection of its own: no worker waits for it.

    Args:
        settings: Where the journal is.
        now: Seconds since 1970.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._now, self._clock = settings, now, clock
        self._journal: Journal | None = None
        self._seen: tuple[Any, ...] = ()
        self._made_at = 0.0
        self._facts: dict[str, Any] = {}
        self._begun = f"{time.time_ns():x}"  # so that no other process gives the same id
        self._number = 0
        self.latest: _Snapshot | None = None

    def step(self) -> bool:
        """Find out how things stand; return whether that is news.

        Raises:
            RegdError: The journal cannot be read.
            sqlite3.Error: So it is.
            OSError: The data root cannot be looked at.
        """
        if self._journal is None:
            path = self._settings.state_dir / FILE_NAME
            self._journal = Journal(path, now=self._now, read_only=True)
        day = datetime.date.fromtimestamp(self._now())
        seen = (self._journal.version(), day)
        if seen == self._seen and self._clock() - self._made_at < _RENEW_S:
            return False
        facts = self._gather(self._journal, day)
        self._seen, self._made_at = seen, self._clock()
        at = facts.pop("at")
        if facts == self._facts:
            return False
        self._facts = facts
        self._number += 1
        body = json.dumps({"at": at, **facts})
        self.latest = _Snapshot(f"{self._begun}-{self._number}", body)
        return True

    def _gather(self, journal: Journal, day: datetime.date) -> dict[str, Any]:
        facts = report(self._settings, journal, ask_alyx=False, today=day)
        return {
            **glance(facts),
            "scanned_at": facts["backlog"].get("at"),
            "host": socket.gethostname(),
            "version": __version__,
            "flag": self._settings.flag,
        }

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None


class Page:
    """The status page in threads of this process: `with Page(settings, stop):`.

    A port that cannot be had, or any other fault in it, is logged and ends nothing else.

    Args:
        settings: Where to listen, and where the journal is.
        stop: Set to end it.
        again_s: Seconds between attempts to listen.
    """

    def __init__(
        self, settings: Settings, stop: threading.Event, *, again_s: float = _AGAIN_S
    ) -> None:
        self._settings, self._stop, self._again_s = settings, stop, again_s
        self._told = ""
        self.url: str | None = None
        """Where it is, once it listens."""
        self._thread = threading.Thread(target=self._run, name="page", daemon=True)
        self.news = _News()

    def __enter__(self) -> Self:
        """Start; it may take a moment until it listens."""
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """End, and all connections with it."""
        self._stop.set()
        self._thread.join(2.0 * _STOP_WITHIN_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._serve()
            except OSError as error:
                self._failed(error)
            except Exception as error:
                hint = "regd registers without the page; report this to regd's makers"
                _log.error("page.failed", exc_info=error, hint=hint)
            self.url = None
            self._stop.wait(self._again_s)

    def _failed(self, error: OSError) -> None:
        web = self._settings.web
        reason = f"cannot listen on {web.host}, port {web.port}: {error.strerror or error}"
        if reason != self._told:
            self._told = reason
            hint = (
                "set another web.port, or end what listens there (ss -ltnp shows it), and see that "
                "web.host is an address of this computer; regd registers without the page"
            )
            _log.error("page.failed", reason=reason, hint=hint)

    def _serve(self) -> None:
        """Listen, and answer until `stop` is set."""
        host = self._settings.web.host
        with _listen(host, self._settings.web.port or 0) as sock:
            address, port = sock.getsockname()[:2]
            named = f"[{host}]" if ":" in host else host
            self.url = f"http://{named}:{port}"
            self._told = ""
            _log.info("page.started", url=self.url)
            if not ipaddress.ip_address(address).is_loopback:
                _log.warning(
                    "page.exposed",
                    reason=f"whoever reaches {host} over the network can see the names of sessions",
                    hint="unless that is wanted: leave web.host out, and use ssh -L",
                )
            self.news = _News()
            server = _Server(self._settings, self._app(host, address), self.news, self._stop)
            server.run([sock])

    def _app(self, host: str, address: str) -> ASGIApp:
        async def page(request: Request) -> Response:
            name = request.url.path.removeprefix("/")
            file = package_files("regd").joinpath("page", name or "index.html")
            headers = {"cache-control": "no-cache"}  # a new version of regd has another page
            return Response(file.read_bytes(), media_type=_FILES[name], headers=headers)

        async def as_json(_request: Request) -> Response:
            latest = await self.news.fresh()
            if latest is None:
                text = "regd does not know how things stand; its log says why\n"
                return PlainTextResponse(text, 503, {"retry-after": "10"})
            headers = {"cache-control": "no-store"}
            return Response(latest.body, media_type="application/json", headers=headers)

        async def events(request: Request) -> Response:
            if self.news.readers >= MOST_PAGES:
                text = f"{MOST_PAGES} pages are open already: close one\n"
                return PlainTextResponse(text, 503, {"retry-after": "10"})
            headers = {"cache-control": "no-store", "content-type": "text/event-stream"}
            if request.method == "HEAD":
                return Response(headers=headers)
            known = request.headers.get("last-event-id")
            return _Stream(self.news, self.news.stream(known), headers=headers)

        routes = [Route(f"/{name}", page) for name in _FILES]
        routes += [Route("/report", as_json), Route("/events", events)]
        return _Guard(Router(routes, redirect_slashes=False), _names(host, address))


class _Stream(StreamingResponse):
    def __init__(self, news: _News, content: AsyncIterator[str], headers: dict[str, str]) -> None:
        super().__init__(content, headers=headers)
        self._news = news

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._news.reading():
            await super().__call__(scope, receive, send)


class _Guard:
    """Answers those only who know this computer by its name, with the headers that browsers heed.

    A page of anybody's can send a browser here by a name of its own (DNS rebinding), or as part
    of itself; neither gets an answer.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update({**_HEADERS, "date": formatdate(usegmt=True)})
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await self._answer(scope)(scope, receive, send_guarded)

    def _answer(self, scope: Scope) -> ASGIApp:
        headers = Headers(scope=scope)
        host = _without_port(headers.get("host", ""))
        # the address that was connected to, if it listens on several
        if host not in self._names and host != (scope.get("server") or [""])[0]:
            shown = ascii(host[:100])
            text = f"this is regd, not {shown}: set web.host to that name, if it is this computer\n"
            return PlainTextResponse(text, 421)
        elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if elsewhere and headers.get("sec-fetch-mode") != "navigate":
            return PlainTextResponse("no part of any other page\n", 403)
        return self._app


def _without_port(host: str) -> str:
    name = host[1:].split("]")[0] if host.startswith("[") else host.split(":")[0]
    return name.lower().rstrip(".")


def _names(host: str, address: str) -> frozenset[str]:
    """Return what this computer may be called in an address of the page."""
    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    if not ipaddress.ip_address(address).is_loopback:
        names |= {socket.gethostname().lower(), socket.gethostname().lower().split(".")[0]}
    return frozenset(names)


def _listen(host: str, port: int) -> socket.socket:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # asyncio turns off Nagle's algorithm, 40 ms an answer, only where the protocol is stated
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # a page that takes nothing any longer, as that of a computer that sleeps, is given up
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
        sock.bind(address)
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    return sock


class _Connection(H11Protocol):
    """One of few, that is closed if it asks for nothing."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.abort()
        else:
            self.loop.call_later(_ASK_WITHIN_S, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.close()


class _Server(uvicorn.Server):
    """Answers until `stop` is set; then ends all connections at once."""

    def __init__(
        self, settings: Settings, app: ASGIApp, news: _News, stop: threading.Event
    ) -> None:
        config = uvicorn.Config(
            app, http=_Connection, ws="none", lifespan="off", log_config=None, log_level="error",
            access_log=False, server_header=False, date_header=False, proxy_headers=False,
            timeout_graceful_shutdown=_STOP_WITHIN_S,
        )  # fmt: skip
        super().__init__(config)
        self._reporter, self._news, self._ended = Reporter(settings), news, stop
        self._loop: asyncio.AbstractEventLoop

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        over = asyncio.Event()

        def wait() -> None:
            self._ended.wait()
            self._in_loop(over.set)

        # both may be left behind: one in the middle of a report, where a disk does not answer
        for task in (wait, self._report):
            threading.Thread(target=task, name="page", daemon=True).start()
        await over.wait()
        self._news.end()

    def _in_loop(self, call: Callable[..., None], *about: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *about)

    def _report(self) -> None:
        """Tell the news while somebody reads them."""
        told = ""
        while not self._ended.is_set():
            self._news.wanted.wait()
            if self._ended.is_set():
                break
            began_at = time.monotonic()
            try:
                self._reporter.step()
                told = ""
                self._in_loop(self._news.tell, self._reporter.latest, time.time())
            except Exception as error:  # whatever it is, the page says that it is old
                if str(error) != told and not self._ended.is_set():
                    told = str(error)
                    hint = getattr(error, "hint", "")
                    _log.error("page.failed", reason=told, hint=hint)
                self._in_loop(self._news.wake)
            took_s = time.monotonic() - began_at
            self._ended.wait(min(max(EVERY_S, 10 * took_s), _RENEW_S))
        self._reporter.close()
