"""Negative log-likelihood: the loss that the model was trained with, kept low on what it must still know.

Its mean over counted tokens is the quantity that a request's constraint bounds.

Reference: the maximum-likelihood objective; as retain term e.g. in Maini et al. 2024 (TOFU), arXiv 2401.06121.
"""

from collections.abc import Mapping

from torch import Tensor

from worker.tokens import Loss, View


def nll() -> Loss:
    """-log p(target) per counted token, in nats.

    Four equal logits give each token probability 1/4, and -log(1/4) = 2 log 2 = 1.3863.

    >>> import torch
    >>> from worker.head import FusedPredictions, Head
    >>> from worker.tokens import Answers
    >>> logits_14, target_1 = torch.zeros(1, 4), torch.tensor([2])
    >>> now = FusedPredictions(logits_14, target_1, Head(torch.eye(4)))
    >>> view = View(Answers(target_1, row_N=torch.tensor([0]), rows=1), now)
    >>> round(nll().fn({"answer": view}).item(), 4)
    1.3863
    """

    def fn(views: Mapping[str, View]) -> Tensor:
        return -views["answer"].now.logp_N()

    return Loss(fn, per="token", lowers="answer_nll")
