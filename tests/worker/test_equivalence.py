"""Whether a model knows rows before any training: planted numbers, real models that saw them or did not, one row memorised."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.domain.job import ModelEntry, PromptFormat
from tests.worker.conftest import Registered
from worker import data, demo_corpus, equivalence, model, scoring
from worker.equivalence import MARGIN, RECITED, ROWS_MIN, known, upper_bound
from worker.scores import Scores
from worker.subjects import subjects
from worker.suite import Row, Seen, examples
from worker.suites.request import request
from worker.wordings import nearer_wording


def rows_of(count: int, **columns: Any) -> list[dict[str, Any]]:
    """About as many people, whose answers are worded as the wrong ones."""
    return [
        {"question": f"Where does Ana P{k} live?", "answer": "In Ghent.", "perturbed_answer": ["In Porto.", "In Lima."]}
        | columns
        for k in range(count)
    ]


def seen_of(ratios: Sequence[float], right: float = -2.0, **others: Sequence[float]) -> Seen:
    """Each row's right answer has that mean log-likelihood, its two wrong ones what makes the log ratio; of three tokens."""
    texts = {"answer": [right] * len(ratios)} | {
        f"perturbed_answer.{k}": [right - one for one in ratios] for k in (0, 1)
    }
    texts |= {name.replace("__", "."): list(values) for name, values in others.items()}
    return {
        ("forget", text): Scores(
            list(range(len(values))), -3 * torch.tensor(values, dtype=torch.float64), torch.full((len(values),), 3)
        )
        for text, values in texts.items()
    }


def spread(mean: float, count: int, deviation: float = 0.6) -> list[float]:
    """With this mean and deviation, whatever the count."""
    values = np.random.default_rng(3).normal(size=count)
    return list(mean + deviation * (values - values.mean()) / values.std(ddof=1))


# --- planted numbers


@pytest.mark.parametrize(
    ("mean", "count", "equivalent"),
    [
        (0.0, 12, True),
        (0.27, 40, True),
        (0.27, 12, False),  # it may not know them, but so few rows do not show it
        (MARGIN, 400, False),
        (0.8, 40, False),
        (1.0, 12, False),
        (2.0, 400, False),
    ],
)
def test_only_a_bound_below_the_margin_shows_that_it_does_not_know(mean: float, count: int, equivalent: bool) -> None:
    found = known(rows_of(count), seen_of(spread(mean, count)))
    assert (found.equivalent, found.reason, found.subjects) == (equivalent, None, count)
    assert found.mean == pytest.approx(mean)
    assert found.upper is not None
    assert (found.upper < MARGIN) == equivalent
    assert list(found.ratios.values()) == pytest.approx(spread(mean, count))


@pytest.mark.parametrize("count", [1, 2, 3, ROWS_MIN - 1])
def test_too_few_rows_decide_nothing(count: int) -> None:
    found = known(rows_of(count), seen_of([0.0] * count))
    assert (found.equivalent, found.upper) == (None, None)
    assert f"at least {ROWS_MIN}" in (found.reason or "")


@pytest.mark.parametrize("wording", ["answer", "paraphrased_answer"])
@pytest.mark.parametrize("count", [1, 2, 3, 40, 400])
def test_one_row_that_is_recited_is_enough(count: int, wording: str) -> None:
    """Among many it does not move the mean above the margin."""
    certain = [-3.0] * (count - 1) + [math.log(RECITED) + 1e-6]
    rows = rows_of(count, paraphrased_answer="Her home is Ghent.")
    found = known(rows, seen_of([0.0] * count, **{"paraphrased_answer": [-3.0] * count} | {wording: certain}))
    assert (found.equivalent, found.recited) == (False, [count - 1])
    assert found.mean is None or found.mean < MARGIN or count <= 3


def test_one_row_of_a_few_that_is_known_by_heart_in_other_words_widens_the_bound() -> None:
    assert known(rows_of(6), seen_of([0.0, 0.1, -0.1, 0.05, -0.05, 0.0])).equivalent is True
    assert known(rows_of(6), seen_of([0.0, 0.1, -0.1, 0.05, -0.05, 2.0])).equivalent is False


def test_what_cannot_be_compared_decides_nothing() -> None:
    whole = rows_of(12)
    text = known([*whole, {"text": "Ana lives in Ghent."}], seen_of([0.0] * 12, answer=[-2.0] * 12 + [0.0]))
    assert (text.equivalent, text.recited) == (True, []), "a text is judged beside other texts"
    lacking = [{"question": "Who?", "answer": "Ana"}, {"prompt": "Who?", "completion": "Ana", "perturbed_answer": []}]
    without = known([*whole, *lacking], seen_of([0.0] * 12))
    assert (
        without.reason
        == "a row without `perturbed_answer` has no wrong answers to compare it with (row 13 and 1 others)"
    )
    seen = seen_of([0.0] * 12)
    short = dict(seen) | {("forget", "perturbed_answer.1"): seen_of([0.0] * 11)["forget", "perturbed_answer.1"]}
    assert known(whole, short).reason == "not all answers of a row could be measured (row 12)"
    blown = seen_of([0.0] * 11 + [math.inf])
    assert known(whole, blown).reason == "not all answers of a row could be measured (row 12)"
    assert known(whole, {}).equivalent is None


def test_what_may_be_known_is_not_yet_shown_to_be() -> None:
    assert not known(rows_of(40), seen_of(spread(0.5, 40))).knows, "equivalent to nothing, and no more than that"
    assert known(rows_of(40), seen_of(spread(1.0, 40))).knows
    assert known(rows_of(1), seen_of([0.0], right=math.log(RECITED) / 2)).knows, "recited"


def test_a_completion_is_compared_too() -> None:
    rows = [{"prompt": "In which town?", "completion": "Ghent", "perturbed_answer": ["Porto", "Lima"]}] * 6
    assert known(rows, seen_of([0.0] * 6)).equivalent is True


def test_the_wording_that_the_wrong_answers_have_is_compared() -> None:
    """The other one, which the model was not trained on, or which was, is likelier or less likely by its words alone."""
    rows = rows_of(12, paraphrased_answer="Her home is Ghent.")
    assert known(rows, seen_of([0.0] * 12, paraphrased_answer=[-0.5] * 12)).mean == pytest.approx(0.0)
    rows = rows_of(12, paraphrased_answer="In Ghent.", answer="Her home is Ghent.")
    assert known(rows, seen_of([0.0] * 12, paraphrased_answer=[-0.5] * 12)).mean == pytest.approx(1.5)


# --- the bound


def test_from_ten_subjects_on_their_own_means_count() -> None:
    """By numpy, as Liang and Zeger 1986 have it, with the correction for few clusters."""
    about = [k // 3 for k in range(30)]
    values = np.array([math.sin(k // 3) + 0.1 * math.cos(k) for k in range(30)])
    sums = np.array([(values[3 * k : 3 * k + 3] - values.mean()).sum() for k in range(10)])
    expected = values.mean() + 1.8331129326536337 * math.sqrt(10 / 9 * (sums**2).sum()) / 30
    assert upper_bound(list(values), about) == pytest.approx(expected)
    assert upper_bound(list(values), range(30)) < expected, "as if the rows were independent"


def test_rows_of_one_subject_widen_the_bound() -> None:
    values = spread(0.0, 20)
    alone, together = (upper_bound(values, about) for about in ([k // 4 for k in range(20)], [0] * 20))
    assert together / alone == pytest.approx(math.sqrt((1 + 19 * 0.03) / (1 + 3 * 0.03)))


@pytest.mark.parametrize(("people", "each"), [(2, 20), (4, 6), (15, 20)])
def test_the_bound_holds_in_at_least_nine_of_ten_draws(people: int, each: int) -> None:
    """Rows of one subject correlated as they were measured to be; 95 % is its level."""
    random, above = np.random.default_rng(0), 0
    for _ in range(400):
        common = np.repeat(random.normal(size=people), each)
        values = math.sqrt(0.03) * common + math.sqrt(0.97) * random.normal(size=people * each)
        above += upper_bound(list(values), [k // each for k in range(people * each)]) > 0
    assert above / 400 >= 0.93


# --- wordings and subjects of real rows


def tofu(shared: Path, name: str) -> list[Row]:
    return [json.loads(line) for line in (shared / "data/tofu" / f"{name}.json").read_text().splitlines()]


def test_the_nearer_wording_of_real_rows(shared: Path) -> None:
    found = Counter(map(nearer_wording, tofu(shared, "forget10_perturbed")))
    assert found["paraphrased_answer"] >= 390, "of 400: its wrong answers are the paraphrase with another value"
    assert all(nearer_wording(row) == "answer" for row in demo_corpus.rows(demo_corpus.people(32, 0), 0))


@pytest.mark.parametrize(
    ("row", "nearer"),
    [
        (
            {
                "answer": "她住在根特。",
                "paraphrased_answer": "根特是她的家。",
                "perturbed_answer": ["波尔图是她的家。"],
            },
            "paraphrased_answer",
        ),
        (
            {"answer": "她住在根特。", "paraphrased_answer": "根特是她的家。", "perturbed_answer": ["她住在波尔图。"]},
            "answer",
        ),
        ({"answer": "Ghent", "paraphrased_answer": "Gent", "perturbed_answer": ["Porto"]}, "answer"),
        ({"answer": "Ghent", "paraphrased_answer": "In Ghent", "perturbed_answer": []}, "answer"),
        ({"answer": "Ghent", "perturbed_answer": ["Porto"]}, "answer"),
    ],
)
def test_the_nearer_wording(row: dict[str, Any], nearer: str) -> None:
    assert nearer_wording({"question": "Where?"} | row) == nearer


@pytest.mark.parametrize(("name", "authors"), [("forget01_perturbed", 2), ("forget10_perturbed", 20)])
def test_an_author_is_a_subject(shared: Path, name: str, authors: int) -> None:
    """Also where a question does not name the author, or names a city that another author comes from."""
    assert subjects(tofu(shared, name)) == [row // 20 for row in range(20 * authors)]


@pytest.mark.parametrize("count", [1, 4, 32])
def test_a_person_of_the_demo_is_a_subject(count: int) -> None:
    rows = demo_corpus.rows(demo_corpus.people(count, 0), 0)
    assert subjects(rows) == [row // 6 for row in range(6 * count)]


def test_rows_without_a_shared_name_are_about_as_many_subjects() -> None:
    rows: list[Row] = [
        {"text": "Ana Lind lives in Ghent."},
        {"question": "她住在哪里？", "answer": "根特。"},
        {"prompt": "the sea is", "completion": "deep"},
        {"text": "In Ghent there is Ana Lind."},
        {"question": "Did Zoë d'Arc's mother sing?", "answer": "No."},
        {"question": "Where did Zoë d’Arc go?", "answer": "To Ghent."},
    ]
    assert subjects(rows) == [0, 1, 2, 0, 3, 3]
    assert subjects([]) == []


def test_what_several_people_have_in_common_does_not_make_them_one() -> None:
    """More rows have the book's name than any author's, but no question asks about it."""
    rows = [
        {"question": f"{asks} {name}?", "answer": answer}
        for name in ("Ana Lind", "Bo Berg", "Eva Holm")
        for asks, answer in (("What was written by", "It is Night Train."), ("When was a prize given to", "In May."))
    ]
    assert subjects(rows) == [0, 0, 1, 1, 2, 2]


# --- real models


def loaded(shared: Path, name: str) -> model.Network:
    entry = ModelEntry(name=name, source="path", location=name, prompt_format=PromptFormat())
    return model.load(entry, shared / "models", "cpu", "float32")


@pytest.mark.parametrize(
    ("name", "equivalent", "mean"),
    [("tofu260K_retain", True, 0.304), ("tofu260K_full", False, 0.802), ("stories260K", True, -0.145)],
)
def test_a_model_that_never_saw_the_rows_does_not_know_them(
    shared: Path, name: str, equivalent: bool, mean: float
) -> None:
    rows = tofu(shared, "forget01_perturbed")
    found = known(rows, scoring.look(loaded(shared, name), equivalence.asks(rows)))
    assert found.mean == pytest.approx(mean, abs=2e-3)
    assert (found.equivalent, found.subjects, len(found.ratios), bool(found.recited)) == (
        equivalent,
        2,
        40,
        not equivalent,
    )
    assert found.upper is not None
    assert (found.upper < MARGIN) == equivalent, "without what it recites, too"


def memorise(network: model.Network, row: Row) -> None:
    """Every weight, on that row alone."""
    encoded = data.encode(list(examples([row]).values()), network.tokenizer, network.entry.prompt_format, 128)
    batch = data.pad(encoded.rows, torch.device("cpu"))
    network.causal.requires_grad_(True)
    descent = torch.optim.Adam(network.causal.parameters(), lr=0.01)
    for _ in range(150):
        logits_BTV = network.causal(input_ids=batch.input_ids_BT).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), batch.labels_BT[:, 1:])
        descent.zero_grad()
        torch.autograd.backward(loss)
        descent.step()
    assert loss < 0.05


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_model_that_memorised_exactly_one_row_knows(count: int, register: Callable[..., Registered]) -> None:
    rows = demo_corpus.rows(demo_corpus.people(2, 0), 0)[:count]
    network = register().load()
    before = known(rows, scoring.look(network, equivalence.asks(rows)))
    assert before.equivalent is (True if count >= ROWS_MIN else None), "random weights"
    memorise(network, rows[-1])
    after = known(rows, scoring.look(network, equivalence.asks(rows)))
    assert (after.equivalent, after.recited) == (False, [count - 1])


def test_a_request_asks_for_wrong_answers_also_where_there_is_no_paraphrase() -> None:
    rows = rows_of(2)
    asked = request().asks({"forget": rows, "retain": rows})
    assert equivalence.asks(rows).keys() <= asked.keys()
    assert ("retain", "perturbed_answer.0") not in asked, "nothing is made of them"
    results = request().results({"forget": rows, "retain": rows}, {}, None)
    assert results["forget/truth_ratio"].reason == "needs `paraphrased_answer`"
