"""The demo, as a person runs it: the program itself, in a folder of its own."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from regd.demo import MARKER, npy, recording
from regd.sandbox.server import Server

REGD = [sys.executable, "-m", "regd"]


def environment() -> dict[str, str]:
    """Return an environment with settings that the demo must not be led astray by."""
    return {
        **os.environ,
        "COLUMNS": "80",
        "REGD_ALYX__URL": "http://127.0.0.1:9",
        "REGD_FLAG": "another.flag",
        "http_proxy": "http://127.0.0.1:9",
    }


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*REGD, "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )


def processes_on(folder: Path) -> list[str]:
    """Return the command lines of the processes that name a path in the folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if str(folder) in line:
            lines.append(line)
    return lines


def read_until(process: subprocess.Popen[str], word: str) -> str:
    """Return the first line with `word` in it; the demo itself ends when nothing happens."""
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return line
    raise AssertionError(f"the demo ended without {word!r}")


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "shown"
    process = start("--folder", str(folder))
    output, _ = process.communicate()
    return folder, process.returncode, output


def test_the_demo_shows_everything_and_ends(played):
    folder, status, output = played
    assert status == 0, output
    for shown in (
        "session.created",
        "file.moved",
        "flag.removed",
        "dataset ",
        "protected",
        "Needs a person",
        "regd     runs",
        "_rig_thermometer.raw.csv",
        "on SIGTERM the daemon ended",
        f"demo --clean --folder {folder}",
    ):
        assert shown in output
    assert not re.search(r"^NO ", output, re.M)
    lines = output.split("Where to look next")[0].splitlines()
    # what is to be copied stays whole; all else fits
    assert max(len(line) for line in lines if "_rig_thermometer" not in line) <= 80
    assert not processes_on(folder)


def test_what_the_demo_shows_is_so(played):
    folder = played[0]
    on_disk = {p.name for p in (folder / "data").rglob("*") if p.is_file()}
    assert on_disk == {*(Path(name).name for name in recording()), "_iblrig_leftCamera.raw.mp4"}
    with Server(db=folder / "alyx.sqlite") as server:
        rows = server.store.db.execute("SELECT count(*) FROM dataset").fetchone()
    assert rows[0] == len(on_disk)  # one is not registered, one has a revision


def test_a_demo_is_cleaned_up(played):
    folder = played[0]
    for said in ("is removed", "is not there"):
        done = subprocess.run(
            [*REGD, "demo", "--clean", "--folder", folder], capture_output=True, text=True
        )
        assert done.returncode == 0
        assert said in done.stdout.replace("\n", " ")
        assert not folder.exists()


def test_an_interrupted_demo_leaves_nothing(tmp_path):
    folder = tmp_path / "demo"
    process = start("--folder", str(folder), "--remove-after")
    read_until(process, "session.created")
    assert processes_on(folder / "regd.yaml")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode not in (0, 2)
    assert "Traceback" not in output
    assert not processes_on(folder)
    assert not folder.exists()


def test_a_demo_whose_daemon_dies_fails(tmp_path):
    folder = tmp_path / "demo"
    process = start("--folder", str(folder), "--remove-after")
    read_until(process, "scan.finished")
    pid = int((folder / "state" / "lock").read_text())
    os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 2
    assert "the daemon ended with status -9" in output
    assert "Traceback" not in output
    assert (folder / "regd.log").exists()  # kept, to be looked at
    assert not processes_on(folder)


@pytest.mark.parametrize("option", ["--clean", "--remove-after"])
def test_a_folder_that_is_no_demo_is_left_alone(tmp_path, option):
    precious = tmp_path / "precious.npy"
    precious.write_bytes(b"data")
    link = tmp_path.with_name(f"{tmp_path.name}-link")
    link.symlink_to(tmp_path)
    for folder in (tmp_path, link):
        process = start("--folder", str(folder), option)
        output, _ = process.communicate()
        assert process.returncode == 2
        assert "left alone" in output.replace("\n", " ")
    assert [*tmp_path.iterdir()] == [precious]


def test_a_removal_that_was_interrupted_is_done_again(tmp_path):
    from regd.demo import remove

    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / MARKER).touch()
    (folder / "link").symlink_to(tmp_path)
    assert remove(folder)
    assert tmp_path.exists()
    assert not folder.exists()
    assert not remove(folder)


def test_arrays_are_numpys():
    assert np.load(io.BytesIO(npy([1.5, 2.5, 3.5]))).tolist() == [1.5, 2.5, 3.5]
    assert np.load(io.BytesIO(npy([1, 2, 3, 4], columns=2))).tolist() == [[1, 2], [3, 4]]
    for name, content in recording().items():
        if name.endswith(".npy"):
            assert np.load(io.BytesIO(content)).dtype == np.float64
