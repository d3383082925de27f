"""What a model said of a benchmark's texts, kept for the next job that asks: a base model is looked at once, not once per job.

One file for each (set, text), named by a digest of all that its numbers depend on, below the storage root. It begins with
the digest of the rest: what lies there and is not what was written is computed again.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors.torch import load, save
from torch import Tensor

from service import prompts
from service.domain.errors import NotFound, StorageUnavailable
from service.store.storage import Storage
from worker.data import Encoded
from worker.model import Network
from worker.scores import Scores
from worker.suite import Ask

CODE = ("data", "decoder", "generation", "gradients", "head", "looks", "scoring", "tokens", "trees", "views")
FOLDER = "looks"
DIGEST_BYTES = 64  # hexadecimal
ROWS = ("nll_B", "counted_B", "gradient_norm_B")  # a number for each row
TOKENS = ("hits", "logp", "standardised")  # a tensor for each row
TEXTS = ("generated", "answers", "labels", "generated_ids", "prompts")  # by place


def model_digest(network: Network) -> str:
    """Of the base's files, of the adapter as it is now, and of what computes with them."""
    weights = network.causal.get_input_embeddings().weight
    facts = (_code(), torch.__version__, transformers.__version__, network.digest, network.tokenizer_digest)
    return _digest(*facts, network.vocabulary, str(weights.dtype), weights.device.type, adapter_digest(network))


@cache
def _code() -> str:
    """Of the source that computes what is kept: nothing that another version computed is taken for this one's."""
    own = [Path(__file__).with_name(f"{name}.py") for name in CODE]
    sources = [path.read_bytes() for path in (*own, *sorted(Path(prompts.__file__).parent.glob("*.py")))]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()


def adapter_digest(network: Network) -> str:
    """Of the tensors and scales of the LoRA layers that are on; "base" if there are none."""
    said = hashlib.sha256()
    on = False
    layers: list[tuple[str, Any]] = [
        (name, layer) for name, layer in network.causal.named_modules() if isinstance(layer, LoraLayer)
    ]
    for name, layer in layers:
        if layer.disable_adapters:
            continue
        for adapter in layer.active_adapters:
            own = {n: p for n, p in layer.named_parameters() if n.startswith("lora_") and adapter in n.split(".")}
            for part, p in sorted(own.items()):
                said.update(json.dumps([name, part, str(p.dtype), list(p.shape), layer.scaling[adapter]]).encode())
                said.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
                on = True
    return said.hexdigest() if on else "base"


def key(model: str, text: tuple[str, str], ask: Ask, encoded: Encoded) -> str:
    """Where a look lies below the storage root.

    Args:
        model: its digest.
        text: (set, text).
    """
    rows = [(row.ids, row.answer_start, row.ends) for row in encoded.rows]
    asked: list[object] = [sorted(ask.views), ask.scored]
    if "generated" in ask.views:
        asked += [ask.max_new_tokens, list(ask.stops), ask.beyond_context, encoded.answers, encoded.prompts]
    return f"{FOLDER}/{_digest(model, text, sorted(ask.texts), asked, rows)}"


def keep(storage: Storage, key: str, scores: Scores) -> None:
    tensors = {name: value for name in ROWS if (value := getattr(scores, name)) is not None}
    for name in TOKENS:
        if (rows := getattr(scores, name)) is not None:
            tensors[name] = torch.cat(rows) if rows else torch.empty(0)
            tensors[f"{name}/lengths"] = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    texts = {name: sorted(by_place.items()) for name in TEXTS if (by_place := getattr(scores, name)) is not None}
    payload = save(
        tensors,
        {"places": json.dumps(scores.places), "empty": json.dumps(list(scores.empty)), "texts": json.dumps(texts)},
    )
    storage.write(key, [hashlib.sha256(payload).hexdigest().encode(), payload])


def recall(storage: Storage, key: str) -> Scores | None:
    """None: it is not there, or not what was written."""
    try:
        content = b"".join(storage.read(key))
    except (NotFound, StorageUnavailable):  # such as what was sealed with the keys of other files
        return None
    said, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(payload).hexdigest().encode() != said:
        return None
    tensors, header = load(payload), _header(payload)
    fields: dict[str, Any] = {name: tensors[name] for name in ROWS if name in tensors}
    for name in TOKENS:
        if name in tensors:
            fields[name] = _split(tensors[name], tensors[f"{name}/lengths"])
    for name, pairs in json.loads(header["texts"]).items():
        fields[name] = dict(pairs)
    return Scores(places=json.loads(header["places"]), empty=json.loads(header["empty"]), **fields)


def _split(values_N: Tensor, lengths_B: Tensor) -> list[Tensor]:
    return list(torch.split(values_N, lengths_B.tolist()))


def _header(payload: bytes) -> dict[str, str]:
    """The text part of a safetensors file: after the length of its head in eight bytes, a JSON object."""
    length = int.from_bytes(payload[:8], "little")
    metadata: dict[str, str] = json.loads(payload[8 : 8 + length])["__metadata__"]
    return metadata


def _digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
