"""What the API answers with. Readers ignore fields and enum values that they do not know: more will come."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Literal

import structlog
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError

from service.domain.catalog import SuiteFigure, SuiteSet
from service.domain.job import (
    Audit,
    Budget,
    Constraint,
    Failure,
    FilePurpose,
    Gate,
    JobSpec,
    Limits,
    Lora,
    MethodChoice,
    ModelEntry,
    PromptFormat,
    Resources,
    Stage,
    Status,
    Verdict,
)
from service.store import files, tables
from service.store.secrets import Secrets

JOBS_PATH = "/v1/unlearning/jobs"
BENCHMARKS_PATH = "/v1/benchmarks"
FILES_PATH = "/v1/files"
REQUESTS_PATH = "/v1/deletion-requests"
PLANS_PATH = "/v1/deletion-plans"
ADAPTER, REPORT_JSON, REPORT_HTML = "adapter/adapter_model.safetensors", "report.json", "report.html"
OF_SPEC = (  # the rest has columns
    *("parent", "reverifies", "method", "constraint", "budget", "lora", "seed", "resources", "limits"),
    *("benchmarks", "audit", "gates", "deletion_requests"),
)

log = structlog.get_logger(__name__)


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    purpose: FilePurpose
    filename: str | None = Field(description="null once it is purged")
    bytes: int
    rows: int = Field(description="or figures, of eval_scores")
    sha256: str | None = Field(description="of the content; null once it is purged, since one row's could be guessed")
    digest: str = Field(description="HMAC-SHA-256 of the content under a key of the service: what evidence names")
    created_at: datetime
    created_by: str
    purge_at: datetime | None = Field(description="as soon as nothing needs it after that")
    purged_at: datetime | None


class ModelObject(BaseModel):
    id: str = Field(description="the name by which a job asks for it")
    object: Literal["model"] = "model"
    source: Literal["path", "hub"]
    hub_id: str | None
    revision: str | None = Field(description="of a Hub model: its commit")
    digest: str | None = Field(
        description="of the files that are loaded; null for a Hub model, whose revision pins them"
    )
    tokenizer_digest: str | None
    prompt_format: PromptFormat
    gpu_class: str
    info: dict[str, Any]
    created_at: datetime | None


class MethodObject(BaseModel):
    id: str
    object: Literal["method"] = "method"
    summary: str
    reference: str | None
    composition: dict[str, str]
    parameters: dict[str, Any] = Field(description="JSON Schema of `hyperparameters`, with defaults")
    presets: dict[str, dict[str, Any]]


class SuiteObject(BaseModel):
    id: str
    object: Literal["suite"] = "suite"
    summary: str
    reference: str | None
    sets: dict[str, SuiteSet] = Field(description="what it takes; the columns are those that every row must have")
    figures: dict[str, SuiteFigure]


class BenchmarkObject(BaseModel):
    id: str = Field(description="the name by which a job asks for it")
    object: Literal["benchmark"] = "benchmark"
    suite: Literal["tofu", "muse"]
    corpus: str
    sets: dict[str, str] = Field(description="the suite's name of a set -> the file")
    retrained_model: str | None
    retrained_scores: str | None
    created_at: datetime


class BaseModelRef(BaseModel):
    id: str
    revision: str | None
    digest: str | None
    tokenizer_digest: str | None


class Progress(BaseModel):
    unit: Literal["steps"] = "steps"
    completed: int
    total: int | None
    percent: float
    queue_position: int | None = Field(description="1: next; null: it does not wait, or rests until `not_before`")
    eta_seconds: float | None = Field(description="until the solve ends, as the steps so far suggest")
    trained_tokens: int


class StageEntry(BaseModel):
    stage: Stage
    attempt: int
    started_at: datetime
    finished_at: datetime | None


class JobWarning(BaseModel):
    code: str
    message: str


class Result(BaseModel):
    adapter: str | None = Field(
        description="id of the artifact with the adapter's weights; null of a reverification: the job that it reverifies has them"
    )
    report: str | None = Field(description="id of the artifact with the report's JSON")
    certificate: str | None = Field(
        description="its id; null until it is issued, and where no adapter was released although the model knew the rows"
    )


class Links(BaseModel):
    self: str
    cancel: str
    pause: str
    resume: str
    retry: str
    reverify: str
    events: str
    attempts: str
    steps: str
    report: str
    certificate: str
    artifacts: str


class JobObject(BaseModel):
    """What another version of the service stored, and this one cannot read, is shown as it is stored."""

    id: str
    object: Literal["unlearning.job"] = "unlearning.job"
    created_at: datetime
    created_by: str
    updated_at: datetime
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    not_before: datetime | None = Field(description="of a job that rests after a lost attempt: the next one")
    estimated_finish_at: datetime | None
    status: Status = Field(
        description="whether the run finished; `verdict` says whether the model passed, or did not know the rows before"
    )
    status_reason: str | None
    stage: SerializeAsAny[Stage | None]
    stage_history: SerializeAsAny[list[StageEntry]]
    progress: Progress
    model: str
    base_model: BaseModelRef | None = Field(description="null once the model is no longer registered")
    parent: SerializeAsAny[str | None] = Field(description="the job whose adapter this one starts from")
    reverifies: SerializeAsAny[str | None] = Field(
        description="the job whose adapter this one evaluates under the current verdict rules, without training; null: it trains"
    )
    method: SerializeAsAny[MethodChoice]
    constraint: SerializeAsAny[Constraint]
    epsilon: float | None = Field(
        description="the bound, nats per token; known once the model that it starts from was measured"
    )
    base_retain_loss: float | None = Field(
        description="of the model that it starts from, on the retain set, nats per token"
    )
    budget: SerializeAsAny[Budget]
    due_at: datetime | None
    lora: SerializeAsAny[Lora]
    forget_set: str
    retain_set: str
    refusal_set: str | None
    holdout_set: str | None
    benchmarks: SerializeAsAny[list[str]]
    audit: SerializeAsAny[Audit | None]
    gates: SerializeAsAny[list[Gate]]
    deletion_requests: SerializeAsAny[list[str]] = Field(description="that it serves")
    priority: int
    resources: SerializeAsAny[Resources]
    seed: SerializeAsAny[int]
    limits: SerializeAsAny[Limits]
    attempt: int
    verdict: SerializeAsAny[Verdict | None]
    failure: SerializeAsAny[Failure | None]
    warnings: SerializeAsAny[list[JobWarning]]
    result: Result
    metadata: dict[str, str]
    external_id: str | None
    version: int
    links: Links


class EventObject(BaseModel):
    id: str
    object: Literal["unlearning.job.event"] = "unlearning.job.event"
    job_id: str
    seq: int
    created_at: datetime
    level: Literal["info", "warn", "error"]
    type: str
    message: str
    data: dict[str, Any]
    attempt: int


class Step(BaseModel):
    """Measured on the step's batch before the parameters moved. A number that was not finite is null."""

    step: int
    losses: dict[str, float | None]
    dual: dict[str, float | None] = Field(description="multiplier by constraint")
    violation: dict[str, float | None] = Field(description="loss minus bound, by constraint; positive: violated")
    learning_rate: float | None
    gradient_norm: float | None
    tokens: int = Field(description="trained so far")
    tokens_per_second: float | None
    elapsed_seconds: float
    extra: dict[str, float | None]


class Check(BaseModel):
    """A measurement of the whole sets, or of their fixed samples."""

    step: int
    forget_objective: float | None
    forget_probability: float | None
    retain_loss: float | None
    retain_upper: float | None
    epsilon: float | None
    feasible: bool
    best: bool
    rows: int
    seconds: float


class Events(BaseModel):
    object: Literal["list"] = "list"
    data: list[EventObject]
    has_more: bool


class Steps(BaseModel):
    """Of the current attempt, or the last."""

    object: Literal["list"] = "list"
    attempt: int
    data: list[Step]
    checks: list[Check] = Field(description="all of them, at that step and after it")
    has_more: bool


class CheckpointObject(BaseModel):
    """The adapter, the solver's and the optimiser's state, and the state of whatever is random, after a step."""

    object: Literal["unlearning.job.checkpoint"] = "unlearning.job.checkpoint"
    job_id: str
    attempt: int = Field(description="that saved it")
    step: int
    bytes: int
    sha256: str
    created_at: datetime


class Checkpoints(BaseModel):
    object: Literal["list"] = "list"
    data: list[CheckpointObject]
    has_more: Literal[False] = False


class ArtifactObject(BaseModel):
    id: str
    object: Literal["unlearning.job.artifact"] = "unlearning.job.artifact"
    job_id: str
    name: str
    media_type: str
    bytes: int
    sha256: str
    created_at: datetime
    content: str = Field(description="path of the content")


def file_object(secrets: Secrets, row: tables.File) -> FileObject:
    private = files.private(secrets, row) if row.purged_at is None else None
    told = {"filename": private.name, "sha256": private.sha256} if private else {"filename": None, "sha256": None}
    return FileObject.model_validate(_columns(row) | told)


def model_object(entry: ModelEntry) -> ModelObject:
    """Without the folder: a path of the workers' machines is nobody's business."""
    hub_id = entry.location if entry.source == "hub" else None
    return ModelObject(id=entry.name, hub_id=hub_id, **entry.model_dump(exclude={"name", "location"}))


def benchmark_object(row: tables.Benchmark) -> BenchmarkObject:
    return BenchmarkObject.model_validate(_columns(row) | {"id": row.name})


def job_object(
    row: tables.Job,
    model: BaseModelRef | None,
    queue_position: int | None,
    artifacts: Sequence[tables.Artifact],
    certificate: str | None,
    waits_for: str | None,
) -> JobObject:
    """A row that another version of this code wrote is shown as it is stored, where it does not fit.

    Args:
        waits_for: why no worker takes it now, beside what its own row says.
    """
    asked = _asked(row)
    eta = eta_seconds(row, asked["budget"])
    ids = {artifact.name: artifact.id for artifact in artifacts}
    path = f"{JOBS_PATH}/{row.id}"
    shown = (
        {name: value for name, value in _columns(row).items() if name in JobObject.model_fields}
        | asked
        | {
            "object": "unlearning.job",
            "status_reason": status_reason(row, queue_position, waits_for),
            "metadata": row.metadata_,
            "estimated_finish_at": row.updated_at + timedelta(seconds=eta) if eta is not None else None,
            "progress": Progress(
                completed=row.step,
                total=row.steps_total,
                percent=percent(row),
                queue_position=queue_position,
                eta_seconds=eta,
                trained_tokens=row.trained_tokens,
            ),
            "base_model": model,
            "result": Result(adapter=ids.get(ADAPTER), report=ids.get(REPORT_JSON), certificate=certificate),
            "links": Links(
                self=path,
                cancel=f"{path}/cancel",
                pause=f"{path}/pause",
                resume=f"{path}/resume",
                retry=f"{path}/retry",
                reverify=f"{path}/reverify",
                events=f"{path}/events",
                attempts=f"{path}/attempts",
                steps=f"{path}/steps",
                report=f"{path}/report",
                certificate=f"{path}/certificate",
                artifacts=f"{path}/artifacts",
            ),
        }
    )
    try:
        return JobObject.model_validate(shown)
    except ValidationError as error:
        log.warning("a job is shown as it is stored", job_id=row.id, fields=_fields(error))
        return JobObject.model_construct(**shown)


def status_reason(row: tables.Job, queue_position: int | None, waits_for: str | None) -> str | None:
    return "; ".join(filter(None, (waits_for, row.status_reason, _rest(row, queue_position)))) or None


def _rest(row: tables.Job, queue_position: int | None) -> str | None:
    """Until when it rests: the database's clock says whether it does, by leaving it without a place in the line."""
    if row.status is not Status.QUEUED or row.not_before is None or queue_position is not None:
        return None
    return f"the next attempt begins at {row.not_before:%Y-%m-%d %H:%M:%S} UTC or later"


def _asked(row: tables.Job) -> dict[str, Any]:
    """What of the spec has no column; fields that this version does not know are passed over."""
    stored: Mapping[str, Any] = row.spec
    with suppress(ValidationError):
        stored = dict(JobSpec.model_validate(row.spec, extra="ignore"))
    return {name: stored.get(name) for name in OF_SPEC}


def _fields(error: ValidationError) -> list[str]:
    return [".".join(map(str, found["loc"])) for found in error.errors()]


def base_model(entry: ModelEntry) -> BaseModelRef:
    """`entry`: or a row with its columns."""
    return BaseModelRef(
        id=entry.location if entry.source == "hub" else entry.name,
        revision=entry.revision,
        digest=entry.digest,
        tokenizer_digest=entry.tokenizer_digest,
    )


def percent(row: tables.Job) -> float:
    """Of the steps; a run that ended earlier than its budget is complete all the same."""
    if row.status is Status.SUCCEEDED:
        return 100.0
    return round(100.0 * row.step / row.steps_total, 1) if row.steps_total else 0.0


def eta_seconds(row: tables.Job, budget: object) -> float | None:
    """While it solves: the rest of the steps at the pace so far, or the rest of the time, whichever is less."""
    if row.status is not Status.RUNNING or row.stage != Stage.UNLEARNING or not row.step:
        return None
    if not isinstance(budget, Budget):  # another version's
        return None
    began = datetime.fromisoformat(row.stage_history[-1]["started_at"])
    elapsed = (row.updated_at - began).total_seconds()
    return round(max(0.0, min((budget.max_steps - row.step) * elapsed / row.step, budget.max_seconds - elapsed)), 1)


def event_object(row: tables.JobEvent) -> EventObject:
    return EventObject.model_validate(_columns(row))


def step(row: tables.JobStep) -> Step:
    return Step.model_validate(_columns(row))


def check(row: tables.JobCheck) -> Check:
    return Check.model_validate(_columns(row))


def checkpoint(row: tables.JobCheckpoint, attempt: int) -> CheckpointObject:
    return CheckpointObject.model_validate(_columns(row) | {"attempt": attempt})


def artifact_object(row: tables.Artifact) -> ArtifactObject:
    content = f"{JOBS_PATH}/{row.job_id}/artifacts/{row.id}/content"
    return ArtifactObject.model_validate(_columns(row) | {"content": content})


def _columns(row: tables.Base) -> dict[str, Any]:
    return {column.key: getattr(row, column.key) for column in type(row).__mapper__.column_attrs}
