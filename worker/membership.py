"""Membership inference: do the forget rows still look like training data, beside rows that never were?

Reference: the attacks' own papers, each in its file in worker/metrics; as computed by OpenUnlearning, arXiv 2506.12618.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from worker.figures import TINY, Figure, Missing, Reading, averaged, over_rows, with_zeros
from worker.metrics.gradnorm import gradnorm
from worker.metrics.loss import loss
from worker.metrics.min_k import min_k
from worker.metrics.min_k_plus_plus import min_k_plus_plus
from worker.metrics.zlib import zlib
from worker.scores import Metric, mean_loss
from worker.statistics import auc
from worker.suite import FigureForm, Result

SIDES = ("forget", "holdout")
CHANCE = 0.5  # the AUC of a guess
VIEWS = frozenset({"logp", "standardised", "labels"})  # that all attacks but the last need
GRADIENT = frozenset({"gradient_norm"})


class Attack(NamedTuple):
    """Membership inference: a score of a row that is low for a member of the training data."""

    metric: Callable[[], Metric]
    words: str
    empty_is_zero: bool = False  # so the reference scores a row without a token


ATTACKS = {
    "loss": Attack(loss, "the mean loss"),
    "zlib": Attack(zlib, "the mean loss per byte of the compressed answer"),
    "min_k": Attack(min_k, "Min-K% (the least likely 40 % of the tokens)", empty_is_zero=True),
    "min_k_plus_plus": Attack(min_k_plus_plus, "Min-K%++ (the same, standardised)", empty_is_zero=True),
    "gradnorm": Attack(gradnorm, "the norm of the gradient of the mean log-probability", empty_is_zero=True),
}


def membership(reading: Reading, name: str, *, zeros: bool) -> Result:
    """AUC of the attack: 1 where every forget row looks more like a member of the training data than every holdout row."""
    scores = {of: reading.scores(of) for of in SIDES}  # both are there, or Missing
    found = {of: reading.score(ATTACKS[name].metric(), of) for of in SIDES}
    return _compared({of: averaged(with_zeros(found[of], scores[of].empty) if zeros else found[of]) for of in SIDES})


def membership_against_reference(reading: Reading) -> Result:
    """The attack by loss, of each row what the retrained reference loses on it taken off."""
    known = reading.retrained("mia_loss").parts
    parts = {}
    for of in SIDES:
        theirs = known[of].by_row if of in known else {}
        own = mean_loss(reading.scores(of))
        if own.keys() - theirs.keys():
            raise Missing("the figures of the retrained reference have no mia_loss of every row")
        parts[of] = over_rows({place: value - theirs[place]["score"] for place, value in own.items()})
    return _compared(parts)


def _compared(parts: Mapping[str, Result]) -> Result:
    values = {of: [row["score"] for row in part.by_row.values()] for of, part in parts.items()}
    for of in parts:
        if not values[of]:
            raise Missing(f"no row of the set {of} could be measured")
    return Result(auc(values["forget"], values["holdout"]), rows=sum(map(len, values.values())), parts=parts)


def privleak(own_auc: float, other_auc: float) -> float:
    """How far 1 - AUC of an attack is from another model's, in per cent of that: 0 is best, below it the rows look known.

    Reference: Shi et al. 2024, MUSE, arXiv 2407.06460; with the reference implementation's 1e-10 in the divisor. Raises Missing
    where the other AUC is 1, of which the reference prints up to 1e12.

    >>> round(privleak(0.75, 0.5), 6)
    -50.0
    """
    if 1 - other_auc <= TINY:
        raise Missing("the AUC of the other model is 1: of 1 - AUC, which is 0, there is no per cent")
    return ((1 - own_auc) - (1 - other_auc)) / ((1 - other_auc) + TINY) * 100


def membership_figures() -> dict[str, Figure]:
    """Each attack as the reference has it, and the one beside it that a row without a token does not change."""
    corrected = corrected_membership_figures("", [name for name in ATTACKS if ATTACKS[name].empty_is_zero])
    found = {f"mia_{name}": _attack(name, zeros=attack.empty_is_zero) for name, attack in ATTACKS.items()}
    found["mia_reference"] = Figure(
        FigureForm("AUC of the mean loss less the retrained reference's, forget against holdout rows", retrained=True),
        membership_against_reference,
    )
    return found | {f"{name}_corrected": figure for name, figure in corrected.items()}


def corrected_membership_figures(prefix: str, attacks: Sequence[str]) -> dict[str, Figure]:
    """The attacks on the rows that have a token that counts."""
    return {f"{prefix}mia_{name}": _attack(name, zeros=False, benchmark=False) for name in attacks}


def _attack(name: str, *, zeros: bool, benchmark: bool = True) -> Figure:
    words = f"AUC of {ATTACKS[name].words}, forget against holdout rows; 1: forget rows look like members"
    words += "; a row without a token that counts scores 0" if zeros else ""
    return Figure(FigureForm(words, benchmark=benchmark), partial(membership, name=name, zeros=zeros))


def leak_figures(prefix: str = "") -> dict[str, Figure]:
    """What Min-K% gives away, against the retrained reference and against chance."""

    def of(reading: Reading, other_auc: float) -> Result:
        attack = reading.measured(f"{prefix}mia_min_k")
        return Result(privleak(reading.value(f"{prefix}mia_min_k"), other_auc), rows=attack.rows)

    said = "how far 1 - AUC of Min-K% is from that of {}, in per cent of it; 0 is best"
    return {
        f"{prefix}privleak": Figure(
            FigureForm(said.format("the retrained reference"), retrained=True),
            lambda reading: of(reading, reading.retrained_value("mia_min_k")),
        ),
        f"{prefix}privleak_vs_chance": Figure(
            FigureForm(said.format("a guess (the reference's privleak without a retrained model)"), benchmark=False),
            lambda reading: of(reading, CHANCE),
        ),
    }
