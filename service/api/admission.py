"""Is the request possible? Everything that can be told without the model is told here, before a job exists."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from service.api import polling, retained, sets, shown, tokens
from service.api.deps import Parts
from service.api.once import ANEW, Once
from service.api.shapes import REPORT_JSON, JobObject
from service.domain import gates, modelsizes, overlap, recipe
from service.domain.deletion import PlannedJob
from service.domain.errors import FieldProblem, InvalidRequest, NotFound
from service.domain.identity import Principal
from service.domain.job import SETS, SPACE_WARNING, JobCreate, JobSpec, MethodChoice, ModelEntry, Resources
from service.domain.rows import Example
from service.store import (
    artifacts,
    benchmarks,
    deletion_jobs,
    deletion_reads,
    deletions,
    digests,
    jobs,
    lineage,
    models,
    reverifications,
)
from service.store.rows import WarningRow
from service.store.storage import Stored

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


Asked = JobCreate | PlannedJob
Kinds = dict[str, int]  # the kinds of rows that a set has, and the number of the first row of each


class JudgedSets(NamedTuple):
    forget: Kinds
    forget_rows: int
    retain: Kinds
    warnings: list[WarningRow]


class Judged(NamedTuple):
    """What is known of a request that can be carried out."""

    entry: ModelEntry
    method: MethodChoice  # with all its hyperparameters
    resources: Resources
    warnings: list[WarningRow]
    served: dict[str, list[int]]  # by deletion request: the numbers of its rows in the forget set
    forgets: frozenset[str]  # the digests of that set's rows, where it serves any


def submit(here: Parts, who: Principal, request: JobCreate, once: Once = ANEW) -> JobObject:
    """A queued job, committed, as it was then. Raises InvalidRequest; then neither row nor file is kept."""
    judged = judge(here, who, request)
    with sets.inline_files(here, who, {purpose: getattr(request, purpose) for purpose in SETS}) as inline:
        ids = {one.purpose: one.kept.file_id for one in inline}
        named = {purpose: getattr(request, purpose) for purpose in SETS} | ids
        settled = {"method": judged.method.model_dump(), "resources": judged.resources.model_dump()}
        spec = JobSpec.model_validate(request.model_dump(exclude={*settled, *SETS}) | named | settled)
        with here.sessions.begin() as s:
            once.first(s)
            sets.insert(s, inline)
            job = jobs.create(s, spec, judged.warnings, rings=True)
            if judged.served:
                lineage.lengthen(s, job, judged.forgets)
                deletion_jobs.serve(s, job, judged.served)
            answer = shown.job_object(s, job)
            once.keep(s, answer, polling.created(answer))
    here.dispatcher.ring(job.gpu_class)  # after the commit; a bell that nobody hears, the sweep rings again
    return answer


def reverify(here: Parts, job_id: str, once: Once) -> JobObject:
    """A queued reverification of the job, committed, as `submit` does it. Raises NotFound, InvalidTransition."""
    with here.sessions.begin() as s:
        spec = reverifications.spec(s, job_id)
        report = artifacts.named(s, job_id, REPORT_JSON)
    made_on = json.loads(b"".join(here.storage.verified(report.key, Stored(report.bytes, report.sha256))))["base_model"]
    with here.sessions.begin() as s:
        once.first(s)
        job = reverifications.create(s, spec, made_on, rings=True)
        answer = shown.job_object(s, job)
        once.keep(s, answer, polling.created(answer))
    here.dispatcher.ring(job.gpu_class)
    return answer


def judge(here: Parts, who: Principal, request: JobCreate) -> Judged:
    """Reads the sets, keeps nothing. Raises InvalidRequest."""
    entry = _model(here, request.model)
    hyperparameters = here.catalog.complete(request.method.type, request.method.hyperparameters)
    problems = [
        *_parent(here, request),
        *recipe_problems(here, entry, request, hyperparameters),
        *_requests(here, request),
    ]
    if problems:
        raise InvalidRequest(*problems)
    found = _judge_sets(here, request, entry)
    if "text" in found.forget and here.catalog.teaches_refusals(request.method.type, hyperparameters):
        detail = (
            f"{request.method.type} teaches to refuse questions; row {found.forget['text']} is a text, which asks none"
        )
        raise InvalidRequest(FieldProblem("/forget_set", detail, "kind"))
    _judge_refusals(here, request)
    if problems := list(retained.forgotten_before(here, who, request.retain_set, request.parent, request.model)):
        raise InvalidRequest(*problems)
    resources = request.resources
    if resources.gpu_class == "any":  # the request leaves it open, the model may not
        resources = resources.model_copy(update={"gpu_class": entry.gpu_class})
    served, forgets = _rows_of_requests(here, who, request) if request.deletion_requests else ({}, frozenset[str]())
    return Judged(
        entry,
        MethodChoice(type=request.method.type, hyperparameters=hyperparameters),
        resources,
        [
            *_warnings(entry, {*found.forget, *found.retain}),
            *found.warnings,
            *map(WarningRow._make, recipe.warnings(request, found.forget_rows, hyperparameters["forget_rows"])),
        ],
        served,
        forgets,
    )


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


def _parent(here: Parts, request: JobCreate) -> Iterator[FieldProblem]:
    with here.sessions.begin() as s:
        if request.parent is not None and (reason := lineage.why_not(s, request.parent, request.model)) is not None:
            yield FieldProblem("/parent", reason, "parent")


def recipe_problems(
    here: Parts, entry: ModelEntry, asked: Asked, hyperparameters: Mapping[str, Any]
) -> Iterator[FieldProblem]:
    """What is wrong with it whatever its rows are; the hyperparameters are complete."""
    yield from _gpu_class(here, asked)
    yield from _target_modules(entry, asked)
    yield from _refusals_unused(here, asked, hyperparameters)
    yield from _benchmarks_and_gates(here, asked)


def _gpu_class(here: Parts, request: Asked) -> Iterator[FieldProblem]:
    known = here.settings.gpu_classes
    if request.resources.gpu_class not in known:
        yield FieldProblem("/resources/gpu_class", f"the GPU classes are: {', '.join(known)}", "enum")


def _target_modules(entry: ModelEntry, request: Asked) -> Iterator[FieldProblem]:
    """By the last part of a name, where the model's sizes are known. Of a mixture, whose experts may be loaded as one tensor, the
    worker judges."""
    sizes = modelsizes.registered(entry)
    known = {} if sizes is None or sizes.mixture else sizes.linear
    for index, name in enumerate(request.lora.target_modules or ()):
        last = name.rpartition(".")[2]
        if last in HEADS:
            yield FieldProblem(
                f"/lora/target_modules/{index}",
                f"{name!r} is the language-model head, or embeddings that may be tied to it: no adapter goes there",
                "head",
            )
        elif known and last not in known:
            yield FieldProblem(
                f"/lora/target_modules/{index}",
                f"{name!r} names no linear layer of model {entry.name!r}; there are: {', '.join(sorted(known))}",
                "target_module",
            )


def _refusals_unused(here: Parts, request: Asked, hyperparameters: Mapping[str, Any]) -> Iterator[FieldProblem]:
    method = request.method.type
    if request.refusal_set is not None and not here.catalog.teaches_refusals(method, hyperparameters):
        yield FieldProblem("/refusal_set", f"{method} does not teach a refusal, so it would not be used", "unused")


def _benchmarks_and_gates(here: Parts, request: Asked) -> Iterator[FieldProblem]:
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


def _requests(here: Parts, request: JobCreate) -> Iterator[FieldProblem]:
    """Those that it is to serve and cannot."""
    for index, request_id in enumerate(request.deletion_requests):
        if request_id in request.deletion_requests[:index]:
            yield FieldProblem(f"/deletion_requests/{index}", f"{request_id} is named twice", "duplicate")
            continue
        try:
            with here.sessions.begin() as s:
                reason = deletion_jobs.why_not(s, deletions.get(s, request_id), request.model)
        except NotFound as error:
            reason = str(error)
        if reason is not None:
            yield FieldProblem(f"/deletion_requests/{index}", reason, "deletion_request")


def _rows_of_requests(here: Parts, who: Principal, request: JobCreate) -> tuple[dict[str, list[int]], frozenset[str]]:
    """By request: the numbers of its rows in the forget set, in its own order, each once; and the digests of all of that.

    Raises InvalidRequest where a row of a request is missing there, or one that was forgotten for an earlier request.
    """
    with sets.opened(here, request.forget_set, "forget_set") as forget:
        found = digests.row_digests(here.secrets, who.tenant, forget)
        where = dict[str, int]()
        for number, digest in enumerate(found, start=1):
            where.setdefault(digest, number)
    served, problems = dict[str, list[int]](), list[FieldProblem]()
    for index, request_id in enumerate(request.deletion_requests):
        with here.sessions.begin() as s:
            wanted = deletion_reads.with_digests(s, request_id).row_digests
        missing = next((number for number, digest in enumerate(wanted, start=1) if digest not in where), None)
        if missing is not None:
            detail = f"row {missing} of {request_id} is not in the forget set"
            problems.append(FieldProblem(f"/deletion_requests/{index}", detail, "row_missing"))
        else:
            served[request_id] = [where[digest] for digest in dict.fromkeys(wanted)]
    with here.sessions.begin() as s:
        if (reason := lineage.fork(s, who.tenant, request.model, request.parent, where.keys())) is not None:
            problems.append(FieldProblem("/parent", reason, "fork"))
    if problems:
        raise InvalidRequest(*problems)
    return served, frozenset(where)


def _judge_refusals(here: Parts, request: JobCreate) -> None:
    """Raises InvalidRequest unless every row is a text."""
    if request.refusal_set is None:
        return
    with sets.opened(here, request.refusal_set, "refusal_set") as refusals:
        wrong = [number for number, row in enumerate(refusals, start=1) if row.kind != "text"]
    if wrong:
        detail = f"a refusal is a row of `text`; row {wrong[0]} is not, nor are {len(wrong) - 1} others"
        raise InvalidRequest(FieldProblem("/refusal_set", detail, "kind"))


def _judge_sets(here: Parts, request: JobCreate, entry: ModelEntry) -> JudgedSets:
    """Raises InvalidRequest if one cannot be had or is empty, if sets share rows, or if rows are too long for the model."""
    kinds: dict[str, Kinds] = {purpose: {} for purpose in SETS}
    long: dict[str, tokens.LongRows] = {}
    rows = dict.fromkeys(SETS, 0)
    warnings: list[WarningRow] = []

    def noted(examples: Iterator[Example], purpose: str) -> Iterator[Example]:
        if purpose not in long:  # the first time that it is read
            long[purpose] = tokens.LongRows(here.settings, entry)
            examples = long[purpose].watch(examples)
        for number, example in enumerate(examples, start=1):
            kinds[purpose].setdefault(example.kind, number)
            rows[purpose] = number
            yield example

    pairs = [("forget_set", "retain_set")]
    if request.holdout_set is not None:  # what the model was trained on, or is trained on now, is no holdout
        pairs += [("holdout_set", "forget_set"), ("holdout_set", "retain_set")]
    for one, other in pairs:
        with (
            sets.opened(here, getattr(request, one), one) as first,
            sets.opened(here, getattr(request, other), other) as second,
        ):
            found = overlap.overlap(noted(first, one), noted(second, other))
        if found.same:
            raise InvalidRequest(*_overlaps(one, other, found.same))
        names = one.removesuffix("_set"), other.removesuffix("_set")
        warnings += [WarningRow(*warning) for warning in overlap.warnings(*names, found)]
    if problems := [problem for purpose, watched in long.items() for problem in watched.problems(f"/{purpose}")]:
        raise InvalidRequest(*problems)
    return JudgedSets(kinds["forget_set"], rows["forget_set"], kinds["retain_set"], warnings)


def _overlaps(one: str, other: str, shared: overlap.Pairs) -> Iterator[FieldProblem]:
    names = one.removesuffix("_set"), other.removesuffix("_set")
    for first, second in shared[: overlap.NAMED_MAX]:
        yield FieldProblem(f"/{one}", f"{names[0]} row {first} is {names[1]} row {second}", "overlap")
    if more := len(shared[overlap.NAMED_MAX :]):
        yield FieldProblem(f"/{one}", f"and {more} more", "overlap")


def _warnings(entry: ModelEntry, kinds: set[str]) -> list[WarningRow]:
    if "question" in kinds and entry.prompt_format.ends_in_space:
        return [WarningRow("prompt_ends_in_space", f"model {entry.name!r}: {SPACE_WARNING}")]
    return []
