"""The files of a model's folder: which are loaded, whether they may be, and what they digest to.

Weights are safetensors only: a pickle runs code when it is read. For the same reason nothing that names code of its
own (`auto_map`) is accepted. Which files hold the weights is found as transformers finds it; each of them lies in the
folder and is part of the digest. The worker calls `inspect` again on what it is about to load and compares the digests.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from service.domain.errors import FieldProblem, InvalidRequest

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")  # one of them is enough
TOKENIZER_FILES = frozenset(
    {*TOKENIZERS, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    | {"chat_template.jinja", "chat_template.json"}
)
# Read and converted where there is no tokenizer.json, under whichever of these names its class or transformers looks for.
UNCONVERTED = re.compile(r"tekken\.json|[^/]+\.model(\.[^/]+)?")
TEMPLATES = "additional_chat_templates"  # a folder of *.jinja beside the tokeniser
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG_FILES = frozenset({"config.json", "generation_config.json", INDEX})
ORIGINALS = re.compile(
    r"consolidated(-\d+-of-\d+)?\.safetensors"
)  # the weights once more, in the names of another library
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
    """Name -> SHA-256 in 64 hex digits of every file that is loaded. Raises InvalidRequest as `loaded` does."""
    return {name: _sha256(folder / name) for name in loaded(folder)}


def loaded(folder: Path) -> list[str]:
    """The sorted names, below the folder, of the files that are loaded; what else lies there plays no part.

    Every *.safetensors at the top counts, loaded or not, except for copies of the weights that another library reads.
    Raises InvalidRequest for weights that are missing, or that lie outside the folder.
    """
    top = _top(folder)
    safetensors = {name for name in top if name.endswith(".safetensors") and not ORIGINALS.fullmatch(name)}
    return sorted({*top & CONFIG_FILES, *safetensors, *weights(folder), *_tokenizer(folder)})


def weights(folder: Path) -> list[str]:
    """The names of the files with the weights, and of the index that names them, as transformers chooses them.

    Empty where the folder has neither. Raises InvalidRequest for files that are missing, no safetensors or outside.
    """
    named = _json(folder, "config.json").get("transformers_weights") if (folder / "config.json").is_file() else None
    if named is not None:
        first = _inside(folder, named, "config.json")
    elif (folder / SINGLE).is_file():
        first = SINGLE
    elif (folder / INDEX).is_file():
        first = INDEX
    else:
        return []
    if not first.endswith(".index.json"):
        return [_safetensors(first, "config.json")]
    shards = _json(folder, first).get("weight_map")
    if not isinstance(shards, dict):
        raise _refused(f"{first} has no weight_map", "json")
    return [first, *sorted({_safetensors(_inside(folder, name, first), first) for name in shards.values()})]


def digest_at_the_top(folder: Path) -> str:
    """The digest that folders had before it covered all that is loaded: a model may be registered with it."""
    top = _top(folder)
    names = top & (CONFIG_FILES | TOKENIZER_FILES) | {name for name in top if name.endswith(".safetensors")}
    return _digest((name, _sha256(folder / name)) for name in sorted(names))


def digest_files(files: Mapping[str, str]) -> tuple[str, str]:
    """`digest_model` of a folder with these files, as `sums` gives them."""
    ordered = sorted(files.items())
    return _digest(ordered), _digest((name, sha) for name, sha in ordered if _of_tokenizer(name))


def digest_tokenizer(folder: Path) -> str:
    """The second of `digest_model`, without looking at the weights."""
    return _digest((name, _sha256(folder / name)) for name in sorted(_tokenizer(folder)))


def inspect(folder: Path) -> ModelFacts:
    """What the folder holds, read without running any of it. Raises InvalidRequest if it must not or cannot be loaded."""
    if not folder.is_dir():
        raise _refused(f"{folder} is not a folder", "not_found")
    names = _top(folder)
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
    named = tokenizer_config.get("fast_tokenizer_files", ["tokenizer.json"])
    if named != ["tokenizer.json"]:
        raise _refused(
            "tokenizer_config.json chooses the tokeniser's file by version (fast_tokenizer_files): leave tokenizer.json alone",
            "tokenizer",
        )
    architecture = _architecture(config)
    files = sums(folder)
    if not any(name.endswith(".safetensors") for name in files):
        pickles = sorted(name for name in names if name.endswith(PICKLES))
        if pickles:
            raise _refused(f"{pickles[0]} is a pickle, which runs code when read: convert it to safetensors", "pickle")
        raise _refused(f"{folder.name} has no *.safetensors", "weights")
    if not names.intersection(TOKENIZERS):
        raise _refused(f"{folder.name} has no tokeniser ({', '.join(TOKENIZERS)})", "tokenizer")
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


def _top(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def _tokenizer(folder: Path) -> set[str]:
    top = _top(folder)
    other = set() if "tokenizer.json" in top else {name for name in top if UNCONVERTED.fullmatch(name)}
    beside = (f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja"))
    return top & TOKENIZER_FILES | other | {_inside(folder, name, "the tokeniser") for name in beside}


def _of_tokenizer(name: str) -> bool:
    return name in TOKENIZER_FILES or name.startswith(f"{TEMPLATES}/") or UNCONVERTED.fullmatch(name) is not None


def _inside(folder: Path, name: object, named_by: str) -> str:
    """The name, if a file of the folder has it. The Hub's cache links to blobs beside its snapshots: they count as inside."""
    if not isinstance(name, str) or not name.isprintable():
        raise _refused(f"{named_by} names a file {name!r}, which is no path", "path")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or name != path.as_posix():
        raise _refused(f"{named_by} names {name!r}, which is not a path below the model's folder", "path")
    homes = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        homes.append(folder.resolve().parents[1] / "blobs")
    if not (folder / name).is_file():
        raise _refused(f"{named_by} names {name!r}, which is missing", "not_found")
    if not any(home in (folder / name).resolve().parents for home in homes):
        raise _refused(f"{named_by} names {name!r}, a link that leaves the model's folder: put the file there", "path")
    return name


def _safetensors(name: str, named_by: str) -> str:
    if not name.endswith(".safetensors"):
        raise _refused(f"{named_by} names {name!r}: weights are read from safetensors only", "pickle")
    return name


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
