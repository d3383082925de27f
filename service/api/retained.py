"""Rows of a retain set that the model is to forget, or has been made to forget."""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from service.api import sets
from service.api.deps import Parts
from service.domain import overlap, rows
from service.domain.errors import FieldProblem, Gone, NotFound, StorageDamaged
from service.domain.identity import Principal
from service.domain.job import ModelEntry
from service.store import deletion_plans, deletion_reads, digests, files, lineage
from service.store.rows import WarningRow
from service.store.tables import File

JUDGED_BYTES = 4 * 2**20  # of a plan's retain set, at the submission of a request: half a second's work

Numbers = Mapping[bytes, int]  # by overlap.exact: the number of a row in its set, from 1
Read = dict[
    str, Numbers
]  # by model: what was read of its plan's retain set, so that a batch of requests reads each once


def in_plans(
    here: Parts, who: Principal, entries: Sequence[ModelEntry], forget: Numbers, read: Read
) -> Iterator[WarningRow]:
    """One for each model whose plan retains rows that a request wants forgotten, and does not leave them out for another request.

    Not where the plan's retain set is large, or cannot be read: that is found when a job is to be made.
    """
    for entry in entries:
        if entry.name not in read:
            read[entry.name] = _retained(here, who, entry.name)
        retained = read[entry.name]
        pairs = sorted((number, retained[row]) for row, number in forget.items() if row in retained)
        if pairs:
            yield WarningRow(
                "row_retained",
                f"rows of the forget set that the deletion plan of model {entry.name!r} retains: {len(pairs)} "
                f"(forget = retain): {overlap.named(pairs)}; the plan cannot serve the request unless it is approved, or "
                "requeued, with leave_out_retained, or the plan is put with a retain set without them",
            )


def _retained(here: Parts, who: Principal, model: str) -> Numbers:
    """What jobs of the model's plan retain, as far as it is known before one is made."""
    found = dict[bytes, int]()
    with here.sessions.begin() as s:
        retain_set = deletion_plans.retain_set(s, model)
        if retain_set is None:
            return found
        file = files.get(s, retain_set)
        left_out = {digest for request in deletion_reads.left_out(s, model) for digest in request.row_digests}
    if file.bytes > JUDGED_BYTES:
        return found
    try:
        with files.content(here.storage, here.secrets, file) as content:
            for number, row in enumerate(rows.each(rows.lines(content)), start=1):
                if not left_out or left_out.isdisjoint(digests.same_row_digests(here.secrets, who.tenant, row)):
                    found.setdefault(overlap.exact(row), number)
    except (Gone, NotFound, StorageDamaged):
        return {}
    return found


def forgotten_before(
    here: Parts,
    who: Principal,
    retain_set: sets.Given,
    parent: str | None,
    model: str,
    left_out: AbstractSet[str] = frozenset(),
) -> Iterator[FieldProblem]:
    """Rows of the retain set that the model of the job to start from was made to forget, by that job or one before it.

    By keyed digest, which is kept of a deletion request's rows; of others only as long as the rows are.

    Args:
        left_out: digests of rows that will not be retained.
    """
    if parent is None:
        return
    forgotten, both = _forgotten(here, who, parent, model), list[tuple[int, str]]()
    with sets.opened(here, retain_set, "retain_set") as retain:
        for number, row in enumerate(retain, start=1):
            same = digests.same_row_digests(here.secrets, who.tenant, row)
            job = next((forgotten[digest] for digest in same if digest in forgotten), None)
            if job is not None and left_out.isdisjoint(same):
                both.append((number, job))
    for number, job_id in both[: overlap.NAMED_MAX]:
        yield FieldProblem("/retain_set", f"retain row {number} was forgotten by job {job_id}", "overlap")
    if more := len(both[overlap.NAMED_MAX :]):
        yield FieldProblem("/retain_set", f"and {more} more", "overlap")


def _forgotten(here: Parts, who: Principal, parent: str, model: str) -> dict[str, str]:
    """By digest of a row: the job that forgot it. A job's set is read only where it has rows that are no request's."""
    found, unread = dict[str, str](), list[tuple[str, File]]()
    with here.sessions.begin() as s:
        chain = lineage.chain(s, parent)
        for job in [*chain, *lineage.forgotten_already(s, model, [job.id for job in chain])]:
            of_requests = set(deletion_reads.digests_of_job(s, job.id))
            found |= dict.fromkeys(of_requests, job.id)
            file = files.get(s, job.forget_set)
            if file.rows != len(of_requests):  # it has all of theirs
                unread.append((job.id, file))
    for job_id, file in unread:
        try:
            with files.content(here.storage, here.secrets, file) as content:
                found |= dict.fromkeys(
                    digests.row_digests(here.secrets, who.tenant, rows.each(rows.lines(content))), job_id
                )
        except (Gone, NotFound, StorageDamaged):  # purged: digests are left of it, if any request's rows are in it
            continue
    return found
