"""How hard a row pulls at the model: norms of the gradient of its log-probability. Members of the training set pull less.

The GradNorm attack (Wang et al. 2024, arXiv 2402.17012, and OpenUnlearning, arXiv 2506.12618): the mean over the model's
parameter tensors of the 2-norm of the gradient of the row's mean log p.

No gradient outlives the norm that is taken of it. That of a linear layer, sum_t d_t x_t^T with the inputs x and the gradients
d of the outputs, need not even be formed: its squared norm is sum_ts (x_t . x_s)(d_t . d_s), which is less work for a row that
is short beside the layer's width (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679); for a longer one it
is left to autograd. An embedding is a linear layer of one-hot inputs, and a weight that layers share has the sum of what
each of them adds.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from worker import decoder
from worker.data import TokenRow
from worker.model import Network, own_logits


def gradient_norms(network: Network, rows: Sequence[TokenRow]) -> Tensor:
    """[B] float64: the mean over the model's parameter tensors of the 2-norm of the gradient of the row's mean log p.

    The mean log p is over the counted tokens but the end of sequence. The parameters are the base's own, tied ones once, those
    that no gradient reaches left out. With an adapter in the network W stands for the merged W + s B A, and the gradient in it is
    the one in W; the adapter's factors are no parameters of the merged model.
    """
    with _norms(network) as (norms, shared, begin):
        means = []
        for row in rows:
            begin(len(row.ids))
            _mean_logp(network, row).backward()  # type: ignore[no-untyped-call]
            norms += map(outer_norm, shared.values())
            means.append(torch.stack(norms).mean())
            norms.clear()
            shared.clear()
    return torch.stack(means).cpu() if means else torch.zeros(0, dtype=torch.float64)


def _mean_logp(network: Network, row: TokenRow) -> Tensor:
    last = len(row.ids) - row.ends
    ids_T = torch.tensor(row.ids, device=network.device)
    states_TD = decoder.states(network, ids_T[None], [len(row.ids)])[0][0]
    states_ND, label_N = states_TD[row.answer_start - 1 : last - 1], ids_T[row.answer_start : last]
    logits = network.causal.get_output_embeddings() if network.head is not None else own_logits(network.causal)
    logits_NV = logits(states_ND)[:, : network.vocabulary]
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return logits_NV.log_softmax(-1).gather(1, label_N[:, None]).mean()


class Outer(NamedTuple):
    """sum_t left_t right_t^T: what a layer adds to the gradient of its weight [L, R]."""

    left: Tensor  # [T, L]; or [T] int64: one-hot, by the places of the ones
    right_TR: Tensor


@contextmanager
def _norms(network: Network) -> Iterator[tuple[list[Tensor], dict[int, list[Outer]], Callable[[int], None]]]:
    """Within it a backward pass leaves no gradient. It appends to the first the 2-norms of those of the base's parameters.

    What layers add to a weight that they share goes to the second instead, by the weight's id: the norm is that of the sum.
    Before each row the third is told of the row's tokens.
    """
    norms: list[Tensor] = []
    shared: dict[int, list[Outer]] = {}

    def take(p: Tensor) -> None:
        assert p.grad is not None
        norms.append(_norm(p.grad))
        p.grad = None

    def watch(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        def add(d: Tensor) -> None:
            outer = _outer(layer, inputs[0].detach(), d)
            if uses[id(layer.weight)] == 1:
                norms.append(outer_norm([outer]))
            else:
                shared.setdefault(id(layer.weight), []).append(outer)

        if type(layer) is nn.Embedding:  # before it there is nothing that is learned
            output = output.requires_grad_().clone()
        if output.requires_grad and not layer.weight.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]
        return output

    parameters: dict[str, nn.Parameter] = dict(network.causal.named_parameters())
    before = {name: p.requires_grad for name, p in parameters.items()}
    uses = Counter(id(p) for module in network.causal.modules() for p in module.parameters(recurse=False))
    watched = _layers(network, uses)
    apart = {id(layer.weight) for layer in watched}
    for name, p in parameters.items():
        p.requires_grad_(".lora_" not in name and id(p) not in apart)
    alone: list[Any] = [layer.weight.requires_grad_() for layer in watched if uses[id(layer.weight)] == 1]

    def begin(tokens: int) -> None:
        for weight in alone:
            weight.requires_grad_(_is_less_formed(tokens, *weight.shape))

    learned: list[Any] = [p for p in parameters.values() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(take) for p in learned]
    handles += [layer.register_forward_hook(watch) for layer in watched]
    try:
        with torch.enable_grad():
            yield norms, shared, begin
    finally:
        for handle in handles:
            handle.remove()
        for name, p in parameters.items():
            p.requires_grad_(before[name])


def _layers(network: Network, uses: Counter[int]) -> list[Any]:
    """Linear layers and embeddings, the adapter's own left out; if they share a weight, with none but such layers."""
    layers: list[Any] = [
        layer
        for name, layer in network.causal.named_modules()
        if type(layer) in (nn.Linear, Conv1D, nn.Embedding) and ".lora_" not in name
    ]
    known = Counter(id(layer.weight) for layer in layers)
    return [layer for layer in layers if known[id(layer.weight)] == uses[id(layer.weight)]]


def _outer(layer: Any, x: Tensor, d: Tensor) -> Outer:
    d_TO = d.flatten(0, -2)
    if type(layer) is nn.Embedding:
        counts_T = x.flatten() != (-1 if layer.padding_idx is None else layer.padding_idx)  # padding has no gradient
        return Outer(x.flatten()[counts_T], d_TO[counts_T])
    return Outer(d_TO, x.flatten(0, -2))


def outer_norm(sums: Sequence[Outer]) -> Tensor:
    """The 2-norm of their sum, float64.

    >>> linear = Outer(torch.tensor([[3.0, 0.0], [4.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    >>> round(float(outer_norm([linear])) ** 2, 3)  # 7^2 + 4^2
    65.0
    >>> round(float(outer_norm([linear, Outer(torch.tensor([0]), torch.tensor([[1.0, -4.0]]))])) ** 2, 3)  # 8^2
    64.0
    """
    dense = [outer for outer in sums if outer.left.is_floating_point()]
    if dense:
        tokens = sum(len(outer.left) for outer in dense)
        if _is_less_formed(tokens, dense[0].left.shape[1], dense[0].right_TR.shape[1]):
            return _norm(_formed(dense, [outer for outer in sums if not outer.left.is_floating_point()]))
    squared = torch.stack([_inner(a, b) for a in sums for b in sums]).sum()
    return squared.clamp(min=0.0).sqrt()


def _is_less_formed(tokens: int, rows: int, columns: int) -> bool:
    """Whether forming sum_t d_t x_t^T is less work than its norm without."""
    return tokens * (rows + columns) >= rows * columns


def _formed(dense: Sequence[Outer], one_hot: Sequence[Outer]) -> Tensor:
    left_TL, right_TR = (torch.cat([_wide(outer[k]) for outer in dense]) for k in (0, 1))
    gradient_LR = left_TL.T @ right_TR
    for outer in one_hot:
        gradient_LR.index_add_(0, outer.left, _wide(outer.right_TR))
    return gradient_LR


def _inner(a: Outer, b: Outer) -> Tensor:
    """The inner product of two sums, neither of which is formed."""
    if a.left.is_floating_point() and b.left.is_floating_point():
        lefts = _wide(a.left) @ _wide(b.left).T
    elif a.left.is_floating_point():
        lefts = _wide(a.left[:, b.left])
    elif b.left.is_floating_point():
        lefts = _wide(b.left[:, a.left]).T
    else:
        lefts = a.left[:, None] == b.left
    return ((_wide(a.right_TR) @ _wide(b.right_TR).T).double() * lefts.double()).sum()


def _norm(gradient: Tensor) -> Tensor:
    along = torch.linalg.vector_norm(_wide(gradient), dim=-1)  # in two steps: sums in float32 stay short
    norm: Tensor = torch.linalg.vector_norm(along, dtype=torch.float64)
    return norm


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
