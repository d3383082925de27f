"""How large a model is, from its config.json and the headers of its safetensors files. No weight is read."""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from service.domain import modelfiles
from service.domain.errors import InvalidRequest
from service.domain.job import ModelEntry

HEADER_MAX_BYTES = 100_000_000  # the format's own limit
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})  # of mixture models; they get no adapter
HEADS = ("lm_head.weight", "embed_out.weight", "output_projection.weight")
# Names of one size in the configs of different architectures, the first that is there counts.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
WIDTH = ("hidden_size", "n_embd", "d_model")
INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
HEAD_COUNT = ("num_attention_heads", "n_head", "num_heads")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


class Linear(BaseModel):
    """The linear layers of one name, summed over the stack."""

    modules: int
    inputs: int
    outputs: int


class Sizes(BaseModel):
    parameters: int = Field(description="those that are loaded; what is tied counts once")
    layers: int
    width: int = Field(description="of the hidden states")
    inner: int = Field(description="of the feed-forward part")
    attention: int = Field(description="heads times the width of one")
    keys: int = Field(description="the same of the heads that keys, or values, have")
    vocabulary: int
    mixture: bool = Field(description="of experts")
    linear: dict[str, Linear] = Field(description="those that can get an adapter, by the last part of their names")


def registered(entry: ModelEntry) -> Sizes | None:
    """As they were found when the model was registered; None: they were not."""
    return Sizes.model_validate(entry.info["sizes"]) if "sizes" in entry.info else None


def read(folder: Path) -> Sizes | None:
    """None where the files do not say: a config with other names, or weights whose headers cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        text = config.get("text_config", config)
        shapes = dict(_shapes(folder))
        width, heads = _size(text, WIDTH), _size(text, HEAD_COUNT)
        head = text.get("head_dim") or width // heads
        if text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)):
            shapes = {name: shape for name, shape in shapes.items() if not name.endswith(HEADS)}
        return Sizes(
            parameters=sum(map(prod, shapes.values())),
            layers=_size(text, LAYERS),
            width=width,
            inner=_size(text, INNER, 4 * width),
            attention=heads * head,
            keys=(text.get("num_key_value_heads") or heads) * head,
            vocabulary=_size(text, ("vocab_size",)),
            mixture=any(text.get(name) for name in EXPERTS),
            linear=_linear(shapes),
        )
    except (ArithmeticError, AttributeError, InvalidRequest, KeyError, OSError, RecursionError, TypeError, ValueError):
        return None


def _size(config: Mapping[str, Any], names: tuple[str, ...], default: int | None = None) -> int:
    found = next((config[name] for name in names if config.get(name) is not None), default)
    if not isinstance(found, int) or found < 1:
        raise ValueError(names[0])
    return found


def _shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every parameter of the files that are loaded. Masks, which are four-dimensional, are none."""
    for name in modelfiles.weights(folder):
        if not name.endswith(".safetensors"):
            continue
        with (folder / name).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > HEADER_MAX_BYTES:
                raise ValueError(name)
            header = json.loads(file.read(length))
        for tensor, facts in header.items():
            if tensor != "__metadata__" and len(facts["shape"]) < 4:
                yield tensor, facts["shape"]


def _linear(shapes: Mapping[str, list[int]]) -> dict[str, Linear]:
    """Matrices within the numbered layers: neither embeddings nor the head, which lie outside."""
    found: dict[str, Linear] = {}
    for name, shape in shapes.items():
        *path, last, kind = ["", *name.split(".")]
        if kind != "weight" or len(shape) != 2 or last in ROUTERS or not any(part.isdigit() for part in path):
            continue
        before = found.get(last, Linear(modules=0, inputs=0, outputs=0))
        found[last] = Linear(
            modules=before.modules + 1, inputs=before.inputs + shape[1], outputs=before.outputs + shape[0]
        )
    return found
