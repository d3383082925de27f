"""OFMU: forgetting and decorrelating inside, retaining outside, with the inner problem's gradient as a growing penalty.

Composition: npo x nll x penalty_bilevel. That the forget objective is NPO is ours: with cross-entropy, the paper's, the penalty
relearns what the inner steps forgot (a memorised answer is itself a stationary point), which the guard then has to
prevent. "grad_ascent" chooses the paper's. The authors have published no code and few constants; the defaults are ours.

Reference: Asif & Mohammadi Amiri 2025, OFMU, arXiv 2509.22483.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from worker.descent import adamw
from worker.hyperparameters import Beta, ForgetRows, LearningRate, LrWarmupSteps, MaxGradNorm, RetainRows
from worker.losses.forget.grad_ascent import grad_ascent
from worker.losses.forget.npo import npo
from worker.losses.retain.nll import nll
from worker.problem import Method
from worker.solvers.penalty_bilevel import penalty_bilevel

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # its other constants are not known
    "paper": {"objective": "grad_ascent", "inner_steps": 5, "similarity": "cosine", "guard": False},
}


def ofmu(
    *,
    objective: Annotated[
        Literal["npo", "grad_ascent"], Field(description="forget loss; the paper's is grad_ascent")
    ] = "npo",
    npo_beta: Beta = 0.03,
    inner_steps: Annotated[int, Field(ge=1, description="T, steps on the forget side per step on the retain side")] = 1,
    beta: Annotated[
        float, Field(ge=0, description="weight of the similarity of both gradients; 0 saves four of six")
    ] = 0.1,
    similarity: Annotated[
        Literal["cosine", "cosine_squared", "relu_cosine"], Field(description="the paper's is cosine")
    ] = "cosine",
    penalty: Annotated[float, Field(gt=0, description="rho at first, relative to the retain gradient")] = 0.1,
    penalty_growth: Annotated[float, Field(ge=1, description="rho grows by this factor per round")] = 1.1,
    penalty_max: Annotated[float, Field(gt=0, description="rho never exceeds it")] = 10.0,
    guard: Annotated[bool, Field(description="take from the penalty's step what would undo forgetting")] = True,
    learning_rate: LearningRate = 1e-3,
    lr_warmup_steps: LrWarmupSteps = 0,
    max_grad_norm: MaxGradNorm = 1.0,
    forget_rows: ForgetRows = 8,
    retain_rows: RetainRows = 16,
) -> Method:
    """Build it.

    >>> ofmu(forget_rows=4).forget_rows
    4
    """
    descent = adamw(learning_rate=learning_rate, warmup_steps=lr_warmup_steps, max_grad_norm=max_grad_norm)
    forget = npo(beta=npo_beta) if objective == "npo" else grad_ascent()
    solver = penalty_bilevel(
        descent,
        inner_steps=inner_steps,
        beta=beta,
        similarity=similarity,
        penalty=penalty,
        penalty_growth=penalty_growth,
        penalty_max=penalty_max,
        guard=guard,
    )
    return Method(forget, nll(), solver, forget_rows, retain_rows)
