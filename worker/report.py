"""The report of a job: its parts as pure functions of what was measured. worker.assemble puts them together."""

import hashlib
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence, Set
from functools import cache
from importlib import metadata
from typing import Literal, NamedTuple

from service.domain.job import VERDICT_RULES, Gate, GateResult, Verdict
from service.domain.report import (
    EARLIER,
    NOT_TRAINED,
    Answered,
    AuditEntry,
    BenchmarkFacts,
    CheckPoint,
    Conspicuous,
    ConstraintFacts,
    Disclosure,
    Environment,
    Figure,
    Forgotten,
    Knowledge,
    LanguageFacts,
    Likelihood,
    Logged,
    Report,
    RequestFigures,
    RowPoint,
    StepPoint,
    TextKnowledge,
    Trajectory,
)
from worker import gates as gates_of
from worker import likelihood as likelihood_rules
from worker.equivalence import Equivalence
from worker.records import CheckRecord, RequestRows, StepRecord
from worker.text_equivalence import TextEquivalence
from worker.words import number, pair, percents

POINTS_MAX = 500
CHECKS_MAX = 100
FORGET_RATIO = 0.1  # the forget gate: the mean probability is at most this share of what it was
ALWAYS_SHOWN = (
    "retain_nll",
    "forget_probability",
    "disclosure",
)  # in a verdict's message; of other gates those not passed
PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")
DISTRIBUTION = "unlearning-service"
FAMILIES = {  # of attacks, by how their names begin
    "relearn": "fine-tuning",
    "quantise": "quantisation",
    "paraphrase": "rephrased questions",
    "prefix": "jailbreak-style prefixes",
}
CHAINED = (
    "The job started from the adapter of an earlier one, which the released one contains: before it, the base model had that. "
    "Of the earlier jobs the forget sets alone were measured again, as far as they are kept; their retain sets were not."
)
REVERIFIED = (
    "Nothing was trained: the adapter is the one that job {job_id} released, evaluated under the verdict rules that this report "
    "names. The report and the certificate of that job are not changed."
)
UNTRAINED_CHAINED = (
    "The job started from the adapter of an earlier one: where the figures do not name the base model, it had that. What the "
    "earlier jobs of its chain had the model forget was not judged again."
)
WHO = {"base": "The base model", "start": "The model that the job starts from"}
UNTRAINED_HOLDOUT = (
    "Of texts it rests on the holdout set: were its texts trained on, or easier than those to forget, the model would not look "
    "as if it knew these. A text was asked for by continuing it greedily from four places."
)
RELATION = {"<=": "at most", ">=": "at least"}


# --- the verdict


class Value(NamedTuple):
    """What a gate is judged on."""

    value: float | None
    reason: str | None  # why it is None


def values(
    figures: Sequence[Figure], benchmarks: Sequence[BenchmarkFacts], audit: Sequence[AuditEntry]
) -> dict[str, Value]:
    """What a request's gates can name, as it is after unlearning or, of the audit, under the attack."""
    own = {f"{figure.set}/{figure.metric}": Value(figure.after, figure.reason) for figure in figures}
    named = {
        f"{of.name}/{figure.name}": Value(figure.after, figure.reason) for of in benchmarks for figure in of.figures
    }
    attacked = {f"audit/{entry.attack}/{entry.metric}": Value(entry.attacked, entry.reason) for entry in audit}
    return own | named | attacked


def verdict(
    constraint: ConstraintFacts,
    forget_before: float | None,
    forget_after: float | None,
    *,
    published: bool,
    likelihood: Likelihood | None = None,
    disclosures: Sequence[Disclosure] = (),
    answered: Answered | None = None,
    attacks: Sequence[AuditEntry] = (),
    language: LanguageFacts | None = None,
    conspicuous: Conspicuous | None = None,
    earlier: Sequence[Forgotten] = (),
    gates: Sequence[Gate] = (),
    figures: Mapping[str, Value] = {},
) -> Verdict:
    """PASSED only if an adapter was released that keeps the bound, discloses no forgotten row, of its own or of earlier jobs of
    its chain, under which their answers are as unlikely as required, that still answers the rows' neighbours, and that meets
    the request's own gates.

    Args:
        likelihood: what the forget rows' probabilities are held against; None: a tenth of before.

    A slack smaller than the measurement's tolerance is WARNED, and so are a broken gate of severity warn and an earlier job
    whose rows are no longer kept. What else could not be measured fails, with that reason.
    """
    judged = [
        _retain_gate(constraint, published),
        _forget_gate(_finite(forget_before), _finite(forget_after), likelihood),
        *([gates_of.rows(likelihood)] if likelihood else []),
        *(gates_of.disclosure(found) for found in disclosures),
        *([gates_of.answered(answered)] if answered else []),
        *(gates_of.attacks(attacks, likelihood.mean_limit) if likelihood else []),
        *([gates_of.language(language)] if language else []),
        *([gate] if conspicuous and (gate := gates_of.conspicuous(conspicuous)) else []),
        *(_earlier_gate(forgotten) for forgotten in earlier),
        *(
            _own_gate(gate, figures.get(gate.metric, Value(None, "the report has no such figure")), published)
            for gate in gates
        ),
    ]
    results = {gate.result for gate in judged}
    result = next(r for r in ("FAILED", "WARNED", "PASSED") if r in results)
    always = {*ALWAYS_SHOWN, *(gate.metric for gate in gates)}
    shown = [gate.message for gate in judged if gate.metric in always or gate.result != "PASSED"]
    return Verdict(result=result, gates=judged, message=" ".join(shown), rules=VERDICT_RULES)


def _own_gate(gate: Gate, found: Value, published: bool) -> GateResult:
    """What the request set beside the bound. It is about what was released, so without that it is broken."""
    what, value = f"{gate.metric} {RELATION[gate.op]} {gate.threshold:g}", _finite(found.value)
    if value is None:
        met = False
        message = f"{what} was required, but could not be measured: {found.reason or 'it was not finite'}."
    elif not published:
        met = False
        message = f"{what} was required of an adapter, but none was released; the last iterate has {number(value)}."
    else:
        met = value <= gate.threshold if gate.op == "<=" else value >= gate.threshold
        found_value, threshold = pair(value, gate.threshold)
        message = f"{gate.metric} is {found_value}; {RELATION[gate.op]} {threshold} was required."
    broken: Literal["FAILED", "WARNED"] = "FAILED" if gate.severity == "fail" else "WARNED"
    return GateResult(**gate.model_dump(), value=value, result="PASSED" if met else broken, message=message)


def _retain_gate(constraint: ConstraintFacts, published: bool) -> GateResult:
    value, bound = constraint.upper, constraint.epsilon
    gate = GateResult(metric="retain_nll", op="<=", threshold=bound, value=value, result="FAILED", message="")
    if value is None:
        return gate.model_copy(update={"message": f"The retain loss could not be measured: {constraint.reason}."})
    found, allowed = pair(value, bound)
    what = f"The retain loss went from {number(constraint.before, 3)} to {found} nats per token"
    if value > bound:
        return gate.model_copy(update={"message": f"{what}: above the bound of {allowed}."})
    if not published:
        return gate.model_copy(
            update={"message": f"{what}: within the bound of {allowed}, but no adapter was released."}
        )
    if bound - value < constraint.tolerance:
        message = f"{what}: below the bound of {allowed} by less than the measurement's tolerance of {constraint.tolerance:g}."
        return gate.model_copy(update={"result": "WARNED", "message": message})
    return gate.model_copy(update={"result": "PASSED", "message": f"{what}: within the bound of {allowed}."})


def _forget_gate(before: float | None, after: float | None, likelihood: Likelihood | None) -> GateResult:
    threshold = None if before is None else likelihood.mean_limit if likelihood else FORGET_RATIO * before
    source = (likelihood and likelihood.floor) or "a tenth of before"
    gate = GateResult(
        metric="forget_probability", op="<=", threshold=threshold, value=after, result="FAILED", message=""
    )
    if before is None or threshold is None:
        return gate.model_copy(update={"message": "The forget probability before could not be measured."})
    [earlier] = percents(before)
    if after is None:
        message = f"The forget probability after could not be measured; before, it was {earlier}."
        return gate.model_copy(update={"message": message})
    now, required = percents(after, threshold)
    if before <= 0:
        message = f"The forget probability is {now}, but it was 0 before: there was nothing to measure forgetting by."
        return gate.model_copy(update={"message": message})
    message = (
        f"The mean probability of the forget rows' answers, per token, went from {earlier} to {now}; at most {required}, "
        f"{source}, was required."
    )
    return gate.model_copy(update={"result": "FAILED" if after > threshold else "PASSED", "message": message})


def _earlier_gate(forgotten: Forgotten) -> GateResult:
    """What an earlier job had the model forget is as unlikely as it must be, by the base model that the chain started from."""
    tenth = None if forgotten.base is None else FORGET_RATIO * forgotten.base
    threshold = tenth if forgotten.limit is None else forgotten.limit
    source = "a tenth of the base model's" if threshold == tenth else likelihood_rules.WRONG
    gate = GateResult(
        metric=f"{EARLIER}{forgotten.job_id}",
        op="<=",
        threshold=threshold,
        value=forgotten.after,
        result="FAILED",
        message=f"Job {forgotten.job_id}, earlier in the chain: {forgotten.reason}.",
    )
    if forgotten.rows is None:
        return gate.model_copy(update={"severity": "warn", "result": "WARNED"})
    if forgotten.reason is not None or threshold is None or forgotten.after is None:
        return gate
    now, required = percents(forgotten.after, threshold)
    message = (
        f"The mean probability, per token, of what job {forgotten.job_id} had the model forget is {now}, after "
        f"{percents(forgotten.before)[0]} before this job; at most {required}, {source}, is required."
    )
    kept = forgotten.after <= threshold
    return gate.model_copy(update={"result": "PASSED" if kept else "FAILED", "message": message})


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# --- the verdict before any training


def knowledge(model: Literal["base", "start"], found: Equivalence, places: Sequence[int]) -> Knowledge:
    """`places`: in its file, of each row that was measured; 0-based."""
    return Knowledge(
        model=model,
        equivalent=found.equivalent,
        mean=found.mean,
        upper=found.upper,
        margin=found.margin,
        rows=len(found.ratios),
        subjects=found.subjects,
        recited=[places[place] + 1 for place in found.recited],
        reason=found.reason,
    )


def text_knowledge(model: Literal["base", "start"], found: TextEquivalence, places: Sequence[int]) -> TextKnowledge:
    """`places`: in its file, of each row that was measured; 0-based."""
    return TextKnowledge(
        model=model,
        equivalent=found.equivalent,
        auc=found.auc,
        upper=found.upper,
        threshold=found.threshold,
        rows=found.texts,
        holdout_rows=found.holdout_texts,
        likeliest=found.likeliest,
        likeliest_of=found.likeliest_of,
        recited=[places[place] + 1 for place in found.recited],
        reason=found.reason,
    )


def knowledge_gate(found: Knowledge) -> GateResult:
    """PASSED if the model does not know the rows; FAILED if it does, or if that could not be decided."""
    who = WHO[found.model]
    value = _finite(found.upper)
    if found.recited:
        message = f"{who} knows the rows: of {_rows_named(found.recited)} it says a right answer nearly for certain."
    elif found.equivalent is None or value is None:
        message = f"Whether {who[:1].lower()}{who[1:]} knows the rows could not be decided: {found.reason}."
    else:
        message = (
            f"{who} {'does not know' if found.equivalent else 'knows'} the rows: over {found.rows:,} of them, about "
            f"{found.subjects:,} subject{'' if found.subjects == 1 else 's'}, a token of a right answer is at most "
            f"{math.exp(value):.3g} times as likely as one of a wrong answer of the same wording (95 % bound); below "
            f"{math.exp(found.margin):.3g} is what a model shows that never saw them."
        )
    return GateResult(
        metric=f"{found.model}/log_ratio",
        op="<=",
        threshold=found.margin,
        value=value,
        result="PASSED" if found.equivalent else "FAILED",
        message=message,
    )


def text_knowledge_gate(found: TextKnowledge) -> GateResult:
    """PASSED if the model does not know the texts; FAILED if it does, or if that could not be decided."""
    who = WHO[found.model]
    value = _finite(found.upper)
    if found.recited:
        message = f"{who} knows the texts: it says {_rows_named(found.recited)} nearly for certain."
    elif found.equivalent is None or value is None:
        message = f"Whether {who[:1].lower()}{who[1:]} knows the texts could not be decided: {found.reason}."
    elif not found.equivalent and value < found.threshold:
        message = (
            f"{who} knows some of the texts: of the {found.likeliest_of:,} likeliest of these and of the holdout texts "
            f"{found.likeliest:,} are texts to forget, more than chance explains."
        )
    else:
        message = (
            f"{who} {'does not know' if found.equivalent else 'may know'} the texts: of {found.rows:,} one is likelier than "
            f"one of {found.holdout_rows:,} holdout texts, which by the request it never saw, in at most {value:.0%} of pairs "
            f"(95 % bound); 50% is chance, below {found.threshold:.0%} is required."
        )
    return GateResult(
        metric=f"{found.model}/auc",
        op="<=",
        threshold=found.threshold,
        value=value,
        result="PASSED" if found.equivalent else "FAILED",
        message=message,
    )


def _rows_named(numbers: Sequence[int]) -> str:
    return f"row {numbers[0]}" + (f" and {len(numbers) - 1} others" if len(numbers) > 1 else "")


def not_known_verdict(
    start: Sequence[GateResult], base: Sequence[GateResult] = (), parent: str | None = None
) -> Verdict | None:
    """NOT_KNOWN if what the job starts from does not know the rows; None: it does, or may, so the job trains.

    Args:
        start: the gates on what the job starts from: `knowledge_gate`, and that it discloses no row.
        base: the same on the base model alone, where the job starts from an earlier one's adapter. A model that fails them knew
            the rows before that adapter.
        parent: the earlier job.
    """
    if any(gate.result == "FAILED" for gate in start):
        return None
    forgotten = parent is not None and any(gate.result == "FAILED" for gate in base)
    judged = [*start] if forgotten else [*start, *base]
    said = [f"The adapter of job {parent} had forgotten the rows already."] if forgotten else []
    message = " ".join([*said, *(gate.message for gate in judged), "Nothing was trained."])
    result: Literal["NOT_KNOWN"] = "NOT_KNOWN"
    return Verdict(
        result=result, gates=judged, message=message, rules=VERDICT_RULES, forgotten_by=parent if forgotten else None
    )


def untrained(verdict: Verdict) -> str:
    """Why no adapter was released, of a job whose verdict is NOT_KNOWN."""
    if verdict.forgotten_by is not None:
        before = f"The adapter of job {verdict.forgotten_by}"
        return f"{before} had forgotten the rows already, so nothing was trained: go on using it."
    return "The model does not know the rows, so nothing was trained: go on using it as it is."


# --- the course of the run, and what stands beside it


def trajectory(steps: Sequence[StepRecord], checks: Sequence[CheckRecord], resumed: Sequence[int] = ()) -> Trajectory:
    """The series, thinned: at most POINTS_MAX steps and CHECKS_MAX checks.

    The first and the last of both stay, and so do the last best check (the one released) and every kept check's step.
    """
    best = [i for i, check in enumerate(checks) if check.best][-1:]
    kept_checks = [checks[i] for i in _spread(len(checks), CHECKS_MAX, best)]
    checked = {check.step for check in kept_checks}
    places = [i for i, step in enumerate(steps) if step.step in checked]
    return Trajectory(
        steps=[_point(steps[i]) for i in _spread(len(steps), POINTS_MAX, places)],
        steps_total=len(steps),
        checks=[CheckPoint(**check.model_dump(include=set(CheckPoint.model_fields))) for check in kept_checks],
        checks_total=len(checks),
        feasible_checks=sum(check.feasible for check in checks),
        feasible_steps=sum(step.violation.get("retain", math.inf) <= 0 for step in steps),
        logged=_logged(steps),
        resumed=list(resumed),
    )


def _logged(steps: Sequence[StepRecord]) -> dict[str, Logged]:
    """Of each quantity that the solver alone logs: its range over the run."""
    series: dict[str, list[float]] = {}
    for step in steps:
        for name, value in step.extra.items():
            series.setdefault(name, []).append(value)
    return {
        name: Logged(mean=sum(v) / len(v), least=min(v), most=max(v), last=v[-1], steps=len(v))
        for name, v in sorted(series.items())
    }


def _spread(size: int, most: int, always: Sequence[int]) -> list[int]:
    """At most `most` of range(size), evenly spread, with the first, the last and those in `always` among them."""
    if size <= most:
        return list(range(size))
    must = {0, size - 1, *always}
    count = most - len(must)
    return sorted(must | {k * size // count for k in range(count)})


def _point(step: StepRecord) -> StepPoint:
    return StepPoint(
        step=step.step,
        forget_loss=step.losses.get("forget"),
        retain_loss=step.losses.get("retain"),
        dual=step.dual.get("retain"),
        violation=step.violation.get("retain"),
        learning_rate=step.learning_rate,
        gradient_norm=step.gradient_norm,
    )


def of_requests(
    served: Sequence[RequestRows], points: Sequence[RowPoint], *, trained: bool = True
) -> list[RequestFigures]:
    """Each deletion request's own figures, from those of the forget rows."""
    by_row = {point.row: point for point in points}
    figures = []
    for request in served:
        measured = [by_row[number] for number in request.row_numbers if number in by_row]
        figures.append(
            RequestFigures(
                request_id=request.request_id,
                rows=len(request.row_numbers),
                rows_measured=len(measured),
                before=_mean([point.before for point in measured]),
                after=_mean([point.after for point in measured]),
                reason=(None if trained else NOT_TRAINED) if measured else "none of its rows could be measured",
            )
        )
    return figures


def _mean(values: Sequence[float | None]) -> float | None:
    """Null where one of them is, or there are none."""
    finite = [value for value in values if value is not None]
    return sum(finite) / len(finite) if finite and len(finite) == len(values) else None


def environment(device: str, threads: int) -> Environment:
    """Where it ran: versions, not paths and not names of machines."""
    return Environment(
        versions={name: metadata.version(name) for name in PACKAGES},
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        device=device,
        threads=threads,
        code_version=metadata.version(DISTRIBUTION),
        installed=installed(),
    )


@cache
def installed() -> str:
    """One digest of every distribution that is installed: the same where `pip freeze` says the same, but for its order."""
    found = ((re.sub(r"[-_.]+", "-", one.name).lower(), one.version) for one in metadata.distributions())
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(set(found)))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def caveats(
    benchmarks: Sequence[BenchmarkFacts],
    audit: Sequence[AuditEntry],
    *,
    chained: bool = False,
    reverified: str | None = None,
) -> list[str]:
    """What the report does not prove, given what was tried.

    Args:
        reverified: the job whose adapter was evaluated again; None: the job trained its own.
    """
    tried = {entry.attack for entry in audit if entry.attacked is not None}
    retention = "the retain set alone; abilities that it does"
    if benchmarks:
        retention = "the retain set and the benchmarks named here; abilities that they do"
    return [
        "This is evidence of a run and of its measurements, not a proof of erasure: approximate unlearning gives no guarantee.",
        "Only the rows named here were asked for, in the ways named here. Other languages, indirect questions, cleverer prompts "
        "were not tried, and an answer that describes the fact without any of its words is not found.",
        _robustness(tried),
        f"Retention was measured on {retention} not represent may have changed.",
        *([CHAINED] if chained else []),
        *([REVERIFIED.format(job_id=reverified)] if reverified else []),
        "The base model itself is unchanged: the data is still in its weights, its copies, caches and backups. What was measured "
        "holds only where the adapter is applied.",
    ]


def untrained_caveats(*, chained: bool = False, beside_holdout: bool = False) -> list[str]:
    """What the report of a job does not prove whose rows the model did not know."""
    return [
        "This is evidence of measurements on the model, not a proof that its training data lacked the rows: what a model has "
        "seen and does not show cannot be told from what it never saw.",
        "Only the rows named here were measured, on average, and asked for in the ways named here: a single row that the model "
        "knows but does not say then does not show.",
        "Nothing was trained, so neither the bound nor what else the request wanted of an adapter was judged.",
        *([UNTRAINED_HOLDOUT] if beside_holdout else []),
        *([UNTRAINED_CHAINED] if chained else []),
        "It holds for the files that the certificate names. A model that is trained further may learn the rows.",
    ]


def _robustness(tried: Set[str]) -> str:
    if not tried:
        return "Whether further fine-tuning, quantisation or an attack brings the answers back was not tested."
    missed = [words for family, words in FAMILIES.items() if not any(attack.startswith(family) for attack in tried)]
    left = f" Not tested: {', '.join(missed)}." if missed else ""
    return (
        "Only the attacks in the table were tried, at the settings given there; a stronger or a different one may bring more "
        f"back.{left}"
    )


def render_json(report: Report) -> bytes:
    return report.model_dump_json(indent=2).encode() + b"\n"
