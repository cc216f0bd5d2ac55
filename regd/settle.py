"""When a file is finished. Pure: the time is an argument.

A file is settled when its size and modification time have stood still for `quiet_s`. A writer that
closed it shortens the wait to `closed_quiet_s`. A file that nobody has touched for that long
already, by its own time stamps, needs no waiting at all, if they are of this computer's clock; a
file server has its own, which may be wrong, so there a file must be seen standing still. One that a
program was found to have open for writing is not finished, however still: it is looked at again
when closed, or `quiet_s` later.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from regd.model import Signature

_STAMP_SLACK_S = 0.5  # a file system's clock may lag the kernel's by a timer tick or more
_JUMP_S = 2.0  # a clock that is only drawn straight moves by less from one look to the next
_HELD_LEAST_S = 1.0  # between two looks at a file held open, even where `quiet_s` is 0


@dataclass(slots=True)
class Steadiness:
    """Notices when the wall clock is set, by comparing it with the monotonic one.

    A computer that slept is as one whose clock was set: monotonic seconds do not count that time.
    """

    _ahead_s: float | None = None

    def jump_s(self, wall: float, now: float) -> float:
        """Return by how many seconds the wall clock was set since the last call; 0 if it was not.

        Args:
            wall: Seconds since 1970.
            now: Monotonic seconds, read at the same time.
        """
        ahead_s = wall - now
        by_s = 0.0 if self._ahead_s is None else ahead_s - self._ahead_s
        self._ahead_s = ahead_s
        return by_s if abs(by_s) > _JUMP_S else 0.0


@dataclass(slots=True)
class _Sight:
    signature: Signature
    since: float


@dataclass(slots=True)
class Stillness:
    """Remembers when each unfinished file was last seen to change.

    All times called `now` are seconds of one monotonic clock.

    Attributes:
        quiet_s: Seconds a file must stand still.
        closed_quiet_s: Seconds it must stand still after a writer closed it.
    """

    quiet_s: float
    closed_quiet_s: float
    _sights: dict[str, _Sight] = field(default_factory=dict)
    _closed: dict[str, float] = field(default_factory=dict)
    _held: dict[str, float] = field(default_factory=dict)
    _steadiness: Steadiness = field(default_factory=Steadiness)
    _jumped_at: float | None = None

    def closed(self, path: str, now: float) -> None:
        """Note that a writer closed `path`, or moved it into place."""
        self._closed[path] = now
        self._held.pop(path, None)

    def held(self, path: str, now: float) -> None:
        """Note that a program was found to have `path` open for writing."""
        self._held[path] = now

    def see_clocks(self, wall: float, now: float) -> None:
        """Note how the wall clock stands to the monotonic one."""
        if self._steadiness.jump_s(wall, now):
            self._jumped_at = now

    def untouched_s(self, touched_at: float | None, wall: float, now: float) -> float | None:
        """Return the seconds since a file was last touched by its own stamps; None if unknown.

        A stamp of the future tells nothing. Nor does any for `quiet_s` after the wall clock was
        set: a file being written just then looks as if nobody had touched it for as long as the
        clock went ahead. What is touched later has a stamp of the clock as it is.

        Args:
            touched_at: The newer of its mtime and ctime, seconds since 1970; None where they are
                not of this computer's clock.
            wall: Seconds since 1970.
            now: Monotonic seconds, read at the same time.
        """
        self.see_clocks(wall, now)
        if touched_at is None:
            return None
        if self._jumped_at is not None and now - self._jumped_at < self.quiet_s:
            return None
        return wall - touched_at if wall >= touched_at else None

    def remaining_s(
        self, path: str, signature: Signature, untouched_s: float | None, now: float
    ) -> float:
        """Return how many seconds `path` has yet to stand still; 0 if it is settled.

        Args:
            path: Any name that is unique to the file.
            signature: The file's size and modification time at `now`.
            untouched_s: As `untouched_s` tells; no copying tool can set back a ctime.
        """
        sight = self._sights.get(path)
        closed_at = self._closed.get(path)
        if sight is None or sight.signature != signature:
            if sight is not None and closed_at is not None and sight.since >= closed_at:
                del self._closed[path]  # it was seen after the close, and written to since
                closed_at = None
            sight = self._sights[path] = _Sight(signature, now)
        still_s = now - sight.since
        if untouched_s is not None and untouched_s > still_s:
            still_s = untouched_s
        needed_s = self.quiet_s
        if closed_at is not None:
            if untouched_s is not None and untouched_s + _STAMP_SLACK_S < now - closed_at:
                del self._closed[path]  # somebody wrote to it after that
            else:
                needed_s = min(needed_s, self.closed_quiet_s)
        if (held_at := self._held.get(path)) is not None:
            again_s = held_at + max(self.quiet_s, _HELD_LEAST_S) - now
            return max(0.0, again_s, needed_s - still_s)
        return max(0.0, needed_s - still_s)

    def expire(self, now: float) -> None:
        """Drop what is remembered of files that nobody has asked about for long."""
        oldest = now - 100 * max(self.quiet_s, 1.0)
        self._sights = {p: s for p, s in self._sights.items() if s.since > oldest}
        self._closed = {p: at for p, at in self._closed.items() if at > oldest}
        self._held = {p: at for p, at in self._held.items() if at > oldest}

    def forget(self, path: str) -> None:
        """Drop what is remembered of a file that is finished or gone."""
        for known in (self._sights, self._closed, self._held):
            known.pop(path, None)
