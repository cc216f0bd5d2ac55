"""What must hold whatever lies below the data root, whatever Alyx says, whatever the settings hold.

Names are bytes here, as the disk has them; what a check speaks of is text, as regd has it.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import gzip
import io
import json
import logging
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from regd import logs
from regd.alyx import AlyxClient
from regd.cli import app
from regd.errors import RegdError, SettingsError, printable
from regd.journal import Journal
from regd.model import FileState, SessionState
from regd.paths import Ignored, find_session, is_utf8
from regd.registration import RegistrationClient
from regd.sandbox.server import Server
from regd.settings import Settings, load
from tests.chaos import times
from tests.conftest import INITIAL
from tests.rig import Lab, Rig, md5, write

SUBJECT = b"mainenlab/Subjects/ZM_1085"
SOON = settings(deadline=None, suppress_health_check=list(HealthCheck))
days = count()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Server(load=INITIAL, rate_limit=None) as server:
        lab = Lab(server.url, "rig_user", "rig-password", "ZM_1085", "mainenlab", "mainenlab_local")
        with lab.client:
            yield lab


class Place:
    """A rig for one example, on a date of its own, with all that regd says of it."""

    def __init__(self, lab: Lab, **more: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="regd-input-"))
        settle = {"quiet_s": 0, "closed_quiet_s": 0}
        self.rig = Rig(self.folder, lab, **{"settle": settle, "log": {"format": "json"}, **more})
        self.date = str(datetime.date(1990, 1, 1) + datetime.timedelta(days=next(days)))
        self.lines = io.StringIO()

    def __enter__(self) -> Place:
        logs.configure("debug", "json", self.lines)
        return self

    def __exit__(self, *_: object) -> None:
        root = logging.getLogger()
        for handler in list(root.handlers):
            if isinstance(handler, logs._Lines):
                root.removeHandler(handler)
        root.setLevel(logging.WARNING)
        logging.captureWarnings(capture=False)
        # shutil.rmtree stops at trees of thousands of levels
        subprocess.run(["rm", "-rf", self.folder], check=True)

    def put(self, path: bytes, content: bytes = b"", mtime_ns: int | None = None) -> None:
        """Write a file, if the disk takes the name."""
        full = os.fsencode(self.rig.root) + b"/" + path.replace(b"{date}", self.date.encode())
        try:
            path_ = Path(os.fsdecode(full))
            path_.parent.mkdir(parents=True, exist_ok=True)
            with path_.open("xb") as file:
                file.write(content)
            if mtime_ns is not None:
                os.utime(full, ns=(mtime_ns, mtime_ns))
        except (OSError, OverflowError):
            pass

    def events(self) -> list[dict[str, Any]]:
        text = self.lines.getvalue()
        assert text.isascii()
        lines = text.splitlines()
        assert all(line.isprintable() for line in lines)
        return [json.loads(line) for line in lines]

    def status(self) -> dict[str, Any]:
        """Return what `regd status --json` says, after looking at how both forms are shown."""
        config = self.folder / "regd.yaml"
        lab = self.rig.lab
        config.write_text(
            yaml.safe_dump(
                {
                    "data_root": str(self.rig.root),
                    "state_dir": str(self.rig.settings.state_dir),
                    "alyx": {"url": lab.url},
                }
            )
        )
        shown, machine = (
            CliRunner().invoke(app, ["status", *more, "--config", str(config)])
            for more in ([], ["--json"])
        )
        assert shown.exit_code == machine.exit_code == 0, (shown.output, machine.output)
        assert not [line for line in shown.stdout.split("\n") if not line.isprintable()]
        assert machine.stdout.isascii()
        return dict(json.loads(machine.stdout))


# --- what is checked -----------------------------------------------------------------------------


def files_below(root: Path) -> Iterator[str]:
    """Yield the path of whatever is no folder, as regd spells it."""
    for folder, folders, names in os.walk(os.fsencode(root)):
        links = [n for n in folders if Path(os.fsdecode(folder), os.fsdecode(n)).is_symlink()]
        for name in names + links:
            yield os.fsdecode(os.path.relpath(folder + b"/" + name, os.fsencode(root)))


def check(place: Place, journal: Journal) -> None:
    """See that what Alyx has is what is there, and that of all else it is said what to do."""
    rig, lab = place.rig, place.rig.lab
    root = rig.root
    events = place.events()
    assert not {"session.failed", "worker.died"} & {event["event"] for event in events}, events
    rows = journal.sessions()
    registered = set()
    for row in rows:
        if row.eid is None:
            continue
        session = row.path
        for inner, record in lab.datasets(row.eid).items():
            file = root / row.folder / inner
            assert file.is_file()
            assert not file.is_symlink()
            assert (record["hash"], record["file_size"]) == (md5(file), file.stat().st_size)
            for held in record["file_records"]:
                assert held["relative_path"] == f"{session.alyx_path}/{inner}"
            registered.add(f"{row.folder}/{inner}")
    states = {row.folder: row for row in rows}
    told: dict[str, tuple[str | None, str | None]] = {}
    for row in rows:
        for path, file_row in journal.files(row.id).items():
            full = f"{row.folder}/{path}"
            if file_row.state is FileState.REGISTERED:
                assert full in registered
            elif row.state in (SessionState.PARKED, SessionState.HELD, SessionState.WAITING):
                told[full] = row.reason, row.hint
            if file_row.state is FileState.REFUSED:
                told[full] = file_row.reason, file_row.hint
    strays = {path: (reason, hint) for path, reason, hint in journal.strays()}
    ignored = Ignored(rig.settings.watch.ignore)
    backlog = (journal.fact("backlog") or {})["sessions"]
    for path in files_below(root):
        parts = path.split("/")
        above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if path in registered or any(map(ignored, above)):
            continue
        said = [
            *(told[spelt] for spelt in spellings(above) if spelt in told),
            *(strays[printable(folder)] for folder in above if printable(folder) in strays),
            *(
                (states[folder].reason, states[folder].hint)
                for folder in above
                if folder in states and states[folder].state in ("parked", "held")
            ),
        ]
        if not said and backlog and not any(folder in states for folder in above):
            continue
        assert said, f"{path!r} is passed over in silence"
        for reason, hint in said:
            assert reason, (path, reason, hint)
            assert hint, (path, reason, hint)
            assert (reason + hint).isprintable()
    place.status()


def spellings(above: list[str]) -> Iterator[str]:
    for path in above:
        yield path
        parts = path.split("/")
        for depth in (3, 5):  # a session's folder is as it is, what is in it may be escaped
            inner = "/".join(parts[depth:])
            if inner and not is_utf8(inner):
                yield "/".join([*parts[:depth], printable(inner)])


# --- generated trees -----------------------------------------------------------------------------

ODD = [
    b"...", b"..x", b"x..", b" ", b"a b", b" a", b"a ", b"a.", b"-rf", b"--help", b"#", b"##",
    b"#a", b"#a#b#", b"%2e%2e", b"\\", b"..\\..\\x", b"C:\\x", b"a\nb", b"a\tb", b"\x1b[31mred",
    b"\x07", b"a\rb", b"\x7f", b"'", b'"', b"`id`", b"$(id)", b";", b"&", b"|", b"*", b"?", b"[",
    "é".encode(), "e\u0301".encode(), "\u202egnp.exe".encode(), "\u200b".encode(),
    "\ufeff".encode(), "\U0001f42d.npy".encode(), b"\xff", b"\xc3(.npy", b"\xed\xa0\x80.npy",
    b"<b>", b"x" * 255,
    "é".encode() * 127, b"CON", b"NUL.npy", b"a:dog:b.npy", b"[red]x[/red].npy", b"\\xff",
    b"null", b"None", b"nan", b"~", b"Subjects", b"2026-01-01", b"001", b"alf", b"ALF", b"Alf",
]  # fmt: skip
DATA = [
    b"spikes.times.npy", b"spikes.times", b"spikes", b"SPIKES.TIMES.NPY", b"spikes.times.NPY",
    b"spikes..times.npy", b"spikes.times (1).npy", b"spikes.times.npy ", b".npy", b"a.npy",
    b"_ibl_wheel.position.npy", b"_ibl_wheel.position.extra.more.npy", b"_ibl_wheel.position.x",
    b"_ibl_trials.goCue_times_bpod.npy", b"_iblrig_taskData.raw.jsonable", b"wheel.position.npy",
    b"_ibl_experiment.description.yaml", b"_iblrig_taskData.raw.jsonable.tmp", b"a.b.c.d.e.npy",
    b"spikes.times.npy.gz", b"create_me.flag", b"Create_Me.flag", b"create_me.flag.txt",
]  # fmt: skip
FOLDERS = [
    b"alf", b"alf/probe00", b"raw_behavior_data", b"alf/#2020-01-01#", b"alf/#2020-01-01#/x",
    b"alf/##", b"alf/#", b"alf/#a", b"alf/#a#b#", b"#2020-01-01#", b"alf/# #", b"2026-01-01/001",
    b"alf/sp ace", b"alf/a.b", b"alf/-", b"al\xff",
]  # fmt: skip
HOMES = [
    *(SUBJECT + b"/{date}/" + n for n in (b"001", b"1", b"000", b"0", b"01", b"002", b"999")),
    SUBJECT + b"/{date}/1000",
    b"ZM_1085/{date}/003", b"zm_1085/{date}/001", b"KS-006.b/{date}/001", b"nobody/{date}/001",
    SUBJECT + b"/2026-02-30/001", SUBJECT + b"/2026-1-5/001", SUBJECT + b"/{date}",
    SUBJECT + b"/{date}/001/001", SUBJECT + b"/{date}/001/{date}/002",
    b"Subjects/ZM_1085/{date}/004",
    b"mainenlab/Subjects/Subjects/ZM_1085/{date}/005", b"mainenlab/subjects/ZM_1085/{date}/006",
    b"nolab/Subjects/ZM_1085/{date}/007", b"{date}/ZM_1085/001", SUBJECT + b"/{date}#/001",
    SUBJECT,     SUBJECT + b"/{date}/" + "\u0660\u0661".encode(), b"mainenlab", b"",
]  # fmt: skip
NAMES = st.one_of(
    st.sampled_from(ODD),
    st.sampled_from(DATA),
    st.binary(min_size=1, max_size=12),
    st.text(min_size=1, max_size=12, alphabet=st.characters(codec="utf-8")).map(str.encode),
    st.integers(240, 255).map(lambda n: b"spikes.times." + b"x" * (n - 17) + b".npy"),
).filter(lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b".."))
STAMPS = [None, 0, -1, -(10**18), 4_102_444_800 * 10**9, 2**63 - 1, 2**63, -(2**63) - 1, 10**21]
FILES = st.tuples(
    st.one_of(
        st.sampled_from(HOMES[:9]),  # most of them where data belongs
        st.sampled_from(HOMES),
        NAMES.map(lambda n: SUBJECT + b"/{date}/" + n),
        NAMES,
    ),
    st.one_of(st.just(b""), st.sampled_from(FOLDERS), st.lists(NAMES, max_size=4).map(b"/".join)),
    st.one_of(st.sampled_from(DATA), NAMES),
    st.integers(0, 3000),
    st.sampled_from(STAMPS),
)


@settings(SOON, max_examples=times(15))
@given(
    tree=st.lists(FILES, min_size=1, max_size=25),
    flagged=st.booleans(),
    everything=st.booleans(),
)
def test_any_tree(lab: Lab, tree: list[Any], flagged: bool, everything: bool) -> None:
    with Place(lab) as place:
        for n, (home, folder, name, size, stamp) in enumerate(tree):
            path = b"/".join(filter(None, (home, folder, name)))
            place.put(path, random.Random(n).randbytes(size), stamp)
        if flagged:
            place.put(SUBJECT + b"/{date}/001/create_me.flag")
        for _ in range(2):  # what was found once is the same the second time
            with place.rig.scan(everything=everything) as journal:
                check(place, journal)
        for row in journal_rows(place):
            if row.eid:
                lab.client._request("DELETE", f"/sessions/{row.eid}")


def journal_rows(place: Place) -> list[Any]:
    with place.rig.journal() as journal:
        return journal.sessions()


def test_a_path_longer_than_the_system_takes(lab: Lab) -> None:
    with Place(lab) as place:
        place.put(SUBJECT + b"/{date}/001/alf/spikes.times.npy", b"1")
        place.put(SUBJECT + b"/{date}/001/create_me.flag")
        session = place.rig.root / SUBJECT.decode() / place.date / "001"
        for name in (b"d", b"x" * 250):
            inner = os.open(session, os.O_RDONLY)
            for _ in range(2200 if name == b"d" else 30):
                os.mkdir(name, dir_fd=inner)
                deeper = os.open(name, os.O_RDONLY, dir_fd=inner)
                os.close(inner)
                inner = deeper
            os.close(os.open(b"spikes.times.npy", os.O_CREAT, dir_fd=inner))
            os.close(inner)
        with place.rig.scan() as journal:
            (row,) = journal.sessions()
            refused = {r.path[:1]: r.hint for _, r in journal.files_in(FileState.REFUSED)}
            assert set(lab.datasets(row.eid)) == {"alf/spikes.times.npy"}
        assert set(refused) == {"d", "x"}
        assert all(refused.values())
        place.status()


# --- mistakes that people make -------------------------------------------------------------------

S, D = SUBJECT.decode(), "{date}"
GOOD = "alf/spikes.times.npy"
# what lies there; what becomes of it; words of the reason and the hint
MISTAKES: list[tuple[str, str, str]] = [
    (f"{S}/2026-1-5/001/{GOOD}", "stray", "no session folder"),
    (f"{S}/20260105/001/{GOOD}", "stray", "no session folder"),
    (f"{S}/2026-02-30/001/{GOOD}", "stray", "no session folder"),
    (f"{S}/{D}/{GOOD}", "stray", "no session folder"),
    (f"{D}/ZM_1085/001/{GOOD}", "stray", "no session folder"),
    (f"{S}/{D}/001 (copy)/{GOOD}", "stray", "no session folder"),
    (f"{S}/{D}/Copy of 001/{GOOD}", "stray", "no session folder"),
    (f"{S}/{D}/001_old/{GOOD}", "stray", "no session folder"),
    (f"{S}/{D}/001 /{GOOD}", "stray", "no session folder"),
    (f"{S}/{D}/1000/{GOOD}", "stray", "no session folder"),
    (f"{S} /{D}/001/{GOOD}", "stray", "no session folder"),
    (f"{S}/{D}/001.zip", "stray", "in no session folder"),
    (f"{S}/{D}/create_me.flag", "stray", "in no session folder"),
    (f"{S}/notes.txt", "stray", "in no session folder"),
    (f"C:\\data\\{D}\\001", "stray", "in no session folder"),
    (f"mainenlab/subjects/ZM_1085/{D}/001/{GOOD}", "stray", "no session folder"),
    (f"mainenlab/Subjects/Subjects/ZM_1085/{D}/001/{GOOD}", "stray", "no session folder"),
    (f"{S}/{D}/01/{GOOD}", "registered", ""),
    (f"{S}/{D}/1/{GOOD}", "registered", ""),
    (f"{S}/{D}/000/{GOOD}", "registered", ""),
    (f"{S}/{D}/001/spikes.times.npy", "registered", ""),
    (f"{S}/{D}/001/Thumbs.db", "ignored", ""),
    (f"{S}/{D}/001/thumbs.DB", "ignored", ""),
    (f"{S}/{D}/001/.DS_Store", "ignored", ""),
    (f"{S}/{D}/001/desktop.ini", "ignored", ""),
    (f"{S}/{D}/001/_iblrig_taskData.raw.jsonable.tmp", "ignored", ""),
    (f"{S}/{D}/001/Create_Me.flag", "ignored", ""),
    (f"{S}/{D}/001/create_me.flag.txt", "refused", "No data format"),
    (f"{S}/{D}/001/alf/spikes.times (1).npy", "registered", ""),  # it fits Alyx's own pattern
    (f"{S}/{D}/001/alf/spike.tims.npy", "refused", "No dataset type"),
    (f"{S}/{D}/001/alf/spikes..times.npy", "refused", "No dataset type"),
    (f"{S}/{D}/001/alf/spikes.times.npy ", "refused", "No data format"),
    (f"{S}/{D}/001/alf/spikes.times.npy.", "refused", "has no extension"),
    (f"{S}/{D}/001/alf/spikes", "refused", "has no extension"),
    (f"{S}/{D}/001/alf/spikes.times", "refused", "No data format"),
    (f"{S}/{D}/001/alf/Copy of spikes.times.npy", "registered", ""),
    (f"{S}/{D}/001/sp ace/spikes.times.npy", "refused", "the folder is not as ALF allows"),
    (f"{S}/{D}/001/alf/##/spikes.times.npy", "refused", "the folder is not as ALF allows"),
    (f"{S}/{D}/001/alf/#a/spikes.times.npy", "refused", "the folder is not as ALF allows"),
    (f"{S}/{D}/001/alf/#a#b#/spikes.times.npy", "refused", "the folder is not as ALF allows"),
    (f"{S}/{D}/001/alf/#a#/x/spikes.times.npy", "refused", "the folder is not as ALF allows"),
    (f"{S}/{D}/001/alf\\spikes.times.npy", "refused", "Alyx does not take this name"),
    (f"{S}/{D}/001/alf/\x1b[31mspikes.times.npy", "refused", "Alyx does not take this name"),
    (f"{S}/{D}/001/alf/spikes.times.npy|empty", "refused", "is empty"),
    (f"{S}/{D}/001/alf/spikes.times.npy|link", "refused", "is a symbolic link"),
    (f"{S}/{D}/001|link", "stray", "is a symbolic link"),
    (f"mouse_of_nobody/{D}/001/{GOOD}", "parked", "does not exist"),
    (f"cortexlab/Subjects/ZM_1085/{D}/001/{GOOD}", "registered", ""),  # labs share subjects
    (f"no_lab/Subjects/ZM_1085/{D}/001/{GOOD}", "parked", "lab"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "state", "words"), MISTAKES, ids=[ascii(m[0]) for m in MISTAKES])
def test_a_mistake_is_told_with_what_to_do(lab: Lab, path: str, state: str, words: str) -> None:
    with Place(lab) as place:
        path, _, how = path.replace("{date}", place.date).partition("|")
        file = place.rig.root / path
        if how == "link":
            file.parent.mkdir(parents=True)
            file.symlink_to(place.folder)
        else:
            write(file, b"" if how else b"recorded")
        if state in ("registered", "refused", "parked"):
            found = find_session(file)
            assert found
            write(Path(found[0], "create_me.flag"), b"")
        with place.rig.scan() as journal:
            check(place, journal)
            said = [("stray", *stray) for stray in journal.strays()]
            for row in journal.sessions():
                if row.reason:
                    said.append((row.state, row.folder, row.reason, str(row.hint)))
                rows = journal.files(row.id).values()
                said += [(r.state, r.path, str(r.reason), str(r.hint)) for r in rows]
    if state == "ignored":
        assert said == []
    else:
        assert [s for s in said if s[0] == state and words in s[2]], said


# --- answers of Alyx that are not as they should be ----------------------------------------------

JUNK = [
    None, True, False, 0, -1, 1.5, 10**400, float("nan"), float("inf"), "", "x", "\ud800",
    "null", "../../x", "<html>", "9" * 100, [], [[]], {}, [None], {"": None}, {"id": 1},
    "a" * 10**5, "\x1b[2J",
]  # fmt: skip


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, (dict, list)):
        for key, below in inner:
            yield from places_in(below, (*path, key))


def mutated(value: Any, chance: random.Random) -> Any:
    """Return a JSON value with one thing in it that is wrong."""
    value = copy.deepcopy(value)
    path = chance.choice(list(places_in(value)) or [()])
    junk = chance.choice([*JUNK, deep(50)])
    if not path:
        return junk
    above = value
    for key in path[:-1]:
        above = above[key]
    how = chance.choice(["replace", "replace", "drop", "twice"])
    if how == "replace":
        above[path[-1]] = junk
    elif how == "drop":
        del above[path[-1]]
    elif isinstance(above, list):
        above.insert(path[-1], copy.deepcopy(above[path[-1]]))
    return value


def spoilt(answer: httpx.Response, chance: random.Random) -> httpx.Response:
    """Return an answer of Alyx with one thing wrong in it, in its JSON or around it."""
    body, status = answer.read(), answer.status_code
    kind = {"Content-Type": "application/json"}
    if chance.random() < 0.75 and body:
        text = json.dumps(mutated(json.loads(body), chance))
        return httpx.Response(status, content=text, headers=kind)
    return chance.choice(
        [
            httpx.Response(status, content=body[: chance.randrange(len(body) + 1)], headers=kind),
            httpx.Response(status, content=b"\xff\xfe" + body, headers=kind),
            httpx.Response(status, content=body.decode().encode("utf-16"), headers=kind),
            httpx.Response(
                status, content=body, headers={"Content-Type": "application/json; charset=\x01no"}
            ),
            httpx.Response(
                status, content=b"<h1>hello</h1>", headers={"Content-Type": "text/html"}
            ),
            httpx.Response(status, content=body.replace(b"{", b'{"results": 7, "id": 7, ', 1)),
            httpx.Response(status, content=b"[" * 100_000),
            httpx.Response(status, content=b"9" * 10_000),
            httpx.Response(
                status,
                content=gzip.compress(body + b" " * 10**7)[: chance.choice([20, 10**6])],
                headers={"Content-Encoding": "gzip"},
            ),
            httpx.Response(chance.choice([200, 201, 204, 206, 299, 304, 402, 418, 507, 599])),
        ]
    )


class Spoiling(httpx.BaseTransport):
    """Passes requests on to Alyx, and spoils some answers."""

    def __init__(self, seed: int, rate: float) -> None:
        self._network = httpx.HTTPTransport()
        self._chance = random.Random(seed)
        self._rate = rate
        self.asked = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        answer = self._network.handle_request(request)
        answer.read()
        whole = httpx.Response(
            answer.status_code, content=answer.content, headers={"Content-Type": "application/json"}
        )
        return spoilt(whole, self._chance) if self._chance.random() < self._rate else whole

    def close(self) -> None:
        self._network.close()


@settings(SOON, max_examples=times(5))
@given(seed=st.integers(0, 2**32), rate=st.sampled_from([0.1, 0.3, 1.0]))
def test_answers_with_something_wrong_make_no_wrong_state(lab: Lab, seed: int, rate: float) -> None:
    between = Spoiling(seed, rate)
    with Place(lab, workers=1) as place:
        session = SUBJECT + b"/{date}/001/"
        place.put(session + b"alf/spikes.times.npy", b"%d" % seed)
        place.put(session + b"alf/_ibl_wheel.position.npy", b"%d." % seed)
        place.put(session + b"create_me.flag")
        for _ in range(3):
            alyx = AlyxClient(
                lab.url,
                lab.username,
                lab.password,
                requests_per_minute=None,
                transport=between,
                sleep=lambda _: None,
            )
            with contextlib.suppress(RegdError):
                place.rig.scan(client=RegistrationClient(alyx)).close()
            with Journal(place.rig.journal().path, now=time.time) as journal:
                check_registered(place, journal)
                journal.retry(None)
        assert between.asked < 1000
        assert len(place.lines.getvalue()) < 10**6
        place.status()


def check_registered(place: Place, journal: Journal) -> None:
    """See that no file is taken for registered that is not."""
    assert not {"session.failed", "worker.died"} & {e["event"] for e in place.events()}
    held = [
        (session["subject"], record["collection"], record["name"], record["hash"])
        for session in place.rig.lab.client.pages(
            "/sessions", {"date_range": f"{place.date},{place.date}"}
        )
        for record in place.rig.lab.client.pages("/datasets", {"session": session["id"]})
    ]
    for row in journal.sessions():
        for path, r in journal.files(row.id).items():
            if r.state is FileState.REGISTERED:
                folder, _, name = path.rpartition("/")
                assert (row.path.subject, folder, name, r.md5) in held


# --- settings of any shape -----------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([10**400, float("nan"), float("inf"), -1e308, 1e308, "\x1b[31m", "9" * 5000]),
)  # fmt: skip
KEYS = st.one_of(
    st.sampled_from(
        [
            "alyx",
            "scan",
            "register",
            "settle",
            "watch",
            "retry",
            "log",
            "data_root",
            "state_dir",
            "flag",
            "workers",
            "url",
            "token",
            "password",
            "timeout_s",
            "every_s",
            "quiet_s",
            "ignore",
            "first_s",
            "longest_s",
            "attempts",
            "level",
            "users",
        ]
    ),
    SCALARS,
)
SHAPES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)


def dumped(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogateescape")
    except (ValueError, TypeError):
        return b"%d: [" % len(repr(type(value)))


@settings(SOON, max_examples=times(60))
@given(
    st.one_of(
        st.dictionaries(KEYS, SHAPES, max_size=4).map(dumped),
        SHAPES.map(dumped),
        st.binary(max_size=60),
        st.text(max_size=60).map(lambda t: t.encode("utf-16")),
        st.text("abx:&*<!|>-[]{},'\"\\#%@`\t\n \0\ufeff?~=", max_size=40).map(str.encode),
        st.sampled_from([b"\xef\xbb\xbfworkers: 2", b"\tworkers: 2", b"workers: 2\nworkers: 3"]),
    ),
    st.dictionaries(
        st.sampled_from(
            ["REGD_WORKERS", "REGD_ALYX", "REGD_SCAN__EVERY_S", "REGD_NO", "REGD_ALYX__"]
        ),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=10),
        max_size=2,
    ),
)
def test_settings_of_any_shape(text: bytes, environment: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder, "regd.yaml")
        for name in [n for n in os.environ if n.startswith("REGD_")]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        for secret in (False, True):
            if not secret:
                path.write_bytes(text)
            else:
                path.write_bytes(b"alyx: {token: 5ec4e7 5ec4e7}\n" + text)
            for line in mistakes(path):
                assert line.startswith((f"{path}", "environment"))
                assert line.isprintable()
                assert "5ec4e7" not in line
                assert len(line) < 1000
            assert mistakes(path) or not secret


def mistakes(path: Path) -> tuple[str, ...]:
    try:
        load(path)
    except SettingsError as error:
        return error.mistakes
    return ()


def test_settings_that_stand_for_billions_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "regd.yaml"
    for form in ("{{<<: [{}]}}", "[{}]", "{{k: [{}]}}"):
        lines = ["x0: &x0 {flag: a}"]
        nine = (",".join([f"*x{n - 1}"] * 9) for n in range(1, 30))
        lines += [f"x{n}: &x{n} " + form.format(each) for n, each in enumerate(nine, 1)]
        path.write_text("\n".join([*lines, "<<: *x29", "watch: {ignore: *x29}", "flag: *x29"]))
        with pytest.raises(SettingsError) as caught:
            Settings(_config=path)
        assert all(len(line) < 1000 for line in caught.value.mistakes)
