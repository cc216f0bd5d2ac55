"""What is mounted where, and how changes are noticed there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from regd import files, mounts
from tests.rig import DATASETS, Lab, Rig, until

# Recorded on an acquisition PC, a server, and a laptop; in the form of proc_pid_mountinfo(5).
RECORDED = r"""
22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw,errors=remount-ro
24 22 0:22 / /proc rw,nosuid,nodev,noexec,relatime shared:12 - proc proc rw
60 22 8:17 / /mnt/data rw,relatime shared:30 - xfs /dev/sdb1 rw,attr2,inode64
61 60 0:48 / /mnt/data/cortexlab/Subjects rw,relatime shared:31 - nfs4 nas:/subjects rw,vers=4.2
62 22 0:49 / /mnt/nas rw,relatime shared:32 - cifs //nas/rig rw,vers=3.1.1,username=rig
63 22 0:50 / /mnt/far\040away rw,nosuid,nodev - fuse.sshfs rig@far: rw,user_id=0
64 22 8:33 / /mnt/usb rw,relatime shared:34 - fuseblk /dev/sdc1 rw,user_id=0
65 22 0:51 / /mnt/auto rw,relatime shared:35 - autofs /etc/auto.nas rw,fd=7
66 22 8:49 / /mnt/old ro,relatime shared:36 - ext4 /dev/sdd1 rw
67 22 8:65 / /mnt/over rw,relatime shared:37 - ext4 /dev/sde1 rw
68 67 0:52 / /mnt/over rw,relatime shared:38 - nfs nas:/over rw
69 22 0:53 / /var/lib/docker/overlay2/1/merged rw - overlay overlay rw,lowerdir=l,upperdir=u
70 22 0:54 / /mnt/nas2 rw,relatime master:1 propagate_from:2 - nfs4 nas:/2 rw,vers=4.2
short line
"""
MOUNTS = mounts.parse(RECORDED)


@pytest.mark.parametrize(
    ("root", "kind", "observer", "scans_sooner"),
    [
        ("/data/recordings", "ext4", "inotify", False),
        ("/mnt/data/other", "xfs", "inotify", False),
        ("/mnt/data", "xfs", "inotify", True),  # a part of it is on a server
        ("/mnt/data/cortexlab/Subjects/x", "nfs4", "none", True),
        ("/mnt/nas/rig1", "cifs", "none", True),
        ("/mnt/nasty", "ext4", "inotify", False),  # not below /mnt/nas
        ("/mnt/far away/data", "fuse.sshfs", "none", True),
        ("/mnt/usb", "fuseblk", "inotify", False),  # a Windows disk, of this computer alone
        ("/mnt/auto/data", "autofs", "none", True),
        ("/mnt/over/data", "nfs", "none", True),  # what was mounted last covers the disk
        ("/mnt/nas2", "nfs4", "none", True),
        ("/var/lib/docker/overlay2/1/merged/data", "overlay", "inotify", False),
    ],
)
def test_auto_goes_by_the_file_system(
    root: str, kind: str, observer: str, scans_sooner: bool
) -> None:
    chosen = mounts.choose("auto", PurePosixPath(root), MOUNTS)
    assert (chosen.file_system, chosen.observer) == (kind, observer)
    assert chosen.scans_sooner is scans_sooner
    assert bool(chosen.reason) is scans_sooner


def test_what_the_settings_say_goes() -> None:
    nfs, disk = PurePosixPath("/mnt/nas2"), PurePosixPath("/data")
    for wanted in ("polling", "none"):
        for root in (nfs, disk):
            assert mounts.choose(wanted, root, MOUNTS).observer == wanted
            assert not mounts.choose(wanted, root, MOUNTS).scans_sooner
    assert mounts.choose("inotify", nfs, MOUNTS).observer == "inotify"
    assert mounts.choose("inotify", nfs, MOUNTS).scans_sooner, "it tells of this computer alone"


def test_without_a_list_of_mounts_it_is_inotify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "none")
    chosen = mounts.choose("auto", PurePosixPath("/data"), mounts.read())
    assert chosen == mounts.Watching("inotify", "")


def test_scans_that_stand_in_for_events_come_sooner_but_take_a_tenth_of_the_time() -> None:
    network = mounts.Watching("none", "nfs4", "why", scans_sooner=True)
    assert network.pause_s(600, took_s=0.5) == 30
    assert network.pause_s(600, took_s=20) == 200
    assert network.pause_s(600, took_s=90) == 600
    assert network.pause_s(5, took_s=90) == 5
    assert mounts.Watching("inotify", "ext4").pause_s(600, took_s=0.5) == 600


def test_read_only_mounts_are_told() -> None:
    assert [str(m.point) for m in MOUNTS if m.read_only] == ["/mnt/old"]


def test_the_names_of_mountinfo_are_those_of_the_kernels_numbers(tmp_path: Path) -> None:
    """The two tables that a file system is looked up in must agree on this very disk."""
    own = mounts.mount_of(PurePosixPath(tmp_path.resolve()), mounts.read())
    assert own is not None
    number = os.open(tmp_path, os.O_RDONLY)
    try:
        assert files._file_system(number) == mounts._LOCAL.get(own.kind)
    finally:
        os.close(number)


# --- a real one, without a network ---------------------------------------------------------------


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A folder, and a FUSE mount of it that the kernel tells nothing about."""
    if not shutil.which("bindfs") or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs bindfs and /dev/fuse: on Debian, apt install bindfs")
    disk, mount = tmp_path / "disk", tmp_path / "mount"
    disk.mkdir()
    mount.mkdir()
    done = subprocess.run(["bindfs", disk, mount], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    yield disk, mount
    subprocess.run(["fusermount", "-u", mount], check=True)


def test_what_others_write_behind_a_mount_is_found_by_scans(
    behind: tuple[Path, Path], tmp_path: Path, lab: Lab
) -> None:
    disk, mount = behind
    (disk / "data").mkdir()
    rig = Rig(mount, lab, state_dir=tmp_path / "state", scan={"every_s": 0.5})
    on_disk = Rig(disk, lab)
    on_disk.date = rig.date
    with rig.running() as service:
        until(lambda: service.journal.fact("scan"))
        assert service._watching == mounts.choose("auto", PurePosixPath(rig.root), mounts.read())
        assert service._watching.observer == "none"
        assert service._watching.file_system.startswith("fuse")
        assert service._watcher is None
        folder = on_disk.record()
        until(lambda: not (folder / "create_me.flag").exists())
        until(lambda: len(rig.held()) == len(DATASETS))
