"""`regd install` on a computer that really booted: `make test-systemd`.

The tests are one story, told in order: installed, at work, installed again, uninstalled.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import INITIAL
from tests.rig import Lab, until
from tests.systemd.boot import SUITE
from tests.systemd.container import CACHE, VENV, Container, booted, missing, prepared, wheel

HOME = "/home/rig"
ROOT = f"{HOME}/recordings"
SESSION = f"{ROOT}/mainenlab/Subjects/ZM_1085/2026-01-31/001"
WHEEL = "alf/_ibl_wheel.position.npy"

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


class Computer:
    """An acquisition PC with regd's program on it, and nothing else of regd's."""

    def __init__(self, machine: Container, lab: Lab) -> None:
        self.machine = machine
        self.lab = lab
        self.given = f"--data-root {ROOT} --alyx-url {lab.url} --username {lab.username}"
        self.given += f" --repository {lab.repository}"

    def sh(self, script: str, user: str = "root", *, check: bool = True) -> str:
        return self.machine.run("sh", "-uc", f"umask 002; {script}", user=user, check=check)

    def checks(self) -> dict[str, str]:
        """Return what `regd check` finds, by name."""
        facts = json.loads(self.sh("regd check --json", check=False))
        assert facts["judged_for"].startswith("regd "), "rights are those of the service's user"
        return {check["name"]: check["state"] for check in facts["checks"]}

    def data(self) -> str:
        """Return all that was recorded, with its owners and hashes."""
        found = f"find {ROOT} -not -name .regd-owner"
        return self.sh(
            f"{found} -printf '%P %u %g %m\\n' | sort;{found} -type f -exec sha256sum {{}} + | sort"
        )


@pytest.fixture(scope="module")
def computer() -> Iterator[Computer]:
    root = prepared(SUITE)
    folder = Path(tempfile.mkdtemp(prefix="install-", dir=CACHE))
    try:
        for name in ("home", "wheels"):
            (folder / name).mkdir()
        wheel(folder / "wheels")
        shutil.copy(INITIAL, folder / "wheels")
        binds = {folder / "home": HOME, folder / "wheels": "/wheels"}
        with booted(root, folder / "console", binds) as machine:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                url = f"http://127.0.0.1:{free.getsockname()[1]}"
            names = ("rig_user", "rig-password", "ZM_1085", "mainenlab", "mainenlab_local")
            computer = Computer(machine, Lab(url, *names))
            _prepare(computer)
            with computer.lab.client:
                yield computer
    finally:
        shutil.rmtree(folder)


def _prepare(computer: Computer) -> None:
    computer.sh(f"{VENV}/bin/pip install -q --no-index --no-deps /wheels/*.whl")
    computer.sh(
        f"useradd --home-dir {HOME} rig; chown rig:rig {HOME}; chmod 0755 {HOME};"
        f" install -d -o rig -g rig -m 2777 {ROOT}"
    )
    port = computer.lab.url.rpartition(":")[2]
    computer.sh(
        f"systemd-run --quiet --collect --unit=alyx {VENV}/bin/regd sandbox --port {port}"
        f" --load /wheels/{INITIAL.name} --rate-limit none"
    )
    until(lambda: _answers(computer))


def _answers(computer: Computer) -> bool:
    with contextlib.suppress(Exception):
        computer.lab.client.ping()
        return True
    return False


def test_it_is_installed_starts_and_all_is_well(computer: Computer) -> None:
    token = computer.lab.client.log_in()
    install = f"{VENV}/bin/regd install {computer.given}"
    dry = computer.sh(f"{install} --dry-run", user="rig")
    assert "would do user regd" in dry
    assert computer.sh("getent passwd regd || echo none") == "none"
    said = computer.sh(f"echo {token} | {install} --token-file -", check=False)
    assert "done     the service" in said
    assert token not in dry + said
    assert computer.machine.show("regd", "ActiveState", "User", "UnitFileState") == {
        "ActiveState": "active",
        "User": "regd",
        "UnitFileState": "enabled",
    }
    assert computer.sh("stat -c '%U %a' /etc/regd/token") == "root 600"
    until(lambda: computer.checks()["journal"] == "ok")
    wrong = {name for name, state in computer.checks().items() if state in ("wrong", "skipped")}
    assert wrong == set()


def test_a_session_is_registered(computer: Computer) -> None:
    computer.sh(
        f"mkdir -p {SESSION}/alf; echo recorded > {SESSION}/{WHEEL};"
        f" touch {SESSION}/create_me.flag; chmod -R o+rwX {ROOT}/mainenlab",
        user="rig",
    )
    until(lambda: computer.lab.sessions("2026-01-31"), timeout_s=60)
    (session,) = computer.lab.sessions("2026-01-31")
    until(lambda: WHEEL in computer.lab.datasets(session["id"]), timeout_s=60)  # quiet_s is 30
    until(lambda: computer.sh(f"test -e {SESSION}/create_me.flag || echo gone") == "gone")


def test_installed_again_there_is_nothing_to_do(computer: Computer) -> None:
    pid = computer.machine.show("regd", "MainPID")
    said = computer.sh(f"regd install {computer.given}", check=False)
    assert "done " not in said
    assert computer.machine.show("regd", "MainPID") == pid


def test_uninstalled_the_data_is_as_it_was(computer: Computer) -> None:
    before = computer.data()
    assert "/etc/regd/regd.yaml" in computer.sh("regd uninstall")
    assert computer.machine.show("regd", "LoadState") == {"LoadState": "not-found"}
    assert computer.sh("ls /etc/systemd/system | grep regd || echo none") == "none"
    assert computer.sh("cat /etc/regd/token") == computer.lab.client.log_in()
    assert computer.data() == before
    computer.sh(f"{VENV}/bin/regd install", check=False)  # from what it has left
    assert computer.machine.show("regd", "ActiveState") == {"ActiveState": "active"}
    assert computer.checks()["journal"] == "ok"
    computer.sh("regd uninstall --purge")
    assert computer.sh("ls -d /etc/regd /var/lib/regd 2>/dev/null || echo none") == "none"
    assert computer.sh("getent passwd regd || echo none") == "none"
    assert computer.data() == before
