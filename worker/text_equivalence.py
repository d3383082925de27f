"""Whether a model does not know forget rows of `text`: an equivalence test, before any training, against texts that it never saw.

A text has no wrong answers to be compared with. What it can be compared with is a holdout set: texts like it that were never
trained on. The statistic is that of membership inference, the AUC of the mean loss per token: how often the model finds a forget
text likelier than a holdout text. Without knowledge of either it is 1/2 if both sets are alike, whatever the model. It is taken
not to know the texts only if the whole 90 % interval of the AUC, which is two one-sided tests of 5 % (Schuirmann 1987), lies
within MARGIN of 1/2. An AUC below that shows that the sets are not alike, and a holdout set of easier texts would hide what the
model knows; so would one of longer texts, since a token is likelier after more of them.

What a mean over pairs cannot show is a few texts that are known. One that the model recites is enough for it to know; and so are
more texts likelier than every holdout text than chance explains, which is what membership inference is worth where it must not
err (Carlini et al. 2022, arXiv 2112.03570). One text among many that it knows less well than that is not seen here: that no text
is disclosed has to be shown beside this, by what the model says.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from worker.equivalence import LEVEL, RECITED
from worker.scores import Scores, mean_loss
from worker.statistics import auc, auc_bounds
from worker.suite import Ask, Asks, Row, Seen, example

# Of 200 ways to part 100 passages of a book that they never read into 50 and 50, two Llamas of 260,032 parameters are found not
# to know the first in 129 to 135, and taken to know some of it, by the likeliest texts, in 1 to 5. After they have read the first
# half once, the AUC is 0.75 (0.39 before), after twice 0.83.
MARGIN = 0.15
TEXTS_MIN = 6  # of each set, as of rows with answers


class TextEquivalence(NamedTuple):
    equivalent: bool | None  # True: the model does not know the texts; None: it cannot be decided
    auc: float | None  # how often a forget text is likelier than a holdout text
    upper: float | None  # its one-sided 95 % bound
    threshold: float  # that `upper` must lie below
    texts: int
    holdout_texts: int
    recited: list[int]  # places of the rows that the model recites
    likeliest: int  # texts that are likelier than every holdout text
    reason: str | None  # why it cannot be decided


def asks(rows: Sequence[Row], holdout: Sequence[Row]) -> Asks:
    """What `known` needs to be looked at: the texts of both sets.

    >>> asks([{"question": "Who?", "answer": "Ana"}, {"text": "Ana."}], [{"text": "Ben."}]).keys()
    dict_keys([('forget', 'answer'), ('holdout', 'answer')])
    """
    sides = {"forget": rows, "holdout": holdout}
    texts = {of: {place: example(row) for place, row in enumerate(side) if "text" in row} for of, side in sides.items()}
    return {(of, "answer"): Ask(found, frozenset()) for of, found in texts.items() if found}


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
    likeliest = sum(loss < min(other) for loss in own) if other else 0
    found = TextEquivalence(None, None, None, 0.5 + MARGIN, len(own), len(other), recited, likeliest, None)
    if recited:
        return found._replace(equivalent=False)
    if (reason := _too_few(rows, holdout, len(own), len(other))) is not None:
        return found._replace(reason=reason)
    value = auc(own, other)
    lower, upper = auc_bounds(value, len(own), len(other), LEVEL)
    found = found._replace(auc=value, upper=upper)
    if by_chance(likeliest, len(own), len(other)) <= 1 - LEVEL:
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
    if min(texts, holdout_texts) < TEXTS_MIN:
        return f"{texts:,} and {holdout_texts:,} holdout texts are too few, at least {TEXTS_MIN} of each are needed"
    return None


def by_chance(count: int, n: int, m: int) -> float:
    """How likely at least that many of n texts are likelier than all m others, if all n + m are alike.

    >>> by_chance(2, 3, 2)  # of the 10 ways to order 3 and 2, in 3 the first two are of the 3
    0.3
    """
    return math.comb(n, count) / math.comb(n + m, count)
