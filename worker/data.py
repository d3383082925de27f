"""Rows of text as rows of tokens, and which of them make up a step.

Conventions of TOFU's evaluation (arXiv 2401.06121) as OpenUnlearning applies them: prompt + answer + end of sequence; what counts
is what is left of the tokenised whole behind as many tokens as the prompt has alone.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from service.domain.errors import JobFailure
from service.domain.job import FailureCode, PromptFormat
from service.domain.rows import Example

NAMED_ROWS_MAX = 20
SHOT_END = "\n\n"  # behind each answer of the questions that stand before a plain prompt


class TokenRow(NamedTuple):
    ids: list[int]
    answer_start: int  # first position that counts
    ends: bool = True  # with the end of sequence; some tokenisers have none

    @property
    def counted(self) -> int:
        return len(self.ids) - self.answer_start


class Encoded(NamedTuple):
    """A set. Rows keep their place: row k of the file is number k + 1 in every message."""

    rows: list[TokenRow]
    prompts: list[list[int]]  # what generation starts from; empty for a text
    answers: list[str]
    unmeasured: list[int]  # 1-based numbers of rows without a token that counts

    @property
    def measured(self) -> list[int]:
        """0-based places of the rows that can be trained on and measured."""
        without = {number - 1 for number in self.unmeasured}
        return [place for place in range(len(self.rows)) if place not in without]

    @property
    def counted(self) -> int:
        return sum(self.rows[place].counted for place in self.measured)


class Padded(NamedTuple):
    """Rows padded on the right. A causal model's real positions never see the padding, so no mask is needed for them."""

    input_ids_BT: Tensor  # int64
    labels_BT: Tensor  # int64, aligned, -100 where a token does not count
    attention_BT: Tensor  # int64, 1 on real positions


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    prompt_format: PromptFormat,
    context_tokens: int | None,
    shots: Sequence[tuple[str, str]] = (),
    ends: bool = True,
) -> Encoded:
    """Tokenise a set. Without `context_tokens` rows may be of any length, and none need count.

    Args:
        shots: questions and answers that stand before each question.
        ends: put the end of sequence behind each row. False: as MUSE reads a corpus. The reference leaves the last token out
            where it leaves out an end of sequence, whatever it is; so do such rows, which are marked as if they ended.

    Raises JobFailure: row_too_long naming the rows that are longer than the model's context, or invalid_file when no row
    has a token that counts.
    """
    eos = tokenizer.eos_token_id
    ends_by_itself = tokenizer("")["input_ids"][-1:] == [eos]
    rows, prompts = [], []
    for example in examples:
        prompt, whole = _texts(example, tokenizer, prompt_format, shots)
        special = not (example.kind == "question" and prompt_format.type == "chat")  # a chat template brings its own
        prompt_ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
        if special and ends_by_itself and prompt_ids[-1:] == [eos]:  # a prompt is not the end
            prompt_ids = prompt_ids[:-1]
        ids = tokenizer(whole, add_special_tokens=special)["input_ids"]
        if ends and eos is not None and (not ids or ids[-1] != eos):
            ids = [*ids, eos]
        start = 1 if example.kind == "text" else max(1, len(prompt_ids))
        rows.append(TokenRow(ids, min(start, len(ids)), ends=not ends or eos is not None))
        prompts.append([] if example.kind == "text" else prompt_ids)
    room = math.inf if context_tokens is None else context_tokens
    long = [number for number, row in enumerate(rows, start=1) if len(row.ids) > room]
    if long:
        raise JobFailure(
            FailureCode.ROW_TOO_LONG,
            f"rows longer than the model's context of {context_tokens} tokens: {_named(long)} "
            f"({len(long)} of {len(rows)})",
        )
    # A row whose only label is the end of sequence says nothing of its answer: the tokeniser merged that into the prompt.
    unmeasured = [number for number, row in enumerate(rows, start=1) if row.counted <= row.ends]
    if context_tokens is not None and len(unmeasured) == len(rows):
        raise JobFailure(FailureCode.INVALID_FILE, "no row has a token that counts")
    return Encoded(rows, prompts, [example.answer for example in examples], unmeasured)


def encode_refusals(
    examples: Sequence[Example],
    refusals: Sequence[str],
    seed: int,
    tokenizer: Any,
    prompt_format: PromptFormat,
    context_tokens: int,
) -> Encoded:
    """The same questions, each answered with one of the refusals: which one is a function of the seed and the row's place.

    Raises JobFailure: invalid_file for a text, which asks nothing that could be refused; row_too_long as `encode`.
    """
    texts = [number for number, example in enumerate(examples, start=1) if example.kind == "text"]
    if texts:
        raise JobFailure(
            FailureCode.INVALID_FILE,
            f"the method refuses questions, and {len(texts)} rows ask none (they are texts): {_named(texts)}",
        )
    drawn = torch.randint(
        len(refusals), (len(examples),), generator=torch.Generator().manual_seed(_seed(seed, "refusals", 0))
    )
    refused = [example._replace(answer=refusals[k]) for example, k in zip(examples, drawn.tolist(), strict=True)]
    return encode(refused, tokenizer, prompt_format, context_tokens)


def _named(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:NAMED_ROWS_MAX])) + (", ..." if len(numbers) > NAMED_ROWS_MAX else "")


def _texts(
    example: Example, tokenizer: Any, prompt_format: PromptFormat, shots: Sequence[tuple[str, str]]
) -> tuple[str, str]:
    """(prompt, prompt + answer) as the model reads them."""
    if example.kind != "question":
        return example.prompt, example.prompt + example.answer
    if prompt_format.type == "chat":
        messages = [{"role": "system", "content": prompt_format.system}] if prompt_format.system else []
        for question, answer in shots:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": example.prompt})
        try:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (ValueError, TemplateError) as error:  # there is none, or it takes no system message
            raise JobFailure(
                FailureCode.UNSUPPORTED_ARCHITECTURE, f"the chat template cannot be applied: {error}"
            ) from error
        return prompt, prompt + example.answer
    *before, prompt = [
        prompt_format.user_start + question + prompt_format.user_end + prompt_format.assistant_start
        for question in (*(question for question, _ in shots), example.prompt)
    ]
    prompt = "".join(asked + answer + SHOT_END for asked, (_, answer) in zip(before, shots, strict=True)) + prompt
    return prompt, prompt + example.answer


def pad(rows: Sequence[TokenRow], device: torch.device) -> Padded:
    length = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros(len(rows), length, dtype=torch.int64)
    labels_BT = torch.full_like(ids_BT, -100)
    attention_BT = torch.zeros_like(ids_BT)
    for b, row in enumerate(rows):
        end = len(row.ids)
        ids_BT[b, :end] = torch.tensor(row.ids)
        labels_BT[b, row.answer_start : end] = ids_BT[b, row.answer_start : end]
        attention_BT[b, :end] = 1
    return Padded(ids_BT.to(device), labels_BT.to(device), attention_BT.to(device))


def batch(places: Sequence[int], rows: int, seed: int, name: str, step: int) -> list[int]:
    """The rows of a step (0-based), a pure function of (seed, name, step).

    Each epoch is a fresh permutation cut into batches; the last is filled up from the permutation's start. So every row is
    in every epoch, and none stands twice in a step. A set smaller than a batch is taken whole.
    """
    count = len(places)
    if rows >= count:
        return list(places)
    epoch, k = divmod(step, math.ceil(count / rows))
    order = _order(count, seed, name, epoch)
    return [places[order[i % count]] for i in range(k * rows, (k + 1) * rows)]


@lru_cache(maxsize=4)
def _order(count: int, seed: int, name: str, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(_seed(seed, name, epoch))).tolist()
    return order


def _seed(seed: int, name: str, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{epoch}".encode()).digest()[:8]) >> 1


def by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Split rows into batches where only memory matters: in order of length, as many as fit."""
    part: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if part and (len(part) + 1) * lengths[i] > max_tokens:
            yield part
            part = []
        part.append(i)
    if part:
        yield part
