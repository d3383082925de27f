"""What goes between the supervisor and the runner: the assignment (a file), and JSON lines on a pipe.

The runner has no database credentials. It reads its Assignment from the file named on its command line, writes one
record per line to the file descriptor in UNLEARN_RECORDS_FD, and listens on its standard input: the lines "cancel" and
"pause" ask it to stop at the next step, the latter with a checkpoint; end of file means that its parent is gone, and it exits
at once.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, TypeAdapter

from service.domain.job import MICRO_BATCH_TOKENS, FailureCode, JobSpec, ModelEntry, Stage, Verdict

RECORDS_FD = "UNLEARN_RECORDS_FD"
Word = Literal["cancel", "pause"]  # to the runner


class FileRef(BaseModel):
    id: str
    key: str  # below the storage root
    sha256: str  # of the content
    digest: str  # the same, keyed: what a report may name
    data_key: str = Field(repr=False)  # base64; what the stored bytes are encrypted with
    rows: int
    bytes: int  # of the content


class ArtifactFile(BaseModel):
    name: str  # "adapter/adapter_model.safetensors", "report.json"
    key: str  # below the storage root
    media_type: str
    bytes: int
    sha256: str


class EarlierJob(BaseModel):
    job_id: str
    forget_file: FileRef | None  # None: it is no longer kept


class ReleasedAdapter(BaseModel):
    """What a job released."""

    job_id: str
    adapter: list[ArtifactFile]
    report: ArtifactFile  # the JSON one


class ParentAssignment(ReleasedAdapter):
    """The job whose adapter this one starts from."""

    chain: list[
        EarlierJob
    ]  # that job, the one that it started from, and so on; then those whose rows these had forgotten


class BenchmarkAssignment(BaseModel):
    """A registered benchmark that the request names."""

    name: str
    suite: Literal["tofu", "muse"]
    corpus: str
    folder: str  # below the storage root; where what models say of its texts is kept
    files: dict[str, FileRef]  # by the suite's name of the set
    retrained_model: ModelEntry | None = None  # measured once, or
    retrained_scores: FileRef | None = None  # its stored figures; or neither


class RequestRows(BaseModel):
    """A deletion request that the job serves."""

    request_id: str
    row_numbers: list[int]  # of its rows in the forget set, from 1


class CheckpointRef(BaseModel):
    step: int
    key: str  # below the storage root
    sha256: str  # of the stored bytes


class Assignment(BaseModel):
    job_id: str
    attempt: int
    fence: int
    spec: JobSpec
    model: ModelEntry
    parent: ParentAssignment | None = None  # None: it starts from the base model
    reverified: ReleasedAdapter | None = None  # what is evaluated without training; None: the job trains
    forget_file: FileRef
    retain_file: FileRef
    refusal_file: FileRef | None = None  # of the request; None: worker.refusals
    holdout_file: FileRef | None = None
    benchmarks: list[BenchmarkAssignment] = Field(default_factory=list)  # in the request's order
    deletion_requests: list[RequestRows] = Field(default_factory=list)
    row_key: Base64Bytes = Field(repr=False)  # what the tenant's rows are digested with, and nothing else
    storage_url: str
    prefix: str  # below the storage root; this attempt's own: "jobs/<id>/attempts/<fence>"
    checkpoints: list[CheckpointRef] = Field(default_factory=list)  # of earlier attempts, the newest first
    checkpoint_every_s: float = math.inf
    checkpoint_every_steps: int | None = None
    micro_batch_tokens: int = MICRO_BATCH_TOKENS  # positions at once, at most
    models_root: Path
    scratch_dir: Path  # empty folder of this attempt; the supervisor removes it
    device: str  # "cpu", "cuda:0"
    dtype: str  # "float32" or "bfloat16": of the frozen base
    threads: int | None = None
    log_level: str = "INFO"

    @property
    def folder(self) -> str:
        """Below the storage root, where the job's attempts find what earlier ones left: "jobs/<id>"."""
        return self.prefix.partition("/attempts/")[0]


class Record(BaseModel):
    # allow non-finite numbers through JSON: a loss that blew up must be reported, not crash the report of it
    model_config = ConfigDict(ser_json_inf_nan="strings", extra="forbid")


class StageRecord(Record):
    type: Literal["stage"] = "stage"
    stage: Stage


class StepRecord(Record):
    """One solver step, as measured on its batch before the parameters moved."""

    type: Literal["step"] = "step"
    step: int  # 1-based
    losses: dict[str, float]  # "forget", "retain"; nats per token for the retain NLL
    dual: dict[str, float]  # constraint -> multiplier used in this step; empty for solvers without one
    violation: dict[str, float]  # constraint -> loss - bound; positive: violated on this batch
    learning_rate: float
    gradient_norm: float
    tokens: int  # trained so far (all positions, both sets)
    tokens_per_second: float
    elapsed_seconds: float  # of solving
    extra: dict[str, float] = Field(default_factory=dict)  # what this solver alone logs


class CheckRecord(Record):
    """A measurement of the whole forget and retain sets (or of their fixed samples) at the current parameters."""

    type: Literal["check"] = "check"
    step: int
    forget_objective: float
    forget_probability: float
    retain_loss: float
    retain_upper: float  # one-sided 95 % bound if sampled, else equal to retain_loss; this is what must be <= epsilon
    epsilon: float
    feasible: bool
    best: bool  # the released candidate so far
    rows: int
    seconds: float


class WarningRecord(Record):
    type: Literal["warning"] = "warning"
    code: str
    message: str


class ConstraintRecord(Record):
    """Sent once, when the retain loss of the model that the job starts from is known."""

    type: Literal["constraint"] = "constraint"
    epsilon: float
    base_retain_loss: float


class CheckpointRecord(Record):
    """Written; it is a checkpoint once the supervisor has promoted it."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    key: str
    bytes: int
    sha256: str


class ResumedRecord(Record):
    """The run goes on after this step of an earlier attempt; 0: it begins at the beginning, since no checkpoint could be read."""

    type: Literal["resumed"] = "resumed"
    step: int
    tokens: int  # trained until then


class ResultRecord(Record):
    type: Literal["result"] = "result"
    verdict: Verdict
    stop_reason: str
    stop_message: str
    figures: dict[str, Any]  # a few numbers for the job's last event: no text
    artifacts: list[ArtifactFile]


class FailureRecord(Record):
    type: Literal["failure"] = "failure"
    code: FailureCode
    message: str
    forget_rows: list[int] = []  # numbers of the rows of the forget set that are to blame, from 1


class CancelledRecord(Record):
    type: Literal["cancelled"] = "cancelled"


class PausedRecord(Record):
    """It stopped because it was asked to, with a checkpoint to go on from unless the storage took none."""

    type: Literal["paused"] = "paused"


AnyRecord = Annotated[
    StageRecord
    | StepRecord
    | CheckRecord
    | WarningRecord
    | ConstraintRecord
    | CheckpointRecord
    | ResumedRecord
    | ResultRecord
    | FailureRecord
    | CancelledRecord
    | PausedRecord,
    Field(discriminator="type"),
]
parse_record = TypeAdapter[AnyRecord](AnyRecord).validate_json
