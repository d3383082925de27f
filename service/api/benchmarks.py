"""Benchmarks: sets that a suite reads, uploaded once or fetched from the Hub, registered under a name, named by jobs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from fastapi import APIRouter, Depends, Response

from service import hub
from service.api.deps import Here, Page, Parts, Reads, Who, page, uploaded
from service.api.errors import declared, escaped
from service.api.guard import Guarded, needs
from service.api.once import OnceOnly
from service.api.shapes import BENCHMARKS_PATH, BenchmarkObject, SuiteObject, benchmark_object
from service.domain import gates, rows, scores
from service.domain.catalog import Suite, SuiteSet
from service.domain.errors import FieldProblem, InvalidRequest, NotFound, UnlearnError
from service.domain.identity import Principal, Scope
from service.domain.job import BenchmarkCreate, BenchmarkSpec, HubFile
from service.store import benchmarks, files, models
from service.store.files import Kept

router = APIRouter(tags=["benchmarks"], route_class=Guarded)


class Fetched(NamedTuple):
    """A set of the Hub, on its way to becoming a file like an uploaded one."""

    kept: Kept
    rows: int


@router.get(
    "/v1/suites",
    summary="Suites, their sets and their figures",
    dependencies=[needs(Scope.JOBS_READ)],
    responses=declared(),
)
def list_suites(here: Here) -> Page[SuiteObject]:
    """`request` is measured for every job, as far as the columns of its sets allow; the others are for benchmarks."""
    suites = here.catalog.suites
    data = [SuiteObject(id=name, **suite.model_dump()) for name, suite in sorted(suites.items())]
    return page(data, sorted(suites), has_more=False)


@router.post(
    BENCHMARKS_PATH,
    status_code=201,
    summary="Register a benchmark",
    dependencies=[needs(Scope.JOBS_CREATE), Depends(Reads("application/json"))],
    responses=declared(400, 409, 413, 415, 503, 507),
)
def register(here: Here, who: Who, once: OnceOnly, request: BenchmarkCreate, response: Response) -> BenchmarkObject:
    """Files that were uploaded as `eval_set`, under the names that `GET /v1/suites` gives the sets; one may serve twice.

    Instead of a file's id, a set may be a file of a public data set on the Hugging Face Hub, at one commit, where this
    deployment fetches from there. It is fetched now, judged as an upload is, and kept as an `eval_set`.

    Forget quality and `privleak` compare with a model that never saw the forget set: give one that is registered, or its
    figures, uploaded as `eval_scores`. Without either they have no value, and the report says why.
    """
    problems = list(_problems(here, request))
    if problems:
        raise InvalidRequest(*problems)
    with _from_hub(here, who, request) as fetched:
        ids = {of: one.kept.file_id for of, one in fetched.items()}
        spec = BenchmarkSpec.model_validate(request.model_dump() | {"sets": request.sets | ids})
        with here.sessions.begin() as s:
            once.first(s)
            for one in fetched.values():
                files.insert(s, one.kept, purpose="eval_set", rows=one.rows)
            answer = benchmark_object(benchmarks.add(s, spec))
            headers = {"Location": f"{BENCHMARKS_PATH}/{answer.id}"}
            once.keep(s, answer, headers)
    response.headers.update(headers)
    return answer


@router.get(
    BENCHMARKS_PATH, summary="Registered benchmarks", dependencies=[needs(Scope.JOBS_READ)], responses=declared(503)
)
def list_benchmarks(here: Here) -> Page[BenchmarkObject]:
    with here.sessions.begin() as s:
        data = [benchmark_object(row) for row in benchmarks.every(s)]
    return page(data, [one.id for one in data], has_more=False)


@router.get(
    f"{BENCHMARKS_PATH}/{{name}}",
    summary="One benchmark",
    dependencies=[needs(Scope.JOBS_READ)],
    responses=declared(404, 503),
)
def get_benchmark(here: Here, name: str) -> BenchmarkObject:
    with here.sessions.begin() as s:
        return benchmark_object(benchmarks.get(s, name))


@router.delete(
    f"{BENCHMARKS_PATH}/{{name}}",
    status_code=204,
    summary="Forget a benchmark",
    dependencies=[needs(Scope.JOBS_CREATE)],
    responses=declared(404, 409, 503),
)
def delete_benchmark(here: Here, who: Who, name: str) -> None:
    """What models said of it is deleted; its files stay, and can be deleted then. Refused while a job needs it."""
    with here.sessions.begin() as s:
        benchmarks.remove(s, name)
        here.storage.delete(benchmarks.folder(who.tenant, name))  # before the commit: nobody else would delete it


# --- what is wrong with a registration


def _problems(here: Parts, asked: BenchmarkCreate) -> Iterator[FieldProblem]:
    suite = here.catalog.suites[asked.suite]
    if asked.name in gates.RESERVED:
        detail = f"figures of other kinds begin with {asked.name!r}; choose another name"
        yield FieldProblem("/name", detail, "reserved")
    yield from _missing(asked, suite)
    for name, given in asked.sets.items():
        pointer = f"/sets{escaped(name)}"
        if name not in suite.sets:
            detail = f"{asked.suite} has no set {name!r}; it has: {', '.join(suite.sets)}"
            yield FieldProblem(pointer, detail, "enum")
        elif isinstance(given, HubFile):
            yield from _of_hub_file(here, suite.sets[name], given, pointer)
        else:
            yield from _of_file(here, suite.sets[name], given, pointer)
    if asked.retrained_model is not None:
        yield from _of_retrained_model(here, asked.retrained_model)
    if asked.retrained_scores is not None:
        yield from _of_retrained_scores(here, asked, suite, asked.retrained_scores)


def _missing(asked: BenchmarkCreate, suite: Suite) -> Iterator[FieldProblem]:
    missing = [name for name, form in suite.sets.items() if form.required and name not in asked.sets]
    for name in missing:
        yield FieldProblem("/sets", f"{asked.suite} needs the set {name!r}: {suite.sets[name].what}", "missing")


def _of_file(here: Parts, form: SuiteSet, file_id: str, pointer: str) -> Iterator[FieldProblem]:
    """Every row of it."""
    try:
        with uploaded(here, file_id, "eval_set", pointer) as content:
            for _ in rows.each_object(rows.lines(content), pointer, form.columns):
                pass
    except InvalidRequest as error:
        yield from error.problems


def _of_hub_file(here: Parts, form: SuiteSet, given: HubFile, pointer: str) -> Iterator[FieldProblem]:
    """What can be told before it is fetched."""
    if not here.settings.hub_datasets:
        detail = (
            "this deployment does not fetch from the Hub; download the file, upload it (POST /v1/files, "
            "purpose=eval_set), and give the id that is answered"
        )
        yield FieldProblem(pointer, detail, "hub_disabled")
    known = (*form.columns, *form.optional)
    for ours in given.columns:
        if ours not in known:
            detail = f"the set has no column {ours!r}; it has: {', '.join(known)}"
            yield FieldProblem(f"{pointer}/columns{escaped(ours)}", detail, "enum")


def _of_retrained_model(here: Parts, name: str) -> Iterator[FieldProblem]:
    try:
        with here.sessions.begin() as s:
            models.get(s, name)
    except NotFound:
        detail = f"model {name!r} is not registered; GET /v1/models lists those that are"
        yield FieldProblem("/retrained_model", detail, "model_not_found")


def _of_retrained_scores(here: Parts, asked: BenchmarkCreate, suite: Suite, file_id: str) -> Iterator[FieldProblem]:
    """Also where they are of other rows than the sets that are uploaded; those of the Hub a job compares."""
    pointer = "/retrained_scores"
    try:
        with uploaded(here, file_id, "eval_scores", pointer) as content:
            stored = scores.read(content.read(scores.BYTES_MAX + 1), pointer)
    except InvalidRequest as error:
        yield from error.problems
        return
    if not stored.figures.keys() & suite.figures.keys():
        detail = f"has none of the figures of {asked.suite}: {', '.join(suite.figures)}"
        yield FieldProblem(pointer, detail, "figures")
    for name, given in asked.sets.items():
        if name not in suite.sets or isinstance(given, HubFile):
            continue
        try:
            with uploaded(here, given, "eval_set", pointer) as content:
                found = scores.mismatch(stored, name, rows.each_object(rows.lines(content)))
        except InvalidRequest:  # what is wrong with the set itself has its own problem
            continue
        if found:
            yield FieldProblem(pointer, f"{found}; the retrained model must be evaluated on these very files", "rows")


# --- sets of the Hub


@contextmanager
def _from_hub(here: Parts, who: Principal, asked: BenchmarkCreate) -> Iterator[dict[str, Fetched]]:
    """The sets that are on the Hub, stored; gone again if the benchmark is refused.

    An error that is not a refusal may hide a commit that took place: then the bytes stay, for a benchmark may need them.
    """
    fetched, problems = dict[str, Fetched](), list[FieldProblem]()
    try:
        for name, given in asked.sets.items():
            if isinstance(given, HubFile):
                columns = here.catalog.suites[asked.suite].sets[name].columns
                try:
                    fetched[name] = _fetch(here, who, given, columns, f"/sets{escaped(name)}")
                except InvalidRequest as error:
                    problems += error.problems
        if problems:
            raise InvalidRequest(*problems)
        yield fetched
    except UnlearnError:
        for one in fetched.values():
            here.storage.delete(files.file_key(one.kept.file_id))
        raise


def _fetch(here: Parts, who: Principal, given: HubFile, required: list[str], pointer: str) -> Fetched:
    """Judged, then stored. Raises InvalidRequest, HubUnavailable, StorageFull, StorageUnavailable."""
    limit = here.settings.upload_max_bytes
    with hub.fetched(given, here.settings.hub_endpoint, limit, pointer) as path, path.open("rb") as content:

        def lines() -> Iterator[bytes]:
            return hub.lines(content, given.columns, limit, pointer)

        count = sum(1 for _ in rows.each_object(lines(), pointer, required))
        kept = files.keep(here.storage, here.secrets, who.tenant, str(given), (line + b"\n" for line in lines()))
    return Fetched(kept, count)
