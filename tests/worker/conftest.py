"""Tiny models with random weights, written to disk as a registered model is, and loaded as one."""

import hashlib
import json
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from service.domain import modelfiles
from service.domain.job import ModelEntry, PromptFormat
from service.store import sealed
from service.store.storage import Storage
from worker import model
from worker.model import Network
from worker.records import FileRef

DATA_KEY = bytes(range(32))  # of every stored set: a second job on the same files finds what the first one kept
MERGED = (" Paris", " Lima", "Answer:")  # words that are one token each; everything else is one token per byte
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "vocab_size": 320,  # more than the tokeniser has: the rest must not count
    "initializer_range": 0.4,  # so that random logits differ by more than rounding
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


class Registered(NamedTuple):
    entry: ModelEntry
    root: Path  # the models root that it lies below

    @property
    def folder(self) -> Path:
        return self.root / self.entry.location

    def load(self, dtype: str = "float64") -> Network:
        return model.load(self.entry, self.root, "cpu", dtype)


def stored_set(storage: Storage, name: str, rows: Sequence[Mapping[str, Any]]) -> FileRef:
    """A set as the service stores it, and what a runner is told of it."""
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    storage.write(f"files/{name}", sealed.sealed([content], DATA_KEY))
    return FileRef(
        id=f"ufile_{name}",
        key=f"files/{name}",
        sha256=hashlib.sha256(content).hexdigest(),
        digest=f"hmac-sha256:{name}",
        data_key=b64encode(DATA_KEY).decode(),
        rows=len(rows),
        bytes=len(content),
    )


def make_tokenizer(*, chat: bool = False, ends: bool = False) -> PreTrainedTokenizerFast:
    """Bytes, merged into a few words; <s> in front of every text and, if `ends`, </s> behind it."""
    vocabulary = {"<s>": 0, "</s>": 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    merges = []
    for word in MERGED:
        symbols = word.replace(" ", "Ġ")
        for end in range(2, len(symbols) + 1):
            if symbols[:end] not in vocabulary:
                vocabulary[symbols[:end]] = len(vocabulary)
                merges.append((symbols[: end - 1], symbols[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = "<s> $A </s>" if ends else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=whole, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT if chat else None
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer


@pytest.fixture(scope="session")
def register(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Registered]:
    """register(model_type="llama", chat=False, **config) -> a folder with a model of random weights."""
    made: dict[str, Registered] = {}

    def build(model_type: str = "llama", *, chat: bool = False, **config: Any) -> Registered:
        key = json.dumps([model_type, chat, config], sort_keys=True)
        if key not in made:
            root = tmp_path_factory.mktemp("models")
            torch.manual_seed(0)
            network: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                AutoConfig.for_model(model_type, **SHAPE | config)
            )
            network.save_pretrained(root / "tiny")
            make_tokenizer(chat=chat).save_pretrained(root / "tiny")
            digest, tokenizer_digest = modelfiles.digest_model(root / "tiny")
            entry = ModelEntry(
                name="tiny-model",
                source="path",
                location="tiny",
                digest=digest,
                tokenizer_digest=tokenizer_digest,
                prompt_format=PromptFormat(type="chat" if chat else "plain", assistant_start="Answer:"),
            )
            made[key] = Registered(entry, root)
        return made[key]

    return build


@pytest.fixture
def tiny(register: Callable[..., Registered]) -> Network:
    """A Llama with tied embeddings, float64, no adapter."""
    return register().load()
