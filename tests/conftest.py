import shutil
import subprocess
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


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the certificate of an authority (ca.pem), and a server's (server.pem)."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes certificates with the openssl command, which is not installed")
    folder = tmp_path_factory.mktemp("tls")

    def run(*command: str) -> None:
        subprocess.run([openssl, *command], cwd=folder, check=True, capture_output=True)

    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    run(*new, "-x509", "-days", "2", "-subj", "/CN=a lab", "-keyout", "ca.key", "-out", "ca.pem",
        "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip
    run(*new, "-subj", "/CN=127.0.0.1", "-keyout", "server.key", "-out", "server.csr")
    (folder / "extra").write_text("subjectAltName=IP:127.0.0.1\n")
    run("x509", "-req", "-days", "2", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
        "-CAcreateserial", "-extfile", "extra", "-out", "server.pem")  # fmt: skip
    return folder
