"""`python -m bench`: measure, print the table, and keep its lines in RESULTS.md."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.hashing import hashing, writer
from bench.latency import latency
from bench.matching import matching
from bench.measure import Bench, Line, PeerMissing
from bench.registration import drop, long_session, new_sessions
from bench.start import start
from bench.trees import scan, watch
from regd import __version__

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
PARTS: dict[str, Callable[[Bench], Iterator[Line]]] = {
    "start": start,
    "matching": matching,
    "hashing": hashing,
    "sessions": new_sessions,
    "drop": drop,
    "long": long_session,
    "latency": latency,
    "scan": scan,
    "watch": watch,
    "writer": writer,
}


def main() -> int:
    """Return the exit status: 0 if all was measured, whether or not it is fast enough."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try this program")
    parser.add_argument("--runs", type=int, default=5, help="how often each side runs")
    asked = parser.parse_args()
    chosen = asked.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if asked.runs < 1:
        parser.error(f"--runs {asked.runs}: each side must run at least once")
    folder = Path(os.environ.get("BENCH_DIR") or HERE / ".work").resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{folder}: {error.strerror}; name another folder with BENCH_DIR")
    bench = Bench(folder, asked.quick, 1 if asked.quick else asked.runs)
    lines: list[Line] = []
    failed = []
    for name in chosen:
        started_at = time.monotonic()
        try:
            for line in PARTS[name](bench):
                lines.append(line)
                print(f"{name}: {_result(line)}", flush=True)
        except PeerMissing as missing:
            lines.append(Line(name, "-", str(missing), None, None))
        except Exception:
            traceback.print_exc()
            failed.append(name)
        print(f"{name}: took {time.monotonic() - started_at:.0f} s", file=sys.stderr)
    title = "small sizes, to try the program: these figures say nothing" if asked.quick else None
    _show(lines, title)
    if failed:
        print(f"not measured, see above: {', '.join(failed)}", file=sys.stderr)
    elif asked.quick:
        print(f"{RESULTS.name} is left as it is: nothing was measured at full size")
    else:
        _keep(lines, folder)
    return 1 if failed else 0


def _result(line: Line) -> str:
    met = "" if line.met is None else " - met" if line.met else " - MISSED"
    return f"{line.what}: {line.regd}; {line.against}; {_measured(line)}, bar {_bar(line)}{met}"


def _measured(line: Line) -> str:
    return "-" if line.value is None else f"{line.value:.3g} {line.unit}"


def _bar(line: Line) -> str:
    if line.bar is None:
        return "-"
    return f"{'≥' if line.least else '≤'} {line.bar:g} {line.unit}"


def _row(line: Line) -> tuple[str, ...]:
    met = {True: "yes", False: "NO", None: "not measured"}[line.met]
    return (line.what, line.regd, line.against, _measured(line), _bar(line), met)


_COLUMNS = ("what", "regd", "against", "measured", "bar", "met")


def _show(lines: list[Line], title: str | None) -> None:
    table = Table(*_COLUMNS, title=title, show_lines=True)
    for line in lines:
        what, *rest = _row(line)
        table.add_row(f"{what}\n({line.note})" if line.note else what, *rest)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160).print(table)


def _keep(lines: list[Line], folder: Path) -> None:
    """Put what was measured into RESULTS.md, in place of what it holds of the same."""
    text = RESULTS.read_text()
    old = _between(text, "table").splitlines()
    head = f"| {' | '.join((*_COLUMNS, 'when'))} |"
    rows = {row.split(" | ")[0]: row for row in old if row.startswith("| ") and row != head}
    notes = [note for note in _between(text, "notes").splitlines() if note]
    when = f"{datetime.date.today().isoformat()}, {_commit()}"
    for line in lines:
        cells = [cell.replace("|", chr(92) + "|") for cell in (*_row(line), when)]
        rows[f"| {cells[0]}"] = f"| {' | '.join(cells)} |"
        notes = [note for note in notes if not note.startswith(f"- {line.what}: ")]
        if line.note:
            notes.append(f"- {line.what}: {line.note}")
    rule = "|" + "---|" * (len(_COLUMNS) + 1)
    for name, made in (
        ("machine", [_machine(folder)]),
        ("table", [head, rule, *rows.values()]),
        ("notes", notes),
    ):
        before, _, rest = text.partition(f"<!-- {name} -->")
        _, _, after = rest.partition(f"<!-- /{name} -->")
        text = "\n".join([f"{before}<!-- {name} -->", *made, f"<!-- /{name} -->{after}"])
    RESULTS.write_text(text)


def _between(text: str, name: str) -> str:
    found = re.search(f"(?<=<!-- {name} -->).*(?=<!-- /{name} -->)", text, re.DOTALL)
    if not found:
        raise ValueError(f"{RESULTS} has no place for the {name}")
    return found[0]


def _commit() -> str:
    git = ["git", "-C", str(HERE), "describe", "--always"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "?"


def _machine(folder: Path) -> str:
    """Return what the figures were measured on."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"regd {__version__} on {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, "
        f"{memory / 1e9:.0f} GB of memory, Linux {platform.release()}, "
        f"Python {platform.python_version()}, {_file_system(folder)}."
    )


def _file_system(folder: Path) -> str:
    if not shutil.which("findmnt"):
        return "an unknown file system"
    command = ["findmnt", "-no", "FSTYPE,SOURCE", "-T", str(folder)]
    kind, source = subprocess.run(command, capture_output=True, text=True).stdout.split()[:2]
    return f"{kind} on {source}"


if __name__ == "__main__":
    sys.exit(main())
