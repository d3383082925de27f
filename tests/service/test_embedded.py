"""The servers from wheels: they start, they belong to one, and they stop with us, however we end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from service import embedded

SERVERS = """
import sys, time
from pathlib import Path
from service import embedded
folder = Path(sys.argv[1])
with embedded.postgres(folder) as database, embedded.valkey(folder) as broker:
    print(database, broker, flush=True)
    time.sleep(60)
"""


def scalar(url: str, query: str) -> object:
    engine = create_engine(url)
    with engine.begin() as connection:
        result = connection.execute(text(query))
        answer = result.scalar() if result.returns_rows else None
    engine.dispose()
    return answer


def alive(folder: Path) -> list[str]:
    """Command lines of the processes that were started for this folder, ours aside."""
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(folder) in command:
                lines.append(command)
    return lines


def test_the_log_of_postgres_quotes_no_row(reachable_folder: Path) -> None:
    with embedded.postgres(reachable_folder) as url:
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE kept (word text PRIMARY KEY, n json)"))
        row = {"word": "Quxolotl"}
        for statement in (
            "INSERT INTO kept VALUES (:word), (:word)",
            "INSERT INTO kept VALUES ('a', CAST(:word AS json))",
        ):
            with pytest.raises(DBAPIError, match="Quxolotl"), engine.begin() as connection:
                connection.execute(text(statement), row)
        engine.dispose()
    log = (reachable_folder / "postgres.log").read_text()
    assert "ERROR:  duplicate key value" in log
    assert "Quxolotl" not in log


def test_data_outlives_the_server_and_nothing_else_does(reachable_folder: Path) -> None:
    with embedded.postgres(reachable_folder) as url:
        scalar(url, "CREATE TABLE kept (n int)")
        assert alive(reachable_folder)
        with pytest.raises(RuntimeError, match="another process"), embedded.postgres(reachable_folder):
            pass
    assert alive(reachable_folder) == []
    with embedded.postgres(reachable_folder) as url:
        assert scalar(url, "SELECT count(*) FROM kept") == 0
        assert Path(url.partition("host=")[2]).stat().st_mode & 0o077 == 0  # nobody else reaches the socket


def test_valkey_answers_and_keeps_nothing(tmp_path: Path) -> None:
    with embedded.valkey(tmp_path) as url, redis.Redis.from_url(url) as client:
        client.set("a", "b")
        assert client.get("a") == b"b"
    assert [path.name for path in tmp_path.iterdir()] == ["valkey.log"]
    assert alive(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_they_stop_with_us(number: signal.Signals, reachable_folder: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", SERVERS, str(reachable_folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert owner.stdout is not None
        assert b"postgresql" in owner.stdout.readline()
        assert len(alive(reachable_folder)) > 1
        owner.send_signal(number)
        owner.wait(20)
        deadline = time.monotonic() + 10
        while alive(reachable_folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert alive(reachable_folder) == []
    finally:
        owner.kill()
        owner.wait()
