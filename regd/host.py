"""The computer that the daemon runs on: its user there, and what systemd knows of its service.

Everything here only looks. What it asks other programs is given up after a few seconds.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

UNIT = "regd.service"
_WITHIN_S = 5.0
_PROPERTIES = (
    "LoadState", "ActiveState", "SubState", "UnitFileState", "User", "Group",
    "SupplementaryGroups", "DynamicUser", "ReadWritePaths", "ProtectSystem",
    "ProtectHome", "PrivateTmp", "BindPaths", "StateDirectory", "StatusText", "Result",
    "NeedDaemonReload",
)  # fmt: skip
_SECRET = re.compile(r"\s*LoadCredential\s*=")
_RIGHTS = {"r": (os.R_OK, 4), "w": (os.W_OK, 2), "x": (os.X_OK, 1)}

Run = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class Unit:
    """The service as systemd has it loaded.

    Attributes:
        properties: Of `systemctl show`.
        loaded_credentials: The values of LoadCredential=, as they are in its files.
    """

    properties: dict[str, str]
    loaded_credentials: tuple[str, ...] = ()

    def get(self, name: str) -> str:
        """Return a property, or '' if systemd does not know it."""
        return self.properties.get(name, "")

    @property
    def is_there(self) -> bool:
        """Whether it is installed."""
        return self.get("LoadState") == "loaded"

    @property
    def is_active(self) -> bool:
        """Whether it runs."""
        return self.get("ActiveState") in ("active", "reloading")

    @property
    def secrets(self) -> dict[str, Path]:
        """The files that it is handed as secrets, by the names that it knows them by."""
        named = (value.strip().partition(":") for value in self.loaded_credentials)
        return {name: Path(path) for name, _, path in named if path.startswith("/")}

    @property
    def state_dir(self) -> Path | None:
        """The folder that systemd makes for its journal."""
        named = self.get("StateDirectory").split()
        return Path("/var/lib", named[0]) if named else None

    def hides(self, folder: Path) -> str | None:
        """Return why the service cannot write in a folder that its user can; None if it can.

        Args:
            folder: Absolute and without links.
        """
        if any(folder.is_relative_to(path) for path in _paths(self.get("BindPaths"))):
            return None
        at_home = any(folder.is_relative_to(home) for home in ("/home", "/root", "/run/user"))
        if at_home and self.get("ProtectHome") in ("yes", "tmpfs"):
            return f"ProtectHome={self.get('ProtectHome')} hides it"
        if is_temporary(folder) and self.get("PrivateTmp") == "yes":
            return "PrivateTmp=yes hides it"
        strict = self.get("ProtectSystem") == "strict"
        read_only = strict or (at_home and self.get("ProtectHome") == "read-only")
        written = _paths(self.get("ReadWritePaths"))
        if read_only and not any(folder.is_relative_to(path) for path in written):
            return "ReadWritePaths= does not name it"
        return None


def is_temporary(path: Path) -> bool:
    """Say whether a path is in a folder for temporary files, of which services see their own."""
    folders = ("/tmp", "/var/tmp")  # noqa: S108 - they are looked for, not used
    return any(path.is_relative_to(folder) for folder in folders)


def _paths(text: str) -> list[str]:
    """Return the folders in a list of systemd's, such as ``-/data /srv:/srv:rbind``."""
    return [
        part.lstrip("-+").split(":")[-1 if part.count(":") == 1 else 0] for part in text.split()
    ]


def run(command: Sequence[str]) -> str:
    """Return what a program prints, or '' if it is not there, fails or takes too long."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(  # noqa: S603 - fixed programs, and no shell
            [program, *command[1:]],
            capture_output=True, text=True, timeout=_WITHIN_S, check=False,
            stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        return done.stdout
    return ""


def read_unit(run: Run = run) -> Unit | None:
    """Return the service as systemd has it, or None where systemd does not run."""
    shown = run(["systemctl", "show", UNIT, f"--property={','.join(_PROPERTIES)}"])
    properties: dict[str, str] = {}
    for line in shown.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            properties[name] = value
    if not properties.get("LoadState"):
        return None
    # `show` calls it unprintable
    files = run(["systemctl", "cat", UNIT]) if properties["LoadState"] == "loaded" else ""
    secrets = [line.partition("=")[2] for line in files.splitlines() if _SECRET.match(line)]
    return Unit(properties, tuple(secrets))


@dataclass(frozen=True)
class Account:
    """A user of this computer, and how its rights can be found out.

    Attributes:
        name: Its name.
        uid: Its number.
        gid: That of its first group.
        groups: Those of all its groups.
    """

    name: str
    uid: int
    gid: int
    groups: frozenset[int]

    @property
    def is_known_by_mode_alone(self) -> bool:
        """Whether who asks may not try as this user, so that access lists do not count."""
        return os.geteuid() not in (0, self.uid)

    def may(self, path: Path, rights: str) -> bool:
        """Say whether the user has all of some rights ('r', 'w', 'x') to a file or folder.

        Raises:
            OSError: Who asks may not even look.
        """
        status = path.stat()
        if self.uid < 0:
            return self._may_by_mode(status, rights)
        if os.geteuid() == self.uid:
            wanted = sum(_RIGHTS[right][0] for right in rights)
            return os.access(path, wanted, effective_ids=True)
        if os.geteuid() == 0:
            return all(self.run(["test", f"-{right}", str(path)]) is not None for right in rights)
        return self._may_by_mode(status, rights)

    def _may_by_mode(self, status: os.stat_result, rights: str) -> bool:
        mode = stat.S_IMODE(status.st_mode)
        digit = mode >> 6 if status.st_uid == self.uid else mode >> 3
        if status.st_uid != self.uid and status.st_gid not in self.groups:
            digit = mode
        return all(digit & _RIGHTS[right][1] for right in rights)

    def run(self, command: Sequence[str], within_s: float = _WITHIN_S) -> str | None:
        """Return what a program prints that runs as this user; None if it fails.

        Only for root, or this user itself.

        Raises:
            subprocess.TimeoutExpired: It takes too long; it is ended.
        """
        program = shutil.which(command[0])
        if program is None:
            raise FileNotFoundError(f"there is no program {command[0]}")
        as_user = {}
        if os.geteuid() != self.uid:
            as_user = {"user": self.uid, "group": self.gid, "extra_groups": sorted(self.groups)}
        done = subprocess.run(  # noqa: S603 - fixed programs, and no shell
            [program, *command[1:]],
            capture_output=True, timeout=within_s, check=False, cwd="/",
            stdin=subprocess.DEVNULL, **as_user,
        )  # type: ignore[call-overload]  # fmt: skip
        return None if done.returncode else os.fsdecode(done.stdout)


ANYBODY = Account("anybody", -1, -1, frozenset())
"""A user that owns nothing, and is in no group that does: one that is still to be made."""


def account(name: str, groups: Sequence[str] = ()) -> Account | None:
    """Return the user of that name or number, in some more groups; None if there is none."""
    try:
        found = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        return None
    numbers = set(os.getgrouplist(found.pw_name, found.pw_gid))
    for group in groups:
        with contextlib.suppress(KeyError):
            numbers.add(int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid)
    return Account(found.pw_name, found.pw_uid, found.pw_gid, frozenset(numbers))


def whoever_asks() -> Account:
    """Return the user of this very process."""
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:  # as in a container that was given any number
        name = f"#{uid}"
    return Account(name, uid, os.getegid(), frozenset(os.getgroups()))


def service_account(unit: Unit | None) -> Account | None:
    """Return the user that the service runs as; None if there is no service, or no such user."""
    if unit is None or not unit.is_there:
        return None
    groups = [*unit.get("SupplementaryGroups").split(), *unit.get("Group").split()]
    return account(unit.get("User") or "root", groups)
