"""Benchmarks: sets that a suite reads, uploaded once, registered under a name, and named by jobs."""

from collections.abc import Iterator

from fastapi import APIRouter, Depends, Response

from service.api.deps import Here, Page, Parts, Reads, page, uploaded
from service.api.errors import declared, escaped
from service.api.shapes import BENCHMARKS_PATH, BenchmarkObject, SuiteObject, benchmark_object
from service.domain import gates, rows, scores
from service.domain.catalog import Suite
from service.domain.errors import FieldProblem, InvalidRequest, NotFound
from service.domain.job import BenchmarkCreate
from service.store import benchmarks, models

router = APIRouter(tags=["benchmarks"])


@router.get("/v1/suites", summary="Suites, their sets and their figures", responses=declared())
def list_suites(here: Here) -> Page[SuiteObject]:
    """`request` is measured for every job, as far as the columns of its sets allow; the others are for benchmarks."""
    suites = here.catalog.suites
    data = [SuiteObject(id=name, **suite.model_dump()) for name, suite in sorted(suites.items())]
    return page(data, sorted(suites), has_more=False)


@router.post(
    BENCHMARKS_PATH,
    status_code=201,
    summary="Register a benchmark",
    dependencies=[Depends(Reads("application/json"))],
    responses=declared(400, 409, 413, 415, 503),
)
def register(here: Here, request: BenchmarkCreate, response: Response) -> BenchmarkObject:
    """Files that were uploaded as `eval_set`, under the names that `GET /v1/suites` gives the sets; one may serve twice.

    Forget quality and `privleak` compare with a model that never saw the forget set: give one that is registered, or its
    figures, uploaded as `eval_scores`. Without either they have no value, and the report says why.
    """
    problems = list(_problems(here, request))
    if problems:
        raise InvalidRequest(*problems)
    with here.sessions.begin() as s:
        answer = benchmark_object(benchmarks.add(s, request))
    response.headers["Location"] = f"{BENCHMARKS_PATH}/{answer.id}"
    return answer


@router.get(BENCHMARKS_PATH, summary="Registered benchmarks", responses=declared(503))
def list_benchmarks(here: Here) -> Page[BenchmarkObject]:
    with here.sessions.begin() as s:
        data = [benchmark_object(row) for row in benchmarks.every(s)]
    return page(data, [one.id for one in data], has_more=False)


@router.get(f"{BENCHMARKS_PATH}/{{name}}", summary="One benchmark", responses=declared(404, 503))
def get_benchmark(here: Here, name: str) -> BenchmarkObject:
    with here.sessions.begin() as s:
        return benchmark_object(benchmarks.get(s, name))


@router.delete(
    f"{BENCHMARKS_PATH}/{{name}}", status_code=204, summary="Forget a benchmark", responses=declared(404, 409, 503)
)
def delete_benchmark(here: Here, name: str) -> None:
    """What models said of it is deleted; its files stay, and can be deleted then. Refused while a job needs it."""
    with here.sessions.begin() as s:
        benchmarks.remove(s, name)
        here.storage.delete(benchmarks.folder(name))  # before the commit, as with files


# --- what is wrong with a registration


def _problems(here: Parts, asked: BenchmarkCreate) -> Iterator[FieldProblem]:
    suite = here.catalog.suites[asked.suite]
    if asked.name in gates.RESERVED:
        detail = f"figures of other kinds begin with {asked.name!r}; choose another name"
        yield FieldProblem("/name", detail, "reserved")
    yield from _missing(asked, suite)
    for name, file_id in asked.sets.items():
        yield from _of_set(here, asked.suite, suite, name, file_id)
    if asked.retrained_model is not None:
        yield from _of_retrained_model(here, asked.retrained_model)
    if asked.retrained_scores is not None:
        yield from _of_retrained_scores(here, asked.suite, suite, asked.retrained_scores)


def _missing(asked: BenchmarkCreate, suite: Suite) -> Iterator[FieldProblem]:
    missing = [name for name, form in suite.sets.items() if form.required and name not in asked.sets]
    for name in missing:
        yield FieldProblem("/sets", f"{asked.suite} needs the set {name!r}: {suite.sets[name].what}", "missing")


def _of_set(here: Parts, suite_name: str, suite: Suite, name: str, file_id: str) -> Iterator[FieldProblem]:
    """The set's name, and every row of its file."""
    pointer = f"/sets{escaped(name)}"
    if name not in suite.sets:
        known = ", ".join(suite.sets)
        yield FieldProblem(pointer, f"{suite_name} has no set {name!r}; it has: {known}", "enum")
        return
    try:
        with uploaded(here, file_id, "eval_set", pointer) as content:
            for _ in rows.each_object(rows.lines(content), pointer, suite.sets[name].columns):
                pass
    except InvalidRequest as error:
        yield from error.problems


def _of_retrained_model(here: Parts, name: str) -> Iterator[FieldProblem]:
    try:
        with here.sessions.begin() as s:
            models.get(s, name)
    except NotFound:
        detail = f"model {name!r} is not registered; GET /v1/models lists those that are"
        yield FieldProblem("/retrained_model", detail, "model_not_found")


def _of_retrained_scores(here: Parts, suite_name: str, suite: Suite, file_id: str) -> Iterator[FieldProblem]:
    pointer = "/retrained_scores"
    try:
        with uploaded(here, file_id, "eval_scores", pointer) as content:
            figures = scores.read(content.read(scores.BYTES_MAX + 1), pointer)
    except InvalidRequest as error:
        yield from error.problems
        return
    if not figures.keys() & suite.figures.keys():
        detail = f"has none of the figures of {suite_name}: {', '.join(suite.figures)}"
        yield FieldProblem(pointer, detail, "figures")
