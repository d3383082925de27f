"""The workers that have said lately that they are there."""

from datetime import datetime
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from service.api.deps import Here, Page, page
from service.api.errors import declared
from service.api.guard import Guarded, needs
from service.domain.identity import Scope
from service.store import workers

router = APIRouter(prefix="/v1", tags=["operation"], route_class=Guarded)


class WorkerObject(BaseModel):
    id: str
    object: Literal["worker"] = "worker"
    state: Literal["idle", "busy", "silent"] = Field(
        description="silent: it says nothing any more, and is soon forgotten"
    )
    gpu_classes: list[str]
    vram_gib: float
    slots: int = Field(description="jobs that it runs at once")
    jobs: int = Field(description="that it runs, whoever's; it takes another while these are fewer than its slots")
    seen_at: datetime


@router.get("/workers", summary="Workers", dependencies=[needs(Scope.JOBS_READ)], responses=declared(503))
def list_workers(here: Here) -> Page[WorkerObject]:
    """They serve every tenant. One that stops says so, and is gone from here; one that was killed falls silent."""
    with here.sessions.begin() as s:
        known, busy = workers.known(s), workers.busy(s)
        heard = {worker.name for worker in workers.heard(s)}
    data = [
        WorkerObject(
            id=worker.name,
            state="silent" if worker.name not in heard else "busy" if worker.name in busy else "idle",
            gpu_classes=worker.gpu_classes,
            vram_gib=worker.vram_gib,
            slots=worker.slots,
            jobs=busy.get(worker.name, 0),
            seen_at=worker.seen_at,
        )
        for worker in known
    ]
    return page(data, [one.id for one in data], has_more=False)
