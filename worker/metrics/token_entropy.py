"""Entropy of the tokens of a greedy answer: one token said again and again has none. A sign of gibberish.

Of the distribution of the tokens within one answer, in nats; it grows with the answer's length, up to its logarithm.

Reference: the n-gram entropy of Zhang et al. 2018, arXiv 1809.05972, for n = 1.
"""

from collections import Counter

from worker.scores import NOTHING_SAID, Metric, Score, Scores, mean
from worker.statistics import entropy


def token_entropy() -> Metric:
    """Two tokens, each twice: ln 2. An answer without a token has no entropy, and does not count.

    >>> import torch
    >>> said = {0: [5, 6, 5, 6], 1: []}
    >>> scores = Scores([], torch.empty(0), torch.empty(0), generated_ids=said)
    >>> {place: round(value, 4) for place, value in token_entropy().fn(scores).by_row.items()}
    {0: 0.6931}
    """

    def fn(scores: Scores) -> Score:
        assert scores.generated_ids is not None
        said = scores.generated_ids.items()
        return mean({p: entropy(list(Counter(ids).values())) for p, ids in said if ids}, empty=NOTHING_SAID)

    return Metric(
        fn, frozenset({"generated"}), {}, "mean over greedy answers of the entropy of the answer's tokens, in nats"
    )
