"""The status page as a browser meets it: real HTTP to a daemon that registers on the sandbox."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from regd import web
from regd.journal import FILE_NAME, FileRow, Journal
from regd.model import FileState, Signature
from regd.paths import parse_session
from regd.settings import Settings
from regd.status import report
from regd.web import Page, Reporter
from tests.rig import DATASETS, Lab, Rig, idle, until
from tests.test_cli import environment

PAGE = Path(web.__file__).parent / "page"
PATHS = ("/", "/page.css", "/page.js", "/report", "/events")


@pytest.fixture
def rig(tmp_path: Path, lab: Lab) -> Rig:
    rig = Rig(tmp_path, lab, web={"port": 0})
    rig.date = datetime.date.today().isoformat()
    return rig


@contextmanager
def open_page(settings: Settings, **arguments: Any) -> Iterator[Page]:
    with Page(settings, threading.Event(), **arguments) as page:
        until(lambda: page.url)
        yield page
    assert not page._thread.is_alive()


@pytest.fixture
def page(rig: Rig) -> Iterator[Page]:
    """The page of a rig that has a journal, and where no daemon runs."""
    rig.settings.state_dir.mkdir(mode=0o700)
    with write_journal(rig) as journal:
        journal.bind_root(rig.root)
    with open_page(rig.settings) as page:
        yield page


def write_journal(rig: Rig) -> Journal:
    return Journal(rig.settings.state_dir / FILE_NAME, now=lambda: 1e9)


def note(rig: Rig, number: int, *states: FileState) -> None:
    """Have the journal know a session of today, as another process writes it."""
    with write_journal(rig) as journal:
        journal.note(parse_session(("mouse", rig.date, f"{number:03d}")), due_at=0)
        row = journal.session(f"mouse/{rig.date}/{number:03d}")
        assert row is not None
        files = [FileRow(f"alf/{n}", s, Signature(1, 1)) for n, s in enumerate(states)]
        journal.write_files(row.id, files)


class Reader:
    """An open page, without a browser."""

    def __init__(self, url: str, **headers: str) -> None:
        self._open = ExitStack()
        client = self._open.enter_context(httpx.Client(base_url=url, timeout=20, headers=headers))
        response = self._open.enter_context(client.stream("GET", "/events"))
        self.status, self.headers = response.status_code, response.headers
        self.lines = response.iter_lines()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def event(self) -> dict[str, str]:
        """Return the next event by its fields; nothing, if there is no more."""
        fields: dict[str, str] = {}
        for line in self.lines:
            if not line:
                return fields
            name, _, value = line.partition(": ")
            fields[name] = value
        return fields

    def report(self) -> dict[str, Any]:
        """Return the next report."""
        while (event := self.event()).get("event") != "report":
            assert event, "the stream ended"
        return {**json.loads(event["data"]), "id": event["id"]}


def get(page: Page, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    return httpx.request(method, f"{page.url}{path}", headers=headers, timeout=20)


# --- what it tells -------------------------------------------------------------------------------


def test_an_open_page_is_told_of_a_session_until_it_is_registered(rig: Rig) -> None:
    with rig.running(), open_page(rig.settings) as page, Reader(str(page.url)) as reader:
        assert reader.headers["content-type"].startswith("text/event-stream")
        assert reader.event() == {"retry": "2000"}
        before = reader.report()
        assert (before["today"], before["statement"]["title"]) == ([], "Nothing recorded yet")
        folder = rig.record()
        seen = [before]
        while seen[-1]["statement"]["title"] != "All registered":
            seen.append(reader.report())
        (session,) = seen[-1]["today"]
        assert session["session"] == folder.relative_to(rig.root).as_posix()
        assert session["words"] == "registered"
        assert session["files"] == {"registered": len(DATASETS)}
        ids = [told["id"] for told in seen]
        assert len(set(ids)) == len(ids)


def test_the_report_is_that_of_regd_status(rig: Rig) -> None:
    rig.record()
    (rig.record(2) / "alf" / "no.such.npy").write_bytes(b"x")
    with rig.running() as service, open_page(rig.settings) as page:
        until(lambda: idle(service) and service.journal.files_in(FileState.REFUSED))
        told = get(page, "/report").json()
        facts = json.loads(json.dumps(report(rig.settings, service.journal, ask_alyx=False)))
    for kind in ("today", "working", "waiting", "held", "parked"):
        for session in told[kind]:
            assert session.pop("words")
    facts["at"] = told["at"]
    assert {key: told[key] for key in facts} == facts
    assert len(facts["today"]) == 2
    assert told["statement"]["title"] == "1 thing needs you"
    assert rig.lab.password not in json.dumps(told)


def test_a_page_that_knows_it_all_is_told_so(page: Page, rig: Rig) -> None:
    with Reader(str(page.url)) as reader:
        known = reader.report()["id"]
        with Reader(str(page.url), **{"last-event-id": known}) as another:
            assert another.event() == {"retry": "2000"}
            assert another.event()["event"] == "beat"
            note(rig, 1)
            assert len(another.report()["today"]) == 1
        with Reader(str(page.url), **{"last-event-id": "of-another-regd"}) as another:
            assert len(another.report()["today"]) == 1


def test_it_says_that_it_is_there(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "BEAT_S", 0.05)
    with Reader(str(page.url)) as reader:
        reader.report()
        beats = [json.loads(reader.event()["data"]) for _ in range(3)]
        assert all(beat["checked_at"] <= beat["now"] for beat in beats)


# --- what it costs -------------------------------------------------------------------------------


def test_a_hundred_pages_share_one_report(
    page: Page, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr(web, "report", lambda *a, **k: made.append(a) or report(*a, **k))

    async def read(client: httpx.AsyncClient, ready: asyncio.Semaphore) -> None:
        async with client.stream("GET", f"{page.url}/events") as response:
            async for line in response.aiter_lines():
                if line.startswith("data: ") and "today" in line:
                    if json.loads(line.removeprefix("data: "))["today"]:
                        return
                    ready.release()

    async def all_of_them() -> None:
        ready = asyncio.Semaphore(0)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=30) as client:
            pages = [asyncio.create_task(read(client, ready)) for _ in range(100)]
            for _ in pages:
                await ready.acquire()
            await asyncio.to_thread(note, rig, 1)
            await asyncio.gather(*pages)

    asyncio.run(all_of_them())
    assert 2 <= len(made) <= 4, "one a look, not one a page"
    until(lambda: not page.news.readers)


def test_without_a_reader_nothing_is_done(
    page: Page, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[object] = []
    step = Reporter.step
    monkeypatch.setattr(Reporter, "step", lambda self: steps.append(self) or step(self))
    monkeypatch.setattr(web, "EVERY_S", 0.01)
    note(rig, 1)
    assert get(page, "/").status_code == 200
    assert not steps
    with Reader(str(page.url)) as reader:
        reader.report()
        assert steps
    until(lambda: not page.news.readers)
    done = len(steps) + 1  # one may be under way
    note(rig, 2)
    time.sleep(0.2)  # twenty times what is between two looks, if there were any
    assert len(steps) <= done
    assert len(get(page, "/report").json()["today"]) == 2


def test_only_what_changed_is_looked_at_again(rig: Rig) -> None:
    rig.settings.state_dir.mkdir(mode=0o700)
    write_journal(rig).close()
    now, clock = datetime.datetime.now().timestamp(), 0.0
    with closing(Reporter(rig.settings, now=lambda: now, clock=lambda: clock)) as reporter:
        assert reporter.step()
        first = reporter.latest
        assert not reporter.step()
        note(rig, 1, FileState.SETTLING)
        assert reporter.step()
        assert reporter.latest != first
        assert not reporter.step()
        rig.root.rmdir()  # of which the journal does not know
        assert not reporter.step()
        clock += 31
        assert reporter.step()
        now += 86400  # another day: nothing has been recorded yet
        assert reporter.step()
        assert reporter.latest is not None
        assert json.loads(reporter.latest.body)["today"] == []


def test_it_takes_so_many_pages_and_connections(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MOST_PAGES", 2)
    with Reader(str(page.url)) as one, Reader(str(page.url)) as two, Reader(str(page.url)) as more:
        assert (one.status, two.status, more.status) == (200, 200, 503)
        assert more.headers["retry-after"]
        assert get(page, "/events", "HEAD").status_code == 503
    until(lambda: not page.news.readers)
    with Reader(str(page.url)) as again:
        assert again.status == 200
    monkeypatch.setattr(web, "_MOST_CONNECTIONS", 0)
    with pytest.raises(httpx.TransportError):
        get(page, "/")


def test_a_connection_that_asks_for_nothing_is_closed(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_ASK_WITHIN_S", 0.05)
    with closing(connect(page)) as sock:
        assert sock.recv(1) == b""


def connect(page: Page) -> socket.socket:
    url = httpx.URL(str(page.url))
    return socket.create_connection((url.host, url.port), timeout=10)


# --- who may see it, and what they may do --------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_has_the_headers(page: Page, path: str) -> None:
    answer = get(page, path, "HEAD")
    assert (answer.status_code, answer.content) == (200, b"")
    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] in ("no-cache", "no-store")
    assert answer.headers["date"]
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert "server" not in answer.headers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_it_is_read_only(page: Page, path: str, method: str) -> None:
    answer = get(page, path, method)
    assert answer.status_code == 405
    assert "content-security-policy" in answer.headers


@pytest.mark.parametrize(
    "path", ["/x", "/index.html", "/report/", "//", "/page.css/", "/../web.py", "/%2e%2e/web.py"]
)
def test_there_is_nothing_else(page: Page, path: str) -> None:
    with closing(connect(page)) as sock:  # httpx would tidy the path up
        sock.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        assert b" 404 " in sock.recv(4096).split(b"\r\n")[0]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.:99", "127.0.0.1:1", "[::1]:1", "[::1]"])
def test_names_of_this_computer_are_answered_to(page: Page, host: str) -> None:
    assert get(page, "/report", Host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "10.0.0.1",
        "[::2]",
    ],
)
def test_other_names_are_not(page: Page, host: str) -> None:
    """A page of anybody's may have a name of its own lead here, and then read what it wants."""
    for path in PATHS:
        answer = get(page, path, Host=host)
        assert answer.status_code == 421
        assert "mouse" not in answer.text


def test_no_other_page_can_have_it_as_a_part(page: Page) -> None:
    elsewhere = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert get(page, "/report", **elsewhere).status_code == 403
    assert get(page, "/events", **elsewhere).status_code == 403
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert get(page, "/", **link).status_code == 200


def test_a_network_is_warned_of(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(**{**rig.settings.model_dump(), "web": {"port": 0, "host": "0.0.0.0"}})
    with open_page(settings) as page:
        (line,) = logged(caplog, "page.exposed")
        assert "names of sessions" in line["reason"]
        assert get(page, "/", Host=socket.gethostname()).status_code == 200
        assert get(page, "/", Host="evil.example").status_code == 421


def logged(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    lines = [r.msg for r in caplog.records if isinstance(r.msg, dict)]
    return [line for line in lines if line["event"] == event]


# --- when things go wrong ------------------------------------------------------------------------


def test_a_port_in_use_keeps_nobody_from_registering(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = rig.settings.model_copy(
            update={"web": rig.settings.web.model_copy(update={"port": port})}
        )
        with rig.running() as service, Page(settings, threading.Event(), again_s=0.02) as page:
            rig.record()
            until(lambda: len(service.journal.files_in(FileState.REGISTERED)) == len(DATASETS))
            until(lambda: idle(service))
            assert page.url is None
            (line,) = logged(caplog, "page.failed")
            assert f"port {port}" in line["reason"]
            assert "web.port" in line["hint"]
            other.close()
            until(lambda: page.url)
            assert get(page, "/report").json()["statement"]["title"] == "All registered"


def test_a_journal_that_cannot_be_read_is_told_once(
    rig: Rig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "EVERY_S", 0.02)
    with open_page(rig.settings) as page:
        assert [get(page, "/report").status_code for _ in range(3)] == [503] * 3
        assert len(logged(caplog, "page.failed")) == 1
        rig.settings.state_dir.mkdir(mode=0o700)
        write_journal(rig).close()
        assert until(lambda: get(page, "/report").status_code == 200)


def test_nonsense_is_answered_or_dropped(page: Page, caplog: pytest.LogCaptureFixture) -> None:
    for nonsense in (
        b"\x16\x03\x01\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"x" * 1_000_000,
    ):
        with closing(connect(page)) as sock:
            try:
                sock.sendall(nonsense)
                assert sock.recv(4096)[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.1 421 ")
            except ConnectionError:
                pass
    assert get(page, "/").status_code == 200
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_open_pages_do_not_keep_regd_from_stopping(rig: Rig, tmp_path: Path) -> None:
    values = {
        "data_root": str(rig.root),
        "state_dir": str(rig.settings.state_dir),
        "alyx": {"url": rig.lab.url, "username": rig.lab.username},
        "log": {"format": "json"},
        "web": {"port": 0},
    }
    (tmp_path / "regd.yaml").write_text(yaml.safe_dump(values))
    log = tmp_path / "log"
    command = [sys.executable, "-m", "regd", "run", "-c", str(tmp_path / "regd.yaml")]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env=environment(rig))
    try:
        url = until(lambda: re.search(r'"page.started".*"url": "([^"]+)"', log.read_text()))[1]
        with Reader(url) as one, Reader(url) as two, closing(socket.create_connection(
            ("127.0.0.1", httpx.URL(url).port)
        )):  # fmt: skip
            one.report()
            two.report()
            process.send_signal(signal.SIGTERM)
            while one.event():
                pass
            while two.event():
                pass
            assert process.wait(timeout=5) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


# --- what is on the page -------------------------------------------------------------------------


def test_nothing_of_the_page_is_from_elsewhere() -> None:
    texts = {file.name: file.read_text() for file in PAGE.iterdir() if file.is_file()}
    assert sorted(texts) == ["index.html", "page.css", "page.js"]
    for name, text in texts.items():
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.[\w/]+", text))
        assert found <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"url\(|@import|@font-face", text), name
    html = texts["index.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    assert "regd status" in re.search(r"<noscript>(.*?)</noscript>", html, re.S)[1]
    for markup in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert markup not in texts["page.js"]


def colours() -> dict[str, dict[str, str]]:
    css = (PAGE / "page.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.S)
    one, other = (dict(re.findall(r"--([\w-]+): (#\w{6});", part)) for part in (light, dark))
    assert one.keys() == other.keys()
    return {"light": one, "dark": other}


def contrast(one: str, other: str) -> float:
    """Return WCAG 2's contrast ratio of two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_computed_right() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    """WCAG 2 AA: 4.5 for text, 3 for lines; more for what is read from across the room."""
    colour = colours()[scheme]
    fills = [name.removesuffix("-fill") for name in colour if name.endswith("-fill")]
    assert len(fills) == 8
    for name in fills:
        least = 7.0 if name in ("good", "busy", "alarm", "lost", "waiting") else 4.5
        if name == "alarm":
            least = 6.0  # a red that is seen as red
        assert contrast(colour[f"{name}-ink"], colour[f"{name}-fill"]) >= least, name
    for name in ("paper", "card"):
        assert contrast(colour[f"{name}-soft"], colour[f"{name}-fill"]) >= 4.5, name
    for name in ("good", "busy", "waiting", "alarm"):
        assert contrast(colour[f"{name}-mark"], colour["card-fill"]) >= 4.5, name
    assert contrast(colour["line"], colour["card-fill"]) >= 3
    assert contrast(colour["busy-mark"], colour["paper-fill"]) >= 3, "the focus"


def test_no_colour_is_used_but_those() -> None:
    css = (PAGE / "page.css").read_text()
    rest = re.sub(r":root \{.*?\}", "", css, flags=re.S)
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b(?![^{]*\{)", rest)
