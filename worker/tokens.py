"""What a batch says, packed: only the tokens that count. The next-token shift is done once, here and nowhere else.

Legend of shape letters, for the whole numerical core:
B rows   T positions of a padded batch   N counted tokens of the batch   V vocabulary   D hidden width
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor


class Answers(NamedTuple):
    """What the rows should have said: only tokens that count."""

    target_N: Tensor  # int64 token ids
    row_N: Tensor  # int64 in [0, B): the row of each token, ascending
    rows: int  # B


class Predictions(Protocol):
    """What a model says at those N positions. A tensor [N, V] is never held."""

    def logp_N(self) -> Tensor:
        """log p(target), float32 nats (float64 if the model is)."""
        ...

    def margin_N(self) -> Tensor:
        """max logit - mean logit over the tokeniser's vocabulary."""
        ...

    def map_logits(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """f on the logits of a chunk of tokens, [n, V] -> [n]; the chunks concatenated, [N]; recomputed in backward."""
        ...

    def hidden_ND(self, depth: float) -> Tensor:
        """States after the layer at `depth` of the stack, 0 = embeddings, 1 = what the head reads."""
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
    needs: frozenset[str] = frozenset()  # of {"reference", "refusal", "hidden"}
    lowers: str = "answer_logp"  # the quantity that a descent step on it moves down; the contract tests check it


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
