"""What a deletion request's own rows allow to measure; the rest is named, with what it would need.

Figures are called SET/METRIC. Of each set at most 100 rows are answered greedily, since that costs a pass per token.

Reference: the definitions of TOFU, arXiv 2401.06121, and of OpenUnlearning, arXiv 2506.12618, with what is mended in them.
"""

from collections.abc import Callable, Mapping
from functools import partial

from service.domain.rows import Example
from worker import figures, membership
from worker.figures import Figure, Missing, Reading
from worker.metrics.exact_memorization import exact_memorization
from worker.metrics.extraction_strength import extraction_strength
from worker.metrics.extraction_strength_corrected import extraction_strength_corrected
from worker.metrics.nll import nll
from worker.metrics.probability import probability
from worker.metrics.rouge_l_recall import rouge_l_recall
from worker.metrics.rouge_l_recall_unicode import rouge_l_recall_unicode
from worker.scores import Metric
from worker.statistics import interval
from worker.suite import Ask, Asks, FigureForm, Result, SetForm, Sets, Suite, alternatives, examples

ALTERNATIVES = frozenset({"paraphrased_answer", "perturbed_answer"})
SETS = {
    "forget": SetForm(
        "what is to be forgotten: question and answer, prompt and completion, or text",
        frozenset(),
        ALTERNATIVES | {"paraphrased_question"},
    ),
    "retain": SetForm("what must keep working, in the same forms", frozenset(), ALTERNATIVES),
    "holdout": SetForm("rows like the forget set's that were never trained on", frozenset(), required=False),
}
METRICS: Mapping[str, Callable[[], Metric]] = {
    "probability": probability,
    "exact_memorization": exact_memorization,
    "extraction_strength": extraction_strength,
    "extraction_strength_corrected": extraction_strength_corrected,
}
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")  # the gradient of every row costs more than it says
GENERATED_ROWS_MAX = 100
MAX_NEW_TOKENS = 200  # as TOFU


def request() -> Suite:
    """Rows without alternatives have no truth ratio.

    >>> rows = [{"question": "Who?", "answer": "Ana"}]
    >>> request().results({"forget": rows, "retain": rows}, {}, None)["forget/truth_ratio"].reason
    'needs `paraphrased_answer`'
    """
    return figures.suite(SETS, _figures(), _asks)


def _asks(sets: Sets) -> Asks:
    asked = {}
    for of, rows in sets.items():
        own = examples(rows)
        if not own:
            continue
        views = {"forget": membership.VIEWS if sets.get("holdout") else frozenset[str](), "holdout": membership.VIEWS}
        hits = frozenset[str]() if of == "holdout" else frozenset({"hits"})
        asked[of, "answer"] = Ask(own, hits | views.get(of, frozenset()))
        if of == "holdout":
            continue
        if answered := _answered(own):
            asked[of, figures.SAID] = Ask(answered, frozenset({"generated"}), MAX_NEW_TOKENS, scored=False)
        both = [row if row.keys() >= ALTERNATIVES and "text" not in row else {} for row in rows]
        wrong = [row if "text" not in row else {} for row in rows] if of == "forget" else both  # see worker.equivalence
        texts = {"paraphrased_answer": examples(both, "paraphrased_answer")}
        texts |= {f"perturbed_answer.{k}": found for k, found in enumerate(alternatives(wrong, "perturbed_answer"))}
        asked |= {(of, text): Ask(found, frozenset()) for text, found in texts.items() if found}
    return asked


def _answered(rows: Mapping[int, Example]) -> dict[int, Example]:
    """At most 100 rows, evenly spaced. A text has no prompt to answer."""
    askable = [place for place, row in rows.items() if row.kind != "text"]
    count = min(len(askable), GENERATED_ROWS_MAX)
    chosen = [askable[k * len(askable) // count] for k in range(count)]
    return {place: rows[place] for place in chosen}


def _figures() -> dict[str, Figure]:
    found = {}
    for of in ("forget", "retain"):
        for name, metric in METRICS.items():
            found[f"{of}/{name}"] = _figure(of, metric())
        found[f"{of}/rouge_l_recall"] = _figure(of, rouge_l_recall(), figures.SAID)
        found[f"{of}/rouge_l_recall_unicode"] = _figure(of, rouge_l_recall_unicode(), figures.SAID)
        form = FigureForm(nll().definition, nll().better[of], benchmark=False)
        found[f"{of}/nll"] = Figure(form, partial(_nll, of=of))
        found[f"{of}/truth_ratio"] = _truth_ratio(of)
        if of == "forget":
            found["forget/wrong_probability"] = _wrong_probability()
        found |= figures.gibberish_figures(f"{of}/", of, figures.SAID)
    found |= membership.corrected_membership_figures("forget/", ATTACKS)
    leaks = membership.leak_figures("forget/")
    found |= {name: leak for name, leak in leaks.items() if not leak.form.retrained}
    return {name: figure._replace(of=partial(_plain, figure.of)) for name, figure in found.items()}


def _wrong_probability() -> Figure:
    form = FigureForm(
        "mean over rows of the mean probability of `perturbed_answer`, length-normalised", benchmark=False
    )

    def result(reading: Reading) -> Result:
        found = figures.probabilities_of_several(reading.alternatives("forget"))
        return found._replace(by_row={place: {"score": row["prob"]} for place, row in found.by_row.items()})

    return Figure(form, result)


def _plain(of: Callable[[Reading], Result], reading: Reading) -> Result:
    """With numbers for rows: there is no reference that prints them otherwise."""
    found = of(reading)
    return found._replace(by_row={place: row["score"] for place, row in found.by_row.items()})


def _figure(of: str, metric: Metric, text: str = "answer") -> Figure:
    form = FigureForm(metric.definition, metric.better[of], benchmark=False)
    return Figure(form, lambda reading: figures.averaged(reading.score(metric, of, text)))


def _nll(reading: Reading, of: str) -> Result:
    """A mean over tokens, so its interval is one of a ratio of two means over rows."""
    scores = reading.scores(of)
    drawn = interval(
        [list(zip(scores.nll_B.tolist(), scores.counted_B.tolist(), strict=True))], lambda mean_K: mean_K[0] / mean_K[1]
    )
    return figures.pooled(nll().fn(scores))._replace(interval=drawn)


def _truth_ratio(of: str) -> Figure:
    ratio = "r = the probability of `perturbed_answer` over that of `paraphrased_answer`, length-normalised"
    said, each = ("min(r, 1/r)", figures.closer_to_one) if of == "forget" else ("max(0, 1 - r)", figures.true_better)

    def result(reading: Reading) -> Result:
        rows = reading.sets.get(of, ())
        for column in sorted(ALTERNATIVES):
            if rows and not any(column in row for row in rows):
                raise Missing(f"needs `{column}`")
        ratios = figures.exact_truth_ratios(reading.scores(of, "paraphrased_answer"), reading.alternatives(of))
        return figures.truth_ratio(ratios, each)

    return Figure(FigureForm(f"mean over rows of {said}, {ratio}", "higher", benchmark=False), result)
