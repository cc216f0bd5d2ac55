"""Which threads have work in hand, and when each of them last advanced."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stuck:
    """A thread that has work in hand and does not advance.

    Attributes:
        thread: Its name.
        ident: Its number, as `threading.get_ident` tells it.
        on: What it works on, a session's folder or a file in one, or ''.
        silent_s: Seconds since it last advanced.
    """

    thread: str
    ident: int
    on: str
    silent_s: float


@dataclass(slots=True)
class _Hand:
    thread: str
    at: float  # when it last advanced, later where it was granted time, never while it rests
    on: str = ""


class Pulse:
    """Tells a thread that is stuck from one that works for long, and from one with nothing to do.

    A thread is looked at within `watched`, and says there each time that it got a step further:
    read a block, listed a folder, had an answer. A step is what ends by itself within seconds, or
    has a timeout. A thread that waits on purpose, or for another one that is looked at itself,
    rests, and is never stuck.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._hands: dict[int, _Hand] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at this thread for as long as it is in the outermost such block."""
        ident = threading.get_ident()
        if ident in self._hands:
            yield
            return
        with self._lock:
            self._hands[ident] = _Hand(threading.current_thread().name, self._clock())
        try:
            yield
        finally:
            with self._lock:
                del self._hands[ident]

    def beat(self, granted_s: float = 0.0) -> None:
        """Note that this thread advanced.

        Args:
            granted_s: Seconds that its next step may take beyond what is allowed to any.
        """
        hand = self._hands.get(threading.get_ident())
        if hand is not None:
            hand.at = self._clock() + granted_s

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Expect nothing of this thread while it is in the block."""
        self.beat(math.inf)
        try:
            yield
        finally:
            self.beat()

    @contextmanager
    def holding(self, lock: threading.Lock | threading.RLock) -> Iterator[None]:
        """Hold a lock in the block; until it is free, its holder has the work in hand."""
        with self.resting():
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Say what this thread works on in the block, for who has to look after it."""
        hand = self._hands.get(threading.get_ident())
        if hand is None:
            yield
            return
        hand.on = what
        try:
            yield
        finally:
            hand.on = ""

    def stuck(self, allowed_s: float) -> list[Stuck]:
        """Return the threads that have not advanced for longer than `allowed_s`."""
        now = self._clock()
        with self._lock:
            return [
                Stuck(hand.thread, ident, hand.on, now - hand.at)
                for ident, hand in self._hands.items()
                if now - hand.at > allowed_s
            ]
