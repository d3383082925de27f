"""How many answers a job generates to evaluate the model it has trained, and how long they can be.

Computed from the lengths of the rows. Every row is assumed to have a secret and a paraphrased question; the worker skips
what a row lacks. The constants are the worker's, which this package cannot import: tests/worker/test_foresight.py compares
them, and the counts with the worker's own prompts. Not included: rows of earlier jobs in a chain, and benchmarks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

FIGURES_ROWS, FIGURES_TOKENS = 100, 200  # rows of each set that are answered for ROUGE, and tokens of such an answer
WAYS_ROWS = 400  # forget rows that are asked in every way
PREFIXES, PREFIX_TOKENS = 5, 20  # the length of a prefix depends on the tokeniser; this is a usual one
SAMPLES = 8
MORE_TOKENS = 16  # of an answer, beside twice the right one's; of a sample, beside once
CONTINUED_TOKENS = 128  # of a text
NEIGHBOURS = 100  # retain rows that must still be answered


class RowLength(NamedTuple):
    """In tokens."""

    whole: int
    counted: int
    prompts: int  # distinct ones: as in training and, where that differs, as a server sends it; 0: a text


class SetLengths(NamedTuple):
    """Lengths of a set's rows; of a large set, of a sample."""

    sample: Sequence[RowLength]
    rows: int  # of the whole set

    @property
    def scale(self) -> float:
        return self.rows / len(self.sample)

    @property
    def lengths(self) -> list[int]:
        """Of the sample's rows."""
        return [row.whole for row in self.sample]

    @property
    def counted(self) -> int:
        """Tokens of the sample that count."""
        return sum(row.counted for row in self.sample)

    @property
    def prompted(self) -> int:
        """Rows of the sample that have a prompt."""
        return sum(row.prompts > 0 for row in self.sample)


class Answer(NamedTuple):
    """Tokens of the prompt, and of the answer at most."""

    prompt: int
    room: int
    sampled: bool = False  # at temperature 1


Answers = Mapping[Answer, float]  # how many of each are generated together; fractions where a sample stands for a set


def figures(sets: Sequence[SetLengths]) -> Answers:
    """For ROUGE and its like: some rows of each set."""
    return _summed(
        (Answer(row.whole - row.counted, FIGURES_TOKENS), min(one.scale, FIGURES_ROWS / one.prompted))
        for one in sets
        for row in one.sample
        if row.prompts
    )


def disclosure(forget: SetLengths) -> Answers:
    """For disclosure: the forget rows, in every way."""
    return _of_set(forget, 1.0, min(1.0, WAYS_ROWS / forget.rows))


def plain(rows: SetLengths, rows_max: int | None = None) -> Answers:
    """The questions or texts as they stand, of at most so many rows; None: of all."""
    return _of_set(rows, 1.0 if rows_max is None else min(1.0, rows_max / rows.rows), 0.0)


def after_training(forget: SetLengths, retain: SetLengths, rounded: int) -> Answers:
    """All answers after training.

    Args:
        rounded: number of copies with rounded weights; each answers the forget rows as they stand.
    """
    calls = [figures([forget, retain]), disclosure(forget), plain(retain, NEIGHBOURS), *[plain(forget)] * rounded]
    return _summed(one for call in calls for one in call.items())


def _of_set(rows: SetLengths, share: float, in_every_way: float) -> Answers:
    by = rows.scale * share
    return _summed(
        (answer, count * by)
        for row in rows.sample
        for answer, count in (_of_question(row, in_every_way) if row.prompts else _of_text(row))
    )


def _of_question(row: RowLength, in_every_way: float) -> Iterator[tuple[Answer, float]]:
    prompt, room = row.whole - row.counted, 2 * row.counted + MORE_TOKENS
    yield Answer(prompt, room), row.prompts * (1 + in_every_way)  # the question, and its paraphrase
    if in_every_way:
        yield Answer(prompt + PREFIX_TOKENS, room), row.prompts * PREFIXES * in_every_way
        yield Answer(prompt, row.counted + MORE_TOKENS, sampled=True), SAMPLES * in_every_way


def _of_text(row: RowLength) -> Iterator[tuple[Answer, float]]:
    """Continued from its first half and from three places inside."""
    quarter = max(1, (row.whole - 1) // 4)
    for read, end in ((2, 2), (1, 1), (1, 2), (1, 3)):
        if (rest := row.whole - 1 - end * quarter) > 0:
            yield Answer(read * quarter, min(2 * rest + MORE_TOKENS, CONTINUED_TOKENS)), 1.0


def _summed(answers: Iterable[tuple[Answer, float]]) -> Answers:
    found: dict[Answer, float] = {}
    for answer, count in answers:
        found[answer] = found.get(answer, 0.0) + count
    return found
