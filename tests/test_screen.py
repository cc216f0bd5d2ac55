"""How the report looks: on a narrow terminal and a wide one, and where there is none."""

from __future__ import annotations

import datetime
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from regd import screen
from regd.journal import FILE_NAME, FileRow, Journal
from regd.model import FileState, Happening, SessionState, Signature
from regd.paths import parse_session
from regd.settings import Settings
from regd.status import Report, report, story

NOW = datetime.datetime(2023, 11, 14, 15, 0).astimezone().timestamp()
TODAY = datetime.date(2023, 11, 14)
DONE, WAITING, HELD, PARKED = (
    SessionState.DONE,
    SessionState.WAITING,
    SessionState.HELD,
    SessionState.PARKED,
)


class Place:
    """A journal to put states into, and the report on it."""

    def __init__(self, folder: Path) -> None:
        (folder / "data" / "mouse").mkdir(parents=True)
        (folder / "state").mkdir(mode=0o700)
        self.settings = Settings(
            data_root=folder / "data",
            state_dir=folder / "state",
            alyx={"url": "https://alyx.example.org", "token": "0" * 40},
        )
        self.now = NOW
        self.journal = Journal(self.settings.state_dir / FILE_NAME, now=lambda: self.now)
        self.journal.bind_root(folder / "data")

    def session(
        self,
        number: int,
        state: SessionState,
        files: list[FileRow] | None = None,
        subject: str = "mouse",
        date: str = "2023-11-14",
        **more: Any,
    ) -> int:
        self.journal.note(parse_session((subject, date, f"{number:03d}")), due_at=0)
        row = self.journal.claim()
        assert row
        self.journal.write_files(row.id, files or [])
        self.journal.release(row.id, state, **more)
        return row.id

    def report(self, *, running: bool = True, **more: Any) -> Report:
        facts = report(self.settings, self.journal, ask_alyx=False, today=TODAY)
        facts |= {"at": NOW, "daemon": {"running": running}, **more}
        facts["alyx"] |= {"asked": True}
        if running:  # no daemon is at work here
            facts["problems"] = [p for p in facts["problems"] if p["what"] != "regd"]
            facts["needs_human"] = len(facts["problems"])
        return facts


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.journal.close()


def files(number: int, state: FileState = FileState.REGISTERED, **more: Any) -> list[FileRow]:
    signature = Signature(250_000_000, 1)
    return [FileRow(f"{state}{n}.npy", state, signature, **more) for n in range(number)]


def shown(what: RenderableType, width: int = 80) -> list[str]:
    """Return the lines that a terminal of that width shows, which must not be wider."""
    console = Console(file=io.StringIO(), width=width, highlight=False, emoji=False)
    console.print(what, crop=False)
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert all(len(line) <= width for line in lines), lines
    return lines


AWAY = {"kind": "alyx", "reason": "no connection", "hint": "", "since": NOW - 3480}


def test_the_first_line_says_whether_all_is_well(place: Place) -> None:
    def first(**more: Any) -> str:
        return shown(screen.status(place.report(**more)))[0]

    assert first() == "All is well: regd runs, and has seen no session yet"
    assert "sudo systemctl start regd" in first(running=False)
    place.session(1, DONE, date="2023-11-13")
    assert first() == "All is well: nothing was recorded today"
    place.session(1, DONE)
    assert first() == "All is well: the session of today is registered"
    place.session(2, DONE)
    assert first() == "All is well: all 2 sessions of today are registered"
    place.session(3, WAITING, due_at=NOW, reason="files are being written")
    assert first() == "All is well: 2 of 3 sessions of today are registered"
    assert first(away=AWAY) == "Alyx away since 14:02: 1 session waits"
    place.session(4, PARKED, reason="why", hint="do this")
    assert first(away=AWAY) == "1 thing needs a person, see below"


def test_how_far_each_session_of_today_is(place: Place) -> None:
    place.now = NOW - 3600
    place.session(1, DONE, files(20))
    settling = files(6, FileState.SETTLING)
    place.session(2, WAITING, files(14) + settling, due_at=NOW, reason="files are being written")
    failed = {"due_at": NOW + 600, "reason": "no answer", "hint": "", "attempt": 2}
    place.session(3, WAITING, files(3, FileState.READY), **failed)
    place.session(4, PARKED, reason="why", hint="do this")
    place.session(5, HELD, due_at=NOW, reason="not there", hint="put a flag")
    refused = files(1, FileState.REFUSED, reason="empty", hint="delete it")
    place.session(6, DONE, files(3) + refused)
    place.now = NOW - 7200
    place.session(7, DONE, reason="its folder is no longer there")
    lines = shown(screen.status(place.report()))
    start = lines.index("Today, 2023-11-14")
    assert lines[start + 1 : start + 8] == [
        "  mouse/2023-11-14/001  20/20 files  5.0 GB      registered 14:00",
        "  mouse/2023-11-14/002  14/20 files  3.5/5.0 GB  being written since 14:00",
        "  mouse/2023-11-14/003  0/3 files    0/750 MB    failed, again at 15:10",
        "  mouse/2023-11-14/004  no files                 needs a person since 14:00",
        "  mouse/2023-11-14/005  no files                 held since 14:00",
        "  mouse/2023-11-14/006  3/4 files    0.8/1.0 GB  registered, but 1 refused",
        "  mouse/2023-11-14/007  no files                 folder gone since 13:00",
    ]


def test_what_waits_is_told_with_what_for_and_since_when(place: Place) -> None:
    place.now = NOW - 3600
    place.session(1, WAITING, due_at=NOW, reason="no answer", hint="", attempt=1)
    place.session(2, HELD, due_at=NOW, reason="not there", hint="put a flag")
    lines = shown(screen.status(place.report()))
    start = lines.index("Waiting")
    assert lines[start + 1 : start + 7] == [
        "  mouse/2023-11-14/001  since 14:00",
        "    why  no answer",
        "    do   nothing: regd tries it again",
        "  mouse/2023-11-14/002  held since 14:00",
        "    why  not there",
        "    do   put a flag",
    ]
    lines = shown(screen.status(place.report(away=AWAY)))
    start = lines.index("Waiting")
    assert lines[start + 1 : start + 4] == [
        "  Alyx away since 14:02",
        "    why  no connection",
        "    do   nothing: regd goes on when it is back",
    ]
    assert "waits for Alyx since 14:00" in "\n".join(lines)


def test_what_has_one_reason_is_told_once(place: Place) -> None:
    for number in range(1, 31):
        place.session(number, PARKED, reason="no such subject", hint="create it")
    place.session(31, PARKED, reason="another", hint="do that")
    lines = shown(screen.status(place.report(), screen.Most(people=3)))
    start = lines.index("Needs a person")
    assert lines[start + 3 :] == [
        "    do   do that",
        "  mouse/2023-11-14/030",
        "  mouse/2023-11-14/029",
        "  mouse/2023-11-14/028",
        "  ... and 27 more (all of them: regd status | less)",
        "    why  no such subject",
        "    do   create it",
    ]
    assert sum("mouse/2023-11-14/0" in line for line in shown(screen.status(place.report()))) == 62


def test_a_thousand_sessions(place: Place) -> None:
    with place.journal.together():
        for number in range(1, 1001):
            subject = f"mouse{number // 500}"
            place.session(number % 500 + 1, DONE, files(2), subject=subject)
        place.session(501, WAITING, due_at=NOW, reason="files are being written")
    lines = shown(screen.status(place.report(), screen.Most(today=5)))
    assert lines[0] == "All is well: 1,000 of 1,001 sessions of today are registered"
    today = lines[lines.index("Today, 2023-11-14") + 1 :]
    assert len(today) == 6
    assert today[0].startswith("  mouse/2023-11-14/501"), "what is not done stays on the screen"
    assert "... and 996 more" in today[5]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("most", screen.FITTING)
def test_no_line_is_wider_than_the_screen(place: Place, width: int, most: screen.Most) -> None:
    """Nor is anything of a name lost: it goes on in the next line."""
    subject = "a_subject_with_a_name_that_is_longer_than_the_screen_of_the_rig_is_wide_by_far"
    place.session(1, DONE, files(20), subject=subject)
    place.session(2, PARKED, reason="why " * 60, hint="do " * 60, subject=subject)
    place.session(3, HELD, due_at=NOW, reason="why", hint="do", subject=subject)
    text = "".join(line.strip() for line in shown(screen.status(place.report(), most), width))
    assert f"{subject}/2023-11-14/002" in text
    if most.today != 2:
        assert f"{subject}/2023-11-14/001" in text


def test_names_are_shown_as_they_are_and_move_no_cursor(place: Place) -> None:
    facts = place.report()
    name = "[red]:dog:\x1b[2J\udcff"
    facts["problems"] = [{"what": name, "reason": "[bold]why", "hint": "[/bold]do"}]
    text = "\n".join(shown(screen.status(facts)))
    assert "  [red]:dog:\\x1b[2J\\udcff\n    why  [bold]why\n    do   [/bold]do" in text


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (9_949_000, "9.9 MB"),
        (9_950_000, "10 MB"),
        (2 * 10**15, "2.0 PB"),
        (10**19, "10000 PB"),
    ],
)
def test_sizes(number: int, said: str) -> None:
    assert screen.size(number) == said


def test_a_part_of_a_size_has_its_unit() -> None:
    assert screen.size(1_500_000, "GB") == "0.0 GB"
    assert screen.size(12_000_000_000, "GB") == "12 GB"
    assert screen.size(0, "GB") == "0 GB"


# --- the story of one session --------------------------------------------------------------------


def test_the_whole_story_of_a_session(place: Place) -> None:
    place.now = NOW - 3600
    place.journal.note(parse_session(("mouse", "2023-11-14", "001")), due_at=0, flagged=True)
    for place.now in (NOW - 3500, NOW - 3400):
        row = place.journal.claim()
        assert row
        place.journal.release(row.id, WAITING, due_at=0, attempt=1, reason="no answer", hint="")
    row = place.journal.claim()
    assert row
    place.journal.identify(row.id, "6b0f4c1e-0000-4000-8000-000000000001", doubt=False)
    md5, dataset = "d41d8cd98f00b204e9800998ecf8427e", "6b0f4c1e-1111-4111-8111-123456789abc"
    file = FileRow("alf/x.npy", FileState.READY, Signature(1_200_000, 10**18), md5=md5)
    new = "alf/#2023-11-14#/x.npy"
    place.journal.moved(row.id, file.path, file._replace(path=new))
    known = {"md5": md5, "dataset_id": dataset}
    done = FileRow(new, FileState.REGISTERED, Signature(1_200_000, 10**18), **known)
    empty = FileRow("alf/y.npy", FileState.REFUSED, Signature(0, 1), reason="empty", hint="go")
    place.journal.write_files(row.id, [done, empty])
    place.journal.unflagged(row.id)
    place.journal.release(row.id, DONE)
    row = place.journal.session("mouse/2023-11-14/001")
    assert row
    facts = story(place.settings, place.journal, row)
    assert json.loads(json.dumps(facts)) == facts
    facts["at"] = NOW
    assert shown(screen.story(facts)) == [
        "mouse/2023-11-14/001",
        "  state  done since 14:03",
        "  files  1/2 files registered, 1.2 MB",
        "  Alyx   https://alyx.example.org/sessions/6b0f4c1e-0000-4000-8000-000000000001",
        "  note   its folder is not there",
        "",
        "History",
        "  2023-11-14 14:00:00 first seen",
        "  2023-11-14 14:01:40 put off: no answer (2 times, the last 2023-11-14 14:03:20)",
        "  2023-11-14 14:03:20 created on Alyx: 6b0f4c1e-0000-4000-8000-000000000001",
        "  2023-11-14 14:03:20 alf/x.npy moved to alf/#2023-11-14#/x.npy",
        "  2023-11-14 14:03:20 the flag is gone",
        "  2023-11-14 14:03:20 all done",
        "",
        "Files, with state, size, MD5 and dataset id",
        "  alf/#2023-11-14#/x.npy",
        "    registered 2023-11-14 14:03:20  1.2 MB  revision 2023-11-14",
        f"    {md5}  {dataset}",
        "  alf/y.npy",
        "    refused 2023-11-14 14:03:20  0 B",
        "    why  empty",
        "    do   go",
    ]


def test_everything_that_can_happen_has_words(place: Place) -> None:
    place.session(1, PARKED, reason="why", hint="do")
    row = place.journal.session("mouse/2023-11-14/001")
    assert row
    for happening in Happening:
        target = "there" if happening is Happening.MOVED else None
        place.journal._happened(row.id, happening, "about", target)
    lines = shown(screen.story(story(place.settings, place.journal, row)))
    assert len(lines[lines.index("History") :]) == len(Happening) + 3
