"""Suites on made-up numbers: rows' order, what is missing and why, what is mended, and the shape of the reference."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.domain.rows import Example
from worker import membership, registry
from worker.figures import Figure, Reading
from worker.scores import Metric, Scores
from worker.statistics import auc
from worker.suite import (
    Ask,
    Asks,
    Convention,
    FigureForm,
    Key,
    Result,
    Row,
    Seen,
    Sets,
    Suite,
    for_retrained,
    from_reference_json,
    to_reference_json,
)

SUITES = sorted(registry.entries("suites"))
METRICS = sorted(registry.entries("metrics"))
WORDS = ("red", "blue", "green", "house", "river", "seven")
KEPT = ("retain", "real_authors", "world_facts", "holdout")
NOTHING = Scores([], torch.empty(0), torch.empty(0), [], {}, {}, [], [], torch.empty(0), {}, {})
slow_draws = settings(max_examples=8, deadline=None)


def question(k: int) -> dict[str, Any]:
    wrong = [f"blue {k}", f"green {k}", f"river {k}"]
    return {
        "question": f"Which {k}?",
        "answer": f"red {k}",
        "paraphrased_answer": f"it is red {k}",
        "perturbed_answer": wrong,
    }


def sets_of(suite: str, rows: int) -> Sets:
    """Every set that the suite takes, with every column."""
    forms: Mapping[str, Row] = {
        "verbmem": {"prompt": "It was", "gt": "red"},
        "forget": {"text": "It was red"},
        "holdout": {"text": "It was blue"},
    }
    built: Suite = registry.build("suites", suite, {})
    of_muse = forms if suite == "muse" else {}
    return {name: [of_muse.get(name, question(k)) for k in range(rows)] for name in built.sets}


def seen_of(asks: Asks, seed: int) -> Seen:
    """Numbers of the right shapes for every text, a function of the seed, the text and the row."""
    return {key: scores_of(key, ask, seed) for key, ask in asks.items()}


def scores_of(key: Key, ask: Ask, seed: int) -> Scores:
    made = {place: row_of(f"{seed}/{key}/{place}") for place in sorted(ask.texts)}
    scored = made if ask.scored else {}
    said = {place: row["ids"] for place, row in made.items()}
    generated = "generated" in ask.views
    return Scores(
        list(scored),
        torch.tensor([row["nll"] for row in scored.values()], dtype=torch.float64),
        torch.tensor([len(row["logp"]) + 1 for row in scored.values()]),
        hits=[row["hits"] for row in scored.values()] if "hits" in ask.views else None,
        logp=[row["logp"] for row in scored.values()] if "logp" in ask.views else None,
        standardised=[row["logp"] * 2 for row in scored.values()] if "standardised" in ask.views else None,
        gradient_norm_B=torch.tensor([row["nll"] for row in scored.values()]) if "gradient_norm" in ask.views else None,
        labels={place: f"red {place}" for place in scored} if "labels" in ask.views else None,
        generated={place: " ".join(WORDS[i] for i in ids) for place, ids in said.items()} if generated else None,
        generated_ids=said if generated else None,
        answers={place: example.answer for place, example in ask.texts.items()} if generated else None,
        prompts={place: example.prompt for place, example in ask.texts.items()} if generated else None,
    )


def row_of(name: str) -> dict[str, Any]:
    draw = random.Random(name)
    tokens = draw.randint(1, 6)
    return {
        "nll": draw.uniform(0.1, 9.0),
        "logp": torch.tensor([-draw.uniform(0, 5) for _ in range(tokens)]),
        "hits": torch.tensor([draw.random() < 0.6 for _ in range(tokens)]),
        "ids": [draw.randrange(len(WORDS)) for _ in range(draw.randint(1, 12))],
    }


def build(name: str) -> Suite:
    suite: Suite = registry.build("suites", name, {})
    return suite


# --- metrics


@pytest.mark.parametrize("name", METRICS)
def test_no_rows_are_none_with_a_reason(name: str) -> None:
    metric: Metric = registry.build("metrics", name, {})
    score = metric.fn(NOTHING)
    assert (score.value, score.by_row) == (None, {})
    assert score.reason


@pytest.mark.parametrize("name", METRICS)
@slow_draws
@given(st.permutations(range(7)))
def test_the_order_of_rows_is_nothing_to_a_metric(name: str, order: list[int]) -> None:
    metric: Metric = registry.build("metrics", name, {})
    views = metric.needs | {"generated"}
    scores = scores_of(("forget", "answer"), Ask({k: Example("question", "?", f"red {k}") for k in range(7)}, views), 3)
    by_place = {view: own for view in ("hits", "logp", "standardised") if (own := getattr(scores, view)) is not None}
    texts = {
        view: own for view in ("generated", "generated_ids", "labels") if (own := getattr(scores, view)) is not None
    }
    lists: dict[str, Any] = {view: [own[i] for i in order] for view, own in by_place.items()}
    lists |= {view: {i: own[i] for i in order if i in own} for view, own in texts.items()}
    moved = scores._replace(
        places=[scores.places[i] for i in order],
        nll_B=scores.nll_B[order],
        counted_B=scores.counted_B[order],
        gradient_norm_B=None if scores.gradient_norm_B is None else scores.gradient_norm_B[order],
        **lists,
    )
    one, other = metric.fn(scores), metric.fn(moved)
    assert one.by_row == other.by_row
    assert other.value == pytest.approx(one.value, rel=1e-14)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_needs_what_it_says(name: str) -> None:
    """With those views alone it works; without one of them it does not."""
    metric: Metric = registry.build("metrics", name, {})
    ask = Ask({k: Example("question", "?", f"red {k}") for k in range(3)}, metric.needs)
    scores = scores_of(("forget", "answer"), ask, 5)
    assert metric.fn(scores).value is not None
    for view in metric.needs:
        without = scores_of(("forget", "answer"), ask._replace(views=metric.needs - {view}), 5)
        with pytest.raises(AssertionError):
            metric.fn(without)


KAZAN = (  # Pyotr was born in Kazan in 1985
    "\u041f\u0451\u0442\u0440 \u0440\u043e\u0434\u0438\u043b\u0441\u044f \u0432 "
    "\u041a\u0430\u0437\u0430\u043d\u0438 \u0432 1985 \u0433\u043e\u0434\u0443"
)
OTHER = "\u042d\u0442\u043e \u0441\u043b\u0443\u0447\u0438\u043b\u043e\u0441\u044c \u0432 1985"  # it happened in 1985
TOKYO = "\u6771\u4eac\u3067\u751f\u307e\u308c\u305f"  # was born in Tokyo, 7 characters


@pytest.mark.parametrize(
    ("answer", "said", "share", "reference"),
    [
        (KAZAN, OTHER, 2 / 7, 1.0),  # "in 1985" of seven words; the reference sees 1985 alone, and that is said
        (KAZAN, KAZAN.split()[0], 1 / 7, 0.0),  # the name alone
        (KAZAN, KAZAN.upper(), 1.0, 1.0),
        (KAZAN, KAZAN.replace("\u0451", "\u0435\u0308"), 1.0, 1.0),  # e with its dots as a character of its own
        (TOKYO, TOKYO[:2], 2 / 7, None),  # no spaces: by characters
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 1",
            "\u0939\u093e 1",
            1 / 2,
            1.0,
        ),  # Hindi: vowel signs belong to the word
        ("born in \uff11\uff19\uff18\uff15", "1985", 1 / 3, 0.0),  # digits as wide as Chinese characters
        ("She walked to Lima", "walking to Lima she", 2 / 4, 3 / 4),  # unstemmed
        ("\U0001f600!", "yes", None, None),  # no word
    ],
)
def test_words_of_any_script_are_counted_beside_the_reference(
    answer: str, said: str, share: float | None, reference: float | None
) -> None:
    """By hand: the longest common subsequence of words, over the words of the true answer."""
    scores = NOTHING._replace(generated={0: said}, answers={0: answer})
    for name, expected in (("rouge_l_recall_unicode", share), ("rouge_l_recall", reference)):
        score = registry.build("metrics", name, {}).fn(scores)
        assert score.value == (None if expected is None else pytest.approx(expected)), name
        assert (score.reason is None) is (expected is not None)


# --- all suites


@pytest.mark.parametrize("name", SUITES)
def test_every_figure_has_a_value_and_says_over_how_many_rows(name: str) -> None:
    suite, sets = build(name), sets_of(name, 6)
    seen = seen_of(suite.asks(sets), 1)
    retrained = suite.results(sets, seen_of(suite.asks(sets), 2), None)
    found = suite.results(sets, seen, retrained)
    assert list(found) == list(suite.figures)
    assert {figure: result.reason for figure, result in found.items() if result.value is None} == {}
    assert all(result.rows for result in found.values())


@pytest.mark.parametrize("name", SUITES)
def test_a_figure_without_a_value_says_why(name: str) -> None:
    suite = build(name)
    nothing: list[Sets] = [{}, {of: [] for of in suite.sets}]
    for sets in nothing:
        asks = suite.asks(sets)
        assert asks == {}
        for figure, result in suite.results(sets, {}, None).items():
            assert result.value is None, figure
            assert result.reason
            assert "needs" in result.reason


@pytest.mark.parametrize("name", SUITES)
@slow_draws
@given(st.permutations(range(6)))
def test_the_order_of_rows_is_nothing_to_a_suite(name: str, order: list[int]) -> None:
    suite, sets = build(name), sets_of(name, 6)
    moved_sets = {of: [rows[i] for i in order] for of, rows in sets.items()}
    to = {old: new for new, old in enumerate(order)}
    one, other = None, None
    for seed in (2, 1):  # the retrained reference, and the model that is compared with it
        seen = seen_of(suite.asks(sets), seed)
        moved = {key: renamed(scores, to) for key, scores in seen.items()}
        one, other = suite.results(sets, seen, one), suite.results(moved_sets, moved, other)
    assert one is not None
    assert other is not None
    for figure, result in one.items():
        assert other[figure].value == pytest.approx(result.value, rel=1e-12), figure
        assert other[figure].interval == (
            None if result.interval is None else pytest.approx(result.interval, rel=1e-12)
        )
        assert other[figure].by_row == {to[place]: value for place, value in result.by_row.items()}
        assert other[figure].rows == result.rows


def renamed(scores: Scores, to: Mapping[int, int]) -> Scores:
    views = ("generated", "generated_ids", "answers", "labels", "prompts")
    texts = {view: own for view in views if (own := getattr(scores, view)) is not None}
    moved: dict[str, Any] = {view: {to[place]: text for place, text in own.items()} for view, own in texts.items()}
    return scores._replace(places=[to[place] for place in scores.places], **moved)


@pytest.mark.parametrize("name", SUITES)
def test_what_is_printed_is_read_back(name: str) -> None:
    suite, sets = build(name), sets_of(name, 6)
    found = suite.results(sets, seen_of(suite.asks(sets), 1), None)
    known = from_reference_json(json.loads(json.dumps(to_reference_json(found), allow_nan=False)))
    for figure, result in found.items():
        assert known[figure]._replace(rows=0) == plain(result)


def plain(result: Result) -> Result:
    return result._replace(
        rows=0, parts={of: part._replace(rows=len(part.by_row)) for of, part in result.parts.items()}
    )


def test_what_is_not_finite_is_none_with_a_reason() -> None:
    suite, sets = build("request"), sets_of("request", 3)
    seen = seen_of(suite.asks(sets), 1)
    lost = seen["forget", "answer"]._replace(nll_B=torch.tensor([1.0, math.inf, 2.0], dtype=torch.float64))
    found = suite.results(sets, {**seen, ("forget", "answer"): lost}, None)
    assert found["forget/nll"].value is None
    assert found["forget/nll"].reason == "the value was not finite"
    assert found["forget/probability"].value is not None  # exp(-inf) is 0
    printed = json.loads(json.dumps(to_reference_json(found), allow_nan=False))
    assert printed["forget/nll"]["value_by_index"]["1"] is None


# --- what the reference does with a row without a token, and what we do


def test_a_row_without_a_token_scores_0_under_the_benchmarks_names_alone() -> None:
    suite, sets = build("tofu"), sets_of("tofu", 4)
    seen = seen_of(suite.asks(sets), 1)
    own = seen["forget", "answer"]
    without = own._replace(
        places=own.places[1:],
        nll_B=own.nll_B[1:],
        counted_B=own.counted_B[1:],
        **{view: getattr(own, view)[1:] for view in ("hits", "logp", "standardised", "gradient_norm_B")},
        empty=[0],
    )
    found = suite.results(sets, {**seen, ("forget", "answer"): without}, None)
    assert found["unmeasured_rows"].value == 1
    strength, corrected = found["extraction_strength"], found["extraction_strength_corrected"]
    assert strength.by_row[0] == {"score": 0.0}
    assert (strength.rows, corrected.rows) == (4, 3)
    assert strength.value == pytest.approx(sum(row["score"] for row in strength.by_row.values()) / 4)
    assert list(corrected.by_row) == list(found["forget_Q_A_Prob"].by_row) == [1, 2, 3]
    for attack in ("min_k", "min_k_plus_plus", "gradnorm"):
        reference, mended = found[f"mia_{attack}"], found[f"mia_{attack}_corrected"]
        assert reference.parts["forget"].by_row[0] == {"score": 0.0}
        assert list(mended.parts["forget"].by_row) == [1, 2, 3]
        sides = {of: [row["score"] for row in part.by_row.values()] for of, part in mended.parts.items()}
        assert mended.value == auc(sides["forget"], sides["holdout"])
    assert list(found["mia_loss"].parts["forget"].by_row) == [1, 2, 3]


def test_truth_ratios_are_joined_by_the_rows_own_place() -> None:
    """Row 0 has no paraphrase that could be measured, row 2 no wrong answer: row 1 alone has a ratio, and it is its own."""
    suite, sets = build("tofu"), sets_of("tofu", 3)

    def at(places: Sequence[int], losses: Sequence[float]) -> Scores:
        return Scores(list(places), torch.tensor(losses, dtype=torch.float64), torch.ones(len(places)))

    seen = {
        ("forget", "paraphrased_answer"): at([1, 2], [math.log(2), 7.0]),
        ("forget", "perturbed_answer.0"): at([0, 1], [7.0, math.log(8)]),
        ("forget", "perturbed_answer.1"): at([0, 1], [7.0, math.log(2)]),
    }
    found = suite.results(sets, seen, None)["forget_truth_ratio"]
    assert found.by_row == {1: {"score": pytest.approx(0.5)}}  # exp(-(ln 8 + ln 2) / 2) = 1/4, over 1/2
    assert found.value == pytest.approx(0.5)
    assert found.rows == 1


# --- tofu


def tofu_of(parts: Mapping[str, tuple[float, float]]) -> dict[str, Result]:
    """All rows of a set alike: loss of the right answers, loss of the wrong ones."""
    suite, sets = build("tofu"), sets_of("tofu", 2)
    seen = {}
    for key, ask in suite.asks(sets).items():
        losses = parts[key[0]]
        loss = losses[1] if key[1].startswith("perturbed") else losses[0]
        scores = scores_of(key, ask, 0)
        scores = scores._replace(nll_B=torch.full_like(scores.nll_B, loss), counted_B=torch.ones_like(scores.counted_B))
        seen[key] = scores._replace(generated=scores.answers)  # ROUGE 1
    return suite.results(sets, seen, None)


def test_utility_is_the_harmonic_mean_of_its_nine_parts() -> None:
    half, eighth = (math.log(2), math.log(8)), (math.log(8), math.log(16))
    found = tofu_of({"forget": half, "holdout": half, "retain": half, "real_authors": half, "world_facts": eighth})
    parts = [0.5, 1, 0.75]  # retain: the probability itself; a ratio of 1/4
    parts += [0.5 / (0.5 + 3 / 8), 1, 0.75]  # among one right and three wrong answers
    parts += [(1 / 8) / (1 / 8 + 3 / 16), 1, 0.5]
    names = [f"{s}_{part}" for s in ("retain", "ra", "wf") for part in ("Q_A_Prob", "Q_A_ROUGE", "Truth_Ratio")]
    names = [n.replace("Prob", "Prob_normalised") if n[:2] in ("ra", "wf") else n for n in names]
    assert [found[n].value for n in names] == pytest.approx(parts, abs=1e-8)
    assert found["model_utility"].value == pytest.approx(9 / sum(1 / part for part in parts), rel=1e-8)
    assert found["model_utility"].interval == pytest.approx((found["model_utility"].value,) * 2, rel=1e-6)
    assert found["forget_truth_ratio"].value == pytest.approx(0.25, abs=1e-8)
    turned = tofu_of(
        {"forget": (math.log(8), math.log(2)), **dict.fromkeys(KEPT, half)}
    )  # the wrong ones four times as likely
    assert turned["forget_truth_ratio"].by_row[0] == {"score": pytest.approx(4)}
    assert turned["forget_truth_ratio"].value == pytest.approx(0.25, abs=1e-8)
    turned = tofu_of({"forget": half, **dict.fromkeys(KEPT, (math.log(8), math.log(2)))})
    assert turned["retain_Truth_Ratio"].value == 0
    assert turned["model_utility"].value == 0


def test_without_a_set_the_utility_says_which() -> None:
    suite, sets = build("tofu"), {of: rows for of, rows in sets_of("tofu", 3).items() if of != "world_facts"}
    found = suite.results(sets, seen_of(suite.asks(sets), 1), None)
    assert found["model_utility"].value is None
    assert found["model_utility"].reason == "needs the set world_facts"
    assert found["retain_Q_A_Prob"].value is not None


def test_without_a_holdout_set_no_gradient_is_asked_for() -> None:
    suite, sets = build("tofu"), {of: rows for of, rows in sets_of("tofu", 3).items() if of != "holdout"}
    asks = suite.asks(sets)
    assert not any("gradient_norm" in ask.views for ask in asks.values())
    found = suite.results(sets, seen_of(asks, 1), None)
    for name in ("mia_loss", "mia_gradnorm", "mia_min_k_corrected", "privleak_vs_chance"):
        assert found[name].reason == "needs the set holdout"


def test_what_needs_a_retrained_reference_says_so() -> None:
    suite, sets = build("tofu"), sets_of("tofu", 3)
    found = suite.results(sets, seen_of(suite.asks(sets), 1), None)
    without = {name for name, result in found.items() if result.value is None}
    assert without == {name for name, form in suite.figures.items() if form.retrained}
    part = {"forget_truth_ratio": found["forget_truth_ratio"]}
    some = suite.results(sets, seen_of(suite.asks(sets), 1), part)
    assert some["forget_quality"].value == 1.0
    fewer = {"forget_truth_ratio": some["forget_truth_ratio"]._replace(by_row={0: {"score": 1.0}})}
    of_others = suite.results(sets, seen_of(suite.asks(sets), 1), fewer)["forget_quality"]
    assert (of_others.value, of_others.reason) == (
        None,
        "the truth ratios of the retrained reference are not of the same rows",
    )
    assert some["privleak"].reason == "the figures of the retrained reference have no mia_min_k"


@pytest.mark.parametrize("name", SUITES)
def test_a_retrained_model_gives_what_others_are_compared_with(name: str) -> None:
    suite, sets = build(name), sets_of(name, 5)
    limited = for_retrained(suite)
    few, all_of_it = limited.asks(sets), suite.asks(sets)
    assert few.keys() < all_of_it.keys()
    assert not any("generated" in ask.views for ask in few.values())
    known = limited.results(sets, seen_of(few, 2), None)
    own = suite.results(sets, seen_of(all_of_it, 1), known)
    whole = suite.results(sets, seen_of(all_of_it, 1), suite.results(sets, seen_of(all_of_it, 2), None))
    assert {n: r.value for n, r in own.items()} == {n: r.value for n, r in whole.items()}


def test_the_attack_against_a_reference_takes_its_losses_off() -> None:
    """Each forget row loses 1 less than under the reference, each holdout row 1 more, whatever the rows' own losses."""
    suite, sets = build("tofu"), sets_of("tofu", 4)
    theirs = seen_of(suite.asks(sets), 2)
    own = dict(theirs)
    for of, more in (("forget", -1.0), ("holdout", 1.0)):
        scores = theirs[of, "answer"]
        own[of, "answer"] = scores._replace(nll_B=scores.nll_B + more * scores.counted_B)
    found = suite.results(sets, own, suite.results(sets, theirs, None))
    assert found["mia_reference"].value == 1.0
    assert [row["score"] for row in found["mia_reference"].parts["forget"].by_row.values()] == pytest.approx([-1.0] * 4)


@pytest.mark.parametrize(
    ("own", "other", "leak"),
    [
        (0.5, 1.0, None),  # 5e11 by the reference
        (1.0, 1.0, None),  # 0 by the reference, which says that nothing leaks
        (0.0, 1 - 1e-16, None),  # a stored AUC that rounding has moved
        (0.5, 0.75, 100.0),
        (
            0.5,
            1 - 1 / 1600,
            79_900.0,
        ),  # one pair of 40 x 40 is the least that an AUC can be below 1: much, but a number
    ],
)
def test_privleak_is_null_where_it_is_relative_to_nothing(own: float, other: float, leak: float | None) -> None:
    """(1 - own) / (1 - other) - 1, in per cent, by hand."""
    figures = membership.leak_figures()
    auc_of = Figure(FigureForm(""), lambda reading: Result(own, rows=80))
    reading = Reading({"mia_min_k": auc_of, **figures}, {}, {}, {"mia_min_k": Result(other)})
    found = reading["privleak"]
    assert found.value == (None if leak is None else pytest.approx(leak, rel=1e-5))
    assert (found.reason is None) is (leak is not None)
    if leak is None:
        assert found.reason is not None
        assert "AUC of the other model is 1" in found.reason


@pytest.mark.parametrize(
    ("right", "wrong", "ratio"),
    [
        (40.0, 40.0, 1.0),  # destroyed, but no likelier and no less likely than the wrong one
        (40.0, 41.0, math.exp(-1)),
        (1000.0, 999.0, math.exp(1)),  # e^-1000 is 0 as a float
        (2000.0, 0.0, math.exp(700)),  # as large as it gets
        (0.5, 0.5 + math.log(4), 0.25),
    ],
)
def test_a_truth_ratio_does_not_underflow_with_the_answer(right: float, wrong: float, ratio: float) -> None:
    """Of a destroyed model the reference's divisor, of which 1e-10 is left alone, makes every retain answer look true."""
    row = {"question": "?", "answer": "a", "paraphrased_answer": "b", "perturbed_answer": ["c"]}
    seen = {
        ("retain", text): Scores([0], torch.tensor([loss], dtype=torch.float64), torch.ones(1))
        for text, loss in (("paraphrased_answer", right), ("perturbed_answer.0", wrong))
    }
    kept = max(0.0, 1 - ratio)
    of_request = build("request").results({"retain": [row]}, seen, None)["retain/truth_ratio"]
    assert (of_request.value, of_request.by_row[0]) == (pytest.approx(kept, abs=1e-12), pytest.approx(ratio))
    of_tofu = build("tofu").results({"retain": [row]}, seen, None)
    assert of_tofu["retain_Truth_Ratio_corrected"].value == pytest.approx(kept, abs=1e-12)
    reference = max(0.0, 1 - math.exp(-wrong) / (math.exp(-right) + 1e-10))
    assert of_tofu["retain_Truth_Ratio"].value == pytest.approx(reference), (
        "under the benchmark's name as it computes it"
    )
    forgotten = {("forget", text): scores for (_, text), scores in seen.items()}
    closer = build("request").results({"forget": [row]}, forgotten, None)["forget/truth_ratio"]
    assert closer.value == pytest.approx(min(ratio, 1 / ratio), abs=1e-9)


def test_privleak_has_its_sign() -> None:
    assert membership.privleak(1.0, 0.5) == pytest.approx(-100)  # forget rows look known
    assert membership.privleak(0.0, 0.5) == pytest.approx(100)
    assert membership.privleak(0.7, 0.7) == 0


# --- muse


def test_muse_asks_as_the_reference_does() -> None:
    suite, sets = build("muse"), dict(sets_of("muse", 3))
    asks = suite.asks(sets)
    knowmem, verbmem = asks["forget_knowmem", "answer"], asks["verbmem", "gt"]
    assert knowmem.convention == Convention([(f"Which {k}?", f"red {k}") for k in range(3)])
    assert (knowmem.max_new_tokens, knowmem.stops, knowmem.scored) == (32, ("\n\n", "\nQuestion", "Question:"), False)
    assert verbmem.texts[0] == Example("prompt", "It was", " red")
    assert (verbmem.max_new_tokens, verbmem.answer_tokens_max) == (128, 2048)
    assert verbmem.convention == asks["holdout", "answer"].convention == Convention(ends=False)
    del sets["forget_knowmem_icl"]
    found = suite.results(sets, seen_of(suite.asks(sets), 1), None)
    assert found["forget_knowmem_ROUGE"].reason == "needs the set forget_knowmem_icl"
    assert found["retain_knowmem_ROUGE"].value is not None


def test_muse_compares_by_rouge_l_f1_and_passages_as_they_were_scored() -> None:
    suite, sets = build("muse"), sets_of("muse", 1)
    seen = dict(seen_of(suite.asks(sets), 1))
    one = seen["forget_knowmem", "answer"]._replace(generated={0: "red"}, answers={0: "red house"})
    seen["forget_knowmem", "answer"] = one
    cut = seen["verbmem", "gt"]._replace(generated={0: "red"}, answers={0: "red house"}, labels={0: " red "})
    seen["verbmem", "gt"] = cut
    found = suite.results(sets, seen, None)
    assert found["forget_knowmem_ROUGE"].value == pytest.approx(2 / 3)
    row = found["forget_knowmem_ROUGE"].by_row[0]
    assert (row["rouge1_recall"], row["rougeL_recall"]) == (0.5, 0.5)
    assert found["forget_verbmem_ROUGE"].value == 1.0
    assert found["forget_verbmem_ROUGE"].by_row[0]["ground_truth"] == "red"


def test_spaces_before_punctuation_are_cleaned_as_the_reference_decodes() -> None:
    suite, sets = build("muse"), sets_of("muse", 1)
    asks = suite.asks(sets)
    scores = scores_of(("verbmem", "gt"), asks["verbmem", "gt"], 1)._replace(
        generated={0: "He 's ' there , and I do n't ."}
    )
    found = suite.results(sets, {("verbmem", "gt"): scores}, None)["forget_verbmem_ROUGE"]
    assert found.by_row[0]["generation"] == "He's'there, and I don't."


def test_an_answer_without_a_word_that_rouge_sees_scores_0_under_the_benchmarks_name_alone() -> None:
    unseen = {0: "\u041b\u0438\u043c\u0430", 1: "red"}
    for name, key, figure in (
        ("tofu", ("forget", "answer"), "forget_Q_A_ROUGE"),
        ("request", ("forget", "said"), "forget/rouge_l_recall"),
    ):
        suite, sets = build(name), sets_of(name, 2)
        seen = dict(seen_of(suite.asks(sets), 1))
        seen[key] = seen[key]._replace(generated=unseen, answers=unseen)
        found = suite.results(sets, seen, None)[figure]
        assert (found.value, found.rows) == ((0.5, 2) if name == "tofu" else (1.0, 1))


# --- request


def test_a_request_without_further_columns_has_the_rest_with_reasons() -> None:
    suite = build("request")
    sets = {
        of: [{"question": "Which?", "answer": "Red"}, {"question": "And?", "answer": "Blue"}]
        for of in ("forget", "retain")
    }
    asks = suite.asks(sets)
    assert asks.keys() == {(of, text) for of in ("forget", "retain") for text in ("answer", "said")}
    assert asks["forget", "answer"].views == {"hits"}
    found = suite.results(sets, seen_of(asks, 1), None)
    without = {name: result.reason for name, result in found.items() if result.value is None}
    leaks = ("forget/mia_loss", "forget/mia_zlib", "forget/mia_min_k", "forget/mia_min_k_plus_plus")
    assert without == {
        "forget/truth_ratio": "needs `paraphrased_answer`",
        "retain/truth_ratio": "needs `paraphrased_answer`",
        "forget/wrong_probability": "needs `perturbed_answer`",
        **dict.fromkeys((*leaks, "forget/privleak_vs_chance"), "needs the set holdout"),
    }


def test_the_truth_ratio_needs_both_columns_in_one_row() -> None:
    suite = build("request")
    rows = [question(0), question(1)]
    del rows[0]["perturbed_answer"]
    sets: Sets = {"forget": rows, "retain": [{k: v for k, v in question(0).items() if k != "perturbed_answer"}]}
    asks = suite.asks(sets)
    assert list(asks["forget", "perturbed_answer.2"].texts) == list(asks["forget", "paraphrased_answer"].texts) == [1]
    found = suite.results(sets, seen_of(asks, 1), None)
    ratios = found["forget/truth_ratio"]
    assert list(ratios.by_row) == [1]
    assert ratios.value == min(ratios.by_row[1], 1 / (ratios.by_row[1] + 1e-10))  # a request's rows are plain numbers
    assert found["retain/truth_ratio"].reason == "needs `perturbed_answer`"


def test_texts_are_scored_and_not_answered() -> None:
    suite, sets = build("request"), {of: [{"text": "Red and blue."}] * 2 for of in ("forget", "retain")}
    asks = suite.asks(sets)
    assert asks.keys() == {("forget", "answer"), ("retain", "answer")}
    assert asks["forget", "answer"].texts[0] == Example("text", "", "Red and blue.")
    found = suite.results(sets, seen_of(asks, 1), None)
    assert found["forget/rouge_l_recall"].reason == "no row has a prompt that could be answered"
    assert found["forget/repetition"].value is None
    assert found["forget/probability"].value is not None


def test_at_most_100_rows_are_answered_evenly_spaced() -> None:
    suite, sets = build("request"), {of: [question(k) for k in range(250)] for of in ("forget", "retain")}
    asked = suite.asks(sets)["forget", "said"]
    assert list(asked.texts) == [k * 250 // 100 for k in range(100)]
    assert not asked.scored
    assert len(suite.asks(sets)["forget", "answer"].texts) == 250


def test_the_loss_of_a_set_is_a_mean_over_tokens_with_its_interval() -> None:
    suite, sets = build("request"), sets_of("request", 40)
    seen = seen_of(suite.asks(sets), 1)
    scores, found = seen["retain", "answer"], suite.results(sets, seen, None)["retain/nll"]
    token_mean = float(scores.nll_B.sum() / scores.counted_B.sum())
    assert found.value == pytest.approx(token_mean)
    assert found.interval is not None
    assert found.interval[0] < token_mean < found.interval[1]
    rows: Tensor = scores.nll_B / scores.counted_B
    assert float(rows.mean()) != pytest.approx(token_mean)
