"""Deletion plans: how the models of a tenant forget what approved requests name, without anybody asking for the job."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field, SerializeAsAny
from sqlalchemy.orm import Session

from service.api import admission, retained, sets, tokens
from service.api.deps import Here, Parts, Reads, Who
from service.api.errors import declared
from service.api.guard import Guarded, needs
from service.api.shapes import PLANS_PATH
from service.domain.deletion import PlannedJob, PlanPut
from service.domain.errors import InvalidRequest
from service.domain.identity import Principal, Scope
from service.domain.job import SETS, ModelName
from service.store import deletion_plans, deletion_reads, lineage, models
from service.store.tables import DeletionPlan

router = APIRouter(prefix=PLANS_PATH, tags=["deletion requests"], route_class=Guarded)


class PlanObject(BaseModel):
    id: str = Field(description="the model's name")
    object: Literal["deletion_plan"] = "deletion_plan"
    job: dict[str, SerializeAsAny[Any]] = Field(description="the job without its forget set, with its defaults")
    window_seconds: int
    requests_max: int
    status_reason: str | None = Field(
        description="why no job could be made of it, until it is put anew, or what requests wait for that it is to serve now; "
        "null: it works"
    )
    created_by: str
    updated_at: datetime


@router.put(
    "/{model}",
    summary="Say how a model forgets what requests name",
    dependencies=[needs(Scope.JOBS_CREATE), Depends(Reads("application/json"))],
    responses=declared(400, 404, 413, 415, 503),
)
def put(here: Here, who: Who, model: ModelName, asked: PlanPut) -> PlanObject:
    """In place of the plan before, if there is one.

    Once the first approved request for the model has waited for the window, or there are as many as are served at once, one
    job is made: its forget set is their rows, its parent the last job for requests that passed. A request that the plan
    before could not serve is tried again.
    """
    with _under("/job"):
        _judge(here, who, model, asked.job)
    with here.sessions.begin() as s:
        return plan_object(s, deletion_plans.put(s, model, asked))


@router.get(
    "/{model}",
    summary="The plan of a model",
    dependencies=[needs(Scope.REQUESTS_READ)],
    responses=declared(404, 503),
)
def get(here: Here, model: ModelName) -> PlanObject:
    with here.sessions.begin() as s:
        return plan_object(s, deletion_plans.get(s, model))


@router.delete(
    "/{model}",
    status_code=204,
    summary="Remove a plan",
    dependencies=[needs(Scope.JOBS_CREATE)],
    responses=declared(404, 503),
)
def remove(here: Here, model: ModelName) -> None:
    """Approved requests for the model wait from then on for a job that somebody asks for. Jobs that were made go on."""
    with here.sessions.begin() as s:
        deletion_plans.remove(s, model)


def plan_object(s: Session, row: DeletionPlan) -> PlanObject:
    return PlanObject(
        id=row.model,
        job=row.job,
        window_seconds=row.window_seconds,
        requests_max=row.requests_max,
        status_reason=row.status_reason or deletion_plans.waits_for(s, row),
        created_by=row.created_by,
        updated_at=row.updated_at,
    )


def _judge(here: Parts, who: Principal, model: str, asked: PlannedJob) -> None:
    """Raises NotFound for a model that is not registered, and InvalidRequest."""
    with here.sessions.begin() as s:
        entry = models.get(s, model)
        parent = lineage.latest(s, who.tenant, model)
        left_out = {digest for request in deletion_reads.left_out(s, model) for digest in request.row_digests}
    hyperparameters = here.catalog.complete(asked.method.type, asked.method.hyperparameters)
    problems = list(admission.recipe_problems(here, entry, asked, hyperparameters))
    for purpose in SETS:
        file_id = getattr(asked, purpose, None)
        if file_id is None:
            continue
        with sets.opened(here, file_id, purpose) as rows:
            if purpose != "refusal_set":  # those are read behind questions that nobody has asked yet
                problems += tokens.long_rows(here.settings, entry, rows, f"/{purpose}")
    problems += retained.forgotten_before(here, who, asked.retain_set, parent, model, left_out)
    if problems:
        raise InvalidRequest(*problems)


@contextmanager
def _under(pointer: str) -> Iterator[None]:
    """Problems name their place in this part of the body."""
    try:
        yield
    except InvalidRequest as error:
        problems = (problem._replace(pointer=pointer + problem.pointer) for problem in error.problems)
        raise InvalidRequest(*problems) from error
