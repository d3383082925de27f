"""The local stack on real servers and real signals: it comes up whole, and nothing of it is left behind."""

import ast
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from sqlalchemy import create_engine, text

from service import demo, embedded, migrate
from service.domain.job import PromptFormat
from service.local import stack
from service.processes import free_port, interruptible, running
from tests.worker import reports

ROOT = Path(__file__).parents[2]
UP = "import sys; from pathlib import Path; from service.local import up; up(Path(sys.argv[1]))"
STUBBORN = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    "print(child.pid, flush=True); time.sleep(60)"
)


def until(true: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    """Not a zombie, which only waits to be reaped by whoever became its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def below(pid: int) -> set[int]:
    """All descendants, through every thread that may have started one."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return set()
    children = {int(child) for text in lists for child in text.split()}
    return children.union(*(below(child) for child in children))


@contextmanager
def stack_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`unlearn up` in a process of its own, which may be killed."""
    environment = os.environ | {"API_PORT": str(free_port())}
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", UP, str(folder)], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        yield process
    finally:
        started = below(process.pid)
        process.kill()
        process.wait()
        for pid in filter(alive, started):
            os.kill(pid, signal.SIGKILL)


def wait_until_up(process: subprocess.Popen[str], folder: Path) -> list[str]:
    """What it printed; the last line is the one that says so."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            return lines
    raise AssertionError(f"ended with {process.wait()}: {(folder / 'errors').read_text()}")


def test_it_comes_up_whole_and_ctrl_c_leaves_nothing(reachable_folder: Path) -> None:
    with stack_process(reachable_folder) as process:
        told = "".join(wait_until_up(process, reachable_folder))
        api = re.search(r"http://\S+(?=/docs)", told)
        worker = re.search(r"http://\S+/metrics", told)
        for part in ("Postgres", "Valkey", "api", "worker"):
            assert re.search(rf"^{part} is ready \([\d.]+ s\)$", told, re.MULTILINE), told
        shell = f". {shlex.quote(str(reachable_folder / 'environment'))} && command -v python && printenv UNLEARN_URL"
        sourced = subprocess.run(["sh", "-c", shell], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
        assert sourced.stdout.split() == [str(Path(sys.executable).parent / "python"), api[0] if api else ""]
        assert api is not None
        assert worker is not None
        assert httpx.get(f"{api[0]}/readyz").status_code == 200
        assert httpx.get(f"{api[0]}/v1/methods").status_code == 401
        key = {"Authorization": f"Bearer {(reachable_folder / 'admin.key').read_text()}"}
        assert httpx.get(f"{api[0]}/v1/methods", headers=key).status_code == 200
        assert "unlearn_" in httpx.get(worker[0]).text
        with suppress(httpx.NetworkError):  # it may hang up amid it: what has no end is not kept in memory
            assert httpx.get(f"{api[0]}/v1/methods", headers={"X-Endless": "x" * 2**20}).status_code == 400
        started = below(process.pid)
        assert len(started) >= 5
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 128 + signal.SIGINT
        assert until(lambda: not any(map(alive, started)), 5)
    for part in ("api", "worker", "sweep"):
        lines = [json.loads(line) for line in (reachable_folder / "logs" / f"{part}.log").read_text().splitlines()]
        assert lines
        assert not [line for line in lines if line["level"] in ("error", "critical")], (
            "nothing is wrong with an empty stack"
        )
    assert not re.findall("ERROR|FATAL|PANIC", (reachable_folder / "postgres.log").read_text())


FILE_IN_THE_CLEAR = (
    "INSERT INTO files (id, purpose, name, key, bytes, sha256, rows) VALUES ('f', 'forget_set', 'n', 'k', 1, '', 1)"
)


@pytest.fixture
def old_folder(reachable_folder: Path) -> Path:
    """Of a stack from before files were encrypted, with a file."""
    with embedded.postgres(reachable_folder) as url:
        migrate.upgrade(url, "0004")
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text(FILE_IN_THE_CLEAR))
        engine.dispose()
    return reachable_folder


def unlearn_up(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "service.cli", "up", "--folder", str(folder), *options],
        env=os.environ | {"API_PORT": str(free_port())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(120)
def test_an_old_stack_is_not_upgraded_at_the_price_of_its_files(old_folder: Path) -> None:
    _, refused = unlearn_up(old_folder).communicate(timeout=100)
    assert "1 uploaded files were stored unencrypted, before revision 0005" in refused
    assert "Download what is still needed first, then run `unlearn up --yes`" in refused
    assert "Traceback" not in refused


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_old_stack_comes_up_where_that_is_agreed_to(old_folder: Path) -> None:
    with unlearn_up(old_folder, "--yes") as process:
        wait_until_up(process, old_folder)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT


def test_a_port_that_somebody_has_is_told_and_nobody_elses_api_is_taken_for_ours(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = pytest.raises(RuntimeError, match=f"port {port} of 127.0.0.1 is taken; API_PORT chooses another")
        with taken, stack(tmp_path / "new", api_port=port):
            pass
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("later_s", [0.0, 0.7])
def test_a_signal_while_it_starts_leaves_nothing(reachable_folder: Path, later_s: float) -> None:
    with stack_process(reachable_folder) as process:
        assert until(lambda: len(below(process.pid)) >= 1, 20)
        time.sleep(later_s)
        started = below(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
        assert until(lambda: not any(map(alive, started)), 5)


def test_sigkill_takes_the_whole_tree_along(reachable_folder: Path) -> None:
    with stack_process(reachable_folder) as process:
        wait_until_up(process, reachable_folder)
        started = below(process.pid)
        process.kill()
        gone = until(lambda: not any(map(alive, started)), 10)
        for pid in filter(alive, started):  # nobody else would, should the test fail
            os.kill(pid, signal.SIGKILL)
        assert gone


def test_a_part_that_dies_ends_the_stack_and_shows_its_log(reachable_folder: Path) -> None:
    with stack_process(reachable_folder) as process:
        wait_until_up(process, reachable_folder)
        started = below(process.pid)
        sweep = next(pid for pid in started if "service.sweep" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(sweep, signal.SIGKILL)
        assert process.wait(20) == 1
        assert "sweep ended with exit status -9" in (reachable_folder / "errors").read_text()
        assert str(reachable_folder / "logs" / "sweep.log") in (reachable_folder / "errors").read_text()
        assert until(lambda: not any(map(alive, started)), 5)


def test_who_ignores_sigterm_is_killed_with_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.processes.STOP_S", 0.2)
    log = tmp_path / "log"
    with running([sys.executable, "-c", STUBBORN], log, os.environ) as process:
        assert until(lambda: log.read_text().endswith("\n"), 10)
        grandchild = int(log.read_text())
        assert alive(grandchild)
    assert process.returncode == -signal.SIGKILL
    assert until(lambda: not alive(grandchild), 5)


def test_the_first_signal_ends_and_the_next_do_not_disturb_the_cleaning_up() -> None:
    before = signal.getsignal(signal.SIGTERM)
    told = []

    def work() -> None:
        with interruptible():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)
                told.append("cleaned up")

    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == 128 + signal.SIGTERM
    assert told == ["cleaned up"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_demo_prints_no_small_probability_as_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = reports.attack("prefix", 3.21e-05, 6.54e-05)
    report = reports.whole(forget_after=3.21e-05, published=False, gates=[], audit=audit)
    demo._tell(report.model_dump(mode="json"), tmp_path, Console(width=200))
    printed = capsys.readouterr().out
    assert printed.count("3.21e-05") == 2, "of the forget set, and before the attack"
    assert "6.54e-05" in printed
    assert "0.0000" not in printed
    assert report.verdict.message in " ".join(printed.split())


def test_ctrl_c_during_the_demo_leaves_nothing(reachable_folder: Path) -> None:
    """While the model still learns and the service starts; what it left does not hinder the next one."""
    code = f"from pathlib import Path; from service.demo import demo; demo(Path({str(reachable_folder / 'demo')!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        assert until(lambda: len(below(process.pid)) >= 2, 20)
        with pytest.raises(RuntimeError, match="another demo"):
            demo.demo(reachable_folder / "demo")
        started = below(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 128 + signal.SIGINT
        assert until(lambda: not any(map(alive, started)), 5)
    finally:
        process.kill()
        process.wait()


def test_the_demo_removes_no_folder_but_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RuntimeError, match="holds something else"):
        demo.demo(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_command_that_loads_the_adapter_survives_the_shell(tmp_path: Path) -> None:
    folder = tmp_path / """it's a "folder" $HOME"""
    folder.mkdir()
    form = PromptFormat(user_start="Q: ", user_end="\n", assistant_start="A:\n")
    (folder / "prompt_format.json").write_text(form.model_dump_json())
    (folder / "forget.jsonl").write_text(json.dumps({"question": 'Who\'s "he"?'}) + "\n")
    python, option, program = shlex.split(demo.load_command(folder))
    assert option == "-c"
    assert os.path.samefile(python, sys.executable)
    strings = {node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)}
    assert 'Q: Who\'s "he"?\nA:\n' in strings
    assert os.path.relpath(folder / "adapter") in strings
