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
from service.domain import answers, memory, modelsizes
from service.domain.answers import RowLength, SetLengths
from service.domain.errors import JobFailure
from service.domain.job import MICRO_BATCH_TOKENS, Lora, ModelEntry, PromptFormat
from service.domain.rows import Example
from service.prompts import folder, template
from service.settings import Settings
from worker import data, disclosure, disclosures, generation, measure, model, registry, scoring
from worker.attacks.wording import PREFIXES
from worker.losses.retain.nll import nll
from worker.oracle import make_oracle
from worker.suite import examples
from worker.suites import request
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
    assert counted.lengths.prompted == 5
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
    one = SetLengths([RowLength(10, 6, 1), RowLength(20, 6, 1)], 2)
    return memory.Load(one, one, 1, 1, 1, lora, 0, frozenset({"nll"}), "primal_dual", {}, rounded=False)


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
        SetLengths([RowLength(len(row.ids), row.counted, 1) for row in one.rows], len(one.rows))
        for one in encoded.values()
    ]
    load = memory.Load(*sets, 4, 2, 1, Lora(r=2), 0, frozenset(), "weighted", {}, rounded=False)
    overhead = memory.overhead_tokens("cpu", 2, network.parameters)
    assert memory.largest(load, memory.longest, overhead) == max(read)


def test_the_numbers_of_an_evaluation_are_the_workers() -> None:
    assert (answers.FIGURES_ROWS, answers.FIGURES_TOKENS) == (request.GENERATED_ROWS_MAX, request.MAX_NEW_TOKENS)
    assert (answers.WAYS_ROWS, answers.SAMPLES) == (disclosure.ROWS_MAX, disclosure.SAMPLES)
    assert (answers.MORE_TOKENS, answers.CONTINUED_TOKENS) == (disclosure.MORE_TOKENS, disclosure.CONTINUED_TOKENS_MAX)
    assert (disclosures.NEIGHBOURS_MAX, len(PREFIXES)) == (answers.NEIGHBOURS, answers.PREFIXES)
    assert min(generation.GENERATION_TOKENS, 2 * MICRO_BATCH_TOKENS) == memory.GENERATED_TOKENS
    assert (memory.PREFILLED_TOKENS, memory.GENERATED_BYTES) == (generation.PREFILL_TOKENS, generation.GENERATION_BYTES)
    assert (memory.LOGITS_BYTES, memory.SAMPLED) == (generation.LOGITS_BYTES, generation.DRAWING_BYTES)
    assert memory.MEASURED_TOKENS == scoring.SCORING_TOKENS == measure.POSITIONS_AT_ONCE
    assert set(disclosure.WAYS) == {"question", "paraphrase", "prefix", "sample", "continuation"}, "each is counted"


@pytest.mark.parametrize("form", [PLAIN, SPACE, CHAT], ids=["plain", "space", "chat"])
def test_the_answers_to_be_generated_are_those_that_the_worker_generates(
    register: Callable[..., Any], form: PromptFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In number and tokens, for rows with a secret and a paraphrased question; the length of a prefix is an assumption."""
    monkeypatch.setattr(disclosure, "ROWS_MAX", 6)
    monkeypatch.setattr(answers, "WAYS_ROWS", 6)
    registered = register(chat=form is CHAT, max_position_embeddings=2048)
    network = registered.load("float32")
    network = network._replace(entry=network.entry.model_copy(update={"prompt_format": form}))
    values = ("Oslo", "Bern", "Kyiv", "Rome", "Riga", "Doha", "Baku", "Suva")  # of one length, whichever are drawn
    sets: dict[str, list[dict[str, Any]]] = {
        name: [
            {
                "question": f"Where {verb} Ana {place}?",
                "answer": f" {value} it is.",
                "paraphrased_question": f"Where {verb} Ana {place}?",
                "perturbed_answer": [f" {other} it is." for other in values if other != value],
            }
            for place, value in enumerate(values)
        ]
        for name, verb in (("forget", "was"), ("retain", "is"))
    }
    sets["retain"].append({"text": "Bern, Doha, Riga, Baku, Rome and Kyiv are cities that she never saw."})
    info: dict[str, Any] = {"context_tokens": 2048}
    if form is CHAT:
        info["chat"] = template.around(
            folder.template(registered.folder), form, folder.special_tokens(registered.folder)
        )
    entry = ModelEntry(name="m", source="path", location="tiny", prompt_format=form, info=info)
    counter = tokens.counter(Settings(models_root=registered.root), entry)
    lengths = {name: tokens.count(counter, examples(of).values(), len(of), 1000).lengths for name, of in sets.items()}
    plan = disclosures.prepare(sets["forget"], sets["retain"], {}, 0)
    for name, ways, expected in (
        ("forget", tuple(disclosure.WAYS), answers.disclosure(lengths["forget"])),
        ("forget", disclosures.PLAIN, answers.plain(lengths["forget"])),
        ("retain", disclosures.PLAIN, answers.plain(lengths["retain"], answers.NEIGHBOURS)),
    ):
        probes = disclosure.probes(network, plan.targets[name], 0, ways)
        assert sum(expected.values()) == pytest.approx(len(probes)), (name, ways)
        assert sum(n * one.room for one, n in expected.items()) == pytest.approx(sum(p.tokens for p in probes))
        read = sum(n * one.prompt for one, n in expected.items() if one.sampled or ways == disclosures.PLAIN)
        drawn = [p for p in probes if p.seed is not None or ways == disclosures.PLAIN]
        assert read == pytest.approx(sum(len(p.prompt) for p in drawn), rel=0.05), "from two prompts, one may be longer"
    asks = request.request().asks(sets)
    figures = [ask for ask in asks.values() if "generated" in ask.views]
    expected = answers.figures([lengths["forget"], lengths["retain"]])
    assert sum(expected.values()) == sum(len(ask.texts) for ask in figures) == 16
    assert {one.room for one in expected} == {ask.max_new_tokens for ask in figures}


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
