"""How the rows of a step are split into micro-batches: the worker does it, and a plan tells of it beforehand."""

from collections.abc import Sequence

# What a micro-batch costs beside its tokens, per layer: time to launch it times the rate of the device (operations).
OVERHEAD_FLOP = {"cpu": 7.5e7, "cuda": 1.2e11}


def overhead_tokens(device: str, layers: int, parameters: int) -> float:
    """So many tokens take as long as starting one more micro-batch."""
    return OVERHEAD_FLOP.get(device, OVERHEAD_FLOP["cuda"]) * layers / (4.0 * parameters)


def microbatches(lengths: Sequence[int], overhead_tokens: float, max_tokens: int) -> list[list[int]]:
    """Split rows into micro-batches of like length, with the least padded tokens plus `overhead_tokens` for each.

    By dynamic programming over the rows in order of length. A micro-batch holds at most max_tokens padded positions, unless
    a single row is longer.

    >>> microbatches([10, 50, 11, 49], overhead_tokens=5, max_tokens=1000)
    [[3, 1], [0, 2]]
    >>> microbatches([10, 50, 11, 49], overhead_tokens=500, max_tokens=1000)
    [[0, 2, 3, 1]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best = [0.0]  # cost of the first k rows
    cut = [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        fit = max(1, max_tokens // longest)
        start = min(range(max(0, end - fit), end), key=lambda s: best[s] + (end - s) * longest)
        best.append(best[start] + (end - start) * longest + overhead_tokens)
        cut.append(start)
    parts, end = [], len(order)
    while end:
        parts.append(order[cut[end] : end])
        end = cut[end]
    return parts
