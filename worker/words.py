"""What a report says in plain words: the verdict in a sentence, three numbers that need no training, what was not measured."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from service.domain.job import GateResult
from service.domain.report import EARLIER, Disclosure, Figure, Knowledge, Report, TextKnowledge

DISCLOSURE = "disclosure"  # how the gates on what the model gives away begin
MET = {  # what it means that a gate of every job is met or broken: no more than what its figure says
    "retain_nll": "the words to be kept are predicted no worse than allowed",
    "forget_probability": "the exact words to be forgotten are as unlikely as required",
    DISCLOSURE: "asked for what was to be forgotten, the model gives no more of it away than can be guessed",
}
BROKEN = {
    "retain_nll": "the words to be kept are predicted worse than allowed",
    "forget_probability": "the exact words to be forgotten are still likelier than allowed",
    "forget_rows": "the exact words of some rows are still likelier than allowed",
    DISCLOSURE: "asked for what was to be forgotten, the model still gives answers away",
    "disclosure/quantise_8": "with its weights rounded to 8 bits the model gives answers away",
    "disclosure/quantise_4": "with its weights rounded to 4 bits the model gives answers away",
    "retain_answered": "questions to be kept are no longer answered",
    "attack/quantise_8": "with its weights rounded to 8 bits the exact words are likelier than allowed",
    "attack/quantise_4": "with its weights rounded to 4 bits the exact words are likelier than allowed",
    "attack/paraphrase": "asked in other words, the exact words are likelier than allowed",
    "attack/prefix": "behind jailbreak-style prefixes the exact words are likelier than allowed",
    "language": "it answers the forgotten questions with what is no language",
    "conspicuous": "the right answers are so unlikely that they stand out as removed",
}
SLIGHT = {
    "retain_nll": "the bound is kept by less than the measurement can resolve"
}  # WARNED, where that is not "broken"
OF_EARLIER = f"{DISCLOSURE}/ujob_"  # how the gate on what is given away of an earlier job's rows begins
GATES = {  # what the table of requirements calls them
    "retain_nll": "retain loss, nats per token",
    "forget_probability": "mean probability of the forget rows' answers, per token",
    "forget_rows": "single rows likelier than a forgotten row may be",
    "disclosure": "rows given away when asked for",
    "disclosure/quantise_8": "rows given away, weights rounded to 8 bits",
    "disclosure/quantise_4": "rows given away, weights rounded to 4 bits",
    "retain_answered": "share of neighbouring rows still answered, 95 % upper bound",
    "attack/quantise_8": "mean probability, weights rounded to 8 bits",
    "attack/quantise_4": "mean probability, weights rounded to 4 bits",
    "attack/paraphrase": "mean probability, asked in other words",
    "attack/prefix": "mean probability, behind prefixes",
    "language": "answers that are no language: how much less likely, nats per token, or the share that goes round in circles",
    "conspicuous": "right answers against those of a model that does not know them, times as likely",
    "base/log_ratio": "base model: right answers against wrong ones, nats per token",
    "base/disclosure": "base model: rows given away when asked for",
    "start/log_ratio": "with the earlier job's adapter: right answers against wrong ones, nats per token",
    "start/disclosure": "with the earlier job's adapter: rows given away when asked for",
}
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
    """What was asked and what was measured, for who reads nothing else: of each requirement only what its figure says."""
    gates = report.verdict.gates
    own = [gate for gate in gates if of_every_job(gate.metric)]
    earlier = [gate for gate in gates if gate.metric.startswith(EARLIER)]
    others = [gate for gate in gates if gate not in own + earlier]
    asked = (
        f"The model {report.asked.model} was to forget {rows(report.forget_set.rows)} and to keep "
        f"{rows(report.retain_set.rows)}."
    )
    if report.reverifies is not None:
        asked += (
            f" This is a reverification: the adapter that job {report.reverifies} released, evaluated again under verdict rules "
            f"{report.verdict.rules}."
        )
    if report.verdict.result == "NOT_KNOWN":
        holder = report.verdict.forgotten_by
        why = f"the adapter of job {holder} had forgotten them already" if holder else "it does not know them"
        return f"{asked} By the measurements below {why}, so nothing was trained and no adapter was released."
    if report.verdict.result == "PASSED":
        found = [f"with the adapter that was released, {_met(own)}", *_still_unlikely(earlier)]
        found += ["every further requirement is met"] if others else []
    elif report.verdict.result == "WARNED":
        slight = [SLIGHT.get(gate.metric) or _what_is_broken(gate) for gate in own if gate.result == "WARNED"]
        missed = slight + _returned(earlier) + _missed(others)
        found = [f"with the adapter that was released, {_met(own)}, but {', and '.join(missed)}"]
        found += ["a warning does not fail the job: whether the adapter is used all the same is for you to decide"]
    else:
        tail = "the adapter must not be relied on" if report.released.published else "no adapter was released"
        missed = [*_broken(own), *_returned(earlier), *_missed(others)]
        did = "" if any(gate.result == "FAILED" for gate in own) else f"{_met(own)}, but "
        found = [f"{did}{', '.join(missed)}, and {tail}"]
    return " ".join([asked, *(f"{_sentence(words)}." for words in found)])


def _met(own: Sequence[GateResult]) -> str:
    met = [MET[gate.metric] for gate in own if gate.metric in MET and gate.result == "PASSED"]
    *first, last = met or ["it was measured as below"]
    return f"{', '.join(first)} and {last}" if first else last


def _broken(own: Sequence[GateResult]) -> list[str]:
    """Which of the gates of every job failed, and how; then of which a broken one warns."""
    failed = [gate for gate in own if gate.result != "PASSED"]
    if any(_unmeasured(gate) for gate in failed if gate.result == "FAILED"):
        return ["whether it meets what every job must meet could not be measured"]
    retain = next((gate for gate in failed if gate.metric == "retain_nll"), None)
    if retain and retain.value is not None and retain.threshold is not None and retain.value <= retain.threshold:
        return ["no checked iterate met the requirements, and what was measured after is not one that may be released"]
    failed.sort(key=lambda gate: gate.result)  # FAILED before WARNED
    return [_what_is_broken(gate) for gate in failed]


def of_every_job(metric: str) -> bool:
    """Whether a gate is one of every job's; the rest are on the likelihood of earlier jobs' rows, or the request's own."""
    return metric in BROKEN or metric.startswith(OF_EARLIER)


def _what_is_broken(gate: GateResult) -> str:
    metric = gate.metric
    if gate.value is None:
        return f"{GATES.get(metric, metric)} could not be measured"
    if metric.startswith(DISCLOSURE) and gate.result == "WARNED":
        return "of some rows what the model says could not be judged"
    return BROKEN.get(metric, "asked for what an earlier job had it forget, the model gives answers away")


def _unmeasured(gate: GateResult) -> bool:
    """Of a probability that was 0 before, a tenth is nothing to measure forgetting by."""
    return gate.value is None or gate.threshold is None or (gate.metric == "forget_probability" and gate.threshold == 0)


def _still_unlikely(gates: Sequence[GateResult]) -> list[str]:
    return [f"what {_jobs(len(gates))} had it forget is still as unlikely, word for word, as required"] * bool(gates)


def _returned(gates: Sequence[GateResult]) -> list[str]:
    missed = [gate for gate in gates if gate.result != "PASSED"]
    unknown = sum(_unmeasured(gate) for gate in missed)
    likely = len(missed) - unknown
    return [f"what {_jobs(likely)} had it forget is likelier than allowed"] * bool(likely) + [
        f"how likely what {_jobs(unknown)} had it forget is could not be measured"
    ] * bool(unknown)


def _jobs(count: int) -> str:
    return "an earlier job" if count == 1 else f"{count} earlier jobs"


def _missed(gates: Sequence[GateResult]) -> list[str]:
    missed = [gate for gate in gates if gate.result != "PASSED"]
    what = "requirement is" if len(missed) == 1 else "requirements are"
    return [f"{len(missed)} further {what} not met ({', '.join(gate.metric for gate in missed)})"] if missed else []


# --- the three numbers


PIECE = "each next word or part of a word"  # a token, for who knows no tokens


def three(report: Report) -> list[Fact]:
    """What the model says now of the rows to forget, of the rows to keep, and under an attack; the plainest figure of each.

    Of a job that was not trained: what the model knows of the rows, and why the others were not measured.
    """
    if report.verdict.result == "NOT_KNOWN":
        return _untrained(report)
    return [_to_forget(report), _to_keep(report), _under_attack(report)]


def _untrained(report: Report) -> list[Fact]:
    """Of the model that the job starts from, which need not be the base model alone."""
    starts = "base" if report.parent is None else "start"
    return [
        *(_knows_answers(found) for found in report.knowledge if found.model == starts),
        *(_knows_texts(found) for found in report.text_knowledge if found.model == starts),
        Fact(
            "Kept: what it must still say", "unchanged", "Nothing was trained, so the model says what it said before."
        ),
        Fact(
            "Brought back by an attack", "nothing to attack", "No adapter was made, so there is nothing to bring back."
        ),
    ]


def _to_forget(report: Report) -> Fact:
    """The share of the answers' words that it gives, then the forget gate, which alone stands there for texts."""
    if given := next((found for found in report.disclosure if (found.of, found.model) == ("forget", "released")), None):
        return _given_away(given)
    gate, likely = _gate(report, "forget_probability"), _measured(report, "forget", "probability")
    if likely is None or gate.value is None or gate.threshold is None:
        big, exact = None, gate.message
    else:
        [before], (after, required) = percents(likely.before), percents(gate.value, gate.threshold)
        big = f"{before} → {after}"
        exact = (
            f"To {PIECE} of what was to be forgotten it gives a probability of {after} (before, {before}); at most {required} "
            "was required. How likely the same fact is in other words, these figures do not say."
        )
    return _answered(report, "forget", "Rows to forget: what it still says", big, exact)


def _given_away(found: Disclosure) -> Fact:
    name = "Rows to forget: what it still gives away"
    if not found.rows:
        return Fact(name, "not measured", "No answer of these rows tells knowing from guessing, so none was asked for.")
    now = len(found.disclosed)
    times = sum(way.outputs for way in found.ways)
    asked = f"Asked for {rows(found.rows)} in the ways of the table, {times:,} times in all, the model"
    gave = f"gives the answer{'s' if now != 1 else ''} of {rows(now)} away" if now else "gives no answer away"
    chance = sum(way.disclosing for way in found.ways)
    guessed = f" ({chance} answers contain the right words, no more than by chance)" if chance and not now else ""
    before = "" if found.before is None else f" Before, asked plainly, it gave {rows(len(found.before))} away."
    big = f"{now} of {found.rows}" if found.before is None else f"{len(found.before)} → {now} of {found.rows}"
    return Fact(name, big, f"{asked} {gave}{guessed}.{before}")


def _to_keep(report: Report) -> Fact:
    """The share of the answers' words that it gives, then the bound on the loss as a probability per token, e^-loss."""
    facts = report.constraint
    if facts.upper is None:
        big, predicted = None, _gate(report, "retain_nll").message
    else:
        after, required = percents(math.exp(-facts.upper), math.exp(-facts.epsilon), digits=3)
        [before] = percents(math.exp(-facts.before), digits=3)
        big = f"{before} → {after}"
        kept = "" if facts.upper <= facts.epsilon else ", which is not kept"
        predicted = (
            f"Over all {rows(facts.rows_measured)}, it gives {PIECE} a typical probability of {after} (before, {before}); at "
            f"least {required} was required{kept}."
        )
    return _answered(report, "retain", "Rows to keep: what it still says", big, predicted)


def _answered(report: Report, of: str, name: str, big: str | None, judged: str) -> Fact:
    """With `big` where it was asked for no answer."""
    # reports of earlier versions have the second figure alone
    said = _measured(report, of, "rouge_l_recall_unicode") or _measured(report, of, "rouge_l_recall")
    if said is None:
        return Fact(name, big or "not measured", judged)
    before, after = percents(said.before, said.after)
    count = f"{said.rows:,} answer{'' if said.rows == 1 else 's'} to be {'forgotten' if of == 'forget' else 'kept'}"
    shown = f"Asked for {count}, the model gives {after} of the words, in their order; before, {before}."
    return Fact(name, f"{before} → {after}", f"{shown} {judged}")


def _gate(report: Report, metric: str) -> GateResult:
    return next(gate for gate in report.verdict.gates if gate.metric == metric)


def _measured(report: Report, of: str, metric: str) -> Figure | None:
    """The figure, if it has both values."""
    found = (figure for figure in report.figures if (figure.set, figure.metric) == (of, metric))
    return next((figure for figure in found if figure.before is not None and figure.after is not None), None)


def _because(reasons: set[str]) -> str:
    return f"{_sentence('; '.join(sorted(reasons)))}." if reasons else "No figure of it was asked for."


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _under_attack(report: Report) -> Fact:
    """By the attack under which the answers to forget are likeliest."""
    name, audit = "Under attack: what comes back", report.audit
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
        f"Under {count} ({how}) it gives {PIECE} of what was to be forgotten a probability of {attacked}; without "
        f"it, {released}."
    )
    allowed = _gate(report, "forget_probability").threshold
    if allowed is not None and worst.attacked is not None and worst.attacked > allowed:
        sentence += f" That is more than the {percents(allowed)[0]} allowed without an attack."
    sentence += f" The base model under the same attack gives {base}."
    if worst.retrained is not None:
        sentence += f" A model that never saw them gives {percents(worst.retrained)[0]}."
    missed = len(likely) - len(tried)
    return Fact(name, f"{attacked}, not {released}", sentence + (f" {missed} could not be tried." if missed else ""))


# --- what could not be measured


def _knows_answers(found: Knowledge) -> Fact:
    name = "What it knows: right answers against wrong ones"
    if found.mean is None or found.upper is None:
        return Fact(name, "not measured", "")
    mean, upper, margin = pair(*(math.exp(value) for value in (found.mean, found.upper, found.margin)))
    return Fact(
        name,
        f"{mean} times as likely",
        f"A piece of a right answer is on average {mean} times as likely as a piece of a wrong answer in the same words, at "
        f"most {upper} times (95 % bound). Of a model that never saw the answers, less than {margin} times is expected.",
    )


def _knows_texts(found: TextKnowledge) -> Fact:
    name = "What it knows: the texts against texts that it never saw"
    if found.auc is None or found.upper is None:
        return Fact(name, "not measured", "")
    return Fact(
        name,
        f"likelier in {found.auc:.0%} of pairs",
        f"Of a text to forget and one like it that, by the request, the model never saw, it finds the first likelier in "
        f"{found.auc:.0%} of pairs, "
        f"at most {found.upper:.0%} (95 % bound). Half is chance; less than {found.threshold:.0%} is expected of a model that "
        f"never saw the texts.",
    )


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
    who = {"base": "The base model", "start": "The model that the job started from"}
    missing += [(who[known.model], "whether it knew the answers", known.reason) for known in report.knowledge]
    missing += [(who[known.model], "whether it knew the texts", known.reason) for known in report.text_knowledge]
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


def percents(*values: float | None, digits: int = 2) -> list[str]:
    """Shares as per cent, with two digits, or with as many as it takes to tell them apart.

    >>> percents(0.9712, 0.000301, 0.0, 1.0)
    ['97%', '0.03%', '0%', '100%']
    >>> percents(0.9712, 0.9708)
    ['97.12%', '97.08%']
    >>> percents(0.9996)
    ['99.96%']
    """
    return _apart(values, digits, _percent)


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
