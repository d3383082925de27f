"""The problem at the current parameters on one batch: forward, losses, backward.

The forget and the retain rows of a step go through the network together, in micro-batches of like length. The head runs only
where a token counts. How many tokens count in the whole batch is known before the first micro-batch, so that each adds
its share of sum_i weight_i * sum(loss_i) / N_i: every split gives the same numbers, up to rounding. So does every split over
the processes of a torch.distributed group, where there is one: each takes its micro-batches, and the sums are summed.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor, distributed

from service.domain.microbatches import microbatches
from worker import model
from worker.decoder import overhead_tokens
from worker.model import Network
from worker.problem import Evaluation, Params
from worker.solve import Batch
from worker.vectors import flat, unflat
from worker.views import Packed, Term, pack, views


def make_oracle(
    network: Network,
    params: Params,
    terms: Mapping[str, Term],
    places: Mapping[str, Sequence[int]],
) -> Batch:
    """The terms on the rows at these places. `grads` of an evaluation are the caller's to keep."""
    tokens = {name: sum(term.encoded.rows[p].counted for p in places[name]) for name, term in terms.items()}
    sizes = {name: tokens[name] if term.loss.per == "token" else len(places[name]) for name, term in terms.items()}

    @cache
    def packed(asked: frozenset[tuple[str, bool]], limit: int) -> list[Packed]:
        """Micro-batches of the rows of these terms, this process's share. A solver that asks again gets them again.

        Terms with a weight and without one, and places of one text and of two, go apart: the first need a graph, and the
        last twice the room.
        """
        groups: dict[tuple[bool, int], list[tuple[str, int]]] = {}
        for name, weighted in sorted(asked):
            group = groups.setdefault((weighted, len(terms[name].texts)), [])
            group += [(name, place) for place in places[name]]
        parts: list[list[tuple[str, int]]] = []
        for (_, texts), chosen in groups.items():
            lengths = [terms[name].length(place) for name, place in chosen]
            split = microbatches(lengths, overhead_tokens(network), limit // texts)
            parts += [[chosen[i] for i in part] for part in split]
        rank, processes = _rank()
        return [pack(terms, part, network.device) for part in parts[rank::processes]]

    def oracle(weights: Mapping[str, float], *, full_precision: bool = False) -> Evaluation:
        zero = torch.zeros((), dtype=torch.float64, device=network.device)
        losses, nlls = dict.fromkeys(weights, zero), {name: zero for name in weights if terms[name].proxy}
        asked = frozenset((name, weight != 0) for name, weight in weights.items())
        with model.full_precision(network) if full_precision else nullcontext(network) as running:
            wider = running is not network  # its states take twice the room
            for part in packed(asked, network.tokens_at_once // 2 if wider else network.tokens_at_once):
                with torch.set_grad_enabled(any(weights[name] for name in part.shares)):
                    share: Tensor | float = 0.0
                    for name, seen in views(running, part, terms).items():
                        value = terms[name].loss.fn(seen).sum()
                        losses[name] = losses[name] + value.detach()
                        if name in nlls:
                            with torch.no_grad():
                                nlls[name] = nlls[name] - seen["answer"].now.logp_N().sum()
                        share = share + (weights[name] / sizes[name]) * value
                if isinstance(share, Tensor) and share.requires_grad:
                    share.backward()  # type: ignore[no-untyped-call]
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}
        for p in params.values():
            p.grad = None
        sums = torch.stack([*losses.values(), *nlls.values()])
        if _rank()[1] > 1:
            distributed.all_reduce(sums)
            whole_P = flat(grads)
            distributed.all_reduce(whole_P)
            grads = unflat(whole_P, grads)
        found = sums.tolist()
        values = {name: total / sizes[name] for name, total in zip(losses, found, strict=False)}
        strict = {name: total / tokens[name] for name, total in zip(nlls, found[len(losses) :], strict=True)}
        return Evaluation(values, grads, strict)

    return Batch(
        oracle, tokens=sum(len(row.ids) for name in terms for p in places[name] for row in terms[name].rows(p))
    )


def _rank() -> tuple[int, int]:
    """(which, of how many) processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
