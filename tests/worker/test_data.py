"""Rows as tokens by the evaluation's conventions, and the schedule of batches and micro-batches."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain.errors import JobFailure
from service.domain.job import FailureCode, PromptFormat
from service.domain.microbatches import microbatches
from service.domain.rows import Example
from worker import data
from worker.suite import Convention

EOS = 1
PLAIN = PromptFormat(assistant_start="Answer:")
SPACE = PromptFormat(assistant_start="Answer: ")


def qa(question: str, answer: str) -> Example:
    return Example("question", question, answer)


def labels(encoded: data.Encoded, tokenizer: Any, row: int = 0) -> list[str]:
    """What counts, as text, token by token."""
    ids, start, *_ = encoded.rows[row]
    return [tokenizer.decode([i]) for i in ids[start:]]


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer: Callable[..., Any]) -> Any:
    return byte_tokenizer()


# --- encoding


def test_a_question_by_hand(tokenizer: Any) -> None:
    encoded = data.encode([qa("Where?", " Paris.")], tokenizer, PLAIN, 128)
    assert tokenizer.decode(encoded.rows[0].ids) == "<s>Question: Where?\nAnswer: Paris.</s>"
    assert labels(encoded, tokenizer) == [" Paris", ".", "</s>"]
    assert encoded.rows[0].counted == encoded.counted == 3
    assert tokenizer.decode(encoded.prompts[0]) == "<s>Question: Where?\nAnswer:"
    assert encoded.answers == [" Paris."]
    assert encoded.unmeasured == []


def test_prompt_and_completion_are_literal(tokenizer: Any) -> None:
    encoded = data.encode([Example("prompt", "Go to", " Lima")], tokenizer, PLAIN, 128)
    assert tokenizer.decode(encoded.rows[0].ids) == "<s>Go to Lima</s>"
    assert labels(encoded, tokenizer) == [" Lima", "</s>"]
    encoded = data.encode([Example("prompt", "", "ab")], tokenizer, PLAIN, 128)
    assert labels(encoded, tokenizer) == ["a", "b", "</s>"], "<s> alone is the prompt"


def test_of_a_text_all_but_the_first_token_counts(tokenizer: Any) -> None:
    encoded = data.encode([Example("text", "", "ab Lima")], tokenizer, PLAIN, 128)
    assert labels(encoded, tokenizer) == ["a", "b", " Lima", "</s>"]
    assert encoded.prompts == [[]], "there is nothing that it answers"


def test_the_end_of_sequence_is_there_once(tokenizer: Any, byte_tokenizer: Callable[..., Any]) -> None:
    for ending in (tokenizer, byte_tokenizer(ends=True)):
        encoded = data.encode([qa("Where?", " Paris"), qa("Where?", " Paris</s>")], ending, PLAIN, 128)
        assert labels(encoded, ending) == [" Paris", "</s>"], "a prompt has no end that the answer lacks"
        assert labels(encoded, ending, 1) == [" Paris", "<", "/", "s", ">", "</s>"], (
            "the first is in the answer's words"
        )
        assert EOS not in encoded.prompts[0]


def test_a_chat_template_brings_the_only_beginning(byte_tokenizer: Callable[..., Any]) -> None:
    tokenizer = byte_tokenizer(chat=True)
    chat = PromptFormat(type="chat", system="Be brief.")
    encoded = data.encode([qa("Where?", "Paris"), Example("prompt", "Go to", " Lima")], tokenizer, chat, 128)
    assert tokenizer.decode(encoded.rows[0].ids) == "<s>[system] Be brief.\n[user] Where?\n[assistant] Paris</s>"
    assert labels(encoded, tokenizer) == [" Paris", "</s>"]
    assert tokenizer.decode(encoded.rows[1].ids) == "<s>Go to Lima</s>"


def test_a_chat_format_without_a_template_is_a_failure_with_a_sentence(tokenizer: Any) -> None:
    with pytest.raises(JobFailure, match="chat template") as failure:
        data.encode([qa("Where?", " Paris")], tokenizer, PromptFormat(type="chat"), 128)
    assert failure.value.code is FailureCode.UNSUPPORTED_ARCHITECTURE


def test_a_token_that_merges_over_the_seam_counts(tokenizer: Any) -> None:
    """ "Answer: " alone ends in a token for the space; with an answer behind it, the answer's first token has the space."""
    rows = [qa("Where?", "Lima"), qa("Where?", "Limaa"), qa("Where?", "Oslo"), qa("Where?", "Paris")]
    encoded = data.encode(rows, tokenizer, SPACE, 128)
    assert [labels(encoded, tokenizer, k)[:2] for k in range(4)] == [
        [" Lima", "</s>"],
        [" Lima", "a"],
        ["O", "s"],
        [" Paris", "</s>"],
    ]
    assert encoded.unmeasured == []


def test_of_a_benchmark_it_does_not(tokenizer: Any) -> None:
    rows = [qa("Where?", "Lima"), qa("Where?", "Limaa"), qa("Where?", "Oslo"), qa("Where?", "Paris")]
    encoded = data.encode_as_benchmark(rows, tokenizer, SPACE, Convention())
    assert encoded.unmeasured == [1, 4], "all that is left of them is the end of sequence"
    assert encoded.measured == [1, 2]
    assert labels(encoded, tokenizer, 1) == ["a", "</s>"]
    assert labels(encoded, tokenizer, 2) == ["O", "s", "l", "o", "</s>"]
    assert encoded.counted == 2 + 5


def test_a_set_of_which_nothing_counts_is_refused(tokenizer: Any) -> None:
    with pytest.raises(JobFailure, match="no row has a token that counts") as failure:
        data.encode([qa("Where?", "")], tokenizer, SPACE, 128)
    assert failure.value.code is FailureCode.INVALID_FILE


def test_rows_that_are_too_long_are_named_from_1(tokenizer: Any) -> None:
    short, long = Example("text", "", "x" * 30), Example("text", "", "x" * 31)  # and <s> and </s>
    assert len(data.encode([short], tokenizer, PLAIN, 32).rows[0].ids) == 32
    with pytest.raises(JobFailure, match=r"context of 32 tokens: 2, 4 \(2 of 4\)") as failure:
        data.encode([short, long, short, long], tokenizer, PLAIN, 32)
    assert failure.value.code is FailureCode.ROW_TOO_LONG
    with pytest.raises(JobFailure, match=r" 19, 20, \.\.\. \(25 of 25\)"):
        data.encode([long] * 25, tokenizer, PLAIN, 32)


def test_padding_counts_for_nothing() -> None:
    padded = data.pad([data.TokenRow([5, 6, 7, 8], 2), data.TokenRow([9, 10], 1)], torch.device("cpu"))
    assert padded.input_ids_BT.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert padded.labels_BT.tolist() == [[-100, -100, 7, 8], [-100, 10, -100, -100]]
    assert padded.attention_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


# --- the schedule


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), rows=st.integers(1, 16), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 5))
def test_an_epoch_holds_every_row_and_a_step_none_twice(count: int, rows: int, seed: int, epoch: int) -> None:
    places = [3 * k + 1 for k in range(count)]
    steps = math.ceil(count / rows)
    seen = Counter[int]()
    for step in range(epoch * steps, (epoch + 1) * steps):
        batch = data.batch(places, rows, seed, "forget", step)
        assert len(batch) == len(set(batch)) == min(rows, count)
        assert batch == data.batch(places, rows, seed, "forget", step), "a pure function of the step"
        seen.update(batch)
    assert set(seen) == set(places)
    assert max(seen.values()) <= 2
    assert sum(seen.values()) == steps * min(rows, count)


def test_seeds_sets_and_epochs_differ() -> None:
    def epoch(seed: int, name: str, number: int) -> list[int]:
        return [p for k in range(5) for p in data.batch(range(20), 4, seed, name, 5 * number + k)]

    orders = [epoch(0, "forget", 0), epoch(1, "forget", 0), epoch(0, "retain", 0), epoch(0, "forget", 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(20)) for order in orders)


# --- micro-batches


def partitions(count: int) -> Iterator[list[tuple[int, int]]]:
    """Every way to cut `count` things in a row into pieces."""
    for bits in range(2 ** (count - 1)):
        cuts = [0, *(k + 1 for k in range(count - 1) if bits >> k & 1), count]
        yield list(pairwise(cuts))


def cost(parts: Sequence[Sequence[int]], overhead: float) -> float:
    return sum(len(part) * max(part) + overhead for part in parts)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=9),
    overhead=st.sampled_from([0.0, 7.0, 50.0, 1e6]),
    budget=st.sampled_from([1, 70, 150, 10_000]),
)
def test_micro_batches_cost_least(lengths: list[int], overhead: float, budget: int) -> None:
    parts = microbatches(lengths, overhead, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    in_order = sorted(lengths)
    possible = [[in_order[a:b] for a, b in cut] for cut in partitions(len(lengths))]
    allowed = [cut for cut in possible if all(len(p) == 1 or len(p) * max(p) <= budget for p in cut)]
    ours = [[lengths[i] for i in part] for part in parts]
    assert all(len(part) == 1 or len(part) * max(part) <= budget for part in ours)
    assert cost(ours, overhead) == min(cost(cut, overhead) for cut in allowed)


def test_thousands_of_rows_are_split_at_once() -> None:
    began = time.perf_counter()
    parts = microbatches([50 + k % 200 for k in range(8192)], 300.0, 16_384)
    assert sum(map(len, parts)) == 8192
    assert time.perf_counter() - began < 3


def test_scoring_batches_fill_the_budget() -> None:
    lengths = [7, 3, 9, 3, 50, 8]
    parts = list(data.by_length(lengths, 20))
    assert parts == [[1, 3], [0, 5], [2], [4]]


# --- tokenisers without an end of sequence, and refusals


@pytest.fixture
def endless(byte_tokenizer: Callable[..., Any]) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def test_without_an_end_of_sequence_one_token_is_an_answer(endless: Any) -> None:
    encoded = data.encode([qa("Where?", " Paris"), qa("Where?", " Lima")], endless, PLAIN, 128)
    assert [row.counted for row in encoded.rows] == [1, 1]
    assert not any(row.ends for row in encoded.rows)
    assert encoded.unmeasured == []


REFUSALS = ["I do not know.", "No idea.", "I cannot say."]


def test_each_question_is_refused_in_one_of_the_sentences(tokenizer: Any) -> None:
    examples = [qa(f"Where is {k}?", " Paris") for k in range(60)]
    refused = data.encode_refusals(examples, REFUSALS, 3, tokenizer, PLAIN, 128)
    assert refused.prompts == data.encode(examples, tokenizer, PLAIN, 128).prompts, "the same questions"
    assert set(refused.answers) == set(REFUSALS), "all of them are used"
    assert refused.answers == data.encode_refusals(examples, REFUSALS, 3, tokenizer, PLAIN, 128).answers
    assert refused.answers != data.encode_refusals(examples, REFUSALS, 4, tokenizer, PLAIN, 128).answers


def test_a_text_cannot_be_refused(tokenizer: Any) -> None:
    with pytest.raises(JobFailure, match=r"1 rows ask none \(they are texts\): 2") as caught:
        data.encode_refusals([qa("Where?", "Here"), Example("text", "", "x")], REFUSALS, 0, tokenizer, PLAIN, 128)
    assert caught.value.code is FailureCode.INVALID_FILE
