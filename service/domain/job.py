"""An unlearning job: what is asked, the statuses it passes through, and what is answered.

Two axes: `status` says whether the machinery ran to the end, `verdict` whether the model passed.
Field names and meanings follow OpenAI's fine-tuning jobs where such a field exists.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

INLINE_ROWS_MAX = 1000
ERRORS_MAX = 10_000  # of an object that are named one by one
MICRO_BATCH_TOKENS = 16_384  # padded positions at once, where memory has room for them
EXACT_MAX = 2**53 - 1  # of an integer that every reader of JSON reads alike (RFC 7493), as evidence must
COMMIT = r"^[0-9a-f]{40}$"
PLAIN_PATH = r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*(/[^./\\\x00-\x1f][^/\\\x00-\x1f]*)*$"  # no part begins with a dot
LOOSE = 3.0  # a bound of so many times the retain loss before hardly constrains anything
SPACE_WARNING = (
    "a prompt format that ends in a space makes tokens merge over the seam: in a prompt alone the space is a token of its own, "
    "in a training row it belongs to the answer's first word"
)


class Status(StrEnum):
    PENDING_APPROVAL = "pending_approval"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


S = Status
TRANSITIONS: Mapping[Status, frozenset[Status]] = MappingProxyType(
    {
        S.PENDING_APPROVAL: frozenset({S.QUEUED, S.CANCELLED}),
        S.QUEUED: frozenset({S.RUNNING, S.PAUSED, S.CANCELLED}),
        S.RUNNING: frozenset({S.SUCCEEDED, S.FAILED, S.PAUSING, S.CANCELLING, S.QUEUED}),
        S.PAUSING: frozenset({S.PAUSED, S.SUCCEEDED, S.FAILED, S.CANCELLING}),
        S.PAUSED: frozenset({S.QUEUED, S.CANCELLED}),
        S.CANCELLING: frozenset({S.CANCELLED, S.SUCCEEDED, S.FAILED}),
        S.SUCCEEDED: frozenset(),
        S.FAILED: frozenset({S.QUEUED}),
        S.CANCELLED: frozenset(),
    }
)
TERMINAL = frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED})
HELD = frozenset({S.RUNNING, S.PAUSING, S.CANCELLING})  # a worker holds a lease on the row


class Stage(StrEnum):
    PREPARING = "preparing"
    LOADING_MODEL = "loading_model"
    UNLEARNING = "unlearning"
    EVALUATING = "evaluating"
    PACKAGING = "packaging"
    SIGNING = "signing"
    UPLOADING = "uploading"


class FailureCode(StrEnum):
    INVALID_FILE = "invalid_file"
    FORGET_RETAIN_OVERLAP = "forget_retain_overlap"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_REVISION_MISMATCH = "model_revision_mismatch"
    UNSUPPORTED_ARCHITECTURE = "unsupported_architecture"
    OUT_OF_MEMORY = "out_of_memory"
    NON_FINITE_LOSS = "non_finite_loss"
    MAX_RUNTIME_EXCEEDED = "max_runtime_exceeded"
    WORKER_LOST = "worker_lost"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"  # of earlier versions; now the last attempt's own code is kept
    ARTIFACT_UPLOAD_FAILED = "artifact_upload_failed"
    STORAGE_FULL = "storage_full"
    ROW_TOO_LONG = "row_too_long"
    NO_CAPABLE_WORKER = "no_capable_worker"
    INTERNAL_ERROR = "internal_error"


FAILED_ROWS_MAX = 1000  # that a failure names: a job that runs without them finds the others
CLIENT_FAULTS = frozenset(
    {
        FailureCode.INVALID_FILE,
        FailureCode.FORGET_RETAIN_OVERLAP,
        FailureCode.MODEL_NOT_FOUND,
        FailureCode.MODEL_REVISION_MISMATCH,
        FailureCode.UNSUPPORTED_ARCHITECTURE,
        FailureCode.NON_FINITE_LOSS,
        FailureCode.MAX_RUNTIME_EXCEEDED,
        FailureCode.ROW_TOO_LONG,
    }
)
# Running the same again can end differently. Everything else repeats itself, so the worker does not try again.
RETRYABLE = frozenset(
    {
        FailureCode.OUT_OF_MEMORY,
        FailureCode.WORKER_LOST,
        FailureCode.ARTIFACT_UPLOAD_FAILED,
        FailureCode.STORAGE_FULL,
        FailureCode.INTERNAL_ERROR,
    }
)


class Strict(BaseModel):
    """Input: an unknown field is an error, and so is a number that is not finite, or a text with NUL, which Postgres has not."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="wrap")
    @classmethod
    def few_errors(cls, given: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Beyond ERRORS_MAX they are one: each is made as an object of its own, which for 100,000 takes a second."""
        try:
            return validate(given)
        except ValidationError as error:
            if (count := error.error_count()) <= ERRORS_MAX:
                raise
        raise ValueError(f"has {count} errors, too many to name them")

    @field_validator("*")
    @classmethod
    def without_nul(cls, value: Any) -> Any:
        several = (
            [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        )
        if any(isinstance(text, str) and "\0" in text for text in several):
            raise ValueError("has the character NUL (U+0000)")
        return value


class Constraint(Strict):
    """The promise: mean negative log-likelihood per counted token of the retain set, in nats, stays at or below it."""

    epsilon: float | None = Field(default=None, ge=0, description="absolute bound, nats per token")
    epsilon_relative: float | None = Field(
        default=None,
        ge=0,
        description="relative bound: (1 + this) times the retain loss of the model that the job starts from",
    )

    @model_validator(mode="after")
    def exactly_one(self) -> Self:
        if (self.epsilon is None) == (self.epsilon_relative is None):
            raise ValueError("give exactly one of epsilon and epsilon_relative")
        return self

    def bound(self, base_loss: float) -> float:
        """The absolute bound in nats per token, given the retain loss of the model that the job starts from."""
        if self.epsilon is not None:
            return self.epsilon
        assert self.epsilon_relative is not None
        return (1.0 + self.epsilon_relative) * base_loss


class MethodChoice(Strict):
    type: str = Field(max_length=64, description="a name from GET /v1/methods")
    hyperparameters: dict[str, JsonValue] = Field(default_factory=dict)


class Budget(Strict):
    max_steps: int = Field(default=300, ge=1, le=1_000_000)
    max_seconds: float = Field(default=3600.0, gt=0, description="of solving, not of loading or evaluation")
    forget_target: Annotated[float, Field(gt=0, le=1)] | Literal["verdict"] | None = Field(
        default="verdict",
        description="end early once a check finds the bound kept, no more rows likely than the verdict allows, nothing "
        "disclosed to a greedy question, and the mean forget probability at or below this, or where the verdict wants it; "
        "null: use the whole budget",
    )


class Lora(Strict):
    r: int = Field(default=8, ge=1, le=1024)
    alpha: int = Field(default=16, ge=1, le=1_000_000)
    target_modules: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = Field(
        default=None, min_length=1, max_length=64, description="module names; null: every linear layer but the head"
    )


class Resources(Strict):
    gpu_class: str = Field(default="any", pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    min_vram_gib: float | None = Field(default=None, gt=0)


class Limits(Strict):
    max_runtime_seconds: int = Field(
        default=14_400, ge=1, le=31_536_000, description="of one attempt, from claim to end"
    )
    max_attempts: int = Field(default=3, ge=1, le=10)


class Gate(Strict):
    """A threshold on a figure of the report. A figure that could not be measured fails its gate, with that reason."""

    metric: str = Field(
        max_length=200,
        description="of the request: SET/METRIC, a figure of the suite `request` (forget/rouge_l_recall); of a benchmark "
        "that is asked for: NAME/FIGURE; of the audit: audit/ATTACK/probability or audit/ATTACK/extraction_strength",
    )
    op: Literal["<=", ">="]
    threshold: float
    severity: Literal["fail", "warn"] = "fail"


class Audit(Strict):
    """Which attacks are tried on what was released. Each reports how much of the answers to forget comes back."""

    relearn_steps: int = Field(
        default=20,
        ge=0,
        le=1000,
        description="of fine-tuning, on a part of the forget set, and on unrelated text; 0: none",
    )
    relearn_share: float = Field(
        default=0.1, gt=0, lt=1, description="of the forget set that is fine-tuned on; the other rows are measured"
    )
    relearn_learning_rate: float = Field(default=5e-4, gt=0, le=1)
    quantise_bits: list[Literal[4, 8]] = Field(
        default=[8, 4], max_length=2, description="weights of the merged model, rounded to so many bits"
    )
    paraphrases: bool = Field(default=True, description="ask by `paraphrased_question`, where the rows have one")
    prefixes: bool = Field(default=True, description="put jailbreak-style prefixes before each question")

    @property
    def attacks(self) -> list[str]:
        """Those that it asks for, as the report and its gates name them."""
        return [
            *(("relearn_forget", "relearn_unrelated") if self.relearn_steps else ()),
            *(f"quantise_{bits}" for bits in self.quantise_bits),
            *(("paraphrase",) if self.paraphrases else ()),
            *(("prefix",) if self.prefixes else ()),
        ]


class Row(Strict):
    """One inline row, in one of three forms: question/answer, prompt/completion, or text; and what it may have beside."""

    question: str | None = None
    answer: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    paraphrased_question: str | None = Field(default=None, description="the question in other words")
    paraphrased_answer: str | None = Field(default=None, description="the answer in other words")
    perturbed_answer: list[str] | None = Field(default=None, min_length=1, description="wrong answers, worded alike")

    @field_validator("*")
    @classmethod
    def without_nul(cls, value: Any) -> Any:
        """With it, too: rows are kept in files, and what a model was trained on must be possible to forget."""
        return value

    @model_validator(mode="after")
    def one_form(self) -> Self:
        columns = ("question", "answer", "prompt", "completion", "text")
        given = {name for name in columns if getattr(self, name) is not None}
        if given not in ({"question", "answer"}, {"prompt", "completion"}, {"text"}):
            raise ValueError("a row has question and answer, or prompt and completion, or text")
        return self


DataSet = Annotated[str, Field(pattern=r"^ufile_[0-9a-f]{32}$")]
InlineRows = Annotated[list[Row], Field(min_length=1, max_length=INLINE_ROWS_MAX)]
Rows = Annotated[  # told apart beforehand, so that a complaint is about the one that was meant
    Annotated[DataSet, Tag("file")] | Annotated[InlineRows, Tag("rows")],
    Discriminator(lambda value: "rows" if isinstance(value, list) else "file"),
]
ModelName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="a name from GET /v1/models")
]
JobId = Annotated[str, Field(pattern=r"^ujob_[0-9a-f]{32}$")]
RequestId = Annotated[str, Field(pattern=r"^dreq_[0-9a-f]{32}$")]
BenchmarkName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


def _written(time: object) -> object:
    """Seconds since 1970 are no time here: a number that was meant otherwise would pass for one."""
    if isinstance(time, datetime) or (isinstance(time, str) and "T" in time.upper()):
        return time
    raise ValueError("write a time as RFC 3339 does: 2027-01-31T09:00:00Z")


def _to_utc(time: datetime) -> datetime:
    try:
        return time.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("lies outside the years 1 to 9999") from error


Time = Annotated[AwareDatetime, BeforeValidator(_written), AfterValidator(_to_utc)]


class Recipe(Strict):
    """How a model is to forget, whatever it is: what jobs have in common that differ in model and rows."""

    method: MethodChoice
    constraint: Constraint
    budget: Budget = Budget()
    lora: Lora = Lora()
    seed: int = Field(default=0, ge=0, le=EXACT_MAX)
    priority: int = Field(default=5, ge=0, le=9, description="a larger one goes first")
    resources: Resources = Resources()
    limits: Limits = Limits()
    metadata: Metadata = Field(default_factory=dict)
    benchmarks: list[BenchmarkName] = Field(
        default_factory=list, max_length=8, description="names from GET /v1/benchmarks; run before and after"
    )
    audit: Audit | None = Field(
        default=None, description="attacks on what was released; null: those that train nothing"
    )
    gates: list[Gate] = Field(
        default_factory=list, max_length=64, description="beside the constraint and the forget gate"
    )

    @property
    def attacks(self) -> Audit:
        """What is tried on what was released: without `audit` everything but what trains."""
        return self.audit or Audit(relearn_steps=0)


class JobOptions(Recipe):
    """What a request and the stored spec have in common."""

    model: ModelName
    parent: JobId | None = Field(
        default=None,
        description="the job whose adapter this one starts from; what it made the model forget must stay as unlikely; null: the "
        "base model",
    )
    due_at: Time | None = None
    external_id: str | None = Field(default=None, max_length=255)
    deletion_requests: list[RequestId] = Field(
        default_factory=list,
        max_length=64,
        description="approved requests that it serves; its forget set has every row of theirs",
    )


SETS = ("forget_set", "retain_set", "refusal_set", "holdout_set")  # of a request, each an uploaded file's purpose too
FilePurpose = Literal[
    "forget_set",
    "retain_set",
    "refusal_set",
    "holdout_set",
    "eval_set",  # of a benchmark
    "eval_scores",  # stored figures of a retrained model
]


class JobCreate(JobOptions):
    """Body of POST /v1/unlearning/jobs. The sets are ids of uploaded files, or up to 1,000 rows each."""

    forget_set: Rows
    retain_set: Rows
    refusal_set: Rows | None = Field(
        default=None,
        description="for methods that teach a refusal: rows of `text`, each a way to refuse; null: those of the service",
    )
    holdout_set: Rows | None = Field(
        default=None,
        description="rows like the forget set's that the model never saw: membership inference compares with them",
    )


class JobSpec(JobOptions):
    """The persisted request: inline rows have become files, hyperparameters are complete with their defaults."""

    forget_set: DataSet
    retain_set: DataSet
    refusal_set: DataSet | None = None
    holdout_set: DataSet | None = None
    reverifies: JobId | None = None  # the job whose adapter is evaluated again; null: the job trains its own


class Failure(BaseModel):
    code: FailureCode
    message: str
    fault: Literal["client", "platform"]
    retryable: bool
    forget_rows: list[int] = Field(
        default=[],
        description=f"numbers of the rows of the forget set that it failed on, from 1, at most {FAILED_ROWS_MAX:,}; "
        "none: it did not fail on single rows",
    )

    @classmethod
    def of(cls, code: FailureCode, message: str, forget_rows: Sequence[int] = ()) -> Self:
        return cls(
            code=code,
            message=message,
            fault="client" if code in CLIENT_FAULTS else "platform",
            retryable=code in RETRYABLE,
            forget_rows=list(forget_rows),
        )


class GateResult(BaseModel):
    metric: str
    op: Literal["<=", ">="]
    threshold: float | None
    value: float | None
    severity: Literal["fail", "warn"] = "fail"
    result: Literal["PASSED", "WARNED", "FAILED"]
    message: str


VerdictResult = Literal["PASSED", "WARNED", "FAILED", "NOT_KNOWN"]
RELEASED = frozenset({"PASSED", "WARNED"})  # verdicts on an adapter that may be relied on
FORGOTTEN = RELEASED | {"NOT_KNOWN"}  # verdicts after which the model does not know the rows
VERDICT_RULES = 2  # grows whenever the same measurements can get another verdict


class Verdict(BaseModel):
    """On an adapter; or NOT_KNOWN: the model did not know the rows before any training, so nothing was trained."""

    result: VerdictResult
    gates: list[GateResult]
    message: str
    rules: int = Field(default=1, ge=1, description="the rules by which it was given; 1: of before they had a number")
    forgotten_by: JobId | None = Field(
        default=None,
        description="of NOT_KNOWN: the job whose adapter had forgotten the rows already; null: the base model does not know them",
    )

    @model_validator(mode="after")
    def forgotten_already(self) -> Self:
        if self.forgotten_by is not None and self.result != "NOT_KNOWN":
            raise ValueError("only rows that the model does not know were forgotten already")
        return self


class ModelEntry(BaseModel):
    """A model that an administrator registered. `source` is a folder below the models root, or a Hub id."""

    name: str
    source: Literal["path", "hub"]
    location: str  # below the models root, POSIX; or "owner/name"
    revision: str | None = None  # 40 hex digits, of a Hub model
    digest: str | None = None  # "sha256:…" over the files that are loaded; None for a Hub model
    tokenizer_digest: str | None = None
    prompt_format: "PromptFormat"
    gpu_class: str = "any"
    info: dict[str, Any] = Field(default_factory=dict)  # architecture, context length, vocabulary, from config.json
    created_at: datetime | None = None

    @model_validator(mode="after")
    def _has_a_date(self) -> Self:
        """Of an entry that was registered before prompt formats had one."""
        form = self.prompt_format
        if form.type == "chat" and form.template_date is None and self.created_at is not None:
            self.prompt_format = form.model_copy(update={"template_date": self.created_at.date()})
        return self


def _pinned(revision: str) -> str:
    if re.fullmatch(COMMIT, revision) is None:
        raise ValueError("give the 40 hex digits of a commit; a branch or a tag moves")
    return revision


class HubFile(Strict):
    """A file of a public data set on the Hugging Face Hub, at one commit: JSON Lines, one JSON array, or Parquet."""

    repo: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$", description="owner/name"
    )
    revision: Annotated[str, AfterValidator(_pinned), Field(json_schema_extra={"pattern": COMMIT})]
    path: str = Field(max_length=255, pattern=PLAIN_PATH, description="of the file, in the repository")
    columns: dict[str, Annotated[str, Field(max_length=255)]] = Field(
        default_factory=dict, max_length=16, description="our name of a column -> theirs, where they differ"
    )

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}/{self.path}"


BenchmarkSet = Annotated[  # told apart beforehand, as Rows are
    Annotated[DataSet, Tag("file")] | Annotated[HubFile, Tag("hub")],
    Discriminator(lambda value: "hub" if isinstance(value, dict | HubFile) else "file"),
]


class BenchmarkOptions(Strict):
    """What a registration and the stored benchmark have in common."""

    name: BenchmarkName
    suite: Literal["tofu", "muse"]
    corpus: str = Field(
        min_length=1, max_length=255, description="what the data is, for the report: 'TOFU forget01', 'MUSE News'"
    )
    retrained_model: ModelName | None = Field(
        default=None, description="a registered model that never saw the forget set; it is measured once"
    )
    retrained_scores: DataSet | None = Field(
        default=None,
        description="or its stored figures on these very rows, as `unlearn evaluate` or the reference prints them",
    )

    @model_validator(mode="after")
    def one_reference(self) -> Self:
        if self.retrained_model is not None and self.retrained_scores is not None:
            raise ValueError("give at most one of retrained_model and retrained_scores")
        return self


class BenchmarkCreate(BenchmarkOptions):
    """Body of POST /v1/benchmarks: eval_set files, uploaded or on the Hub, under the names that the suite gives its sets."""

    sets: dict[str, BenchmarkSet] = Field(
        min_length=1,
        max_length=16,
        description="the suite's name of a set (GET /v1/suites) -> the id of its file, or a file on the Hub, "
        "where this deployment fetches from there",
    )


class BenchmarkSpec(BenchmarkOptions):
    """The persisted benchmark: what was on the Hub has become files."""

    sets: dict[str, DataSet]


class PromptFormat(BaseModel):
    """How a question becomes a prompt: the tokeniser's chat template, or four strings around it."""

    type: Literal["chat", "plain"] = "plain"
    system: str | None = None  # chat only, as the next two
    template_arguments: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="passed to the chat template beside the messages: enable_thinking, date_string",
    )
    template_date: date | None = Field(
        None,
        description="the date for a chat template that reads the clock, so that a row has the same tokens every day",
    )
    user_start: str = "Question: "
    user_end: str = "\n"
    assistant_start: str = "Answer: "

    @property
    def ends_in_space(self) -> bool:
        """Then the answer's first token has the space, and a server that asks with the prompt alone sends another."""
        return self.type == "plain" and (self.user_end + self.assistant_start).endswith(" ")


ModelEntry.model_rebuild()
