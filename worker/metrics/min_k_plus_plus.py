"""Min-K% on log-probabilities in units of the model's own spread: minus the mean of the lowest. Min-K%++.

Each is (log p - mu) / sigma, with mu and sigma of log p over the vocabulary under the model's distribution at that token.

Reference: Zhang et al. 2024, arXiv 2404.02936; share and rounding of OpenUnlearning, arXiv 2506.12618.
"""

from worker.scores import Metric, Score, Scores, lowest_mean, mean

SHARE = 0.4  # of the tokens; at least one


def min_k_plus_plus() -> Metric:
    """Of three tokens 0.4 are one: the lowest is -3.

    >>> import torch
    >>> standardised = [torch.tensor([0.5, -3.0, 1.0])]
    >>> min_k_plus_plus().fn(Scores([0], torch.ones(1), torch.tensor([4]), standardised=standardised)).value
    3.0
    """

    def fn(scores: Scores) -> Score:
        assert scores.standardised is not None
        rows = zip(scores.places, scores.standardised, strict=True)
        return mean({p: -lowest_mean(v, SHARE) for p, v in rows if len(v)})

    return Metric(
        fn,
        frozenset({"standardised"}),
        {"forget": "higher", "retain": "lower"},
        "mean over rows of minus the mean of the lowest 40 % of the answer's standardised log-probabilities",
    )
