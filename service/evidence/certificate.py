"""The certificate of a job: an in-toto Statement v1 about the files of the adapter, to be signed as a DSSE envelope.

It binds what was asked, what was done and what was measured to the bytes that were released. Where the model did not know the
rows, nothing was: then it is about the files of the model that does not know them. A second statement says the same
verdict in in-toto's test-result v0.1, for policy engines that know nothing of unlearning. No text of a row stands in either, and
no person's name: deletion requests are their opaque ids, and the sets are digests and counts.
"""

import base64
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, field_validator, model_validator

from service.domain.job import JobId, VerdictResult
from service.evidence import canonical, dsse
from service.evidence.canonical import Digest, Instant, Sha256, Strict
from service.evidence.chain import Head
from service.evidence.keys import SigningKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT: Final = "https://in-toto.io/Statement/v1"
UNLEARNING_V1: Final = "urn:unlearning-service:unlearning:v1"  # no longer written: without the verdict's rules
UNLEARNING: Final = "urn:unlearning-service:unlearning:v2"
REVERIFICATION: Final = "urn:unlearning-service:reverification:v1"
TEST_RESULT: Final = "https://in-toto.io/attestation/test-result/v0.1"

LIMITATIONS = (  # of every certificate; those of the run come from its report
    "The signature shows that the holder of the key issued these statements about these files, not that the measurements behind "
    "them were made or were right.",
    "The digests name the sets as they were handed in; that these sets are all of the data to be forgotten is not shown. A keyed "
    "digest can be checked only by who has its key.",
    "The audit log is fixed up to the entry named here. What follows it is fixed only by later certificates.",
)

Result = Literal["PASSED", "WARNED", "FAILED"]  # of a test
Count = Annotated[int, Field(ge=0)]
# Below the adapter's folder: no absolute path, no "..", nothing that a file system reads otherwise
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$")]


class DigestSet(Strict):
    sha256: Sha256


class Subject(Strict):
    name: FileName
    digest: DigestSet


class BaseModelRef(Strict):
    id: str  # as registered
    source: str  # "hub owner/name" or "local folder"
    revision: str | None
    digest: Digest
    tokenizer_digest: Digest


class ParentRef(Strict):
    """The job whose adapter this one started from, and which it contains."""

    job_id: str
    files: list[Subject]


class SetRef(Strict):
    digest: Digest  # of the set as stored; keyed where a plain one could be guessed
    rows: Count


class Method(Strict):
    type: str
    hyperparameters: dict[str, JsonValue]
    seed: Annotated[
        str, Field(pattern=r"^[0-9]+$")
    ]  # decimal digits: a seed may be larger than JSON's numbers are exact


class Bound(Strict):
    """The constraint: the retain set's mean negative log-likelihood per counted token, in nats."""

    metric: Literal["retain_nll"] = "retain_nll"
    unit: Literal["nats per token"] = "nats per token"
    epsilon: float
    before: float
    measured: float | None
    feasible: bool | None  # null: it could not be measured


class GateOutcome(Strict):
    metric: str
    op: Literal["<=", ">="]
    threshold: float | None
    value: float | None
    severity: Literal["fail", "warn"]
    result: Result
    message: str

    @property
    def name(self) -> str:
        return f"{self.metric} {self.op} {self.threshold!r}" if self.threshold is not None else self.metric


class Outcome(Strict):
    result: VerdictResult
    message: str
    gates: list[GateOutcome]
    rules: Annotated[int, Field(ge=1)] = 1  # by which it was given
    forgotten_by: JobId | None = None  # of NOT_KNOWN: the job whose adapter had forgotten the rows already


class Measure(Strict):
    set: str
    metric: str
    before: float | None
    after: float | None
    rows: Count


class Environment(Strict):
    code_version: str
    lock_digest: Digest | None  # of all that was installed where it ran, NAME==VERSION each; null: it was not noted
    hardware: str
    versions: dict[str, str]


class Unlearning(Strict):
    """Our predicate."""

    job_id: str
    deletion_requests: list[str]
    parent: ParentRef | None
    base_model: BaseModelRef
    forget_set: SetRef
    retain_set: SetRef
    method: Method
    constraint: Bound
    verdict: Outcome
    figures: list[Measure]
    report: DigestSet  # of report.json's bytes
    environment: Environment
    started_at: Instant
    finished_at: Instant
    audit_head: Head  # of the tenant's audit log when this was issued
    limitations: Annotated[list[str], Field(min_length=1)]

    @property
    def of_base_model(self) -> bool:
        """Whether the certificate is about the files of the base model. Else they are an adapter's."""
        return self.verdict.result == "NOT_KNOWN" and self.verdict.forgotten_by is None


class Reverification(Unlearning):
    """The predicate of a job that trained nothing and evaluated, under later verdict rules, the adapter of another job."""

    reverifies: JobId  # the job that released the adapter


def _kind(predicate: Any) -> str:
    fields = predicate if isinstance(predicate, Mapping) else vars(predicate)
    return REVERIFICATION if "reverifies" in fields else UNLEARNING


Predicate = Annotated[
    Annotated[Unlearning, Tag(UNLEARNING)] | Annotated[Reverification, Tag(REVERIFICATION)], Discriminator(_kind)
]


class Statement(Strict):
    type_: Literal["https://in-toto.io/Statement/v1"] = Field(default=STATEMENT, alias="_type")
    subject: Annotated[list[Subject], Field(min_length=1)]

    @field_validator("subject")
    @classmethod
    def named_once(cls, subject: list[Subject]) -> list[Subject]:
        if len({one.name for one in subject}) < len(subject):
            raise ValueError("two files have one name")
        return subject


class Certificate(Statement):
    predicate_type: Literal[
        "urn:unlearning-service:unlearning:v1",
        "urn:unlearning-service:unlearning:v2",
        "urn:unlearning-service:reverification:v1",
    ] = Field(default=UNLEARNING, alias="predicateType")
    predicate: Predicate

    @model_validator(mode="after")
    def as_its_version_has_it(self) -> Self:
        if (self.predicate_type == REVERIFICATION) != isinstance(self.predicate, Reverification):
            raise ValueError("a reverification, and nothing else, names the job that it reverifies")
        numbered = "rules" in self.predicate.verdict.model_fields_set
        if numbered != (self.predicate_type != UNLEARNING_V1):
            raise ValueError("the verdict has the number of its rules from the second version on, and needs it there")
        return self


class Configuration(Strict):
    """An in-toto ResourceDescriptor that carries what it describes."""

    name: str
    media_type: Literal["application/json"] = Field(default="application/json", alias="mediaType")
    digest: DigestSet
    content: str  # base64

    @classmethod
    def of(cls, name: str, value: Any) -> Self:
        content = canonical.dumps(value)
        digest = DigestSet(sha256=canonical.sha256(content))
        return cls(name=name, digest=digest, content=base64.b64encode(content).decode())


class GenericPredicate(Strict):
    """in-toto's test-result v0.1."""

    result: Result
    configuration: list[Configuration]
    passed_tests: list[str] = Field(alias="passedTests")
    warned_tests: list[str] = Field(alias="warnedTests")
    failed_tests: list[str] = Field(alias="failedTests")


class GenericResult(Statement):
    predicate_type: Literal["https://in-toto.io/attestation/test-result/v0.1"] = Field(
        default=TEST_RESULT, alias="predicateType"
    )
    predicate: GenericPredicate


def certify(files: Mapping[str, str], predicate: Unlearning | Reverification) -> Certificate:
    """The statement about the files of the adapter or of the base model: name below its folder -> SHA-256 in 64 hex digits.

    Raises ValueError if there is none: then there is nothing that a certificate could be about.
    """
    kind: Literal["urn:unlearning-service:unlearning:v2", "urn:unlearning-service:reverification:v1"] = (
        REVERIFICATION if isinstance(predicate, Reverification) else UNLEARNING
    )
    return Certificate(predicate_type=kind, subject=subjects(files), predicate=predicate)


def subjects(files: Mapping[str, str]) -> list[Subject]:
    return [Subject(name=name, digest=DigestSet(sha256=sha256)) for name, sha256 in sorted(files.items())]


def generic_result(certificate: Certificate) -> GenericResult:
    """The same verdict on the same files for generic policy engines: each gate is a test.

    NOT_KNOWN is WARNED there: nothing speaks against the files, but that a job passed was not shown.
    """
    said = certificate.predicate
    tests: dict[Result, list[str]] = {"PASSED": [], "WARNED": [], "FAILED": []}
    for gate in said.verdict.gates:
        tests[gate.result].append(gate.name)
    asked = {
        "method": said.method.model_dump(),
        "epsilon": said.constraint.epsilon,
        "gates": [gate.name for gate in said.verdict.gates],
    }
    return GenericResult(
        subject=certificate.subject,
        predicate=GenericPredicate(
            result="WARNED" if said.verdict.result == "NOT_KNOWN" else said.verdict.result,
            configuration=[Configuration.of("request.json", asked)],
            passed_tests=tests["PASSED"],
            warned_tests=tests["WARNED"],
            failed_tests=tests["FAILED"],
        ),
    )


def issue(statement: Statement, key: SigningKey) -> dsse.Envelope:
    """Signed. `dsse.to_json` gives the file's bytes."""
    return dsse.sign(PAYLOAD_TYPE, canonical.dumps(statement), key)


def read(envelope: dsse.Envelope) -> Certificate:
    """What an envelope says, signed or not. Raises ValueError if it is no certificate of ours."""
    if envelope.payload_type != PAYLOAD_TYPE:
        raise ValueError(f"its payload is {envelope.payload_type!r}, not {PAYLOAD_TYPE}")
    return Certificate.model_validate(canonical.loads(envelope.payload))
