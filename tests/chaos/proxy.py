"""A proxy between regd and Alyx that fails by a plan, in the ways that networks and proxies do."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

PAGE = b"<!doctype html><html><body><form action=/login>Log in</form></body></html>"
HTML = {"Content-Type": "text/html"}
JSON = {"Content-Type": "application/json"}
STALL_S = 1.5
LATE_S = 60.0

# what answers in Alyx's place: status, headers, body
ANSWERS: dict[str, tuple[int, dict[str, str], bytes]] = {
    "429": (429, JSON, b'{"detail": "Request was throttled."}'),
    "429 after 7 s": (429, {**JSON, "Retry-After": "7"}, b'{"detail": "Request was throttled."}'),
    "429 after hours": (429, {**JSON, "Retry-After": "86400"}, b"{}"),
    "500": (500, HTML, b"<h1>Server Error (500)</h1>"),
    "500 in JSON": (500, JSON, b'{"status_code": 500, "detail": "server closed the connection"}'),
    "502": (502, HTML, b"<h1>Bad Gateway</h1>"),
    "503": (503, {**HTML, "Retry-After": "nonsense"}, b"<h1>Service Unavailable</h1>"),
    "504": (504, HTML, b"<h1>Gateway Time-out</h1>"),
    "404": (404, HTML, b"<h1>Not Found</h1>"),
    "413": (413, HTML, b"<h1>Request Entity Too Large</h1>"),
    "401": (401, {**HTML, "WWW-Authenticate": "Basic"}, b"<h1>Authorization Required</h1>"),
    "403": (403, HTML, b"<h1>Blocked by your organisation</h1>"),
    "half a JSON": (200, JSON, b'{"count": 1, "results": [{"id'),
    "other JSON": (200, JSON, b'{"hello": "world"}'),
    "a list": (200, JSON, b'["hello"]'),
    "nothing": (200, {}, b""),
    "redirect": (302, {"Location": "http://login.example.org/"}, b""),
    "login page": (200, HTML, PAGE),
}
# the same after Alyx got the request, and did what it asks
TOOK_EFFECT = ("500", "502", "503", "504", "half a JSON", "nothing")
FAULTS = (
    "drop",
    "drop the answer",
    "half the request",
    "half the answer",
    "reset",
    "reset the answer",
    "late",
    "dribble",
    "stall",
    *ANSWERS,
    *(f"{name} after the effect" for name in TOOK_EFFECT),
)
Plan = Callable[[int, str, str], str | None]


class Proxy:
    """A TCP server before Alyx: `with Proxy(alyx_url, plan) as proxy: proxy.url`.

    Args:
        upstream: Alyx's address.
        plan: Given a request's number from 0, its method and its path, returns the fault to make
            of it (one of `FAULTS`), or None to pass it on.
        clock: Seconds, by which a request is late.
    """

    def __init__(
        self,
        upstream: str,
        plan: Plan | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        where = urlsplit(upstream)
        self.upstream = (where.hostname or "", where.port or 80)
        self.plan: Plan = plan or (lambda *_: None)
        self.asked: list[tuple[str, str, str | None]] = []
        """Method, path and fault of each request."""
        self._clock = clock
        self._late: list[tuple[float, _Request]] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        proxy = self

        class Handler(_Handler):
            def do(self) -> None:
                proxy._handle(self)

            do_GET = do_POST = do_PATCH = do  # noqa: N815 - names that http.server calls

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self._server.request_queue_size = 128
        self._server.server_bind()
        self._server.server_activate()
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def deliver(self) -> None:
        """Pass on what was held back for `LATE_S`."""
        with self._lock:
            due = [request for at, request in self._late if at <= self._clock()]
            self._late = [(at, request) for at, request in self._late if at > self._clock()]
        for request in due:
            self._pass_on(request)

    def _handle(self, handler: _Handler) -> None:
        request = _Request(handler)
        path = urlsplit(request.path).path
        with self._lock:
            fault = self.plan(len(self.asked), request.method, path)
            self.asked.append((request.method, path, fault))
        if fault is None:
            handler.answer(*self._pass_on(request))
        elif fault in ANSWERS:
            handler.answer(*ANSWERS[fault])
        elif fault.endswith(" after the effect"):
            self._pass_on(request)
            handler.answer(*ANSWERS[fault.removesuffix(" after the effect")])
        elif fault == "late":
            with self._lock:
                self._late.append((self._clock() + LATE_S, request))
            handler.answer(*ANSWERS["504"])
        elif fault in ("drop", "reset"):
            handler.drop(reset=fault == "reset")
        elif fault in ("drop the answer", "reset the answer"):
            self._pass_on(request)
            handler.drop(reset=fault == "reset the answer")
        elif fault == "half the request":
            self._pass_on_half(request)
            handler.drop()
        elif fault == "half the answer":
            status, headers, body = self._pass_on(request)
            handler.answer(status, headers, body[: len(body) // 2], length=len(body))
            handler.drop()
        elif fault == "dribble":
            status, headers, body = self._pass_on(request)
            handler.answer(status, headers, body, pieces=20)
        elif fault == "stall":
            self._closing.wait(STALL_S)  # longer than regd waits for a byte
            handler.drop()
        else:
            raise ValueError(fault)

    def _pass_on(self, request: _Request) -> tuple[int, dict[str, str], bytes]:
        alyx = http.client.HTTPConnection(*self.upstream, timeout=30)
        with contextlib.closing(alyx):
            alyx.request(request.method, request.path, request.body, request.headers)
            answer = alyx.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def _pass_on_half(self, request: _Request) -> None:
        with socket.create_connection(self.upstream) as alyx:
            head = f"{request.method} {request.path} HTTP/1.1\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
            whole = head.encode() + b"\r\n" + request.body
            cut = len(whole) - (len(request.body) // 2 or 4)
            alyx.sendall(whole[:cut])


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # regd may have gone, too
            super().handle()

    def answer(
        self,
        status: int,
        headers: dict[str, str],
        body: bytes,
        *,
        length: int | None = None,
        pieces: int = 1,
    ) -> None:
        hop = ("content-length", "connection", "date", "server", "transfer-encoding")
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in hop:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        size = max(1, len(body) // pieces)
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            if pieces > 1:
                time.sleep(0.01)  # slow is what it is to be

    def drop(self, *, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        else:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


class _Request:
    """A whole request."""

    def __init__(self, handler: _Handler) -> None:
        self.method, self.path = handler.command, handler.path
        self.headers = {
            name: value for name, value in handler.headers.items() if name.lower() != "connection"
        }
        self.body = handler.rfile.read(int(self.headers.get("Content-Length") or 0))
