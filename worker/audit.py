"""The audit of robustness: how much of the forgotten answers comes back when a released model is attacked.

Unlearning that a quantiser or a few steps of fine-tuning undoes is not unlearning. Every attack is tried on what was released, on
the base, which shows what there is to bring back, and on a retrained reference where there is one, which shows what the attack
gives without any memory of the rows. All of them run on copies: the network is left as it was found, to the bit.
"""

import json
from collections.abc import Callable, Mapping, Sequence

import torch

from service.domain.job import Audit
from service.domain.report import AuditEntry
from service.domain.rows import Example, parse
from worker import registry, scoring
from worker.attacks.attack import Attack, encode, unadapted
from worker.attacks.quantise import quantise
from worker.attacks.relearn import relearn_forget, relearn_unrelated
from worker.attacks.wording import paraphrase, prefix
from worker.model import Network
from worker.suite import Row

ROWS_MAX = 400  # measured per attack, drawn at random from a larger set
METRICS = ("probability", "extraction_strength")
NONE_FITS = "none of the rows that it needs fits into the model's context and has a token that counts"

Figures = Mapping[str, float | None]  # metric -> mean over rows
NO_FIGURES: Figures = dict.fromkeys(METRICS)


def audit(
    network: Network,
    settings: Audit,
    rows: Sequence[Row],
    retrained: Network | None,
    seed: int,
    cancelled: Callable[[], bool],
) -> list[AuditEntry]:
    """Every attack that the settings ask for, with one entry per metric.

    Args:
        network: with the released adapter active.
        rows: of the forget set, with all their columns.
        retrained: a model that never saw them; without an adapter.
        seed: decides which rows are drawn, and how a fine-tuning starts.

    Ends early once `cancelled` says so; what was not finished is then not there.
    """
    subjects = {"base": unadapted(network), "attacked": network}
    if retrained is not None:
        subjects["retrained"] = retrained
    found: list[AuditEntry] = []
    for attack in attacks(network, settings, rows, seed, cancelled):
        entries = tried(attack, network, subjects)
        if cancelled():
            break
        found += entries
    return found


def attacks(
    network: Network, settings: Audit, rows: Sequence[Row], seed: int, cancelled: Callable[[], bool]
) -> list[Attack]:
    examples = [parse(json.dumps(row).encode()) for row in rows]
    _, places = encode(network, [examples])
    whole = [examples[place] for place in places]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = sorted(places[i] for i in order[:ROWS_MAX])
    measured = [examples[place] for place in drawn]
    planned: list[Attack] = []
    if settings.relearn_steps:
        planned.append(relearn_forget(whole, ROWS_MAX, settings, seed, cancelled))
        planned.append(relearn_unrelated(measured, settings, seed, cancelled))
    planned += [quantise(measured, bits) for bits in settings.quantise_bits]
    if settings.paraphrases:
        planned.append(paraphrase(measured, [rows[place].get("paraphrased_question") for place in drawn]))
    if settings.prefixes:
        planned.append(prefix(measured))
    if len(places) > ROWS_MAX:
        said = f"; at most {ROWS_MAX} rows measured, drawn at random from {len(places)}"
        planned = [attack._replace(setting=attack.setting + said) for attack in planned]
    return planned


def tried(attack: Attack, network: Network, subjects: Mapping[str, Network]) -> list[AuditEntry]:
    """The attack on each subject, and beside it what the network says of the same rows when it is left alone."""
    setting, values = attack.setting, dict[str, Figures]()
    able = {who: one for who, one in subjects.items() if not attack.trained or encode(one, [attack.trained])[1]}
    keep = encode(network, [attack.rows, *attack.wordings])[1] if "attacked" in able and not attack.reason else []
    if keep:
        rows = [attack.rows[i] for i in keep]
        wordings = [[texts[i] for i in keep] for texts in attack.wordings]
        values["released"] = figures(network, [rows])
        for who, subject in able.items():
            under = attack.alter(subject)
            values[who] = figures(under, wordings)
            if who == "attacked" and attack.trained:  # an attack that did not learn even these shows nothing
                setting += f"; mean probability of what was trained on: {learned(network, under, attack.trained)}"
            del under  # a copy's own weights are gone before the next one is made
    return [
        AuditEntry(
            attack=attack.name,
            setting=setting,
            metric=metric,
            **{who: values.get(who, NO_FIGURES)[metric] for who in ("base", "released", "attacked", "retrained")},
            rows=len(keep),
            reason=attack.reason or (None if keep else NONE_FITS),
        )
        for metric in METRICS
    ]


def learned(network: Network, under: Network, rows: Sequence[Example]) -> str:
    before, after = (figures(one, [rows])["probability"] for one in (network, under))
    return f"{before:.3g} before, {after:.3g} after"


def figures(network: Network, wordings: Sequence[Sequence[Example]]) -> Figures:
    """Means over rows; of each row the largest value over its wordings."""
    metrics = {name: registry.build("metrics", name, {}) for name in METRICS}
    views = frozenset[str]().union(*(metric.needs for metric in metrics.values()))
    encoded, keep = encode(network, wordings)
    if not keep:
        return NO_FIGURES
    scored = [scoring.score(network, [one.rows[i] for i in keep], views) for one in encoded]
    return {name: _mean_of_largest([metric.fn(scores).by_row for scores in scored]) for name, metric in metrics.items()}


def _mean_of_largest(by_row: Sequence[Mapping[int, float]]) -> float:
    """A value that is not a number stays one.

    >>> _mean_of_largest([{0: 0.1, 1: 0.5}, {0: 0.3, 1: 0.4}])
    0.4
    """
    value_WB = torch.tensor([list(values.values()) for values in by_row], dtype=torch.float64)
    return float(value_WB.amax(0).mean())
