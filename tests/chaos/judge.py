"""What must hold of jobs that went through faults: one end, one result, the one it would have had, and nothing else left."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.domain.errors import UnlearnError
from service.domain.job import Status
from service.orphans import delete_orphans
from service.store import artifacts, audit
from service.store.storage import Storage, Stored
from service.store.tables import Artifact, Job, JobCheckpoint, JobEvent, JobStep
from service.store.tenants import DEFAULT
from tests.chaos.scene import Scene, processes

Adapter = dict[str, str]  # its files' digests, by name


class Cost(NamedTuple):
    """What followed upon a fault, by the events of the jobs that it struck."""

    lost: int  # attempts
    expired: int  # leases; such an attempt is among the lost
    given_back: int
    resumed: int

    def plus(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


NONE = Cost(0, 0, 0, 0)


def adapter_of(scene: Scene, job_id: str) -> Adapter:
    """What the job published."""
    return scene.look(lambda s: _adapter(artifacts.of_job(s, job_id)))


def _adapter(rows: Sequence[Artifact]) -> Adapter:
    return {row.name: row.sha256 for row in rows if row.name.startswith("adapter/")}


def broken(scene: Scene, job_id: str, reference: Adapter) -> list[str]:
    """What does not hold of this job; nothing, if it ended exactly once with the reference's adapter."""

    def found(s: Session) -> list[str]:
        return [*_ended_wrongly(s, job_id), *_published_wrongly(s, job_id, scene.here.settings.storage_url, reference)]

    return scene.look(found)


def _ended_wrongly(s: Session, job_id: str) -> Iterator[str]:
    job = s.get_one(Job, job_id)
    if job.status is not Status.SUCCEEDED:
        yield f"it is {job.status}: {job.status_reason}"
    events = s.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)).all()
    ends = sum(event.type == "job.succeeded" for event in events)
    if ends != 1:
        yield f"it succeeded {ends} times"
    if [event.seq for event in events] != list(range(1, job.last_seq + 1)):
        yield "the numbers of its events have gaps"
    steps = select(JobStep.step).where(JobStep.job_id == job_id, JobStep.fence == job.fence).order_by(JobStep.step)
    if list(s.scalars(steps)) != list(range(1, job.step + 1)):
        yield "steps are missing from the series of the attempt that ended it"


def _published_wrongly(s: Session, job_id: str, storage_url: str, reference: Adapter) -> Iterator[str]:
    job, rows, storage = s.get_one(Job, job_id), artifacts.of_job(s, job_id), Storage(storage_url)
    of_attempts = {row.key.split("/")[3] for row in rows}  # jobs/<id>/attempts/<fence>/...
    if of_attempts != {str(job.fence)}:
        yield f"its artifacts are of attempts {sorted(of_attempts)}, and attempt {job.fence} ended it"
    for row in rows:
        try:
            for _ in storage.verified(row.key, Stored(row.bytes, row.sha256)):
                pass
        except UnlearnError as error:
            yield f"{row.name}: {error}"
    if not reference or _adapter(rows) != reference:
        yield f"its adapter is {_adapter(rows)}, and that of the undisturbed run {reference}"


def left_over(scene: Scene) -> list[str]:
    """What should not be there once all jobs have ended and the workers are gone."""
    settings = scene.here.settings
    stored = Storage(settings.storage_url)
    delete_orphans(scene.sessions, stored)  # what the sweep does once an hour
    with scene.sessions.begin() as s:
        jobs = list(s.scalars(select(Job.id)))
        named = {row.key for rows in artifacts.of_jobs(s, jobs).values() for row in rows}
        rows = s.scalar(select(func.count()).select_from(JobCheckpoint))
    found = [f"{key} is stored, and no row names it" for key, _ in stored.ages(artifacts.FOLDER) if key not in named]
    found += [f"{path} is half-written" for path in scene.folder.rglob("*.part")]
    found += [f"{path} lies in the scratch folder" for path in _scratch(settings.worker_scratch_dir)]
    found += [f"{command!r} still runs" for command in processes(scene.folder) if "worker." in command]
    if rows:
        found.append(f"{rows} checkpoints have rows")
    fault = audit.check(scene.sessions, DEFAULT).fault
    if fault:
        found.append(f"the audit log is broken: {fault}")
    return found


def _scratch(folder: Path) -> Iterator[Path]:
    """Beside the locks that tell workers' folders apart, and the folders of slots, which are used again."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".lock":
            yield path


def costs(scene: Scene, strikes: Sequence[tuple[str, Mapping[str, int]]]) -> dict[str, Cost]:
    """By fault. An event counts to the fault that struck its job last before it.

    Args:
        strikes: in order: the fault, and the jobs that it struck, with the number of each one's last event.
    """
    of_job: dict[str, list[tuple[int, str]]] = {}
    for name, struck in strikes:
        for job_id, seq in struck.items():
            of_job.setdefault(job_id, []).append((seq, name))
    total: dict[str, Cost] = {}
    for job_id, struck_at in of_job.items():
        for event in _events(scene, job_id):
            before = [name for seq, name in struck_at if seq < event.seq]
            if before:
                total[before[-1]] = total.get(before[-1], NONE).plus(_cost(event))
    return total


def _events(scene: Scene, job_id: str) -> Sequence[JobEvent]:
    return scene.look(lambda s: s.scalars(select(JobEvent).where(JobEvent.job_id == job_id)).all())


def _cost(event: JobEvent) -> Cost:
    lost = event.type == "attempt.lost"
    return Cost(
        lost,
        lost and "fell silent" in event.message,
        event.type == "attempt.requeued",
        event.type == "checkpoint.resumed",
    )
