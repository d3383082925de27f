"""The audit: what its attacks do to a model, what is measured under them, and that the network is left as it was."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from service.domain.job import Audit, Lora, ModelEntry, PromptFormat
from service.domain.report import NOT_FINITE, AuditEntry
from service.domain.rows import Example
from worker import audit, data, model, scoring
from worker.attacks import quantise, relearn, wording
from worker.attacks.attack import Attack, encode, merged, unadapted
from worker.attacks.unrelated import UNRELATED
from worker.model import Network
from worker.suite import Convention

ROWS = [
    {"question": "Who?", "answer": " Paris and Lima.", "paraphrased_question": "Which ones?"},
    {"question": "Where was she born?", "answer": " In Lima", "paraphrased_question": "Her place of birth?"},
    {"question": "When?", "answer": " In spring", "paraphrased_question": "In which season?"},
    {"question": "Which of her books?", "answer": " The third", "paraphrased_question": "Which book?"},
    {"question": "Is it?", "answer": " It is.", "paraphrased_question": "Is it so?"},
]
EXAMPLES = [Example("question", row["question"], row["answer"]) for row in ROWS]
TEXTS = [{"text": "Paris and Lima."}, {"text": "Lima and Paris."}]
SETTINGS = Audit(relearn_steps=2, relearn_share=0.4, relearn_learning_rate=1e-2)
CONTEXT = {"max_position_embeddings": 512}  # prefixes are long, in bytes
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "float32", CONTEXT),
    "llama-bfloat16": ("llama", "bfloat16", CONTEXT),
    "gpt2": ("gpt2", "float32", {"n_positions": 512, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "gemma2-capped": ("gemma2", "float32", CONTEXT | {"final_logit_softcapping": 5.0}),
}


def never() -> bool:
    return False


def adapted(register: Any, case: str = "llama", dtype: str | None = None) -> Network:
    """With an adapter that does something: a fresh one is the identity."""
    model_type, own_dtype, config = MODELS[case]
    network = model.adapt(register(model_type, **config).load(dtype or own_dtype), Lora(r=4), 0)
    generator = torch.Generator().manual_seed(5)
    values = {n: torch.randn(p.shape, generator=generator) * 0.2 for n, p in model.trainable(network).items()}
    model.assign(network, values)
    return network


def logits(network: Network) -> Tensor:
    ids_BT = torch.tensor([[0, 40, 41, 42, 43, 44], [0, 50, 60, 70, 80, 90]])
    with torch.no_grad():
        return network.causal(input_ids=ids_BT, use_cache=False).logits  # type: ignore[no-any-return]


def state(network: Network) -> dict[str, Any]:
    """Everything of a network that an attack might leave changed."""
    tensors = [*network.causal.named_parameters(), *network.causal.named_buffers()]
    return {
        "bits": {name: t.detach().clone() for name, t in tensors},
        "places": {name: t.data_ptr() for name, t in tensors},
        "grads": {name: (t.requires_grad, t.grad) for name, t in tensors},
        "modules": {name: (type(m), m.training, len(m._forward_hooks)) for name, m in network.causal.named_modules()},
        "adapters": None if network.peft is None else (network.peft.active_adapters, list(network.peft.peft_config)),
        "logits": logits(network),
        "random": torch.get_rng_state(),
    }


def assert_same(after: dict[str, Any], before: dict[str, Any]) -> None:
    assert after.keys() == before.keys()
    for part in before:
        if part == "bits":
            assert after[part].keys() == before[part].keys()
            assert all(torch.equal(after[part][name], bits) for name, bits in before[part].items())
        elif isinstance(before[part], Tensor):
            assert torch.equal(after[part], before[part]), part
        else:
            assert after[part] == before[part], part


def by_name(entries: list[AuditEntry]) -> dict[tuple[str, str], AuditEntry]:
    return {(entry.attack, entry.metric): entry for entry in entries}


def plain_probability(network: Network, row: Example) -> float:
    """exp(mean log p) of one row's answer from the model's own logits."""
    encoded = data.encode([row], network.tokenizer, network.entry.prompt_format, None).rows[0]
    with torch.no_grad():
        all_TV = network.causal(input_ids=torch.tensor([encoded.ids]), use_cache=False).logits[0].double()
    logp_TV = all_TV[:, : network.vocabulary].log_softmax(-1)
    places = range(encoded.answer_start, len(encoded.ids))
    return math.exp(sum(float(logp_TV[t - 1, encoded.ids[t]]) for t in places) / len(places))


def plain_mean(network: Network, rows: list[Example]) -> float:
    return sum(plain_probability(network, row) for row in rows) / len(rows)


# --- the network is left as it was


@pytest.mark.parametrize("case", MODELS)
def test_every_attack_leaves_network_and_reference_as_they_were(register: Any, case: str) -> None:
    network, retrained = adapted(register, case), register(initializer_range=0.3, **CONTEXT).load("float32")
    before, reference_before = state(network), state(retrained)
    entries = by_name(audit.audit(network, SETTINGS, ROWS, retrained, 3, never))
    assert_same(state(network), before)
    assert_same(state(retrained), reference_before)
    names = ("relearn_forget", "relearn_unrelated", "quantise_8", "quantise_4", "paraphrase", "prefix")
    assert list(entries) == [(name, metric) for name in names for metric in audit.METRICS]
    for entry in entries.values():
        assert None not in (entry.base, entry.released, entry.attacked, entry.retrained), entry


@pytest.mark.parametrize("calls", [1, 3, 6, 11])
def test_also_when_it_raises(register: Any, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, done = adapted(register, "llama-bfloat16"), []
    before, own = state(network), scoring.score

    def score(*args: Any) -> Any:
        done.append(args)
        if len(done) == calls:
            raise MemoryError
        return own(*args)

    monkeypatch.setattr(scoring, "score", score)
    with pytest.raises(MemoryError):
        audit.audit(network, SETTINGS, ROWS, None, 0, never)
    assert_same(state(network), before)


def test_cancelled_it_ends_without_what_it_has_not_finished(register: Any) -> None:
    network, asked = adapted(register), list[None]()

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) > 5  # 2 steps on the base, 2 on the released model, once after the attack: then no more

    before = state(network)
    assert {e.attack for e in audit.audit(network, SETTINGS, ROWS, None, 0, cancelled)} == {"relearn_forget"}
    assert audit.audit(network, SETTINGS, ROWS, None, 0, lambda: True) == []
    assert_same(state(network), before)


# --- copies


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2-capped"])
def test_a_merged_copy_is_base_plus_adapter_in_plain_layers(register: Any, case: str) -> None:
    network = adapted(register, case, "float64")
    copy = merged(network)
    assert copy.peft is None
    assert not any(".lora_" in name for name, _ in copy.causal.named_parameters())
    torch.testing.assert_close(logits(copy), logits(network), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits(copy), logits(unadapted(network)), rtol=1e-2), "the adapter does something"


def test_the_base_as_a_network_shares_every_weight(register: Any) -> None:
    network = adapted(register)
    base = unadapted(network)
    with model.adapter_off(network):
        assert torch.equal(logits(base), logits(network))
    own = {name.replace(".base_layer", ""): p.data_ptr() for name, p in network.causal.named_parameters()}
    assert all(p.data_ptr() == own[name] for name, p in base.causal.named_parameters())
    assert base.causal.get_output_embeddings().weight is base.causal.get_input_embeddings().weight, "tied"


# --- quantisation


def plain_rounded(weight: list[list[float]], bits: int, group: int) -> list[list[float]]:
    levels, out = 2 ** (bits - 1) - 1, []
    for channel in weight:
        row: list[float] = []
        for start in range(0, len(channel), group):
            part = channel[start : start + group]
            step = max(abs(w) for w in part) / levels
            row += [step * round(w / step) if step else 0.0 for w in part]
        out.append(row)
    return out


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 64), (4, 7), (2, 3)])
def test_rounding_is_the_plain_one_to_the_nearest_level(bits: int, group: int | None) -> None:
    weight_OI = torch.randn(6, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight_OI[2] = 0.0  # a channel of nothing stays one
    found_OI = quantise.rounded(weight_OI, bits, group)
    expected_OI = torch.tensor(plain_rounded(weight_OI.tolist(), bits, group or 100), dtype=torch.float64)
    torch.testing.assert_close(found_OI, expected_OI, rtol=1e-14, atol=0)
    torch.testing.assert_close(quantise.rounded(found_OI, bits, group), found_OI, rtol=1e-14, atol=0, msg="idempotent")
    for start in range(0, 100, group or 100):
        part_OG, now_OG = (t[:, start : start + (group or 100)] for t in (weight_OI, found_OI))
        step_O = part_OG.abs().amax(-1) / (2 ** (bits - 1) - 1)
        assert bool(((now_OG - part_OG).abs().amax(-1) <= step_O / 2 * (1 + 1e-12)).all()), "half a step at most"
        assert all(len(channel.unique()) <= 2**bits - 1 for channel in now_OG)


def test_rounding_keeps_the_type_and_never_the_storage() -> None:
    weight_OI = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    before_OI = weight_OI.clone()
    found_OI = quantise.rounded(weight_OI, 8, None)
    assert found_OI.dtype == torch.bfloat16
    assert torch.equal(weight_OI, before_OI)
    wide_OI = quantise.rounded(weight_OI.double(), 8, None)
    torch.testing.assert_close(found_OI.double(), wide_OI, rtol=2**-8, atol=0)
    ones_OI = torch.ones(2, 2)  # already on its levels
    assert quantise.rounded(ones_OI, 8, None).data_ptr() != ones_OI.data_ptr()


def test_an_update_of_less_than_half_a_step_is_undone() -> None:
    """Why quantisation brings back what was unlearned: weights on the levels return to them."""
    generator = torch.Generator().manual_seed(2)
    level_OI = torch.randint(-6, 7, (5, 64), generator=generator).double()
    level_OI[:, 0] = 7.0  # the largest weight, which the update leaves alone
    update_OI = (torch.rand(5, 64, generator=generator, dtype=torch.float64) - 0.5) * 0.98
    update_OI[:, 0] = 0.0
    torch.testing.assert_close(quantise.rounded(level_OI + update_OI, 4, 64), level_OI, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("case", "count"), [("llama", 14), ("gpt2", 8)])
def test_linear_layers_are_rounded_by_output_channel_and_nothing_else(register: Any, case: str, count: int) -> None:
    network = adapted(register, case)
    plain, coarse = merged(network).causal, quantise.quantised(network, 4).causal
    layers = {n: m for n, m in plain.named_modules() if isinstance(m, nn.Linear | Conv1D) and "lm_head" not in n}
    assert len(layers) == count
    for name, before in plain.named_parameters():
        after = coarse.get_parameter(name)
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(after, before), name
        else:
            weight_OI = before.T if isinstance(layer, Conv1D) else before
            expected_OI = torch.tensor(plain_rounded(weight_OI.double().tolist(), 4, 64)).float()
            torch.testing.assert_close(after.T if isinstance(layer, Conv1D) else after, expected_OI)
            assert not torch.equal(after, before)


def test_four_bits_are_further_off_than_eight(register: Any) -> None:
    network = adapted(register)
    off = [float((logits(quantise.quantised(network, bits)) - logits(network)).abs().mean()) for bits in (8, 4)]
    assert 0 < off[0] < off[1] / 4


# --- relearning


def test_no_step_changes_nothing(register: Any) -> None:
    network = adapted(register)
    copy = relearn.fine_tune(network, EXAMPLES, Audit(relearn_steps=0), 0, never)
    assert torch.equal(logits(copy), logits(merged(network)))


def test_steps_are_those_of_torch(register: Any) -> None:
    """Three steps of torch.optim.AdamW on the same fresh adapter and the token mean of the whole batch."""
    network, settings = adapted(register, dtype="float64"), Audit(relearn_steps=3, relearn_learning_rate=1e-2)
    found = relearn.fine_tune(network, EXAMPLES, settings, 7, never)
    plain = model.adapt(merged(network), Lora(), 7)
    params = list(model.trainable(plain).values())
    optimiser = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
    rows = data.encode(EXAMPLES, plain.tokenizer, plain.entry.prompt_format, None).rows
    for _ in range(3):
        nll = torch.zeros(())
        for row in rows:
            logp_TV = plain.causal(input_ids=torch.tensor([row.ids])).logits[0, :, : plain.vocabulary].log_softmax(-1)
            nll = nll - sum(logp_TV[t - 1, row.ids[t]] for t in range(row.answer_start, len(row.ids)))
        torch.autograd.backward(nll / sum(row.counted for row in rows))
        optimiser.step()
        optimiser.zero_grad()
    torch.testing.assert_close(logits(found), logits(plain), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(found), logits(network), rtol=1e-2, atol=1e-2)


def test_what_is_trained_on_becomes_likelier_and_the_entry_says_so(register: Any) -> None:
    network = adapted(register)
    settings = Audit(relearn_steps=20, relearn_learning_rate=2e-2, relearn_share=0.4)
    attack = relearn.relearn_forget(EXAMPLES, 400, settings, 0, never)
    before, after = (plain_mean(n, list(attack.trained)) for n in (network, attack.alter(network)))
    assert after > 5 * before
    entry = audit.tried(attack, network, {"attacked": network})[0]
    assert f"trained on: {before:.3g} before, {after:.3g} after" in entry.setting
    assert "on 2 of 5 rows of the forget set" in entry.setting


def test_trained_and_measured_rows_are_disjoint_and_drawn_by_the_seed() -> None:
    rows = [Example("question", f"Who is {i}?", f" {i}") for i in range(40)]
    seen = set()
    for seed in range(5):
        attack = relearn.relearn_forget(rows, 400, Audit(), seed, never)
        assert len(attack.trained) == 4
        assert set(attack.trained) | set(attack.rows) == set(rows)
        assert not set(attack.trained) & set(attack.rows)
        assert attack.trained == relearn.relearn_forget(rows, 400, Audit(), seed, never).trained
        seen.add(tuple(attack.trained))
    assert len(seen) == 5
    assert len(relearn.relearn_forget(rows, 9, Audit(), 0, never).rows) == 9


def test_a_row_that_stands_twice_is_not_both_trained_on_and_measured() -> None:
    rows = [Example("question", "Who?", " She")] * 3 + [Example("question", "When?", " Now")]
    attack = relearn.relearn_forget(rows, 400, Audit(relearn_share=0.5), 0, never)
    assert not set(attack.trained) & set(attack.rows)
    alone = relearn.relearn_forget(rows[:3], 400, Audit(relearn_share=0.5), 0, never)
    assert alone.reason == "needs rows to fine-tune on and different ones to measure"


def test_unrelated_texts_fit_and_stand_once(register: Any) -> None:
    assert len({question for question, _ in UNRELATED}) == len({answer for _, answer in UNRELATED}) == 24
    tiny = register().load("float32")  # of 128 bytes
    assert encode(tiny, [[Example("question", *pair) for pair in UNRELATED]])[1] == list(range(24))


# --- other words


def test_paraphrases_ask_the_same_rows_by_their_own_column(register: Any) -> None:
    rows = [*ROWS[:2], {**ROWS[2], "paraphrased_question": " "}, {k: ROWS[3][k] for k in ("question", "answer")}]
    network = adapted(register)
    entry = by_name(audit.audit(network, Audit(relearn_steps=0), rows, None, 0, never))["paraphrase", "probability"]
    others = [EXAMPLES[i]._replace(prompt=str(ROWS[i]["paraphrased_question"])) for i in (0, 1)]
    assert entry.rows == 2
    assert entry.released == pytest.approx(plain_mean(network, EXAMPLES[:2]), rel=1e-4)
    assert entry.attacked == pytest.approx(plain_mean(network, others), rel=1e-4)
    assert entry.base == pytest.approx(plain_mean(unadapted(network), others), rel=1e-4)
    assert entry.retrained is None


def test_of_the_prefixes_the_largest_value_of_each_row_counts(register: Any) -> None:
    network = adapted(register)
    entry = by_name(audit.audit(network, Audit(relearn_steps=0), ROWS, None, 0, never))["prefix", "probability"]
    value_PB = [
        [plain_probability(network, row._replace(prompt=f"{words} {row.prompt}")) for row in EXAMPLES]
        for words in wording.PREFIXES
    ]
    largest = [max(values) for values in zip(*value_PB, strict=True)]
    assert len({values.index(max(values)) for values in zip(*value_PB, strict=True)}) > 1, "one prefix is not always it"
    assert entry.attacked == pytest.approx(sum(largest) / len(largest), rel=1e-4)
    assert "of each row the largest value" in entry.setting


def test_a_row_that_a_prefix_makes_too_long_is_not_measured(register: Any) -> None:
    network = adapted(register)
    short = network._replace(context_tokens=19 + 70 + max(map(len, wording.PREFIXES)))
    long = {"question": "W" * 70, "answer": " " + "a" * 30}  # fits without a prefix
    entries = by_name(audit.audit(short, Audit(relearn_steps=0), [*ROWS, long], None, 0, never))
    assert entries["quantise_8", "probability"].rows == 6
    assert entries["prefix", "probability"].rows == 5


# --- what is said of it


def test_what_cannot_be_tried_is_null_with_its_reason(register: Any) -> None:
    network = adapted(register)
    bare = [{key: row[key] for key in ("question", "answer")} for row in ROWS]
    entries = by_name(audit.audit(network, Audit(relearn_steps=0), bare, None, 0, never))
    assert entries["paraphrase", "probability"].reason == "needs `paraphrased_question`"
    texts = by_name(audit.audit(network, Audit(relearn_steps=0), TEXTS, None, 0, never))
    assert texts["prefix", "extraction_strength"].reason == "the rows are texts, which ask nothing"
    assert texts["paraphrase", "probability"].reason == "the rows are texts, which ask nothing"
    assert texts["quantise_8", "probability"].rows == 2
    single = by_name(audit.audit(network, SETTINGS, ROWS[:1], None, 0, never))
    assert single["relearn_forget", "probability"].reason == "needs rows to fine-tune on and different ones to measure"
    for entry in (entries["paraphrase", "probability"], texts["prefix", "probability"]):
        assert (entry.base, entry.released, entry.attacked, entry.retrained, entry.rows) == (None, None, None, None, 0)


def test_rows_that_do_not_fit_are_a_reason_too(register: Any) -> None:
    network, retrained = adapted(register), register(initializer_range=0.3, **CONTEXT).load("float32")
    short = network._replace(context_tokens=50)
    entries = by_name(audit.audit(short, SETTINGS, ROWS, retrained._replace(context_tokens=20), 0, never))
    for name in ("relearn_unrelated", "prefix"):
        entry = entries[name, "probability"]
        assert (entry.attacked, entry.released, entry.reason) == (None, None, audit.NONE_FITS), name
    entry = entries["relearn_forget", "probability"]
    assert entry.attacked is not None
    assert entry.retrained is None, "no row fits into the reference's context"


def test_a_model_that_an_attack_breaks_has_no_figure(register: Any) -> None:
    def broken(network: Network) -> Network:
        copy = merged(network)
        copy.causal.model.norm.weight = nn.Parameter(torch.full((16,), math.nan))
        return copy

    network = adapted(register)
    entry = audit.tried(Attack("broken", "", EXAMPLES, [EXAMPLES], broken), network, {"attacked": network})[0]
    assert (entry.attacked, entry.reason) == (None, NOT_FINITE)
    assert entry.released is not None


def test_only_what_is_asked_for_is_tried(register: Any) -> None:
    settings = Audit(relearn_steps=0, quantise_bits=[4], paraphrases=False, prefixes=False)
    assert {e.attack for e in audit.audit(adapted(register), settings, ROWS, None, 0, never)} == {"quantise_4"}


def test_it_is_a_function_of_the_seed(register: Any) -> None:
    network = adapted(register)
    runs = [audit.audit(network, SETTINGS, ROWS, None, seed, never) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert by_name(runs[0])["relearn_forget", "probability"] != by_name(runs[2])["relearn_forget", "probability"]
    assert by_name(runs[0])["quantise_4", "probability"] == by_name(runs[2])["quantise_4", "probability"]


def test_of_many_rows_some_are_measured_and_the_entry_says_so(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "ROWS_MAX", 2)
    entries = audit.audit(adapted(register), SETTINGS, ROWS, None, 0, never)
    assert {entry.rows for entry in entries} == {2}
    assert all("at most 2 rows measured, drawn at random from 5" in entry.setting for entry in entries)


def test_base_and_reference_are_attacked_too(register: Any) -> None:
    network, retrained = adapted(register), register(initializer_range=0.3, **CONTEXT).load("float32")
    entries = by_name(audit.audit(network, Audit(relearn_steps=0), ROWS, retrained, 0, never))
    entry = entries["quantise_4", "probability"]
    assert entry.base == pytest.approx(plain_mean(quantise.quantised(unadapted(network), 4), EXAMPLES), rel=1e-4)
    assert entry.attacked == pytest.approx(plain_mean(quantise.quantised(network, 4), EXAMPLES), rel=1e-4)
    assert entry.retrained == pytest.approx(plain_mean(quantise.quantised(retrained, 4), EXAMPLES), rel=1e-4)
    assert entry.released == pytest.approx(plain_mean(network, EXAMPLES), rel=1e-4)
    assert len({entry.base, entry.attacked, entry.retrained, entry.released}) == 4


def test_figures_are_the_references_and_eight_bits_hardly_move_them() -> None:
    """A fresh adapter is the identity: what is 'released' has the base's figures, which the reference harness printed.

    On the rows that both read alike: the reference loses the first token of those that merge with the space before them.
    """
    shared = Path(os.environ.get("UNLEARN_SHARED", "../shared")).resolve()
    if not shared.is_dir():
        pytest.skip(f"no shared folder at {shared} (UNLEARN_SHARED)")
    text = (shared / "data" / "tofu" / "forget01_perturbed.json").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    golden = json.loads((shared / "golden" / "tofu260K_full_forget01_TOFU_EVAL.json").read_text())
    known = ModelEntry(name="tofu", source="path", location="tofu260K_full", prompt_format=PromptFormat())
    network = model.adapt(model.load(known, shared / "models", "cpu", "float32"), Lora(), 0)
    settings = Audit(relearn_steps=0, quantise_bits=[8], prefixes=False)
    examples = [Example("question", row["question"], row["answer"]) for row in rows]
    tokens = [
        data.encode(examples, network.tokenizer, PromptFormat(), None).rows,
        data.encode_as_benchmark(examples, network.tokenizer, PromptFormat(), Convention()).rows,
    ]
    alike = [place for place, (own, theirs) in enumerate(zip(*tokens, strict=True)) if own == theirs]
    assert len(alike) == 16
    entries = by_name(audit.audit(network, settings, [rows[place] for place in alike], None, 0, never))
    entry, strength = entries["quantise_8", "probability"], entries["quantise_8", "extraction_strength"]
    for found, figure, field in ((entry, "forget_Q_A_Prob", "prob"), (strength, "extraction_strength", "score")):
        values = [golden[figure]["value_by_index"][str(place)][field] for place in alike]
        assert found.released == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert entry.attacked == entry.base == pytest.approx(entry.released, abs=0.01)
    assert entries["paraphrase", "probability"].attacked == entries["paraphrase", "probability"].base
