"""Longest common subsequence of the greedy answer and the true one, as a share of the true one's words (stemmed).

Reference: Lin 2004, ROUGE; recall as in Maini et al. 2024, TOFU, arXiv 2401.06121.
"""

import re

from rouge_score import rouge_scorer

from worker.scores import FORGOTTEN_LOWER, Metric, Score, Scores, mean

WORD = re.compile("[a-z0-9]")  # all that the reference implementation sees; any other answer would score a silent 0


def rouge_l_recall() -> Metric:
    """Three of the four words of the true answer, in order.

    >>> import torch
    >>> scores = Scores([0], torch.ones(1), torch.tensor([5]), None, {0: "She was in Lima"}, {0: "born was in Lima"})
    >>> rouge_l_recall().fn(scores).value
    0.75
    >>> rouge_l_recall().fn(scores._replace(answers={0: "\u041b\u0438\u043c\u0430"})).value is None
    True
    """
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)

    def fn(scores: Scores) -> Score:
        assert scores.generated is not None
        assert scores.answers is not None
        by_row = {
            p: float(scorer.score(scores.answers[p].strip(), text.strip())["rougeL"].recall)
            for p, text in scores.generated.items()
            if WORD.search(scores.answers[p].lower())
        }
        why = "no answer has a word in Latin letters or digits, and the reference counts no others"
        return mean(by_row, empty=why if scores.generated else "no row has a prompt that could be answered")

    return Metric(
        fn, frozenset({"generated"}), FORGOTTEN_LOWER, "mean over rows of ROUGE-L recall of the greedy answer, stemmed"
    )
