"""Whether a model does not know forget rows of `text`: an equivalence test, before any training, against a holdout set.

A text has no wrong answers to be compared with. What it can be compared with is a holdout set: texts like it that, by the
request, were never trained on. The statistic is that of membership inference, the AUC of the mean loss per token: how often the
model finds a forget text likelier than a holdout text. Without knowledge of either it is 1/2 if both sets are alike, whatever
the model. It is taken not to know the texts only if the whole 90 % interval of the AUC, which is two one-sided tests of 5 %
(Schuirmann 1987), lies within MARGIN of 1/2. An AUC below that shows that the sets are not alike, and a holdout set of easier
texts would hide what the model knows; so would one of longer texts, since a token is likelier after more of them.

What a mean over pairs cannot show is some texts that are known. One that the model recites is enough for it to know; and so are
more forget texts among the likeliest of both sets than chance explains, which is what membership inference is worth where it
must not err (Carlini et al. 2022, arXiv 2112.03570). A few texts among many that it knows less well than that are not seen
here: that no text is disclosed has to be shown beside this, by what the model says.

The interval and the shares take texts as independent. Passages of few documents are not: with 200 of 5 documents on each side,
whose losses correlate by 1/2, a true AUC of 0.75 is taken for none in 9 % of draws. A holdout set that was trained on shows
nothing but that the model recites one of its texts.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from scipy.stats import hypergeom

from worker.equivalence import LEVEL, RECITED
from worker.scores import Scores, mean_loss
from worker.statistics import auc, auc_bounds
from worker.suite import Row, Seen

# Of 200 ways to part 100 passages of a book that they never read into 50 and 50, two Llamas of 260,032 parameters are found
# not to know the first in about two thirds. After they have read the first half once, every weight trained, the AUC is 0.75
# (0.39 before), after twice 0.83; of SmolLM2-135M 0.72 (0.47 before). What a large model read once in pretraining is often
# below the margin.
MARGIN = 0.15
TEXTS_MIN = 20  # of each set: of fewer no interval is so narrow
HOLDOUT_SHARE = 0.5  # at least so many holdout texts for each text, or the likeliest show little
LIKELIEST = (0.02, 0.05, 0.1, 0.2)  # shares of both sets


class TextEquivalence(NamedTuple):
    equivalent: bool | None  # True: the model does not know the texts; None: it cannot be decided
    auc: float | None  # how often a forget text is likelier than a holdout text
    upper: float | None  # its one-sided 95 % bound
    threshold: float  # that `upper` must lie below
    texts: int
    holdout_texts: int
    recited: list[int]  # places of the rows that the model recites
    likeliest: int  # forget texts among as many of both sets that are likeliest, where they are most conspicuous
    likeliest_of: int
    reason: str | None  # why it cannot be decided


def known(rows: Sequence[Row], holdout: Sequence[Row], seen: Seen) -> TextEquivalence:
    """The test.

    Args:
        rows, holdout: all rows of both sets, with all their columns; those that are no texts do not count.
        seen: what the model says of them: ("forget", "answer") and ("holdout", "answer").
    """
    forget_loss, forget_tokens = _texts(rows, seen.get(("forget", "answer")))
    holdout_loss, holdout_tokens = _texts(holdout, seen.get(("holdout", "answer")))
    recited = sorted(place for place, loss in forget_loss.items() if -loss >= math.log(RECITED))
    own, other = list(forget_loss.values()), list(holdout_loss.values())
    found = TextEquivalence(None, None, None, 0.5 + MARGIN, len(own), len(other), recited, 0, 0, None)
    if recited:
        return found._replace(equivalent=False)
    if (reason := _too_few(rows, holdout, len(own), len(other))) is not None:
        return found._replace(reason=reason)
    value = auc(own, other)
    lower, upper = auc_bounds(value, len(own), len(other), LEVEL)
    found = found._replace(auc=value, upper=upper)
    seen_holdout = [place + 1 for place, loss in holdout_loss.items() if -loss >= math.log(RECITED)]
    if seen_holdout:
        return found._replace(reason=f"the model recites row {seen_holdout[0]} of the holdout set, so it has seen it")
    p_value, likeliest, likeliest_of = among_likeliest(own, other)
    found = found._replace(likeliest=likeliest, likeliest_of=likeliest_of)
    if p_value <= 1 - LEVEL:
        return found._replace(equivalent=False)
    lengths = auc(forget_tokens, holdout_tokens)
    if abs(lengths - 0.5) > MARGIN:
        middle = median(forget_tokens), median(holdout_tokens)
        words = "the forget texts have a median of {:,.0f} tokens, the holdout texts of {:,.0f}: they must be as long"
        return found._replace(reason=words.format(*middle))
    if upper < 0.5 + MARGIN and lower <= 0.5 - MARGIN:
        return found._replace(
            reason="the model finds the holdout texts likelier, so they may not be like the forget texts"
        )
    return found._replace(equivalent=upper < 0.5 + MARGIN)


def _texts(rows: Sequence[Row], scores: Scores | None) -> tuple[dict[int, float], list[int]]:
    """Place -> loss of the texts that were measured and whose loss is finite; and how many tokens of each count."""
    if scores is None:
        return {}, []
    tokens = dict(zip(scores.places, scores.counted_B.tolist(), strict=True))
    losses = {
        place: loss
        for place, loss in mean_loss(scores).items()
        if "text" in rows[place] and tokens[place] and math.isfinite(loss)
    }
    return losses, [tokens[place] for place in losses]


def _too_few(rows: Sequence[Row], holdout: Sequence[Row], measured: int, measured_holdout: int) -> str | None:
    texts, holdout_texts = (sum("text" in row for row in side) for side in (rows, holdout))
    if not holdout_texts:
        return "a row of `text` has no wrong answers to compare it with, and there is no holdout set of texts"
    if measured < texts or measured_holdout < holdout_texts:
        return "not all texts could be measured"
    distinct, distinct_holdout = (len({row["text"] for row in side if "text" in row}) for side in (rows, holdout))
    if distinct < texts or distinct_holdout < holdout_texts:
        return "a text that a set has twice is no second text"
    if min(texts, holdout_texts) < TEXTS_MIN:
        return f"{texts:,} and {holdout_texts:,} holdout texts are too few, at least {TEXTS_MIN} of each are needed"
    if holdout_texts < HOLDOUT_SHARE * texts:
        return f"{holdout_texts:,} holdout texts are too few beside {texts:,}, at least half as many are needed"
    return None


def among_likeliest(own: Sequence[float], other: Sequence[float]) -> tuple[float, int, int]:
    """Of the likeliest of both sets, by loss, how many are own: the p-value of so many if all are alike, how many, of how many.

    Of several shares that are looked at, for which the p-value is corrected (Bonferroni), the one where it is least.

    >>> p_value, count, of = among_likeliest([1.0] * 5 + [3.0] * 45, [2.0] * 50)
    >>> round(p_value, 3), count, of  # of the 5 likeliest of 100 all 5 are own
    (0.113, 5, 5)
    """
    pooled = sorted([(loss, False) for loss in own] + [(loss, True) for loss in other])  # of a tie, the own is first
    found = []
    for share in LIKELIEST:
        of = math.ceil(share * len(pooled))
        count = sum(not others for _, others in pooled[:of])
        found.append((float(hypergeom.sf(count - 1, len(pooled), len(own), of)), count, of))
    p_value, count, of = min(found)
    return min(1.0, p_value * len(found)), count, of
