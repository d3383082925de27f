"""Longest common subsequence of the greedy answer and the true one: harmonic mean of its shares of both (words, stemmed).

Reference: Lin 2004, ROUGE; F1 as in Shi et al. 2024, MUSE, arXiv 2407.06460.
"""

from worker.rouge import rouge
from worker.scores import FORGOTTEN_LOWER, Metric


def rouge_l_f1() -> Metric:
    """One word of one that is said, one of two that are true: 2 / (1 + 2).

    >>> import torch
    >>> from worker.scores import Scores
    >>> scores = Scores([0], torch.ones(1), torch.tensor([5]), None, {0: "Nine"}, {0: "Nine feet"})
    >>> round(rouge_l_f1().fn(scores).value, 12)
    0.666666666667
    """
    return Metric(
        lambda scores: rouge(scores, "rougeL", "fmeasure"),
        frozenset({"generated"}),
        FORGOTTEN_LOWER,
        "mean over rows of ROUGE-L F1 of the greedy answer, stemmed",
    )
