"""Distinct pairs of neighbouring tokens among all of all greedy answers: low where every question gets the same answer.

Reference: distinct-2 of Li et al. 2016, arXiv 1510.03055.
"""

from worker.scores import NOTHING_SAID, Metric, Score, Scores, runs

N = 2  # tokens in a run


def distinct_n() -> Metric:
    """12, 23 and again 12, 23: two distinct of four in all, though each answer alone has none twice.

    >>> import torch
    >>> said = {0: [1, 2, 3], 1: [1, 2, 3]}
    >>> score = distinct_n().fn(Scores([], torch.empty(0), torch.empty(0), generated_ids=said))
    >>> score.value, score.by_row
    (0.5, {0: 1.0, 1: 1.0})
    """

    def fn(scores: Scores) -> Score:
        assert scores.generated_ids is not None
        of_row = {p: runs(ids, N) for p, ids in scores.generated_ids.items() if len(ids) >= N}
        said = [run for row in of_row.values() for run in row]
        by_row = {p: len(set(row)) / len(row) for p, row in of_row.items()}
        return Score(len(set(said)) / len(said), by_row) if said else Score(None, {}, NOTHING_SAID)

    return Metric(
        fn,
        frozenset({"generated"}),
        {},
        "distinct pairs of neighbouring tokens as a share of all of them, over all greedy answers together",
    )
