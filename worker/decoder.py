"""What the engine asks of a decoder beyond a plain forward pass, and whether this one can do it.

Decided by evidence where that is cheap: a decoder that reads a small tree as it reads its rows one by one reads trees. What a
small probe cannot see (windows, frequencies that change with the length) is read from the config. Where the answer is
no, rows are read one by one and generation is the library's own.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from worker import trees
from worker.model import Network
from worker.trees import Forest

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


def read(network: Network, forest: Forest) -> Tensor:
    """What the head reads, [B*T, D]."""
    input_ids_BT = forest.input_ids_BT.to(network.device)
    if forest.seen_BTT is None:
        lengths_B = forest.positions_BT.amax(1) + 1
        return states(network, input_ids_BT, lengths_B.tolist())[0].flatten(0, 1)
    dtype = network.causal.get_input_embeddings().weight.dtype
    hidden_BTT = torch.zeros(forest.seen_BTT.shape, dtype=dtype).masked_fill_(~forest.seen_BTT, -torch.inf)
    states_BTD: Tensor = network.causal.get_decoder()(
        input_ids=input_ids_BT,
        attention_mask=hidden_BTT[:, None].to(network.device),
        position_ids=forest.positions_BT.to(network.device),
        use_cache=False,
    ).last_hidden_state
    return states_BTD.flatten(0, 1)


@torch.no_grad()
def reads_trees(network: Network, longest: int) -> bool:
    """Whether rows of at most so many tokens say the same in a tree as alone."""
    if longest > min(window(network), rescaled_at(network)):
        return False
    (tree,) = trees.grow(PROBE, pairs_per_token=float("inf"), max_tokens=100)
    try:
        shared_ND = read(network, trees.plant([tree]))
    except Exception:  # there is no common type for "this forward pass takes no such mask"
        return False
    return all(_agree(network, PROBE[i], shared_ND[path]) for i, path in zip(tree.rows, tree.paths, strict=True))


@torch.no_grad()
def caches(network: Network, longest: int) -> bool:
    """Whether rows of at most so many tokens say the same if they go on, padded, from the keys and values of a common prefix.

    Also whether what was kept can be dropped again, from the end and by row.
    """
    short, long = PROBE[1:]
    if longest > rescaled_at(network):
        return False
    try:
        kept = prefilled(network, PROBE[0][:3])
        kept.batch_repeat_interleave(2)
        gap = len(long) - len(short)
        mask_BS = torch.tensor([[1] * (len(short) - 1) + [0] * gap, [1] * (len(long) - 1)])
        step(network, kept, torch.tensor([short[3:-1] + [0] * gap, long[3:-1]]), mask_BS)
        wrong = [2] if window(network) > len(long) + 1 else []  # a cache that is full of its window is not cropped
        mask_BS = torch.cat([mask_BS, torch.ones(2, 1 + len(wrong), dtype=torch.int64)], 1)
        last_BTD = step(network, kept, torch.tensor([[short[-1], *wrong], [long[-1], *wrong]]), mask_BS)[:, :1]
        if wrong:
            kept.crop(-len(wrong))
        kept.batch_select_indices(torch.tensor([1], device=network.device))
    except Exception:  # as above: "this model has no such cache"
        return False
    return _agree(network, short, last_BTD[0]) and _agree(network, long, last_BTD[1])


def _agree(network: Network, ids: Sequence[int], states_TD: Tensor) -> bool:
    """Whether these are the row's last states as the decoder reads it alone."""
    alone_TD = read(network, trees.plant(trees.single([ids])))[-len(states_TD) :]
    tolerance = LOW_TOLERANCE if alone_TD.dtype in (torch.bfloat16, torch.float16) else TOLERANCE
    return bool((states_TD - alone_TD).abs().max() <= tolerance * alone_TD.abs().max())


def prefilled(network: Network, ids: Sequence[int]) -> DynamicCache:
    """The keys and values of one row; of none: an empty cache."""
    kept = DynamicCache(config=network.causal.config)
    if ids:
        step(network, kept, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))
    return kept


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


def positions_max(network: Network) -> int:
    """How long a row can be. Learned positions end with the context; computed ones go on, beyond what was trained."""
    inputs = network.causal.get_input_embeddings()
    learned = any(
        isinstance(module, nn.Embedding) and module is not inputs and ("pos" in name or name.endswith("wpe"))
        for name, module in network.causal.named_modules()
    )
    return network.context_tokens if learned else sys.maxsize
