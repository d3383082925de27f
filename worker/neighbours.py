"""Rows that ask the same of somebody else: their questions differ in a name alone."""

from collections.abc import Iterator, Sequence
from itertools import islice

NAME_WORDS = 4  # of a name, at most
SAME_WORDS = 3  # of the question around it, at least
QUESTION_WORDS = 60  # a longer prompt is no question about somebody, and its frames would fill the memory

Frame = tuple[tuple[str, ...], tuple[str, ...]]  # what stands before and behind the name


def neighbours(questions: Sequence[str], others: Sequence[str], most: int) -> list[list[int]]:
    """Of each question the places of others that differ from it in one name, at most so many.

    >>> neighbours(["Where was Ana Lund born?"], ["Where was Bo Ek born?", "Who is Bo Ek?", "Where was Ana Lund born?"], 9)
    [[0]]
    """
    places: dict[Frame, list[int]] = {}
    for place, other in enumerate(others):
        for frame in _frames(other):
            places.setdefault(frame, []).append(place)
    found = []
    for question in questions:
        alike = (place for frame in _frames(question) for place in places.get(frame, ()) if others[place] != question)
        found.append(list(islice(dict.fromkeys(alike), most)))
    return found


def _frames(question: str) -> Iterator[Frame]:
    """The question without each run of words that may be a name: one that begins with a capital, where the script has them."""
    words = question.split()
    if len(words) > QUESTION_WORDS:
        return
    for start in range(len(words)):
        for end in range(start + 1, min(start + NAME_WORDS, len(words)) + 1):
            if (
                len(words) - (end - start) >= SAME_WORDS
                and not words[start][:1].islower()
                and not words[end - 1][:1].islower()
            ):
                yield tuple(words[:start]), (*words[end:], _mark(words[end - 1]))


def _mark(word: str) -> str:
    """What stands behind a word and belongs to the sentence: "Brandvik's?" ends in "'s?" for any name."""
    for at, letter in enumerate(word):
        if not letter.isalnum() and letter != "-":
            return word[at:]
    return ""
