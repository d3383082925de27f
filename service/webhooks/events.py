"""What a webhook may tell. The body is thin: it names the object and its status, and its receiver fetches the rest with
a key of its own, so a body holds nothing of anybody's."""

import json
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple

BODY_MAX_BYTES = 20_000


class EventType(StrEnum):
    REQUEST_RECEIVED = "deletion_request.received"
    REQUEST_APPROVED = "deletion_request.approved"
    REQUEST_DENIED = "deletion_request.denied"
    REQUEST_COMPLETED = "deletion_request.completed"
    REQUEST_FAILED = "deletion_request.failed"
    REQUEST_REQUEUED = "deletion_request.requeued"
    REQUEST_OVERDUE = "deletion_request.overdue"
    JOB_QUEUED = "unlearning.job.queued"
    JOB_STARTED = "unlearning.job.started"
    JOB_PAUSED = "unlearning.job.paused"
    JOB_SUCCEEDED = "unlearning.job.succeeded"
    JOB_FAILED = "unlearning.job.failed"
    JOB_CANCELLED = "unlearning.job.cancelled"
    CERTIFICATE_ISSUED = "certificate.issued"
    TEST = "webhook.test"


class Subject(NamedTuple):
    """The object that it happened to, as the API shows these three fields."""

    id: str
    object: str
    status: str


def body(event: EventType, at: datetime, subject: Subject) -> bytes:
    """The bytes to store, sign and send: every attempt sends the same ones. `at`, aware: when it happened."""
    if at.tzinfo is None:
        raise ValueError("a time without a zone")
    timestamp = at.astimezone(UTC).isoformat().replace("+00:00", "Z")
    told = {"type": event, "timestamp": timestamp, "data": subject._asdict()}
    content = json.dumps(told, separators=(",", ":")).encode()
    if len(content) >= BODY_MAX_BYTES:
        raise ValueError(f"a body of {len(content)} bytes; below {BODY_MAX_BYTES} are allowed")
    return content
