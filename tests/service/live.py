"""The API as a process of its own, under the server that it has in production."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from service.processes import free_port, running
from service.settings import IN_FILES, Settings


class Live(NamedTuple):
    port: int
    pid: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def served(settings: Settings, folder: Path, **environment: str) -> Iterator[Live]:
    """`unlearn api`, once it answers. Its log, and its temporary files (in `tmp`), lie in the folder.

    Args:
        environment: further variables, such as knobs of the settings.
    """
    port, log, temporary = free_port(), folder / "api.log", folder / "tmp"
    temporary.mkdir()
    secret = settings.master_key.get_secret_value() if settings.master_key else ""
    given = {name.upper(): str(getattr(settings, name)) for name in ("storage_url", "models_root", *IN_FILES)}
    given |= {"MASTER_KEY": secret, "API_PORT": str(port), "TMPDIR": str(temporary)}
    with running([sys.executable, "-m", "service", "api"], log, os.environ | given | environment) as process:
        until = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/livez", timeout=5)
                break
            except httpx.TransportError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.05)
        yield Live(port, process.pid, log)
