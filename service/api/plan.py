"""What a job would be, before there is one: judged as it would be, and then nothing is kept."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field

from service.api import admission, sets, shown, tokens
from service.api.deps import Parts
from service.api.sets import Given
from service.api.shapes import BaseModelRef, JobWarning, base_model
from service.api.tokens import Cannot, Counted, Tokens
from service.domain import answers, memory, modelsizes, recipe
from service.domain.answers import Answer
from service.domain.identity import Principal
from service.domain.job import (
    SETS,
    Audit,
    Budget,
    Constraint,
    JobCreate,
    Lora,
    MethodChoice,
    ModelEntry,
    Resources,
    Status,
)
from service.domain.memory import Load, Memory
from service.store import files, lineage, quotas, reads, workers
from service.store.rows import WarningRow
from service.store.tables import Job

GIB = 2**30
READ = ("forget_set", "retain_set", "holdout_set")
BEHIND_QUESTIONS = "refusals are read behind the questions of the forget set"


class SetSize(BaseModel):
    rows: int
    bytes: int = Field(description="as JSON Lines")
    tokens: Tokens | None
    tokens_reason: str | None = Field(description="why they are not told")


class Steps(BaseModel):
    max_steps: int
    forget_rows: int = Field(description="per step")
    retain_rows: int
    texts: int = Field(description="of a forget row: 2 where a refusal is taught, taken to be as long as the answer")
    forget_passes: float = Field(description="over the forget set, in all steps")
    tokens_per_step: int | None = Field(description="of its batch, on average; a solver may read it more than once")
    tokens_max: int | None = Field(description="the same of all steps")


class MemoryPlan(BaseModel):
    """The worker's peak in bytes, estimated, beside the interpreter's own 0.6 GiB, attacks that train, and benchmarks."""

    cpu_float32: Memory | None = Field(
        description="compared with models of 135 million and of 260 thousand parameters: a step is estimated 9 % too low and "
        "20 % too high, a check 38 % too high and right; disclosure, of the smaller, 19 % too high"
    )
    accelerator_bfloat16: Memory | None = Field(
        description="counted as on a CPU, and never measured on an accelerator; its allocator is taken to leave no holes"
    )
    reason: str | None = Field(description="why it is not told")


class EvaluationPlan(BaseModel):
    """Evaluation of the trained model. Not included: rows of earlier jobs in a chain, and benchmarks."""

    answers: int | None = Field(
        description="to be generated if every row has a secret and a paraphrased question; null where the sets' tokens are"
    )
    tokens_max: int | None = Field(description="of these answers, if each is as long as it may be")
    attacks: list[str] = Field(description="as the report names them")


class JobPlan(BaseModel):
    object: Literal["unlearning.job.plan"] = "unlearning.job.plan"
    model: str
    base_model: BaseModelRef
    parent: str | None
    method: MethodChoice = Field(description="with all its hyperparameters")
    constraint: Constraint
    budget: Budget = Field(description="the most that it would take, in steps and seconds")
    sets: dict[str, SetSize]
    steps: Steps
    evaluation: EvaluationPlan
    memory: MemoryPlan
    benchmarks: list[str]
    deletion_requests: list[str]
    resources: Resources
    jobs_ahead: int = Field(description="that would be claimed before it, whoever's and of whatever GPU class")
    status_reason: str | None = Field(description="why it would wait, whatever is before it")
    warnings: list[JobWarning]


class Known(NamedTuple):
    """Of the request's sets."""

    sizes: dict[str, tuple[int, int]]  # rows and bytes
    counted: dict[str, Counted]  # by purpose, of those that are read row by row
    reason: str | None  # why they are not counted


def plan(here: Parts, who: Principal, request: JobCreate) -> JobPlan:
    """Raises InvalidRequest, as the creation would: for rows that are in two sets, with their numbers."""
    judged = admission.judge(here, who, request)
    resources = judged.resources.model_dump(include={"gpu_class", "min_vram_gib"})
    like = Job(tenant_id=who.tenant, status=Status.QUEUED, **resources)
    with here.sessions.begin() as s:
        ahead = reads.ahead(s, request.priority, request.due_at)
        heard = workers.heard(s)
        waits_for = shown.waits_for(like, heard, quotas.at_most(s, [who.tenant]))
        full = quotas.full(s, who.tenant) is not None
        vram_gib = [one.vram_gib for one in heard if like.gpu_class in (*one.gpu_classes, "any") and one.vram_gib]
        before = lineage.chain(s, request.parent) if request.parent is not None else []
        earlier_rank = sum(Lora.model_validate(job.spec["lora"]).r for job in before)
    known = _known(here, judged.entry, request)
    composition = here.catalog.composition(judged.method.type, judged.method.hyperparameters)
    needs = {name: frozenset(here.catalog.losses[composition[f"{name}_loss"]].needs) for name in ("forget", "retain")}
    steps = _steps(judged.method, request.budget, known, texts=2 if "refusal" in needs["forget"] else 1)
    needed = _memory(judged.entry, request.lora, request.attacks, earlier_rank, known, steps, composition, needs)
    warnings = [*judged.warnings, *_too_many(full), *_too_long(known.counted)]
    warnings += _too_large(needed, judged.resources, vram_gib)
    return JobPlan(
        model=request.model,
        base_model=base_model(judged.entry),
        parent=request.parent,
        method=judged.method,
        constraint=request.constraint,
        budget=request.budget,
        sets={purpose: _set(known, purpose) for purpose in known.sizes},
        steps=steps,
        evaluation=_evaluation(request.attacks, known),
        memory=needed,
        benchmarks=list(request.benchmarks),
        deletion_requests=list(request.deletion_requests),
        resources=judged.resources,
        jobs_ahead=ahead,
        status_reason=waits_for,
        warnings=[JobWarning(**warning._asdict()) for warning in warnings],
    )


def _known(here: Parts, entry: ModelEntry, request: JobCreate) -> Known:
    given = {purpose: rows for purpose in SETS if (rows := getattr(request, purpose)) is not None}
    sizes = {purpose: _size(here, rows) for purpose, rows in given.items()}
    try:
        counter = tokens.counter(here.settings, entry)
    except Cannot as reason:
        return Known(sizes, {}, str(reason))
    counted = {}
    for purpose in READ:
        if purpose in given:
            with sets.opened(here, given[purpose], purpose) as examples:
                counted[purpose] = tokens.count(counter, examples, *sizes[purpose])
    return Known(sizes, counted, None)


def _size(here: Parts, given: Given) -> tuple[int, int]:
    if isinstance(given, list):
        return len(given), sum(len(sets.line(row)) for row in given)
    assert given is not None
    with here.sessions.begin() as s:
        file = files.get(s, given)
    return file.rows, file.bytes


def _set(known: Known, purpose: str) -> SetSize:
    rows, size = known.sizes[purpose]
    if purpose in known.counted:
        return SetSize(rows=rows, bytes=size, tokens=known.counted[purpose].tokens, tokens_reason=None)
    return SetSize(rows=rows, bytes=size, tokens=None, tokens_reason=known.reason or BEHIND_QUESTIONS)


def _steps(method: MethodChoice, budget: Budget, known: Known, texts: int) -> Steps:
    rows = {
        purpose: min(int(str(method.hyperparameters[name])), known.sizes[purpose][0])
        for purpose, name in (("forget_set", "forget_rows"), ("retain_set", "retain_rows"))
    }
    per_step = None
    if known.counted:
        read = {purpose: known.counted[purpose].tokens.total / known.sizes[purpose][0] for purpose in rows}
        per_step = texts * rows["forget_set"] * read["forget_set"] + rows["retain_set"] * read["retain_set"]
    return Steps(
        max_steps=budget.max_steps,
        forget_rows=rows["forget_set"],
        retain_rows=rows["retain_set"],
        texts=texts,
        forget_passes=recipe.forget_passes(budget, known.sizes["forget_set"][0], rows["forget_set"]),
        tokens_per_step=None if per_step is None else round(per_step),
        tokens_max=None if per_step is None else round(budget.max_steps * per_step),
    )


def _evaluation(attacks: Audit, known: Known) -> EvaluationPlan:
    counts: Mapping[Answer, float] = {}
    if known.counted:
        forget, retain = (known.counted[name].lengths for name in ("forget_set", "retain_set"))
        counts = answers.after_training(forget, retain, len(attacks.quantise_bits))
    return EvaluationPlan(
        answers=round(sum(counts.values())) if counts else None,
        tokens_max=round(sum(answer.room * count for answer, count in counts.items())) if counts else None,
        attacks=attacks.attacks,
    )


def _memory(
    entry: ModelEntry,
    lora: Lora,
    attacks: Audit,
    earlier_rank: int,
    known: Known,
    steps: Steps,
    composition: Mapping[str, str],
    needs: Mapping[str, frozenset[str]],
) -> MemoryPlan:
    sizes = modelsizes.registered(entry)
    if sizes is None:
        return _no_memory("the sizes of the model were not found when it was registered")
    if sizes.mixture:
        return _no_memory("what a mixture of experts needs was never measured")
    if not known.counted:
        return _no_memory(f"it depends on the rows' tokens: {known.reason}")
    load = Load(
        forget=known.counted["forget_set"].lengths,
        retain=known.counted["retain_set"].lengths,
        forget_rows=steps.forget_rows,
        retain_rows=steps.retain_rows,
        texts=steps.texts,
        lora=lora,
        earlier_rank=earlier_rank,
        losses=frozenset({composition["forget_loss"], composition["retain_loss"]}),
        solver=composition["solver"],
        reference=needs,
        rounded=bool(attacks.quantise_bits),
    )
    return MemoryPlan(
        cpu_float32=memory.estimate(sizes, load, memory.CPU),
        accelerator_bfloat16=memory.estimate(sizes, load, memory.ACCELERATOR),
        reason=None,
    )


def _no_memory(reason: str) -> MemoryPlan:
    return MemoryPlan(cpu_float32=None, accelerator_bfloat16=None, reason=reason)


def _too_many(full: bool) -> Iterator[WarningRow]:
    if full:
        yield WarningRow(
            "open_jobs", "the tenant has as many jobs that have not ended as it may: a creation would be a 429"
        )


def _too_long(counted: Mapping[str, Counted]) -> Iterator[WarningRow]:
    for purpose, (told, _) in counted.items():
        if told.too_long:
            numbers = ", ".join(map(str, told.too_long_rows)) + (
                ", ..." if told.too_long > len(told.too_long_rows) else ""
            )
            message = f"{told.too_long} rows of the {purpose} are longer than the model's context: rows {numbers}"
            yield WarningRow("rows_too_long", f"{message}; the job would fail")


def _too_large(needed: MemoryPlan, resources: Resources, vram_gib: Sequence[float]) -> Iterator[WarningRow]:
    if needed.accelerator_bfloat16 is None or resources.gpu_class == "cpu":
        return
    gib = needed.accelerator_bfloat16.total / GIB
    said = f"the job needs about {gib:.3g} GiB on an accelerator, in bfloat16, by an estimate that was measured on none"
    if resources.min_vram_gib is not None and gib > resources.min_vram_gib:
        yield WarningRow("memory_above_request", f"{said}, and min_vram_gib is {resources.min_vram_gib:g}")
    if vram_gib and gib > max(vram_gib):
        yield WarningRow(
            "memory_above_workers", f"{said}; the largest of the workers that may take it has {max(vram_gib):g}"
        )
