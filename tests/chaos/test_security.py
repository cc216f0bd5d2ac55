"""What must hold when somebody means harm: on the disk, as Alyx, or beside regd on the computer.

Who may write below the data root may put any recording there, and what is there is registered: a
hard link, too, is a file like others. But nothing outside the root is reached through it.
"""

from __future__ import annotations

import contextlib
import datetime
import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regd import files
from regd.alyx import AlyxClient
from regd.errors import AlyxAway, RegdError, SettingsError
from regd.model import FileState, SessionState
from regd.settings import Settings
from tests.chaos import times
from tests.rig import DATASETS, Rig, md5, write
from tests.test_faults import client

FILE = DATASETS[0]
EVIL = "https://evil.example.org"


# --- nothing outside the data root ---------------------------------------------------------------


class Canary:
    """A tree outside the data root that looks like a session, and must never be touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (*DATASETS, "alf/canary.times.npy", "alf/#2001-01-01#/spikes.times.npy"):
            write(folder / name, f"canary {name}".encode())
        (folder / "create_me.flag").touch()
        self.hashes = {md5(p) for p in folder.rglob("*") if p.is_file() and p.stat().st_size}
        self.before = self.state()

    def state(self) -> dict[str, tuple[int, int, bytes]]:
        found = {}
        for path in sorted(self.folder.rglob("*")):
            status = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
            found[str(path)] = status.st_mtime_ns, status.st_ino, content
        return found

    def check(self, sent: str = "") -> None:
        assert self.state() == self.before
        assert "canary" not in sent
        assert not [h for h in self.hashes if h in sent]


@contextlib.contextmanager
def swapping(folder: Path, outside: Path, parked: Path) -> Iterator[Callable[[], int]]:
    """Put a link to `outside` in the place of a folder and take it away, again and again."""
    stop, count = threading.Event(), [0]

    def swap() -> None:
        while not stop.is_set():
            folder.rename(parked)
            folder.symlink_to(outside)
            count[0] += 1
            folder.unlink()
            parked.rename(folder)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield lambda: count[0]
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def writer(folder: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Yield a way to write into this very folder, whatever stands at its path meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def put(name: str, content: bytes = b"") -> None:
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        with os.fdopen(os.open(name, flags, dir_fd=descriptor), "wb") as file:
            file.write(content)

    try:
        yield put
    finally:
        os.close(descriptor)


LEVELS = ("", "alf", "alf/probe00")


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_reached_through_a_folder_that_becomes_a_link(
    tmp_path: Path, level: str
) -> None:
    root, session = tmp_path / "root", "KS005/2026-01-31/001"
    canary = Canary(tmp_path / "outside")
    for name in DATASETS:
        write(root / session / name, name.encode())
    write(root / session / "alf/#2020-01-01#/spikes.times.npy", b"older")
    seen: list[str] = []

    def work() -> None:
        put("create_me.flag", b"")
        seen.extend(f.path for f in files.walk(root, session))
        for name in (*DATASETS, "alf/canary.times.npy"):
            inner = f"{session}/{name}"
            signature = files.signature(root, inner)
            if signature is not None:
                seen.append(files.md5(root, inner, signature, lambda _: None))
        seen.extend(files.occupied_revisions(root, session, "alf/spikes.times.npy"))
        files.move(root, session, "alf/spikes.times.npy", "alf/#2026-01-31#/spikes.times.npy")
        files.move(root, session, "alf/#2026-01-31#/spikes.times.npy", "alf/spikes.times.npy")
        signature = files.signature(root, f"{session}/alf/spikes.times.npy")
        if signature is not None:
            revised = "alf/#2026-01-31#/spikes.times.npy"
            files.check_finished(root, f"{session}/alf/spikes.times.npy", signature)
            files.mend_move(root, session, "alf/spikes.times.npy", revised, signature)
        files.remove_flag(root, session, "create_me.flag")

    inside = root / session / level
    with (
        writer(root / session) as put,
        swapping(inside, canary.folder / level, tmp_path / "parked") as swaps,
    ):
        while swaps() < times(400):
            with contextlib.suppress(OSError, RegdError):
                work()
    canary.check(" ".join(seen))
    assert "2001-01-01" not in seen
    left = {p.read_bytes() for p in (root / session).rglob("*.npy")}
    assert left == {n.encode() for n in DATASETS if n.endswith(".npy")} | {b"older"}


@pytest.mark.parametrize("level", LEVELS)
def test_a_scan_registers_nothing_through_a_folder_that_becomes_a_link(
    rig: Rig, tmp_path: Path, level: str
) -> None:
    canary = Canary(tmp_path / "outside")
    folder = rig.record()
    sent: list[bytes] = []

    def listen(request: httpx.Request) -> None:
        sent.append(request.content)

    with (
        writer(folder) as put,
        swapping(folder / level, canary.folder / level, tmp_path / "parked") as swaps,
    ):
        for _ in range(times(3)):
            put("create_me.flag", b"")
            put("_ibl_experiment.description.yaml", os.urandom(8))
            with contextlib.suppress(OSError, RegdError):
                rig.scan(client=client(rig, listen)[1]).close()
        assert swaps() > 10
    canary.check(b" ".join(sent).decode())
    with rig.scan() as journal:
        assert journal.sessions()
        assert not [row for row in journal.sessions() if "regd failed" in (row.reason or "")]


def test_links_are_named_not_followed_and_a_hard_link_is_a_file_like_others(
    rig: Rig, tmp_path: Path
) -> None:
    canary = Canary(tmp_path / "outside")
    folder = rig.record(names=[FILE])
    (folder / "alf" / "probe00").symlink_to(canary.folder / "alf" / "probe00")
    (folder / "alf" / "spikes.times.npy").symlink_to(canary.folder / "alf" / "spikes.times.npy")
    (folder.parent / "002").symlink_to(canary.folder)
    (folder.parents[2] / "other").symlink_to(canary.folder)
    (rig.root / "outer").symlink_to(canary.folder)
    hard = tmp_path / "hard.npy"
    hard.write_bytes(b"one file, two names")
    (folder / "alf" / "_ibl_wheel.timestamps.npy").hardlink_to(hard)
    with rig.scan() as journal:
        strays = {path: (reason, hint) for path, reason, hint in journal.strays()}
        refused = {row.path: row.hint for _, row in journal.files_in(FileState.REFUSED)}
    held = rig.held()
    assert set(held) == {FILE, "alf/_ibl_wheel.timestamps.npy"}
    assert set(refused) == {"alf/probe00", "alf/spikes.times.npy"}
    assert all(refused.values())
    assert {path.rpartition("/")[2] for path in strays} == {"002", "other", "outer"}
    rig.lab.protect(rig.eid(), "alf/_ibl_wheel.timestamps.npy")
    hard.write_bytes(b"changed by its other name")
    rig.scan().close()
    assert hard.read_bytes() == b"changed by its other name"
    canary.check()


def test_a_root_that_is_a_link_is_taken_as_what_it_is_at_the_start(
    rig: Rig, tmp_path: Path
) -> None:
    rig.record()
    (tmp_path / "link").symlink_to(rig.root)
    linked = rig.settings.model_copy(update={"data_root": tmp_path / "link"})
    rig.settings = linked
    with rig.scan() as journal:
        assert journal.fact("data_root") == str(rig.root)
    assert len(rig.held()) == len(DATASETS)


# --- an Alyx that means harm ---------------------------------------------------------------------

REVISIONS = (
    "../../x",
    "2001-01-01/../../../../x",
    "2001-01-01/b",
    "2001-01-01\0",
    "2001-01-01 \x1b[31m",
    "2001-01-01\ud800",
    "2001-01-01" + "z" * 10_000,
    "2001-01-01#",
    "\N{ARABIC-INDIC DIGIT TWO}001-01-01/..",
    "..",
    "/etc",
    "2999-12-31~",
)


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("name", REVISIONS, ids=lambda name: ascii(name)[:30])
def test_a_revision_named_by_alyx_moves_nothing_out_of_its_folder(
    rig: Rig, name: str, protected: bool
) -> None:
    folder = rig.record(names=[FILE, DATASETS[1]])
    told: list[str] = []

    def lie(request: httpx.Request) -> httpx.Response | None:
        if request.url.path != "/register-file":
            return None
        body = json.loads(request.content)
        if FILE not in body["filenames"]:
            told.extend(body["filenames"])
            return None
        history = [{name: protected}, {"": True}]
        details = [{f: history if f == FILE else []} for f in body["filenames"]]
        answer = {
            "status_code": 403,
            "error": "One or more datasets is protected",
            "details": details,
        }
        return httpx.Response(403, content=json.dumps(answer))

    with rig.scan(client=client(rig, lie)[1]) as journal:
        (session,) = journal.sessions()
        refused = [row for _, row in journal.files_in(FileState.REFUSED)]
    assert "regd failed" not in (session.reason or "")
    (file,) = folder.rglob("_ibl_wheel.position.npy")
    inner = file.relative_to(folder).as_posix()
    if refused:
        assert inner == FILE
        assert refused[0].hint
        assert refused[0].reason
        assert refused[0].reason.isprintable()
        assert len(refused[0].reason) < 1000
    else:  # today's revision
        assert inner.startswith(f"alf/#{datetime.date.today().year}")
        assert inner in told
    assert DATASETS[1] in rig.held()
    outside = [p for p in rig.root.rglob("*") if not p.is_relative_to(folder)]
    assert all(p.is_dir() and folder.is_relative_to(p) for p in outside)


@pytest.mark.parametrize("details", [[], [{}], [{"else.npy": [{"": True}]}], [{FILE: []}]])
def test_a_refusal_that_names_no_file_is_no_endless_loop(rig: Rig, details: object) -> None:
    rig.record(names=[FILE])

    def refuse(request: httpx.Request) -> httpx.Response | None:
        if request.url.path != "/register-file":
            return None
        answer = {"error": "One or more datasets is protected", "details": details}
        return httpx.Response(403, json=answer)

    between, liar = client(rig, refuse)
    with rig.scan(client=liar) as journal:
        (session,) = journal.sessions()
    assert between.asked.count(("POST", "/register-file")) <= 3
    assert session.state in (SessionState.WAITING, SessionState.PARKED)


class Alyx(httpx.BaseTransport):
    """Answers everything with what `answer` returns, and keeps what was asked."""

    def __init__(self, answer: Callable[[httpx.Request], httpx.Response]) -> None:
        self._answer = answer
        self.asked: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.asked.append(request)
        return self._answer(request)


def alone(
    answer: Callable[[httpx.Request], httpx.Response], **login: str
) -> tuple[Alyx, AlyxClient]:
    alyx = Alyx(answer)
    login = login or {"token": "5ec4e7"}
    return alyx, AlyxClient(
        "https://alyx.test",
        **login,
        requests_per_minute=None,
        transport=alyx,
        sleep=lambda _: None,
    )


@pytest.mark.parametrize("status", [200, 301, 302, 303, 307, 308])
@pytest.mark.parametrize("login", [{"token": "5ec4e7"}, {"username": "u", "password": "5ec4e7"}])
def test_neither_token_nor_password_goes_to_another_host(
    status: int, login: dict[str, str]
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if status == 200 and request.url.path == "/auth-token":
            return httpx.Response(200, json={"token": "5ec4e7"})
        if status == 200 and b"offset" not in request.url.query:
            return httpx.Response(200, json={"next": f"{EVIL}/x?offset=1", "results": [{}]})
        if status == 200:
            return httpx.Response(200, json={"next": None, "results": []})
        return httpx.Response(status, headers={"Location": f"{EVIL}{request.url.path}"})

    alyx, client = alone(answer, **login)
    with contextlib.suppress(RegdError):
        assert list(client.pages("/x")) == [{}]
    with contextlib.suppress(RegdError):
        client.post("/x", {})
    assert len(alyx.asked) >= 2
    assert {request.url.host for request in alyx.asked} == {"alyx.test"}


@pytest.mark.parametrize(
    "token",
    ["a\nX-Evil: 1", "", " ", "\0", "\u00e9", "\ud800", "a" * 10_000, None, 7, ["a"], {"a": 1}],
    ids=lambda token: ascii(token)[:20],
)
def test_a_token_that_is_none_is_not_sent(token: object) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=json.dumps({"token": token}))

    alyx, client = alone(answer, username="u", password="p")
    with pytest.raises(AlyxAway, match="without a token"):
        client.get("/x")
    assert {request.url.path for request in alyx.asked} == {"/auth-token"}


@pytest.mark.parametrize("packed", [True, False])
def test_an_enormous_answer_is_given_up(packed: bool) -> None:
    megabyte = b" " * 2**20
    sent = [0]

    def plain() -> Iterator[bytes]:
        while True:
            sent[0] += 1
            assert sent[0] < 200
            yield megabyte

    bomb = gzip.compress(b"[" + megabyte * 100 + b"]")
    answers = [
        httpx.Response(200, content=bomb, headers={"Content-Encoding": "gzip"})
        if packed
        else httpx.Response(200, content=plain())
    ]
    _, client = alone(lambda _: answers.pop())
    with pytest.raises(AlyxAway, match="more than") as caught:
        client.post("/x", {})
    assert caught.value.unknown_outcome


def test_pages_have_an_end() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        n = int(request.url.params.get("offset", 0)) + 1
        return httpx.Response(200, json={"next": f"https://alyx.test/?offset={n}", "results": [{}]})

    _, client = alone(answer)
    with pytest.raises(AlyxAway, match="without end"):
        list(client.pages("/x"))


# --- secrets -------------------------------------------------------------------------------------

MODES = st.integers(0, 0o777)


@given(MODES, st.sampled_from(["password", "token"]), st.sampled_from(["yaml", "file", "prefixed"]))
@settings(max_examples=times(60), deadline=None)
def test_a_secret_that_others_have_a_right_to_is_refused(
    tmp_path_factory: pytest.TempPathFactory, mode: int, leaf: str, kind: str
) -> None:
    folder = tmp_path_factory.mktemp("secret")
    path = (
        folder
        / {"yaml": "regd.yaml", "file": f"alyx__{leaf}", "prefixed": f"REGD_alyx__{leaf}"}[kind]
    )
    path.write_text(f"alyx: {{{leaf}: 5ec4e7}}\n" if kind == "yaml" else "5ec4e7")
    path.chmod(mode | 0o400)
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("REGD_")]:
            patch.delenv(name)
        if kind != "yaml":
            patch.setenv("CREDENTIALS_DIRECTORY", str(folder))
        config = path if kind == "yaml" else None
        if not mode & 0o007:
            found = getattr(Settings(_config=config).alyx, leaf)
            assert found.get_secret_value() == "5ec4e7"
            return
        with pytest.raises(SettingsError) as caught:
            Settings(_config=config, workers=0)
        (line,) = caught.value.mistakes
        assert line.startswith(f"{path}: holds alyx.{leaf}")
        assert line.endswith(f"; chmod o= {path}")
        assert "5ec4e7" not in line
        subprocess.run(line.rpartition("; ")[2], shell=True, check=True)
        assert getattr(Settings(_config=config).alyx, leaf)


def test_a_file_without_secrets_may_be_open_to_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "regd.yaml"
    path.write_text("workers: 3\nalyx: {url: 'https://a', password: null}\n")
    path.chmod(0o666)
    (tmp_path / "alyx__username").write_text("u")
    (tmp_path / "alyx__username").chmod(0o666)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert Settings(_config=path).workers == 3


def test_a_secret_is_told_nowhere(rig: Rig, tmp_path: Path) -> None:
    rig.record()
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "alyx__password").write_text(rig.lab.password)
    (secrets / "alyx__password").chmod(0o600)
    config = tmp_path / "regd.yaml"
    config.write_text(
        f"data_root: {rig.root}\nstate_dir: {rig.settings.state_dir}\n"
        f"alyx: {{url: '{rig.lab.url}', username: {rig.lab.username}}}\n"
        "settle: {quiet_s: 0.1, closed_quiet_s: 0.1}\nlog: {level: debug}\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("REGD_")}
    environment = {**kept, "CREDENTIALS_DIRECTORY": str(secrets)}
    told = []
    for command in (["scan"], ["config"], ["status"], ["status", "--json"]):
        process = subprocess.Popen(
            [sys.executable, "-m", "regd", *command, "--config", str(config)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        told.append(Path(f"/proc/{process.pid}/cmdline").read_bytes())
        told.append(process.communicate(timeout=60)[0])
    assert b"file.registered" in told[1]
    told += [path.read_bytes() for path in rig.settings.state_dir.iterdir() if path.is_file()]
    rig.lab.client.get("/data-formats", {"limit": 1})
    token = rig.lab.client._login.token
    assert token
    loaded = Settings(**{"alyx": {"password": rig.lab.password, "token": token}})
    told += [repr(loaded).encode(), str(loaded.model_dump()).encode()]
    told += [repr(rig.lab.client).encode()]
    for text in told:
        assert rig.lab.password.encode() not in text
        assert token.encode() not in text


def test_what_is_installed_fits_together() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
