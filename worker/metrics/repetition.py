"""Share of a greedy answer's runs of four tokens that it has said before. A sign of gibberish.

Reference: seq-rep-4 of Welleck et al. 2019, arXiv 1908.04319.
"""

from typing import Annotated

from pydantic import Field

from worker.scores import NOTHING_SAID, Metric, Score, Scores, mean, runs


def repetition(*, n: Annotated[int, Field(ge=1, description="tokens in a run")] = 4) -> Metric:
    """1212121 has four runs of four, of which two are others: 1 - 2/4. Three tokens have none, and do not count.

    >>> import torch
    >>> said = {0: [1, 2, 1, 2, 1, 2, 1], 1: [1, 1, 1]}
    >>> repetition().fn(Scores([], torch.empty(0), torch.empty(0), generated_ids=said)).by_row
    {0: 0.5}
    """

    def fn(scores: Scores) -> Score:
        assert scores.generated_ids is not None
        of_row = {p: runs(ids, n) for p, ids in scores.generated_ids.items() if len(ids) >= n}
        return mean({p: 1 - len(set(said)) / len(said) for p, said in of_row.items()}, empty=NOTHING_SAID)

    return Metric(
        fn,
        frozenset({"generated"}),
        {},
        "mean over greedy answers of the share of their runs of four tokens that are not new in the answer",
    )
