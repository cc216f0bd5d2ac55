"""`regd install` and `regd uninstall`: what they plan, do, keep, and take over."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import one.params
import pytest

from regd import host, install, settings
from regd.errors import NeedsHuman, SettingsError
from regd.install import (
    CONFIG,
    FOLDER,
    LINK,
    MANIFEST,
    RIG,
    STATE_DIR,
    SYSCTL,
    TOKEN,
    UNIT,
    Command,
    Computer,
    NewUser,
    One,
    Step,
    Wanted,
)
from tests.rig import Lab, write

PROJECT = Path(__file__).parents[1]
PROGRAM = Path("/opt/regd/bin/regd")
SECRET = "0123456789abcdef0123456789abcdef01234567"
VALUES = {
    "data_root": "/data/recordings",
    "alyx.url": "https://alyx.example.org",
    "alyx.username": "rig_user",
    "repository": "mainenlab_local",
}


class Pretend(Computer):
    """A computer with systemd, of which nothing is real but its files, below a folder."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, self.note, self.show)
        self.ran: list[str] = []
        self.fails = ""
        self.enabled = self.active = False
        self.read_at = 0.0  # when systemd has read its files
        self.limits: dict[str, int] = {}
        self.may_write = True
        passwd = root / "etc/passwd"
        if not passwd.exists():
            write(passwd, b"root:x:0:0::/root:/bin/sh\nrig:x:1000:1000::/home/rig:/bin/sh\n")

    @property
    def is_image(self) -> bool:
        return False

    def note(self, command: Sequence[str]) -> None:
        line = " ".join(command)
        if self.fails and self.fails in line:
            raise NeedsHuman(f"{line} ended with 1: as the test wishes")
        self.ran.append(line)
        match command:
            case ["useradd", *_, name]:
                with (self.root / "etc/passwd").open("a") as file:
                    file.write(f"{name}:x:999:999::/:/bin/false\n")
            case ["systemctl", "daemon-reload"]:
                self.read_at = self.newest()
            case ["systemctl", "enable", _]:
                self.enabled = True
            case ["systemctl", "start" | "restart", _]:
                self.active = True
            case ["systemctl", "disable", "--now", _]:
                self.enabled = self.active = False

    def newest(self) -> float:
        there = [path for path in (self.at(UNIT), self.at(RIG)) if path.exists()]
        return max((path.stat().st_mtime for path in there), default=0.0)

    def show(self, command: Sequence[str]) -> str:
        if command[:2] == ["systemctl", "cat"]:
            return self.at(UNIT).read_text() + self.at(RIG).read_text()
        assert command[:2] == ["systemctl", "show"]
        there = self.at(UNIT).exists()
        return (
            f"NeedDaemonReload={'yes' if self.newest() > self.read_at else 'no'}\n"
            f"LoadState={'loaded' if there else 'not-found'}\n"
            f"ActiveState={'active' if self.active else 'inactive'}\n"
            f"UnitFileState={'enabled' if self.enabled else 'disabled'}\n"
        )

    def at(self, path: Path) -> Path:
        return self.root / path.relative_to("/")

    def plan(self, token: str | None = SECRET, **changed: Any) -> list[Step]:
        values = {**VALUES, **changed.pop("values", {})}
        wanted = Wanted(values, token, **changed)
        seen = self.look(wanted.user)
        seen = install.replace(seen, limits=self.limits, may_write=self.may_write)
        return install.plan(wanted, seen, program=PROGRAM)

    def install(self, token: str | None = SECRET, **changed: Any) -> list[str]:
        """Do all of it, and return what was not kept."""
        done = []
        self.ran = []
        for step in self.plan(token, **changed):
            if step.action is not None:
                self.do(step.action)
                done.append(step.what)
        return done

    def uninstall(self, *, purge: bool = False) -> list[Step]:
        seen = self.look(self.user_made or "regd")
        steps = install.plan_removal(seen, purge=purge, user=self.user_made)
        for step in steps:
            if step.action is not None:
                self.do(step.action)
        return steps


@pytest.fixture
def computer(tmp_path: Path) -> Pretend:
    return Pretend(tmp_path / "root")


def files_below(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes(),
        )
        for path in folder.rglob("*")
        if not path.is_dir()
    }


# --- installing ----------------------------------------------------------------------------------


def test_all_is_put_in_place_and_a_second_run_has_nothing_to_do(computer: Pretend) -> None:
    computer.install()
    assert computer.ran == [
        "useradd --system --user-group --no-create-home --home-dir /var/lib/regd"
        " --shell /usr/sbin/nologin regd",
        "systemctl daemon-reload",
        "systemctl enable regd.service",
        "systemctl start regd.service",
    ]
    for path, mode in ((CONFIG, 0o644), (TOKEN, 0o600), (UNIT, 0o644), (RIG, 0o644)):
        assert stat.S_IMODE(computer.at(path).stat().st_mode) == mode
    assert computer.at(TOKEN).read_text() == f"{SECRET}\n"
    assert computer.at(LINK).readlink() == PROGRAM
    loaded = settings.load(computer.at(CONFIG)).settings
    assert str(loaded.data_root) == VALUES["data_root"]
    assert (loaded.alyx.url, loaded.alyx.username) == (VALUES["alyx.url"], VALUES["alyx.username"])
    assert loaded.repository == VALUES["repository"]
    rig = computer.at(RIG).read_text()
    assert "\nUser=regd\n" in rig
    assert rig.endswith("\nReadWritePaths=\nReadWritePaths=/data/recordings\n")
    assert (
        f"\nExecStart={PROGRAM} run --config /etc/regd/regd.yaml\n" in computer.at(UNIT).read_text()
    )
    before = files_below(computer.root)
    assert Pretend(computer.root).plan(token=None)[0].note == "is there"
    again = Pretend(computer.root)
    again.enabled, again.active, again.read_at = True, True, computer.read_at
    assert again.install() == again.install(token=None) == []
    assert files_below(computer.root) == before


def test_the_service_can_read_its_settings_whatever_roots_umask_is(computer: Pretend) -> None:
    before = os.umask(0o077)
    try:
        computer.install()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(computer.at(path).stat().st_mode) for path in (FOLDER, CONFIG, TOKEN)]
    assert modes == [0o755, 0o644, 0o600]


def test_the_token_is_told_nowhere(computer: Pretend) -> None:
    steps = computer.plan()
    assert SECRET not in repr(steps)
    assert SECRET not in "".join(step.shown + step.note for step in steps)
    computer.install()
    held = {
        path
        for path, (_, content) in files_below(computer.root).items()
        if SECRET.encode() in content
    }
    assert held == {"etc/regd/token"}
    assert SECRET not in repr(Wanted(VALUES, SECRET))
    assert SECRET not in repr(One("https://x", "a", SECRET, None))


def test_what_a_person_has_changed_is_left_alone(computer: Pretend) -> None:
    computer.install()
    config, unit = computer.at(CONFIG), computer.at(UNIT)
    by_hand = config.read_text().replace("workers: 4", "workers: 2")
    config.write_text(by_hand)
    unit.write_text(unit.read_text() + "# mine\n")
    computer.note(["systemctl", "daemon-reload"])
    assert computer.install(token=None) == [f"{UNIT}.new"], "its values are as wanted: it stays"
    done = computer.install(token=None, values={"repository": "another"})
    assert done == [f"{CONFIG}.new"]
    assert config.read_text() == by_hand
    assert unit.read_text().endswith("# mine\n")
    assert "another" in computer.at(CONFIG).with_name("regd.yaml.new").read_text()
    assert computer.install(token=None, values={"repository": "another"}) == []


def test_what_nobody_has_changed_is_brought_up_to_date(
    computer: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    computer.install()
    assert computer.install(values={"repository": "another"}) == [str(CONFIG), "the service"]
    assert computer.ran == ["systemctl restart regd.service"]
    shared = install.shared
    monkeypatch.setattr(install, "shared", lambda name: shared(name) + "\n# newer\n")
    done = computer.install(values={"repository": "another"})
    assert done == [str(UNIT), "systemd reads its files", "the service"]
    assert computer.install(SECRET[::-1], values={"repository": "another"}) == [
        str(TOKEN),
        "the service",
    ]


@pytest.mark.parametrize("fails", ["useradd", "daemon-reload", "enable", "start"])
def test_after_a_failure_in_the_middle_it_goes_on(computer: Pretend, fails: str) -> None:
    computer.fails = fails
    with pytest.raises(NeedsHuman):
        computer.install()
    again = Pretend(computer.root)
    again.enabled, again.read_at = computer.enabled, computer.read_at
    again.install()
    assert again.active
    assert again.enabled
    assert again.user_made == "regd"
    assert "regd:" in again.at(Path("/etc/passwd")).read_text()
    assert again.install() == []


def test_the_rigs_own_user_is_taken_as_it_is(computer: Pretend) -> None:
    computer.install(user="rig")
    assert not [line for line in computer.ran if "useradd" in line]
    assert "\nUser=rig\n" in computer.at(RIG).read_text()
    assert computer.user_made is None


def test_without_a_token_the_service_waits_for_it(computer: Pretend) -> None:
    steps = {step.what: step for step in computer.plan(token=None)}
    assert steps[str(TOKEN)].by_hand
    assert steps["the service"].action is None
    computer.install(token=None)
    assert stat.S_IMODE(computer.at(TOKEN).stat().st_mode) == 0o600
    assert not computer.active
    computer.at(TOKEN).write_text(SECRET)  # as the step says
    assert computer.install(token=None) == ["the service"]


def test_what_a_person_has_to_do_is_said(computer: Pretend) -> None:
    computer.may_write = False
    (step,) = [step for step in computer.plan() if step.what.startswith("rights in")]
    assert step.by_hand
    assert step.action is None
    assert "setfacl -R -m u:regd:rwX" in step.note


def test_limits_that_are_too_low_are_raised_for_good(computer: Pretend) -> None:
    computer.limits = {"fs.inotify.max_user_watches": 524288}
    computer.install()
    assert "sysctl -q -w fs.inotify.max_user_watches=524288" in computer.ran
    assert "fs.inotify.max_user_watches=524288\n" in computer.at(SYSCTL).read_text()


def test_in_an_image_nothing_is_started(tmp_path: Path) -> None:
    seen = Computer(tmp_path, lambda _: None).look("regd")
    steps = install.plan(Wanted(VALUES, SECRET), seen, program=PROGRAM, root=tmp_path)
    words = [s.action.words for s in steps if isinstance(s.action, (Command, NewUser))]
    assert [(w[0], w[1]) for w in words] == [
        ("useradd", f"--root={tmp_path}"),
        ("systemctl", f"--root={tmp_path}"),
    ]
    assert words[-1][2:] == ("enable", "regd.service")


# --- the files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    ["plain", "with: colon", "null", "1.0", "a # b", "tr\\1ee", "C:\\x", "ö", "it's", 'a "b"'],
)
def test_a_value_stands_in_the_settings_file_as_it_was_given(value: str) -> None:
    values = {**VALUES, "repository": value}
    text = install.settings_file(install.shared("regd.yaml"), values)
    assert install.settings_in(text) == values


@pytest.mark.parametrize("text", ["", "- a list\n", "data_root: [", "alyx: 3\n", "\0"])
def test_a_settings_file_that_is_odd_sets_nothing(text: str) -> None:
    assert install.settings_in(text) == {}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"alyx.url": "https://a.b"}, "data_root is missing: give it with --data-root"),
        ({"data_root": "/x"}, "alyx.url is missing: give it with --alyx-url"),
        ({"data_root": "x", "alyx.url": "https://a.b"}, "must begin with /"),
        ({"data_root": "/x", "alyx.url": "a.b"}, "must be an http or https address"),
    ],
)
def test_values_that_cannot_be_used_are_refused(values: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        install.check_values(values)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("data_root", ["/data", "/mnt/my data/100%", '/mnt/a"b'])
def test_systemd_reads_the_unit_and_the_rigs_own_part(tmp_path: Path, data_root: str) -> None:
    unit = install.unit_file(install.shared("regd.service"), Path("/bin/true"))
    write(tmp_path / "regd.service", unit.encode())
    own = install.rig_file("root", data_root, "/mnt")
    write(tmp_path / "regd.service.d" / "rig.conf", own.encode())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / "regd.service"],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    said = [
        line
        for line in done.stderr.splitlines()
        if ("regd.service" in line or "rig.conf" in line)
        and not re.search("RestartSteps|RestartMaxDelaySec", line)  # of systemd 254 and newer
    ]
    assert said == []


def test_the_wheel_has_what_is_put_in_place() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert {
        f"{folder}/{name}": f"regd/share/{name}" for name, folder in install._SHARED.items()
    } == included
    for source in included:
        assert (PROJECT / source).is_file()


# --- uninstalling --------------------------------------------------------------------------------


@pytest.fixture
def used(computer: Pretend) -> Pretend:
    """A computer on which regd was installed, and has worked."""
    write(computer.root / "data/recordings/ZM_1085/2026-01-31/001/alf/a.b.npy", b"a recording")
    write(computer.root / "etc/sysctl.d/10-other.conf", b"x")
    computer.before = files_below(computer.root)  # type: ignore[attr-defined]
    computer.limits = {"fs.inotify.max_user_watches": 524288}
    computer.install()
    state = computer.at(STATE_DIR)
    for name in ("regd.db", "regd.db-wal", "lock", "identity"):
        write(state / name.replace("regd.db", install.FILE_NAME), b"x")
    return computer


def test_uninstall_removes_what_install_made_and_keeps_what_was_worked_for(used: Pretend) -> None:
    used.uninstall()
    assert used.ran[-2:] == ["systemctl disable --now regd.service", "systemctl daemon-reload"]
    left = {path for path in files_below(used.root) if path not in used.before}  # type: ignore[attr-defined]
    assert {f"/{path}" for path in left if not path.startswith("var/lib/regd/")} == {
        str(CONFIG),
        str(TOKEN),
        str(MANIFEST),
    }
    assert len(left) == 3 + 4
    assert not used.at(RIG.parent).exists()
    used.install(token=None)
    assert used.active, "it can be installed again, and goes on where it was"


def test_purge_removes_all_but_the_data(used: Pretend) -> None:
    used.uninstall(purge=True)
    assert used.ran[-1] == "userdel regd"
    after = files_below(used.root)
    after.pop("etc/passwd")
    used.before.pop("etc/passwd")  # type: ignore[attr-defined]
    assert after == used.before  # type: ignore[attr-defined]
    assert not used.at(STATE_DIR).exists()
    assert not used.at(FOLDER).exists()


def test_uninstall_leaves_alone_what_others_have_made(used: Pretend) -> None:
    used.at(UNIT).write_text("[Service]\n")
    write(used.at(RIG.parent) / "override.conf", b"[Service]\n")
    used.at(LINK).unlink()
    write(used.at(LINK), b"another program")
    write(used.at(STATE_DIR) / "mine", b"x")
    steps = used.uninstall(purge=True)
    kept = {step.what for step in steps if step.action is None}
    assert kept == {str(UNIT), str(LINK)}
    for path in (UNIT, LINK, RIG.parent / "override.conf", STATE_DIR / "mine"):
        assert used.at(path).exists()


def test_a_user_that_was_there_before_stays(computer: Pretend) -> None:
    computer.install(user="rig")
    computer.uninstall(purge=True)
    assert not [line for line in computer.ran if "userdel" in line]


# --- ONE -----------------------------------------------------------------------------------------

ALYX = "https://alyx.cortexlab.example:8443/sub"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder in which ONE was set up, by ONE."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    one.params.setup(client=ALYX, silent=True, make_default=True, username="rig_user",
                     cache_dir=tmp_path / "cache")  # fmt: skip
    kept = one.params.get(client=ALYX, silent=True)
    one.params.save(
        kept.set("TOKEN", {"rig_user": {"token": SECRET}, "other": {"token": "x"}}), ALYX
    )
    return home


def test_what_one_knows_is_read_as_one_has_written_it(home: Path, tmp_path: Path) -> None:
    before = files_below(home)
    assert install.read_one(home) == One(ALYX, "rig_user", SECRET, tmp_path / "cache")
    assert files_below(home) == before
    one.params.setup(client="https://second.example.org", silent=True, make_default=True)
    assert install.read_one(home).url == "https://second.example.org"  # type: ignore[union-attr]
    assert install.read_one(home).token is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "caches",
    [
        "",
        "[]",
        "{}",
        '{"DEFAULT": 3}',
        '{"DEFAULT": "../../etc/passwd"}',
        '{"DEFAULT": "gone"}',
        "\xff",
    ],
)
def test_a_one_that_is_not_set_up_is_none(tmp_path: Path, caches: str) -> None:
    write(tmp_path / ".one" / ".caches", caches.encode("latin-1"))
    assert install.read_one(tmp_path) is None
    assert install.read_one(tmp_path / "nobody") is None


class Person:
    """Answers questions from a table; an unexpected one fails the test."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def _answer(self, question: str) -> Any:
        self.asked.append(question)
        for words, answer in self.answers.items():
            if words.replace("_", " ") in question:
                return answer
        raise AssertionError(f"nobody expected: {question}")

    def ask(self, question: str, default: str) -> str:
        answer = self._answer(question)
        return default if answer is None else str(answer)

    def confirm(self, question: str) -> bool:
        return bool(self._answer(question))

    def secret(self, question: str) -> str:
        return str(self._answer(question))


def gather(
    given: Mapping[str, str | None] | None = None,
    token: str | None = None,
    held: Mapping[str, str] | None = None,
    has_token: bool = False,
    found: One | None = None,
    person: Person | None = None,
    **how: Any,
) -> tuple[dict[str, str], str | None]:
    return install.gather(given or {}, token, held or {}, has_token, found, person, **how)


ONE = One("https://alyx.example.org", "rig_user", SECRET, Path("/data/one"))


def test_one_is_taken_over_after_the_person_agrees() -> None:
    person = Person(
        Take_that_over=True, token_that_ONE_has=True, Folder=None, repository="mainenlab_local"
    )
    values, token = gather(found=ONE, person=person)
    assert values == {**VALUES, "data_root": "/data/one"}
    assert token == SECRET
    assert SECRET not in " ".join(person.asked)


def test_one_is_left_alone_where_the_person_does_not_agree() -> None:
    person = Person(
        Take_that_over=False, Folder="/d", Address="https://other.example.org", user="me",
        repository="", Alyx_token="t0ken",
    )  # fmt: skip
    values, token = gather(found=ONE, person=person)
    assert values["alyx.url"] == "https://other.example.org"
    assert (values["alyx.username"], token) == ("me", "t0ken")


def test_from_one_asks_nobody_and_goes_below_what_is_given() -> None:
    given = {"data_root": "/d", "alyx.url": None, "repository": None}
    assert gather(given, found=ONE, from_one=True) == (
        {"data_root": "/d", "alyx.url": ONE.url, "alyx.username": "rig_user"},
        SECRET,
    )
    values, token = gather({**given, "alyx.username": "me"}, found=ONE, from_one=True)
    assert values["alyx.username"] == "me"
    assert token is None, "it is another user's"
    _, token = gather(given, has_token=True, found=ONE, from_one=True)
    assert token is None, "there is one already"
    elsewhere = {"alyx.url": "https://other.example.org", "alyx.username": "rig_user"}
    _, token = gather({**given, **elsewhere}, found=ONE, from_one=True)
    assert token is None, "it is another Alyx's"


def test_one_is_not_taken_over_unasked() -> None:
    with pytest.raises(SettingsError, match=r"alyx\.url is missing"):
        gather({"data_root": "/d"}, found=ONE)


def test_what_is_set_already_is_not_asked_for_again() -> None:
    person = Person()
    assert gather(held=VALUES, has_token=True, found=ONE, person=person) == (VALUES, None)
    assert person.asked == []


def test_the_token_is_fetched_with_the_password(lab: Lab) -> None:
    person = Person(Alyx_token="", password=lab.password)
    values = {**VALUES, "alyx.url": lab.url, "alyx.username": lab.username}
    _, token = gather(held=values, person=person)
    assert token is not None
    assert len(token) == 40
    assert lab.password not in " ".join(person.asked)


# --- as people run it ----------------------------------------------------------------------------


def regd(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("REGD_")}
    return subprocess.run(
        [sys.executable, "-m", "regd", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**kept, "HOME": "/nonexistent", "SUDO_USER": "", "COLUMNS": "200"},
        **{"stdin": subprocess.DEVNULL, **how},
    )


GIVEN = ["--data-root", "/data/recordings", "--alyx-url", "https://alyx.example.org"]


def test_a_dry_run_shows_all_and_does_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    token = tmp_path / "token"
    token.write_text(SECRET)
    dry = regd("install", "--dry-run", "--root", str(root), *GIVEN, "--token-file", str(token))
    assert dry.returncode == 0
    assert list(root.iterdir()) == []
    for part in (
        "useradd", "data_root: /data/recordings", "mode 0600", "(the token)", "[Unit]", "WantedBy=",
        "ReadWritePaths=/data/recordings", "enable regd.service",
    ):  # fmt: skip
        assert part in dry.stdout, part
    assert SECRET not in dry.stdout + dry.stderr


def test_a_token_comes_from_standard_input_and_never_as_an_argument(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root / "etc/passwd", b"regd:x:999:999::/:/bin/false\n")
    fake = tmp_path / "bin" / "systemctl"
    write(fake, b"#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    from_input = {"stdin": None, "input": f"{SECRET}\n"}
    done = regd("install", "--root", str(root), *GIVEN, "--token-file", "-", **from_input)
    assert (root / "etc/regd/token").read_text() == f"{SECRET}\n", done.stderr
    assert json.loads((root / "etc/regd/installed.json").read_text())["user"] is None
    assert "No such option" in regd("install", "--token", SECRET).stderr


def test_what_is_missing_or_was_never_installed_is_one_line(tmp_path: Path) -> None:
    missing = regd("install", "--root", str(tmp_path))
    assert missing.returncode == 2
    assert "data_root is missing: give it with --data-root" in missing.stderr
    never = regd("uninstall", "--root", str(tmp_path))
    assert never.returncode == 2
    assert "was not used here" in never.stderr
    assert "Traceback" not in missing.stderr + never.stderr


def test_where_the_service_could_not_read_regd_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "home"
    closed.mkdir(mode=0o700)
    program = closed / "venv/bin/regd"
    write(program, b"")
    monkeypatch.setattr(install, "_may_enter", lambda _, folder: folder != closed)
    assert any(str(closed) in r for r, _ in install._obstacles(None, "regd", program))


def test_anybody_has_the_rights_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    folder.chmod(0o750)
    assert not host.ANYBODY.may(folder, "x")
    folder.chmod(0o751)
    assert host.ANYBODY.may(folder, "x")
    assert not host.ANYBODY.may(folder, "r")
