"""Rows of text as rows of tokens, and which of them make up a step.

`encode` reads a row as the model is served: what the chat template renders for the whole dialogue, up to the end of turn
(service.prompts). `encode_as_benchmark` reads it as OpenUnlearning's evaluation does (arXiv 2506.12618), for figures that carry
a benchmark's name.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from service.domain.errors import JobFailure
from service.domain.job import FailureCode, PromptFormat
from service.domain.rows import Example
from service.prompts import control, template
from service.prompts import rows as as_tokens
from service.prompts.control import Tokeniser, swapped
from service.prompts.template import TemplateRefused
from worker.suite import Convention

NAMED_ROWS_MAX = 20
SHOT_END = "\n\n"  # behind each answer of the questions that stand before a plain prompt


class RowsUnfit(JobFailure):
    """Of a set that cannot be encoded, the numbers of the rows to blame, from 1."""

    def __init__(self, code: FailureCode, message: str, rows: Sequence[int]) -> None:
        super().__init__(code, message)
        self.rows = rows


class TokenRow(NamedTuple):
    ids: list[int]
    answer_start: int  # first position that counts
    ends: bool = True  # with the end of turn or of sequence; some tokenisers have none

    @property
    def counted(self) -> int:
        return len(self.ids) - self.answer_start


class Encoded(NamedTuple):
    """A set. Rows keep their place: row k of the file is number k + 1 in every message."""

    rows: list[TokenRow]
    prompts: list[list[int]]  # what a server generates from, which need not be how the row begins; empty for a text
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
    examples: Sequence[Example], tokenizer: Any, prompt_format: PromptFormat, context_tokens: int | None
) -> Encoded:
    """Tokenise a set as the model is served. Without `context_tokens` rows may be of any length, and none need count.

    A question of a chat format is what the template renders for the whole dialogue; the last token is its end of turn. What
    counts is what there is of the answer in the rendering, and what follows. A control token's text inside a row is plain text.

    Raises JobFailure: row_too_long naming the rows that are longer than the model's context; invalid_file when no row has a
    token that counts, or for a row that the chat template refuses; unsupported_architecture for a chat template or a tokeniser
    that cannot be used.
    """
    render = _renderer(tokenizer, prompt_format) if prompt_format.type == "chat" else None
    tokeniser = _tokeniser(tokenizer, as_tokens.written(prompt_format, render and render.template))
    texts, prompts = [], []
    for number, example in enumerate(examples, start=1):
        if render is not None and example.kind == "question":
            question, answer = (swapped(tokeniser, words) for words in (example.prompt, example.answer))
            whole, marked, prompt = (
                swapped(tokeniser, render(number, question, reply)) for reply in (answer, template.ANSWER, None)
            )
            text = as_tokens.by_rendering(tokeniser, whole, marked)
        else:
            text = as_tokens.literal(tokeniser, prompt_format, example)
            prompt = text.text[: text.answer_start]
        texts.append(text)
        prompts.append(prompt)
    rows = [TokenRow(*row) for row in as_tokens.row_tokens(tokeniser, texts, tokenizer.eos_token_id)]
    prompt_ids = as_tokens.prompt_tokens(tokeniser, prompts, [text.bare for text in texts])
    return _checked(examples, rows, prompt_ids, context_tokens)


def end_of_turn(tokenizer: Any, prompt_format: PromptFormat) -> int | None:
    """The token that ends an answer of a model as it is served: the chat template's end of turn, else the end of sequence.

    Of an end of turn in ordinary tokens it is the end of sequence, as it is in the rows that are trained on. None: the tokeniser
    has none. Raises JobFailure as `encode`.
    """
    (row,) = encode([Example("question", template.QUESTION, template.ANSWER)], tokenizer, prompt_format, None).rows
    return row.ids[-1] if row.ends else None


def encode_as_benchmark(
    examples: Sequence[Example], tokenizer: Any, prompt_format: PromptFormat, convention: Convention
) -> Encoded:
    """Tokenise texts as the reference's evaluation does: control tokens in a text are control tokens.

    What counts is what is left of the tokenised whole behind as many tokens as the prompt has alone. The end of sequence stands
    behind a row that does not end in it, also behind a chat template's end of turn, or, for the text of a corpus, behind none;
    where the reference leaves out an end of sequence it leaves out the last token, whatever it is, and so do such rows, which
    are marked as if they ended.

    Raises JobFailure: unsupported_architecture for a chat template that cannot be used; invalid_file for a row that it refuses.
    """
    render = _renderer(tokenizer, prompt_format) if prompt_format.type == "chat" else None
    eos, ends = tokenizer.eos_token_id, convention.ends
    ends_by_itself = tokenizer("")["input_ids"][-1:] == [eos]
    rows, prompts = [], []
    for number, example in enumerate(examples, start=1):
        special = render is None or example.kind != "question"  # a chat template brings its own
        if render is not None and example.kind == "question":
            prompt, whole = (
                render(number, example.prompt, reply, convention.shots) for reply in (None, example.answer)
            )
        else:
            prompt = _literal_prompt(example, prompt_format, convention.shots)
            whole = prompt + example.answer
        prompt_ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
        if special and ends_by_itself and prompt_ids[-1:] == [eos]:  # a prompt is not the end
            prompt_ids = prompt_ids[:-1]
        ids = tokenizer(whole, add_special_tokens=special)["input_ids"]
        if ends and eos is not None and (not ids or ids[-1] != eos):
            ids = [*ids, eos]
        start = 1 if example.kind == "text" else max(1, len(prompt_ids))
        rows.append(TokenRow(ids, min(start, len(ids)), ends=not ends or eos is not None))
        prompts.append(prompt_ids)
    return _checked(examples, rows, prompts, None)


def _checked(
    examples: Sequence[Example], rows: list[TokenRow], prompts: Sequence[list[int]], context_tokens: int | None
) -> Encoded:
    room = math.inf if context_tokens is None else context_tokens
    long = [number for number, row in enumerate(rows, start=1) if len(row.ids) > room]
    if long:
        raise RowsUnfit(
            FailureCode.ROW_TOO_LONG,
            f"rows longer than the model's context of {context_tokens} tokens: {_named(long)} "
            f"({len(long)} of {len(rows)})",
            long,
        )
    # A row whose only label is its end says nothing of its answer: that is empty, or merged with a benchmark's prompt.
    unmeasured = [number for number, row in enumerate(rows, start=1) if row.counted <= row.ends]
    if context_tokens is not None and len(unmeasured) == len(rows):
        raise RowsUnfit(FailureCode.INVALID_FILE, "no row has a token that counts", unmeasured)
    starts = [[] if example.kind == "text" else ids for example, ids in zip(examples, prompts, strict=True)]
    return Encoded(rows, starts, [example.answer for example in examples], unmeasured)


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
        raise RowsUnfit(
            FailureCode.INVALID_FILE,
            f"the method refuses questions, and {len(texts)} rows ask none (they are texts): {_named(texts)}",
            texts,
        )
    drawn = torch.randint(
        len(refusals), (len(examples),), generator=torch.Generator().manual_seed(_seed(seed, "refusals", 0))
    )
    refused = [example._replace(answer=refusals[k]) for example, k in zip(examples, drawn.tolist(), strict=True)]
    return encode(refused, tokenizer, prompt_format, context_tokens)


def _named(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:NAMED_ROWS_MAX])) + (", ..." if len(numbers) > NAMED_ROWS_MAX else "")


class _Renderer(NamedTuple):
    """A chat template of which is known that rows will be found in it."""

    template: str
    form: PromptFormat
    special_tokens: Mapping[str, str]

    def __call__(self, number: int, question: str, answer: str | None, shots: Sequence[tuple[str, str]] = ()) -> str:
        """The row of that number; see template.render. What the template says of it is not passed on: it may quote the row."""
        try:
            return template.render(self.template, self.form, self.special_tokens, question, answer, shots)
        except TemplateRefused:
            raise RowsUnfit(FailureCode.INVALID_FILE, f"the chat template refuses row {number}", [number]) from None


def _renderer(tokenizer: Any, form: PromptFormat) -> _Renderer:
    try:
        made = _Renderer(tokenizer.get_chat_template(), form, tokenizer.special_tokens_map)
        template.around(*made)  # of a Hub model nobody has looked at it yet
    except ValueError as error:  # there is none
        raise _unsupported(f"the chat template cannot be applied: {error}") from error
    except TemplateRefused as refused:
        raise _unsupported(str(refused)) from refused
    return made


@lru_cache(maxsize=4)
def _tokeniser(tokenizer: Any, written: str) -> Tokeniser:
    try:
        return control.tokeniser(tokenizer.backend_tokenizer, written)
    except Exception as error:  # one that is no fast one, or has code of its own; the library's own error is no other
        what = "the tokeniser has no tokenizer.json, without which control tokens in a text cannot be kept apart"
        raise _unsupported(f"{what} ({type(error).__name__})") from error


def _unsupported(message: str) -> JobFailure:
    return JobFailure(FailureCode.UNSUPPORTED_ARCHITECTURE, message)


def _literal_prompt(example: Example, form: PromptFormat, shots: Sequence[tuple[str, str]]) -> str:
    if example.kind != "question":
        return example.prompt
    *before, prompt = [
        form.user_start + question + form.user_end + form.assistant_start
        for question in (*(question for question, _ in shots), example.prompt)
    ]
    return "".join(shot + answer + SHOT_END for shot, (_, answer) in zip(before, shots, strict=True)) + prompt


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
