"""Negative log-likelihood per counted token, in nats: the token mean over the whole set, which a request's bound is about.

Reference: the retain loss of Entesari et al. 2025, arXiv 2506.05314.
"""

from worker.scores import Metric, Score, Scores, mean_loss


def nll() -> Metric:
    """Rows of 1 and 3 tokens with losses 1 and 5: 6 nats over 4 tokens. (The mean of the rows' means would be 4/3.)

    >>> import torch
    >>> nll().fn(Scores([0, 1], torch.tensor([1.0, 5.0]).double(), torch.tensor([1, 3]))).value
    1.5
    """

    def fn(scores: Scores) -> Score:
        if not scores.places:
            return Score(None, {}, "no row could be measured")
        return Score(float(scores.nll_B.sum() / scores.counted_B.sum()), mean_loss(scores))

    return Metric(
        fn,
        frozenset(),
        {"forget": "higher", "retain": "lower"},
        "mean loss over all counted tokens of the set, in nats",
    )
