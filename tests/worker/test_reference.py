"""What the reference says is that of the base, is computed once, and is found again only if it is what was written."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

from service.domain.job import Lora, PromptFormat
from service.domain.rows import Example
from service.store.sealed import SealedStorage
from worker import data, model, reference, views
from worker.data import Encoded
from worker.losses.retain.nll import nll
from worker.model import Network, adapter_off
from worker.tokens import Loss
from worker.views import Term

ROWS = ["Who?| Paris and Lima.", "Where was she born?| In Lima", "?| Paris"]
REFUSED = ["Who?| I cannot say.", "Where was she born?| No", "?| I do not know"]
PREFIX = "jobs/j1"


def encode(network: Network, rows: list[str]) -> Encoded:
    return data.encode([Example("question", *row.split("|")) for row in rows], network.tokenizer, PromptFormat(), 128)


@pytest.fixture
def network(tiny: Network) -> Network:
    """With an adapter that does something, which the reference must not show."""
    adapted = model.adapt(tiny, Lora(r=2), 0)
    generator = torch.Generator().manual_seed(1)
    model.assign(adapted, {n: torch.randn(p.shape, generator=generator) for n, p in model.trainable(adapted).items()})
    return adapted


def term(network: Network, *needs: str, depth: float = 1.0) -> Term:
    texts = {"answer": encode(network, ROWS), "refusal": encode(network, REFUSED)}
    return Term(Loss(nll().fn, per="token", needs=frozenset(needs), depth=depth), texts)


def logits(network: Network, ids: list[int]) -> Tensor:
    with adapter_off(network), torch.no_grad():
        return network.causal(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :, : network.vocabulary]  # type: ignore[no-any-return]


@pytest.fixture
def storage(tmp_path: Path) -> SealedStorage:
    return SealedStorage(str(tmp_path), bytes(32))


def recall(storage: SealedStorage, network: Network, term: Term, places: list[int]) -> Term:
    with TemporaryDirectory() as scratch:
        return reference.recall(storage, PREFIX, Path(scratch), network, term, places)


@pytest.mark.parametrize("at_once", [1, 10_000])
def test_log_probabilities_are_those_of_the_base(
    network: Network, storage: SealedStorage, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "TOKENS_AT_ONCE", at_once)
    recalled = recall(storage, network, term(network, "reference"), [2, 0, 1])
    assert recalled.reference is not None
    for text, encoded in recalled.texts.items():
        for place, row in enumerate(encoded.rows):
            logp_TV = logits(network, row.ids).log_softmax(-1)[row.answer_start - 1 : -1]
            expected = logp_TV.gather(1, torch.tensor(row.ids[row.answer_start :])[:, None])[:, 0]
            stored = recalled.reference[text, place]
            torch.testing.assert_close(stored.logp_n, expected)
            assert stored.states_nD is None, "what is not needed is not kept"


def test_its_logits_come_from_stored_states(network: Network, storage: SealedStorage) -> None:
    recalled = recall(storage, network, term(network, "reference_states"), [0, 1, 2])
    part = views.pack({"t": recalled}, [("t", 1), ("t", 0)], network.device)
    view = views.views(network, part, {"t": recalled})["t"]["refusal"]
    assert view.reference is not None
    largest_N = view.reference.map_logits(lambda y_n, z_nV: z_nV.max(-1).values)
    expected = [logits(network, row.ids)[row.answer_start - 1 : -1] for row in encode(network, REFUSED).rows]
    torch.testing.assert_close(largest_N, torch.cat([expected[1], expected[0]]).max(-1).values)
    ours_N = view.now.map_logits(lambda y_n, z_nV, theirs_nV: (z_nV - theirs_nV).abs().max(-1).values, view.reference)
    assert ours_N.min() > 1e-3, "the adapter makes a difference"


def test_inner_states_are_those_at_the_losss_depth(network: Network, storage: SealedStorage) -> None:
    recalled = recall(storage, network, term(network, "reference_states", depth=0.5), [0])
    row = recalled.encoded.rows[0]
    with adapter_off(network), torch.no_grad():
        out = network.causal(input_ids=torch.tensor([row.ids]), output_hidden_states=True, use_cache=False)
    assert recalled.reference is not None
    torch.testing.assert_close(
        recalled.reference["answer", 0].states_nD, out.hidden_states[1][0, row.answer_start - 1 : -1]
    )


def test_a_loss_gets_no_more_of_the_reference_than_it_says_it_needs(network: Network, storage: SealedStorage) -> None:
    recalled = recall(storage, network, term(network, "reference"), [0])
    part = views.pack({"t": recalled}, [("t", 0)], network.device)
    seen = views.views(network, part, {"t": recalled})["t"]["answer"].reference
    assert seen is not None
    with pytest.raises(LookupError, match="reference_states"):
        seen.hidden_ND()
    with pytest.raises(LookupError, match="reference_states"):
        seen.margin_N()
    now = views.views(network, part, {"t": recalled})["t"]["answer"].now
    with pytest.raises(LookupError, match="reference_states"):
        now.map_logits(lambda y_n, z_nV, theirs_nV: z_nV.sum(-1), seen)
    plain = term(network)
    assert recall(storage, network, plain, [0]) is plain, "nothing is computed for nothing"


def test_a_second_attempt_finds_what_the_first_one_stored(
    network: Network, storage: SealedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = recall(storage, network, term(network, "reference"), [0, 1, 2])
    monkeypatch.setattr(reference, "compute", lambda *_: pytest.fail("computed again"))
    second = recall(storage, network, term(network, "reference"), [0, 1, 2])
    assert first.reference is not None
    assert second.reference is not None
    for key, stored in first.reference.items():
        assert stored.logp_n is not None
        again = second.reference[key].logp_n
        assert again is not None
        assert torch.equal(stored.logp_n, again)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_what_is_damaged_is_computed_again(network: Network, tmp_path: Path, damage: str) -> None:
    storage = SealedStorage(str(tmp_path), bytes(32))
    first = recall(storage, network, term(network, "reference"), [0])
    (path,) = (tmp_path / PREFIX / "reference").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-3]), "empty": b""}[damage])
    second = recall(storage, network, term(network, "reference"), [0])
    assert first.reference is not None
    assert second.reference is not None
    torch.testing.assert_close(second.reference["answer", 0].logp_n, first.reference["answer", 0].logp_n)


def test_other_rows_needs_depths_or_models_are_other_files(network: Network) -> None:
    plain = term(network, "reference")
    digests = [
        reference.digest(network, plain, [0, 1]),
        reference.digest(network, plain, [0, 2]),
        reference.digest(network, term(network, "reference_states"), [0, 1]),
        reference.digest(network, term(network, "reference_states", depth=0.5), [0, 1]),
        reference.digest(network._replace(digest="sha256:0"), plain, [0, 1]),
        reference.digest(network._replace(dtype="bfloat16"), plain, [0, 1]),
    ]
    assert len(set(digests)) == len(digests)
    assert reference.digest(network, term(network, "reference"), [0, 1]) == digests[0]
