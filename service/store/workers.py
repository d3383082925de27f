"""Who hears which GPU classes, as the workers themselves say again and again; and so, which job nobody can run."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.domain.job import HELD, Status
from service.store.tables import Job, Worker
from service.store.tenancy import EVERYBODYS

SAY_EVERY_S = 30.0
SILENT_MIN = 5  # a worker that has said nothing for so long is taken to be gone
FORGOTTEN = timedelta(days=1)
HEARD = select(Worker.name, Worker.gpu_classes, Worker.vram_gib, Worker.slots).where(
    Worker.seen_at > func.now() - timedelta(minutes=SILENT_MIN)
)


def seen(s: Session, name: str, gpu_classes: Sequence[str], vram_gib: float, slots: int = 1) -> None:
    """This worker runs, now. Those that said so long ago are forgotten."""
    said = {"gpu_classes": list(gpu_classes), "vram_gib": vram_gib, "slots": slots, "seen_at": func.now()}
    row = insert(Worker).values(name=name, **said)
    s.execute(row.on_conflict_do_update(index_elements=[Worker.name], set_=said))
    s.execute(delete(Worker).where(Worker.seen_at < func.now() - FORGOTTEN))


def gone(s: Session, name: str) -> None:
    s.execute(delete(Worker).where(Worker.name == name))


def heard(s: Session | Connection) -> Sequence[Any]:
    """Those that said so within the last minutes: their rows, without the time."""
    return s.execute(HEARD).all()


def known(s: Session) -> Sequence[Worker]:
    """Those too that have fallen silent, until they are forgotten."""
    return s.scalars(select(Worker).order_by(Worker.name)).all()


def busy(s: Session) -> dict[str, int]:
    """Worker -> how many jobs it runs, whoever's."""
    held = select(Job.lease_owner, func.count()).where(Job.status.in_(HELD)).group_by(Job.lease_owner)
    return {name: count for name, count in s.execute(held, execution_options=EVERYBODYS) if name is not None}


def can_run(worker: Any, gpu_class: str, min_vram_gib: float | None) -> bool:
    """The rule of jobs.claim."""
    return gpu_class in (*worker.gpu_classes, "any") and worker.vram_gib >= (min_vram_gib or 0)


def nobody_runs(job: Job, heard: Sequence[Any]) -> str | None:
    """Why a queued job waits in vain; None: it does not wait, or somebody can run it."""
    if job.status is not Status.QUEUED:
        return None
    if any(can_run(worker, job.gpu_class, job.min_vram_gib) for worker in heard):
        return None
    room = f" with {job.min_vram_gib:g} GiB" if job.min_vram_gib else ""
    return f"no worker that hears GPU class {job.gpu_class}{room} has been seen in the last {SILENT_MIN} minutes"
