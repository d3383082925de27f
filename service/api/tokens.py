"""The tokens of a set, counted as the worker will: by the same prompt format and with the same tokeniser (service.prompts).

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

from service.domain.answers import RowLength, SetLengths
from service.domain.errors import FieldProblem
from service.domain.job import ModelEntry, PromptFormat
from service.domain.modelfiles import digest_tokenizer
from service.domain.rows import Example
from service.prompts import control, template
from service.prompts import folder as files
from service.prompts import rows as as_tokens
from service.prompts.control import Tokeniser
from service.prompts.rows import RowText, RowTokens
from service.prompts.template import QUESTION, Around, TemplateRefused
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
    tokeniser: Tokeniser
    eos: int | None
    form: PromptFormat
    around: Around | None  # what the chat template writes around a question and its answer
    served: Around | None  # the same of the prompt that a server generates an answer from
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
    form, around, served, written, reason = entry.prompt_format, None, None, None, None
    if form.type == "chat":
        if "chat" not in entry.info:
            raise Cannot("what the chat template writes around questions and answers was not found at registration")
        around, reason = Around(*entry.info["chat"]), TEMPLATE_SAYS
    try:
        digest = digest_tokenizer(folder)
        if entry.tokenizer_digest not in (None, digest):
            raise Cannot("the tokeniser's files here are not those that were registered")
        if around is not None:
            written = files.template(folder)
            prompt = template.render(written, form, files.special_tokens(folder), QUESTION)
            before, _, between = prompt.partition(QUESTION)
            served = Around(before, between)
        tokeniser, eos, config = _read(folder, digest, as_tokens.written(form, written))
    except (OSError, TemplateRefused) as error:
        raise Cannot("the model's folder cannot be read here") from error
    if config.get("tokenizer_class") not in AS_IN_FILE or {"add_bos_token", "add_eos_token"} & config.keys():
        reason = "the worker may read tokenizer.json in another way: its class or its config has rules of its own"
    return Counter(tokeniser, eos, form, around, served, entry.info.get("context_tokens"), reason)


@lru_cache(maxsize=8)
def _read(folder: Path, _digest: str, written: str) -> tuple[Tokeniser, int | None, dict[str, Any]]:
    """The tokeniser, its end of sequence and its config, as the files with this digest have them. Raises Cannot."""
    try:
        own: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        special = files.special_tokens(folder)
        added = {token.content for token in own.get_added_tokens_decoder().values()}
        own.add_special_tokens(
            [token for token in special.values() if token not in added]
        )  # as the worker's library does
        eos = special.get("eos_token")
        return control.tokeniser(own, written), None if eos is None else own.token_to_id(eos), config
    except Exception as error:  # the library's own is no other
        raise Cannot("no tokenizer.json and tokenizer_config.json of the model can be read here") from error


def count(counter: Counter, examples: Iterable[Example], rows: int, size_bytes: int) -> Counted:
    """Of every k-th row where the set is large."""
    stride = -(-size_bytes // COUNTED_BYTES)
    chosen = islice(enumerate(examples, start=1), 0, None, stride)
    sample, long = list[RowLength](), list[int]()
    for part in _parts(chosen):
        chunk = [example for _, example in part]
        encoded = zip(part, _rows(counter, chunk), _server_prompts(counter, chunk), strict=True)
        for (number, example), row, prompt in encoded:
            prompts = 0 if example.kind == "text" else len({tuple(row.ids[: row.answer_start]), tuple(prompt)})
            length = RowLength(len(row.ids), len(row.ids) - row.answer_start, prompts)
            sample.append(length)
            if counter.context_tokens is not None and length.whole > counter.context_tokens:
                long.append(number)
    lengths = SetLengths(sample, rows)
    whole = len(sample) == rows
    tokens = Tokens(
        total=round(sum(lengths.lengths) * lengths.scale),
        counted=round(lengths.counted * lengths.scale),
        longest=max(lengths.lengths),
        rows_counted=len(sample),
        exact=whole and counter.reason is None,
        reason=counter.reason if whole else f"a large set: every {stride}th row was counted",
        too_long=len(long),
        too_long_rows=long[:NAMED_ROWS_MAX],
    )
    return Counted(tokens, lengths)


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
        form, chat = self._entry.prompt_format, self._entry.info.get("chat", ())
        written = chat if form.type == "chat" else (form.user_start, form.user_end, form.assistant_start)
        around = sum(len(text.encode()) for text in written)
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
        encoded = _rows(found, [example for *_, example in self._suspects])
        spare = 0.0 if found.reason is None else ESTIMATE_SPARE
        long = sorted(
            number
            for (_, number, _), row in zip(self._suspects, encoded, strict=True)
            if len(row.ids) * (1 - spare) > found.context_tokens
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


def _rows(counter: Counter, examples: Sequence[Example]) -> list[RowTokens]:
    texts = [_written(counter, counter.around, example) for example in examples]
    return as_tokens.row_tokens(counter.tokeniser, texts, counter.eos)


def _server_prompts(counter: Counter, examples: Sequence[Example]) -> list[list[int]]:
    texts = [_written(counter, counter.served, example._replace(answer="")) for example in examples]
    return as_tokens.prompt_tokens(counter.tokeniser, [text.text for text in texts], [text.bare for text in texts])


def _written(counter: Counter, around: Around | None, example: Example) -> RowText:
    if around is not None and example.kind == "question":
        return as_tokens.by_pieces(counter.tokeniser, around, example)
    return as_tokens.literal(counter.tokeniser, counter.form, example)
