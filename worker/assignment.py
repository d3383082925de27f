"""What a runner is told before it starts: its assignment, and which accelerator it sees."""

import os
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy.orm import Session

from service.domain.errors import JobFailure, NotFound
from service.domain.job import SETS, FailureCode, JobSpec, ModelEntry
from service.settings import Settings
from service.store import artifacts, benchmarks, files, models
from service.store.rows import Claim
from worker.process import count_accelerators
from worker.records import Assignment, BenchmarkAssignment, FileRef

DRIVER = Path("/dev/nvidiactl")


def assignment(
    s: Session, claim: Claim, spec: JobSpec, settings: Settings, scratch: Path, on_accelerator: bool
) -> Assignment:
    """Raises JobFailure where a model, a file or a benchmark is gone."""
    forget, retain, refusals, holdout = (_file(s, getattr(spec, purpose)) for purpose in SETS)
    dtype = settings.worker_dtype
    return Assignment(
        job_id=claim.job_id,
        attempt=claim.attempt,
        fence=claim.fence,
        spec=spec,
        model=_model(s, spec.model),
        forget_file=forget,
        retain_file=retain,
        refusal_file=refusals,
        holdout_file=holdout,
        benchmarks=[_benchmark(s, name) for name in spec.benchmarks],
        storage_url=settings.storage_url,
        prefix=prefix(claim),
        models_root=settings.models_root,
        scratch_dir=scratch,
        device="cuda:0" if on_accelerator else "cpu",  # the first of those that it sees, see `environment`
        dtype=("bfloat16" if on_accelerator else "float32") if dtype == "auto" else dtype,
        threads=settings.worker_threads,
    )


def _model(s: Session, name: str) -> ModelEntry:
    try:
        return models.get(s, name)
    except NotFound as error:
        raise JobFailure(FailureCode.MODEL_NOT_FOUND, str(error)) from error


def _file(s: Session, file_id: str | None) -> FileRef | None:
    try:
        return None if file_id is None else FileRef.model_validate(files.get(s, file_id), from_attributes=True)
    except NotFound as error:
        raise JobFailure(FailureCode.INVALID_FILE, str(error)) from error


def _benchmark(s: Session, name: str) -> BenchmarkAssignment:
    try:
        found = benchmarks.get(s, name)
    except NotFound as error:
        raise JobFailure(FailureCode.INVALID_FILE, str(error)) from error
    try:
        return BenchmarkAssignment(
            name=name,
            suite=found.suite,
            corpus=found.corpus,
            files={of: _file(s, file_id) for of, file_id in found.sets.items()},
            retrained_model=None if found.retrained_model is None else _model(s, found.retrained_model),
            retrained_scores=_file(s, found.retrained_scores),
        )
    except JobFailure as failure:
        raise JobFailure(failure.code, f"benchmark {name!r}: {failure}") from failure


def prefix(claim: Claim) -> str:
    """Where this attempt's files lie in the storage."""
    return f"{artifacts.folder(claim.job_id)}/attempts/{claim.fence}"


def reference_prefix(claim: Claim) -> str:
    """Where the attempts of the job share what the reference model says of its rows (worker.reference)."""
    return f"{artifacts.folder(claim.job_id)}/reference"


def accelerators(settings: Settings) -> list[str]:
    """What slots take turns at, as CUDA_VISIBLE_DEVICES names it; none: runs go to the CPU. For once, at start-up.

    Raises RuntimeError where an accelerator is asked for and not found, or the driver does not answer.
    """
    if settings.worker_device == "cpu" or (settings.worker_device == "auto" and not DRIVER.exists()):
        return []
    found = count_accelerators()
    if settings.worker_device == "cuda" and not found:
        raise RuntimeError("WORKER_DEVICE is cuda, but torch finds no CUDA device")
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ours.split(",")[:found] if ours else [str(number) for number in range(found)]


def environment(accelerator: str | None) -> Mapping[str, str]:
    """A runner sees the accelerator of its slot alone, and cuBLAS works in the same order each time."""
    if accelerator is None:
        return {}
    return {"CUDA_VISIBLE_DEVICES": accelerator, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
