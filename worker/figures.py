"""What the suites' figures are made with: one reading of what was seen, and the means that it is reduced to.

A figure is a form and a function of the reading. What it lacks it says by raising Missing, which ends as the figure's reason,
and as that of every figure that is made of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

from worker.metrics.distinct_n import distinct_n
from worker.metrics.exact_memorization import exact_memorization
from worker.metrics.extraction_strength import extraction_strength
from worker.metrics.extraction_strength_corrected import extraction_strength_corrected
from worker.metrics.repetition import repetition
from worker.metrics.rouge_1_recall import rouge_1_recall
from worker.metrics.rouge_l_f1 import rouge_l_f1
from worker.metrics.rouge_l_recall import rouge_l_recall
from worker.metrics.token_entropy import token_entropy
from worker.scores import Metric, Score, Scores, mean, mean_loss
from worker.statistics import mean_interval
from worker.suite import Asks, FigureForm, Result, Seen, SetForm, Sets, Suite

RETRAINED = "needs a retrained reference: a model that never saw the forget set, or its stored figures"
TINY = 1e-10  # what the reference adds to a divisor
LOG_MAX = 700.0  # e^LOG_MAX is still a float
SAID = "said"  # a text that is only generated, of some of the rows
FIELDS = {"gradient_norm": ("gradient_norm_B",), "generated": ("generated", "generated_ids", "answers")}  # of Scores
GIBBERISH = {"token_entropy": token_entropy, "repetition": repetition, "distinct_n": distinct_n}
POOLED = ("distinct_n",)  # not a mean over rows
# What the reference's decoding takes away: spaces that some tokenisers leave before punctuation.
CLEANED = (
    *((f" {mark}", mark) for mark in (".", "?", "!", ",")),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)
ROUGES = {"rouge1_recall": rouge_1_recall, "rougeL_f1": rouge_l_f1, "rougeL_recall": rouge_l_recall}


class Missing(Exception):
    """Something that a figure needs is not there; the message is the figure's reason."""


class Reading:
    """What was seen of the sets, and the figures made of it so far, each of them once."""

    def __init__(
        self, figures: "Mapping[str, Figure]", sets: Sets, seen: Seen, retrained: Mapping[str, Result] | None
    ) -> None:
        self.sets = sets
        self._figures, self._seen, self._retrained = figures, seen, retrained
        self._found: dict[str, Result] = {}

    def __getitem__(self, name: str) -> Result:
        """A figure, without its value where that is missing."""
        if name not in self._found:
            try:
                found = self._figures[name].of(self)
            except Missing as missing:
                found = Result(None, reason=str(missing))
            if found.value is not None and not math.isfinite(found.value):
                found = Result(None, found.by_row, "the value was not finite", rows=found.rows, parts=found.parts)
            self._found[name] = found
        return self._found[name]

    def measured(self, name: str) -> Result:
        """A figure that has a value. Raises Missing, with the figure's own reason."""
        found = self[name]
        if found.value is None:
            raise Missing(found.reason)
        return found

    def value(self, name: str) -> float:
        """The same, the value alone."""
        found = self.measured(name).value
        assert found is not None
        return found

    def scores(self, of: str, text: str = "answer") -> Scores:
        """Raises Missing, naming the set or the column that is not there."""
        if (of, text) in self._seen:
            return self._seen[of, text]
        column = text.partition(".")[0]
        if not self.sets.get(of):
            raise Missing(f"needs the set {of}")
        if text == SAID:
            raise Missing("no row has a prompt that could be answered")
        if column != "answer" and not any(column in row for row in self.sets[of]):
            raise Missing(f"needs `{column}`")
        raise Missing("no row was looked at")

    def score(self, metric: Metric, of: str, text: str = "answer") -> Score:
        """What a metric says of a text. Raises Missing also where a view was not asked for."""
        scores = self.scores(of, text)
        for view in sorted(metric.needs):
            if any(getattr(scores, field) is None for field in FIELDS.get(view, (view,))):
                raise Missing(f"the view {view!r} of the set {of} was not asked for")
        return metric.fn(scores)

    def alternatives(self, of: str, column: str = "perturbed_answer") -> list[Scores]:
        """The scores of each alternative. Raises Missing."""
        first = [self.scores(of, f"{column}.0")]
        return first + [
            s for k in range(1, len(self._seen)) if (s := self._seen.get((of, f"{column}.{k}"))) is not None
        ]

    def retrained(self, name: str) -> Result:
        """A figure of the retrained reference that has a value. Raises Missing."""
        if self._retrained is None:
            raise Missing(RETRAINED)
        found = self._retrained.get(name)
        if found is None or found.value is None:
            raise Missing(f"the figures of the retrained reference have no {name}")
        return found

    def retrained_value(self, name: str) -> float:
        """The same, the value alone."""
        found = self.retrained(name).value
        assert found is not None
        return found


class Figure(NamedTuple):
    form: FigureForm
    of: Callable[[Reading], Result]  # raises Missing


def suite(sets: Mapping[str, SetForm], figures: Mapping[str, Figure], asks: Callable[[Sets], Asks]) -> Suite:
    """The suite whose results are these figures."""

    def results(given: Sets, seen: Seen, retrained: Mapping[str, Result] | None) -> dict[str, Result]:
        reading = Reading(figures, given, seen, retrained)
        return {name: reading[name] for name in figures}

    return Suite(sets, {name: figure.form for name, figure in figures.items()}, asks, results)


# --- of one set


def averaged(score: Score) -> Result:
    """A mean over rows, with its interval."""
    return pooled(score)._replace(interval=mean_interval(list(score.by_row.values())))


def pooled(score: Score) -> Result:
    """What is not a mean over rows."""
    by_row = {place: {"score": score.by_row[place]} for place in sorted(score.by_row)}
    return Result(score.value, by_row, score.reason, rows=len(by_row))


def over_rows(values: Mapping[int, float], rows: Mapping[int, Any] | None = None) -> Result:
    """The mean of values by place; `rows` is what is printed of each."""
    found = averaged(mean(dict(values)))
    return found if rows is None else found._replace(by_row=dict(sorted(rows.items())))


def with_zeros(score: Score, empty: Sequence[int]) -> Score:
    """With 0 for the rows without a token that counts, as the reference has them."""
    by_row = score.by_row | dict.fromkeys(empty, 0.0)
    return mean(by_row) if by_row else score


def probabilities(scores: Scores) -> Result:
    """Mean of exp(-mean loss)."""
    rows = {place: {"prob": math.exp(-value), "avg_loss": value} for place, value in mean_loss(scores).items()}
    return over_rows({place: row["prob"] for place, row in rows.items()}, rows)


def probabilities_of_several(several: Sequence[Scores]) -> Result:
    """Of alternatives: the mean over rows of the mean over a row's alternatives."""
    losses = by_place(several)
    rows = {p: {"prob": [math.exp(-value) for value in of], "avg_loss": of} for p, of in losses.items()}
    return over_rows({place: sum(row["prob"]) / len(row["prob"]) for place, row in rows.items()}, rows)


def by_place(several: Sequence[Scores]) -> dict[int, list[float]]:
    """Place -> the mean losses of a row's alternatives, in order."""
    losses: dict[int, list[float]] = {}
    for scores in several:
        for place, value in mean_loss(scores).items():
            losses.setdefault(place, []).append(value)
    return losses


def truth_ratios(correct: Scores, wrong: Sequence[Scores]) -> dict[int, float]:
    """Place -> exp(-mean loss of the wrong answers) / exp(-loss of the right one), rows with both alone, by their own place.

    As the reference: 1e-10 in the divisor makes a right answer of more than 20 nats per token look likelier than the wrong ones.
    """
    return {
        place: math.exp(-false) / (math.exp(-right) + TINY) for place, (right, false) in _both(correct, wrong).items()
    }


def exact_truth_ratios(correct: Scores, wrong: Sequence[Scores]) -> dict[int, float]:
    """The same of the losses' difference, which does not underflow."""
    return {place: math.exp(min(right - false, LOG_MAX)) for place, (right, false) in _both(correct, wrong).items()}


def _both(correct: Scores, wrong: Sequence[Scores]) -> dict[int, tuple[float, float]]:
    """Place -> loss of the right answer, mean loss of the wrong ones."""
    right, losses = mean_loss(correct), by_place(wrong)
    return {p: (right[p], sum(losses[p]) / len(losses[p])) for p in sorted(right.keys() & losses.keys())}


def closer_to_one(ratio: float) -> float:
    """Of rows that are forgotten: 1 where right and wrong answers are as likely."""
    return min(ratio, 1 / (ratio + TINY))


def true_better(ratio: float) -> float:
    """Of rows that are kept."""
    return max(0.0, 1 - ratio)


def truth_ratio(ratios: Mapping[int, float], of: Callable[[float], float]) -> Result:
    """The mean of a function of the ratios; the rows have the ratios themselves."""
    return over_rows({p: of(value) for p, value in ratios.items()}, {p: {"score": v} for p, v in ratios.items()})


def rouge(scores: Scores, which: str) -> Result:
    """Mean of one of the three values that a row has, `which` as the reference names it; unseen answers score 0 there."""
    said, answers = _cleaned(scores.generated), _cleaned(scores.answers)
    of_row = {
        name: metric().fn(scores._replace(generated=said, answers=answers)).by_row for name, metric in ROUGES.items()
    }
    prompts, rows = _cleaned(scores.prompts), dict[int, dict[str, Any]]()
    for place in sorted(said):
        rows[place] = {name: values.get(place, 0.0) for name, values in of_row.items()}
        rows[place] |= {"input": prompts[place]} if prompts else {}
        rows[place] |= {"ground_truth": answers[place].strip(), "generation": said[place]}
    return over_rows({place: row[which] for place, row in rows.items()}, rows)


def _cleaned(texts: Mapping[int, str] | None) -> dict[int, str]:
    """Texts as the reference decodes them."""
    return {
        place: reduce(lambda text, pair: text.replace(*pair), CLEANED, text) for place, text in (texts or {}).items()
    }


def memorization_figures(of: str, text: str, words: str) -> dict[str, Figure]:
    """How much of the answers a model says by itself, given what stands before; `words` names the answers."""

    def strength(reading: Reading) -> Result:
        return averaged(with_zeros(reading.score(extraction_strength(), of, text), reading.scores(of, text).empty))

    said = f"mean of 1 - the share of {words} that must be given first"
    return {
        "exact_memorization": Figure(
            FigureForm(f"mean share of the tokens of {words} that are predicted as the likeliest", "lower"),
            lambda reading: averaged(reading.score(exact_memorization(), of, text)),
        ),
        "extraction_strength": Figure(
            FigureForm(f"{said}; a row of m tokens scores 1/m at least, one without a token that counts 0", "lower"),
            strength,
        ),
        "extraction_strength_corrected": Figure(
            FigureForm(
                f"{said}; 0 where nothing is extracted, rows without a token left out", "lower", benchmark=False
            ),
            lambda reading: averaged(reading.score(extraction_strength_corrected(), of, text)),
        ),
        "unmeasured_rows": Figure(
            FigureForm(f"how many of {words} have no token that counts, merged into what is before", benchmark=False),
            lambda reading: Result(float(len(reading.scores(of, text).empty)), rows=len(reading.sets[of])),
        ),
    }


def gibberish_figures(prefix: str, of: str, text: str) -> dict[str, Figure]:
    """Whether greedy answers are language at all: a model that says nothing sensible scores well on forgetting."""

    def figure(name: str) -> Figure:
        metric = GIBBERISH[name]()
        taken = pooled if name in POOLED else averaged
        return Figure(
            FigureForm(metric.definition, benchmark=False), lambda reading: taken(reading.score(metric, of, text))
        )

    return {prefix + name: figure(name) for name in GIBBERISH}
