"""What a batch says, packed: only the tokens that count. The next-token shift is done once, here and nowhere else.

Legend of shape letters, for the whole numerical core:
B rows   T positions of a padded batch   N counted tokens of the batch   V vocabulary   D hidden width
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor


class Answers(NamedTuple):
    """What the rows should have said: only tokens that count."""

    target_N: Tensor  # int64 token ids
    row_N: Tensor  # int64 in [0, B): the row of each token, ascending
    rows: int  # B


class Distribution(NamedTuple):
    """What a model says at N positions, [N] each, without a gradient."""

    logp_N: Tensor  # of the target, nats
    likeliest_N: Tensor  # int64 token ids
    mean_N: Tensor  # of log p(v) over the vocabulary, v drawn from the model itself: minus the entropy
    variance_N: Tensor  # of the same


class Predictions(Protocol):
    """What a model says at those N positions. A tensor [N, V] is never held."""

    def logp_N(self) -> Tensor:
        """log p(target), float32 nats (float64 if the model is)."""
        ...

    def margin_N(self) -> Tensor:
        """max logit - mean logit over the tokeniser's vocabulary."""
        ...

    def distribution(self) -> Distribution:
        """In one walk over the logits; no gradient. Types as logp_N."""
        ...

    def map_logits(self, f: Callable[..., Tensor], *others: Any) -> Tensor:
        """f(targets [n], logits [n, V], the others' logits [n, V]...) -> [n], on chunks of tokens; the chunks concatenated, [N].

        Logits are computed in the base's type, handed on as float32 (float64 if the model is), and recomputed in backward.
        The others are predictions of the same tokens; their logits take no gradient.
        """
        ...

    def hidden_ND(self) -> Tensor:
        """States after the layer at the depth that the loss declares (Loss.depth)."""
        ...


class View(NamedTuple):
    """One text under the current and, if asked for, the reference model (the same network with the adapter off)."""

    answers: Answers
    now: Predictions
    reference: Predictions | None = None


class Loss(NamedTuple):
    """A loss as numbers per token or per row, pure in the views, so that every split into micro-batches is exact."""

    fn: Callable[[Mapping[str, View]], Tensor]  # views: "answer", and "refusal" for pair losses -> [N] or [B]
    per: Literal["token", "row"]
    # "reference": log p(target) under the reference; "reference_states": its states at `depth`, hence its logits if that is
    # 1; "refusal": a second view of the same rows, answered with a refusal
    needs: frozenset[str] = frozenset()
    # of the states that hidden_ND gives, as a part of the stack: 0 the embeddings, 1 what the head reads
    depth: float = 1.0
    fixed_weights: bool = False  # factors of it count as constants: its gradient is not the derivative of its value
    lowers: str = "answer_logp"  # the quantity that a descent step on it moves down; the contract tests check it


def row_sums(answers: Answers, values_N: Tensor) -> Tensor:
    """Sums over each row's tokens, [N] -> [B].

    >>> row_sums(Answers(torch.tensor([5, 6, 7]), torch.tensor([0, 0, 1]), rows=2), torch.tensor([1.0, 2.0, 4.0])).tolist()
    [3.0, 4.0]
    """
    return values_N.new_zeros(answers.rows).index_add_(0, answers.row_N, values_N)


def counted(input_ids_BT: Tensor, labels_BT: Tensor) -> tuple[Answers, Tensor]:
    """The counted tokens of a padded batch, and where they are predicted.

    labels_BT is aligned with input_ids_BT and -100 where a token does not count (no shift applied yet). The token at
    position t is predicted from position t-1; a label at t = 0 has no prediction and does not count.

    Returns:
        answers, and predicted_at_N: int64 indices into the flattened [B*T] positions whose hidden state predicts them.
    """
    counts_BT = labels_BT[:, 1:] != -100
    row_N, before_N = torch.nonzero(counts_BT, as_tuple=True)
    target_N = labels_BT[row_N, before_N + 1]
    return Answers(target_N, row_N, labels_BT.shape[0]), row_N * input_ids_BT.shape[1] + before_N
