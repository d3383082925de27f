"""One look at the texts that a suite asks for: every view of every text, each computed once.

All likelihood views of all texts come from one forward pass, in which rows that begin alike are read once where they do
(worker.trees). Batches are made by length within a budget of tokens, and the head runs only where a token counts.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from service.domain.microbatches import microbatches
from service.store.storage import Storage
from worker import data, decoder, generation, looks, trees
from worker.data import Encoded, TokenRow
from worker.generation import Generated
from worker.gradients import gradient_norms
from worker.model import Network
from worker.scores import Scores
from worker.suite import Ask, Asks, Key, Seen

SCORING_TOKENS = 4_096  # padded positions at once, at most: enough to fill an accelerator
DISTRIBUTION = frozenset({"hits", "standardised"})  # those that need more than log p of the label
MIN_VARIANCE = 1e-6  # of log p; the reference divides by no less


def look(network: Network, asks: Asks, cache: Storage | None = None) -> Seen:
    """What the model says of the texts.

    Not scored are rows without a counted token, and rows for which the model has no positions.

    Args:
        cache: where it is kept for the next look, of any job. Not for a network whose base weights were changed in memory,
            and not for a customer's rows.
    """
    tokens = {key: encoded(network, ask) for key, ask in asks.items()}
    if cache is None:
        return _look(network, asks, tokens)
    model = looks.model_digest(network)
    keys = {key: looks.key(model, key, ask, tokens[key]) for key, ask in asks.items()}
    known = {key: scores for key in asks if (scores := looks.recall(cache, keys[key])) is not None}
    new = _look(network, {key: ask for key, ask in asks.items() if key not in known}, tokens)
    for key, scores in new.items():
        looks.keep(cache, keys[key], scores)
    return {key: known[key] if key in known else new[key] for key in asks}


def encoded(network: Network, ask: Ask) -> Encoded:
    """The texts of an ask as rows of tokens, in the order of their places."""
    texts = [ask.texts[place] for place in sorted(ask.texts)]
    tokenizer, form = network.tokenizer, network.entry.prompt_format
    if ask.convention is None:
        rows = data.encode(texts, tokenizer, form, None)
    else:
        rows = data.encode_as_benchmark(texts, tokenizer, form, ask.convention)
    if ask.answer_tokens_max is None:
        return rows
    cut = [row._replace(ids=row.ids[: row.answer_start + ask.answer_tokens_max]) for row in rows.rows]
    return rows._replace(rows=cut)


def _look(network: Network, asks: Asks, tokens: Mapping[Key, Encoded]) -> dict[Key, Scores]:
    longest = decoder.positions_max(network)
    chosen = {
        key: [i for i in tokens[key].measured if ask.scored and len(tokens[key].rows[i].ids) <= longest]
        for key, ask in asks.items()
    }
    rows = {key: [tokens[key].rows[i] for i in chosen[key]] for key in asks}
    said = _likelihoods(
        network,
        [row for key in asks for row in rows[key]],
        [bool(ask.views & DISTRIBUTION) for key, ask in asks.items() for _ in rows[key]],
    )
    answers = _generated(network, asks, tokens)
    seen, start = dict[Key, Scores](), 0
    for key, ask in asks.items():
        places, own = sorted(ask.texts), said[start : start + len(rows[key])]
        start += len(own)
        scores = _scores(network, [places[i] for i in chosen[key]], rows[key], own, ask.views)
        if key in answers:
            scores = scores._replace(
                generated={places[i]: one.text for i, one in answers[key].items()},
                generated_ids={places[i]: one.ids for i, one in answers[key].items()},
                answers={places[i]: ask.texts[places[i]].answer for i in answers[key]},
                prompts={places[i]: _text(network, tokens[key].prompts[i]) for i in answers[key]},
            )
        seen[key] = scores._replace(empty=[places[number - 1] for number in tokens[key].unmeasured if ask.scored])
    return seen


def _generated(network: Network, asks: Asks, tokens: Mapping[Key, Encoded]) -> dict[Key, dict[int, Generated]]:
    """Answers by the row's place among the texts; none to a prompt that leaves no room for one.

    Prompts that are continued under the same conditions go together, so that batches are full.
    """
    alike: dict[object, list[Key]] = {}
    for key, ask in asks.items():
        if "generated" in ask.views:
            condition = (ask.max_new_tokens, ask.stops, ask.beyond_context, ask.convention is None)
            alike.setdefault(condition, []).append(key)
    found: dict[Key, dict[int, Generated]] = {key: {} for keys in alike.values() for key in keys}
    for keys in alike.values():
        ask = asks[keys[0]]
        chosen = [
            (key, i, prompt)
            for key in keys
            for i, prompt in enumerate(tokens[key].prompts)
            if generation.room(network, prompt, ask.beyond_context)
        ]
        prompts = [prompt for *_, prompt in chosen]
        end = data.end_of_turn(network.tokenizer, network.entry.prompt_format) if ask.convention is None else None
        said = generation.generate(network, prompts, ask.max_new_tokens, ask.stops, ask.beyond_context, end_of_turn=end)
        for (key, i, _), one in zip(chosen, said, strict=True):
            found[key][i] = one
    return found


def score(network: Network, rows: Sequence[TokenRow], wanted: frozenset[str]) -> Scores:
    """The likelihood views of token rows, each with a counted token; `places` are the rows' places in the sequence."""
    said = _likelihoods(network, rows, [bool(wanted & DISTRIBUTION)] * len(rows))
    return _scores(network, range(len(rows)), rows, said, wanted)


class _Said(NamedTuple):
    """Of a row's counted tokens, the end of sequence included; on the CPU."""

    logp_n: Tensor
    hits_n: Tensor | None = None
    standardised_n: Tensor | None = None


def _scores(
    network: Network,
    places: Sequence[int],
    rows: Sequence[TokenRow],
    said: Sequence[_Said],
    wanted: frozenset[str],
) -> Scores:
    def inner(name: str, field: str) -> list[Tensor] | None:
        if name not in wanted:
            return None
        return [getattr(one, field)[: row.counted - row.ends] for row, one in zip(rows, said, strict=True)]

    return Scores(
        list(places),
        torch.tensor([-float(one.logp_n.double().sum()) for one in said], dtype=torch.float64),
        torch.tensor([row.counted for row in rows], dtype=torch.int64),
        hits=inner("hits", "hits_n"),
        logp=inner("logp", "logp_n"),
        standardised=inner("standardised", "standardised_n"),
        gradient_norm_B=gradient_norms(network, rows) if "gradient_norm" in wanted else None,
        labels={place: _text(network, row.ids[row.answer_start :]) for place, row in zip(places, rows, strict=True)}
        if "labels" in wanted
        else None,
    )


def _text(network: Network, ids: Sequence[int]) -> str:
    text: str = network.tokenizer.decode(ids, skip_special_tokens=True)
    return text


@torch.no_grad()
def _likelihoods(network: Network, rows: Sequence[TokenRow], distribution: Sequence[bool]) -> list[_Said]:
    """Of each row log p of its counted tokens, and, where that is asked for, what needs the whole distribution."""
    # Nothing is asked of the state at the last token; it is read where the row's length changes what others read.
    limit = decoder.rescaled_at(network)
    ids = [row.ids if len(row.ids) > limit else row.ids[:-1] for row in rows]
    at_once = min(SCORING_TOKENS, network.tokens_at_once)
    grown = decoder.grown(network, ids, at_once)
    found: dict[int, _Said] = {}
    for part in microbatches([len(tree.ids) for tree in grown], decoder.overhead_tokens(network), at_once):
        batch = [grown[k] for k in part]
        forest = trees.plant(batch)
        last_PD, length = decoder.read(network, forest), forest.input_ids_BT.shape[1]
        for whole in (False, True):
            chosen = [
                (i, b * length, path)
                for b, tree in enumerate(batch)
                for i, path in zip(tree.rows, tree.paths, strict=True)
                if distribution[i] is whole
            ]
            if chosen:
                found |= _at_counted(network, rows, chosen, last_PD, whole)
    return [found[i] for i in range(len(rows))]


def _at_counted(
    network: Network,
    rows: Sequence[TokenRow],
    chosen: Sequence[tuple[int, int, list[int]]],
    last_PD: Tensor,
    whole: bool,
) -> dict[int, _Said]:
    """The head at the counted tokens of the rows; a state and label that several rows share are taken once.

    Args:
        chosen: (row, where its tree begins in the batch's P positions, its path in the tree).
    """
    pairs_N2 = torch.tensor(
        [
            (start + at, label)
            for i, start, path in chosen
            for at, label in zip(path[rows[i].answer_start - 1 :], rows[i].ids[rows[i].answer_start :], strict=False)
        ],
        dtype=torch.int64,
    ).view(-1, 2)
    pair_n, of_N = torch.unique(pairs_N2[:, 0] * network.vocabulary + pairs_N2[:, 1], return_inverse=True)
    at_n, label_n = (pair_n // network.vocabulary).to(network.device), (pair_n % network.vocabulary).to(network.device)
    predicted = network.predictions(last_PD[at_n], label_n)
    counts = [rows[i].counted for i, _, _ in chosen]
    if not whole:
        logp = torch.split(predicted.logp_N().cpu()[of_N], counts)
        return {i: _Said(*one) for (i, _, _), *one in zip(chosen, logp, strict=True)}
    now = predicted.distribution()
    standardised_n = (now.logp_N - now.mean_N) / now.variance_N.clamp(min=MIN_VARIANCE).sqrt()
    values = (now.logp_N, now.likeliest_N == label_n, standardised_n)
    split = [torch.split(value_n.cpu()[of_N], counts) for value_n in values]
    return {i: _Said(*one) for (i, _, _), *one in zip(chosen, *split, strict=True)}
