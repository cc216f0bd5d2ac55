"""Which dataset type a file name has: regd's matcher against ONE's."""

from __future__ import annotations

import json
import random
import re
import string
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from bench.measure import PROJECT, Bench, Failed, Line, PeerMissing, alternate, s
from regd.datasettypes import DatasetTypes

_TYPES = 300


def matching(bench: Bench) -> Iterator[Line]:
    """Every name is matched by both; the answers must be the same."""
    try:
        from iblutil.util import Bunch
        from one.registration import get_dataset_type
    except ImportError:
        raise PeerMissing("ONE is not here: pip install ONE-api") from None
    types = _types()
    chosen = _names(types, bench.size(100_000, 5_000))
    matcher = DatasetTypes(types)
    records = list(map(Bunch, types))
    theirs = partial(get_dataset_type, dtypes=records)
    answers: list[list[str | None]] = [[], []]
    # in slices, in turns: a slow minute hits both
    slices = iter([piece for n in range(10) for piece in [chosen[n::10]] * 2])
    ours_s, theirs_s = alternate(
        10,
        lambda: _time(matcher.match, next(slices), answers[0]),
        lambda: _time(theirs, next(slices), answers[1]),
    )
    different = sum(a != b for a, b in zip(*answers, strict=True))
    if different:
        raise Failed(f"{different} of {len(chosen)} names have another type with ONE")
    each = len(chosen) / 10
    yield Line(
        f"dataset type of a name, {_TYPES} types", s(ours_s / each), f"ONE: {s(theirs_s / each)}",
        theirs_s / ours_s, 20, "times faster", least=True,
        note=f"the same answers on {len(chosen)} names",
    )  # fmt: skip


def _time(match: Callable[[str], Any], names: Sequence[str], answers: list[str | None]) -> float:
    """Return how long it took to match names; their types, None for a refusal, go to `answers`."""
    started_at = time.perf_counter()
    for name in names:
        try:
            answers.append(match(name)["name"])
        except ValueError:
            answers.append(None)
    return time.perf_counter() - started_at


def _types() -> list[dict[str, str]]:
    """Return the types of the stand-in's lab, and variants of them up to 300."""
    file = PROJECT / "regd" / "sandbox" / "data" / "default_lab.json"
    real = [
        {"name": t["name"], "filename_pattern": t["filename_pattern"] or ""}
        for t in json.loads(file.read_text())["dataset_types"]
    ]
    variants = [
        {key: re.sub(r"\.", "Two.", text, count=1) for key, text in t.items()}
        for t in real
        if "." in t["name"] and (not t["filename_pattern"] or "." in t["filename_pattern"])
    ]
    return [*real, *variants][:_TYPES]


def _names(types: list[dict[str, str]], count: int) -> list[str]:
    """Return file names: nine of ten made by a type's pattern, the others of no type."""
    chance = random.Random(1)
    letters = string.ascii_letters + string.digits

    def word() -> str:
        return "".join(chance.choices(letters, k=chance.randint(1, 6)))

    def name() -> str:
        if chance.random() < 0.1:
            return f"_{word()}_{word()}.{word()}.npy"
        chosen = chance.choice(types)
        pattern = chosen["filename_pattern"] or f"{chosen['name']}.npy"
        found = re.sub(r"\*", lambda _: chance.choice(["", f"_{word()}_", f".{word()}"]), pattern)
        return found.replace("?", chance.choice(letters)).strip(".") or word()

    return [name() for _ in range(count)]
