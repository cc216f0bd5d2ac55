"""What the daemon tells Prometheus: a page to scrape, a file for node_exporter, or both.

Loaded only where one of them is switched on. Counters are of this process, since it started; gauges
are read from the journal when somebody asks, on a connection of its own, so that the daemon never
waits for a scrape. Whatever fails here, regd goes on registering.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, MetricsHandler, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from regd import __version__
from regd.counts import SLOW_S, Counts
from regd.journal import FILE_NAME, Journal
from regd.logs import Recurring, get_logger
from regd.settings import Settings
from regd.status import Report, report

AWAY_KINDS = ("alyx", "credentials", "root", "owner")
"""What all work may wait for, as the daemon writes it down."""
_AGAIN_S = 60.0  # between two attempts to listen
_PATIENCE_S = 10.0  # for a client that does not go on; Prometheus waits as long for an answer
_MOST_CLIENTS = 8
_REMIND_S = 3600.0
_log = get_logger()


class About(NamedTuple):
    """What a family of metrics is."""

    kind: str
    labels: tuple[str, ...]
    meaning: str


FAMILIES = {
    "regd_build_info": About("info", ("version",), "Always 1; which regd this is."),
    "regd_sessions": About("gauge", ("state",), "Sessions known, by state."),
    "regd_files": About("gauge", ("state",), "Files known, by state."),
    "regd_oldest_waiting_since_timestamp_seconds": About(
        "gauge", (), "Since when the session waits that has waited longest; absent if none does."
    ),
    "regd_needs_human": About("gauge", (), "Things that a person has to mend."),
    "regd_away": About("gauge", ("kind",), "1 for what all work waits for now, 0 for all else."),
    "regd_backlog_sessions": About(
        "gauge", (), "Old sessions without a flag that were left alone, at the last scan."
    ),
    "regd_disk_free_bytes": About("gauge", ("folder",), "Space that regd's user may still use."),
    "regd_disk_size_bytes": About("gauge", ("folder",), "Size of that folder's file system."),
    "regd_journal_read_timestamp_seconds": About(
        "gauge", (), "When the gauges above were read; they are as old as that."
    ),
    "regd_journal_read_error": About(
        "gauge", (), "1 if the journal could not be read; then the gauges above are missing."
    ),
    "regd_hints_total": About("counter", (), "Changes in the data folder that events told of."),
    "regd_overflows_total": About("counter", (), "Times that the kernel dropped events."),
    "regd_scans_total": About("counter", (), "Passes over the whole data folder that ended."),
    "regd_last_scan_duration_seconds": About("gauge", (), "How long the last of them took."),
    "regd_last_scan_timestamp_seconds": About("gauge", (), "When it ended; absent before that."),
    "regd_hashed_bytes_total": About("counter", (), "Bytes read to be hashed."),
    "regd_created_sessions_total": About("counter", (), "Sessions created on Alyx."),
    "regd_registered_files_total": About("counter", (), "Files that Alyx took."),
    "regd_registered_bytes_total": About("counter", (), "Bytes that these hold."),
    "regd_alyx_requests_total": About(
        "counter",
        ("method", "endpoint", "status"),
        "Requests to Alyx, each attempt; the status is `none` where no whole answer came.",
    ),
    "regd_alyx_request_duration_seconds": About(
        "histogram", ("method", "endpoint"), "How long these took."
    ),
    "regd_alyx_last_success_timestamp_seconds": About(
        "gauge", (), "When Alyx last did what it was asked; absent before that."
    ),
}
"""Every family by its name as Prometheus shows it, but for `process_*`."""


def markdown_table() -> str:
    """Return the table of all metrics for the documentation."""
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for name, about in FAMILIES.items():
        labels = ", ".join(f"`{label}`" for label in about.labels)
        lines.append(f"| `{name}` | {about.kind} | {labels} | {about.meaning} |")
    return "\n".join(lines)


class RegdCollector(Collector):
    """Turns the daemon's counts and its journal into metrics; never raises.

    Args:
        settings: Where the journal is.
        counts: What this process has done.
        now: Seconds since 1970.
        clock: Monotonic seconds.
        read: Returns what `regd status` shows.
    """

    def __init__(
        self,
        settings: Settings,
        counts: Counts,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        read: Callable[[Settings, Journal], Report] | None = None,
    ) -> None:
        self._settings, self._counts = settings, counts
        self._now, self._clock = now, clock
        self._report = read or _report
        self._turn = threading.Lock()
        self._again_at = clock()
        self._gauges: list[Metric] = []
        self._read_at: float | None = None
        self._failed = False
        self._trouble = Recurring(
            _log, "metrics.failed", "metrics.mended", every_s=_REMIND_S, clock=clock
        )

    def describe(self) -> Iterable[Metric]:
        """Yield every family, without values."""
        return [_family(name) for name in FAMILIES]

    def collect(self) -> Iterable[Metric]:
        """Yield every family that has values now."""
        self._refresh()
        families = [_family("regd_build_info", {(__version__,): 1})]
        families += self._gauges
        families += _one("regd_journal_read_timestamp_seconds", self._read_at)
        families += _one("regd_journal_read_error", int(self._failed))
        families += self._of_process()
        return families

    def _refresh(self) -> None:
        """Read the journal, unless that was done lately or another thread is at it.

        A disk that hangs holds up one scrape; those after it get what is known, with its age.
        """
        if not self._turn.acquire(blocking=False):
            return
        try:
            if self._clock() < self._again_at:
                return
            try:
                read_at = self._now()
                self._gauges = [*self._of_journal()]
                self._read_at, self._failed = read_at, False
                self._trouble.recovered()
            except Exception as error:  # the daemon says more of it, and this must go on
                self._gauges, self._failed = [], True
                hint = "regd status says more; the metrics lack what the journal knows"
                self._trouble.failed(reason=f"the journal cannot be read: {error}", hint=hint)
            self._again_at = self._clock() + self._settings.metrics.every_s
        finally:
            self._turn.release()

    def _of_journal(self) -> Iterator[Metric]:
        settings = self._settings
        with Journal(settings.state_dir / FILE_NAME, now=self._now, read_only=True) as journal:
            facts = self._report(settings, journal)
        for kind in ("sessions", "files"):
            yield _family(f"regd_{kind}", {(state,): n for state, n in facts[kind].items()})
        yield from _one("regd_oldest_waiting_since_timestamp_seconds", facts["waiting_since"])
        yield from _one("regd_needs_human", facts["needs_human"])
        away = (facts["away"] or {}).get("kind")
        yield _family("regd_away", {(kind,): int(kind == away) for kind in AWAY_KINDS})
        yield from _one("regd_backlog_sessions", facts["backlog"]["sessions"])
        disks = {}
        for name, folder in (("data_root", settings.data_root), ("state_dir", settings.state_dir)):
            with contextlib.suppress(OSError):  # one that is away is told of by regd_away
                disks[name,] = os.statvfs(folder or "")
        free = {name: disk.f_bavail * disk.f_frsize for name, disk in disks.items()}
        yield _family("regd_disk_free_bytes", free)
        size = {name: disk.f_blocks * disk.f_frsize for name, disk in disks.items()}
        yield _family("regd_disk_size_bytes", size)

    def _of_process(self) -> Iterator[Metric]:
        counts = self._counts
        yield from _one("regd_hints_total", counts.hints)
        yield from _one("regd_overflows_total", counts.overflows)
        yield from _one("regd_scans_total", counts.scans)
        if counts.scanned_at is not None:
            yield from _one("regd_last_scan_duration_seconds", counts.scan_s)
        yield from _one("regd_last_scan_timestamp_seconds", counts.scanned_at)
        yield from _one("regd_hashed_bytes_total", counts.hashed_bytes)
        yield from _one("regd_created_sessions_total", counts.sessions_created)
        yield from _one("regd_registered_files_total", counts.files_registered)
        yield from _one("regd_registered_bytes_total", counts.registered_bytes)
        requests = counts.requests()
        number = {kind: sum(took.buckets) for kind, took in requests.items()}
        yield _family("regd_alyx_requests_total", number)
        # over all statuses: what times out is among what takes long
        latency: dict[tuple[str, str], tuple[list[int], float]] = {}
        for (method, endpoint, _), took in requests.items():
            buckets, total_s = latency.get((method, endpoint), ([0] * len(took.buckets), 0.0))
            buckets = [a + b for a, b in zip(buckets, took.buckets, strict=True)]
            latency[method, endpoint] = buckets, total_s + took.total_s
        yield _histogram("regd_alyx_request_duration_seconds", latency)
        yield from _one("regd_alyx_last_success_timestamp_seconds", counts.answered_at)


def _report(settings: Settings, journal: Journal) -> Report:
    return report(settings, journal, ask_alyx=False)


def _family(name: str, values: Mapping[Any, float] | None = None) -> Metric:
    """Return a family with the value for each combination of its labels' values."""
    kind, labels, meaning = FAMILIES[name]
    # OpenMetrics names these without their endings
    base = name.removesuffix({"counter": "_total", "info": "_info"}.get(kind, ""))
    family = Metric(base, meaning, kind)
    for key, value in (values or {}).items():
        family.add_sample(name, dict(zip(labels, map(str, key), strict=True)), value)
    return family


def _one(name: str, value: float | None) -> list[Metric]:
    """Return a family with one value and no labels; none at all if there is no value."""
    return [] if value is None else [_family(name, {(): value})]


def _histogram(name: str, latency: dict[tuple[str, str], tuple[list[int], float]]) -> Metric:
    _, labels, meaning = FAMILIES[name]
    family = HistogramMetricFamily(name, meaning, labels=labels)
    for key, (buckets, total_s) in latency.items():
        bounds = [*map(str, SLOW_S), "+Inf"]
        up_to = [sum(buckets[: n + 1]) for n in range(len(buckets))]
        family.add_metric(key, [*zip(bounds, up_to, strict=True)], total_s)
    return family


class _Handler(MetricsHandler):
    """Answers GET /metrics, and nothing else."""

    timeout = _PATIENCE_S
    server_version, sys_version = "regd", ""

    def do_GET(self) -> None:  # noqa: N802  # the name is http.server's
        if urlsplit(self.path).path == "/metrics":
            super().do_GET()
        else:
            self.send_error(HTTPStatus.NOT_FOUND, "the metrics are at /metrics")


class _Server(ThreadingHTTPServer):
    """A thread a client, of whom there are few; none keeps the process from ending."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        self._turns = threading.BoundedSemaphore(_MOST_CLIENTS)
        super().__init__(address[:2], _Handler.factory(registry))  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Listen, without looking up a name for the address, which takes long where DNS is away."""
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a client, unless too many are being answered."""
        if self._turns.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a client, in a thread of its own."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._turns.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over a client that went away."""


class Exporter:
    """Serves the metrics and writes them to a file, as the settings say, until it is closed.

    Args:
        settings: `metrics.port` or `metrics.textfile` is set.
        counts: What this process has done.
        clock: Monotonic seconds.
    """

    def __init__(
        self, settings: Settings, counts: Counts, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings.metrics
        self._clock = clock
        collector = RegdCollector(settings, counts, clock=clock)
        # node_exporter has process_* of its own, and would give up over a second one
        self._plain = CollectorRegistry()
        self._plain.register(collector)
        self._whole = CollectorRegistry()
        self._whole.register(collector)
        ProcessCollector(registry=self._whole)
        self._stop = threading.Event()
        self._server: _Server | None = None
        self._listen_at = clock()
        self._trouble = {
            what: Recurring(
                _log, "metrics.failed", "metrics.mended", every_s=_REMIND_S, clock=clock
            )
            for what in ("port", "textfile")
        }
        self._thread = threading.Thread(target=self.run, name="metrics", daemon=True)

    @property
    def address(self) -> tuple[str, int] | None:
        """Where the metrics are served: host and port, or None if they are not."""
        return None if self._server is None else self._server.server_address[:2]  # type: ignore[return-value]

    def __enter__(self) -> Exporter:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        # a disk that hangs does not keep regd from ending
        self._thread.join(timeout=1.0)
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if self._settings.textfile is not None:
            with contextlib.suppress(OSError):  # numbers of a regd that does not run mislead
                self._settings.textfile.unlink()

    def run(self) -> None:
        """Do what is due, again and again, until told to stop."""
        while not self._stop.is_set():
            self.step()
            self._stop.wait(self._settings.every_s if self._settings.textfile else _AGAIN_S)

    def step(self) -> None:
        """Listen if that has not worked yet, and write the file."""
        port, textfile = self._settings.port, self._settings.textfile
        if port is not None and self._server is None and self._clock() >= self._listen_at:
            self._listen(self._settings.host, port)
        if textfile is not None:
            self._write(textfile)

    def _listen(self, host: str, port: int) -> None:
        self._listen_at = self._clock() + _AGAIN_S
        try:
            server = _Server(host, port, self._whole)
        except OSError as error:
            self._trouble["port"].failed(
                reason=f"the metrics cannot be served at {host}:{port}: {error.strerror or error}",
                hint="free that port, or correct metrics.port and metrics.host, then: systemctl "
                "restart regd; regd registers all the same, and tries again every minute",
            )
            return
        self._server = server
        threading.Thread(target=server.serve_forever, name="metrics-http", daemon=True).start()
        self._trouble["port"].recovered()
        host, port = server.server_address[:2]  # type: ignore[assignment]
        _log.info("metrics.started", host=host, port=port)

    def _write(self, path: Path) -> None:
        try:
            write_whole(path, generate_latest(self._plain))
        except OSError as error:
            self._trouble["textfile"].failed(
                reason=f"the metrics cannot be written to {path}: {error.strerror}",
                hint=f"let regd's user write in {path.parent}, under systemd with ReadWritePaths=, "
                "too; or correct metrics.textfile. regd registers all the same",
            )
        else:
            self._trouble["textfile"].recovered()


def write_whole(path: Path, content: bytes) -> None:
    """Put a file that everybody may read in the place of the one before, all of it at once.

    Raises:
        OSError: It cannot be written; the one before is as it was.
    """
    new = path.with_name(f"{path.name}.new")  # node_exporter reads *.prom alone
    with contextlib.suppress(FileNotFoundError):
        new.unlink()  # left by a crash, or put there by somebody
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(new, flags, 0o644), "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # whatever the umask is
            file.write(content)
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
