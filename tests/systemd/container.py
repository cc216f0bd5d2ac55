"""A Debian in a container that boots systemd, with regd's dependencies in it.

The folder of it is made once, by debootstrap, and kept in ~/.cache/regd; what a run changes is in
memory, and gone with it. Needs root, debootstrap and systemd-nspawn.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regd" / "systemd"
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,ca-certificates"
VENV = "/opt/regd"


def missing() -> str:
    """Return what a container cannot be booted without, or ''."""
    if os.geteuid() != 0:
        return "it needs root: sudo make test-systemd"
    tools = [
        tool for tool in ("debootstrap", "systemd-nspawn", "nsenter") if not shutil.which(tool)
    ]
    return f"install {', '.join(tools)}" if tools else ""


def prepared(suite: str) -> Path:
    """Return a root folder with regd's dependencies in `/opt/regd`, made if it is not there yet."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    needs = sorted(project["dependencies"])
    key = hashlib.blake2b(repr((PACKAGES, needs)).encode(), digest_size=6).hexdigest()
    root = CACHE / f"{suite}-{key}"
    if root.exists():
        return root
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{suite}-*"):
        shutil.rmtree(old)
    making = CACHE / f"making-{suite}"
    wheels = CACHE / f"wheels-{suite}"
    for left in (making, wheels):
        shutil.rmtree(left, ignore_errors=True)
    print(f"making {root} (some minutes, once)", flush=True)
    options = ["--variant=minbase", f"--include={PACKAGES}"]
    _do("debootstrap", *options, suite, making, _mirror())
    version = _do("chroot", making, "python3", "-c", "import sys; print(*sys.version_info[:2])")
    python = ".".join(version.split())
    only = ["--only-binary=:all:", f"--python-version={python}"]
    _do(sys.executable, "-m", "pip", "download", "-q", "-d", wheels, *only, *needs)
    _do("chroot", making, "python3", "-m", "venv", VENV)
    shutil.move(wheels, making / "wheels")
    pip = [f"{VENV}/bin/pip", "install", "-q", "--no-index", "--find-links=/wheels"]
    _do("chroot", making, *pip, *needs)
    shutil.rmtree(making / "wheels")
    making.rename(root)
    return root


def _mirror() -> str:
    """Return where this computer's apt gets Debian's packages from."""
    lines = _do("apt-get", "indextargets", "--format", "$(ORIGIN) $(SITE)", "Created-By: Packages")
    sites = [line.split(" ", 1)[1] for line in lines.splitlines() if line.startswith("Debian ")]
    if not sites:
        raise RuntimeError("apt knows no mirror of Debian: check its sources, then apt-get update")
    return sites[0]


def wheel(folder: Path) -> Path:
    """Build regd's own wheel into a folder, and return it."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"]
    _do(*pip, "-w", folder, PROJECT)
    (built,) = folder.glob("regd-*.whl")
    return built


def _do(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        words = " ".join(map(str, command))
        raise RuntimeError(f"{words}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


class Container:
    """A booted system; see `booted`."""

    def __init__(self, init: int) -> None:
        self.init = init

    def run(self, *command: object, user: str = "root", check: bool = True) -> str:
        """Run a command in it as one of its users, and return its standard output, stripped."""
        inside = ["nsenter", f"--target={self.init}", "--all"]
        inside += [
            "env",
            "--ignore-environment",
            "--chdir=/",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
        ]
        if user != "root":
            inside += ["runuser", "-u", user, "--"]
        words = [*inside, *map(str, command)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        if check and done.returncode:
            shown = " ".join(map(str, command))
            raise RuntimeError(f"{shown}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit, as `systemctl show` has them."""
        shown = self.run("systemctl", "show", unit, f"--property={','.join(properties)}")
        return dict(line.split("=", 1) for line in shown.splitlines())

    def pid_outside(self, pid: int) -> int:
        """Return the number that one of its processes has on this computer."""
        namespace = Path(f"/proc/{self.init}/ns/pid").stat()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                same = os.path.samestat((process / "ns" / "pid").stat(), namespace)
                if same and _numbers(process)[-1] == pid:
                    return int(process.name)
        raise LookupError(f"process {pid} is not there")


@contextlib.contextmanager
def booted(root: Path, console: Path, binds: dict[Path, str]) -> Iterator[Container]:
    """Boot a root folder, which stays as it is, and shut it down at the end.

    Args:
        root: From `prepared`.
        console: File that its console is written to.
        binds: Folders of this computer, and where they are in it.
    """
    options = ["--quiet", "--register=no", "--keep-unit", "--volatile=overlay", "--console=pipe"]
    options += [f"--directory={root}", "--machine=regd-test", "--settings=no"]
    options += [f"--bind={outside}:{inside}" for outside, inside in binds.items()]
    with console.open("wb") as out:
        nspawn = subprocess.Popen(
            ["systemd-nspawn", *options, "--boot"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        container = Container(_init_of(nspawn, console))
        _wait_until_up(container, console)
        yield container
    finally:
        nspawn.send_signal(signal.SIGTERM)  # an orderly shutdown
        try:
            nspawn.wait(timeout=30)
        except subprocess.TimeoutExpired:
            nspawn.kill()  # takes all that is in it
            nspawn.wait()


def _init_of(nspawn: subprocess.Popen[bytes], console: Path) -> int:
    """Return the number of the container's process 1 on this computer."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and nspawn.poll() is None:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int(_field(process, "PPid"))
                if parent == nspawn.pid and _numbers(process)[1:] == [1]:
                    return int(process.name)
        time.sleep(0.1)  # another program starts it, and nothing tells when
    raise RuntimeError(f"systemd-nspawn did not boot: {console.read_text()[-2000:]}")


def _numbers(process: Path) -> list[int]:
    """Return a process's numbers, from the outermost namespace to its own."""
    return [int(number) for number in _field(process, "NSpid").split()]


def _field(process: Path, name: str) -> str:
    lines = (process / "status").read_text().splitlines()
    return next(line.split(":", 1)[1] for line in lines if line.startswith(f"{name}:"))


def _wait_until_up(container: Container, console: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        state = container.run("systemctl", "is-system-running", check=False)
        if state in ("running", "degraded"):
            return
        time.sleep(0.2)  # it boots
    raise RuntimeError(f"it did not boot: {state}\n{console.read_text()[-3000:]}")


if __name__ == "__main__":
    if what := missing():
        sys.exit(f"a container cannot be booted here: {what}")
