"""Greedy answers are those of the library, one prompt at a time, with fewer tokens read."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from service.domain.job import ModelEntry, PromptFormat
from service.domain.rows import Example
from worker import data, decoder, generation, model, scoring
from worker.generation import Generated, generate
from worker.model import Network
from worker.suite import Ask, Convention

SHARED = Path(os.environ.get("UNLEARN_SHARED", "../shared"))
MOE = {"num_experts_per_tok": 1, "moe_intermediate_size": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 24},
    "gemma2": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0, "sliding_window": 64},
    "gemma3_text": {"sliding_window": 8},  # shorter than the prompts
    "qwen2_moe": {"num_experts": 2} | MOE,
    "bloom": {"n_layer": 2, "n_head": 2},
}
FEW_SHOT = list(range(40, 60))
PROMPTS = [
    [*FEW_SHOT, 70, 71, 72],
    [*FEW_SHOT, 80],
    [*FEW_SHOT, 90, 91, 92, 93, 94, 95, 96, 97],
    [*FEW_SHOT, 70, 71, 73],
    [*FEW_SHOT, 70, 71, 72],  # the first again
]
OTHERS = [[5], [100, 101], list(range(60, 90)), list(range(200, 220))]


def load(register: Any, architecture: str, **config: Any) -> Network:
    dtype = "float32" if "num_experts_per_tok" in ARCHITECTURES[architecture] else "float64"
    network: Network = register(architecture, **ARCHITECTURES[architecture] | config).load(dtype)
    return network


def by_the_library(network: Network, prompt: Sequence[int], room: int) -> list[int]:
    out_1T = network.causal.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=room,
        do_sample=False,
        pad_token_id=1,
    )
    ids: list[int] = out_1T[0, len(prompt) :].tolist()
    ends = network.causal.generation_config.eos_token_id
    return next((ids[:k] for k, token in enumerate(ids) if token in ends), ids)


def ids(found: Sequence[Generated]) -> list[list[int]]:
    return [one.ids for one in found]


@pytest.mark.parametrize("prompts", [PROMPTS, OTHERS, PROMPTS + OTHERS], ids=["prefix", "no prefix", "both"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tokens_are_the_librarys(architecture: str, prompts: list[list[int]], register: Any) -> None:
    network = load(register, architecture)
    assert decoder.caches(network, 60)
    assert ids(generate(network, prompts, 12)) == [by_the_library(network, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("tokens", [1, 70])
def test_batches_and_the_order_of_prompts_change_nothing(
    tokens: int, tiny: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = PROMPTS + OTHERS
    expected = generate(tiny, prompts, 12)
    monkeypatch.setattr(generation, "GENERATION_TOKENS", tokens)
    monkeypatch.setattr(generation, "GENERATION_BYTES", 0)
    assert generate(tiny, prompts[::-1], 12) == expected[::-1]


def test_a_large_vocabulary_is_read_for_a_few_rows_at_a_time(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are answered at once; greedy and drawn tokens are the same."""
    prompts = (PROMPTS + OTHERS) * 3
    seeds = [None if k % 2 else k for k in range(len(prompts))]
    own, rows = generation._logits, list[int]()

    def counted(network: Network, states_ND: torch.Tensor) -> torch.Tensor:
        rows.append(len(states_ND))
        return own(network, states_ND)

    monkeypatch.setattr(generation, "_logits", counted)
    expected = generate(tiny, prompts, 12, seeds=seeds)
    assert max(rows) > 5
    rows.clear()
    own_bytes, copied, wide = tiny.causal.dtype.itemsize, 4, 8 + 8
    vocabulary = tiny.causal.config.vocab_size
    monkeypatch.setattr(generation, "LOGITS_BYTES", 5 * vocabulary * (own_bytes + copied + wide))
    assert generate(tiny, prompts, 12, seeds=seeds) == expected
    assert max(rows) == 5
    monkeypatch.setattr(generation, "LOGITS_BYTES", 1)
    assert generate(tiny, prompts[:3], 12, seeds=seeds[:3]) == expected[:3], "at least one at a time"


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "bloom"])
def test_rows_that_wait_take_the_places_of_those_that_have_ended(
    architecture: str, register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside rows of other lengths, which have said more."""
    network = load(register, architecture)
    prompts, rooms = [*PROMPTS, *OTHERS], [3, 12, 1, 12, 4, 2, 12, 5, 12]
    rows: list[tuple[int, ...]] = []
    own = decoder.joined
    monkeypatch.setattr(
        decoder,
        "joined",
        lambda parts: rows.append(tuple(len(mask_BS) for _, mask_BS in parts)) or own(parts),  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr(generation, "GENERATION_TOKENS", 4 * 40)
    monkeypatch.setattr(generation, "GENERATION_BYTES", 0)
    expected = [by_the_library(network, prompt, room) for prompt, room in zip(prompts, rooms, strict=True)]
    assert ids(generate(network, prompts, rooms)) == expected
    assert rows, "beside those that went on"


def ending_early(network: Network, *after: int) -> list[list[int]]:
    """End-of-sequence tokens such that rows end at different times: what the model says at these places of the first prompts."""
    said = [by_the_library(network, prompt, 12) for prompt in PROMPTS[:2]]
    network.causal.generation_config.eos_token_id = sorted({1, *(said[k][at] for k, at in enumerate(after))})
    return [by_the_library(network, prompt, 12) for prompt in PROMPTS + OTHERS]


def test_each_row_ends_where_it_ends_and_leaves_the_batch(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ending_early(tiny, 3, 6)
    assert len({len(row) for row in expected}) > 2, "rows of several lengths"
    monkeypatch.setattr(decoder, "caches", lambda *_: True)  # without the probes
    monkeypatch.setattr(decoder, "reads_trees", lambda *_: False)
    monkeypatch.setattr(generation, "GUESSING_TOKENS", 0)
    sizes = positions_of_passes(tiny, lambda: generate(tiny, PROMPTS + OTHERS, 12))
    assert ids(generate(tiny, PROMPTS + OTHERS, 12)) == expected
    # after the prompts, one position for each row that has said no end yet and has room
    going = [sum(len(row) > step for row in expected) for step in range(11)]
    assert sizes[1:] == [count for count in going if count]


def positions_of_passes(network: Network, do: Callable[[], object]) -> list[int]:
    sizes: list[int] = []
    handle = network.causal.get_decoder().register_forward_pre_hook(
        lambda _module, _args, given: sizes.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        do()
    finally:
        handle.remove()
    return sizes


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bloom"])
@pytest.mark.parametrize(("falsified", "passes"), [(None, 2), (0, 12), (3, 4)], ids=["right", "wrong", "partly"])
def test_of_what_is_guessed_as_much_stands_as_is_right(
    architecture: str, falsified: int | None, passes: int, register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row guesses its own answer, with one token falsified in every row but the last."""
    network = load(register, architecture)
    expected = [by_the_library(network, prompt, 12) for prompt in OTHERS]

    def guesses(ids: list[int], most: int) -> list[int]:
        (row,) = (row for row, prompt in enumerate(OTHERS) if ids[: len(prompt)] == prompt)
        right = expected[row][len(ids) - len(OTHERS[row]) :][:most]
        return [(t + 1) % 200 if k == falsified and row < 3 else t for k, t in enumerate(right)]

    monkeypatch.setattr(decoder, "caches", lambda *_: True)
    monkeypatch.setattr(generation, "GUESSING_TOKENS", 1000)
    monkeypatch.setattr(generation, "_guesses", guesses)
    assert ids(generate(network, OTHERS, 12)) == expected
    assert len(positions_of_passes(network, lambda: generate(network, OTHERS, 12))) == passes


def test_guesses_leave_room_in_a_window_and_end_with_the_positions(
    register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one row guesses right leaves gaps in those that guess wrong."""
    prompts = [[40, 41, 42, 43], [50, 51, 52], [60] * 8]
    network = load(register, "gemma2", sliding_window=24)
    expected = [by_the_library(network, prompt, 16) for prompt in prompts]
    monkeypatch.setattr(
        generation,
        "_guesses",
        lambda ids, most: (expected[0][len(ids) - 4 :] if ids[0] == 40 else [ids[-1]] * most)[:most],
    )
    columns: list[int] = []
    own = decoder.step
    monkeypatch.setattr(decoder, "caches", lambda *_: True)
    monkeypatch.setattr(decoder, "step", lambda n, k, i, mask: columns.append(mask.shape[1]) or own(n, k, i, mask))  # type: ignore[func-returns-value]
    assert ids(generate(network, prompts, 16)) == expected
    assert max(columns) < 24, "of the cache"
    learned = load(register, "gpt2")
    monkeypatch.setattr(generation, "_guesses", lambda ids, most: [ids[-1]] * most)
    long = list(range(2, 122))
    assert ids(generate(learned, [long], 30)) == [by_the_library(learned, long, 8)], "of 128 positions"


def test_what_prompts_begin_with_is_read_once(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "caches", lambda *_: True)
    monkeypatch.setattr(decoder, "reads_trees", lambda *_: True)
    sizes = positions_of_passes(tiny, lambda: generate(tiny, PROMPTS, 1))
    assert sizes == [20 + len((70, 71, 72, 73)) + len((80,)) + 8], "the prefix, and what each has of its own"
    sizes = positions_of_passes(tiny, lambda: generate(tiny, PROMPTS[:1], 1))
    assert sizes == [23], "nothing to share"
    sizes = positions_of_passes(tiny, lambda: generate(tiny, PROMPTS[:1] * 8, 1, seeds=list(range(8))))
    assert sizes == [23], "eight answers to one prompt"


def test_a_row_ends_with_its_stop(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "caches", lambda *_: True)
    whole = generate(tiny, PROMPTS, 30)
    stop = next(one.text for one in whole if len(one.text) > 12)[4:6]  # two characters that one of the answers has
    found = generate(tiny, PROMPTS, 30, (stop, "not said"))
    assert [one.text for one in found] == [one.text.partition(stop)[0].strip() for one in whole]
    for one, longer in zip(found, whole, strict=True):
        assert longer.ids[: len(one.ids)] == one.ids
        read = tiny.tokenizer.decode(one.ids[:-1])
        assert stop not in read, "no token behind the one that completed it"
    assert sum(len(one.ids) for one in found) < sum(len(one.ids) for one in whole)
    assert sum(positions_of_passes(tiny, lambda: generate(tiny, PROMPTS, 30, (stop,)))) < sum(
        positions_of_passes(tiny, lambda: generate(tiny, PROMPTS, 30))
    )


def test_no_row_is_longer_than_the_context_and_none_costs_another_its_room(tiny: Network) -> None:
    long, full, short = list(range(2, 127)), list(range(2, 130)), [40, 41]  # of 128 tokens
    found = ids(generate(tiny, [long, [], full, short], 12))
    assert [len(row) for row in found] == [3, 0, 0, 12]
    assert found[0] == by_the_library(tiny, long, 3)
    assert found[3] == by_the_library(tiny, short, 12)


def test_beyond_the_context_where_there_are_positions(tiny: Network, register: Any) -> None:
    long, beyond = list(range(2, 127)), list(range(2, 140))
    found = ids(generate(tiny, [long, beyond], 12, beyond_context=True))
    assert found == [by_the_library(tiny, long, 12), by_the_library(tiny, beyond, 12)]
    learned = load(register, "gpt2")
    assert [len(row) for row in ids(generate(learned, [long, beyond], 12, beyond_context=True))] == [3, 0]


def test_a_model_whose_cache_is_not_understood_answers_as_the_library_does(
    register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    network = load(register, "llama", rope_parameters=scaled)
    assert decoder.caches(network, 16)
    assert not decoder.caches(network, 17)
    expected = [by_the_library(network, prompt, 12) for prompt in PROMPTS]
    assert ids(generate(network, PROMPTS, 12)) == expected

    def broken(*_: Any) -> Any:
        raise TypeError("no such cache")

    monkeypatch.setattr(decoder, "step", broken)
    tiny = load(register, "llama")
    assert ids(generate(tiny, PROMPTS, 12)) == [by_the_library(tiny, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision(dtype: str, register: Any) -> None:
    network = register().load(dtype)
    found = generate(network, PROMPTS, 12)
    assert found[0] == found[4], "the same prompt, the same answer"
    assert all(len(one.ids) <= 12 for one in found)
    agree = sum(
        a == b
        for one, prompt in zip(found, PROMPTS, strict=True)
        for a, b in zip(one.ids, by_the_library(network, prompt, 12), strict=False)
    )
    assert agree > 40, "of 60: a near tie goes either way, and what follows with it"


# --- few-shot prompts


def test_shots_stand_before_each_question(register: Any) -> None:
    shots = (("Who?", "Ada"), ("Where?", "Lima"))
    plain = register()
    row, convention = Example("question", "When?", "Now"), Convention(shots)
    encoded = data.encode_as_benchmark([row], plain.load().tokenizer, PromptFormat(), convention)
    before = "Question: Who?\nAnswer: Ada\n\nQuestion: Where?\nAnswer: Lima\n\nQuestion: When?\nAnswer: "
    tokenizer = plain.load().tokenizer
    assert tokenizer.decode(encoded.prompts[0], skip_special_tokens=True) == before
    assert tokenizer.decode(encoded.rows[0].ids, skip_special_tokens=True) == before + "Now"
    chat = register(chat=True)
    network = chat.load()
    encoded = data.encode_as_benchmark([row], network.tokenizer, chat.entry.prompt_format, convention)
    turns = "[user] Who?\n[assistant] Ada\n[user] Where?\n[assistant] Lima\n[user] When?\n[assistant]"
    assert network.tokenizer.decode(encoded.prompts[0], skip_special_tokens=True) == turns


# --- the reference's own figures


@pytest.fixture(scope="module")
def learned() -> Network:
    if not (SHARED / "models" / "tofu260K_full").is_dir():
        pytest.skip("no shared/models/tofu260K_full")
    entry = ModelEntry(name="tofu", source="path", location="tofu260K_full", prompt_format=PromptFormat())
    return model.load(entry, SHARED.resolve() / "models", "cpu", "float32")


def test_the_references_answers(learned: Network) -> None:
    """TOFU's, and those of MUSE: with questions and answers before the question, and with stops."""
    golden = json.loads((SHARED / "golden" / "tofu260K_full_forget01_TOFU_EVAL.json").read_text())
    rows = list(golden["forget_Q_A_ROUGE"]["value_by_index"].values())
    prompts = [learned.tokenizer(row["input"])["input_ids"] for row in rows]
    assert [one.text for one in generate(learned, prompts, 200)] == [row["generation"] for row in rows]
    golden = json.loads((SHARED / "golden" / "tofu260K_full_alice12_MUSE_EVAL.json").read_text())
    rows = list(golden["forget_knowmem_ROUGE"]["value_by_index"].values())
    prompts = [learned.tokenizer(row["input"])["input_ids"] for row in rows]
    stops = ("\n\n", "\nQuestion", "Question:")
    said = generate(learned, prompts, 32, stops, beyond_context=True)
    assert [one.text for one in said] == [row["generation"] for row in rows]
    rows = list(golden["forget_verbmem_ROUGE"]["value_by_index"].values())
    prompts = [learned.tokenizer(row["input"])["input_ids"] for row in rows]
    said = generate(learned, prompts, 128, beyond_context=True)
    assert [one.text for one in said] == [row["generation"] for row in rows]


def test_a_look_puts_prompts_with_the_same_conditions_together(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = generation.generate
    monkeypatch.setattr(
        generation,
        "generate",
        lambda n, prompts, *rest, **named: calls.append(len(prompts)) or own(n, prompts, *rest, **named),  # type: ignore[func-returns-value]
    )
    ask = Ask(
        {0: Example("question", "Who?", " Ada"), 3: Example("question", "Where?", " Lima")}, frozenset({"generated"}), 4
    )
    seen = scoring.look(
        tiny, {("forget", "answer"): ask, ("retain", "answer"): ask, ("other", "answer"): ask._replace(stops=("x",))}
    )
    assert calls == [4, 2]
    scores = seen["forget", "answer"]
    assert scores.answers == {0: " Ada", 3: " Lima"}
    assert scores.generated == seen["retain", "answer"].generated
    assert scores.generated_ids is not None
    prompts = data.encode(list(ask.texts.values()), tiny.tokenizer, tiny.entry.prompt_format, None).prompts
    assert list(scores.generated_ids.values()) == [by_the_library(tiny, prompt, 4) for prompt in prompts]
