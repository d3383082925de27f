"""The report of a job: what was asked, what was done, what was measured, what is promised and what is not.

No text of the forget or retain set stands in it, and no request can ask for any: rows are named by number and keyed digest,
which stay when the sets are purged. A figure that could not be measured is null with its reason, never 0.
Published as JSON Schema at /v1/schemas/report.
"""

import math
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from service.domain.job import Budget, Constraint, Lora, PromptFormat, Verdict, VerdictResult

NOT_FINITE = "the value was not finite"
NOT_TRAINED = "nothing was trained"  # why nothing was measured after
EARLIER = "forgotten/"  # how the gates on the rows of earlier jobs begin, before the job's id


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A run that blew up must be reported: what is not a finite number becomes null, here and nowhere else.
Measured = Annotated[float | None, BeforeValidator(_finite)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Composition(Part):
    forget_loss: str
    retain_loss: str  # what was trained; the bound is on the NLL whatever it is
    solver: str


class Asked(Part):
    model: str
    method: str
    composition: Composition
    hyperparameters: dict[str, Any]
    constraint: Constraint
    budget: Budget
    lora: Lora
    seed: int


class BaseModelFacts(Part):
    name: str
    source: str  # "hub owner/name", or "local folder": a path of the worker's machine is nobody's business
    revision: str | None
    digest: str
    tokenizer_digest: str
    files: dict[str, str] = Field(
        default_factory=dict, description="name -> SHA-256 of each file that was loaded; empty: of an earlier worker"
    )
    architecture: str
    parameters: int
    trainable_parameters: int
    vocabulary: int
    context_tokens: int
    dtype: str
    prompt_format: PromptFormat
    head: Literal["fused", "plain"]  # whether the language-model head took the chunked path


class DataFacts(Part):
    file_id: str
    digest: str  # keyed: only the service can tell whose rows it is of
    rows: int
    counted_tokens: int  # labelled tokens, end of sequence included
    unmeasured_rows: int  # rows whose labels vanished in the tokeniser's merge over the seam


class Forgotten(Part):
    """An earlier job of the chain: the mean probability of its forget rows, which must stay low."""

    job_id: str
    rows: int | None  # over which the means are taken; null: they are no longer kept
    base: Measured  # of the base model alone
    limit: Measured = None  # that `after` must keep; null: a tenth of `base`
    before: Measured  # of the adapter that this job started from
    after: Measured
    reason: str | None = None  # why one of them is null

    @model_validator(mode="after")
    def null_has_its_reason(self) -> Self:
        if self.base is None or self.before is None or self.after is None:
            self.reason = self.reason or NOT_FINITE
        return self


class Parent(Part):
    """The job whose adapter this one started from: `before` is the base model with that adapter."""

    job_id: str
    files: list["AdapterFile"]  # of its adapter, which the released one contains
    forgotten: list[Forgotten]  # the chain, that job first; then jobs whose rows the chain had forgotten already


class ConstraintFacts(Part):
    metric: Literal["retain_nll"] = "retain_nll"
    unit: Literal["nats per token"] = "nats per token"
    epsilon: float
    source: Literal["absolute", "relative"]
    before: float
    after: Measured
    upper: Measured  # what is compared with epsilon; equal to `after`, since every measurable row was measured
    slack: Measured  # epsilon - upper
    tolerance: float  # of the measurement at this precision
    satisfied: bool | None
    rows_measured: int
    rows_total: int
    reason: str | None = None  # why `after` is null

    @model_validator(mode="after")
    def null_has_its_reason(self) -> Self:
        if self.upper is None:
            self.reason, self.slack, self.satisfied = self.reason or NOT_FINITE, None, None
        return self


Interval = tuple[Measured, Measured]  # 95 %, by bootstrap over rows


class Figure(Part):
    set: Literal["forget", "retain"]
    metric: str  # probability, exact_memorization, extraction_strength, rouge_l_recall, nll
    better: Literal["lower", "higher"] | None  # which way unlearning wants it; null: neither
    definition: str
    before: Measured
    after: Measured
    before_interval: Interval | None = None
    after_interval: Interval | None = None
    rows: int  # over which the mean is taken
    reason: str | None = None  # why one of them is null

    @model_validator(mode="after")
    def null_has_its_reason(self) -> Self:
        if self.before is None or self.after is None:
            self.reason = self.reason or NOT_FINITE
        return self


class DisclosureWay(Part):
    """One way of asking for all rows."""

    way: str  # question, paraphrase, prefix, sample, continuation
    description: str
    outputs: int
    disclosing: int  # that contain the row's secret; of a way in which a row is asked one time, rows
    by_chance: int  # so many are explained by how often decoys come out
    rows: list[int]  # 1-based, whose secret came out
    beyond: list[int]  # 1-based: those of them that chance does not explain


class Disclosure(Part):
    """What the model says when it is asked for rows that it was to forget. Of what it said, nothing is kept."""

    of: str  # "forget", or the job of the chain whose rows they are
    # as released, or with its weights rounded; of a job that was not trained what it started from, and the base model
    model: Literal["released", "quantise_8", "quantise_4", "start", "base"]
    rows: int  # that were asked for
    rows_in_every_way: int  # of them; the others were asked plainly alone
    rows_total: int
    without_secret: list[int]  # 1-based: nothing in their answers tells knowing from guessing
    before: list[int] | None  # 1-based: asked plainly, the model that the job started from disclosed these
    ways: list[DisclosureWay]
    disclosed: list[int]  # 1-based: in a way in which more came out than chance explains


class Answered(Part):
    """Rows that must still be answered: the retain rows nearest to the forgotten ones, asked plainly, and others."""

    rows: int  # that were asked for
    before: int  # of them answered before: their secret came out
    after: int  # of those that were answered before, answered still
    lost: list[int]  # 1-based: the others of those
    upper: Measured  # one-sided 95 % upper bound of the share that is answered still
    reason: str | None = None  # why that is null


class Likelihood(Part):
    """The limits that the forgotten rows' probabilities are held against."""

    mean_limit: float
    floor: str | None  # where the limit comes from, if not from a tenth of before
    rows_above: list[int]  # 1-based: above the row's own limit
    rows_allowed: int
    rows_unknown: list[int] = []  # without a limit of their own: before, a wrong answer was likelier


class LanguageFacts(Part):
    """Whether what the model says to the forgotten questions is language, by the base model's judgement."""

    outputs: int
    refusals: int  # not judged: they are language
    nll: Measured  # under the base model, nats per token
    usual: Measured  # of wrong answers of the right form, or of the base's own samples
    excess: Measured  # one-sided 95 % lower bound of how much the first is above the second
    looping: Measured  # share of the answers that go round in circles
    noise: bool


class Conspicuous(Part):
    """How the right answers stand against the floor: far below it they stick out as what was removed."""

    ratio: Measured  # geometric mean over rows
    upper: Measured  # its one-sided 95 % upper bound
    against: str


class RowPoint(Part):
    """One row, by its number in the file and by the digest that a deletion request has of it: of the row's text, nothing."""

    row: int  # 1-based
    digest: str | None = None  # keyed, as service.evidence.rowdigest makes it; null: of an earlier worker
    before: Measured
    after: Measured


class RequestFigures(Part):
    """A deletion request that the job serves: how probable its rows' answers are, on average."""

    request_id: str
    rows: int
    rows_measured: int
    before: Measured
    after: Measured
    reason: str | None = None  # why one of them is null

    @model_validator(mode="after")
    def null_has_its_reason(self) -> Self:
        if self.before is None or self.after is None:
            self.reason = self.reason or NOT_FINITE
        return self


class BenchmarkFigure(Part):
    name: str
    definition: str
    better: Literal["lower", "higher"] | None
    benchmark: bool  # computed as the benchmark's reference does, under its name; false: ours, beside it
    before: Measured
    after: Measured
    retrained: Measured  # of the retrained reference, where there is one
    before_interval: Interval | None
    after_interval: Interval | None
    rows: int
    reason: str | None = None  # why `before` or `after` is null

    @model_validator(mode="after")
    def null_has_its_reason(self) -> Self:
        if self.before is None or self.after is None:
            self.reason = self.reason or NOT_FINITE
        return self


class BenchmarkSet(Part):
    name: str
    digest: str
    rows: int
    beyond_context: int  # rows longer than the model's context: run as the reference runs them
    unmeasured_rows: int


class BenchmarkFacts(Part):
    name: str  # as registered
    suite: Literal["tofu", "muse"]
    corpus: str
    sets: list[BenchmarkSet]
    retrained: str | None  # what the retrained reference is: a registered model, or stored scores with their digest
    figures: list[BenchmarkFigure]
    truth_ratios: dict[Literal["before", "after", "retrained"], list[Measured]]  # of the forget rows; empty: none


class AuditEntry(Part):
    """One attack, and how much of the forgotten answers it brought back: means over the rows that were measured."""

    attack: str  # relearn_forget, relearn_unrelated, quantise_8, quantise_4, paraphrase, prefix
    setting: str  # in words
    metric: Literal["probability", "extraction_strength"]
    base: Measured  # of the base model under the same attack: what there is to bring back
    released: Measured  # of what was released (or, if nothing was, of the last iterate), before the attack
    attacked: Measured
    retrained: Measured  # of the retrained reference under the same attack, where there is one
    rows: int
    reason: str | None = None  # why `base`, `released` or `attacked` is null

    @model_validator(mode="after")
    def null_has_its_reason(self) -> Self:
        if self.base is None or self.released is None or self.attacked is None:
            self.reason = self.reason or NOT_FINITE
        return self


class Knowledge(Part):
    """Whether a model knows the forget rows before any training: right answers against wrong ones of the same wording.

    A row's log ratio is the right answer's mean log-likelihood per token (nats) less that of its wrong ones.
    """

    model: Literal["base", "start"]  # start: the base model with the adapter that the job starts from
    equivalent: bool | None  # to a model that never saw the rows; null: it could not be decided, so the job trains
    mean: Measured  # log ratio over rows
    upper: Measured  # its one-sided 95 % bound; rows about one subject are dependent
    margin: float  # `upper` must lie below it
    rows: int  # that have a log ratio
    subjects: int  # that these rows are about
    recited: list[int] = Field(
        default_factory=list
    )  # numbers of rows of which it says a right answer nearly for certain
    reason: str | None = None  # why it could not be decided


class TextKnowledge(Part):
    """Whether a model knows forget rows of `text` before any training: how likely they are beside texts of the holdout set."""

    model: Literal["base", "start"]  # start: the base model with the adapter that the job starts from
    equivalent: bool | None  # to a model that never saw the texts; null: it could not be decided, so the job trains
    auc: Measured  # how often a forget text is likelier than a holdout text
    upper: Measured  # its one-sided 95 % bound
    threshold: float  # `upper` must lie below it
    rows: int  # of `text`, of the forget set
    holdout_rows: int
    likeliest: int  # forget texts among as many of both sets that are likeliest, where they are most conspicuous
    likeliest_of: int
    recited: list[int] = Field(default_factory=list)  # numbers of rows that it says nearly for certain
    reason: str | None = None  # why it could not be decided


class StepPoint(Part):
    step: int
    forget_loss: Measured  # null: it was not finite
    retain_loss: Measured
    dual: Measured  # null for solvers without one
    violation: Measured
    learning_rate: float
    gradient_norm: Measured


class CheckPoint(Part):
    step: int
    forget_objective: Measured
    forget_probability: Measured
    retain_loss: Measured
    retain_upper: Measured
    feasible: bool


class Logged(Part):
    mean: Measured
    least: Measured
    most: Measured
    last: Measured
    steps: int  # that logged it


class Trajectory(Part):
    steps: list[StepPoint]  # thinned to at most 500 points; the whole series is at /steps
    steps_total: int
    checks: list[CheckPoint]  # thinned too; the first, the last and the best so far stay
    checks_total: int
    feasible_checks: int
    feasible_steps: int  # steps whose batch kept the bound
    logged: dict[str, Logged]  # what the solver alone logs, over all steps
    resumed: list[int] = Field(default_factory=list)  # the steps after which an attempt went on from a checkpoint


class StopFacts(Part):
    reason: str
    message: str
    step: int


class Released(Part):
    """What `after` describes: the published adapter, or, if none kept the bound, the last iterate, which was not published.

    Of a job that was not trained, because the model does not know the rows, nothing was measured after."""

    published: bool
    step: int
    files: list["AdapterFile"]
    message: str
    load: str | None  # Python that loads it


class AdapterFile(Part):
    name: str
    bytes: int
    sha256: str


class Note(Part):
    code: str
    message: str


class Environment(Part):
    versions: dict[str, str]
    python: str
    platform: str
    device: str
    threads: int
    code_version: str
    installed: str | None = None  # digest of every installed distribution with its version; null: of an earlier worker


class Report(Part):
    schema_version: Literal["1"] = "1"
    job_id: str
    attempt: int
    created_at: datetime
    reverifies: str | None = Field(
        default=None,
        description="the job whose adapter was evaluated again, without training; null: the report is on what the job trained",
    )
    verdict: Verdict
    asked: Asked
    base_model: BaseModelFacts
    parent: Parent | None = None
    forget_set: DataFacts
    retain_set: DataFacts
    holdout_set: DataFacts | None = None
    constraint: ConstraintFacts
    figures: list[Figure]
    rows: dict[str, list[RowPoint]] = Field(
        default_factory=dict,
        description="per row, by number and keyed digest: forget/probability and retain/probability",
    )
    deletion_requests: list[RequestFigures] = Field(default_factory=list, description="that the job serves")
    benchmarks: list[BenchmarkFacts] = Field(default_factory=list)
    audit: list[AuditEntry] = Field(default_factory=list)
    likelihood: Likelihood | None = Field(default=None, description="null: of an earlier worker; so are the next four")
    disclosure: list[Disclosure] = Field(default_factory=list)
    answered: Answered | None = None
    language: LanguageFacts | None = None
    conspicuous: Conspicuous | None = None
    knowledge: list[Knowledge] = Field(
        default_factory=list,
        description="of what the job starts from and, if it was not trained, of the base model; none: no answers to forget",
    )
    text_knowledge: list[TextKnowledge] = Field(default_factory=list, description="the same of rows of `text`")
    stop: StopFacts
    released: Released
    trajectory: Trajectory
    warnings: list[Note]
    timings_seconds: dict[str, float]
    environment: Environment
    caveats: list[str] = Field(description="what this report does not prove")


class ChainJob(Part):
    """One job of a chain, as its own report has it."""

    job_id: str
    created_at: datetime
    model: str
    base_digest: str
    parent: str | None  # the job whose adapter it started from
    method: str
    result: VerdictResult
    released: bool
    forget_rows: int
    forget_digest: str
    retain_digest: str
    epsilon: float
    retain_before: float
    retain_after: Measured


class ChainSeries(Part):
    """A figure over the jobs of a chain; null where a job did not ask for it or could not measure it."""

    source: str  # "request", or the name of a benchmark
    figure: str
    definition: str
    better: Literal["lower", "higher"] | None
    benchmark: bool  # as in BenchmarkFigure; of a request's figures always false
    before: list[Measured]  # one value per job, in the chain's order
    after: list[Measured]
    retrained: list[Measured]


class ChainReport(Part):
    """Several reports in order: what holds on as requests follow on each other, and what grows with their size."""

    schema_version: Literal["1"] = "1"
    jobs: list[ChainJob]
    series: list[ChainSeries]
    comparable: list[str] = Field(description="what may be compared over the jobs, and what the chain shows")
    not_comparable: list[str] = Field(description="what may not, with the reason")


Released.model_rebuild()
Parent.model_rebuild()
