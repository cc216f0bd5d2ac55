"""What a person is told, from a journal in a state that is made here."""

import datetime
import json
from pathlib import Path

import pytest

from regd.journal import FILE_NAME, FileRow, Journal
from regd.model import FileState, SessionState, Signature
from regd.paths import parse_session
from regd.settings import Settings
from regd.status import report

NOW = 1_700_000_000.0
TODAY = datetime.date(2023, 11, 14)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "data").mkdir()
    (tmp_path / "state").mkdir(mode=0o700)
    return Settings(
        data_root=tmp_path / "data",
        state_dir=tmp_path / "state",
        alyx={"url": "http://127.0.0.1:9", "token": "0" * 40},
    )


def test_the_sessions_of_today(settings: Settings) -> None:
    with Journal(settings.state_dir / FILE_NAME, now=lambda: NOW) as journal:
        for number, date in (("001", "2023-11-13"), ("001", "2023-11-14"), ("002", "2023-11-14")):
            journal.note(parse_session(("mouse", date, number)), due_at=NOW)
        row = journal.session("mouse/2023-11-14/001")
        assert row is not None
        rows = [
            FileRow(f"alf/{n}.npy", FileState.REGISTERED, Signature(5, 1), md5="0" * 32)
            for n in range(3)
        ]
        journal.write_files(row.id, [*rows, FileRow("b", FileState.SETTLING, Signature(5, 1))])
        facts = report(settings, journal, ask_alyx=False, today=TODAY)
    assert json.loads(json.dumps(facts)) == facts
    assert [(s["session"], s["state"], s["files"]) for s in facts["today"]] == [
        ("mouse/2023-11-14/001", SessionState.WAITING, {"registered": 3, "settling": 1}),
        ("mouse/2023-11-14/002", SessionState.WAITING, {}),
    ]
    assert facts["waiting_since"] == NOW
    assert len(facts["waiting"]) == 3


def test_alyx_is_not_asked_by_who_needs_no_answer(settings: Settings) -> None:
    with Journal(settings.state_dir / FILE_NAME, now=lambda: NOW) as journal:
        assert report(settings, journal, ask_alyx=False)["alyx"]["reason"] is None
        assert "no connection" in report(settings, journal)["alyx"]["reason"]
