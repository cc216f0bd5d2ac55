"""Running the sandbox: inside a test or a demo (`Server`), or as a command (`serve`)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import uvicorn
from starlette.middleware import Middleware

from regd.sandbox.app import make_app
from regd.sandbox.store import Store
from regd.sandbox.throttle import Throttle

Lab = str | Path | Mapping[str, Any] | None
DEFAULT_RATE = "550/minute"
_REMEMBERED = 100_000


@dataclass(frozen=True)
class Asked:
    """One request the sandbox answered."""

    method: str
    path: str
    status: int


class PortInUseError(OSError):
    """Something else listens there; the message says what to do."""


class _Prompt(uvicorn.Server):
    """A uvicorn server that says when it is up, and stops at once when idle.

    uvicorn looks ten times a second whether to stop, and then waits as long again.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.up.set()

    async def main_loop(self) -> None:
        ticks = -1  # so that the first answer has a date, as all others
        while not await self.on_tick(ticks := ticks + 1):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), 0.1)

    def tell_to_stop(self) -> None:
        """Stop; may be called from another thread."""
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._told.set)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.server_state.tasks:
            await super().shutdown(sockets)
            return
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0)  # a closed connection is gone by the loop's next turn


class Server:
    """The sandbox in a thread of this process: `with Server() as server: server.url`.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        db: SQLite file, or `:memory:`. A file that holds a lab already is used as it is.
        load: The lab to start from: a JSON file, its content, or None for the built-in one.
        rate_limit: Requests a user may make, such as `550/minute`; None for no limit.
        middleware: Starlette middleware around everything, to delay or break answers.

    Raises:
        LoadError: The lab or the database file is not usable.
        RateError: The rate limit cannot be read.
        PortInUseError: Something else listens on that address.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        db: str | Path = ":memory:",
        load: Lab = None,
        rate_limit: str | None = DEFAULT_RATE,
        middleware: Sequence[Middleware] = (),
    ) -> None:
        """Open the database and the port; nothing is answered before `start`."""
        throttle = Throttle(rate_limit)
        self.store = Store(str(db))
        self.requests: deque[Asked] = deque(maxlen=_REMEMBERED)
        """What was asked, oldest first; the last hundred thousand."""
        self.passwords: dict[str, str] = {}
        """The users of the lab that was loaded; nobody, where the file held a lab already."""
        try:
            if self.store.is_empty:
                self.passwords = self.store.load(load)
            self._socket = _listen(host, port)
        except BaseException:
            self.store.close()
            raise
        self.host, self.port = host, self._socket.getsockname()[1]
        app = make_app(self.store, throttle, tuple(middleware), self._note)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", ws="none",
            timeout_graceful_shutdown=2, server_header=False,
        )  # fmt: skip
        self._server = _Prompt(config)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The address to give to clients."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def start(self) -> Self:
        """Answer from now on, in a thread; it is up when this returns."""
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="sandbox", daemon=True
        )
        self._thread.start()
        self._server.up.wait()
        return self

    def stop(self) -> None:
        """Finish what is being answered, and close the port and the database."""
        self._server.tell_to_stop()
        if self._thread is not None:
            self._thread.join()
        self._socket.close()
        self.store.close()

    def _note(self, method: str, path: str, status: int) -> None:
        self.requests.append(Asked(method, path, status))

    def __enter__(self) -> Self:
        """Start."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self.stop()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns off Nagle's algorithm, 40 ms an answer, only where the protocol is stated
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise PortInUseError(
            f"cannot listen on {host}:{port} ({error.strerror}): give another --port, or 0 for any"
        ) from None
    return sock


def serve(
    host: str = "127.0.0.1",
    port: int = 8000,
    db: str | Path = ":memory:",
    load: Lab = None,
    rate_limit: str | None = DEFAULT_RATE,
) -> None:
    """Run the sandbox until SIGTERM or SIGINT, saying where it listens and who may log in.

    Raises what `Server` raises.
    """
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Server(host, port, db, load, rate_limit) as server:
        for number in before:
            signal.signal(number, lambda *_: stop.set())
        _announce(server, str(db))
        stop.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(server: Server, db: str) -> None:
    lines = [
        f"Alyx sandbox at {server.url} (database: {db})",
        "It is for trials and tests. It is not a database to keep data in.",
        *(
            ["Users, each with the password to log in with:"]
            + [f"  {name}  {password}" for name, password in server.passwords.items()]
            if server.passwords
            else ["Its users are those of that database, with the passwords they had."]
        ),
        "Stop it with Ctrl-C.",
    ]
    sys.stdout.write("\n".join(lines) + "\n\n")
    sys.stdout.flush()
