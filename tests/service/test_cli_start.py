"""How the command line starts: what it imports, what Ctrl-C does meanwhile, what `unlearn up` says while it waits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service import processes
from service.processes import free_port, running, wait

HEAVY = {"fastapi", "starlette", "uvicorn", "sqlalchemy", "psycopg", "alembic", "celery", "kombu", "redis", "structlog"}
HEAVY |= {
    "torch",
    "transformers",
    "peft",
    "numpy",
    "tokenizers",
    "jinja2",
    "fsspec",
    "prometheus_client",
    "service.store",
}
HEAVY |= {"service.api", "service.settings", "pydantic_settings", "huggingface_hub"}
LOADED = """
import json, sys
from service.__main__ import main
sys.argv = ["unlearn", *json.loads(sys.argv[1])]
try:
    main()
except SystemExit as end:
    sys.stderr.write("\\n" + json.dumps([end.code, sorted(sys.modules)]))
"""
INTERRUPTED = """
import os, signal, sys
from service.__main__ import main
module, *sys.argv[1:] = sys.argv[1:]
sys.addaudithook(lambda event, given: event == "import" and given[0] == module and os.kill(os.getpid(), signal.SIGINT))
main()
"""


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("--help",), 0),
        (("status",), 2),
        (("watch", "ujob_1"), 2),
        (("keys", "list"), 2),
        (("requests", "list"), 2),
        (("webhooks", "list"), 2),
        (("benchmarks", "list"), 2),
        (("plans", "show", "m"), 2),
        (("audit", "export", "--out", "/tmp/none"), 2),
        (("models", "add", "--help"), 0),
        (("verify", __file__), 1),
    ],
)
def test_what_speaks_http_or_reads_files_imports_nothing_of_the_service(command: tuple[str, ...], status: int) -> None:
    environment = os.environ | {"UNLEARN_API_KEY": "key", "UNLEARN_URL": f"http://127.0.0.1:{free_port()}"}
    ran = subprocess.run(
        [sys.executable, "-c", LOADED, json.dumps(command)], env=environment, capture_output=True, text=True, check=True
    )
    code, modules = json.loads(ran.stderr.splitlines()[-1])
    assert code == status, ran.stderr
    assert {name for name in modules if name in HEAVY or name.partition(".")[0] in HEAVY} == set()


@pytest.mark.parametrize(
    "command",
    [("httpx", "status"), ("service.local", "up", "--folder", "nowhere"), ("sqlalchemy.exc", "models", "list")],
    ids=" ".join,
)
def test_ctrl_c_while_modules_are_imported_is_no_traceback(command: tuple[str, ...], tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (-signal.SIGINT, "")
    assert list(tmp_path.iterdir()) == []
    assert not ran.stdout or command[1] == "up", "at once it says that it starts"


def waited(program: str, tmp_path: Path, says: str | None = "") -> list[str]:
    shown: list[str] = []
    log = tmp_path / "log"
    with running([sys.executable, "-c", program], log, os.environ) as process:
        wait(process, "part", lambda: None if "ready" in log.read_text() else says, shown.append)
    return shown


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LOOK_S", 0.1), ("NEWS_S", 0.2), ("IDLE_S", 1.0)):
        monkeypatch.setattr(processes, name, seconds)


BUSY = "import time; end = time.monotonic() + 2.5\nwhile time.monotonic() < end: pass\n"


def test_a_part_that_works_is_waited_for_longer_than_one_that_sleeps(hurried: None, tmp_path: Path) -> None:
    shown = waited(BUSY + "print('ready', flush=True); time.sleep(60)", tmp_path)
    assert shown[0].startswith("part is starting, ")
    assert shown[-1].startswith("part is ready (")
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}])"
    assert waited(f"{child}; print('ready', flush=True)", tmp_path)[-1].startswith("part is ready ("), (
        "a child's work, too"
    )
    with pytest.raises(RuntimeError, match=r"part is not ready after \d+ s: no answer yet"):
        waited("import time; time.sleep(60)", tmp_path)


def test_a_part_that_says_it_is_not_ready_is_given_up_though_it_works(hurried: None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"part is not ready after \d+ s: 503"):
        waited("while True: pass", tmp_path, "503")


def test_a_part_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="part ended with exit status 3 before it was ready"):
        waited("raise SystemExit(3)", tmp_path)


def test_a_part_is_not_waited_for_without_end(hurried: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "MOST_S", 1.5)
    with pytest.raises(RuntimeError, match=r"part is not ready after [12] s"):
        waited("while True: pass", tmp_path)
