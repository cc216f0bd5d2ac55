"""The dataset type of a file name, against ONE's own answer."""

import json
import string
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from one.registration import get_dataset_type as one_get_dataset_type

from regd.datasettypes import DatasetTypes, get_dataset_type
from regd.errors import NoDatasetType

INITIAL = Path(__file__).parent / "contract" / "initial.json"
LAB: list[dict[str, Any]] = json.loads(INITIAL.read_text())["dataset_types"]
LAB = [{"filename_pattern": None, **t} for t in LAB]

steady = settings(deadline=None, derandomize=True, max_examples=700)


def as_one_takes_them(types: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**t, "filename_pattern": t["filename_pattern"] or ""} for t in types]


def answer(find: Any) -> str:
    """Return the name of the type found, or which of the two mistakes it was."""
    try:
        return str(find()["name"])
    except ValueError as error:
        return str(error).partition(" for filename")[0]


def assert_same(name: str, types: list[dict[str, Any]]) -> None:
    expected = answer(lambda: one_get_dataset_type(name, as_one_takes_them(types)))
    assert answer(lambda: DatasetTypes(types).match(name)) == expected, (name, types)


def named(name: str, pattern: str | None = None) -> dict[str, Any]:
    return {"name": name, "filename_pattern": pattern}


# --- the recorded lab ----------------------------------------------------------------------------


def candidates(types: list[dict[str, Any]]) -> set[str]:
    """Return names that match, nearly match, or match by name alone."""
    names = {"readme.md", "noextension", ".hidden", "a.b", "spikes.times", "_x_.y.z", "..npy"}
    for record in types:
        glob = record["filename_pattern"] or ""
        for star in ("", "a", ".npy", "_bpod.csv", "x.y", ".imec0.ap"):
            filled = glob.replace("*", star).replace("?", "1")
            names |= {filled, filled.upper(), f"x{filled}", f"{filled}x", filled[1:], filled[:-1]}
        for extension in ("npy", "NPY", "raw.bin", "extra.tar.gz"):
            names |= {f"{record['name']}.{extension}", f"_ibl_{record['name']}.{extension}"}
            names.add(f"{record['name'].upper()}.{extension}")
            names.add(f"{record['name']}_bpod.{extension}")
        names.add(record["name"])
    return {n for n in names if n and n not in (".", "..") and "/" not in n}


def test_the_recorded_lab_on_thousands_of_names() -> None:
    types = DatasetTypes(LAB)
    oracle = as_one_takes_them(LAB)
    names = sorted(candidates(LAB))
    assert len(LAB) == 131
    assert len(names) > 3000
    kinds = {"one": 0, "none": 0, "many": 0}
    for name in names:
        expected = answer(lambda name=name: one_get_dataset_type(name, oracle))  # type: ignore[misc]
        assert answer(lambda name=name: types.match(name)) == expected, name  # type: ignore[misc]
        kind = {"No dataset type found": "none", "Multiple matching dataset types found": "many"}
        kinds[kind.get(expected, "one")] += 1
    assert min(kinds.values()) > 10, kinds


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_the_recorded_lab_on_mangled_names(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(candidates(LAB))))
    cut = data.draw(st.integers(0, len(name)))
    between = data.draw(st.text(string.ascii_letters + "._-[]*?#é ", max_size=4))
    name = name[:cut] + between + name[cut:]
    if name.strip("."):
        assert_same(name, LAB)


# --- any lab -------------------------------------------------------------------------------------

# few letters, so that names and patterns meet; no letter whose folded form is not its small one
letters = "aAbB._"
names = st.text(letters + "[]!-^é", min_size=1, max_size=9).filter(lambda n: n.strip("."))
globs = st.one_of(
    st.none(),
    st.sampled_from(
        ["", " ", "\t", "*", "?*", "[", "[]", "[!]", "[a", "[a-", "[b-a]", "*[!a]*", "**"]
    ),
    st.text(letters + "[]!-^é*?", max_size=9),
    st.text(string.ascii_letters + "._*", max_size=14),
)


@steady
@given(
    names,
    st.lists(st.builds(named, st.one_of(st.just("a.b"), st.just("b"), names), globs), max_size=5),
)
@example("a.b.npy", [named("a.b"), named("a.b")])
@example("a.b.npy", [named("a.b", " ")])
@example("abcd[x].npy", [named("t", "abcd[[]x].npy")])
@example("ABCD.npy", [named("t", "abcd.NPY"), named("u", "abcd.*")])
@example("abcdX.npy", [named("t", "abcd]*")])
def test_any_names_and_patterns(name: str, types: list[dict[str, Any]]) -> None:
    assert_same(name, types)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.text(string.ascii_lowercase, min_size=4, max_size=12), st.data())
def test_a_pattern_made_of_a_name_finds_it(name: str, data: st.DataObject) -> None:
    pattern = "".join(
        data.draw(st.sampled_from([c, c.upper(), "?", "*", f"[{c}]", f"[!_]{''}"])) for c in name
    )
    assert_same(name, [named("t", pattern), named("u", f"x{pattern}")])
    assert DatasetTypes([named("t", pattern)]).match(name)["name"] == "t"


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("SPİKES.npy", "*spi*"),
        ("SPİKES.npy", "*sp?kes*"),
        ("spi̇kes.npy", "SPİKES*"),
        ("TIMES.NPY", "times*"),
        ("É.npy", "é.*"),
        ("\u212aelvin.npy", "kelvin*"),
        ("\udcff.npy", "*.npy"),
        ("two\nlines.npy", "two*"),
    ],
)
def test_letters_of_other_scripts(name: str, pattern: str) -> None:
    assert_same(name, [named("t", pattern)])


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("ΩΣ.npy", "ως.npy"),  # a small sigma is another letter at the end of a word
        ("ΟΔΟΣΑ.npy", "ΟΔΟΣ*"),
        ("straße.npy", "strasse*"),
        ("STRASSE.npy", "straße*"),
        ("current_\u00b5A.npy", "*\u03bcA*"),  # the micro sign, the Greek mu
        ("\u017fpikes.times.npy", "spikes*"),
    ],
)
def test_letters_that_fold_to_another_than_their_small_one(name: str, pattern: str) -> None:
    assert_same(name, [named("t", pattern)])


# --- the rest ------------------------------------------------------------------------------------


def test_a_type_without_a_pattern_goes_by_its_name() -> None:
    for blank in (None, "", "  "):
        types = DatasetTypes([named("spikes.times", blank), named("readme", blank)])
        assert types.match("_ibl_spikes.times_bpod.extra.npy")["name"] == "spikes.times"
        assert types.match("readme.md")["name"] == "readme"
        with pytest.raises(NoDatasetType):
            types.match("Spikes.times.npy")  # a name is matched as it is written


def test_no_type_is_reported_with_what_to_do() -> None:
    with pytest.raises(NoDatasetType, match=r'No dataset type found for filename "x.y.npy"') as e:
        DatasetTypes([]).match("x.y.npy")
    assert "watch.ignore" in e.value.hint


def test_several_types_are_named() -> None:
    types = [named("first", "*.npy"), named("spikes.times"), named("third", "SPIKES*")]
    with pytest.raises(NoDatasetType, match=r"Multiple matching.*first, spikes\.times, third"):
        DatasetTypes(types).match("spikes.times.npy")
    assert issubclass(NoDatasetType, ValueError)  # what ONE raises


def test_the_record_itself_is_returned() -> None:
    record = {**named("t", "*.npy"), "id": 7}
    assert DatasetTypes([record]).match("a.npy") is record
    assert get_dataset_type("a.npy", [record]) is record


def test_objects_and_paths_as_one_takes_them() -> None:
    types = [
        SimpleNamespace(name="first", filename_pattern="*.npy"),
        SimpleNamespace(name="a.b", filename_pattern=""),
    ]
    for path in ("/data/x/c.npy", PurePosixPath("alf/c.npy"), "c.npy"):
        assert get_dataset_type(path, types) is types[0]
    assert get_dataset_type("alf/a.b.csv", iter(types)) is types[1]
    with pytest.raises(NoDatasetType):
        get_dataset_type("c.csv", types)
