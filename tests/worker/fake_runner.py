"""A runner without a model: the real pipe and the real protocol, and a behaviour that the job's metadata names."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from service.domain.job import FailureCode, Stage, Verdict
from service.store.storage import Storage
from worker.pipe import die_with_parent, listen, open_pipe
from worker.records import (
    ArtifactFile,
    Assignment,
    CancelledRecord,
    CheckpointRecord,
    CheckRecord,
    ConstraintRecord,
    FailureRecord,
    PausedRecord,
    Record,
    ResultRecord,
    ResumedRecord,
    StageRecord,
    StepRecord,
    WarningRecord,
    Word,
)

Emit = Callable[[Record], None]
Asked = Callable[[], Word | None]
CREDENTIALS = {"DATABASE_URL", "BROKER_URL"}
CUDA = {"CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG"}


def step(number: int) -> StepRecord:
    return StepRecord(
        step=number,
        losses={"forget": 2.0 - 0.01 * number, "retain": 0.5},
        dual={"retain": 10.0 + number},
        violation={"retain": -0.1},
        learning_rate=1e-3,
        gradient_norm=1.5,
        tokens=100 * number,
        tokens_per_second=1000.0,
        elapsed_seconds=0.01 * number,
    )


def result(job: Assignment, **figures: object) -> ResultRecord:
    stored = Storage(job.storage_url).write(f"{job.prefix}/report.json", [b"{}"])
    file = ArtifactFile(
        name="report.json", key=f"{job.prefix}/report.json", media_type="application/json", **stored._asdict()
    )
    verdict = Verdict(result="PASSED", gates=[], message="the bound was kept")
    return ResultRecord(
        verdict=verdict, stop_reason="max_steps", stop_message="done", figures=figures, artifacts=[file]
    )


def normal(job: Assignment, emit: Emit, asked: Asked) -> Record:
    assert list(job.scratch_dir.iterdir()) == []
    (job.scratch_dir / "half-made").write_text("text of the forget set")
    emit(StageRecord(stage=Stage.PREPARING))
    emit(WarningRecord(code="epsilon_loose", message="epsilon hardly constrains anything"))
    emit(StageRecord(stage=Stage.EVALUATING))
    emit(ConstraintRecord(epsilon=0.6, base_retain_loss=0.5))
    emit(StageRecord(stage=Stage.UNLEARNING))
    steps = int(job.spec.metadata.get("steps", "5"))
    for number in range(1, steps + 1):
        emit(step(number))
        time.sleep(float(job.spec.metadata.get("step_s", "0")))
    emit(
        CheckRecord(
            step=steps,
            forget_objective=1.0,
            forget_probability=0.04,
            retain_loss=0.55,
            retain_upper=0.55,
            epsilon=0.6,
            feasible=True,
            best=True,
            rows=2,
            seconds=0.1,
        )
    )
    credentials = [name for name in os.environ if name.upper() in CREDENTIALS]
    return result(
        job,
        credentials=credentials,
        device=job.device,
        cuda={name: os.environ[name] for name in CUDA & os.environ.keys()},
    )


def endless(job: Assignment, emit: Emit, asked: Asked) -> Record:
    emit(StageRecord(stage=Stage.UNLEARNING))
    Storage(job.storage_url).write(f"{job.prefix}/adapter/part", [b"half"])
    for number in range(1, 10_000):
        if asked() == "cancel" and job.spec.metadata["fake"] == "endless":
            break
        emit(step(number))
        time.sleep(0.02)
    return CancelledRecord()


def saves(job: Assignment, emit: Emit, asked: Asked) -> Record:
    """Five steps a checkpoint; goes on from the last one, and ends once it is asked to or has done the job's `steps`."""
    storage, begun = Storage(job.storage_url), job.checkpoints[0].step if job.checkpoints else 0
    emit(StageRecord(stage=Stage.UNLEARNING))
    if begun:
        assert b"".join(storage.read(job.checkpoints[0].key)) == f"state {begun}".encode()
        emit(ResumedRecord(step=begun, tokens=100 * begun))
    for number in range(begun + 1, int(job.spec.metadata.get("steps", "10000")) + 1):
        emit(step(number))
        if (paused := asked() == "pause") or number % 5 == 0:
            key = f"{job.folder}/checkpoints/{job.fence}-{number}"
            stored = storage.write(key, [f"state {number}".encode()])
            emit(CheckpointRecord(step=number, key=key, bytes=stored.bytes, sha256=stored.sha256))
        if paused:
            return PausedRecord()
        time.sleep(0.02)
    return result(job)


def measures(job: Assignment, emit: Emit, asked: Asked) -> Record:
    """Past its solve, where it hears nothing."""
    emit(StageRecord(stage=Stage.UNLEARNING))
    emit(step(1))
    emit(StageRecord(stage=Stage.EVALUATING))
    time.sleep(60)
    raise AssertionError


def deaf(job: Assignment, emit: Emit, asked: Asked) -> Record:
    return endless(job, emit, asked)


def stubborn(job: Assignment, emit: Emit, asked: Asked) -> Record:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return endless(job, emit, asked)


def killed(job: Assignment, emit: Emit, asked: Asked) -> Record:
    emit(step(1))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def exits(job: Assignment, emit: Emit, asked: Asked) -> Record:
    emit(step(1))
    os._exit(3)


def fails(job: Assignment, emit: Emit, asked: Asked) -> Record:
    return FailureRecord(code=FailureCode.ROW_TOO_LONG, message="row 3 has 600 tokens", forget_rows=[3])


def garbage(job: Assignment, emit: Emit, asked: Asked) -> Record:
    os.write(int(os.environ["UNLEARN_RECORDS_FD"]), b"Epoch 1: the answer is 42\n")
    return endless(job, emit, asked)


def oversized(job: Assignment, emit: Emit, asked: Asked) -> Record:
    os.write(int(os.environ["UNLEARN_RECORDS_FD"]), b"x" * (2**20 + 2**17))
    return endless(job, emit, asked)


def parent(job: Assignment, emit: Emit, asked: Asked) -> Record:
    """Leaves a child behind that holds the pipe open."""
    fd = int(os.environ["UNLEARN_RECORDS_FD"])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(fd,))
    return result(job, child=child.pid)


def lingers(job: Assignment, emit: Emit, asked: Asked) -> Record:
    """And does not end by itself after its last record."""
    emit(parent(job, emit, asked))
    time.sleep(60)
    raise AssertionError


def not_known(job: Assignment, emit: Emit, asked: Asked) -> Record:
    """Finds before any training that the model does not know the rows."""
    emit(StageRecord(stage=Stage.EVALUATING))
    emit(ConstraintRecord(epsilon=0.6, base_retain_loss=0.5))
    emit(StageRecord(stage=Stage.UPLOADING))
    verdict = Verdict(result="NOT_KNOWN", gates=[], message="the model does not know the rows", rules=2)
    return result(job).model_copy(update={"verdict": verdict, "stop_reason": "not_known", "stop_message": "no step"})


def main() -> None:
    die_with_parent()
    emit, asked = open_pipe(), listen()
    job = Assignment.model_validate_json(Path(sys.argv[1]).read_text())
    behaviour = globals()[job.spec.metadata.get("fake", "normal")]
    emit(behaviour(job, emit, asked))


if __name__ == "__main__":
    main()
