"""Rows of tokens that begin alike, read once where they do: each such group is a tree, laid out as one sequence.

A token of the tree stands at its place in its rows and attends to its own ancestors alone, so every row reads what it
would read alone, and what several rows share is in the sequence once. The seven answers of a question share the question,
and as much of each other as they have in common. Known as tree attention (Cai et al. 2024, Medusa, arXiv 2401.10774).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tree(NamedTuple):
    ids: list[int]
    positions: list[int]  # of each token in the rows that it stands in
    rows: list[int]  # which rows are in the tree
    paths: list[list[int]]  # of each row: the tree's indices of its tokens, in the row's order

    @property
    def branches(self) -> bool:
        return len(self.rows) > 1


class Forest(NamedTuple):
    """Trees padded on the right to one length."""

    input_ids_BT: Tensor  # int64
    positions_BT: Tensor  # int64
    seen_BTT: Tensor | None  # bool: [b, t, s]: t attends to s; None: no tree branches, and plain causal attention does


def single(rows: Sequence[Sequence[int]]) -> list[Tree]:
    """Each row by itself."""
    return [Tree(list(ids), list(range(len(ids))), [i], [list(range(len(ids)))]) for i, ids in enumerate(rows)]


def grow(rows: Sequence[list[int]], pairs_per_token: float, max_tokens: int) -> list[Tree]:
    """Trees of the rows, sharing where that saves.

    In lexicographic order a row shares more with the row before it than with any earlier one. It joins that one's tree if the
    tokens that it saves cost more than the attention that it adds: a tree attends over its whole length, whatever is masked.

    Args:
        pairs_per_token: how many pairs of tokens cost as much to attend over as one token costs elsewhere in the model.
        max_tokens: of a tree, unless a single row is longer.

    >>> [(tree.ids, tree.paths) for tree in grow([[5, 6, 7], [8], [5, 6, 9, 4]], pairs_per_token=1e3, max_tokens=100)]
    [([5, 6, 7, 9, 4], [[0, 1, 2], [0, 1, 3, 4]]), ([8], [[0]])]
    """
    trees: list[Tree] = []
    tree = Tree([], [], [], [])
    before: Sequence[int] = ()
    for i in sorted(range(len(rows)), key=lambda i: rows[i]):
        ids = rows[i]
        shared = common_prefix(before, ids)
        size = len(tree.ids) + len(ids) - shared
        added_pairs = size**2 - len(tree.ids) ** 2 - len(ids) ** 2
        if not shared or size > max_tokens or shared * pairs_per_token < added_pairs:
            tree, shared = Tree([], [], [], []), 0
            trees.append(tree)
        own = range(len(tree.ids), len(tree.ids) + len(ids) - shared)
        tree.paths.append([*(tree.paths[-1][:shared] if shared else ()), *own])
        tree.ids.extend(ids[shared:])
        tree.positions.extend(range(shared, len(ids)))
        tree.rows.append(i)
        before = ids
    return trees


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """
    >>> common_prefix([1, 2, 3], [1, 2])
    2
    """
    length = min(len(a), len(b))
    return next((t for t in range(length) if a[t] != b[t]), length)


def plant(trees: Sequence[Tree]) -> Forest:
    length = max(len(tree.ids) for tree in trees)
    ids_BT = torch.zeros(len(trees), length, dtype=torch.int64)
    positions_BT = torch.zeros_like(ids_BT)
    for b, tree in enumerate(trees):
        ids_BT[b, : len(tree.ids)] = torch.tensor(tree.ids)
        positions_BT[b, : len(tree.ids)] = torch.tensor(tree.positions)
    if not any(tree.branches for tree in trees):
        return Forest(ids_BT, positions_BT, None)
    seen_BTT = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1)  # padding, too: a softmax needs something
    for b, tree in enumerate(trees):
        start = 0  # of the row's own tokens, which follow those of the row before
        for path in tree.paths:
            end = path[-1] + 1
            own = seen_BTT[b, start:end]
            own[:, start:end] |= torch.ones(end - start, end - start, dtype=torch.bool).tril()
            if shared := len(path) - (end - start):
                own |= seen_BTT[b, path[shared - 1]]  # what the last shared token sees, its descendants see
            start = end
    return Forest(ids_BT, positions_BT, seen_BTT)
