"""Rotary positions that are rescaled for the longest row of a batch: a row says in any company what it says alone."""

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from service.domain.job import Lora
from worker import data, decoder, generation, measure, model, oracle, scoring
from worker.data import Encoded, TokenRow
from worker.losses.forget.margin_flattening import margin_flattening
from worker.losses.retain.nll import nll
from worker.model import Network
from worker.views import Term

LIMIT = 40  # tokens, from which on positions are rescaled
LENGTHS = [90, 12, LIMIT + 1, 60, LIMIT, 25, 60, LIMIT - 1]  # of rows
LONGROPE = {  # as Phi-3-mini-128k has it
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 5.0, 9.0]},
    "original_max_position_embeddings": LIMIT,
    "max_position_embeddings": 8 * LIMIT,
}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "max_position_embeddings": LIMIT,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {"longrope": ("phi3", LONGROPE), "dynamic": ("llama", DYNAMIC)}


@pytest.fixture(params=KINDS)
def fresh(request: pytest.FixtureRequest, register: Any) -> Callable[[], Network]:
    """A network that has read nothing yet."""
    model_type, config = KINDS[request.param]

    def load() -> Network:
        network = model.adapt(register(model_type, **config).load("float64"), Lora(r=2), 0)
        generator = torch.Generator().manual_seed(1)
        values = {n: torch.randn(p.shape, generator=generator) * 0.2 for n, p in model.trainable(network).items()}
        model.assign(network, values)
        return network

    return load


def rows_of(lengths: Iterable[int]) -> Encoded:
    """Rows of random tokens, so many of each."""
    draw = random.Random(0)
    rows = [TokenRow([0, *draw.choices(range(2, 270), k=length - 2), 1], answer_start=4) for length in lengths]
    return Encoded(rows, prompts=[row.ids[:4] for row in rows], answers=[""] * len(rows), unmeasured=[])


def logits(network: Network, row: TokenRow) -> tuple[Tensor, Tensor]:
    """Those that predict what counts [n, V], and the targets [n]; of a row that the model reads alone."""
    logits_TV = network.causal(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :, : network.vocabulary]
    return logits_TV[row.answer_start - 1 : -1], torch.tensor(row.ids[row.answer_start :])


def loss(network: Network, row: TokenRow) -> Tensor:
    z_nV, y_n = logits(network, row)
    return torch.nn.functional.cross_entropy(z_nV, y_n, reduction="sum")


@torch.no_grad()
def test_beside_a_row_beyond_the_limit_padding_alone_changes_what_a_row_says(fresh: Callable[[], Network]) -> None:
    """Or the tests below would have nothing to find."""
    assert decoder.rescaled_at(fresh()) == LIMIT
    (row,) = rows_of([12]).rows
    alone_TV = fresh().causal(input_ids=torch.tensor([row.ids])).logits[0]
    for length, changes in ((LIMIT, False), (LIMIT + 1, True)):
        padded_TV = fresh().causal(input_ids=torch.tensor([row.ids + [0] * (length - 12)])).logits[0]
        assert bool((padded_TV[:12] - alone_TV).abs().max() > 1e-3) is changes


def test_a_check_measures_each_row_as_if_it_were_alone(fresh: Callable[[], Network]) -> None:
    network = fresh()
    encoded = rows_of(LENGTHS)
    expected = [loss(fresh(), row).item() for row in encoded.rows]
    scores, _ = measure.score(network, Term(nll(), {"answer": encoded}), list(range(len(LENGTHS))))
    assert scores.nll_B.tolist() == pytest.approx(expected, abs=1e-5)


def test_an_evaluation_measures_each_row_as_if_it_were_alone(fresh: Callable[[], Network]) -> None:
    network, wanted = fresh(), frozenset({"logp", "standardised", "gradient_norm"})
    encoded = rows_of(LENGTHS)
    found = scoring.score(network, encoded.rows, wanted)
    assert found.nll_B.tolist() == pytest.approx([loss(fresh(), row).item() for row in encoded.rows], abs=1e-5)
    alone = [scoring.score(fresh(), [row], wanted) for row in encoded.rows]
    assert found.gradient_norm_B is not None
    assert found.gradient_norm_B.tolist() == pytest.approx([float(one.gradient_norm_B) for one in alone], abs=1e-5)  # type: ignore[arg-type]


def test_a_step_has_the_gradient_of_rows_read_one_at_a_time(fresh: Callable[[], Network]) -> None:
    """The forget rows with a second text of another length, as methods that refuse have it."""
    network = fresh()
    forget, refused, retain = (rows_of(lengths) for lengths in (LENGTHS[:4], LENGTHS[4:], LENGTHS[::-1]))
    terms = {
        "forget": Term(margin_flattening(), {"answer": forget, "refusal": refused}),
        "retain": Term(nll(), {"answer": retain}),
    }
    places = {"forget": range(4), "retain": range(len(LENGTHS))}
    params = model.trainable(network)
    found = oracle.make_oracle(network, params, terms, places).oracle({"forget": 0.7, "retain": 2.5})

    expected = [torch.zeros_like(p) for p in params.values()]
    for row in forget.rows:
        alone = fresh()
        z_nV, _ = logits(alone, row)
        value = 0.7 / forget.counted * (z_nV.max(-1).values - z_nV.mean(-1)).square().sum()
        _add(expected, value, alone)
    for row in retain.rows:
        alone = fresh()
        _add(expected, 2.5 / retain.counted * loss(alone, row), alone)
    for name, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(found.grads[name], gradient, rtol=0, atol=1e-8)
    assert any(g.abs().max() > 1e-3 for g in expected), "a gradient that is there to be compared"


def _add(sums: list[Tensor], value: Tensor, network: Network) -> None:
    for total, gradient in zip(sums, torch.autograd.grad(value, list(model.trainable(network).values())), strict=True):
        total += gradient


@torch.no_grad()
def test_so_do_the_layers_before_the_last(fresh: Callable[[], Network]) -> None:
    network = fresh()
    rows = rows_of(LENGTHS).rows
    padded = data.pad(rows, network.device)
    layers = decoder.states(network, padded.input_ids_BT, [len(row.ids) for row in rows], inner=True)
    assert len(layers) == 1 + 3, "the last, the embeddings, and both layers"
    for b, row in enumerate(rows):
        out = fresh().causal.get_decoder()(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
        for layer_BTD, alone_1TD in zip(layers, (out.last_hidden_state, *out.hidden_states), strict=True):
            torch.testing.assert_close(layer_BTD[b, : len(row.ids)], alone_1TD[0], rtol=0, atol=1e-9)


def test_an_answer_does_not_depend_on_what_was_asked_before(fresh: Callable[[], Network]) -> None:
    """Some answers begin before the limit and end behind it."""
    network, room = fresh(), 12
    prompts = [row.ids[:-1] for row in rows_of([12, 90, 60, LIMIT + 3, LIMIT - 3]).rows]
    together = generation.generate(network, prompts, room, beyond_context=True)
    assert [len(one.ids) for one in together] == [room] * len(prompts), "each is long enough to be compared"
    for prompt, one in zip(prompts, together, strict=True):
        assert generation.generate(fresh(), [prompt], room, beyond_context=True) == [one]


@torch.no_grad()
def test_an_answer_that_grows_beyond_the_limit_is_what_the_model_says_of_the_whole(register: Any) -> None:
    """Each token from the whole text before it; a cache of keys would hold those of the other factors."""
    network = register("phi3", **LONGROPE).load("float64")
    (row,) = rows_of([LIMIT - 3]).rows
    ids = row.ids[:-1]
    (answer,) = generation.generate(network, [ids], 12)
    for token in answer.ids:
        assert token == network.causal(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
        ids = [*ids, token]
    assert len(ids) > LIMIT + 2
