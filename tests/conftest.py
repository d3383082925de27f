"""Real servers, started once per run; a database of its own per test, copied from one that was migrated once."""

import os

# Before anybody imports torch: tests are many and small, threads would only contend.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import logging
import shutil
import signal
import sys
import threading
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
import redis
import structlog
from fsspec.core import url_to_fs
from pydantic import SecretStr
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from service import embedded, migrate
from service.domain.job import Constraint, JobSpec, MethodChoice, ModelEntry, PromptFormat
from service.local import ROLE
from service.settings import Settings
from service.store import files, jobs, models, tenancy
from service.store.files import Kept
from service.store.ids import new_id
from service.store.secrets import secrets_of
from service.store.session import Sessions, make_engine, make_sessions
from service.store.tenants import DEFAULT

ROOM_BYTES = 4 * 2**30  # of two clusters, with the logs that they write ahead
MASTER_KEY = b64encode(bytes(range(32))).decode()
PLAIN = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
collect_ignore = ["benchmarks"]  # programs


# A shell has SIGINT ignored in what it starts in the background, and whatever the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def configure_logs() -> None:
    """Without the local variables of every frame: to draw them takes longer than the tests."""
    structlog.reset_defaults()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, PLAIN],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),  # not a line for each request
        logger_factory=structlog.WriteLoggerFactory(
            sys.__stderr__
        ),  # a command's output that a test looks at is another
    )


configure_logs()


@pytest.fixture(autouse=True)
def logs_are_left_as_they_were() -> Iterator[None]:
    """Programs that are run within a test configure their own, for the whole process."""
    handlers, level = list(logging.root.handlers), logging.root.level
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning
    yield
    configure_logs()
    logging.root.handlers[:], logging.root.level = handlers, level
    sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning = hooks


class Cluster(NamedTuple):
    url: str  # of the maintenance database
    admin: Engine
    names: Iterator[int]

    def database(self, name: str) -> str:
        return make_url(self.url).set(database=name).render_as_string(hide_password=False)


@pytest.fixture
def reachable_folder() -> Iterator[Path]:
    """For a Postgres: run by root, it is another user, and each pytest that starts closes /tmp/pytest-of-root to others."""
    with TemporaryDirectory(prefix="unlearn-test-") as folder:
        yield Path(folder)


def in_memory() -> str | None:
    """A folder that is no disk, where there is one with room: a copy of a database takes a tenth of the time there."""
    folder = Path("/dev/shm")
    roomy = folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > ROOM_BYTES
    return str(folder) if roomy else None


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with TemporaryDirectory(prefix="unlearn-test-", dir=in_memory()) as folder, embedded.postgres(Path(folder)) as url:
        admin = create_engine(url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):  # nothing here must outlive a crash
                connection.execute(text(f"ALTER SYSTEM SET {setting} = off"))
            connection.execute(text("SELECT pg_reload_conf()"))
            connection.execute(text("CREATE DATABASE migrated"))
        there = Cluster(url, admin, count(1))
        embedded.role(url, ROLE)
        migrate.upgrade(there.database("migrated"), grant_to=ROLE)
        yield there
        admin.dispose()


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded.valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def empty_database_url(cluster: Cluster) -> Iterator[str]:
    """A database without tables."""
    yield from _database(cluster, "template0")


@pytest.fixture
def database_url(cluster: Cluster) -> Iterator[str]:
    """Of the role of the service, which does not own the tables: every test shows that it can do the service's work."""
    for url in _database(cluster, "migrated"):
        yield make_url(url).set(username=ROLE).render_as_string(hide_password=False)


def owner(sessions: Sessions) -> Engine:
    """Who migrates, and could do anything to the same database."""
    return create_engine(sessions.kw["bind"].url.set(username="postgres"), poolclass=NullPool)


def _database(cluster: Cluster, template: str) -> Iterator[str]:
    name = f"test_{next(cluster.names)}"
    with cluster.admin.connect() as connection:
        # Copied file by file, which takes a sixth of the time of a copy that goes through the log.
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY"))
    yield cluster.database(name)
    with cluster.admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sessions(engine: Engine) -> Sessions:
    """Of the tenant that is there from the beginning."""
    return tenancy.bound(make_sessions(engine), DEFAULT, "tester")


@pytest.fixture
def session(sessions: Sessions) -> Iterator[Session]:
    """One transaction, rolled back; `sessions` is for what must commit."""
    with sessions() as s:
        yield s


@pytest.fixture
def broker_url(broker: str) -> str:
    """Without a message in it."""
    with redis.Redis.from_url(broker) as client:
        client.flushall()
    return broker


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The endpoint of a server that speaks S3; whoever has the environment that `bucket` sets may do everything."""
    from moto.server import ThreadedMotoServer  # slow to import

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a root in a bucket of its own. What is started from here finds it, too."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "ours",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid4().hex}"
    fs, _ = url_to_fs("s3://", skip_instance_cache=True)
    fs.call_s3("create_bucket", Bucket=name)
    return f"s3://{name}/root"


@pytest.fixture(params=["folder", "bucket"])
def storage_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty root, of either kind."""
    if request.param == "bucket":
        return str(request.getfixturevalue("bucket"))
    (tmp_path / "root").mkdir()
    return str(tmp_path / "root")


@pytest.fixture
def settings(database_url: str, broker_url: str, tmp_path: Path) -> Settings:
    for name in ("models", "storage"):
        (tmp_path / name).mkdir()
    return Settings(
        database_url=database_url,
        broker_url=broker_url,
        storage_url=str(tmp_path / "storage"),
        master_key=SecretStr(MASTER_KEY),
        models_root=tmp_path / "models",
        worker_scratch_dir=tmp_path / "scratch",
        worker_metrics_port=0,
        sweep_metrics_port=0,
    )


def kept(settings: Settings) -> Kept:
    """Of a file without bytes."""
    file_id = new_id("ufile")
    sealed = files.seal(secrets_of(settings), file_id, bytes(32), "0" * 64, "f.jsonl")
    return Kept(file_id, 1, "hmac-sha256:" + "0" * 64, sealed)


@pytest.fixture
def new_job(sessions: Sessions, settings: Settings) -> Callable[..., str]:
    """new_job(**fields of JobSpec) -> id of a queued job, committed. Its files are rows alone, without bytes."""

    def create(**fields: Any) -> str:
        with sessions.begin() as s:
            if not models.every(s):
                models.add(s, ModelEntry(name="m", source="path", location="m", prompt_format=PromptFormat()))
            sets = {
                purpose: files.insert(s, kept(settings), purpose=purpose, rows=1).id
                for purpose in ("forget_set", "retain_set")
            }
            asked = {"model": "m", "method": MethodChoice(type="pdu"), "constraint": Constraint(epsilon=1.0)}
            return jobs.create(s, JobSpec.model_validate(asked | sets | fields)).id

    return create


@pytest.fixture
def shared() -> Path:
    """The folder with real data and models; a test that needs it is skipped, by name, where it is missing."""
    folder = Path(os.environ.get("UNLEARN_SHARED", "../shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder} (UNLEARN_SHARED)")
    return folder
