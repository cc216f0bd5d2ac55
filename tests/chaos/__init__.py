"""What must hold when everything goes wrong: one file for each kind of trouble.

`make test` runs each part briefly, `make chaos` at full length. Every random choice is hypothesis',
so a failure prints what to type to see it again.
"""

TIMES: int | None = None  # set by --times, before a test module is imported


def times(short: int) -> int:
    """Return how often a random test runs: `short` in `make test`, N in `make chaos N=…`."""
    return short if TIMES is None else TIMES
