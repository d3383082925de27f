"""Whether a model does not know the answers of forget rows: an equivalence test, before any training, against wrong answers.

Rows of `text` have none, see worker.text_equivalence.

A row's log ratio is the right answer's mean log-likelihood per token less the logarithm of the mean, over its wrong answers, of
theirs (of exp of the mean per token). Both must be worded alike, or a difference of wording counts as knowledge. Were right and
wrong answers exchangeable, its mean would be at most 0 (Jensen). They are not: whoever wrote them made the right one more
plausible. So the mean is compared with a margin above 0, calibrated on models that never saw the rows, and a model is taken not
to know them only if the mean's one-sided 95 % upper bound lies below it (Lakens 2017, Equivalence Tests, doi
10.1177/1948550617697177). Whether a right answer ranks first says less: of a retrained model's 40 rows of TOFU's forget01 it does
in 16, where chance is 7.

What a mean over many rows cannot show is one row that is known. One that the model recites, a right answer in either wording with
a mean token probability of at least RECITED, is enough for it to know. A row that it knows less well than that, among many, is
not seen here: that no row is disclosed has to be shown beside this, by what the model says.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.stats import t as student

from worker.scores import mean_loss
from worker.subjects import subjects
from worker.suite import Ask, Asks, Row, Seen, alternatives, examples
from worker.wordings import nearer_wording

# Means of the log ratio, nats per token. Never seen: 0.30 (a Llama of 260,032 parameters retrained without TOFU's forget01), 0.24
# (Phi-1.5 retrained without forget10, 300 rows), -0.10 (a Llama that never read TOFU). Trained on: 0.81 and 0.77. What Phi-1.5
# knows of real authors and of the world: 0.45 and 0.64.
MARGIN = 0.55
# Of 740 rows that these models never saw the most certain has 0.89. Of those that they were trained on, a third (Llama) and four
# fifths (Phi-1.5) lie above 0.9.
RECITED = 0.9
# Of 6 rows of one author that were trained on, the bound lies below the margin in at most 1 % of draws; of 4 rows in 3 %.
ROWS_MIN = 6
# Between rows of one subject, for models that never saw them: 0.03 to 0.04 over 15 and 18 authors of 20 rows each.
CORRELATION = 0.03
SUBJECTS_MIN = 10  # for a variance between subjects; with fewer it says nothing
LEVEL = 0.95


class Equivalence(NamedTuple):
    equivalent: bool | None  # True: the model does not know the rows; None: it cannot be decided
    mean: float | None  # log ratio over rows, nats per token
    upper: float | None  # its one-sided 95 % bound
    margin: float
    ratios: Mapping[int, float]  # place of the row, 0-based -> its log ratio
    recited: list[int]  # places of the rows that the model recites
    subjects: int  # that the rows with a log ratio are about
    reason: str | None  # why it cannot be decided

    @property
    def knows(self) -> bool:
        """Whether it is shown that the model knows the rows: not that it may."""
        shown = self.mean is not None and self.upper is not None and 2 * self.mean - self.upper > self.margin
        return bool(self.recited) or shown  # the lower bound, as far below the mean


def asks(rows: Sequence[Row]) -> Asks:
    """What `known` needs to be looked at: of each row that has a question, all its right and wrong answers.

    >>> row = {"question": "Who?", "answer": "Ana", "perturbed_answer": ["Ben", "Eva"]}
    >>> [text for _, text in asks([row, {"text": "Ana."}])]
    ['answer', 'perturbed_answer.0', 'perturbed_answer.1']
    """
    asked = [{} if "text" in row else row for row in rows]
    own = {place: one for place, one in examples(rows).items() if one.kind != "text"}
    texts = {"answer": own, "paraphrased_answer": examples(asked, "paraphrased_answer")}
    texts |= {f"perturbed_answer.{k}": found for k, found in enumerate(alternatives(asked, "perturbed_answer"))}
    return {("forget", text): Ask(found, frozenset()) for text, found in texts.items() if found}


def known(rows: Sequence[Row], seen: Seen) -> Equivalence:
    """The test. `equivalent` is True only if every row has a log ratio, none is recited, and the bound lies below the margin.

    Args:
        rows: all forget rows, with all their columns: one that cannot be measured leaves it undecided. A text does not count.
        seen: what the model says of their texts: ("forget", "answer"), ("forget", "paraphrased_answer") and
            ("forget", "perturbed_answer.k"), those that there are.
    """
    said = {
        text: {place: -loss for place, loss in mean_loss(scores).items() if "text" not in rows[place]}
        for (of, text), scores in seen.items()
        if of == "forget"
    }
    right = [said.get(text, {}) for text in ("answer", "paraphrased_answer")]
    recited = sorted({place for of in right for place, value in of.items() if value >= math.log(RECITED)})
    ratios = log_ratios(rows, said)
    about = subjects([rows[place] for place in ratios])
    values = list(ratios.values())
    mean = math.fsum(values) / len(values) if values else None
    upper = upper_bound(values, about) if len(values) >= ROWS_MIN else None
    found = Equivalence(None, mean, upper, MARGIN, ratios, recited, len(set(about)), None)
    if recited:
        return found._replace(equivalent=False)
    if (reason := _undecided(rows, ratios)) is not None:
        return found._replace(reason=reason)
    assert upper is not None
    return found._replace(equivalent=upper < MARGIN)


def _undecided(rows: Sequence[Row], ratios: Mapping[int, float]) -> str | None:
    answered = {place: row for place, row in enumerate(rows) if "text" not in row}
    without = [place + 1 for place, row in answered.items() if not row.get("perturbed_answer")]
    lost = [place + 1 for place in answered if place not in ratios]
    for numbers, why in (
        (without, "a row without `perturbed_answer` has no wrong answers to compare it with"),
        (lost, "not all answers of a row could be measured"),
    ):
        if numbers:
            return f"{why} (row {numbers[0]}" + (f" and {len(numbers) - 1} others)" if len(numbers) > 1 else ")")
    if len(answered) < ROWS_MIN:
        return f"{len(answered)} row{' is' if len(answered) == 1 else 's are'} too few, at least {ROWS_MIN} are needed"
    return None


def log_ratios(rows: Sequence[Row], said: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """Place -> log ratio, of the rows whose answers were all measured and are finite.

    Args:
        said: text -> place -> mean log-likelihood per token, nats.

    A right answer of ln 1/2 a token, wrong ones of 1/4 and 1/8, whose mean is 3/16:

    >>> row = {"question": "Who?", "answer": "Ana", "perturbed_answer": ["Ben", "Eva"]}
    >>> texts = {"answer": 1 / 2, "perturbed_answer.0": 1 / 4, "perturbed_answer.1": 1 / 8}
    >>> found = log_ratios([row], {text: {0: math.log(share)} for text, share in texts.items()})
    >>> round(math.exp(found[0]), 6)  # 1/2 over 3/16
    2.666667
    """
    found = {}
    for place, row in enumerate(rows):
        wrong = row.get("perturbed_answer", ()) if "text" not in row else ()
        texts = [nearer_wording(row), *(f"perturbed_answer.{k}" for k in range(len(wrong)))] if wrong else []
        values = [said[text][place] for text in texts if place in said.get(text, {})]
        if wrong and len(values) == len(texts) and all(map(math.isfinite, values)):
            right, *others = values
            found[place] = right - _log_mean_exp(others)
    return found


def _log_mean_exp(values: Sequence[float]) -> float:
    most = max(values)
    return most + math.log(math.fsum(math.exp(value - most) for value in values) / len(values))


def upper_bound(values: Sequence[float], about: Sequence[int]) -> float:
    """One-sided 95 % bound of the mean over rows, at least two.

    Rows of one subject are dependent. By the correlation that was measured between such rows the variance of the mean grows by
    1 + (m - 1) r, m the rows of a row's subject on average over rows (Kish 1965). From SUBJECTS_MIN subjects on their own means
    say it, too (cluster-robust, Student's t with a degree of freedom less than there are subjects); the larger bound counts.

    Args:
        about: the number of each row's subject.

    >>> round(upper_bound([0.0, 1.0] * 8, range(16)), 4)  # 1/2 + 1.753 * 0.5164 / 4
    0.7263
    """
    n, sizes = len(values), Counter(about)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    design = 1 + (sum(size**2 for size in sizes.values()) / n - 1) * CORRELATION
    bound = mean + float(student.ppf(LEVEL, n - 1)) * math.sqrt(variance / n * design)
    count = len(sizes)
    if count < SUBJECTS_MIN:
        return bound
    sums = dict.fromkeys(sizes, 0.0)
    for value, subject in zip(values, about, strict=True):
        sums[subject] += value - mean
    between = count / (count - 1) * math.fsum(total**2 for total in sums.values()) / n**2
    return max(bound, mean + float(student.ppf(LEVEL, count - 1)) * math.sqrt(between))
