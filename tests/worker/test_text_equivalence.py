"""Whether a model knows forget texts before any training: planted losses, real models that saw them or did not, one memorised."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from service.domain.job import ModelEntry, PromptFormat
from tests.worker.conftest import Registered
from tests.worker.test_equivalence import memorise
from worker import data, demo_corpus, model, scoring
from worker.equivalence import LEVEL, RECITED
from worker.scores import Scores
from worker.statistics import auc_bounds
from worker.suite import Ask, Asks, Row, Seen, examples
from worker.text_equivalence import MARGIN, TEXTS_MIN, TextEquivalence, known

SHARED = Path(os.environ.get("UNLEARN_SHARED", "../shared"))


def texts(count: int) -> list[Row]:
    return [{"text": f"Text {k}."} for k in range(count)]


def losses(values: Sequence[float], tokens: int = 50) -> Scores:
    """Of as many texts, nats per token."""
    counted = torch.full((len(values),), tokens)
    return Scores(list(range(len(values))), tokens * torch.tensor(values, dtype=torch.float64), counted)


def judged(forget: Sequence[float], holdout: Sequence[float], tokens: int = 50) -> TextEquivalence:
    seen = {("forget", "answer"): losses(forget, tokens), ("holdout", "answer"): losses(holdout)}
    return known(texts(len(forget)), texts(len(holdout)), seen)


def spread(count: int, seed: int = 0) -> list[float]:
    return list(np.random.default_rng(seed).normal(3.0, 0.4, count))


def interleaved(count: int) -> tuple[list[float], list[float]]:
    """Two sets whose AUC is 1/2 as nearly as can be: in turns, each as often the likelier one."""
    values = sorted(spread(2 * count))
    pairs = [(a, b) if k % 2 else (b, a) for k, (a, b) in enumerate(zip(values[::2], values[1::2], strict=True))]
    return [a for a, _ in pairs], [b for _, b in pairs]


# --- planted losses


@pytest.mark.parametrize(
    ("count", "shift", "equivalent"),
    [
        (40, 0.0, True),
        (200, 0.0, True),
        (200, 0.1, True),  # a quarter of the spread: 57 % of pairs
        (40, 0.1, False),  # it may not know them, but so few texts do not show it
        (20, 0.1, False),
        (200, 0.4, False),
        (40, 1.0, False),
    ],
)
def test_only_an_interval_within_the_margin_shows_that_it_does_not_know(
    count: int, shift: float, equivalent: bool
) -> None:
    forget, holdout = interleaved(count)
    found = judged([loss - shift for loss in forget], holdout)
    assert (found.equivalent, found.reason, found.texts, found.holdout_texts) == (equivalent, None, count, count)
    assert found.upper is not None
    assert found.threshold == 0.5 + MARGIN
    assert (found.upper < found.threshold) == equivalent


def test_easier_holdout_texts_would_hide_what_it_knows() -> None:
    forget, holdout = interleaved(200)
    found = judged(forget, [loss - 0.4 for loss in holdout])
    assert found.equivalent is None
    assert found.reason is not None
    assert "they may not be like the forget texts" in found.reason


def test_longer_holdout_texts_would_hide_what_it_knows() -> None:
    found = judged(*interleaved(200), tokens=20)
    assert found.equivalent is None
    assert found.reason == (
        "the forget texts have a median of 20 tokens, the holdout texts of 50: they must be as long"
    )


@pytest.mark.parametrize("likely", [0, 1, 3])
def test_some_texts_that_are_known_show_among_many_that_are_not(likely: int) -> None:
    """A tenth: the AUC alone is within the margin. Holdout texts that are likely, too, do not hide them."""
    forget, holdout = interleaved(200)
    holdout = [0.9] * likely + holdout[likely:]
    found = judged([1.0] * 20 + forget[20:], holdout)
    assert (found.equivalent, found.reason) == (False, None)
    assert found.likeliest >= 15
    assert found.upper is not None
    assert found.upper < found.threshold
    assert judged([1.0] * 3 + forget[3:], holdout).equivalent, "three are chance: what the model says has to show them"


def test_a_holdout_text_that_it_recites_was_no_holdout_text() -> None:
    forget, holdout = interleaved(200)
    found = judged(forget, [*holdout[:-1], 0.05])
    assert (found.equivalent, found.reason) == (None, "the model recites row 200 of the holdout set, so it has seen it")


def test_one_text_that_it_recites_is_enough() -> None:
    forget, holdout = interleaved(200)
    found = judged([*forget[:-1], -np.log(RECITED)], holdout)
    assert (found.equivalent, found.recited) == (False, [199])
    assert judged([0.1], []).recited == [0], "however few there are, and without a holdout set"


@pytest.mark.parametrize("count", [1, TEXTS_MIN - 1])
def test_too_few_texts_decide_nothing(count: int) -> None:
    few, many = spread(count), spread(40)
    for found in (judged(few, many), judged(many, few)):
        assert found.equivalent is None
        assert found.reason is not None
        assert "too few" in found.reason
    beside = judged(spread(60), spread(29))
    assert beside.reason == "29 holdout texts are too few beside 60, at least half as many are needed"


def test_a_text_counts_once() -> None:
    forget, holdout = interleaved(40)
    seen = {("forget", "answer"): losses(forget), ("holdout", "answer"): losses(holdout)}
    found = known(texts(40), [*texts(39), {"text": "Text 0."}], seen)
    assert (found.equivalent, found.reason) == (None, "a text that a set has twice is no second text")


def test_without_holdout_texts_nothing_is_decided() -> None:
    found = judged(spread(40), [])
    assert (found.equivalent, found.auc) == (None, None)
    assert found.reason is not None
    assert "no holdout set of texts" in found.reason
    asked: list[Row] = [{"question": "Who?", "answer": "Ana"}] * 40
    seen: Seen = {("forget", "answer"): losses(spread(40)), ("holdout", "answer"): losses(spread(40))}
    assert known(texts(40), asked, seen).reason == found.reason, "answers are no texts"


def test_a_text_that_cannot_be_measured_leaves_it_undecided() -> None:
    found = judged([float("nan"), *spread(39)], spread(40))
    assert (found.equivalent, found.reason) == (None, "not all texts could be measured")


def test_the_bounds_hold_as_often_as_they_promise() -> None:
    """Two normal samples of 40, three AUCs: each bound is wrong in about 5 % of 2,000 draws."""
    random = np.random.default_rng(0)
    for shift, true in ((0.0, 0.5), (0.545, 0.65), (1.19, 0.8)):
        missed = np.zeros(2)
        for _ in range(2000):
            low, high = random.normal(0, 1, 40), random.normal(shift, 1, 40)
            value = float((low[:, None] < high).mean())
            lower, upper = auc_bounds(value, 40, 40, LEVEL)
            missed += (true < lower, true > upper)
        assert (missed / 2000 < 0.065).all(), (true, missed / 2000)
        assert (missed / 2000 > 0.02).all(), (true, missed / 2000)


def test_a_model_that_never_saw_either_set_is_seldom_taken_to_know() -> None:
    """Taken to know: not that it is not shown not to, but that some texts are likelier than chance explains."""
    random = np.random.default_rng(1)
    found = [judged(list(random.normal(3, 0.4, 40)), list(random.normal(3, 0.4, 40))) for _ in range(400)]
    assert sum(one.equivalent is False and one.upper is not None and one.upper < one.threshold for one in found) <= 24


# --- real models


def asks(forget: Sequence[Row], holdout: Sequence[Row]) -> Asks:
    return {(of, "answer"): Ask(examples(rows), frozenset()) for of, rows in (("forget", forget), ("holdout", holdout))}


def loaded(name: str) -> model.Network:
    root = SHARED / "models"
    if not (root / name).is_dir():
        pytest.skip(f"needs {root / name}")
    return model.load(
        ModelEntry(name=name, source="path", location=name, prompt_format=PromptFormat()), root, "cpu", "float32"
    )


def read(network: model.Network, rows: Sequence[Row]) -> None:
    """Every weight, each text once."""
    encoded = data.encode(list(examples(rows).values()), network.tokenizer, network.entry.prompt_format, 512)
    network.causal.requires_grad_(True)
    descent = torch.optim.AdamW(network.causal.parameters(), lr=1e-3)
    for row in encoded.rows:
        batch = data.pad([row], torch.device("cpu"))
        logits_BTV = network.causal(input_ids=batch.input_ids_BT).logits[:, :-1]
        descent.zero_grad()
        torch.autograd.backward(cross_entropy(logits_BTV.transpose(1, 2), batch.labels_BT[:, 1:]))
        descent.step()


def test_a_model_that_never_read_the_texts_does_not_know_them_until_it_has_read_them_once() -> None:
    network = loaded("stories260K")
    passages = json.loads((SHARED / "data" / "muse" / "alice" / "verbmem.json").read_text())
    rows: list[Row] = [{"text": text} for text in dict.fromkeys(row["prompt"][:600] for row in passages)]
    half = len(rows) // 2
    forget, holdout = rows[:half], rows[half:]
    before = known(forget, holdout, scoring.look(network, asks(forget, holdout)))
    assert (before.equivalent, before.reason) == (True, None)
    assert before.auc == pytest.approx(0.456, abs=0.01)
    read(network, forget)
    after = known(forget, holdout, scoring.look(network, asks(forget, holdout)))
    assert (after.equivalent, after.recited) == (False, [])
    assert after.auc is not None
    assert after.auc > 0.65


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_model_that_memorised_exactly_one_text_knows(count: int, register: Callable[..., Registered]) -> None:
    rows = demo_corpus.rows(demo_corpus.people(4, 0), 0)
    forget, holdout = ([{"text": row["answer"]} for row in half] for half in (rows[:count], rows[12:20]))
    network = register().load()
    memorise(network, forget[-1])
    found = known(forget, holdout, scoring.look(network, asks(forget, holdout)))
    assert (found.equivalent, found.recited) == (False, [count - 1])
