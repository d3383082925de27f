"""Two LoRA adapters as one that does what both do together: s B A + t D C = [s B, t D] [A; C].

PEFT's `add_weighted_adapter` with "cat" computes the same product, but gives the result the first adapter's layers: what the
second has on others would be lost. All layers have the same rank here, padded with zeros where only one of the two acts, and a
scale of one, so that a reader of LoRA that knows no rank or scale per layer applies it as PEFT does.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

PREFIX = "base_model.model."  # of the names under which PEFT stores an adapter's tensors


def write_concatenated(peft: PeftModel, names: Sequence[str], folder: Path) -> None:
    """The files of one adapter in place of those named, as PEFT writes and reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = concatenated(peft, names)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


@torch.no_grad()
def concatenated(peft: PeftModel, names: Sequence[str]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors (A [R, inputs], B [outputs, R], R the sum of the ranks) of one adapter in place of those named.

    Exact but for the rounding of s * B in the adapters' own type; there is none where the scale is a power of two, and what
    was itself concatenated (scale one) keeps its bits.
    """
    configs: list[Any] = [peft.peft_config[name] for name in names]
    layers: list[tuple[str, Any]] = [
        (path, module) for path, module in peft.get_base_model().named_modules() if isinstance(module, LoraLayer)
    ]
    rank = sum(config.r for config in configs)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers:
        here = [name for name in names if name in layer.lora_A]
        a_RI = torch.cat([layer.lora_A[name].weight for name in here])
        b_OR = torch.cat([layer.scaling[name] * layer.lora_B[name].weight for name in here], dim=1)
        absent = rank - len(a_RI)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = pad(a_RI, (0, 0, 0, absent)).cpu()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = pad(b_OR, (0, absent)).cpu()
    config = replace(
        configs[-1],
        r=rank,
        lora_alpha=rank,
        target_modules=[path for path, _ in layers],  # whole paths: the layers of one kind need not all have an adapter
        layers_to_transform=None,
        inference_mode=True,
    )
    return config, tensors
