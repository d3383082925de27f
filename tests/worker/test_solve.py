"""The loop against a one-dimensional problem whose course can be worked out by hand.

forget(x) = (x - 4)^2, retain(x) = x: a step of plain descent moves x towards 4, and x <= bound is the constraint.
"""

import math
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, NamedTuple

import pytest
import torch

from worker.problem import Evaluation, Oracle, Params, Problem, Solver, Step
from worker.solve import (
    CHECK_SHARE,
    DIVERGING_STEPS,
    FORWARD_SHARE,
    Batch,
    Checked,
    Limits,
    Progress,
    Run,
    StopReason,
    solve,
)


class Measurement(NamedTuple):
    forget_objective: float
    forget_probability: float
    retain_loss: float
    retain_upper: float
    forgotten: bool
    generation_tokens: int


def descend(rate: float, violation: Callable[[int], float] | None = None, *, capped: bool = False) -> Solver:
    """`violation` of a step (0-based), for what happens at a multiplier's cap."""

    def step(problem: Problem, state: int, params: Params, oracle: Oracle) -> tuple[int, Step]:
        here = oracle({"forget": 1.0, "retain": 0.0})
        params["x"] -= rate * here.grads["x"]
        values = (
            here.values if violation is None else here.values | {"retain": problem.bounds["retain"] + violation(state)}
        )
        return state + 1, Step(values, {}, rate, float(here.grads["x"].abs()), capped=capped)

    return Solver(lambda problem, params: 0, step)


def run(
    *,
    bound: float = 10.0,
    rate: float = 0.125,  # x after k steps: 4 (1 - 0.75^k)
    max_steps: int = 8,
    target: float | None = None,
    check_tokens: int = 0,
    generates: Callable[[float], int] = lambda x: 0,  # tokens of a check
    poison: int | None = None,
    upper_by: float = 0.0,
    ask_at: int | None = None,
    ask: StopReason = StopReason.CANCELLED,
    max_seconds: float = math.inf,
    course: list[tuple[float, float]] | None = None,  # objective and probability of each check
    violation: Callable[[int], float] | None = None,
    capped: bool = False,
    keep: Callable[[Run, Params], None] = lambda here, params: None,
    resumed: Run | None = None,
    params: Params | None = None,
) -> tuple[Run, Params, list[Progress], list[tuple[Checked, bool]]]:
    params = params or {"x": torch.zeros(1, dtype=torch.float64)}
    steps: list[Progress] = []
    checks: list[tuple[Checked, bool]] = []

    def batch(step: int) -> Batch:
        def oracle(weights: Mapping[str, float], *, full_precision: bool = False) -> Evaluation:
            x = float(params["x"])
            gradient = math.nan if step == poison else 2 * (x - 4)
            return Evaluation({"forget": (x - 4) ** 2, "retain": x}, {"x": torch.tensor([gradient]).double()})

        return Batch(oracle, tokens=10)

    def check() -> Measurement:
        x = float(params["x"])
        objective, probability = ((x - 4) ** 2, 1 / (1 + x)) if course is None else course[len(checks)]
        forgotten = target is not None and probability <= target
        return Measurement(objective, probability, x, x + upper_by, forgotten, generates(x))

    ticks = count()
    solution = solve(
        Problem("forget", {"retain": bound}),
        descend(rate, violation, capped=capped),
        params,
        batch,
        check,
        check_tokens,
        Limits(max_steps, max_seconds),
        on_step=steps.append,
        on_check=lambda checked, improves, seconds: checks.append((checked, improves)),
        asked=lambda: ask if ask_at is not None and len(steps) >= ask_at else None,
        keep=lambda here: keep(here, params),
        resumed=resumed,
        clock=lambda: float(next(ticks)),
    )
    return solution, params, steps, checks


def x_after(step: int) -> float:
    return 4 * (1 - 0.75**step)


def test_budget_used_and_the_last_iterate_is_best_when_all_are_feasible() -> None:
    solution, params, steps, _ = run()
    assert solution.stop.reason is StopReason.MAX_STEPS
    assert [s.step for s in steps] == list(range(1, 9))
    assert solution.best is not None
    assert solution.best.step == solution.steps == 8
    assert params["x"].item() == pytest.approx(x_after(8))
    assert solution.best_params is not None
    torch.testing.assert_close(solution.best_params["x"], params["x"])


def test_the_best_iterate_is_the_last_that_kept_the_bound_not_the_last() -> None:
    solution, params, _, checks = run(bound=x_after(3) + 1e-9)
    assert solution.best is not None
    assert solution.best.step == 3
    assert solution.best_params is not None
    assert solution.best_params["x"].item() == pytest.approx(x_after(3))
    assert params["x"].item() == pytest.approx(x_after(8)), "the parameters themselves are left where the run ended"
    assert [c.step for c, _ in checks] == [1, 2, 3, 4, 8], "a step's batch lags one step behind; the end is checked too"
    assert not solution.last.feasible  # type: ignore[union-attr]


def test_the_untouched_parameters_are_no_candidate() -> None:
    solution, *_ = run(bound=0.5)  # x = 0 would keep the bound; x after one step is 1
    assert solution.best is None
    assert solution.best_params is None
    assert solution.last is not None
    assert not solution.last.feasible


def test_a_sampled_check_is_judged_by_its_upper_bound() -> None:
    solution, *_ = run(bound=x_after(3) + 1e-9, upper_by=x_after(3) - x_after(2))
    assert solution.best is not None
    assert solution.best.step == 2


def test_target_is_reached_only_by_a_check_that_keeps_the_bound() -> None:
    solution, *_ = run(target=1 / (1 + x_after(4)) + 1e-9)
    assert solution.stop.reason is StopReason.TARGET_REACHED
    assert solution.steps == 4
    infeasible, *_ = run(target=1 / (1 + x_after(4)) + 1e-9, bound=x_after(3) + 1e-9)
    assert infeasible.stop.reason is StopReason.MAX_STEPS


def test_non_finite_stops_before_the_parameters_are_touched() -> None:
    solution, params, steps, _ = run(poison=5)
    assert solution.stop.reason is StopReason.NON_FINITE
    assert "Step 6" in solution.stop.message
    assert len(steps) == solution.steps == 5
    assert params["x"].item() == pytest.approx(x_after(5))
    assert solution.best is not None, "what was reached before is not thrown away"


def test_checks_use_a_bounded_share_of_the_work() -> None:
    _, _, steps, checks = run(max_steps=100, check_tokens=90)
    between = checks[:-1]  # the closing one aside
    assert len(between) == 4
    assert len(between) * 90 * FORWARD_SHARE <= CHECK_SHARE * 10 * len(steps)


def test_what_checks_generate_is_work_of_theirs() -> None:
    """A step is 10 tokens. 100 generated ones are 50 of them, which is a fifth of the work of 25 steps."""
    _, _, _, checks = run(max_steps=100, generates=lambda x: 100)
    assert [check.step for check, _ in checks] == [1, 26, 51, 76, 100]
    _, _, _, checks = run(max_steps=100, check_tokens=60, generates=lambda x: 100)
    assert [check.step for check, _ in checks] == [15, 55, 95, 100], "beside the forward pass"
    _, _, _, checks = run(max_steps=12, generates=lambda x: 40 if x < x_after(2) else 0)
    assert [check.step for check, _ in checks] == [1, *range(11, 13)], "each waits for the one before it alone"


def test_the_check_that_reaches_the_target_is_released_even_if_another_had_a_lower_objective() -> None:
    solution, params, _, checks = run(target=0.2, course=[(5.0, 0.3), (6.0, 0.1)])
    assert solution.stop.reason is StopReason.TARGET_REACHED
    assert [improves for _, improves in checks] == [True, True]
    assert solution.best is not None
    assert solution.best.measured.forget_probability == 0.1
    assert solution.best_params is not None
    torch.testing.assert_close(solution.best_params["x"], params["x"])


def test_an_iterate_whose_objective_is_not_finite_is_no_candidate() -> None:
    solution, *_ = run(max_steps=3, course=[(math.nan, 0.3), (6.0, 0.2), (7.0, 0.1)])
    assert solution.best is not None
    assert solution.best.step == 2


def test_the_smallest_time_budget_still_buys_a_step() -> None:
    solution, *_ = run(max_seconds=1e-9)
    assert solution.stop.reason is StopReason.MAX_SECONDS
    assert solution.steps == 1


def test_cancel_and_time_limit_end_between_steps() -> None:
    cancelled, _, _, checks = run(ask_at=3)
    assert cancelled.stop.reason is StopReason.CANCELLED
    assert cancelled.steps == 3
    assert len(checks) == 3
    late, *_ = run(max_seconds=11)
    assert late.stop.reason is StopReason.MAX_SECONDS
    assert 0 < late.steps < 8
    assert late.last is not None
    assert late.last.step == late.steps


# --- where a run stands


def stopped_and_gone_on(at: int, bound: float = 10.0, **how: Any) -> tuple[Run, Run, list[int]]:
    """(undisturbed, ended after a step and gone on, the steps of the second half)"""
    whole, *_ = run(bound=bound, **how)
    kept: list[tuple[Run, Params]] = []
    run(bound=bound, keep=lambda here, params: kept.append((here, {"x": params["x"].clone()})), **how)
    here, params = next((here, params) for here, params in kept if here.steps == at)
    gone_on, _, steps, _ = run(bound=bound, resumed=here, params=params, **how)
    return whole, gone_on, [progress.step for progress in steps]


@pytest.mark.parametrize("at", [1, 2, 25, 26, 40])
def test_checks_that_generate_are_due_at_the_same_steps_in_a_run_that_goes_on(at: int) -> None:
    how: dict[str, Any] = {"max_steps": 60, "generates": lambda x: 100}
    kept: list[tuple[Run, Params]] = []
    *_, whole = run(keep=lambda here, params: kept.append((here, {"x": params["x"].clone()})), **how)
    here, params = next((here, params) for here, params in kept if here.steps == at)
    *_, rest = run(resumed=here, params=params, **how)
    assert [check.step for check, _ in rest] == [check.step for check, _ in whole if check.step > at]


@pytest.mark.parametrize("at", range(1, 8))
def test_a_run_goes_on_from_where_it_was_kept(at: int) -> None:
    bound = x_after(3) + 1e-9  # the best iterate is behind or ahead
    whole, gone_on, steps = stopped_and_gone_on(at, bound)
    assert steps == list(range(at + 1, 9))
    assert (gone_on.steps, gone_on.tokens, gone_on.stop) == (whole.steps, whole.tokens, whole.stop)
    assert gone_on.best is not None
    assert gone_on.best == whole.best
    assert gone_on.best_params is not None
    assert whole.best_params is not None
    assert torch.equal(gone_on.best_params["x"], whole.best_params["x"])
    assert gone_on.last == whole.last


def test_the_time_before_counts_too() -> None:
    kept: list[Run] = []
    run(keep=lambda here, params: kept.append(here), max_steps=4)
    late, _, steps, _ = run(resumed=kept[1]._replace(elapsed_s=1e6), max_seconds=1e6 - 1)
    assert late.stop is not None
    assert late.stop.reason is StopReason.MAX_SECONDS
    assert len(steps) == 1


def test_a_run_at_its_end_is_not_taken_up_again() -> None:
    kept: list[Run] = []
    whole, *_ = run(keep=lambda here, params: kept.append(here))
    again, _, steps, checks = run(resumed=kept[-1], max_steps=100)
    assert kept[-1].stop == whole.stop
    assert again.stop == whole.stop
    assert steps == []
    assert checks == []


def test_a_pause_ends_between_steps_without_a_check() -> None:
    kept: list[Run] = []
    paused, _, steps, checks = run(ask_at=3, ask=StopReason.PAUSED, keep=lambda here, params: kept.append(here))
    assert paused.stop is not None
    assert paused.stop.reason is StopReason.PAUSED
    assert len(steps) == len(checks) == 3
    assert kept[-1] is paused


# --- a multiplier that has come to its cap


@pytest.mark.parametrize(
    ("violation", "stops"),
    [
        (lambda step: 0.1 * (step + 1), DIVERGING_STEPS),  # worse and worse
        (lambda step: 100.0 / (1 + step), None),  # on its way back
        (lambda step: 1.0 + 0.05 * (step % 2), None),  # neither
        (lambda step: 0.3 * (1 - math.exp(-(step + 1) / 10)), None),  # it levels off
        (lambda step: 5e-5 * (step + 1), None),  # next to nothing: the bound is 1
        (lambda step: -1.0 if step == DIVERGING_STEPS - 5 else 0.1 * step, 2 * DIVERGING_STEPS - 4),  # once kept
    ],
)
def test_a_violation_that_grows_at_the_cap_ends_the_run(violation: Callable[[int], float], stops: int | None) -> None:
    ended, _, steps, _ = run(max_steps=3 * DIVERGING_STEPS, violation=violation, capped=True, bound=1.0)
    assert ended.stop is not None
    assert ended.stop.reason is (StopReason.MAX_STEPS if stops is None else StopReason.DIVERGED)
    if stops is not None:
        assert len(steps) == stops
        assert "larger epsilon" in ended.stop.message
        assert ended.last is not None, "measured, so that there is a report"


def test_below_the_cap_nothing_is_called_diverged() -> None:
    ended, *_ = run(max_steps=3 * DIVERGING_STEPS, violation=lambda step: 0.1 * (step + 1), capped=False, bound=1.0)
    assert ended.stop is not None
    assert ended.stop.reason is StopReason.MAX_STEPS
