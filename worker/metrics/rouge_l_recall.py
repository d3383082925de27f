"""Longest common subsequence of the greedy answer and the true one, as a share of the true one's words (stemmed).

Reference: Lin 2004, ROUGE; recall as in Maini et al. 2024, TOFU, arXiv 2401.06121.
"""

from rouge_score import rouge_scorer

from worker.scores import FORGOTTEN_LOWER, Metric, Score, Scores, mean


def rouge_l_recall() -> Metric:
    """Three of the four words of the true answer, in order.

    >>> import torch
    >>> scores = Scores([0], torch.ones(1), torch.tensor([5]), None, {0: "She was in Lima"}, {0: "born was in Lima"})
    >>> rouge_l_recall().fn(scores).value
    0.75
    """
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)

    def fn(scores: Scores) -> Score:
        assert scores.generated is not None
        assert scores.answers is not None
        by_row = {
            p: float(scorer.score(scores.answers[p].strip(), text.strip())["rougeL"].recall)
            for p, text in scores.generated.items()
        }
        return mean(by_row, empty="no row has a prompt that could be answered")

    return Metric(
        fn, frozenset({"generated"}), FORGOTTEN_LOWER, "mean over rows of ROUGE-L recall of the greedy answer, stemmed"
    )
