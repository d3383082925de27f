"""The report of a job: its parts as pure functions of what was measured, and its two renderings. worker.run fills it in."""

import math
import os
import platform
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

from jinja2 import Environment as Templates
from jinja2 import StrictUndefined, Template

from service.domain.job import GateResult, Verdict
from service.domain.report import CheckPoint, ConstraintFacts, Environment, Report, StepPoint, Trajectory
from worker import chart
from worker.records import CheckRecord, StepRecord

POINTS_MAX = 500
FORGET_RATIO = 0.1  # the forget gate: the mean probability is at most this share of what it was
PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")
DISTRIBUTION = "unlearning-service"
CAVEATS = [
    "This is evidence of a run and of its measurements, not a proof of erasure: approximate unlearning gives no guarantee.",
    "Only the rows named here were measured, in these wordings. Paraphrases, other languages and indirect questions were not.",
    "Whether further fine-tuning, quantisation or an attack brings the answers back was not tested.",
    "Retention was measured on the retain set alone; abilities that it does not represent may have changed.",
    "The base model itself is unchanged: the data is still in its weights, its copies, caches and backups. What was measured "
    "holds only where the adapter is applied.",
]


def verdict(
    constraint: ConstraintFacts, forget_before: float | None, forget_after: float | None, *, published: bool
) -> Verdict:
    """PASSED only if an adapter was released that keeps the bound and has forgotten.

    A slack smaller than the measurement's tolerance is WARNED. What could not be measured fails, with that reason.
    """
    gates = [_retain_gate(constraint, published), _forget_gate(forget_before, forget_after)]
    results = {gate.result for gate in gates}
    result = next(r for r in ("FAILED", "WARNED", "PASSED") if r in results)
    return Verdict(result=result, gates=gates, message=" ".join(gate.message for gate in gates))


def _retain_gate(constraint: ConstraintFacts, published: bool) -> GateResult:
    value, bound = constraint.upper, constraint.epsilon
    gate = GateResult(metric="retain_nll", op="<=", threshold=bound, value=value, result="FAILED", message="")
    if value is None:
        return gate.model_copy(update={"message": f"The retain loss could not be measured: {constraint.reason}."})
    sampled = constraint.rows_measured < constraint.rows_total
    what = f"The retain loss{' (95 % upper bound)' if sampled else ''} is {value:.6g} nats per token"
    if value > bound:
        return gate.model_copy(update={"message": f"{what}, above the bound of {bound:.6g}."})
    if not published:
        return gate.model_copy(update={"message": f"{what}, but no adapter was released."})
    if bound - value < constraint.tolerance:
        message = f"{what}, below the bound of {bound:.6g} by less than the measurement's tolerance of {constraint.tolerance:g}."
        return gate.model_copy(update={"result": "WARNED", "message": message})
    return gate.model_copy(update={"result": "PASSED", "message": f"{what}, within the bound of {bound:.6g}."})


def _forget_gate(before: float | None, after: float | None) -> GateResult:
    threshold = None if before is None else FORGET_RATIO * before
    gate = GateResult(
        metric="forget_probability", op="<=", threshold=threshold, value=after, result="FAILED", message=""
    )
    if before is None or after is None or threshold is None:
        return gate.model_copy(update={"message": "The forget probability could not be measured."})
    if before <= 0:
        return gate.model_copy(update={"message": "The model gave the forget set no probability even before."})
    what = f"The mean forget probability went from {before:.4g} to {after:.4g}"
    if after > threshold:
        return gate.model_copy(update={"message": f"{what}; at most {threshold:.4g}, a tenth of before, was required."})
    return gate.model_copy(
        update={"result": "PASSED", "message": f"{what}, at most a tenth of before ({threshold:.4g})."}
    )


def trajectory(steps: Sequence[StepRecord], checks: Sequence[CheckRecord]) -> Trajectory:
    """The series, thinned to POINTS_MAX points; the first step, the last, and every checked one stay."""
    stride = (
        max(1, math.ceil(len(steps) / (POINTS_MAX - len(checks) - 1))) if len(checks) < POINTS_MAX - 1 else len(steps)
    )
    keep = {check.step for check in checks} | ({steps[-1].step} if steps else set())
    kept = [step for i, step in enumerate(steps) if i % stride == 0 or step.step in keep]
    return Trajectory(
        steps=[_point(step) for step in kept],
        steps_total=len(steps),
        checks=[CheckPoint(**check.model_dump(include=set(CheckPoint.model_fields))) for check in checks],
        feasible_checks=sum(check.feasible for check in checks),
    )


def _point(step: StepRecord) -> StepPoint:
    return StepPoint(
        step=step.step,
        forget_loss=_finite(step.losses.get("forget")),
        retain_loss=_finite(step.losses.get("retain")),
        dual=_finite(step.dual.get("retain")),
        violation=_finite(step.violation.get("retain")),
        learning_rate=step.learning_rate,
        gradient_norm=_finite(step.gradient_norm),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def environment(device: str, threads: int) -> Environment:
    """Where it ran: versions, not paths and not names of machines."""
    return Environment(
        versions={name: metadata.version(name) for name in PACKAGES},
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        device=device,
        threads=threads,
        code_version=metadata.version(DISTRIBUTION),
    )


def render_json(report: Report) -> bytes:
    return report.model_dump_json(indent=2).encode() + b"\n"


def render_html(report: Report) -> str:
    """One page that needs nothing else: no script, no font, no network."""
    figures = {(figure.set, figure.metric): figure for figure in report.figures}
    return _template().render(
        report=report,
        forget=figures.get(("forget", "probability")),
        picture=chart.picture(report.trajectory, report.constraint.epsilon, report.released.step),
        number=_number,
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


@cache
def _template() -> Template:
    source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    templates = Templates(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return templates.from_string(source)
