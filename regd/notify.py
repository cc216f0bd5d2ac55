"""What systemd is told about this process, where systemd started it: see sd_notify(3)."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sqlite3
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from regd.errors import RegdError, SettingsError, printable
from regd.health import BEAT_S
from regd.logs import get_logger
from regd.pulse import Pulse, Stuck

_LOOK_S = BEAT_S  # between two looks for what is stuck
_STATUS_S = 5.0  # between two looks for a new status
_START_STEP_S = 120.0  # while regd starts, that long is asked for again and again
_LONGEST_START_S = 3600.0  # but not for ever: a journal or a data root may not answer
_WATCHDOG_S = 300.0  # where systemd does not ask
_LONGEST_STATUS = 500  # characters
_SEND_WITHIN_S = 5.0
_log = get_logger()


class Systemd:
    """The socket on which systemd listens; without one, nothing is told to anybody.

    Args:
        environ: The environment that this process was started in.

    Attributes:
        listens: Whether there is one.
        watchdog_s: Seconds of silence after which it restarts this process; None if it does not.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.listens = address.startswith(("/", "@"))
        self.watchdog_s: float | None = None
        usec = environ.get("WATCHDOG_USEC", "")
        if usec.isdecimal() and environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            self.watchdog_s = int(usec) / 1e6

    def tell(self, **variables: object) -> None:
        """Send some variables of sd_notify(3), each on a line of its own.

        What cannot be sent is not: systemd hears the next one, or restarts the service.
        """
        if not self.listens:
            return
        message = "\n".join(f"{key}={printable(str(value))}" for key, value in variables.items())
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out,
        ):
            out.settimeout(_SEND_WITHIN_S)
            out.sendto(message.encode(), self._address)


class Lifeline:
    """Keeps systemd informed from start to end: that regd is ready, alive, and what it does.

    The watchdog is fed while every thread that has work in hand advances, or has none. Where one
    does not, that is logged with the place in the code, and systemd, which hears nothing any
    longer, ends this process after WatchdogSec and starts a new one; a thread that goes on before
    that saves it. Neither of the two threads here waits for what another holds: that one may be
    the stuck one.

    Args:
        systemd: Who is told; where nobody listens, only `renewing` tells anybody.
        pulse: Which threads advance.
    """

    def __init__(self, systemd: Systemd, pulse: Pulse) -> None:
        self._systemd = systemd
        self._pulse = pulse
        self._ready = False
        self._running = contextlib.ExitStack()
        self._status = ""
        self._reported: set[int] = set()
        self._file: Path | None = None
        self.allowed_s = systemd.watchdog_s or _WATCHDOG_S
        """How long a thread with work in hand may be silent, in seconds."""

    def __enter__(self) -> Lifeline:
        if self._systemd.listens:
            if sys.__stderr__ is not None:
                faulthandler.enable(sys.__stderr__)  # what systemd ends by SIGABRT says where it is
            self._systemd.tell(STATUS="starting")
        self._running.enter_context(self._pulse.watched())
        self._pulse.beat(_LONGEST_START_S)
        every_s = min(_LOOK_S, self.allowed_s / 3)
        self._running.enter_context(_repeating("watchdog", self.look, every_s))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._running.close()
        if isinstance(error, (RegdError, SettingsError, OSError)):
            self._systemd.tell(STOPPING=1, STATUS=str(error).partition("\n")[0][:_LONGEST_STATUS])
        else:
            self._systemd.tell(STOPPING=1)

    @contextlib.contextmanager
    def renewing(self, file: Path) -> Iterator[None]:
        """Renew the time of a file in the block while all is alive, for `regd.health` to see."""
        self._file = file
        try:
            yield
        finally:
            self._file = None

    @contextlib.contextmanager
    def saying(self, sentence: Callable[[], str], answers_within_s: float) -> Iterator[None]:
        """Say in the block what regd does.

        Args:
            sentence: Returns that, in one line for people; called every few seconds.
            answers_within_s: How long Alyx may keep silent in the middle of an answer.
        """
        self.allowed_s = max(self.allowed_s, 2 * answers_within_s)

        def say() -> None:
            with contextlib.suppress(RegdError, sqlite3.Error):  # others find that, and end regd
                self.say(sentence())

        with (
            _repeating("status", say, _STATUS_S)
            if self._systemd.listens
            else contextlib.nullcontext()
        ):
            yield

    def ready(self) -> None:
        """Say that the start is over; a scan comes next."""
        self._ready = True
        self._systemd.tell(READY=1, STATUS="scanning")

    def look(self) -> None:
        """Say that all is alive if it is, and whose work is stuck if not."""
        stuck = self._pulse.stuck(self.allowed_s)
        idents = {thread.ident for thread in stuck}
        for thread in stuck:
            if thread.ident not in self._reported:
                _log.error(
                    "work.stuck",
                    thread=thread.thread,
                    work=thread.on,
                    silent_s=round(thread.silent_s),
                    reason="it does not get a step further: systemd starts regd anew",
                    hint="do the disks of data_root and state_dir answer? If they do, report this",
                    stack=_stack(thread),
                )
        if self._reported - idents and not stuck:
            _log.info("work.resumed")
        self._reported = idents
        if self._file is not None and not stuck:
            with contextlib.suppress(OSError):
                os.utime(self._file)
        if stuck:
            self._systemd.tell(STATUS=_sentence(stuck))
            self._status = ""
        elif self._ready:
            self._systemd.tell(WATCHDOG=1)
        else:
            self._systemd.tell(EXTEND_TIMEOUT_USEC=int(_START_STEP_S * 1e6))

    def say(self, status: str) -> None:
        """Tell a status if it is another one than before."""
        if self._ready and not self._reported and status != self._status:
            self._status = status
            self._systemd.tell(STATUS=status[:_LONGEST_STATUS])


@contextlib.contextmanager
def _repeating(name: str, step: Callable[[], None], every_s: float) -> Iterator[None]:
    """Have a thread do something every so often, at once the first time, while in the block."""
    stop = threading.Event()

    def run() -> None:
        step()
        while not stop.wait(every_s):
            step()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=1.0)  # it may wait for a disk


def _stack(stuck: Stuck) -> str:
    """Return where in the code a thread is."""
    frame = sys._current_frames().get(stuck.ident)
    return "".join(traceback.format_stack(frame)).rstrip() if frame is not None else ""


def _sentence(stuck: list[Stuck]) -> str:
    which = ", ".join(f"{s.thread} at {s.on}" if s.on else s.thread for s in stuck)
    return f"stuck for {round(stuck[0].silent_s)} s, to be restarted: {which}"[:_LONGEST_STATUS]
