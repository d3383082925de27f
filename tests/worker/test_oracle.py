"""The oracle against plain autograd over whole logits, in float64, for every split into micro-batches."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from service.domain.job import Lora
from service.domain.rows import Example
from worker import data, model, oracle
from worker.data import Encoded, TokenRow
from worker.head import FusedPredictions
from worker.losses.forget.margin_flattening import margin_flattening
from worker.losses.retain.nll import nll
from worker.model import Network
from worker.problem import Evaluation, Method, Solver
from worker.tokens import Loss, View

FORGET = ["Who?| Paris and Lima.", "Where was she born?| In Lima", "?| Paris", "Which of her books came first?| a"]
RETAIN = ["What?| Water.", "Is it?| It is, and has been for as long as anybody knows", "A longer question?| Lima Paris"]
SPLITS = [1, 150, 300, 100_000]  # most padded positions of a micro-batch
FEWEST = 1e9  # the overhead that makes as few micro-batches as that allows
NO_SOLVER = Solver(lambda problem, params: None, lambda problem, state, params, oracle: None)  # type: ignore[arg-type,return-value]


def method(forget: Loss, retain: Loss) -> Method:
    return Method(forget, retain, NO_SOLVER, 4, 3)


PDU = method(margin_flattening(), nll())


def encode(network: Network, rows: list[str]) -> Encoded:
    examples = [Example("question", *row.split("|")) for row in rows]
    return data.encode(examples, network.tokenizer, network.entry.prompt_format, network.context_tokens)


def adapted(network: Network) -> Network:
    """With an adapter that does something."""
    network = model.adapt(network, Lora(r=2), 0)
    generator = torch.Generator().manual_seed(1)
    values = {n: torch.randn(p.shape, generator=generator) * 0.2 for n, p in model.trainable(network).items()}
    model.assign(network, values)
    return network


@pytest.fixture(params=["tied", "plain-head"])
def network(request: pytest.FixtureRequest, register: Any) -> Network:
    scaled = {"model_type": "granite", "logits_scaling": 8.0}  # (Gemma's attention is float32 whatever it is loaded as)
    network = adapted(register(**(scaled if request.param == "plain-head" else {})).load("float64"))
    assert (network.head is None) == (request.param == "plain-head")
    return network


def ask(network: Network, how: Method, weights: Mapping[str, float], max_tokens: int = 100_000) -> Evaluation:
    forget, retain = encode(network, FORGET), encode(network, RETAIN)
    params = model.trainable(network)
    batch = oracle.make_oracle(network, how, params, forget, range(4), retain, range(3), max_tokens)
    return batch.oracle(weights)


def plain_rows(network: Network, row: TokenRow) -> tuple[Tensor, Tensor]:
    """Of one row alone, from the model's whole logits: those that predict what counts [n, V], and the targets [n]."""
    logits_TV = network.causal(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :, : network.vocabulary]
    return logits_TV[row.answer_start - 1 : -1], torch.tensor(row.ids[row.answer_start :])


def plain(network: Network) -> dict[str, Tensor]:
    """Both terms as their definitions have them: means over all counted tokens of the set."""
    margins, losses = [], []
    for row in encode(network, FORGET).rows:
        z_nV, _ = plain_rows(network, row)
        margins.append(z_nV.max(-1).values - z_nV.mean(-1))
    for row in encode(network, RETAIN).rows:
        z_nV, y_n = plain_rows(network, row)
        losses.append(torch.nn.functional.cross_entropy(z_nV, y_n, reduction="none"))
    return {"forget": torch.cat(margins).square().mean(), "retain": torch.cat(losses).mean()}


@pytest.mark.parametrize("weights", [{"forget": 0.7, "retain": 2.5}, {"forget": 1.0, "retain": 0.0}, {"retain": 1.0}])
@pytest.mark.parametrize("max_tokens", SPLITS)
def test_values_and_gradients_are_those_of_plain_autograd(
    network: Network, max_tokens: int, weights: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "overhead_tokens", lambda network: FEWEST)
    params = model.trainable(network)
    expected = plain(network)
    total = torch.stack([weight * expected[term] for term, weight in weights.items()]).sum()
    gradients = torch.autograd.grad(total, list(params.values()))
    here = ask(network, PDU, weights, max_tokens)
    assert here.values.keys() == weights.keys()
    for term, value in here.values.items():
        assert value == pytest.approx(expected[term].item(), rel=1e-12, abs=1e-9)
    assert here.grads.keys() == params.keys()
    for name, gradient in zip(params, gradients, strict=True):
        torch.testing.assert_close(here.grads[name], gradient, rtol=0, atol=1e-9)
    assert any(g.abs().max() > 1e-3 for g in here.grads.values()), "a gradient that is there to be compared"


def test_the_splits_differ(tiny: Network) -> None:
    """Or the test above would compare one micro-batch with itself."""
    lengths = [len(row.ids) for rows in (FORGET, RETAIN) for row in encode(tiny, rows).rows]
    assert [len(data.microbatches(lengths, FEWEST, budget)) for budget in SPLITS] == [7, 3, 2, 1]


def test_asking_leaves_no_trace(network: Network) -> None:
    params = model.trainable(network)
    before = {name: p.detach().clone() for name, p in params.items()}
    batch = oracle.make_oracle(network, PDU, params, encode(network, FORGET), [0, 2], encode(network, RETAIN), [1])
    first = batch.oracle({"forget": 1.0, "retain": 2.0})
    kept = {name: g.clone() for name, g in first.grads.items()}
    second = batch.oracle({"forget": 1.0, "retain": 2.0})
    assert first.values == second.values
    for name, p in params.items():
        assert p.grad is None
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0)
        torch.testing.assert_close(first.grads[name], kept[name], rtol=0, atol=0, msg="the gradients are the caller's")
        torch.testing.assert_close(second.grads[name], kept[name], rtol=0, atol=0)


def test_values_alone_need_no_backward_pass(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "backward", lambda self: pytest.fail("a backward pass"))
    here = ask(network, PDU, {"forget": 0.0, "retain": 0.0})
    expected = plain(network)
    assert here.values == {term: pytest.approx(value.item()) for term, value in expected.items()}
    assert not any(g.any() for g in here.grads.values())


def test_the_first_answer_token_is_predicted_from_the_prompts_last(tiny: Network) -> None:
    """Three of prompt, three of answer: positions 2, 3, 4; of the second row, in the other set, 8 + 0 and 8 + 1."""
    part = oracle.pack(
        [("forget", TokenRow([9, 8, 7, 6, 5, 4, 3, 2], 3)), ("retain", TokenRow([2, 3, 4], 1))], torch.device("cpu")
    )
    assert part.shares["forget"].at_N.tolist() == [2, 3, 4, 5, 6]
    assert part.shares["forget"].answers.target_N.tolist() == [6, 5, 4, 3, 2]
    assert part.shares["retain"].at_N.tolist() == [8, 9]
    assert part.shares["retain"].answers.target_N.tolist() == [3, 4]
    assert part.shares["retain"].answers.row_N.tolist() == [0, 0], "rows are numbered within the set"
    assert part.shares["retain"].answers.rows == 1


def test_the_head_runs_only_where_a_token_counts(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    logp_N, margin_N = FusedPredictions.logp_N, FusedPredictions.margin_N
    monkeypatch.setattr(FusedPredictions, "logp_N", lambda self: seen.append(len(self.last_ND)) or logp_N(self))  # type: ignore[func-returns-value]
    monkeypatch.setattr(FusedPredictions, "margin_N", lambda self: seen.append(len(self.last_ND)) or margin_N(self))  # type: ignore[func-returns-value]
    network = adapted(tiny)
    ask(network, PDU, {"forget": 1.0, "retain": 1.0})
    assert sum(seen) == encode(network, FORGET).counted + encode(network, RETAIN).counted


def row_sums(view: View, values_N: Tensor) -> Tensor:
    return values_N.new_zeros(view.answers.rows).index_add_(0, view.answers.row_N, values_N)


def against_reference() -> Loss:
    """A number per row that needs the reference: the squared log ratio of the whole answer."""

    def fn(views: Mapping[str, View]) -> Tensor:
        view = views["answer"]
        assert view.reference is not None
        return row_sums(view, view.now.logp_N() - view.reference.logp_N()).square()

    return Loss(fn, per="row", needs=frozenset({"reference"}))


@pytest.mark.parametrize("max_tokens", SPLITS)
def test_a_row_loss_against_the_reference(network: Network, max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is the network with the adapter off, and takes no gradient; the mean is over rows."""
    monkeypatch.setattr(oracle, "overhead_tokens", lambda network: FEWEST)
    params = model.trainable(network)
    assert network.peft is not None

    def logp(row: TokenRow) -> Tensor:
        z_nV, y_n = plain_rows(network, row)
        return -torch.nn.functional.cross_entropy(z_nV, y_n, reduction="sum")

    rows = encode(network, FORGET).rows
    with network.peft.disable_adapter(), torch.no_grad():
        reference = [logp(row) for row in rows]
    expected = torch.stack([(logp(row) - r).square() for row, r in zip(rows, reference, strict=True)]).mean()
    gradients = torch.autograd.grad(expected, list(params.values()))
    here = ask(network, method(against_reference(), nll()), {"forget": 1.0, "retain": 0.0}, max_tokens)
    assert here.values["forget"] == pytest.approx(expected.item(), rel=1e-9)
    for name, gradient in zip(params, gradients, strict=True):
        torch.testing.assert_close(here.grads[name], gradient, rtol=1e-9, atol=1e-9)


def test_states_within_the_network_are_there_for_a_loss_that_needs_them(tiny: Network) -> None:
    network = adapted(tiny)

    def fn(views: Mapping[str, View]) -> Tensor:
        return views["answer"].now.hidden_ND(0.5).square().sum(-1)

    here = ask(network, method(Loss(fn, per="token", needs=frozenset({"hidden"})), nll()), {"forget": 1.0}, 90)
    sums = []
    for row in encode(network, FORGET).rows:
        out = network.causal(input_ids=torch.tensor([row.ids]), output_hidden_states=True, use_cache=False)
        sums.append(out.hidden_states[1][0, row.answer_start - 1 : -1].square().sum(-1))
    assert here.values["forget"] == pytest.approx(torch.cat(sums).mean().item(), rel=1e-9)


def test_a_step_of_a_tiny_model_is_one_micro_batch(tiny: Network) -> None:
    """Starting another one would take longer than the padding that it saves."""
    lengths = [len(row.ids) for rows in (FORGET, RETAIN) for row in encode(tiny, rows).rows]
    assert len(data.microbatches(lengths, oracle.overhead_tokens(tiny), oracle.MAX_TOKENS)) == 1


def test_tokens_are_those_that_are_trained_on(tiny: Network) -> None:
    network = adapted(tiny)
    forget, retain = encode(network, FORGET), encode(network, RETAIN)
    batch = oracle.make_oracle(network, PDU, model.trainable(network), forget, [1], retain, [0, 2])
    assert batch.tokens == len(forget.rows[1].ids) + len(retain.rows[0].ids) + len(retain.rows[2].ids)


def test_a_bfloat16_base_gives_float32_gradients(register: Any) -> None:
    # A margin's gradient jumps where two logits are nearly equal, so the directions are compared on the retain term.
    exact = ask(adapted(register().load("float32")), PDU, {"forget": 0.0, "retain": 1.0})
    here = ask(adapted(register().load("bfloat16")), PDU, {"forget": 0.0, "retain": 1.0})
    assert {g.dtype for g in here.grads.values()} == {torch.float32}
    for term, value in here.values.items():
        assert value == pytest.approx(exact.values[term], rel=0.1)
    ours, theirs = (torch.cat([g.flatten() for g in e.grads.values()]) for e in (here, exact))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.97
