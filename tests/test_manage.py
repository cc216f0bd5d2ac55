"""What a person does to sessions: naming one, putting it back to work, forgetting it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from regd import manage
from regd.errors import DataRootAway, InvalidInput, NeedsHuman
from regd.journal import FILE_NAME, FileRow, Journal
from regd.model import FileState, SessionState, Signature
from regd.paths import parse_session
from regd.settings import Settings
from tests.rig import write

ONE = "lab/Subjects/mouse/2023-11-14/001"
TWO = "lab/Subjects/mouse/2023-11-15/001"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "data" / "lab").mkdir(parents=True)
    (tmp_path / "state").mkdir(mode=0o700)
    return Settings(data_root=tmp_path / "data", state_dir=tmp_path / "state")


@pytest.fixture
def journal(settings: Settings) -> Iterator[Journal]:
    with Journal(settings.state_dir / FILE_NAME, now=time.time) as journal:
        for folder in (ONE, TWO):
            journal.note(parse_session(tuple(folder.split("/"))), due_at=0)
        yield journal


def release(journal: Journal, state: SessionState, **more: Any) -> int:
    row = journal.claim()
    assert row is not None
    journal.release(row.id, state, **more)
    return row.id


def parked(journal: Journal) -> int:
    return release(journal, SessionState.PARKED, reason="why", hint="do")


def root(settings: Settings) -> Path:
    assert settings.data_root is not None
    return settings.data_root


def test_a_session_is_found_by_what_a_person_types(
    settings: Settings, journal: Journal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = journal.claim()
    assert row
    eid = "6b0f4c1e-0000-4000-8000-000000000001"
    journal.identify(row.id, eid, doubt=True)
    file = root(settings) / ONE / "alf" / "x.npy"
    write(file, b"x")
    (tmp_path / "link").symlink_to(root(settings))

    def found(name: object) -> str:
        return manage.find(settings, journal, str(name)).folder

    for name in (ONE, f"{ONE}/", f"{ONE}/alf/x.npy", "mouse/2023-11-14/001", "mouse/2023-11-14/1"):
        assert found(name) == ONE
    for name in ("2023-11-14", eid, eid.upper(), file, file.parent, root(settings) / ONE):
        assert found(name) == ONE
    assert found(tmp_path / "link" / ONE) == ONE
    monkeypatch.chdir(file.parent)
    for name in (".", "x.npy", "..", "2023-11-14/001", "no-longer-there.npy"):
        assert found(name) == ONE
    assert found("2023-11-15/001") == TWO


@pytest.mark.parametrize("name", ["mouse", "001", "lab/Subjects"])
def test_a_name_that_may_be_several_lists_them(
    settings: Settings, journal: Journal, name: str
) -> None:
    with pytest.raises(InvalidInput, match="several") as caught:
        manage.find(settings, journal, name)
    assert ONE in caught.value.hint
    assert TWO in caught.value.hint


@pytest.mark.parametrize(
    "name", ["nobody", "", "/", "/etc", "mous", "2023-11-14/002", "\udcff\x1b"]
)
def test_a_name_that_nothing_has(settings: Settings, journal: Journal, name: str) -> None:
    with pytest.raises(InvalidInput, match="knows no session"):
        manage.find(settings, journal, name)


def test_retry_is_of_all_that_are_named_or_of_none(settings: Settings, journal: Journal) -> None:
    parked(journal)
    parked(journal)
    with pytest.raises(InvalidInput):
        manage.retry(settings, journal, ["2023-11-14", "nobody"])
    assert len(journal.sessions(SessionState.PARKED)) == 2
    assert manage.retry(settings, journal, ["2023-11-14", ONE, "2023-11-15"]) == 2
    assert len(journal.sessions(SessionState.WAITING)) == 2
    assert journal.claim()
    with pytest.raises(NeedsHuman, match="in work already"):
        manage.retry(settings, journal, [ONE])


def test_what_is_gone_is_forgotten(settings: Settings, journal: Journal) -> None:
    parked(journal)
    write(root(settings) / "lab" / "stray", b"x")
    journal.write_strays(1, [("gone", "why", "do"), ("lab/stray", "why", "do")])
    assert manage.forget(settings, journal, "2023-11-14", force=False) == ONE
    assert journal.session(ONE) is None
    for name in ("gone", str(root(settings) / "gone")):
        if name == "gone":
            assert manage.forget(settings, journal, name, force=False) == "gone"
        else:
            with pytest.raises(InvalidInput, match="knows no session"):
                manage.forget(settings, journal, name, force=False)
    with pytest.raises(NeedsHuman, match="still there"):
        manage.forget(settings, journal, "lab/stray", force=False)
    assert [path for path, _, _ in journal.strays()] == ["lab/stray"]


def test_what_would_be_found_again_needs_force_or_to_be_ignored(
    settings: Settings, journal: Journal
) -> None:
    for _ in range(2):
        parked(journal)
    for folder in (ONE, TWO):
        write(root(settings) / folder / "x", b"x")
    with pytest.raises(NeedsHuman, match="still there") as caught:
        manage.forget(settings, journal, ONE, force=False)
    assert f"add {ONE} to watch.ignore" in caught.value.hint
    ignoring = settings.model_copy(
        update={"watch": settings.watch.model_copy(update={"ignore": ("lab/Subjects/mouse",)})}
    )
    assert manage.forget(ignoring, journal, ONE, force=False) == ONE
    assert manage.forget(settings, journal, TWO, force=True) == TWO
    assert journal.sessions() == []
    assert manage.stays(settings, TWO)
    assert not manage.stays(ignoring, TWO)


def test_a_file_in_a_session_is_not_taken_for_the_session(
    settings: Settings, journal: Journal
) -> None:
    with pytest.raises(InvalidInput, match="is in a session"):
        manage.forget(settings, journal, f"{ONE}/alf/x.npy", force=True)
    assert journal.session(ONE)


def test_a_disk_that_is_not_mounted_is_not_taken_for_data_that_was_removed(
    settings: Settings, journal: Journal
) -> None:
    parked(journal)
    (root(settings) / "lab").rmdir()
    with pytest.raises(DataRootAway, match="is empty"):
        manage.forget(settings, journal, ONE, force=False)
    assert manage.forget(settings, journal, ONE, force=True) == ONE


def test_what_only_the_journal_knows_is_not_forgotten(settings: Settings, journal: Journal) -> None:
    write(root(settings) / ONE / "x", b"x")
    row = journal.claim()
    assert row
    with pytest.raises(NeedsHuman, match="worked on"):
        manage.forget(settings, journal, ONE, force=True)
    moving = FileRow("x", FileState.READY, Signature(1, 1))
    placing = moving._replace(state=FileState.PLACING, move_to="#r#/x")
    journal.write_files(row.id, [placing])
    journal.set_creating(row.id, True)
    journal.release(row.id, SessionState.PARKED, reason="why", hint="do")
    with pytest.raises(NeedsHuman, match="may still arrive") as caught:
        manage.forget(settings, journal, ONE, force=True)
    assert "wait" in caught.value.hint
    journal.set_creating(row.id, False)
    with pytest.raises(NeedsHuman, match="has not ended"):
        manage.forget(settings, journal, ONE, force=True)
    journal.write_files(row.id, [moving])
    manage.forget(settings, journal, ONE, force=True)


def test_a_move_whose_folder_is_gone_is_forgotten_with_it(
    settings: Settings, journal: Journal
) -> None:
    write(root(settings) / "another/2020-01-01/001/x", b"x")  # its disk is there
    row = journal.claim()
    assert row
    placing = FileRow(
        "x", FileState.PLACING, Signature(1, 1), move_to="#r#/x", reason="r", hint="h"
    )
    journal.write_files(row.id, [placing])
    journal.release(row.id, SessionState.DONE)
    assert manage.forget(settings, journal, ONE, force=False) == ONE
    assert ONE not in {row.folder for row in journal.sessions()}
