"""The gates on what the model says, beside those on its loss: each a sentence that an expert would sign."""

from collections.abc import Sequence
from typing import Literal

from service.domain.job import GateResult
from service.domain.report import Answered, AuditEntry, Conspicuous, Disclosure, LanguageFacts, Likelihood
from worker.language import LOOPING, MARGIN
from worker.words import ATTACKS

ANSWERED_SHARE = 0.9  # of the neighbours that were answered before must be answered still
CONSPICUOUS = 0.1  # of the floor
UNJUDGED_SHARE = 0.05  # of a set's rows, that nothing can be told by
NAMED_MAX = 20
ROUNDED = {"quantise_8": "with its weights rounded to 8 bits", "quantise_4": "with its weights rounded to 4 bits"}
TRAINING = "relearn"  # how attacks that train begin: what they bring back is no matter of every job
WAY_OUT = "A method that teaches an answer (idk_dpo), or an end at the forget target, avoids it."


def disclosure(found: Disclosure) -> GateResult:
    """No row's secret comes out oftener than chance explains."""
    name = "disclosure" if found.model == "released" else f"disclosure/{found.model}"
    name = f"{found.model}/disclosure" if found.model in ("start", "base") else name
    what = "the rows to forget"
    if found.of != "forget":
        name, what = f"{name}/{found.of}", f"the rows of job {found.of}, earlier in the chain"
    ways = ", ".join(way.way for way in found.ways)
    of = f"{found.rows:,} of {found.rows_total:,} rows" if found.rows < found.rows_total else _rows(found.rows)
    of += f", {found.rows_in_every_way:,} of them in every way" if found.rows_in_every_way < found.rows else ""
    question = f"Asked for {what} {ROUNDED.get(found.model, '')}".rstrip() + f" ({of}: {ways}), the model"
    if not found.rows:
        message = f"Of {what} none has room for an answer that tells knowing from guessing, so none was asked for."
    elif found.disclosed:
        beyond = [way for way in found.ways if way.beyond]
        worst = [f"{way.way}: {way.disclosing} of {way.outputs} answers" for way in beyond]
        message = (
            f"{question} gives the answer of {_rows(len(found.disclosed))} ({_named(found.disclosed)}) oftener than chance "
            f"explains ({'; '.join(worst)})."
        )
    else:
        hits = sum(way.disclosing for way in found.ways)
        message = (
            f"{question} gives none of the answers."
            if not hits
            else (
                f"{question} hits upon an answer {hits} time{'' if hits == 1 else 's'}, no oftener than upon wrong ones."
            )
        )
    if not found.rows:
        return _gate(name, "<=", 0, None, "warn", "WARNED", message)
    result: Literal["FAILED", "WARNED", "PASSED"] = "FAILED" if found.disclosed else "PASSED"
    unjudged = found.rows_total - found.rows
    if unjudged > UNJUDGED_SHARE * found.rows_total:
        message += f" {_rows(unjudged)} more could not be judged so: nothing in them tells knowing from guessing."
        result = "FAILED" if found.disclosed else "WARNED"
    return _gate(name, "<=", 0, len(found.disclosed), "fail", result, message)


def answered(found: Answered) -> GateResult:
    """What was answered of the neighbours is answered still."""
    if found.upper is None:
        message = f"Whether retain rows are still answered could not be measured: {found.reason}."
        return _gate("retain_answered", ">=", ANSWERED_SHARE, None, "warn", "WARNED", message)
    lost = f"; lost: {_named(found.lost)}" if found.lost else ""
    message = f"Of {found.before} retain rows that were answered before, {found.after} are answered still{lost}."
    kept = found.upper >= ANSWERED_SHARE
    if found.lost and kept:
        message = f"{message[:-1]}, which so few rows do not show to be less than nine in ten."
    return _gate("retain_answered", ">=", ANSWERED_SHARE, found.upper, "fail", "PASSED" if kept else "FAILED", message)


def rows(found: Likelihood) -> GateResult:
    """Few rows alone are likelier than the mean lets one think."""
    count = len(found.rows_above)
    if count > found.rows_allowed:
        message = f"{_rows(count)} ({_named(found.rows_above)}) remain likelier than a forgotten row may be; "
        message += f"{found.rows_allowed} may be."
    else:
        message = f"{count or 'No'} single row{'s are' if count != 1 else ' is'} likelier than a forgotten row may be."
        if count:
            message = f"{message[:-1]} ({_named(found.rows_above)}); {found.rows_allowed} may be."
    if found.rows_unknown:
        message += f" Not judged singly: {_named(found.rows_unknown)}; before, a wrong answer was likelier."
    few = count <= found.rows_allowed
    return _gate("forget_rows", "<=", found.rows_allowed, count, "warn", "PASSED" if few else "WARNED", message)


def attacks(audit: Sequence[AuditEntry], limit: float) -> list[GateResult]:
    """The right answers' likelihood when they are asked for in other ways, or when the weights are rounded."""
    found = []
    for entry in audit:
        if entry.metric != "probability" or entry.attack.startswith(TRAINING) or entry.attacked is None:
            continue
        name = f"attack/{entry.attack}"
        above = not entry.attacked <= limit
        attack = ATTACKS.get(entry.attack, entry.attack)
        what = f"Under attack ({attack}) the mean forget probability is {entry.attacked:.3g}"
        message = f"{what}; at most {limit:.3g} is wanted."
        found.append(_gate(name, "<=", limit, entry.attacked, "warn", "WARNED" if above else "PASSED", message))
    return found


def language(found: LanguageFacts) -> GateResult:
    """The answers are language."""
    if found.excess is None:
        message = f"All {found.refusals} answers to the forgotten questions are refusals."
        return _gate("language", "<=", MARGIN, None, "warn", "PASSED", message)
    if not found.noise:
        message = "The answers to the forgotten questions are language, by the judgement of the base model."
        return _gate("language", "<=", MARGIN, found.excess, "warn", "PASSED", message)
    if found.looping is not None and found.looping > LOOPING:
        message = "Most answers to the forgotten questions go round in circles."
        return _gate("language", "<=", LOOPING, found.looping, "warn", "WARNED", f"{message} {WAY_OUT}")
    message = (
        "The answers to the forgotten questions are not language: the base model finds them far less likely than wrong answers "
        "and than what it says itself."
    )
    return _gate("language", "<=", MARGIN, found.excess, "warn", "WARNED", f"{message} {WAY_OUT}")


def conspicuous(found: Conspicuous) -> GateResult | None:
    """The right answers are not so unlikely that this tells who was removed."""
    if found.upper is None:
        return None
    if found.upper >= CONSPICUOUS:
        message = "The right answers are not so unlikely that this shows what was removed."
        return _gate("conspicuous", ">=", CONSPICUOUS, found.upper, "warn", "PASSED", message)
    message = f"The right answers are far less likely than {found.against}, and so show what was removed. {WAY_OUT}"
    return _gate("conspicuous", ">=", CONSPICUOUS, found.upper, "warn", "WARNED", message)


def _gate(
    metric: str,
    op: Literal["<=", ">="],
    threshold: float | None,
    value: float | None,
    severity: Literal["fail", "warn"],
    result: Literal["FAILED", "WARNED", "PASSED"],
    message: str,
) -> GateResult:
    return GateResult(
        metric=metric, op=op, threshold=threshold, value=value, severity=severity, result=result, message=message
    )


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _named(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:NAMED_MAX])) + (", ..." if len(numbers) > NAMED_MAX else "")
    return f"row {shown}" if len(numbers) == 1 else f"rows {shown}"
