"""Words of the true answer that are in the greedy one, in whatever order, as a share of the true one's (stemmed).

Reference: Lin 2004, ROUGE.
"""

from worker.rouge import rouge
from worker.scores import FORGOTTEN_LOWER, Metric


def rouge_1_recall() -> Metric:
    """Three of the four words of the true answer, in another order.

    >>> import torch
    >>> from worker.scores import Scores
    >>> scores = Scores([0], torch.ones(1), torch.tensor([5]), None, {0: "in Lima she was"}, {0: "born was in Lima"})
    >>> rouge_1_recall().fn(scores).value
    0.75
    """
    return Metric(
        lambda scores: rouge(scores, "rouge1", "recall"),
        frozenset({"generated"}),
        FORGOTTEN_LOWER,
        "mean over rows of ROUGE-1 recall of the greedy answer, stemmed",
    )
