"""Every process writes its log as JSON lines, and names an error by its place and kind: its message may quote a row."""

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import redis
from celery import Celery
from pydantic import ValidationError
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from service import logs
from service.dispatch import celery_config, queue_name
from service.domain.errors import StorageFull
from service.processes import free_port
from service.settings import Settings

ROOT = Path(__file__).parents[2]
CANARY = "Quxolotl"

# Whatever a library or the interpreter may write by itself; then the process's own fault is planted, and it starts.
FAULTS = f"""
import asyncio, gc, logging, sys, threading, warnings
CANARY = "{CANARY}"

def fail(*_, **__):
    try:
        raise KeyError(CANARY)
    except KeyError as error:
        raise ValueError(f"about {{CANARY}}") from error

class Fails:
    def __del__(self):
        fail()

async def lose_a_task():
    async def failing():
        fail()
    task = asyncio.ensure_future(failing())
    await asyncio.sleep(0)
    del task

def faults():
    Fails()
    warnings.warn(f"about {{CANARY}}")
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    asyncio.run(lose_a_task())
    gc.collect()
    library = logging.getLogger("a.library")
    library.warning("nothing was raised", exc_info=True)
    try:
        fail()
    except ValueError as error:
        library.warning("tries again after %s", error)
        library.error("%(what)s", {{"what": str(error)}}, exc_info=True)
        library.exception(f"it failed: {{error}} {{error!r}}")
        library.error("it failed\\n%s", repr(error))
"""
API = """
import service.cli, service.store.models
service.store.models.every = fail
from service import app
made = app.create_app
app.create_app = lambda *given: (faults(), made(*given))[1]
service.cli.app(["api"])
"""
API_THAT_FAILS = """
import service.cli
from service.store.storage import Storage
Storage.create = fail
service.cli.app(["api"])
"""
WORKER = """
import worker.app
from service.store import jobs
jobs.claim = fail
listen = worker.app._listen
worker.app._listen = lambda *given: (faults(), listen(*given))[1]
worker.app.main()
"""
SWEEP = """
import service.sweep
service.sweep.issue_due = fail
run = service.sweep.run
service.sweep.run = lambda *given: (faults(), run(*given))[1]
service.sweep.main()
"""
MIGRATE = """
import service.cli, service.migrate
name = service.migrate._name_oldest_code
service.migrate._name_oldest_code = lambda *given: (faults(), name(*given), fail())
service.cli.app(["migrate"])
"""
UP = """
import contextlib, service.cli, service.local
service.local.stack = lambda *_, **__: contextlib.nullcontext(faults() or fail())
service.cli.app(["up"])
"""


class Ended(NamedTuple):
    status: int
    printed: str
    lines: list[dict[str, Any]]  # of the log

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]


class Process(NamedTuple):
    popen: subprocess.Popen[bytes]
    out: Path
    err: Path

    def until(self, words: str) -> None:
        deadline = time.monotonic() + 50
        while words not in self.err.read_text():
            assert self.popen.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.1)

    def ended(self) -> Ended:
        status = self.popen.wait(50)
        text = self.err.read_text()
        assert CANARY not in text + self.out.read_text()
        return Ended(status, self.out.read_text(), [json.loads(line) for line in text.splitlines()])

    def stopped(self) -> Ended:
        self.popen.send_signal(signal.SIGTERM)
        return self.ended()


@contextmanager
def started(program: str, settings: Settings, folder: Path, **environment: str) -> Iterator[Process]:
    assert settings.master_key is not None
    given = {
        "DATABASE_URL": settings.database_url,
        "BROKER_URL": settings.broker_url,
        "STORAGE_URL": settings.storage_url,
        "MASTER_KEY": settings.master_key.get_secret_value(),
        "MODELS_ROOT": str(settings.models_root),
        "WORKER_SCRATCH_DIR": str(settings.worker_scratch_dir),
        "WORKER_METRICS_PORT": "0",
        "SWEEP_METRICS_PORT": "0",
        "SWEEP_INTERVAL_S": "0.2",
    }
    out, err = folder / "out", folder / "err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        popen = subprocess.Popen(
            [sys.executable, "-c", FAULTS + program],
            cwd=ROOT,
            env=os.environ | given | environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
    try:
        yield Process(popen, out, err)
    finally:
        popen.kill()
        popen.wait()


def assert_faults_are_named(ended: Ended) -> None:
    named = "builtins.ValueError from builtins.KeyError"
    for event in (
        "uncaught exception in a thread",
        "unraisable exception",
        "Task exception was never retrieved",
        "%(what)s",
    ):
        [line] = ended.of(event)
        assert line["exception"].endswith(named)
        assert ", in fail" in line["exception"]
    assert "UserWarning" in {line["category"] for line in ended.of("Python warning")}
    assert ended.of("tries again after builtins.ValueError")
    assert ended.of("nothing was raised")
    assert ended.of("it failed: builtins.ValueError builtins.ValueError")
    assert [line["logger"] for line in ended.of("it failed")] == ["a.library"]


@pytest.mark.timeout(120)
def test_the_api(settings: Settings, make_key: Callable[..., str], tmp_path: Path) -> None:
    port = free_port()
    key = make_key("admin")
    with started(API, settings, tmp_path, API_PORT=str(port)) as process:
        process.until("Uvicorn running")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            known = {"Authorization": f"Bearer {key}", "X-Request-ID": "r1"}
            assert http.get(f"/v1/models?name={CANARY}", headers=known).status_code == 500
            assert http.get(f"/v1/{CANARY}?a={CANARY}", headers=known | {"X-Request-ID": "r2"}).status_code == 404
            path = f"/v1/unlearning/jobs/{CANARY}"
            assert http.get(path, headers=known | {"X-Request-ID": "r3"}).status_code == 404
            assert (
                http.get(path, headers={"X-Request-ID": "r4", "Authorization": f"Bearer {CANARY}"}).status_code == 401
            )
            assert http.get("/livez").status_code == 200
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(f"{CANARY}\r\n\r\n".encode())
            assert b"400" in raw.recv(1000)
        ended = process.stopped()
    assert_faults_are_named(ended)
    [failed] = ended.of("request failed")
    assert (failed["route"], failed["request_id"]) == ("/v1/models", "r1")
    assert failed["exception"].endswith("builtins.ValueError from builtins.KeyError")
    requests = ended.of("request")
    shown = [(one["request_id"], one["method"], one["route"], one["status"], one["principal"]) for one in requests]
    own = requests[0]["principal"]
    assert own.startswith("key_")
    assert shown == [
        ("r1", "GET", "/v1/models", 500, own),
        ("r2", "GET", "unmatched", 404, None),
        ("r3", "GET", "/v1/unlearning/jobs/{job_id}", 404, own),
        ("r4", "GET", "/v1/unlearning/jobs/{job_id}", 401, None),
    ]
    assert all(0 < one["milliseconds"] < 30_000 for one in requests)
    assert key not in json.dumps(ended.lines)
    assert ended.printed == ""


@pytest.mark.timeout(120)
def test_an_api_that_cannot_start(settings: Settings, tmp_path: Path) -> None:
    with started(API_THAT_FAILS, settings, tmp_path, API_PORT=str(free_port())) as process:
        ended = process.ended()
    [line] = ended.of("the API cannot start")
    assert (ended.status, line["error"]) == (3, "builtins.ValueError"), "3 is uvicorn's"
    assert ", in fail" in line["exception"]


@pytest.mark.timeout(120)
def test_the_worker(settings: Settings, tmp_path: Path) -> None:
    with started(WORKER, settings, tmp_path, WORKER_POLL_S="0.2") as process:
        process.until(" ready.")
        process.until("the supervisor failed")
        bells = Celery("tests", set_as_current=False)
        bells.conf.update(celery_config(settings))
        bells.send_task(f"{CANARY}", args=[CANARY], queue=queue_name("any"))
        process.until("Received unregistered task")
        bells.close()
        ended = process.stopped()
    assert_faults_are_named(ended)
    assert (ended.status, ended.printed) == (0, "")
    failed = ended.of("the supervisor failed")[0]
    assert failed["exception"].endswith("builtins.ValueError from builtins.KeyError")
    assert ended.of("worker stopped")


@pytest.mark.timeout(120)
def test_the_sweep(settings: Settings, tmp_path: Path) -> None:
    with started(SWEEP, settings, tmp_path) as process:
        process.until("a duty failed")
        [metrics] = re.findall(r'"metrics": "([^"]*)"', process.err.read_text())
        with urllib.request.urlopen(metrics, timeout=10) as answer:
            assert b"unlearn_sweep_duty" in answer.read()
        ended = process.stopped()
    assert_faults_are_named(ended)
    assert {(line["duty"], line["error"]) for line in ended.of("a duty failed")} == {
        ("certificates", "builtins.ValueError")
    }
    assert (ended.status, ended.printed) == (0, "")


@pytest.mark.timeout(120)
def test_a_migration(settings: Settings, empty_database_url: str, tmp_path: Path) -> None:
    url = make_url(empty_database_url).render_as_string(hide_password=False)
    with started(MIGRATE, settings, tmp_path, DATABASE_URL=url) as process:
        ended = process.ended()
    assert_faults_are_named(ended)
    assert any(line["logger"] == "alembic.runtime.migration" for line in ended.lines)
    [line] = ended.of("process ended by an uncaught exception")
    assert (ended.status, line["error"]) == (1, "builtins.ValueError")


@pytest.mark.timeout(120)
def test_the_local_stack(settings: Settings, tmp_path: Path) -> None:
    with started(UP, settings, tmp_path) as process:
        ended = process.ended()
    assert_faults_are_named(ended)
    assert (ended.status, len(ended.of("process ended by an uncaught exception"))) == (1, 1)
    assert ended.printed.startswith("Starting Postgres")


def test_a_setting_that_is_wrong_is_named_without_its_value(settings: Settings, tmp_path: Path) -> None:
    with started("import service.sweep; service.sweep.main()", settings, tmp_path, SWEEP_INTERVAL_S=CANARY) as process:
        ended = process.ended()
    [line] = ended.lines
    assert (ended.status, line["event"]) == (1, "process ended by an uncaught exception")
    assert "sweep_interval_s: float_parsing" in line["error"]


def test_a_reason_quotes_no_data_and_says_what_is_out_of_order(session: Session) -> None:
    session.execute(text("CREATE TEMPORARY TABLE t (word text UNIQUE)"))
    with pytest.raises(IntegrityError, match=CANARY) as twice:
        session.execute(text("INSERT INTO t VALUES (:word), (:word)"), {"word": CANARY})
    assert logs.reason(twice.value) == "psycopg.errors.UniqueViolation (SQLSTATE 23505)"
    with pytest.raises(OperationalError) as away:
        create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none").connect()
    assert logs.reason(away.value).startswith("psycopg.OperationalError: ")
    assert "refused" in logs.reason(away.value)
    with pytest.raises(redis.ConnectionError) as refused:
        redis.Redis(port=1).ping()
    assert "refused" in logs.reason(refused.value)
    with pytest.raises(ValidationError, match=CANARY) as malformed:
        Settings(api_port=CANARY)  # type: ignore[arg-type]
    assert logs.reason(malformed.value) == "pydantic_core._pydantic_core.ValidationError: api_port: int_parsing"
    assert logs.reason(StorageFull("storage is full")) == "storage is full"
    assert (
        logs.reason(PermissionError(13, "Permission denied", CANARY)) == "builtins.PermissionError: Permission denied"
    )
    assert logs.reason(OSError(CANARY)) == "builtins.OSError"


def test_no_error_is_logged_as_its_message() -> None:
    """logs.reason decides which messages may be written: it is given the error, not a text made of it."""
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for package in ("service", "worker")
        for path in sorted((ROOT / package).rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
        if isinstance(call.func.value, ast.Name) and call.func.value.id in {"log", "told"}
        if any(_is_message(keyword.value) for keyword in call.keywords) and "cannot start" not in ast.unparse(call)
    ]
    assert found == []


def _is_message(value: ast.expr) -> bool:
    return (
        re.search(r"(str|repr)\((error|exception|lost|e)\)|\{(error|exception|lost|e)[!:}]", ast.unparse(value))
        is not None
    )
