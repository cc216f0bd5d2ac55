import datetime
import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path, PurePosixPath
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from regd.logs import MASK, Recurring, bound_contextvars, configure, get_logger

TOKEN = "0f3a9c5e7b1d2f4a6c8e0b1d3f5a7c9e1b3d5f7a"
LOGGERS = ("httpx", "watchdog", "asyncio", "httpcore")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def logging_as_before():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)
    logging.captureWarnings(capture=False)


def fail(text):
    try:
        {}["key"]
    except KeyError as error:
        raise ValueError(text) from error


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def logged(log_it, level="debug", **options):
    stream = io.StringIO()
    configure(level, "json", stream, **options)
    log_it(get_logger())
    return lines(stream)


def test_every_json_line_has_event_level_and_utc_timestamp():
    (line,) = logged(lambda log: log.info("file.registered", size_bytes=3))
    assert (line["event"], line["level"], line["size_bytes"]) == ("file.registered", "info", 3)
    assert list(line)[:3] == ["timestamp", "level", "event"]
    at = datetime.datetime.fromisoformat(line["timestamp"])
    assert at.utcoffset() == datetime.timedelta(0)


def test_auto_is_readable_on_a_terminal_and_json_elsewhere(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    configure("info", "auto", stream)
    get_logger().info("session.created")
    assert lines(stream)[0]["event"] == "session.created"

    terminal = Terminal()
    configure("info", "auto", terminal)
    get_logger().info("session.created", eid="e", attempt=1)
    (line,) = terminal.getvalue().splitlines()
    stamp, rest = line.split(" ", 1)
    assert datetime.datetime.fromisoformat(stamp).tzinfo is not None
    assert rest.split() == ["[info", "]", "session.created", "eid=e", "attempt=1"]
    assert "\x1b" not in line


def test_colours_on_a_terminal_unless_unwanted(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    configure("info", "console", terminal)
    get_logger().info("session.created")
    assert "\x1b[" in terminal.getvalue()


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2)])
def test_levels(level, shown):
    def log_all(log):
        for name in ("debug", "info", "warning", "error"):
            getattr(log, name)("a.b")

    assert len(logged(log_all, level)) == shown


@pytest.mark.parametrize(("level", "format"), [("loud", "json"), ("info", "xml")])
def test_unknown_level_or_format(level, format):
    with pytest.raises(ValueError, match="no such log level or format"):
        configure(level, format, io.StringIO())


def test_other_libraries_and_warnings_go_the_same_way():
    stream = io.StringIO()
    configure("info", "json", stream)
    logging.getLogger("some.library").warning("%s is %d", "it", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old ways", stacklevel=1)
    theirs, warned = lines(stream)
    assert (theirs["event"], theirs["level"], theirs["logger"]) == (
        "it is 3",
        "warning",
        "some.library",
    )
    assert "old ways" in warned["event"]
    assert warned["logger"] == "py.warnings"


@pytest.mark.parametrize("name", ["httpx", "watchdog.observers.inotify_c", "asyncio"])
def test_chatter_is_shown_at_debug_only_but_warnings_always(name):
    for level, shown in (("info", ["warning"]), ("debug", ["info", "warning"])):
        stream = io.StringIO()
        configure(level, "json", stream)
        logging.getLogger(name).info("GET")
        logging.getLogger(name).warning("overflow")
        assert [line["level"] for line in lines(stream)] == shown


def test_configure_again_replaces_the_first():
    first, second = io.StringIO(), io.StringIO()
    configure("info", "json", first)
    configure("info", "json", second)
    get_logger().info("a.b")
    assert not first.getvalue()
    assert len(lines(second)) == 1


def test_context_reaches_our_lines_and_those_of_libraries():
    def log_it(log):
        with bound_contextvars(session="KS014/2024-05-01/001", attempt=2):
            log.info("session.created", eid="e")
            logging.getLogger("library").error("oops")
        log.info("daemon.stopped")

    ours, theirs, after = logged(log_it)
    assert (ours["session"], ours["attempt"], ours["eid"]) == ("KS014/2024-05-01/001", 2, "e")
    assert theirs["session"] == "KS014/2024-05-01/001"
    assert "session" not in after


def test_exception_is_structured_and_without_secrets_or_local_variables():
    def log_it(log):
        hidden_local = "local-" + TOKEN  # noqa: F841
        try:
            fail(f"Token {TOKEN} was refused")
        except ValueError:
            log.exception("session.failed")

    (line,) = logged(log_it)
    first, cause = line["exception"]
    assert first["exc_type"] == "ValueError"
    assert first["exc_value"] == f"Token {MASK} was refused"
    assert cause["exc_type"] == "KeyError"
    assert "local-" not in json.dumps(line)


def test_traceback_on_a_terminal_is_masked_too():
    terminal = Terminal()
    configure("info", "console", terminal, secrets=["correct horse"])
    try:
        fail("correct " + "horse\udcff")
    except ValueError:
        get_logger().exception("session.failed")
    text = terminal.getvalue()
    assert "Traceback" in text
    assert f"ValueError: {MASK}\\udcff" in text


@pytest.mark.parametrize(
    "about",
    [
        {"token": TOKEN},
        {"alyx_password": TOKEN},
        {"headers": {"Authorization": TOKEN}},
        {"headers": [{"authorization": [TOKEN]}]},
        {"note": f"Authorization: Token {TOKEN}"},
        {"note": f"sent 'Authorization': 'Token {TOKEN}'"},
        {"note": f"Token {TOKEN}"},
        {"note": f'{{"username": "u", "password": "{TOKEN}"}}'},
        {"note": f"https://user:{TOKEN}@alyx.example.org"},
        {"note": [f"token={TOKEN}&x=1"]},
        {"token": SecretStr(TOKEN)},
        *({key: TOKEN} for key in ("Cookie", "api_key", "APIKEY", "x_secret", "passwd")),
        {"body": f"Bearer {TOKEN}".encode()},
    ],
)
@pytest.mark.parametrize("format", ["json", "console"])
def test_secrets_are_masked(about, format):
    stream = io.StringIO()
    configure("info", format, stream)
    get_logger().info("request.failed", **about)
    assert TOKEN not in stream.getvalue()
    assert MASK in stream.getvalue()


def test_known_secrets_are_masked_anywhere():
    (line,) = logged(lambda log: log.info("x.y", text="it is hunter2!"), secrets=["hunter2", ""])
    assert line["text"] == f"it is {MASK}!"


suspects = st.sampled_from(
    [TOKEN, "token", " ToKen: ", "passwd=", "Bearer ", "https://a:b@c", "http://", '"', "\\", "é"]
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | suspects


@given(
    texts=st.lists(st.lists(suspects | st.text(max_size=3)).map("".join), max_size=3),
    about=st.dictionaries(st.sampled_from(["path", "token", "cookie", "ApiKey", "n"]), plain),
    secrets=st.lists(st.text(min_size=1) | suspects, max_size=2),
)
def test_a_line_is_as_clean_whether_or_not_it_looks_suspect(texts, about, secrets):
    about = {**{f"text_{n}": text for n, text in enumerate(texts)}, **about}
    # a list has each value of its line looked at
    one, other = logged(
        lambda log: [log.info("x.y", **about), log.info("x.y", **about, each=[])],
        secrets=secrets,
    )
    del other["each"], one["timestamp"], other["timestamp"]
    assert list(one.items()) == list(other.items())


@pytest.mark.parametrize("secret", ['hun"ter2', "hun\\ter2", "huntér2", "Hunter2", "hun\nter2"])
def test_a_known_secret_is_masked_however_json_writes_it(secret):
    (line,) = logged(lambda log: log.info("x.y", text=f"it is {secret}!"), secrets=[secret])
    assert line["text"] == f"it is {MASK}!"


def test_what_is_no_secret_stays():
    about = {"text": "the token was refused; basic facts", "token": None, "n": 1}
    (line,) = logged(lambda log: log.info("x.y", **about))
    assert {key: line[key] for key in about} == about


def test_values_that_json_does_not_know():
    eid = UUID(int=1)
    (line,) = logged(
        lambda log: log.info(
            "x.y", path=PurePosixPath("a/b"), eid=eid, seen={1}, ratio=float("nan"), pair=(1, None)
        )
    )
    assert line["path"] == "a/b"
    assert line["eid"] == str(eid)
    assert (line["seen"], line["ratio"], line["pair"]) == ([1], "nan", [1, None])


def test_a_value_that_holds_itself():
    loop = []
    loop.append(loop)
    (line,) = logged(lambda log: log.info("x.y", loop=loop))
    assert line["loop"]


def test_a_path_that_is_not_utf8_and_one_with_control_characters():
    odd = b"caf\xe9.npy".decode("utf-8", "surrogateescape")
    (line,) = logged(lambda log: log.warning("path.refused", path=odd))
    assert line["path"] == "caf\\udce9.npy"

    raw = io.BytesIO()
    configure("info", "console", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    get_logger().warning("path.refused", path=odd, other="a\x1b[2Jb", name="µ")
    assert raw.getvalue().count(b"\n") == 1
    assert b"caf\\udce9.npy" in raw.getvalue()
    assert b"\x1b" not in raw.getvalue()
    assert b"name=\\xb5" in raw.getvalue()


text = st.text(st.characters(codec=None))  # surrogates as well


@given(
    event=text,
    key=text,
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | text | st.binary(),
        lambda below: st.lists(below) | st.dictionaries(text, below),
        max_leaves=8,
    ),
)
def test_anything_makes_one_json_line(event, key, value):
    stream = io.StringIO()
    configure("info", "json", stream)
    get_logger().info(event, about={key: value})
    (line,) = stream.getvalue().splitlines()
    stream.getvalue().encode()
    assert json.loads(line)["level"] == "info"


def test_each_line_is_one_write_from_any_thread():
    class Writes(io.StringIO):
        def __init__(self):
            super().__init__()
            self.all = []

        def write(self, text):
            self.all.append(text)
            return len(text)

    stream = Writes()
    configure("info", "json", stream)
    log = get_logger()
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        for i in range(50):
            with bound_contextvars(session=number):
                log.info("file.registered", i=i, who=number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stream.all) == 400
    for written in stream.all:
        line = json.loads(written)
        assert written.endswith("}\n")
        assert line["session"] == line["who"]


def test_recurring_failure_is_rate_limited_and_its_end_logged_once():
    now = [1000.0]
    stream = io.StringIO()
    configure("info", "json", stream)
    alyx = Recurring(
        get_logger(), "alyx.went_away", "alyx.came_back", every_s=60, clock=lambda: now[0]
    )
    assert not alyx.recovered()
    assert alyx.failed(error="refused")
    now[0] += 59.9
    assert not alyx.failed(error="refused")
    now[0] += 0.1
    assert alyx.failed(error="refused", wait_s=5)
    assert alyx.recovered(url="u")
    assert not alyx.recovered()
    assert alyx.failed()
    shown = [
        {key: value for key, value in line.items() if key != "timestamp"} for line in lines(stream)
    ]
    away = {"event": "alyx.went_away", "level": "warning"}
    assert shown == [
        away | {"failures": 1, "error": "refused"},
        away | {"failures": 3, "error": "refused", "wait_s": 5},
        {"event": "alyx.came_back", "level": "info", "failures": 3, "failed_s": 60.0, "url": "u"},
        away | {"failures": 1},
    ]


# --- systemd's journal ---------------------------------------------------------------------------

LINE_MAX = 48 * 1024  # LineMax of journald.conf(5): what is longer, journald breaks


@pytest.fixture(params=["pipe", "socket"])
def to_journal(request, monkeypatch):
    """A stream that stands for the journal's, named as systemd names it, and a way to read it."""
    if request.param == "pipe":
        reader, writer = os.pipe()
    else:
        one, other = socket.socketpair()
        reader, writer = one.detach(), other.detach()
    status = os.fstat(writer)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    stream = os.fdopen(writer, "w", encoding="utf-8")

    read = []  # while it is written: what does not fit into the pipe would wait for ever
    with os.fdopen(reader, "rb") as file:
        thread = threading.Thread(target=lambda: read.extend(file.read().split(b"\n")[:-1]))
        thread.start()

        def lines():
            stream.close()
            thread.join()
            return [line.decode() for line in read]

        yield stream, lines
        stream.close()
        thread.join()


def log_every_level(stream, format):
    configure("debug", format, stream)
    log = get_logger()
    for level in ("debug", "info", "warning", "error"):
        getattr(log, level)(f"a.{level}")
    logging.getLogger("other").critical("lost")
    logging.getLogger("other").log(15, "in between")
    try:
        fail("so")
    except ValueError:
        log.exception("a.fault")


def test_lines_to_the_journal_begin_with_their_priority(to_journal):
    stream, read = to_journal
    log_every_level(stream, "json")
    found = [re.fullmatch(r"(?:<(\d)>)?(\{.*\})", line) for line in read()]
    assert [match[1] for match in found] == ["7", "6", "4", "3", "2", None, "3"]
    events = [json.loads(match[2])["event"] for match in found]
    assert events == ["a.debug", "a.info", "a.warning", "a.error", "lost", "in between", "a.fault"]


def test_each_line_of_a_traceback_has_its_priority(to_journal):
    stream, read = to_journal
    log_every_level(stream, "console")
    shown = read()
    start = next(n for n, line in enumerate(shown) if "a.fault" in line)
    assert len(shown) > start + 5
    assert all(line.startswith("<3>") for line in shown[start:])


@pytest.mark.parametrize("named", [None, "", "1:2", "nonsense"])
def test_no_other_stream_gets_priorities(to_journal, monkeypatch, named):
    """As where the daemon's output is redirected, or a program was started from a service."""
    stream, read = to_journal
    if named is None:
        monkeypatch.delenv("JOURNAL_STREAM")
    else:
        monkeypatch.setenv("JOURNAL_STREAM", named)
    log_every_level(stream, "json")
    assert all(line.startswith("{") for line in read())
    other = io.StringIO()
    log_every_level(other, "json")
    assert all(line.startswith("{") for line in other.getvalue().splitlines())


def test_a_command_that_fails_tells_the_journal_how_severe_that_is(tmp_path):
    with (tmp_path / "journal").open("w") as stream:
        status = os.fstat(stream.fileno())
        for named in (f"{status.st_dev}:{status.st_ino}", "1:2"):
            subprocess.run(
                [sys.executable, "-m", "regd", "run", "-c", "/no/such/file"],
                stderr=stream,
                env={**os.environ, "JOURNAL_STREAM": named},
            )
    there, elsewhere = Path(stream.name).read_text().splitlines()
    assert there.startswith("<3>regd: /no/such/file")
    assert elsewhere.startswith("regd: /no/such/file")


@pytest.mark.parametrize("character", ["x", '"', "\\", "\x1b", "é", "😀"])
@pytest.mark.parametrize("key", ["reason", "event", "another"])
def test_no_line_is_too_long_for_the_journal(to_journal, character, key):
    stream, read = to_journal
    long = character * 200_000
    about = {"session": "a/2020-01-01/001", "path": "x.npy", "attempt": 2}
    configure("info", "json", stream)
    if key == "event":
        get_logger().error(long, **about)
    else:
        get_logger().error("a.fault", **about, **{key: long})
    configure("info", "console", stream)
    get_logger().error("a.fault", **{key if key != "event" else "more": long})
    as_json, as_text = read()
    assert len(as_json.encode()) < LINE_MAX
    assert len(as_text.encode()) < LINE_MAX
    line = json.loads(as_json.removeprefix("<3>"))
    assert about.items() <= line.items()
    assert line["cut_bytes"] > 200_000
    assert line["event"].startswith("a.fault" if key != "event" else character)
    assert as_text.endswith("...")
