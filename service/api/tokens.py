"""The tokens of a set, counted as the worker will: prompt, answer, end of sequence (worker.data.encode).

With the model's own tokeniser where its folder can be read here; the library that reads it knows neither torch nor a model.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field
from tokenizers import Tokenizer

from service.domain.errors import FieldProblem
from service.domain.job import ModelEntry
from service.domain.memory import SetLengths
from service.domain.modelfiles import digest_tokenizer
from service.domain.rows import Example
from service.settings import Settings

COUNTED_BYTES = 2 * 2**20  # of a set: about a second's work; of a larger one every k-th row is counted
JUDGED_BYTES = 2**19  # of a set's longest rows, at a submission: a quarter of a second's work
SPECIAL_TOKENS_MAX = 8  # that a tokeniser puts around a row
ESTIMATE_SPARE = 0.1  # a row is refused by an estimate only if it would be too long with so much less
ROWS_AT_ONCE = 256
NAMED_ROWS_MAX = 20
AS_IN_FILE = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})  # classes that take tokenizer.json as it is
TEMPLATE_SAYS = "what the chat template puts around a question was found once; it may treat a row in another way"


class Cannot(Exception):
    """Why tokens cannot be counted here, for people."""


class Tokens(BaseModel):
    total: int = Field(description="prompts, answers and ends of sequence; of a sample: its mean times the rows")
    counted: int = Field(description="those of them that count: behind the prompt")
    longest: int = Field(description="row that was counted")
    rows_counted: int = Field(description="fewer than the rows of a large set, of which every k-th is counted")
    exact: bool = Field(description="as the worker will count; else an estimate, for this reason:")
    reason: str | None
    too_long: int = Field(
        description="rows of those counted that are longer than the model's context: the job would fail"
    )
    too_long_rows: list[int] = Field(description="their numbers in the set, at most 20")


class Counter(NamedTuple):
    tokenizer: Any
    eos: int | None
    before: str
    behind: str
    chat: bool
    context_tokens: int | None
    reason: str | None  # why what it counts is an estimate


class Counted(NamedTuple):
    tokens: Tokens
    lengths: SetLengths


def counter(settings: Settings, entry: ModelEntry) -> Counter:
    """Raises Cannot."""
    if entry.source == "hub":
        raise Cannot("a Hub model's tokeniser is fetched by the worker, not here")
    folder = settings.models_root / entry.location
    try:
        digest = digest_tokenizer(folder)
        if entry.tokenizer_digest not in (None, digest):
            raise Cannot("the tokeniser's files here are not those that were registered")
        tokenizer, config = _read(folder, digest)
    except OSError as error:
        raise Cannot("the model's folder cannot be read here") from error
    chat = entry.prompt_format.type == "chat"
    (before, behind), reason = _around(entry), TEMPLATE_SAYS if chat else None
    if config.get("tokenizer_class") not in AS_IN_FILE or {"add_bos_token", "add_eos_token"} & config.keys():
        reason = "the worker may read tokenizer.json in another way: its class or its config has rules of its own"
    eos = config.get("eos_token")
    eos = tokenizer.token_to_id(eos["content"] if isinstance(eos, dict) else eos) if eos is not None else None
    return Counter(tokenizer, eos, before, behind, chat, entry.info.get("context_tokens"), reason)


def _around(entry: ModelEntry) -> Sequence[str]:
    """What stands before and behind a question. Raises Cannot."""
    form = entry.prompt_format
    if form.type != "chat":
        return form.user_start, form.user_end + form.assistant_start
    if "chat" not in entry.info:
        raise Cannot("what the chat template puts around a question was not found at registration")
    around: Sequence[str] = entry.info["chat"]
    return around


@lru_cache(maxsize=8)
def _read(folder: Path, _digest: str) -> tuple[Any, dict[str, Any]]:
    """The tokeniser and its config, as the files with this digest have them. Raises Cannot."""
    try:
        tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except Exception as error:  # the library's own is no other
        raise Cannot("no tokenizer.json and tokenizer_config.json of the model can be read here") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, config


def count(counter: Counter, examples: Iterable[Example], rows: int, size_bytes: int) -> Counted:
    """Of every k-th row where the set is large."""
    stride = -(-size_bytes // COUNTED_BYTES)
    chosen = islice(enumerate(examples, start=1), 0, None, stride)
    lengths, counted, asked, long = list[int](), 0, 0, list[int]()
    for part in _parts(chosen):
        for (number, example), (length, counts) in zip(part, _measured(counter, [e for _, e in part]), strict=True):
            lengths.append(length)
            counted += counts
            asked += example.kind != "text"
            if counter.context_tokens is not None and length > counter.context_tokens:
                long.append(number)
    whole = len(lengths) == rows
    scale = rows / len(lengths)
    tokens = Tokens(
        total=round(sum(lengths) * scale),
        counted=round(counted * scale),
        longest=max(lengths),
        rows_counted=len(lengths),
        exact=whole and counter.reason is None,
        reason=counter.reason if whole else f"a large set: every {stride}th row was counted",
        too_long=len(long),
        too_long_rows=long[:NAMED_ROWS_MAX],
    )
    return Counted(tokens, SetLengths(lengths, counted, asked, rows))


class LongRows:
    """Finds the rows of a set that are longer than the model's context, of those rows that pass through it.

    A token has at least one byte, so few rows need be counted: those with more bytes than the context has tokens and, if they are
    many, the longest of them. What is not found here (nor by a normaliser that makes a text longer) the worker finds.
    """

    def __init__(self, settings: Settings, entry: ModelEntry, counted_bytes: int = JUDGED_BYTES) -> None:
        self._settings, self._entry, self._counted_bytes = settings, entry, counted_bytes
        self._suspects: list[tuple[int, int, Example]] = []  # a heap, of (bytes, number, row)
        self._bytes = 0  # of the suspects
        self._left_out = False

    def watch(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The same rows."""
        context_tokens: int | None = self._entry.info.get("context_tokens")
        try:
            around = sum(len(text.encode()) for text in _around(self._entry))
        except Cannot:
            context_tokens = None
        if context_tokens is None:
            yield from examples
            return
        for number, example in enumerate(examples, start=1):
            size = len(example.prompt.encode()) + len(example.answer.encode())
            if size + around * (example.kind == "question") + SPECIAL_TOKENS_MAX > context_tokens:
                self._keep(size, number, example)
            yield example

    def _keep(self, size: int, number: int, example: Example) -> None:
        heappush(self._suspects, (size, number, example))
        self._bytes += size
        while self._bytes > self._counted_bytes and len(self._suspects) > 1:
            self._bytes -= heappop(self._suspects)[0]
            self._left_out = True

    def problems(self, pointer: str) -> Iterator[FieldProblem]:
        """One that names the rows, if there are any. None where the tokens cannot be counted here."""
        if not self._suspects:
            return
        try:
            found = counter(self._settings, self._entry)
        except Cannot:
            return
        assert found.context_tokens is not None
        measured = _measured(found, [example for *_, example in self._suspects])
        spare = 0.0 if found.reason is None else ESTIMATE_SPARE
        long = sorted(
            number
            for (_, number, _), (length, _) in zip(self._suspects, measured, strict=True)
            if length * (1 - spare) > found.context_tokens
        )
        if long:
            rows = ", ".join(map(str, long[:NAMED_ROWS_MAX])) + (", ..." if len(long) > NAMED_ROWS_MAX else "")
            detail = (
                f"longer than the context of model {self._entry.name!r}, {found.context_tokens} tokens: rows {rows}"
            )
            if found.reason is not None:
                detail += f", by an estimate with {ESTIMATE_SPARE:.0%} to spare"
            if self._left_out:
                detail += "; shorter ones were not counted"
            yield FieldProblem(pointer, detail, "row_too_long")


def long_rows(settings: Settings, entry: ModelEntry, examples: Iterable[Example], pointer: str) -> list[FieldProblem]:
    """Of a set that is read for nothing else."""
    found = LongRows(settings, entry)
    for _ in found.watch(examples):
        pass
    return list(found.problems(pointer))


Numbered = tuple[int, Example]


def _parts(rows: Iterator[Numbered]) -> Iterator[list[Numbered]]:
    while part := list(islice(rows, ROWS_AT_ONCE)):
        yield part


def _measured(counter: Counter, examples: Sequence[Example]) -> Iterator[tuple[int, int]]:
    """(tokens, tokens that count) of each row."""
    tokenizer, eos = counter.tokenizer, counter.eos
    ends_by_itself = eos is not None and tokenizer.encode("").ids[-1:] == [eos]
    prompts = [
        counter.before + example.prompt + counter.behind if example.kind == "question" else example.prompt
        for example in examples
    ]
    # a chat template brings its own special tokens
    special = [not (counter.chat and example.kind == "question") for example in examples]
    wholes = _encoded(tokenizer, [p + e.answer for p, e in zip(prompts, examples, strict=True)], special)
    starts = _encoded(tokenizer, prompts, special)
    for example, prompt_ids, ids, own in zip(examples, starts, wholes, special, strict=True):
        before = len(prompt_ids) - (own and ends_by_itself and prompt_ids[-1:] == [eos])
        length = len(ids) + (eos is not None and ids[-1:] != [eos])
        start = 1 if example.kind == "text" else max(1, before)
        yield length, length - min(start, length)


def _encoded(tokenizer: Any, texts: Sequence[str], special: Sequence[bool]) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in texts]
    for kind in set(special):
        at = [i for i, own in enumerate(special) if own is kind]
        for i, one in zip(
            at, tokenizer.encode_batch_fast([texts[i] for i in at], add_special_tokens=kind), strict=True
        ):
            ids[i] = one.ids
    return ids
