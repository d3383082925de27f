"""A check against the plain computation; what a sample may promise."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from service.domain.job import Lora, PromptFormat
from service.domain.rows import Example
from worker import data, head, measure, model
from worker.data import Encoded, TokenRow
from worker.losses.forget.margin_flattening import margin_flattening
from worker.losses.retain.nll import nll
from worker.model import Network
from worker.scores import Scores
from worker.views import Term

ROWS = ["Who?| Paris and Lima.", "Where was she born?| In Lima", "?| Paris", "Which of her books?| a", "Is it?| It is"]


def encode(network: Network, rows: Sequence[str], assistant_start: str = "Answer:") -> Encoded:
    examples = [Example("question", *row.split("|")) for row in rows]
    return data.encode(examples, network.tokenizer, PromptFormat(assistant_start=assistant_start), 128)


def plain_term(encoded: Encoded) -> Term:
    return Term(nll(), {"answer": encoded})


def flattened(encoded: Encoded) -> Term:
    return Term(margin_flattening(), {"answer": encoded})


# --- against the plain computation


def plain_logits(network: Network, row: TokenRow) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out_TV = network.causal(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :, : network.vocabulary]
    return out_TV[row.answer_start - 1 : -1], torch.tensor(row.ids[row.answer_start :])


@pytest.mark.parametrize("positions_at_once", [1, 60, 100_000])
def test_a_scoring_pass(tiny: Network, positions_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "POSITIONS_AT_ONCE", positions_at_once)
    encoded = encode(tiny, ROWS)
    places = [3, 0, 4, 1]  # out of order, one left out
    scores, objective = measure.score(tiny, flattened(encoded), places)
    assert scores.places == places
    squares = []
    for place, row_nll, count in zip(places, scores.nll_B, scores.counted_B, strict=True):
        z_nV, y_n = plain_logits(tiny, encoded.rows[place])
        assert row_nll.item() == pytest.approx(torch.nn.functional.cross_entropy(z_nV, y_n, reduction="sum").item())
        assert count == len(y_n)
        squares.append((z_nV.max(-1).values - z_nV.mean(-1)).square())
    assert objective == pytest.approx(torch.cat(squares).mean().item(), rel=1e-9)
    assert not scores.nll_B.requires_grad


def test_the_head_gives_each_token_its_probability_once(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """The NLL of a set is its scores and, in the retain set, its loss as well."""
    seen: list[int] = []
    once = head._logp
    monkeypatch.setattr(head, "_logp", lambda h_ND, *rest, **how: seen.append(len(h_ND)) or once(h_ND, *rest, **how))  # type: ignore[func-returns-value]
    encoded = encode(tiny, ROWS)
    measure.score(tiny, plain_term(encoded), encoded.measured)
    assert sum(seen) == encoded.counted


def test_a_check_measures_what_it_says(tiny: Network) -> None:
    network = model.adapt(tiny, Lora(), 0)
    forget, retain = encode(network, ROWS[:2]), encode(network, ROWS[2:])
    found = measure.measure(network, measure.sets(flattened(forget), flattened(retain), 0))
    losses = [torch.nn.functional.cross_entropy(*plain_logits(network, row), reduction="none") for row in forget.rows]
    assert found.forget_probability == pytest.approx(sum(math.exp(-row.mean()) for row in losses) / 2)
    losses = [torch.nn.functional.cross_entropy(*plain_logits(network, row), reduction="none") for row in retain.rows]
    assert found.retain_loss == found.retain_upper == pytest.approx(torch.cat(losses).mean().item())


def test_what_is_promised_is_measured_on_every_row(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    network = model.adapt(tiny, Lora(), 0)
    term = flattened(encode(network, ROWS))
    whole = measure.sets(term, term, 0)
    monkeypatch.setattr(measure, "SAMPLE_ROWS_MAX", 2)
    sampled = measure.sets(term, term, 0)
    assert len(sampled.retain_places) == 2
    assert sampled.whole == whole == whole.whole
    of_whole, of_sample = (measure.measure(network, both) for both in (whole, sampled))
    assert of_sample.retain_upper > of_sample.retain_loss != of_whole.retain_loss == of_whole.retain_upper


# --- samples


def lengths(counts: Sequence[int]) -> Encoded:
    rows = [TokenRow([0] * (n + 1), 1) for n in counts]
    return Encoded(rows, [[] for _ in rows], ["" for _ in rows], [])


def test_a_small_set_is_measured_whole() -> None:
    assert measure.sample(lengths([5] * 7), seed=0, rows_max=7) == list(range(7))


def test_a_sample_is_a_function_of_the_seed_and_covers_the_lengths() -> None:
    encoded = lengths([10 + 7 * k % 91 for k in range(1000)])
    places = measure.sample(encoded, seed=3, rows_max=50)
    assert places == measure.sample(encoded, seed=3, rows_max=50)
    assert places != measure.sample(encoded, seed=4, rows_max=50)
    assert places == sorted(set(places))
    assert len(places) == 50
    rank = {place: k for k, place in enumerate(sorted(range(1000), key=lambda p: (len(encoded.rows[p].ids), p)))}
    per_stratum = Counter(rank[p] // 50 for p in places)
    assert set(per_stratum) == set(range(20)), "every stratum of 50 rows"
    assert set(per_stratum.values()) == {2, 3}


def test_every_row_is_as_likely_to_be_measured_as_any_other() -> None:
    encoded = lengths([10 + 7 * k % 91 for k in range(90)])
    seen = Counter(p for seed in range(2000) for p in measure.sample(encoded, seed, 40))
    assert min(seen.values()) > 0.35 * 2000
    assert max(seen.values()) < 0.55 * 2000


def test_the_token_mean_of_all_rows_is_certain() -> None:
    scores = Scores([0, 1], torch.tensor([1.0, 5.0], dtype=torch.float64), torch.tensor([1, 3]))
    assert measure.token_mean(scores, 2) == (1.5, 1.5)


def test_the_upper_bound_by_hand() -> None:
    """Ratio 1.5; residuals 1 - 1.5 and 5 - 4.5, so s^2 = 0.5; mean length 2; half of the rows measured."""
    scores = Scores([0, 1], torch.tensor([1.0, 5.0], dtype=torch.float64), torch.tensor([1, 3]))
    mean, upper = measure.token_mean(scores, 4)
    assert mean == 1.5
    assert upper == pytest.approx(1.5 + 1.6448536 * math.sqrt(0.5 / 2 / 4 * 0.5))


def test_the_upper_bound_holds_as_often_as_it_says() -> None:
    """A population of 3,000 rows with skewed losses that depend on length, sampled 400 times."""
    generator = torch.Generator().manual_seed(0)
    tokens_B = torch.randint(5, 200, (3000,), generator=generator)
    per_token_B = -torch.rand(3000, generator=generator, dtype=torch.float64).log() * (1 + 20 / tokens_B)
    nll_B = per_token_B * tokens_B
    truth = float(nll_B.sum() / tokens_B.sum())
    encoded = lengths(tokens_B.tolist())
    held, widths = 0, []
    for seed in range(400):
        places = measure.sample(encoded, seed, 300)
        mean, upper = measure.token_mean(Scores(places, nll_B[places], tokens_B[places]), 3000)
        held += truth <= upper
        widths.append(upper / mean - 1)
    assert held / 400 > 0.92
    assert max(widths) < 0.25, "a bound that is of use"
