"""Rows that two sets share, and rows that are so much alike that they may contradict each other.

By digest: the sets need not fit into memory. Messages have row numbers, never text.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

from service.domain.rows import Example

NAMED_MAX = 20
Pairs = list[tuple[int, int]]  # 1-based numbers of a row of the first set and one of the second, in order


class Overlap(NamedTuple):
    """Every row of the second set stands in the first of these that it belongs to, if in any, with one row of the first set."""

    same: Pairs  # white space at the ends aside
    folded: Pairs  # the same words, after NFKC and case folding and without white space; also as `text`
    same_question: Pairs  # after the same folding, with another answer


def overlap(first: Iterable[Example], second: Iterable[Example]) -> Overlap:
    """Of a row that is in the first set twice, the last is named."""
    rows, words, questions = dict[bytes, int](), dict[bytes, int](), dict[bytes, int]()
    for number, row in enumerate(first, start=1):
        rows[exact(row)] = words[_words(row)] = number
        if question := folded(row.prompt):
            questions[_digest(question)] = number
    found = Overlap([], [], [])
    for number, row in enumerate(second, start=1):
        if (digest := exact(row)) in rows:
            found.same.append((rows[digest], number))
        elif (digest := _words(row)) in words:
            found.folded.append((words[digest], number))
        elif (question := folded(row.prompt)) and (digest := _digest(question)) in questions:
            found.same_question.append((questions[digest], number))
    return Overlap(*map(sorted, found))


def warnings(one: str, other: str, found: Overlap) -> Iterator[tuple[str, str]]:
    """(code, message) of what is no error.

    >>> list(warnings("forget", "retain", Overlap([], [], [(1, 4), (2, 9)])))[0][1]
    '2 rows of the retain set have the question of a row of the forget set and another answer (forget = retain): 1 = 4, 2 = 9'
    """
    if found.folded:
        yield (
            "rows_alike",
            f"{len(found.folded)} rows of the {other} set have the words of a row of the {one} set, differing only in "
            f"capitals, white space, the form of characters or the fields ({one} = {other}): {named(found.folded)}",
        )
    if found.same_question:
        yield (
            "same_question",
            f"{len(found.same_question)} rows of the {other} set have the question of a row of the {one} set and another "
            f"answer ({one} = {other}): {named(found.same_question)}",
        )


def named(pairs: Sequence[tuple[int, int]]) -> str:
    """
    >>> named([(1, 4), (2, 9)])
    '1 = 4, 2 = 9'
    """
    return ", ".join(f"{a} = {b}" for a, b in pairs[:NAMED_MAX]) + (", ..." if len(pairs) > NAMED_MAX else "")


def folded(text: str) -> str:
    """
    >>> folded(" \uff37ho  is\u00a0ADA?") == folded("who is Ada?")
    True
    """
    caseless = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(caseless.split())


def _words(row: Example) -> bytes:
    return _digest(folded(row.prompt + row.answer))


def exact(row: Example) -> bytes:
    """Equal for what `overlap` calls the same row."""
    return _digest(row.prompt.strip(), row.answer.strip())


def _digest(*texts: str) -> bytes:
    digest = blake2b(digest_size=16)
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()
