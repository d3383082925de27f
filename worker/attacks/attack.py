"""What an attack on an unlearned model is, and the copies of a model that attacks are tried on."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from torch import nn

from service.domain.rows import Example
from worker import data
from worker.data import Encoded
from worker.model import Network


class Attack(NamedTuple):
    """It alters the model, or it asks in other words; what it measures are answers of forget rows.

    A `reason` says why it cannot be tried; the rest is then empty.
    """

    name: str
    setting: str  # in words
    rows: Sequence[Example] = ()  # that are measured, as they stand in the forget set
    wordings: Sequence[Sequence[Example]] = ()  # how each of them is asked under the attack; the largest value counts
    alter: Callable[[Network], Network] = lambda network: network  # the attacked model, never the given one altered
    trained: Sequence[Example] = ()  # what the model is fine-tuned on
    reason: str | None = None


def encode(network: Network, wordings: Sequence[Sequence[Example]]) -> tuple[list[Encoded], list[int]]:
    """Token rows of each wording, and the places that can be measured in all of them: a token counts, the context suffices."""
    encoded = [data.encode(texts, network.tokenizer, network.entry.prompt_format, None) for texts in wordings]
    fits = [{i for i in one.measured if len(one.rows[i].ids) <= network.context_tokens} for one in encoded]
    return encoded, sorted(set[int].intersection(*fits))


def unadapted(network: Network) -> Network:
    """The base as a network of its own. It shares all weights with the given one and takes no memory of its own."""
    causal = _copy(network.causal if network.peft is None else network.peft)
    return network._replace(causal=causal if network.peft is None else causal.unload(), peft=None)


def merged(network: Network) -> Network:
    """The model with its adapter merged, as PEFT merges: what somebody holds who was given the unlearned model.

    The given network stays as it is to the bit: PEFT's `merge_adapter` followed by `unmerge_adapter` would not do, because
    sums in bfloat16 are rounded and subtracting does not bring the lost bits back. For as long as the copy lives, its merged
    layers are a second time in memory; everything else is shared.
    """
    if network.peft is None:
        return unadapted(network)
    # A safe merge adds into a clone of the weight and puts that into the copy's own parameter.
    return network._replace(causal=_copy(network.peft).merge_and_unload(safe_merge=True), peft=None)


def _copy(module: Any) -> Any:
    """Modules and parameters of its own, on the storage of the given one's tensors."""
    own = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    return deepcopy(module, {**own, **{id(buffer): buffer for buffer in module.buffers()}})
