"""What a solver sees: a constrained problem and an oracle. Never a model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from worker.tokens import Loss

Params = dict[str, Tensor]  # the trainable leaves by name (float32); moved in place


class Problem(NamedTuple):
    """min objective(theta)  subject to  term_c(theta) <= bounds[c]."""

    objective: str
    bounds: Mapping[str, float]  # in the term's own unit


class Evaluation(NamedTuple):
    values: dict[str, float]  # the terms named in the weights, over the whole batch: all micro-batches and ranks
    grads: Params  # d/dtheta sum_i weights[i] * term_i; a weight of 0 asks for the value alone
    strict: Mapping[str, float] = {}  # term -> what its bound is on, where the term is only a proxy of it

    @property
    def bounded(self) -> dict[str, float]:
        """What is compared with the bounds, and reported: a multiplier follows the constraint, the gradient its proxy.

        Proxy constraints: Cotter, Jiang & Sridharan 2019, arXiv 1804.06500.
        """
        return {**self.values, **self.strict}


class Oracle(Protocol):
    """The problem on one batch at the current parameters: a pure function of (parameters, batch)."""

    def __call__(self, weights: Mapping[str, float], *, full_precision: bool = False) -> Evaluation:
        """Args:
        full_precision: in float32 whatever the type of the frozen base, for differences of gradients.
        """
        ...


class Step(NamedTuple):
    """What one solver step reports, beside the new state. All numbers are measured before the parameters moved."""

    values: dict[
        str, float
    ]  # term -> what its bound is on (Evaluation.bounded), on the batch; both terms, at every step
    duals: dict[str, float]  # constraint -> multiplier that was used
    learning_rate: float
    gradient_norm: float  # of the composed direction, before clipping
    extra: dict[str, float] = {}  # noqa: RUF012  what this solver alone logs
    capped: bool = False  # a multiplier that was used was at its cap


class Solver(NamedTuple):
    """Hyperparameters only. What evolves is the state (plain tensors and numbers: it is checkpointed) and the parameters."""

    init: Callable[[Problem, Params], Any]
    step: Callable[[Problem, Any, Params, Oracle], tuple[Any, Step]]


class Descent(NamedTuple):
    """A first-order method with its schedule and clipping, behind two functions."""

    init: Callable[[Params], Any]
    apply: Callable[[Any, Params, Params], tuple[Any, float, float]]  # -> state, gradient norm before clipping, rate


class Method(NamedTuple):
    """A composition: forget loss x retain loss x solver, how large a step's batch is, and where the adapter goes."""

    forget: Loss
    retain: Loss
    solver: Solver
    forget_rows: int  # rows of the forget set per step
    retain_rows: int
    layers: Callable[[int], Sequence[int]] = (
        range  # number of layers of the model -> those (0-based) that get an adapter
    )
