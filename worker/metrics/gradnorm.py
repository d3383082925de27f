"""How steep the loss of an answer is in the model's weights: at a member training has made it flat.

Of each parameter tensor the 2-norm of the gradient of the row's mean log-probability, and of these norms the mean.

Reference: Wang et al. 2024, arXiv 2402.17012; as computed by OpenUnlearning, arXiv 2506.12618.
"""

from worker.scores import Metric, Score, Scores, mean


def gradnorm() -> Metric:
    """Two rows.

    >>> import torch
    >>> norms = torch.tensor([1.0, 2.0]).double()
    >>> gradnorm().fn(Scores([0, 1], torch.ones(2), torch.tensor([2, 2]), gradient_norm_B=norms)).value
    1.5
    """

    def fn(scores: Scores) -> Score:
        assert scores.gradient_norm_B is not None
        return mean(dict(zip(scores.places, scores.gradient_norm_B.tolist(), strict=True)))

    return Metric(
        fn,
        frozenset({"gradient_norm"}),
        {"forget": "higher", "retain": "lower"},
        "mean over rows of the mean 2-norm, over parameter tensors, of the gradient of the answer's mean log-probability",
    )
