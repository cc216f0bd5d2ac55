"""The journal, on real SQLite files."""

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from regd import journal as journal_module
from regd.errors import InvalidInput, JournalDamaged, JournalFailed, NeedsHuman
from regd.journal import FILE_NAME, SCHEMA_VERSION, UNKNOWN_OUTCOME_S, FileRow, Journal
from regd.model import FileState, Happening, SessionPath, SessionState, Signature
from regd.paths import parse_session

WAITING, WORKING, DONE, HELD, PARKED = SessionState


def path_of(number: int | str = 1, subject: str = "a", lab: str = "") -> SessionPath:
    folder = f"{lab}/Subjects/{subject}" if lab else subject
    return parse_session((*folder.split("/"), "2020-01-01", f"{number:0>3}"))


A, B = path_of(1), path_of(2)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a Path would hide what is counted


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / FILE_NAME


@pytest.fixture
def journal(file: Path, clock: Clock) -> Iterator[Journal]:
    journal = Journal(file, now=clock)
    yield journal
    journal.close()


def note(journal: Journal, session: SessionPath = A, due_at: float = 1000.0, **more: Any) -> None:
    assert journal.note(session, due_at=due_at, **more) is None


def row_of(journal: Journal, session: SessionPath = A) -> Any:
    row = journal.session(session.folder)
    assert row is not None
    return row


def claim_and_release(journal: Journal, state: SessionState, **more: Any) -> None:
    row = journal.claim()
    assert row is not None
    if state in (PARKED, HELD):
        more = {"reason": "because", "hint": "do this", **more}
    journal.release(row.id, state, **more)


# --- sessions: one step at a time ----------------------------------------------------------------


def test_a_noted_session_waits_and_is_claimed_when_it_is_due(
    journal: Journal, clock: Clock
) -> None:
    note(journal, due_at=1010.0)
    row = row_of(journal)
    assert (row.folder, row.state, row.flagged, row.eid, row.doubt, row.due_at, row.attempt) == (
        "a/2020-01-01/001", WAITING, False, None, True, 1010.0, 0,
    )  # fmt: skip
    assert row.path == A
    assert journal.claim() is None
    assert journal.next_due_at() == 1010.0
    clock.now = 1010.0
    claimed = journal.claim()
    assert claimed is not None
    assert (claimed.id, claimed.state, claimed.changed_at) == (row.id, WORKING, 1010.0)
    assert journal.claim() is None
    assert journal.next_due_at() is None


def test_the_session_due_longest_goes_first(journal: Journal, clock: Clock) -> None:
    for number, due_at in ((1, 900.0), (2, 800.0), (3, 1000.0), (4, 1001.0)):
        note(journal, path_of(number), due_at)
    claimed = [journal.claim() for _ in range(4)]
    assert [row.path.number if row else None for row in claimed] == ["002", "001", "003", None]


def test_noting_again_only_ever_brings_it_forward(journal: Journal) -> None:
    note(journal, due_at=1010.0)
    note(journal, due_at=1005.0)
    assert row_of(journal).due_at == 1005.0
    note(journal, due_at=1050.0)
    assert row_of(journal).due_at == 1005.0


def test_a_flag_is_remembered_until_it_is_gone(journal: Journal) -> None:
    note(journal, flagged=True)
    note(journal, flagged=False)
    assert row_of(journal).flagged is True
    journal.unflagged(row_of(journal).id)
    assert row_of(journal).flagged is False


def test_release_writes_all_that_is_said(journal: Journal, clock: Clock) -> None:
    note(journal)
    clock.now = 1003.0
    claim_and_release(journal, WAITING, due_at=1060.0, attempt=3, reason="r", hint="h")
    row = row_of(journal)
    assert (row.state, row.due_at, row.attempt, row.reason, row.hint, row.changed_at) == (
        WAITING, 1060.0, 3, "r", "h", 1003.0,
    )  # fmt: skip


def test_only_a_claimed_session_is_released(journal: Journal) -> None:
    note(journal)
    row = row_of(journal)
    journal.release(row.id, DONE)
    assert row_of(journal) == row
    claim_and_release(journal, DONE)
    journal.release(row.id, PARKED, reason="late")
    assert row_of(journal).state is DONE


@pytest.mark.parametrize("state", [WAITING, DONE, HELD])
def test_a_hint_during_the_work_keeps_the_session_due(
    journal: Journal, clock: Clock, state: SessionState
) -> None:
    note(journal)
    assert journal.claim()
    note(journal, due_at=1020.0)
    note(journal, due_at=1010.0)
    note(journal, due_at=1030.0)
    assert row_of(journal).state is WORKING
    journal.release(row_of(journal).id, state, due_at=5000.0, reason="because")
    assert (row_of(journal).state, row_of(journal).due_at) == (WAITING, 1010.0)
    clock.now = 1010.0
    assert journal.claim()
    journal.release(row_of(journal).id, DONE)
    assert row_of(journal).state is DONE  # the hint is used up


def test_a_hint_during_the_work_does_not_put_off_an_earlier_attempt(journal: Journal) -> None:
    note(journal)
    assert journal.claim()
    note(journal, due_at=2000.0)
    journal.release(row_of(journal).id, WAITING, due_at=1005.0)
    assert row_of(journal).due_at == 1005.0


@pytest.mark.parametrize("flagged", [False, True])
def test_parking_is_not_undone_by_a_hint(journal: Journal, flagged: bool) -> None:
    note(journal)
    assert journal.claim()
    note(journal, due_at=1001.0, flagged=flagged)
    journal.release(row_of(journal).id, PARKED, reason="because", hint="do this")
    note(journal, due_at=1002.0)
    note(journal, due_at=1002.0, flagged=True)
    row = row_of(journal)
    assert (row.state, row.reason, row.hint) == (PARKED, "because", "do this")
    assert journal.claim() is None
    assert journal.next_due_at() is None


def test_a_new_flag_undoes_parking(journal: Journal) -> None:
    note(journal)
    claim_and_release(journal, PARKED)
    note(journal, due_at=1001.0, flagged=True, new_flag=True)
    assert (row_of(journal).state, row_of(journal).due_at) == (WAITING, 1001.0)


def test_a_held_session_is_looked_at_again_at_its_time(journal: Journal, clock: Clock) -> None:
    note(journal)
    claim_and_release(journal, HELD, due_at=1600.0)
    assert journal.next_due_at() == 1600.0
    note(journal, due_at=1001.0, held_until=1300.0)  # a new file: not at once, but sooner
    assert (row_of(journal).state, row_of(journal).due_at) == (HELD, 1300.0)
    note(journal, due_at=1001.0, held_until=1900.0)
    assert row_of(journal).due_at == 1300.0
    note(journal, due_at=1250.0)  # nobody says until when: when it is due
    assert row_of(journal).due_at == 1250.0
    clock.now = 1250.0
    assert journal.claim()


def test_a_flag_ends_holding_at_once(journal: Journal) -> None:
    note(journal)
    claim_and_release(journal, HELD, due_at=1600.0)
    note(journal, due_at=1001.0, flagged=True, new_flag=True, held_until=1900.0)
    assert (row_of(journal).state, row_of(journal).due_at) == (WAITING, 1001.0)


def test_a_done_session_goes_back_to_work(journal: Journal, clock: Clock) -> None:
    note(journal)
    claim_and_release(journal, DONE)
    clock.now = 1010.0
    note(journal, due_at=1012.0)
    row = row_of(journal)
    assert (row.state, row.due_at, row.changed_at) == (WAITING, 1012.0, 1010.0)


def test_one_session_in_two_folders_is_refused(journal: Journal) -> None:
    note(journal, path_of(1, "a"))
    before = journal.sessions()
    twins = [
        SessionPath("a/2020-01-01/1", "a", "2020-01-01", "1"),
        path_of(1, "a", lab="lab"),
    ]
    for twin in twins:
        assert journal.note(twin, due_at=1.0, flagged=True) == "a/2020-01-01/001"
    assert journal.sessions() == before
    note(journal, path_of(1, "A"))  # another subject


def test_identify(journal: Journal) -> None:
    note(journal)
    row = row_of(journal)
    journal.identify(row.id, "eid", doubt=False)  # not in work: nobody may
    assert row_of(journal).eid is None
    assert journal.claim()
    journal.identify(row.id, "eid", doubt=False)
    assert (row_of(journal).eid, row_of(journal).doubt) == ("eid", False)
    journal.set_doubt(row.id, True)
    assert row_of(journal).doubt is True


def test_recover_puts_back_what_was_in_work_with_a_doubt(journal: Journal, clock: Clock) -> None:
    for number in (1, 2, 3):
        note(journal, path_of(number), due_at=900.0 + number)
    claimed = [journal.claim(), journal.claim()]
    for row in claimed:
        assert row
        journal.identify(row.id, "eid", doubt=False)
    note(journal, path_of(1), due_at=5000.0)  # a hint during the work
    clock.now = 1100.0
    assert journal.recover() == 2
    assert journal.recover() == 0
    for number in (1, 2):
        row = row_of(journal, path_of(number))
        # what was sent for it may still be on its way
        assert (row.state, row.due_at, row.doubt, row.eid) == (WAITING, 1175.0, True, "eid")
    assert row_of(journal, path_of(3)).due_at == 903.0


def test_a_session_whose_creation_was_sent_is_known_as_such(journal: Journal, clock: Clock) -> None:
    for number in (1, 2):
        note(journal, path_of(number), due_at=900.0 + number)
    (first, _) = (journal.claim(), journal.claim())
    assert first
    journal.set_creating(first.id, True)
    assert row_of(journal).creating_at == 1000.0
    journal.shift(50.0)
    assert row_of(journal).creating_at == 1050.0
    clock.now = 1010.0  # set back while nobody looked
    journal.clamp(3600.0, 3600.0)
    assert row_of(journal).creating_at == 1010.0
    clock.now = 1100.0
    assert journal.recover(60.0) == 2
    rows = [row_of(journal, path_of(number)) for number in (1, 2)]
    # of neither was a file sent: both are looked for at once
    assert [row.due_at for row in rows] == [1100.0, 1100.0]
    assert [row.creating_at for row in rows] == [1100.0, None]
    journal.claim()
    journal.identify(first.id, "eid", doubt=True)
    assert row_of(journal).creating_at is None


def test_retry_of_one_session(journal: Journal, clock: Clock) -> None:
    for number in (1, 2):
        note(journal, path_of(number))
        claim_and_release(journal, PARKED, attempt=7)
    clock.now = 1050.0
    assert journal.retry(A.folder) == 1
    row = row_of(journal)
    assert (row.state, row.due_at, row.attempt, row.changed_at) == (WAITING, 1050.0, 0, 1050.0)
    assert row_of(journal, B).state is PARKED
    assert journal.retry("a/2020-01-01/099") == 0


def test_retry_of_all(journal: Journal, clock: Clock) -> None:
    states = {1: PARKED, 2: HELD, 3: DONE, 4: DONE, 5: WAITING}
    for number, state in states.items():
        note(journal, path_of(number), due_at=100.0 + number)
        claim_and_release(journal, state, due_at=9e9)
    refused = FileRow("x", FileState.REFUSED, Signature(1, 1), reason="no")
    kept = FileRow("y", FileState.REGISTERED, Signature(1, 1))
    journal.write_files(row_of(journal, path_of(4)).id, [refused, kept])
    note(journal, path_of(6))
    assert journal.claim()
    assert journal.retry(None) == 4
    left = {n: row_of(journal, path_of(n)).state for n in range(1, 7)}
    assert left == {1: WAITING, 2: WAITING, 3: DONE, 4: WAITING, 5: WAITING, 6: WORKING}
    # so that the refused file is taken for a new one
    assert set(journal.files(row_of(journal, path_of(4)).id)) == {"y"}


def test_retry_of_a_done_session_that_is_named(journal: Journal) -> None:
    note(journal)
    claim_and_release(journal, DONE)
    assert journal.retry(A.folder) == 1
    assert row_of(journal).state is WAITING


def test_retry_leaves_a_session_in_work_alone(journal: Journal) -> None:
    note(journal)
    assert journal.claim()
    refused = FileRow("x", FileState.REFUSED, Signature(1, 1), reason="no")
    journal.write_files(row_of(journal).id, [refused])
    assert journal.retry(A.folder) == 0
    assert journal.retry(None) == 0
    assert row_of(journal).state is WORKING
    assert "x" in journal.files(row_of(journal).id)


def test_sessions_by_state_the_latest_change_first(journal: Journal, clock: Clock) -> None:
    for number in (1, 2, 3):
        clock.now += 1
        note(journal, path_of(number), due_at=number)
    clock.now += 1
    claim_and_release(journal, DONE)
    assert [r.path.number for r in journal.sessions()] == ["001", "003", "002"]
    assert [r.path.number for r in journal.sessions(WAITING)] == ["003", "002"]
    assert [r.path.number for r in journal.sessions(WAITING, DONE, limit=2)] == ["001", "003"]
    assert journal.sessions(PARKED) == []


# --- sessions: any order of steps ----------------------------------------------------------------


@dataclass
class Expected:
    """What a session must be; the rules of the journal in a few lines of Python."""

    state: SessionState
    due_at: float
    flagged: bool
    hinted_at: float | None = None
    not_before: float = 0.0


class JournalMachine(RuleBasedStateMachine):
    """Any order of steps of several workers, scans and people."""

    numbers = st.integers(1, 3)
    delays = st.sampled_from([-5.0, 0.0, 1.0, 10.0])

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.path = Path(self.folder.name, FILE_NAME)
        self.journal = Journal(self.path, now=self.clock)
        self.model: dict[str, Expected] = {}

    def teardown(self) -> None:
        self.journal.close()
        self.folder.cleanup()

    @rule(seconds=st.sampled_from([0.5, 1.0, 7.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def reopen(self) -> None:
        """As after a stop; what is in work stays so until `recover`."""
        self.journal.close()
        self.journal = Journal(self.path, now=self.clock)

    @rule(number=numbers, delay=delays, flagged=st.booleans(), new=st.booleans(), held=delays)
    def note(self, number: int, delay: float, flagged: bool, new: bool, held: float) -> None:
        session, now = path_of(number), self.clock.now
        due_at, held_until, new_flag = now + delay, now + held, flagged and new
        assert (
            self.journal.note(
                session, due_at=due_at, flagged=flagged, new_flag=new_flag, held_until=held_until
            )
            is None
        )
        old = self.model.get(session.folder)
        if old is None:
            self.model[session.folder] = Expected(WAITING, due_at, flagged)
            return
        old.flagged |= flagged
        match old.state:
            case SessionState.WORKING:
                old.hinted_at = min(old.hinted_at or due_at, due_at)
            case SessionState.WAITING:
                old.due_at = max(old.not_before, min(old.due_at, due_at))
            case SessionState.HELD if not flagged:
                old.due_at = min(old.due_at, held_until)
            case SessionState.PARKED if not new_flag:
                pass
            case _:
                old.state, old.due_at = WAITING, due_at

    def is_any(self, *states: SessionState) -> bool:
        return any(e.state in states for e in self.model.values())

    @rule()
    @precondition(lambda self: self.is_any(WAITING, HELD))
    def claim(self) -> None:
        row, now = self.journal.claim(), self.clock.now
        due = {
            folder: e.due_at
            for folder, e in self.model.items()
            if e.state in (WAITING, HELD) and e.due_at <= now
        }
        if row is None:
            assert not due
            return
        # the one that is due longest, so that none is starved; and never one in work
        assert due[row.folder] == min(due.values())
        expected = self.model[row.folder]
        expected.state, expected.hinted_at = WORKING, None

    @rule(number=numbers, news=st.booleans(), flagged=st.booleans())
    def work_begins(self, number: int, news: bool, flagged: bool) -> None:
        """As a note and a claim, which otherwise seldom meet; maybe with news during the work."""
        self.note(number, -5.0, flagged, flagged, 0.0)
        self.claim()
        if news:
            self.note(number, 1.0, flagged, flagged, 0.0)

    @precondition(lambda self: self.is_any(WORKING))
    @rule(
        data=st.data(),
        state=st.sampled_from([WAITING, DONE, HELD, PARKED]),
        delay=delays,
        attempt=st.integers(0, 3),
    )
    def release(self, data: st.DataObject, state: SessionState, delay: float, attempt: int) -> None:
        working = sorted(f for f, e in self.model.items() if e.state is WORKING)
        folder = data.draw(st.sampled_from(working))
        row = self.journal.session(folder)
        assert row
        due_at = self.clock.now + delay
        self.journal.release(row.id, state, due_at=due_at, attempt=attempt, reason="r")
        old = self.model[folder]
        hinted_at, old.hinted_at = old.hinted_at, None
        old.not_before = 0.0
        if hinted_at is None:
            old.state, old.due_at = state, due_at
        elif state is PARKED:
            old.state = PARKED
        else:
            old.state = WAITING
            old.due_at = min(hinted_at, due_at) if state is WAITING else hinted_at

    @rule(number=st.one_of(st.none(), numbers))
    def retry(self, number: int | None) -> None:
        folder = None if number is None else path_of(number).folder
        count = self.journal.retry(folder)
        changed = [
            e
            for f, e in self.model.items()
            if e.state is not WORKING
            and (f == folder or (folder is None and e.state in (PARKED, HELD, WAITING)))
        ]
        assert count == len(changed)
        for expected in changed:
            expected.state, expected.due_at = WAITING, max(self.clock.now, expected.not_before)

    @rule()
    @precondition(lambda self: self.is_any(WORKING))
    def recover(self) -> None:
        working = [e for e in self.model.values() if e.state is WORKING]
        assert self.journal.recover() == len(working)
        for expected in working:
            # none is known to be on Alyx, so that no file was sent
            expected.not_before = 0.0
            expected.state, expected.due_at = WAITING, self.clock.now

    @invariant()
    def the_journal_is_as_the_rules_say(self) -> None:
        if not hasattr(self, "model"):
            return
        rows = {row.folder: row for row in self.journal.sessions()}
        assert set(rows) == set(self.model)
        for folder, expected in self.model.items():
            row = rows[folder]
            assert (row.state, row.flagged) == (expected.state, expected.flagged)
            if expected.state in (WAITING, HELD):
                assert row.due_at == expected.due_at
        waiting = [e.due_at for e in self.model.values() if e.state in (WAITING, HELD)]
        assert self.journal.next_due_at() == min(waiting, default=None)


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(
    deadline=None,
    derandomize=True,
    max_examples=200,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow],
)


# --- files ---------------------------------------------------------------------------------------


def ready(path: str, **more: Any) -> FileRow:
    return FileRow(path, FileState.READY, Signature(3, 7), md5="m", **more)


def test_files_are_kept_as_written(journal: Journal, clock: Clock) -> None:
    note(journal)
    id_ = row_of(journal).id
    rows = [
        ready("alf/a.npy"),
        FileRow("b", FileState.PLACING, Signature(2**62, -1), "m", "d", "#r#/b", first_seen_at=5.0),
        FileRow("c", FileState.REFUSED, Signature(0, 0), reason="why", hint="what to do"),
        FileRow("d", FileState.SETTLING, Signature(0, 0)),
        FileRow("e", FileState.REGISTERED, Signature(0, 0), dataset_id="d"),
    ]
    journal.write_files(id_, rows)
    written = [r._replace(first_seen_at=r.first_seen_at or 1000.0, changed_at=1000.0) for r in rows]
    assert journal.files(id_) == {r.path: r for r in written}
    assert journal.known(A.folder) == (row_of(journal), journal.files(id_))
    assert journal.known("unknown") is None
    clock.now = 1001.0
    journal.write_files(id_, [written[1]], gone=["c", "never there"])
    assert set(journal.files(id_)) == {"alf/a.npy", "b", "d", "e"}
    assert (journal.files(id_)["b"].first_seen_at, journal.files(id_)["b"].changed_at) == (5, 1001)
    journal.write_files(id_, [])


def test_a_file_that_is_gone_and_back_in_one_write_is_kept(journal: Journal) -> None:
    note(journal)
    id_ = row_of(journal).id
    journal.write_files(id_, [ready("a")])
    journal.write_files(id_, [ready("a")], gone=["a"])
    assert set(journal.files(id_)) == {"a"}


def test_ready_files_come_in_order_and_no_more_than_asked_for(journal: Journal) -> None:
    for session in (A, B):
        note(journal, session)
        journal.write_files(row_of(journal, session).id, [ready(f"{n}") for n in range(5)])
    id_ = row_of(journal).id
    journal.write_files(id_, [FileRow("0", FileState.REGISTERED, Signature(1, 1))])
    assert [f.path for f in journal.ready_files(id_, 2)] == ["1", "2"]
    assert [f.path for f in journal.ready_files(id_, -1)] == ["1", "2", "3", "4"]


def test_files_in_states_of_all_sessions(journal: Journal) -> None:
    for session in (B, A):
        note(journal, session)
        refused = FileRow("z", FileState.REFUSED, Signature(1, 1), reason="no")
        journal.write_files(row_of(journal, session).id, [refused, ready("y")])
    found = journal.files_in(FileState.REFUSED, FileState.READY)
    expected = [(A.folder, "y"), (A.folder, "z"), (B.folder, "y"), (B.folder, "z")]
    assert [(folder, row.path) for folder, row in found] == expected
    assert [row.path for _, row in journal.files_in(FileState.REFUSED)] == ["z", "z"]
    assert journal.files_in(FileState.PLACING) == []


def test_counts(journal: Journal) -> None:
    sessions, files = journal.counts()
    assert set(sessions) == set(SessionState)
    assert set(files) == set(FileState)
    assert not any(sessions.values())
    note(journal, A)
    note(journal, B)
    journal.write_files(row_of(journal).id, [ready("a"), ready("b")])
    claim_and_release(journal, DONE)
    sessions, files = journal.counts()
    assert (sessions[WAITING], sessions[DONE], files[FileState.READY]) == (1, 1, 2)


def test_one_bad_row_undoes_the_whole_write(journal: Journal) -> None:
    note(journal)
    id_ = row_of(journal).id
    journal.write_files(id_, [ready("a")])
    bad = FileRow("b", FileState.REFUSED, Signature(1, 1))  # without a reason
    with pytest.raises(sqlite3.IntegrityError):
        journal.write_files(id_, [ready("c"), bad], gone=["a"])
    assert set(journal.files(id_)) == {"a"}
    journal.write_files(id_, [ready("d")])  # and the journal goes on working


# --- what the schema itself refuses --------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE session SET state = 'resting'",
        "UPDATE session SET state = 'parked', reason = NULL",
        "UPDATE session SET state = 'held', reason = NULL",
        "UPDATE session SET flagged = 2",
        "UPDATE session SET doubt = NULL",
        "UPDATE session SET due_at = NULL",
        "UPDATE session SET waiting_since = NULL",
        "UPDATE session SET state = 'done'",
        "INSERT INTO session (folder, subject, date, number, due_at, changed_at, waiting_since)"
        " VALUES ('a/2020-01-01/1', 'a', '2020-01-01', 1, 0, 0, 0)",
        "INSERT INTO session (folder, subject, date, number, due_at, changed_at, waiting_since)"
        " VALUES ('a/2020-01-01/001', 'b', '2020-01-01', 1, 0, 0, 0)",
        "UPDATE file SET state = 'lost'",
        "UPDATE file SET state = 'placing'",
        "UPDATE file SET move_to = 'x'",
        "UPDATE file SET state = 'refused', reason = NULL",
        "UPDATE file SET session_id = 99",
        "INSERT INTO request (kind, asked_at) VALUES ('dance', 0)",
        "INSERT INTO request (kind, asked_at, state) VALUES ('scan', 0, 'lost')",
    ],
)
def test_states_that_cannot_be(journal: Journal, statement: str) -> None:
    note(journal)
    journal.write_files(row_of(journal).id, [ready("a")])
    with pytest.raises(sqlite3.IntegrityError):
        journal._db.execute(statement)


def test_since_when_a_session_waits(journal: Journal, clock: Clock) -> None:
    """Attempts, and what comes up while it waits, do not make the wait a new one."""
    note(journal)
    for clock.now in (1010.0, 1020.0):
        note(journal, due_at=clock.now, flagged=True)
        claim_and_release(journal, WAITING, due_at=clock.now + 10, attempt=1)
    note(journal, B)
    assert row_of(journal).waiting_since == journal.waiting_since() == 1000.0
    clock.now = 1030.0
    for _ in (A, B):
        claim_and_release(journal, DONE)
    assert row_of(journal).waiting_since is journal.waiting_since() is None
    clock.now = 1040.0
    note(journal, due_at=1050.0)
    assert row_of(journal).waiting_since == 1040.0
    clock.now = 1050.0
    assert journal.claim()
    note(journal, due_at=1060.0)
    clock.now = 1055.0
    journal.release(row_of(journal).id, DONE)  # all of what it waited for is done
    assert row_of(journal).waiting_since == 1055.0
    clock.now = 1060.0
    claim_and_release(journal, PARKED)
    assert row_of(journal).waiting_since is None
    journal.retry(None)
    assert row_of(journal).waiting_since == 1060.0
    journal.shift(-500.0)
    assert row_of(journal).waiting_since == 560.0
    claim_and_release(journal, HELD, due_at=1070.0)
    clock.now = 1070.0
    assert journal.claim()
    journal.recover()
    assert row_of(journal).waiting_since == 1070.0
    clock.now = 1000.0  # set back while regd did not run
    journal.clamp(3600, 3600)
    assert row_of(journal).waiting_since == 1000.0


def test_releasing_as_parked_or_held_needs_a_reason(journal: Journal) -> None:
    note(journal)
    row = journal.claim()
    assert row
    for state in (PARKED, HELD):
        with pytest.raises(sqlite3.IntegrityError):
            journal.release(row.id, state)
    assert row_of(journal).state is WORKING


def test_every_state_of_the_model_is_one_of_the_schema(journal: Journal) -> None:
    note(journal)
    id_ = row_of(journal).id
    for session_state in SessionState:
        since = 1000.0 if session_state in (WAITING, WORKING) else None
        journal._db.execute(
            "UPDATE session SET state = ?, reason = 'r', waiting_since = ?", (session_state, since)
        )
    for file_state in FileState:
        move_to = "x" if file_state is FileState.PLACING else None
        row = FileRow("a", file_state, Signature(1, 1), reason="r", move_to=move_to)
        journal.write_files(id_, [row])


# --- strays, facts, requests ---------------------------------------------------------------------


def test_strays_are_kept_until_a_later_whole_scan_misses_them(journal: Journal) -> None:
    journal.write_strays(1, [("x", "why", "what"), ("y", "why", "what")])
    journal.write_strays(2, [("y", "other", "what")])
    assert set(journal.strays()) == {("x", "why", "what"), ("y", "other", "what")}
    journal.drop_strays_before(2)
    assert journal.strays() == [("y", "other", "what")]


def test_facts(journal: Journal) -> None:
    assert journal.fact("x") is None
    for value in (1, "é", None, [1, {"a": 2.5}], False):
        journal.set_fact("x", value)
        assert journal.fact("x") == value


def test_a_journal_belongs_to_one_data_root(journal: Journal) -> None:
    journal.bind_root(Path("/data"))
    journal.bind_root(Path("/data"))
    with pytest.raises(InvalidInput, match="/data, not /other") as caught:
        journal.bind_root(Path("/other"))
    assert "state_dir" in caught.value.hint


def test_scans_asked_for(journal: Journal, clock: Clock) -> None:
    assert journal.take_scan() is None
    first = journal.ask_scan(everything=False)
    assert journal.scan_done(first) is False
    assert journal.take_scan() is False
    second = journal.ask_scan(everything=True)
    assert second != first
    # asked for again, as after a crash: what was taken and not finished is taken again
    assert journal.take_scan() is True
    third = journal.ask_scan(everything=False)
    journal.finish_scans()
    assert [journal.scan_done(n) for n in (first, second, third)] == [True, True, False]
    assert journal.take_scan() is False
    clock.now += 90000.0
    journal.finish_scans()
    assert journal.scan_done(first) is True  # forgotten by now, and done all the same
    assert journal._db.execute("SELECT count(*) FROM request").fetchone() == (0,)


# --- other processes -----------------------------------------------------------------------------


def test_what_another_process_changes_is_seen(file: Path, journal: Journal, clock: Clock) -> None:
    note(journal)
    claim_and_release(journal, PARKED)
    other = Journal(file, now=clock)
    seen = journal.version()
    assert journal.version() == seen
    note(journal, B)  # one's own changes are no news
    assert journal.version() == seen
    for change in (lambda: other.retry(None), lambda: other.ask_scan(everything=True)):
        assert change()
        assert journal.version() != seen
        seen = journal.version()
    other.close()
    assert row_of(journal).state is WAITING
    assert journal.take_scan() is True


def test_a_scan_asked_for_here_shows_as_well_as_one_asked_for_elsewhere(journal: Journal) -> None:
    seen = journal.version()
    journal.ask_scan(everything=False)
    assert journal.version() != seen


def test_two_connections_never_claim_one_session(file: Path, clock: Clock) -> None:
    with Journal(file, now=clock) as one, Journal(file, now=clock) as two:
        for number in range(1, 41):
            note(one, path_of(number))
        claimed: list[str] = []

        def work(journal: Journal) -> None:
            while (row := journal.claim()) is not None:
                claimed.append(row.folder)

        threads = [threading.Thread(target=work, args=(j,)) for j in (one, one, two, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(claimed) == len(set(claimed)) == 40


def test_a_reader_beside_a_writer(file: Path, journal: Journal, clock: Clock) -> None:
    note(journal)
    with Journal(file, now=clock, read_only=True) as reader:
        assert row_of(reader).state is WAITING
        assert journal.claim()
        assert row_of(reader).state is WORKING
        with pytest.raises(JournalFailed, match="readonly"):
            reader.retry(None)
        with journal._write() as db:
            db.execute("UPDATE session SET attempt = 9")
            assert row_of(reader).attempt == 0  # and it does not wait for the writer
    assert row_of(journal).attempt == 9


# --- opening -------------------------------------------------------------------------------------


def test_opened_again_it_holds_what_was_written(file: Path, clock: Clock) -> None:
    with Journal(file, now=clock) as journal:
        note(journal, flagged=True)
        before = row_of(journal)
    with Journal(file, now=clock) as journal:
        assert row_of(journal) == before


@pytest.mark.parametrize("name", ["with space", "per%20cent", "que?ry", "ha#sh", "größe"])
def test_any_name_of_a_folder(tmp_path: Path, clock: Clock, name: str) -> None:
    (tmp_path / name).mkdir()
    with Journal(tmp_path / name / FILE_NAME, now=clock) as journal:
        note(journal)
    assert (tmp_path / name / FILE_NAME).exists()
    with Journal(tmp_path / name / FILE_NAME, now=clock, read_only=True) as journal:
        assert row_of(journal)


def test_reading_needs_a_journal(file: Path, clock: Clock) -> None:
    with pytest.raises(NeedsHuman, match="no journal") as caught:
        Journal(file, now=clock, read_only=True)
    assert "regd run" in caught.value.hint
    assert not file.exists()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_journal_of_a_newer_version_is_refused(file: Path, clock: Clock, read_only: bool) -> None:
    with Journal(file, now=clock) as journal:
        journal._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    before = file.read_bytes()
    with pytest.raises(NeedsHuman, match=f"newer version.*{SCHEMA_VERSION + 1}") as caught:
        Journal(file, now=clock, read_only=read_only)
    assert caught.value.hint
    assert file.read_bytes() == before


@pytest.fixture
def next_version(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A way to have this be the regd after this one, whose schema has one column more."""

    def upgrade(step: str) -> None:
        newer = journal_module._schema().replace(
            "    eid         TEXT,", "    eid TEXT,\n    colour TEXT,"
        )
        monkeypatch.setattr(journal_module, "_schema", lambda: newer)
        monkeypatch.setattr(journal_module, "_STEPS", (*journal_module._STEPS, step))
        monkeypatch.setattr(journal_module, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
        journal_module._columns_wanted.cache_clear()

    yield upgrade
    monkeypatch.undo()
    journal_module._columns_wanted.cache_clear()


def test_a_journal_of_an_older_version_is_brought_up_to_date(
    file: Path, clock: Clock, next_version: Callable[[str], None]
) -> None:
    with Journal(file, now=clock) as journal:
        note(journal)
    next_version(
        "ALTER TABLE session ADD COLUMN colour TEXT;\nUPDATE session SET colour = 'red';\n"
    )
    with pytest.raises(NeedsHuman, match="older version") as caught:
        Journal(file, now=clock, read_only=True)
    assert "regd scan" in caught.value.hint
    for _ in range(2):
        with Journal(file, now=clock) as journal:
            assert row_of(journal).state is WAITING
            assert journal._db.execute("SELECT colour FROM session").fetchall() == [("red",)]
    Journal(file, now=clock, read_only=True).close()


@pytest.mark.parametrize(
    "step", ["ALTER TABLE no_such_table ADD COLUMN colour TEXT;\n", "DROP TABLE request;\n"]
)
def test_an_older_journal_with_other_tables_is_damaged(
    file: Path, clock: Clock, next_version: Callable[[str], None], step: str
) -> None:
    with Journal(file, now=clock) as journal:
        note(journal)
    next_version(step)
    with pytest.raises(JournalDamaged):
        Journal(file, now=clock)
    with Journal(file.with_name("copy"), now=clock) as new:  # one that is made new is complete
        new._db.execute("SELECT colour FROM session")
    with sqlite3.connect(file) as db:  # and that one is as it was
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert db.execute("SELECT count(*) FROM request").fetchone() == (0,)
    db.close()


@pytest.mark.parametrize("content", [b"not a database, but a text " * 50, bytes(range(256)) * 32])
def test_a_file_that_is_no_journal_is_left_as_it_is(
    file: Path, clock: Clock, content: bytes
) -> None:
    file.write_bytes(content)
    with pytest.raises(JournalDamaged, match="not a database"):
        Journal(file, now=clock)
    assert file.read_bytes() == content


def test_a_folder_that_is_none(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.sqlite").mkdir()
    for path in ("missing/j.sqlite", "file/j.sqlite"):
        with pytest.raises(JournalFailed, match="cannot be used") as caught:
            Journal(tmp_path / path, now=clock)
        assert "state_dir" in caught.value.hint


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that any user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="regd-test-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path
        path.chmod(0o755)


@pytest.fixture
def nobody() -> Iterator[Any]:
    """A way to be, for the rest of the test, somebody to whom mode bits apply."""
    if os.geteuid() != 0:
        yield lambda: None
        return
    yield lambda: os.seteuid(65534)
    os.seteuid(0)


def test_a_folder_that_may_not_be_written(public: Path, nobody: Any, clock: Clock) -> None:
    public.chmod(0o555)
    nobody()
    with pytest.raises(JournalFailed, match="cannot be used"):
        Journal(public / FILE_NAME, now=clock)


def test_a_journal_that_may_not_be_written(public: Path, nobody: Any, clock: Clock) -> None:
    Journal(public / FILE_NAME, now=clock).close()
    (public / FILE_NAME).chmod(0o444)
    public.chmod(0o555)
    nobody()
    with pytest.raises(JournalFailed, match="cannot be used") as caught:
        Journal(public / FILE_NAME, now=clock)
    assert str(public / FILE_NAME) in caught.value.reason
    assert "regd's user" in caught.value.hint
    assert "state_dir" in caught.value.hint


def test_a_state_folder_that_is_its_owners_alone(public: Path, nobody: Any, clock: Clock) -> None:
    Journal(public / FILE_NAME, now=clock).close()
    public.chmod(0o700)
    nobody()
    if os.geteuid() != 65534:
        pytest.skip("only root can be somebody else")
    with pytest.raises(JournalFailed, match="cannot be used: Permission denied") as caught:
        Journal(public / FILE_NAME, now=clock, read_only=True)
    assert "sudo -u regd" in caught.value.hint


def test_a_reader_who_may_not_write_beside_the_journal(
    public: Path, nobody: Any, clock: Clock
) -> None:
    with Journal(public / FILE_NAME, now=clock) as journal:
        note(journal)
    public.chmod(0o555)
    nobody()
    # SQLite keeps its -shm file there, for a reader, too
    with pytest.raises(JournalFailed, match="cannot be used") as caught:
        Journal(public / FILE_NAME, now=clock, read_only=True)
    assert "regd's user" in caught.value.hint


@pytest.mark.parametrize("read_only", [False, True])
def test_a_journal_that_may_not_be_read(
    public: Path, nobody: Any, clock: Clock, read_only: bool
) -> None:
    Journal(public / FILE_NAME, now=clock).close()
    (public / FILE_NAME).chmod(0)
    nobody()
    before = open_descriptors()
    with pytest.raises(JournalFailed, match="cannot be used") as caught:
        Journal(public / FILE_NAME, now=clock, read_only=read_only)
    assert "state_dir" in caught.value.hint
    assert open_descriptors() == before


def test_a_reader_beside_a_running_writer_needs_only_the_right_to_read(
    public: Path, nobody: Any, clock: Clock
) -> None:
    with Journal(public / FILE_NAME, now=clock) as journal:
        note(journal)
        for path in public.iterdir():
            path.chmod(0o644)
        public.chmod(0o555)
        nobody()
        with Journal(public / FILE_NAME, now=clock, read_only=True) as reader:
            assert row_of(reader)


# --- crashes -------------------------------------------------------------------------------------

WRITER = """
    import sys, time
    from pathlib import Path
    from regd.journal import FileRow, Journal
    from regd.model import FileState, Signature
    from regd.paths import parse_session

    journal = Journal(Path(sys.argv[1]), now=time.time)
    number = 0
    while True:
        number += 1
        session = parse_session((f"s{number}", "2020-01-01", "001"))
        journal.note(session, due_at=0.0)
        row = journal.claim()
        rows = [FileRow(str(n), FileState.READY, Signature(n, n)) for n in range(20)]
        journal.write_files(row.id, rows)
        print(number, flush=True)
"""


@pytest.mark.parametrize("after", [1, 7, 40])
def test_a_kill_in_the_middle_of_writing_loses_nothing_that_was_committed(
    file: Path, clock: Clock, after: int
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(file)], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout
        told = 0
        while told < after:
            told = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        told = max([told, *map(int, writer.stdout.read().split())])
    assert writer.returncode == -signal.SIGKILL
    with Journal(file, now=clock) as journal:
        assert journal._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        for number in range(1, told + 1):
            known = journal.known(f"s{number}/2020-01-01/001")
            assert known is not None
            assert known[0].state is WORKING
            assert len(known[1]) == 20
        # one more may have got as far as any of its commits, but a write is whole or not at all
        last = journal.known(f"s{told + 1}/2020-01-01/001")
        assert last is None or len(last[1]) in (0, 20)
        assert len(journal.sessions()) in (told, told + 1)
        assert journal.recover() >= told


def test_durable_waits_for_the_disk(
    file: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.fdatasync, []

    def fdatasync(fd: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    note(journal)
    assert synced == []
    journal.durable()
    assert synced == [f"{file.resolve()}-wal"]


def test_durable_at_any_time(file: Path, journal: Journal, clock: Clock) -> None:
    journal.durable()
    note(journal)
    journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    journal.durable()
    with Journal(file, now=clock) as other:
        other.durable()  # opened, and not written to
    journal.durable()


def test_a_full_disk_is_said_and_leaves_the_journal_whole(journal: Journal) -> None:
    note(journal)
    id_ = row_of(journal).id
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    many = [ready(f"{n:0200}") for n in range(500)]
    with pytest.raises(JournalFailed, match="full"):
        journal.write_files(id_, many)
    assert journal.files(id_) == {}
    journal._db.execute("PRAGMA max_page_count = 100000")
    journal.write_files(id_, many)
    assert len(journal.files(id_)) == 500


def test_threads_share_a_journal(journal: Journal) -> None:
    def work(number: int) -> None:
        for turn in range(10):
            note(journal, path_of(1, f"s{number}-{turn}"))
            journal.counts()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(journal.sessions()) == 60


# --- a clock that is set -------------------------------------------------------------------------


def test_waits_keep_their_length_when_the_clock_is_set(journal: Journal, clock: Clock) -> None:
    note(journal, due_at=clock.now + 60)
    clock.now -= 5 * 3600
    journal.shift(-5 * 3600)
    assert journal.next_due_at() == clock.now + 60


def test_what_waits_longer_than_anything_can_is_due_soon(journal: Journal, clock: Clock) -> None:
    note(journal, due_at=clock.now + 60)
    assert journal.clamp(3600, 6 * 3600) == 0
    clock.now -= 86400
    assert journal.clamp(3600, 6 * 3600) == 1
    due_at = journal.next_due_at()
    assert due_at is not None
    assert clock.now <= due_at <= clock.now + UNKNOWN_OUTCOME_S


def test_what_is_counted_and_listed_for_people(journal: Journal) -> None:
    other = parse_session(("a", "2020-01-02", "001"))
    for session in (B, A, other):
        note(journal, session)
    ids = [row_of(journal, session).id for session in (A, B)]
    rows = [ready("r"), ready("s")._replace(state=FileState.SETTLING)]
    slow = ready("t")._replace(state=FileState.SETTLING, reason="it grows", hint="close it")
    journal.write_files(ids[0], [*rows, slow])
    assert journal.file_totals([*ids, 99]) == {
        ids[0]: {FileState.READY: (1, 3), FileState.SETTLING: (2, 6)},
        ids[1]: {},
        99: {},
    }
    assert [row.folder for row in journal.sessions_of("2020-01-01")] == [A.folder, B.folder]
    assert [row.folder for row in journal.sessions_of("2020-01-01", limit=1)] == [A.folder]
    queued = (FileState.SETTLING, FileState.READY)
    assert len(journal.files_in(*queued)) == 3
    assert [row.path for _, row in journal.files_in(*queued, hinted=True)] == ["t"]


# --- what is told of one session -----------------------------------------------------------------


def told(journal: Journal, session: SessionPath = A) -> list[tuple[str, str | None, int]]:
    return [(e.name, e.about, e.times) for e in journal.history(row_of(journal, session).id)]


def test_the_history_of_a_session(journal: Journal, clock: Clock) -> None:
    """What happens again at once makes no further row, and waiting for a writer is no event."""
    note(journal, flagged=True)
    for clock.now in (1010.0, 1020.0, 1030.0):
        claim_and_release(journal, WAITING, due_at=clock.now + 10, reason="no answer", hint="")
    clock.now = 1040.0
    row = journal.claim()
    assert row
    journal.identify(row.id, "e", doubt=False)
    journal.unflagged(row.id)
    journal.unflagged(row.id)
    journal.moved(row.id, "a.npy", ready("#2020-01-02#/a.npy")._replace(md5="0" * 32))
    journal.release(row.id, WAITING, due_at=1050.0, reason="files are being written")
    clock.now = 1050.0
    assert journal.claim()
    journal.recover(0.0)
    for state in (DONE, PARKED):
        clock.now += 10.0
        note(journal, due_at=clock.now)
        claim_and_release(journal, state)
    journal.retry(None)
    assert told(journal) == [
        ("failed", "no answer", 3),
        ("created", "e", 1),
        ("unflagged", None, 1),
        ("moved", "a.npy", 1),
        ("interrupted", None, 1),
        ("done", None, 1),
        ("parked", "because", 1),
        ("resumed", None, 1),
    ]
    first, *_, moved, _, _, _, last = journal.history(row.id)
    assert (first.first_at, first.last_at) == (1010.0, 1030.0)
    assert (moved.about, moved.target) == ("a.npy", "#2020-01-02#/a.npy")
    assert last.last_at == 1070.0
    assert row_of(journal).first_seen_at == 1000.0
    assert list(journal.files(row.id)) == ["#2020-01-02#/a.npy"]


def test_a_history_has_an_end(journal: Journal) -> None:
    note(journal)
    session = row_of(journal).id
    for number in range(500):
        journal.moved(session, f"{number}", ready(f"#r#/{number}"))
        assert journal.claim()
        journal.release(session, WAITING, due_at=0.0, reason=f"failure {number}", hint="")
    kept = journal.history(session)
    assert sum(e.name is Happening.MOVED for e in kept) == 500
    assert len(kept) <= 500 + 200
    assert kept[-1].about == "failure 499"


def test_every_happening_of_the_model_is_one_of_the_schema(journal: Journal) -> None:
    note(journal)
    for name in Happening:
        target = "x" if name is Happening.MOVED else None
        journal._happened(row_of(journal).id, name, "a", target)


def test_what_a_person_may_call_a_session(journal: Journal) -> None:
    one = path_of(1, "mouse_1", "lab")
    two = parse_session(("lab", "Subjects", "mouse_1", "2020-01-02", "001"))
    other = path_of(1, "mousex1")
    for session in (one, two, other):
        note(journal, session)
    row = journal.claim()
    assert row
    journal.identify(row.id, "6B0F".lower(), doubt=True)

    def found(name: str) -> list[str]:
        return [row.folder for row in journal.find(name)]

    assert found("6B0F") == [row.folder]
    for name in (
        one.folder,
        "mouse_1/2020-01-01/001",
        "mouse_1/2020-01-01/1",
        "mouse_1/2020-01-01",
    ):
        assert found(name) == [one.folder], name
    assert found("2020-01-01/001") == [one.folder, other.folder]
    assert found("mouse_1") == found("lab/Subjects") == [two.folder, one.folder]
    assert found("001") == [two.folder, one.folder, other.folder]
    for name in ("mouse", "1", "MOUSE_1", "", "%", "/", "2020-01-03/001"):
        assert found(name) == [], name
    assert len(journal.find("001", limit=2)) == 2


def test_forgetting(journal: Journal) -> None:
    note(journal)
    note(journal, B)
    session = row_of(journal).id
    journal.write_files(session, [ready("a")])
    claim_and_release(journal, PARKED)
    journal.forget(session)
    assert journal.session(A.folder) is None
    assert journal.history(session) == []
    assert journal.files(session) == {}
    assert row_of(journal, B).state is WAITING
    assert journal.write_strays(1, [("x", "why", "do")])
    assert journal.forget_stray("x")
    assert not journal.forget_stray("x")
    assert journal.strays() == []


def test_what_is_in_work_or_being_moved_is_not_forgotten(journal: Journal) -> None:
    note(journal)
    row = journal.claim()
    assert row
    with pytest.raises(NeedsHuman, match="worked on"):
        journal.forget(row.id)
    placing = ready("a")._replace(state=FileState.PLACING, move_to="#r#/a")
    journal.write_files(row.id, [placing])
    journal.release(row.id, PARKED, reason="r", hint="h")
    with pytest.raises(NeedsHuman, match=r"a/2020-01-01/001/a .* not ended") as caught:
        journal.forget(row.id)
    assert "regd retry" in caught.value.hint
    assert journal.files(row.id)["a"].move_to == "#r#/a"


def test_what_is_not_registered_is_found_without_reading_the_rest(journal: Journal) -> None:
    asked: list[str] = []
    journal._db.set_trace_callback(asked.append)
    journal.left()
    journal.files_in(FileState.REFUSED)
    journal.files_in(FileState.SETTLING, FileState.READY, hinted=True)
    journal.ready_files(1, 100)  # of a session with 100,000 files, a thousand times
    journal.states_left(1)
    journal._db.set_trace_callback(None)
    of_files = [query for query in asked if "FROM file" in query]
    assert len(of_files) == 5
    for query in of_files:
        plan = journal._db.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
        assert any(
            "USING INDEX file_state" in str(step) or "COVERING INDEX file_state" in str(step)
            for step in plan
        ), plan
