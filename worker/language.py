"""Whether what the model says to the forgotten questions is language, by the judgement of the model that it was.

A model that answers with noise has forgotten, but nobody can use it, and it shows who was removed. The base model is asked how
likely it finds the answers: noise is far less likely to it than wrong answers of the right form and than what it would say
itself at temperature 1. (Its own greedy answers are no measure: it has memorised them.) A loop of a few words becomes likely as
it goes on, so repetition is counted beside.
"""

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

from worker import data, generation, scoring
from worker.data import TokenRow
from worker.model import Network
from worker.refusals import REFUSALS
from worker.spelling import words

MARGIN = 1.0  # nats per token that the answers may be less likely, on average over rows
REPEATED = 0.5  # share of an answer's pairs of tokens that stand in it before: it goes round in circles
LOOPING = 0.5  # of the answers
RESAMPLES = 2_000
LEVEL = 0.05  # one-sided


class Language(NamedTuple):
    answers: int  # that were judged; refusals are not
    refusals: int
    nll: float | None  # under the base, nats per token, mean over answers
    usual: float | None  # the same of wrong answers, or of the base's own samples, whichever is larger
    excess_lower: float | None  # one-sided 95 % lower bound of the difference
    looping: float | None  # share of the answers

    @property
    def noise(self) -> bool:
        return self.excess_lower is not None and (self.excess_lower > MARGIN or (self.looping or 0.0) > LOOPING)


def usual(
    base: Network, prompts: Sequence[Sequence[int]], wrong: Sequence[Sequence[str]], tokens: Sequence[int], seed: int
) -> list[float]:
    """Of each prompt how unlikely the base finds an answer that is language: nats per token, the larger of the two means.

    Args:
        wrong: of each prompt wrong answers of the right form, or none.
        tokens: of an answer, at most.
    """
    if not prompts:
        return []
    drawn = generation.generate(
        base, prompts, tokens, seeds=[seed + k for k in range(len(prompts))], end_of_turn=_end(base)
    )
    own = nll(base, prompts, [one.text for one in drawn])
    pairs = [(k, text) for k, texts in enumerate(wrong) for text in texts]
    found: dict[int, list[float]] = {}
    for (k, _), value in zip(
        pairs, nll(base, [prompts[k] for k, _ in pairs], [text for _, text in pairs]), strict=True
    ):
        found.setdefault(k, []).append(value)
    alternatives = [fmean(found[k]) if k in found else value for k, value in enumerate(own)]
    return own if fmean(own) >= fmean(alternatives) else alternatives


def judge(
    base: Network,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[str],
    expected: Sequence[float],
    refusals: Sequence[str] = (),
) -> Language:
    """What the answers are, given what `usual` found for the same prompts.

    Args:
        refusals: wordings that are language whatever the base thinks of them, beside ours.
    """
    known = {tuple(words(text)) for text in (*REFUSALS, *refusals)}
    judged = [k for k, text in enumerate(outputs) if tuple(words(text)) not in known]
    if not judged:
        return Language(0, len(outputs), None, None, None, None)
    values = nll(base, [prompts[k] for k in judged], [outputs[k] for k in judged])
    excess = [value - expected[k] for k, value in zip(judged, values, strict=True)]
    return Language(
        answers=len(judged),
        refusals=len(outputs) - len(judged),
        nll=fmean(values),
        usual=fmean(expected[k] for k in judged),
        excess_lower=_lower(excess),
        looping=fmean(float(repeated(_ids(base, outputs[k])) > REPEATED) for k in judged),
    )


def nll(network: Network, prompts: Sequence[Sequence[int]], texts: Sequence[str]) -> list[float]:
    """Nats per token of each text behind its prompt, its end of turn included; of an empty text that alone."""
    rows, own_end = [], _end(network)
    end = [] if own_end is None else [own_end]
    for prompt, text in zip(prompts, texts, strict=True):
        rows.append(TokenRow([*prompt, *_ids(network, text), *end][: network.context_tokens], len(prompt)))
    if not rows:
        return []
    scores = scoring.score(network, rows, frozenset())
    means: list[float] = (scores.nll_B / scores.counted_B).tolist()
    return means


def _end(network: Network) -> int | None:
    return data.end_of_turn(network.tokenizer, network.entry.prompt_format)


def repeated(ids: Sequence[int]) -> float:
    """The share of an answer's pairs of tokens that stand in it before.

    >>> repeated([7, 7, 7, 7, 7]), repeated([1, 2, 3, 4])
    (0.75, 0.0)
    """
    pairs = list(pairwise(ids))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def _ids(network: Network, text: str) -> list[int]:
    ids: list[int] = network.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _lower(values: Sequence[float]) -> float:
    """Of the mean, by bootstrap over rows; of one row its value."""
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=random).numpy()
    return float(np.quantile(np.asarray(values)[drawn].mean(1), LEVEL))
