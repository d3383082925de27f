"""Answers, greedy or drawn: batched by length, each row ending where it ends, what prompts begin with in common read once.

A row that repeats itself, as those of an unlearned model often do, reads several tokens in one pass: what followed when it
last said what it says now. Of these guesses stand those that the model, having read what is before them, says too; so every
token is the model's own (Leviathan et al. 2023, arXiv 2211.17192; guesses from the text itself: Saxena 2023, prompt lookup).
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from service.domain.job import MICRO_BATCH_TOKENS
from worker import decoder
from worker.model import Network, own_logits
from worker.trees import common_prefix

# Positions of a batch if every row takes all its room; or more, as far as their keys and values take no more than so many bytes:
# a small model's pass takes as long for few rows.
GENERATION_TOKENS, GENERATION_BYTES = 32_768, 256 * 2**20
# Of logits at once, with what drawing needs beside them: without a bound, a small model's many rows times a large vocabulary.
LOGITS_BYTES, DRAWING_BYTES = 256 * 2**20, 4 + 2 * 8  # the latter of a logit: a copy of it, and two in float64
PREFILL_TOKENS = 4_096  # of prompts that are read at once, at most
LOOP_TOKENS, PERIOD_MAX = 48, 12  # so many tokens with a period of at most so many go on like that
GUESSING_TOKENS = 16  # of a pass, guesses included: so few take little longer than one


class Generated(NamedTuple):
    text: str  # cut at the end of sequence and before the first stop, stripped
    ids: list[int]  # the tokens that were chosen, the end of sequence left out


@torch.no_grad()
def generate(
    network: Network,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    stops: Sequence[str] = (),
    beyond_context: bool = False,
    seeds: Sequence[int | None] | None = None,
    loops_end: bool = False,
    end_of_turn: int | None = None,
) -> list[Generated]:
    """Answers to the prompts (token ids), at most so many tokens, of each prompt or of all.

    Greedy ones are those of transformers' `generate` on one prompt at a time, up to the order of sums.

    Args:
        seeds: of each prompt; with one, its answer is drawn at temperature 1, and its randomness is a function of the seed
            alone: neither the other prompts nor the batch change it. None: greedy.
        loops_end: a greedy answer ends where it has gone round in circles for a while, for who looks for words in it: hardly ever
            do other ones follow.
        end_of_turn: a token that ends an answer, beside those that the model's own files name: `worker.data.end_of_turn` for a
            request's sets; a benchmark's answers have none.
        stops: a row ends as soon as its text contains one of them.
        beyond_context: answers go on past the model's context where it has positions there; otherwise no row is longer than
            the context, and a prompt as long as that has an empty answer. So has a prompt of no tokens.
    """
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    rows = [
        _Row(list(prompt), min(most[i], room(network, prompt, beyond_context)), seeds[i] if seeds else None)
        for i, prompt in enumerate(prompts)
    ]
    ends = {*(network.causal.generation_config.eos_token_id or ()), *(() if end_of_turn is None else (end_of_turn,))}
    ending = _Ending(ends, stops, loops_end)
    roomy = [row for row in rows if row.room > 0]
    if not roomy:
        pass
    elif decoder.caches(network, max(len(row.prompt) + row.room for row in roomy)):
        at_once = min(GENERATION_TOKENS, 2 * network.tokens_at_once)
        if network.tokens_at_once == MICRO_BATCH_TOKENS:  # less, where memory had no room
            at_once = max(at_once, GENERATION_BYTES // decoder.position_bytes(network))
        _answer(network, roomy, at_once, ending)
    else:
        for row in roomy:
            row.answer = _uncached(network, row, ending)
    return [Generated(_cut(_decoded(network, row.answer), stops).strip(), row.answer) for row in rows]


class _Ending(NamedTuple):
    """What ends an answer beside the end of its room."""

    tokens: Collection[int]
    texts: Sequence[str]
    loops: bool  # of a greedy one, to have gone round in circles for a while


class _Row:
    """A prompt and what was answered so far.

    Attributes:
        room: for so many tokens.
        drawn: for each a number in [0, 1) where the answer is sampled; else None.
    """

    def __init__(self, prompt: list[int], room: int, seed: int | None) -> None:
        self.prompt, self.room = prompt, room
        self.drawn = None if seed is None else _uniform(seed, room)
        self.answer: list[int] = []

    @property
    def left(self) -> int:
        return self.room - len(self.answer)


def room(network: Network, prompt: Sequence[int], beyond_context: bool) -> int:
    """How many tokens can follow a prompt, at least 0; of an empty prompt none can."""
    longest = decoder.positions_max(network) if beyond_context else network.context_tokens
    return max(0, longest - len(prompt)) if prompt else 0


def _answer(network: Network, rows: Sequence[_Row], at_once: int, ending: _Ending) -> None:
    """All rows to their ends. Once half of a batch has ended, rows that wait take their places."""
    waiting = sorted(rows, key=lambda row: len(row.prompt) + row.room)  # the longest, at the end, go first
    batch, full = None, 0
    while waiting or batch:
        new = _fitting(waiting, batch, at_once) if not batch or 2 * len(batch.rows) <= full else []
        if new:
            begun = _begin(network, new, ending)
            batch = _joined(batch, begun) if batch and begun else batch or begun
            full = len(batch.rows) if batch else 0
        elif batch:
            batch = _go_on(network, batch, ending)


class _Batch(NamedTuple):
    """Rows that go on, at least one."""

    rows: list[_Row]
    kept: DynamicCache  # of all tokens but the last
    mask_BS: Tensor


class _Read(NamedTuple):
    """What a row reads in a pass."""

    ids: list[int]
    guesses: int = 0  # so many of them, at the end


def _fitting(waiting: list[_Row], batch: _Batch | None, at_once: int) -> list[_Row]:
    """Taken off the end of those that wait: as many as fit, with all their room, beside the batch; without one at least one."""
    new: list[_Row] = []
    count, width, left = 0, 0, 0
    if batch:
        count, width, left = len(batch.rows), batch.mask_BS.shape[1], max(row.left for row in batch.rows)
    while waiting:
        width, left = max(width, len(waiting[-1].prompt)), max(left, waiting[-1].room)
        if count and (count + 1) * (width + left) > at_once:
            break
        new.append(waiting.pop())
        count += 1
    return new


def _begin(network: Network, rows: list[_Row], ending: _Ending) -> _Batch | None:
    """Reads the prompts. None: no answer has more than one token."""
    kept, mask_BS, last_BD = decoder.prefilled(network, [row.prompt for row in rows], PREFILL_TOKENS)
    reads = [_Read(row.prompt[-1:]) for row in rows]
    return _answered(network, _Batch(rows, kept, mask_BS), reads, last_BD[:, None], ending)


def _go_on(network: Network, batch: _Batch, ending: _Ending) -> _Batch | None:
    """Reads each row's last token, and guesses. None: all rows have ended."""
    rows, kept, mask_BS = batch
    # gaps, which wrong guesses leave, count towards a window
    spare = decoder.window(network) - 1 - mask_BS.shape[1] - max(row.left for row in rows)
    most = int(min(GUESSING_TOKENS // len(rows) - 1, spare))
    reads = []
    for row in rows:
        guesses = _guesses([*row.prompt, *row.answer], min(most, row.left - 1)) if row.drawn is None else []
        reads.append(_Read([row.answer[-1], *guesses], len(guesses)))
    width = max(len(read.ids) for read in reads)
    ids_BT = torch.tensor([[*read.ids, *[0] * (width - len(read.ids))] for read in reads])
    read_BT = torch.tensor([[1] * len(read.ids) + [0] * (width - len(read.ids)) for read in reads])
    mask_BS = torch.cat([mask_BS, read_BT], 1)
    states_BTD = decoder.step(network, kept, ids_BT, mask_BS)
    return _answered(network, _Batch(rows, kept, mask_BS), reads, states_BTD, ending)


def _answered(
    network: Network, batch: _Batch, reads: Sequence[_Read], states_BTD: Tensor, ending: _Ending
) -> _Batch | None:
    """The rows with what follows what they have read, without those that have ended and without wrong guesses."""
    rows, kept, mask_BS = batch
    start, stay = mask_BS.shape[1] - states_BTD.shape[1], []
    drawn = [None if row.drawn is None else row.drawn[len(row.answer)] for row in rows]
    for b, (row, follow) in enumerate(zip(rows, _follows(network, states_BTD, reads, drawn), strict=True)):
        sure = len(reads[b].ids) - reads[b].guesses
        right = common_prefix(reads[b].ids[sure:], follow)
        mask_BS[b, start + sure + right :] = 0
        if _extend(network, row, follow[: right + 1], ending):
            stay.append(b)
    if not stay:
        return None
    if len(stay) < len(rows):
        order = _closed_up(stay)
        kept.batch_select_indices(torch.tensor(order, device=network.device))
        rows, mask_BS = [rows[b] for b in order], mask_BS[order]
    if unused := int(mask_BS.any(0).flip(0).int().argmax()):  # columns at the end in which no row has a token
        kept.crop(-unused)
        mask_BS = mask_BS[:, :-unused]
    return _Batch(rows, kept, mask_BS)


def _closed_up(stay: Sequence[int]) -> list[int]:
    """The rows that stay, in an order in which those behind take the places of those that go: few are moved.

    >>> _closed_up([0, 2, 4, 5])
    [0, 4, 2, 5]
    """
    here = set(stay)
    behind = (b for b in stay if b >= len(stay))
    return [b if b in here else next(behind) for b in range(len(stay))]


def _joined(one: _Batch, other: _Batch) -> _Batch:
    kept, mask_BS = decoder.joined([(one.kept, one.mask_BS), (other.kept, other.mask_BS)])
    return _Batch([*one.rows, *other.rows], kept, mask_BS)


def _follows(
    network: Network, states_BTD: Tensor, reads: Sequence[_Read], drawn: Sequence[float | None]
) -> Iterator[list[int]]:
    """Of each row the likeliest token behind the last that is sure, and behind each guess; of a sampled one the one drawn."""
    places = [(b, t) for b, (ids, guesses) in enumerate(reads) for t in range(len(ids) - 1 - guesses, len(ids))]
    at_N = [drawn[b] for b, _ in places]  # a row that guesses is not drawn
    b_N, t_N = torch.tensor(places, device=network.device).T
    states_ND = states_BTD[b_N, t_N]
    each = states_ND.element_size() + DRAWING_BYTES * any(at is not None for at in at_N)
    at_once = max(1, LOGITS_BYTES // (network.causal.config.get_text_config().vocab_size * each))
    parts = (slice(first, first + at_once) for first in range(0, len(places), at_once))
    chosen = iter([token for part in parts for token in _chosen(network, states_ND[part], at_N[part])])
    return (list(islice(chosen, read.guesses + 1)) for read in reads)


def _chosen(network: Network, states_ND: Tensor, at_N: Sequence[float | None]) -> list[int]:
    logits_NV = _logits(network, states_ND)
    chosen_N = logits_NV.argmax(-1)
    sampled = [n for n, at in enumerate(at_N) if at is not None]
    if sampled:
        at_n = torch.tensor([at_N[n] for n in sampled], dtype=torch.float64)
        chosen_N[sampled] = _drawn(logits_NV[sampled, : network.vocabulary], at_n)
    tokens: list[int] = chosen_N.tolist()
    return tokens


def _drawn(logits_nV: Tensor, at_n: Tensor) -> Tensor:
    """By the inverse of the distribution function, in float64.

    >>> _drawn(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([0.6], dtype=torch.float64)).tolist()
    [1]
    """
    upto_nV = logits_nV.double().softmax(-1).cumsum(-1)
    at_n1 = at_n.to(logits_nV.device)[:, None] * upto_nV[:, -1:]
    return torch.searchsorted(upto_nV, at_n1, right=True)[:, 0].clamp(max=logits_nV.shape[1] - 1)


def _uniform(seed: int, count: int) -> list[float]:
    numbers: list[float] = torch.rand(
        count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return numbers


def _guesses(ids: Sequence[int], most: int) -> list[int]:
    """What followed when the last two tokens last stood there, as if it went on like that.

    >>> _guesses([5, 6, 7, 8, 5, 6], 3), _guesses([4, 9, 9, 9], 3), _guesses([1, 2, 3], 3)
    ([7, 8, 5], [9, 9, 9], [])
    """
    for at in range(len(ids) - 1, 1, -1) if most > 0 else ():
        if ids[at - 1] == ids[-1] and ids[at - 2] == ids[-2]:
            period = len(ids) - at
            return [ids[at + k % period] for k in range(most)]
    return []


def _loops(ids: Sequence[int]) -> bool:
    """Whether the last LOOP_TOKENS are a few tokens over and over.

    >>> _loops([1, 2, 3] * 20), _loops(range(60)), _loops([1, 2, 3] * 5)
    (True, False, False)
    """
    tail = list(ids[-LOOP_TOKENS:])
    return len(tail) == LOOP_TOKENS and any(tail[period:] == tail[:-period] for period in range(1, PERIOD_MAX + 1))


def _extend(network: Network, row: _Row, tokens: Sequence[int], ending: _Ending) -> bool:
    """Adds the tokens to the answer, as far as it goes; whether it goes on behind them."""
    for token in tokens:
        if token in ending.tokens:
            return False
        row.answer.append(token)
        if not row.left or _stopped(network, row.answer, ending.texts):
            return False
    return not (ending.loops and row.drawn is None and _loops(row.answer))


def _logits(network: Network, last_BD: Tensor) -> Tensor:
    """The model's own, over its whole vocabulary, which may be larger than the tokeniser's."""
    own = network.causal.get_output_embeddings() if network.head is not None else own_logits(network.causal)
    logits_BV: Tensor = own(last_BD)
    return logits_BV


def _stopped(network: Network, ids: Sequence[int], stops: Sequence[str]) -> bool:
    if not stops:
        return False
    text = _decoded(network, ids)
    return any(stop in text for stop in stops)


def _decoded(network: Network, ids: Sequence[int]) -> str:
    text: str = network.tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text


@torch.no_grad()
def _uncached(network: Network, row: _Row, ending: _Ending) -> list[int]:
    """The same of one row, for a model whose cache is not understood: greedy ones are the library's."""
    decoder.reset_positions(network, len(row.prompt) + row.room)
    ids_1T = torch.tensor([row.prompt], device=network.device)
    if row.drawn is not None:
        return _drawn_by_rereading(network, ids_1T, row.drawn, ending.tokens)
    whole_1T = network.causal.generate(
        input_ids=ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=row.room,
        do_sample=False,
        eos_token_id=sorted(ending.tokens) or None,
        pad_token_id=network.tokenizer.eos_token_id or 0,
    )
    ids: list[int] = whole_1T[0, len(row.prompt) :].tolist()
    ids = next((ids[:k] for k, token in enumerate(ids) if token in ending.tokens), ids)
    loops = (k for k in range(LOOP_TOKENS, len(ids)) if ending.loops and _loops(ids[:k]))
    return ids[: next(loops, len(ids))]


def _drawn_by_rereading(network: Network, ids_1T: Tensor, drawn: Sequence[float], ends: Collection[int]) -> list[int]:
    said: list[int] = []
    for at in drawn:
        decoder.reset_positions(network, ids_1T.shape[1])
        logits_1V = network.causal(input_ids=ids_1T, use_cache=False).logits[:, -1, : network.vocabulary]
        token = _drawn(logits_1V, torch.tensor([at], dtype=torch.float64))
        if int(token) in ends:
            break
        said.append(int(token))
        ids_1T = torch.cat([ids_1T, token[None].to(ids_1T.device)], 1)
    return said
