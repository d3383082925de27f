"""What a report says in plain words: the verdict in a sentence, three numbers that need no training, what was not measured."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from service.domain.job import GateResult
from service.domain.report import EARLIER, AuditEntry, Figure, Report

OWN_GATES = ("retain_nll", "forget_probability")  # of every job; the rest are earlier jobs' and the request's
ATTACKS = {
    "relearn_forget": "fine-tuning on a part of the forget set",
    "relearn_unrelated": "fine-tuning on unrelated text",
    "quantise_8": "rounding the weights to 8 bits",
    "quantise_4": "rounding the weights to 4 bits",
    "paraphrase": "asking in other words",
    "prefix": "jailbreak-style prefixes",
}


class Fact(NamedTuple):
    """One of the three numbers on the first screen."""

    name: str
    big: str
    sentences: str


def summary(report: Report) -> str:
    """What happened, in one sentence for who reads nothing else."""
    asked = (
        f"The model {report.asked.model} was to forget {rows(report.forget_set.rows)} "
        f"while keeping {rows(report.retain_set.rows)}: "
    )
    own = [gate for gate in report.verdict.gates if gate.metric in OWN_GATES]
    earlier = [gate for gate in report.verdict.gates if gate.metric.startswith(EARLIER)]
    others = [gate for gate in report.verdict.gates if gate not in own + earlier]
    if report.verdict.result == "PASSED":
        more = ", and it meets every other requirement of the request" if others else ""
        more += f"; what {_jobs(len(earlier))} had it forget stays forgotten" if earlier else ""
        return f"{asked}the adapter that was released does both, by the measurements below{more}."
    if report.verdict.result == "WARNED":
        slight = "it keeps its bound by less than the measurement can resolve"
        reasons = [slight] * any(gate.result == "WARNED" for gate in own) + _returned(earlier) + _broken(others)
        return f"{asked}the adapter that was released does both, but {', and '.join(reasons)}."
    failed = {gate.metric for gate in own if gate.result == "FAILED"}
    retain = next(gate for gate in own if gate.metric == "retain_nll")
    if any(gate.value is None or not gate.threshold for gate in own if gate.metric in failed):
        missed = "whether it did could not be measured"
    elif "retain_nll" in failed and retain.value is not None and retain.value <= (retain.threshold or 0.0):
        missed = "no checked iterate did both, and what was measured after is not one that may be released"
    elif failed == {"retain_nll"}:
        missed = "it did not keep what it had to keep"
    elif failed == {"forget_probability"}:
        missed = "it did not forget what it had to forget"
    else:
        missed = "it did neither as required" if failed else "it did both"
    tail = "the adapter must not be relied on" if report.released.published else "no adapter was released"
    return f"{asked}{', '.join([missed, *_returned(earlier), *_broken(others)])}, and {tail}."


def _returned(gates: Sequence[GateResult]) -> list[str]:
    results = [gate.result for gate in gates]
    likely, unknown = results.count("FAILED"), results.count("WARNED")
    return [f"what {_jobs(likely)} had it forget is not as unlikely as it must stay"] * bool(likely) + [
        f"whether what {_jobs(unknown)} had it forget stays forgotten could not be measured"
    ] * bool(unknown)


def _jobs(count: int) -> str:
    return "an earlier job" if count == 1 else f"{count} earlier jobs"


def _broken(gates: Sequence[GateResult]) -> list[str]:
    missed = [gate for gate in gates if gate.result != "PASSED"]
    what = "requirement of the request is" if len(missed) == 1 else "requirements of the request are"
    return [f"{len(missed)} further {what} not met ({', '.join(gate.metric for gate in missed)})"] if missed else []


# --- the three numbers


def three(report: Report) -> list[Fact]:
    """What is forgotten, what is kept, what an attack brings back; of each the plainest figure that was measured."""
    gates = {gate.metric: gate.message for gate in report.verdict.gates}
    return [
        _answered(report, "forget", "Forgotten: what it still says", gates["forget_probability"]),
        _answered(report, "retain", "Kept: what it must still say", gates["retain_nll"]),
        _brought_back(report.audit),
    ]


def _answered(report: Report, of: str, name: str, gate: str) -> Fact:
    found = {figure.metric: figure for figure in report.figures if figure.set == of}
    which = "that were to be forgotten" if of == "forget" else "that it was to keep"
    said, likely = found.get("rouge_l_recall"), found.get("probability")
    if said and _measured(said):
        before, after = percents(said.before, said.after)
        asked = f"Asked for {said.rows:,} answers {which}, the model gives {after} of their words, in their order"
    elif likely and _measured(likely):
        before, after = percents(likely.before, likely.after)
        asked = f"To each next piece of {likely.rows:,} answers {which} the model gives a probability of about {after}"
    else:
        reasons = {figure.reason for figure in (said, likely) if figure and figure.reason}
        return Fact(name, "not measured", f"{_because(reasons)} {gate}")
    return Fact(name, f"{before} → {after}", f"{asked}; before, {before}. {gate}")


def _measured(figure: Figure) -> bool:
    return figure.before is not None and figure.after is not None


def _because(reasons: set[str]) -> str:
    return f"{_sentence('; '.join(sorted(reasons)))}." if reasons else "No figure of it was asked for."


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _brought_back(audit: Sequence[AuditEntry]) -> Fact:
    """By the attack under which the forgotten answers are likeliest."""
    name = "Brought back by an attack"
    if not audit:
        return Fact(
            name,
            "not tested",
            "The request asked for no attack, so it is not known whether fine-tuning, rounding the weights or other "
            "wordings bring the answers back.",
        )
    likely = [entry for entry in audit if entry.metric == "probability"]
    tried = [entry for entry in likely if entry.attacked is not None]
    if not tried:
        reasons = {entry.reason for entry in likely if entry.reason}
        return Fact(name, "not measured", f"No attack could be tried. {_because(reasons)}")
    worst = max(tried, key=lambda entry: entry.attacked or 0.0)
    released, attacked, base = percents(worst.released, worst.attacked, worst.base)
    how = ATTACKS.get(worst.attack, worst.attack)
    count = f"the strongest of {len(tried)} attacks" if len(tried) > 1 else "the only attack tried"
    sentence = (
        f"Under {count} ({how}) each next piece of a forgotten answer has a probability of about {attacked}; without it, "
        f"{released}, and of the base model under the same attack, {base}."
    )
    if worst.retrained is not None:
        sentence += f" A model that never saw them gives {percents(worst.retrained)[0]}."
    missed = len(likely) - len(tried)
    return Fact(name, f"{released} → {attacked}", sentence + (f" {missed} could not be tried." if missed else ""))


# --- what could not be measured


def unmeasured(report: Report) -> Iterator[str]:
    """Each with its reason; figures that share one are named together."""
    if report.constraint.upper is None:
        yield f"Retain loss after: {report.constraint.reason}."
    missing = [(f"{f.set.capitalize()} set", f.metric, f.reason) for f in report.figures]
    missing += [(f"Benchmark {of.name}", f.name, f.reason) for of in report.benchmarks for f in of.figures]
    missing += [("Deletion requests", f.request_id, f.reason) for f in report.deletion_requests]
    missing += [("Audit", f"{e.attack}/{e.metric}", e.reason) for e in report.audit]
    if report.parent is not None:
        missing += [("Earlier jobs", f.job_id, f.reason) for f in report.parent.forgotten]
    together: dict[tuple[str, str], list[str]] = {}
    for where, name, reason in missing:
        if reason:
            together.setdefault((where, reason), []).append(name)
    for (where, reason), names in together.items():
        yield f"{where}, {', '.join(names)}: {reason}."
    merged = "the tokeniser merges their answers with the prompt, so that no token counts"
    own = (("Forget", report.forget_set), ("Retain", report.retain_set), ("Holdout", report.holdout_set))
    left_out = [(f"{name} set", facts.unmeasured_rows) for name, facts in own if facts]
    left_out += [(f"Benchmark {of.name}, set {s.name}", s.unmeasured_rows) for of in report.benchmarks for s in of.sets]
    for where, count in left_out:
        if count:
            yield f"{where}, {rows(count)}: {merged}."
    points = report.trajectory.steps
    broken = sum(point.forget_loss is None or point.retain_loss is None for point in points)
    if broken:
        yield f"The losses of {broken} of the {len(points)} steps in the picture: they were not finite."
    blown = sum(check.retain_upper is None for check in report.trajectory.checks)
    if blown:
        yield f"The retain loss at {blown} of the {len(report.trajectory.checks)} checks in the picture: it was not finite."


# --- numbers


def rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def number(value: float | None, digits: int = 4) -> str:
    return "not measured" if value is None else f"{value:.{digits}g}"


def interval(value: float | None, both: tuple[float | None, float | None] | None) -> str:
    """The ends of a 95 % interval; empty where there is none."""
    if value is None or both is None or None in both:
        return ""
    return " to ".join(f"{end:.3g}" for end in both)


def pair(*values: float | None) -> list[str]:
    """With three digits, or with as many as it takes to tell the values apart."""
    return _apart(values, 3, lambda value, digits: f"{value:.{digits}g}")


def percents(*values: float | None) -> list[str]:
    """Shares as per cent, with two digits, or with as many as it takes to tell them apart.

    >>> percents(0.9712, 0.000301, 0.0, 1.0)
    ['97%', '0.03%', '0%', '100%']
    >>> percents(0.9712, 0.9708)
    ['97.12%', '97.08%']
    >>> percents(0.9996)
    ['99.96%']
    """
    return _apart(values, 2, _percent)


def _percent(value: float, digits: int) -> str:
    if value == 0:
        return "0%"
    if abs(value) < 1e-6:
        return f"{value * 100:.{digits - 1}e}%"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value) * 100)))
    shown = f"{value * 100:.{decimals}f}"
    if float(shown) == 100 and value < 1 - 1e-6:  # nearly all is not all
        return _percent(value, digits + 1)
    return (shown.rstrip("0").rstrip(".") if "." in shown else shown) + "%"


def _apart(values: Sequence[float | None], digits: int, text: Callable[[float, int], str]) -> list[str]:
    for more in range(digits, 18):
        texts = ["not measured" if value is None else text(value, more) for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts
