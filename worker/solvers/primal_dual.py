"""Primal-dual descent on the Lagrangian: a bound's multiplier rises while it is broken and falls while there is slack.

    L(theta, lambda) = gamma f(theta) + sum_c lambda_c (r_c(theta) - bound_c)
    theta    <- descent on grad_theta L(theta, lambda)
    lambda_c <- clip(lambda_c + dual_step (r_c(theta) - bound_c), 0, dual_max)      with r_c from before theta moved

One dual step per optimizer step, with the constraint measured over the whole batch, all micro-batches and ranks: the course
of lambda does not depend on how a batch is split. For the first warmup_steps optimizer steps lambda stays as it is. Where a
term is a proxy of what its bound is on, theta follows the proxy and lambda the constraint itself (Evaluation.bounded).

Reference: Entesari et al. 2025, Constrained Entropic Unlearning, arXiv 2506.05314, Algorithm 1 (simultaneous updates).
"""

from typing import Annotated, Any, TypedDict

from pydantic import Field

from worker.problem import Descent, Oracle, Params, Problem, Solver, Step


class State(TypedDict):
    primal: Any  # the descent's
    duals: dict[str, float]  # constraint -> multiplier
    step: int  # optimizer steps taken


def primal_dual(
    descent: Descent,
    /,
    *,
    dual_init: Annotated[float, Field(ge=0, description="multiplier at the start")] = 50.0,
    dual_step: Annotated[float, Field(ge=0, description="dual step size; 0 keeps the multiplier fixed")] = 50.0,
    dual_max: Annotated[
        float, Field(gt=0, description="the multiplier never exceeds it, nor does dual_init")
    ] = 10_000.0,
    warmup_steps: Annotated[int, Field(ge=0, description="optimizer steps before the multiplier moves")] = 0,
    forget_weight: Annotated[float, Field(gt=0, description="gamma, the weight of the objective")] = 1.0,
) -> Solver:
    """Descent on the parameters and projected ascent on the multipliers, both at every step.

    On f(x) = (x - 4)^2, r(x) = x, x <= 1 the multiplier is 6 at the optimum x = 1: f'(1) + 6 = 0. From there nothing moves.

    >>> import torch
    >>> from worker.descent import sgd
    >>> from worker.problem import Evaluation
    >>> params = {"x": torch.tensor([1.0])}
    >>> def oracle(weights):
    ...     x = params["x"].item()
    ...     slope = weights["f"] * 2 * (x - 4) + weights["r"]
    ...     return Evaluation({"f": (x - 4) ** 2, "r": x}, {"x": torch.tensor([slope])})
    >>> problem, solver = Problem("f", {"r": 1.0}), primal_dual(sgd(learning_rate=0.1), dual_init=6.0)
    >>> state, step = solver.step(problem, solver.init(problem, params), params, oracle)
    >>> params["x"].item(), state["duals"]
    (1.0, {'r': 6.0})
    """

    def init(problem: Problem, params: Params) -> State:
        return State(primal=descent.init(params), duals=dict.fromkeys(problem.bounds, min(dual_init, dual_max)), step=0)

    def ascend(dual: float, violation: float) -> float:
        return min(max(dual + dual_step * violation, 0.0), dual_max)

    def step(problem: Problem, state: State, params: Params, oracle: Oracle) -> tuple[State, Step]:
        duals = state["duals"]
        here = oracle({problem.objective: forget_weight} | duals)
        primal, norm, rate = descent.apply(state["primal"], params, here.grads)
        taken = state["step"] + 1
        new_duals = duals
        if taken > warmup_steps:
            new_duals = {c: ascend(duals[c], here.bounded[c] - bound) for c, bound in problem.bounds.items()}
        capped = dual_step > 0 and max(duals.values()) >= dual_max
        return State(primal=primal, duals=new_duals, step=taken), Step(here.bounded, duals, rate, norm, capped=capped)

    return Solver(init, step)
