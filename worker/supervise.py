"""One attempt of a job: start its runner, write down what it tells, keep the lease, end it when it must end.

The supervisor is the only writer, every write carries the claim's fence, and no session is open between writes. While
the database is away the runner goes on and its records wait; only when the lease must be taken for lost is it killed.
"""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from threading import Event
from typing import NamedTuple

import structlog
from pydantic import ValidationError
from sqlalchemy.orm import Session

from service.domain.errors import JobFailure
from service.domain.job import HELD, TERMINAL, Failure, FailureCode, JobSpec, Limits, Stage, Status
from service.settings import Settings
from service.store import checkpoints, jobs
from service.store.rows import ArtifactRow, Claim
from service.store.session import Sessions
from service.store.storage import FULL, Storage
from worker import process
from worker.assignment import assignment, checkpoints_folder, environment, prefix, reference_prefix
from worker.journal import Journal
from worker.lease import RETRY_S, DatabaseAway, Lease, LeaseLost
from worker.process import MalformedLine, Runner
from worker.records import (
    AnyRecord,
    CancelledRecord,
    CheckpointRecord,
    CheckpointRef,
    FailureRecord,
    PausedRecord,
    ResultRecord,
    ResumedRecord,
    StageRecord,
    parse_record,
)
from worker.telemetry import Telemetry

RUNNER = (sys.executable, "-m", "worker.run")
TICK_S = 0.2  # how soon a deadline, a shutdown or the runner's end is noticed
WRITE_EVERY_S = 1.0  # steps are written in batches
LAST = (ResultRecord, FailureRecord, CancelledRecord, PausedRecord)  # of a runner; then it ends

log = structlog.get_logger(__name__)


class Slot(NamedTuple):
    """A place for one job at a time."""

    number: int
    folder: Path  # used by nobody else; what lies in it is of this slot's last attempt
    accelerator: str | None = None  # as CUDA_VISIBLE_DEVICES names it; None: the CPU


class Asked(Enum):
    """Why a runner was ended that would have gone on."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RELEASE = "release"


Outcome = ResultRecord | Failure | Asked


def supervise(
    sessions: Sessions,
    claim: Claim,
    settings: Settings,
    slot: Slot,
    stopping: Event,
    telemetry: Telemetry,
    runner: Sequence[str] = RUNNER,
) -> Status | None:
    """Runs a claimed job, in this thread. Where the job went; None: somebody else has it, and we wrote nothing more.

    Args:
        stopping: set when the worker shuts down; the runner is then ended and the job given back.
        runner: the command, to which the path of the assignment is added.
    """
    told = log.bind(job_id=claim.job_id, attempt=claim.attempt, fence=claim.fence, slot=slot.number)
    lease = Lease(sessions, claim, settings.lease_s)
    try:
        spec = JobSpec.model_validate(claim.spec)
    except ValidationError as error:
        told.error("the stored spec cannot be read", fields=_fields(error))
        return _refuse(lease, error, settings.infra_losses_max)
    told.info("attempt started", method=spec.method.type)
    telemetry.claimed(_key(claim), spec.method.type)
    journal = Journal(spec.budget.max_steps)
    status: Status | None = None
    unknown = False  # whether the attempt's files may have become the job's without our knowledge
    try:
        outcome = _attempt(lease, spec, journal, settings, slot, stopping, telemetry, runner)
        unknown = isinstance(outcome, ResultRecord)
        status = _end(lease, journal, outcome, settings.infra_losses_max)
        unknown = False
        told.info("attempt ended", outcome=_in_words(outcome), status=status)
    except LeaseLost as lost:
        told.warning("lease lost", error=lost)
    finally:
        telemetry.ended(_key(claim), status)
        if status is not Status.SUCCEEDED and not unknown:
            _delete(settings, prefix(claim))
        if status in TERMINAL:  # no attempt will want it again, and it tells of the forget set
            _delete(settings, reference_prefix(claim))
        if status in (Status.SUCCEEDED, Status.CANCELLED):  # one that failed may be tried again, from there
            _delete(settings, checkpoints_folder(claim))
    return status


def _delete(settings: Settings, key: str) -> None:
    """Best effort: what stays, the sweep finds once the job has ended."""
    with suppress(Exception):
        Storage(settings.storage_url).delete(key)


def _refuse(lease: Lease, error: ValidationError, infra_losses_max: int) -> Status | None:
    """Another version of this code wrote the spec: not the job's fault. A worker of that version may have it a little later."""
    message = f"this worker's version cannot read the stored spec: {', '.join(_fields(error))}"
    try:
        return lease.insist(lambda s: jobs.lose(s, *_key(lease.claim), message, infra_losses_max))
    except LeaseLost:
        return None


def _fields(error: ValidationError) -> list[str]:
    """Without the values."""
    return [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]


def _attempt(
    lease: Lease,
    spec: JobSpec,
    journal: Journal,
    settings: Settings,
    slot: Slot,
    stopping: Event,
    telemetry: Telemetry,
    runner: Sequence[str],
) -> Outcome:
    """From the assignment to the runner's end. Raises LeaseLost."""
    began = time.monotonic()
    pid_file, scratch, path = (slot.folder / name for name in ("runner.pid", "attempt", "assignment.json"))
    try:
        process.kill_leftover(pid_file)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        on_accelerator = slot.accelerator is not None
        job = lease.insist(lambda s: assignment(s, lease.claim, spec, settings, scratch, on_accelerator))
        path.touch(0o600)
        path.write_text(job.model_dump_json())
        saved = _Saved(settings, checkpoints_folder(lease.claim), job.checkpoints)
        with process.started([*runner, str(path)], environment(slot.accelerator), pid_file) as running:
            return _follow(running, lease, spec.limits, began, journal, saved, settings, stopping, telemetry)
    except LeaseLost:
        raise
    except JobFailure as failure:
        return Failure.of(failure.code, str(failure))
    except Exception as error:
        log.exception("the attempt failed outside its runner", job_id=lease.claim.job_id)
        journal.clear()  # it may be what cannot be written
        full = isinstance(error, OSError) and error.errno in FULL
        code = FailureCode.STORAGE_FULL if full else FailureCode.INTERNAL_ERROR
        return Failure.of(code, f"the worker could not carry out the attempt: {type(error).__name__}; see its log")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            path.unlink()


class _Saved:
    """The files of the job's checkpoints: those stay that have rows (store.checkpoints).

    Args:
        refs: those with rows at the attempt's start; what else lies there was never promoted, or is no longer one.
    """

    def __init__(self, settings: Settings, folder: str, refs: Sequence[CheckpointRef]) -> None:
        self._settings = settings
        self._refs = list(reversed(refs))
        keys = {ref.key for ref in refs}
        with suppress(Exception):  # they go with the next attempt, or with the job
            for key, _ in Storage(settings.storage_url).ages(folder):
                if key not in keys:
                    _delete(settings, key)

    def told(self, records: Sequence[CheckpointRecord | ResumedRecord]) -> None:
        """What the runner told is written, and so are the rows."""
        for record in records:
            if isinstance(record, CheckpointRecord):
                self._refs.append(CheckpointRef(step=record.step, key=record.key, sha256=record.sha256))
            else:
                while self._refs and self._refs[-1].step != record.step:
                    _delete(self._settings, self._refs.pop().key)
        while len(self._refs) > checkpoints.KEPT:
            _delete(self._settings, self._refs.pop(0).key)


def _follow(
    running: Runner,
    lease: Lease,
    limits: Limits,
    began: float,
    journal: Journal,
    saved: _Saved,
    settings: Settings,
    stopping: Event,
    telemetry: Telemetry,
) -> Outcome:
    """Until the runner has ended. Raises LeaseLost, which leaves the killing to whoever started it."""
    beat_every_s = min(settings.heartbeat_s, settings.lease_s / 4)
    limit_s = limits.max_runtime_seconds
    oom_kills = process.oom_kills()
    written_at = time.monotonic()
    not_before = 0.0  # of the next write
    asked: Failure | Asked | None = None
    ends: list[tuple[float, Signals]] = []  # what a runner that does not end by itself gets, and when
    last: AnyRecord | None = None
    solving = False

    def hear(lines: Iterable[bytes]) -> None:
        nonlocal last, ends, solving
        for record in _parsed(lines):
            telemetry.record(_key(lease.claim), record)
            if isinstance(record, LAST):
                last = record
                ends = [(time.monotonic() + settings.term_grace_s, SIGKILL)]
            else:
                journal.add(record, time.monotonic())
            if isinstance(record, StageRecord):
                solving = record.stage is Stage.UNLEARNING

    def to_rest() -> list[tuple[float, Signals]]:
        """Between two steps the runner saves a checkpoint and ends. Else it has nothing to save: it is ended at once."""
        if not solving:
            return _from_now(settings, 0)
        running.ask("pause")
        return _from_now(settings, settings.drain_grace_s)

    try:
        while running.exit_code() is None:
            hear(running.lines(TICK_S))
            now = time.monotonic()
            if now >= began + limit_s and asked is None:
                limit = f"the attempt ran for longer than {limit_s} s"
                asked, ends = Failure.of(FailureCode.MAX_RUNTIME_EXCEEDED, limit), _from_now(settings, 0)
            if stopping.is_set() and asked in (None, Asked.CANCEL, Asked.PAUSE):
                asked, ends = Asked.RELEASE, _from_now(settings, 0) if asked is Asked.CANCEL else to_rest()
            if now >= not_before and _due(journal, now - written_at, beat_every_s):
                try:
                    beat = lease.keep(lambda s: journal.write(s, lease.claim))
                except DatabaseAway:
                    not_before = now + RETRY_S
                else:
                    saved.told(journal.saved)
                    journal.clear()
                    written_at = now
                    if beat.cancel and asked in (None, Asked.PAUSE):
                        running.ask("cancel")
                        asked, ends = Asked.CANCEL, _from_now(settings, settings.cancel_grace_s)
                    elif beat.pause and asked is None:
                        asked, ends = Asked.PAUSE, to_rest()
            while ends and now >= ends[0][0]:
                running.signal(ends.pop(0)[1])
        hear(running.rest())
    except (MalformedLine, ValidationError):
        return Failure.of(FailureCode.INTERNAL_ERROR, "the runner wrote something that is no record")

    match last:
        case ResultRecord():
            return last
        case FailureRecord():
            return Failure.of(last.code, last.message, last.forget_rows)
    return asked or _died(running.exit_code(), process.oom_kills() > oom_kills)


def _from_now(settings: Settings, grace_s: float) -> list[tuple[float, Signals]]:
    term_at = time.monotonic() + grace_s
    return [(term_at, SIGTERM), (term_at + settings.term_grace_s, SIGKILL)]


def _due(journal: Journal, since_s: float, beat_every_s: float) -> bool:
    return since_s >= beat_every_s or journal.urgent or (bool(journal) and since_s >= WRITE_EVERY_S)


def _parsed(lines: Iterable[bytes]) -> Iterator[AnyRecord]:
    for line in lines:
        yield parse_record(line)


def _died(exit_code: int | None, out_of_memory: bool) -> Failure:
    """A runner that ended without a last record."""
    assert exit_code is not None
    if exit_code >= 0:
        return Failure.of(FailureCode.INTERNAL_ERROR, f"the runner ended without a result, exit status {exit_code}")
    name = Signals(-exit_code).name
    if exit_code == -SIGKILL and out_of_memory:
        return Failure.of(FailureCode.OUT_OF_MEMORY, f"the kernel ended the runner for want of memory ({name})")
    outside = exit_code in (-SIGKILL, -SIGTERM)
    code = FailureCode.WORKER_LOST if outside else FailureCode.INTERNAL_ERROR
    return Failure.of(code, f"the runner was ended by {name}")


def _end(lease: Lease, journal: Journal, outcome: Outcome, infra_losses_max: int) -> Status | None:
    """Writes the attempt's end, if need be without what was still to be told of it.

    One that cannot be written even so fails the job, since another run would come to the same; but an attempt that is
    only given back waits for its lease to lapse. Raises LeaseLost.
    """

    def settle(journal: Journal, outcome: Outcome) -> Status | None:
        return lease.insist(lambda s: _settle(s, lease.claim, journal, outcome, infra_losses_max))

    told = log.bind(job_id=lease.claim.job_id, outcome=_in_words(outcome))
    try:
        return settle(journal, outcome)
    except LeaseLost:
        raise
    except Exception:
        told.exception("the attempt's end could not be written with the rest of its journal")
    try:
        return settle(Journal(0), outcome)
    except LeaseLost:
        raise
    except Exception as error:
        told.exception("the attempt's end could not be written")
        if outcome in (Asked.RELEASE, Asked.PAUSE):
            raise LeaseLost("the attempt could not be given back") from error
        message = f"the attempt's end could not be written: {type(error).__name__}; see the worker's log"
        failure = Failure.of(FailureCode.INTERNAL_ERROR, message).model_copy(update={"retryable": False})
        return settle(Journal(0), failure)


def _settle(s: Session, claim: Claim, journal: Journal, outcome: Outcome, infra_losses_max: int) -> Status | None:
    """The last write of the attempt: what was still to be told, and where the job goes."""
    key = _key(claim)
    job = jobs.get(s, claim.job_id)
    if job.fence == claim.fence and job.status not in HELD:
        return job.status  # an earlier try was committed, though we did not hear of it; or the lease had lapsed
    if not journal.write(s, claim):
        return None
    match outcome:
        case ResultRecord():
            artifacts = [ArtifactRow(**file.model_dump()) for file in outcome.artifacts]
            told = outcome.model_dump(include={"stop_reason", "stop_message", "figures"})
            return Status.SUCCEEDED if jobs.succeed(s, *key, outcome.verdict, artifacts, told) else None
        case Failure(code=FailureCode.WORKER_LOST):
            return jobs.lose(s, *key, outcome.message, infra_losses_max)
        case Failure():
            return jobs.fail(s, *key, outcome)
        case Asked.CANCEL:
            return Status.CANCELLED if jobs.cancelled(s, *key) else None
        case Asked.PAUSE:
            return jobs.paused(s, *key)
        case Asked.RELEASE:
            return jobs.get(s, claim.job_id).status if jobs.release(s, *key) else None


def _key(claim: Claim) -> tuple[str, int]:
    return claim.job_id, claim.fence


def _in_words(outcome: Outcome) -> str:
    match outcome:
        case ResultRecord():
            return f"verdict {outcome.verdict.result}"
        case Failure():
            return f"{outcome.code}: {outcome.message}"
    return outcome.value
