"""What the engine asks of a decoder beyond a plain forward pass, and whether this one can do it.

Decided by evidence where that is cheap: a decoder that reads a small tree as it reads its rows one by one reads trees. What a
small probe cannot see (windows, frequencies that change with the length) is read from the config. Where the answer is
no, rows are read one by one and generation is the library's own.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from service.domain import microbatches
from worker import trees
from worker.cache import PreallocatedLayer
from worker.model import Network
from worker.trees import Forest, Tree

PROBE_TOKENS = 100
PROBE = ([2, 3, 4, 5, 6, 7], [2, 3, 4, 6, 5], [2, 3, 4, 5, 6, 4, 3])  # three rows that begin alike
TOLERANCE, LOW_TOLERANCE = 1e-4, 5e-2  # of the largest state; in half precision the order of sums shows
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")  # names of it in configs
RESCALED = frozenset({"dynamic", "longrope"})  # kinds of rotary positions that depend on the longest row of a batch


def states(network: Network, input_ids_BT: Tensor, lengths: Sequence[int], inner: bool = False) -> tuple[Tensor, ...]:
    """What the head reads of rows padded on the right, [B, T, D], and with `inner` what every layer does, the embeddings first.

    Each row says what it says alone. Where rotary positions are rescaled for the longest row of a batch, one that is long enough
    for that is read with rows of its own length only.

    Args:
        input_ids_BT: on the network's device.
        lengths: of the rows, without padding.
    """
    limit = rescaled_at(network)
    alike: dict[int, list[int]] = {}
    for b, length in enumerate(lengths):
        alike.setdefault(length if length > limit else 0, []).append(b)
    if len(alike) == 1:
        return _states(network, input_ids_BT, inner)
    padded = input_ids_BT.shape[1]
    parts = []
    for rows in alike.values():
        width = max(lengths[b] for b in rows)
        read = _states(network, input_ids_BT[rows, :width], inner)
        parts.append([pad(layer_BTD, (0, 0, 0, padded - width)) for layer_BTD in read])
    back = torch.tensor([b for rows in alike.values() for b in rows], device=network.device).argsort()
    return tuple(torch.cat(layers)[back] for layers in zip(*parts, strict=True))


def _states(network: Network, input_ids_BT: Tensor, inner: bool) -> tuple[Tensor, ...]:
    reset_positions(network, input_ids_BT.shape[1])
    out = network.causal.get_decoder()(input_ids=input_ids_BT, use_cache=False, output_hidden_states=inner)
    return (out.last_hidden_state, *(out.hidden_states if inner else ()))


@torch.no_grad()
def reset_positions(network: Network, longest: int) -> None:
    """Call it before rows of at most so many tokens: dynamic positions keep the scale of the longest row so far until they
    see a short one.
    """
    if longest >= rescaled_at(network):
        network.causal.get_decoder()(
            input_ids=torch.zeros(1, 1, dtype=torch.int64, device=network.device), use_cache=False
        )


def read(network: Network, forest: Forest, kept: DynamicCache | None = None) -> Tensor:
    """What the head reads, [B*T, D].

    Args:
        kept: an empty cache, which gets the keys and values; of rows that are not long enough for rescaled positions.
    """
    input_ids_BT = forest.input_ids_BT.to(network.device)
    given: dict[str, Tensor] = {}
    if forest.seen_BTT is not None:
        dtype = network.causal.get_input_embeddings().weight.dtype
        hidden_BTT = torch.zeros(forest.seen_BTT.shape, dtype=dtype).masked_fill_(~forest.seen_BTT, -torch.inf)
        given["attention_mask"] = hidden_BTT[:, None].to(network.device)
        given["position_ids"] = forest.positions_BT.to(network.device)
    elif kept is None:
        lengths_B = forest.positions_BT.amax(1) + 1
        return states(network, input_ids_BT, lengths_B.tolist())[0].flatten(0, 1)
    states_BTD: Tensor = network.causal.get_decoder()(
        input_ids=input_ids_BT, past_key_values=kept, use_cache=kept is not None, **given
    ).last_hidden_state
    return states_BTD.flatten(0, 1)


def grown(network: Network, rows: Sequence[list[int]], max_tokens: int) -> list[Tree]:
    """Trees of the rows where that saves something and the decoder reads them; else each row by itself."""
    found = trees.grow(rows, pairs_per_token(network), max_tokens)
    if len(found) == len(rows) or not reads_trees(network, max(map(len, rows))):
        return trees.single(rows)
    return found


def _found_once(probe: Callable[[Network], bool]) -> Callable[[Network], bool]:
    """Of each model that is loaded: what its weights are changes nothing of what its decoder can do."""
    found = WeakKeyDictionary[Any, bool]()

    def known(network: Network) -> bool:
        if network.causal not in found:
            found[network.causal] = probe(network)
        return found[network.causal]

    return known


def reads_trees(network: Network, longest: int) -> bool:
    """Whether rows of at most so many tokens say the same in a tree as alone."""
    return longest <= min(window(network), rescaled_at(network)) and _reads_a_tree(network)


@_found_once
@torch.no_grad()
def _reads_a_tree(network: Network) -> bool:
    (tree,) = trees.grow(PROBE, pairs_per_token=float("inf"), max_tokens=PROBE_TOKENS)
    try:
        shared_ND = read(network, trees.plant([tree]))
    except Exception:  # there is no common type for "this forward pass takes no such mask"
        return False
    return all(_agree(network, PROBE[i], shared_ND[path]) for i, path in zip(tree.rows, tree.paths, strict=True))


def caches(network: Network, longest: int) -> bool:
    """Whether rows of at most so many tokens say the same if they go on, padded, from the keys and values of their beginnings.

    Also whether what was kept can be dropped again, from the end and by row.
    """
    return longest <= rescaled_at(network) and _goes_on(network)


@_found_once
@torch.no_grad()
def _goes_on(network: Network) -> bool:
    short, long = PROBE[1:]
    wrong = 2
    try:
        begun = prefilled(network, [short[:-1], long[:-1]], PROBE_TOKENS)
        mask_BS = torch.cat([begun.mask_BS, torch.ones(2, 2, dtype=torch.int64)], 1)
        last_BTD = step(network, begun.kept, torch.tensor([[short[-1], wrong], [long[-1], wrong]]), mask_BS)[:, :1]
        begun.kept.crop(-1)
        begun.kept.batch_select_indices(torch.tensor([1], device=network.device))
    except Exception:  # as above: "this model has no such cache"
        return False
    return _agree(network, short, last_BTD[0]) and _agree(network, long, last_BTD[1])


def _agree(network: Network, ids: Sequence[int], states_TD: Tensor) -> bool:
    """Whether these are the row's last states as the decoder reads it alone."""
    alone_TD = read(network, trees.plant(trees.single([ids])))[-len(states_TD) :]
    tolerance = LOW_TOLERANCE if alone_TD.dtype in (torch.bfloat16, torch.float16) else TOLERANCE
    return bool((states_TD - alone_TD).abs().max() <= tolerance * alone_TD.abs().max())


class Prefilled(NamedTuple):
    """Rows that were read, padded on the left."""

    kept: DynamicCache
    mask_BS: Tensor  # 1 where there is a token
    last_BD: Tensor  # states of the rows' last tokens


def prefilled(network: Network, rows: Sequence[list[int]], at_once: int) -> Prefilled:
    """Keys and values of the rows; what rows begin with in common is read once.

    Layers that attend to a window keep all tokens, too: what lies outside it their mask hides.

    Args:
        at_once: positions, at most.
    """
    width = max(map(len, rows))
    found = grown(network, rows, at_once)
    layers, last = list[PreallocatedLayer](), dict[int, Tensor]()
    for part in microbatches.microbatches([len(tree.ids) for tree in found], overhead_tokens(network), at_once):
        forest, own = trees.plant([found[k] for k in part]), DynamicCache()
        last_PD, length = read(network, forest, own), forest.input_ids_BT.shape[1]
        read_layers: list[Any] = own.layers
        paths = {
            i: [b * length + t for t in path]
            for b, k in enumerate(part)
            for i, path in zip(found[k].rows, found[k].paths, strict=True)
        }
        at_RS = torch.tensor([[0] * (width - len(path)) + path for path in paths.values()], device=network.device)
        last |= dict(zip(paths, last_PD[at_RS[:, -1]], strict=True))
        layers = layers or [PreallocatedLayer(one.keys, one.values, len(rows), width) for one in read_layers]
        for layer, one in zip(layers, read_layers, strict=True):
            layer.fill(list(paths), one.keys, one.values, at_RS)
    kept = DynamicCache()
    kept.layers.extend(layers)
    mask_BS = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Prefilled(kept, mask_BS, torch.stack([last[i] for i in range(len(rows))]))


def joined(parts: Sequence[tuple[DynamicCache, Tensor]]) -> tuple[DynamicCache, Tensor]:
    """Rows of several prefilled caches, with their masks, in one. They are emptied: no more than a layer is there twice."""
    trimmed = [mask_BS[:, int(mask_BS.any(0).int().argmax()) :] for _, mask_BS in parts]
    width = max(mask_BS.shape[1] for mask_BS in trimmed)
    layers, found = [list[Any](kept.layers) for kept, _ in parts], DynamicCache()
    for kept, _ in parts:
        kept.layers.clear()
    while layers[0]:
        found.layers.append(PreallocatedLayer.joined([of.pop(0) for of in layers], width))
    return found, torch.cat([pad(mask_BS, (width - mask_BS.shape[1], 0)) for mask_BS in trimmed])


def step(network: Network, kept: DynamicCache, ids_BT: Tensor, mask_BS: Tensor) -> Tensor:
    """Reads on from what is kept, and keeps it, too: the last states [B, T, D].

    Args:
        mask_BS: over what is kept and the new tokens: 1 where there is a token. It counts the positions.
    """
    mask_BS = mask_BS.to(network.device)
    positions_BT = (mask_BS.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
    states_BTD: Tensor = network.causal.get_decoder()(
        input_ids=ids_BT.to(network.device),
        attention_mask=mask_BS,
        position_ids=positions_BT,
        past_key_values=kept,
        use_cache=True,
    ).last_hidden_state
    return states_BTD


def window(network: Network) -> float:
    """From how many tokens on a layer no longer attends to the first."""
    config = network.causal.config.get_text_config()
    limits = [limit for name in WINDOWS if isinstance(limit := getattr(config, name, None), int) and limit > 0]
    return min(limits, default=float("inf"))


def rescaled_at(network: Network) -> float:
    """From how many tokens on what a position reads depends on the longest row of its batch."""
    config = network.causal.config.get_text_config()
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in (rope, *(value for value in rope.values() if isinstance(value, dict)))
        if kind.get("rope_type") in RESCALED
    ]
    return min(limits, default=float("inf"))


def pairs_per_token(network: Network) -> float:
    """How many pairs of positions a layer attends over for the price of one token.

    A layer of width D has about 12 D^2 weights, hence 24 D^2 operations for a token; a pair costs 4 D, and takes twice the
    time that a product does for them.
    """
    width: int = network.causal.config.get_text_config().hidden_size
    return 3.0 * width


def overhead_tokens(network: Network) -> float:
    """So many tokens take as long as one more pass."""
    layers: int = network.causal.config.get_text_config().num_hidden_layers
    return microbatches.overhead_tokens(network.device.type, layers, network.parameters)


def position_bytes(network: Network) -> int:
    """What the keys and values of a token take."""
    config = network.causal.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element: int = network.causal.get_input_embeddings().weight.element_size()
    return int(2 * config.num_hidden_layers * heads * size * element)


def positions_max(network: Network) -> int:
    """How long a row can be. Learned positions end with the context; computed ones go on, beyond what was trained."""
    inputs = network.causal.get_input_embeddings()
    learned = any(
        isinstance(module, nn.Embedding) and module is not inputs and ("pos" in name or name.endswith("wpe"))
        for name, module in network.causal.named_modules()
    )
    return network.context_tokens if learned else sys.maxsize
