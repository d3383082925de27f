"""Putting a job's report together: what was asked, what was done, what was measured."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import torch

from service.domain.job import Verdict
from service.domain.report import (
    NOT_TRAINED,
    AdapterFile,
    Asked,
    AuditEntry,
    BenchmarkFacts,
    Composition,
    ConstraintFacts,
    DataFacts,
    Figure,
    Knowledge,
    Parent,
    Released,
    Report,
    RowPoint,
    StopFacts,
)
from worker import data, model, registry, report
from worker.diary import Diary
from worker.measure import Measurement, Sets
from worker.problem import Method
from worker.records import ArtifactFile, Assignment, FileRef
from worker.solve import Run

# By this much (nats) a token mean of the same weights moves with the composition of the batches.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}


class Found(NamedTuple):
    """What was measured."""

    before: Measurement
    after: Measurement | None  # None: nothing was trained
    figures: list[Figure]
    rows: dict[str, list[RowPoint]]
    benchmarks: list[BenchmarkFacts]
    audit: list[AuditEntry]
    holdout: data.Encoded | None
    parent: Parent | None
    knowledge: Sequence[Knowledge] = ()  # before any training: of the base model and of what the job starts from


def assemble(
    job: Assignment,
    method: Method,
    network: model.Network,
    both: Sets,
    epsilon: float,
    solution: Run,
    adapter: Sequence[ArtifactFile],
    found: Found,
    diary: Diary,
) -> Report:
    """Of a job that was trained."""
    assert found.after is not None
    assert solution.stop is not None
    constraint = constraint_facts(job, both, epsilon, found)
    verdict = report.verdict(
        constraint,
        found.before.forget_probability,
        found.after.forget_probability,
        published=bool(adapter),
        earlier=found.parent.forgotten if found.parent else (),
        gates=job.spec.gates,
        figures=report.values(found.figures, found.benchmarks, found.audit),
    )
    stop = StopFacts(reason=solution.stop.reason, message=solution.stop.message, step=solution.steps)
    step = solution.best.step if solution.best else solution.steps
    caveats = report.caveats(found.benchmarks, found.audit, chained=found.parent is not None)
    return _report(
        job, method, network, both, found, diary, verdict, constraint, stop, released(job, step, adapter), caveats
    )


def assemble_untrained(
    job: Assignment,
    method: Method,
    network: model.Network,
    both: Sets,
    epsilon: float,
    verdict: Verdict,
    found: Found,
    diary: Diary,
) -> Report:
    """Of a job that was not trained, because of its verdict NOT_KNOWN."""
    return _report(
        job,
        method,
        network,
        both,
        found,
        diary,
        verdict,
        constraint_facts(job, both, epsilon, found),
        StopFacts(reason="not_known", message="No step was taken: the model does not know the rows.", step=0),
        Released(published=False, step=0, files=[], message=report.untrained(verdict), load=None),
        report.untrained_caveats(chained=found.parent is not None),
    )


def constraint_facts(job: Assignment, both: Sets, epsilon: float, found: Found) -> ConstraintFacts:
    now = found.after
    return ConstraintFacts(
        epsilon=epsilon,
        source="absolute" if job.spec.constraint.epsilon is not None else "relative",
        before=found.before.retain_loss,
        after=now.retain_loss if now else None,
        upper=now.retain_upper if now else None,
        slack=epsilon - now.retain_upper if now else None,
        tolerance=TOLERANCE[job.dtype],
        satisfied=now.retain_upper <= epsilon if now else None,
        rows_measured=len(both.retain.encoded.measured),
        rows_total=len(both.retain.encoded.rows),
        reason=None if now else NOT_TRAINED,
    )


def _report(
    job: Assignment,
    method: Method,
    network: model.Network,
    both: Sets,
    found: Found,
    diary: Diary,
    verdict: Verdict,
    constraint: ConstraintFacts,
    stop: StopFacts,
    released: Released,
    caveats: list[str],
) -> Report:
    spec = job.spec
    return Report(
        job_id=job.job_id,
        attempt=job.attempt,
        created_at=datetime.now(UTC),
        verdict=verdict,
        asked=Asked(
            model=spec.model,
            method=spec.method.type,
            composition=Composition(**registry.composition(method)),
            hyperparameters=spec.method.hyperparameters,
            constraint=spec.constraint,
            budget=spec.budget,
            lora=spec.lora,
            seed=spec.seed,
        ),
        base_model=model.facts(network),
        parent=found.parent,
        forget_set=set_facts(job.forget_file, both.forget.encoded),
        retain_set=set_facts(job.retain_file, both.retain.encoded),
        holdout_set=set_facts(job.holdout_file, found.holdout) if job.holdout_file and found.holdout else None,
        constraint=constraint,
        figures=found.figures,
        rows=found.rows,
        deletion_requests=report.of_requests(
            job.deletion_requests, found.rows.get("forget/probability", []), trained=found.after is not None
        ),
        benchmarks=found.benchmarks,
        audit=found.audit,
        knowledge=list(found.knowledge),
        stop=stop,
        released=released,
        trajectory=report.trajectory(diary.steps, diary.checks, diary.resumed),
        warnings=diary.warnings,
        timings_seconds=diary.seconds,
        environment=report.environment(str(network.device), torch.get_num_threads()),
        caveats=caveats,
    )


def set_facts(file: FileRef, encoded: data.Encoded) -> DataFacts:
    return DataFacts(
        file_id=file.id,
        digest=file.digest,
        rows=len(encoded.rows),
        counted_tokens=encoded.counted,
        unmeasured_rows=len(encoded.unmeasured),
    )


def released(job: Assignment, step: int, adapter: Sequence[ArtifactFile]) -> Released:
    published = [AdapterFile(name=file.name, bytes=file.bytes, sha256=file.sha256) for file in adapter]
    if not published:
        message = (
            "No checked iterate kept the bound, so no adapter was released. "
            f"The figures after are those of the last iterate, step {step}."
        )
        return Released(published=False, step=step, files=[], message=message, load=None)
    if job.model.source == "hub":
        base = f'"{job.model.location}", revision="{job.model.revision}"'
    else:  # a registered name is not a place: somebody else may own it on the Hub
        base = f'"FOLDER_OF_{job.model.name}"'
    return Released(
        published=True,
        step=step,
        files=published,
        message=f"The adapter of step {step}. The figures after were measured on its published bytes.",
        load=(
            "import torch; from peft import PeftModel; from transformers import AutoModelForCausalLM; "
            f"base = AutoModelForCausalLM.from_pretrained({base}, dtype=torch.{job.dtype}); "
            'model = PeftModel.from_pretrained(base, "adapter")'
        ),
    )
