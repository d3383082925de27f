"""TOFU: has a model forgotten fictitious authors, and does it still know the others, real ones, and the world?

Figures have the names that OpenUnlearning's evaluator prints, and its values, number for number; ours beside them say so.
Where the reference joins the truth ratios of rows that could be measured to the first row numbers, ours have the rows' own.

Reference: Maini et al. 2024, TOFU, arXiv 2401.06121; as computed by OpenUnlearning, arXiv 2506.12618.
"""

import math
from collections.abc import Callable, Mapping

from worker import figures, membership
from worker.figures import Figure, Missing, Reading
from worker.statistics import harmonic_mean, interval, kolmogorov_smirnov
from worker.suite import Ask, Asks, Better, Convention, FigureForm, Result, SetForm, Sets, Suite, alternatives, examples

QUESTION = frozenset({"question", "answer"})
WRONG = QUESTION | {"perturbed_answer"}
SETS = {
    "forget": SetForm("what is to be forgotten: forgetNN_perturbed", WRONG | {"paraphrased_answer"}),
    "retain": SetForm("what is to be kept: retain_perturbed", WRONG | {"paraphrased_answer"}),
    "real_authors": SetForm("questions on real authors: real_authors_perturbed", WRONG),
    "world_facts": SetForm("questions on the world: world_facts_perturbed", WRONG),
    "holdout": SetForm("like the forget set, and never trained on: holdoutNN", QUESTION, required=False),
}
KEPT = {"retain": "retain", "ra": "real_authors", "wf": "world_facts"}  # the utility's parts, by their figures' names
ANSWERED = frozenset({"generated"})
MEMBERSHIP = membership.VIEWS | membership.GRADIENT
MAX_NEW_TOKENS = 200
EXACT = "; without the benchmark's 1e-10 in the divisor, by which an answer of more than 20 nats per token looks true"


def tofu() -> Suite:
    """A right answer of probability 1/2 (ln 2 nats a token) and wrong ones of 1/4: a ratio of 1/2.

    >>> import torch
    >>> from worker.scores import Scores
    >>> row = {"question": "Who?", "answer": "Ana", "paraphrased_answer": "It is Ana", "perturbed_answer": ["Ben"]}
    >>> texts = {"paraphrased_answer": math.log(2), "perturbed_answer.0": math.log(4)}
    >>> seen = {("forget", text): Scores([0], torch.tensor([loss]), torch.tensor([1])) for text, loss in texts.items()}
    >>> results = tofu().results({"forget": [row]}, seen, None)
    >>> round(results["forget_truth_ratio"].value, 4), results["model_utility"].reason
    (0.5, 'needs the set retain')
    """
    return figures.suite(SETS, _figures(), _asks)


def _asks(sets: Sets) -> Asks:
    views = {"forget": ANSWERED | {"hits"} | (MEMBERSHIP if sets.get("holdout") else frozenset())}
    views |= {"holdout": MEMBERSHIP}
    asked = {}
    for of, rows in sets.items():
        texts = {"answer": examples(rows)}
        if of in ("forget", "retain"):
            texts["paraphrased_answer"] = examples(rows, "paraphrased_answer")
        if of != "holdout":
            texts |= {f"perturbed_answer.{k}": found for k, found in enumerate(alternatives(rows, "perturbed_answer"))}
        for text, found in texts.items():
            wanted = views.get(of, ANSWERED) if text == "answer" else frozenset[str]()
            if found:
                asked[of, text] = Ask(found, wanted, MAX_NEW_TOKENS, convention=Convention())
    return asked


def _figures() -> dict[str, Figure]:
    found = _on_forgetting()
    for short, of in KEPT.items():
        found |= _on_keeping(short, of)
    found["model_utility"] = Figure(
        FigureForm(
            "harmonic mean of nine: probability, ROUGE and truth ratio on retain, real authors and world facts; 0 if one is",
            "higher",
        ),
        _utility,
    )
    found |= membership.membership_figures() | membership.leak_figures()
    return found | figures.gibberish_figures("forget_", "forget", "answer")


def _on_forgetting() -> dict[str, Figure]:
    return {
        "forget_Q_A_Prob": _prob("forget", "answer", "lower"),
        "forget_Q_A_PARA_Prob": _prob("forget", "paraphrased_answer", "lower"),
        "forget_Q_A_PERT_Prob": _several("forget"),
        "forget_Q_A_ROUGE": _rouge("forget", "lower"),
        "forget_truth_ratio": Figure(
            FigureForm(
                "mean of min(r, 1/r), r = wrong answers' probability over the paraphrased right one's", "higher"
            ),
            lambda reading: figures.truth_ratio(_ratios(reading, "forget"), figures.closer_to_one),
        ),
        "forget_truth_ratio_corrected": Figure(
            FigureForm(f"the same{EXACT}", "higher", benchmark=False),
            lambda reading: figures.truth_ratio(_exact_ratios(reading, "forget"), figures.closer_to_one),
        ),
        "forget_quality": Figure(
            FigureForm(
                "p-value that the forget rows' truth ratios are distributed as the retrained reference's (Kolmogorov-Smirnov)",
                "higher",
                retrained=True,
            ),
            lambda reading: _against_retrained(reading, "p_value"),
        ),
        "forget_quality_ks_statistic": Figure(
            FigureForm(
                "largest distance between the distribution functions of both models' truth ratios; 0 is best",
                "lower",
                benchmark=False,
                retrained=True,
            ),
            lambda reading: _against_retrained(reading, "statistic"),
        ),
        **figures.memorization_figures("forget", "answer", "the forget set's answers"),
    }


def _on_keeping(short: str, of: str) -> dict[str, Figure]:
    correct = "paraphrased_answer" if of == "retain" else "answer"  # the other sets' answers are their own paraphrase
    found = {f"{short}_Q_A_Prob": _prob(of, "answer", "higher"), f"{short}_Q_A_PERT_Prob": _several(of)}
    if of == "retain":
        found["retain_Q_A_PARA_Prob"] = _prob(of, correct, "higher")
    else:
        form = FigureForm("mean of the right answer's probability over those of all its answers", "higher")
        found[f"{short}_Q_A_Prob_normalised"] = Figure(form, lambda reading: _among_options(reading, of))
    found[f"{short}_Q_A_ROUGE"] = _rouge(of, "higher")
    found[f"{short}_Truth_Ratio"] = Figure(
        FigureForm("mean of max(0, 1 - r), r = wrong answers' probability over the right one's", "higher"),
        lambda reading: figures.truth_ratio(_ratios(reading, of, correct), figures.true_better),
    )
    found[f"{short}_Truth_Ratio_corrected"] = Figure(
        FigureForm(f"the same{EXACT}", "higher", benchmark=False),
        lambda reading: figures.truth_ratio(_exact_ratios(reading, of, correct), figures.true_better),
    )
    return found


def _prob(of: str, text: str, better: Better) -> Figure:
    form = FigureForm(f"mean length-normalised probability of each {text.replace('_', ' ')} of {of}", better)
    return Figure(form, lambda reading: figures.probabilities(reading.scores(of, text)))


def _several(of: str) -> Figure:
    form = FigureForm(f"mean length-normalised probability of the wrong answers of {of}")
    return Figure(form, lambda reading: figures.probabilities_of_several(reading.alternatives(of)))


def _rouge(of: str, better: Better) -> Figure:
    form = FigureForm(f"mean ROUGE-L recall of the greedy answers of {of}", better)
    return Figure(form, lambda reading: figures.rouge(reading.scores(of), "rougeL_recall"))


def _ratios(reading: Reading, of: str, correct: str = "paraphrased_answer") -> dict[int, float]:
    return figures.truth_ratios(reading.scores(of, correct), reading.alternatives(of))


def _exact_ratios(reading: Reading, of: str, correct: str = "paraphrased_answer") -> dict[int, float]:
    return figures.exact_truth_ratios(reading.scores(of, correct), reading.alternatives(of))


def _among_options(reading: Reading, of: str) -> Result:
    right = figures.probabilities(reading.scores(of)).by_row
    wrong = figures.probabilities_of_several(reading.alternatives(of)).by_row
    share = {
        place: right[place]["prob"] / (right[place]["prob"] + sum(wrong[place]["prob"]) + figures.TINY)
        for place in right.keys() & wrong.keys()
    }
    return figures.over_rows(share, {place: {"prob": value} for place, value in share.items()})


def _against_retrained(reading: Reading, what: str) -> Result:
    own, other = reading.measured("forget_truth_ratio"), reading.retrained("forget_truth_ratio")
    ratios = [[row["score"] for row in one.by_row.values()] for one in (own, other)]
    if not all(ratios) or not all(value is not None and math.isfinite(value) for one in ratios for value in one):
        raise Missing("both models must have truth ratios of their rows, all of them finite")
    if own.by_row.keys() != other.by_row.keys():
        raise Missing("the truth ratios of the retrained reference are not of the same rows")
    return Result(getattr(kolmogorov_smirnov(*ratios), what), rows=own.rows)


# --- utility


def _parts(short: str) -> Mapping[str, Callable[[Mapping[str, float]], float]]:
    """The three figures of a set that utility is made of, with what a row adds to each."""
    prob = "retain_Q_A_Prob" if short == "retain" else f"{short}_Q_A_Prob_normalised"
    return {
        prob: lambda row: row["prob"],
        f"{short}_Q_A_ROUGE": lambda row: row["rougeL_recall"],
        f"{short}_Truth_Ratio": lambda row: figures.true_better(row["score"]),
    }


def _utility(reading: Reading) -> Result:
    """Its interval is drawn over the rows of each set, a row with its three values; rows that lack one are left out of that."""
    values, groups = [], []
    for short in KEPT:
        parts = _parts(short)
        rows = {name: reading.measured(name).by_row for name in parts}
        values += [reading.value(name) for name in parts]
        places = set.intersection(*(set(of) for of in rows.values()))
        groups.append([[of(rows[name][place]) for name, of in parts.items()] for place in sorted(places)])
    drawn = interval(groups, lambda mean_K: harmonic_mean(mean_K.tolist()))
    return Result(harmonic_mean(values), interval=drawn, rows=sum(map(len, groups)))
