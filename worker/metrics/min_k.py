"""Minus the mean log-probability of an answer's least likely tokens: a member has few that surprise. Min-K%.

Reference: Shi et al. 2023, arXiv 2310.16789; share and rounding of OpenUnlearning, arXiv 2506.12618.
"""

from worker.scores import Metric, Score, Scores, lowest_mean, mean

SHARE = 0.4  # of the tokens; at least one


def min_k() -> Metric:
    """Of five tokens 0.4 are two: the lowest are -4 and -2.

    >>> import torch
    >>> logp = [torch.tensor([-1.0, -4.0, 0.0, -2.0, -0.5])]
    >>> min_k().fn(Scores([0], torch.ones(1), torch.tensor([6]), logp=logp)).value
    3.0
    """

    def fn(scores: Scores) -> Score:
        assert scores.logp is not None
        return mean({p: -lowest_mean(v, SHARE) for p, v in zip(scores.places, scores.logp, strict=True) if len(v)})

    return Metric(
        fn,
        frozenset({"logp"}),
        {"forget": "higher", "retain": "lower"},
        "mean over rows of minus the mean log-probability of the least likely 40 % of the answer's tokens",
    )
