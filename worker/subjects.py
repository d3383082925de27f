"""Whom or what each row is about: rows about one subject are dependent, and are resampled together."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cache
from typing import Any

from service.domain.rows import Example
from worker.suite import example

WORD = re.compile(r"[^\W\d_](?:[\w.-]*\w)?(?:['’][^\W\d_]{2,})?")  # a possessive 's is left out, d'Arc is one word
END = '.!?:;…"“”„«»()'  # between two words: the second begins something new

Name = tuple[str, ...]  # one or two capitalised words, as they stand next to each other


def subjects(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The number of each row's subject, from 0 in the order in which they come up.

    No column says it, so it is read from names: of those in a row's question or answer that another row has too, the one counts
    that most questions have. If it mostly stands beside one that more have, as a book's beside its author's, that one counts. A
    name is two capitalised words or, in a question without such, one. A row that shares none is about a subject of its own.

    >>> subjects([{"question": f"{what} Ana Lind?", "answer": "No."} for what in ("Who is", "Where is")])
    [0, 0]
    >>> subjects([{"question": f"Who is {name}?", "answer": "No."} for name in ("Ana Lind", "Bo Berg")])
    [0, 1]
    """
    texts = [example(row) for row in rows]
    inside = {
        name for text in texts for part in (text.prompt, text.answer) for name, begins in _names(part) if not begins
    }
    names = [_of_row(text, inside) for text in texts]
    asked = Counter(name for text in texts for name in {name for name, _ in _names(text.prompt)})
    rows_with: dict[Name, set[int]] = {}
    for row, own in enumerate(names):
        for name in own:
            rows_with.setdefault(name, set()).add(row)

    def weight(name: Name) -> tuple[int, int, int]:
        return len(name), asked[name], len(rows_with[name])

    @cache
    def leading(name: Name) -> Name:
        """The name itself, or the weightier one that stands in most rows that have it, and so on."""
        of = rows_with[name]
        beside = Counter(other for row in of for other in names[row] if len(other) == len(name))
        above = [other for other, count in beside.items() if 2 * count > len(of) and weight(other) > weight(name)]
        if above:
            return leading(max(above, key=lambda other: (weight(other), other)))
        # Of names in just the same rows, as the halves of a longer one, always the same.
        return min(other for other in beside if rows_with[other] == of)

    numbers: dict[Name | int, int] = {}
    found = []
    for row, own in enumerate(names):
        shared = [name for name in own if len(rows_with[name]) > 1]
        key = leading(max(shared, key=weight)) if shared else row
        found.append(numbers.setdefault(key, len(numbers)))
    return found


def _of_row(text: Example, inside: Set[Name]) -> list[Name]:
    """Those of the question, or of a text, before those of the answer.

    What only ever begins a sentence is no name, but a word that is capitalised for that ("In Ghent", "Did Ana").

    Args:
        inside: names that stand inside a sentence somewhere.
    """
    question = [name for name, _ in _names(text.prompt or text.answer) if name in inside]
    pairs = [name for name in question if len(name) == 2]
    told = [name for name, _ in _names(text.answer) if len(name) == 2 and name in inside]
    return list(dict.fromkeys([*(pairs or question), *told]))


def _names(text: str) -> Iterator[tuple[Name, bool]]:
    """Each capitalised word, each pair of them that stand together, and whether it begins a sentence."""
    before: tuple[str, bool] | None = None  # the last word, if it was capitalised, and whether it began a sentence
    end = 0
    for word in WORD.finditer(text):
        between, first, end = text[end : word.start()], end == 0, word.end()
        begins = first or any(mark in between for mark in END)
        last = (word.group(), begins) if word.group()[0].isupper() else None
        if last and before and between.isspace():
            yield (before[0], last[0]), before[1]
        if last:
            yield (last[0],), begins
        before = last
