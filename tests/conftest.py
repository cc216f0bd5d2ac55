from collections.abc import Iterator
from pathlib import Path

import pytest

from regd.sandbox.server import Server

INITIAL = Path(__file__).parent / "contract" / "initial.json"


@pytest.fixture
def sandbox() -> Iterator[Server]:
    """A fresh Alyx stand-in, loaded with the recorded lab, without a request limit."""
    with Server(load=INITIAL, rate_limit=None) as server:
        yield server
