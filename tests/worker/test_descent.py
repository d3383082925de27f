"""Descent against torch.optim, its schedule and clipping by hand, and its state through a checkpoint."""

import io
import math
from collections.abc import Callable

import pytest
import torch

from worker.descent import adamw, sgd
from worker.problem import Descent, Params

SHAPES = {"a": (3, 4), "b": (5,), "c": ()}


def numbers(seed: int, dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("descent", "torch_optimizer"),
    [
        (adamw(learning_rate=0.01, max_grad_norm=2.0), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0)),
        (
            adamw(learning_rate=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, max_grad_norm=2.0),
            lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        ),
        (sgd(learning_rate=0.01, max_grad_norm=2.0), lambda p: torch.optim.SGD(p, lr=0.01)),
    ],
    ids=["adamw", "adamw-all", "sgd"],
)
def test_equals_torch(descent: Descent, torch_optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    params = numbers(0)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = torch_optimizer(leaves.values())
    state = descent.init(params)
    for step in range(10):
        grads = {name: g * 0.6 for name, g in numbers(step + 1).items()}  # norms on both sides of 2
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        expected_norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 2.0)
        optimizer.step()
        state, norm, _ = descent.apply(state, params, grads)
        assert norm == pytest.approx(float(expected_norm))
    for name, p in params.items():
        torch.testing.assert_close(p, leaves[name].detach(), rtol=1e-5, atol=0)  # torch clips to 2 / (norm + 1e-6)


def test_parameters_move_in_place_also_as_leaves_that_require_a_gradient() -> None:
    leaf = torch.tensor([1.0], requires_grad=True)
    descent = sgd(learning_rate=0.5)
    descent.apply(descent.init({"x": leaf}), {"x": leaf}, {"x": torch.tensor([2.0])})
    assert leaf.item() == 0.0
    assert leaf.requires_grad


def test_warm_up_is_linear_in_steps() -> None:
    for descent in (sgd(learning_rate=8.0, warmup_steps=4), adamw(learning_rate=8.0, warmup_steps=4)):
        params, rates = {"x": torch.zeros(1)}, []
        state = descent.init(params)
        for _ in range(6):
            state, _, rate = descent.apply(state, params, {"x": torch.ones(1)})
            rates.append(rate)
        assert rates == [2, 4, 6, 8, 8, 8]


def test_clipping_is_by_the_norm_of_all_parameters_together() -> None:
    params = {"x": torch.zeros(1), "y": torch.zeros(1)}
    descent = sgd(learning_rate=1.0, max_grad_norm=1.0)
    _, norm, _ = descent.apply(descent.init(params), params, {"x": torch.tensor([3.0]), "y": torch.tensor([4.0])})
    assert norm == 5.0
    assert [params["x"].item(), params["y"].item()] == pytest.approx([-0.6, -0.8])


def test_a_zero_gradient_is_no_division_by_zero() -> None:
    params = {"x": torch.ones(2)}
    descent = adamw(learning_rate=1.0, max_grad_norm=1.0)
    _, norm, _ = descent.apply(descent.init(params), params, {"x": torch.zeros(2)})
    assert norm == 0.0
    assert params["x"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("descent", [adamw(learning_rate=0.1, warmup_steps=3), sgd(learning_rate=0.1, warmup_steps=3)])
def test_resumes_bit_for_bit_and_leaves_old_states_alone(descent: Descent) -> None:
    params = numbers(0, torch.float32)
    state = descent.init(params)
    for step in range(2):
        state, _, _ = descent.apply(state, params, numbers(step, torch.float32))
    file = io.BytesIO()
    torch.save({"state": state, "params": params}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for step in range(2, 5):
        state, _, _ = descent.apply(state, params, numbers(step, torch.float32))
        loaded["state"], _, _ = descent.apply(loaded["state"], loaded["params"], numbers(step, torch.float32))
    assert all(torch.equal(p, loaded["params"][name]) for name, p in params.items())
    assert all(math.isfinite(float(p.sum())) for p in params.values())
