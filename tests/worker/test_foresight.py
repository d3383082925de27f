"""What a dry run tells is what the worker then finds: tokens to the last one, memory by what autograd keeps."""

import inspect
import json
from collections.abc import Callable
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from service import register
from service.api import tokens
from service.domain import memory, modelsizes
from service.domain.errors import JobFailure
from service.domain.job import Lora, ModelEntry, PromptFormat
from service.domain.rows import Example
from service.prompts import folder, template
from service.settings import Settings
from worker import data, model, registry
from worker.losses.retain.nll import nll
from worker.oracle import make_oracle
from worker.views import Term

EXAMPLES = [
    Example("question", "Where is it?", " Paris."),
    Example("question", "Who?", "Lima Lima"),
    Example("prompt", "Go to", " Lima"),
    Example("prompt", "", "ab"),
    Example("text", "", "Paris Lima, and é."),
    Example("question", "x" * 40, "y" * 90),
]
PLAIN = PromptFormat(assistant_start="Answer:")
SPACE = PromptFormat()
CHAT = PromptFormat(type="chat", system="Be kind.")


def agree(counted: tokens.Counted, encoded: data.Encoded) -> None:
    assert list(counted.lengths.lengths) == [len(row.ids) for row in encoded.rows]
    assert counted.tokens.total == sum(len(row.ids) for row in encoded.rows)
    assert counted.tokens.counted == counted.lengths.counted == sum(row.counted for row in encoded.rows)
    assert counted.tokens.longest == max(len(row.ids) for row in encoded.rows)


@pytest.mark.parametrize(("ends", "form"), [*product((False, True), (PLAIN, SPACE)), (False, CHAT)])
def test_tokens_are_those_of_the_worker(
    byte_tokenizer: Callable[..., Any], tmp_path: Path, ends: bool, form: PromptFormat
) -> None:
    tokenizer = byte_tokenizer(chat=form is CHAT, ends=ends)
    tokenizer.save_pretrained(tmp_path / "m")
    info: dict[str, Any] = {"context_tokens": 100}
    if form is CHAT:
        info["chat"] = template.around(folder.template(tmp_path / "m"), form, folder.special_tokens(tmp_path / "m"))
    entry = ModelEntry(name="m", source="path", location="m", prompt_format=form, info=info)
    counter = tokens.counter(Settings(models_root=tmp_path), entry)
    counted = tokens.count(counter, EXAMPLES, len(EXAMPLES), 1000)
    agree(counted, data.encode(EXAMPLES, tokenizer, form, None))
    assert counted.tokens.exact is (form is not CHAT)
    assert counted.lengths.asked == 5
    with pytest.raises(JobFailure) as refused:
        data.encode(EXAMPLES, tokenizer, form, 100)
    assert (counted.tokens.too_long, counted.tokens.too_long_rows) == (1, [6])
    assert "tokens: 6 (1 of 6)" in str(refused.value)


def test_tokens_of_a_real_tokeniser_are_those_of_the_worker(shared: Path) -> None:
    """As it is registered: the digest of the tokeniser's files, the context and the sizes are there."""
    root = shared / "models"
    settings = Settings(models_root=root, gpu_classes=["any"])
    entry = register.folder_entry(settings, "m", root / "tofu260K_full", PLAIN)
    rows = map(json.loads, (shared / "data" / "tofu" / "forget01.json").read_text().splitlines())
    examples = [Example("question", row["question"], row["answer"]) for row in rows]
    counted = tokens.count(tokens.counter(settings, entry), examples, len(examples), 10_000)
    network = model.load(entry, root, "cpu", "float32")
    agree(counted, data.encode(examples, network.tokenizer, PLAIN, network.context_tokens))
    assert counted.tokens.exact
    assert modelsizes.Sizes.model_validate(entry.info["sizes"]).parameters == network.parameters


def test_of_a_large_set_every_kth_row_is_counted(byte_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "m")
    entry = ModelEntry(name="m", source="path", location="m", prompt_format=PLAIN, info={"context_tokens": 30})
    counter = tokens.counter(Settings(models_root=tmp_path), entry)
    examples = [Example("text", "", "a" * (10 + number % 3)) for number in range(1000)]
    told = tokens.count(counter, iter(examples), 1000, 4 * tokens.COUNTED_BYTES - 1).tokens
    assert (told.rows_counted, told.exact, told.reason) == (250, False, "a large set: every 4th row was counted")
    assert told.total == pytest.approx(sum(len(row.answer) + 2 for row in examples), rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_what_is_kept_for_the_gradient_is_what_autograd_keeps(
    register: Callable[..., Any], dtype: str, targets: list[str] | None
) -> None:
    """Beside it attention keeps a number per head, and a norm one: a few bytes of a thousand."""
    registered = register(hidden_size=64, intermediate_size=172, num_attention_heads=8, num_hidden_layers=3, head_dim=8)
    lora = Lora(r=4, alpha=8, target_modules=targets)
    network = model.adapt(registered.load(dtype), lora, seed=0)
    sizes = modelsizes.read(registered.folder)
    assert sizes is not None
    assert (sizes.parameters, sizes.keys, sizes.attention) == (network.parameters, 8, 64)
    own = {p.untyped_storage().data_ptr() for p in network.causal.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if (at := t.untyped_storage().data_ptr()) not in own:
            kept[at] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network.causal.get_decoder()(input_ids=torch.randint(0, 256, (4, 50)), use_cache=False)
    found = sum(t.untyped_storage().nbytes() for t in kept.values()) / 200
    machine = memory.CPU if dtype == "float32" else memory.ACCELERATOR
    expected = memory.kept_per_token(sizes, lora, machine)
    if targets is None:
        assert found == pytest.approx(expected, rel=0.05)
    else:
        assert 0.6 * expected < found <= expected * 1.05


def test_the_adapters_numbers_are_those_that_are_trained(register: Callable[..., Any]) -> None:
    registered = register()
    sizes = modelsizes.read(registered.folder)
    assert sizes is not None
    for lora in (Lora(r=4), Lora(r=3, target_modules=["v_proj", "gate_proj"])):
        network = model.adapt(registered.load("float32"), lora, seed=0)
        trained = sum(p.numel() for p in model.trainable(network).values())
        load = an_load(lora)
        held = memory.estimate(sizes, load, memory.CPU).adapter
        assert held == memory.ADAPTER_HELD * 4 * trained


def an_load(lora: Lora) -> memory.Load:
    one = memory.SetLengths([10, 20], 12, 2, 2)
    return memory.Load(one, one, 1, 1, 1, lora, 0, frozenset({"nll"}), "primal_dual", {})


def test_the_largest_micro_batch_is_the_oracles(tiny: Any) -> None:
    """Of a step of these very rows, all of them."""
    network = model.adapt(tiny, Lora(r=2), seed=0)
    rows = {"forget": EXAMPLES[:4], "retain": EXAMPLES[4:]}
    encoded = {name: data.encode(of, network.tokenizer, network.entry.prompt_format, None) for name, of in rows.items()}
    terms = {name: Term(nll(), {"answer": one}) for name, one in encoded.items()}
    read: list[int] = []
    network.causal.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    places = {name: range(len(one.rows)) for name, one in encoded.items()}
    make_oracle(network, model.trainable(network), terms, places).oracle({"forget": 1.0, "retain": 1.0})
    sets = [
        memory.SetLengths([len(row.ids) for row in one.rows], one.counted, 1, len(one.rows)) for one in encoded.values()
    ]
    load = memory.Load(*sets, 4, 2, 1, Lora(r=2), 0, frozenset(), "weighted", {})
    overhead = memory.overhead_tokens("cpu", 2, network.parameters)
    assert memory.largest(load, memory.longest, overhead) == max(read)


def test_the_parts_that_take_more_are_those_that_say_so() -> None:
    """By name, since the service does not know the worker's sources."""

    def saying(kind: str, words: str) -> set[str]:
        return {
            name
            for name, one in registry.entries(kind).items()
            if words in inspect.getsource(import_module(one.module))
        }

    assert saying("solvers", "full_precision=True") | saying("solvers", "full_precision=beta") == memory.FULL_PRECISION
    assert saying("losses", "map_logits") == memory.WHOLE_DISTRIBUTIONS
