"""`regd install` and `regd uninstall`: what is there, what is to be done, and doing it.

`Computer` looks and acts; `plan` and `plan_removal` decide, and touch nothing. Whatever was made is
written down in /etc/regd/installed.json, so that a second run has nothing to do, a file that a
person has changed is known as such and left alone, and nothing else is ever removed.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import pwd
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import yaml
from pydantic import ValidationError

from regd import __version__, check, host, mounts
from regd.alyx import AlyxClient
from regd.errors import NeedsHuman, SettingsError
from regd.journal import FILE_NAME
from regd.settings import AlyxSettings

FOLDER = Path("/etc/regd")
CONFIG = FOLDER / "regd.yaml"
TOKEN = FOLDER / "token"
MANIFEST = FOLDER / "installed.json"
UNIT = Path("/etc/systemd/system/regd.service")
RIG = Path("/etc/systemd/system/regd.service.d/rig.conf")
SYSCTL = Path("/etc/sysctl.d/90-regd.conf")
LINK = Path("/usr/local/bin/regd")
STATE_DIR = Path("/var/lib/regd")
_HEAD = "# Written by `regd install`; `regd uninstall` removes it.\n"

_SHARED = {"regd.yaml": "config", "regd.service": "systemd"}


def shared(name: str) -> str:
    """Return a file that comes with regd, from the installed package or from a clone."""
    package = Path(__file__).parent
    for folder in (package / "share", package.parent / _SHARED[name]):
        with contextlib.suppress(FileNotFoundError):
            return (folder / name).read_text()
    raise NeedsHuman(f"{name} is missing from this installation of regd", hint="install it again")


# --- ONE -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class One:
    """What an installation of ONE knows of Alyx.

    Attributes:
        url: The address of Alyx.
        username: Its user there; None if it has asked each time.
        token: That user's token, if ONE has kept it.
        cache_dir: The folder that ONE loads data into, and registers from.
    """

    url: str
    username: str | None
    token: str | None = field(repr=False)
    cache_dir: Path | None


def read_one(home: Path) -> One | None:
    """Return what ONE has in a home folder, or None if it was never set up there.

    The form is that of `one.params` (ONE-api 2 and 3): `.one/.caches` names the database that is
    the default, `.one/.<that>` holds its settings. They are read here, since ONE's own reader
    writes into files that lack a key.
    """
    caches = _json(home / ".one" / ".caches")
    key = caches.get("DEFAULT")
    if not isinstance(key, str) or not re.fullmatch(r"[\w.-]+", key):
        return None
    kept = _json(home / ".one" / f".{key}")
    url = kept.get("ALYX_URL")
    if not isinstance(url, str) or not url:
        return None
    username = kept.get("ALYX_LOGIN") or None
    tokens = kept.get("TOKEN")
    of_user = tokens.get(username) if isinstance(tokens, dict) else None
    token = of_user.get("token") if isinstance(of_user, dict) else None
    folders = caches.get("CLIENT_MAP")
    cache_dir = folders.get(key) if isinstance(folders, dict) else None
    return One(
        url,
        username if isinstance(username, str) else None,
        token if isinstance(token, str) and token else None,
        Path(cache_dir) if isinstance(cache_dir, str) and cache_dir else None,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def home_of_caller() -> Path:
    """Return the home folder of who called sudo, or else of this user."""
    caller = os.environ.get("SUDO_USER")
    with contextlib.suppress(KeyError):
        return Path(pwd.getpwnam(caller).pw_dir) if caller else Path.home()
    return Path.home()


# --- what is wanted ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What a person wants installed.

    Attributes:
        values: Settings by their dotted keys, of `KEYS`; those not in it stay as they are.
        token: The Alyx token, to be put in its file.
        user: The user that the service runs as; made if there is none.
        start: Whether to start the service.
    """

    values: Mapping[str, str]
    token: str | None = field(default=None, repr=False)
    user: str = "regd"
    start: bool = True


KEYS = ("data_root", "alyx.url", "alyx.username", "repository")
"""The settings that differ from rig to rig."""
_QUESTIONS = {
    "data_root": "Folder that the recordings are written below",
    "alyx.url": "Address of Alyx",
    "alyx.username": "Alyx user that regd works as",
    "repository": "Alyx name of this disk's data repository (empty for none)",
}


class Asker(Protocol):
    """A person at a terminal."""

    def ask(self, question: str, default: str) -> str:
        """Return the answer to a question."""

    def confirm(self, question: str) -> bool:
        """Return whether the answer is yes."""

    def secret(self, question: str) -> str:
        """Return an answer that is not shown."""


def gather(
    given: Mapping[str, str | None],
    token: str | None,
    held: Mapping[str, str],
    has_token: bool,
    one: One | None,
    asker: Asker | None,
    *,
    from_one: bool = False,
    log_in: Callable[[str, str, str], str] | None = None,
) -> tuple[dict[str, str], str | None]:
    """Return the settings that are wanted, and the token if one is to be put in its file.

    What is given goes over what is set already, that over what ONE has, and what is missing then
    is asked for.

    Args:
        given: By the keys of `KEYS`; None where it was not given.
        token: The token that was given.
        held: What is set already.
        has_token: Whether a token is there already.
        one: What ONE has on this computer.
        asker: Who can be asked, if anybody can.
        from_one: Whether to take over what ONE has without asking.
        log_in: Returns the token for an address, a user and a password.

    Raises:
        SettingsError: Something is missing or wrong.
    """
    values = {**held, **{key: value for key, value in given.items() if value}}
    if one is not None and (
        from_one or ("alyx.url" not in values and asker is not None and asker.confirm(_offer(one)))
    ):
        values.setdefault("alyx.url", one.url)
        # what is of one Alyx goes to no other
        is_its = values["alyx.url"].rstrip("/") == one.url.rstrip("/")
        if is_its and one.username:
            values.setdefault("alyx.username", one.username)
        is_missing = token is None and not has_token and one.username == values.get("alyx.username")
        if (
            is_its
            and is_missing
            and one.token
            and (from_one or (asker and asker.confirm("Take over the token that ONE has, too?")))
        ):
            token = one.token
    if asker is not None:
        for key in KEYS:
            if not values.get(key):
                default = str(one.cache_dir or "") if one and key == "data_root" else ""
                if answer := asker.ask(_QUESTIONS[key], default).strip():
                    values[key] = answer
    check_values(values)
    if token is None and not has_token and asker is not None:
        token = _ask_token(values, asker, log_in or fetch_token)
    return values, token


def _offer(one: One) -> str:
    user = f" as {one.username}" if one.username else ""
    return f"ONE on this computer uses {one.url}{user}. Take that over?"


def _ask_token(
    values: Mapping[str, str], asker: Asker, log_in: Callable[[str, str, str], str]
) -> str | None:
    user = values.get("alyx.username")
    of = f" of {user}" if user else ""
    if token := asker.secret(f"Alyx token{of} (empty: to get it with the password)").strip():
        return token
    if not user or not (password := asker.secret(f"Alyx password{of} (empty: later)")):
        return None
    return log_in(values["alyx.url"], user, password)


def fetch_token(url: str, username: str, password: str) -> str:
    """Return the token that Alyx has for a user.

    Raises:
        RegdError: It has none for that password, or does not answer.
    """
    with AlyxClient(url, username, password, timeout_s=10) as client:
        return client.log_in()


def settings_in(text: str | None) -> dict[str, str]:
    """Return those of `KEYS` that a settings file sets."""
    try:
        held = yaml.safe_load(text or "")
    except yaml.YAMLError:
        return {}
    held = held if isinstance(held, dict) else {}
    alyx = held.get("alyx") if isinstance(held.get("alyx"), dict) else {}
    flat = {**held, **{f"alyx.{key}": value for key, value in (alyx or {}).items()}}
    return {key: str(flat[key]) for key in KEYS if flat.get(key)}


def check_values(values: Mapping[str, str]) -> None:
    """See that the settings can be used.

    Raises:
        SettingsError: One is missing or wrong.
    """
    options = {"data_root": "--data-root", "alyx.url": "--alyx-url"}
    missing = [
        f"{key} is missing: give it with {options[key]}" for key in options if not values.get(key)
    ]
    if missing:
        raise SettingsError(missing)
    if not Path(values["data_root"]).is_absolute():
        raise SettingsError([f"data_root must begin with /, not {values['data_root']}"])
    try:
        AlyxSettings(url=values["alyx.url"])
    except ValidationError as error:
        (detail,) = error.errors(include_url=False)
        raise SettingsError(
            [f"alyx.url {detail['ctx']['error']}, not {values['alyx.url']}"]
        ) from None


def settings_file(template: str, values: Mapping[str, str]) -> str:
    """Return the example of the settings file with some values put in."""
    text = template
    for key, value in values.items():
        section, dot, leaf = key.partition(".")
        indent, name = ("  ", leaf) if dot else ("", section)
        written = yaml.safe_dump(value, allow_unicode=True, width=10**6).removesuffix("\n...\n")
        line = f"{indent}{name}: {written.strip()}".replace("\\", r"\\")
        text = re.sub(rf"(?m)^{indent}{name}:.*$", line, text, count=1)
    return text


def unit_file(template: str, program: Path) -> str:
    """Return the unit with that program started."""
    # a path is one word of systemd's, and in it % begins a specifier
    return re.sub(
        r"(?m)^ExecStart=\S+", lambda _: f"ExecStart={_word(str(program))}", template, count=1
    )


def rig_file(user: str, data_root: str, mount: str | None) -> str:
    """Return what is this rig's own in the service, beside the unit.

    Args:
        user: Whom it runs as.
        data_root: What it may write in.
        mount: Where the disk of it is mounted, if it is not the system's.
    """
    lines = [_HEAD.rstrip()]
    if mount is not None:
        lines += ["[Unit]", f"RequiresMountsFor={_word(data_root)}", ""]
    lines += ["[Service]", f"User={user}"]
    lines += [
        "# in place of the unit's own",
        "ReadWritePaths=",
        f"ReadWritePaths={_word(data_root)}",
    ]
    return "\n".join(lines) + "\n"


def _word(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"' if re.search(r"""[\s"'\\]""", text) else escaped


# --- what is there -------------------------------------------------------------------------------


_UNREAD = "\0"  # stands for a token that this user may not read


@dataclass(frozen=True)
class Seen:
    """What is there before anything is done.

    Attributes:
        files: The content of those of regd's files that there are; of a link, where it leads.
        token: What the token's file holds; None without one.
        folder: Whether there is /etc/regd.
        made: By path, the SHA-256 of what an earlier run has written there.
        user: Whether there is the user that is wanted.
        unit: The service as systemd has it; None where systemd does not run.
        mount: Where the data folder's disk is mounted, if it is not the system's.
        may_write: Whether the user may write in the data folder; None if that cannot be told.
        limits: The kernel's limits that are too low for the data folder, as they should be.
        obstacles: What keeps the service from working at all, each with what to do.
    """

    files: Mapping[Path, str]
    token: str | None = field(repr=False)
    folder: bool
    made: Mapping[str, str]
    user: bool
    unit: host.Unit | None
    mount: str | None = None
    may_write: bool | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    obstacles: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Command:
    """A program to run."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class NewUser:
    """A user to make."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Write:
    """A file to put in place."""

    path: Path
    content: str = field(repr=False)
    mode: int = 0o644


@dataclass(frozen=True)
class Link:
    """A symbolic link to put in place."""

    path: Path
    target: Path


@dataclass(frozen=True)
class Remove:
    """A file to remove."""

    path: Path


@dataclass(frozen=True)
class MakeFolder:
    """A folder to make."""

    path: Path


@dataclass(frozen=True)
class RemoveFolder:
    """A folder to remove if nothing is in it, after what fits the patterns was removed from it."""

    path: Path
    patterns: tuple[str, ...] = ()


Action = Command | NewUser | Write | Link | Remove | MakeFolder | RemoveFolder


def describe(action: Action) -> str:
    """Return what an action is, for who asks before it is done."""
    match action:
        case Command(words) | NewUser(_, words):
            return shlex.join(words)
        case Write(_, _, mode):
            return f"a file, mode {mode:04o}"
        case Link():
            return "a link"
        case MakeFolder():
            return "a folder, mode 0755"
        case Remove():
            return "removed"
        case RemoveFolder(_, patterns):
            of_regd = f"{', '.join(patterns)} removed, and the folder " if patterns else "removed "
            return f"{of_regd}if nothing else is in it"


@dataclass(frozen=True)
class Step:
    """One thing of a plan.

    Attributes:
        what: What it is about, such as 'user regd'.
        action: What is to be done; None for nothing.
        note: Why nothing is done, or what is to be done by hand.
        by_hand: Whether a person has to do it.
        shown: What a dry run prints of a file: all of it, or what changes.
    """

    what: str
    action: Action | None = None
    note: str = ""
    by_hand: bool = False
    shown: str = ""


# --- the plan ------------------------------------------------------------------------------------


def plan(wanted: Wanted, seen: Seen, *, program: Path, root: Path = Path("/")) -> list[Step]:
    """Return all that `regd install` has to do, in order.

    Args:
        wanted: What is wanted; its values complete.
        seen: What is there.
        program: The regd that the service starts.
        root: What stands for / in an image that is being made; there nothing is started.
    """
    below = () if root == Path("/") else (f"--root={root}",)
    data_root = wanted.values["data_root"]
    steps = [
        _user(wanted, seen, below),
        Step(str(FOLDER), None if seen.folder else MakeFolder(FOLDER), "is there"),
        *_settings(wanted, seen),
        _token(wanted, seen),
        *_own_file(UNIT, unit_file(shared("regd.service"), program), seen),
        *_own_file(RIG, rig_file(wanted.user, data_root, seen.mount), seen),
        *_link(program, seen),
    ]
    if seen.limits and not below:
        lines = [f"{name}={value}" for name, value in seen.limits.items()]
        steps += _own_file(SYSCTL, "".join([_HEAD, *(f"{line}\n" for line in lines)]), seen)
        steps.append(Step("the kernel's limits", Command(("sysctl", "-q", "-w", *lines))))
    if seen.may_write is False:
        hint = f"{wanted.user} may not write there: {check.grant(wanted.user, Path(data_root))}"
        steps.append(Step(f"rights in {data_root}", note=hint, by_hand=True))
    return [*steps, *_service(wanted, seen, steps, below)]


def _user(wanted: Wanted, seen: Seen, below: tuple[str, ...]) -> Step:
    what = f"user {wanted.user}"
    if seen.user:
        return Step(what, note="is there")
    words = ("useradd", *below, "--system", "--user-group", "--no-create-home")
    words += ("--home-dir", str(STATE_DIR), "--shell", "/usr/sbin/nologin", wanted.user)
    return Step(what, NewUser(wanted.user, words))


def _settings(wanted: Wanted, seen: Seen) -> list[Step]:
    there = seen.files.get(CONFIG)
    held = settings_in(there)
    if there is not None and all(held.get(key) == value for key, value in wanted.values.items()):
        return [Step(str(CONFIG), note="is as wanted")]
    values = {**held, **wanted.values}
    return _own_file(CONFIG, settings_file(shared("regd.yaml"), values), seen)


def _token(wanted: Wanted, seen: Seen) -> Step:
    what = str(TOKEN)
    if wanted.token is None and seen.token:
        return Step(what, note="is there")
    if wanted.token is None:  # the service does not start without the file
        make = Write(TOKEN, "", 0o600) if seen.token is None else None
        return Step(what, make, _ADD_TOKEN, by_hand=True, shown="(nothing yet)")
    if (seen.token or "").strip() == wanted.token:
        return Step(what, note="holds that token")
    return Step(what, Write(TOKEN, f"{wanted.token}\n", 0o600), shown="(the token)")


_ADD_TOKEN = f"put the Alyx token into it (sudo nano {TOKEN}), then: sudo systemctl restart regd"


def _own_file(path: Path, content: str, seen: Seen) -> list[Step]:
    """Return how a file comes about that a person may have changed since."""
    what, there = str(path), seen.files.get(path)
    if there == content:
        return [Step(what, note="is as wanted")]
    if there is None:
        return [Step(what, Write(path, content), shown=content)]
    shown = _difference(path, there, content)
    if seen.made.get(what) == digest(there):
        return [Step(what, Write(path, content), shown=shown)]
    beside = path.with_name(f"{path.name}.new")
    kept = Step(what, note=f"stays: a person has changed it; as regd would have it: {beside}")
    if seen.files.get(beside) == content:
        return [kept]
    return [kept, Step(str(beside), Write(beside, content), shown=shown)]


def _link(program: Path, seen: Seen) -> Iterator[Step]:
    """Yield what lets people type `regd`, unless it is found already."""
    there, target = seen.files.get(LINK), f"{_LINKED}{program}"
    if there == target:
        yield Step(str(LINK), note="is as wanted")
    elif there is None or seen.made.get(str(LINK)) == digest(there):
        yield Step(str(LINK), Link(LINK, program), shown=target)
    else:
        yield Step(str(LINK), note=f"stays: it is another; type {program}")


def _difference(path: Path, old: str, new: str) -> str:
    before, after = (text.splitlines(keepends=True) for text in (old, new))
    return "".join(difflib.unified_diff(before, after, str(path), f"{path} (new)", n=1))


def _service(
    wanted: Wanted, seen: Seen, steps: Sequence[Step], below: tuple[str, ...]
) -> Iterator[Step]:
    written = {step.action.path for step in steps if isinstance(step.action, Write)}
    enable = Command(("systemctl", *below, "enable", host.UNIT))
    if below:
        yield Step("start with the computer", enable)
        return
    unit = seen.unit if seen.unit is not None and seen.unit.is_there else None
    is_stale = unit is None or unit.get("NeedDaemonReload") == "yes"
    if is_stale or {UNIT, RIG} & written:
        yield Step("systemd reads its files", Command(("systemctl", "daemon-reload")))
    is_enabled = unit is not None and unit.get("UnitFileState") == "enabled"
    yield Step("start with the computer", None if is_enabled else enable, "is set")
    is_active = unit is not None and unit.is_active
    if is_active and not {UNIT, RIG, CONFIG, TOKEN} & written:
        yield Step("the service", note="runs")
    elif not wanted.start:
        yield Step("the service", note="start it: sudo systemctl restart regd", by_hand=True)
    elif wanted.token is None and not seen.token:
        yield Step("the service", note="is to be started when the token is there")
    else:
        verb = "restart" if is_active else "start"
        yield Step("the service", Command(("systemctl", verb, host.UNIT)))


def plan_removal(seen: Seen, *, purge: bool, user: str | None) -> list[Step]:
    """Return all that `regd uninstall` has to do, in order. Data is no part of it.

    Args:
        seen: What is there.
        purge: Whether settings, token, journal and user go, too.
        user: The user that was made, if one was.
    """
    steps = []
    if seen.unit is not None and seen.unit.is_there:
        stop = Command(("systemctl", "disable", "--now", host.UNIT))
        steps.append(Step("the service stops", stop))
    for path in (RIG, UNIT, SYSCTL, LINK):
        steps += _removal(path, seen)
    steps.append(Step(str(RIG.parent), RemoveFolder(RIG.parent)))
    if seen.unit is not None:
        steps.append(Step("systemd reads its files", Command(("systemctl", "daemon-reload"))))
    if not purge:
        kept = [str(path) for path in (CONFIG, TOKEN) if path in seen.files or path == TOKEN]
        note = "stay, and the journal and the user with them; --purge removes these, too"
        return [*steps, Step(", ".join(kept), note=note)]
    steps += [Step(str(path), Remove(path)) for path in (CONFIG, TOKEN)]
    steps.append(Step(f"{STATE_DIR}, the journal", RemoveFolder(STATE_DIR, _STATE)))
    if user is not None:
        steps.append(Step(f"user {user}", Command(("userdel", user))))
    return [*steps, Step(str(FOLDER), RemoveFolder(FOLDER, (MANIFEST.name,)))]


_STATE = (f"{FILE_NAME}*", "lock", "identity")  # what regd keeps in its state folder
_LINKED = "-> "


def _removal(path: Path, seen: Seen) -> Iterator[Step]:
    there, made = seen.files.get(path), seen.made.get(str(path))
    if there is None:
        return
    if made == digest(there):
        yield Step(str(path), Remove(path))
    else:
        why = "a person has changed it" if made else "regd install has not made it"
        yield Step(str(path), note=f"stays: {why}")


def digest(text: str) -> str:
    """Return the SHA-256 of a file's content."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


# --- looking and doing ---------------------------------------------------------------------------

Run = Callable[[Sequence[str]], None]


def run(command: Sequence[str]) -> None:
    """Run a program to its end.

    Raises:
        NeedsHuman: It fails, or is not there.
    """
    try:
        done = subprocess.run(  # noqa: S603 - fixed programs, and no shell
            list(command), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise NeedsHuman(f"{command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise NeedsHuman(f"{shlex.join(command)} ended with {done.returncode}: {said}")


class Computer:
    """The computer, or a folder that stands for one.

    Args:
        root: What stands for /.
        run: Runs a program that changes something; raises NeedsHuman if it fails.
        ask: Runs one that tells something, and returns what it prints.

    Attributes:
        user_made: The user that `regd install` has made; None if it has made none.
    """

    def __init__(self, root: Path = Path("/"), run: Run = run, ask: host.Run = host.run) -> None:
        self.root = root
        self._run = run
        self._ask = ask
        manifest = _json(self._at(MANIFEST))
        self._made: dict[str, str] = dict(manifest.get("files") or {})
        self.user_made: str | None = manifest.get("user")

    @property
    def is_image(self) -> bool:
        """Whether it is a folder, in which nothing runs."""
        return self.root != Path("/")

    @property
    def was_installed(self) -> bool:
        """Whether `regd install` was here."""
        return self._at(MANIFEST).exists()

    def _at(self, path: Path) -> Path:
        return self.root / path.relative_to("/")

    def read(self, path: Path) -> str | None:
        """Return the content of a file, or None if there is none, or it may not be read."""
        try:
            if self._at(path).is_symlink():
                return f"{_LINKED}{self._at(path).readlink()}"
            return self._at(path).read_text(errors="surrogateescape")
        except (FileNotFoundError, PermissionError):
            return None

    def look(self, user: str, data_root: str | None = None, program: Path | None = None) -> Seen:
        """Return what is there.

        Args:
            user: Whom the service is to run as.
            data_root: The data folder; None where it does not matter.
            program: The regd that the service is to start; None where it does not matter.
        """
        own = (CONFIG, UNIT, RIG, SYSCTL, LINK)
        both = (each for path in own for each in (path, path.with_name(f"{path.name}.new")))
        account = self._account(user)
        seen = Seen(
            files={path: content for path in both if (content := self.read(path)) is not None},
            token=self._token(),
            folder=self._at(FOLDER).is_dir(),
            made=self._made,
            user=account is not None,
            unit=None if self.is_image else host.read_unit(self._ask),
        )
        if data_root is None or program is None or self.is_image:
            return seen
        obstacles = [*_obstacles(account, user, program), *_of_data(data_root)]
        if seen.unit is None:
            hint = "start `regd run` with what starts services here, as the Dockerfile does"
            obstacles.append(("systemd does not run here", hint))
        return replace(
            seen,
            mount=_mount(data_root),
            may_write=_may_write(account, data_root),
            limits=_low_limits(data_root),
            obstacles=obstacles,
        )

    def _token(self) -> str | None:
        try:
            return self._at(TOKEN).read_text()
        except FileNotFoundError:
            return None
        except PermissionError:
            return _UNREAD

    def _account(self, user: str) -> host.Account | None:
        if self.root == Path("/"):
            return host.account(user)
        for line in (self.read(Path("/etc/passwd")) or "").splitlines():
            name, *fields = line.split(":")
            if name == user and len(fields) >= 3:
                return host.Account(name, int(fields[1]), int(fields[2]), frozenset())
        return None

    def do(self, action: Action) -> None:
        """Do one thing of a plan, and write down what was made.

        Raises:
            NeedsHuman: A program fails.
            OSError: The disk refuses.
        """
        match action:
            case Command(words):
                self._run(words)
                return
            case NewUser(name, words):
                self._run(words)
                self.user_made = name
            case Write(path, content, mode):
                self._write(path, content, mode)
                if path != TOKEN:
                    self._made[str(path)] = digest(content)
            case Link(path, target):
                self._at(path).parent.mkdir(parents=True, exist_ok=True)
                self._at(path).unlink(missing_ok=True)
                self._at(path).symlink_to(target)
                self._made[str(path)] = digest(f"{_LINKED}{target}")
            case Remove(path):
                self._at(path).unlink(missing_ok=True)
                self._made.pop(str(path), None)
            case MakeFolder(path):
                self._at(path).mkdir(parents=True, exist_ok=True)
                self._at(path).chmod(0o755)  # whatever root's umask is: the service reads there
            case RemoveFolder(path, patterns):
                for file in (f for pattern in patterns for f in self._at(path).glob(pattern)):
                    file.unlink()
                with contextlib.suppress(OSError):  # something of somebody else's is in it
                    self._at(path).rmdir()
                if path == FOLDER:
                    return
        if self._made or self.user_made or self.was_installed:
            held = {"version": __version__, "user": self.user_made, "files": self._made}
            self._write(MANIFEST, json.dumps(held, indent=2) + "\n", 0o644)

    def _write(self, path: Path, content: str, mode: int) -> None:
        """Put a file in place, whole or not at all."""
        target = self._at(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.regd")
        part.unlink(missing_ok=True)
        # its mode before its content: it may be a secret
        number = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(number, "w", errors="surrogateescape") as file:
            os.fchmod(number, mode)
            file.write(content)
            file.flush()
            os.fsync(number)
        part.rename(target)


def program_of_this() -> Path:
    """Return the regd that runs now, to be started by the service."""
    beside = Path(sys.executable).parent / "regd"
    return beside if beside.exists() else Path(sys.argv[0]).absolute()


def _mount(data_root: str) -> str | None:
    found = mounts.mount_of(PurePosixPath(os.path.realpath(data_root)), mounts.read())
    return None if found is None or str(found.point) == "/" else str(found.point)


def _may_write(account: host.Account | None, data_root: str) -> bool | None:
    try:
        return (account or host.ANYBODY).may(Path(data_root), "rwx")
    except OSError:
        return None


def _low_limits(data_root: str) -> dict[str, int]:
    folders = check.count_folders(Path(data_root))
    return {f"fs.inotify.{name}": better for name, _, better in check.low_limits(folders)}


def _of_data(data_root: str) -> Iterator[tuple[str, str]]:
    if not os.path.isdir(data_root):  # noqa: PTH112  # Path.is_dir raises if it may not look
        yield f"{data_root} is no folder", "mount its disk, or make it"
    elif host.is_temporary(Path(os.path.realpath(data_root))):
        yield f"{data_root} is in a folder for temporary files", "record somewhere else"


def _obstacles(account: host.Account | None, user: str, program: Path) -> Iterator[tuple[str, str]]:
    """Yield what keeps a user from starting regd where it is installed."""
    hint = "install it where all may read: sudo python3 -m venv /opt/regd"
    if host.is_temporary(program.resolve()):
        yield f"{program} is in a folder for temporary files, which services do not see", hint
    needed = {program, Path(sys.executable).resolve(), Path(__file__).parent}
    for path in sorted(needed):
        folder = next((f for f in reversed(path.parents) if not _may_enter(account, f)), None)
        if folder is not None:
            yield f"{user} could not start {program}: it may not enter {folder}", hint
            return


def _may_enter(account: host.Account | None, folder: Path) -> bool:
    try:
        return (account or host.ANYBODY).may(folder, "x")
    except OSError:
        return False
