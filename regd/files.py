"""What regd does to files: look at them, hash them, move them without ever overwriting one.

Every path is opened folder by folder from the data root, and no symbolic link is followed, so that
nothing outside the root can be read or moved however the tree changes meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import operator
import os
import signal
from collections.abc import Callable, Generator, Iterator
from fcntl import F_RDLCK, F_SETLEASE, F_SETSIG, F_UNLCK
from functools import partial
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from typing import Any, NamedTuple

from regd import mounts
from regd.errors import FileChanged, FileHeld, NeedsHuman, PathTaken
from regd.model import Signature
from regd.paths import OWNER_FILE, Ignored, parse_dataset

_RENAME_NOREPLACE = 1
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_BLOCK = 2**18  # bytes of a file in memory at a time
_WINDOW = 64 * _BLOCK  # bytes after which what was read is dropped from the page cache
_LONGEST_FOLDER = 255  # characters; ALF allows no more, and each level keeps a folder open
_NOTHING = Ignored(())
# The numbers of ioprio_set and ioprio_get, which glibc has no functions for.
_IOPRIO = {"x86_64": (251, 252), "aarch64": (30, 31), "riscv64": (30, 31)}
_IOPRIO_WHO_PROCESS, _IOPRIO_IDLE = 1, 3 << 13
_NICE = 10  # as in systemd/regd.service
_AUTOGROUP = Path("/proc/self/autogroup")
_libc = ctypes.CDLL(None, use_errno=True)
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)


def let_others_first() -> None:
    """Have the processor and the disk serve other programs first: one of them may record.

    Holds for this thread and those that it starts. A choice that was made by whoever started this
    process (nice and ionice, systemd's Nice and IOSchedulingClass) is left; a nice of 0 is none.
    See "setpriority(2)" and "ioprio_set(2)".
    """
    with contextlib.suppress(OSError):  # a filter of system calls may forbid it
        if os.getpriority(os.PRIO_PROCESS, 0) == 0:
            os.setpriority(os.PRIO_PROCESS, 0, _NICE)
            # Where the kernel groups processes by session, a nice counts within one alone; see
            # "The autogroup feature" in sched(7). Others may share this session: then it is left.
            if os.getsid(0) == os.getpid():
                _AUTOGROUP.write_text(str(_NICE))
    set_number, get_number = _IOPRIO.get(os.uname().machine, (0, 0))
    if set_number and _libc.syscall(get_number, _IOPRIO_WHO_PROCESS, 0) == 0:
        _libc.syscall(set_number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)


class Found(NamedTuple):
    """A file as a walk sees it.

    Attributes:
        path: Its path below the folder walked, '/' between the parts.
        size: Bytes; of what the disk fails on, the number of its error (errno.h).
        mtime_ns: When its content was last modified, nanoseconds since 1970.
        ctime_ns: When the kernel last changed anything of it, nanoseconds since 1970.
        kind: 'file', 'link', 'other' (a device, a socket, a pipe), 'unreadable' (a file or folder
            that regd has no right to look at), 'failing' (one that the disk fails on), or 'deep'
            (a folder whose path is longer than Alyx takes, and that was not entered).
    """

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    kind: str

    @property
    def signature(self) -> Signature:
        """Its size and modification time."""
        return _signature(self.size, self.mtime_ns)

    @property
    def touched_ns(self) -> int:
        """The newer of mtime and ctime."""
        return max(self.mtime_ns, self.ctime_ns)

    @property
    def modified_s(self) -> float:
        """When its content was last modified, seconds since 1970."""
        return self.mtime_ns / 1e9


def _nothing() -> None:
    pass


def walk(
    root: Path,
    folder: str = "",
    ignored: Ignored | None = None,
    flag: str = "",
    beat: Callable[[], object] = _nothing,
) -> list[Found]:
    """Return every file, link and special file below a folder, following no link.

    Args:
        root: The data root.
        folder: An existing folder below it; '' for the root itself.
        ignored: What it fits is left out, with all that is below it.
        flag: The name of a file in `folder` itself that is never left out.
        beat: Called again and again, as it advances.

    Raises:
        OSError: `folder` itself cannot be read.
    """
    with open_folder(root, folder) as top:
        listed = list_open(top, folder, ignored or _NOTHING, flag, beat)
        return [Found._make(fields) for fields in listed]


Fields = tuple[str, int, int, int, str]
"""Those of a `Found`, which takes longer to make."""


def list_open(
    top: int,
    folder: str,
    ignored: Ignored,
    flag: str = "",
    beat: Callable[[], object] = _nothing,
) -> list[Fields]:
    """Return the fields of each `Found` below an open folder; see `walk`."""
    found: list[Fields] = []
    _list_into(found, top, "", f"{folder}/", ignored.fits_name, ignored.fits_path, flag, beat)
    return found


def _list_into(
    found: list[Fields],
    descriptor: int,
    inner: str,
    prefix: str,
    fits_name: Callable[[str], object],
    fits_path: Callable[[str], object] | None,
    flag: str,
    beat: Callable[[], object],
) -> None:
    beat()
    folders = []
    with os.scandir(descriptor) as listed:
        for entry in listed:
            if not len(found) & 1023:  # of a million files on a slow drive
                beat()
            name = entry.name
            path = inner + name
            if (
                fits_name(name) or (fits_path is not None and fits_path(prefix + path))
            ) and path != flag:
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append((name, path))
                    continue
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as error:
                found.append(_not_seen(path, error))
                continue
            mode = status.st_mode
            kind = "file" if S_ISREG(mode) else "link" if S_ISLNK(mode) else "other"
            found.append((path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, kind))
    for name, path in folders:
        if len(path) > _LONGEST_FOLDER:
            found.append((path, 0, 0, 0, "deep"))
            continue
        try:
            # from the one above, so that no folder is looked up by its path again
            below = open_inner(descriptor, name)
            try:
                _list_into(found, below, f"{path}/", prefix, fits_name, fits_path, flag, beat)
            finally:
                os.close(below)
        except (FileNotFoundError, NotADirectoryError):
            continue  # it went away since it was listed
        except OSError as error:
            found.append(_not_seen(path, error))


def _not_seen(path: str, error: OSError) -> Fields:
    if isinstance(error, PermissionError):
        return path, 0, 0, 0, "unreadable"
    return path, error.errno or errno.EIO, 0, 0, "failing"


def signature_of(status: os.stat_result) -> Signature:
    """Return the signature of a file's status."""
    return _signature(status.st_size, status.st_mtime_ns)


def _signature(size: int, mtime_ns: int) -> Signature:
    # time stamps before 1677 and after 2262 do not fit into the journal's 64 bits
    return Signature(size, max(-(2**63), min(mtime_ns, 2**63 - 1)))


def open_inner(folder: int, name: str) -> int:
    """Open the folder `name` in an open one, and return its descriptor, to be closed.

    Raises:
        OSError: It is missing, is no folder, or is a symbolic link.
    """
    return os.open(name, _FOLDER, dir_fd=folder)


class Opened:
    """A folder that is kept open while all that is below it is looked at, one file at a time.

    So is the one below it that was asked for last: files come folder by folder, and no part of
    their path is opened again for each.

    Attributes:
        number: The folder's descriptor.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._inner = ""
        self._inner_number = number

    def inner(self, relative: str) -> int:
        """Return the descriptor of a folder below; it is closed when the next one is asked for.

        Raises:
            OSError: A part is missing, is no folder, or is a symbolic link.
        """
        if relative != self._inner:
            self.close()
            if relative:
                self._inner_number = _descend(os.dup(self.number), relative)
                self._inner = relative
        return self._inner_number

    def close(self) -> None:
        """Close what `inner` opened."""
        number, self._inner, self._inner_number = self._inner_number, "", self.number
        if number != self.number:
            os.close(number)


@contextlib.contextmanager
def open_below(root: Path, relative: str) -> Iterator[Opened]:
    """Open the folder `relative` below `root`, to look at what is in it.

    Raises:
        OSError: A part is missing, is no folder, or is a symbolic link.
    """
    with open_folder(root, relative) as number, contextlib.closing(Opened(number)) as opened:
        yield opened


@contextlib.contextmanager
def open_folder(root: Path | Opened, relative: str) -> Iterator[int]:
    """Open the folder `relative` below `root` and yield its descriptor.

    Args:
        root: The data root, or a folder below it that is open.
        relative: '/' between its parts; '' for `root` itself.

    Raises:
        OSError: A part is missing, is no folder, or is a symbolic link.
    """
    if isinstance(root, Opened):
        yield root.inner(relative)
        return
    descriptor = _descend(os.open(root, _FOLDER & ~os.O_NOFOLLOW), relative)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _descend(folder: int, relative: str) -> int:
    """Close an open folder, and return the descriptor of the one `relative` to it."""
    for part in filter(None, relative.split("/")):
        try:
            if part in (".", ".."):
                raise OSError(errno.EINVAL, "not a path below the data root", relative)
            inner = open_inner(folder, part)
        finally:
            os.close(folder)
        folder = inner
    return folder


@contextlib.contextmanager
def open_file(root: Path | Opened, relative: str) -> Iterator[FileIO]:
    """Open the regular file `relative` below `root` for reading.

    Raises:
        OSError: It is missing, no regular file, or a part of the path is a symbolic link.
    """
    folder, _, name = relative.rpartition("/")
    with open_folder(root, folder) as descriptor:
        file = _open_in(descriptor, name)
    with file:
        yield file


def _open_in(folder: int, name: str) -> FileIO:
    """Open the regular file `name` in an open folder for reading."""
    number = os.open(name, _FILE, dir_fd=folder)
    if not S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a regular file", name)
    return FileIO(number)


def signature(root: Path, relative: str) -> Signature | None:
    """Return the signature of a regular file below `root`, or None if there is none."""
    status = _status(root, relative)
    if status is None or not S_ISREG(status.st_mode):
        return None
    return signature_of(status)


def _status(root: Path, relative: str) -> os.stat_result | None:
    folder, _, name = relative.rpartition("/")
    try:
        with open_folder(root, folder) as descriptor:
            return os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_open_for_writing(file: FileIO) -> bool | None:
    """Say whether a program has a file open for writing, or mapped so; None if nobody can tell.

    The kernel grants a read lease only where nobody can write, to the file's owner or with
    CAP_LEASE. It is given back at once: a program that opens the file for writing in between waits
    that long, a microsecond. Where just then the whole process gets no turn (busier programs, a
    frozen cgroup, SIGSTOP), it waits until there is one, or until the kernel takes the lease, after
    /proc/sys/fs/lease-break-time (45 s); with O_NONBLOCK it gets EWOULDBLOCK. See "Leases" in
    fcntl(2).

    Args:
        file: Open for reading only.
    """
    number = file.fileno()
    control = partial(_libc_with_gil.fcntl, number)
    steps: tuple[Callable[[], int], ...] = (
        # Who opens the file in that microsecond has the kernel signal this process, by default with
        # SIGIO, which would end it; SIGURG is ignored. Giving the lease back undoes this setting.
        partial(control, F_SETSIG, signal.SIGURG),
        partial(control, F_SETLEASE, F_RDLCK),
        ctypes.get_errno,
        partial(control, F_SETLEASE, F_UNLCK),
    )
    # one C call that keeps the GIL: no other thread gets a turn while the lease is held
    _, taken, code, _ = tuple(map(operator.call, steps))
    if taken == 0:
        return False
    if code != errno.EAGAIN or _is_remote(number):
        return None
    return True


def is_local(number: int) -> bool:
    """Say whether an open file is surely on a disk of this computer, which no other one sees."""
    return _file_system(number) in mounts.LOCAL_TYPES


def _is_remote(number: int) -> bool:
    """Say whether a file is on a network drive that refuses a lease for reasons of its own."""
    kind = _file_system(number)
    return kind is None or kind in mounts.NETWORK_TYPES


def _file_system(number: int) -> int | None:
    """Return the f_type of an open file's file system, or None if it does not tell."""
    status = ctypes.create_string_buffer(512)
    if _libc.fstatfs(number, status) != 0:
        return None
    return ctypes.c_ulong.from_buffer(status).value


@contextlib.contextmanager
def open_finished(root: Path | Opened, relative: str, expected: Signature) -> Iterator[FileIO]:
    """Open a file for reading that nobody writes to, neither now nor when it is closed.

    Raises:
        FileChanged: It is not `expected`, now or at the end, or was touched or replaced meanwhile.
        FileHeld: A program has it open for writing, now or at the end.
        OSError: It cannot be read.
    """
    try:
        with open_file(root, relative) as file:
            # now, too: what is stored in a page mapped before, and dirty already, changes no stamp
            before = _check_finished(file, expected, relative)
            yield file
            after = _check_finished(file, expected, relative)
            # no tool can set this one back: written to, replaced, moved or deleted
            if before.st_ctime_ns != after.st_ctime_ns:
                raise FileChanged(f"{relative} was written to meanwhile")
    except BlockingIOError:  # a file server holds a lease of its own for a client that writes
        raise FileHeld(f"{relative} is open for writing") from None


def _check_finished(file: FileIO, expected: Signature, relative: str) -> os.stat_result:
    # in this order: what was written before the last writer closed it shows in the signature
    if is_open_for_writing(file):
        raise FileHeld(f"{relative} is open for writing")
    return _check_signature(file, expected, relative)


def check_finished(root: Path | Opened, relative: str, expected: Signature) -> None:
    """Raise if a file that was finished is so no longer; much cheaper than reading it.

    Raises:
        FileChanged: It is not `expected`, or is gone.
        FileHeld: A program has it open for writing.
        OSError: It cannot be opened.
    """
    folder, _, name = relative.rpartition("/")
    try:
        with open_folder(root, folder) as descriptor:
            _check_in(descriptor, name, expected)
    except (FileNotFoundError, NotADirectoryError):
        raise FileChanged(f"{relative} is gone") from None


def _check_in(folder: int, name: str, expected: Signature) -> None:
    """Raise if a file in an open folder is not `expected`, or is open for writing."""
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if not S_ISREG(status.st_mode) or signature_of(status) != expected:
        raise FileChanged(f"{name} was written to meanwhile")
    try:
        with _open_in(folder, name) as file:
            _check_finished(file, expected, name)
    except BlockingIOError:  # see `open_finished`
        raise FileHeld(f"{name} is open for writing") from None


def md5(
    root: Path | Opened, relative: str, expected: Signature, on_read: Callable[[int], object]
) -> str:
    """Return the MD5 of a finished file, 32 hexadecimal digits, as Alyx keeps it.

    Args:
        root: The data root, or a folder below it that is open.
        relative: The file's path below it.
        expected: What it must be.
        on_read: Called with the number of bytes of each block that was read; may raise to end.

    Raises:
        FileChanged: It was not `expected` before or after it was read.
        FileHeld: A program has it open for writing, before or after it was read.
        OSError: It cannot be read.
    """
    return _run(md5_in_blocks(root, relative, expected), on_read)


def md5_in_blocks(
    root: Path | Opened, relative: str, expected: Signature
) -> Generator[int, None, str]:
    """Do as `md5`, block by block: yield the bytes of each, so that others can have a turn.

    What is not read to the end has to be closed.
    """
    with open_finished(root, relative, expected) as file:
        return (yield from _digest(file))


def md5_of(path: Path, expected: Signature) -> str:
    """Return the MD5 of any file, following links as the one who names it means to.

    Raises:
        FileChanged: It was not `expected` before or after it was read.
        OSError: It cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        _check_signature(file, expected, str(path))
        digest = _run(_digest(file), lambda _: None)
        _check_signature(file, expected, str(path))
    return digest


def _run(digesting: Generator[int, None, str], on_read: Callable[[int], object]) -> str:
    with contextlib.closing(digesting):
        try:
            while True:
                on_read(next(digesting))
        except StopIteration as end:
            return str(end.value)


def _digest(file: FileIO) -> Generator[int, None, str]:
    """Read a file from its beginning to its end, once, and return the MD5 of that.

    Yields the bytes of each block. A large file does not stay in the page cache: that memory is
    for the programs that record.
    """
    # Alyx's `hash`; it guards against accidents, not against people
    digest = hashlib.md5(usedforsecurity=False)
    size = os.fstat(file.fileno()).st_size
    buffer = memoryview(bytearray(max(1, min(size, _BLOCK))))
    at = dropped_at = 0
    while read := file.readinto(buffer):
        at += read
        digest.update(buffer[:read])
        if at - dropped_at >= _WINDOW:
            _drop(file, dropped_at, at - dropped_at)
            dropped_at = at
        yield read
    if dropped_at:
        _drop(file, dropped_at, 0)
    return digest.hexdigest()


def _drop(file: FileIO, start: int, length: int) -> None:
    """Drop a part of a file (all after `start` if it is 0 long) from the page cache."""
    with contextlib.suppress(OSError):  # what is not yet on the disk stays
        os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)


def occupied_revisions(root: Path, folder: str, relative: str) -> set[str]:
    """Return the revisions beside a file whose folder holds a file of the same name.

    Args:
        root: The data root.
        folder: A session folder below it.
        relative: The file's path below `folder`, in a revision folder or not.
    """
    place = parse_dataset(relative)
    with (
        open_folder(root, f"{folder}/{place.collection}") as descriptor,
        os.scandir(descriptor) as entries,
    ):
        return {
            entry.name[1:-1]
            for entry in entries
            if len(entry.name) > 2 and entry.name[0] == entry.name[-1] == "#"
            if _holds(descriptor, entry.name, place.name)
        }


def _holds(above: int, folder: str, name: str) -> bool:
    try:
        descriptor = os.open(folder, _FOLDER, dir_fd=above)
    except OSError:
        return False  # no folder, or a link: nothing can be moved into it
    try:
        os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True  # a dangling link occupies the name, too


def _check_signature(file: Any, expected: Signature, relative: str) -> os.stat_result:
    status = os.fstat(file.fileno())
    if signature_of(status) != expected:
        raise FileChanged(f"{relative} was written to meanwhile")
    return status


def move(
    root: Path, folder: str, source: str, target: str, expected: Signature | None = None
) -> None:
    """Move a file within `folder`, never over another one; both folders reach the disk.

    Args:
        root: The data root.
        folder: A session folder below it.
        source: The file's path below `folder`.
        target: Its new path below `folder`; the last folder of it is made if it is missing.
        expected: What the file must be, and finished, in the moment it is moved: a program that
            has it open would go on writing at `target`, and begin another file at `source`. None
            if that does not matter.

    Raises:
        FileChanged: It is not `expected`; nothing was moved.
        FileHeld: A program has it open for writing; nothing was moved.
        PathTaken: `target` exists, or what took the file's place meanwhile has no place any more.
        FileNotFoundError: `source` does not.
        NeedsHuman: The file system can move nothing without the risk of overwriting.
        OSError: The disk refuses.
    """
    source_folder, _, name = source.rpartition("/")
    target_folder, _, new_name = target.rpartition("/")
    parent, _, revision = target_folder.rpartition("/")
    with open_folder(root, f"{folder}/{parent}") as above:
        with contextlib.suppress(FileExistsError):
            os.mkdir(revision, dir_fd=above)
        os.fsync(above)
    with (
        open_folder(root, f"{folder}/{source_folder}") as from_fd,
        open_folder(root, f"{folder}/{target_folder}") as to_fd,
    ):
        try:
            rename_noreplace(from_fd, name, to_fd, new_name, expected)
        except PathTaken:
            raise
        except FileExistsError:
            raise PathTaken(
                f"{folder}/{target} exists already, so {source} was not moved there",
                hint="compare the two files, keep both, then: regd retry --all",
            ) from None
        os.fsync(to_fd)
        os.fsync(from_fd)


def rename_noreplace(
    from_fd: int, name: str, to_fd: int, new_name: str, expected: Signature | None = None
) -> None:
    """Rename as `renameat2` with RENAME_NOREPLACE does, by link and unlink where it is missing.

    Args:
        from_fd: The open folder of the file.
        name: Its name there.
        to_fd: The open folder that it goes to.
        new_name: Its name there.
        expected: As for `move`.
    """
    if expected is not None:
        _check_in(from_fd, name, expected)
    old, new = os.fsencode(name), os.fsencode(new_name)
    renameat2 = getattr(_libc, "renameat2", None)  # glibc has it since 2.28
    if renameat2 is None:
        return _link_and_unlink(from_fd, name, to_fd, new_name, expected)
    if renameat2(from_fd, old, to_fd, new, _RENAME_NOREPLACE) == 0:
        return None
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), name)
    return _link_and_unlink(from_fd, name, to_fd, new_name, expected)


def _link_and_unlink(
    from_fd: int, name: str, to_fd: int, new_name: str, expected: Signature | None
) -> None:
    try:
        os.link(name, new_name, src_dir_fd=from_fd, dst_dir_fd=to_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise NeedsHuman(
                f"the file system of {name} cannot move a file without the risk of overwriting",
                hint="keep data_root on a file system that has hard links, such as ext4 or XFS",
            ) from None
        raise
    new = os.stat(new_name, dir_fd=to_fd, follow_symlinks=False)
    _keep_new_name(from_fd, name, to_fd, new_name, new, expected)


def _keep_new_name(
    from_fd: int,
    name: str,
    to_fd: int,
    new_name: str,
    new: os.stat_result,
    expected: Signature | None,
) -> None:
    """Drop the old name of a file that has two; the new one instead if it is not `expected`."""
    os.fsync(to_fd)  # the new name is on the disk before the old one goes
    if expected is not None:  # that took its time
        try:
            _check_in(from_fd, name, expected)
        except (FileChanged, FileNotFoundError):
            old = _status_in(from_fd, name)
            if old is not None and os.path.samestat(old, new):
                os.fsync(from_fd)
                _drop_name(to_fd, new_name, new)
                raise
            # else another file was saved under the old name meanwhile: this one has moved
    _drop_name(from_fd, name, new)


def _status_in(folder: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def moving_name(path: str) -> str:
    """Return the path that a file has for a moment where a move has to drop the old one."""
    folder, slash, name = path.rpartition("/")
    # of any name, however long, and of no dataset type
    return f"{folder}{slash}.regd-moving-{blake2b(os.fsencode(name), digest_size=8).hexdigest()}"


def _drop_name(folder: int, name: str, file: os.stat_result) -> None:
    """Remove a name from a folder if it is one of `file`, whatever is saved under it meanwhile.

    No call removes a name only if it is that of a certain file, but a rename takes whatever the
    name is of, and then there is time to look.
    """
    if name.startswith(OWNER_FILE):
        os.unlink(name, dir_fd=folder)  # regd's own: nobody saves another file under it
        return
    _end_drop(folder, name, file)
    with contextlib.suppress(FileNotFoundError):
        os.rename(name, moving_name(name), src_dir_fd=folder, dst_dir_fd=folder)
        _end_drop(folder, name, file)


def _end_drop(folder: int, name: str, file: os.stat_result | None) -> None:
    """Remove what `_drop_name` has renamed if it is `file`, or else put it back."""
    moving = moving_name(name)
    taken = _status_in(folder, moving)
    if taken is None:
        return
    if file is None or not os.path.samestat(taken, file):
        try:
            os.link(moving, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            there = _status_in(folder, name)
            if there is None or not os.path.samestat(there, taken):  # else it was put back already
                raise PathTaken(
                    f"{name} was saved twice while it was moved; the first of them is {moving} now",
                    hint="compare the two files, keep both, then: regd retry --all",
                ) from None
        os.fsync(folder)
    os.unlink(moving, dir_fd=folder)


def remove_flag(root: Path, folder: str, flag: str) -> bool:
    """Delete the flag file in `folder`; return False if there is none.

    Raises:
        OSError: It cannot be deleted, or it is a folder.
    """
    try:
        with open_folder(root, folder) as descriptor:
            # not flushed: a flag that comes back after a power cut is harmless
            os.unlink(flag, dir_fd=descriptor)
    except FileNotFoundError:
        return False
    return True


def mend_move(root: Path, folder: str, source: str, target: str, expected: Signature) -> None:
    """Leave one name to a file whose move a crash left half done; do nothing if it has one.

    Raises:
        FileChanged: It is not `expected`, and is at `source` alone again.
        FileHeld: A program has it open for writing; it is at `source` alone again.
        PathTaken: What took its place meanwhile has no place any more.
        OSError: The disk refuses.
    """
    old_folder, _, old_name = source.rpartition("/")
    new_folder, _, new_name = target.rpartition("/")
    new = _status(root, f"{folder}/{target}")
    try:
        with open_folder(root, f"{folder}/{old_folder}") as old_fd:
            _end_drop(old_fd, old_name, new)
            old = _status_in(old_fd, old_name)
            if new is not None:
                with open_folder(root, f"{folder}/{new_folder}") as new_fd:
                    # with a single link the two names are two spellings of it, and it must stay
                    if old and old.st_nlink > 1 and os.path.samestat(old, new):
                        _keep_new_name(old_fd, old_name, new_fd, new_name, new, expected)
                    os.fsync(new_fd)  # before the old one: the crash may have come before both
            os.fsync(old_fd)
    except (FileNotFoundError, NotADirectoryError):
        return  # a folder went away, and with it one of the names
