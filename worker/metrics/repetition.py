"""Share of a greedy answer's runs of four tokens that it has said before. A sign of gibberish.

Reference: seq-rep-4 of Welleck et al. 2019, arXiv 1908.04319.
"""

from worker.scores import NOTHING_SAID, Metric, Score, Scores, mean, runs

N = 4  # tokens in a run


def repetition() -> Metric:
    """12121212 has five runs of four, of which two are different: 1 - 2/5. Three tokens have none, and do not count.

    >>> import torch
    >>> said = {0: [1, 2, 1, 2, 1, 2, 1, 2], 1: [1, 1, 1]}
    >>> repetition().fn(Scores([], torch.empty(0), torch.empty(0), generated_ids=said)).by_row
    {0: 0.6}
    """

    def fn(scores: Scores) -> Score:
        assert scores.generated_ids is not None
        of_row = {p: runs(ids, N) for p, ids in scores.generated_ids.items() if len(ids) >= N}
        return mean({p: 1 - len(set(said)) / len(said) for p, said in of_row.items()}, empty=NOTHING_SAID)

    return Metric(
        fn,
        frozenset({"generated"}),
        {},
        "mean over greedy answers of the share of their runs of four tokens that are not new in the answer",
    )
