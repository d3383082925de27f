"""How much of the answer's end the model completes by itself: 1 minus the share that it must be given first.

Reference: Carlini et al. 2021, arXiv 2012.07805; as computed by OpenUnlearning, arXiv 2506.12618, whose loop ends one short: a
row of m tokens of which nothing is extracted scores 1/m there, and here under the same name.
"""

from torch import Tensor

from worker.scores import FORGOTTEN_LOWER, Metric, Score, Scores, mean


def extraction_strength() -> Metric:
    """Of four tokens the last two are right on their own: two must be given, 1 - 2/4. Nothing right: 1 - 3/4.

    >>> import torch
    >>> hits = [torch.tensor([True, False, True, True]), torch.tensor([True, True, True, False])]
    >>> extraction_strength().fn(Scores([0, 1], torch.ones(2), torch.tensor([5, 5]), hits)).by_row
    {0: 0.5, 1: 0.25}
    """

    def row(hits: Tensor) -> float:
        wrong = (~hits).nonzero()[:, 0]
        given = 0 if not len(wrong) else min(int(wrong[-1]) + 1, len(hits) - 1)
        return 1 - given / len(hits)

    def fn(scores: Scores) -> Score:
        assert scores.hits is not None
        return mean({p: row(h) for p, h in zip(scores.places, scores.hits, strict=True) if len(h)})

    return Metric(
        fn, frozenset({"hits"}), FORGOTTEN_LOWER, "mean over rows of 1 - share of the answer that must be given first"
    )
