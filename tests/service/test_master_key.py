"""A deployment that was started with another master key does not pretend to work, and secrets may come from files."""

import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from pydantic import SecretStr
from pydantic_settings import SettingsError

from service import sweep
from service.register import first_key
from service.settings import Settings
from service.store.evidence_keys import WrongMasterKey, check_master_key
from service.store.secrets import KEY_BYTES, secrets_of
from service.store.session import Sessions, make_engine, make_sessions

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
    check_master_key(make_sessions(engine), secrets_of(settings))
    engine.dispose()


def test_secrets_come_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_KEY", "DATABASE_URL", "BROKER_URL"):
        monkeypatch.delenv(name, raising=False)
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
