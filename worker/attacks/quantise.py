"""Quantisation: rounding the weights takes small updates back, and what they had hidden is there again.

Round to nearest, as in Zhang et al. 2024, "Catastrophic Failure of LLM Unlearning via Quantization", arXiv 2410.16454. It is
simulated: the model computes with the rounded weights in its own type, so it needs no kernel and runs on every device. The
arithmetic is a page of a library that comes with its own kernels and is tied to versions of torch (torchao), hence ours.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from service.domain.rows import Example
from worker.attacks.attack import Attack, merged
from worker.model import ROUTERS, Network

GROUPS = {8: None, 4: 64}  # bits -> inputs of an output channel that share a scale; None: all of them


def quantise(rows: Sequence[Example], bits: int) -> Attack:
    group = GROUPS[bits]
    scale = "one scale per output channel" if group is None else f"one scale per {group} inputs of an output channel"
    return Attack(
        f"quantise_{bits}",
        f"weights of the merged model's linear layers, the head left out, rounded to {bits} bits ({scale})",
        rows,
        [rows],
        partial(quantised, bits=bits),
    )


@torch.no_grad()
def quantised(network: Network, bits: int) -> Network:
    """A copy with its adapter merged and the weights of its linear layers rounded; head, embeddings and routers stay."""
    copy = merged(network)
    for layer in _linear(copy.causal):
        transposed = isinstance(layer, Conv1D)  # its weight is [inputs, outputs]
        weight_OI = layer.weight.T if transposed else layer.weight
        rounded_OI = rounded(weight_OI, bits, GROUPS[bits])
        layer.weight = nn.Parameter(rounded_OI.T.contiguous() if transposed else rounded_OI, requires_grad=False)
    return copy


def _linear(causal: Any) -> Iterator[Any]:
    head = causal.get_output_embeddings()
    for name, module in causal.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name.rpartition(".")[2] not in ROUTERS:
            yield module


def rounded(weight_OI: Tensor, bits: int, group: int | None) -> Tensor:
    """The nearest of the 2^bits - 1 levels that lie evenly between minus and plus the largest weight of each group.

    Args:
        weight_OI: output channels x inputs.
        group: so many inputs of a channel share a scale, the last ones perhaps fewer; None: all of them.

    Returns:
        a new tensor of the weight's type. Float16 and bfloat16 weights are divided in float32, and round the level once more.

    With two bits the levels are -m, 0 and m:

    >>> rounded(torch.tensor([[1.0, -0.6, 0.2, 3.0, 2.0]]), bits=2, group=3)
    tensor([[ 1., -1.,  0.,  3.,  3.]])
    """
    wide_OI = weight_OI if weight_OI.dtype == torch.float64 else weight_OI.float()
    outputs, inputs = weight_OI.shape
    size = inputs if group is None else group
    grouped_OGS = pad(wide_OI, (0, -inputs % size)).view(outputs, -1, size)  # zeros change no group's largest weight
    step_OG1: Tensor = grouped_OGS.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    level_OGS: Tensor = (grouped_OGS / step_OG1.clamp(min=torch.finfo(step_OG1.dtype).tiny)).round()
    return (level_OGS * step_OG1).flatten(1)[:, :inputs].to(weight_OI.dtype, copy=True)
