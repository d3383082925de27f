"""Measuring the forget and the retain set: the checks of a run, and what its report promises.

Above a size a check measures a fixed sample, and what must stay below a bound is then judged by its one-sided 95 % confidence
bound. The figures of a report are worker.evaluate's.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from worker import data
from worker.data import Encoded
from worker.losses.retain.nll import nll
from worker.model import Network
from worker.scores import Scores
from worker.views import Term, pack, views

SAMPLE_ROWS_MAX = 2000  # of a set; a larger one is sampled
STRATA = 20
POSITIONS_AT_ONCE = 4_096  # padded: as fast as it gets on a CPU, and enough to fill an accelerator
Z_95 = 1.6448536269514722  # one-sided


class Measurement(NamedTuple):
    """What a check finds. See worker.solve.Measured."""

    forget_objective: float  # the method's forget loss, mean over the set
    forget_probability: float
    retain_loss: float  # nats per counted token
    retain_upper: float
    forgotten: bool = False  # everything that the forget target asks for was found, the bound aside
    generation_tokens: int = 0  # of the prompts and answers that were needed to find that out


class Sets(NamedTuple):
    """Both sides of the problem, with the rows that stand for them."""

    forget: Term
    retain: Term
    forget_places: list[int]
    retain_places: list[int]

    @property
    def rows(self) -> int:
        return len(self.forget_places) + len(self.retain_places)

    @property
    def whole(self) -> "Sets":
        """The same with every row that can be measured: what is promised is measured on all of them."""
        return self._replace(forget_places=self.forget.encoded.measured, retain_places=self.retain.encoded.measured)

    @property
    def tokens(self) -> int:
        forget = sum(len(row.ids) for p in self.forget_places for row in self.forget.rows(p))
        return forget + sum(len(self.retain.encoded.rows[p].ids) for p in self.retain_places)


def sets(forget: Term, retain: Term, seed: int) -> Sets:
    return Sets(
        forget,
        retain,
        sample(forget.encoded, seed, SAMPLE_ROWS_MAX),
        sample(retain.encoded, seed, SAMPLE_ROWS_MAX),
    )


def sample(encoded: Encoded, seed: int, rows_max: int) -> list[int]:
    """All measurable rows, or a sample stratified by length, a function of the seed.

    Each stratum is drawn from at random: a systematic sample (every k-th row) has only k outcomes, and its bound then holds
    for more or fewer of them than it says.
    """
    places = encoded.measured
    if len(places) <= rows_max:
        return places
    by_length = sorted(places, key=lambda place: (len(encoded.rows[place].ids), place))
    generator = torch.Generator().manual_seed(seed)
    strata = min(STRATA, rows_max)
    chosen: list[int] = []
    for k in range(strata):
        stratum = by_length[k * len(places) // strata : (k + 1) * len(places) // strata]
        count = (k + 1) * rows_max // strata - k * rows_max // strata
        chosen += [stratum[i] for i in torch.randperm(len(stratum), generator=generator)[:count].tolist()]
    return sorted(chosen)


def measure(network: Network, both: Sets) -> Measurement:
    """One forward pass over the rows that stand for both sets."""
    return measure_rows(network, both)[0]


def measure_rows(network: Network, both: Sets) -> tuple[Measurement, dict[int, float]]:
    """The same, and of each forget row that was measured, by its place, the probability of its answer."""
    forget, objective = score(network, both.forget, both.forget_places)
    retain, _ = score(network, answers_alone(both.retain), both.retain_places)
    loss, upper = token_mean(retain, len(both.retain.encoded.measured))
    probability_B = _probabilities(forget)
    rows = dict(zip(forget.places, probability_B.tolist(), strict=True))
    return Measurement(objective, float(probability_B.mean()), loss, upper), rows


def mean_probability(network: Network, term: Term, places: Sequence[int]) -> float:
    """Of the rows' answers: the mean over rows of exp(mean log p of the row's counted tokens)."""
    return float(_probabilities(score(network, term, places)[0]).mean())


def _probabilities(scores: Scores) -> Tensor:
    return (-scores.nll_B / scores.counted_B).exp()


def answers_alone(term: Term) -> Term:
    """The same set without the loss that a method trains on it: what is bounded is the NLL of the answers."""
    return Term(nll(), {"answer": term.encoded})


@torch.no_grad()
def score(network: Network, term: Term, places: Sequence[int]) -> tuple[Scores, float]:
    """One forward pass over the rows, in order of length. The second value is the mean of the term's loss."""
    encoded, terms = term.encoded, {"scored": term}
    nll_B = torch.zeros(len(places), dtype=torch.float64)
    total = 0.0
    at_once = min(POSITIONS_AT_ONCE, network.tokens_at_once)
    for part in data.by_length([term.length(p) for p in places], at_once):
        seen = views(network, pack(terms, [("scored", places[i]) for i in part], network.device), terms)["scored"]
        view = seen["answer"]
        logp_N, row_N = view.now.logp_N().double().cpu(), view.answers.row_N.cpu()
        nll_B[part] = torch.zeros(len(part), dtype=torch.float64).index_add_(0, row_N, -logp_N)
        total += float(term.loss.fn(seen).double().sum())
    counted_B = torch.tensor([encoded.rows[p].counted for p in places])
    size = int(counted_B.sum()) if term.loss.per == "token" else len(places)
    return Scores(list(places), nll_B, counted_B), total / size


def token_mean(scores: Scores, population: int) -> tuple[float, float]:
    """The token mean of a set and its one-sided 95 % upper bound, from a sample of its rows.

    The ratio of two row means, sum nll / sum tokens; its variance by linearisation, with the correction for a finite
    population: nothing is uncertain once every row is measured.
    """
    n = len(scores.places)
    tokens_B = scores.counted_B.double()
    ratio = float(scores.nll_B.sum() / tokens_B.sum())
    if n >= population:
        return ratio, ratio
    residual_B = scores.nll_B - ratio * tokens_B
    variance = float(residual_B.square().sum()) / (n - 1) / n / float(tokens_B.mean()) ** 2 * (1 - n / population)
    return ratio, ratio + Z_95 * math.sqrt(variance)
