"""A deployment that was started with another master key does not pretend to work, and secrets may come from files."""

import os
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from pydantic import SecretStr
from pydantic_settings import SettingsError
from sqlalchemy import Engine, text

from service import sweep
from service.register import first_key
from service.settings import Settings
from service.store.evidence_keys import WrongMasterKey, check_master_key
from service.store.secrets import KEY_BYTES, secrets_of
from service.store.session import Sessions, make_engine, make_sessions
from tests.conftest import Cluster

OTHER = b64encode(bytes(KEY_BYTES)).decode()


@pytest.fixture
def used(settings: Settings, sessions: Sessions) -> Settings:
    """Of a database that was used with its key before."""
    check_master_key(sessions, secrets_of(settings))
    return settings


@pytest.fixture
def another(used: Settings) -> Settings:
    return used.model_copy(update={"master_key": SecretStr(OTHER)})


def test_it_starts_with_its_own_and_not_with_another(
    used: Settings, another: Settings, client_of: Callable[..., Any]
) -> None:
    with client_of(used) as http:
        assert http.get("/readyz").status_code == 200
    with pytest.raises(WrongMasterKey, match="no API key would be recognised"), client_of(another):
        pass


def test_it_is_not_ready_where_the_database_came_back_as_another(
    used: Settings, another: Settings, client_of: Callable[..., Any]
) -> None:
    with client_of(used) as http:
        here = http.app.state.parts
        http.app.state.parts = here._replace(secrets=secrets_of(another))
        answer = http.get("/readyz")
    assert (answer.status_code, answer.json()["checks"]["database"]) == (503, "was used with another MASTER_KEY")


def test_sweep_worker_and_first_key_refuse_it(another: Settings) -> None:
    with pytest.raises(WrongMasterKey):
        sweep.run(another, Event())
    with pytest.raises(WrongMasterKey):
        first_key(another)
    refused = subprocess.run(
        [sys.executable, "-m", "worker.app"],
        env=os.environ | {"DATABASE_URL": another.database_url, "MASTER_KEY": OTHER},
        cwd=another.worker_scratch_dir.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 1
    assert "MASTER_KEY is not the one" in refused.stdout + refused.stderr


def test_nothing_is_claimed_while_the_database_is_away(settings: Settings) -> None:
    engine = make_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")
    assert not check_master_key(make_sessions(engine), secrets_of(settings))
    engine.dispose()


@contextmanager
def away(cluster: Cluster, engine: Engine) -> Iterator[None]:
    """Within it the database is not there, under its name."""
    name = engine.url.database
    engine.dispose()
    with cluster.admin.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {name} RENAME TO {name}_away"))
        try:
            yield
        finally:
            connection.execute(text(f"ALTER DATABASE {name}_away RENAME TO {name}"))


def test_a_sweep_and_a_worker_that_start_before_the_database_refuse_it_later(
    another: Settings, cluster: Cluster, engine: Engine
) -> None:
    stop = Event()
    working = [sys.executable, "-m", "worker.app"]
    environment = {"DATABASE_URL": another.database_url, "MASTER_KEY": OTHER, "WORKER_METRICS_PORT": "0"}
    folder, piped = another.worker_scratch_dir.parent, {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with ThreadPoolExecutor(1) as pool:
        try:
            with away(cluster, engine):
                sweeping = pool.submit(sweep.run, another, stop)
                worker = subprocess.Popen(working, env=os.environ | environment, cwd=folder, text=True, **piped)
                assert worker.stdout is not None
                started = next(
                    line for line in worker.stdout if "waiting for the database" in line or "started" in line
                )
                assert (sweeping.done(), worker.poll()) == (False, None), started
            said, _ = worker.communicate(timeout=30)
            assert (worker.returncode, "MASTER_KEY is not the one" in said) == (1, True), said
            with pytest.raises(WrongMasterKey):
                sweeping.result(30)
        finally:
            stop.set()
            worker.kill()


def test_a_sweep_that_waits_for_the_database_can_be_stopped(used: Settings, cluster: Cluster, engine: Engine) -> None:
    stop = Event()
    with ThreadPoolExecutor(1) as pool, away(cluster, engine):
        sweeping = pool.submit(sweep.run, used, stop)
        time.sleep(0.5)
        stop.set()
        sweeping.result(30)


@pytest.mark.parametrize("beside", [None, ""], ids=["unset", "empty"])
def test_secrets_come_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: str | None) -> None:
    """Also beside variables that are empty, as a compose file sets them that passes on what is not set."""
    for name in ("MASTER_KEY", "DATABASE_URL", "BROKER_URL"):
        monkeypatch.delenv(name, raising=False)
        if beside is not None:
            monkeypatch.setenv(name, beside)
        (tmp_path / name).write_text(f"content of {name}\n")
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / name))
    found = Settings()
    assert found.master_key is not None
    assert found.master_key.get_secret_value() == "content of MASTER_KEY"
    assert (found.database_url, found.broker_url) == ("content of DATABASE_URL", "content of BROKER_URL")
    monkeypatch.setenv("BROKER_URL", "redis://given/0")
    assert Settings().broker_url == "redis://given/0"
    monkeypatch.setenv("MASTER_KEY_FILE", str(tmp_path / "missing"))
    with pytest.raises(SettingsError, match=r"MASTER_KEY_FILE: .* cannot be read"):
        Settings()
