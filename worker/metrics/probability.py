"""Length-normalised probability of the answer: exp of minus the mean loss of its tokens, end of sequence included.

Reference: Maini et al. 2024, TOFU, arXiv 2401.06121.
"""

import math

from worker.scores import FORGOTTEN_LOWER, Metric, Score, Scores, mean, mean_loss


def probability() -> Metric:
    """Two tokens of loss 2 ln 2 in all have a mean loss of ln 2, so a probability of one half.

    >>> import math, torch
    >>> scores = Scores([7], torch.tensor([2 * math.log(2)], dtype=torch.float64), torch.tensor([2]))
    >>> round(probability().fn(scores).by_row[7], 12)
    0.5
    """

    def fn(scores: Scores) -> Score:
        return mean({place: math.exp(-loss) for place, loss in mean_loss(scores).items()})

    return Metric(fn, frozenset(), FORGOTTEN_LOWER, "mean over rows of exp(-mean loss of the answer's tokens)")
