"""Longest common subsequence of the greedy answer and the true one, as a share of the true one's words (stemmed).

Reference: Lin 2004, ROUGE; recall as in Maini et al. 2024, TOFU, arXiv 2401.06121.
"""

from worker.rouge import rouge
from worker.scores import FORGOTTEN_LOWER, Metric


def rouge_l_recall() -> Metric:
    """Three of the four words of the true answer, in order.

    >>> import torch
    >>> from worker.scores import Scores
    >>> scores = Scores([0], torch.ones(1), torch.tensor([5]), None, {0: "She was in Lima"}, {0: "born was in Lima"})
    >>> rouge_l_recall().fn(scores).value
    0.75
    >>> rouge_l_recall().fn(scores._replace(answers={0: "\u041b\u0438\u043c\u0430"})).value is None
    True
    """
    return Metric(
        lambda scores: rouge(scores, "rougeL", "recall"),
        frozenset({"generated"}),
        FORGOTTEN_LOWER,
        "mean over rows of ROUGE-L recall of the greedy answer, stemmed",
    )
