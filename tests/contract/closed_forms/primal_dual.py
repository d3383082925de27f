"""Karush-Kuhn-Tucker: gamma (theta - a) + dual (theta - b) = 0 and |theta - b|^2 / 2 = bound."""

import torch
from torch import Tensor

GAMMA = 1.5
PARAMETERS = {"dual_init": 0.0, "dual_step": 0.2, "forget_weight": GAMMA}
STEPS = 1000


def closed_form(a: Tensor, b: Tensor, bound: float) -> tuple[Tensor, float | None]:
    dual = GAMMA * (float(torch.linalg.vector_norm(a - b)) / (2 * bound) ** 0.5 - 1)
    return (GAMMA * a + dual * b) / (GAMMA + dual), dual
