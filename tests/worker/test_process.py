import json
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
