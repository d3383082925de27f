"""The line in which queued jobs wait, whoever's they are: who may be claimed, and in which order."""

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    FromClause,
    Select,
    Text,
    and_,
    bindparam,
    func,
    literal_column,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.orm import Session, aliased

from service.domain.job import Status
from service.store import quotas
from service.store.tables import Job, Tenant

# Not parameters: only so does Postgres see that the partial index has all of them, and what its expressions are.
QUEUED, ALWAYS, NONE = (text(f"'{Status.QUEUED}'"), text("'-infinity'"), text("0"))


def order(job: Any) -> tuple[ColumnElement[Any], ...]:
    """Priority, due date, time of queueing. `job`: the table, an alias of it, or a subquery with these columns."""
    return job.priority.desc(), job.due_at, job.queued_at, job.id  # ascending is NULLS LAST


def ready(job: Any) -> ColumnElement[bool]:
    """It waits, and does not rest."""
    return and_(job.status == QUEUED, func.coalesce(job.not_before, ALWAYS) <= func.now())


def first(s: Session, classes: Collection[str], vram_gib: float, most: int) -> Sequence[str]:
    """The first `most` jobs, in order, that such a worker can run and whose tenant may run another; nothing is locked.

    An index has a line for each tenant and GPU class, in order. Whatever is longer than this needs (that of a class which
    nobody asks for, that of a tenant at its bound) is not read; the first `most` of all lie in the `most` lines whose
    heads come first. So it costs a look into the index for each tenant and class, whatever the number of jobs, but for
    those at the head of a line that rest or do not fit, which are passed over one by one.
    """
    return s.connection().scalars(_first(most), {"classes": sorted({*classes, "any"}), "vram_gib": vram_gib}).all()


@cache  # to put it together takes longer than the answer
def _first(most: int) -> Select[str]:
    heard = func.unnest(bindparam("classes", type_=ARRAY(Text))).table_valued("gpu_class").render_derived("heard")
    lines = select(Tenant.id.label("tenant_id"), heard.c.gpu_class).join(heard, true()).where(~quotas.RUNS_MOST)
    heads = _firsts(lines.subquery(), 1, most)
    found = _firsts(heads, most, most)
    return select(found.c.id).order_by(*order(found.c))


def _firsts(lines: FromClause, of_each: int, most: int) -> FromClause:
    """The first `most` of all the lines, of each no more than `of_each`."""
    job = aliased(Job)
    mine = and_(job.tenant_id == lines.c.tenant_id, job.gpu_class == lines.c.gpu_class)
    fits = func.coalesce(job.min_vram_gib, NONE) <= bindparam("vram_gib")
    of_line = select(job.id, job.priority, job.due_at, job.queued_at).where(ready(job), mine, fits)
    found = of_line.order_by(*order(job)).limit(literal_column(str(of_each))).lateral()
    rows = select(lines.c.tenant_id, lines.c.gpu_class, *found.c).select_from(lines).join(found, true())
    return rows.order_by(*order(found.c)).limit(literal_column(str(most))).subquery()


def before(priority: int, due_at: Any) -> ColumnElement[bool]:
    """Of what is ready: those that come before a job that comes now."""
    due = Job.due_at <= due_at if due_at is not None else true()
    return or_(Job.priority > priority, and_(Job.priority == priority, due))
