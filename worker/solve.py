"""The loop: steps, checks, stopping, and the choice of the iterate that may be released.

Two kinds of numbers guide a run. A step reports the losses of its own batch, for free and with noise. A *check* measures
the whole forget and the whole retain set at the current parameters, and only a check can call an iterate feasible or
end the run as "target reached". What is returned as `best` is the checked iterate with the lowest forget objective
among those within every bound, unless a check reached the target: then it is that one. The parameters before the first
step are no candidate.

Between two steps all that evolves is in a Run and in the parameters: with both a run goes on elsewhere, bit for bit.
"""

import math
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import torch

from worker.problem import Evaluation, Oracle, Params, Problem, Solver, Step

CHECK_SHARE = 0.2  # at most this share of a solve's work goes into checks (the closing one aside, and the last answers)
# Work of a forward pass against a training step on the same tokens: the base is frozen, so that backward is one pass too.
FORWARD_SHARE = 1 / 2
DIVERGING_STEPS = 50  # in a row over the bound with a multiplier at its cap, before it is asked whether it gets worse
DIVERGING_GROWTH = (
    1.1  # of the violation, from one half of them to the next and from one quarter: it does not level off
)
DIVERGING_LEAST = 0.01  # of the bound: less is no matter


class Batch(NamedTuple):
    """One step's problem."""

    oracle: Oracle
    tokens: int  # positions that one evaluation trains on


class Measured(Protocol):
    """What a check finds at the current parameters."""

    @property
    def forget_objective(self) -> float: ...
    @property
    def forget_probability(self) -> float: ...
    @property
    def retain_loss(self) -> float: ...
    @property
    def retain_upper(
        self,
    ) -> float: ...  # one-sided 95 % bound where sampled, else retain_loss; compared with the bound
    @property
    def forgotten(self) -> bool: ...  # everything that the forget target asks for, the bound aside
    @property
    def generation_tokens(self) -> int: ...  # of the prompts and answers that were needed to find that out


class Limits(NamedTuple):
    max_steps: int
    max_seconds: float


class StopReason(StrEnum):
    MAX_STEPS = "max_steps"
    MAX_SECONDS = "max_seconds"
    TARGET_REACHED = "target_reached"
    NON_FINITE = "non_finite"
    DIVERGED = "diverged"
    CANCELLED = "cancelled"
    PAUSED = "paused"


class Stop(NamedTuple):
    reason: StopReason
    message: str


class Checked(NamedTuple):
    step: int
    measured: Measured
    feasible: bool


class Progress(NamedTuple):
    """One finished step, with where the run stands."""

    step: int  # 1-based
    report: Step
    tokens: int  # trained so far
    elapsed_s: float
    step_s: float  # of this step alone
    step_tokens: int


class Run(NamedTuple):
    """Where a run stands between two steps, beside its parameters: with both, and nothing else, it goes on."""

    state: Any  # the solver's
    steps: int = 0
    tokens: int = 0  # trained so far
    tokens_at_check: int = 0
    elapsed_s: float = 0.0
    capped: tuple[float, ...] = ()  # the largest violation of each of the last steps, while a multiplier is at its cap
    last: Checked | None = None
    best: Checked | None = None  # the released candidate; None: no checked iterate kept the bound
    best_params: Params | None = None
    stop: Stop | None = None


class _NonFiniteError(Exception):
    """Raised inside a step, before the solver can touch the parameters."""


def _guarded(oracle: Oracle) -> Oracle:
    def call(weights: Mapping[str, float], *, full_precision: bool = False) -> Evaluation:
        here = oracle(weights, full_precision=full_precision)
        broken = [
            f"{term} = {value}"
            for term, value in (*here.values.items(), *here.strict.items())
            if not math.isfinite(value)
        ]
        if not broken and here.grads:
            norms = torch.stack(torch._foreach_norm(list(here.grads.values())))
            if not bool(torch.isfinite(norms).all()):
                broken = ["the gradient is not finite"]
        if broken:
            raise _NonFiniteError("; ".join(broken))
        return here

    return call


def solve(
    problem: Problem,
    solver: Solver,
    params: Params,
    batch: Callable[[int], Batch],
    check: Callable[[], Measured],
    check_tokens: int,
    limits: Limits,
    *,
    on_step: Callable[[Progress], None],
    on_check: Callable[[Checked, bool, float], None],
    asked: Callable[[], StopReason | None],
    keep: Callable[[Run], None],
    resumed: Run | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Run:
    """Minimise the objective within the bounds, in place on `params`. Returns the run with its `stop`.

    Args:
        batch: the problem on the batch of a step (0-based); a pure function of the step.
        check: measures the forget and the retain set at the current parameters.
        check_tokens: positions of one check, without what it generates; when checks run depends on token counts, never on
            the clock, so that a run is the same on a slow machine.
        on_check: told of each check, whether it is the best so far, and its seconds.
        asked: whether to stop, CANCELLED or PAUSED; looked at before each step.
        keep: told where the run stands after each step, with the parameters as they are then, and again when it stops,
            whatever for.
        resumed: where it stood, with the parameters of then.

    The time limit is looked at after each step. The check that reaches the target is the best one, whatever the objective.
    `last` of a run at its end was at the parameters as they are left; it is None when no step was taken.
    """
    run = resumed or Run(solver.init(problem, params))
    start = clock() - run.elapsed_s

    def kept(run: Run) -> Run:
        nonlocal start
        began = clock()
        keep(run)
        start += clock() - began  # not of solving
        return run

    def checked(run: Run) -> Run:
        began = clock()
        measured = check()
        # A bound on any term but the retain loss has no measurement yet, so it cannot be promised.
        feasible = all(measured.retain_upper <= bound for bound in problem.bounds.values())
        here = Checked(run.steps, measured, feasible)
        finite = math.isfinite(measured.forget_objective) and math.isfinite(measured.forget_probability)
        lower = run.best is None or measured.forget_objective < run.best.measured.forget_objective
        improves = feasible and finite and (lower or measured.forgotten)
        on_check(here, improves, clock() - began)
        run = run._replace(last=here, tokens_at_check=run.tokens)
        return run._replace(best=here, best_params=_copied(params)) if improves else run

    while run.stop is None:
        if (reason := asked()) is not None:
            return kept(run._replace(stop=Stop(reason, f"Asked to stop after step {run.steps}.")))
        began = clock()
        work = batch(run.steps)
        try:
            state, report = solver.step(problem, run.state, params, _guarded(work.oracle))
        except _NonFiniteError as error:
            run = run._replace(stop=_not_finite(run.steps + 1, error))
            break
        now = clock()
        run = run._replace(
            state=state,
            steps=run.steps + 1,
            tokens=run.tokens + work.tokens,
            elapsed_s=now - start,
            capped=_while_capped(run.capped, problem, report),
        )
        on_step(Progress(run.steps, report, run.tokens, run.elapsed_s, now - began, work.tokens))

        within = all(report.values[term] <= bound for term, bound in problem.bounds.items())
        affordable = (run.tokens - run.tokens_at_check) * CHECK_SHARE >= _work_of_a_check(run.last, check_tokens)
        if within and affordable:
            run = checked(run)._replace(elapsed_s=clock() - start)
        run = run._replace(stop=_reached_target(run) or _diverged(run, problem) or _spent(run, limits))
        if run.stop is None:
            kept(run)

    if run.steps and (run.last is None or run.last.step != run.steps):
        run = checked(run)
    return kept(run._replace(elapsed_s=clock() - start))


def _work_of_a_check(last: Checked | None, check_tokens: int) -> float:
    """In tokens trained. How many a check generates is known only behind it, so the next one waits for it."""
    generated = 0 if last is None else last.measured.generation_tokens
    return (check_tokens + generated) * FORWARD_SHARE


def _spent(run: Run, limits: Limits) -> Stop | None:
    if run.steps >= limits.max_steps:
        return Stop(StopReason.MAX_STEPS, f"The budget of {limits.max_steps} steps is used.")
    if run.elapsed_s >= limits.max_seconds:
        return Stop(StopReason.MAX_SECONDS, f"The budget of {limits.max_seconds:g} s is used after step {run.steps}.")
    return None


def _not_finite(step: int, error: _NonFiniteError) -> Stop:
    return Stop(
        StopReason.NON_FINITE,
        f"Step {step} was not taken, because a number was not finite: {error}. "
        "A smaller learning rate or dual step may help.",
    )


def _reached_target(run: Run) -> Stop | None:
    last = run.last
    if last is None or last.step != run.steps or not (last.feasible and last.measured.forgotten):
        return None
    return Stop(
        StopReason.TARGET_REACHED,
        f"A check at step {run.steps} found the bound kept and the forget target reached, with a mean forget probability of "
        f"{last.measured.forget_probability:.2g}.",
    )


def _while_capped(before: tuple[float, ...], problem: Problem, report: Step) -> tuple[float, ...]:
    """Violations while a multiplier is at its cap, and so rises no further. A step on which the bound is kept ends that."""
    worst = max(report.values[term] - bound for term, bound in problem.bounds.items())
    return (*before, worst)[-DIVERGING_STEPS:] if report.capped and worst > 0 else ()


def _diverged(run: Run, problem: Problem) -> Stop | None:
    """The multiplier has been at its cap throughout, and the bound is broken by more and more, to the end."""
    if len(run.capped) < DIVERGING_STEPS:
        return None
    half, quarter = DIVERGING_STEPS // 2, DIVERGING_STEPS // 4
    first, second = run.capped[:half], run.capped[half:]
    grows = sum(second) > DIVERGING_GROWTH * sum(first) and sum(second[-quarter:]) > DIVERGING_GROWTH * sum(
        second[:quarter]
    )
    if not grows or run.capped[-1] < DIVERGING_LEAST * max(problem.bounds.values()):
        return None
    return Stop(
        StopReason.DIVERGED,
        f"The multiplier has been at its cap for {DIVERGING_STEPS} steps, and the bound is broken by more and more: "
        f"by {run.capped[0]:.4g} nats per token then, by {run.capped[-1]:.4g} at step {run.steps}. "
        "A larger epsilon, a smaller learning rate or a larger dual_max may help.",
    )


def _copied(params: Params) -> Params:
    return {name: value.detach().clone() for name, value in params.items()}
