"""What a model said is kept and found again: only for the very same question to the very same model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer

from service.domain.job import Lora
from service.domain.rows import Example
from service.store.storage import Storage
from worker import looks, model, scoring
from worker.model import Network
from worker.scores import Scores
from worker.suite import Ask, Asks, Convention

VIEWS = frozenset({"hits", "logp", "standardised", "gradient_norm", "labels", "generated"})
ROWS = {0: ("Where?", " Lima"), 2: ("Who lives in\u2028Paris?", " nobody ☺"), 5: ("What?", " this")}


def asks(views: frozenset[str] = VIEWS, **changed: Any) -> dict[tuple[str, str], Ask]:
    texts = {place: Example("question", *row) for place, row in ROWS.items()}
    return {
        ("forget", "answer"): Ask(texts, views, 4, **changed),
        ("forget", "wrong"): Ask({0: Example("question", "Where?", " Paris")}, frozenset({"logp"})),
        ("forget", "prompt"): Ask(texts, frozenset({"generated"}), 4, scored=False),
    }


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def passes(network: Network, asked: Asks, storage: Storage) -> int:
    count: list[None] = []
    handle = network.causal.get_decoder().register_forward_pre_hook(lambda *_: count.append(None))
    try:
        scoring.look(network, asked, storage)
    finally:
        handle.remove()
    return len(count)


def assert_equal(a: Scores, b: Scores) -> None:
    for name, x, y in zip(Scores._fields, a, b, strict=True):
        if name in looks.TOKENS and x is not None:
            assert y is not None
            assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(x, y, strict=True)), name
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, y), name
            assert x.dtype == y.dtype, name
        else:
            assert x == y, name


def test_a_second_job_on_the_same_base_runs_no_forward_pass(register: Any, storage: Storage) -> None:
    first = scoring.look(register().load("float32"), asks(), storage)
    again = register().load("float32")
    assert passes(again, asks(), storage) == 0
    second = scoring.look(again, asks(), storage)
    plain = scoring.look(again, asks())
    assert first.keys() == second.keys() == plain.keys()
    for key in first:
        assert_equal(first[key], second[key])
        assert_equal(first[key], plain[key])
    assert second["forget", "answer"].labels == {0: " Lima", 2: " nobody ☺", 5: " this"}
    assert second["forget", "prompt"].places == []


def test_only_what_is_new_is_computed(register: Any, storage: Storage) -> None:
    network = register().load("float32")
    scoring.look(network, {key: ask for key, ask in asks().items() if key != ("forget", "wrong")}, storage)
    lone = {("forget", "wrong"): asks()["forget", "wrong"]}
    expected = scoring.look(network, lone)
    assert 0 < passes(network, asks(), storage) <= 2
    assert_equal(scoring.look(network, asks(), storage)["forget", "wrong"], expected["forget", "wrong"])


def adapted(base: Network, seed: int = 0) -> Network:
    network = model.adapt(base, Lora(r=2), seed)
    with torch.no_grad():
        for p in model.trainable(network).values():
            p.add_(0.1)
    return network


CHANGES: dict[str, Callable[[Any], tuple[Network, Asks]]] = {
    "another base": lambda register: (register(initializer_range=0.3).load("float32"), asks()),
    "another type": lambda register: (register().load("bfloat16"), asks()),
    "an adapter": lambda register: (adapted(register().load("float32")), asks()),
    "a row's text": lambda register: (
        register().load("float32"),
        {
            key: ask._replace(texts=ask.texts | {0: Example("question", "Where?", " Peru")})
            for key, ask in asks().items()
        },
    ),
    "a row's place": lambda register: (
        register().load("float32"),
        {
            key: ask._replace(texts={place + 1: text for place, text in ask.texts.items()})
            for key, ask in asks().items()
        },
    ),
    "the set": lambda register: (
        register().load("float32"),
        {("retain", text): ask for (_, text), ask in asks().items()},
    ),
    "the version of a library": lambda register: (register().load("float32"), asks()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_look_depends_on_is_in_its_name(
    change: str, register: Any, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring.look(register().load("float32"), asks(), storage)
    network, asked = CHANGES[change](register)
    if change == "the version of a library":
        monkeypatch.setattr(transformers, "__version__", "9.9.9")
    assert passes(network, asked, storage) > 0
    assert passes(network, asked, storage) == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"max_new_tokens": 5},
        {"stops": ("x",)},
        {"convention": Convention(shots=(("Who?", "Ada"),))},
        {"beyond_context": True},
        {"views": VIEWS - {"hits"}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_was_asked_is_in_its_name(changed: dict[str, Any], tiny: Network, storage: Storage) -> None:
    ask = asks()["forget", "answer"]
    scoring.look(tiny, {("forget", "answer"): ask}, storage)
    assert passes(tiny, {("forget", "answer"): ask._replace(**changed)}, storage) > 0


def test_how_answers_are_generated_does_not_matter_to_likelihoods(tiny: Network, storage: Storage) -> None:
    ask = asks(frozenset({"logp"}))["forget", "answer"]
    scoring.look(tiny, {("forget", "answer"): ask}, storage)
    assert passes(tiny, {("forget", "answer"): ask._replace(max_new_tokens=7)}, storage) == 0


def test_an_adapter_is_known_by_what_it_is_now(register: Any) -> None:
    base = register().load("float32")
    assert looks.adapter_digest(base) == "base"
    network = adapted(base)
    before = looks.adapter_digest(network)
    assert before == looks.adapter_digest(adapted(register().load("float32")))
    assert before != "base"
    with model.adapter_off(network):
        assert looks.adapter_digest(network) == "base"
    with torch.no_grad():
        next(iter(model.trainable(network).values())).view(-1)[0] += 1e-6
    changed = looks.adapter_digest(network)
    assert changed != before
    for layer in network.causal.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling = {name: 2 * scale for name, scale in layer.scaling.items()}
    assert looks.adapter_digest(network) != changed


def test_what_was_damaged_is_computed_again(tiny: Network, storage: Storage) -> None:
    expected = scoring.look(tiny, asks(), storage)
    for path in Path(storage.root).rglob("*"):
        if path.is_file():
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(bytes(content))
    assert passes(tiny, asks(), storage) > 0, "one bit differs"
    assert passes(tiny, asks(), storage) == 0, "and is mended"
    for path in Path(storage.root).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:100])
    again = scoring.look(tiny, asks(), storage)
    for key in expected:
        assert_equal(expected[key], again[key])


def test_without_a_cache_nothing_is_kept(tiny: Network, storage: Storage) -> None:
    scoring.look(tiny, asks())
    assert not list(Path(storage.root).iterdir())
