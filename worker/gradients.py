"""How hard a row pulls at the model: norms of the gradient of its log-probability. Members of the training set pull less.

The GradNorm attack (Wang et al. 2024, arXiv 2402.17012, and OpenUnlearning, arXiv 2506.12618): the mean over the model's
parameter tensors of the 2-norm of the gradient of the row's mean log p.

No gradient outlives the norm that is taken of it. That of a linear layer, sum_t d_t x_t^T with the inputs x and the gradients
d of the outputs, need not even be formed: its squared norm is sum_ts (x_t . x_s)(d_t . d_s), which is less work for a row that
is short beside the layer's width (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from worker.data import TokenRow
from worker.model import Network, own_logits


def gradient_norms(network: Network, rows: Sequence[TokenRow]) -> Tensor:
    """[B] float64: the mean over the model's parameter tensors of the 2-norm of the gradient of the row's mean log p.

    The mean log p is over the counted tokens but the end of sequence. The parameters are the base's own, tied ones once, those
    that no gradient reaches left out. With an adapter in the network W stands for the merged W + s B A, and the gradient in it is
    the one in W; the adapter's factors are no parameters of the merged model.
    """
    with _norms(network) as norms:
        means = []
        for row in rows:
            _mean_logp(network, row).backward()  # type: ignore[no-untyped-call]
            means.append(torch.stack(norms).mean())
            norms.clear()
    return torch.stack(means).cpu() if means else torch.zeros(0, dtype=torch.float64)


def _mean_logp(network: Network, row: TokenRow) -> Tensor:
    last = len(row.ids) - row.ends
    ids_T = torch.tensor(row.ids[:last], device=network.device)  # nothing is asked of the state at the end of sequence
    states_TD = network.causal.get_decoder()(input_ids=ids_T[None], use_cache=False).last_hidden_state[0]
    states_ND, label_N = states_TD[row.answer_start - 1 : -1], ids_T[row.answer_start :]
    logits = network.causal.get_output_embeddings() if network.head is not None else own_logits(network.causal)
    logits_NV = logits(states_ND)[:, : network.vocabulary]
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return logits_NV.log_softmax(-1).gather(1, label_N[:, None]).mean()


@contextmanager
def _norms(network: Network) -> Iterator[list[Tensor]]:
    """Within it a backward pass appends the 2-norm of the gradient of each of the base's parameters, and leaves no gradient."""
    norms: list[Tensor] = []

    def take(p: Tensor) -> None:
        assert p.grad is not None
        norms.append(_norm(p.grad))
        p.grad = None

    def watch(_: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
        x_TI = inputs[0].detach().flatten(0, -2)
        if output.requires_grad:
            output.register_hook(lambda d: norms.append(outer_norm(x_TI, d.flatten(0, -2))))

    parameters: dict[str, nn.Parameter] = dict(network.causal.named_parameters())
    before = {name: p.requires_grad for name, p in parameters.items()}
    watched: list[Any] = list(_linear_layers(network))
    apart = {id(layer.weight) for layer in watched}
    for name, p in parameters.items():
        p.requires_grad_(".lora_" not in name and id(p) not in apart)
    learned: list[Any] = [p for p in parameters.values() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(take) for p in learned]
    handles += [layer.register_forward_hook(watch) for layer in watched]
    try:
        with torch.enable_grad():
            yield norms
    finally:
        for handle in handles:
            handle.remove()
        for name, p in parameters.items():
            p.requires_grad_(before[name])


def _linear_layers(network: Network) -> Iterator[nn.Module]:
    """Those of the decoder whose weight is theirs alone, the adapter's own left out."""
    layers = [
        layer
        for name, layer in network.causal.get_decoder().named_modules()
        if type(layer) in (nn.Linear, Conv1D) and ".lora_" not in name
    ]
    uses = Counter(id(p) for module in network.causal.modules() for p in module.parameters(recurse=False))
    yield from (layer for layer in layers if uses[id(layer.weight)] == 1)


def outer_norm(x_TI: Tensor, d_TO: Tensor) -> Tensor:
    """The 2-norm of sum_t d_t x_t^T, float64.

    >>> round(float(outer_norm(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0], [4.0]]))) ** 2, 3)  # 7^2 + 4^2
    65.0
    """
    tokens, inputs, outputs = len(x_TI), x_TI.shape[1], d_TO.shape[1]
    if tokens * (inputs + outputs) >= inputs * outputs:
        return _norm(_wide(d_TO).T @ _wide(x_TI))
    x_TI, d_TO = _wide(x_TI), _wide(d_TO)
    squared = ((x_TI @ x_TI.T).double() * (d_TO @ d_TO.T).double()).sum()
    return squared.clamp(min=0.0).sqrt()


def _norm(gradient: Tensor) -> Tensor:
    along = torch.linalg.vector_norm(_wide(gradient), dim=-1)  # in two steps: sums in float32 stay short
    norm: Tensor = torch.linalg.vector_norm(along, dtype=torch.float64)
    return norm


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
