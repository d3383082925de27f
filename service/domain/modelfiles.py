"""The files of a model's folder: which are loaded, whether they may be, and what they digest to.

Weights are safetensors only: a pickle runs code when it is read. For the same reason nothing that names code of its
own (`auto_map`) is accepted. The worker calls `inspect` again on what it is about to load and compares the digests.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from service.domain.errors import FieldProblem, InvalidRequest

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")  # one of them is enough
TOKENIZER_FILES = frozenset(
    {*TOKENIZERS, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    | {"chat_template.jinja", "chat_template.json"}
)
CONFIG_FILES = frozenset({"config.json", "generation_config.json", "model.safetensors.index.json"})
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CAUSAL = ("ForCausalLM", "LMHeadModel")  # how architectures that predict the next token are named
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


class ModelFacts(NamedTuple):
    digest: str  # "sha256:…" of every file that is loaded
    tokenizer_digest: str  # of those of the tokeniser alone
    files: dict[str, str]  # name -> SHA-256 of every file that is loaded
    architecture: str
    context_tokens: int | None
    vocabulary: int | None
    chat_template: bool


def digest_model(folder: Path) -> tuple[str, str]:
    """(digest, tokenizer digest), each "sha256:" and 64 hex digits, over the names and contents of what is loaded."""
    return digest_files(sums(folder))


def sums(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 in 64 hex digits of every file that is loaded."""
    return {name: _sha256(folder / name) for name in sorted(loaded(folder))}


def loaded(folder: Path) -> list[str]:
    """The names of the files that are loaded; what else lies in the folder plays no part."""
    return [path.name for path in folder.iterdir() if path.is_file() and _is_loaded(path.name)]


def digest_files(files: Mapping[str, str]) -> tuple[str, str]:
    """`digest_model` of a folder with these files, as `sums` gives them."""
    ordered = sorted(files.items())
    return _digest(ordered), _digest((name, sha) for name, sha in ordered if name in TOKENIZER_FILES)


def digest_tokenizer(folder: Path) -> str:
    """The second of `digest_model`, without reading the weights."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name in TOKENIZER_FILES)
    return _digest((name, _sha256(folder / name)) for name in names)


def inspect(folder: Path) -> ModelFacts:
    """What the folder holds, read without running any of it. Raises InvalidRequest if it must not or cannot be loaded."""
    if not folder.is_dir():
        raise _refused(f"{folder} is not a folder", "not_found")
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if "adapter_config.json" in names:
        raise _refused(f"{folder.name} is an adapter, not a model: register its base model", "adapter")
    config = _json(folder, "config.json")
    if "auto_map" in config:
        raise _refused("config.json names code of its own (auto_map): remote code is never run", "remote_code")
    tokenizer_config = _json(folder, "tokenizer_config.json") if "tokenizer_config.json" in names else {}
    if "auto_map" in tokenizer_config:
        raise _refused(
            "tokenizer_config.json names code of its own (auto_map): remote code is never run", "remote_code"
        )
    architecture = _architecture(config)
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if name.endswith(PICKLES))
        if pickles:
            raise _refused(f"{pickles[0]} is a pickle, which runs code when read: convert it to safetensors", "pickle")
        raise _refused(f"{folder.name} has no *.safetensors", "weights")
    if not names.intersection(TOKENIZERS):
        raise _refused(f"{folder.name} has no tokeniser ({', '.join(TOKENIZERS)})", "tokenizer")
    files = sums(folder)
    digest, tokenizer_digest = digest_files(files)
    return ModelFacts(
        digest=digest,
        tokenizer_digest=tokenizer_digest,
        files=files,
        architecture=architecture,
        context_tokens=next((config[key] for key in CONTEXT_KEYS if isinstance(config.get(key), int)), None),
        vocabulary=config["vocab_size"] if isinstance(config.get("vocab_size"), int) else None,
        chat_template=bool(tokenizer_config.get("chat_template"))
        or not names.isdisjoint({"chat_template.jinja", "chat_template.json"}),
    )


def _is_loaded(name: str) -> bool:
    return name in CONFIG_FILES or name in TOKENIZER_FILES or name.endswith(".safetensors")


def _architecture(config: dict[str, Any]) -> str:
    given = config.get("architectures")
    names = [str(name) for name in given] if isinstance(given, list) else []
    causal = next((name for name in names if name.endswith(CAUSAL)), None)
    if causal is None:
        raise _refused(
            f"config.json names no causal language model, but {', '.join(names) or 'no architecture'}", "architecture"
        )
    return causal


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise _refused(f"{folder.name} has no {name}", "not_found") from None
    except (ValueError, RecursionError):
        raise _refused(f"{name} is not JSON", "json") from None
    if not isinstance(content, dict):
        raise _refused(f"{name} is not a JSON object", "json")
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(sums: Iterable[tuple[str, str]]) -> str:
    """The lines `sha256sum` would print, sorted by name, hashed: anyone can check it with coreutils."""
    lines = "".join(f"{sha}  {name}\n" for name, sha in sums)
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def _refused(message: str, code: str) -> InvalidRequest:
    return InvalidRequest(FieldProblem("/model", message, code))
