"""A deletion request: what the law calls erasure, before and beside the jobs that carry it out.

Its statuses, its deadlines, and what is asked of it.
"""

import unicodedata
from calendar import monthrange
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from service.domain.job import DataSet, Metadata, ModelName, Recipe, Rows, Strict, Time


class RequestStatus(StrEnum):
    RECEIVED = "received"
    PENDING_APPROVAL = "pending_approval"
    APPROVED = "approved"  # waits for a job that serves it
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    DENIED = "denied"
    CANCELLED = "cancelled"
    FAILED = "failed"  # needs a person


class Regulation(StrEnum):
    GDPR = "gdpr"
    CCPA = "ccpa"
    OTHER = "other"


class DenialReason(StrEnum):
    """Those of the Data Rights Protocol."""

    SUSPECTED_FRAUD = "suspected_fraud"
    INSUF_VERIFICATION = "insuf_verification"
    NO_MATCH = "no_match"
    CLAIM_NOT_COVERED = "claim_not_covered"
    OUTSIDE_JURISDICTION = "outside_jurisdiction"
    TOO_MANY_REQUESTS = "too_many_requests"
    OTHER = "other"


R = RequestStatus
TRANSITIONS: Mapping[RequestStatus, frozenset[RequestStatus]] = MappingProxyType(
    {
        R.RECEIVED: frozenset({R.PENDING_APPROVAL, R.APPROVED}),
        R.PENDING_APPROVAL: frozenset({R.APPROVED, R.DENIED, R.CANCELLED}),
        R.APPROVED: frozenset({R.IN_PROGRESS, R.FAILED, R.DENIED, R.CANCELLED}),
        R.IN_PROGRESS: frozenset({R.APPROVED, R.COMPLETED, R.FAILED}),
        R.FAILED: frozenset({R.APPROVED, R.IN_PROGRESS, R.COMPLETED, R.CANCELLED}),
        R.COMPLETED: frozenset(),
        R.DENIED: frozenset(),
        R.CANCELLED: frozenset(),
    }
)
CLOSED = frozenset({R.COMPLETED, R.DENIED, R.CANCELLED})
SERVABLE = frozenset({R.APPROVED, R.IN_PROGRESS, R.FAILED})  # a job may serve it

CLOCK_SKEW = timedelta(minutes=1)
CCPA_DAYS = 45
PLAN_REQUESTS_MAX = 64  # as many as a job can name
WINDOW_MAX_S = 2_592_000  # 30 days


def months_after(time: datetime, months: int) -> datetime:
    """The same day of a later month, or its last where it has no such day (as Regulation 1182/71, article 3(2c), counts).

    >>> months_after(datetime(2027, 1, 31, 9), 1)
    datetime.datetime(2027, 2, 28, 9, 0)
    """
    years, month = divmod(time.month - 1 + months, 12)
    year = time.year + years
    return time.replace(year=year, month=month + 1, day=min(time.day, monthrange(year, month + 1)[1]))


def due(regulation: Regulation, received_at: datetime) -> datetime | None:
    """By law: GDPR article 12(3); CCPA, Cal. Civ. Code 1798.130(a)(2). None: the law says nothing that we know."""
    match regulation:
        case Regulation.GDPR:
            return months_after(received_at, 1)
        case Regulation.CCPA:
            return received_at + timedelta(days=CCPA_DAYS)
        case Regulation.OTHER:
            return None


def due_extended(regulation: Regulation, received_at: datetime) -> datetime | None:
    """The latest to which it can be extended: two more months, or 45 more days; counted from the receipt, as the first."""
    match regulation:
        case Regulation.GDPR:
            return months_after(received_at, 3)
        case Regulation.CCPA:
            return received_at + timedelta(days=2 * CCPA_DAYS)
        case Regulation.OTHER:
            return None


def plain_subject(identifier: str) -> str:
    """What is digested of a subject's identifier: an e-mail address is the same in capitals."""
    return unicodedata.normalize("NFKC", identifier).strip().casefold()


def _now() -> datetime:
    return datetime.now(UTC)


def _not_in_future(time: datetime) -> datetime:
    if time > _now() + CLOCK_SKEW:
        raise ValueError("lies in the future")
    return time


def _no_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half a surrogate pair, which is no character") from error
    return text


def _distinct(models: list[str]) -> list[str]:
    if len(set(models)) < len(models):
        raise ValueError("names a model twice")
    return models


Subject = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_no_surrogates)]
Reason = Annotated[str, Field(min_length=1, max_length=1000, description="for people to read; name nobody in it")]


class DeletionCreate(Strict):
    """Body of POST /v1/deletion-requests."""

    external_reference: str | None = Field(
        default=None, min_length=1, max_length=255, description="its number in the system that it comes from"
    )
    regulation: Regulation
    received_at: Annotated[Time, AfterValidator(_not_in_future)] = Field(default_factory=_now)
    due_at: Time | None = Field(
        default=None,
        description="null: gdpr one calendar month after receipt, ccpa 45 days, and no later; for other it must be given",
    )
    models: Annotated[list[ModelName], Field(min_length=1, max_length=16), AfterValidator(_distinct)]
    forget_set: Rows = Field(description="what they must forget: the id of an uploaded file, or up to 1,000 rows")
    subjects: list[Subject] = Field(
        default_factory=list,
        max_length=100,
        description="who it is about, such as e-mail addresses: kept only as keyed digests, by which it can be found",
    )
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def has_a_deadline(self) -> Self:
        deadline = self.deadline
        if deadline is None:
            raise ValueError("regulation other has no deadline of its own: give due_at")
        if deadline <= self.received_at:
            raise ValueError("due_at is not after received_at")
        return self

    @field_validator("due_at")
    @classmethod
    def is_not_past_the_laws(cls, due_at: datetime | None, info: ValidationInfo) -> datetime | None:
        told = info.data
        if due_at is None or not {"regulation", "received_at"} <= told.keys():  # what is wrong with these, they say
            return due_at
        latest = due(told["regulation"], told["received_at"])
        if latest is not None and due_at > latest:
            by_law = f"{latest:%Y-%m-%d %H:%M:%S} UTC"
            raise ValueError(
                f"by {told['regulation']} it is due at {by_law} at the latest: extend it later, with a reason"
            )
        return due_at

    @property
    def deadline(self) -> datetime | None:
        return self.due_at or due(self.regulation, self.received_at)


class Denial(Strict):
    reason: DenialReason
    note: str | None = Field(default=None, max_length=1000, description="for people to read; name nobody in it")


class Extension(Strict):
    reason: Reason
    due_at: Time | None = Field(
        default=None,
        description="null: as late as allowed (gdpr: three months after receipt; ccpa: 90 days); for other give it",
    )


class Closing(Strict):
    reason: Reason


class PlannedJob(Recipe):
    """A job without what differs from one to the next: its requests, their rows, its parent and its due date."""

    retain_set: DataSet
    refusal_set: DataSet | None = None
    holdout_set: DataSet | None = None


class PlanPut(Strict):
    """Body of PUT /v1/deletion-plans/{model}."""

    job: PlannedJob
    window_seconds: int = Field(
        ge=0, le=WINDOW_MAX_S, description="how long the first approved request waits for others"
    )
    requests_max: int = Field(ge=1, le=PLAN_REQUESTS_MAX, description="as many make a job at once")
