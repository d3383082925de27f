"""Putting a job's report together: what was asked, what was done, what was measured."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import repeat
from typing import Any, NamedTuple

import torch

from service.domain.report import (
    NOT_TRAINED,
    AdapterFile,
    Asked,
    BenchmarkFacts,
    Composition,
    ConstraintFacts,
    DataFacts,
    Figure,
    Parent,
    Released,
    Report,
    RowPoint,
    StopFacts,
)
from worker import benchmarks, data, evaluate, lineage, model, registry, report
from worker.appraisal import After, Before, Case, NotKnown
from worker.diary import Diary
from worker.problem import Method
from worker.records import ArtifactFile, Assignment, FileRef
from worker.solve import Run

# By this much (nats) a token mean of the same weights moves with the composition of the batches.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}


class Candidate(NamedTuple):
    """What was measured after, and how it came about."""

    stop: StopFacts
    released: Released


def assemble(
    job: Assignment,
    method: Method,
    network: model.Network,
    case: Case,
    before: Before,
    after: After,
    epsilon: float,
    candidate: Candidate,
    holdout: data.Encoded | None,
    diary: Diary,
) -> Report:
    """Of a job with an adapter to evaluate: its own, or that of the job that it reverifies."""
    constraint = constraint_facts(job, case, before, after, epsilon)
    facts = _facts(job, network, case, before, after)
    verdict = report.verdict(
        constraint,
        before.limits.before,
        after.measured.forget_probability,
        published=candidate.released.published,
        likelihood=after.likelihood,
        disclosures=after.disclosed.disclosure,
        answered=after.disclosed.answered,
        attacks=after.attacks,
        language=after.disclosed.language,
        conspicuous=after.conspicuous,
        earlier=facts.parent.forgotten if facts.parent else (),
        gates=job.spec.gates,
        figures=report.values(facts.figures, facts.benchmarks, after.attacks),
    )
    knowledge, text_knowledge = before.knowledge.facts(
        "base" if job.parent is None else "start", case.request.places["forget"]
    )
    return _report(
        job,
        method,
        network,
        case,
        facts,
        holdout,
        diary,
        verdict=verdict,
        constraint=constraint,
        stop=candidate.stop,
        released=candidate.released,
        deletion_requests=report.of_requests(
            job.deletion_requests, facts.rows.get("forget/probability", []), trained=True
        ),
        audit=list(after.attacks),
        likelihood=after.likelihood,
        disclosure=after.disclosed.disclosure,
        answered=after.disclosed.answered,
        language=after.disclosed.language,
        conspicuous=after.conspicuous,
        knowledge=knowledge,
        text_knowledge=text_knowledge,
        caveats=report.caveats(
            facts.benchmarks, after.attacks, chained=facts.parent is not None, reverified=job.spec.reverifies
        ),
    )


def assemble_untrained(
    job: Assignment,
    method: Method,
    network: model.Network,
    case: Case,
    before: Before,
    epsilon: float,
    unknown: NotKnown,
    holdout: data.Encoded | None,
    diary: Diary,
) -> Report:
    """Of a job that was not trained, because of its verdict NOT_KNOWN."""
    facts = _facts(job, network, case, before, None)
    return _report(
        job,
        method,
        network,
        case,
        facts,
        holdout,
        diary,
        verdict=unknown.verdict,
        constraint=constraint_facts(job, case, before, None, epsilon),
        stop=StopFacts(reason="not_known", message="No step was taken: the model does not know the rows.", step=0),
        released=Released(published=False, step=0, files=[], message=report.untrained(unknown.verdict), load=None),
        deletion_requests=report.of_requests(
            job.deletion_requests, facts.rows.get("forget/probability", []), trained=False
        ),
        disclosure=unknown.disclosure,
        knowledge=unknown.knowledge,
        text_knowledge=unknown.text_knowledge,
        caveats=report.untrained_caveats(chained=facts.parent is not None, beside_holdout=bool(unknown.text_knowledge)),
    )


class _Facts(NamedTuple):
    """What both kinds of report have of what was measured."""

    figures: list[Figure]
    rows: dict[str, list[RowPoint]]
    benchmarks: list[BenchmarkFacts]
    parent: Parent | None


def _facts(job: Assignment, network: model.Network, case: Case, before: Before, after: After | None) -> _Facts:
    chain_after = after.chain if after else [None] * len(case.chain)
    parent = None
    if job.parent:
        earlier = (case.chain, before.chain_limits, before.chain_base, before.chain, chain_after)
        parent = lineage.facts(job.parent, *earlier)
    now = after.request if after else None
    return _Facts(
        evaluate.figures(case.request, before.request, now),
        evaluate.row_points(case.request, before.request, now, case.examples, job.row_key),
        [benchmarks.facts(*one) for one in zip(case.named, repeat(network), before.named, after.named)]
        if after
        else [],
        parent,
    )


def constraint_facts(
    job: Assignment, case: Case, before: Before, after: After | None, epsilon: float
) -> ConstraintFacts:
    now, retain = after.measured if after else None, case.both.retain.encoded
    return ConstraintFacts(
        epsilon=epsilon,
        source="absolute" if job.spec.constraint.epsilon is not None else "relative",
        before=before.measured.retain_loss,
        after=now.retain_loss if now else None,
        upper=now.retain_upper if now else None,
        slack=epsilon - now.retain_upper if now else None,
        tolerance=TOLERANCE[job.dtype],
        satisfied=now.retain_upper <= epsilon if now else None,
        rows_measured=len(retain.measured),
        rows_total=len(retain.rows),
        reason=None if now else NOT_TRAINED,
    )


def _report(
    job: Assignment,
    method: Method,
    network: model.Network,
    case: Case,
    facts: _Facts,
    holdout: data.Encoded | None,
    diary: Diary,
    **parts: Any,
) -> Report:
    spec = job.spec
    return Report(
        job_id=job.job_id,
        attempt=job.attempt,
        created_at=datetime.now(UTC),
        reverifies=spec.reverifies,
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
        parent=facts.parent,
        forget_set=set_facts(job.forget_file, case.both.forget.encoded),
        retain_set=set_facts(job.retain_file, case.both.retain.encoded),
        holdout_set=set_facts(job.holdout_file, holdout) if job.holdout_file and holdout else None,
        figures=facts.figures,
        rows=facts.rows,
        benchmarks=facts.benchmarks,
        trajectory=report.trajectory(diary.steps, diary.checks, diary.resumed),
        warnings=diary.warnings,
        timings_seconds=diary.seconds,
        environment=report.environment(str(network.device), torch.get_num_threads()),
        **parts,
    )


def set_facts(file: FileRef, encoded: data.Encoded) -> DataFacts:
    return DataFacts(
        file_id=file.id,
        digest=file.digest,
        rows=len(encoded.rows),
        counted_tokens=encoded.counted,
        unmeasured_rows=len(encoded.unmeasured),
    )


def trained(job: Assignment, solution: Run, adapter: Sequence[ArtifactFile]) -> Candidate:
    """What the run released or, if nothing, its last iterate."""
    assert solution.stop is not None
    stop = StopFacts(reason=solution.stop.reason, message=solution.stop.message, step=solution.steps)
    step = solution.best.step if solution.best else solution.steps
    if adapter:
        message = f"The adapter of step {step}. The figures after were measured on its published bytes."
        return Candidate(stop, _released(job, step, adapter, message))
    message = (
        "No checked iterate kept the bound, so no adapter was released. "
        f"The figures after are those of the last iterate, step {step}."
    )
    return Candidate(stop, Released(published=False, step=step, files=[], message=message, load=None))


def reverified(job: Assignment) -> Candidate:
    """What the job that is reverified released."""
    of = job.reverified
    assert of is not None
    why = f"No step was taken: this is a reverification of the adapter that job {of.job_id} released."
    message = f"It was released by job {of.job_id}. The figures after were measured on its published bytes."
    return Candidate(StopFacts(reason="reverified", message=why, step=0), _released(job, 0, of.adapter, message))


def _released(job: Assignment, step: int, adapter: Sequence[ArtifactFile], message: str) -> Released:
    if job.model.source == "hub":
        base = f'"{job.model.location}", revision="{job.model.revision}"'
    else:  # a registered name is not a place: somebody else may own it on the Hub
        base = f'"FOLDER_OF_{job.model.name}"'
    return Released(
        published=True,
        step=step,
        files=[AdapterFile(name=file.name, bytes=file.bytes, sha256=file.sha256) for file in adapter],
        message=message,
        load=(
            "import torch; from peft import PeftModel; from transformers import AutoModelForCausalLM; "
            f"base = AutoModelForCausalLM.from_pretrained({base}, dtype=torch.{job.dtype}); "
            'model = PeftModel.from_pretrained(base, "adapter")'
        ),
    )
