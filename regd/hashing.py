"""Large files are hashed aside: who waited for one would keep small sessions waiting, too."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import threading
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from pathlib import Path

from regd import files
from regd.errors import Stopping
from regd.files import Found
from regd.pulse import Pulse

LARGE = 64 * 2**20
"""Bytes from which on a file is hashed aside: those of 0.1 s of a core, 0.5 s of a slow disk."""
_SLICE = 64 * 2**20  # bytes that are read of one before a smaller one may have its turn
_NICER = 5  # regd's other work comes first; not under the unit, whose filter forbids to step back
_THREADS = 4


@dataclass(slots=True, eq=False)
class _Job:
    """One file to be hashed.

    Attributes:
        relative: Its path below the data root.
        seen: As it was when it was asked for.
        blocks: The reading, begun or not.
        left: Bytes not yet read.
        outcome: The MD5, or why there is none; None until then.
        dropped: Whether nobody asks for it any more.
    """

    relative: str
    seen: Found
    blocks: Generator[int, None, str]
    left: int
    outcome: str | Exception | None = None
    dropped: bool = False


@dataclass(slots=True)
class Hasher:
    """Hashes files on threads of its own, always the one with the least left to read.

    So a file of a terabyte delays one of a gigabyte by no more than a slice, and itself by no more
    than what is smaller: every file has its turn.

    Attributes:
        root: The data root.
        on_read: Told of the bytes of each block; may raise `Stopping`.
        on_done: Told of each file that is done, by its path below the root.
        threads: How many files are read at a time.
        pulse: Told of what is read, and that nothing is to be.
    """

    root: Path
    on_read: Callable[[int], object]
    on_done: Callable[[str], object]
    threads: int = min(_THREADS, os.cpu_count() or 1)
    pulse: Pulse = field(default_factory=Pulse)
    _jobs: dict[str, _Job] = field(default_factory=dict)
    _queue: list[tuple[int, int, _Job]] = field(default_factory=list)
    _number: itertools.count[int] = field(default_factory=itertools.count)
    _news: threading.Condition = field(default_factory=threading.Condition)
    _started: list[threading.Thread] = field(default_factory=list)
    _closed: bool = False

    def md5(self, relative: str, found: Found) -> str | None:
        """Return the MD5 of a file as it was found; None if it is not known yet, but will be.

        Raises:
            FileChanged: It was written to while it was read; so for the other errors of
                `files.md5`, each once.
        """
        with self._news:
            job = self._jobs.get(relative)
            if job is not None and job.seen == found._replace(path=job.seen.path):
                if job.outcome is None:
                    return None
                del self._jobs[relative]
                if isinstance(job.outcome, Exception):
                    raise job.outcome
                return job.outcome
            if job is not None:
                self._drop(job)
            blocks = files.md5_in_blocks(self.root, relative, found.signature)
            self._jobs[relative] = job = _Job(relative, found, blocks, found.size)
            self._put(job)
            if len(self._started) < self.threads:
                thread = threading.Thread(
                    target=self._run, name=f"hasher-{len(self._started)}", daemon=True
                )
                self._started.append(thread)
                thread.start()
        return None

    def is_busy(self) -> bool:
        """Say whether any file is being hashed, or its MD5 waits for who asked for it."""
        with self._news:
            return bool(self._jobs)

    def forget(self, folder: str, but: Collection[str] = ()) -> None:
        """Drop all files below a folder, but for some of them: nobody asks for them any more."""
        with self._news:
            for relative in [r for r in self._jobs if r.startswith(f"{folder}/")]:
                if relative.removeprefix(f"{folder}/") not in but:
                    self._drop(self._jobs[relative])

    def close(self) -> None:
        """End the threads; what was not done is lost."""
        with self._news:
            self._closed = True
            self._news.notify_all()

    def _put(self, job: _Job) -> None:
        heapq.heappush(self._queue, (job.left, next(self._number), job))
        self._news.notify()

    def _drop(self, job: _Job) -> None:
        job.dropped = True
        del self._jobs[job.relative]

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            nice = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, nice + _NICER)
        with self.pulse.watched():
            while (job := self._next()) is not None:
                with self.pulse.on(job.relative):
                    self._read(job)

    def _next(self) -> _Job | None:
        """Wait for the file to be read next; None if there will be none."""
        with self._news:
            while not self._queue and not self._closed:
                with self.pulse.resting():
                    self._news.wait()
            return None if self._closed else heapq.heappop(self._queue)[2]

    def _read(self, job: _Job) -> None:
        """Hash a file to its end, or until a smaller one has waited for a slice."""
        slice_ = 0
        try:
            while not (job.dropped or self._closed):
                size = next(job.blocks)
                self.on_read(size)
                job.left -= size
                slice_ += size
                if slice_ >= _SLICE:
                    slice_ = 0
                    with self._news:
                        if self._queue and self._queue[0][0] < job.left:
                            self._put(job)
                            return
        except StopIteration as end:
            self._end(job, end.value)
        except Stopping:
            pass
        except Exception as error:  # to be raised where it is asked for
            self._end(job, error)
        job.blocks.close()

    def _end(self, job: _Job, outcome: str | Exception) -> None:
        job.outcome = outcome
        if not job.dropped:
            self.on_done(job.relative)
