"""A row as a model is served: what stands before its answer, the answer, and the end of turn; and as tokens.

What counts are the tokens in which there is any of the answer, and what follows up to the end of turn. They are found by
characters: a tokeniser may merge the end of the prompt with the answer's beginning.
"""

from collections.abc import Sequence
from typing import NamedTuple

from service.domain.job import PromptFormat
from service.domain.rows import Example
from service.prompts import control
from service.prompts.control import Tokeniser, swapped
from service.prompts.template import ANSWER, Around


class RowText(NamedTuple):
    """Control tokens stand under their names in it, as in all texts here."""

    text: str
    answer_start: int  # in characters
    ended: bool = False  # the text ends in the template's own end of turn
    bare: bool = False  # the text has all its control tokens: nothing is put around it


class RowTokens(NamedTuple):
    ids: list[int]
    answer_start: int  # first position that counts
    ends: bool  # in an end of turn or of sequence; some tokenisers have none


def written(form: PromptFormat, template: str | None) -> str:
    """What `control.tokeniser` has to know of a prompt format."""
    return (template or "") if form.type == "chat" else f"{form.user_start}\0{form.user_end}{form.assistant_start}"


def literal(tokeniser: Tokeniser, form: PromptFormat, example: Example) -> RowText:
    """A row without a chat template: a question in the plain format, a literal prompt, or a text."""
    prompt = example.prompt
    if example.kind == "question":
        before, behind = (swapped(tokeniser, part) for part in (form.user_start, form.user_end + form.assistant_start))
        prompt = before + prompt + behind
    return RowText(prompt + example.answer, len(prompt))


def by_pieces(tokeniser: Tokeniser, around: Around, example: Example) -> RowText:
    """A row of a chat template, of which is known what it writes around questions and answers."""
    before, between, behind = (swapped(tokeniser, part) for part in around)
    prompt = before + example.prompt + between
    return _to_the_end_of_turn(
        tokeniser, prompt + example.answer + behind, len(prompt), len(prompt) + len(example.answer)
    )


def by_rendering(tokeniser: Tokeniser, whole: str, marked: str) -> RowText:
    """A row of a chat template, as the template renders it.

    Args:
        whole: the rendering.
        marked: the rendering of the same question with template.ANSWER for its answer. A template that writes something else
            before this row's answer does so because of it, and that counts too.
    """
    before, _, behind = marked.rpartition(ANSWER)
    start = next((k for k, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other), len(before))
    end = len(whole) - len(behind) if whole.endswith(behind) else start
    return _to_the_end_of_turn(tokeniser, whole, start, max(start, end))


def _to_the_end_of_turn(tokeniser: Tokeniser, text: str, start: int, end: int) -> RowText:
    """The end of turn is the first control token behind the answer. A template without one leaves it to the end of sequence.

    Of an answer of which nothing is left only the end counts, not the spaces around it.
    """
    if found := tokeniser.control.search(text, end):
        return RowText(text[: found.end()], start if start < end else found.start(), ended=True, bare=True)
    return RowText(text[:end] + text[end:].rstrip(), start, bare=True)


def row_tokens(tokeniser: Tokeniser, rows: Sequence[RowText], eos: int | None) -> list[RowTokens]:
    """The rows as tokens, with an end of sequence behind those that have no end."""
    found = []
    for row, (ids, spans, is_control) in zip(rows, control.tokens(tokeniser, [row.text for row in rows]), strict=True):
        first = [] if row.bare else _first(tokeniser, ids)
        start = next(
            (
                place
                for place, (begin, end) in enumerate(spans)
                if end > row.answer_start and not (is_control[place] and begin < row.answer_start)
            ),
            len(ids),
        )
        ids = [*first, *ids, *([] if row.bare else tokeniser.last)]
        if not row.ended and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        found.append(RowTokens(ids, min(max(1, len(first) + start), len(ids)), row.ended or eos is not None))
    return found


def prompt_tokens(tokeniser: Tokeniser, prompts: Sequence[str], bare: Sequence[bool]) -> list[list[int]]:
    """Prompts alone, as a server reads them."""
    read = [one.ids for one in control.tokens(tokeniser, prompts)]
    return [ids if own else [*_first(tokeniser, ids), *ids] for ids, own in zip(read, bare, strict=True)]


def _first(tokeniser: Tokeniser, ids: Sequence[int]) -> list[int]:
    """Nothing where a prompt format writes the beginning of sequence itself."""
    return [] if tokeniser.first == ids[: len(tokeniser.first)] else tokeniser.first
