"""How the models of a tenant forget what approved requests name, and which requests wait for a job. The caller commits."""

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.domain.deletion import SERVABLE, PlanPut
from service.domain.errors import NotFound
from service.store import audit, lineage, quotas, tenancy
from service.store.tables import DeletionJob, DeletionPlan, DeletionRequest, Job, Model

KEY = [DeletionPlan.tenant_id, DeletionPlan.model]


class Batch(NamedTuple):
    """Requests that one job is to serve."""

    plan: DeletionPlan
    requests: Sequence[DeletionRequest]
    parent: str | None  # the job whose adapter it starts from


def put(s: Session, model: str, asked: PlanPut) -> DeletionPlan:
    """Of the session's tenant; in place of the one before. Raises NotFound for a model that is not registered."""
    known = select(Model.name).where(Model.name == model)
    if s.scalar(known.with_for_update(key_share=True, read=True)) is None:
        raise NotFound("model", model)
    _try_again(s, model)
    values = {
        "job": asked.job.model_dump(mode="json"),
        "window_seconds": asked.window_seconds,
        "requests_max": asked.requests_max,
        "status_reason": None,
        "created_by": tenancy.actor(s),
    }
    row = insert(DeletionPlan).values(tenant_id=tenancy.tenant(s), model=model, **values)
    row = row.on_conflict_do_update(index_elements=KEY, set_=values | {"updated_at": func.now()})
    told = {"method": asked.job.method.type, "window_seconds": asked.window_seconds, "requests_max": asked.requests_max}
    audit.write(s, "deletion_plan.put", "deletion_plan", model, told)
    return s.scalars(row.returning(DeletionPlan), execution_options={"populate_existing": True}).one()


def _try_again(s: Session, model: str) -> None:
    """Another plan may serve what the one before could not."""
    unfit = select(DeletionRequest.id).where(DeletionRequest.unfit.has_key(model))
    locked = s.scalars(unfit.order_by(DeletionRequest.id).with_for_update()).all()
    fit = update(DeletionRequest).where(DeletionRequest.id.in_(locked))
    fit = fit.values(unfit=DeletionRequest.unfit.op("-")(model))
    s.execute(fit, execution_options={"synchronize_session": False})


def get(s: Session, model: str) -> DeletionPlan:
    """Of the session's tenant."""
    plan = s.get(DeletionPlan, (tenancy.tenant(s), model))
    if plan is None:
        raise NotFound("deletion plan", model)
    return plan


def retain_set(s: Session, model: str) -> str | None:
    """The file that the plan of the session's tenant for the model retains; None: there is no plan."""
    plan = s.get(DeletionPlan, (tenancy.tenant(s), model))
    return None if plan is None else str(plan.job["retain_set"])


def remove(s: Session, model: str) -> None:
    """Of the session's tenant. What waits, waits for a job that somebody asks for."""
    gone = delete(DeletionPlan).where(DeletionPlan.model == model)
    if s.scalar(gone.returning(DeletionPlan.model)) is None:
        raise NotFound("deletion plan", model)
    audit.write(s, "deletion_plan.removed", "deletion_plan", model)


def of_model(s: Session, model: str) -> bool:
    """Whether any tenant has a plan for it."""
    plans = select(DeletionPlan.model).where(DeletionPlan.model == model)
    return s.scalar(plans.limit(1), execution_options=tenancy.EVERYBODYS) is not None


def suspend(s: Session, plan: DeletionPlan, reason: str) -> None:
    """No job can be made of it until it is put anew. One that was put meanwhile is another, and goes on."""
    same = (DeletionPlan.tenant_id == plan.tenant_id) & (DeletionPlan.model == plan.model)
    stopped = update(DeletionPlan).where(same, DeletionPlan.updated_at == plan.updated_at)
    if s.scalar(stopped.values(status_reason=reason).returning(DeletionPlan.model)) is not None:
        audit.write(s, "deletion_plan.suspended", "deletion_plan", plan.model, tenant_id=plan.tenant_id)


def due(s: Session) -> list[Batch]:
    """Requests that need wait no longer, of all that the session sees.

    Not while a job for requests on the same model runs: the next starts from its adapter, or would undo what it did.
    """
    plans = s.scalars(select(DeletionPlan).where(DeletionPlan.status_reason.is_(None))).all()
    batches = (_due(s, plan) for plan in plans)
    return [batch for batch in batches if batch is not None]


def waits_for(s: Session, plan: DeletionPlan) -> str | None:
    """Why no job is made yet for requests that need wait no longer; None: there are none, or nothing keeps it."""
    if not _ripe(s, plan):
        return None
    if (job := lineage.under_way(s, plan.tenant_id, plan.model)) is not None:
        return f"waits for job {job.id} ({job.status}): the next one starts from its adapter"
    if (bound := quotas.full(s, plan.tenant_id)) is not None:
        return f"waits for a place: {bound} open jobs are allowed"
    return None


def _due(s: Session, plan: DeletionPlan) -> Batch | None:
    requests = _ripe(s, plan)
    if not requests or lineage.under_way(s, plan.tenant_id, plan.model) is not None:
        return None
    return Batch(plan, requests, lineage.latest(s, plan.tenant_id, plan.model))


def _ripe(s: Session, plan: DeletionPlan) -> Sequence[DeletionRequest]:
    """Those that wait, once the first has waited for the window or they are as many as are served at once; else none."""
    waiting = _waiting(s, plan)
    long_ago = s.scalars(select(func.now())).one() - timedelta(seconds=plan.window_seconds)
    if len(waiting) < plan.requests_max and waiting and (waiting[0].approved_at or long_ago) > long_ago:
        return []
    return waiting


def _waiting(s: Session, plan: DeletionPlan) -> Sequence[DeletionRequest]:
    """Those that no job on the model serves or has served, unless they were requeued since; the one that was approved first
    before the others.

    Also of one that failed for another model: for this one it can be served.
    """
    served = select(DeletionJob.job_id).join(Job, Job.id == DeletionJob.job_id)
    served = served.where(
        DeletionJob.request_id == DeletionRequest.id, DeletionJob.requeued_at.is_(None), Job.model == plan.model
    )
    rows = select(DeletionRequest).where(
        DeletionRequest.tenant_id == plan.tenant_id,
        DeletionRequest.status.in_(SERVABLE),
        DeletionRequest.models.contains([plan.model]),
        ~DeletionRequest.unfit.has_key(plan.model),
        ~served.exists(),
    )
    return s.scalars(rows.order_by(DeletionRequest.approved_at, DeletionRequest.id).limit(plan.requests_max)).all()
