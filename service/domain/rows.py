"""The rows of uploaded sets: JSON Lines, read line by line, with the line's number in every complaint.

A row of a request's sets has `question` and `answer`, or `prompt` and `completion`, or `text`. One of an evaluation set has
the columns that its suite reads. Columns with a meaning are of their type wherever they stand; others are left alone.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import IO, Any, Literal, NamedTuple, TypeVar

from service.domain.errors import FieldProblem, InvalidRequest

PROBLEMS_MAX = 20  # a file of the wrong kind is wrong on every line
LINE_MAX_BYTES = 2**20
READ_BYTES = 2**16
FORMS: dict[str, tuple[str, str] | tuple[str]] = {
    "question": ("question", "answer"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
EXTRAS = ("paraphrased_question", "paraphrased_answer", "perturbed_answer")  # what a request's rows may have beside
LISTS = frozenset({"perturbed_answer"})  # of strings: wrong alternatives; every other column is a string
COLUMNS = (*(field for form in FORMS.values() for field in form), "gt", *EXTRAS)

Object = dict[str, Any]
T = TypeVar("T")


class Example(NamedTuple):
    """One row. `prompt` is the question, the literal prompt, or empty for a text; `answer` is what counts."""

    kind: Literal["question", "prompt", "text"]
    prompt: str
    answer: str


def parse(line: bytes) -> Example:
    """One line. Raises ValueError with a sentence that says what is wrong, without quoting the row."""
    row = _object(line)
    forms = [kind for kind, fields in FORMS.items() if all(field in row for field in fields)]
    if not forms:
        raise ValueError("lacks question and answer, or prompt and completion, or text")
    if len(forms) > 1:
        raise ValueError(f"has the fields of two forms ({' and '.join(forms)})")
    kind = forms[0]
    _judge(row, (*FORMS[kind], *EXTRAS))
    values = [row[field] for field in FORMS[kind]]
    if not values[-1].strip():
        raise ValueError(f"{FORMS[kind][-1]} is empty")
    return Example(kind, "" if kind == "text" else values[0], values[-1])  # type: ignore[arg-type]


def parse_columns(line: bytes, required: Collection[str] = ()) -> Object:
    """One line of an evaluation set, with all its columns. Raises as `parse` does."""
    row = _object(line)
    if missing := [name for name in required if name not in row]:
        raise ValueError(f"lacks {' and '.join(sorted(missing))}")
    forms = [kind for kind, fields in FORMS.items() if all(field in row for field in fields)]
    if len(forms) > 1:
        raise ValueError(f"has the fields of two forms ({' and '.join(forms)})")
    if not any(name in row for name in COLUMNS):
        raise ValueError(f"has none of the columns {', '.join(COLUMNS)}")
    _judge(row, COLUMNS)
    return row


def _object(line: bytes) -> Object:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON in UTF-8") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _judge(row: Object, names: Iterable[str]) -> None:
    """Raises ValueError for one of these columns that is there and is not of its type."""
    for name in names:
        if name not in row:
            continue
        value = row[name]
        texts = value if name in LISTS else [value]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name} is not {'a list of strings' if name in LISTS else 'a string'}")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} has half a surrogate pair, which is no character") from error


def capped(line: bytes) -> bytes:
    """The line itself, without its end. Raises ValueError if it is too long."""
    if len(line) > LINE_MAX_BYTES:
        raise ValueError(f"longer than {LINE_MAX_BYTES} bytes")
    return line


def read(lines: Iterable[bytes], pointer: str = "") -> list[Example]:
    """All rows of a file. Raises as `each` does."""
    return list(each(lines, pointer))


def lines(source: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file. One that is too long comes cut, as the last: `each` refuses it, and it never fills the memory."""
    rest = b""
    while chunk := source.read(READ_BYTES):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
        if len(rest) > LINE_MAX_BYTES:
            break
    if rest:
        yield rest


def each(lines: Iterable[bytes], pointer: str = "") -> Iterator[Example]:
    """The rows of a request's set that need not fit into memory; blank lines are passed over.

    Raises InvalidRequest at the end, naming the lines that are wrong (at most 20), or that there are no rows.
    """
    return _each(lines, parse, pointer)


def each_object(lines: Iterable[bytes], pointer: str = "", required: Collection[str] = ()) -> Iterator[Object]:
    """The same of an evaluation set: objects that have the required columns, and whose columns are of their types."""
    return _each(lines, lambda line: parse_columns(line, required), pointer)


def _each(lines: Iterable[bytes], parse: Callable[[bytes], T], pointer: str) -> Iterator[T]:
    rows, problems = 0, list[FieldProblem]()
    for number, line in enumerate(lines, start=1):
        try:
            capped(line)
        except ValueError as error:
            problems.append(FieldProblem(pointer, f"line {number}: {error}", "line"))
            break
        if not line.removeprefix(BOM_UTF8).strip():
            continue
        try:
            row = parse(line)
        except ValueError as error:
            problems.append(FieldProblem(pointer, f"line {number}: {error}", "line"))
            if len(problems) >= PROBLEMS_MAX:
                break
        else:
            rows += 1
            yield row
    if problems:
        raise InvalidRequest(*problems)
    if not rows:
        raise InvalidRequest(FieldProblem(pointer, "the set has no rows", "empty"))
