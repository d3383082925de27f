"""The worker process: its slots, its bell over a real Valkey, its signals."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import pytest
import redis
from prometheus_client import CollectorRegistry
from sqlalchemy import func, select

from service.dispatch import CeleryDispatcher
from service.domain.job import Status
from service.settings import Settings
from service.store import jobs, tables, workers
from service.store.session import Sessions
from service.store.tables import Job, JobStep
from worker.app import Worker
from worker.telemetry import Telemetry

ROOT = Path(__file__).parents[2]
FAKE = str(Path(__file__).with_name("fake_runner.py"))
RUN = """
import ctypes
import sys
from service.settings import Settings
from worker.app import run
code = run(Settings(), runner=(sys.executable, sys.argv[1]))
print("imported", sorted({"torch", "transformers", "peft", "fastapi"} & sys.modules.keys()))
print("dumpable", ctypes.CDLL(None).prctl(3))  # PR_GET_DUMPABLE
sys.exit(code)
"""
BELL_ONLY = {"WORKER_POLL_S": "600"}


def worker(sessions: Sessions, settings: Settings, tmp_path: Path) -> Worker:
    telemetry = Telemetry(CollectorRegistry(), ["pdu"], ["any", "cpu"], linger_s=60)
    return Worker(sessions, settings, telemetry, tmp_path / "slots", runner=(sys.executable, FAKE))


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def status(sessions: Sessions, job_id: str) -> Status:
    with sessions() as s:
        return jobs.get(s, job_id).status


def started_stepping(sessions: Sessions, job_id: str) -> bool:
    with sessions() as s:
        return bool(s.scalar(select(func.count()).select_from(JobStep).where(JobStep.job_id == job_id)))


def registered(sessions: Sessions) -> list[list[str]]:
    with sessions() as s:
        return list(s.scalars(select(tables.Worker.gpu_classes)))


# --- slots


def test_it_claims_until_nothing_is_due(
    sessions: Sessions, settings: Settings, new_job: Callable[..., str], tmp_path: Path
) -> None:
    ids = [new_job() for _ in range(3)]
    worker(sessions, settings, tmp_path).work()
    assert [status(sessions, job_id) for job_id in ids] == [Status.SUCCEEDED] * 3


def test_bells_and_polls_share_the_slots(
    sessions: Sessions, settings: Settings, new_job: Callable[..., str], tmp_path: Path
) -> None:
    for _ in range(4):
        new_job(metadata={"steps": "10", "step_s": "0.03"})
    two = worker(sessions, settings.model_copy(update={"worker_slots": 2}), tmp_path)
    threads = [Thread(target=two.work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    with sessions() as s:
        ran = [(job.started_at, job.finished_at) for job in s.scalars(select(Job))]
    at_once = [sum(a <= began < b for a, b in ran if a and b) for began, _ in ran if began]
    assert len(at_once) == 4
    assert max(at_once) == 2


def test_it_says_what_it_hears_and_how_many_jobs_it_runs_at_once(
    sessions: Sessions, settings: Settings, tmp_path: Path
) -> None:
    given = settings.model_copy(update={"worker_slots": 3, "worker_vram_gib": 8.0})
    three = worker(sessions, given, tmp_path)
    thread = Thread(target=three.say)
    thread.start()

    def said() -> list[tuple[list[str], float, int]]:
        with sessions() as s:
            return [(one.gpu_classes, one.vram_gib, one.slots) for one in workers.heard(s)]

    until(said)
    assert said() == [(given.worker_gpu_classes, 8.0, 3)]
    three.stopping.set()
    thread.join(5)
    assert said() == []


def test_two_workers_of_one_process_id_are_told_apart(sessions: Sessions, settings: Settings, tmp_path: Path) -> None:
    """As in two containers on a host's network: each is the first process of its own."""
    names = {worker(sessions, settings, tmp_path)._name for _ in range(2)}
    assert len(names) == 2


def test_slots_take_turns_at_the_accelerators(sessions: Sessions, settings: Settings, tmp_path: Path) -> None:
    telemetry = Telemetry(CollectorRegistry(), ["pdu"], ["any", "cpu"], linger_s=60)
    three = settings.model_copy(update={"worker_slots": 3})
    shared = Worker(sessions, three, telemetry, tmp_path, devices=["4", "6"])
    assert [shared._free.get().accelerator for _ in range(3)] == ["4", "6", "4"]


def test_a_missing_accelerator_is_said_before_anything_starts(settings: Settings, tmp_path: Path) -> None:
    with process(settings, tmp_path, WORKER_DEVICE="cuda", CUDA_VISIBLE_DEVICES="") as refused:
        assert refused.popen.wait(60) == 1
        assert "WORKER_DEVICE is cuda, but torch finds no CUDA device" in refused.output.read_text()


def test_it_claims_nothing_once_it_stops(
    sessions: Sessions, settings: Settings, new_job: Callable[..., str], tmp_path: Path
) -> None:
    job_id = new_job()
    stopped = worker(sessions, settings, tmp_path)
    stopped.stopping.set()
    stopped.work()
    assert status(sessions, job_id) is Status.QUEUED


# --- the process


class Process(NamedTuple):
    popen: subprocess.Popen[bytes]
    output: Path
    scratch: Path

    def metrics_url(self) -> str:
        until(lambda: re.search(r"http://\S+/metrics", self.output.read_text()))
        found = re.search(r"http://[\d.:]+/metrics", self.output.read_text())
        assert found is not None
        return found[0]

    def runner_pid(self) -> int:
        return int((self.scratch / "worker-0" / "slot-0" / "runner.pid").read_text().split()[0])


@contextmanager
def process(settings: Settings, tmp_path: Path, **environment: str) -> Iterator[Process]:
    output = tmp_path / "worker.log"
    with output.open("wb") as log:
        popen = subprocess.Popen(
            [sys.executable, "-c", RUN, FAKE],
            cwd=ROOT,
            env=os.environ
            | {"MASTER_KEY": settings.master_key.get_secret_value() if settings.master_key else ""}
            | {
                "DATABASE_URL": settings.database_url,
                "BROKER_URL": settings.broker_url,
                "STORAGE_URL": settings.storage_url,
                "WORKER_SCRATCH_DIR": str(settings.worker_scratch_dir),
                "WORKER_METRICS_PORT": "0",
            }
            | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield Process(popen, output, settings.worker_scratch_dir)
    finally:
        popen.kill()
        popen.wait()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


def test_a_bell_starts_a_job_and_a_shutdown_gives_one_back(
    settings: Settings, sessions: Sessions, new_job: Callable[..., str], tmp_path: Path
) -> None:
    dispatcher = CeleryDispatcher(settings)
    with process(settings, tmp_path, DRAIN_GRACE_S="1", **BELL_ONLY) as running:
        url = running.metrics_url()
        first = new_job()
        until(lambda: registered(sessions) == [["cpu"]])
        assert dispatcher.ring("any")
        until(lambda: status(sessions, first) is Status.SUCCEEDED)

        assert f'unlearn_solver_dual_variable{{constraint="retain",job_id="{first}"}} 15.0' in get(url)
        assert get(url.replace("/metrics", "/livez")) == "ok\n"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(url.replace("/metrics", "/"))

        second = new_job(metadata={"fake": "endless"}, resources={"gpu_class": "cpu"})
        assert dispatcher.ring("cpu")
        until(lambda: started_stepping(sessions, second))
        pid, asked_at = running.runner_pid(), time.monotonic()
        running.popen.send_signal(signal.SIGTERM)
        assert running.popen.wait(10) == 0, running.output.read_text()
        assert time.monotonic() - asked_at < 5
        assert not alive(pid)
        assert "imported []" in running.output.read_text()
        assert "dumpable 0" in running.output.read_text(), "its environment is readable through /proc"
    dispatcher.close()
    with sessions() as s:
        job = jobs.get(s, second)
        assert (job.status, job.attempt) == (Status.QUEUED, 0)
    assert registered(sessions) == [], "it took its leave"


def test_a_runner_does_not_outlive_a_killed_worker(
    settings: Settings, sessions: Sessions, new_job: Callable[..., str], tmp_path: Path
) -> None:
    job_id = new_job(metadata={"fake": "stubborn"})
    with process(settings, tmp_path) as running:
        until(lambda: started_stepping(sessions, job_id))
        pid = running.runner_pid()
        running.popen.kill()
        running.popen.wait()
        until(lambda: not alive(pid), 2.0)
    assert status(sessions, job_id) is Status.RUNNING  # the sweep settles it when the lease lapses


def test_without_a_broker_it_polls_and_still_hears_signals(
    settings: Settings, sessions: Sessions, new_job: Callable[..., str], tmp_path: Path
) -> None:
    with process(settings, tmp_path, BROKER_URL="redis://127.0.0.1:1/0", WORKER_POLL_S="0.3") as running:
        running.metrics_url()
        job_id = new_job()
        until(lambda: status(sessions, job_id) is Status.SUCCEEDED)
        running.popen.send_signal(signal.SIGINT)
        running.popen.wait(10)
    assert "Unrecoverable" not in running.output.read_text()


@pytest.mark.parametrize("memory", [1, 0], ids=["full", "with room again"])
def test_a_broker_that_is_full_does_not_end_it(
    settings: Settings, sessions: Sessions, new_job: Callable[..., str], tmp_path: Path, memory: int
) -> None:
    """It refuses to write down which message is being read. Jobs are found by polling, and by the bell once there is room."""
    dispatcher = CeleryDispatcher(settings)
    assert dispatcher.ring("any")
    with redis.Redis.from_url(settings.broker_url) as broker:
        broker.config_set("maxmemory", 1)
        try:
            with process(settings, tmp_path, WORKER_POLL_S="0.3" if memory else "600") as running:
                until(lambda: "the broker's connection was lost" in running.output.read_text())
                job_id = new_job()
                broker.config_set("maxmemory", memory)
                assert memory or dispatcher.ring("any")
                until(lambda: status(sessions, job_id) is Status.SUCCEEDED)
                running.popen.send_signal(signal.SIGTERM)
                assert running.popen.wait(10) == 0, running.output.read_text()
        finally:
            broker.config_set("maxmemory", 0)
    dispatcher.close()


def test_two_workers_on_one_machine_have_folders_of_their_own(tmp_path: Path) -> None:
    from worker.app import _own_folder

    with _own_folder(tmp_path) as first, _own_folder(tmp_path) as second:
        assert first != second
    with _own_folder(tmp_path) as again:
        assert again == first


def test_what_a_dead_worker_left_in_its_folder_is_gone_when_another_takes_it(tmp_path: Path) -> None:
    from worker.app import _own_folder
    from worker.process import started

    slot = tmp_path / "worker-0" / "slot-0"
    slot.mkdir(parents=True)
    (slot / "assignment.json").write_text("the keys of the job's files")
    with started([sys.executable, "-c", "import time; time.sleep(60)"], {}, slot / "runner.pid") as runner:
        with _own_folder(tmp_path) as own:
            assert not own.exists()
        assert runner.exit_code() == -signal.SIGKILL
