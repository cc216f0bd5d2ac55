"""The ALF grammar below a data root, against ONE's own parser where it has an opinion."""

from pathlib import PurePosixPath

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from one.alf.path import folder_parts

from regd.errors import InvalidPath
from regd.model import DatasetPath, SessionPath
from regd.paths import (
    Ignored,
    could_become_session,
    find_session,
    is_date,
    is_utf8,
    object_attribute,
    parse_dataset,
    parse_session,
    printable,
    session_depth,
)
from regd.settings import NEVER_DATA

steady = settings(deadline=None, derandomize=True, max_examples=150)

# what a folder on a rig may be called: proper names, near misses, and anything at all
part = st.one_of(
    st.sampled_from(
        [
            "alf",
            "probe00",
            "2020-01-01",
            "001",
            "1",
            "Subjects",
            "#a#",
            "#2020-01-01#",
            "..",
            ".",
            "",
        ]
    ),
    st.from_regex(r"[\w.#-]{1,8}", fullmatch=True),
    st.text(max_size=6).filter(lambda t: "/" not in t),
)
anything = st.text(st.characters(), max_size=12)  # surrogates and control characters among it


# --- dates and sessions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2020-02-29", True),
        ("2021-02-29", False),
        ("2020-13-01", False),
        ("2020-1-1", False),
        ("20200101", False),
        ("2020-W01-1", False),
        ("0000-01-01", False),
        ("2020-01-01 ", False),
        ("2020-01-01\n", False),
        ("\u0662\u0660\u0662\u0660-\u0660\u0661-\u0660\u0661", False),  # Arabic digits
        ("", False),
    ],
)
def test_is_date(text: str, expected: bool) -> None:
    assert is_date(text) is expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("ZM_1085/2020-01-01/001", ("ZM_1085", "2020-01-01", "001", None)),
        ("ZM_1085/2020-01-01/1", ("ZM_1085", "2020-01-01", "1", None)),
        ("lab/Subjects/ZM.10-85/2020-01-01/12", ("ZM.10-85", "2020-01-01", "12", "lab")),
        ("Subjects/2020-01-01/001", ("Subjects", "2020-01-01", "001", None)),
        ("2020-01-01/2020-01-02/001", ("2020-01-01", "2020-01-02", "001", None)),
        ("2020-01-01/2020-01-02/001/001", None),
        ("a/2020-01-01/0001", None),
        ("a/2020-01-01/", None),
        ("a/2020-01-01/001\n", None),
        ("a/2020-01-01/¹", None),
        ("a/2020-01-01/\u0663", None),
        ("a/2020-02-30/001", None),
        ("2020-01-01/001", None),
        ("a/b/2020-01-01/001", None),
        ("lab/subjects/a/2020-01-01/001", None),
        ("my lab/Subjects/a/2020-01-01/001", None),
        ("lab/Subjects/2020-01-01/001", None),
        ("x/lab/Subjects/a/2020-01-01/001", None),
        ("a b/2020-01-01/001", None),
        (".hidden/2020-01-01/001", None),
        ("-a/2020-01-01/001", None),
        ("../2020-01-01/001", None),
        ("a\udcff/2020-01-01/001", None),
        ("", None),
    ],
)
def test_parse_session(path: str, expected: tuple[str, str, str, str | None] | None) -> None:
    parts = tuple(path.split("/"))
    if expected is None:
        with pytest.raises(InvalidPath) as caught:
            parse_session(parts)
        assert caught.value.hint
        assert is_utf8(str(caught.value))
        assert str(caught.value).isprintable()
        return
    assert parse_session(parts) == SessionPath(path, *expected)


def test_one_session_however_its_number_is_written() -> None:
    short, long = (parse_session(("a", "2020-01-01", n)) for n in ("1", "001"))
    assert short.key == long.key == ("a", "2020-01-01", 1)
    assert (short.alyx_path, long.alyx_path) == ("a/2020-01-01/1", "a/2020-01-01/001")


@pytest.mark.parametrize(
    ("path", "depth"),
    [
        ("a/2020-01-01/001", 3),
        ("a/2020-01-01/001/alf/x.npy", 3),
        ("/data/lab/Subjects/a/2020-01-01/001/x", 7),
        ("a/2020-01-01/002/2020-01-02/001", 3),
        ("a/2020-01-01", None),
        ("2020-01-01/001", None),
        ("a/b/c", None),
    ],
)
def test_session_depth(path: str, depth: int | None) -> None:
    assert session_depth(PurePosixPath(path).parts) == depth


@pytest.mark.parametrize(
    ("path", "folder", "lab"),
    [
        (
            "/data/lab/Subjects/a/2020-01-01/001/alf/x.npy",
            "/data/lab/Subjects/a/2020-01-01/001",
            "lab",
        ),
        ("/data/Subjects/a/2020-01-01/001", "/data/Subjects/a/2020-01-01/001", "data"),
        ("/Subjects/a/2020-01-01/001", "/Subjects/a/2020-01-01/001", None),
        ("a/2020-01-01/001/x", "a/2020-01-01/001", None),
    ],
)
def test_find_session(path: str, folder: str, lab: str | None) -> None:
    found = find_session(PurePosixPath(path))
    assert found is not None
    assert found[0] == PurePosixPath(folder)
    assert (found[1].subject, found[1].lab) == ("a", lab)


def test_find_session_says_when_there_is_none() -> None:
    assert find_session(PurePosixPath("/data/a/2020-01-01")) is None
    with pytest.raises(InvalidPath, match="subject"):
        find_session(PurePosixPath("/data/a b/2020-01-01/001"))
    with pytest.raises(InvalidPath):
        find_session(PurePosixPath("/2020-01-01/001"))


@steady
@given(st.lists(part, max_size=6).map(tuple))
def test_whatever_is_accepted_is_the_session_that_one_sees(parts: tuple[str, ...]) -> None:
    try:
        session = parse_session(parts)
    except InvalidPath:
        return
    lab, subject, date, number, *rest = folder_parts("/".join(parts))
    assert (session.lab, session.subject, session.date, session.number) == (
        lab,
        subject,
        date,
        number,
    )
    assert rest == [None, None]
    assert session_depth(parts) == len(parts)
    assert find_session(PurePosixPath("/".join(parts))) is not None
    assert ".." not in parts
    assert "" not in parts


session_parts = st.tuples(
    st.one_of(
        st.just(()),
        st.tuples(st.from_regex(r"[a-z0-9_]{1,5}", fullmatch=True), st.just("Subjects")),
    ),
    st.one_of(st.just("Subjects"), st.from_regex(r"[a-zA-Z0-9_][\w.-]{0,6}", fullmatch=True)),
    st.dates().map(str),
    st.from_regex(r"[0-9]{1,3}", fullmatch=True),
).map(lambda t: (*t[0], *t[1:]))


@steady
@given(session_parts)
def test_every_folder_on_the_way_to_a_session_is_entered(parts: tuple[str, ...]) -> None:
    parse_session(parts)
    for depth in range(len(parts)):
        assert could_become_session(parts[:depth])


def test_the_folder_of_every_lab_is_entered() -> None:
    parts = ("élab", "Subjects", "a", "2020-01-01", "001")
    assert parse_session(parts).lab == "élab"
    assert could_become_session(parts[:1])


@pytest.mark.parametrize(
    "path",
    [
        "a b",
        "a/b",
        "a/2020-02-30",
        "a/subjects",
        "my lab/Subjects",
        "a/2020-01-01/001",
        "..",
        "lab/Subjects/a/b",
        "lab/Subjects/..",
        "a\udcff",
        "",
    ],
)
def test_other_folders_are_not_entered(path: str) -> None:
    assert not could_become_session(tuple(path.split("/")))


# --- files in a session --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ("spikes.times.npy", ("", "", "spikes.times.npy")),
        ("alf/spikes.times.npy", ("alf", "", "spikes.times.npy")),
        ("alf/probe00/spikes.times.npy", ("alf/probe00", "", "spikes.times.npy")),
        ("alf/#2020-01-01#/a.b.npy", ("alf", "2020-01-01", "a.b.npy")),
        ("#2020-01-01a#/a.b.npy", ("", "2020-01-01a", "a.b.npy")),
        ("2020-01-01/001/a.b.npy", ("2020-01-01/001", "", "a.b.npy")),
        ("alf.x/a b.npy", ("alf.x", "", "a b.npy")),
        ("alf/name", ("alf", "", "name")),
        ("alf/.hidden", ("alf", "", ".hidden")),
        ("create_me.flag", ("", "", "create_me.flag")),
        ("größe/µ.npy", ("größe", "", "µ.npy")),
        ("a/" + "n" * 255, ("a", "", "n" * 255)),
    ],
)
def test_parse_dataset(inner: str, expected: tuple[str, str, str]) -> None:
    assert parse_dataset(inner) == DatasetPath(*expected)


@pytest.mark.parametrize(
    "inner",
    [
        "",
        "alf/",
        "/a.npy",
        "alf//a.npy",
        "alf/./a.npy",
        "alf/../a.npy",
        "../a.npy",
        "alf/..",
        ".",
        "sp ace/a.npy",
        "alf/#a#/b/c.npy",
        "alf/#a#/#b#/c.npy",
        "alf/##/c.npy",
        "alf/#a/c.npy",
        "alf/#a b#/c.npy",
        "a+b/c.npy",
        "alf\n/c.npy",
        "alf/c.npy\n",
        "alf/c\x00.npy",
        "alf/c\x7f.npy",
        "alf/c\u202e.npy",
        "alf/c\xa0.npy",
        "alf/a\\b.npy",
        "alf/a:b.npy",
        "alf/\udcff.npy",
        "\udcff/a.npy",
        "a/" + "n" * 256,
        "c" * 256 + "/a.npy",
    ],
)
def test_parse_dataset_refuses(inner: str) -> None:
    with pytest.raises(InvalidPath) as caught:
        parse_dataset(inner)
    assert caught.value.hint
    assert str(caught.value).isprintable()


@steady
@given(st.lists(part, min_size=1, max_size=5).map("/".join))
@example("alf/#r#/a.npy")
@example("#r#/a.npy")
@example("a/2020-01-01/001/#r#/x")
def test_whatever_is_accepted_is_where_alyx_puts_it(inner: str) -> None:
    try:
        place = parse_dataset(inner)
    except InvalidPath:
        return
    folder = PurePosixPath("ZM_1085/2019-12-31/002", inner).parent
    parts = folder_parts(folder)
    assert parts[1:4] == ("ZM_1085", "2019-12-31", "002")
    assert (place.collection, place.revision) == (parts[4] or "", parts[5] or "")
    # and nothing of the path got lost on the way
    assert place.path == inner


@steady
@given(anything, anything)
def test_no_odd_character_is_ever_accepted(before: str, after: str) -> None:
    for odd in ("\udcff", "\n", "\0", "\x1b", "\x85", "\u2028", "\\", ":"):
        with pytest.raises(InvalidPath):
            parse_dataset(f"alf/{before}{odd}{after}")
        with pytest.raises(InvalidPath):
            parse_session((before + odd + after, "2020-01-01", "001"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("spikes.times.npy", "spikes.times"),
        ("_ibl_trials.goCue_times_bpod.csv", "trials.goCue_times"),
        ("_spikeglx_ephysData_g0_t0.imec0.lf.bin", "ephysData_g0_t0.imec0"),
        ("readme.md", None),
        ("noextension", None),
        ("", None),
    ],
)
def test_object_attribute(name: str, expected: str | None) -> None:
    assert object_attribute(name) == expected


# --- what is ignored -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.tmp", "/a/b.tmp", True),
        ("*.tmp", "/b.TMP", True),
        ("*.TMP", "/b.tmp", True),
        ("*.tmp", "/a.tmp/b.npy", False),
        ("__pycache__", "/a/__pycache__", True),
        ("__pycache__", "/a/x__pycache__", False),
        ("old/raw", "/old/raw", True),
        ("old/raw", "/OLD/Raw", True),
        ("old/raw", "/a/old/raw", False),
        ("/old/raw/", "/old/raw", True),
        ("*/raw/*.avi", "/a/2020-01-01/001/raw/x.AVI", True),
        ("*/raw/*.avi", "/raw/x.avi", False),
        ("a/*", "/a/b/c", True),
        ("data?.[bc]in", "/x/data1.bin", True),
        ("data?.[!b]in", "/x/data1.bin", False),
        (".*", "/a/.hidden", True),
        (".*", "/a/b.c", False),
        ("a.b", "/axb", False),
        ("*.npy", "/a/two\nlines.npy", True),
        ("*.npy", "/a/\udcff.npy", True),
    ],
)
def test_ignored(pattern: str, path: str, expected: bool) -> None:
    assert bool(Ignored([pattern])(path[1:])) is expected
    assert bool(Ignored(["nothing", pattern, "no/thing"])(path[1:])) is expected


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("raw*.bin", "/a/2020-01-01/001/raw_ephys_data/_spikeglx_ephysData_g0_t0.imec.ap.bin"),
        ("a*.npy", "/s/2020-01-01/001/alf/spikes.times.npy"),
    ],
)
def test_a_pattern_without_a_slash_is_held_against_the_last_name_alone(
    pattern: str, path: str
) -> None:
    assert not Ignored([pattern])(path[1:])


@pytest.mark.parametrize("pattern", ["/top", "top/", "/top/"])
def test_a_slash_at_an_end_makes_no_pattern_void(pattern: str) -> None:
    assert Ignored([pattern])("top")


@steady
@given(anything.filter(lambda t: "/" not in t))
def test_no_pattern_ignores_nothing(name: str) -> None:
    assert not Ignored([])(name)
    assert not Ignored([])("")


@steady
@given(st.lists(anything, max_size=4), anything)
def test_any_list_of_patterns_can_be_compiled(patterns: list[str], path: str) -> None:
    assert Ignored(patterns)(path) in (True, False)


@pytest.mark.parametrize(
    "name",
    [
        ".DS_Store",
        "x.npy.part",
        "~$x.doc~",
        "THUMBS.DB",
        "$RECYCLE.BIN",
        "create_me.flag",
        "System Volume Information",
        "lost+found",
        "a.SWP",
    ],
)
def test_what_is_never_data(name: str) -> None:
    assert Ignored(NEVER_DATA)(f"a/2020-01-01/001/{name}")
    assert Ignored(NEVER_DATA)(name)


@pytest.mark.parametrize(
    "name", ["spikes.times.npy", "_iblrig_taskData.raw.jsonable", "alf", "#a#"]
)
def test_data_is_not_ignored(name: str) -> None:
    assert not Ignored(NEVER_DATA)(f"a/2020-01-01/001/{name}")


# --- names as they are shown ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name.npy", "plain name.npy"),
        ("größe", "größe"),
        ("a\nb\t", "a\\nb\\t"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\udcff.npy", "\\udcff.npy"),
        ("\u202e", "\\u202e"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@steady
@given(st.text(st.characters(), max_size=30))
def test_whatever_is_shown_is_utf8_on_one_line(text: str) -> None:
    shown = printable(text)
    assert is_utf8(shown)
    assert shown.isprintable()
    assert printable(shown) == shown
    if text.isprintable() and is_utf8(text):
        assert shown == text


@steady
@given(st.binary(max_size=20))
def test_is_utf8_of_names_as_they_come_from_a_disk(name: bytes) -> None:
    try:
        name.decode()
    except UnicodeDecodeError:
        expected = False
    else:
        expected = True
    assert is_utf8(name.decode("utf-8", "surrogateescape")) is expected
