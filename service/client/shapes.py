"""What the service answers with, as far as a program needs it; `raw` has all of it, what comes later too.

Names of statuses, stages and codes are strings: a newer service may have more of them.
"""

from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.domain.errors import UnlearnError
from service.domain.job import FORGOTTEN, RELEASED, TERMINAL

Json = dict[str, Any]


class Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Answer(Part):
    raw: Json = Field(repr=False, description="the whole JSON object")

    @classmethod
    def of(cls, raw: Json) -> Self:
        """Raises UnlearnError where the answer is none of this service's."""
        try:
            return cls.model_validate({**raw, "raw": raw})
        except ValidationError as error:
            wrong = ", ".join(".".join(map(str, one["loc"])) for one in error.errors())
            raise UnlearnError(f"the service answered with a {cls.__name__} that cannot be read: {wrong}") from error


class File(Answer):
    id: str
    purpose: str
    filename: str | None
    rows: int
    bytes: int
    digest: str
    purge_at: datetime | None
    purged_at: datetime | None


# --- jobs


class Progress(Part):
    completed: int
    total: int | None
    percent: float
    queue_position: int | None
    eta_seconds: float | None
    trained_tokens: int


class Gate(Part):
    metric: str
    op: str
    threshold: float | None
    value: float | None
    severity: str
    result: str
    message: str


class Verdict(Part):
    result: str
    message: str
    gates: list[Gate]
    rules: int = 1  # the number of the rules by which it was given
    forgotten_by: str | None = None  # of NOT_KNOWN: the job whose adapter had forgotten the rows already


class Failure(Part):
    code: str
    message: str
    fault: str
    retryable: bool
    forget_rows: list[int] = []  # numbers of the rows of the forget set that it failed on


class Warning(Part):  # noqa: A001  as the field is called
    code: str
    message: str


class Result(Part):
    adapter: str | None
    report: str | None
    certificate: str | None


class Job(Answer):
    id: str
    model: str
    created_at: datetime
    created_by: str
    finished_at: datetime | None
    status: str
    status_reason: str | None
    stage: str | None
    progress: Progress
    epsilon: float | None  # the bound on the retain loss, nats per token; known once its start was measured
    base_retain_loss: float | None
    reverifies: str | None = None  # the job whose adapter this one evaluates again; None: it trains its own
    attempt: int
    verdict: Verdict | None
    failure: Failure | None
    warnings: list[Warning]
    result: Result
    metadata: dict[str, str]
    version: int
    links: dict[str, str]

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL

    @property
    def released(self) -> bool:
        """Whether its verdict let the adapter out."""
        return self.verdict is not None and self.verdict.result in RELEASED

    @property
    def forgotten(self) -> bool:
        """Whether, by its verdict, the model does not know the rows: with what was released, or before any training."""
        return self.verdict is not None and self.verdict.result in FORGOTTEN


class Step(Answer):
    """Measured on the step's batch before the parameters moved. A number that was not finite is None."""

    step: int
    losses: dict[str, float | None]  # nats per token
    dual: dict[str, float | None]  # multiplier by constraint
    violation: dict[str, float | None]  # loss minus bound, by constraint
    elapsed_seconds: float


class Event(Answer):
    id: str
    job_id: str
    seq: int
    created_at: datetime
    level: str
    type: str
    message: str
    data: Json
    attempt: int


class Checkpoint(Answer):
    job_id: str
    attempt: int
    step: int
    bytes: int
    sha256: str
    created_at: datetime


class Attempt(Answer):
    attempt: int
    worker: str
    started_at: datetime
    ended_at: datetime | None
    outcome: str
    message: str | None


class Artifact(Answer):
    id: str
    job_id: str
    name: str
    media_type: str
    bytes: int
    sha256: str


# --- requests, plans, keys


class Approval(Part):
    by: str
    at: datetime


class ServingJob(Part):
    id: str
    model: str


class DeletionRequest(Answer):
    id: str
    status: str
    status_reason: str | None
    external_reference: str | None
    regulation: str
    received_at: datetime
    due_at: datetime
    overdue: bool
    finished_at: datetime | None
    models: list[str]
    forget_set: str
    files: list[str]  # with the sets of the jobs that serve it
    rows: int
    approvals: list[Approval]
    approvals_required: int
    jobs: list[ServingJob]
    leave_out_retained: bool = False
    warnings: list[Warning] = []
    version: int


class BatchItem(Part):
    """Of a batch, what became of one request: it was made, or there is a problem (RFC 9457)."""

    index: int
    status: int
    request: DeletionRequest | None
    problem: Json | None


class Plan(Answer):
    id: str  # the model's name
    job: Json
    window_seconds: int
    requests_max: int
    status_reason: str | None


class Key(Answer):
    id: str
    name: str
    prefix: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    secret: str | None = Field(default=None, repr=False)  # of one that was made now


# --- webhooks


class Endpoint(Answer):
    id: str
    url: str
    description: str
    event_types: list[str]
    status: str
    status_reason: str | None
    secret: str | None = Field(default=None, repr=False)  # of one that was made or rotated now


class DeliveryAttempt(Part):
    number: int
    at: datetime
    status: int | None
    error: str | None


class Delivery(Answer):
    id: str
    endpoint_id: str
    message_id: str
    type: str
    status: str
    created_at: datetime
    attempts: list[DeliveryAttempt]


# --- the deployment


class Model(Answer):
    id: str
    source: str
    revision: str | None
    digest: str | None
    gpu_class: str


class Method(Answer):
    id: str
    summary: str
    parameters: Json  # JSON Schema of its hyperparameters


class Worker(Answer):
    id: str
    state: str
    gpu_classes: list[str]
    vram_gib: float
    slots: int
    jobs: int
    seen_at: datetime


class AuditEvent(Answer):
    seq: int
    id: str
    created_at: datetime
    actor: str
    action: str
    object_type: str
    object_id: str
    data: Json
    hash: str


class AuditHead(Answer):
    seq: int
    hash: str
    valid: bool | None  # None: not checked yet
    checked_at: datetime | None


# --- benchmarks


class SuiteSet(Part):
    what: str
    required: bool
    columns: list[str]
    optional: list[str]


class Suite(Answer):
    id: str
    summary: str
    sets: dict[str, SuiteSet]


class Benchmark(Answer):
    id: str
    suite: str
    corpus: str
    sets: dict[str, str]
    retrained_model: str | None
    retrained_scores: str | None
