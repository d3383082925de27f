"""OFMU: forgetting and decorrelating inside, retaining outside, with the inner problem's gradient as a growing penalty.

The paper raises L_f; this code lowers a loss f, so L_f = -f and grad L_f = -g_f. With c the cosine of g_f and g_r,

    Phi = L_f - beta Sim(grad L_f, grad L_r) = -psi,    psi = f + beta S(c),    S(c) = -c (the paper), c^2 or max(0, -c)
    grad psi = g_f + beta S'(c) grad c
    grad c = H_f (g_r/|g_r| - c g_f/|g_f|) / |g_f|  +  H_r (g_f/|g_f| - c g_r/|g_r|) / |g_r|
    F = r + rho s |grad psi|^2,    grad F = g_r + 2 rho s (Hess psi) (grad psi)

A round is inner_steps steps of descent on psi (ascent on Phi) and one step on F, from where the inner steps ended; then rho
grows. That the outer step is taken there is ours: the paper's text seems to return to where the round started, which would
make its inner steps useless. Inner steps go on while rho grows, so a round at rest balances F against inner_steps * psi; it is
a stationary point of F only as far as the penalty outweighs them. Products with Hessians are differences of gradients on the
same batch in full precision, on both sides: a one-sided one is wrong by the curvature's change along the way.

Ours too: s is fixed at the first outer step, such that the penalty's part of grad F is rho times as long as g_r there. As a
plain factor of |grad psi|^2 rho would depend on the number of parameters, on the scale of f and on its curvature.

The guard: where f is concave along g_f, (Hess psi)(grad psi) points against g_f and the penalty's step raises f again: it
relearns. Then its component along g_f is removed. With softmax regression that happens everywhere if f is the negative
cross-entropy; with NPO it happens at the memorised model too, and hardly ever once that has forgotten.

Reference: Asif & Mohammadi Amiri 2025, OFMU, arXiv 2509.22483, Eqs. 7 and 9, Algorithm 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, TypedDict

import torch
from pydantic import Field
from torch import Tensor

from worker.problem import Descent, Oracle, Params, Problem, Solver, Step
from worker.vectors import flat, moved, unflat

Gradient = Callable[[], Tensor]  # [P], at the parameters as they are when it is called

# How far to go on either side, in norms of the parameters: for grad c, and for the product of the outer step, which takes
# differences of it. Farther, and the curvature itself has changed (on an adapter of a model of 260 thousand parameters a
# one-sided product is a quarter off at 1e-3, wholly at 1e-2); nearer, and rounding grows, which is divided by both.
DISTANCES = {torch.float32: (3e-4, 1e-3), torch.float64: (1e-5, 3e-5)}
# A gradient shorter than this share of the other one counts as so long where grad c divides by it: a memorised forget set.
SHORTEST = 1e-3
NOISE = 0.5
SLOPES: dict[str, Callable[[float], float]] = {  # S'(c)
    "cosine": lambda c: -1.0,
    "cosine_squared": lambda c: 2 * c,
    "relu_cosine": lambda c: -1.0 if c < 0 else 0.0,
}


class State(TypedDict):
    inner: Any  # the descent's, of the inner steps
    outer: Any  # and of the outer ones, whose gradients are of another size
    taken: int  # inner steps of this round
    rho: float
    scale: float  # s; 0 until it is known


def penalty_bilevel(
    descent: Descent,
    /,
    *,
    inner_steps: Annotated[int, Field(ge=1, description="steps on the forget side per step on the retain side")] = 5,
    beta: Annotated[float, Field(ge=0, description="weight of the similarity; 0 saves four gradients of six")] = 0.1,
    similarity: Annotated[
        Literal["cosine", "cosine_squared", "relu_cosine"],
        Field(
            description="of raising the forget and lowering the retain loss: its cosine, its square, its positive part"
        ),
    ] = "cosine",
    penalty: Annotated[
        float, Field(gt=0, description="rho at first: length of the penalty's gradient over the retain gradient's")
    ] = 0.1,
    penalty_growth: Annotated[float, Field(ge=1, description="rho grows by this factor per round")] = 1.1,
    penalty_max: Annotated[float, Field(gt=0, description="rho never exceeds it, nor does `penalty`")] = 10.0,
    guard: Annotated[bool, Field(description="take from the penalty's step what would undo forgetting")] = True,
) -> Solver:
    """Rounds of inner_steps steps inside and one outside; each is one solver step.

    Gradients: 2 of an inner step, 6 with similarity; 6 of an outer step, 30 with similarity.

    Extra: phase (0 inside, 1 outside), cosine of g_f and g_r (1: they agree), penalty (rho), phi_norm (|grad Phi|); of an outer
    step also guard_fired (0 or 1) and hessian_error: how far (Hess psi)(grad psi) changes when its difference is taken over
    half the distance, relative to its length. Near 1 the product is noise: above NOISE it is left out of that step, and does
    not set s.

    f(x) = x^2 / 2, r(x) = -x, no similarity, rate 1/4, from x = 4: the inner step leads to x = 3, where
    (Hess psi)(grad psi) = x, of which rho s makes half the length of g_r = -1; the outer step is 1/4 of 1 - 1/2.

    >>> import torch
    >>> from worker.descent import sgd
    >>> from worker.problem import Evaluation
    >>> params = {"x": torch.tensor([4.0]).double()}
    >>> def oracle(weights, full_precision=False):
    ...     slope = sum(weight * (params["x"] if term == "f" else -torch.ones(1)) for term, weight in weights.items())
    ...     return Evaluation(dict.fromkeys(weights, 0.0), {"x": slope.double()})
    >>> problem = Problem("f", {"r": 0.0})
    >>> solver = penalty_bilevel(sgd(learning_rate=0.25), inner_steps=1, beta=0.0, penalty=0.5)
    >>> state = solver.init(problem, params)
    >>> for _ in range(2):
    ...     state, step = solver.step(problem, state, params, oracle)
    ...     print(step.extra["phase"], round(params["x"].item(), 6))
    0.0 3.0
    1.0 3.125
    """
    slope = SLOPES[similarity]

    def init(problem: Problem, params: Params) -> State:
        inner, outer = descent.init(params), descent.init(params)
        return State(inner=inner, outer=outer, taken=0, rho=min(penalty, penalty_max), scale=0.0)

    def step(problem: Problem, state: State, params: Params, oracle: Oracle) -> tuple[State, Step]:
        terms = {problem.objective: 1.0}, dict.fromkeys(problem.bounds, 1.0)
        forget, retain = (partial(_exact, oracle, weights, params) for weights in terms)

        near, far = (share * (_norm(flat(params)) or 1.0) for share in DISTANCES[flat(params).dtype])

        def tilted(f_P: Tensor, r_P: Tensor) -> Tensor:
            """Grad psi where the parameters are, from both gradients there."""
            pull = beta * slope(_cosine(f_P, r_P))
            return f_P + pull * _cosine_gradient(forget, retain, f_P, r_P, params, near) if pull else f_P

        def psi() -> Tensor:
            return tilted(forget(), retain()) if beta else forget()

        lower, upper = (oracle(weights, full_precision=beta > 0) for weights in terms)
        f_P, r_P = flat(lower.grads, params), flat(upper.grads, params)
        psi_P = tilted(f_P, r_P)
        outside = state["taken"] == inner_steps
        extra = {
            "phase": float(outside),
            "cosine": _cosine(f_P, r_P),
            "penalty": state["rho"],
            "phi_norm": _norm(psi_P),
        }
        if outside:
            coarse_P, product_P = (_product(psi, psi_P, params, distance) for distance in (far, far / 2))
            error = _ratio(_norm(coarse_P - product_P), _norm(product_P))
            reliable = error <= NOISE
            scale = state["scale"] or (_ratio(_norm(r_P), 2 * _norm(product_P)) if reliable else 0.0)
            penalty_P, fired = guarded((2 * state["rho"] * scale if reliable else 0.0) * product_P, f_P)
            extra |= {"guard_fired": float(fired), "hessian_error": error}
            outer, norm, rate = descent.apply(state["outer"], params, unflat(r_P + penalty_P, params))
            rho = min(state["rho"] * penalty_growth, penalty_max)
            new = State(inner=state["inner"], outer=outer, taken=0, rho=rho, scale=scale)
        else:
            inner, norm, rate = descent.apply(state["inner"], params, unflat(psi_P, params))
            taken = state["taken"] + 1
            new = State(inner=inner, outer=state["outer"], taken=taken, rho=state["rho"], scale=state["scale"])
        return new, Step(lower.bounded | upper.bounded, {}, rate, norm, extra)

    def guarded(penalty_P: Tensor, f_P: Tensor) -> tuple[Tensor, bool]:
        """Descent on the penalty lowers f by <penalty, g_f>: not less than nothing, if guarded."""
        along = _ratio(float(penalty_P @ f_P), float(f_P @ f_P))
        fired = guard and along < 0
        return penalty_P - along * f_P if fired else penalty_P, fired

    return Solver(init, step)


def _exact(oracle: Oracle, weights: dict[str, float], params: Params) -> Tensor:
    return flat(oracle(weights, full_precision=True).grads, params)


def _cosine_gradient(
    forget: Gradient, retain: Gradient, f_P: Tensor, r_P: Tensor, params: Params, distance: float
) -> Tensor:
    """Grad c [P] from both gradients where the parameters are; 0 where one of them is, and c is not defined."""
    f_norm, r_norm = _norm(f_P), _norm(r_P)
    if not f_norm or not r_norm:
        return torch.zeros_like(f_P)
    f_unit, r_unit, c = f_P / f_norm, r_P / r_norm, _cosine(f_P, r_P)
    of_forget = _product(forget, r_unit - c * f_unit, params, distance) / max(f_norm, SHORTEST * r_norm)
    of_retain = _product(retain, f_unit - c * r_unit, params, distance) / max(r_norm, SHORTEST * f_norm)
    return of_forget + of_retain


def _product(gradient: Gradient, v_P: Tensor, params: Params, distance: float) -> Tensor:
    """Hessian times v, from the gradients at this distance on either side."""
    length = _norm(v_P)
    if not length:
        return torch.zeros_like(v_P)
    with moved(params, v_P / length, distance):
        ahead_P = gradient()
    with moved(params, v_P / length, -distance):
        return (ahead_P - gradient()) * (length / (2 * distance))


def _cosine(f_P: Tensor, r_P: Tensor) -> float:
    return _ratio(float(f_P @ r_P), _norm(f_P) * _norm(r_P))


def _norm(v_P: Tensor) -> float:
    return float(torch.linalg.vector_norm(v_P))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
