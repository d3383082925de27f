"""What a runner is told before it starts: its assignment, and which accelerator it sees."""

import os
from base64 import b64encode
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from sqlalchemy.orm import Session

from service.domain.errors import Gone, JobFailure, NotFound
from service.domain.job import MICRO_BATCH_TOKENS, SETS, FailureCode, JobSpec, ModelEntry
from service.settings import Settings
from service.store import (
    artifacts,
    benchmarks,
    checkpoints,
    deletions,
    digests,
    files,
    jobs,
    lineage,
    models,
    tenancy,
)
from service.store.rows import Claim
from service.store.secrets import Secrets, secrets_of
from service.store.tables import Artifact, Job
from worker.process import count_accelerators
from worker.records import (
    ArtifactFile,
    Assignment,
    BenchmarkAssignment,
    CheckpointRef,
    EarlierJob,
    FileRef,
    ParentAssignment,
    ReleasedAdapter,
    RequestRows,
)

REPORT = "report.json"
DRIVER = Path("/dev/nvidiactl")

Refer = Callable[[str | None], FileRef | None]


def assignment(
    s: Session, claim: Claim, spec: JobSpec, settings: Settings, scratch: Path, on_accelerator: bool
) -> Assignment:
    """Raises JobFailure where a model, a file, a benchmark or an earlier job's adapter is gone."""
    tenancy.bind(s, claim.tenant_id)
    secrets = secrets_of(settings)
    refer = partial(_file, s, secrets)
    forget, retain, refusals, holdout = (refer(getattr(spec, purpose)) for purpose in SETS)
    dtype = settings.worker_dtype
    return Assignment(
        job_id=claim.job_id,
        attempt=claim.attempt,
        fence=claim.fence,
        spec=spec,
        model=_model(s, spec.model),
        parent=None if spec.parent is None else _parent(s, refer, spec.parent, spec.model),
        reverified=None if spec.reverifies is None else _released(s, spec.reverifies, spec.model),
        forget_file=forget,
        retain_file=retain,
        refusal_file=refusals,
        holdout_file=holdout,
        benchmarks=[_benchmark(s, refer, name) for name in spec.benchmarks],
        deletion_requests=[
            RequestRows.model_validate(link, from_attributes=True) for link in deletions.served(s, claim.job_id)
        ],
        row_key=b64encode(digests.row_key(secrets, claim.tenant_id)),
        storage_url=settings.storage_url,
        prefix=prefix(claim),
        checkpoints=[
            CheckpointRef.model_validate(row, from_attributes=True) for row in checkpoints.of_job(s, claim.job_id)
        ],
        checkpoint_every_s=settings.checkpoint_every_s,
        checkpoint_every_steps=settings.checkpoint_every_steps,
        micro_batch_tokens=jobs.get(s, claim.job_id).micro_batch_tokens or MICRO_BATCH_TOKENS,
        models_root=settings.models_root,
        scratch_dir=scratch,
        device="cuda:0" if on_accelerator else "cpu",  # the first of those that it sees, see `environment`
        dtype=("bfloat16" if on_accelerator else "float32") if dtype == "auto" else dtype,
        threads=settings.worker_threads,
        log_level=settings.log_level,
    )


def _model(s: Session, name: str) -> ModelEntry:
    try:
        return models.get(s, name)
    except NotFound as error:
        raise JobFailure(FailureCode.MODEL_NOT_FOUND, str(error)) from error


def _released(s: Session, job_id: str, model: str) -> ReleasedAdapter:
    if reason := lineage.why_not(s, job_id, model):
        raise JobFailure(FailureCode.MODEL_NOT_FOUND, f"the adapter of job {job_id} cannot be had: {reason}")
    return ReleasedAdapter(
        job_id=job_id,
        adapter=[_published(artifact) for artifact in lineage.adapter(s, job_id)],
        report=_published(artifacts.named(s, job_id, REPORT)),
    )


def _parent(s: Session, refer: Refer, job_id: str, model: str) -> ParentAssignment:
    released, chain = _released(s, job_id, model), lineage.chain(s, job_id)
    return ParentAssignment(
        **dict(released),
        chain=[
            _earlier(refer, job) for job in (*chain, *lineage.forgotten_already(s, model, [job.id for job in chain]))
        ],
    )


def _published(artifact: Artifact) -> ArtifactFile:
    return ArtifactFile.model_validate(artifact, from_attributes=True)


def _earlier(refer: Refer, job: Job) -> EarlierJob:
    """Its rows may be gone, as they are to be in the end: then the report says that they could not be measured again."""
    try:
        rows = refer(job.forget_set)
    except JobFailure:
        rows = None
    return EarlierJob(job_id=job.id, forget_file=rows)


def _file(s: Session, secrets: Secrets, file_id: str | None) -> FileRef | None:
    if file_id is None:
        return None
    try:
        file = files.get(s, file_id)
        private = files.private(secrets, file)
    except (NotFound, Gone) as error:
        raise JobFailure(FailureCode.INVALID_FILE, str(error)) from error
    return FileRef(
        id=file.id,
        key=file.key,
        sha256=private.sha256,
        digest=file.digest,
        data_key=b64encode(private.data_key).decode(),
        rows=file.rows,
        bytes=file.bytes,
    )


def _benchmark(s: Session, refer: Refer, name: str) -> BenchmarkAssignment:
    try:
        found = benchmarks.get(s, name)
    except NotFound as error:
        raise JobFailure(FailureCode.INVALID_FILE, str(error)) from error
    try:
        return BenchmarkAssignment(
            name=name,
            suite=found.suite,
            corpus=found.corpus,
            folder=benchmarks.folder(found.tenant_id, name),
            files={of: refer(file_id) for of, file_id in found.sets.items()},
            retrained_model=None if found.retrained_model is None else _model(s, found.retrained_model),
            retrained_scores=refer(found.retrained_scores),
        )
    except JobFailure as failure:
        raise JobFailure(failure.code, f"benchmark {name!r}: {failure}") from failure


def prefix(claim: Claim) -> str:
    """Where this attempt's files lie in the storage."""
    return f"{artifacts.folder(claim.job_id)}/attempts/{claim.fence}"


def checkpoints_folder(claim: Claim) -> str:
    """Where the attempts of the job find each other's checkpoints (worker.checkpoint)."""
    return f"{artifacts.folder(claim.job_id)}/checkpoints"


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
