"""Builds the image and runs it as an orchestrator would: `make test-docker`.

No Docker engine is needed: buildah builds on a base that debootstrap makes, and crun runs what
comes out, with the read-only root and without the rights, as compose.yaml has it. The base stays in
the cache, so that a second run is quick; all else goes in the end, whatever happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("REGD_DOCKER_CACHE", "/var/tmp/regd-docker"))
SUITE = "trixie"  # the Debian release whose Python the Dockerfile's base has
TOOLS = {"buildah": "buildah", "debootstrap": "debootstrap", "crun": "crun", "tar": "tar"}
TOOLS |= {"unshare": "util-linux"}
USER = 4711  # neither root nor the user of the image: the owner of some recordings
WITHIN_S = 60.0
STOPS_WITHIN_S = 10.0


def say(text: str) -> None:
    print(f"- {text}", flush=True)


def run(*words: str | Path, **options: Any) -> str:
    """Run a program and return what it prints; fail with all of it."""
    done = subprocess.run(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **{"timeout": 1800, **options},
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed ({done.returncode}):\n{done.stdout[-4000:]}")
    return done.stdout.strip()


def buildah(*words: str | Path, **options: Any) -> str:
    stores = ("--root", CACHE / "images", "--runroot", CACHE / "run", "--storage-driver", "vfs")
    return run("buildah", *stores, *words, env={**os.environ, "TMPDIR": str(CACHE)}, **options)


def until(happened: Callable[[], Any], what: str, within_s: float = WITHIN_S) -> Any:
    deadline = time.monotonic() + within_s
    while not (result := happened()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:.0f} s: {what}")
        time.sleep(0.2)  # another process is at work, and nothing tells of its end
    return result


# --- the image -----------------------------------------------------------------------------------


def base_name() -> str:
    """Return the one base that the Dockerfile builds on."""
    (name,) = set(re.findall(r"^FROM (\S+)", (PROJECT / "Dockerfile").read_text(), re.M))
    return str(name)


def make_base(name: str) -> None:
    """Import a Debian with Python under the name of the base, unless the cache has it."""
    full = f"docker.io/library/{name}"
    if full in buildah("images", "--format", "{{.Name}}:{{.Tag}}").splitlines():
        say(f"{name}: from {CACHE}")
        return
    say(f"{name}: made of Debian {SUITE}, once")
    targets = run(
        "apt-get", "indextargets", "--format", "$(REPO_URI) $(LABEL)", "Created-By: Packages"
    )
    mirror = next(line.split()[0] for line in targets.splitlines() if line.endswith(" Debian"))
    root = CACHE / "debootstrap"
    shutil.rmtree(root, ignore_errors=True)
    packages = "--include=python3,python3-venv,ca-certificates"
    run("debootstrap", "--variant=minbase", packages, SUITE, root, mirror)
    for link in ("python", "python3"):  # where the official image has it
        (root / "usr/local/bin" / link).symlink_to("/usr/bin/python3")
    version = run("chroot", root, "/usr/local/bin/python", "--version")
    if not version.startswith(f"Python {name.split(':')[1].split('-')[0]}."):
        sys.exit(f"Debian {SUITE} has {version}, but the Dockerfile wants {name}")
    for folder in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
        shutil.rmtree(root / folder)
    archive = CACHE / "base.tar"
    run("tar", "-C", root, "-cf", archive, ".")
    shutil.rmtree(root)
    container = buildah("from", "scratch")
    buildah("add", container, archive, "/")
    archive.unlink()
    path = "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    buildah("config", "--env", path, "--cmd", "python3", container)
    buildah("commit", "--rm", container, full)


def pip_of_this_machine() -> Iterator[str]:
    """Yield buildah's options that let pip in the build do as it does on this machine."""
    listed = run(sys.executable, "-m", "pip", "config", "list")
    settings = dict(re.findall(r"^global\.([\w-]+)='(.*)'$", listed, re.M))
    config = CACHE / "pip.conf"
    text = "".join(f"{key} = {value}\n" for key, value in settings.items())
    config.write_text(f"[global]\n{text}")
    yield f"--volume={config}:/etc/pip.conf:ro"
    places = {Path("/etc/ssl/certs")}
    for word in " ".join(settings.values()).split():
        if word.startswith("file:///"):  # an index refers to files beside it
            places.add(Path(word.removeprefix("file://")).parent)
        elif word.startswith("/") and word.count("/") > 1:
            places.add(Path(word))
    for place in sorted(places):
        if place.exists():
            yield f"--volume={place}:{place}:ro"


def build(tag: str) -> None:
    say("building the image")
    options = ["--isolation", "chroot", "--format", "docker", "--pull-never", "--no-cache"]
    buildah("bud", *options, *pip_of_this_machine(), "--tag", tag, PROJECT)


# --- containers ----------------------------------------------------------------------------------


def crun(*words: str) -> list[str]:
    """Return the words that run crun, whatever control groups this computer has."""
    hide = 'mount -t tmpfs none /sys/fs/cgroup && exec crun --cgroup-manager=disabled "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "crun", *words]


class Container:
    """One container of the image, as compose.yaml would run it.

    Args:
        name: Of its own on this computer.
        root: The unpacked image.
        config: The image's settings, as Docker has them.
        folder: For what belongs to this container.
        binds: A folder of the computer for each of the container's.
        arguments: After the image's entry point, if not its own.
        environment: Beside the image's.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        config: dict[str, Any],
        folder: Path,
        *,
        binds: dict[str, Path],
        arguments: list[str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name, self._config = name, config
        self._environment = {**(environment or {}), "HOME": "/nonexistent"}
        bundle = folder / name
        bundle.mkdir()
        run("crun", "spec", cwd=bundle)
        spec = json.loads((bundle / "config.json").read_text())
        spec["root"] = {"path": str(root), "readonly": True}
        spec["process"] |= {
            "terminal": False,
            "user": {"uid": USER, "gid": USER},
            "args": [*config["Entrypoint"], *(arguments or config["Cmd"])],
            "env": [*config["Env"], *(f"{k}={v}" for k, v in self._environment.items())],
            "cwd": "/",
            "capabilities": {},
            "noNewPrivileges": True,
        }
        spec["mounts"] = [m for m in spec["mounts"] if m["type"] not in ("cgroup", "mqueue")]
        tmp = ["nosuid", "nodev", "noexec", "mode=1777", "size=64m"]
        spec["mounts"].append(
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": tmp}
        )
        for inside, outside in binds.items():
            spec["mounts"].append(
                {"destination": inside, "source": str(outside), "options": ["bind", "rw"]}
            )
        # the computer's network: there is no engine to connect the two
        kept = [n for n in spec["linux"]["namespaces"] if n["type"] not in ("network", "cgroup")]
        spec["linux"]["namespaces"] = kept
        (bundle / "config.json").write_text(json.dumps(spec))
        self.log = bundle / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                crun("run", "--bundle", str(bundle), name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def exec(self, *words: str) -> tuple[int, str]:
        """Run a program in it, and return its exit status and what it printed."""
        environment = [*self._config["Env"], *(f"{k}={v}" for k, v in self._environment.items())]
        options = [f"--env={value}" for value in environment]
        done = subprocess.run(
            crun("exec", f"--user={USER}:{USER}", *options, self.name, *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout.strip()

    def health(self) -> tuple[int, str]:
        """Run the image's health check."""
        kind, *words = self._config["Healthcheck"]["Test"]
        assert kind == "CMD", "it needs no shell"
        return self.exec(*words)

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to its first process."""
        run(*crun("kill", self.name, str(int(number))))

    def remove(self) -> None:
        subprocess.run(crun("delete", "--force", self.name), capture_output=True, check=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def try_out(root: Path, config: dict[str, Any], folder: Path) -> None:
    """Run the sandbox and regd from the image, and record a session."""
    data, state = folder / "recordings", folder / "state"
    for made in (data, state):
        made.mkdir()
        os.chown(made, USER, USER)
    state.chmod(0o755)
    port = free_port()
    wanted = yaml.safe_load((PROJECT / "compose.yaml").read_text())["services"]
    arguments = [str(port) if word == "8000" else word for word in wanted["sandbox"]["command"]]
    environment = dict(wanted["regd"]["environment"])
    environment["REGD_ALYX__URL"] = f"http://127.0.0.1:{port}"
    environment["REGD_METRICS__PORT"] = str(metrics := free_port())
    suffix = str(os.getpid())
    with contextlib.ExitStack() as stack:
        sandbox = Container(
            f"regd-test-sandbox-{suffix}", root, config, folder, binds={}, arguments=arguments
        )
        stack.callback(sandbox.remove)
        until(lambda: answers(port), "the sandbox answers")
        regd = Container(
            f"regd-test-{suffix}",
            root,
            config,
            folder,
            binds={"/data": data, "/var/lib/regd": state},
            environment=environment,
        )
        stack.callback(regd.remove)
        try:
            drop_a_session(regd, data)
            look_inside(regd, metrics)
            fail_and_stop(regd)
        except BaseException:
            print(f"--- the log of {regd.name}:\n{regd.log.read_text()[-6000:]}")
            raise


def drop_a_session(regd: Container, data: Path) -> None:
    until(lambda: regd.health()[0] == 0, "the health check says that regd is at work")
    say(f"health: {regd.health()[1]}")
    session = data / "mainenlab/Subjects/ZM_1085/2026-01-31/001"
    (session / "alf").mkdir(parents=True)
    (session / "alf/spikes.times.npy").write_bytes(b"a recording")
    (session / "create_me.flag").touch()
    for path in (*data.rglob("*"),):
        os.chown(path, USER, USER)
    until(lambda: not (session / "create_me.flag").exists(), "the flag is gone")

    def facts() -> Any:
        code, text = regd.exec("regd", "status", "--json")
        assert code == 0, text
        return json.loads(text)

    until(lambda: facts()["sessions"]["done"] == 1, "the session is done")
    assert facts()["files"]["registered"] == 1
    assert facts()["problems"] == []
    say("a session that was dropped into the data folder is registered")


def look_inside(regd: Container, metrics: int) -> None:
    code, text = regd.exec("id", "-u")
    assert (code, text) == (0, str(USER)), text
    for path in ("/x", "/opt/regd/x", "/etc/regd/x", "/var/x"):
        code, text = regd.exec("python", "-c", f"open({path!r}, 'w')")
        assert code == 1, f"{path} can be written"
        assert "Read-only file system" in text, text
    _, status = regd.exec("cat", "/proc/1/status")
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert facts["CapEff"].strip("0") == facts["CapPrm"].strip("0") == "", facts
    assert facts["NoNewPrivs"] == "1", facts
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=10) as answer:
        assert b"regd_registered_files_total 1.0" in answer.read()
    code, text = regd.exec("regd", "check", "--json")
    assert code in (0, 1), text  # it may warn of a small disk, never fail
    say("it has no rights, writes nowhere but in its volumes, and tells its metrics")


def fail_and_stop(regd: Container) -> None:
    state = regd.exec("python", "-c", "import os; print(os.environ['REGD_STATE_DIR'])")[1]
    # a daemon that hangs renews the time no longer: the test does not wait for that
    regd.kill(signal.SIGSTOP)
    regd.exec(
        "python", "-c", f"import os, time; os.utime('{state}/lock', (time.time() - 300,) * 2)"
    )
    code, text = regd.health()
    assert code == 1, text
    say(f"health of one that hangs: {text}")
    regd.kill(signal.SIGCONT)
    until(lambda: regd.health()[0] == 0, "it goes on, and is well again")
    began_at = time.monotonic()
    regd.kill(signal.SIGTERM)
    code = regd.process.wait(timeout=STOPS_WITHIN_S)
    took_s = time.monotonic() - began_at
    assert code == 0, f"exit status {code}"
    assert '"regd.stopped"' in regd.log.read_text()
    say(f"SIGTERM ends it in {took_s:.1f} s, with exit status 0")


def no_daemon(root: Path, config: dict[str, Any], folder: Path) -> None:
    """See that the health check fails beside a container whose regd does not run."""
    state = folder / "empty"
    state.mkdir()
    os.chown(state, USER, USER)
    name = f"regd-test-idle-{os.getpid()}"
    idle = Container(
        name,
        root,
        {**config, "Entrypoint": ["sleep"], "Cmd": ["60"]},
        folder,
        binds={"/var/lib/regd": state},
    )
    try:
        until(lambda: idle.exec("true")[0] == 0, "it runs")
        code, text = idle.health()
        assert code == 1, text
        say(f"health without a daemon: {text}")
    finally:
        idle.remove()


def main() -> None:
    if missing := sorted({TOOLS[tool] for tool in TOOLS if shutil.which(tool) is None}):
        sys.exit(f"this needs {', '.join(missing)}: apt install {' '.join(missing)}")
    if os.geteuid() != 0:
        sys.exit("this needs root: it makes a Debian, and containers")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # with all that is to be removed
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    tag = f"localhost/regd-test:{os.getpid()}"
    folder = CACHE / f"run-{os.getpid()}"
    folder.mkdir()
    folder.chmod(0o711)
    CACHE.chmod(0o711)  # the container's user goes through both
    container = ""
    try:
        make_base(base_name())
        build(tag)
        container = buildah("from", "--pull-never", tag)
        root = Path(buildah("mount", container))
        described = json.loads(buildah("inspect", "--type", "image", tag))
        config = described["Docker"]["config"]
        assert config["User"] == "regd"
        size = sum(f.lstat().st_size for f in root.rglob("*") if not f.is_symlink() and f.is_file())
        say(f"the image has {size / 1e6:.0f} MB")
        no_daemon(root, config, folder)
        try_out(root, config, folder)
    finally:
        if container:
            buildah("rm", container)
        names = buildah("images", "--format", "{{.Name}}:{{.Tag}}").splitlines()
        if tag in names:
            buildah("rmi", tag)
        shutil.rmtree(folder, ignore_errors=True)
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
