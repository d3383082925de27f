"""The problem at the current parameters on one batch: forward, losses, backward.

The forget and the retain rows of a step go through the network together, in micro-batches of like length. The head runs only
where a token counts. How many tokens count in the whole batch is known before the first micro-batch, so that each adds
its share of sum_i weight_i * sum(loss_i) / N_i: every split gives the same numbers, up to rounding.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from worker import data
from worker.data import Encoded, TokenRow
from worker.model import Network
from worker.problem import Evaluation, Method, Params
from worker.solve import Batch
from worker.tokens import Answers, Loss, View, counted

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
    rows = [forget.rows[p] for p in forget_places] + [retain.rows[p] for p in retain_places]
    is_forget = [True] * len(forget_places) + [False] * len(retain_places)
    losses = {"forget": method.forget, "retain": method.retain}
    sizes = {
        "forget": _size(method.forget, [forget.rows[p] for p in forget_places]),
        "retain": _size(method.retain, [retain.rows[p] for p in retain_places]),
    }
    lengths = [len(row.ids) for row in rows]
    parts = data.microbatches(lengths, overhead_tokens(network), max_tokens)
    tokens = sum(lengths)

    def oracle(weights: Mapping[str, float]) -> Evaluation:
        sums: dict[str, list[Tensor]] = {term: [] for term in weights}
        trains = any(weights.values())
        for part in parts:
            with nullcontext() if trains else torch.no_grad():
                seen = views(network, [rows[i] for i in part], [is_forget[i] for i in part], list(losses.values()))
                terms = {term: losses[term].fn({"answer": seen[term]}).sum() for term in weights if term in seen}
            if trains:
                share = sum((weights[term] / sizes[term]) * value for term, value in terms.items() if weights[term])
                if isinstance(share, Tensor):
                    share.backward()  # type: ignore[no-untyped-call]
            for term, value in terms.items():
                sums[term].append(value.detach())
        totals = torch.stack([torch.stack(sums[term]).sum() / sizes[term] for term in weights])
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}
        for p in params.values():
            p.grad = None
        return Evaluation(dict(zip(weights, totals.tolist(), strict=True)), grads)

    return Batch(oracle, tokens)


def overhead_tokens(network: Network) -> float:
    """So many tokens take as long as starting one more micro-batch."""
    layers = network.causal.config.get_text_config().num_hidden_layers
    return OVERHEAD_FLOP.get(network.device.type, OVERHEAD_FLOP["cuda"]) * float(layers) / (4.0 * network.parameters)


def _size(loss: Loss, rows: Sequence[TokenRow]) -> int:
    """What the sum is divided by: the counted tokens of the whole batch, or its rows."""
    return sum(row.counted for row in rows) if loss.per == "token" else len(rows)


def views(
    network: Network, rows: Sequence[TokenRow], is_forget: Sequence[bool], losses: Collection[Loss]
) -> dict[str, View]:
    """A view of each set's share of a micro-batch ("forget", "retain"), with what the losses need."""
    padded = data.pad(rows, network.device)
    answers, at_N = counted(padded.input_ids_BT, padded.labels_BT)
    hidden = any("hidden" in loss.needs for loss in losses)
    now_ND, now_layers = states(network, padded.input_ids_BT, at_N, hidden)
    before: tuple[Tensor, tuple[Tensor, ...]] | None = None
    if any("reference" in loss.needs for loss in losses):
        assert network.peft is not None
        with network.peft.disable_adapter(), torch.no_grad():
            before = states(network, padded.input_ids_BT, at_N, hidden)

    seen = {}
    forget_B = torch.tensor(is_forget, device=network.device)
    for term, mine_B in {"forget": forget_B, "retain": ~forget_B}.items():
        chosen_B = torch.nonzero(mine_B)[:, 0]
        if not len(chosen_B):
            continue
        mine_N = mine_B[answers.row_N]
        target_N = answers.target_N[mine_N]
        renumbered_B = torch.cumsum(mine_B, 0) - 1
        seen[term] = View(
            Answers(target_N, renumbered_B[answers.row_N[mine_N]], len(chosen_B)),
            network.predictions(now_ND[mine_N], target_N, tuple(layer[mine_N] for layer in now_layers)),
            None
            if before is None
            else network.predictions(before[0][mine_N], target_N, tuple(layer[mine_N] for layer in before[1])),
        )
    return seen


def states(network: Network, input_ids_BT: Tensor, at_N: Tensor, hidden: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the head reads at the given flat positions [N, D] and, if asked for, the states after every layer there."""
    out = network.causal.get_decoder()(input_ids=input_ids_BT, use_cache=False, output_hidden_states=hidden)
    layers = tuple(layer.flatten(0, 1)[at_N] for layer in out.hidden_states) if hidden else ()
    return out.last_hidden_state.flatten(0, 1)[at_N], layers
