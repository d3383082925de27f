"""The oracle against plain autograd over whole logits, in float64, for every split into micro-batches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, multiprocessing

from service.domain.job import Lora
from service.domain.microbatches import microbatches
from service.domain.rows import Example
from worker import data, model, oracle, reference
from worker.data import Encoded, TokenRow
from worker.descent import sgd
from worker.head import FusedPredictions
from worker.losses.forget.margin_flattening import margin_flattening
from worker.losses.retain.hidden_distance import hidden_distance
from worker.losses.retain.kl import kl
from worker.losses.retain.nll import nll
from worker.model import Network
from worker.problem import Evaluation, Problem
from worker.solvers.augmented_lagrangian import augmented_lagrangian
from worker.solvers.bilevel_projection import bilevel_projection
from worker.solvers.gradient_surgery import gradient_surgery
from worker.solvers.penalty_bilevel import penalty_bilevel
from worker.solvers.primal_dual import primal_dual
from worker.tokens import Loss, View, row_sums
from worker.views import Term, pack

FORGET = ["Who?| Paris and Lima.", "Where was she born?| In Lima", "?| Paris", "Which of her books came first?| a"]
RETAIN = ["What?| Water.", "Is it?| It is, and has been for as long as anybody knows", "A longer question?| Lima Paris"]
REFUSED = [
    "Who?| I cannot say.",
    "Where was she born?| No idea",
    "?| I do not know",
    "Which of her books came first?| ?",
]
PLACES = {"forget": range(4), "retain": range(3)}
SPLITS = [1, 150, 300, 100_000]  # most padded positions of a micro-batch
FEWEST = 1e9  # the overhead that makes as few micro-batches as that allows


class Losses(NamedTuple):
    forget: Loss
    retain: Loss


PDU = Losses(margin_flattening(), nll())


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


def terms(network: Network, losses: Losses = PDU) -> dict[str, Term]:
    """With what the reference says of every row, where a loss needs that."""
    texts = {"answer": encode(network, FORGET), "refusal": encode(network, REFUSED)}
    if "refusal" not in losses.forget.needs:
        del texts["refusal"]
    made = {"forget": Term(losses.forget, texts), "retain": Term(losses.retain, {"answer": encode(network, RETAIN)})}
    for name, term in made.items():
        if reference.needed(term):
            places = list(PLACES[name])
            stored = reference.by_place(reference.compute(network, term, places), term, places)
            made[name] = term._replace(reference=stored)
    return made


def ask(
    network: Network,
    losses: Losses,
    weights: Mapping[str, float],
    max_tokens: int = 100_000,
    *,
    full_precision: bool = False,
) -> Evaluation:
    network = network._replace(tokens_at_once=max_tokens)
    batch = oracle.make_oracle(network, model.trainable(network), terms(network, losses), PLACES)
    return batch.oracle(weights, full_precision=full_precision)


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
    assert [len(microbatches(lengths, FEWEST, budget)) for budget in SPLITS] == [7, 3, 2, 1]


def test_asking_leaves_no_trace(network: Network) -> None:
    params = model.trainable(network)
    before = {name: p.detach().clone() for name, p in params.items()}
    batch = oracle.make_oracle(network, params, terms(network), {"forget": [0, 2], "retain": [1]})
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
    sides = {
        "forget": Term(nll(), {"answer": Encoded([TokenRow([9, 8, 7, 6, 5, 4, 3, 2], 3)], [[]], [""], [])}),
        "retain": Term(nll(), {"answer": Encoded([TokenRow([2, 3, 4], 1)], [[]], [""], [])}),
    }
    part = pack(sides, [("forget", 0), ("retain", 0)], torch.device("cpu"))
    forget, retain = part.shares["forget"]["answer"], part.shares["retain"]["answer"]
    assert forget.at_N.tolist() == [2, 3, 4, 5, 6]
    assert forget.answers.target_N.tolist() == [6, 5, 4, 3, 2]
    assert retain.at_N.tolist() == [8, 9]
    assert retain.answers.target_N.tolist() == [3, 4]
    assert retain.answers.row_N.tolist() == [0, 0], "rows are numbered within the set"
    assert retain.answers.rows == 1


def test_the_head_runs_only_where_a_token_counts(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    logp_N, margin_N = FusedPredictions.logp_N, FusedPredictions.margin_N
    monkeypatch.setattr(FusedPredictions, "logp_N", lambda self: seen.append(len(self.last_ND)) or logp_N(self))  # type: ignore[func-returns-value]
    monkeypatch.setattr(FusedPredictions, "margin_N", lambda self: seen.append(len(self.last_ND)) or margin_N(self))  # type: ignore[func-returns-value]
    network = adapted(tiny)
    ask(network, PDU, {"forget": 1.0, "retain": 1.0})
    assert sum(seen) == encode(network, FORGET).counted + encode(network, RETAIN).counted


def against_reference() -> Loss:
    """A number per row that needs the reference: the squared log ratio of the whole answer."""

    def fn(views: Mapping[str, View]) -> Tensor:
        view = views["answer"]
        assert view.reference is not None
        return row_sums(view.answers, view.now.logp_N() - view.reference.logp_N()).square()

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
    here = ask(network, Losses(against_reference(), nll()), {"forget": 1.0, "retain": 0.0}, max_tokens)
    assert here.values["forget"] == pytest.approx(expected.item(), rel=1e-9)
    for name, gradient in zip(params, gradients, strict=True):
        torch.testing.assert_close(here.grads[name], gradient, rtol=1e-9, atol=1e-9)


def test_states_within_the_network_are_there_for_a_loss_that_needs_them(tiny: Network) -> None:
    network = adapted(tiny)

    def fn(views: Mapping[str, View]) -> Tensor:
        return views["answer"].now.hidden_ND().square().sum(-1)

    here = ask(network, Losses(Loss(fn, per="token", depth=0.5), nll()), {"forget": 1.0}, 90)
    sums = []
    for row in encode(network, FORGET).rows:
        out = network.causal(input_ids=torch.tensor([row.ids]), output_hidden_states=True, use_cache=False)
        sums.append(out.hidden_states[1][0, row.answer_start - 1 : -1].square().sum(-1))
    assert here.values["forget"] == pytest.approx(torch.cat(sums).mean().item(), rel=1e-9)


def test_a_step_of_a_tiny_model_is_one_micro_batch(tiny: Network) -> None:
    """Starting another one would take longer than the padding that it saves."""
    lengths = [len(row.ids) for rows in (FORGET, RETAIN) for row in encode(tiny, rows).rows]
    assert len(microbatches(lengths, oracle.overhead_tokens(tiny), tiny.tokens_at_once)) == 1


def test_tokens_are_those_that_are_trained_on(tiny: Network) -> None:
    network = adapted(tiny)
    forget, retain = encode(network, FORGET), encode(network, RETAIN)
    batch = oracle.make_oracle(network, model.trainable(network), terms(network), {"forget": [1], "retain": [0, 2]})
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


def test_full_precision_on_a_bfloat16_base_is_the_float32_model_and_leaves_no_trace(register: Any) -> None:
    """Differences of gradients need it: their cosine with those of a float32 forward pass, with and without."""

    def difference(network: Network, **how: bool) -> Tensor:
        params = model.trainable(network)
        found = []
        for sign in (1.0, -1.0):
            generator = torch.Generator().manual_seed(3)
            shift = {n: torch.randn(p.shape, generator=generator) * 1e-4 * sign for n, p in params.items()}
            model.assign(network, {n: p.detach() + shift[n] for n, p in params.items()})
            here = ask(network, PDU, {"retain": 1.0}, **how)
            model.assign(network, {n: p.detach() - shift[n] for n, p in params.items()})
            found.append(torch.cat([g.flatten() for g in here.grads.values()]))
        return found[0] - found[1]

    low = adapted(register().load("bfloat16"))
    wide = adapted(register().load("float32"))
    for p, q in zip(wide.causal.parameters(), low.causal.parameters(), strict=True):
        p.data.copy_(q.data)  # the same numbers in a wider type
    bits = [p.detach().clone() for p in low.causal.parameters() if not p.requires_grad]
    exact = difference(wide)
    assert torch.cosine_similarity(difference(low, full_precision=True), exact, dim=0) > 0.9999
    assert torch.cosine_similarity(difference(low), exact, dim=0) < 0.9
    for p, before in zip([p for p in low.causal.parameters() if not p.requires_grad], bits, strict=True):
        assert p.dtype == before.dtype
        assert torch.equal(p, before)


@pytest.mark.parametrize("loss", [kl(), hidden_distance(depth=0.5)], ids=["kl", "hidden_distance"])
def test_a_bfloat16_reference_serves_in_full_precision_too(register: Any, loss: Loss) -> None:
    low = adapted(register().load("bfloat16"))
    losses = Losses(margin_flattening(), loss)
    wide, narrow = (ask(low, losses, {"retain": 1.0}, full_precision=full) for full in (True, False))
    assert wide.values["retain"] == pytest.approx(narrow.values["retain"], rel=0.1)
    assert wide.values["retain"] > 0


# --- pairs and proxies


def preferred() -> Loss:
    """A number per row of both texts and the reference: how much more the answer rose than the refusal, squared."""

    def fn(views: Mapping[str, View]) -> Tensor:
        def rise(text: str) -> Tensor:
            view = views[text]
            assert view.reference is not None
            return row_sums(view.answers, view.now.logp_N() - view.reference.logp_N())

        return (rise("answer") - rise("refusal")).square()

    return Loss(fn, per="row", needs=frozenset({"reference", "refusal"}))


@pytest.mark.parametrize("max_tokens", SPLITS)
def test_a_pair_stays_together_under_every_split(
    network: Network, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "overhead_tokens", lambda network: FEWEST)
    params = model.trainable(network)
    assert network.peft is not None

    def rise(rows: list[str]) -> Tensor:
        def logp() -> Tensor:
            each = [plain_rows(network, row) for row in encode(network, rows).rows]
            return torch.stack([-torch.nn.functional.cross_entropy(z, y, reduction="sum") for z, y in each])

        with network.peft.disable_adapter(), torch.no_grad():  # type: ignore[union-attr]
            before = logp()
        return logp() - before

    expected = (rise(FORGET) - rise(REFUSED)).square().mean()
    gradients = torch.autograd.grad(expected, list(params.values()))
    here = ask(network, Losses(preferred(), nll()), {"forget": 1.0, "retain": 0.0}, max_tokens)
    assert here.values["forget"] == pytest.approx(expected.item(), rel=1e-9)
    for name, gradient in zip(params, gradients, strict=True):
        torch.testing.assert_close(here.grads[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("max_tokens", SPLITS)
def test_what_is_bounded_is_the_nll_even_if_something_else_is_trained(
    network: Network, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "overhead_tokens", lambda network: FEWEST)
    sides = terms(network, Losses(nll(), margin_flattening()))
    sides["retain"] = sides["retain"]._replace(proxy=True)
    network = network._replace(tokens_at_once=max_tokens)
    batch = oracle.make_oracle(network, model.trainable(network), sides, PLACES)
    here, alone = batch.oracle({"forget": 0.5, "retain": 2.0}), batch.oracle({"forget": 1.0})
    assert here.strict == {"retain": pytest.approx(plain(network)["retain"].item(), rel=1e-12)}
    assert here.bounded == {"forget": here.values["forget"]} | dict(here.strict)
    assert here.values["retain"] != pytest.approx(here.bounded["retain"])
    assert alone.strict == {}, "only of the terms that were asked for"


# --- several processes


def one_of_two(rank: int, folder: str, registered: Any) -> None:
    """In a process of its own: evaluate and step as one of two, and keep what came out."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        network = adapted(registered.load())
        torch.save([evaluations(network), courses(network)], f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def evaluations(network: Network) -> list[Any]:
    """Of a Lagrangian, of one term (whose two micro-batches go one to each process), and of a single micro-batch."""
    sides = terms(network, Losses(margin_flattening(), margin_flattening()))
    sides["retain"] = sides["retain"]._replace(proxy=True)
    params = model.trainable(network)
    small = oracle.make_oracle(network._replace(tokens_at_once=40), params, sides, PLACES).oracle
    large = oracle.make_oracle(network, params, sides, PLACES).oracle
    asked = [small({"forget": 0.7, "retain": 2.5}), small({"retain": 1.0}), large({"forget": 1.0, "retain": 0.0})]
    return [(here.values, dict(here.strict), here.grads) for here in asked]


def courses(network: Network) -> list[Any]:
    """Three steps of each solver: what it reports, the direction's length and the coefficients in it, and where it ends."""
    sides, problem = terms(network), Problem("forget", {"retain": 2.0})
    params = model.trainable(network)
    start = {name: p.detach().clone() for name, p in params.items()}
    batch = oracle.make_oracle(network._replace(tokens_at_once=40), params, sides, PLACES)
    found = []
    descent = sgd(learning_rate=1e-3)
    for solver in (
        primal_dual(descent),
        augmented_lagrangian(descent),
        bilevel_projection(descent),
        gradient_surgery(descent),
        penalty_bilevel(descent, inner_steps=1, beta=0.0),
    ):
        model.assign(network, start)
        state = solver.init(problem, params)
        for _ in range(3):
            state, report = solver.step(problem, state, params, batch.oracle)
            found.append((report.values, report.duals, report.gradient_norm, report.extra))
        found.append({name: p.detach().clone() for name, p in params.items()})
    return found


@pytest.mark.slow
def test_two_processes_give_what_one_gives(register: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients, the composed direction, and the course of the multiplier."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # a spawned process looks for this module there
    multiprocessing.spawn(one_of_two, (str(tmp_path), register()), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    network = adapted(register().load())
    expected = [evaluations(network), courses(network)]
    for rank in (0, 1):
        # differences of gradients (penalty_bilevel) make rounding larger by the inverse of their distance
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-6, atol=1e-9)
