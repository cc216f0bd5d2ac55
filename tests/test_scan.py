"""A scan of a real tree against a real journal."""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from regd.errors import printable
from regd.journal import FILE_NAME, FileRow, Journal
from regd.model import FileState, SessionState, Signature
from regd.paths import Ignored
from regd.scan import Scanner, ScanResult
from regd.settings import Settings

NOW = 1_700_000_000.0
DAY_S = 86400.0
FLAG = "create_me.flag"
S1, S2 = "a/2020-01-01/001", "a/2020-01-01/002"


@dataclass
class Place:
    """A data root, its journal, and a scanner."""

    root: Path
    journal: Journal
    stop: threading.Event = field(default_factory=threading.Event)
    settings: Settings = field(default_factory=Settings)

    def put(self, relative: str, age_s: float = 60.0) -> Path:
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (NOW - age_s, NOW - age_s))
        return path

    def scan(self, now: float = NOW, **more: Any) -> ScanResult:
        ignored = Ignored(self.settings.watch.ignore)
        scanner = Scanner(self.root, self.settings, self.journal, ignored, self.stop)
        return scanner.scan(now, **more)

    def row(self, folder: str = S1) -> Any:
        row = self.journal.session(folder)
        assert row is not None
        return row

    def finish(self, state: SessionState = SessionState.DONE, folder: str = S1) -> None:
        """Do as a worker does: register all files as they are, and release the session."""
        row = self.journal.claim()
        assert row is not None
        assert row.folder == folder
        files = [p for p in (self.root / folder).rglob("*") if p.is_file() and p.name != FLAG]
        rows = []
        for path in files:
            status = path.stat()
            inner = printable(str(path.relative_to(self.root / folder)))
            signature = Signature(status.st_size, status.st_mtime_ns)
            rows.append(FileRow(inner, FileState.REGISTERED, signature))
        self.journal.write_files(row.id, rows)
        self.journal.release(row.id, state, due_at=NOW + 600, reason="because")


def strays(result: ScanResult) -> dict[str, str]:
    return {path: f"{reason} | {hint}" for path, reason, hint in result.strays}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Place]]:
    root = tmp_path / "data"
    root.mkdir()
    with Journal(tmp_path / FILE_NAME, now=lambda: NOW) as journal:
        yield lambda **values: Place(root, journal, settings=Settings(**values))


@pytest.fixture
def place(make: Callable[..., Place]) -> Place:
    return make()


# --- what a scan remembers -----------------------------------------------------------------------


def listing(place: Place) -> bytes | None:
    return place.journal.listings("a/2020-01-01").get(S1)


@pytest.fixture
def compared(place: Place) -> Place:
    """A session that is registered, and was found to need nothing."""
    place.put(f"{S1}/alf/spikes.times.npy")
    place.scan()
    place.finish()
    assert listing(place) is None
    assert place.scan().noted == []
    assert listing(place) is not None
    return place


def test_a_session_in_which_nothing_changed_is_counted_without_its_files_being_read(
    compared: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Journal, "files", lambda *_: pytest.fail("its rows were read"))
    again = compared.scan()
    assert (again.sessions, again.files, again.noted) == (1, 1, [])


@pytest.mark.parametrize(
    "change",
    [
        lambda s: (s / "alf/spikes.times.npy").write_bytes(b"y" * 9),
        lambda s: os.utime(s / "alf/spikes.times.npy", (NOW, NOW)),
        lambda s: (s / "alf/spikes.clusters.npy").write_bytes(b"x"),
        lambda s: (s / "alf/spikes.times.npy").rename(s / "alf/spikes.amps.npy"),
        lambda s: (s / FLAG).touch(),
    ],
    ids=["written", "touched", "added", "renamed", "flagged"],
)
def test_what_changes_after_that_is_noted(compared: Place, change: Callable[[Path], Any]) -> None:
    change(compared.root / S1)
    assert compared.scan().noted == [S1]


def test_a_session_that_was_worked_on_is_compared_again(compared: Place) -> None:
    assert compared.journal.retry(S1) == 1
    assert compared.journal.claim() is not None
    assert listing(compared) is None


def test_a_finding_that_is_out_of_date_is_not_written_down(compared: Place) -> None:
    row = compared.row()
    compared.journal.retry(S1)
    compared.journal.claim()
    compared.journal.note_unchanged([(row.id, row.changed_at, b"while it is in work")])
    assert listing(compared) is None
    compared.journal.release(row.id, SessionState.DONE)
    compared.journal.note_unchanged([(row.id, row.changed_at - 1.0, b"before it was")])
    assert listing(compared) is None


def test_files_that_were_of_no_interest_are_looked_at_once_they_are(
    make: Callable[..., Place],
) -> None:
    place = make(register={"files": False})
    place.put(f"{S1}/{FLAG}")
    place.put(f"{S1}/alf/spikes.times.npy")
    place.scan()
    row = place.journal.claim()
    assert row is not None
    place.journal.unflagged(row.id)
    place.journal.release(row.id, SessionState.DONE)
    (place.root / S1 / FLAG).unlink()
    assert place.scan().noted == []
    assert place.scan().noted == []
    place.settings = Settings()
    assert place.scan().noted == [S1]


def test_others_get_a_turn_between_two_folders(place: Place) -> None:
    for number in range(1, 4):
        place.put(f"a/2020-01-01/00{number}/alf/spikes.times.npy")
    turns: list[None] = []
    scanner = Scanner(
        place.root,
        place.settings,
        place.journal,
        Ignored(()),
        place.stop,
        lambda: turns.append(None),
    )
    scanner.scan(NOW)
    assert len(turns) >= 3


# --- what is noted -------------------------------------------------------------------------------


def test_an_empty_root(place: Place) -> None:
    assert place.scan() == ScanResult()
    assert place.journal.fact("backlog") == {"sessions": 0, "files": 0, "at": NOW}


def test_a_new_session_is_noted(place: Place) -> None:
    place.put(f"{S1}/alf/x.npy")
    place.put(f"{S1}/y.npy")
    place.put(f"lab/Subjects/b/2020-01-01/3/{FLAG}")
    result = place.scan()
    assert (result.sessions, result.files) == (2, 2)
    assert sorted(result.noted) == [S1, "lab/Subjects/b/2020-01-01/3"]
    assert result.strays == []
    row = place.row()
    assert (row.state, row.due_at, row.flagged) == (SessionState.WAITING, NOW, False)
    assert place.row("lab/Subjects/b/2020-01-01/3").flagged is True


def test_a_session_without_files_or_flag_is_none(place: Place) -> None:
    (place.root / S1 / "alf").mkdir(parents=True)
    place.put(f"{S2}/x.tmp")
    result = place.scan()
    assert (result.sessions, result.files, result.noted) == (2, 0, [])
    assert place.journal.sessions() == []


def test_an_unchanged_session_is_left_alone(place: Place) -> None:
    place.put(f"{S1}/x.npy")
    place.scan()
    place.finish()
    before = place.row()
    result = place.scan(NOW + 1)
    assert (result.sessions, result.files, result.noted) == (1, 1, [])
    assert place.row() == before


@pytest.mark.parametrize("change", ["size", "time", "new"])
def test_a_changed_session_is_noted_again(place: Place, change: str) -> None:
    path = place.put(f"{S1}/x.npy")
    place.scan()
    place.finish()
    match change:
        case "size":
            stamp = path.stat().st_mtime_ns
            path.write_bytes(b"xy")
            os.utime(path, ns=(stamp, stamp))
        case "time":
            os.utime(path, (NOW, NOW))
        case "new":
            place.put(f"{S1}/alf/y.npy")
    assert place.scan(NOW + 1).noted == [S1]
    assert (place.row().state, place.row().due_at) == (SessionState.WAITING, NOW + 1)


def test_a_deleted_file_is_no_work(place: Place) -> None:
    place.put(f"{S1}/x.npy")
    path = place.put(f"{S1}/y.npy")
    place.scan()
    place.finish()
    path.unlink()
    assert place.scan().noted == []


def test_a_name_that_is_not_utf8_is_noted_once(place: Place) -> None:
    place.put(f"{S1}/x.npy")
    name = os.fsencode(place.root / S1) + b"/\xff.npy"
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
    result = place.scan()
    assert (result.files, result.noted) == (2, [S1])
    place.finish()
    assert "\\udcff.npy" in place.journal.files(place.row().id)
    assert place.scan().noted == []


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_link_in_a_session_is_seen_and_not_followed(place: Place, kind: str) -> None:
    place.put(f"{S1}/x.npy")
    outside = place.root.parent / "outside"
    outside.mkdir()
    (outside / "many").touch()
    if kind == "link":
        (place.root / S1 / "odd").symlink_to(outside)
    else:
        os.mkfifo(place.root / S1 / "odd")
    result = place.scan()
    assert (result.files, result.noted) == (2, [S1])


# --- flags ---------------------------------------------------------------------------------------


def test_a_flag_alone_makes_a_session(place: Place) -> None:
    place.put(f"{S1}/{FLAG}")
    result = place.scan()
    assert (result.sessions, result.files, result.noted) == (1, 0, [S1])
    assert place.row().flagged is True


def test_a_flag_put_into_a_finished_session(place: Place) -> None:
    place.put(f"{S1}/x.npy")
    place.scan()
    place.finish()
    place.put(f"{S1}/{FLAG}")
    assert place.scan().noted == [S1]
    assert (place.row().state, place.row().flagged) == (SessionState.WAITING, True)


def test_a_flag_that_could_not_be_removed_is_tried_again(place: Place) -> None:
    place.put(f"{S1}/{FLAG}")
    place.scan()
    place.finish()
    assert place.row().flagged
    assert place.scan().noted == [S1]


def test_a_new_flag_undoes_parking_and_the_old_one_does_not(place: Place) -> None:
    flag = place.put(f"{S1}/{FLAG}")
    place.scan()
    place.finish(SessionState.PARKED)
    assert place.scan().noted == []
    place.put(f"{S1}/x.npy")
    place.scan()
    assert place.row().state is SessionState.PARKED
    place.journal.unflagged(place.row().id)
    flag.touch()
    assert place.scan().noted == [S1]
    assert place.row().state is SessionState.WAITING


def test_a_held_session_is_not_looked_at_at_once(place: Place) -> None:
    place.put(f"{S1}/x.npy")
    place.scan()
    place.finish(SessionState.HELD)
    place.put(f"{S1}/y.npy")
    assert place.scan(NOW + 1).noted == [S1]
    assert (place.row().state, place.row().due_at) == (SessionState.HELD, NOW + 600)
    place.put(f"{S1}/{FLAG}")
    assert place.scan(NOW + 2).noted == [S1]
    assert (place.row().state, place.row().due_at) == (SessionState.WAITING, NOW + 2)


def test_a_flag_of_another_name(make: Callable[..., Place]) -> None:
    place = make(flag="extract.me")
    place.put(f"{S1}/extract.me")
    place.put(f"{S2}/{FLAG}")  # an ignored name like any other
    assert place.scan().noted == [S1]


def test_the_flag_counts_even_where_its_name_is_ignored(make: Callable[..., Place]) -> None:
    place = make(flag="x.flag", watch={"ignore": ["*.flag", "x*"]})
    place.put(f"{S1}/x.flag")
    assert place.scan().noted == [S1]
    assert place.row().flagged


def test_a_flag_deeper_in_the_session_is_no_flag(place: Place) -> None:
    place.put(f"{S1}/alf/{FLAG}")
    place.put(f"{S1}/alf/x.npy")
    result = place.scan()
    assert result.noted == [S1]
    assert place.row().flagged is False


def test_with_sessions_alone_only_flags_are_work(make: Callable[..., Place]) -> None:
    place = make(register={"files": False})
    place.put(f"{S1}/{FLAG}")
    path = place.put(f"{S1}/x.npy")
    place.scan()
    place.finish()
    place.journal.unflagged(place.row().id)
    (place.root / S1 / FLAG).unlink()
    path.write_bytes(b"changed")
    assert place.scan().noted == []
    place.put(f"{S1}/{FLAG}")
    assert place.scan().noted == [S1]


# --- the backlog ---------------------------------------------------------------------------------


def test_old_sessions_are_counted_and_left_alone(place: Place) -> None:
    place.put(f"{S1}/x.npy", age_s=15 * DAY_S)
    place.put(f"{S1}/y.npy", age_s=20 * DAY_S)
    place.put(f"{S2}/x.npy", age_s=13 * DAY_S)
    result = place.scan()
    assert result.noted == [S2]
    assert (result.backlog_sessions, result.backlog_files) == (1, 2)
    assert (result.sessions, result.files) == (2, 3)
    assert place.journal.fact("backlog") == {"sessions": 1, "files": 2, "at": NOW}
    assert place.journal.session(S1) is None


@pytest.mark.parametrize("why", ["everything", "flag", "new file", "known"])
def test_an_old_session_is_taken(place: Place, why: str) -> None:
    place.put(f"{S1}/x.npy", age_s=100 * DAY_S)
    if why == "flag":
        place.put(f"{S1}/{FLAG}", age_s=100 * DAY_S)
    if why == "new file":
        place.put(f"{S1}/y.npy")
    if why == "known":
        place.scan(everything=True)
        place.finish()
        place.put(f"{S1}/z.npy", age_s=100 * DAY_S)
    result = place.scan(everything=why == "everything")
    assert result.noted == [S1]
    assert result.backlog_sessions == 0


def test_no_backlog_days(make: Callable[..., Place]) -> None:
    place = make(scan={"backlog_days": 0})
    place.put(f"{S1}/x.npy", age_s=0.0)
    place.put(f"{S2}/x.npy", age_s=1.0)
    assert place.scan().noted == [S1]


def test_a_stamp_of_the_future_is_not_old(place: Place) -> None:
    place.put(f"{S1}/x.npy", age_s=-1000 * DAY_S)
    assert place.scan().noted == [S1]


# --- what lies elsewhere -------------------------------------------------------------------------


def test_strays_are_named_with_what_to_do(place: Place) -> None:
    place.put("notes.txt")
    place.put("a/notes.txt")
    place.put("a/2020-01-01/notes.txt")
    place.put("a/old data/deep/x.npy")
    place.put("a/2020-02-30/001/x.npy")
    place.put("a/2020-01-01/0001/x.npy")
    place.put(f"b b/2020-01-01/001/{FLAG}")
    place.put("b/2020-01-01/session1/x.npy")
    place.put("lab/Subjects/b/2020-01-01/x1/y.npy")
    (place.root / "empty folder/deep").mkdir(parents=True)
    (place.root / "link").symlink_to("a")
    place.put(f"{S1}/x.npy")
    result = place.scan()
    assert result.noted == [S1]
    found = strays(result)
    assert set(found) == {
        "notes.txt", "a/notes.txt", "a/2020-01-01/notes.txt", "a/old data", "a/2020-02-30",
        "a/2020-01-01/0001", "b b", "b/2020-01-01/session1", "lab/Subjects/b/2020-01-01/x1", "link",
    }  # fmt: skip
    assert "deep/x.npy" in found["a/old data"]
    assert "symbolic link" in found["link"]
    for text in found.values():
        assert "watch.ignore" in text
    assert {path for path, _, _ in place.journal.strays()} == set(found)


def test_what_is_ignored_is_no_stray(make: Callable[..., Place]) -> None:
    place = make(watch={"ignore": [".*", "*.tmp", "old", "a/2019-*"]})
    for path in (".hidden", ".git/x", "x.TMP", "old/x.npy", "a/2019-01-01/001/x.npy", "b c/x.tmp"):
        place.put(path)
    place.put(f"{S1}/old/x.npy")
    place.put(f"{S1}/y.npy")
    result = place.scan()
    assert result.strays == []
    assert (result.noted, result.files) == ([S1], 1)


def test_strays_that_are_not_utf8_are_shown_escaped(place: Place) -> None:
    for name in (b"/\xff.txt", b"/\xfe/2020-01-01/001/x.npy"):
        path = os.fsencode(place.root) + name
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 - bytes
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    result = place.scan()
    assert set(strays(result)) == {"\\udcff.txt", "\\udcfe"}
    assert {path for path, _, _ in place.journal.strays()} == set(strays(result))


def test_strays_that_are_gone_are_forgotten_by_a_whole_scan(place: Place) -> None:
    path = place.put("notes.txt")
    place.put("a/notes.txt")
    place.scan()
    path.unlink()
    place.scan(below="a")
    assert len(place.journal.strays()) == 2
    place.scan()
    assert [p for p, _, _ in place.journal.strays()] == ["a/notes.txt"]


def test_a_linked_session_is_not_entered(place: Place) -> None:
    place.put(f"{S1}/x.npy")
    (place.root / S2).symlink_to(place.root / S1)
    result = place.scan()
    assert result.noted == [S1]
    assert set(strays(result)) == {S2}


def test_the_same_session_twice(place: Place) -> None:
    place.put(f"{S1}/x.npy")
    place.put("a/2020-01-01/1/x.npy")
    place.put("lab/Subjects/a/2020-01-01/001/x.npy")
    result = place.scan()
    (row,) = place.journal.sessions()
    others = {S1, "a/2020-01-01/1", "lab/Subjects/a/2020-01-01/001"} - {row.folder}
    assert set(strays(result)) == others
    for text in strays(result).values():
        assert row.folder in text
        assert "rename or merge" in text


def test_only_one_of_two_equal_sessions_is_noted(place: Place) -> None:
    place.put(f"{S1}/x.npy")
    place.put("a/2020-01-01/1/x.npy")
    assert len(place.scan().noted) == 1


# --- folders that cannot be read -----------------------------------------------------------------


@pytest.fixture
def public_place() -> Iterator[Place]:
    """As `place`, where any user can reach it, unlike pytest's own folders."""
    with tempfile.TemporaryDirectory(prefix="regd-test-") as name:
        root = Path(name)
        root.chmod(0o755)
        with Journal(root / FILE_NAME, now=lambda: NOW) as journal:
            (root / "data").mkdir()
            yield Place(root / "data", journal)


def scan_as_nobody(place: Place, **more: Any) -> ScanResult:
    """Scan as somebody to whom mode bits apply; dry, since the journal is another's."""
    if os.geteuid() != 0:
        return place.scan(dry=True, **more)
    os.seteuid(65534)
    try:
        return place.scan(dry=True, **more)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["a", "a/2020-01-01", S1])
def test_a_folder_that_may_not_be_read_stops_nothing_else(public_place: Place, closed: str) -> None:
    place = public_place
    place.put(f"{S1}/x.npy")
    place.put("b/2020-01-01/001/x.npy")
    (place.root / closed).chmod(0)
    result = scan_as_nobody(place)
    (place.root / closed).chmod(0o755)
    assert result.noted == ["b/2020-01-01/001"]
    ((path, reason, hint),) = result.strays
    assert path == closed
    assert "Permission denied" in reason
    assert "right to read" in hint


def test_a_folder_in_a_session_that_may_not_be_read_stops_not_the_session(
    public_place: Place,
) -> None:
    place = public_place
    place.put(f"{S1}/x.npy")
    place.put(f"{S1}/closed/y.npy")
    (place.root / S1 / "closed").chmod(0)
    result = scan_as_nobody(place)
    (place.root / S1 / "closed").chmod(0o755)
    assert result.noted == [S1]
    assert result.strays == []  # the session's own work says what is wrong with it


def test_a_new_session_of_nothing_but_a_folder_that_may_not_be_read(public_place: Place) -> None:
    place = public_place
    place.put(f"{S1}/closed/y.npy")
    (place.root / S1 / "closed").chmod(0)
    result = scan_as_nobody(place)
    (place.root / S1 / "closed").chmod(0o755)
    assert result.noted == [S1]
    assert result.backlog_sessions == 0


def test_a_root_that_is_gone(place: Place) -> None:
    place.put("notes.txt")
    place.scan()
    place.root.rename(place.root.parent / "unmounted")
    with pytest.raises(FileNotFoundError):
        place.scan()
    assert len(place.journal.strays()) == 1  # nothing is taken for gone


# --- parts of a root, and dry scans --------------------------------------------------------------


@pytest.mark.parametrize(
    ("below", "noted"),
    [
        ("a", [S1, S2]),
        ("a/2020-01-01", [S1, S2]),
        (S1, [S1]),
        ("b", ["b/2020-01-01/001"]),
        ("lab", ["lab/Subjects/c/2020-01-01/001"]),
        ("lab/Subjects/c", ["lab/Subjects/c/2020-01-01/001"]),
    ],
)
def test_a_scan_of_a_part(place: Place, below: str, noted: list[str]) -> None:
    for folder in (S1, S2, "b/2020-01-01/001", "lab/Subjects/c/2020-01-01/001"):
        place.put(f"{folder}/x.npy")
    place.put("notes.txt")
    result = place.scan(below=below)
    assert sorted(result.noted) == noted
    assert result.strays == []
    assert place.journal.fact("backlog") is None  # which is of the whole root


def test_a_part_that_is_no_session(place: Place) -> None:
    place.put("a b/x.npy")
    assert set(strays(place.scan(below="a b"))) == {"a b"}
    assert [path for path, _, _ in place.journal.strays()] == ["a b"]


@pytest.mark.parametrize("gone", ["a", "a/2020-01-01", S1])
def test_a_part_that_is_gone_by_then(place: Place, gone: str) -> None:
    assert place.scan(below=gone).strays == []


def test_a_dry_scan_changes_nothing(place: Place) -> None:
    place.put(f"{S1}/x.npy")
    place.put(f"{S2}/x.npy", age_s=100 * DAY_S)
    place.put("notes.txt")
    dry = place.scan(dry=True)
    assert place.journal.sessions() == []
    assert place.journal.strays() == []
    assert place.journal.fact("scan") is None
    assert place.journal.fact("backlog") is None
    wet = place.scan()
    assert dry == wet


def test_a_scan_can_be_stopped(place: Place) -> None:
    place.put("a/notes.txt")
    place.scan()
    for number in range(1, 6):
        place.put(f"a/2020-01-01/{number:03}/x.npy")
    (place.root / "a/notes.txt").unlink()
    place.stop.set()
    assert place.scan().noted == []
    assert len(place.journal.strays()) == 1  # a scan that is not whole forgets nothing


def test_many_sessions_in_order(place: Place) -> None:
    folders = [f"{s}/2020-01-0{d}/00{n}" for s in "ab" for d in (1, 2) for n in (1, 2)]
    for folder in folders:
        place.put(f"{folder}/x.npy")
    assert place.scan().noted == folders
