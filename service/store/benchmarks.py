"""The registry of benchmarks. The caller commits."""

from collections.abc import Sequence

from sqlalchemy import Select, SQLColumnExpression, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.domain.errors import InvalidTransition, NotFound
from service.domain.job import TERMINAL, BenchmarkSpec
from service.store import audit, idempotency, tenancy
from service.store.tables import Benchmark, File, Job, Model


def add(s: Session, asked: BenchmarkSpec) -> Benchmark:
    """Its files and its retrained model stay as long as it does. Raises NotFound for one of them.

    Raises InvalidTransition if the name is taken: jobs and reports name a benchmark, so a name never changes its meaning.
    """
    files = {file for file in (*asked.sets.values(), asked.retrained_scores) if file is not None}
    found = select(File.id).where(File.id.in_(files), File.purged_at.is_(None)).order_by(File.id)
    if missing := files - set(s.scalars(found.with_for_update(key_share=True, read=True))):
        raise NotFound("file", min(missing))
    if asked.retrained_model is not None:
        model = select(Model.name).where(Model.name == asked.retrained_model)
        if s.scalar(model.with_for_update(key_share=True, read=True)) is None:
            raise NotFound("model", asked.retrained_model)
    owned = {"tenant_id": tenancy.tenant(s), **asked.model_dump(mode="json")}
    row = insert(Benchmark).values(owned).on_conflict_do_nothing()
    if s.scalar(row.returning(Benchmark.name)) is None:
        raise InvalidTransition(f"a benchmark {asked.name!r} is registered; remove it first, or choose another name")
    audit.write(s, "benchmark.registered", "benchmark", asked.name, {"suite": asked.suite})
    return get(s, asked.name)


def get(s: Session, name: str) -> Benchmark:
    """Of the session's tenant."""
    benchmark = s.get(Benchmark, (tenancy.tenant(s), name))
    if benchmark is None:
        raise NotFound("benchmark", name)
    return benchmark


def every(s: Session) -> Sequence[Benchmark]:
    return s.scalars(select(Benchmark).order_by(Benchmark.name)).all()


def using(file_id: SQLColumnExpression[str]) -> Select[str]:
    """Names of benchmarks that need the file."""
    value = func.jsonb_each_text(Benchmark.sets).table_valued("key", "value").alias("of_set")
    in_sets = select(value.c.value).where(value.c.value == file_id).exists()
    return select(Benchmark.name).where(in_sets | (Benchmark.retrained_scores == file_id))


def of_model(s: Session, model: str) -> str | None:
    """A benchmark whose retrained reference is the model."""
    return s.scalar(select(Benchmark.name).where(Benchmark.retrained_model == model).limit(1))


def folder(tenant_id: str, name: str) -> str:
    """Where workers keep what models said of its texts, below the storage root."""
    return f"benchmarks/{tenant_id}/{name}"


def remove(s: Session, name: str) -> None:
    """Of the session's tenant. Forgets the entry; its files stay. Raises InvalidTransition while a job needs it."""
    # The lock waits for a job that is just being created with it, and makes a later one find it gone.
    if s.scalar(select(Benchmark.name).where(Benchmark.name == name).with_for_update()) is None:
        raise NotFound("benchmark", name)
    names_it = Job.spec["benchmarks"].contains([name])
    user = s.scalar(select(Job.id).where(Job.status.not_in(TERMINAL), names_it).limit(1))
    if user is not None:
        raise InvalidTransition(f"job {user} still needs benchmark {name!r}")
    s.execute(delete(Benchmark).where(Benchmark.name == name))
    idempotency.withdraw(s, tenancy.tenant(s), f"benchmarks/{name}")
    audit.write(s, "benchmark.removed", "benchmark", name)
