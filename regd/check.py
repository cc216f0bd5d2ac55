"""What `regd check` finds out: whether this rig, its settings and Alyx are as regd needs them.

A list of small checks, each on its own: one that fails, crashes or hangs is that one's cross, and
keeps no other from its answer, but for those that could say nothing without it. Nothing is changed,
here or on Alyx.
"""

from __future__ import annotations

import ipaddress
import os
import queue
import shlex
import shutil
import socket
import sqlite3
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from regd import host, mounts
from regd.alyx import AlyxClient, Contact
from regd.datasettypes import DatasetTypes, examples
from regd.errors import (
    AlyxRefused,
    InvalidPath,
    MemberNotFound,
    NeedsHuman,
    NoDatasetType,
    RegdError,
    SettingsError,
    Unauthorized,
    printable,
)
from regd.journal import FILE_NAME, Journal, asides
from regd.paths import Ignored, could_become_session, parse_session
from regd.records import DATA_FORMAT, DATASET_TYPE
from regd.registration import RegistrationClient
from regd.settings import Loaded, Settings, check_credentials, credentials_hint, load
from regd.status import is_running, report

_WITHIN_S = 10.0  # for one check
_ALL_WITHIN_S = 60.0
_ALYX_TIMEOUT_S = 3.0  # it is tried four times
_WALK_S = 6.0
_MOST_NAMES = 20_000
_MOST_SUBJECTS = 20
_HUNG = "no answer"
_SHOWN = 3  # examples in one line
_MB = 1e6
_DAY_S = 86400.0

Report = dict[str, Any]


class State(StrEnum):
    """What came of a check, from the best to the worst."""

    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        state: Whether it is as it should be.
        found: What there is, one line.
        hint: What to do, one line; '' if there is nothing to do.
    """

    state: State
    found: str
    hint: str = ""


def _ok(found: str) -> Finding:
    return Finding(State.OK, found)


def _warning(found: str, hint: str) -> Finding:
    return Finding(State.WARNING, found, hint)


def _wrong(found: str, hint: str) -> Finding:
    return Finding(State.WRONG, found, hint)


def _skipped(found: str, hint: str = "") -> Finding:
    return Finding(State.SKIPPED, found, hint)


def _after(name: str) -> Finding:
    return _skipped(f"cannot be told before this is well: {name}")


_NO_FOLDER = _after("data folder")


def _worst(findings: Sequence[Finding]) -> Finding:
    """Return several findings as one: as bad as the worst, and with what to do about that one."""
    states = list(State)
    worst = max(findings, key=lambda finding: states.index(finding.state))
    told = [f for f in findings if f.state is worst.state] if worst.state is not State.OK else []
    hints = dict.fromkeys(f.hint for f in told if f.hint)
    found = "; ".join(f.found for f in told or findings)
    return Finding(worst.state, found, "; ".join(hints))


# --- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to find out.

    Attributes:
        name: What it is about.
        look: Finds it out.
        needs: The checks without whose success this one could say nothing.
        within_s: How long it may take, in seconds.
        beside: Checks that look at the same: where one of them hangs, this one would, too.
    """

    name: str
    look: Callable[[], Finding]
    needs: tuple[str, ...] = ()
    within_s: float = _WITHIN_S
    beside: tuple[str, ...] = ()


def run(
    checks: Sequence[Check],
    *,
    all_within_s: float = _ALL_WITHIN_S,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[str, Finding]]:
    """Yield what each check found, by its name, in their order.

    Args:
        checks: Each after those that it needs.
        all_within_s: How long all may take together, in seconds.
        clock: Monotonic seconds.
    """
    ends_at = clock() + all_within_s
    states: dict[str, State] = {}
    hung = set()
    for check in checks:
        failed = [n for n in check.needs if states[n] in (State.WRONG, State.SKIPPED)]
        failed += [name for name in check.beside if name in hung]
        if failed:
            finding = _after(failed[0])
        elif (left_s := ends_at - clock()) <= 0:
            finding = _skipped("no time was left for it", "run it again")
        else:
            finding = _look(check, min(left_s, check.within_s))
            if finding.found.startswith(_HUNG):
                hung.add(check.name)
        states[check.name] = finding.state
        yield check.name, finding


def _look(check: Check, within_s: float) -> Finding:
    """Return what a check finds; it is left behind where it hangs, as on a file server's answer."""
    answer: queue.SimpleQueue[Finding] = queue.SimpleQueue()
    thread = threading.Thread(
        target=lambda: answer.put(_caught(check)), name=f"check {check.name}", daemon=True
    )
    thread.start()
    try:
        return answer.get(timeout=within_s)
    except queue.Empty:
        return _wrong(
            f"{_HUNG} within {within_s:.0f} s",
            "is a file server, a disk or the network away? Run it again",
        )


def _caught(check: Check) -> Finding:
    try:
        return check.look()
    except RegdError as error:
        return _wrong(error.reason, error.hint)
    except (OSError, sqlite3.Error, subprocess.SubprocessError) as error:
        return _wrong(printable(str(error)), "mend that, then run it again")
    except Exception as error:
        text = printable(f"{type(error).__name__}: {error}")
        return _wrong(f"the check itself failed: {text}", "report this to the makers of regd")


def report_of(findings: Sequence[tuple[str, Finding]], judged_for: str) -> Report:
    """Return all findings for a program.

    Returns:
        A dict that JSON can hold: ``status`` ('ok', 'warning' or 'wrong'), ``exit`` (0, 1 or 2, as
        monitoring plugins have it), ``judged_for`` (whose rights were looked at), ``checks`` (each
        a ``name``, ``state``, ``found`` and ``hint``).
    """
    states = {finding.state for _, finding in findings}
    code = 2 if State.WRONG in states else 1 if states - {State.OK} else 0
    return {
        "status": ("ok", "warning", "wrong")[code],
        "exit": code,
        "judged_for": judged_for,
        "checks": [
            {"name": name, "state": str(f.state), "found": f.found, "hint": f.hint}
            for name, f in findings
        ],
    }


# --- what is looked at ---------------------------------------------------------------------------


@dataclass
class _Tree:
    """What a look through the data folder has seen.

    Attributes:
        folders: How many there are.
        labs: Those that folders are named for.
        subjects: With the date of the newest session.
        names: Of files in sessions, each with one path below its session.
        is_whole: Whether all of it was seen.
    """

    folders: int = 1
    labs: set[str] = field(default_factory=set)
    subjects: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    is_whole: bool = True


class Checkup:
    """Everything that is looked at, once.

    Args:
        config: The settings file; None for none.
        unit: The service, as systemd has it; None without systemd.
        now: Seconds since 1970.
        transport: Where requests go instead of the network; for tests.
    """

    def __init__(
        self,
        config: Path | None,
        unit: host.Unit | None,
        *,
        now: Callable[[], float] = time.time,
        transport: Any = None,
    ) -> None:
        self._config = config
        self._unit = unit if unit is not None and unit.is_there else None
        self._has_systemd = unit is not None
        self._now = now
        self._transport = transport
        self._account = host.service_account(unit) or host.whoever_asks()
        self._loaded: Loaded | None = None
        self._tree: _Tree | None = None
        self._client: AlyxClient | None = None
        self._contact: Contact | None = None
        self._registration: RegistrationClient | None = None

    @property
    def judged_for(self) -> str:
        """Whose rights are looked at, and how."""
        about = [] if self._unit is None else ["as which the service runs"]
        if self._account.is_known_by_mode_alone:
            about.append("by the modes of files alone: with sudo it is exact")
        return f"{self._account.name} ({'; '.join(about)})" if about else self._account.name

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()

    def checks(self) -> list[Check]:
        """Return all checks, in an order in which they can run."""
        ours, alyx, root = ("settings",), ("settings", "Alyx"), ("data folder",)
        asked = (*alyx, "token")
        return [
            Check("settings", self._settings_are_good),
            Check("data folder", self._data_folder, ours, 2 * _WALK_S + 2),
            Check("file system", self._file_system, ours, beside=root),
            Check("inotify", self._inotify, ours, _WALK_S + 2, root),
            Check("state folder", self._state_folder, ours, beside=root),
            Check("free space", self._free_space, ours, beside=root),
            Check("service", self._service),
            Check("journal", self._journal, ("settings", "state folder"), beside=root),
            Check("Alyx", self._alyx, ours, 15),
            Check("TLS", self._tls, alyx),
            Check("clock", self._clock_is_right, alyx),
            Check("token", self._token, alyx, 15),
            Check("user", self._user, asked, 15),
            Check("may register", self._may_register, asked, 15),
            Check("repository", self._repository, asked, 15),
            Check("labs", self._labs, (*asked, "inotify"), 15),
            Check("subjects", self._subjects, (*asked, "inotify"), 15),
            Check("dataset types", self._dataset_types, asked, 15),
            Check("file names", self._file_names, (*asked, "inotify", "dataset types"), 15),
        ]

    # --- this computer ---------------------------------------------------------------------------

    def _settings_are_good(self) -> Finding:
        secrets = {}
        if self._unit is not None and "CREDENTIALS_DIRECTORY" not in os.environ:
            secrets = {n: p for n, p in self._unit.secrets.items() if os.access(p, os.R_OK)}
        try:
            loaded = load(self._config, secrets)
        except SettingsError as error:
            return _wrong("; ".join(error.mistakes), "mend that, then: regd check")
        settings = self._of_the_service(loaded)
        self._loaded = Loaded(settings, loaded.origins)
        given = sum(origin != "default" for origin in loaded.origins.values())
        where = "" if self._config is None else f" in {self._config} and beside it"
        missing = [key for key in ("data_root", "alyx.url") if loaded.origins[key] == "default"]
        if missing:
            where = str(self._config or "the settings file")
            return _wrong(f"{' and '.join(missing)} not set", f"set it in {where}")
        state, root = settings.state_dir, self._root
        if not (root.is_absolute() and state.is_absolute()):
            return _wrong("data_root and state_dir must begin with /", "write the whole path")
        return _ok(f"{given} set{where}; regd config shows them")

    def _of_the_service(self, loaded: Loaded) -> Settings:
        """Return the settings with the state folder that the service will have."""
        settings = loaded.settings
        if loaded.origins["state_dir"] == "default" and self._unit and self._unit.state_dir:
            return settings.model_copy(update={"state_dir": self._unit.state_dir})
        return settings

    @property
    def _settings(self) -> Settings:
        assert self._loaded is not None
        return self._loaded.settings

    @property
    def _root(self) -> Path:
        assert self._settings.data_root is not None
        return self._settings.data_root

    def _data_folder(self) -> Finding:
        root, who = self._root, self._account
        if not root.is_dir():
            hint = f"mount its disk, or: sudo mkdir -p {shlex.quote(str(root))}"
            return _wrong(f"{root} is no folder", hint)
        if (missing := self._without(root)) is not None:
            return _wrong(f"{who.name} may not {missing} in {root}", grant(who.name, root))
        hidden = self._unit.hides(Path(os.path.realpath(root))) if self._unit else None
        if hidden:
            return _wrong(
                f"{who.name} may write in {root}, but the service may not: {hidden}",
                f"sudo systemctl edit regd: [Service] ReadWritePaths={root}"
                + (" and ProtectHome=read-only" if "hides" in hidden else ""),
            )
        return self._below(root)

    def _without(self, folder: Path) -> str | None:
        """Return what the user may not do in a folder, or None."""
        words = {"x": "enter it or look", "r": "read", "w": "write"}
        try:
            return next(
                (w for right, w in words.items() if not self._account.may(folder, right)), None
            )
        except PermissionError:
            return words["x"]

    def _below(self, root: Path) -> Finding:
        """Look at the rights to all that is in the data folder, as the user itself would."""
        who = self._account
        if who.is_known_by_mode_alone or shutil.which("find") is None:
            return _ok(f"{root}: {who.name} may read and write there")
        closed = ["(", "!", "-readable", "-o", "!", "-writable", "-o", "!", "-executable", ")"]
        try:
            printed = who.run(
                ["find", str(root), "-type", "d", *closed, "-print0", "-prune"], _WALK_S
            )
            files = who.run(
                ["find", str(root), "-type", "f", "!", "-readable", "-print0", "-quit"], _WALK_S
            )
        except subprocess.TimeoutExpired:
            return _ok(f"{root}: {who.name} may read and write there; not all below was looked at")
        ignored = Ignored(self._settings.watch.ignore)
        paths = (*(printed or "").split("\0"), *(files or "").split("\0"))
        inner = [os.path.relpath(path, root) for path in paths if path]
        wrong = [path for path in inner if not ignored(path)]
        if wrong:
            return _warning(
                f"{who.name} may not read and write in {_listed(wrong)} below {root}",
                "flags are removed there, and files moved into revisions: " + grant(who.name, root),
            )
        return _ok(f"{root}: {who.name} may read and write there")

    def _file_system(self) -> Finding:
        if not self._root.is_dir():
            return _NO_FOLDER
        root = PurePosixPath(os.path.realpath(self._root))
        mounted = mounts.read()
        chosen = mounts.choose(self._settings.watch.observer, root, mounted)
        own = mounts.mount_of(root, mounted)
        name = str(own) if own else "unknown"
        if own is not None and own.read_only:
            return _wrong(
                f"{name} is mounted read-only",
                f"sudo mount -o remount,rw {shlex.quote(str(own.point))} (a disk with errors is "
                "mounted so: sudo dmesg)",
            )
        how = {"inotify": "the kernel tells of changes", "polling": "listings are compared"}
        found = f"{name}: {how.get(chosen.observer, 'scans alone find changes')}"
        if chosen.scans_sooner:
            sooner = "so regd scans more often" if chosen.observer == "inotify" else "so regd scans"
            return _ok(f"{name}: {chosen.reason}, {sooner} by itself")
        if chosen.observer == "none":
            return _warning(
                f"{found}, every {self._settings.scan.every_s:.0f} s",
                "set watch.observer to auto, unless that is meant",
            )
        return _ok(found)

    def _inotify(self) -> Finding:
        if not self._root.is_dir():
            return _NO_FOLDER
        tree = _look_through(self._root, Ignored(self._settings.watch.ignore), self._settings.flag)
        self._tree = tree
        shown = f"{'' if tree.is_whole else 'more than '}{tree.folders} folders"
        chosen = mounts.choose(
            self._settings.watch.observer,
            PurePosixPath(os.path.realpath(self._root)),
            mounts.read(),
        )
        if chosen.observer != "inotify":
            return _ok(f"not used here; {shown}")
        for name, limit, better in low_limits(tree.folders):
            line = f"fs.inotify.{name}={better}"
            return _warning(
                f"fs.inotify.{name} is {limit}, for {shown}: changes in some are found by scans "
                "alone",
                f"echo {line} | sudo tee /etc/sysctl.d/90-regd.conf && sudo sysctl --system",
            )
        most = _inotify_limit("max_user_watches")
        return _ok(f"{shown}, {most} watches allowed; about {max(1, tree.folders // 1000)} MB")

    def _state_folder(self) -> Finding:
        folder, root, who = self._settings.state_dir, self._root, self._account
        real = Path(os.path.realpath(folder))
        if real.is_relative_to(os.path.realpath(root)):
            return _wrong(f"{folder} is inside data_root", "name another folder in state_dir")
        there = real
        while not os.path.lexists(there):
            there = there.parent
        own = mounts.mount_of(PurePosixPath(there), mounts.read())
        if own is not None and not own.tells_all:
            return _wrong(
                f"{folder} is on a network drive ({own}): the journal cannot work there",
                "name a folder on a local disk in state_dir",
            )
        if own is not None and own.read_only:
            return _wrong(f"{folder} is on a disk that is mounted read-only ({own})", "remount it")
        made_by_systemd = self._unit is not None and real == self._unit.state_dir
        if there != real:
            if made_by_systemd or self._may(there, "wx"):
                return _ok(f"{folder} is made at the first start")
            return _wrong(
                f"{who.name} may not make {folder}",
                f"sudo install -d -o {who.name} -m 0700 {shlex.quote(str(folder))}",
            )
        status = real.stat()
        if status.st_uid != who.uid:
            return _wrong(
                f"{folder} belongs to user #{status.st_uid}, and not to {who.name}",
                f"sudo chown -R {who.name} {shlex.quote(str(folder))}",
            )
        if stat.S_IMODE(status.st_mode) & 0o077:
            return _wrong(
                f"{folder} can be reached by other users",
                f"sudo chmod 700 {shlex.quote(str(folder))}",
            )
        if not self._may(real, "rwx"):
            return _wrong(f"{who.name} may not write in {folder}", "is its disk read-only?")
        return _ok(f"{folder}{f' on {own.kind}' if own else ''}")

    def _may(self, path: Path, rights: str) -> bool:
        try:
            return self._account.may(path, rights)
        except PermissionError:
            return False

    def _free_space(self) -> Finding:
        # regd needs next to nothing beside the recordings; these need what is left there
        return _worst(
            [
                _space("state_dir", self._settings.state_dir, warn=(500 * _MB, 0), least=50 * _MB),
                _space("data_root", self._root, warn=(50e9, 0.05), least=100 * _MB),
            ]
        )

    # --- the daemon ------------------------------------------------------------------------------

    def _service(self) -> Finding:
        unit = self._unit
        if unit is None:
            return self._daemon()
        findings = []
        for path in unit.secrets.values():
            findings += _secret_file(path)
        if (
            unit.get("User")
            and host.service_account(unit) is None
            and unit.get("DynamicUser") != "yes"
        ):
            user = unit.get("User")
            findings.append(
                _wrong(f"its user {user} does not exist", f"sudo useradd --system {user}")
            )
        if not unit.is_active:
            result = unit.get("Result")
            why = f" ({result})" if result and result != "success" else ""
            hint = "sudo systemctl start regd; journalctl -u regd -n 30 says why it ended"
            findings.append(_wrong(f"it does not run: {unit.get('ActiveState')}{why}", hint))
        if unit.get("NeedDaemonReload") == "yes":
            hint = "sudo systemctl daemon-reload && sudo systemctl restart regd"
            findings.append(_warning("its files have changed since systemd read them", hint))
        if unit.get("UnitFileState") not in ("enabled", "enabled-runtime", "generated", "static"):
            findings.append(
                _warning("it is not started when the computer is", "sudo systemctl enable regd")
            )
        status = f": {unit.get('StatusText')}" if unit.get("StatusText") else ""
        return _worst(findings or [_ok(f"runs, and starts with the computer{status}")])

    def _daemon(self) -> Finding:
        """Look for a daemon that is no service of systemd."""
        findings = []
        if self._has_systemd:
            findings = [_warning("regd is not installed as a service", "sudo regd install")]
        if self._loaded is None:
            return _worst([*findings, _after("settings")])
        state_dir = self._settings.state_dir
        try:
            (state_dir / "lock").stat()
        except FileNotFoundError:
            runs = False
        except PermissionError:
            return _worst(
                [*findings, _skipped(f"{state_dir} is its user's alone", "sudo regd check")]
            )
        else:
            runs = is_running(state_dir)
        if not runs:
            findings.append(_wrong("no daemon is running", "start it: regd run"))
        return _worst(findings or [_ok("a daemon is running")])

    def _journal(self) -> Finding:
        settings = self._settings
        path = settings.state_dir / FILE_NAME
        try:
            path.stat()
        except FileNotFoundError:
            return _ok("none yet: it is made at the first start")
        except PermissionError:
            return _skipped(f"{path} is its user's alone", "sudo regd check")
        if not os.access(path, os.R_OK):
            return _skipped(f"{path} is its user's alone", "sudo regd check")
        with Journal(path, now=self._now, read_only=True) as journal:
            facts = report(settings, journal, ask_alyx=False)
            backlog = journal.fact("backlog")
        running = is_running(settings.state_dir)
        findings = []
        scanned_at = backlog.get("at") if backlog else None
        ago_s = None if scanned_at is None else self._now() - scanned_at
        if running and ago_s is not None and ago_s > 3 * settings.scan.every_s + 600:
            findings.append(_warning(f"the last whole scan was {_ago(ago_s)}", "regd status"))
        findings += [
            _warning(f"a damaged one was set aside: {aside}", "regd status")
            for aside in asides(path)
        ]
        if people := facts["needs_human"]:
            things = "1 thing needs" if people == 1 else f"{people} things need"
            findings.append(_warning(f"{things} a person", "regd status"))
        scanned = "no scan yet" if ago_s is None else f"last whole scan {_ago(ago_s)}"
        known = sum(facts["sessions"].values())
        return _worst(findings or [_ok(f"sessions known: {known}; {scanned}")])

    # --- Alyx ------------------------------------------------------------------------------------

    @property
    def _connection(self) -> AlyxClient:
        assert self._client is not None
        return self._client

    def _alyx(self) -> Finding:
        alyx = self._settings.alyx.model_copy(update={"timeout_s": _ALYX_TIMEOUT_S})
        quick = self._settings.model_copy(update={"alyx": alyx})
        self._client = AlyxClient.from_settings(
            quick, sleep=lambda _seconds: None, transport=self._transport
        )
        parts = urlsplit(self._client.base_url)
        if self._transport is None:
            try:
                socket.getaddrinfo(parts.hostname, parts.port or 443)
            except (OSError, UnicodeError) as error:
                why = getattr(error, "strerror", None) or str(error)
                return _wrong(
                    f"the name {parts.hostname} cannot be looked up: {why}",
                    "is the network up (resolvectl status), and alyx.url right?",
                )
        began_at = time.monotonic()
        try:
            self._contact = self._client.contact()
        except RegdError as error:
            hint = "is Alyx up, and does nothing in between keep requests from it?"
            return _wrong(error.reason, error.hint or hint)
        took_ms = 1000 * (time.monotonic() - began_at)
        return _ok(f"{self._client.base_url} answers as Alyx does, in {took_ms:.0f} ms")

    def _tls(self) -> Finding:
        parts = urlsplit(self._connection.base_url)
        if parts.scheme == "http":
            if _is_this_computer(parts.hostname or ""):
                return _ok("none, and none needed: Alyx is on this computer")
            return _warning(
                "none: the token goes over the network readable by others",
                "set alyx.url to the https address, if Alyx has one",
            )
        assert self._contact is not None
        until = self._contact.certificate_until
        if until is None:
            return _ok("the certificate is trusted")
        days = (until.timestamp() - self._now()) / _DAY_S
        found = f"the certificate is trusted, until {until:%Y-%m-%d}"
        if days < 30:
            return _warning(
                f"{found}: {days:.0f} days left", "have Alyx's certificate renewed in time"
            )
        return _ok(found)

    def _clock_is_right(self) -> Finding:
        sent_at = self._now()
        date = self._connection.contact().date  # over the connection that is there
        if date is None:
            return _ok("the server does not say what time it is")
        off_s = clock_offset_s(sent_at, self._now(), date.timestamp())
        hint = "sudo timedatectl set-ntp true; timedatectl shows whether it is synchronised"
        behind = "behind" if off_s < 0 else "ahead of"
        found = f"{_duration(abs(off_s))} {behind} Alyx's server"
        if abs(off_s) > 3600:
            return _wrong(f"{found}: sessions get wrong dates, certificates seem invalid", hint)
        if abs(off_s) > 5:
            return _warning(found, hint)
        return _ok("as that of Alyx's server" + (f", to {abs(off_s):.1f} s" if off_s else ""))

    def _token(self) -> Finding:
        client = self._connection
        if not client.has_credentials:
            if self._unit is not None and self._unit.secrets:
                files = ", ".join(map(str, self._unit.secrets.values()))
                if any(not os.access(path, os.R_OK) for path in self._unit.secrets.values()):
                    return _skipped(f"{files} may not be read by you", "sudo regd check")
            try:
                check_credentials(self._settings)
            except SettingsError as error:
                return _wrong(error.mistakes[0], "sudo regd install asks for the token")
        try:
            client.greet()
        except Unauthorized as error:
            return _wrong(error.reason, credentials_hint(self._settings))
        kind = "token" if self._settings.alyx.token else "password"
        return _ok(f"Alyx takes the {kind}")

    def _user(self) -> Finding:
        name = self._settings.alyx.username
        if name is None:
            return _warning(
                "alyx.username is not set: Alyx does not tell whose token it is, and names whom it "
                "is of on what is registered",
                "set alyx.username to the name of the user whose token it is",
            )
        names = [*self._settings.register.users, self._settings.register.created_by]
        asked = list(dict.fromkeys(filter(None, [name, *names])))
        for user in asked:
            try:
                self._connection.rest("users", "read", id=user)
            except MemberNotFound:
                key = "alyx.username" if user == name else "register.users or .created_by"
                return _wrong(f"Alyx has no user {user}", f"correct {key}")
        return _ok(f"{', '.join(asked)} on Alyx")

    def _may_register(self) -> Finding:
        """See whether Alyx would let this user create sessions, as far as it tells.

        A public user, who may only look, is refused even the question. For anybody else Alyx has
        no answer that is given before the first session is created.
        """
        name = self._settings.alyx.username or "the token's user"
        try:
            answer = self._connection.options("/sessions")
        except Unauthorized:
            raise
        except AlyxRefused as error:
            if error.status == 403:
                return _wrong(
                    f"{name} may only look: Alyx refuses to let it register",
                    "have Alyx's administrator make it no public user, or name another user",
                )
            return _ok("Alyx does not say")
        except MemberNotFound:
            return _ok("Alyx does not say")
        if isinstance(answer, dict) and "POST" in (answer.get("actions") or {}):
            return _ok(f"Alyx offers {name} to create sessions")
        return _ok(f"Alyx does not refuse {name}; the first session will show it")

    def _repository(self) -> Finding:
        name = self._settings.repository
        if name is None:
            return _warning(
                "repository is not set: Alyx marks every file as existing nowhere",
                "set it to the name of this disk's data repository on Alyx",
            )
        try:
            self._connection.rest("data-repository", "read", id=name)
        except MemberNotFound:
            return _wrong(
                f"Alyx has no data repository {name}", "correct repository, or create it on Alyx"
            )
        labs = [
            str(lab.get("name"))
            for lab in self._connection.pages("/labs")
            if name in (lab.get("repositories") or ())
        ]
        if not labs:
            return _warning(
                f"{name} belongs to no lab", "add it to the lab's repositories on Alyx (Labs)"
            )
        return _ok(f"{name}, of {', '.join(labs)}")

    def _labs(self) -> Finding:
        assert self._tree is not None
        if not self._tree.labs:
            return _ok("no folder is named for one: Alyx takes that of the subject")
        known = {str(lab.get("name")) for lab in self._connection.pages("/labs")}
        unknown = sorted(self._tree.labs - known)
        if unknown:
            return _wrong(
                f"Alyx has no lab {_listed(unknown)}, which a folder below data_root is named for",
                "rename the folder, or create the lab on Alyx",
            )
        return _ok(f"{_listed(sorted(self._tree.labs))} on Alyx")

    def _subjects(self) -> Finding:
        assert self._tree is not None
        newest = sorted(self._tree.subjects.items(), key=lambda pair: pair[1], reverse=True)
        if not newest:
            return _ok("no session was recorded yet")
        unknown = []
        for subject, _ in newest[:_MOST_SUBJECTS]:
            try:
                self._connection.rest("subjects", "read", id=subject)
            except MemberNotFound:
                unknown.append(subject)
        if unknown:
            return _warning(
                f"Alyx has no subject {_listed(unknown)}",
                "create it on Alyx, or rename the folder; then: regd retry --all",
            )
        looked = min(len(newest), _MOST_SUBJECTS)
        of = f"the {looked} recorded last" if looked < len(newest) else f"all {looked}"
        return _ok(f"{of} on Alyx")

    def _dataset_types(self) -> Finding:
        types = DatasetTypes(self._connection.pages("/dataset-types", form=DATASET_TYPE))
        listed = self._connection.pages("/data-formats", form=DATA_FORMAT)
        formats = [record["file_extension"] for record in listed]
        if not types.types:
            return _wrong("Alyx has none: nothing can be registered", "create them on Alyx")
        if not formats:
            return _wrong("Alyx has no data format: nothing can be registered", "create them there")
        findings = [
            _warning(
                f"{one} and {other} both fit {example}, which Alyx then refuses",
                "make their filename patterns on Alyx exclude each other",
            )
            for one, other, example in types.overlaps()
        ]
        unmatched = [*types.unmatched(), *_without_format(types, formats)]
        ignored = Ignored(self._settings.watch.ignore)
        unmatched += [
            (str(record["name"]), "watch.ignore leaves out all of its files")
            for record in types.types
            if (names := examples(record)) and all(map(ignored, names))
        ]
        findings += [
            _warning(f"{name} fits no file: {why}", "correct its filename pattern on Alyx")
            for name, why in unmatched
        ]
        if not findings:
            return _ok(f"{len(types.types)}, none in another's way; {len(formats)} data formats")
        shown = _worst(findings[:_SHOWN])
        more = len(findings) - _SHOWN
        found = f"{shown.found}; and {more} more" if more > 0 else shown.found
        return Finding(shown.state, found, shown.hint)

    def _file_names(self) -> Finding:
        assert self._tree is not None
        client = RegistrationClient(self._connection)
        reasons: dict[str, list[str]] = {}
        for name, path in self._tree.names.items():
            try:
                client.check_name(path)
            except (NoDatasetType, InvalidPath) as error:
                reasons.setdefault(_kind_of(error), []).append(name)
        if not reasons:
            return _ok(f"each has one dataset type: {len(self._tree.names)} in sessions")
        found = [f"{kind}: {_listed(sorted(names))}" for kind, names in sorted(reasons.items())]
        return _warning(
            "; ".join(found),
            "rename them, add what Alyx lacks, or name them in watch.ignore; regd status has more",
        )


# --- looks ---------------------------------------------------------------------------------------

_INOTIFY = {"max_user_watches": 1024, "max_user_instances": 8, "max_queued_events": 4096}
_INOTIFY_GOOD = {
    "max_user_watches": 524288,
    "max_user_instances": 512,
    "max_queued_events": 16384,
}


def _inotify_limit(name: str) -> int | None:
    try:
        return int(Path(f"/proc/sys/fs/inotify/{name}").read_text())
    except (OSError, ValueError):
        return None


def low_limits(folders: int) -> list[tuple[str, int, int]]:
    """Return the kernel's limits that are too low for so many folders: name, value, a better one.

    max_user_watches counts for all programs of a user, and folders are added each day.
    """
    low = []
    for name, least in _INOTIFY.items():
        needed = max(least, folders * 5 // 4 if name == "max_user_watches" else 0)
        limit = _inotify_limit(name)
        if limit is not None and limit < needed:
            low.append((name, limit, max(needed * 2, _INOTIFY_GOOD[name])))
    return low


def count_folders(root: Path) -> int:
    """Return how many folders are below one, itself included, as far as can be seen quickly."""
    return _look_through(root, Ignored(()), "").folders


def _look_through(
    root: Path, ignored: Ignored, flag: str, clock: Callable[[], float] = time.monotonic
) -> _Tree:
    """Return what is below the data folder; ends where it takes too long."""
    tree = _Tree()
    ends_at = clock() + _WALK_S
    left: list[tuple[str, tuple[str, ...], bool]] = [(str(root), (), False)]
    while left:
        folder, parts, is_ignored = left.pop()
        if clock() > ends_at:
            tree.is_whole = False
            return tree
        depth = 0
        if not is_ignored:
            depth = _note_session(tree, parts)
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue  # the data folder's check says so
        for entry in entries:
            inner = (*parts, entry.name)
            leaves_out = is_ignored or ignored("/".join(inner))
            if entry.is_dir(follow_symlinks=False):
                tree.folders += 1
                left.append((entry.path, inner, leaves_out))
            elif depth and not leaves_out and entry.name != flag and len(tree.names) < _MOST_NAMES:
                tree.names.setdefault(entry.name, "/".join(inner[depth:]))
    return tree


def _note_session(tree: _Tree, parts: tuple[str, ...]) -> int:
    """Note whose session a folder is, or lies in; return how many parts that session has."""
    for depth in (3, 5):
        try:
            session = parse_session(parts[:depth]) if len(parts) >= depth else None
        except InvalidPath:
            continue
        if session is None:
            break
        newest = tree.subjects.get(session.subject, "")
        tree.subjects[session.subject] = max(newest, session.date)
        return depth
    if len(parts) == 2 and parts[1] == "Subjects" and could_become_session(parts):
        tree.labs.add(parts[0])
    return 0


def _space(key: str, folder: Path, warn: tuple[float, float], least: float) -> Finding:
    there = folder
    while not there.exists():
        there = there.parent
    space = os.statvfs(there)
    free, total = space.f_bavail * space.f_frsize, max(1, space.f_blocks * space.f_frsize)
    found = f"{key} has {_size(free)} free"
    hint = f"make room on the disk of {folder}: sudo du -xh --max-depth=2 {shlex.quote(str(there))}"
    if space.f_files and space.f_favail < max(1000, space.f_files // 1000):
        return _wrong(f"{key} has room for {space.f_favail} more files alone (inodes)", hint)
    if free < least:
        return _wrong(found, hint)
    most_bytes, share = warn
    if free < most_bytes and (not share or free / total < share):
        return _warning(found, hint)
    return _ok(found)


def _secret_file(path: Path) -> list[Finding]:
    try:
        status = path.stat()
    except FileNotFoundError:
        hint = (
            f"put the Alyx token into it: sudo install -m 0600 /dev/null {path}; sudo nano {path}"
        )
        return [_wrong(f"{path} is not there, so the service cannot start", hint)]
    except PermissionError:
        return []
    if stat.S_IMODE(status.st_mode) & 0o007:
        return [_wrong(f"everybody may read {path}", f"sudo chmod o= {shlex.quote(str(path))}")]
    if status.st_size == 0:
        return [_wrong(f"{path} is empty", f"put the Alyx token into it: sudo nano {path}")]
    return []


def _without_format(types: DatasetTypes, formats: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the types whose pattern ends in an extension that no data format has."""
    for record in types.types:
        extension = PurePosixPath((record.get("filename_pattern") or "").strip()).suffix
        if extension and not set(extension) & set("*?[]") and extension not in formats:
            yield str(record["name"]), f"Alyx has no data format {extension}"


def _kind_of(error: NeedsHuman) -> str:
    text = error.reason
    if isinstance(error, InvalidPath):
        return "not as ALF allows"
    if text.startswith("Multiple"):
        return "two dataset types fit"
    return "no dataset type" if text.startswith("No dataset type") else "no data format"


def clock_offset_s(sent_at: float, received_at: float, date: float) -> float:
    """Return how far this computer's clock is ahead of a server's, at least; 0 if it may be right.

    Args:
        sent_at: When the request went out, by this computer's clock.
        received_at: When the answer was there.
        date: What the answer says the time was; the part of a second is cut off.
    """
    if sent_at > date + 1:
        return sent_at - (date + 1)
    return min(0.0, received_at - date)


def _is_this_computer(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def grant(user: str, folder: Path) -> str:
    """Return the command that lets a user work in a folder, and in what is made there later."""
    rights = f"u:{user}:rwX"
    return f"sudo setfacl -R -m {rights} -m d:{rights} {shlex.quote(str(folder))}"


# --- words ---------------------------------------------------------------------------------------


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(printable, names[:_SHOWN]))
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _ago(seconds: float) -> str:
    return f"{_duration(seconds)} ago"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * _DAY_S:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / _DAY_S:.0f} days"
