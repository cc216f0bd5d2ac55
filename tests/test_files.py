"""What is done to files, on a real file system."""

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iblutil.io import hashfile

from regd import files
from regd.errors import FileChanged, FileHeld, InvalidPath, NeedsHuman, PathTaken, Stopping
from regd.model import Signature
from regd.paths import Ignored

SESSION = "ZM_1085/2020-01-01/001"


def nobody(_: int) -> None:
    """Stand in for who is told of what was read."""


steady = settings(deadline=None, derandomize=True, max_examples=60)


def put(root: Path, relative: str, content: bytes = b"x") -> Path:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a Path would hide what is counted


def signature_of(path: Path) -> Signature:
    status = path.stat()
    return Signature(status.st_size, status.st_mtime_ns)


@contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """Be somebody to whom the mode bits of `folder` apply."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that any user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="regd-test-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


# --- walk ----------------------------------------------------------------------------------------


def test_walk_yields_every_file_with_its_signature(tmp_path: Path) -> None:
    put(tmp_path, "a.npy", b"123")
    put(tmp_path, "alf/b.npy", b"")
    put(tmp_path, "alf/#r#/c d.npy")
    (tmp_path / "empty").mkdir()
    os.utime(tmp_path / "a.npy", ns=(1, 5_000_000_000))
    found = {f.path: f for f in files.walk(tmp_path)}
    assert set(found) == {"a.npy", "alf/b.npy", "alf/#r#/c d.npy"}
    first = found["a.npy"]
    assert first.signature == Signature(3, 5_000_000_000)
    assert first.modified_s == 5.0
    assert first.kind == "file"
    # a copying tool can set mtime back, but not ctime
    assert first.touched_ns == (tmp_path / "a.npy").stat().st_ctime_ns


def test_walk_takes_the_newer_of_both_stamps(tmp_path: Path) -> None:
    future = 2**62
    os.utime(put(tmp_path, "a"), ns=(1, future))
    assert files.walk(tmp_path)[0].touched_ns == future


def test_walk_follows_no_link_and_names_it(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    put(outside, "secret")
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "folder").symlink_to(outside)
    (inside / "file").symlink_to(outside / "secret")
    (inside / "dangling").symlink_to("nowhere")
    (inside / "loop").symlink_to(inside)
    assert {(f.path, f.kind) for f in files.walk(inside)} == {
        ("folder", "link"), ("file", "link"), ("dangling", "link"), ("loop", "link"),
    }  # fmt: skip


def test_walk_names_special_files_as_such(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        folder = os.open(tmp_path, os.O_RDONLY)
        sock.bind(f"/proc/self/fd/{folder}/sock")  # socket paths are short
        os.close(folder)
        assert {(f.path, f.kind) for f in files.walk(tmp_path)} == {
            ("pipe", "other"), ("sock", "other"),
        }  # fmt: skip


def test_walk_leaves_out_what_is_ignored_and_does_not_enter_it(tmp_path: Path) -> None:
    put(tmp_path, "keep/a")
    put(tmp_path, "drop/deep/b")
    put(tmp_path, "drop.txt")
    asked = []

    def ignored(path: str) -> bool:
        asked.append(path)
        return path.startswith("s/drop")

    found = files.walk(
        tmp_path.parent, tmp_path.name, asking(lambda p: ignored("s/" + p.split("/", 1)[1]))
    )
    assert [f.path for f in found] == ["keep/a"]
    assert sorted(asked) == ["s/drop", "s/drop.txt", "s/keep", "s/keep/a"]


def asking(answer: Callable[[str], bool]) -> Ignored:
    """Return what is asked about every path."""
    ignored = Ignored(())
    ignored.fits_path = answer
    return ignored


def test_walk_gives_names_that_are_not_utf8_as_the_disk_has_them(tmp_path: Path) -> None:
    name = b"\xff\xfe.npy"
    fd = os.open(os.fsencode(tmp_path) + b"/" + name, os.O_CREAT | os.O_WRONLY)
    os.close(fd)
    (found,) = files.walk(tmp_path)
    assert os.fsencode(found.path) == name


def test_walk_passes_over_what_vanishes_meanwhile(tmp_path: Path) -> None:
    put(tmp_path, "a/x")
    put(tmp_path, "b")

    def vanish(path: str) -> bool:
        if path == "/b":
            (tmp_path / "b").unlink()
        if path == "/a":
            (tmp_path / "a/x").unlink()
            (tmp_path / "a").rmdir()
        return False

    assert list(files.walk(tmp_path, "", asking(vanish))) == []


def test_walk_passes_over_a_folder_that_a_file_took_the_place_of(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    def replace(path: str) -> bool:
        (tmp_path / "a").rmdir()
        put(tmp_path, "a")
        return False

    assert list(files.walk(tmp_path, "", asking(replace))) == []


def test_walk_says_when_the_folder_itself_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(files.walk(tmp_path / "none"))


def test_walk_names_a_folder_that_may_not_be_read_and_goes_on(public: Path) -> None:
    put(public, "a/b/x")
    put(public, "a/c/y")
    (public / "a/b").chmod(0)
    with unprivileged(public):
        found = {f.path: f for f in files.walk(public)}
    (public / "a/b").chmod(0o755)
    assert {path: f.kind for path, f in found.items()} == {"a/b": "unreadable", "a/c/y": "file"}
    # nothing is known of it, so no size and no time are made up
    assert found["a/b"] == files.Found("a/b", 0, 0, 0, "unreadable")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_walk_names_a_folder_that_the_disk_fails_on_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    put(tmp_path, "a/b/x")
    put(tmp_path, "a/c/y")
    real = files.open_inner

    def open_inner(folder: int, name: str) -> int:
        if name == "b":
            raise OSError(code, os.strerror(code))
        return real(folder, name)

    monkeypatch.setattr(files, "open_inner", open_inner)
    found = {f.path: f for f in files.walk(tmp_path)}
    assert found.keys() == {"a/b", "a/c/y"}
    assert found["a/b"] == files.Found("a/b", code, 0, 0, "failing")


@pytest.mark.parametrize("inner", ["x", "deep/x"])
def test_walk_names_a_folder_that_may_be_listed_but_not_entered(public: Path, inner: str) -> None:
    put(public, f"a/b/{inner}")
    put(public, "a/c/y")
    (public / "a/b").chmod(0o444)
    try:
        with unprivileged(public):
            found = {f.path: f.kind for f in files.walk(public)}
    finally:
        (public / "a/b").chmod(0o755)
    assert found.pop("a/c/y") == "file"
    assert set(found.values()) == {"unreadable"}


def test_walk_does_not_name_a_folder_that_is_ignored_as_unreadable(public: Path) -> None:
    put(public, "a/b/x")
    (public / "a/b").chmod(0)
    with unprivileged(public):
        assert list(files.walk(public, "", asking(lambda path: path.endswith("/b")))) == []
    (public / "a/b").chmod(0o755)


def test_walk_says_when_the_folder_itself_may_not_be_read(public: Path) -> None:
    put(public, "a/b/x")
    (public / "a").chmod(0)
    with unprivileged(public), pytest.raises(PermissionError):
        list(files.walk(public / "a"))
    (public / "a").chmod(0o755)


# --- opening -------------------------------------------------------------------------------------


def test_open_folder(tmp_path: Path) -> None:
    put(tmp_path, "a/b/c")
    for relative in ("a/b", "/a//b/"):
        with files.open_folder(tmp_path, relative) as fd:
            assert os.listdir(fd) == ["c"]  # noqa: PTH208 - a descriptor is no Path
    with files.open_folder(tmp_path, "") as fd:
        assert os.listdir(fd) == ["a"]  # noqa: PTH208


@pytest.mark.parametrize("link", ["a", "a/b"])
def test_a_link_anywhere_on_the_path_is_refused(tmp_path: Path, link: str) -> None:
    root = tmp_path / "root"
    put(tmp_path / "outside", "b/c", b"secret")
    put(tmp_path / "outside", "c", b"secret")
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to(tmp_path / "outside")
    before = open_descriptors()
    with pytest.raises(OSError, match=link[-1]), files.open_folder(root, "a/b"):
        pass
    with pytest.raises(OSError, match=link[-1]), files.open_file(root, "a/b/c"):
        pass
    assert files.signature(root, "a/b/c") is None
    assert open_descriptors() == before


def test_a_link_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "secret")
    (tmp_path / "a").symlink_to("secret")
    with pytest.raises(OSError, match="symbolic"), files.open_file(tmp_path, "a"):
        pass
    assert files.signature(tmp_path, "a") is None


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    put(tmp_path, "data/a", b"1")
    (tmp_path / "root").symlink_to("data")
    with files.open_file(tmp_path / "root", "a") as file:
        assert file.read() == b"1"


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"), files.open_file(tmp_path, "pipe"):
        pass
    assert files.signature(tmp_path, "pipe") is None


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="not a regular file"), files.open_file(tmp_path, "a"):
        pass
    assert files.signature(tmp_path, "a") is None


def test_a_folder_in_place_of_the_file_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    before = open_descriptors()
    with pytest.raises(OSError, match="not a regular file"), files.open_file(tmp_path, "a"):
        pass
    assert open_descriptors() == before


def test_signature(tmp_path: Path) -> None:
    path = put(tmp_path, "a/b", b"1234")
    assert files.signature(tmp_path, "a/b") == signature_of(path)
    assert files.signature(tmp_path, "a/none") is None
    assert files.signature(tmp_path, "none/b") is None
    assert files.signature(tmp_path, "a/b/c") is None


# --- the disk ------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("ionice"), reason="ionice is not here (util-linux)")
@pytest.mark.parametrize(
    ("before", "after"), [([], "idle"), (["ionice", "-c", "2", "-n", "3"], "best-effort: prio 3")]
)
def test_the_disk_serves_others_first_unless_somebody_chose(before: list[str], after: str) -> None:
    code = (
        "import subprocess, sys, threading; from regd.files import let_others_first\n"
        "let_others_first()\n"
        "def ask(): subprocess.run(['ionice', '-p', str(threading.get_native_id())], check=True)\n"
        "thread = threading.Thread(target=ask); thread.start(); thread.join()"
    )
    command = [*before, sys.executable, "-c", code]
    asked = subprocess.run(command, capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == after


@pytest.mark.parametrize("before", [[], ["nice", "-n", "3"]])
def test_so_does_the_processor(before: list[str]) -> None:
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    code = (
        "import os, threading; from regd.files import let_others_first; let_others_first()\n"
        "def ask(): print(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))\n"
        "thread = threading.Thread(target=ask); thread.start(); thread.join()"
    )
    command = [*before, sys.executable, "-c", code]
    asked = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(asked.stdout) == (ours + 3 if before else ours or 10)


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="CONFIG_SCHED_AUTOGROUP")
@pytest.mark.parametrize("alone", [True, False])
def test_and_beside_other_sessions_if_its_own_is_of_regd_alone(alone: bool) -> None:
    code = (
        "from pathlib import Path; from regd.files import let_others_first\n"
        "def ask(): print(['none', *Path('/proc/self/autogroup').read_text().split()][-1])\n"
        "ask(); let_others_first(); ask()"
    )
    command = [sys.executable, "-c", code]
    asked = subprocess.run(
        command, capture_output=True, text=True, check=True, start_new_session=alone
    )
    before, after = asked.stdout.split()  # "none" where the kernel keeps no group for the session
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert after == ("10" if alone and ours == 0 and before != "none" else before)


# --- MD5 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 2**18 - 1, 2**18, 2**18 + 1, 3_000_000])
def test_md5_is_that_of_the_original(tmp_path: Path, size: int) -> None:
    path = put(tmp_path, "s/a", os.urandom(size))
    digest = files.md5(tmp_path, "s/a", signature_of(path), nobody)
    assert digest == hashlib.md5(path.read_bytes()).hexdigest()
    assert digest == files.md5_of(path, signature_of(path))
    assert digest == hashfile.md5(path)


@steady
@given(st.binary(max_size=300))
def test_md5_of_any_content(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = put(Path(name), "a", content)
        assert (
            files.md5(Path(name), "a", signature_of(path), nobody)
            == hashlib.md5(content).hexdigest()
        )


class WritesOnce:
    """Is told of what was read; does something to the file then, once."""

    def __init__(self, effect: Callable[[], object]) -> None:
        self.effect: Callable[[], object] | None = effect

    def __call__(self, _: int) -> None:
        effect, self.effect = self.effect, None
        if effect:
            effect()


def test_md5_sees_a_change_before_during_and_after(tmp_path: Path) -> None:
    path = put(tmp_path, "a", b"one")
    old = signature_of(path)
    with pytest.raises(FileChanged):
        files.md5(tmp_path, "a", Signature(old.size, old.mtime_ns - 1), nobody)
    with pytest.raises(FileChanged):
        files.md5(tmp_path, "a", Signature(old.size + 1, old.mtime_ns), nobody)
    with pytest.raises(FileChanged):
        files.md5_of(path, Signature(old.size + 1, old.mtime_ns))

    def same_size() -> None:
        path.write_bytes(b"two")
        os.utime(path, ns=(1, old.mtime_ns + 1))

    once = WritesOnce(same_size)
    with pytest.raises(FileChanged):
        files.md5(tmp_path, "a", old, once)
    once = WritesOnce(lambda: path.open("ab").close())  # opened, but not written to
    now = signature_of(path)
    assert files.md5(tmp_path, "a", now, once) == hashlib.md5(b"two").hexdigest()


def test_md5_notices_a_file_of_the_same_size_and_time_that_took_its_place(tmp_path: Path) -> None:
    path = put(tmp_path, "a", b"one")
    new = put(tmp_path, "b", b"new")
    old = signature_of(path)
    os.utime(new, ns=(old.mtime_ns, old.mtime_ns))
    once = WritesOnce(lambda: new.replace(path))
    with pytest.raises(FileChanged):
        files.md5(tmp_path, "a", old, once)
    assert signature_of(path) == old


def test_md5_notices_a_change_whose_time_was_set_back(tmp_path: Path) -> None:
    path = put(tmp_path, "a", b"one")
    old = signature_of(path)

    def unnoticed() -> None:
        path.write_bytes(b"two")
        os.utime(path, ns=(old.mtime_ns, old.mtime_ns))

    once = WritesOnce(unnoticed)
    with pytest.raises(FileChanged):
        files.md5(tmp_path, "a", old, once)
    assert signature_of(path) == old


def test_md5_of_a_file_that_a_program_has_mapped_until_it_is_read(tmp_path: Path) -> None:
    path = put(tmp_path, "a", b"one")
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    mapped[:] = b"two"  # from here on the page is dirty: no store in it changes a stamp
    mapped.flush()
    mapped[:] = b"two"
    before = signature_of(path)

    def store(_size: int) -> None:
        mapped[:] = b"new"
        mapped.close()

    with pytest.raises(FileHeld):
        files.md5(tmp_path, "a", before, store)
    mapped.close()


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 2500, 2**18, 2**18 + 1])
def test_md5_on_a_file_system_that_gives_less_than_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    class Stingy(FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 1000))

        def readinto(self, buffer: Any, /) -> int:
            return super().readinto(memoryview(buffer)[:1000])

    path = put(tmp_path, "s/a", os.urandom(size))
    monkeypatch.setattr(files, "FileIO", Stingy)
    digest = files.md5(tmp_path, "s/a", signature_of(path), nobody)
    assert digest == hashlib.md5(path.read_bytes()).hexdigest()


# --- is_open_for_writing -------------------------------------------------------------------------


def held(path: Path) -> bool | None:
    with FileIO(path) as file:
        return files.is_open_for_writing(file)


@pytest.mark.parametrize("mode", ["ab", "r+b"])
def test_a_file_is_open_for_writing_until_its_last_writer_closed_it(
    tmp_path: Path, mode: str
) -> None:
    path = put(tmp_path, "a")
    with path.open("rb"):
        assert held(path) is False
        with path.open(mode), path.open(mode) as second:
            assert held(path) is True
        assert second.closed
    assert held(path) is False


@pytest.mark.parametrize("folder", [None, "/dev/shm"])  # ext4 and tmpfs differ in how they map
def test_a_shared_mapping_is_an_open_writer_even_without_a_descriptor(
    tmp_path: Path, folder: str | None
) -> None:
    with tempfile.TemporaryDirectory(dir=folder or tmp_path) as place:
        path = put(Path(place), "a", bytes(4096))
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 4096)
        assert held(path) is True
        mapped.close()
        assert held(path) is False
        with path.open("rb") as file, mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_COPY):
            assert held(path) is False


def test_nobody_can_tell_of_what_is_no_regular_file(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with FileIO(reader) as file:
        assert files.is_open_for_writing(file) is None
    os.close(writer)


@pytest.mark.parametrize(
    "code", [errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS]
)
def test_a_kernel_that_does_not_say_is_believed_neither_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuses(*_: int) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(files, "_libc_with_gil", SimpleNamespace(fcntl=refuses))
    path = put(tmp_path, "a", b"one")
    with path.open("ab"):
        assert held(path) is None
        # stillness alone decides then
        assert (
            files.md5(tmp_path, "a", signature_of(path), nobody) == hashlib.md5(b"one").hexdigest()
        )


@pytest.mark.parametrize(
    ("kind", "said"), [(0x6969, None), (0xFF534D42, None), (0xFE534D42, None), (0xEF53, True)]
)
def test_a_network_drive_that_grants_no_lease_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int, said: bool | None
) -> None:
    def fstatfs(_: int, buffer: Any) -> int:
        ctypes.c_ulong.from_buffer(buffer).value = kind
        return 0

    monkeypatch.setattr(files, "_libc", SimpleNamespace(fstatfs=fstatfs))
    path = put(tmp_path, "a")
    with path.open("ab"):
        assert held(path) is said


def test_a_file_held_open_is_not_hashed(tmp_path: Path) -> None:
    path = put(tmp_path, "a", b"one")
    with path.open("ab"), pytest.raises(FileHeld):
        files.md5(tmp_path, "a", signature_of(path), nobody)

    writers = []
    once = WritesOnce(lambda: writers.append(path.open("ab")))
    with pytest.raises(FileHeld):
        files.md5(tmp_path, "a", signature_of(path), once)
    writers[0].close()


def test_a_file_that_a_server_has_leased_to_a_client_is_held(tmp_path: Path) -> None:
    path = put(tmp_path, "a", b"one")
    with path.open("r+b") as server:
        fcntl.fcntl(server, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(server, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # as Samba's kernel oplocks
        with pytest.raises(FileHeld):
            files.md5(tmp_path, "a", signature_of(path), nobody)


def test_who_opens_a_file_while_it_is_asked_about_is_hardly_delayed_and_ends_nobody(
    tmp_path: Path,
) -> None:
    """Asks in a process of its own, where SIGIO would be the end of it."""
    path = put(tmp_path, "a")
    asks = (
        "from io import FileIO; from regd import files; file = FileIO({!r})\n"
        "print('go', flush=True)\n"
        "while True: files.is_open_for_writing(file)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", asks.format(str(path))], stdout=subprocess.PIPE
    ) as asker:
        assert asker.stdout is not None
        asker.stdout.readline()
        longest_s = 0.0
        for _ in range(20_000):
            started_at = time.monotonic()
            os.close(os.open(path, os.O_WRONLY))
            longest_s = max(longest_s, time.monotonic() - started_at)
        alive = asker.poll() is None
        asker.kill()
    assert alive
    assert longest_s < 2.0  # the kernel would take a lease that is not given back after 45 s


def test_md5_stops(tmp_path: Path) -> None:
    path = put(tmp_path, "a", os.urandom(1_000_000))
    read: list[int] = []

    def stop(size: int) -> None:
        read.append(size)
        if sum(read) > 500_000:
            raise Stopping("enough")

    before = open_descriptors()
    with pytest.raises(Stopping):
        files.md5(tmp_path, "a", signature_of(path), stop)
    assert 500_000 < sum(read) < 1_000_000
    assert open_descriptors() == before


def cached(path: Path) -> int:
    """Return how many bytes of a file are in the page cache."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.mark.skipif(not shutil.which("fincore"), reason="fincore is not here (util-linux)")
def test_md5_leaves_the_page_cache_to_those_who_record(tmp_path: Path) -> None:
    content = os.urandom(3 * files._WINDOW + 12345)
    path = put(tmp_path, "a", content)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # it was recorded a while ago
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path):
        pytest.skip(f"{tmp_path} is on a file system that is all in memory")
    assert path.read_bytes() == content
    assert cached(path) >= len(content)
    digest = files.md5(tmp_path, "a", signature_of(path), nobody)
    assert digest == hashlib.md5(content).hexdigest()
    assert cached(path) < files._WINDOW


def test_md5_of_follows_the_link_it_is_given(tmp_path: Path) -> None:
    path = put(tmp_path, "a", b"one")
    (tmp_path / "link").symlink_to(path)
    assert files.md5_of(tmp_path / "link", signature_of(path)) == hashlib.md5(b"one").hexdigest()


# --- moving --------------------------------------------------------------------------------------


@pytest.fixture
def no_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot rename without replacing, as some network drives."""

    def renameat2(*_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    libc = SimpleNamespace(renameat2=renameat2, fstatfs=files._libc.fstatfs)
    monkeypatch.setattr(files, "_libc", libc)


@pytest.fixture(params=["renameat2", "link"])
def either_way(request: pytest.FixtureRequest) -> None:
    if request.param == "link":
        request.getfixturevalue("no_renameat2")


@pytest.mark.usefixtures("either_way")
class TestMove:
    """What holds of a move, however the file system does it."""

    @pytest.mark.parametrize(
        ("source", "target"),
        [
            ("alf/a.npy", "alf/#2020-01-01#/a.npy"),
            ("a.npy", "#2020-01-01#/a.npy"),
            ("alf/#r#/a.npy", "alf/#s#/a.npy"),
        ],
    )
    def test_into_a_new_revision_folder(self, tmp_path: Path, source: str, target: str) -> None:
        put(tmp_path / SESSION, source, b"data")
        put(tmp_path / SESSION, "alf/other.npy", b"other")
        os.utime(tmp_path / SESSION / source, ns=(1, 12345))
        before = open_descriptors()
        files.move(tmp_path, SESSION, source, target)
        assert tree(tmp_path / SESSION) == {target: b"data", "alf/other.npy": b"other"}
        assert (tmp_path / SESSION / target).stat().st_mtime_ns == 12345
        assert (tmp_path / SESSION / target).stat().st_nlink == 1
        assert open_descriptors() == before

    def test_into_a_folder_that_is_there(self, tmp_path: Path) -> None:
        put(tmp_path / SESSION, "alf/a.npy", b"data")
        put(tmp_path / SESSION, "alf/#r#/b.npy", b"other")
        files.move(tmp_path, SESSION, "alf/a.npy", "alf/#r#/a.npy")
        assert tree(tmp_path / SESSION) == {"alf/#r#/a.npy": b"data", "alf/#r#/b.npy": b"other"}

    @pytest.mark.parametrize("kind", ["file", "folder", "dangling link", "same file"])
    def test_never_over_anything(self, tmp_path: Path, kind: str) -> None:
        source = put(tmp_path / SESSION, "alf/a.npy", b"new")
        target = tmp_path / SESSION / "alf/#r#/a.npy"
        target.parent.mkdir()
        match kind:
            case "file":
                target.write_bytes(b"old")
            case "folder":
                target.mkdir()
            case "dangling link":
                target.symlink_to("nowhere")
            case "same file":
                target.hardlink_to(source)
        with pytest.raises(PathTaken) as caught:
            files.move(tmp_path, SESSION, "alf/a.npy", "alf/#r#/a.npy")
        assert "alf/#r#/a.npy" in caught.value.reason
        assert caught.value.hint
        assert isinstance(caught.value, FileExistsError)
        assert source.read_bytes() == b"new"
        assert kind != "file" or target.read_bytes() == b"old"
        assert kind != "dangling link" or target.is_symlink()

    def test_a_missing_source(self, tmp_path: Path) -> None:
        put(tmp_path / SESSION, "alf/b.npy")
        with pytest.raises(FileNotFoundError):
            files.move(tmp_path, SESSION, "alf/a.npy", "alf/#r#/a.npy")
        assert tree(tmp_path) == {f"{SESSION}/alf/b.npy": b"x"}

    def test_never_out_through_a_link(self, tmp_path: Path) -> None:
        root, outside = tmp_path / "root", tmp_path / "outside"
        outside.mkdir()
        put(root / SESSION, "alf/a.npy")
        (root / SESSION / "alf/#r#").symlink_to(outside)
        with pytest.raises(OSError, match="#r#"):
            files.move(root, SESSION, "alf/a.npy", "alf/#r#/a.npy")
        assert tree(outside) == {}
        assert tree(root) == {f"{SESSION}/alf/a.npy": b"x"}

    def test_of_two_who_race_for_one_name_one_wins_and_no_byte_is_lost(
        self, tmp_path: Path
    ) -> None:
        for turn in range(30):
            session = f"s{turn}/2020-01-01/001"
            for who in "ab":
                put(tmp_path / session, f"{who}/x.npy", who.encode())
            (tmp_path / session / "a/#r#").mkdir()
            gate = threading.Barrier(2)
            taken: list[str] = []

            def go(who: str, session: str = session, gate: Any = gate, taken: Any = taken) -> None:
                gate.wait()
                try:
                    files.move(tmp_path, session, f"{who}/x.npy", "a/#r#/x.npy")
                except PathTaken:
                    taken.append(who)

            threads = [threading.Thread(target=go, args=(who,)) for who in "ab"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            (loser,) = taken
            winner = "b" if loser == "a" else "a"
            assert tree(tmp_path / session) == {
                "a/#r#/x.npy": winner.encode(),
                f"{loser}/x.npy": loser.encode(),
            }

    def test_in_a_folder_that_may_not_be_written(self, public: Path) -> None:
        put(public / SESSION, "alf/a.npy", b"data")
        (public / SESSION / "alf").chmod(0o555)
        with unprivileged(public), pytest.raises(PermissionError):
            files.move(public, SESSION, "alf/a.npy", "alf/#r#/a.npy")
        (public / SESSION / "alf").chmod(0o755)
        assert tree(public / SESSION) == {"alf/a.npy": b"data"}

    def test_both_folders_reach_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(tmp_path / SESSION, "alf/a.npy")
        real, synced = os.fsync, set()

        def fsync(fd: int) -> None:
            synced.add(str(Path(f"/proc/self/fd/{fd}").readlink()))
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        files.move(tmp_path, SESSION, "alf/a.npy", "alf/#r#/a.npy")
        alf = f"{tmp_path.resolve()}/{SESSION}/alf"
        assert synced == {alf, f"{alf}/#r#"}


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EINVAL])
@pytest.mark.usefixtures("no_renameat2")
def test_a_file_system_that_can_neither_rename_nor_link_needs_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    put(tmp_path / SESSION, "alf/a.npy", b"data")

    def link(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(NeedsHuman) as caught:
        files.move(tmp_path, SESSION, "alf/a.npy", "alf/#r#/a.npy")
    assert caught.value.hint
    assert tree(tmp_path / SESSION) == {"alf/a.npy": b"data"}


@pytest.mark.usefixtures("no_renameat2")
def test_the_hint_names_a_file_system_that_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / SESSION, "alf/a.npy", b"data")

    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(NeedsHuman) as caught:
        files.move(tmp_path, SESSION, "alf/a.npy", "alf/#r#/a.npy")
    assert "a.npy" in caught.value.reason
    assert "data_root" in caught.value.hint
    assert "hard links" in caught.value.hint


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_another_failure_of_the_rename_is_raised_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def renameat2(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(files, "_libc", SimpleNamespace(renameat2=renameat2))
    put(tmp_path / SESSION, "alf/a.npy", b"data")
    with pytest.raises(OSError, match=r"a\.npy") as caught:
        files.move(tmp_path, SESSION, "alf/a.npy", "alf/#r#/a.npy")
    assert caught.value.errno == code
    assert tree(tmp_path / SESSION) == {"alf/a.npy": b"data"}


def test_a_c_library_without_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_libc", SimpleNamespace())
    put(tmp_path / SESSION, "alf/a.npy", b"data")
    files.move(tmp_path, SESSION, "alf/a.npy", "alf/#r#/a.npy")
    assert tree(tmp_path / SESSION) == {"alf/#r#/a.npy": b"data"}


OLD, NEW = "alf/a.npy", "alf/#r#/a.npy"
MOVING = files.moving_name(OLD)


@pytest.mark.usefixtures("either_way")
class TestMoveOfFinished:
    """What holds of a move that is told what the file must be."""

    def test_as_it_was(self, tmp_path: Path) -> None:
        path = put(tmp_path / SESSION, OLD, b"data")
        before = open_descriptors()
        files.move(tmp_path, SESSION, OLD, NEW, signature_of(path))
        assert tree(tmp_path / SESSION) == {NEW: b"data"}
        assert open_descriptors() == before

    def test_open_for_writing(self, tmp_path: Path) -> None:
        path = put(tmp_path / SESSION, OLD, b"data")
        with path.open("ab"), pytest.raises(FileHeld):
            files.move(tmp_path, SESSION, OLD, NEW, signature_of(path))
        assert tree(tmp_path / SESSION) == {OLD: b"data"}

    @pytest.mark.parametrize("kind", ["longer", "folder", "link", "pipe"])
    def test_no_longer_what_it_was(self, tmp_path: Path, kind: str) -> None:
        path = put(tmp_path / SESSION, OLD, b"data")
        was = signature_of(path)
        path.unlink()
        match kind:
            case "longer":
                path.write_bytes(b"data and more")
            case "folder":
                path.mkdir()
            case "link":
                path.symlink_to(put(tmp_path, "elsewhere", b"data"))
            case "pipe":
                os.mkfifo(path)
        with pytest.raises(FileChanged):
            files.move(tmp_path, SESSION, OLD, NEW, was)
        assert os.path.lexists(path)
        assert not (tmp_path / SESSION / NEW).exists()

    def test_opened_while_the_folder_is_made(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = put(tmp_path / SESSION, OLD, b"data")
        was, writers = signature_of(path), []
        real = os.fsync

        def fsync(descriptor: int) -> None:  # takes seconds on a slow disk
            writers.append(path.open("ab"))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(FileHeld):
            files.move(tmp_path, SESSION, OLD, NEW, was)
        assert tree(tmp_path / SESSION) == {OLD: b"data"}
        for writer in writers:
            writer.close()


def test_check_finished(tmp_path: Path) -> None:
    path = put(tmp_path, "s/a", b"data")
    was = signature_of(path)
    before = open_descriptors()
    files.check_finished(tmp_path, "s/a", was)
    with path.open("ab"), pytest.raises(FileHeld):
        files.check_finished(tmp_path, "s/a", was)
    with pytest.raises(FileChanged):
        files.check_finished(tmp_path, "s/a", Signature(was.size, was.mtime_ns + 1))
    for gone in ("s/b", "t/a", "s/a/b"):
        with pytest.raises(FileChanged):
            files.check_finished(tmp_path, gone, was)
    assert open_descriptors() == before


# --- moving by link ------------------------------------------------------------------------------


def mend(root: Path, target: str = NEW, was: Signature | None = None) -> None:
    files.mend_move(root, SESSION, OLD, target, was or signature_of(root / SESSION / NEW))


def halfway(root: Path) -> Path:
    """Leave a file as a crash does between link and unlink; return its old path."""
    old = put(root / SESSION, OLD, b"data")
    (root / SESSION / NEW).parent.mkdir()
    (root / SESSION / NEW).hardlink_to(old)
    return old


def save(path: Path, content: bytes) -> None:
    """Save a file as most tools do."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def after(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], Any]) -> None:
    """Have `act` done once after the next call of a function of `os`."""
    real = getattr(os, name)

    def instead(*args: Any, **more: Any) -> None:
        monkeypatch.setattr(os, name, real)
        real(*args, **more)
        act()

    monkeypatch.setattr(os, name, instead)


@pytest.mark.usefixtures("no_renameat2")
@pytest.mark.parametrize(
    ("last", "left"),
    [
        ("rename", {OLD: b"data", NEW: b"data"}),
        ("unlink", {MOVING: b"data", NEW: b"data"}),
    ],
)
def test_a_crash_in_a_move_by_link_loses_nothing_and_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str, left: dict[str, bytes]
) -> None:
    was = signature_of(put(tmp_path / SESSION, OLD, b"data"))
    with monkeypatch.context() as patch:
        patch.setattr(os, last, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            files.move(tmp_path, SESSION, OLD, NEW, was)
    assert tree(tmp_path / SESSION) == left
    for _ in range(2):
        mend(tmp_path)
        assert tree(tmp_path / SESSION) == {NEW: b"data"}


@pytest.mark.usefixtures("no_renameat2")
def test_who_opens_a_file_while_its_new_name_reaches_the_disk_keeps_it_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / SESSION, OLD, b"data")
    was, writers = signature_of(path), []
    after(monkeypatch, "link", lambda: writers.append(path.open("ab")))
    with pytest.raises(FileHeld):
        files.move(tmp_path, SESSION, OLD, NEW, was)
    assert tree(tmp_path / SESSION) == {OLD: b"data"}
    writers[0].close()


def test_a_half_done_move_of_a_file_that_is_written_to_is_undone(tmp_path: Path) -> None:
    old = halfway(tmp_path)
    was = signature_of(old)
    with old.open("ab", buffering=0) as writer:
        with pytest.raises(FileHeld):
            mend(tmp_path, was=was)
        assert tree(tmp_path / SESSION) == {OLD: b"data"}
        writer.write(b" and more")
    (tmp_path / SESSION / NEW).hardlink_to(old)
    with pytest.raises(FileChanged):
        mend(tmp_path, was=was)
    assert tree(tmp_path / SESSION) == {OLD: b"data and more"}


@pytest.mark.parametrize("moment", ["fsync", "link"])
@pytest.mark.usefixtures("no_renameat2")
def test_what_is_saved_under_the_old_name_during_a_move_by_link_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = put(tmp_path / SESSION, OLD, b"data")
    (tmp_path / SESSION / NEW).parent.mkdir()
    after(monkeypatch, "link", lambda: after(monkeypatch, "fsync", lambda: save(path, b"news")))
    if moment == "link":
        after(monkeypatch, "link", lambda: save(path, b"news"))
    files.move(tmp_path, SESSION, OLD, NEW, signature_of(path))
    assert tree(tmp_path / SESSION) == {OLD: b"news", NEW: b"data"}


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_what_is_saved_under_the_old_name_while_a_crash_is_mended_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    old = halfway(tmp_path)
    after(monkeypatch, moment, lambda: save(old, b"news"))
    mend(tmp_path)
    assert tree(tmp_path / SESSION) == {OLD: b"news", NEW: b"data"}


def saved_in_the_last_moment(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Have a file saved between the last look at its name and what is done to the name."""
    real = os.rename

    def rename(*args: Any, **more: Any) -> None:
        monkeypatch.setattr(os, "rename", real)
        save(path, b"news")
        real(*args, **more)

    monkeypatch.setattr(os, "rename", rename)


@pytest.mark.parametrize("last", [None, "link", "unlink"])
def test_what_is_saved_in_the_last_moment_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str | None
) -> None:
    old = halfway(tmp_path)
    with monkeypatch.context() as patch:
        saved_in_the_last_moment(patch, old)
        if last is not None:  # a crash before that
            patch.setattr(os, last, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) if last else nullcontext():
            mend(tmp_path)
        assert last is None or (tmp_path / SESSION / MOVING).read_bytes() == b"news"
    mend(tmp_path)
    assert tree(tmp_path / SESSION) == {OLD: b"news", NEW: b"data"}


def test_what_is_saved_twice_in_the_last_moment_is_all_there_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = halfway(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_end_drop", lambda *_: None)
        saved_in_the_last_moment(patch, old)
        mend(tmp_path)
    save(old, b"later news")
    for _ in range(2):
        with pytest.raises(PathTaken) as caught:
            mend(tmp_path)
        assert MOVING.rpartition("/")[2] in caught.value.reason
        assert caught.value.hint
    everything = {OLD: b"later news", MOVING: b"news", NEW: b"data"}
    assert tree(tmp_path / SESSION) == everything


def test_what_was_taken_goes_back_even_where_the_new_folder_is_gone(tmp_path: Path) -> None:
    was = signature_of(put(tmp_path / SESSION, MOVING, b"data"))
    mend(tmp_path, was=was)
    assert tree(tmp_path / SESSION) == {OLD: b"data"}


def test_a_second_name_is_dropped_only_if_it_is_the_same_file(tmp_path: Path) -> None:
    put(tmp_path / SESSION, OLD, b"data")
    put(tmp_path / SESSION, NEW, b"data")
    mend(tmp_path)
    assert len(tree(tmp_path / SESSION)) == 2


def test_a_link_to_the_file_is_no_second_name(tmp_path: Path) -> None:
    put(tmp_path / SESSION, NEW, b"data")
    (tmp_path / SESSION / OLD).symlink_to("#r#/a.npy")
    mend(tmp_path)
    assert (tmp_path / SESSION / OLD).is_symlink()


def test_a_file_with_a_single_name_keeps_it(tmp_path: Path) -> None:
    path = put(tmp_path / SESSION, OLD, b"data")
    mend(tmp_path, was=signature_of(path))
    (tmp_path / SESSION / NEW).parent.mkdir()
    (tmp_path / "elsewhere").hardlink_to(path)  # it has another name, but not that one
    mend(tmp_path, was=signature_of(path))
    assert tree(tmp_path / SESSION) == {OLD: b"data"}


def test_the_last_name_of_a_file_is_never_dropped(tmp_path: Path) -> None:
    # as on a disk that takes #R# and #r# for the same folder
    path = put(tmp_path / SESSION, OLD, b"data")
    mend(tmp_path, "alf//a.npy", signature_of(path))
    assert tree(tmp_path / SESSION) == {OLD: b"data"}


# --- the rest ------------------------------------------------------------------------------------


def test_remove_flag(tmp_path: Path) -> None:
    flag = put(tmp_path / SESSION, "create_me.flag")
    put(tmp_path / SESSION, "alf/a.npy")
    assert files.remove_flag(tmp_path, SESSION, "create_me.flag") is True
    assert not flag.exists()
    assert files.remove_flag(tmp_path, SESSION, "create_me.flag") is False
    assert files.remove_flag(tmp_path, "gone/2020-01-01/001", "create_me.flag") is False
    assert tree(tmp_path) == {f"{SESSION}/alf/a.npy": b"x"}


def test_remove_flag_removes_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    data = put(tmp_path / SESSION, "alf/a.npy")
    (tmp_path / SESSION / "create_me.flag").symlink_to("alf/a.npy")
    assert files.remove_flag(tmp_path, SESSION, "create_me.flag") is True
    assert data.exists()


def test_remove_flag_leaves_a_folder_and_a_linked_session_alone(tmp_path: Path) -> None:
    put(tmp_path / "root" / SESSION, "create_me.flag/x")
    with pytest.raises(OSError, match="create_me"):
        files.remove_flag(tmp_path / "root", SESSION, "create_me.flag")
    flag = put(tmp_path / "elsewhere", "create_me.flag")
    (tmp_path / "root/ZM_1085/2020-01-01/002").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="002"):
        files.remove_flag(tmp_path / "root", "ZM_1085/2020-01-01/002", "create_me.flag")
    assert flag.exists()


def test_remove_flag_says_when_it_may_not(public: Path) -> None:
    put(public / SESSION, "create_me.flag")
    (public / SESSION).chmod(0o555)
    with unprivileged(public), pytest.raises(PermissionError):
        files.remove_flag(public, SESSION, "create_me.flag")
    (public / SESSION).chmod(0o755)


def test_occupied_revisions(tmp_path: Path) -> None:
    for inner in (
        "alf/a.npy", "alf/#2020-01-01#/a.npy", "alf/#b#/a.npy", "alf/#other#/b.npy",
        "alf/##/a.npy", "alf/#/a.npy", "alf/#open/a.npy", "alf/plain/a.npy", "alf/deep/#d#/a.npy",
    ):  # fmt: skip
        put(tmp_path, inner)
    put(tmp_path, "alf/#file#")
    (tmp_path / "alf/#dangling#").mkdir()
    (tmp_path / "alf/#dangling#/a.npy").symlink_to("nowhere")
    expected = {"2020-01-01", "b", "dangling"}
    assert files.occupied_revisions(tmp_path, "", "alf/a.npy") == expected
    assert files.occupied_revisions(tmp_path, "", "alf/#b#/a.npy") == expected
    assert files.occupied_revisions(tmp_path, "", "a.npy") == set()
    with pytest.raises(FileNotFoundError):
        files.occupied_revisions(tmp_path, "", "gone/a.npy")
    with pytest.raises(InvalidPath):
        files.occupied_revisions(tmp_path, "", "../a.npy")


def test_nothing_outside_the_root_is_opened(tmp_path: Path) -> None:
    put(tmp_path, "secret")
    (tmp_path / "root/a").mkdir(parents=True)
    with (
        pytest.raises(OSError, match=r"\.\."),
        files.open_file(tmp_path / "root", "a/../../secret"),
    ):
        pass
