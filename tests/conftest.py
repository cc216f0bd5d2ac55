from collections.abc import Iterator
from pathlib import Path

import pytest

from regd.sandbox.server import Server
from tests import chaos
from tests.rig import Lab, Rig, real_lab

INITIAL = Path(__file__).parent / "contract" / "initial.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", type=int, help="how often each random part of tests/chaos runs")


def pytest_configure(config: pytest.Config) -> None:
    chaos.TIMES = config.getoption("--times")


@pytest.fixture
def sandbox() -> Iterator[Server]:
    """A fresh Alyx stand-in, loaded with the recorded lab, without a request limit."""
    with Server(load=INITIAL, rate_limit=None) as server:
        yield server


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The Alyx to register on: the one the environment names, or else the sandbox."""
    lab = real_lab()
    if lab is None:
        url = request.getfixturevalue("sandbox").url
        lab = Lab(url, "rig_user", "rig-password", "ZM_1085", "mainenlab", "mainenlab_local")
    with lab.client:
        yield lab


@pytest.fixture
def rig(tmp_path: Path, lab: Lab) -> Rig:
    """An acquisition PC with nothing recorded yet."""
    return Rig(tmp_path, lab)


@pytest.fixture
def rig_with() -> type[Rig]:
    """A way to make an acquisition PC with other settings."""
    return Rig
