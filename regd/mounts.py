"""What file systems are mounted where, and how changes in them can be noticed.

inotify tells of what programs of this computer do through the mount. What other computers do on a
file server, and what happens behind a FUSE mount, it never tells: there, scans find it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Name in /proc/self/mountinfo, and f_type (statfs(2), linux/magic.h), of those on the disks of this
# computer whose time stamps are of its clock and fine enough to go by ...
_LOCAL = {
    **dict.fromkeys(("ext2", "ext3", "ext4"), 0xEF53),
    **{"xfs": 0x58465342, "btrfs": 0x9123683E, "zfs": 0x2FC12FC1, "f2fs": 0xF2F52010},
    **{"tmpfs": 0x01021994, "overlay": 0x794C7630},
}
# ... and of those that other computers, or the host of a virtual one, write to as well.
_NETWORK = {
    **{"nfs": 0x6969, "nfs4": 0x6969, "smbfs": 0x517B, "cifs": 0xFF534D42, "smb3": 0xFE534D42},
    **{"9p": 0x01021997, "ceph": 0x00C36400, "afs": 0x5346414F, "coda": 0x73757245},
    **{"lustre": 0x0BD00BD0, "gpfs": 0x47504653, "beegfs": 0x19830326, "pvfs2": 0x20030528},
    **{"ocfs2": 0x7461636F, "gfs2": 0x01161970, "vboxsf": 0x786F4256},
}
_NETWORK_UNNUMBERED = {"virtiofs", "autofs"}  # they have the number of another, or stand for one
LOCAL_TYPES = frozenset(_LOCAL.values())
"""The f_type of file systems that are surely on a disk of this computer."""
NETWORK_TYPES = frozenset(_NETWORK.values())
"""The f_type of file systems that are surely on another computer's disk."""
MOUNTINFO = Path("/proc/self/mountinfo")

_SOONEST_S = 30.0  # between two scans that stand in for events
_SHARE = 10.0  # such a scan takes at most one part in so many of the time


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo.

    Attributes:
        point: Where it is mounted.
        kind: The name of its file system, such as 'ext4' or 'fuse.sshfs'.
        source: The disk or the server.
        read_only: Whether nothing can be written there, whoever asks.
    """

    point: PurePosixPath
    kind: str
    source: str
    read_only: bool

    @property
    def is_network(self) -> bool:
        """Whether others than this computer write there."""
        return self.kind in _NETWORK or self.kind in _NETWORK_UNNUMBERED

    @property
    def is_fuse(self) -> bool:
        """Whether a program stands behind it; not if that program only reads a disk (NTFS)."""
        return self.kind == "fuse" or self.kind.startswith("fuse.")

    @property
    def tells_all(self) -> bool:
        """Whether inotify tells of every change there."""
        return not (self.is_network or self.is_fuse)

    def __str__(self) -> str:
        return f"{self.kind} at {self.point}"


def parse(text: str) -> list[Mount]:
    """Return the mounts of a mountinfo file, in its order; see proc_pid_mountinfo(5)."""
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, more = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(more) < 3:
            continue
        read_only = "ro" in fields[5].split(",") or "ro" in more[2].split(",")
        point = PurePosixPath(_unescaped(fields[4]))
        mounts.append(Mount(point, more[0], _unescaped(more[1]), read_only))
    return mounts


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def read() -> list[Mount]:
    """Return what is mounted now, as this process sees it; nothing where that cannot be told."""
    try:
        return parse(MOUNTINFO.read_text(errors="surrogateescape"))
    except OSError:
        return []


def mount_of(path: PurePosixPath, mounts: Sequence[Mount]) -> Mount | None:
    """Return the mount that a path (absolute, without links) lies on."""
    found = None
    for mount in mounts:  # a later one at the same place covers the earlier
        deeper = found is None or len(mount.point.parts) >= len(found.point.parts)
        if deeper and path.is_relative_to(mount.point):
            found = mount
    return found


def mounts_below(path: PurePosixPath, mounts: Sequence[Mount]) -> list[Mount]:
    """Return what is mounted below a folder, each place once."""
    below = {m.point: m for m in mounts if m.point != path and m.point.is_relative_to(path)}
    return list(below.values())


@dataclass(frozen=True, slots=True)
class Watching:
    """How changes below a data root are noticed.

    Attributes:
        observer: 'inotify', 'polling', or 'none' for scans alone.
        file_system: The name of the file system that it is, or '' if that cannot be told.
        reason: Why so, where it is not for the settings' sake.
        scans_sooner: Whether scans have to find what else events would tell.
    """

    observer: str
    file_system: str
    reason: str = ""
    scans_sooner: bool = False

    def pause_s(self, every_s: float, took_s: float) -> float:
        """Return how long to wait for the next scan, in seconds.

        Args:
            every_s: The setting scan.every_s; it is never waited for longer.
            took_s: How long the last scan took.
        """
        return min(every_s, max(_SOONEST_S, _SHARE * took_s)) if self.scans_sooner else every_s


def choose(wanted: str, root: PurePosixPath, mounts: Sequence[Mount]) -> Watching:
    """Return how to notice changes below a data root.

    Where events do not tell all, scans alone do, and come sooner. Comparing listings (polling)
    would take several times the work of a scan, every few seconds, and keep every file in memory.

    Args:
        wanted: The setting watch.observer.
        root: The data root, absolute and without links.
        mounts: What is mounted.
    """
    own = mount_of(root, mounts)
    kind = own.kind if own else ""
    there = [own, *mounts_below(root, mounts)] if own else []
    silent = next((mount for mount in there if not mount.tells_all), None)
    if wanted not in ("auto", "inotify") or silent is None:
        return Watching("inotify" if wanted == "auto" else wanted, kind)
    alone = wanted == "auto" and silent is own
    return Watching("none" if alone else "inotify", kind, _why(silent), scans_sooner=True)


def _why(mount: Mount) -> str:
    what = "other computers write on" if mount.is_network else "is written behind"
    return f"the kernel does not tell what {what} {mount}"
