"""The registry of models, filled by an administrator. The caller commits."""

from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.domain.errors import InvalidTransition, NotFound
from service.domain.job import TERMINAL, ModelEntry
from service.store import audit, benchmarks, deletion_plans, lineage
from service.store.tables import Job, Model
from service.store.tenants import DEFAULT


def add(s: Session, entry: ModelEntry) -> ModelEntry:
    """Raises InvalidTransition if the name is taken: jobs and reports name a model, so a name never changes its meaning."""
    row = insert(Model).values(entry.model_dump(mode="json", exclude={"created_at"}))
    if s.scalar(row.on_conflict_do_nothing().returning(Model.name)) is None:
        raise InvalidTransition(f"a model {entry.name!r} is registered; remove it first, or choose another name")
    told = {"source": entry.source, "digest": entry.digest or entry.revision or ""}
    audit.write(s, "model.registered", "model", entry.name, told, tenant_id=DEFAULT)  # the deployment's own log
    return get(s, entry.name)


def get(s: Session, name: str) -> ModelEntry:
    model = s.get(Model, name)
    if model is None:
        raise NotFound("model", name)
    return _entry(model)


def every(s: Session) -> list[ModelEntry]:
    return [_entry(model) for model in s.scalars(select(Model).order_by(Model.name))]


def remove(s: Session, name: str) -> None:
    """Forgets the entry; files stay where they are. Raises InvalidTransition while a job, a benchmark or a plan needs it.

    And for good, once it has forgotten for deletion requests: under its name other weights would be taken for those.
    """
    if s.scalar(select(Model.name).where(Model.name == name).with_for_update()) is None:
        raise NotFound("model", name)
    user = s.scalar(select(Job.id).where(Job.status.not_in(TERMINAL), Job.model == name).limit(1))
    if user is not None:
        raise InvalidTransition(f"job {user} still needs model {name!r}")
    if (benchmark := benchmarks.of_model(s, name)) is not None:
        raise InvalidTransition(f"benchmark {benchmark!r} still needs model {name!r}")
    if deletion_plans.of_model(s, name):
        raise InvalidTransition(f"a deletion plan still needs model {name!r}")
    if (forgot := lineage.of_model(s, name)) is not None:
        detail = f"the next job for deletion requests on model {name!r} starts from what job {forgot} forgot"
        raise InvalidTransition(f"{detail}: it stays; register other weights under another name")
    audit.write(s, "model.removed", "model", name, tenant_id=DEFAULT)
    s.execute(delete(Model).where(Model.name == name))


def _entry(model: Model) -> ModelEntry:
    return ModelEntry.model_validate(model, from_attributes=True)
