"""What the commands of the documentation meet in a test: `python stand_in.py NAME ARGUMENT...`.

A program that would change the computer (sudo, systemctl, useradd, pip, docker, ...) is stood in
for by this one, which takes what the real one takes, no more, and does what can be done below
$FAKE_ROOT: `systemctl start regd` starts the daemon as the installed unit says. Programs that go on
for ever run until they work. What is not understood ends with status 64: the test fails.
"""

from __future__ import annotations

import configparser
import contextlib
import getopt
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

NAMES = (
    "docker",
    "install",
    "journalctl",
    "make",
    "pip",
    "promtool",
    "python3",
    "regd",
    "ssh",
    "sudo",
)
NAMES += ("systemctl", "useradd", "userdel")

ROOT = Path(os.environ.get("FAKE_ROOT", "/nowhere"))  # nothing is there until a test says where
RUN = ROOT / "run"
PYTHON = os.environ.get("FAKE_PYTHON", sys.executable)
PROJECT = Path(__file__).parents[1]
UNIT = ROOT / "etc/systemd/system/regd.service"
LOG, PID = RUN / "journal", RUN / "regd.pid"
STARTS_WITHIN_S = 20.0
# Commands that have done what was asked, and found something, with these statuses.
REPORTS = {"check": (1, 2), "scan": (1,)}


def refuse(what: str) -> NoReturn:
    print(f"{NAME}: {what}", file=sys.stderr)
    sys.exit(64)


def options(arguments: list[str], short: str = "", *long: str) -> tuple[dict[str, str], list[str]]:
    """Return the options that are given, of those that there are, and the other arguments."""
    try:
        given, others = getopt.gnu_getopt(arguments, short, list(long))
    except getopt.GetoptError as error:
        refuse(str(error))
    return dict(given), others


def leave_to(*command: str) -> NoReturn:
    sys.stdout.flush()
    os.execvp(command[0], command)


# --- who may do it, and where it comes from ------------------------------------------------------


def sudo(arguments: list[str]) -> None:
    try:  # its own options end where the command begins
        given, command = getopt.getopt(arguments, "u:")
    except getopt.GetoptError as error:
        refuse(str(error))
    if ("-u", "regd") in given and not (RUN / "users/regd").exists():
        refuse("there is no user regd")
    leave_to(*command)


def useradd(arguments: list[str]) -> None:
    long = ("system", "user-group", "shell=", "no-create-home", "home-dir=", "groups=", "root=")
    _, names = options(arguments, "", *long)
    if len(names) != 1:
        refuse("name one user")
    (RUN / "users").mkdir(exist_ok=True)
    (RUN / "users" / names[0]).touch()


def userdel(arguments: list[str]) -> None:
    _, names = options(arguments)
    for name in names:
        (RUN / "users" / name).unlink()


def install(arguments: list[str]) -> None:
    given, paths = options(arguments, "dm:o:g:")
    mode = ["-m", given["-m"]] if "-m" in given else []
    folder = ["-d"] if "-d" in given else []
    # whose it is cannot be given away by everybody who runs tests
    os.execvpe("install", ["install", *folder, *mode, *paths], {**os.environ, "PATH": os.defpath})


def python3(arguments: list[str]) -> None:
    if arguments[:2] != ["-m", "venv"]:
        leave_to(PYTHON, *arguments)
    (folder,) = arguments[2:]
    launcher(Path(folder) / "bin", "pip")


def pip(arguments: list[str]) -> None:
    if arguments[:1] != ["install"]:
        refuse("only installs here")
    _, what = options(arguments[1:], "U", "upgrade")
    for each in what:
        if not (each == "." and Path("pyproject.toml").exists()):
            refuse(f"{each} is no folder to install from")
    launcher(Path(os.environ["FAKE_SELF"]).parent, "regd")


def launcher(folder: Path, *names: str) -> None:
    """Put this program under other names into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        file = folder / name
        file.write_text(
            f'#!/bin/sh\nFAKE_SELF="$0" exec {shlex.quote(PYTHON)} -S {shlex.quote(__file__)}'
            f' {name} "$@"\n'
        )
        file.chmod(0o755)


# --- regd ----------------------------------------------------------------------------------------


def regd(arguments: list[str]) -> None:
    command = [PYTHON, "-m", "regd", *arguments]
    name = arguments[0] if arguments else ""
    if name in ("run", "sandbox") or "--watch" in arguments:
        until_it_works(command)
    elif name in ("install", "uninstall"):
        install_regd([*command, "--root", str(ROOT)])
    elif name in REPORTS:
        status = subprocess.run(command, check=False).returncode
        sys.exit(0 if status in REPORTS[name] else status)
    else:
        leave_to(*command)


def install_regd(command: list[str]) -> None:
    """Have regd put its files below the test's folder, and do what it leaves out in an image."""
    if "uninstall" in command:
        stop()
    else:  # what a person at the terminal would say
        answers = {
            "--data-root": f"{ROOT}/data/recordings",
            "--alyx-url": "https://alyx.example.org",
            "--username": "rig_user",
        }
        for option, answer in answers.items():
            if option not in command:
                command += [option, answer]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    if "uninstall" not in command and "--dry-run" not in command:
        token = ROOT / "etc/regd/token"
        if token.read_text():
            start()


def until_it_works(command: list[str]) -> None:
    """Run what goes on for ever until it says something, and stop it as a person does."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    said = process.stdout.readline()
    if not said:
        refuse(f"{shlex.join(command)} ended with status {process.wait()}")
    process.send_signal(signal.SIGINT)
    sys.stdout.write(said.decode() + process.communicate()[0].decode())
    if process.returncode not in (0, 130, -signal.SIGINT):
        refuse(f"{shlex.join(command)} ended with status {process.returncode}")


# --- systemd -------------------------------------------------------------------------------------


def systemctl(arguments: list[str]) -> None:
    given, (verb, *units) = options(arguments, "", "now", "no-pager", "root=")
    if verb == "daemon-reload":
        return
    if [unit.removesuffix(".service") for unit in units] != ["regd"]:
        refuse(f"there is no unit {' '.join(units)}")
    if not UNIT.exists():
        refuse(f"there is no {UNIT}")
    if verb in ("stop", "restart") or (verb == "disable" and "--now" in given):
        stop()
    if verb in ("start", "restart") or (verb == "enable" and "--now" in given):
        start()
    elif verb == "status":
        print("active (running)" if PID.exists() else "inactive (dead)")
    elif verb not in ("stop", "enable", "disable", "edit"):
        refuse(f"no verb {verb}")


def here(path: str) -> str:
    """Return where a path of the unit is in this test."""
    return re.sub(r"(?<![\w.])/(?=(etc|opt|var)/)", f"{ROOT}/", path)


def start() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.read(UNIT)
    service = unit["Service"]
    state = ROOT / "var/lib" / service["StateDirectory"]
    state.mkdir(parents=True, mode=0o700, exist_ok=True)
    secrets = RUN / "credentials"
    shutil.rmtree(secrets, ignore_errors=True)
    secrets.mkdir(mode=0o700)
    name, _, source = service["LoadCredential"].partition(":")
    shutil.copy(here(source), secrets / name)
    program, *words = shlex.split(here(service["ExecStart"]))
    if not os.access(program, os.X_OK):
        refuse(f"ExecStart: there is no {program}")
    with LOG.open("a") as log:
        process = subprocess.Popen(
            [PYTHON, "-m", "regd", *words],
            env={
                **os.environ,
                "CREDENTIALS_DIRECTORY": str(secrets),
                "STATE_DIRECTORY": str(state),
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    PID.write_text(str(process.pid))
    deadline = time.monotonic() + STARTS_WITHIN_S
    while '"scan.finished"' not in LOG.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            refuse(f"the service does not start: {LOG.read_text()}")
        time.sleep(0.05)  # another process is at work


def stop() -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        pid = int(PID.read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STARTS_WITHIN_S
        while ") Z " not in Path(f"/proc/{pid}/stat").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)  # another process is at work
    PID.unlink(missing_ok=True)


def journalctl(arguments: list[str]) -> None:
    given, others = options(arguments, "u:fben:p:o:r", "since=", "no-pager")
    if given.get("-u", "").removesuffix(".service") != "regd" or others:
        refuse("name the unit with -u regd")
    print(LOG.read_text() if LOG.exists() else "-- No entries --")


# --- docker --------------------------------------------------------------------------------------


def docker(arguments: list[str]) -> None:
    verb, *rest = arguments
    images, containers = RUN / "images", RUN / "containers"
    images.mkdir(exist_ok=True)
    containers.mkdir(exist_ok=True)
    if verb == "compose":
        compose(rest)
    elif verb == "build":
        given, folders = options(rest, "t:")
        if len(folders) != 1 or not (Path(folders[0]) / "Dockerfile").exists():
            refuse(f"there is no Dockerfile in {folders}")
        (images / given["-t"]).touch()
    elif verb == "run":
        values = ("name=", "restart=", "stop-timeout=", "user=", "tmpfs=", "cap-drop=")
        try:  # its own options end where the image stands
            pairs, (image, *words) = getopt.getopt(
                rest, "dv:p:e:", ["read-only", "init", "rm", "security-opt=", *values]
            )
        except (getopt.GetoptError, ValueError) as error:
            refuse(str(error))
        if not (images / image).exists():
            refuse(f"there is no image {image}")
        for source in (value.split(":")[0] for name, value in pairs if name == "-v"):
            if "/" in source and not Path(source).exists():
                refuse(f"there is no {source}")
        (containers / dict(pairs)["--name"]).touch()
        if words:
            leave_to(PYTHON, "-m", "regd", words[0], "--help")
    elif verb in ("exec", "logs", "stop", "start", "restart", "rm", "inspect"):
        container, *words = rest
        if not (containers / container).exists():
            refuse(f"there is no container {container}")
        if verb == "exec":
            inside(words)
    else:
        refuse(f"no command {verb}")


def compose(arguments: list[str]) -> None:
    verb, *rest = arguments
    file = Path("compose.yaml")
    if not file.exists():
        refuse(f"there is no {file}")
    named = file.read_text().partition("\nservices:\n")[2]
    services = re.findall(r"^  (\w+):$", named.partition("\nvolumes:\n")[0], re.M)
    up = RUN / "up"
    if verb == "up":
        options(rest, "d", "detach", "build", "wait")
        for source in re.findall(r"source: (\./\S+)", file.read_text()):
            if not Path(source).is_dir():
                refuse(f"there is no folder {source}")
        up.touch()
        return
    if not up.exists():
        refuse("nothing is up")
    if verb == "exec":
        service, *words = rest
        if service not in services:
            refuse(f"there is no service {service}, only {services}")
        inside(words)
    elif verb == "down":
        options(rest, "v", "volumes")
        up.unlink()
    elif verb not in ("logs", "ps", "stop", "start", "restart"):
        refuse(f"no command {verb}")


def inside(words: list[str]) -> NoReturn:
    """Take a command for a container, where nothing is registered here: is there such a one?"""
    if words[0] != "regd":
        refuse(f"there is no {words[0]} in the image")
    leave_to(PYTHON, "-m", *words, "--help")


# --- programs beside regd ------------------------------------------------------------------------


def ssh(arguments: list[str]) -> None:
    given, hosts = options(arguments, "NL:")
    if len(hosts) != 1 or not re.fullmatch(r"\d+:127\.0\.0\.1:\d+", given.get("-L", "")):
        refuse("say -L PORT:127.0.0.1:PORT and one host")


def promtool(arguments: list[str]) -> None:
    if arguments[:2] not in (["check", "config"], ["check", "rules"], ["test", "rules"]):
        refuse(f"no command {' '.join(arguments[:2])}")
    for file in arguments[2:]:
        if not Path(file).exists():
            refuse(f"there is no {file}")


# --- make, pytest --------------------------------------------------------------------------------


def make(arguments: list[str]) -> None:
    leave_to(os.environ["FAKE_MAKE"], "--dry-run", "--no-print-directory", *arguments)


def pytest(arguments: list[str]) -> None:
    os.chdir(PROJECT)
    leave_to(PYTHON, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *arguments)


if __name__ == "__main__":
    NAME, *ARGUMENTS = sys.argv[1:]
    RUN.mkdir(exist_ok=True)
    globals()[NAME](ARGUMENTS)
