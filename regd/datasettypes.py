"""Which dataset type a file name has. Pure.

A name has the type whose `filename_pattern` it matches (as a glob, in any case), or, for a type
without a pattern, the type named like the file's ``object.attribute``. This is Alyx's own rule
(`one.registration.get_dataset_type`), with the search inverted: instead of trying each pattern on
each name, a pattern is tried only where a fragment of its literal text occurs in the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from functools import lru_cache
from pathlib import PurePath
from typing import Any

from regd.errors import InvalidPath, NoDatasetType
from regd.paths import object_attribute, parse_dataset

_FRAGMENT = 4  # characters; long enough to be rare among names, short enough to be in most patterns
_LITERAL = re.compile(r"[^*?\[\]]+")
_CLASS = re.compile(r"\[([^!\]])[^\]]*\]")  # a character class, and one that is in it


class DatasetTypes:
    """All dataset types of a database, compiled for matching.

    Args:
        types: Records with the keys ``name`` and ``filename_pattern`` (None or '' where the type is
            matched by its name), as `GET /dataset-types` lists them.
    """

    def __init__(self, types: Iterable[Mapping[str, Any]]) -> None:
        self._named: dict[str, list[int]] = {}
        self._patterns: list[tuple[int, re.Pattern[str]]] = []
        self._by_fragment: dict[str, list[int]] = {}  # fragment -> indices into _patterns
        self._always: list[int] = []
        self.types = list(types)
        # the names of recordings come again and again
        self._matches = lru_cache(maxsize=65536)(self._match)
        for order, record in enumerate(self.types):
            pattern = (record.get("filename_pattern") or "").strip()
            if not pattern:
                self._named.setdefault(record["name"], []).append(order)
                continue
            # the pattern itself is not stripped, as Alyx does not strip it either
            glob = record["filename_pattern"].casefold()
            index = len(self._patterns)
            self._patterns.append((order, re.compile(translate(glob))))
            literal = max(_LITERAL.findall(glob), key=len, default="")
            if "[" in glob or len(literal) < _FRAGMENT:
                self._always.append(index)  # rare: a character class, or hardly any literal text
            else:
                self._by_fragment.setdefault(literal[-_FRAGMENT:], []).append(index)

    def match(self, name: str) -> Mapping[str, Any]:
        """Return the one type of the file called `name` (without folders).

        Raises:
            NoDatasetType: No type matches, or more than one does.
        """
        found = self._matches(name)
        if len(found) == 1:
            return self.types[found[0]]
        if not found:
            raise NoDatasetType(
                f'No dataset type found for filename "{name}"',
                hint="rename the file, add its dataset type on Alyx, "
                "or name it in watch.ignore if it is no dataset; then: regd retry --all",
            )
        names = ", ".join(str(self.types[i]["name"]) for i in found)
        raise NoDatasetType(
            f'Multiple matching dataset types found for filename "{name}": {names}',
            hint="make their filename patterns on Alyx exclude each other; then: regd retry --all",
        )

    def names_of(self, name: str) -> list[str]:
        """Return the names of all types that a file called `name` has; one is as it should be."""
        return [str(self.types[index]["name"]) for index in self._matches(name)]

    def overlaps(self) -> list[tuple[str, str, str]]:
        """Return types that a file may have both of, with a name that it would have then.

        Alyx refuses such a file. Tried are names made from each type's own pattern or name; that
        any two patterns with stars fit some odd name together is no mistake.
        """
        found: dict[tuple[str, str], str] = {}
        for record in self.types:
            for example in examples(record):
                first, *others = self.names_of(example) or [""]
                for other in others:
                    found.setdefault((first, other), example)
        return [(first, other, example) for (first, other), example in found.items()]

    def unmatched(self) -> list[tuple[str, str]]:
        """Return the types that no file can have, and why."""
        found = []
        for record in self.types:
            name, pattern = str(record["name"]), record.get("filename_pattern") or ""
            if pattern.strip() != pattern:
                found.append((name, f"its pattern {pattern!r} begins or ends with a space"))
            elif not any(name in self.names_of(example) for example in examples(record)):
                found.append((name, f"its pattern {pattern!r} fits no name of a file"))
        return found

    def _match(self, name: str) -> list[int]:
        folded = name.casefold()
        found = list(self._named.get(object_attribute(name) or PurePath(name).stem, ()))
        candidates = set(self._always)
        fragments = self._by_fragment
        for start in range(len(folded) - _FRAGMENT + 1):
            hit = fragments.get(folded[start : start + _FRAGMENT])
            if hit:
                candidates.update(hit)
        for index in candidates:
            order, pattern = self._patterns[index]
            if pattern.match(folded):
                found.append(order)
        return sorted(found)


def examples(record: Mapping[str, Any]) -> list[str]:
    """Return names of files that a dataset type is meant for, made from its pattern or name."""
    pattern = (record.get("filename_pattern") or "").strip()
    if not pattern:
        return [f"{record['name']}.npy", f"_ns_{record['name']}.npy"]
    ending = "npy" if pattern.endswith(".*") else ".npy" if pattern.endswith("*") else ""
    begun = _CLASS.sub(lambda found: found[1], pattern.removesuffix("*")).replace("?", "x")
    names = [begun.replace("*", filling) + ending for filling in ("", "x", "_ns_")]
    return [name for name in dict.fromkeys(names) if _is_name(name)]


def _is_name(name: str) -> bool:
    try:
        return "/" not in name and bool(parse_dataset(name))
    except InvalidPath:
        return False


def get_dataset_type(filename: str | PurePath, dtypes: Iterable[Any]) -> Any:
    """Return the dataset type of `filename`, one of `dtypes`.

    For one name at a time, as in ONE; for many, build a `DatasetTypes` once.

    Args:
        filename: A file name or path; only its last part counts.
        dtypes: Dataset types, as mappings or as objects with the attributes ``name`` and
            ``filename_pattern``.

    Raises:
        NoDatasetType: The name matches none of them, or several (a ValueError).
    """
    originals = list(dtypes)
    records = [
        {**_as_mapping(dtype), "position": position} for position, dtype in enumerate(originals)
    ]
    found = DatasetTypes(records).match(PurePath(filename).name)
    return originals[found["position"]]


def _as_mapping(dtype: Any) -> dict[str, Any]:
    if isinstance(dtype, Mapping):
        return {"name": dtype["name"], "filename_pattern": dtype["filename_pattern"]}
    return {"name": dtype.name, "filename_pattern": dtype.filename_pattern}
