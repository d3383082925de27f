"""The verbs of a job. The caller commits.

What the holder of a lease does is fenced: it returns False (or None) when the row has meanwhile gone to somebody else.
A move that the job's status does not allow raises InvalidTransition (see moves.py).
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import timedelta
from typing import Any

from pydantic import ValidationError
from sqlalchemy import and_, bindparam, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from service.domain.errors import InvalidTransition, NotFound, PreconditionFailed
from service.domain.job import (
    HELD,
    MICRO_BATCH_TOKENS,
    SETS,
    Failure,
    FailureCode,
    JobSpec,
    Limits,
    Stage,
    Status,
    Verdict,
)
from service.store import audit, checkpoints, deletion_jobs, line, lineage, moves, quotas, tenancy
from service.store.ids import new_id
from service.store.metrics import ATTEMPTS_LOST, FENCED_WRITES, JOB_VERDICTS, LEASES_EXPIRED, bump
from service.store.moves import FRESH
from service.store.rows import (
    ArtifactRow,
    Beat,
    CheckpointRow,
    CheckRow,
    Claim,
    ConstraintRow,
    Event,
    StepRow,
    WarningRow,
)
from service.store.tables import Artifact, Benchmark, File, Job, JobCheck, JobEvent, JobStep, Model, Tenant

RETRY_MAX_S = 600
AT_ONCE = 32  # jobs that a claim looks at: about as many workers may claim at the same time without looking again
MICRO_BATCH_SHRINKS = 4  # by this much, each time that memory had no room
MICRO_BATCH_TOKENS_MIN = 256
STILL_READY = (  # made once: each claim asks it, and to put it together takes longer than the answer
    select(Job, Tenant.max_running_jobs)
    .join(Tenant, Tenant.id == Job.tenant_id)
    .where(Job.id.in_(bindparam("ids", expanding=True)), line.ready(Job))
    .order_by(*line.order(Job))
    .limit(1)
    .with_for_update(of=Job, skip_locked=True)
)

Versions = AbstractSet[int] | None  # those at which a job may be for a move; None: any


# --- what a user asks


def create(s: Session, spec: JobSpec, warnings: Sequence[WarningRow] = (), *, rings: bool = False) -> Job:
    """A queued job of the session's tenant. Raises NotFound for a file, a model or a benchmark; they stay while it needs them.

    Raises QuotaExceeded where the tenant has as many jobs that have not ended as it may.

    Args:
        rings: the caller rings its bell after the commit; else the sweep does.
    """
    _needed(s, {getattr(spec, purpose) for purpose in SETS}, spec.model, spec.benchmarks)
    quotas.take_place(s, tenancy.tenant(s))
    job = Job(
        id=new_id("ujob"),
        version=0,  # 1 with the events below
        created_by=tenancy.actor(s),
        status=Status.QUEUED,
        queued_at=func.now(),
        rung_at=func.now() if rings else None,
        spec=_as_asked(spec),
        model=spec.model,
        method=spec.method.type,
        forget_set=spec.forget_set,
        retain_set=spec.retain_set,
        refusal_set=spec.refusal_set,
        holdout_set=spec.holdout_set,
        priority=spec.priority,
        due_at=spec.due_at,
        gpu_class=spec.resources.gpu_class,
        min_vram_gib=spec.resources.min_vram_gib,
        external_id=spec.external_id,
        metadata_=spec.metadata,
        steps_total=None if spec.reverifies else spec.budget.max_steps,
        warnings=[warning._asdict() for warning in warnings],
    )
    s.add(job)
    s.flush()
    data = {"model": spec.model, "method": spec.method.type}
    data |= {"reverifies": spec.reverifies} if spec.reverifies else {}
    audit.write(s, "job.created", "unlearning.job", job.id, data)
    job = moves.write(s, job, [Event("job.created", "created"), Event("job.queued", "waits for a worker")])
    moves.tell(s, job)
    return job


def _needed(s: Session, sets: Collection[str | None], model: str, named: Collection[str]) -> None:
    """From here to the commit none of them can go, and after it the job keeps them. Raises NotFound."""
    files = set(sets) - {None}
    there = select(File.id).where(File.id.in_(files), File.purged_at.is_(None))
    if missing := files - set(s.scalars(there.with_for_update(key_share=True, read=True))):
        raise NotFound("file", min(filter(None, missing)))
    if s.scalar(select(Model.name).where(Model.name == model).with_for_update(key_share=True, read=True)) is None:
        raise NotFound("model", model)
    benchmarks = select(Benchmark.name).where(Benchmark.name.in_(named))
    if lacking := set(named) - set(s.scalars(benchmarks.with_for_update(key_share=True, read=True))):
        raise NotFound("benchmark", min(lacking))


def _as_asked(spec: JobSpec) -> dict[str, Any]:
    """Without what was not asked for: a worker of an older version, which may read it, refuses fields that it does not know."""
    stored = spec.model_dump(mode="json", exclude_none=True)
    return {name: value for name, value in stored.items() if value != []}


def get(s: Session, job_id: str) -> Job:
    job = s.get(Job, job_id)
    if job is None:
        raise NotFound("job", job_id)
    return job


def request_cancel(s: Session, job_id: str, versions: Versions = None) -> Job:
    """Ends a job that waits; asks the worker of one that runs. Asking twice is asking once. Raises InvalidTransition."""
    job = _locked(s, job_id, versions)
    if job.status in (Status.CANCELLING, Status.CANCELLED):
        return job
    if job.status not in HELD:
        return moves.cancel(s, job, "cancelled before it ran")
    asked = Event("cancel.requested", "the worker was asked to stop")
    return moves.move(s, job, Status.CANCELLING, asked, cancel_requested_at=func.now())


def pause(s: Session, job_id: str, versions: Versions = None) -> Job:
    """No worker takes a job that waits, until it is resumed; that of one that runs is asked. Pausing twice is pausing once."""
    job = _locked(s, job_id, versions)
    if job.status in (Status.PAUSING, Status.PAUSED):
        return job
    if job.status is Status.RUNNING:
        asked = Event("pause.requested", "the worker was asked to pause")
        return moves.move(s, job, Status.PAUSING, asked, pause_requested_at=func.now())
    paused = Event("job.paused", "paused while it waited")
    return moves.move(s, job, Status.PAUSED, paused, status_reason="paused on request", pause_requested_at=func.now())


def resume(s: Session, job_id: str, versions: Versions = None) -> Job:
    """Back to its place in the line. Resuming a job that waits changes nothing. Ring its bell after the commit."""
    job = _locked(s, job_id, versions)
    if job.status is Status.QUEUED:
        return job
    if job.status is not Status.PAUSED:
        raise InvalidTransition(f"the job is {job.status}; only one that is paused can be resumed")
    events = Event("job.resumed", "resumed"), Event("job.queued", "waits for a worker again")
    values = {"status_reason": None, "pause_requested_at": None, "rung_at": func.now()}
    return moves.move(s, job, Status.QUEUED, *events, **values)


def retry(s: Session, job_id: str, versions: Versions = None) -> Job:
    """A job that failed, at the end of the line, with all its attempts. Ring its bell after the commit.

    Raises InvalidTransition for any other, for one of which a set, the model or a benchmark is gone, and for one that serves
    deletion requests where its model has forgotten for others since, or one of them was closed; QuotaExceeded as `create` does.
    """
    job = _locked(s, job_id, versions)
    if job.status is not Status.FAILED:
        raise InvalidTransition(f"the job is {job.status}; only one that failed can be tried again")
    try:
        _needed(s, [getattr(job, purpose) for purpose in SETS], job.model, job.spec.get("benchmarks") or [])
    except NotFound as error:
        raise InvalidTransition(f"the job cannot run again: {error} any more") from error
    quotas.take_place(s, job.tenant_id)
    if deletion_jobs.serves(s, job.id):
        lineage.lengthen(s, job)
        deletion_jobs.serve_again(s, job)
    queued = Event("job.queued", "asked for again; waits for a worker")
    counts = {"content_failures": 0, "infra_losses": 0}
    times = {"queued_at": func.now(), "rung_at": func.now(), "cancel_requested_at": None, "pause_requested_at": None}
    return moves.move(
        s, job, Status.QUEUED, queued, **checkpoints.rewound(s, job) | counts | times | {"status_reason": None}
    )


def _locked(s: Session, job_id: str, versions: Versions) -> Job:
    """Raises PreconditionFailed unless it is at one of the versions."""
    job = moves.locked(s, job_id)
    if versions is not None and job.version not in versions:
        raise PreconditionFailed(f"the job is at version {job.version}")
    return job


# --- what a worker does


def claim(s: Session, *, worker: str, classes: Collection[str], vram_gib: float, lease_s: float) -> Claim | None:
    """The job that is due first among those that this worker can run, leased to it; None: nothing to do.

    A tenant that runs as many jobs as it may is passed over. The spec is not looked at here: one that cannot be read must
    be claimed to be put aside, and not block those behind it.
    """
    job = _first_free(s, classes, vram_gib)
    if job is None:
        return None
    attempt = job.attempt + 1
    job = moves.move(
        s,
        job,
        Status.RUNNING,
        Event("job.started", f"attempt {attempt} started", {"worker": worker, "attempt": attempt}),
        attempt=attempt,
        fence=job.fence + 1,
        lease_owner=worker,
        lease_until=func.now() + timedelta(seconds=lease_s),
        beat_at=func.now(),
        started_at=func.now(),
        status_reason=None,
    )
    return Claim(job.id, job.tenant_id, job.fence, job.attempt, job.spec)


def _first_free(s: Session, classes: Collection[str], vram_gib: float) -> Job | None:
    """Locked, and so its tenant's place for one more that runs."""
    most = AT_ONCE
    while found := line.first(s, classes, vram_gib, most):
        free = s.execute(STILL_READY, {"ids": found}, execution_options=FRESH).one_or_none()
        if free is None and len(found) < most:
            return None  # all of them are somebody else's by now
        if free is None:
            most *= 8
            continue
        job: Job = free.Job
        if free.max_running_jobs is None or quotas.may_run(s, job.tenant_id):
            return job  # else somebody took the tenant's last place since; so it is passed over now
    return None


def beat(s: Session, job_id: str, fence: int, lease_s: float) -> Beat | None:
    """Extends the lease. None: it is lost, and so is the right to write; stop the runner at once."""
    row = s.execute(
        update(Job)
        .where(Job.id == job_id, Job.fence == fence, Job.status.in_(HELD))
        .values(lease_until=func.now() + timedelta(seconds=lease_s), beat_at=func.now())
        .returning(Job.status)
        .execution_options(synchronize_session=False)
    ).scalar()
    if row is None:
        bump(s, FENCED_WRITES, {})
        return None
    return Beat(cancel=row is Status.CANCELLING, pause=row is Status.PAUSING)


def log(
    s: Session,
    job_id: str,
    fence: int,
    *,
    stage: Stage | None = None,
    steps: Sequence[StepRow] = (),
    checks: Sequence[CheckRow] = (),
    events: Sequence[Event] = (),
    constraint: ConstraintRow | None = None,
    warnings: Sequence[WarningRow] = (),
    resumed: tuple[int, int] | None = None,
    saved: Sequence[CheckpointRow] = (),
) -> bool:
    """A batch of what the runner told, at once. Repeating a batch changes nothing but its events.

    Args:
        resumed: (step, tokens trained until then) after which it goes on from a checkpoint; (0, 0): none could be read.
        saved: checkpoints that the runner wrote.
    """
    job = moves.held(s, job_id, fence)
    if job is None:
        return False
    key = {"job_id": job_id, "fence": fence}
    values: dict[str, Any] = {}
    before: list[Event] = []
    if stage is not None and stage != job.stage:
        before = [Event("stage.finished", f"{job.stage} finished", {"stage": job.stage})] if job.stage else []
        before.append(Event("stage.started", f"{stage} started", {"stage": stage}))
        now = moves.now(s)
        opened = {"stage": stage, "attempt": job.attempt, "started_at": now, "finished_at": None}
        values |= {"stage": stage, "stage_history": [*moves.closed(job.stage_history, now), opened]}
    if resumed is not None:
        checkpoints.take_over(s, job, resumed[0])
        values |= {"step": resumed[0], "trained_tokens": resumed[1]}
    if steps:
        rows = [key | step._asdict() for step in steps]
        s.execute(postgresql.insert(JobStep).on_conflict_do_nothing(), rows)
        values |= {"step": steps[-1].step, "trained_tokens": steps[-1].tokens}
    for check in checks:  # the last check of a step counts
        upsert = postgresql.insert(JobCheck).values(**key, **check._asdict())
        index = [JobCheck.job_id, JobCheck.fence, JobCheck.step]
        s.execute(upsert.on_conflict_do_update(index_elements=index, set_=check._asdict()))
    if saved:
        checkpoints.promote(s, job, saved)
        values["infra_losses"] = 0  # it comes on, however often its workers are lost
    if constraint is not None:
        values |= constraint._asdict()
    if warnings:
        told = [warning._asdict() for warning in warnings]
        values["warnings"] = job.warnings + [warning for warning in told if warning not in job.warnings]
    moves.write(s, job, [*before, *events], **values)
    return True


def succeed(
    s: Session,
    job_id: str,
    fence: int,
    verdict: Verdict,
    artifacts: Sequence[ArtifactRow] = (),
    data: Mapping[str, Any] | None = None,
) -> bool:
    """The run came to its end, whatever the verdict. The artifacts of this attempt become the job's in the same moment."""
    job = moves.held(s, job_id, fence)
    if job is None:
        return False
    gates = [
        Event("gate.failed", gate.message, gate.model_dump(mode="json"), "warn")
        for gate in verdict.gates
        if gate.result == "FAILED"
    ]
    ended = Event("job.succeeded", verdict.message, {**(data or {}), "verdict": verdict.result})
    if artifacts:
        rows = [{"id": new_id("uart"), "job_id": job_id, **artifact._asdict()} for artifact in artifacts]
        s.execute(insert(Artifact), rows)
    moves.move(s, job, Status.SUCCEEDED, *gates, ended, verdict=verdict.model_dump(mode="json"), status_reason=None)
    bump(s, JOB_VERDICTS, {"result": verdict.result})
    return True


def cancelled(s: Session, job_id: str, fence: int) -> bool:
    """The runner stopped because it was asked to."""
    job = moves.held(s, job_id, fence)
    if job is None:
        return False
    moves.cancel(s, job, "stopped on request")
    return True


def fail(s: Session, job_id: str, fence: int, failure: Failure) -> Status | None:
    """The attempt ended without a result: again, later, if that can help and attempts are left. Where the job went."""
    job = moves.held(s, job_id, fence)
    if job is None:
        return None
    if job.status is Status.CANCELLING:
        return moves.cancel(s, job, f"failed while it was being cancelled: {failure.message}").status
    bump(s, ATTEMPTS_LOST, {"code": failure.code})
    told = {**failure.model_dump(mode="json"), "stage": job.stage, "step": job.step}
    # While it loads, another process may have held the memory; later a smaller micro-batch may find room, until there is none.
    full = failure.code is FailureCode.OUT_OF_MEMORY and job.stage not in (None, Stage.PREPARING, Stage.LOADING_MODEL)
    smaller = _smaller_micro_batch(job) if full else job.micro_batch_tokens
    shrinks = smaller != job.micro_batch_tokens  # a few times at most: that is no failure yet
    repeats = full and not shrinks and told == _lost_before(s, job)
    failures, attempts = job.content_failures + (not shrinks), _max_attempts(job)
    if failure.retryable and failures < attempts and not repeats:
        wait_s, reason = _wait_s(failures), f"{failure.code}: {failure.message}"
        lost = Event("attempt.lost", f"{reason}; again in {wait_s} s", told, "warn")
        later = func.now() + timedelta(seconds=wait_s)
        values = {"content_failures": failures, "micro_batch_tokens": smaller}
        return moves.again(s, job, lost, status_reason=reason, not_before=later, **values).status
    if failure.retryable:
        message = f"{failure.message}; {failures} of {attempts} attempts failed"
        if repeats:
            message += f", the last two alike at step {job.step}: another would end there too"
        failure = failure.model_copy(update={"message": message})
    return moves.fail(s, job, failure, content_failures=failures).status


def lose(s: Session, job_id: str, fence: int, reason: str, infra_losses_max: int) -> Status | None:
    """The attempt was ended from outside, which is not the job's fault: again, later. Where the job went."""
    job = moves.held(s, job_id, fence)
    if job is None:
        return None
    later = func.now() + timedelta(seconds=_wait_s(job.infra_losses + 1))
    return _lost(s, job, reason, infra_losses_max, not_before=later).status


def _wait_s(failures: int) -> int:
    """Before the next attempt: 10, 40, 160 s, then ten minutes. Who holds the memory or the disk may have let go by then."""
    return int(min(10 * 4 ** max(failures - 1, 0), RETRY_MAX_S))


def _smaller_micro_batch(job: Job) -> int:
    """The numbers are the same up to rounding, however a batch is split."""
    return max((job.micro_batch_tokens or MICRO_BATCH_TOKENS) // MICRO_BATCH_SHRINKS, MICRO_BATCH_TOKENS_MIN)


def _max_attempts(job: Job) -> int:
    try:
        return Limits.model_validate(job.spec.get("limits"), extra="ignore").max_attempts
    except ValidationError:  # another version wrote it
        return Limits().max_attempts


def _lost_before(s: Session, job: Job) -> dict[str, Any] | None:
    """What was told of the last attempt that was lost."""
    lost = select(JobEvent.data).where(JobEvent.job_id == job.id, JobEvent.type == "attempt.lost")
    return s.scalar(lost.order_by(JobEvent.seq.desc()).limit(1))


def release(s: Session, job_id: str, fence: int) -> bool:
    """The worker goes away on purpose: the attempt is given back, and counts as if it had never been."""
    return _given_back(s, job_id, fence, "its worker stopped") is not None


def paused(s: Session, job_id: str, fence: int) -> Status | None:
    """The runner stopped because it was asked to pause: the attempt is given back, as in `release`. Where the job went."""
    return _given_back(s, job_id, fence, "paused on request")


def _given_back(s: Session, job_id: str, fence: int, reason: str) -> Status | None:
    job = moves.held(s, job_id, fence)
    if job is None:
        return None
    if job.status is Status.CANCELLING:
        return moves.cancel(s, job, reason).status
    back = Event("attempt.requeued", f"{reason}; the attempt is given back")
    return moves.again(s, job, back, status_reason=reason, attempt=job.attempt - 1).status


# --- what the sweep does


def expire(s: Session, infra_losses_max: int, limit: int = 100) -> list[Job]:
    """Settles jobs whose worker fell silent; the rows as they are afterwards."""
    lapsed = s.scalars(
        select(Job)
        .where(Job.status.in_(HELD), Job.lease_until < func.now())
        .order_by(Job.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True),
        execution_options=FRESH,
    ).all()
    # Two sweeps at once, with different jobs, bump the same counters: in the same order, or each waits for the other.
    for gpu_class, count in sorted(Counter(job.gpu_class for job in lapsed).items()):
        bump(s, LEASES_EXPIRED, {"queue": gpu_class}, count)
    return [
        _lost(s, job, f"worker {job.lease_owner} fell silent during attempt {job.attempt}", infra_losses_max)
        for job in sorted(lapsed, key=lambda job: (job.status, job.method))
    ]


def _lost(s: Session, job: Job, reason: str, infra_losses_max: int, **values: Any) -> Job:
    losses = job.infra_losses + 1
    if job.status is Status.CANCELLING:
        return moves.cancel(s, job, reason, infra_losses=losses)
    bump(s, ATTEMPTS_LOST, {"code": FailureCode.WORKER_LOST})
    if losses > infra_losses_max:
        failure = Failure.of(
            FailureCode.WORKER_LOST, f"{reason}; that was loss {losses}, {infra_losses_max} are allowed"
        )
        return moves.fail(s, job, failure, infra_losses=losses)
    told = {"code": FailureCode.WORKER_LOST, "worker": job.lease_owner, "infra_losses": losses}
    return moves.again(s, job, Event("attempt.lost", reason, told, "warn"), infra_losses=losses, **values)


def due_classes(s: Session, ring_again_s: float) -> list[str]:
    """GPU classes with a job that is due for which no bell ever rang, or with jobs that are due and no bell for that long."""
    silent = func.max(Job.rung_at) < func.now() - timedelta(seconds=ring_again_s)
    classes = select(Job.gpu_class).where(line.ready(Job)).group_by(Job.gpu_class)
    return list(s.scalars(classes.having(or_(func.bool_or(Job.rung_at.is_(None)), silent)).order_by(Job.gpu_class)))


def rung(s: Session, classes: Collection[str]) -> None:
    """Notes that these classes' bells ring now: with the jobs for which none ever rang, and with one of each class.

    Not with all: they may be very many. Ring after the commit: a claim passes over the rows locked here.
    """
    due = and_(line.ready(Job), Job.gpu_class.in_(classes))
    one_of_each = select(func.min(Job.id)).where(due).group_by(Job.gpu_class)
    noted = select(Job.id).where(due, or_(Job.rung_at.is_(None), Job.id.in_(one_of_each)))
    s.execute(
        update(Job)
        .where(Job.id.in_(noted.with_for_update(skip_locked=True)))
        .values(rung_at=func.now())
        .execution_options(synchronize_session=False)
    )
