"""What of a recipe is likely not meant, though it can be carried out: a bound that binds nothing, too few or too many steps."""

from collections.abc import Iterator
from math import ceil

from service.domain.job import LOOSE, Budget, Recipe

# Published methods read their forget set 5 to 50 times (PDU on TOFU and MUSE 10 to 30, the clients of Oblivionis 50). The default
# budget of 300 steps is 300 passes over a set that fits into one step, which is no mistake: hence so many more.
PASSES_MAX = 1000
PUBLISHED_PASSES = "5 to 50"


def forget_passes(budget: Budget, rows: int, rows_per_step: int) -> float:
    """How often the whole budget reads the forget set; the last step of a pass has what is left.

    >>> forget_passes(Budget(max_steps=6), 20, 8)
    2.0
    """
    return budget.max_steps / ceil(rows / rows_per_step)


def warnings(recipe: Recipe, rows: int, rows_per_step: int) -> Iterator[tuple[str, str]]:
    """Code and words, with the figures.

    Args:
        rows: of the forget set.
        rows_per_step: forget rows of a step, as the method's hyperparameters have it.
    """
    relative = recipe.constraint.epsilon_relative
    if relative is not None and 1 + relative > LOOSE:
        yield (
            "epsilon_loose",
            f"epsilon_relative {relative:g} lets the retain loss become {1 + relative:g} times what it was, and more than "
            f"{LOOSE:g} times hardly constrains anything; it is a share: 0.25 allows 25 % more",
        )
    steps, passes = recipe.budget.max_steps, forget_passes(recipe.budget, rows, rows_per_step)
    if passes < 1:
        yield (
            "few_passes",
            f"max_steps {steps:,} with {rows_per_step:,} forget rows each reads at most {steps * rows_per_step:,} of the "
            f"{rows:,} rows to forget: the others are never trained on",
        )
    elif passes > PASSES_MAX:
        yield (
            "many_passes",
            f"max_steps {steps:,} is {passes:,.0f} passes over the {rows:,} rows to forget, where published methods make "
            f"{PUBLISHED_PASSES}",
        )
