"""regd: every session recorded on an acquisition PC ends up registered on Alyx, once.

``from regd import AlyxClient, RegistrationClient, Settings`` is the library; `regd run` the daemon.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from regd.alyx import AlyxClient
    from regd.datasettypes import get_dataset_type
    from regd.registration import RegistrationClient
    from regd.settings import Settings

_HOME = {
    "AlyxClient": "regd.alyx",
    "RegistrationClient": "regd.registration",
    "Settings": "regd.settings",
    "get_dataset_type": "regd.datasettypes",
}
__all__ = ["AlyxClient", "RegistrationClient", "Settings", "get_dataset_type"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `regd --help` waits for none of it."""
    if name not in _HOME:
        raise AttributeError(f"module 'regd' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
