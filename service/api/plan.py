"""What a job would be, before there is one: judged as it would be, and then nothing is kept."""

from typing import Literal

from pydantic import BaseModel, Field

from service.api import admission, sets
from service.api.deps import Parts
from service.api.sets import Given
from service.api.shapes import BaseModelRef, JobWarning, base_model
from service.domain.identity import Principal
from service.domain.job import SETS, Budget, Constraint, JobCreate, MethodChoice, Resources, Status
from service.store import files, reads, workers
from service.store.tables import Job


class SetSize(BaseModel):
    rows: int
    bytes: int = Field(description="as JSON Lines; tokens are known once a worker has read them")


class JobPlan(BaseModel):
    object: Literal["unlearning.job.plan"] = "unlearning.job.plan"
    model: str
    base_model: BaseModelRef
    parent: str | None
    method: MethodChoice = Field(description="with all its hyperparameters")
    constraint: Constraint
    budget: Budget = Field(description="the most that it would take, in steps and seconds")
    sets: dict[str, SetSize]
    benchmarks: list[str]
    deletion_requests: list[str]
    resources: Resources
    jobs_ahead: int = Field(description="that would be claimed before it, whoever's and of whatever GPU class")
    status_reason: str | None = Field(description="why it would wait in vain")
    warnings: list[JobWarning]


def plan(here: Parts, who: Principal, request: JobCreate) -> JobPlan:
    """Raises InvalidRequest, as the creation would."""
    judged = admission.judge(here, who, request)
    like = Job(status=Status.QUEUED, gpu_class=judged.resources.gpu_class, min_vram_gib=judged.resources.min_vram_gib)
    with here.sessions.begin() as s:
        ahead = reads.ahead(s, request.priority, request.due_at)
        nobody = workers.nobody_runs(like, workers.heard(s))
    return JobPlan(
        model=request.model,
        base_model=base_model(judged.entry),
        parent=request.parent,
        method=judged.method,
        constraint=request.constraint,
        budget=request.budget,
        sets={purpose: _size(here, given) for purpose in SETS if (given := getattr(request, purpose)) is not None},
        benchmarks=list(request.benchmarks),
        deletion_requests=list(request.deletion_requests),
        resources=judged.resources,
        jobs_ahead=ahead,
        status_reason=nobody,
        warnings=[JobWarning(**warning._asdict()) for warning in judged.warnings],
    )


def _size(here: Parts, given: Given) -> SetSize:
    if isinstance(given, list):
        return SetSize(rows=len(given), bytes=sum(len(sets.line(row)) for row in given))
    assert given is not None
    with here.sessions.begin() as s:
        file = files.get(s, given)
    return SetSize(rows=file.rows, bytes=file.bytes)
