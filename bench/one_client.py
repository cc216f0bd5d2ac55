"""ONE's own client, doing what `regd scan` does: `python one_client.py URL ROOT HOME COUNT`.

Writes into the file COUNT how many requests it sent, at its start and in all.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(url: str, root: str, home: str, count: str) -> None:
    """Create every flagged session below `root` and register its files."""
    os.environ["HOME"] = home  # ONE keeps settings and caches there
    import requests
    from one.api import ONE
    from one.registration import RegistrationClient

    from bench.alyx import PASSWORD, USER

    sent = 0
    send = requests.Session.send

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += 1
        return send(*args, **kwargs)

    setattr(requests.Session, "send", counting)  # noqa: B010
    api = ONE(
        base_url=url, username=USER, password=PASSWORD,
        cache_dir=Path(home, "cache"), cache_rest=None, silent=True,
    )  # fmt: skip
    client = RegistrationClient(api)
    at_start = sent
    client.create_sessions(root, register_files=True)
    Path(count).write_text(json.dumps([at_start, sent]))


if __name__ == "__main__":
    main(*sys.argv[1:])
