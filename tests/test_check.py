"""`regd check`: what is wrong is found, and said with what to do; nothing is changed."""

from __future__ import annotations

import http.server
import json
import os
import pwd
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from regd import check, host, mounts, screen
from regd.check import Check, Checkup, Finding, State, clock_offset_s
from regd.sandbox.server import Server
from tests.rig import Lab, Rig, idle, until, write

Findings = dict[str, Finding]
OK = Finding(State.OK, "fine")


# --- the run -------------------------------------------------------------------------------------


def test_a_check_that_crashes_or_hangs_keeps_no_other_from_its_answer() -> None:
    never = threading.Event()

    def crash() -> Finding:
        raise ZeroDivisionError("oh")

    def hang() -> Finding:
        never.wait()
        return OK

    checks = [
        Check("crashes", crash),
        Check("hangs", hang, within_s=0.01),
        Check("works", lambda: OK),
        Check("needs it", lambda: OK, ("works", "hangs")),
        Check("would hang, too", never.wait, beside=("hangs",)),  # type: ignore[arg-type]
        Check("needs that in turn", lambda: OK, ("needs it",)),
    ]
    found = dict(check.run(checks))
    never.set()
    assert [str(f.state) for f in found.values()] == ["wrong", "wrong", "ok", *["skipped"] * 3]
    assert "ZeroDivisionError" in found["crashes"].found
    assert "no answer within" in found["hangs"].found
    assert "hangs" in found["needs it"].found


def test_all_together_end_in_time() -> None:
    times = iter([0.0, 1.0, 70.0, 71.0])
    checks = [Check("one", lambda: OK), Check("two", lambda: OK), Check("three", lambda: OK)]
    found = dict(check.run(checks, all_within_s=60, clock=lambda: next(times)))
    assert [str(f.state) for f in found.values()] == ["ok", "skipped", "skipped"]


@pytest.mark.parametrize(
    ("states", "status", "code"),
    [
        ([State.OK, State.OK], "ok", 0),
        ([State.OK, State.WARNING], "warning", 1),
        ([State.OK, State.SKIPPED], "warning", 1),  # what nobody looked at is not known to be well
        ([State.WARNING, State.WRONG, State.SKIPPED], "wrong", 2),
    ],
)
def test_the_exit_status_is_that_of_monitoring_plugins(
    states: list[State], status: str, code: int
) -> None:
    facts = check.report_of([(str(n), Finding(s, "x")) for n, s in enumerate(states)], "me")
    assert (facts["status"], facts["exit"]) == (status, code)
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("sent", "received", "date", "off"),
    [
        (100.2, 100.4, 100, 0),
        (100.9, 101.1, 100, 0),  # the second is cut off
        (100.2, 103.0, 103, 0),  # it was asked for long
        (99.9, 100.1, 100, 0),
        (90.0, 90.5, 100, -9.5),
        (110.0, 110.5, 100, 9.0),
        (100.0, 130.0, 100, 0),
    ],
)
def test_a_clock_is_off_by_what_the_request_and_the_second_do_not_explain(
    sent: float, received: float, date: float, off: float
) -> None:
    assert clock_offset_s(sent, received, date) == pytest.approx(off)


# --- how it looks --------------------------------------------------------------------------------

FACTS = check.report_of(
    [
        ("data folder", Finding(State.OK, "/data is there")),
        (
            "token",
            Finding(State.WRONG, "Alyx does not take it " * 6, "sudo systemctl edit regd " * 6),
        ),
        ("clock", Finding(State.WARNING, "it is off", "timedatectl")),
        ("user", Finding(State.SKIPPED, "cannot be told")),
    ],
    "regd",
)


def shown(**how: Any) -> str:
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(screen.checked(FACTS, **how), crop=False)
    return captured.get()


def test_it_fits_the_terminal_and_can_be_read_without_colour() -> None:
    text = shown(width=80)
    assert max(map(len, text.splitlines())) <= 80
    for mark in screen.MARKS.values():
        assert f"\n{mark} " in text
    assert text.rstrip().endswith("1 wrong, 1 warning, 1 not looked at")


def test_it_is_shown_on_a_terminal_for_ascii_alone() -> None:
    assert shown(width=80, plain=True).isascii()


def test_for_programs_each_check_and_each_remedy_is_one_line() -> None:
    assert len(shown().splitlines()) == 1 + 4 + 2 + 1


# --- a rig ---------------------------------------------------------------------------------------


@pytest.fixture
def look(rig: Rig, tmp_path: Path) -> Callable[..., Findings]:
    """A way to check the rig, with other settings, and another service than none."""
    rig.lab.client.get("/labs")  # Alyx is up

    def look(
        unit: host.Unit | None = None, now: Callable[[], float] | None = None, **changed: Any
    ) -> Findings:
        alyx = {"url": rig.lab.url, "username": rig.lab.username, "password": rig.lab.password}
        values = {
            "data_root": str(rig.root),
            "state_dir": str(rig.settings.state_dir),
            "repository": rig.lab.repository,
            "alyx": {**alyx, **changed.pop("alyx", {})},
            **changed,
        }
        config = tmp_path / "regd.yaml"
        config.touch(mode=0o600)
        config.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        checkup = Checkup(config, unit, **({"now": now} if now else {}))
        try:
            return dict(check.run(checkup.checks()))
        finally:
            checkup.close()

    return look


def bad(found: Findings) -> dict[str, str]:
    return {name: str(f.state) for name, f in found.items() if f.state is not State.OK}


def everything_below(folder: Path) -> dict[str, tuple[float, int]]:
    found = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_mtime, status.st_ctime_ns)
    return found


def test_all_is_well_and_nothing_is_changed(
    rig: Rig, sandbox: Server, look: Callable[..., Findings], tmp_path: Path
) -> None:
    rig.record()
    sandbox.store.db.execute("DELETE FROM datasettype WHERE name LIKE 'ambiguous%'")
    sandbox.store.db.execute("DELETE FROM datasettype WHERE name LIKE 'widefield.raw%'")
    with rig.running() as service:
        until(lambda: not (rig.folder() / "create_me.flag").exists() and idle(service))
        look()  # its settings file is there now
        before = everything_below(rig.root)
        before.pop(str(rig.root / ".regd-owner"))  # the daemon writes to it
        asked_before = len(sandbox.requests)
        found = look()
        after = everything_below(rig.root)
        after.pop(str(rig.root / ".regd-owner"))
    assert bad(found) == {}
    assert len(found) == 19
    assert before.keys() == after.keys()
    mine = [asked for asked in list(sandbox.requests)[asked_before:] if "files" not in asked.path]
    assert {(a.method, a.path) for a in mine if a.method not in ("GET", "OPTIONS")} <= {
        ("POST", "/auth-token")
    }


def test_a_rig_without_a_daemon_leaves_nothing_behind(
    rig: Rig, look: Callable[..., Findings], tmp_path: Path
) -> None:
    rig.record()
    before = everything_below(rig.root)
    found = look()
    assert everything_below(rig.root) == before
    assert not rig.settings.state_dir.exists()
    assert found["service"].state is State.WRONG
    assert "regd run" in found["service"].hint


@pytest.mark.parametrize(
    ("changed", "name", "state", "said"),
    [
        ({"data_root": "/no/such/folder"}, "data folder", "wrong", "is no folder"),
        ({"data_rot": "/x"}, "settings", "wrong", "data_root"),
        ({"data_root": None}, "settings", "wrong", "data_root not set"),
        ({"state_dir": "{root}/state"}, "state folder", "wrong", "inside data_root"),
        ({"watch": {"observer": "none"}}, "file system", "warning", "scans alone"),
        ({"repository": None}, "repository", "warning", "existing nowhere"),
        ({"repository": "no_such"}, "repository", "wrong", "no data repository no_such"),
        ({"alyx": {"password": "wrong"}}, "token", "wrong", "does not accept the password"),
        ({"alyx": {"password": None, "token": "0" * 40}}, "token", "wrong", "Invalid token"),
        ({"alyx": {"password": None}}, "token", "wrong", "alyx.password is not set"),
        ({"register": {"users": ["nobody"]}}, "user", "wrong", "no user nobody"),
        (
            {"alyx": {"username": "public_user", "password": "public-password"}},
            "may register",
            "wrong",
            "may only look",
        ),
        ({"alyx": {"url": "http://127.0.0.1:9"}}, "Alyx", "wrong", "no connection"),
        ({"alyx": {"url": "http://alyx.invalid"}}, "Alyx", "wrong", "cannot be looked up"),
        ({"watch": {"ignore": ["*wheel*"]}}, "dataset types", "warning", "watch.ignore leaves out"),
    ],
)
def test_what_is_wrong_in_the_settings_is_told_with_what_to_do(
    look: Callable[..., Findings],
    rig: Rig,
    sandbox: Server,
    changed: dict[str, Any],
    name: str,
    state: str,
    said: str,
) -> None:
    text = json.dumps(changed).replace("{root}", str(rig.root))
    found = look(**json.loads(text))
    assert (found[name].state, found[name].hint != "") == (state, True)
    assert said in found[name].found


def test_what_stands_in_the_data_folder_is_held_against_alyx(
    look: Callable[..., Findings], rig: Rig, sandbox: Server
) -> None:
    rig.record()
    session = rig.folder()
    for name in ("alf/no.such.npy", "notes.xyz", "alf/ambiguous.thing.npy", "alf/sp ace/a.b.npy"):
        write(session / name, b"x")
    write(rig.root / "nolab/Subjects/nobody/2026-01-01/001/alf/spikes.times.npy", b"x")
    found = look()
    assert "nolab" in found["labs"].found
    assert "nobody" in found["subjects"].found
    for part in (
        "no dataset type: no.such.npy",
        "no data format: notes.xyz",
        "two dataset types fit: ambiguous.thing.npy",
        "not as ALF allows: a.b.npy",
    ):
        assert part in found["file names"].found
    assert "ambiguous.one and ambiguous.two both fit" in found["dataset types"].found


def test_what_needs_a_person_is_told(look: Callable[..., Findings], rig: Rig) -> None:
    rig.record()
    write(rig.folder() / "alf/no.such.npy", b"x")
    rig.scan().close()
    found = look()
    assert found["journal"].state is State.WARNING
    assert found["journal"].found == "1 thing needs a person"


def test_a_clock_that_is_off_is_told(look: Callable[..., Findings]) -> None:
    assert look(now=lambda: time.time() - 86400)["clock"].state is State.WRONG
    late = look(now=lambda: time.time() + 60)["clock"]
    assert late.state is State.WARNING
    assert "timedatectl" in late.hint
    assert "ahead of" in late.found


def test_limits_and_room_that_are_too_low_are_told(
    look: Callable[..., Findings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_inotify_limit", lambda _: 3)
    monkeypatch.setattr(
        check.os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 10**9, 9, 9, 0, 0, 0, 0, 255))
    )
    found = look()
    assert found["inotify"].state is State.WARNING
    assert "/etc/sysctl.d/" in found["inotify"].hint
    assert found["free space"].state is State.WRONG
    assert "state_dir has 37 kB free" in found["free space"].found


@pytest.mark.parametrize(
    ("line", "name", "state", "said"),
    [
        ("nas:/x", "file system", "ok", "so regd scans by itself"),
        ("read-only", "file system", "wrong", "mounted read-only"),
        ("state", "state folder", "wrong", "network drive"),
    ],
)
def test_what_it_lies_on_is_told(
    look: Callable[..., Findings],
    rig: Rig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    line: str,
    name: str,
    state: str,
    said: str,
) -> None:
    point = rig.settings.state_dir if line == "state" else rig.root
    point.mkdir(mode=0o700, exist_ok=True)
    mode, kind = ("ro", "ext4") if line == "read-only" else ("rw", "nfs4")
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(
        f"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:4 / {point} {mode} - {kind} nas:/x rw\n"
    )
    monkeypatch.setattr(mounts, "MOUNTINFO", mountinfo)
    found = look()
    assert found[name].state == state
    assert said in found[name].found


# --- an Alyx that is odd -------------------------------------------------------------------------


def test_an_alyx_that_never_answers_holds_nobody_up(
    look: Callable[..., Findings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_ALYX_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        found = look(alyx={"url": url})
    assert found["Alyx"].state is State.WRONG
    assert found["Alyx"].hint
    skipped = [name for name, f in found.items() if f.state is State.SKIPPED]
    assert {"TLS", "clock", "token", "repository", "file names"} <= {*skipped}


@contextmanager
def serving(content: bytes, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Answer every GET with that, and yield the address."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that hangs up in the handshake is what is tested."""

    with Quiet(("127.0.0.1", 0), Answers) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_something_that_is_no_alyx_is_told(look: Callable[..., Findings]) -> None:
    with serving(b"<html>welcome</html>") as url:
        assert "other than JSON" in look(alyx={"url": url})["Alyx"].found


def test_a_certificate_that_ends_soon_or_is_the_labs_own(
    look: Callable[..., Findings], authority: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.pem", authority / "server.key")
    with serving(b"[]", context) as url:
        soon = look(alyx={"url": url, "ca_file": str(authority / "ca.pem")})
        own = look(alyx={"url": url})
    assert soon["TLS"].state is State.WARNING
    assert "2 days left" in soon["TLS"].found
    assert own["Alyx"].state is State.WRONG
    assert "alyx.ca_file" in own["Alyx"].hint


def test_a_token_in_clear_is_told(
    look: Callable[..., Findings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_is_this_computer", lambda _: False)
    assert "readable by others" in look()["TLS"].found


@pytest.mark.parametrize(
    ("name", "own"), [("localhost", True), ("127.0.0.1", True), ("::1", True), ("alyx", False)]
)
def test_which_names_are_of_this_computer(name: str, own: bool) -> None:
    assert check._is_this_computer(name) is own


# --- the service and its user --------------------------------------------------------------------


def unit_of(**properties: str) -> host.Unit:
    well = {
        "LoadState": "loaded",
        "ActiveState": "active",
        "UnitFileState": "enabled",
        "User": pwd.getpwuid(os.geteuid()).pw_name,
    }
    secrets = tuple(filter(None, [properties.pop("LoadCredential", "")]))
    return host.Unit({**well, **properties}, secrets)


def test_the_service_is_read_as_systemd_shows_it() -> None:
    answers = {
        "show": "LoadState=loaded\nUser=regd\nStateDirectory=regd\nReadWritePaths=-/data /srv/x\n",
        "cat": "# /etc/systemd/system/regd.service\n[Service]\n"
        "LoadCredential=alyx__token:/etc/regd/token\n#LoadCredential=no:/x\n"
        "# /etc/systemd/system/regd.service.d/rig.conf\n LoadCredential = other:name\n",
    }
    unit = host.read_unit(lambda command: answers[command[1]])
    assert unit is not None
    assert unit.is_there
    assert not unit.is_active
    assert unit.secrets == {"alyx__token": Path("/etc/regd/token")}
    assert unit.state_dir == Path("/var/lib/regd")
    assert host.read_unit(lambda _: "") is None


@pytest.mark.parametrize(
    ("properties", "folder", "hidden"),
    [
        ({"ProtectSystem": "strict", "ReadWritePaths": "-/data"}, "/data/x", None),
        ({"ProtectSystem": "strict", "ReadWritePaths": "-/data"}, "/database", "ReadWritePaths"),
        ({"ProtectSystem": "full"}, "/data", None),
        ({"ProtectHome": "yes", "ReadWritePaths": "/home/rig"}, "/home/rig/data", "ProtectHome"),
        ({"ProtectHome": "read-only", "ReadWritePaths": "/home/rig"}, "/home/rig/data", None),
        ({"ProtectHome": "read-only"}, "/home/rig/data", "ReadWritePaths"),
        ({"ProtectHome": "tmpfs", "BindPaths": "/home/rig:/home/rig:rbind"}, "/home/rig/d", None),
    ],
)
def test_what_the_service_is_kept_from(
    properties: dict[str, str], folder: str, hidden: str | None
) -> None:
    why = unit_of(**properties).hides(Path(folder))
    assert (why is None) == (hidden is None)
    assert hidden is None or hidden in why


def test_a_service_that_does_not_run_or_may_not_write_is_told(
    look: Callable[..., Findings], rig: Rig, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    secret = f"alyx__token:{token}"
    stopped = look(unit_of(ActiveState="failed", Result="exit-code", UnitFileState="disabled"))
    assert "it does not run: failed (exit-code)" in stopped["service"].found
    kept_out = look(unit_of(ProtectSystem="strict", ReadWritePaths="/elsewhere"))
    assert "ReadWritePaths= does not name it" in kept_out["data folder"].found
    assert f"ReadWritePaths={rig.root}" in kept_out["data folder"].hint
    assert "is empty" in look(unit_of(LoadCredential=secret))["service"].found
    token.write_text("0" * 40)
    token.chmod(0o644)
    assert "chmod o=" in look(unit_of(LoadCredential=secret))["settings"].found
    token.unlink()
    assert "cannot start" in look(unit_of(LoadCredential=secret))["service"].found
    assert look(unit_of())["service"].state is State.OK


def test_the_services_secret_is_used_where_it_may_be_read(
    look: Callable[..., Findings], rig: Rig, tmp_path: Path
) -> None:
    with rig.lab.client as client:
        answer = client._send(
            "POST", "/auth-token", data={"username": "rig_user", "password": "rig-password"}
        )
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(f"{answer.json()['token']}\n")
    unit = unit_of(LoadCredential=f"alyx__token:{token}")
    assert look(unit, alyx={"password": None})["token"].found == "Alyx takes the token"


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as another user")


@as_root
def test_rights_are_judged_for_the_user_of_the_service(
    look: Callable[..., Findings], rig: Rig, tmp_path: Path
) -> None:
    """As root everything can be written; what counts is what the service can."""
    nobody = unit_of(User="nobody")
    for folder in (rig.root, *rig.root.parents):
        if str(folder).startswith(str(Path(tmp_path.parts[0], *tmp_path.parts[1:3]))):
            folder.chmod(0o755)
    refused = look(nobody)["data folder"]
    assert refused.state is State.WRONG
    assert "nobody may not" in refused.found
    assert "setfacl -R -m u:nobody:rwX" in refused.hint
    rig.root.chmod(0o777)
    assert look(nobody)["data folder"].state is State.OK
    rig.record()
    partly = look(nobody)["data folder"]
    assert partly.state is State.WARNING
    assert rig.lab.lab in partly.found


def test_rights_by_mode_alone(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    folder.chmod(0o750)
    status = folder.stat()
    account = host.Account("a", status.st_uid, 1, frozenset())
    assert account._may_by_mode(status, "rwx")
    account = host.Account("b", status.st_uid + 1, 1, frozenset({status.st_gid}))
    assert account._may_by_mode(status, "rx")
    assert not account._may_by_mode(status, "w")
    account = host.Account("c", status.st_uid + 1, 1, frozenset())
    assert not account._may_by_mode(status, "r")


# --- as people and monitoring run it -------------------------------------------------------------


def test_the_command(rig: Rig, lab: Lab, tmp_path: Path) -> None:
    config = tmp_path / "regd.yaml"
    config.write_text(
        yaml.safe_dump({"data_root": "/no/such", "alyx": {"url": lab.url, "username": "rig_user"}})
    )

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("REGD_", "LC_", "LANG"))}
        return subprocess.run(
            [sys.executable, "-m", "regd", "check", "-c", str(config), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**kept, "REGD_ALYX__PASSWORD": lab.password, **environment},
        )

    plain, fancy = run(LANG="C"), run(LANG="C.UTF-8")
    assert plain.returncode == fancy.returncode == 2
    assert plain.stdout.isascii()
    assert "XX data folder" in plain.stdout
    assert "✗ data folder" in fancy.stdout
    facts = json.loads(run("--json").stdout)
    assert facts["exit"] == 2
    assert {c["name"]: c["state"] for c in facts["checks"]}["data folder"] == "wrong"
    assert lab.password not in plain.stdout + json.dumps(facts)
