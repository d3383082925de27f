import json
import subprocess
import sys
from pathlib import Path

import pytest

from worker import process

CODE = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"


def test_a_runner_has_the_credentials_of_the_storage_and_of_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for_storage = {
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ENDPOINT_URL",
        "FSSPEC_S3_KEY",
        "FSSPEC_S3_SECRET",
    }
    for name in for_storage | process.CREDENTIALS:
        monkeypatch.setenv(name, "secret")
    command = [sys.executable, "-c", CODE, str(tmp_path / "told")]
    with process.started(command, {}, tmp_path / "pid") as runner:
        while runner.exit_code() is None:
            list(runner.lines(0.1))
    told = json.loads((tmp_path / "told").read_text())
    assert {name for name, value in told.items() if value == "secret"} == for_storage


PRINTS = """
import os, subprocess, sys
os.write(1, b"Quxolotl\\n" + b"x" * 3_000_000 + b"\\n" + b"[" * 200_000 + b"\\n")
os.write(2, b'{"event": "its own"}\\n[1]\\n\\xff\\n\\n"event"\\n')
subprocess.run(["sh", "-c", "echo Quxolotl of a child"])
os.write(2, b'{"event": "its last, cut off"')
os.abort()
"""
START = """
import sys
from pathlib import Path
from service import logs
from worker import process
logs.configure()
with process.started([sys.executable, "-c", sys.argv[1]], {}, Path(sys.argv[2])) as runner:
    while runner.exit_code() is None:
        list(runner.lines(0.1))
"""


@pytest.mark.timeout(60)
def test_what_a_runner_prints_beside_its_log_is_counted_and_not_quoted(tmp_path: Path) -> None:
    command = [sys.executable, "-c", START, PRINTS, str(tmp_path / "pid")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=50)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert "Quxolotl" not in done.stderr + done.stdout
    assert sum(line["event"] == "its own" for line in lines) == 1
    strange = [line["bytes"] for line in lines if line["event"] == "unstructured runner output omitted"]
    assert strange[0] == len("Quxolotl\n")
    assert sum(strange[1:4]) == 3_000_001, "a line without an end is no reason to keep it in memory"
    assert strange[4:] == [200_001, len("[1]\n"), 2, len('"event"\n'), 20, 29]
