"""What a client that looks again and again is told: when to come back, and whether anything has changed."""

import re
from collections.abc import Sequence
from hashlib import sha256

from service.api.shapes import JobObject
from service.domain.job import TERMINAL, Status

QUEUED_RETRY_S = 10
RUNNING_RETRY_S = 30
WAIT_MAX_S = 30


def headers(job: JobObject) -> dict[str, str]:
    # Not the version alone: the place in the line and the workers change without it. If-Match reads the version.
    digest = sha256(job.model_dump_json(warnings=False).encode()).hexdigest()[:32]
    told = {"ETag": f'"{job.version}-{digest}"'}
    if job.status is Status.QUEUED:
        told["Retry-After"] = str(QUEUED_RETRY_S)
    elif job.status not in TERMINAL:
        eta = job.progress.eta_seconds
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
