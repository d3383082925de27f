"""Mean loss of an answer's tokens, end of sequence included: a member of the training data has a low one.

Reference: Yeom et al. 2018, arXiv 1709.01604; as computed by OpenUnlearning, arXiv 2506.12618.
"""

from worker.scores import Metric, Score, Scores, mean, mean_loss


def loss() -> Metric:
    """Rows of 1 and 3 tokens with losses 1 and 6: (1/1 + 6/3) / 2. (The mean over tokens, the figure `nll`, would be 7/4.)

    >>> import torch
    >>> loss().fn(Scores([0, 1], torch.tensor([1.0, 6.0]).double(), torch.tensor([1, 3]))).value
    1.5
    """

    def fn(scores: Scores) -> Score:
        return mean(mean_loss(scores))

    return Metric(
        fn,
        frozenset(),
        {"forget": "higher", "retain": "lower"},
        "mean over rows of the mean loss of the answer's tokens, in nats",
    )
