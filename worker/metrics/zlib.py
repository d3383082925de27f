"""Mean loss of an answer's tokens per byte of the answer, compressed: what is hard for everyone is no sign of a stranger.

Reference: Carlini et al. 2021, arXiv 2012.07805; as computed by OpenUnlearning, arXiv 2506.12618.
"""

from zlib import compress

from worker.scores import Metric, Score, Scores, mean, mean_loss


def zlib() -> Metric:
    """zlib takes 2 bytes of header, 4 of checksum and 3 for this one character: a mean loss of 4.5 over 9 bytes.

    >>> import torch
    >>> scores = Scores([0], torch.tensor([9.0]).double(), torch.tensor([2]), labels={0: "a"})
    >>> zlib().fn(scores).value
    0.5
    """

    def fn(scores: Scores) -> Score:
        assert scores.labels is not None
        return mean({p: value / len(compress(scores.labels[p].encode())) for p, value in mean_loss(scores).items()})

    return Metric(
        fn,
        frozenset({"labels"}),
        {"forget": "higher", "retain": "lower"},
        "mean over rows of the mean loss over the bytes of the zlib-compressed answer",
    )
