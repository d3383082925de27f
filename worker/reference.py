"""What the reference model says of the rows of a job, computed once and kept: the model that the job starts from.

Log-probabilities take four bytes per counted token; a loss on whole distributions or hidden states needs the states that
those come from. They lie below the job's own prefix of the storage, named by a digest of all that they depend on, so that a
second attempt finds the first one's; what lies there and is not what was written is computed again. Sealed, names too: what
a model says of rows tells of the rows.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.domain.errors import NotFound, StorageUnavailable
from service.store.sealed import SealedStorage
from worker import data
from worker.data import Encoded
from worker.looks import adapter_digest
from worker.model import Network, adapter_off
from worker.views import Stored, Term, pack, views

FORMAT = 2  # of the stored values; raise it when what is computed here changes
TOKENS_AT_ONCE = 4_096  # padded positions
REFERENCE, STATES = "reference", "reference_states"
References = dict[tuple[str, int], Stored]


def needed(term: Term) -> bool:
    return bool(term.loss.needs & {REFERENCE, STATES})


def recall(
    storage: SealedStorage, prefix: str, scratch: Path, network: Network, term: Term, places: Sequence[int]
) -> Term:
    """The term with what the reference says of the rows at these places: stored, or computed and stored.

    Args:
        prefix: of the job, below the storage root.
        scratch: a folder for a copy that is mapped into memory rather than read: states of a large set are gigabytes.
    """
    if not needed(term):
        return term
    name = f"{storage.alias(digest(network, term, places))}.safetensors"
    key, local = f"{prefix}/reference/{name}", scratch / name
    if not _fetch(storage, key, local):
        save_file(compute(network, term, places), local)
        storage.put(key, local)
    return term._replace(reference=by_place(load_file(local), term, places))


@torch.no_grad()
def compute(network: Network, term: Term, places: Sequence[int]) -> dict[str, Tensor]:
    """TEXT/logp [N] and TEXT/states [N, D] over the counted tokens of all rows, in the order of the places, as needed.

    In the base's own type: a network that runs in full precision later differs from its reference by that rounding.
    """
    plain = {"rows": term._replace(reference=None)}
    starts = {text: _starts(encoded, places) for text, encoded in term.texts.items()}
    found: dict[str, Tensor] = {}
    at_once = min(TOKENS_AT_ONCE, network.tokens_at_once)
    for part in data.by_length([len(term.texts) * term.length(place) for place in places], at_once):
        packed = pack(plain, [("rows", places[i]) for i in part], network.device)
        with adapter_off(network):
            seen = views(network, packed, plain)["rows"]
            for text, view in seen.items():
                kinds = {}
                if REFERENCE in term.loss.needs:
                    kinds["logp"] = view.now.logp_N()
                if STATES in term.loss.needs:
                    kinds["states"] = view.now.hidden_ND()
                here = packed.shares["rows"][text].places
                counts = [term.texts[text].rows[place].counted for place in here]
                for kind, values in kinds.items():
                    whole = found.get(f"{text}/{kind}")
                    if whole is None:
                        size = (starts[text][None], *values.shape[1:])
                        whole = found[f"{text}/{kind}"] = values.new_empty(size, device="cpu")
                    for place, of_row in zip(here, torch.split(values.cpu(), counts), strict=True):
                        whole[starts[text][place] :][: len(of_row)] = of_row
    return found


def _starts(encoded: Encoded, places: Sequence[int]) -> dict[int | None, int]:
    """Where each place's tokens begin; None: where the last ones end."""
    ends = accumulate((encoded.rows[place].counted for place in places), initial=0)
    return dict(zip([*places, None], ends, strict=True))


def digest(network: Network, term: Term, places: Sequence[int]) -> str:
    """Of everything that the values depend on: the base and a parent's adapter on it, its type and device, the code, and the
    very tokens."""
    said = hashlib.sha256()
    facts = (FORMAT, torch.__version__, transformers.__version__, network.digest, network.dtype, network.device.type)
    with adapter_off(network):
        parent = adapter_digest(network)
    said.update(json.dumps([*facts, parent, sorted(term.loss.needs), term.loss.depth]).encode())
    for text, encoded in sorted(term.texts.items()):
        for place in places:
            row = encoded.rows[place]
            said.update(json.dumps([text, place, row.ids, row.answer_start]).encode())
    return said.hexdigest()


def _fetch(storage: SealedStorage, key: str, local: Path) -> bool:
    """Copies what is stored; False: it is not there, or not what was written."""
    try:
        with local.open("wb") as file:
            file.writelines(storage.read(key))
    except (NotFound, StorageUnavailable):
        return False
    return True


def by_place(tensors: Mapping[str, Tensor], term: Term, places: Sequence[int]) -> References:
    """What `compute` found, row by row."""
    reference: References = {}
    for text, encoded in term.texts.items():
        counts = [encoded.rows[place].counted for place in places]
        split = {
            kind: torch.split(tensors[f"{text}/{kind}"], counts)
            for kind in ("logp", "states")
            if f"{text}/{kind}" in tensors
        }
        for i, place in enumerate(places):
            logp, states = split.get("logp"), split.get("states")
            reference[text, place] = Stored(None if logp is None else logp[i], None if states is None else states[i])
    return reference
