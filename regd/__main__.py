"""`python -m regd` is `regd`."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _NumpyOnDemand(ModuleType):
    """Stands for numpy until something of it is used.

    iblutil imports it for what regd never calls: 10 MB, and 50 ms of each start.
    """

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get("numpy") is self:
            del sys.modules["numpy"]
        return getattr(import_module("numpy"), name)


if "numpy" not in sys.modules and (_spec := find_spec("numpy")):
    sys.modules["numpy"] = _NumpyOnDemand("numpy")
    sys.modules["numpy"].__spec__ = _spec

from regd.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
