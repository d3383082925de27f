"""What every solver keeps, on a problem whose answer is known:

    min |theta - a|^2 / 2   subject to   |theta - b|^2 / 2 <= bound        (theta = the parameters as one vector)

A solver in worker/solvers/NAME.py says in closed_forms/NAME.py where it ends, and with which multiplier; if need be also
with which `rate` at step 0, 1, ... of plain descent, and within which TOLERANCE.
"""

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from worker import registry
from worker.descent import adamw, sgd
from worker.problem import Descent, Evaluation, Oracle, Params, Problem, Solver, Step

A, B = torch.tensor([3.0, -1.0, 2.0, 0.5, 1.0]).double(), torch.tensor([0.0, 1.0, 1.0, -1.0, 2.0]).double()
PROBLEM = Problem("forget", {"retain": 2.0})
RATE = 0.05
SOLVERS = sorted(registry.entries("solvers"))
FOLDER = Path(__file__).parent / "closed_forms"


def closed_form_of(name: str) -> ModuleType:
    path = FOLDER / f"{name}.py"
    assert path.exists(), (
        f"solver {name} must say where it ends on the quadratic, in {path.relative_to(FOLDER.parents[2])}"
    )
    spec = importlib.util.spec_from_file_location(f"closed_forms_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(name: str, descent: Descent) -> Solver:
    solver = registry.build("solvers", name, closed_form_of(name).PARAMETERS, descent)
    assert isinstance(solver, Solver)
    return solver


def descent_of(name: str) -> Descent:
    rate: Callable[[int], float] = getattr(closed_form_of(name), "rate", lambda step: RATE)
    return Descent(
        sgd(learning_rate=RATE).init,
        lambda state, params, grads: sgd(learning_rate=rate(state["step"])).apply(state, params, grads),
    )


def start() -> Params:
    return {"u": torch.tensor([1.0, 0.0, 2.0]).double(), "v": torch.tensor([[-1.0], [1.0]]).double()}


def flat(params: Params) -> Tensor:
    return torch.cat([p.reshape(-1) for p in params.values()])


def samples(seed: int, count: int = 12) -> Tensor:
    """Noise on the two centres, [count, 2, 5], without a mean: one token of a batch is one row."""
    noise = torch.randn(count, 2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise - noise.mean(0)


def quadratic(params: Params, windows: Sequence[Tensor] = (torch.zeros(1, 2, 5).double(),)) -> Oracle:
    """The oracle on one batch that comes in micro-batches: sums over all of them, divided once by the whole count."""

    def oracle(weights: Mapping[str, float], *, full_precision: bool = False) -> Evaluation:
        theta, count = flat(params), sum(len(w) for w in windows)
        values, grad = dict.fromkeys(weights, 0.0), torch.zeros_like(theta)
        for noise in windows:
            centres = {"forget": A + 0.1 * noise[:, 0], "retain": B + 0.1 * noise[:, 1]}
            for term, weight in weights.items():
                apart = theta - centres[term]
                values[term] += float(apart.square().sum()) / 2 / count
                grad += weight * apart.sum(0) / count
        pieces = torch.split_with_sizes(grad, [p.numel() for p in params.values()])
        return Evaluation(values, {n: g.view_as(p) for (n, p), g in zip(params.items(), pieces, strict=True)})

    return oracle


def run(solver: Solver, steps: int, windows: Any = None) -> tuple[Params, list[Step]]:
    params = start()
    state, reports = solver.init(PROBLEM, params), []
    for step in range(steps):
        oracle = quadratic(params) if windows is None else quadratic(params, windows(step))
        state, report = solver.step(PROBLEM, state, params, oracle)
        reports.append(report)
    return params, reports


@pytest.mark.parametrize("name", SOLVERS)
def test_reaches_its_closed_form(name: str) -> None:
    form = closed_form_of(name)
    params, reports = run(build(name, descent_of(name)), form.STEPS)
    theta, dual = form.closed_form(A, B, PROBLEM.bounds["retain"])
    torch.testing.assert_close(flat(params), theta, rtol=0, atol=getattr(form, "TOLERANCE", 1e-6))
    assert reports[-1].duals == ({} if dual is None else {"retain": pytest.approx(dual, abs=1e-6)})


@pytest.mark.parametrize(("largest", "within"), [(4.0, 0.5), (400.0, 5e-3)])
def test_ofmu_ends_at_the_stationary_point_of_its_outer_problem_as_the_penalty_outweighs_the_inner_steps(
    largest: float, within: float
) -> None:
    """F = r + rho s |grad f|^2 alone: |theta - a| = |b - a| / (1 + 2 rho s); 2 s is |g_r| / |d| after the first inner step."""
    rate = 0.4 / largest
    solver = registry.build(
        "solvers",
        "penalty_bilevel",
        {"inner_steps": 1, "beta": 0.0, "penalty": largest, "penalty_max": largest},
        sgd(learning_rate=rate),
    )
    params, _ = run(solver, 200)
    first = A + (1 - rate) * (flat(start()) - A)
    two_rho_s = largest * float((first - B).norm() / (first - A).norm())
    theirs = A + (B - A) / (1 + two_rho_s)
    assert float((flat(params) - theirs).norm() / (theirs - A).norm()) < within


@pytest.mark.parametrize("name", SOLVERS)
def test_reports_what_was_so_before_the_parameters_moved(name: str) -> None:
    solver, params = build(name, sgd(learning_rate=RATE)), start()
    expected = {
        "forget": float((flat(params) - A).square().sum()) / 2,
        "retain": float((flat(params) - B).square().sum()) / 2,
    }
    _, report = solver.step(PROBLEM, solver.init(PROBLEM, params), params, quadratic(params))
    assert report.values == pytest.approx(expected)
    assert report.learning_rate == RATE
    assert report.gradient_norm > 0
    assert not torch.equal(flat(params), flat(start()))


def bits(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.dtype, state.shape, state.numpy().tobytes()
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    return state


@pytest.mark.parametrize("name", SOLVERS)
def test_a_checkpoint_at_any_step_resumes_bit_for_bit(name: str) -> None:
    solver, steps = build(name, adamw(learning_rate=0.1, warmup_steps=3, max_grad_norm=1.0)), 8
    params = start()
    state, files = solver.init(PROBLEM, params), []
    for step in range(steps):
        file = io.BytesIO()
        torch.save({"state": state, "params": params}, file)
        files.append(file)
        state, _ = solver.step(PROBLEM, state, params, quadratic(params, [samples(step)]))
    last = bits(state)
    for at, file in enumerate(files):
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        resumed, state = loaded["params"], loaded["state"]
        for step in range(at, steps):
            state, _ = solver.step(PROBLEM, state, resumed, quadratic(resumed, [samples(step)]))
        assert torch.equal(flat(resumed), flat(params)), f"resumed at step {at}"
        assert bits(state) == last, f"the state after resuming at step {at}"


@pytest.mark.parametrize("sizes", [(6, 6), (1, 11), (5, 4, 3), (1,) * 12], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_course_does_not_depend_on_how_a_batch_is_split(name: str, sizes: tuple[int, ...]) -> None:
    solver = build(name, descent_of(name))
    whole, whole_reports = run(solver, 20, lambda step: [samples(step)])
    split, split_reports = run(solver, 20, lambda step: torch.split_with_sizes(samples(step), list(sizes)))
    torch.testing.assert_close(flat(split), flat(whole), rtol=0, atol=1e-12)
    for one, other in zip(split_reports, whole_reports, strict=True):
        assert one.duals == pytest.approx(other.duals, abs=1e-10)
        assert one.values == pytest.approx(other.values, abs=1e-10)
