"""What a runner is told before it starts: its assignment, and which accelerator it sees."""

import os
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy.orm import Session

from service.domain.errors import JobFailure, NotFound
from service.domain.job import FailureCode
from service.settings import Settings
from service.store import files, models
from service.store.rows import Claim
from worker.process import has_accelerator
from worker.records import Assignment, FileRef


def assignment(s: Session, claim: Claim, settings: Settings, scratch: Path) -> Assignment:
    """Raises JobFailure where the model or a file is gone."""
    spec = claim.spec
    try:
        model = models.get(s, spec.model)
    except NotFound as error:
        raise JobFailure(FailureCode.MODEL_NOT_FOUND, str(error)) from error
    try:
        forget, retain = (
            FileRef.model_validate(files.get(s, name), from_attributes=True)
            for name in (spec.forget_set, spec.retain_set)
        )
    except NotFound as error:
        raise JobFailure(FailureCode.INVALID_FILE, str(error)) from error
    on_accelerator = settings.worker_device == "cuda" or (settings.worker_device == "auto" and has_accelerator())
    dtype = settings.worker_dtype
    return Assignment(
        job_id=claim.job_id,
        attempt=claim.attempt,
        fence=claim.fence,
        spec=spec,
        model=model,
        forget_file=forget,
        retain_file=retain,
        storage_url=settings.storage_url,
        prefix=prefix(claim),
        models_root=settings.models_root,
        scratch_dir=scratch,
        device="cuda:0" if on_accelerator else "cpu",  # the first of those that it sees, see `environment`
        dtype=("bfloat16" if on_accelerator else "float32") if dtype == "auto" else dtype,
        threads=settings.worker_threads,
    )


def prefix(claim: Claim) -> str:
    return f"jobs/{claim.job_id}/attempts/{claim.fence}"


def environment(device: str, slot: int) -> Mapping[str, str]:
    """A runner sees the accelerator of its slot alone."""
    if device == "cpu":
        return {}
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = ours.split(",") if ours else [str(n) for n in range(slot + 1)]
    return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}
