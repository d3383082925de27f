"""Is the request possible? Everything that can be told without the model is told here, before a job exists."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from service.api import shown
from service.api.deps import Parts, uploaded
from service.api.shapes import JobObject
from service.domain import gates, rows
from service.domain.errors import FieldProblem, InvalidRequest, NotFound, UnlearnError
from service.domain.job import SETS, SPACE_WARNING, JobCreate, JobSpec, ModelEntry, Row
from service.domain.rows import Example
from service.store import benchmarks, files, jobs, models
from service.store.rows import WarningRow
from service.store.storage import Stored

OVERLAPS_NAMED = 20
# The last part of the names by which architectures call their head and the embeddings that may be tied to it.
HEADS = frozenset(
    {
        "lm_head",
        "embed_out",
        "output_projection",
        "embed_tokens",
        "embed_in",
        "wte",
        "word_embeddings",
        "tok_embeddings",
    }
)


Kinds = dict[str, int]  # the kinds of rows that a set has, and the number of the first row of each


class Inline(NamedTuple):
    """Rows of the request, on their way to becoming a file."""

    file_id: str
    purpose: str
    rows: int
    stored: Stored


def submit(here: Parts, request: JobCreate) -> JobObject:
    """A queued job, committed, its bell rung, as it was then. Raises InvalidRequest; then neither row nor file is kept."""
    entry = _model(here, request.model)
    hyperparameters = here.catalog.complete(request.method.type, request.method.hyperparameters)
    problems = [
        *_gpu_class(here, request),
        *_target_modules(request),
        *_refusals_unused(here, request, hyperparameters),
        *_benchmarks_and_gates(here, request),
    ]
    if problems:
        raise InvalidRequest(*problems)
    forget, retain = _judge_sets(here, request)
    if "text" in forget and here.catalog.teaches_refusals(request.method.type, hyperparameters):
        detail = f"{request.method.type} teaches to refuse questions; row {forget['text']} is a text, which asks none"
        raise InvalidRequest(FieldProblem("/forget_set", detail, "kind"))
    _judge_refusals(here, request)

    with _inline_files(here, request) as inline:
        ids = {one.purpose: one.file_id for one in inline}
        asked = request.model_dump(exclude={"method", *SETS})
        if request.resources.gpu_class == "any":  # the request leaves it open, the model may not
            asked["resources"]["gpu_class"] = entry.gpu_class
        sets = {purpose: getattr(request, purpose) for purpose in SETS} | ids
        method = {"type": request.method.type, "hyperparameters": hyperparameters}
        spec = JobSpec.model_validate(asked | sets | {"method": method})
        with here.sessions.begin() as s:
            for one in inline:
                name = f"{one.purpose}.jsonl"
                files.insert(s, one.file_id, purpose=one.purpose, name=name, rows=one.rows, **one.stored._asdict())
            job = jobs.create(s, spec, _warnings(entry, {*forget, *retain}), rings=True)
            answer = shown.job_object(s, job)
    here.dispatcher.ring(job.gpu_class)  # after the commit; a bell that nobody hears, the sweep rings again
    return answer


def _model(here: Parts, name: str) -> ModelEntry:
    try:
        with here.sessions.begin() as s:
            return models.get(s, name)
    except NotFound as error:
        raise InvalidRequest(
            FieldProblem(
                "/model", f"model {name!r} is not registered; GET /v1/models lists those that are", "model_not_found"
            )
        ) from error


def _gpu_class(here: Parts, request: JobCreate) -> Iterator[FieldProblem]:
    known = here.settings.gpu_classes
    if request.resources.gpu_class not in known:
        yield FieldProblem("/resources/gpu_class", f"the GPU classes are: {', '.join(known)}", "enum")


def _target_modules(request: JobCreate) -> Iterator[FieldProblem]:
    for index, name in enumerate(request.lora.target_modules or ()):
        if name.rpartition(".")[2] in HEADS:
            yield FieldProblem(
                f"/lora/target_modules/{index}",
                f"{name!r} is the language-model head, or embeddings that may be tied to it: no adapter goes there",
                "head",
            )


def _refusals_unused(here: Parts, request: JobCreate, hyperparameters: Mapping[str, Any]) -> Iterator[FieldProblem]:
    method = request.method.type
    if request.refusal_set is not None and not here.catalog.teaches_refusals(method, hyperparameters):
        yield FieldProblem("/refusal_set", f"{method} does not teach a refusal, so it would not be used", "unused")


def _benchmarks_and_gates(here: Parts, request: JobCreate) -> Iterator[FieldProblem]:
    named = dict[str, gates.Named]()
    for index, name in enumerate(request.benchmarks):
        pointer = f"/benchmarks/{index}"
        if name in named:
            yield FieldProblem(pointer, f"benchmark {name!r} is named twice", "duplicate")
            continue
        try:
            with here.sessions.begin() as s:
                found = benchmarks.get(s, name)
            retrained = found.retrained_model is not None or found.retrained_scores is not None
            named[name] = gates.Named(found.suite, retrained)
        except NotFound:
            detail = f"benchmark {name!r} is not registered; GET /v1/benchmarks lists those that are"
            yield FieldProblem(pointer, detail, "benchmark_not_found")
    yield from gates.problems(request, here.catalog, named)


def _judge_refusals(here: Parts, request: JobCreate) -> None:
    """Raises InvalidRequest unless every row is a text."""
    if request.refusal_set is None:
        return
    with _opened(here, request, "refusal_set") as refusals:
        wrong = [number for number, row in enumerate(refusals, start=1) if row.kind != "text"]
    if wrong:
        detail = f"a refusal is a row of `text`; row {wrong[0]} is not, nor are {len(wrong) - 1} others"
        raise InvalidRequest(FieldProblem("/refusal_set", detail, "kind"))


def _judge_sets(here: Parts, request: JobCreate) -> tuple[Kinds, Kinds]:
    """Of the forget and the retain set. Raises InvalidRequest if one cannot be had or is empty, or if sets share rows."""
    kinds: dict[str, Kinds] = {purpose: {} for purpose in SETS}

    def noted(examples: Iterator[Example], kinds: Kinds) -> Iterator[Example]:
        for number, example in enumerate(examples, start=1):
            kinds.setdefault(example.kind, number)
            yield example

    pairs = [("forget_set", "retain_set")]
    if request.holdout_set is not None:  # what the model was trained on, or is trained on now, is no holdout
        pairs += [("holdout_set", "forget_set"), ("holdout_set", "retain_set")]
    for one, other in pairs:
        with _opened(here, request, one) as first, _opened(here, request, other) as second:
            shared = rows.overlap(noted(first, kinds[one]), noted(second, kinds[other]))
        if shared:
            raise InvalidRequest(*_overlaps(one, other, shared))
    return kinds["forget_set"], kinds["retain_set"]


def _overlaps(one: str, other: str, shared: list[tuple[int, int]]) -> Iterator[FieldProblem]:
    names = one.removesuffix("_set"), other.removesuffix("_set")
    for first, second in shared[:OVERLAPS_NAMED]:
        yield FieldProblem(f"/{one}", f"{names[0]} row {first} is {names[1]} row {second}", "overlap")
    if more := len(shared[OVERLAPS_NAMED:]):
        yield FieldProblem(f"/{one}", f"and {more} more", "overlap")


@contextmanager
def _opened(here: Parts, request: JobCreate, purpose: str) -> Iterator[Iterator[Example]]:
    given = getattr(request, purpose)
    if isinstance(given, list):
        yield _inline_rows(given, purpose)
        return
    with uploaded(here, given, purpose, f"/{purpose}") as content:
        yield rows.each(rows.lines(content), f"/{purpose}")


def _inline_rows(given: list[Row], purpose: str) -> Iterator[Example]:
    problems = []
    for index, row in enumerate(given):
        try:
            yield rows.parse(rows.capped(_line(row).removesuffix(b"\n")))
        except ValueError as error:
            problems.append(FieldProblem(f"/{purpose}/{index}", f"row {index + 1}: {error}", "line"))
    if problems:
        raise InvalidRequest(*problems)


@contextmanager
def _inline_files(here: Parts, request: JobCreate) -> Iterator[list[Inline]]:
    """The bytes of inline rows, stored; gone again if the job is refused.

    An error that is not a refusal may hide a commit that took place: then the bytes stay, for a job may need them.
    """
    inline: list[Inline] = []
    try:
        for purpose in SETS:
            given = getattr(request, purpose)
            if isinstance(given, list):
                file_id = files.new_file_id()
                stored = here.storage.write(files.file_key(file_id), (_line(row) for row in given))
                inline.append(Inline(file_id, purpose, len(given), stored))
        yield inline
    except UnlearnError:
        for one in inline:
            here.storage.delete(files.file_key(one.file_id))
        raise


def _line(row: Row) -> bytes:
    return json.dumps(row.model_dump(exclude_none=True), ensure_ascii=False).encode() + b"\n"


def _warnings(entry: ModelEntry, kinds: set[str]) -> list[WarningRow]:
    if "question" in kinds and entry.prompt_format.ends_in_space:
        return [WarningRow("prompt_ends_in_space", f"model {entry.name!r}: {SPACE_WARNING}")]
    return []
