"""What a client that looks again and again is told: when to come back, and whether anything has changed."""

import json
import re
from collections.abc import Sequence
from hashlib import sha256

from service.api.shapes import BaseModelRef, JobObject
from service.domain.job import TERMINAL, Status

QUEUED_RETRY_S = 10
RUNNING_RETRY_S = 30
WAIT_MAX_S = 30


# Of the object's form: the same job is answered otherwise by a service that knows more of it.
FORM = sha256(json.dumps(JobObject.model_json_schema()).encode()).hexdigest()


def headers(job: JobObject) -> dict[str, str]:
    etag = tag(job.version, job.base_model, job.progress.queue_position, job.status_reason, job.result.certificate)
    return told(etag, job.status, job.progress.eta_seconds)


def tag(
    version: int,
    base_model: BaseModelRef | None,
    queue_position: int | None,
    status_reason: str | None,
    certificate: str | None,
) -> str:
    """The ETag. Not the version alone: the place in the line and the other arguments change without it.

    If-Match reads the version.
    """
    model = base_model and base_model.model_dump_json()
    parts = json.dumps([FORM, model, queue_position, status_reason, certificate])
    return f'"{version}-{sha256(parts.encode()).hexdigest()[:32]}"'


def told(etag: str, status: Status, eta: float | None) -> dict[str, str]:
    """Args:
    eta: seconds until the solve ends.
    """
    told = {"ETag": etag}
    if status is Status.QUEUED:
        told["Retry-After"] = str(QUEUED_RETRY_S)
    elif status not in TERMINAL:
        pace = RUNNING_RETRY_S if eta is None else min(RUNNING_RETRY_S, eta / 20)
        told["Retry-After"] = str(max(1, round(pace)))
    return told


def created(job: JobObject) -> dict[str, str]:
    return {"Location": job.links.self} | headers(job)


def wait_s(prefer: Sequence[str]) -> int:
    """How long a client would wait for a change rather than ask again: Prefer: wait=20 (RFC 7240). 0: not at all."""
    for preference in ",".join(prefer).split(","):
        match = re.fullmatch(r'wait\s*=\s*"?([0-9]{1,9})"?', preference.partition(";")[0].strip(), re.IGNORECASE)
        if match:
            return min(int(match[1]), WAIT_MAX_S)
    return 0
