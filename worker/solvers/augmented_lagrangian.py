"""Augmented Lagrangian: primal-dual descent with a quadratic penalty, which damps the swings of the multiplier.

    L(theta, lambda) = gamma f(theta) + sum_c psi_c(r_c(theta))
    psi_c(r)  = (max(0, lambda_c + mu (r - bound_c))^2 - lambda_c^2) / (2 mu)        mu -> 0: lambda_c (r - bound_c)
    theta    <- descent on gamma grad f + sum_c max(0, lambda_c + mu (r_c(theta) - bound_c)) grad r_c
    lambda_c <- clip(lambda_c + dual_step (r_c(theta) - bound_c), 0, dual_max)      with r_c from before theta moved

The weight of a bounded term's gradient depends on its value over the whole batch, so each term is asked for its own gradient
and the direction is composed afterwards. That is the work of one evaluation of the sum (no row is seen twice) and one more
gradient in memory per bound; what is lost is that rows of different terms share micro-batches. Where a term is a proxy of
what its bound is on, weight and multiplier follow the constraint itself (Evaluation.bounded), the gradient the proxy.

The optimum is that of the plain Lagrangian, with the same multiplier; reported is lambda, and the weight beside it. The
classical method of multipliers has dual_step = mu and solves for theta in between.

Reference: Hestenes 1969 and Powell 1969, for inequalities Rockafellar 1973 (Nocedal & Wright 2006, chapter 17); the problem and
its dual are those of Entesari et al. 2025, arXiv 2506.05314.
"""

from typing import Annotated, Any, TypedDict

from pydantic import Field

from worker.problem import Descent, Oracle, Params, Problem, Solver, Step
from worker.vectors import flat, unflat


class State(TypedDict):
    primal: Any  # the descent's
    duals: dict[str, float]  # constraint -> multiplier
    step: int  # optimizer steps taken


def augmented_lagrangian(
    descent: Descent,
    /,
    *,
    penalty: Annotated[
        float, Field(ge=0, description="mu, weight of the squared violation; 0: plain primal-dual descent")
    ] = 50.0,
    dual_init: Annotated[float, Field(ge=0, description="multiplier at the start")] = 50.0,
    dual_step: Annotated[float, Field(ge=0, description="dual step size; 0 keeps the multiplier fixed")] = 50.0,
    dual_max: Annotated[
        float, Field(gt=0, description="the multiplier never exceeds it, nor does dual_init; the penalty comes on top")
    ] = 10_000.0,
    warmup_steps: Annotated[int, Field(ge=0, description="optimizer steps before the multiplier moves")] = 0,
    forget_weight: Annotated[float, Field(gt=0, description="gamma, the weight of the objective")] = 1.0,
) -> Solver:
    """Descent on the augmented Lagrangian and projected ascent on the multipliers, both at every step.

    f(x) = (x - 4)^2 and r(x) = x <= 1 at x = 2 with multiplier 3 and mu 2: the weight of r is 3 + 2 (2 - 1) = 5, the slope
    2 (2 - 4) + 5 = 1, and the multiplier rises by 2 (2 - 1).

    >>> import torch
    >>> from worker.descent import sgd
    >>> from worker.problem import Evaluation
    >>> params = {"x": torch.tensor([2.0])}
    >>> def oracle(weights):
    ...     x = params["x"].item()
    ...     slope = weights.get("f", 0) * 2 * (x - 4) + weights.get("r", 0)
    ...     return Evaluation({t: {"f": (x - 4) ** 2, "r": x}[t] for t in weights}, {"x": torch.tensor([slope])})
    >>> solver = augmented_lagrangian(sgd(learning_rate=0.5), penalty=2.0, dual_init=3.0, dual_step=2.0)
    >>> problem = Problem("f", {"r": 1.0})
    >>> state, step = solver.step(problem, solver.init(problem, params), params, oracle)
    >>> params["x"].item(), step.extra, state["duals"]
    (1.5, {'weight/r': 5.0}, {'r': 5.0})
    """

    def init(problem: Problem, params: Params) -> State:
        return State(primal=descent.init(params), duals=dict.fromkeys(problem.bounds, min(dual_init, dual_max)), step=0)

    def ascend(dual: float, violation: float) -> float:
        return min(max(dual + dual_step * violation, 0.0), dual_max)

    def step(problem: Problem, state: State, params: Params, oracle: Oracle) -> tuple[State, Step]:
        duals = state["duals"]
        objective = oracle({problem.objective: forget_weight})
        terms = {c: oracle({c: 1.0}) for c in problem.bounds}
        values = objective.bounded | {c: here.bounded[c] for c, here in terms.items()}
        violations = {c: values[c] - bound for c, bound in problem.bounds.items()}
        weights = {c: max(0.0, duals[c] + penalty * violation) for c, violation in violations.items()}

        direction_P = flat(objective.grads, params)
        for c, here in terms.items():
            direction_P += weights[c] * flat(here.grads, params)
        primal, norm, rate = descent.apply(state["primal"], params, unflat(direction_P, params))

        taken = state["step"] + 1
        new_duals = duals
        if taken > warmup_steps:
            new_duals = {c: ascend(duals[c], violation) for c, violation in violations.items()}
        extra = {f"weight/{c}": weight for c, weight in weights.items()}
        capped = dual_step > 0 and max(duals.values()) >= dual_max
        return State(primal=primal, duals=new_duals, step=taken), Step(values, duals, rate, norm, extra, capped)

    return Solver(init, step)
