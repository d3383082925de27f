"""The supervisor against a real Postgres and real processes; only the model is missing (fake_runner.py)."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, create_engine, delete, func, make_url, select, text, update
from sqlalchemy.orm import Session

from service.domain.job import Failure, FailureCode, Limits, Stage, Status
from service.settings import Settings
from service.store import artifacts, jobs
from service.store.rows import Claim
from service.store.session import Sessions
from service.store.storage import Storage
from service.store.tables import Job, JobCheck, JobEvent, JobStep, Model
from worker import assignment, process
from worker.supervise import Slot, supervise
from worker.telemetry import Telemetry

RUNNER = (sys.executable, str(Path(__file__).with_name("fake_runner.py")))
KNOBS = {"lease_s": 3.0, "heartbeat_s": 0.2, "cancel_grace_s": 0.4, "drain_grace_s": 0.4, "term_grace_s": 0.3}


class Bench(NamedTuple):
    """One worker's slot, without the worker."""

    sessions: Sessions
    settings: Settings
    slot: Slot
    registry: CollectorRegistry
    telemetry: Telemetry
    stopping: Event

    def claim(self, lease_s: float | None = None) -> Claim:
        with self.sessions.begin() as s:
            claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=lease_s or self.settings.lease_s)
        assert claim is not None
        return claim

    def run(self, claim: Claim | None = None) -> Status | None:
        claim = claim or self.claim()
        return supervise(self.sessions, claim, self.settings, self.slot, self.stopping, self.telemetry, runner=RUNNER)

    @contextmanager
    def running(self, claim: Claim | None = None) -> Iterator[list[Status | None]]:
        """Supervised in a thread, from the first step on; its answer is there afterwards."""
        claim, answer = claim or self.claim(), list[Status | None]()
        thread = Thread(target=lambda: answer.append(self.run(claim)))
        thread.start()
        try:
            until(lambda: self.rows(JobStep, claim.job_id) > 0)
            yield answer
        finally:
            thread.join(20)
        assert not thread.is_alive()

    def wait(self) -> None:
        """Until the next attempt of every job may begin."""
        with self.sessions.begin() as s:
            s.execute(update(Job).values(not_before=None))

    def job(self, job_id: str) -> Job:
        with self.sessions() as s:
            return jobs.get(s, job_id)

    def rows(self, table: type[JobStep | JobCheck | JobEvent], job_id: str) -> int:
        with self.sessions() as s:
            return s.scalars(select(func.count()).select_from(table).where(table.job_id == job_id)).one()

    def events(self, job_id: str) -> list[JobEvent]:
        with self.sessions() as s:
            return list(s.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)))

    def runner_pid(self) -> int:
        return int((self.slot.folder / "runner.pid").read_text().split()[0])

    def files_left(self) -> list[Path]:
        return [path for path in Path(self.settings.storage_url).rglob("*") if path.is_file()]


@pytest.fixture
def bench(sessions: Sessions, settings: Settings, tmp_path: Path) -> Bench:
    registry = CollectorRegistry()
    telemetry = Telemetry(registry, ["pdu"], ["any", "cpu"], linger_s=60)
    slot = Slot(0, tmp_path / "scratch" / "slot-0")
    return Bench(sessions, settings.model_copy(update=KNOBS), slot, registry, telemetry, Event())


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- a run to the end


def test_what_the_runner_tells_becomes_rows_events_and_artifacts(
    bench: Bench, new_job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "secret")
    monkeypatch.setenv("broker_url", "secret")
    job_id = new_job()
    assert bench.run() is Status.SUCCEEDED

    job = bench.job(job_id)
    assert (job.status, job.step, job.trained_tokens) == (Status.SUCCEEDED, 5, 500)
    assert (job.epsilon, job.base_retain_loss) == (0.6, 0.5)
    assert job.verdict is not None
    assert job.verdict["result"] == "PASSED"
    assert [warning["code"] for warning in job.warnings] == ["epsilon_loose"]
    stages = [Stage.PREPARING, Stage.EVALUATING, Stage.UNLEARNING]
    assert [entry["stage"] for entry in job.stage_history] == stages
    assert all(entry["finished_at"] for entry in job.stage_history)

    with bench.sessions() as s:
        steps = s.scalars(select(JobStep).where(JobStep.job_id == job_id).order_by(JobStep.step)).all()
        assert [(step.step, step.dual["retain"]) for step in steps] == [(n, 10.0 + n) for n in range(1, 6)]
        assert [check.feasible for check in s.scalars(select(JobCheck))] == [True]
        [artifact] = artifacts.of_job(s, job_id)
    assert b"".join(Storage(bench.settings.storage_url).read(artifact.key)) == b"{}"

    events = bench.events(job_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    types = [event.type for event in events]
    assert types[:3] == ["job.created", "job.queued", "job.started"]
    assert types[-1] == "job.succeeded"
    assert types.count("stage.started") == 3
    assert types.count("job.progress") == 1  # five steps within two seconds
    assert [event.message for event in events if event.level == "warn"] == ["epsilon hardly constrains anything"]
    assert [event.data["epsilon"] for event in events if event.type == "metrics"] == [0.6, 0.6]

    assert events[-1].data["figures"] == {"credentials": [], "device": "cpu", "cuda": {}}
    assert list(bench.slot.folder.iterdir()) == []  # nothing of the forget set stays
    labels = {"job_id": job_id, "constraint": "retain"}
    assert bench.registry.get_sample_value("unlearn_solver_dual_variable", labels) == 15.0


def test_a_job_whose_rows_the_model_does_not_know_has_succeeded(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job(metadata={"fake": "not_known"})
    assert bench.run() is Status.SUCCEEDED
    job = bench.job(job_id)
    assert (job.step, job.failure) == (0, None)
    assert job.verdict is not None
    assert (job.verdict["result"], job.verdict["rules"], job.verdict["forgotten_by"]) == ("NOT_KNOWN", 2, None)
    with bench.sessions() as s:
        assert [artifact.name for artifact in artifacts.of_job(s, job_id)] == ["report.json"]
    assert bench.events(job_id)[-1].data["verdict"] == "NOT_KNOWN"


def test_steps_are_readable_while_the_job_runs_and_progress_is_thinned(
    bench: Bench, new_job: Callable[..., str]
) -> None:
    job_id = new_job(metadata={"steps": "60", "step_s": "0.05"})
    with bench.running() as answer:
        assert bench.job(job_id).status is Status.RUNNING
        assert bench.rows(JobStep, job_id) < 60
        assert bench.job(job_id).stage == Stage.UNLEARNING
    assert answer == [Status.SUCCEEDED]
    assert bench.rows(JobStep, job_id) == 60
    assert sum(event.type == "job.progress" for event in bench.events(job_id)) == 2  # at 0 s and at 2 s


def test_what_a_runner_wrote_just_before_its_end_is_read(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job(metadata={"steps": "20", "step_s": "0.05"})
    with bench.running() as answer:
        pid = bench.runner_pid()
        with bench.sessions.begin() as s:  # the supervisor waits for this lock while the runner comes to its end
            s.execute(select(Job.id).with_for_update())
            until(lambda: not alive(pid))
    assert answer == [Status.SUCCEEDED]
    assert bench.rows(JobStep, job_id) == 20


@pytest.mark.parametrize("fake", ["parent", "lingers"])
def test_a_runner_is_ended_after_its_result_with_all_that_it_started(
    fake: str, bench: Bench, new_job: Callable[..., str]
) -> None:
    job_id = new_job(metadata={"fake": fake})
    assert bench.run() is Status.SUCCEEDED
    child = bench.events(job_id)[-1].data["figures"]["child"]
    until(lambda: not alive(child), 1.0)  # the kernel ends it when it gets to it


# --- cancel, limits, shutdown


def test_a_cooperative_cancel(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job(metadata={"fake": "endless"})
    with bench.running() as answer, bench.sessions.begin() as s:
        asked_at = time.monotonic()
        jobs.request_cancel(s, job_id)
    assert answer == [Status.CANCELLED]
    assert time.monotonic() - asked_at < 1.0
    assert bench.job(job_id).step == bench.rows(JobStep, job_id)
    assert bench.events(job_id)[-1].type == "job.cancelled"
    assert bench.files_left() == []


@pytest.mark.parametrize(("fake", "grace_s"), [("deaf", 0.4), ("stubborn", 0.7)], ids=["SIGTERM", "SIGKILL"])
def test_a_runner_that_ignores_the_cancel(fake: str, grace_s: float, bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job(metadata={"fake": fake})
    with bench.running() as answer:
        pid, asked_at = bench.runner_pid(), time.monotonic()
        with bench.sessions.begin() as s:
            jobs.request_cancel(s, job_id)
    assert answer == [Status.CANCELLED]
    assert grace_s <= time.monotonic() - asked_at < grace_s + 1.5
    assert not alive(pid)


def test_the_runtime_limit(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job(metadata={"fake": "stubborn"}, limits=Limits(max_runtime_seconds=1))
    began = time.monotonic()
    assert bench.run() is Status.FAILED
    assert 1.0 <= time.monotonic() - began < 3.0
    assert failure(bench, job_id).code is FailureCode.MAX_RUNTIME_EXCEEDED
    assert bench.files_left() == []


def test_a_shutdown_gives_the_attempt_back(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job(metadata={"fake": "endless"})
    with bench.running() as answer:
        pid, asked_at = bench.runner_pid(), time.monotonic()
        bench.stopping.set()
    assert answer == [Status.QUEUED]
    assert time.monotonic() - asked_at < 1.5
    job = bench.job(job_id)
    assert (job.attempt, job.content_failures, job.infra_losses) == (0, 0, 0)
    assert "attempt.requeued" in [event.type for event in bench.events(job_id)]
    assert not alive(pid)
    assert bench.files_left() == []


# --- runners that fail


def failure(bench: Bench, job_id: str) -> Failure:
    return Failure.model_validate(bench.job(job_id).failure)


def test_a_runner_that_was_killed_from_outside_is_a_loss_of_the_machinery(
    bench: Bench, new_job: Callable[..., str]
) -> None:
    bench = bench._replace(settings=bench.settings.model_copy(update={"infra_losses_max": 1}))
    job_id = new_job(metadata={"fake": "killed"}, limits=Limits(max_attempts=1))
    assert bench.run() is Status.QUEUED
    [lost] = [event for event in bench.events(job_id) if event.type == "attempt.lost"]
    assert (lost.data["code"], "SIGKILL" in lost.message) == ("worker_lost", True)
    bench.wait()
    assert bench.run() is Status.FAILED
    assert failure(bench, job_id).code is FailureCode.WORKER_LOST
    job = bench.job(job_id)
    assert (job.attempt, job.infra_losses, job.content_failures) == (2, 2, 0)


def test_the_last_failures_own_code_is_kept(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job(metadata={"fake": "exits"}, limits=Limits(max_attempts=2))
    assert bench.run() is Status.QUEUED
    bench.wait()
    assert bench.run() is Status.FAILED
    told = failure(bench, job_id)
    assert told.code is FailureCode.INTERNAL_ERROR
    assert told.message == "the runner ended without a result, exit status 3; 2 of 2 attempts failed"


def test_a_spec_that_this_version_cannot_read_fails_by_name_and_starts_nothing(
    bench: Bench, new_job: Callable[..., str]
) -> None:
    """It waits for a worker of another version, without end neither, and spends none of the job's own attempts."""
    bench = bench._replace(settings=bench.settings.model_copy(update={"infra_losses_max": 2}))
    job_id = new_job(limits=Limits(max_attempts=1))
    with bench.sessions.begin() as s:
        s.execute(text("""UPDATE jobs SET spec = spec || '{"novel": "secret", "seed": "x"}'"""))
    for _ in range(2):
        assert bench.run() is Status.QUEUED
        job = bench.job(job_id)
        assert (job.content_failures, job.not_before is not None) == (0, True)
        bench.wait()
    assert bench.run() is Status.FAILED
    told = failure(bench, job_id)
    assert told.code is FailureCode.WORKER_LOST
    assert "novel: Extra inputs" in told.message
    assert "seed: Input should be" in told.message
    assert "secret" not in told.message
    assert not bench.slot.folder.exists()


def test_an_end_that_cannot_be_written_is_not_run_again(
    bench: Bench, new_job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "succeed", unwritable)
    job_id = new_job()
    assert bench.run() is Status.FAILED
    told = failure(bench, job_id)
    assert (told.code, told.retryable) == (FailureCode.INTERNAL_ERROR, False)
    assert "could not be written: IntegrityError" in told.message
    assert bench.job(job_id).attempt == 1
    assert bench.files_left() == []


def unwritable(s: Session, *_: object, **__: object) -> bool:
    """What the database refuses."""
    s.execute(text("UPDATE jobs SET stage = 'no such stage'"))
    raise AssertionError


def test_an_end_is_written_without_a_journal_that_cannot_be(
    bench: Bench, new_job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for fake, expected in (("normal", Status.SUCCEEDED), ("exits", Status.QUEUED)):
        job_id = new_job(metadata={"fake": fake})
        with monkeypatch.context() as patched:
            patched.setattr("worker.supervise._due", lambda *_: False)  # so that all of it is left for the end
            patched.setattr(jobs, "log", unwritable)
            assert bench.run() is expected
        assert bench.job(job_id).content_failures == (expected is Status.QUEUED)
        assert bench.rows(JobStep, job_id) == 0


@pytest.mark.parametrize("broken", ["log", "release"])
def test_a_release_never_becomes_a_failure(
    broken: str, bench: Bench, new_job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = new_job(metadata={"fake": "endless"})
    with bench.running() as answer:
        monkeypatch.setattr("worker.supervise._due", lambda *_: False)
        time.sleep(0.3)  # the write that may be under way, and a few records for the next
        monkeypatch.setattr(jobs, broken, unwritable)
        bench.stopping.set()
    if broken == "log":
        assert answer == [Status.QUEUED]
        assert bench.job(job_id).attempt == 0
        return
    assert answer == [None], "the sweep gives it back once its lease has lapsed"
    assert bench.job(job_id).status is Status.RUNNING


def test_nor_does_a_pause(bench: Bench, new_job: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = new_job(metadata={"fake": "endless"})  # which does not hear the word, and is ended
    with bench.running() as answer:
        monkeypatch.setattr(jobs, "paused", unwritable)
        with bench.sessions.begin() as s:
            jobs.pause(s, job_id)
    assert answer == [None], "the sweep gives it back once its lease has lapsed"
    assert bench.job(job_id).status is Status.PAUSING


def test_what_the_reference_says_goes_with_the_end_of_the_job(bench: Bench, new_job: Callable[..., str]) -> None:
    """It tells of the forget set; until then the next attempt finds it."""
    job_id = new_job(metadata={"fake": "exits"}, limits=Limits(max_attempts=2))
    key = f"jobs/{job_id}/reference/ab.safetensors"
    Storage(bench.settings.storage_url).write(key, [b"log-probabilities"])
    assert bench.run() is Status.QUEUED
    assert [path.name for path in bench.files_left()] == ["ab.safetensors"]
    bench.wait()
    assert bench.run() is Status.FAILED
    assert bench.files_left() == []


def test_two_attempts_of_a_job_may_overlap(bench: Bench, new_job: Callable[..., str]) -> None:
    """This worker lost the lease, and claimed the job again before its first attempt noticed."""
    job_id = new_job(metadata={"steps": "30", "step_s": "0.05"})
    second = bench._replace(slot=Slot(1, bench.slot.folder.with_name("slot-1")))
    with bench.running() as first_answer:
        with bench.sessions.begin() as s:
            s.execute(update(Job).values(lease_until=func.now() - text("interval '1 s'")))
            jobs.expire(s, infra_losses_max=10)
        with second.running() as second_answer:
            pass
    assert (first_answer, second_answer) == ([None], [Status.SUCCEEDED])
    assert bench.job(job_id).attempt == 2


@pytest.mark.parametrize(
    ("device", "found", "visible", "expected"),
    [
        ("cpu", 4, None, []),
        ("cuda", 2, None, ["0", "1"]),
        ("cuda", 2, "4,6", ["4", "6"]),
        ("cuda", 1, "4,-1,6", ["4"]),
        ("auto", 1, None, ["0"]),
        ("auto", 0, "", []),
    ],
)
def test_the_accelerators_are_counted_once_at_start_up(
    device: str, found: int, visible: str | None, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignment, "DRIVER", tmp_path)
    monkeypatch.setattr(assignment, "count_accelerators", lambda: found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert assignment.accelerators(Settings(worker_device=device)) == expected
    monkeypatch.setattr(assignment, "DRIVER", tmp_path / "none")
    assert assignment.accelerators(Settings(worker_device="auto")) == []


def test_an_accelerator_that_is_asked_for_and_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "count_accelerators", lambda: 0)
    with pytest.raises(RuntimeError, match="finds no CUDA device"):
        assignment.accelerators(Settings(worker_device="cuda"))


def test_torch_is_asked_without_credentials_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ${DATABASE_URL:-3}\n")
    python.chmod(0o755)
    monkeypatch.setenv("DATABASE_URL", "secret")
    monkeypatch.setattr(sys, "executable", str(python))
    assert process.count_accelerators() == 3
    monkeypatch.setattr(process, "ACCELERATORS_TOLD_S", 0.1)
    for script in ("#!/bin/sh\nexec sleep 60\n", "#!/bin/sh\nexit 1\n"):
        python.write_text(script)
        with pytest.raises(RuntimeError, match="does not say"):
            process.count_accelerators()


def test_a_runner_sees_the_accelerator_of_its_slot_and_works_in_the_same_order_each_time(
    bench: Bench, new_job: Callable[..., str]
) -> None:
    on = bench._replace(slot=Slot(1, bench.slot.folder, accelerator="4"))
    job_id = new_job()
    assert on.run() is Status.SUCCEEDED
    figures = bench.events(job_id)[-1].data["figures"]
    assert figures["device"] == "cuda:0"
    assert figures["cuda"] == {"CUDA_VISIBLE_DEVICES": "4", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def test_a_kill_that_the_kernel_counted_as_want_of_memory(
    bench: Bench, new_job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([3, 4])
    monkeypatch.setattr(process, "oom_kills", lambda: next(counts))
    job_id = new_job(metadata={"fake": "killed"})
    assert bench.run() is Status.QUEUED
    assert any("out_of_memory" in event.message for event in bench.events(job_id))


def test_a_kernel_that_does_not_keep_secrets_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PR_SET_DUMPABLE", -1)  # which no kernel knows
    with pytest.raises(OSError, match="prctl"):
        process.keep_secrets()


def test_the_kernel_tells_of_such_kills() -> None:
    assert process.oom_kills() >= 0
    assert "oom_kill " in Path("/proc/vmstat").read_text()


@pytest.mark.parametrize(
    ("fake", "status", "words"),
    [
        ("fails", Status.FAILED, "row_too_long"),
        ("exits", Status.QUEUED, "exit status 3"),
        ("garbage", Status.QUEUED, "no record"),
        ("oversized", Status.QUEUED, "no record"),
    ],
)
def test_a_failure_with_its_reason(
    fake: str, status: Status, words: str, bench: Bench, new_job: Callable[..., str]
) -> None:
    job_id = new_job(metadata={"fake": fake})
    assert bench.run() is status
    told = [f"{event.data.get('code')} {event.message}" for event in bench.events(job_id)]
    assert any(words in message for message in told)
    assert not any("42" in message for message in told)  # what it wrote may be text of the forget set


def test_the_rows_that_an_attempt_failed_on_are_kept(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job(metadata={"fake": "fails"})
    bench.run()
    assert failure(bench, job_id).forget_rows == [3]


def test_a_model_that_is_gone(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job()
    with bench.sessions.begin() as s:
        s.execute(delete(Model))
    assert bench.run() is Status.FAILED
    assert failure(bench, job_id).code is FailureCode.MODEL_NOT_FOUND


def test_a_runner_that_cannot_be_started(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job()
    bench.slot.folder.parent.mkdir(parents=True)
    bench.slot.folder.write_text("in the way")
    assert bench.run() is Status.QUEUED
    assert any("internal_error" in event.message for event in bench.events(job_id))


# --- the lease


def test_who_is_fenced_out_kills_its_runner_and_writes_nothing_more(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job(metadata={"fake": "stubborn"})
    with bench.running() as answer:
        pid = bench.runner_pid()
        with bench.sessions.begin() as s:
            s.execute(update(Job).values(lease_until=func.now() - text("interval '1 s'")))
            jobs.expire(s, infra_losses_max=10)
            successor = jobs.claim(s, worker="other", classes=["cpu"], vram_gib=0, lease_s=60)
        assert successor is not None
        steps, events = bench.rows(JobStep, job_id), bench.rows(JobEvent, job_id)
    assert answer == [None]
    assert not alive(pid)
    assert (bench.rows(JobStep, job_id), bench.rows(JobEvent, job_id)) == (steps, events)
    assert (bench.job(job_id).fence, bench.job(job_id).lease_owner) == (successor.fence, "other")
    assert bench.files_left() == []


@contextmanager
def database_away(engine: Engine, admin_url: str) -> Iterator[None]:
    """This database alone: it breaks every connection, and refuses new ones."""
    name = make_url(str(engine.url)).database
    admin = create_engine(admin_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"))
        try:
            yield
        finally:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    admin.dispose()


def test_an_attempt_outlives_a_database_that_is_away_for_less_than_the_lease(
    bench: Bench, new_job: Callable[..., str], engine: Engine, cluster: Any
) -> None:
    job_id = new_job(metadata={"steps": "40", "step_s": "0.05"})
    with bench.running() as answer, database_away(engine, cluster.url):
        time.sleep(1.5)
    assert answer == [Status.SUCCEEDED]
    assert bench.job(job_id).attempt == 1
    assert bench.rows(JobStep, job_id) == 40


def test_a_runner_is_killed_when_the_database_is_away_for_longer_than_the_lease(
    bench: Bench, new_job: Callable[..., str], engine: Engine, cluster: Any
) -> None:
    short = bench._replace(settings=bench.settings.model_copy(update={"lease_s": 1.0}))
    new_job(metadata={"fake": "stubborn"})
    with short.running() as answer:
        pid = short.runner_pid()
        with database_away(engine, cluster.url):
            until(lambda: not alive(pid), 5.0)
    assert answer == [None]


# --- leftovers


def test_a_leftover_of_the_slot_is_killed_first(bench: Bench, new_job: Callable[..., str]) -> None:
    new_job()
    leftover = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    started_at = Path(f"/proc/{leftover.pid}/stat").read_text().rpartition(")")[2].split()[19]
    bench.slot.folder.mkdir(parents=True)
    (bench.slot.folder / "attempt").mkdir()
    (bench.slot.folder / "attempt" / "half-made").write_text("of the attempt before")
    (bench.slot.folder / "runner.pid").write_text(f"{leftover.pid} {started_at}")
    assert bench.run() is Status.SUCCEEDED
    assert leftover.wait(1) == -signal.SIGKILL


def test_a_later_process_with_the_number_of_a_leftover_is_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        for content in (f"{other.pid} 1", f"{other.pid} None", ""):
            (tmp_path / "runner.pid").write_text(content)
            process.kill_leftover(tmp_path / "runner.pid")
            assert not (tmp_path / "runner.pid").exists()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
