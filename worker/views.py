"""A micro-batch on the device, and what a loss sees of it: each text under the current model and under the reference.

The head runs only where a token counts. What the reference says was stored before the run (worker.reference).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from worker import data, decoder
from worker.data import Encoded, TokenRow
from worker.layers import passed
from worker.model import Network
from worker.tokens import Answers, Distribution, Loss, Predictions, View, counted


class Stored(NamedTuple):
    """What the reference says of one text: the part that a loss needs, on the CPU."""

    logp_n: Tensor | None  # of the counted tokens
    states_nD: Tensor | None  # at the positions that predict them, at the loss's depth


class Term(NamedTuple):
    """One side of the problem: a set, and the loss on it."""

    loss: Loss
    texts: Mapping[str, Encoded]  # "answer", and "refusal" where the loss needs it; row k of both asks the same
    reference: Mapping[tuple[str, int], Stored] | None = None  # (text, place) -> what the reference says of it
    proxy: bool = False  # the loss stands in for the token-mean NLL of the answers, which is what is bounded

    @property
    def encoded(self) -> Encoded:
        return self.texts["answer"]

    def rows(self, place: int) -> list[TokenRow]:
        return [encoded.rows[place] for encoded in self.texts.values()]

    def length(self, place: int) -> int:
        """Of the longest of a place's texts."""
        return max(len(row.ids) for row in self.rows(place))


class Share(NamedTuple):
    """What one text of one term counts of a micro-batch."""

    places: list[int]
    answers: Answers  # its rows renumbered from 0
    at_N: Tensor  # int64 positions of the flattened [B*T] whose states predict those tokens
    reference: Stored | None  # of those tokens, on the device


class Packed(NamedTuple):
    """A micro-batch on the device. Nothing in it depends on the parameters."""

    input_ids_BT: Tensor
    lengths: list[int]  # of the rows, without padding
    shares: dict[str, dict[str, Share]]  # term -> text -> share


def pack(terms: Mapping[str, Term], chosen: Sequence[tuple[str, int]], device: torch.device) -> Packed:
    """Pad the texts of these (term, place). All counting is done before the device sees a number: it never waits."""
    labelled = [(term, text, place) for term, place in chosen for text in terms[term].texts]
    rows = [terms[term].texts[text].rows[place] for term, text, place in labelled]
    padded = data.pad(rows, torch.device("cpu"))
    answers, at_N = counted(padded.input_ids_BT, padded.labels_BT)
    shares: dict[str, dict[str, Share]] = {}
    for term, text in sorted({(term, text) for term, text, _ in labelled}):
        mine_B = torch.tensor([label[:2] == (term, text) for label in labelled])
        mine_N = mine_B[answers.row_N]
        row_N = (mine_B.cumsum(0) - 1)[answers.row_N[mine_N]]
        packed = Answers(answers.target_N[mine_N].to(device), row_N.to(device), int(mine_B.sum()))
        places = [place for *label, place in labelled if tuple(label) == (term, text)]
        said = _said(terms[term], text, places, device)
        shares.setdefault(term, {})[text] = Share(places, packed, at_N[mine_N].to(device), said)
    return Packed(padded.input_ids_BT.to(device), [len(row.ids) for row in rows], shares)


def views(network: Network, part: Packed, terms: Mapping[str, Term]) -> dict[str, dict[str, View]]:
    """term -> text -> view, of the terms in the micro-batch; one forward pass for all of them."""
    here = {name: terms[name] for name in part.shares}
    seen = states(network, part, inner=any(term.loss.depth < 1 for term in here.values()))

    def view(term: Term, share: Share) -> View:
        inner_ND = seen.at(term.loss.depth)[share.at_N] if term.loss.depth < 1 else None
        now = network.predictions(seen.last_PD[share.at_N], share.answers.target_N, inner_ND)
        return View(share.answers, now, recalled(network, term.loss, share))

    return {name: {text: view(here[name], share) for text, share in part.shares[name].items()} for name in here}


class States(NamedTuple):
    """Of all positions P = B*T of a micro-batch."""

    last_PD: Tensor  # what the head reads
    layers: tuple[Tensor, ...]  # after the embeddings and after every layer, [P, D] each; empty unless asked for

    def at(self, depth: float) -> Tensor:
        return self.layers[passed(depth, len(self.layers) - 1)]


def states(network: Network, part: Packed, inner: bool) -> States:
    last_PD, *layers = (s.flatten(0, 1) for s in decoder.states(network, part.input_ids_BT, part.lengths, inner))
    return States(last_PD, tuple(layers))


# --- the reference


class Recalled:
    """worker.tokens.Predictions from stored values. What was not stored, because the loss does not need it, is refused."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    def logp_N(self) -> Tensor:
        if self._stored.logp_n is None:
            raise LookupError("the loss does not say that it needs 'reference'")
        return self._stored.logp_n

    def hidden_ND(self) -> Tensor:
        if self._stored.states_nD is None:
            raise LookupError("the loss does not say that it needs 'reference_states'")
        return self._stored.states_nD

    @property
    def logits_nV(self) -> Tensor:
        """What another's map_logits asks for."""
        raise LookupError(
            "the reference's logits come from its last states: the loss needs 'reference_states' at depth 1"
        )

    def margin_N(self) -> Tensor:
        return self.logits_nV

    def distribution(self) -> Distribution:
        raise LookupError("no loss sees the reference's distribution")

    def map_logits(self, *_: object) -> Tensor:
        return self.logits_nV


def recalled(network: Network, loss: Loss, share: Share) -> Predictions | None:
    """What the reference says of a micro-batch's tokens, as it was stored: in the base's own type, also for a network that
    runs in full precision."""
    if share.reference is None:
        return None
    states_ND = share.reference.states_nD
    if states_ND is not None and loss.depth == 1.0:
        weight_VD = network.causal.get_output_embeddings().weight
        return network.predictions(states_ND.to(weight_VD.dtype), share.answers.target_N)
    return Recalled(share.reference)


def _said(term: Term, text: str, places: Sequence[int], device: torch.device) -> Stored | None:
    """The stored values of these places, end to end."""
    if term.reference is None:
        return None
    rows = [term.reference[text, place] for place in places]
    return Stored(_joined([row.logp_n for row in rows], device), _joined([row.states_nD for row in rows], device))


def _joined(rows: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    present = [row for row in rows if row is not None]
    return torch.cat(present).to(device) if present else None
