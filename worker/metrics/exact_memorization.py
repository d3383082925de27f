"""Share of the answer's tokens that the model would choose, given the true tokens before; end of sequence left out.

Reference: Tirumala et al. 2022, arXiv 2205.10770; as computed by OpenUnlearning, arXiv 2506.12618.
"""

from worker.scores import FORGOTTEN_LOWER, Metric, Score, Scores, mean


def exact_memorization() -> Metric:
    """Three of four tokens.

    >>> import torch
    >>> hits = [torch.tensor([True, False, True, True])]
    >>> exact_memorization().fn(Scores([0], torch.ones(1), torch.tensor([5]), hits)).value
    0.75
    """

    def fn(scores: Scores) -> Score:
        assert scores.hits is not None
        return mean({p: float(h.double().mean()) for p, h in zip(scores.places, scores.hits, strict=True) if len(h)})

    return Metric(
        fn,
        frozenset({"hits"}),
        FORGOTTEN_LOWER,
        "mean over rows of the share of answer tokens predicted as the likeliest",
    )
