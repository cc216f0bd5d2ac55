"""A program that records: `python writing.py FILE MB_PER_S SECONDS`.

Prints the rate it kept, in MB/s, and its longest write, in seconds. It is never ahead of its pace;
where it falls behind it makes up for it, as a camera's buffer does, until the time is over.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

_BLOCK = b"\xa5" * 1_000_000


def main(path: str, mb_per_s: str, seconds: str) -> None:
    """Write megabytes to `path`, each at its time."""
    rate, last_s = float(mb_per_s), float(seconds)
    written, longest_s = 0, 0.0
    with Path(path).open("wb", buffering=0) as file:
        started_at = time.perf_counter()
        while (now := time.perf_counter() - started_at) < last_s:
            if written > now * rate:
                time.sleep(written / rate - now)  # the pace
                continue
            file.write(_BLOCK)
            longest_s = max(longest_s, time.perf_counter() - started_at - now)
            written += 1
        took_s = time.perf_counter() - started_at
    print(written / took_s, longest_s)


if __name__ == "__main__":
    main(*sys.argv[1:])
