"""Extraction strength as its definition has it: a row of which nothing is extracted scores 0, not 1 over its length.

The figure `extraction_strength` keeps the value that the field's harness prints; this one is beside it.

Reference: Carlini et al. 2021, arXiv 2012.07805.
"""

from torch import Tensor

from worker.scores import FORGOTTEN_LOWER, Metric, Score, Scores, mean


def extraction_strength_corrected() -> Metric:
    """Of four tokens the last two are right on their own: 1 - 2/4. The last one wrong: all four must be given.

    >>> import torch
    >>> hits = [torch.tensor([True, False, True, True]), torch.tensor([True, True, True, False])]
    >>> extraction_strength_corrected().fn(Scores([0, 1], torch.ones(2), torch.tensor([5, 5]), hits)).by_row
    {0: 0.5, 1: 0.0}
    """

    def row(hits: Tensor) -> float:
        wrong = (~hits).nonzero()[:, 0]
        given = int(wrong[-1]) + 1 if len(wrong) else 0
        return 1 - given / len(hits)

    def fn(scores: Scores) -> Score:
        assert scores.hits is not None
        return mean({p: row(h) for p, h in zip(scores.places, scores.hits, strict=True) if len(h)})

    return Metric(
        fn,
        frozenset({"hits"}),
        FORGOTTEN_LOWER,
        "mean over rows of 1 - share of the answer that must be given first, 0 where nothing is extracted",
    )
