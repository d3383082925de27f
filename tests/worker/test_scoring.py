"""Every view of every row against the plain computation of one row at a time in float64."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from service.domain.job import Lora
from service.domain.rows import Example
from worker import decoder, head, model, scoring, trees
from worker.data import TokenRow
from worker.model import Network
from worker.scores import Scores
from worker.suite import Ask

ALL = frozenset({"hits", "logp", "standardised", "gradient_norm", "labels"})
MOE = {"num_experts_per_tok": 1, "moe_intermediate_size": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 24},  # learned positions with an offset
    "gemma2": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0, "sliding_window": 64},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2} | MOE,
    "qwen2_moe": {"num_experts": 2} | MOE,
    "gemma3_text": {"sliding_window": 8},  # shorter than the rows
    "bloom": {"n_layer": 2, "n_head": 2},  # positions are in a bias of the attention
}
SHARING = {"llama", "gpt2", "opt", "gemma2", "mistral", "mixtral", "qwen2_moe"}


def rows_of(*texts: Sequence[int], answer_start: int = 3) -> list[TokenRow]:
    return [TokenRow(list(ids), answer_start) for ids in texts]


QUESTION = list(range(10, 22))
ROWS = [
    *rows_of(
        [*QUESTION, 40, 41, 42, 43, 1],
        [*QUESTION, 40, 41, 50, 1],
        [*QUESTION, 60, 61, 62, 63, 64, 65, 1],
        [*QUESTION, 40, 41],  # a row that is a prefix of others
        answer_start=12,
    ),
    *rows_of([*QUESTION[:5], 70, 71, 1], [99, 98, 97, 96, 95, 1], [99, 98, 97, 96, 95, 1]),  # the last two are the same
    TokenRow([*QUESTION, 40, 41, 42, 43, 1], 1),  # the first again, but all of it counts
    TokenRow([7, 8, 9, 10, 11], 2, ends=False),
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def network(request: pytest.FixtureRequest, register: Any) -> Network:
    return load(register, request.param)


def load(register: Any, architecture: str) -> Network:
    # the library's experts are not written for float64
    dtype = "float32" if "num_experts_per_tok" in ARCHITECTURES[architecture] else "float64"
    network: Network = register(architecture, **ARCHITECTURES[architecture]).load(dtype)
    return network


def tolerance(network: Network) -> float:
    return 1e-6 if network.dtype == "float64" else 1e-4


def plain(network: Network, row: TokenRow, with_gradient: bool = True) -> dict[str, Any]:
    """One row, whole logits, textbook formulas, in the model's type."""
    parameters = [p for name, p in network.causal.named_parameters() if ".lora_" not in name]
    for p in parameters:
        p.requires_grad_(with_gradient)
    try:
        with torch.set_grad_enabled(with_gradient):
            z_TV = network.causal(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :, : network.vocabulary]
            logp_NV = z_TV[row.answer_start - 1 : -1].log_softmax(-1)
            y_N = torch.tensor(row.ids[row.answer_start :])
            logp_N = logp_NV[torch.arange(len(y_N)), y_N]
            end = len(y_N) - row.ends
            gradients = torch.autograd.grad(logp_N[:end].mean(), parameters, allow_unused=True) if with_gradient else []
    finally:
        for p in parameters:
            p.requires_grad_(False)
    logp_N, logp_NV = logp_N.detach().double(), logp_NV.detach().double()
    mean_N = (logp_NV.exp() * logp_NV).sum(-1)
    variance_N = (logp_NV.exp() * (logp_NV - mean_N[:, None]).square()).sum(-1)
    norms = [float(g.norm()) for g in gradients if g is not None]
    return {
        "nll": -float(logp_N.sum()),
        "logp": logp_N[:end],
        "hits": (logp_NV.argmax(-1) == y_N)[:end],
        "standardised": ((logp_N - mean_N) / variance_N.clamp(min=1e-6).sqrt())[:end],
        "gradient_norm": sum(norms) / max(len(norms), 1),
    }


def assert_same(scores: Scores, rows: Sequence[TokenRow], expected: Sequence[dict[str, Any]], within: float) -> None:
    assert scores.logp
    assert scores.hits
    assert scores.standardised
    assert scores.gradient_norm_B is not None
    close: dict[str, Any] = {"rtol": within, "atol": within, "check_dtype": False}
    assert scores.counted_B.tolist() == [row.counted for row in rows]
    torch.testing.assert_close(
        scores.nll_B, torch.tensor([one["nll"] for one in expected], dtype=torch.float64), **close
    )
    gradient_norm_B = torch.tensor([one["gradient_norm"] for one in expected], dtype=torch.float64)
    torch.testing.assert_close(scores.gradient_norm_B, gradient_norm_B, **close)
    for i, one in enumerate(expected):
        torch.testing.assert_close(scores.logp[i], one["logp"], **close)
        torch.testing.assert_close(scores.standardised[i], one["standardised"], **close)
        assert scores.hits[i].tolist() == one["hits"].tolist()


def test_every_view_of_every_row(network: Network) -> None:
    assert_same(scoring.score(network, ROWS, ALL), ROWS, [plain(network, row) for row in ROWS], tolerance(network))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_which_decoders_read_trees(architecture: str, register: Any) -> None:
    network = load(register, architecture)
    assert decoder.reads_trees(network, max(len(row.ids) for row in ROWS)) is (architecture in SHARING)


def test_a_window_or_positions_that_depend_on_the_batch_end_sharing(register: Any) -> None:
    short = register("mistral", sliding_window=12).load()
    assert decoder.reads_trees(short, 12)
    assert not decoder.reads_trees(short, 13)
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    dynamic = register("llama", rope_parameters=scaled).load()
    assert decoder.reads_trees(dynamic, 16)
    assert not decoder.reads_trees(dynamic, 17)


def test_shared_or_alone_in_any_order(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    close = {"rtol": tolerance(network), "atol": tolerance(network)}
    whole = scoring.score(network, ROWS, ALL)
    order = list(range(len(ROWS)))
    random.Random(0).shuffle(order)
    shuffled = scoring.score(network, [ROWS[i] for i in order], ALL)
    monkeypatch.setattr(decoder, "reads_trees", lambda *_: False)
    monkeypatch.setattr(scoring, "SCORING_TOKENS", 40)  # and in batches of one to three
    alone = scoring.score(network, ROWS, ALL)
    for name in ("nll_B", "gradient_norm_B"):
        torch.testing.assert_close(getattr(whole, name), getattr(alone, name), **close)
        torch.testing.assert_close(getattr(whole, name)[order], getattr(shuffled, name), **close)
    for name in ("logp", "hits", "standardised"):
        for i, k in enumerate(order):
            torch.testing.assert_close(getattr(whole, name)[k], getattr(shuffled, name)[i], **close)
            torch.testing.assert_close(getattr(whole, name)[k], getattr(alone, name)[k], **close)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_in_less_precision(dtype: str, register: Any) -> None:
    """Against the same weights in float64; the views are float32."""
    low, exact = register().load(dtype), register().load()
    with torch.no_grad():
        for p, q in zip(exact.causal.parameters(), low.causal.parameters(), strict=True):
            p.copy_(q)
    scores = scoring.score(low, ROWS, ALL - {"hits"} if dtype != "float32" else ALL)
    assert scores.logp
    assert scores.standardised
    assert scores.gradient_norm_B is not None
    assert {row.dtype for row in (*scores.logp, *scores.standardised)} == {torch.float32}
    expected = [plain(exact, row) for row in ROWS]
    if dtype == "float32":
        assert_same(scores, ROWS, expected, 1e-4)
    for i, one in enumerate(expected):
        torch.testing.assert_close(scores.logp[i], one["logp"], rtol=0.05, atol=0.1, check_dtype=False)
        assert float(scores.gradient_norm_B[i]) == pytest.approx(one["gradient_norm"], rel=0.05)


def test_with_an_adapter_gradients_are_those_of_the_merged_model(register: Any) -> None:
    adapted = disturbed(register().load())
    lora = list(model.trainable(adapted).values())
    scores = scoring.score(adapted, ROWS, ALL)
    assert all(p.requires_grad and p.grad is None for p in lora), "training goes on as before"
    assert not any(p.requires_grad for name, p in adapted.causal.named_parameters() if ".lora_" not in name)
    assert adapted.peft is not None
    merged = adapted._replace(causal=adapted.peft.merge_and_unload(), peft=None)
    assert_same(scores, ROWS, [plain(merged, row) for row in ROWS], 1e-6)


def disturbed(base: Network) -> Network:
    network = model.adapt(base, Lora(r=4), 0)
    generator = torch.Generator().manual_seed(5)
    model.assign(
        network,
        {
            name: torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1
            for name, p in model.trainable(network).items()
        },
    )
    return network


# --- what is saved


def tokens_read(network: Network, do: Callable[[], object]) -> tuple[int, int]:
    """(forward passes, positions of the decoder) that it takes."""
    sizes: list[int] = []
    handle = network.causal.get_decoder().register_forward_pre_hook(
        lambda _module, _args, given: sizes.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        do()
    finally:
        handle.remove()
    return len(sizes), sum(sizes)


def test_what_rows_share_is_read_once_and_each_state_and_label_meets_the_head_once(
    tiny: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "reads_trees", lambda *_: True)  # without its probe
    seen: list[int] = []
    own = Network.predictions

    def counted(self: Network, last_ND: Tensor, *rest: Any) -> Any:
        seen.append(len(last_ND))
        return own(self, last_ND, *rest)

    monkeypatch.setattr(Network, "predictions", counted)
    rows = ROWS[:4]
    passes, positions = tokens_read(tiny, lambda: scoring.score(tiny, rows, frozenset({"hits"})))
    assert (passes, positions) == (1, 12 + 4 + 1 + 6), (
        "question, first answer, what is new in the second, and the third, each without its last token"
    )
    assert seen == [len({(tuple(row.ids[:t]), row.ids[t]) for row in rows for t in range(12, len(row.ids))})]


def test_a_row_shares_with_the_row_before_it_what_that_one_had_of_its_own() -> None:
    (tree,) = trees.grow([[1, 2, 3], [1, 4, 5], [1, 4, 6]], pairs_per_token=1e6, max_tokens=100)
    assert tree.ids == [1, 2, 3, 4, 5, 6]
    assert tree.paths == [[0, 1, 2], [0, 3, 4], [0, 3, 5]]
    assert tree.positions == [0, 1, 2, 1, 2, 2]


@pytest.mark.parametrize("chunk_bytes", [1, 400, 10**6])
def test_a_distribution_in_one_walk(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over chunks of the vocabulary, and over chunks of tokens where the head is more than a product; with a peaked row."""
    monkeypatch.setattr(head, "CACHED_BYTES", chunk_bytes)
    monkeypatch.setattr(head, "CHUNK_BYTES", chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    weight_VD, h_ND = (torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in (11, 5))
    h_ND[4] *= 40.0
    y_N = torch.tensor([0, 10, 3, 3, 7])
    logp_NV = (h_ND @ weight_VD.T).log_softmax(-1)
    mean_N = (logp_NV.exp() * logp_NV).sum(-1)
    variance_N = (logp_NV.exp() * (logp_NV - mean_N[:, None]).square()).sum(-1)
    for predicted in (
        head.FusedPredictions(h_ND, y_N, head.Head(weight_VD)),
        head.PlainPredictions(h_ND, y_N, lambda h_nD: h_nD @ weight_VD.T, 11),
    ):
        found = predicted.distribution()
        torch.testing.assert_close(found.logp_N, logp_NV.gather(1, y_N[:, None])[:, 0])
        torch.testing.assert_close(found.mean_N, mean_N)
        torch.testing.assert_close(found.variance_N, variance_N, rtol=1e-9, atol=1e-12)
        assert found.likeliest_N.tolist() == logp_NV.argmax(-1).tolist()


def test_a_weight_that_two_layers_share_is_one_parameter(tiny: Network) -> None:
    first, second = tiny.causal.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    found = scoring.gradient_norms(tiny, ROWS[:2])
    assert found.tolist() == pytest.approx([plain(tiny, row)["gradient_norm"] for row in ROWS[:2]], rel=1e-9)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_embeddings_gradient_is_that_of_all_tokens_but_padding(
    architecture: str, tied: bool, register: Any
) -> None:
    """In short rows, in one so long that the head's gradient is formed, and with tokens that stand there twice."""
    network = register(architecture, **ARCHITECTURES[architecture], tie_word_embeddings=tied).load()
    padding = network.causal.get_input_embeddings().padding_idx
    assert (padding is None) is (architecture == "gpt2")
    rows = [TokenRow([5, 1, 7, 7, 5, 1, 8, 1], 4), TokenRow([(7 * k) % 90 for k in range(120)], 2)]
    expected = [plain(network, row)["gradient_norm"] for row in rows]
    assert scoring.gradient_norms(network, rows).tolist() == pytest.approx(expected, rel=1e-9)


def test_rows_that_share_too_little_are_read_alone() -> None:
    long = [[1, *range(k, k + 300)] for k in (1000, 2000)]
    assert [tree.rows for tree in trees.grow(long, pairs_per_token=100, max_tokens=4096)] == [[0], [1]]
    assert [tree.rows for tree in trees.grow(long, pairs_per_token=1e6, max_tokens=4096)] == [[0, 1]]
    assert [tree.rows for tree in trees.grow(long, pairs_per_token=1e6, max_tokens=600)] == [[0], [1]]


def test_a_tree_holds_its_rows_and_shows_each_token_its_own_past() -> None:
    ids = [row.ids for row in ROWS]
    grown = trees.grow(ids, pairs_per_token=1e6, max_tokens=1000)
    forest = trees.plant(grown)
    assert forest.seen_BTT is not None
    assert sorted(i for tree in grown for i in tree.rows) == list(range(len(ROWS)))
    for b, tree in enumerate(grown):
        for i, path in zip(tree.rows, tree.paths, strict=True):
            assert forest.input_ids_BT[b, path].tolist() == ids[i]
            assert forest.positions_BT[b, path].tolist() == list(range(len(path)))
            for t, at in enumerate(path):
                assert torch.nonzero(forest.seen_BTT[b, at])[:, 0].tolist() == sorted(path[: t + 1])


# --- a look


def example(question: str, answer: str) -> Example:
    return Example("question", question, answer)


def test_a_look_at_several_texts_is_one_forward_pass(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "reads_trees", lambda *_: True)
    right = Ask({4: example("Where?", " Lima"), 1: example("Who?", " Ada")}, frozenset({"hits", "labels"}))
    wrong = Ask({4: example("Where?", " Paris"), 1: example("Who?", " Bob")}, frozenset({"logp"}))
    asks = {("forget", "answer"): right, ("forget", "wrong"): wrong}
    passes, _ = tokens_read(tiny, lambda: scoring.look(tiny, asks))
    assert passes == 1
    seen = scoring.look(tiny, asks)
    first, second = seen["forget", "answer"], seen["forget", "wrong"]
    assert first.places == second.places == [1, 4]
    assert (first.logp, first.standardised, second.hits, second.labels) == (None,) * 4, "what was not asked for"
    assert first.labels == {1: " Ada", 4: " Lima"}
    assert first.hits is not None
    assert [len(row) for row in first.hits] == [4, 1]
    assert first.generated is None


def test_a_text_that_cannot_be_measured_has_no_numbers_and_no_answer(register: Any) -> None:
    network = register("gpt2", **ARCHITECTURES["gpt2"]).load()
    texts = {
        0: example("Where?", " Lima"),
        1: Example("text", "", "She lives in Lima"),
        2: example("x" * 200, " Paris"),  # longer than there are positions
    }
    seen = scoring.look(network, {("forget", "answer"): Ask(texts, frozenset({"generated"}), 3, beyond_context=True)})
    scores = seen["forget", "answer"]
    assert scores.places == [0, 1]
    assert scores.generated is not None
    assert list(scores.generated) == [0]
    unscored = Ask({0: texts[0]}, frozenset({"generated"}), 3, scored=False)
    only = scoring.look(network, {("forget", "answer"): unscored})["forget", "answer"]
    assert (only.places, only.generated) == ([], {0: scores.generated[0]})
