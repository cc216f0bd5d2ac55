"""The daemon and the scan, end to end: what is recorded on disk ends up on Alyx, once."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from regd import worker
from regd.journal import FileRow, Journal
from regd.model import FileState, SessionState
from regd.service import Service
from regd.status import report
from tests.rig import DATASETS, QUIET_S, Clock, Lab, Rig, idle, md5, until, write


def assert_on_alyx(rig: Rig, folder: Path, number: int = 1) -> None:
    """Check that Alyx holds exactly the files of a session folder, once, with their MD5s."""
    on_disk = {
        path.relative_to(folder).as_posix(): (path.stat().st_size, md5(path))
        for path in folder.rglob("*")
        if path.is_file()
    }
    held = rig.held(number)
    assert {path: (d["file_size"], d["hash"]) for path, d in held.items()} == on_disk
    for dataset in held.values():
        exists = {r["data_repository"]: r["exists"] for r in dataset["file_records"]}
        assert exists[rig.lab.repository] is True


def test_a_flagged_session_is_registered_while_the_daemon_runs(rig: Rig) -> None:
    with rig.running():
        folder = rig.record()
        until(lambda: not (folder / "create_me.flag").exists())
        until(lambda: len(rig.held()) == len(DATASETS))
    assert_on_alyx(rig, folder)
    (session,) = rig.lab.sessions(rig.date)
    assert session["lab"] == rig.lab.lab
    assert session["start_time"] == f"{rig.date}T00:00:00"


def test_what_happened_while_it_was_off_is_found(rig: Rig) -> None:
    folder = rig.record()
    with rig.running():
        until(lambda: not (folder / "create_me.flag").exists())
        until(lambda: rig.lab.sessions(rig.date) and len(rig.held()) == len(DATASETS))
    assert_on_alyx(rig, folder)


def test_ten_sessions_of_twenty_files_each_once_and_never_again(rig: Rig) -> None:
    types = ("position", "timestamps", "velocity")
    names = [f"alf/task_{n:02d}/_ibl_wheel.{t}.npy" for n in range(7) for t in types][:20]
    with rig.running() as service:
        folders = [rig.record(number, names=names) for number in range(1, 11)]
        until(lambda: not any((f / "create_me.flag").exists() for f in folders), 60)
        until(lambda: idle(service), 60)
    assert [s["number"] for s in rig.lab.sessions(rig.date)] == list(range(1, 11))
    for number, folder in enumerate(folders, 1):
        assert_on_alyx(rig, folder, number)
    for lost in (False, True):
        before = {n: rig.held(n) for n in range(1, 11)}
        if lost:
            rig.lose_journal()
        rig.scan(everything=True).close()
        assert {n: rig.held(n) for n in range(1, 11)} == before
        assert len(rig.lab.sessions(rig.date)) == 10


def test_a_changed_file_is_registered_again(rig: Rig) -> None:
    folder = rig.record()
    rig.scan().close()
    changed = folder / DATASETS[0]
    with rig.running():
        write(changed, b"a better calibration")
        until(lambda: rig.held()[DATASETS[0]]["hash"] == md5(changed))
    assert_on_alyx(rig, folder)


def test_a_new_file_in_a_known_session_needs_no_flag(rig: Rig) -> None:
    folder = rig.record()
    rig.scan().close()
    with rig.running():
        write(folder / "alf" / "_ibl_wheel.velocity.npy", b"derived later")
        until(lambda: "alf/_ibl_wheel.velocity.npy" in rig.held())
    assert_on_alyx(rig, folder)


def test_a_session_that_alyx_does_not_know_is_held_until_it_is_flagged(rig: Rig) -> None:
    folder = rig.record(flag=False)
    with rig.running() as service:
        until(lambda: service.journal.sessions(SessionState.HELD))
        assert rig.lab.sessions(rig.date) == []
        (held,) = report(rig.settings, service.journal)["held"]
        assert held["files"] == {"settling": len(DATASETS)}
        assert "create_me.flag" in held["hint"]
        (folder / "create_me.flag").touch()
        until(lambda: not (folder / "create_me.flag").exists())
        until(lambda: idle(service))
    assert_on_alyx(rig, folder)


def test_a_growing_file_is_not_registered_until_it_stands_still(rig: Rig) -> None:
    folder = rig.record()
    path = folder / "alf" / "_ibl_wheel.velocity.npy"
    with rig.running() as service, path.open("wb") as file:
        until(lambda: not (folder / "create_me.flag").exists())
        for _ in range(20):
            file.write(b"x" * 1000)
            file.flush()
            os.fsync(file.fileno())
            # the writer's own pace: shorter than quiet_s, so that the file never stands still
            service.stop.wait(0.1)
            assert "alf/_ibl_wheel.velocity.npy" not in rig.held()
        file.close()
        until(lambda: "alf/_ibl_wheel.velocity.npy" in rig.held())
    assert_on_alyx(rig, folder)


def test_a_file_that_grows_for_too_long_is_reported_and_not_registered(
    rig_with: type[Rig], tmp_path: Path, lab: Lab
) -> None:
    settle = {"quiet_s": 0.6, "closed_quiet_s": 0.1, "max_wait_s": 0.8}
    rig = rig_with(tmp_path, lab, settle=settle)
    folder = rig.record()
    path = folder / "alf" / "_ibl_wheel.velocity.npy"
    with rig.running() as service, path.open("wb") as file:

        def reported() -> bool:
            file.write(b"x" * 1000)
            file.flush()
            return bool(report(rig.settings, service.journal)["unfinished"])

        until(reported)
        (entry,) = report(rig.settings, service.journal)["unfinished"]
        assert entry["path"] == "alf/_ibl_wheel.velocity.npy"
        assert "still being written" in entry["reason"]
        assert "alf/_ibl_wheel.velocity.npy" not in rig.held()
        file.close()
        until(lambda: "alf/_ibl_wheel.velocity.npy" in rig.held())
        assert report(rig.settings, service.journal)["unfinished"] == []


def test_a_protected_file_moves_to_a_revision_and_causes_no_more_work(rig: Rig) -> None:
    folder = rig.record()
    rig.scan().close()
    rig.lab.protect(rig.eid(), DATASETS[0])
    today = datetime.date.today().isoformat()
    moved = f"alf/#{today}#/_ibl_wheel.position.npy"
    with rig.running() as service:
        write(folder / DATASETS[0], b"recomputed")
        until(lambda: moved in rig.held())
        until(lambda: idle(service))
    assert not (folder / DATASETS[0]).exists()
    assert (folder / moved).read_bytes() == b"recomputed"
    held = rig.held()
    assert set(held) == {*DATASETS, moved}
    assert held[moved]["hash"] == md5(folder / moved)
    for lost in (False, True):
        if lost:
            rig.lose_journal()
        rig.scan().close()
        assert rig.held() == held


def test_a_protected_revision_of_today_is_followed_by_a_sub_revision(rig: Rig) -> None:
    folder = rig.record()
    rig.scan().close()
    today = datetime.date.today().isoformat()
    revisions = [today, f"{today}a", f"{today}b"]
    protected = DATASETS[0]
    for n, revision in enumerate(revisions):
        rig.lab.protect(rig.eid(), protected)
        write(folder / DATASETS[0], f"version {n}".encode())
        rig.scan().close()
        protected = f"alf/#{revision}#/_ibl_wheel.position.npy"
        assert (folder / protected).read_bytes() == f"version {n}".encode()
        assert rig.held()[protected]["hash"] == md5(folder / protected)


def test_an_unchanged_protected_file_is_never_moved(rig: Rig) -> None:
    folder = rig.record()
    rig.scan().close()
    rig.lab.protect(rig.eid(), *DATASETS)
    before = rig.held()
    rig.lose_journal()
    for path in folder.rglob("*.*"):
        if path.is_file():
            os.utime(path)  # touched, with the same content
    (folder / "create_me.flag").touch()
    rig.scan().close()
    assert rig.held() == before
    assert not (folder / "create_me.flag").exists()
    assert not list(folder.rglob("#*#"))


def test_an_occupied_revision_folder_is_never_overwritten(rig: Rig) -> None:
    folder = rig.record()
    rig.scan().close()
    rig.lab.protect(rig.eid(), DATASETS[0])
    today = datetime.date.today().isoformat()
    other = folder / "alf" / f"#{today}#" / "_ibl_wheel.position.npy"
    write(other, b"put there by somebody else")
    write(folder / DATASETS[0], b"recomputed")
    rig.scan().close()
    assert other.read_bytes() == b"put there by somebody else"
    placed = folder / "alf" / f"#{today}a#" / "_ibl_wheel.position.npy"
    assert placed.read_bytes() == b"recomputed"
    assert rig.held()[f"alf/#{today}a#/_ibl_wheel.position.npy"]["hash"] == md5(placed)


def test_plain_session_creation(rig_with: type[Rig], tmp_path: Path, lab: Lab) -> None:
    rig = rig_with(tmp_path, lab, register={"files": False})
    folder = rig.record()
    rig.scan().close()
    assert not (folder / "create_me.flag").exists()
    assert rig.held() == {}


def test_old_data_is_counted_and_taken_only_when_asked_for(rig: Rig) -> None:
    folder = rig.record(flag=False)
    month_ago = datetime.datetime.now().timestamp() - 30 * 86400
    for path in folder.rglob("*.*"):
        if path.is_file():
            os.utime(path, (month_ago, month_ago))
    rig.lab.client.post(
        "/sessions",
        {"subject": rig.lab.subject, "number": 1, "start_time": f"{rig.date}T00:00:00"},
    )
    with rig.scan() as journal:
        assert journal.fact("backlog") | {"at": 0} == {
            "sessions": 1,
            "files": len(DATASETS),
            "at": 0,
        }
    assert rig.held() == {}
    rig.scan(everything=True).close()
    assert_on_alyx(rig, folder)


class TestWhatNeedsAPerson:
    """Each is reported with what to do, and everything beside it is registered."""

    def refused(self, rig: Rig) -> dict[str, str]:
        with rig.scan() as journal:
            facts = report(rig.settings, journal)
        assert facts["needs_human"] > 0
        things = {
            **{f"{f['session']}/{f['path']}": f for f in facts["refused"]},
            **{s["session"]: s for s in facts["parked"]},
            **{s["path"]: s for s in facts["strays"]},
        }
        assert all(thing["hint"] for thing in things.values())
        return {where: thing["reason"] for where, thing in things.items()}

    def test_files(self, rig: Rig) -> None:
        folder = rig.record()
        write(folder / "alf" / "no.such.npy", b"unknown type")
        write(folder / "alf" / "_ibl_wheel.position.xyz", b"unknown extension")
        write(folder / "alf" / "sp ace" / "_ibl_wheel.position.npy", b"not ALF")
        write(folder / "alf" / "_ibl_wheel.velocity.npy", b"")
        outside = rig.root.parent / "_ibl_wheel.secret.npy"
        outside.write_bytes(b"elsewhere")
        (folder / "alf" / "_ibl_wheelMoves.type.npy").symlink_to(outside)
        (folder / "linked").symlink_to(rig.root.parent)
        os.mkfifo(folder / "alf" / "_ibl_wheelMoves.intervals.npy")
        not_utf8 = os.fsencode(folder) + b"/alf/_ibl_wh\xffel.position.npy"
        Path(os.fsdecode(not_utf8)).write_bytes(b"not UTF-8")
        prefix = folder.relative_to(rig.root).as_posix()
        refused = self.refused(rig)
        assert refused.keys() == {
            f"{prefix}/{name}"
            for name in (
                "alf/no.such.npy",
                "alf/_ibl_wheel.position.xyz",
                "alf/sp ace/_ibl_wheel.position.npy",
                "alf/_ibl_wheel.velocity.npy",
                "alf/_ibl_wheelMoves.type.npy",
                "alf/_ibl_wheelMoves.intervals.npy",
                "alf/_ibl_wh\\udcffel.position.npy",
                "linked",
            )
        }
        assert set(rig.held()) == set(DATASETS)
        assert not (folder / "create_me.flag").exists()

    def test_two_dataset_types(self, rig: Rig) -> None:
        folder = rig.record()
        types = {t["name"] for t in rig.lab.client.pages("/dataset-types")}
        for name, pattern in (("ambiguous.one", "ambiguous.thing*"), ("ambiguous.two", "ambi*g*")):
            if name not in types:
                rig.lab.client.post("/dataset-types", {"name": name, "filename_pattern": pattern})
        write(folder / "alf" / "ambiguous.thing.npy", b"which?")
        (reason,) = self.refused(rig).values()
        assert "ambiguous.one, ambiguous.two" in reason
        assert set(rig.held()) == set(DATASETS)

    def test_a_subject_that_alyx_does_not_have(self, rig: Rig) -> None:
        rig.record()
        stranger = rig.root / rig.lab.lab / "Subjects" / "nobody-at-all" / rig.date / "001"
        write(stranger / DATASETS[0], b"x")
        (stranger / "create_me.flag").touch()
        (reason,) = self.refused(rig).values()
        assert "nobody-at-all" in reason
        assert (stranger / "create_me.flag").exists()
        assert set(rig.held()) == set(DATASETS)

    def test_folders_that_are_no_sessions(self, rig: Rig) -> None:
        rig.record()
        base = rig.root / rig.lab.lab / "Subjects" / rig.lab.subject
        write(base / "notes" / "monday" / "_ibl_wheel.position.npy", b"x")
        write(base / "2020-13-45" / "001" / "_ibl_wheel.position.npy", b"x")
        write(base / rig.date / "1234" / "_ibl_wheel.position.npy", b"x")
        write(rig.root / "read me.txt", b"x")
        flagged = base / rig.date / "first" / "create_me.flag"
        write(flagged, b"")
        prefix = base.relative_to(rig.root).as_posix()
        assert self.refused(rig).keys() == {
            f"{prefix}/notes",
            f"{prefix}/2020-13-45",
            f"{prefix}/{rig.date}/1234",
            f"{prefix}/{rig.date}/first",
            "read me.txt",
        }
        assert flagged.exists()
        assert set(rig.held()) == set(DATASETS)

    def test_one_session_in_two_folders(self, rig: Rig) -> None:
        folder = rig.record()
        rig.scan().close()
        shutil.copytree(folder, folder.with_name("1"))
        assert list(self.refused(rig)) == [folder.with_name("1").relative_to(rig.root).as_posix()]
        assert len(rig.lab.sessions(rig.date)) == 1

    def test_a_refused_file_is_registered_once_it_is_mended(self, rig: Rig) -> None:
        folder = rig.record()
        write(folder / "alf" / "wheel position.npy", b"mended")
        assert self.refused(rig)
        (folder / "alf" / "wheel position.npy").rename(folder / "alf" / "_ibl_wheel.velocity.npy")
        with rig.scan() as journal:
            assert journal.files_in(FileState.REFUSED) == []
        assert_on_alyx(rig, folder)

    def test_a_parked_session_goes_on_after_retry(self, rig: Rig) -> None:
        stranger = f"newborn-{rig.date}-{os.getpid()}"
        folder = rig.root / rig.lab.lab / "Subjects" / stranger / rig.date / "001"
        write(folder / DATASETS[0], b"x")
        (folder / "create_me.flag").touch()
        assert self.refused(rig)
        rig.lab.client.post("/subjects", {"nickname": stranger, "lab": rig.lab.lab})
        rig.scan().close()
        assert (folder / "create_me.flag").exists(), "parked until somebody says go on"
        with Journal(rig.journal().path, now=lambda: 0.0) as journal:
            assert journal.retry(folder.relative_to(rig.root).as_posix()) == 1
        rig.scan().close()
        assert not (folder / "create_me.flag").exists()


def test_alyx_away_counts_against_no_session(rig: Rig) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        alyx = rig.settings.alyx.model_copy(
            update={"url": f"http://127.0.0.1:{nobody.getsockname()[1]}"}
        )
        away = rig.settings.model_copy(update={"alyx": alyx})
        present, rig.settings = rig.settings, away
        folder = rig.record()
        with rig.running() as service:
            until(lambda: service.gate.error is not None)
            until(lambda: service.journal.sessions(SessionState.WAITING))
            (row,) = service.journal.sessions()
            assert row.attempt == 0
        assert (folder / "create_me.flag").exists()
    rig.settings = present
    with rig.running():
        until(lambda: not (folder / "create_me.flag").exists())
    assert_on_alyx(rig, folder)


def test_a_session_moved_in_whole_is_registered(rig: Rig, tmp_path: Path) -> None:
    with rig.running() as service:
        folder = rig.record()
        staged = tmp_path / "staged"
        until(lambda: not (folder / "create_me.flag").exists())
        until(lambda: idle(service))
        write(staged / "alf" / "_ibl_wheel.position.npy", b"copied from elsewhere")
        (staged / "create_me.flag").touch()
        staged.rename(rig.folder(2))
        until(lambda: not (rig.folder(2) / "create_me.flag").exists())
        until(lambda: idle(service))
    assert_on_alyx(rig, rig.folder(2), 2)


@pytest.mark.skipif("REGD_TEST_ALYX_URL" in os.environ, reason="counts requests at the sandbox")
def test_a_new_session_costs_three_requests(rig: Rig, sandbox) -> None:
    rig.record()
    time.sleep(QUIET_S)  # all files have settled, or they go in two requests
    rig.scan().close()
    asked = [
        (r.method, r.path) for r in sandbox.requests if r.path in ("/sessions", "/register-file")
    ]
    assert asked == [("GET", "/sessions"), ("POST", "/sessions"), ("POST", "/register-file")]
    assert len(sandbox.requests) == 3 + 3, "and once a token, the dataset types and data formats"
    sandbox.requests.clear()
    rig.scan().close()
    assert not sandbox.requests, "nothing to do, nothing to ask"


def test_a_watcher_that_died_is_replaced_and_what_it_missed_is_found(rig: Rig) -> None:
    with rig.running() as service:
        until(lambda: service._watcher is not None)
        dead = service._watcher
        assert dead is not None
        dead.stop()
        folder = rig.record()
        until(lambda: service._watcher is not dead)
        until(lambda: not (folder / "create_me.flag").exists())
        until(lambda: idle(service))
    assert_on_alyx(rig, folder)


def test_a_session_deleted_on_alyx_is_created_again_when_flagged(rig: Rig) -> None:
    folder = rig.record()
    rig.scan().close()
    rig.lab.client._request("DELETE", f"/sessions/{rig.eid()}")
    write(folder / DATASETS[0], b"changed")
    (folder / "create_me.flag").touch()
    with rig.running() as service:
        until(lambda: not (folder / "create_me.flag").exists())
        until(lambda: idle(service))
    assert_on_alyx(rig, folder)


def test_a_dataset_type_added_on_alyx_is_known_on_retry(rig: Rig) -> None:
    folder = rig.record()
    name = f"novel{os.getpid()}x{rig.date.replace('-', 'x')}.thing"
    write(folder / "alf" / f"{name}.npy", b"x")
    with rig.scan() as journal:
        assert len(journal.files_in(FileState.REFUSED)) == 1
    rig.lab.client.post("/dataset-types", {"name": name, "filename_pattern": f"*{name}.*"})
    with Journal(rig.journal().path, now=lambda: 0.0) as journal:
        assert journal.retry(None) == 1
    rig.scan().close()
    assert_on_alyx(rig, folder)


# --- turns ---------------------------------------------------------------------------------------


def test_a_session_of_very_many_files_gives_way_to_others(
    tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In hashing and in posting; and in each of its turns it gets on."""
    monkeypatch.setattr(worker, "_TURN_S", 0.0)
    rig = Rig(tmp_path, lab, register={"chunk_files": 1})
    clock = Clock()

    def is_registered(row: FileRow) -> bool:
        return row.state is FileState.REGISTERED

    def turns(service: Service) -> list[list[int]]:
        """Return how many files each session has registered after each turn of one."""
        service.scanner.scan(clock())
        after = []
        while service.step():
            clock.sleep(0.001)
            all_files = [service.journal.files(row.id) for row in service.journal.sessions()]
            after.append([sum(map(is_registered, each.values())) for each in all_files])
        return after

    with rig.by_hand(clock) as service:
        rig.record(1)
        assert turns(service) == [[len(DATASETS)]]  # nobody else is due
        for number in (2, 3):
            rig.record(number)
        progress = [sorted(counts)[:2] for counts in turns(service)]
    assert progress[-1] == [len(DATASETS)] * 2
    assert all(abs(one - other) <= 2 for one, other in progress)
    assert len(progress) >= 2 * len(DATASETS) - 1
    for number in (2, 3):
        assert_on_alyx(rig, rig.folder(number), number)
