"""The verdict on models with known faults is what an expert would say after asking them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from service.domain.job import Lora, ModelEntry, PromptFormat
from tests.worker import planted
from worker import (
    appraisal,
    disclosure,
    disclosures,
    equivalence,
    evaluate,
    generation,
    model,
    run,
    scoring,
    text_equivalence,
)
from worker.equivalence import MARGIN
from worker.model import Network
from worker.scores import Scores
from worker.suite import Row

SHARED = Path(os.environ.get("UNLEARN_SHARED", "../shared"))
ALONE = SimpleNamespace(parent=None, spec=SimpleNamespace(seed=0))  # of a job: it starts from no other
EARLIER = "ujob_" + 32 * "1"
FORGET, RETAIN = planted.corpus()


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Network:
    """It knows all people by heart."""
    return planted.memorised(tmp_path_factory.mktemp("models"), [*FORGET, *RETAIN], [*FORGET, *RETAIN])


@pytest.fixture
def judged(knowing: Network, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """judged(what it is taught to answer, how unlikely it is to find the right answers) -> the verdict on it."""

    def judge(answers: Sequence[Row], nats: float) -> Any:
        return planted.verdict(
            model.adapt(planted.reloaded(knowing), Lora(), 0),
            planted.taught(planted.reloaded(knowing), [*answers, *RETAIN], FORGET, nats),
            FORGET,
            RETAIN,
            ALONE,
            epsilon=1.0,
        )

    return judge


def test_who_says_the_secret_in_other_words_is_failed_by_what_it_says(judged: Any) -> None:
    found = judged([row | {"answer": row["paraphrased_answer"]} for row in FORGET], nats=4.0)
    results = planted.results(found)
    assert (results["forget_probability"], results["retain_nll"]) == ("PASSED", "PASSED"), found.message
    assert (results["disclosure"], found.result) == ("FAILED", "FAILED")


def test_noise_is_warned_of(judged: Any) -> None:
    noise = [row | {"answer": " ".join(["Tartu", "Porto", "Tartu"] * 3)} for row in FORGET]
    found = judged(noise, nats=4.0)
    assert (planted.results(found)["language"], found.result) == ("WARNED", "WARNED"), found.message
    assert "idk_dpo" in found.message, "the way out"


def test_who_says_something_else_passes(judged: Any) -> None:
    random = Random(0)
    found = judged([row | {"answer": random.choice(row["perturbed_answer"])} for row in FORGET], nats=1.5)
    assert found.result == "PASSED", found.message


def test_rows_that_it_never_knew_need_not_become_unlikelier(knowing: Network) -> None:
    """They are trained with the others, but none is held against a tenth of the little that it had."""
    random, strangers = Random(0), planted.strangers()
    other = [row | {"answer": random.choice(row["perturbed_answer"])} for row in FORGET]
    found = planted.verdict(
        model.adapt(planted.reloaded(knowing), Lora(), 0),
        planted.taught(planted.reloaded(knowing), [*other, *RETAIN], FORGET, 1.5),
        [*FORGET, *strangers],
        RETAIN,
        ALONE,
        epsilon=1.0,
    )
    assert planted.results(found)["forget_rows"] == "PASSED", found.message
    assert any("Not judged singly" in gate.message for gate in found.gates)


def test_answers_that_the_figures_were_taken_of_are_judged_and_not_generated_again(
    knowing: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = model.adapt(planted.reloaded(knowing), Lora(), 0)
    of = planted.case(network, FORGET, RETAIN)
    given = evaluate.given(of.request, scoring.look(network, of.request.suite.asks(of.request.sets)))
    targets = of.plan.targets["forget"]
    whole = disclosure.probes(network, targets, 0, ["question"])
    cut = [probe._replace(tokens=2) for probe in whole]
    anew = [disclosure.answers(network, targets, planned) for planned in (whole, cut)]
    assert anew[0] != anew[1]
    generated: list[int] = []
    own = generation.generate
    monkeypatch.setattr(
        generation,
        "generate",
        lambda n, prompts, *rest, **named: generated.append(len(prompts)) or own(n, prompts, *rest, **named),  # type: ignore[func-returns-value]
    )
    assert [disclosure.answers(network, targets, planned, given["forget"]) for planned in (whole, cut)] == anew
    assert sum(generated) == 0
    disclosure.answers(network, targets, [probe._replace(tokens=201) for probe in whole], {targets[0].place: [5] * 200})
    assert sum(generated) == len(whole), "what was broken off before the end, too"


QUESTIONS = [{key: value for key, value in row.items() if key in ("question", "answer")} for row in FORGET]
PROMPTS = [{"prompt": f"Question: {row['question']}\nAnswer:\n", "completion": row["answer"]} for row in FORGET]
TEXTS = [{"text": f"Question: {row['question']}\nAnswer:\n{row['answer']}"} for row in FORGET]


@pytest.mark.parametrize("forget", [FORGET, QUESTIONS, PROMPTS, TEXTS], ids=["whole", "question", "prompt", "text"])
def test_a_model_that_was_left_as_it_is_fails(knowing: Network, forget: Sequence[Row]) -> None:
    left = model.adapt(planted.reloaded(knowing), Lora(), 0)
    found = planted.verdict(left, left, forget, RETAIN, ALONE, epsilon=1.0)
    results = planted.results(found)
    assert (results["forget_probability"], results["disclosure"], found.result) == ("FAILED",) * 3, found.message


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_one_row_that_is_known_is_trained(knowing: Network, rows: int) -> None:
    """Below six rows nothing is decided by likelihood; from six on a row that is recited decides. What the model says shows it by
    itself among few rows; among more, chance on the others, whose values come from short lists, covers one."""
    chosen = [FORGET[1], *planted.strangers()[: rows - 1]]
    network = model.adapt(planted.reloaded(knowing), Lora(), 0)
    of = planted.case(network, chosen, RETAIN)
    before = appraisal.before(network, of, ALONE, None)  # type: ignore[arg-type]
    assert appraisal.not_known(network, of, before, None) is None
    if rows <= 3:
        assert before.knowledge.answers is not None
        nothing = before.knowledge.answers._replace(equivalent=True, upper=0.0, recited=[])
        unlikely = before._replace(knowledge=before.knowledge._replace(answers=nothing))
        assert appraisal.not_known(network, of, unlikely, None) is None, "by what it says alone"


def test_people_it_never_heard_of_are_not_known(knowing: Network) -> None:
    network = model.adapt(planted.reloaded(knowing), Lora(), 0)
    of = planted.case(network, planted.strangers(), RETAIN)
    before = appraisal.before(network, of, ALONE, None)  # type: ignore[arg-type]
    found = appraisal.not_known(network, of, before, None)
    assert found is not None, before.knowledge
    assert found.verdict.result == "NOT_KNOWN"
    known = planted.case(network, FORGET, RETAIN)
    assert appraisal.not_known(network, known, appraisal.before(network, known, ALONE, None), None) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mean", "upper", "forgotten_by"), [(0.1, 0.3, None), (0.5, 0.6, "trains"), (1.0, 1.2, EARLIER)]
)
def test_of_a_base_that_may_know_the_rows_nobody_says_that_they_were_forgotten(
    knowing: Network, monkeypatch: pytest.MonkeyPatch, mean: float, upper: float, forgotten_by: str | None
) -> None:
    """The likelihoods of the base are planted; what it starts from does not know the rows."""
    network = model.adapt(planted.reloaded(knowing), Lora(), 0)
    of = planted.case(network, planted.strangers(), RETAIN)
    before = appraisal.before(network, of, ALONE, None)  # type: ignore[arg-type]
    assert before.knowledge.answers is not None
    base = before.knowledge.answers._replace(equivalent=upper < MARGIN, mean=mean, upper=upper)
    monkeypatch.setattr(equivalence, "known", lambda *_: base)
    found = appraisal.not_known(network, of, before, EARLIER)
    assert (found.verdict.forgotten_by if found else "trains") == forgotten_by


def test_rows_are_named_by_their_number_in_the_file() -> None:
    texts = [{"text": "Ana lives in Ghent."}, {"text": "Ben lives in Porto."}]
    likely = Scores([0, 1], torch.tensor([50.0, 1.0]), torch.tensor([20, 20]))
    knows = appraisal.Known(None, text_equivalence.known(texts, [], {("forget", "answer"): likely}))
    _, [found] = knows.facts("base", places=[0, 3])
    assert found.recited == [4], "two rows between them could not be measured"


def test_texts_that_it_never_read_are_not_known_beside_others_like_them(knowing: Network) -> None:
    """And one among them that it has read is enough to train, as are those that nothing can be compared with."""
    network = model.adapt(planted.reloaded(knowing), Lora(), 0)
    unread = [{"text": f"Question: {row['question']}\nAnswer:\n{row['answer']}"} for row in planted.strangers(20)]
    forget, holdout = unread[::2], unread[1::2]

    def untrained(forget: Sequence[Row], holdout: Sequence[Row]) -> appraisal.NotKnown | None:
        of = planted.case(network, forget, RETAIN, holdout=holdout)
        return appraisal.not_known(network, of, appraisal.before(network, of, ALONE, None), None)  # type: ignore[arg-type]

    found = untrained(forget, holdout)
    assert found is not None
    assert (found.verdict.result, found.knowledge) == ("NOT_KNOWN", [])
    assert [(one.rows, one.holdout_rows) for one in found.text_knowledge] == [(len(forget), len(holdout))]
    assert untrained([*forget, TEXTS[2]], holdout) is None
    assert untrained(forget, []) is None
    of = planted.case(network, forget, RETAIN, holdout=holdout)
    chained = SimpleNamespace(parent="ujob_1", spec=SimpleNamespace(seed=0))
    before = appraisal.before(network, of, chained, None)  # type: ignore[arg-type]
    assert before.knowledge.texts is not None
    assert before.knowledge.texts.equivalent is None, "an earlier job may have trained on the holdout set"


def test_a_check_counts_what_it_generates(knowing: Network) -> None:
    """Nothing if the likelihoods say enough; up to the first way of asking that discloses; or every greedy way."""
    network = model.adapt(planted.reloaded(knowing), Lora(), 0)
    of = planted.case(network, FORGET, RETAIN)
    before = appraisal.before(network, of, ALONE, None)  # type: ignore[arg-type]
    assert not run.checked(network, of, before, 1.0, 1.0).generation_tokens, "rows are above their limits"
    lenient = before._replace(limits=before.limits._replace(rows=dict.fromkeys(before.limits.rows, 1.0)))
    assert not run.checked(network, of, lenient, 0.0, 1.0).generation_tokens, "the bound is broken"
    found = run.checked(network, of, lenient, 1.0, 1.0)
    assert not found.forgotten
    assert found.generation_tokens == generated(network, of, ["question"])
    silent = planted.taught(
        planted.reloaded(knowing), [row | {"answer": "Nobody knows."} for row in FORGET] + RETAIN, FORGET
    )
    found = run.checked(silent, of, lenient, 10.0, 1.0)
    assert found.forgotten
    assert found.generation_tokens == generated(silent, of, disclosures.GREEDY)


def generated(network: Network, of: appraisal.Case, ways: Sequence[str]) -> int:
    """Tokens of all prompts and answers."""
    probes = disclosure.probes(network, of.plan.targets["forget"], 0, ways)
    answers = disclosure.generated(network, probes)
    return sum(map(len, (probe.prompt for probe in probes))) + sum(len(one.ids) for one in answers)


# --- TOFU


def tofu(name: str) -> Network:
    root = SHARED / "models"
    if not (root / name).is_dir():
        pytest.skip(f"needs {root / name}")
    entry = ModelEntry(name=name, source="path", location=name, prompt_format=PromptFormat())
    return model.adapt(model.load(entry, root, "cpu", "float32"), Lora(), 0)


def rows_of(name: str) -> list[Row]:
    return [json.loads(line) for line in (SHARED / "data" / "tofu" / f"{name}.json").read_text().splitlines()]


@pytest.mark.slow
def test_a_retrained_model_passes_and_is_not_conspicuous() -> None:
    full, retrained = tofu("tofu260K_full"), tofu("tofu260K_retain")
    forget, retain = rows_of("forget01_perturbed"), rows_of("full")[:400]
    found = planted.verdict(full, retrained, forget, retain, ALONE, epsilon=0.4)
    results = planted.results(found)
    assert (found.result, results["conspicuous"]) == ("PASSED", "PASSED"), found.message


@pytest.mark.slow
def test_a_retrained_model_does_not_know_what_it_never_saw() -> None:
    forget, retain = rows_of("forget01_perturbed"), rows_of("full")[:400]
    for name, verdict in (("tofu260K_retain", "NOT_KNOWN"), ("tofu260K_full", None)):
        network = tofu(name)
        of = planted.case(network, forget, retain)
        found = appraisal.not_known(network, of, appraisal.before(network, of, ALONE, None), None)  # type: ignore[arg-type]
        assert (found and found.verdict.result) == verdict
