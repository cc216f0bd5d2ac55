"""What Prometheus is told: the numbers are those of the daemon, and telling them harms nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse

from regd.counts import SLOW_S, Counts
from regd.errors import SettingsError
from regd.journal import FILE_NAME, Journal
from regd.metrics import FAMILIES, Exporter, RegdCollector, write_whole
from regd.paths import parse_session
from regd.settings import LEAVES, Settings, check_for_daemon
from regd.status import report
from tests.rig import Rig, idle, until, write

Numbers = dict[tuple[str, tuple[str, ...]], float]


def numbers(text: str) -> Numbers:
    """Return the value of every sample, by its name and its labels' values in their order."""
    return {
        (sample.name, tuple(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def fetch(address: tuple[str, int], path: str = "/metrics", **options: Any) -> Any:
    host, port = address
    request = urllib.request.Request(f"http://{host}:{port}{path}", **options)
    return urllib.request.urlopen(request, timeout=10)


def scrape(address: tuple[str, int]) -> Numbers:
    return numbers(fetch(address).read().decode())


def events(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    lines = [record.msg for record in caplog.records]
    return [line for line in lines if isinstance(line, dict) and line["event"] == event]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder whose journal knows one waiting session."""
    folder = tmp_path / "state"
    folder.mkdir()
    with Journal(folder / FILE_NAME, now=lambda: 1000.0) as journal:
        session = parse_session(("ZM_1085", "2026-01-31", "001"))
        journal.note(session, due_at=0.0, flagged=False, new_flag=False, held_until=0.0)
    return folder


def settings(folder: Path, **metrics: Any) -> Settings:
    (folder / "data").mkdir(exist_ok=True)
    wanted = {"port": 0, **metrics}
    return Settings(data_root=folder / "data", state_dir=folder / "state", metrics=wanted)


def collected(collector: RegdCollector) -> Numbers:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


@contextmanager
def exporting(wanted: Settings, counts: Counts | None = None) -> Iterator[Exporter]:
    with Exporter(wanted, counts or Counts()) as exporter:
        yield exporter


# --- the numbers ---------------------------------------------------------------------------------


def test_the_numbers_of_a_daemon_at_work(rig_with: type[Rig], lab: Any, tmp_path: Path) -> None:
    rig = rig_with(tmp_path, lab, metrics={"port": 0, "every_s": 1})
    with rig.running() as service, exporting(rig.settings, service.client.alyx.counts) as exporter:
        until(lambda: service.client.alyx.counts.scans)
        folder = rig.record(1)
        write(folder / "alf/_ibl_nothing.npy", b"what has no dataset type is refused")
        until(lambda: service.client.alyx.counts.files_registered == 6 and idle(service))
        address = until(lambda: exporter.address)
        # what was read a second ago may be told again
        found = until(lambda: (n := scrape(address))["regd_needs_human", ()] == 1 and n)
    recorded = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in recorded if path.name != "_ibl_nothing.npy")
    assert found["regd_sessions", ("done",)] == 1
    assert found["regd_sessions", ("waiting",)] == 0
    assert found["regd_files", ("registered",)] == 6
    assert found["regd_files", ("refused",)] == 1
    assert found["regd_created_sessions_total", ()] == 1
    assert found["regd_registered_files_total", ()] == 6
    assert found["regd_registered_bytes_total", ()] == size
    assert found["regd_hashed_bytes_total", ()] == size
    assert found["regd_hints_total", ()] > 6
    assert found["regd_scans_total", ()] >= 1
    assert found["regd_alyx_requests_total", ("/sessions", "POST", "201")] == 1
    assert found["regd_alyx_request_duration_seconds_count", ("/sessions", "POST")] == 1
    assert abs(found["regd_alyx_last_success_timestamp_seconds", ()] - time.time()) < 60
    assert abs(found["regd_last_scan_timestamp_seconds", ()] - time.time()) < 60
    assert found["process_resident_memory_bytes", ()] > 1e6


def test_every_family_that_is_declared_is_told_and_no_other(tmp_path: Path, state: Path) -> None:
    counts = Counts()
    counts.scanned(0.5)
    counts.requested("GET", "/sessions", 200, 0.02, good=True)
    families = [*RegdCollector(settings(tmp_path), counts).collect()]
    told = {sample.name for family in families for sample in family.samples}
    told = {
        name
        if name in FAMILIES
        else name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        for name in told
    }
    assert told == set(FAMILIES)
    for family in families:
        for sample in family.samples:
            name = sample.name if sample.name in FAMILIES else family.name
            assert set(sample.labels) - {"le"} == set(FAMILIES[name].labels)


def test_what_is_not_yet_known_is_absent_and_not_zero(tmp_path: Path, state: Path) -> None:
    """A time of 0 would be 1970: an alarm on its age would go off."""
    found = collected(RegdCollector(settings(tmp_path), Counts()))
    for name in ("last_scan_timestamp", "last_scan_duration", "alyx_last_success_timestamp"):
        assert (f"regd_{name}_seconds", ()) not in found
    assert found["regd_oldest_waiting_since_timestamp_seconds", ()] == 1000.0
    with Journal(state / FILE_NAME, now=time.time) as journal:
        journal._db.execute("DELETE FROM session")
    found = collected(RegdCollector(settings(tmp_path), Counts()))
    assert ("regd_oldest_waiting_since_timestamp_seconds", ()) not in found


@pytest.mark.parametrize("kind", ["alyx", "credentials", "root", "owner"])
def test_what_all_work_waits_for(tmp_path: Path, state: Path, kind: str) -> None:
    about = {"away": {"kind": kind, "reason": "", "hint": "", "since": 0}}
    collector = RegdCollector(
        settings(tmp_path),
        Counts(),
        read=lambda *args: {**report(*args, ask_alyx=False), **about},
    )
    away = {k[1][0]: v for k, v in collected(collector).items() if k[0] == "regd_away"}
    assert away == {**dict.fromkeys(("alyx", "credentials", "root", "owner"), 0), kind: 1}


def test_a_histogram_counts_what_took_at_most_so_long(tmp_path: Path, state: Path) -> None:
    counts = Counts()
    for status, took_s in ((200, 0.01), (200, 0.02), (500, 3.0), (None, 100.0)):
        counts.requested("GET", "/sessions/1", status, took_s, good=False)
    found = collected(RegdCollector(settings(tmp_path), counts))
    name, labels = "regd_alyx_request_duration_seconds", ("GET", "/sessions/{id}")
    up_to = [found[f"{name}_bucket", (*labels, str(bound))] for bound in (*SLOW_S, "+Inf")]
    assert up_to == [1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4]
    assert found[f"{name}_count", labels] == 4
    assert found[f"{name}_sum", labels] == pytest.approx(103.03)
    by_status = {k[1][2]: v for k, v in found.items() if k[0] == "regd_alyx_requests_total"}
    assert by_status == {"200": 2, "500": 1, "none": 1}


# --- the journal is not disturbed ----------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_journal_is_read_every_so_often_however_often_somebody_asks(
    tmp_path: Path, state: Path
) -> None:
    clock, reads = Clock(), []
    collector = RegdCollector(
        settings(tmp_path, every_s=15),
        Counts(),
        now=lambda: 5000 + clock.now,
        clock=clock,
        read=lambda *args: reads.append(1) or report(*args, ask_alyx=False),  # type: ignore[func-returns-value]
    )
    for clock.now in (0.0, 1.0, 14.9):
        found = collected(collector)
        assert found["regd_journal_read_timestamp_seconds", ()] == 5000
    assert len(reads) == 1
    clock.now = 15.0
    assert collected(collector)["regd_journal_read_timestamp_seconds", ()] == 5015
    assert len(reads) == 2


def test_without_a_journal_the_rest_is_told(tmp_path: Path, state: Path) -> None:
    clock = Clock()
    collector = RegdCollector(settings(tmp_path), Counts(), clock=clock)
    assert collected(collector)["regd_sessions", ("waiting",)] == 1
    (state / FILE_NAME).rename(state / "away")
    for content in (None, b"no journal at all" * 1000):
        if content is not None:
            (state / FILE_NAME).write_bytes(content)
        clock.now += 100
        found = collected(collector)
        assert found["regd_journal_read_error", ()] == 1
        assert found["regd_scans_total", ()] == 0
        assert not [name for name, _ in found if name in ("regd_sessions", "regd_needs_human")]
    (state / "away").rename(state / FILE_NAME)
    clock.now += 100
    found = collected(collector)
    assert found["regd_journal_read_error", ()] == 0
    assert found["regd_sessions", ("waiting",)] == 1


def test_a_disk_that_hangs_holds_up_one_scrape_alone(tmp_path: Path, state: Path) -> None:
    clock, hang, hung = Clock(), threading.Event(), threading.Event()

    def read(*args: Any) -> dict[str, Any]:
        if clock.now:
            hung.set()
            hang.wait(20)
        return report(*args, ask_alyx=False)

    collector = RegdCollector(settings(tmp_path), Counts(), now=clock, clock=clock, read=read)
    collected(collector)
    clock.now = 100.0
    first = threading.Thread(target=collector.collect)
    first.start()
    assert hung.wait(10)
    found = collected(collector)  # would hang, too, if it waited for its turn
    assert found["regd_sessions", ("waiting",)] == 1
    assert found["regd_journal_read_timestamp_seconds", ()] == 0.0
    hang.set()
    first.join(10)
    assert collected(collector)["regd_journal_read_timestamp_seconds", ()] == 100.0


def test_a_scrape_waits_for_no_writer(tmp_path: Path, state: Path) -> None:
    collector = RegdCollector(settings(tmp_path), Counts())
    with Journal(state / FILE_NAME, now=time.time) as journal, journal.together():
        journal.set_fact("anything", 1)  # a transaction is open, and the journal's lock is held
        assert collected(collector)["regd_journal_read_error", ()] == 0


# --- the port ------------------------------------------------------------------------------------


def test_only_the_metrics_are_served_and_only_to_be_read(tmp_path: Path, state: Path) -> None:
    with exporting(settings(tmp_path)) as exporter:
        address = until(lambda: exporter.address)
        assert address[0] == "127.0.0.1"
        for path in ("/", "/metrics/", "/../etc/passwd", "/favicon.ico"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                fetch(address, path)
        for method in ("POST", "PUT", "DELETE", "HEAD"):
            with pytest.raises(urllib.error.HTTPError, match="501"):
                fetch(address, method=method)
        answer = fetch(address, "/metrics?x=1")
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert "Python" not in answer.headers["Server"]


def test_openmetrics_is_spoken_too(tmp_path: Path, state: Path) -> None:
    counts = Counts()
    counts.requested("GET", "/sessions", 200, 0.02, good=True)
    with exporting(settings(tmp_path), counts) as exporter:
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        answer = fetch(until(lambda: exporter.address), headers=accept).read().decode()
    families = {family.name: family.type for family in parse_openmetrics(answer)}
    assert families["regd_hints"] == "counter"
    assert families["regd_alyx_request_duration_seconds"] == "histogram"


def test_a_client_that_says_nothing_keeps_nobody_waiting(
    tmp_path: Path, state: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with exporting(settings(tmp_path)) as exporter:
        address = until(lambda: exporter.address)
        with socket.create_connection(address), socket.create_connection(address) as rude:
            rude.send(b"GET /metr")
            assert scrape(address)["regd_journal_read_error", ()] == 0
        for _ in range(20):  # each hangs up in the middle
            with socket.create_connection(address) as gone:
                gone.send(b"GET /metrics HTTP/1.0\r\n\r\n")
        until(lambda: _works(lambda: scrape(address)))
    assert "Traceback" not in capfd.readouterr().err


def test_too_many_clients_are_sent_away(tmp_path: Path, state: Path) -> None:
    with exporting(settings(tmp_path)) as exporter:
        address = until(lambda: exporter.address)
        silent = [socket.create_connection(address) for _ in range(8)]
        with socket.create_connection(address, timeout=10) as one_more:
            assert one_more.recv(1) == b""
        for client in silent:
            client.close()
        until(lambda: _works(lambda: scrape(address)))


def _works(action: Callable[[], object]) -> bool:
    try:
        action()
    except OSError:
        return False
    return True


def test_a_port_in_use_is_said_with_what_to_do_and_tried_again(
    tmp_path: Path, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "regd")
    clock = Clock()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wanted = settings(tmp_path, port=taken.getsockname()[1])
        exporter = Exporter(wanted, Counts(), clock=clock)
        exporter.step()
        clock.now = 59.0
        exporter.step()
        assert exporter.address is None
    exporter.step()
    assert exporter.address is None  # not before a minute has passed
    clock.now = 60.0
    with exporter:
        assert scrape(until(lambda: exporter.address))
    (failed,) = events(caplog, "metrics.failed")
    assert str(wanted.metrics.port) in failed["reason"]
    assert "metrics.port" in failed["hint"]
    assert len(events(caplog, "metrics.mended")) == 1


def test_ipv6(tmp_path: Path, state: Path) -> None:
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("this computer has no IPv6")
    with exporting(settings(tmp_path, host="::1")) as exporter:
        host, port = until(lambda: exporter.address)
        assert host == "::1"
        assert scrape((f"[{host}]", port))


# --- the file ------------------------------------------------------------------------------------


def test_the_file_is_whole_readable_by_all_and_gone_in_the_end(tmp_path: Path, state: Path) -> None:
    file = tmp_path / "textfile" / "regd.prom"
    file.parent.mkdir()
    umask = os.umask(0o077)
    try:
        with exporting(settings(tmp_path, port=None, textfile=file)) as exporter:
            text = until(lambda: file.exists() and file.read_text())
            assert stat.S_IMODE(file.stat().st_mode) == 0o644
            assert exporter.address is None
            assert [path.name for path in file.parent.iterdir()] == ["regd.prom"]
    finally:
        os.umask(umask)
    assert numbers(text)["regd_sessions", ("waiting",)] == 1
    # node_exporter has these itself, and rejects all of it over a second one
    assert "process_" not in text
    assert not file.exists()


def test_the_file_is_written_again_and_again(tmp_path: Path, state: Path) -> None:
    file = tmp_path / "regd.prom"
    with exporting(settings(tmp_path, port=None, textfile=file, every_s=1)):
        first = until(lambda: file.exists() and file.stat().st_ino)
        until(lambda: file.stat().st_ino != first)


def test_a_folder_that_is_missing_is_said_with_what_to_do(
    tmp_path: Path, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "regd")
    file = tmp_path / "later" / "regd.prom"
    exporter = Exporter(settings(tmp_path, port=None, textfile=file), Counts(), clock=Clock())
    exporter.step()
    exporter.step()
    (failed,) = events(caplog, "metrics.failed")
    assert str(file.parent) in failed["hint"]
    file.parent.mkdir()
    exporter.step()
    assert file.exists()
    assert len(events(caplog, "metrics.mended")) == 1


@pytest.mark.parametrize("kind", ["link", "fifo", "file"])
def test_what_lies_in_the_way_is_not_written_to(tmp_path: Path, kind: str) -> None:
    victim, file = tmp_path / "victim", tmp_path / "regd.prom"
    victim.write_text("as before")
    way = tmp_path / "regd.prom.new"
    if kind == "link":
        way.symlink_to(victim)
    elif kind == "fifo":
        os.mkfifo(way)  # opened for writing, it waits for a reader
    else:
        way.hardlink_to(victim)
    write_whole(file, b"new")
    assert (file.read_bytes(), victim.read_text()) == (b"new", "as before")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["regd.prom", "victim"]


# --- the program ---------------------------------------------------------------------------------


def test_the_daemon_serves_them_and_ends_in_time(
    rig_with: type[Rig], lab: Any, tmp_path: Path
) -> None:
    file = tmp_path / "regd.prom"
    rig = rig_with(tmp_path, lab)
    config = tmp_path / "regd.yaml"
    alyx = {"url": lab.url, "username": lab.username, "password": lab.password}
    config.write_text(
        json.dumps(
            {
                "data_root": str(rig.root),
                "state_dir": str(tmp_path / "state"),
                "alyx": alyx,
                "metrics": {"port": 0, "textfile": str(file)},
            }
        )
    )
    config.chmod(0o600)
    with subprocess.Popen(
        [sys.executable, "-m", "regd", "run", "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as daemon:
        try:
            assert daemon.stdout
            lines = (json.loads(line) for line in daemon.stdout)
            started = next(line for line in lines if line["event"] == "metrics.started")
            address = (started["host"], started["port"])
            until(lambda: scrape(address) and file.exists())
            with socket.create_connection(address):  # a client that stays
                daemon.send_signal(signal.SIGTERM)
                told = [line["event"] for line in lines]
                daemon.wait(timeout=15)
        finally:
            daemon.kill()
    assert daemon.returncode == 0
    assert not file.exists()
    assert "regd.stopped" in told


# --- the settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("port", -1, "at least 0"),
        ("port", 65536, "at most 65535"),
        ("port", "yes", "whole number"),
        ("host", "", "address"),
        ("host", "http://127.0.0.1", "address"),
        ("textfile", "regd.prom", "ends in .prom"),
        ("textfile", "/var/lib/regd.txt", "ends in .prom"),
        ("every_s", 0, "at least 1"),
    ],
)
def test_wrong_settings_are_refused_by_name(key: str, value: object, expected: str) -> None:
    with pytest.raises(SettingsError, match=rf"metrics\.{key} .*{expected}"):
        Settings(metrics={key: value})


def test_the_file_may_not_lie_among_the_recordings(tmp_path: Path, state: Path) -> None:
    wanted = settings(tmp_path, textfile=tmp_path / "data" / "regd.prom")
    with pytest.raises(SettingsError, match=r"metrics\.textfile .* must be outside data_root"):
        check_for_daemon(wanted, dict.fromkeys(LEAVES, "here"))
