"""The commands as people and systemd run them: real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.rig import DATASETS, Rig, until, write


@pytest.fixture
def config(rig: Rig, tmp_path: Path) -> Path:
    """A settings file for the rig, the password in the environment."""
    path = tmp_path / "regd.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "data_root": str(rig.root),
                "state_dir": str(rig.settings.state_dir),
                "repository": rig.lab.repository,
                "alyx": {"url": rig.lab.url, "username": rig.lab.username},
                "settle": {"quiet_s": 0.6, "closed_quiet_s": 0.1},
                "log": {"format": "json"},
            }
        )
    )
    return path


def environment(rig: Rig) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("REGD_")}
    return {**kept, "REGD_ALYX__PASSWORD": rig.lab.password, "COLUMNS": "200"}


def regd(rig: Rig, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "regd", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(rig),
    )


@contextmanager
def daemon(rig: Rig, config: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `regd run` and see that it ends well."""
    log = config.with_suffix(".log")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "regd", "run", "-c", str(config)],
            stderr=stderr,
            env=environment(rig),
            text=True,
        )
        try:
            until(lambda: "scan.finished" in log.read_text())
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=5) == 0


def events(config: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in config.with_suffix(".log").read_text().splitlines()]


def test_scan_says_what_it_did_and_what_is_left(rig: Rig, config: Path) -> None:
    folder = rig.record()
    dry = regd(rig, "scan", "-c", config, "--dry-run")
    assert dry.returncode == 0
    assert folder.relative_to(rig.root).as_posix() in dry.stdout
    assert not rig.settings.state_dir.exists(), "a dry run writes nothing"
    done = regd(rig, "scan", "-c", config)
    assert (done.returncode, done.stdout.strip()) == (
        0,
        f"1 session known, {len(DATASETS)} files registered",
    )
    write(folder / "alf" / "no.such.npy", b"x")
    left = regd(rig, "scan", "-c", config)
    assert left.returncode == 1
    assert "1 thing needs a person: regd status" in left.stdout


def test_daemon_logs_each_thing_once(rig: Rig, config: Path) -> None:
    with daemon(rig, config):
        folder = rig.record()
        until(lambda: not (folder / "create_me.flag").exists())
        until(lambda: len(rig.held()) == len(DATASETS))
    lines = events(config)
    session = folder.relative_to(rig.root).as_posix()
    eid = rig.eid()
    for line in lines:
        assert {"event", "level", "timestamp"} <= line.keys()
        assert rig.lab.password not in json.dumps(line)
    (created,) = [line for line in lines if line["event"] == "session.created"]
    (unflagged,) = [line for line in lines if line["event"] == "flag.removed"]
    registered = [line for line in lines if line["event"] == "file.registered"]
    assert sorted(line["path"] for line in registered) == sorted(DATASETS)
    assert {line["session"] for line in (created, unflagged, *registered)} == {session}
    assert {line["eid"] for line in (created, unflagged, *registered)} == {eid}
    assert lines[-1]["event"] == "regd.stopped"


def test_commands_beside_a_running_daemon(rig: Rig, config: Path) -> None:
    with daemon(rig, config) as first:
        second = regd(rig, "run", "-c", config)
        assert second.returncode == 2
        assert f"another regd (process {first.pid})" in second.stderr

        rig.record()
        scan = regd(rig, "scan", "-c", config)
        assert scan.returncode == 0
        assert f"{len(DATASETS)} files registered" in scan.stdout

        facts = json.loads(regd(rig, "status", "-c", config, "--json").stdout)
        assert facts["daemon"]["running"]
        assert facts["alyx"]["reachable"]
        assert facts["sessions"]["done"] == 1
        assert facts["needs_human"] == 0

        stranger = rig.root / rig.lab.lab / "Subjects" / "nobody" / rig.date / "001"
        write(stranger / DATASETS[0], b"x")
        write(stranger / "create_me.flag", b"")

        def parked() -> Any:
            return json.loads(regd(rig, "status", "-c", config, "--json").stdout)["parked"]

        (row,) = until(parked)
        assert "nobody" in row["reason"]
        shown = regd(rig, "status", "-c", config).stdout
        assert row["session"] in shown
        again = regd(rig, "retry", stranger, "-c", config).stdout
        assert again == "1 session put back to work: regd is at it; see: regd status\n"
        until(lambda: sum(e["event"] == "session.parked" for e in events(config)) == 2)
    facts = json.loads(regd(rig, "status", "-c", config, "--json").stdout)
    assert not facts["daemon"]["running"]


def test_sigterm_in_the_middle_of_a_large_file(rig: Rig, config: Path) -> None:
    folder = rig.record()
    with (folder / "alf" / "_ibl_wheel.velocity.npy").open("wb") as file:
        file.truncate(40 << 30)  # sparse: hashing it takes far longer than the test
    with daemon(rig, config):
        until(lambda: rig.lab.sessions(rig.date))
    with rig.journal() as journal:
        (row,) = journal.sessions()
        assert row.state == "waiting"
        assert row.attempt == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "-c", "/no/such/regd.yaml"], "/no/such/regd.yaml"),
        (["scan", "-c", "{config}", "--no-such-option"], "No such option"),
        (["retry", "-c", "{config}"], "--all"),
        (["retry", "no/such/session", "-c", "{config}"], "knows no session"),
        (["status", "-c", "{config}"], "there is no journal"),
        (["sandbox", "--rate-limit", "often"], "often"),
        (["sandbox", "--load", "/no/such.json"], "/no/such.json"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(
    rig: Rig, config: Path, arguments: list[str], said: str
) -> None:
    if "retry" in arguments and len(arguments) > 3:
        rig.scan().close()  # there is a journal
    result = regd(rig, *(a.format(config=config) for a in arguments))
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_scan_without_alyx_says_so(rig: Rig, config: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["alyx"]["url"] = "http://127.0.0.1:9"  # the discard port: nobody listens
    config.write_text(yaml.safe_dump(settings))
    rig.record()
    result = regd(rig, "scan", "-c", config)
    assert result.returncode == 2
    assert "http://127.0.0.1:9" in result.stderr
    assert "Traceback" not in result.stderr
    facts = json.loads(regd(rig, "status", "-c", config, "--json").stdout)
    assert not facts["alyx"]["reachable"]
    assert facts["sessions"]["waiting"] == 1


def test_config_shows_where_values_come_from_and_no_secret(rig: Rig, config: Path) -> None:
    shown = regd(rig, "config", "-c", config).stdout
    assert rig.lab.password not in shown
    for text in (str(config), "REGD_ALYX__PASSWORD", "default", "settle.quiet_s"):
        assert text in shown


def test_the_story_of_a_session_and_its_end(rig: Rig, config: Path) -> None:
    folder = rig.record()
    session = folder.relative_to(rig.root).as_posix()
    write(folder / "alf" / "no.such.npy", b"x")
    assert regd(rig, "scan", "-c", config).returncode == 1
    shown = regd(rig, "show", f"{rig.date}/001", "-c", config).stdout
    assert shown.startswith(f"{session}\n")
    for text in (rig.eid(), "first seen", "created on Alyx", "the flag is gone", *DATASETS):
        assert text in shown
    story = json.loads(regd(rig, "show", folder / "alf", "-c", config, "--json").stdout)
    assert [happened["what"] for happened in story["history"]] == ["created", "unflagged", "done"]
    held = rig.held()
    for file in story["by_file"]:
        if file["path"] in held:
            assert file["state"] == "registered"
            assert file["md5"] == held[file["path"]]["hash"]
            assert held[file["path"]]["url"].endswith(file["dataset_id"])
        else:
            assert file["reason"]
            assert file["hint"]
    refused = regd(rig, "forget", session, "-c", config)
    assert refused.returncode == 2
    assert "still there" in refused.stderr
    folder.rename(rig.root.parent / "away")
    (rig.root / "another").mkdir()
    assert regd(rig, "forget", session, "-c", config).stdout == f"forgotten: {session}\n"
    assert regd(rig, "show", session, "-c", config).returncode == 2
    assert len(rig.held()) == len(DATASETS), "what is on Alyx stays there"


# --- completion ----------------------------------------------------------------------------------


def completed(rig: Rig, *words: Any) -> list[str]:
    """Return what a shell is told for the last word."""
    done = subprocess.run(
        [sys.executable, "-m", "regd"],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **environment(rig),
            "_REGD_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(["regd", *map(str, words)]),
            "COMP_CWORD": str(len(words)),
        },
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_a_shell_completes_commands_and_sessions(rig: Rig, config: Path) -> None:
    known = rig.record().relative_to(rig.root).as_posix()
    short = "/".join(known.split("/")[-3:])
    assert completed(rig, "show", "-c", config, known[:4]) == [], "there is no journal yet"
    rig.scan().close()
    assert completed(rig, "fo") == ["forget"]
    for command in ("show", "retry"):
        assert completed(rig, command, "-c", config, known[:4]) == [known]
        assert completed(rig, command, "-c", config, short[:6]) == [short]
        assert completed(rig, command, "-c", config, "nobody") == []
    assert completed(rig, "forget", "-c", config, known[:4]) == [], "nothing is wrong with it"
    assert completed(rig, "show", "-c", "/no/such/file", known[:4]) == []


def test_bash_completes(rig: Rig, config: Path, tmp_path: Path) -> None:
    """In an interactive bash, by the tabulator, with what the documentation has people install."""
    known = rig.record().relative_to(rig.root).as_posix()
    rig.scan().close()
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "regd").write_text(f'#!/bin/sh\nexec {sys.executable} -m regd "$@"\n')
    (programs / "regd").chmod(0o755)
    script = tmp_path / "regd.bash"
    env = {
        **environment(rig),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "REGD_CONFIG": str(config),
        "PS1": "",
        "TERM": "dumb",
    }
    done = subprocess.run(
        ["regd"], env={**env, "_REGD_COMPLETE": "source_bash"}, capture_output=True
    )
    script.write_bytes(done.stdout)
    lines = (
        f"source {script}",
        f"regd show {known[:6]}\t >{tmp_path}/session",
        f"regd config -c {config.parent}/regd.y\t >{tmp_path}/file",
        "exit",
    )
    screen, inner = pty.openpty()
    bash = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env=env,
        start_new_session=True,
    )
    os.close(inner)
    os.write(screen, "".join(f"{line}\n" for line in lines).encode())
    with contextlib.suppress(OSError):  # the end, on a terminal
        while os.read(screen, 10_000):
            pass
    assert bash.wait(timeout=30) == 0
    os.close(screen)
    assert (tmp_path / "session").read_text().startswith(f"{known}\n")
    assert str(config) in (tmp_path / "file").read_text()
