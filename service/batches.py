"""One job for the approved requests of a model that wait: their rows together, and the model's plan."""

from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime, timedelta
from typing import NamedTuple

import structlog
from pydantic import ValidationError
from sqlalchemy import func, update
from sqlalchemy.exc import SQLAlchemyError

from service.api import admission, tokens
from service.api.deps import Parts
from service.domain import overlap, rows
from service.domain.deletion import PlannedJob
from service.domain.errors import Gone, InvalidRequest, InvalidTransition, NotFound, StorageDamaged, UnlearnError
from service.domain.identity import SYSTEM, Principal, Scope
from service.domain.job import JobCreate
from service.store import deletion_jobs, deletion_plans, deletion_reads, digests, files, models, quotas, tenancy
from service.store.deletion_plans import Batch
from service.store.tables import DeletionRequest, File

FORGET, RETAIN = "forget_set", "retain_set"
NAMES = {FORGET: "deletion-requests.jsonl", RETAIN: "retained.jsonl"}
REASON_MAX = 1000
UNUSED_AGE = timedelta(hours=1)  # of a set that a crash kept from its job: then it is purged

UNREADABLE = (Gone, NotFound, StorageDamaged, InvalidRequest)  # and it stays so
CHANGED = frozenset({"deletion_request", "fork"})  # problems that another sweep, or a person, has just caused

log = structlog.get_logger(__name__)


class BatchesFailed(UnlearnError):
    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(f"deletion requests on these models are not served: {', '.join(sorted(set(names)))}")


class Stored(NamedTuple):
    file_id: str
    kept_until: datetime | None  # by the tenant's rule


def serve_deletions(here: Parts) -> int:
    """Makes the jobs that are due. How many.

    Two sweeps may both try: the request's row lets one of them serve it, and the other takes its file back.

    Raises BatchesFailed, after it has tried all, where an error kept some from being served: another sweep tries them again.
    """
    with here.sessions.begin() as s:
        due = deletion_plans.due(s)
    made, failed = 0, list[str]()
    for batch in due:
        tenant_id = batch.plan.tenant_id
        bound = here._replace(sessions=tenancy.bound(here.sessions, tenant_id, SYSTEM))
        who = Principal(SYSTEM, tenant_id, frozenset({Scope.JOBS_CREATE}))
        try:
            made += _serve(bound, who, batch)
        except Exception as error:  # other batches go on
            failed.append(batch.plan.model)
            trace = not isinstance(error, (UnlearnError, SQLAlchemyError))  # the storage or the database is away
            fields = {"model": batch.plan.model, "tenant": tenant_id, "error": error}
            log.error("deletion requests are not served", **fields, exc_info=trace)
    if failed:
        raise BatchesFailed(failed)
    return made


def _serve(here: Parts, who: Principal, batch: Batch) -> bool:
    """Whether a job was made. A request that no job can serve fails, and the others go on without it."""
    with here.sessions.begin() as s:
        if quotas.full(s, who.tenant) is not None:  # told before their rows are put together, at every sweep
            log.info("deletion requests wait: the tenant has as many open jobs as it may", model=batch.plan.model)
            return False
    try:
        recipe = PlannedJob.model_validate(batch.plan.job, extra="ignore")
    except ValidationError:
        _suspend(here, batch, "another version of the service wrote it")
        return False
    try:  # before the requests' files: where the service has the wrong MASTER_KEY, none of them is to blame
        for _ in _lines(here, recipe.retain_set):
            pass
    except UNREADABLE as error:
        _suspend(here, batch, f"its retain set cannot be read: {error}")
        return False
    unfit = dict(_unreadable(here, who, batch.requests))
    unfit |= _too_long(here, batch.plan.model, [request for request in batch.requests if request.id not in unfit])
    shared = _shared(here, who, batch, recipe, [one for one in batch.requests if one.id not in unfit])
    unfit |= shared.unfit
    for request_id, reason in unfit.items():
        with here.sessions.begin() as s:
            deletion_jobs.fail(s, request_id, batch.plan.model, reason[:REASON_MAX])
        log.warning("a deletion request cannot be served", request_id=request_id)
    requests = [request for request in batch.requests if request.id not in unfit]
    return bool(requests) and _submit(here, who, batch, recipe, requests, shared.left_out)


def _submit(
    here: Parts,
    who: Principal,
    batch: Batch,
    recipe: PlannedJob,
    requests: Sequence[DeletionRequest],
    left_out: AbstractSet[int],
) -> bool:
    forget = _store(here, who, FORGET, _rows_of(here, who, requests))
    retain = _without(here, who, batch.plan.model, recipe.retain_set, left_out) if left_out else None
    made = [forget] if retain is None else [forget, retain]
    asked = JobCreate.model_validate(
        recipe.model_dump()
        | {
            "model": batch.plan.model,
            "forget_set": forget.file_id,
            "retain_set": recipe.retain_set if retain is None else retain.file_id,
            "parent": batch.parent,
            "due_at": min(request.due_at for request in requests),
            "deletion_requests": [request.id for request in requests],
        }
    )
    try:
        job = admission.submit(here, who, asked)
    except InvalidTransition as error:  # it was taken back, or another sweep was faster
        _purge(here, made)
        log.info("a batch of deletion requests has changed meanwhile", model=batch.plan.model, reason=error)
        return False
    except InvalidRequest as error:
        _purge(here, made)
        if CHANGED.issuperset(problem.code for problem in error.problems):
            log.info("a batch of deletion requests has changed meanwhile", model=batch.plan.model, reason=error)
            return False
        _suspend(here, batch, str(error))
        return False
    except UnlearnError:
        _purge(here, made)
        raise
    with here.sessions.begin() as s:
        for stored in made:  # unless the job has ended meanwhile, and its requests with it: then they are due
            kept = update(File).where(File.id == stored.file_id, File.purge_at > func.now())
            s.execute(kept.values(purge_at=stored.kept_until), execution_options={"synchronize_session": False})
    log.info("a job serves deletion requests", job_id=job.id, model=batch.plan.model, requests=len(requests))
    return True


def _unreadable(here: Parts, who: Principal, requests: Iterable[DeletionRequest]) -> Iterator[tuple[str, str]]:
    """By request whose rows cannot be had, or are not those that it was submitted with: why."""
    for request in requests:
        with here.sessions.begin() as s:
            submitted = deletion_reads.with_digests(s, request.id).row_digests
        try:
            found = set(
                digests.row_digests(here.secrets, who.tenant, map(rows.parse, _lines(here, request.forget_set)))
            )
        except UNREADABLE as error:
            yield request.id, f"its forget set cannot be read: {error}"
            continue
        if missing := [number for number, digest in enumerate(submitted, start=1) if digest not in found]:
            yield request.id, f"its row {missing[0]} is not in its forget set, by the digest that was kept of it"


def _too_long(here: Parts, model: str, requests: Iterable[DeletionRequest]) -> Iterator[tuple[str, str]]:
    """By request that has rows which are longer than the model's context: which. They could not be counted when it came in."""
    with here.sessions.begin() as s:
        entry = models.get(s, model)
    for request in requests:
        examples = map(rows.parse, _lines(here, request.forget_set))
        for problem in tokens.long_rows(here.settings, entry, examples, "/forget_set"):
            yield request.id, problem.detail


class _Shared(NamedTuple):
    left_out: AbstractSet[int]  # numbers of rows of the plan's retain set, from 1
    unfit: Mapping[str, str]  # by request that the rows which it shares with that set keep from being served: why


def _shared(
    here: Parts, who: Principal, batch: Batch, recipe: PlannedJob, requests: Sequence[DeletionRequest]
) -> _Shared:
    """What becomes of rows that the plan's retain set shares with requests, white space at their ends aside.

    Those of requests that leave theirs out of it are left out: of earlier requests, or the model would learn them again, then of
    these, then of those that still wait. A request whose rows would leave nothing to retain does not have them left out. What
    is retained all the same, no request of the batch may want forgotten.
    """
    with here.sessions.begin() as s:
        others = deletion_reads.left_out(s, batch.plan.model)
    own = {request.id for request in requests}
    by_digest, by_row = dict[str, list[str]](), dict[bytes, dict[str, int]]()
    for other in others:
        for digest in set(other.row_digests):
            by_digest.setdefault(digest, []).append(other.request_id)
    for request in requests:
        for number, line in enumerate(_lines(here, request.forget_set), start=1):
            by_row.setdefault(overlap.exact(rows.parse(line)), {}).setdefault(request.id, number)
    shares, wanted, count = (
        dict[str, set[int]](),
        dict[str, dict[int, int]](),
        0,
    )  # by request; `wanted`: by retained row
    for count, example in enumerate(map(rows.parse, _lines(here, recipe.retain_set)), start=1):
        for request_id, number in by_row.get(overlap.exact(example), {}).items():
            shares.setdefault(request_id, set()).add(count)
            wanted.setdefault(request_id, {})[count] = number
        for digest in digests.same_row_digests(here.secrets, who.tenant, example) if by_digest else ():
            for request_id in by_digest.get(digest, []):
                shares.setdefault(request_id, set()).add(count)

    earlier = [other.request_id for other in others if other.served and other.request_id not in own]
    waiting = [other.request_id for other in others if not other.served and other.request_id not in own]
    flagged = [request.id for request in requests if request.leave_out_retained]
    left_out, unfit = set[int](), dict[str, str]()
    for request_id in (*earlier, *flagged, *waiting):
        without = left_out | shares.get(request_id, set())
        if len(without) < count:
            left_out = without
        elif request_id in own:
            unfit[request_id] = "without its rows, and those left out for others, the plan's retain set would be empty"
    for request_id, numbers in wanted.items():
        retained = min(numbers.keys() - left_out, default=None)
        if retained is not None:
            detail = f"its row {numbers[retained]} is row {retained} of the plan's retain set"
            unfit.setdefault(request_id, detail)
    return _Shared(left_out, unfit)


def _rows_of(here: Parts, who: Principal, requests: Iterable[DeletionRequest]) -> Iterator[bytes]:
    """The rows of all of them, each once, with all their columns."""
    seen = set[str]()
    for request in requests:
        for line in _lines(here, request.forget_set):
            [digest] = digests.row_digests(here.secrets, who.tenant, [rows.parse(line)])
            if digest not in seen:
                seen.add(digest)
                yield line


def _without(here: Parts, who: Principal, model: str, retain_set: str, left_out: AbstractSet[int]) -> Stored:
    """The plan's retain set without the rows of these numbers."""
    log.info("rows are left out of a plan's retain set", model=model, rows=len(left_out))
    lines = enumerate(_lines(here, retain_set), start=1)
    return _store(here, who, RETAIN, (line for number, line in lines if number not in left_out))


def _store(here: Parts, who: Principal, purpose: str, lines: Iterable[bytes]) -> Stored:
    """As a new file, to be purged unless a job is made."""
    count = 0

    def counted() -> Iterator[bytes]:
        nonlocal count
        for line in lines:
            count += 1
            yield line + b"\n"

    kept = files.keep(here.storage, here.secrets, who.tenant, NAMES[purpose], counted())
    with here.sessions.begin() as s:
        file = files.insert(s, kept, purpose=purpose, rows=count)
        kept_until, file.purge_at = file.purge_at, func.now() + UNUSED_AGE
        return Stored(file.id, kept_until)


def _lines(here: Parts, file_id: str) -> Iterator[bytes]:
    with here.sessions.begin() as s:
        file = files.get(s, file_id)
    with files.content(here.storage, here.secrets, file) as content:
        for line in rows.lines(content):
            if plain := line.removeprefix(BOM_UTF8).strip():
                yield plain


def _purge(here: Parts, made: Iterable[Stored]) -> None:
    for stored in made:
        with here.sessions.begin() as s:
            key = files.purge(s, stored.file_id)
        here.storage.delete(key)


def _suspend(here: Parts, batch: Batch, reason: str) -> None:
    log.error("a deletion plan is suspended", model=batch.plan.model, tenant=batch.plan.tenant_id)
    with here.sessions.begin() as s:
        deletion_plans.suspend(s, batch.plan, reason[:REASON_MAX])
