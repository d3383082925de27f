"""A registered model, its tokeniser and its head; a LoRA adapter on it, saved and loaded as PEFT does.

The base is frozen and stays as it is: the reference model is the same network with the trained adapter off. A job that starts
from an earlier one's adapter has that in it, too, frozen: it is part of the reference. Weights are read from safetensors only,
and no code that a model brings along is run.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from service.domain import modelfiles
from service.domain.errors import InvalidRequest, JobFailure
from service.domain.job import MICRO_BATCH_TOKENS, FailureCode, Lora, ModelEntry
from service.domain.report import BaseModelFacts
from worker import card
from worker.concatenation import write_concatenated
from worker.failures import failure
from worker.head import FusedPredictions, Head, PlainPredictions
from worker.problem import Params
from worker.tokens import Predictions

LOADED_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]
TOKENIZER_FILES = [*sorted(modelfiles.TOKENIZER_FILES), f"{modelfiles.TEMPLATES}/*.jinja"]
UNUSED_FILES = ["consolidated*.safetensors"]  # the weights once more
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})  # of mixture models; their choices are not adapted
CAPS_AND_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # of the logits, in a model's config
PROBE_TOKENS = 8
LOW_PRECISION = (torch.bfloat16, torch.float16)
TRAINED, PARENT = (
    "default",
    "parent",
)  # PEFT's names of adapters; it publishes only the default without a folder of its own


class Network(NamedTuple):
    """A causal language model, with or without an adapter in it."""

    entry: ModelEntry
    digest: str
    tokenizer_digest: str
    files: Mapping[str, str]  # name -> SHA-256 of what was loaded
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    causal: Any  # transformers.PreTrainedModel; PEFT puts its layers into this very module
    peft: PeftModel | None
    head: Head | None  # None: the logits are more than W h + b, and the model's own output is used
    vocabulary: int  # ids below it are the tokeniser's; the model's may be padded
    context_tokens: int
    parameters: int  # of the base
    device: torch.device
    dtype: str
    tokens_at_once: int = MICRO_BATCH_TOKENS  # padded positions, at most; a longer row goes alone

    def predictions(self, last_ND: Tensor, target_N: Tensor, inner_ND: Tensor | None = None) -> Predictions:
        if self.head is not None:
            return FusedPredictions(last_ND, target_N, self.head, inner_ND)
        return PlainPredictions(last_ND, target_N, own_logits(self.causal), self.vocabulary, inner_ND)


def load(entry: ModelEntry, models_root: Path, device: str, dtype: str) -> Network:
    """Load a registered model, frozen.

    Raises JobFailure: model_not_found, model_revision_mismatch (the files are not those that were registered), or
    unsupported_architecture.
    """
    folder = _folder(entry, models_root)
    try:
        facts = modelfiles.inspect(folder)
    except InvalidRequest as error:
        raise _unsupported(str(error)) from error
    if entry.digest is not None and facts.digest != entry.digest:
        why = f"the files of {entry.name} digest to {facts.digest}, registered was {entry.digest}"
        if modelfiles.digest_at_the_top(folder) == entry.digest:
            why += (
                ". It was registered when digests did not cover all that is loaded, such as weights in subfolders, or counted "
                "consolidated.safetensors: compare its files with their source, and register it again"
            )
        raise JobFailure(FailureCode.MODEL_REVISION_MISMATCH, why)
    tokenizer, causal = _read(folder, entry, dtype)
    causal.to(device).eval().requires_grad_(False)
    for part in causal.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    # Greedy means the likeliest token: a repetition penalty that the model comes with would change every answer.
    causal.generation_config = GenerationConfig(eos_token_id=_ends(tokenizer, causal), do_sample=False)  # type: ignore[no-untyped-call]
    vocabulary = min(_ids(tokenizer), causal.config.get_text_config().vocab_size)
    return Network(
        entry=entry,
        digest=facts.digest,
        tokenizer_digest=facts.tokenizer_digest,
        files=facts.files,
        tokenizer=tokenizer,
        causal=causal,
        peft=None,
        head=_head(causal, vocabulary),
        vocabulary=vocabulary,
        context_tokens=facts.context_tokens or tokenizer.model_max_length,
        parameters=sum(p.numel() for p in causal.parameters()),
        device=torch.device(device),
        dtype=dtype,
    )


def _read(folder: Path, entry: ModelEntry, dtype: str) -> tuple[Any, Any]:
    """(tokeniser, model), every weight of which comes from the files."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # there is no common type for "this is not a model that I can read"
        if known := failure(error):
            raise known from error
        why = str(error).strip().partition("\n")[0].replace(str(folder), entry.location)
        raise _unsupported(f"{entry.name} cannot be loaded: {type(error).__name__}: {why}") from error
    causal, loading = loaded
    if loading["missing_keys"]:  # they would be filled with random numbers
        named = ", ".join(sorted(loading["missing_keys"])[:3])
        raise _unsupported(f"{entry.name} lacks {len(loading['missing_keys'])} of its architecture's weights: {named}")
    return tokenizer, causal


def _ids(tokenizer: Any) -> int:
    """From this id on there is no token. It is more than the tokeniser has tokens where its ids have holes."""
    ids: Iterable[int] = tokenizer.get_vocab().values()
    return 1 + max(ids)


def _ends(tokenizer: Any, causal: Any) -> list[int] | None:
    """What ends a generated answer: the tokeniser's end of sequence, and those that the model names (end of turn)."""
    named = causal.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    return sorted(ends) or None


def _unsupported(message: str) -> JobFailure:
    return JobFailure(FailureCode.UNSUPPORTED_ARCHITECTURE, message)


def _folder(entry: ModelEntry, models_root: Path) -> Path:
    if entry.source == "path":
        root = models_root.resolve()
        folder = root / entry.location
        if not folder.is_dir() or root not in folder.resolve().parents:
            raise JobFailure(
                FailureCode.MODEL_NOT_FOUND,
                f"{entry.name}: no folder {entry.location!r} below this worker's models root",
            )
        return folder
    try:
        return Path(
            snapshot_download(
                entry.location,
                revision=entry.revision,
                allow_patterns=LOADED_FILES + TOKENIZER_FILES,
                ignore_patterns=UNUSED_FILES,
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if known := failure(error):
            raise known from error
        raise JobFailure(
            FailureCode.MODEL_NOT_FOUND,
            f"{entry.name}: {entry.location} at {entry.revision} could not be fetched from the Hub, and is not in the "
            f"local cache ({type(error).__name__})",
        ) from error


# --- the head


def own_logits(causal: Any) -> Callable[[Tensor], Tensor]:
    """The model's own way from the last hidden states [n, D] to logits [n, V], whatever it does there.

    Its forward pass is run with the decoder replaced by one that returns the given states.
    """
    prefix = causal.base_model_prefix

    def logits(hidden_nD: Tensor) -> Tensor:
        decoder = getattr(causal, prefix)
        setattr(causal, prefix, _Returns(hidden_nD[None]))
        try:
            return causal(input_ids=torch.zeros(1, len(hidden_nD), dtype=torch.int64), use_cache=False).logits[0]  # type: ignore[no-any-return]
        finally:
            setattr(causal, prefix, decoder)

    return logits


class _Returns(nn.Module):
    def __init__(self, hidden_1nD: Tensor) -> None:
        super().__init__()
        self.hidden_1nD = hidden_1nD

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return _States(last_hidden_state=self.hidden_1nD)


class _States(BaseModelOutputWithPast):
    """Architectures hand on further fields of their own (router logits, cross attentions); here they are None."""

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def _head(causal: Any, vocabulary: int) -> Head | None:
    """The head as W h + b, if that is all it is: no cap or scale in the config, and the model's own logits agree.

    None: it is more than that, and `own_logits` gives what it gives. Raises JobFailure if not even that does.
    """
    output = causal.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise _unsupported(f"{type(causal).__name__} has no output projection")
    ids_1T = torch.arange(PROBE_TOKENS, device=output.weight.device)[None] % vocabulary
    hidden_TD = causal.get_decoder()(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
    own_TV = causal(input_ids=ids_1T, use_cache=False).logits[0, :, :vocabulary].float()
    tolerance = 1e-4 if output.weight.dtype in (torch.float32, torch.float64) else 2e-2

    def agrees(logits_TV: Tensor) -> bool:
        off = (own_TV - logits_TV[:, :vocabulary].float()).abs().max()
        return bool(off <= tolerance * own_TV.abs().max().clamp(min=1.0))

    head = _linear_head(causal, vocabulary)
    config = causal.config.get_text_config()
    if all(getattr(config, name, None) in (None, 1) for name in CAPS_AND_SCALES) and agrees(head.logits(hidden_TD)):
        return head
    try:
        reproduced = agrees(own_logits(causal)(hidden_TD))
    except (AttributeError, TypeError):
        reproduced = False
    if not reproduced:
        raise _unsupported(f"how {type(causal).__name__} gets from its last states to its logits is not understood")
    return None


def _linear_head(causal: Any, vocabulary: int) -> Head:
    output = causal.get_output_embeddings()
    return Head(output.weight[:vocabulary], None if output.bias is None else output.bias[:vocabulary])


@contextmanager
def full_precision(network: Network) -> Iterator[Network]:
    """Within it the base is float32: differences of gradients drown in a bfloat16 forward pass. Its own bits come back.

    For that time both copies of the base are in memory.
    """
    low = [t for t in (*network.causal.parameters(), *network.causal.buffers()) if t.dtype in LOW_PRECISION]
    own = [t.data for t in low]
    try:
        for t in low:
            t.data = t.data.float()
        head = None if network.head is None else _linear_head(network.causal, network.vocabulary)
        yield network._replace(head=head) if low else network
    finally:
        for t, bits in zip(low, own, strict=True):
            t.data = bits


def facts(network: Network) -> BaseModelFacts:
    """What a report says of the base model."""
    return BaseModelFacts(
        name=network.entry.name,
        source=f"hub {network.entry.location}" if network.entry.source == "hub" else "local folder",
        revision=network.entry.revision,
        digest=network.digest,
        tokenizer_digest=network.tokenizer_digest,
        files=dict(network.files),
        architecture=type(network.causal).__name__,
        parameters=network.parameters,
        trainable_parameters=sum(p.numel() for name, p in network.causal.named_parameters() if ".lora_" in name),
        vocabulary=network.vocabulary,
        context_tokens=network.context_tokens,
        dtype=network.dtype,
        prompt_format=network.entry.prompt_format,
        head="fused" if network.head is not None else "plain",
    )


# --- the adapter


def adapt(
    base: Network,
    lora: Lora,
    seed: int,
    layers: Callable[[int], Sequence[int]] = range,
    parent: Path | None = None,
) -> Network:
    """Put a fresh LoRA adapter into the network: float32 whatever the base's type, no dropout, a function of the seed.

    Args:
        layers: the number of layers -> those (0-based) that get one.
        parent: the folder of an adapter that acts beside it and is not trained.

    Raises JobFailure (unsupported_architecture) for a target that is the head, an embedding or a router, or that is not there.
    """
    count = base.causal.config.get_text_config().num_hidden_layers
    chosen = sorted(layers(count))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=_targets(base.causal, lora.target_modules),
        layers_to_transform=None if chosen == list(range(count)) else chosen,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft = get_peft_model(base.causal, config)
        if parent is not None:
            peft.load_adapter(str(parent), PARENT, torch_device=str(base.device))
            _activate(peft, [PARENT, TRAINED])
    config.base_model_name_or_path, config.revision = (
        card.base_name(base),
        base.entry.revision,
    )  # PEFT would publish a path
    peft.eval()
    return base._replace(peft=peft)


def _targets(causal: Any, wanted: list[str] | None) -> list[str]:
    """Names of the linear layers that get an adapter."""
    head = causal.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in causal.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    } - ROUTERS
    if wanted is None:
        return sorted(linear)
    modules = dict(causal.named_modules())
    for target in wanted:
        matched = [module for name, module in modules.items() if name == target or name.endswith("." + target)]
        if any(module is head or isinstance(module, nn.Embedding) for module in matched):
            why = "is the head or an embedding, which must stay as it is: the bound is measured through it"
        elif target.rpartition(".")[2] in ROUTERS and matched:
            why = "is a router of a mixture model, which is not adapted"
        elif not any(isinstance(module, nn.Linear | Conv1D) for module in matched):
            why = "names no linear layer of this model"
        else:
            continue
        raise _unsupported(f"adapter target {target!r} {why}; there are: {', '.join(sorted(linear))}")
    return wanted


def adapter_off(network: Network) -> AbstractContextManager[None]:
    """Within it the network is the reference model: without the adapter that is trained, with its parent if it has one."""
    peft = _peft(network)
    return _only(peft, [PARENT]) if PARENT in peft.peft_config else peft.disable_adapter()


def base_alone(network: Network) -> AbstractContextManager[None]:
    """Within it the network is the base: without a parent, too."""
    peft = _peft(network)
    return _only(peft, []) if PARENT in peft.peft_config else peft.disable_adapter()


@contextmanager
def _only(peft: PeftModel, names: list[str]) -> Iterator[None]:
    _activate(peft, names)
    try:
        yield
    finally:
        _activate(peft, [PARENT, TRAINED])


def _activate(peft: PeftModel, names: list[str]) -> None:
    """These adapters act; the parent is never trained. (PEFT's own switches make whatever they turn on trainable.)"""
    tuner: Any = peft.base_model
    tuner.set_adapter(names, inference_mode=True)
    peft.set_requires_grad(TRAINED)


def trainable(network: Network) -> Params:
    """The adapter's leaves by name."""
    return {name: p for name, p in _peft(network).named_parameters() if p.requires_grad}


@torch.no_grad()
def assign(network: Network, values: Mapping[str, Tensor]) -> None:
    for name, parameter in trainable(network).items():
        parameter.copy_(values[name])


def save(network: Network, folder: Path) -> None:
    """Write the adapter as PEFT does, adapter_config.json and adapter_model.safetensors, and what worker.card says of its base.

    One that has a parent is written as one with it: it goes onto the base alone.
    """
    peft = _peft(network)
    if PARENT in peft.peft_config:
        write_concatenated(peft, [PARENT, TRAINED], folder)
    else:  # "auto" would look on the Hub whether the base's vocabulary has changed
        peft.save_pretrained(str(folder), save_embedding_layers=False)
    _put_in_order(folder / "adapter_config.json")
    (folder / card.FILE).write_text(card.describe(network), encoding="utf-8")
    (folder / "README.md").write_text(card.card(network, PARENT in peft.peft_config), encoding="utf-8")


def _put_in_order(path: Path) -> None:
    """The modules' names are a set to PEFT: in another process it writes them in another order."""
    config = json.loads(path.read_text())
    for name, value in config.items():
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            config[name] = sorted(value)
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def load_adapter(network: Network, folder: Path) -> Network:
    """The base with the adapter that is stored in the folder, in place of those that may be in it now."""
    causal = network.causal if network.peft is None else network.peft.unload()
    peft = PeftModel.from_pretrained(causal, str(folder), is_trainable=False)
    peft.eval()
    return network._replace(causal=causal, peft=peft)


def _peft(network: Network) -> PeftModel:
    assert network.peft is not None, "the network has no adapter"
    return network.peft
