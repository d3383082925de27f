"""What every loss keeps, on a model small enough to differentiate by hand. A new file in worker/losses/ is found by itself.

The model: embeddings, a causal running mean over the row, one trained layer, a frozen head. Its float64 numbers are exact
to about 1e-15, so that "equal" below means equal.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from worker import registry
from worker.head import FusedPredictions, Head
from worker.problem import Params
from worker.tokens import Loss, View, counted

D, V, PAD = 6, 17, 0
LOSSES = sorted(registry.entries("losses"))
Row = tuple[list[int], list[int]]  # prompt, answer
Views = Mapping[str, View]
ROWS: list[Row] = [([3, 5, 2], [7, 1, 4]), ([9], [8]), ([6, 6], [2, 12, 11, 10, 3]), ([1, 2, 3, 4], [5, 16])]
REFUSALS: list[Row] = [(prompt, [13, 14]) for prompt, _ in ROWS]

# What a loss may say that descent on it moves down (Loss.lowers), and how that is measured.
QUANTITIES: Mapping[str, Callable[[View], Tensor]] = {
    "answer_logp": lambda view: view.now.logp_N().mean(),
    "answer_nll": lambda view: -view.now.logp_N().mean(),
    "answer_margin": lambda view: view.now.margin_N().mean(),
}


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Loss:
    built = registry.build("losses", request.param, {})
    assert isinstance(built, Loss)
    return built


def model(seed: int) -> Params:
    return {"mix_DD": torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


def frozen(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    width = max(len(p) + len(a) for p, a in rows)
    ids = [[*p, *a, *[PAD] * (width - len(p) - len(a))] for p, a in rows]
    labels = [[*[-100] * len(p), *a, *[-100] * (width - len(p) - len(a))] for p, a in rows]
    return torch.tensor(ids), torch.tensor(labels)


def states(params: Params, ids_BT: Tensor) -> list[Tensor]:
    """[B, T, D] after the embeddings and after the trained layer."""
    embedded = frozen(V, D)[ids_BT]
    past = embedded.cumsum(1) / torch.arange(1, ids_BT.shape[1] + 1)[None, :, None]
    return [embedded, (past @ params["mix_DD"]).tanh() * 2]


def view(params: Params, reference: Params, rows: Sequence[Row]) -> View:
    ids_BT, labels_BT = padded(rows)
    answers, at_N = counted(ids_BT, labels_BT)

    def predictions(of: Params) -> FusedPredictions:
        layers = [state.reshape(-1, D)[at_N] for state in states(of, ids_BT)]
        return FusedPredictions(layers[-1], answers.target_N, Head(frozen(V, D)), layers)

    return View(answers, predictions(params), predictions(reference))


def views(params: Params, rows: Sequence[int] = range(len(ROWS)), *, seed: int = 1) -> Views:
    pick = lambda texts: [texts[i] for i in rows]  # noqa: E731
    reference = model(seed + 100)
    return {"answer": view(params, reference, pick(ROWS)), "refusal": view(params, reference, pick(REFUSALS))}


def test_a_number_for_each_token_or_row(loss: Loss) -> None:
    given = views(model(1))
    numbers = loss.fn(given)
    tokens = len(given["answer"].answers.target_N)
    assert numbers.shape == ((tokens,) if loss.per == "token" else (len(ROWS),))
    assert numbers.dtype == torch.float64
    assert torch.isfinite(numbers).all()


def test_rows_do_not_see_each_other(loss: Loss) -> None:
    together = loss.fn(views(model(1)))
    alone = torch.cat([loss.fn(views(model(1), [row])) for row in range(len(ROWS))])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)


def test_the_gradient_is_the_derivative(loss: Loss) -> None:
    params = {"mix_DD": model(1)["mix_DD"].requires_grad_()}
    assert torch.autograd.gradcheck(lambda mix_DD: loss.fn(views({"mix_DD": mix_DD})), (params["mix_DD"],))


def compositions(rows: int) -> Iterator[list[list[int]]]:
    """Every way to cut the rows, in order, into micro-batches."""
    for cuts in itertools.product([False, True], repeat=rows - 1):
        parts: list[list[int]] = [[0]]
        for row, cut in enumerate(cuts, 1):
            if cut:
                parts.append([])
            parts[-1].append(row)
        yield parts


def test_exact_under_every_split_into_micro_batches(loss: Loss) -> None:
    """A sum over micro-batches divided by the count of the whole batch is the batch's mean, and so is its gradient."""

    def mean_and_grad(parts: list[list[int]]) -> tuple[Tensor, Tensor]:
        mix_DD = model(1)["mix_DD"].requires_grad_()
        numbers = [loss.fn(views({"mix_DD": mix_DD}, part)) for part in parts]
        mean = sum((part.sum() for part in numbers), torch.zeros(())) / sum(len(part) for part in numbers)
        (grad,) = torch.autograd.grad(mean, mix_DD)
        return mean.detach(), grad

    whole = mean_and_grad([list(range(len(ROWS)))])
    for parts in compositions(len(ROWS)):
        torch.testing.assert_close(mean_and_grad(parts), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_small_descent_step_lowers_the_loss_and_what_it_says_it_lowers(loss: Loss, seed: int) -> None:
    assert loss.lowers in QUANTITIES, f"say in QUANTITIES how {loss.lowers!r} is measured"
    params = {"mix_DD": model(seed)["mix_DD"].requires_grad_()}
    before = views(params, seed=seed)
    value, quantity = loss.fn(before).mean(), QUANTITIES[loss.lowers](before["answer"])
    (grad,) = torch.autograd.grad(value, params["mix_DD"])
    after = views({"mix_DD": (params["mix_DD"] - 1e-4 * grad / grad.norm()).detach()}, seed=seed)
    assert grad.norm() > 0
    assert loss.fn(after).mean() < value
    assert QUANTITIES[loss.lowers](after["answer"]) < quantity


def test_moves_the_predictions_of_the_answer_and_nothing_else(loss: Loss) -> None:
    """Prompt of three, answer of three: position 2 predicts the first answer token, position 5 predicts nothing that counts."""
    ids_BT, labels_BT = torch.tensor([[3, 5, 2, 7, 1, 4]]), torch.tensor([[-100, -100, -100, 7, 1, 4]])
    answers, at_N = counted(ids_BT, labels_BT)
    states_TD = frozen(6, D).requires_grad_()
    given = dict(views(model(1), [0]))
    layers = [states_TD[at_N], states_TD[at_N]]
    now = FusedPredictions(states_TD[at_N], answers.target_N, Head(frozen(V, D)), layers)
    given["answer"] = View(answers, now, given["answer"].reference)
    (grad_TD,) = torch.autograd.grad(loss.fn(given).sum(), states_TD)
    assert grad_TD.norm(dim=1).nonzero()[:, 0].tolist() == [2, 3, 4]


class Asked:
    """Predictions that remember that somebody looked at them."""

    def __init__(self, inner: FusedPredictions, tell: Callable[[str], None], name: str) -> None:
        self._inner, self._tell, self._name = inner, tell, name

    def hidden_ND(self, depth: float) -> Tensor:
        self._tell(self._name)
        if depth != 1.0:
            self._tell("hidden")
        return self._inner.hidden_ND(depth)

    def __getattr__(self, name: str) -> Any:
        self._tell(self._name)
        return getattr(self._inner, name)


def test_needs_exactly_what_it_says(loss: Loss) -> None:
    asked: set[str] = set()

    class Recording(dict[str, View]):
        def __getitem__(self, name: str) -> View:
            asked.add(name)
            answers, now, reference = super().__getitem__(name)
            assert isinstance(now, FusedPredictions)
            assert isinstance(reference, FusedPredictions)
            return View(answers, Asked(now, asked.add, name), Asked(reference, asked.add, "reference"))

    loss.fn(Recording(views(model(1))))
    assert asked - {"answer"} == loss.needs
    assert "answer" in asked
