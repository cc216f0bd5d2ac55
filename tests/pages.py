"""The pages of the documentation, taken apart, and a place where their commands are run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import httpx
import yaml

from tests import stand_in
from tests.rig import Lab

PROJECT = Path(__file__).parents[1]
DOCS = PROJECT / "docs"
PAGES = [PROJECT / name for name in ("README.md", "CHANGELOG.md", "bench/RESULTS.md")]
PAGES += sorted(DOCS.glob("*.md"))

# What a block may run as it is; all else is stood in for, or fails.
HARMLESS = ("bash", "cat", "chmod", "cp", "date", "grep", "head", "id", "ls", "mkdir", "rm", "sh")
HARMLESS += ("tail", "tee", "touch")
# Folders of the computer, which are moved below the test's own.
_OUTSIDE = re.compile(r"(?<![\w.:)/-])/(?=(?:etc|opt|var|data|tmp|usr|srv|run)\b)")
_ABSOLUTE = re.compile(r"(?<![\w.:)/~-])(/[\w.-]+[\w./-]*)")
_PORT = re.compile(r"(?<=--port )\d+|(?<=port: )\d+|(?<=127\.0\.0\.1:)\d+|(?<=localhost:)\d+")


class Block(NamedTuple):
    """A fenced block: its language, what is in it, and the line it begins on."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return a page's fenced blocks."""
    text = page.read_text()
    return [
        Block(found[1], found[2], text[: found.start()].count("\n") + 1)
        for found in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.M | re.S)
    ]


@cache
def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    """Return what stands between backticks in a page's prose, on one line or two."""
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> list[str]:
    """Return the commands in a page's prose: what a person could type."""
    program = re.compile(rf"(?:sudo .*|(?:{'|'.join([*stand_in.NAMES, 'chmod'])}) .*)$")
    return [span for span in spans(page) if program.match(span)]


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and images, those of the web left out."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))
    return [target for target in found if not re.match(r"https?://", target)]


def anchors(page: Path) -> set[str]:
    """Return what the headings of a page are called in links to them, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@dataclass
class Place:
    """Where a page's commands are run: a clone, a computer's folders, and a lab's Alyx.

    Attributes:
        folder: For all of it.
        lab: The Alyx that stands for the one of the pages.
    """

    folder: Path
    lab: Lab

    def __post_init__(self) -> None:
        self.root = self.folder / "root"  # what is / on the page
        self.clone = self.folder / "clone"
        self.config = self.root / "etc/regd/regd.yaml"
        self._ports: dict[str, str] = {}
        for path in ("etc/systemd/system", "var/lib", "opt", "data/recordings", "tmp", "home"):
            (self.root / path).mkdir(parents=True)
        self.clone.mkdir()
        for path in PROJECT.iterdir():
            if path.name not in (".venv", ".git", "demo"):
                (self.clone / path.name).symlink_to(path)
        self._programs = self.folder / "programs"
        stand_in.launcher(self._programs, *stand_in.NAMES)
        stand_in.launcher(self.clone / ".venv/bin", "regd", "pytest", "python3")
        for name in HARMLESS:
            program = shutil.which(name)
            assert program, name
            (self._programs / name).symlink_to(program)
        (self.root / "run/users").mkdir(parents=True)
        self.environment = {
            "PATH": str(self._programs),
            "HOME": str(self.root / "home"),
            "LANG": "C.UTF-8",
            "COLUMNS": "100",
            "REGD_CONFIG": str(self.config),
            "FAKE_ROOT": str(self.root),
            "FAKE_PYTHON": sys.executable,
            "FAKE_MAKE": shutil.which("make") or "make",
            "PYTHONPATH": str(PROJECT),
        }

    def here(self, text: str) -> str:
        """Return a text with the paths, ports and addresses that stand for the page's."""
        text = _PORT.sub(lambda port: self._port(port[0]), text)
        text = text.replace("https://alyx.example.org", self.lab.url)
        return _OUTSIDE.sub(f"{self.root}/", text)

    def _port(self, number: str) -> str:
        if number not in self._ports:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._ports[number] = str(free.getsockname()[1])
        return self._ports[number]

    def run(self, command: str) -> str:
        """Run a command of a page, and return what it prints.

        Raises:
            AssertionError: It fails, or reaches for something outside the test's folder.
        """
        command = self.here(command)
        outside = [
            path
            for path in _ABSOLUTE.findall(command)
            if not path.startswith((f"{self.root}/", "/dev/null"))
        ]
        assert not outside, f"{command!r} names {outside}, for which nothing stands here"
        done = subprocess.run(
            # a person's shell, too, is there until the command ends: regd asks which one it is
            ["bash", "-euo", "pipefail", "-c", f"{command}\nexit"],
            cwd=self.clone,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}\nended with {done.returncode}:\n{done.stdout}"
        self._fill_in()
        return done.stdout

    def _fill_in(self) -> None:
        """Do what the pages tell a person to do by hand: settings, and the token."""
        token = self.root / "etc/regd/token"
        if token.exists() and not token.read_text():
            token.write_text(self.token())
        if self.config.exists() and "alyx.example.org" in self.config.read_text():
            self.write_settings(self.config.read_text())

    def write_settings(self, text: str) -> None:
        """Write the settings file, with what belongs to this lab."""
        values = yaml.safe_load(self.here(text))
        values["repository"] = self.lab.repository
        values["alyx"] |= {"url": self.lab.url, "username": self.lab.username}
        values["settle"] = {"quiet_s": 0.3, "closed_quiet_s": 0.1}
        self.config.parent.mkdir(exist_ok=True)
        self.config.write_text(yaml.safe_dump(values))

    def token(self) -> str:
        """Return a token of the lab's Alyx."""
        who = {"username": self.lab.username, "password": self.lab.password}
        return str(httpx.post(f"{self.lab.url}/auth-token", data=who).json()["token"])

    def end(self) -> None:
        """End the service, if the page has started it."""
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((self.root / "run/regd.pid").read_text()), signal.SIGTERM)
