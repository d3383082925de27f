"""The whole service on this machine, in one process tree: Postgres and Valkey from wheels, API, worker, sweep.

Each part is its own process with its own log. What needs torch is started as a process: nothing here imports it.
"""

import json
import os
import shlex
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any, NamedTuple

import httpx

from service import embedded, migrate, printing, processes, register
from service.processes import free_port, interruptible, is_free, running, tail
from service.settings import Settings
from service.store.secrets import KEY_BYTES

ROLE = "unlearn_service"  # as which every part connects: it does not own the tables
PARTS = {
    "api": ("-m", "service.cli", "api"),
    "worker": ("-m", "worker.app"),
    "sweep": ("-m", "service.sweep"),
}


class Part(NamedTuple):
    process: Popen[bytes]
    log: Path


class Stack(NamedTuple):
    """What runs. `environment` is what every part was started with; other commands need the same to reach it."""

    settings: Settings
    environment: dict[str, str]
    parts: dict[str, Part]
    key: str  # of an administrator of the default tenant

    @property
    def url(self) -> str:
        return f"http://{self.settings.api_host}:{self.settings.api_port}"

    @property
    def headers(self) -> dict[str, str]:
        """Of a client that asks as the administrator."""
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def worker_metrics_url(self) -> str:
        return f"http://{self.settings.worker_metrics_host}:{self.settings.worker_metrics_port}/metrics"

    def check(self) -> None:
        """Raises RuntimeError with the end of its log if a part is no longer alive."""
        for name, part in self.parts.items():
            code = part.process.poll()
            if code is not None:
                raise RuntimeError(f"{name} ended with exit status {code}:\n{tail(part.log)}\n(the rest: {part.log})")


@contextmanager
def stack(
    folder: Path, show: Callable[[str], None] = embedded.nothing, *, accept_loss: bool = False, **knobs: Any
) -> Iterator[Stack]:
    """Everything started and healthy, with its state below `folder`; everything stopped afterwards, in reverse order.

    Args:
        accept_loss: as migrate.upgrade has it; otherwise DataLoss is raised where an upgrade of what is there would lose files.
        show: gets a line for each part that is ready, and every few seconds for what is waited for.
        knobs: fields of Settings; what is not given comes from the environment, the worker's metrics port is a free one,
            the storage lies below `folder` unless it is given.

    Raises RuntimeError when the API's port is taken or a part does not come up.
    """
    asked = Settings(**knobs)
    if not is_free(asked.api_host, asked.api_port):  # else whoever listens there would be taken for our API
        raise RuntimeError(f"port {asked.api_port} of {asked.api_host} is taken; API_PORT chooses another")
    folder = folder.absolute()
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        owner_url = opened.enter_context(embedded.postgres(folder, show))
        knobs = {"storage_url": str(folder / "storage")} | knobs
        knobs |= {
            "database_url": embedded.role(owner_url, ROLE),
            "broker_url": opened.enter_context(embedded.valkey(folder, show=show)),
            "models_root": folder / "models",
            "worker_scratch_dir": folder / "scratch",
            "worker_metrics_port": free_port(),
            "sweep_metrics_port": free_port(),
            "master_key": _kept(folder / "master.key", lambda: b64encode(os.urandom(KEY_BYTES)).decode()),
            "metrics_public": True,  # to this machine
        }
        settings = Settings(**knobs)
        show("the schema is brought up to date")
        migrate.upgrade(owner_url, grant_to=ROLE, accept_loss=accept_loss)
        key = _kept(folder / "admin.key", lambda: register.first_key(settings))
        here = Stack(settings, os.environ | _as_environment(settings), {}, key)
        for name, arguments in PARTS.items():
            log = logs / f"{name}.log"
            process = opened.enter_context(running([sys.executable, *arguments], log, here.environment))
            here.parts[name] = Part(process, log)
        for name, url in (("api", f"{here.url}/readyz"), ("worker", here.worker_metrics_url)):
            try:
                processes.wait(here.parts[name].process, name, lambda url=url: _state(here, url), show)  # type: ignore[misc]
            except RuntimeError as error:
                raise RuntimeError(
                    f"{error}:\n{tail(here.parts[name].log)}\n(the rest: {here.parts[name].log})"
                ) from error
        here.check()
        yield here


def up(folder: Path, *, accept_loss: bool = False) -> None:
    """Run the stack in the foreground until a signal ends it, or until a part dies: then RuntimeError. Else as `stack`."""
    with interruptible(), stack(folder, printing.line, accept_loss=accept_loss) as here:
        names = ("DATABASE_URL", "BROKER_URL", "STORAGE_URL", "MODELS_ROOT", "MASTER_KEY")
        (folder / "environment").touch(0o600)
        given = {name: here.environment[name] for name in names}
        given |= {"UNLEARN_URL": here.url, "UNLEARN_API_KEY": here.key}
        lines = [f"export {name}={shlex.quote(value)}" for name, value in given.items()]
        lines.append(f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"  # where `unlearn` is')
        (folder / "environment").write_text("\n".join(lines) + "\n")
        printing.line(f"API      {here.url}/docs")
        printing.line(f"worker   {here.worker_metrics_url}")
        printing.line(f"logs     {folder / 'logs'}")
        printing.line("For other commands, in another terminal:")
        printing.line(f"  . {folder / 'environment'}")
        printing.line("Ctrl-C stops everything.")
        while True:
            here.check()
            time.sleep(0.5)


def _kept(file: Path, make: Callable[[], str]) -> str:
    """A secret that is made once, and then read from a file that nobody else may read."""
    if not file.exists():
        secret = make()
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(secret)
    return file.read_text()


def _as_environment(settings: Settings) -> dict[str, str]:
    values = settings.model_dump(mode="json", exclude_none=True)
    assert settings.master_key is not None
    values["master_key"] = settings.master_key.get_secret_value()
    return {name.upper(): value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _state(here: Stack, url: str) -> str | None:
    """As `processes.wait` has it: None where the URL answers 200. Raises RuntimeError if a part has ended."""
    here.check()
    try:
        answer = httpx.get(url, timeout=5, trust_env=False)
    except httpx.TransportError:
        return ""
    return None if answer.status_code == httpx.codes.OK else f"{url} answers {answer.status_code}"
