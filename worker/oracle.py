"""The problem at the current parameters on one batch: forward, losses, backward.

The forget and the retain rows of a step go through the network together, in micro-batches of like length. The head runs only
where a token counts. How many tokens count in the whole batch is known before the first micro-batch, so that each adds
its share of sum_i weight_i * sum(loss_i) / N_i: every split gives the same numbers, up to rounding.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from worker import data
from worker.data import Encoded, TokenRow
from worker.model import Network, adapter_off
from worker.problem import Evaluation, Method, Params
from worker.solve import Batch
from worker.tokens import Answers, Loss, Predictions, View, counted

MAX_TOKENS = 16_384  # padded positions of a micro-batch
# What a micro-batch costs beside its tokens, per layer: time to launch it times the rate of the device (operations).
OVERHEAD_FLOP = {"cpu": 7.5e7, "cuda": 1.2e11}


def make_oracle(
    network: Network,
    method: Method,
    params: Params,
    forget: Encoded,
    forget_places: Sequence[int],
    retain: Encoded,
    retain_places: Sequence[int],
    max_tokens: int = MAX_TOKENS,
) -> Batch:
    """The terms "forget" and "retain" on these rows. `grads` of an evaluation are the caller's to keep."""
    losses = {"forget": method.forget, "retain": method.retain}
    rows = {"forget": [forget.rows[p] for p in forget_places], "retain": [retain.rows[p] for p in retain_places]}
    sizes = {term: _size(losses[term], rows[term]) for term in losses}

    @cache
    def packed(terms: frozenset[str]) -> list[Packed]:
        """Micro-batches of the rows of these terms. A solver that asks again gets them again."""
        labelled = [(term, row) for term in sorted(terms) for row in rows[term]]
        parts = data.microbatches([len(row.ids) for _, row in labelled], overhead_tokens(network), max_tokens)
        return [pack([labelled[i] for i in part], network.device) for part in parts]

    def oracle(weights: Mapping[str, float]) -> Evaluation:
        sums: dict[str, list[Tensor]] = {term: [] for term in weights}
        for part in packed(frozenset(weights)):
            with torch.set_grad_enabled(any(weights[term] for term in part.shares)):
                seen = views(network, part, [losses[term] for term in part.shares])
                share: Tensor | float = 0.0
                for term, view in seen.items():
                    with torch.set_grad_enabled(weights[term] != 0):
                        value = losses[term].fn({"answer": view}).sum()
                    sums[term].append(value.detach())
                    if weights[term]:
                        share = share + (weights[term] / sizes[term]) * value
            if isinstance(share, Tensor):
                share.backward()  # type: ignore[no-untyped-call]
        totals = torch.stack([torch.stack(sums[term]).sum() / sizes[term] for term in weights])
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}
        for p in params.values():
            p.grad = None
        return Evaluation(dict(zip(weights, totals.tolist(), strict=True)), grads)

    return Batch(oracle, tokens=sum(len(row.ids) for of_term in rows.values() for row in of_term))


def overhead_tokens(network: Network) -> float:
    """So many tokens take as long as starting one more micro-batch."""
    layers = network.causal.config.get_text_config().num_hidden_layers
    return OVERHEAD_FLOP.get(network.device.type, OVERHEAD_FLOP["cuda"]) * float(layers) / (4.0 * network.parameters)


def _size(loss: Loss, rows: Sequence[TokenRow]) -> int:
    """What the sum is divided by: the counted tokens of the whole batch, or its rows."""
    return sum(row.counted for row in rows) if loss.per == "token" else len(rows)


class Share(NamedTuple):
    """What one term counts of a micro-batch."""

    answers: Answers  # its rows renumbered from 0
    at_N: Tensor  # int64 positions of the flattened [B*T] whose states predict those tokens


class Packed(NamedTuple):
    """A micro-batch on the device. Nothing in it depends on the parameters."""

    input_ids_BT: Tensor
    shares: dict[str, Share]  # by term


def pack(labelled: Sequence[tuple[str, TokenRow]], device: torch.device) -> Packed:
    """Pad rows, each with the term that it belongs to. All counting is done before the device sees a number: it never waits."""
    padded = data.pad([row for _, row in labelled], torch.device("cpu"))
    answers, at_N = counted(padded.input_ids_BT, padded.labels_BT)
    shares = {}
    for term in sorted({term for term, _ in labelled}):
        mine_B = torch.tensor([of == term for of, _ in labelled])
        mine_N = mine_B[answers.row_N]
        row_N = (mine_B.cumsum(0) - 1)[answers.row_N[mine_N]]
        packed = Answers(answers.target_N[mine_N].to(device), row_N.to(device), int(mine_B.sum()))
        shares[term] = Share(packed, at_N[mine_N].to(device))
    return Packed(padded.input_ids_BT.to(device), shares)


def views(network: Network, part: Packed, losses: Collection[Loss]) -> dict[str, View]:
    """A view of each term's share of a micro-batch, with what the losses need; one pass for all of them."""
    hidden = any("hidden" in loss.needs for loss in losses)
    now = states(network, part.input_ids_BT, hidden)
    before: States | None = None
    if any("reference" in loss.needs for loss in losses):
        with adapter_off(network), torch.no_grad():
            before = states(network, part.input_ids_BT, hidden)

    def predictions(seen: States, share: Share) -> Predictions:
        layers = tuple(layer_PD[share.at_N] for layer_PD in seen.layers)
        return network.predictions(seen.last_PD[share.at_N], share.answers.target_N, layers)

    return {
        term: View(share.answers, predictions(now, share), None if before is None else predictions(before, share))
        for term, share in part.shares.items()
    }


class States(NamedTuple):
    """Of all positions P = B*T of a micro-batch."""

    last_PD: Tensor  # what the head reads
    layers: tuple[Tensor, ...]  # after the embeddings and after every layer, [P, D] each; empty unless asked for


def states(network: Network, input_ids_BT: Tensor, hidden: bool) -> States:
    out = network.causal.get_decoder()(input_ids=input_ids_BT, use_cache=False, output_hidden_states=hidden)
    layers = tuple(layer.flatten(0, 1) for layer in out.hidden_states) if hidden else ()
    return States(out.last_hidden_state.flatten(0, 1), layers)
