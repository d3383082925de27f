"""The minimiser of the weighted sum of two squared distances is the weighted mean of their centres."""

from torch import Tensor

PARAMETERS = {"forget_weight": 2.0, "retain_weight": 3.0}
STEPS = 300


def closed_form(a: Tensor, b: Tensor, bound: float) -> tuple[Tensor, float | None]:
    return (2 * a + 3 * b) / 5, None
