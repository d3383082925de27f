"""Each gate on what the model says: its result, what was judged, and a sentence that is true of it."""

from collections.abc import Sequence
from typing import Any

import pytest

from service.domain.job import GateResult
from service.domain.report import Answered, Conspicuous, Disclosure, DisclosureWay, LanguageFacts, Likelihood
from tests.worker.reports import Page, attack, make
from worker import gates
from worker.page import render_html

JOB = "ujob_" + 32 * "1"


def asked(**changes: Any) -> Disclosure:
    ways = [
        DisclosureWay(
            way="question", description="greedily", outputs=24, disclosing=0, by_chance=2, rows=[], beyond=[]
        ),
        DisclosureWay(
            way="prefix", description="behind prefixes", outputs=120, disclosing=3, by_chance=5, rows=[2, 7], beyond=[]
        ),
    ]
    parts: dict[str, Any] = {
        "of": "forget",
        "model": "released",
        "rows": 24,
        "rows_in_every_way": 24,
        "rows_total": 24,
        "without_secret": [],
        "before": [*range(1, 25)],
        "ways": ways,
        "disclosed": [],
    }
    return Disclosure(**parts | changes)


def beyond(rows: list[int]) -> dict[str, Any]:
    way = DisclosureWay(
        way="sample", description="drawn", outputs=192, disclosing=9, by_chance=1, rows=rows, beyond=rows
    )
    return {"ways": [way], "disclosed": rows}


def kept(before: int, lost: list[int], upper: float | None) -> Answered:
    return Answered(rows=100, before=before, after=before - len(lost), lost=lost, upper=upper, reason="none was before")


def speaks(**changes: Any) -> LanguageFacts:
    parts: dict[str, Any] = {"outputs": 24, "refusals": 0, "nll": 1.3, "usual": 1.2, "excess": 0.05, "looping": 0.0}
    return LanguageFacts(**{"noise": False} | parts | changes)


def likely(above: list[int], allowed: int = 1, unknown: Sequence[int] = ()) -> Likelihood:
    return Likelihood(mean_limit=0.1, floor=None, rows_above=above, rows_allowed=allowed, rows_unknown=list(unknown))


TABLE: list[tuple[GateResult | None, str, str, float | None, str]] = [  # gate, metric, result, value, words
    (
        gates.disclosure(asked()),
        "disclosure",
        "PASSED",
        0,
        "hits upon an answer 3 times, no oftener than upon wrong ones",
    ),
    (gates.disclosure(asked(ways=[])), "disclosure", "PASSED", 0, "gives none of the answers"),
    (gates.disclosure(asked(**beyond([2, 7]))), "disclosure", "FAILED", 2, "rows 2, 7) oftener than chance explains"),
    (gates.disclosure(asked(**beyond([5]))), "disclosure", "FAILED", 1, "the answer of 1 row (row 5)"),
    (gates.disclosure(asked(rows=0, ways=[])), "disclosure", "WARNED", None, "tells knowing from guessing"),
    (
        gates.disclosure(asked(rows=22, without_secret=[3, 4])),
        "disclosure",
        "WARNED",
        0,
        "2 rows more could not be judged",
    ),
    (gates.disclosure(asked(rows=23, without_secret=[3])), "disclosure", "PASSED", 0, "no oftener"),  # one in twenty
    (
        gates.disclosure(asked(rows_total=900, rows=900, rows_in_every_way=400)),
        "disclosure",
        "PASSED",
        0,
        "400 of them in",
    ),
    (gates.disclosure(asked(of=JOB, before=None)), f"disclosure/{JOB}", "PASSED", 0, f"the rows of job {JOB}"),
    (gates.disclosure(asked(model="quantise_4")), "disclosure/quantise_4", "PASSED", 0, "rounded to 4 bits"),
    (gates.disclosure(asked(model="base")), "base/disclosure", "PASSED", 0, "Asked for the rows to forget"),
    (gates.answered(kept(80, [], 1.0)), "retain_answered", "PASSED", 1.0, "Of 80 retain rows"),
    (
        gates.answered(kept(80, [4], 0.999)),
        "retain_answered",
        "PASSED",
        0.999,
        "lost: row 4, which so few rows do not show",
    ),
    (gates.answered(kept(80, [*range(1, 31)], 0.71)), "retain_answered", "FAILED", 0.71, "50 are answered still"),
    (gates.answered(kept(0, [], None)), "retain_answered", "WARNED", None, "could not be measured: none was before"),
    (gates.rows(likely([])), "forget_rows", "PASSED", 0, "No single rows are likelier"),
    (
        gates.rows(likely([9])),
        "forget_rows",
        "PASSED",
        1,
        "1 single row is likelier than a forgotten row may be (row 9); 1",
    ),
    (gates.rows(likely([9, 12])), "forget_rows", "WARNED", 2, "2 rows (rows 9, 12) remain likelier"),
    (
        gates.rows(likely([], unknown=[2, 3])),
        "forget_rows",
        "PASSED",
        0,
        "Not judged singly: rows 2, 3; before, a wrong",
    ),
    (gates.language(speaks()), "language", "PASSED", 0.05, "are language, by the judgement of the base model"),
    (gates.language(speaks(noise=True, excess=4.0)), "language", "WARNED", 4.0, "idk_dpo"),
    (gates.language(speaks(noise=True, looping=0.9)), "language", "WARNED", 0.9, "go round in circles"),
    (gates.language(speaks(outputs=0, refusals=24, excess=None)), "language", "PASSED", None, "are refusals"),
    (
        gates.conspicuous(Conspicuous(ratio=0.3, upper=0.4, against="x")),
        "conspicuous",
        "PASSED",
        0.4,
        "not so unlikely",
    ),
    (gates.conspicuous(Conspicuous(ratio=0.01, upper=0.02, against="x")), "conspicuous", "WARNED", 0.02, "idk_dpo"),
    (gates.conspicuous(Conspicuous(ratio=None, upper=None, against="x")), "", "", None, ""),
]


@pytest.mark.parametrize(("gate", "metric", "result", "value", "words"), TABLE)
def test_a_gate_says_what_was_measured(
    gate: GateResult | None, metric: str, result: str, value: float | None, words: str
) -> None:
    if not metric:
        assert gate is None
        return
    assert gate is not None
    assert (gate.metric, gate.result, gate.value) == (metric, result, value)
    assert words in gate.message, gate.message
    if gate.value is not None and gate.threshold is not None:
        met = gate.value <= gate.threshold if gate.op == "<=" else gate.value >= gate.threshold
        assert met is (result == "PASSED") or "could not be judged so" in gate.message


def test_attacks_that_train_are_no_gate_of_every_job() -> None:
    audit = [*attack("relearn_forget", 0.04, 0.9), *attack("prefix", 0.04, 0.2), *attack("paraphrase", 0.04, 0.1)]
    found = {gate.metric: gate.result for gate in gates.attacks(audit, 0.1)}
    assert found == {"attack/prefix": "WARNED", "attack/paraphrase": "PASSED"}


def test_the_page_shows_what_came_out_and_names_rows_alone() -> None:
    page = Page(render_html(make(disclosure=[asked(**beyond([2, 7]))], answered=kept(80, [4], 0.999)))).text
    assert "24 → 2 of 24" in page, "before and now, on the first screen"
    assert "gives the answers of 2 rows away" in page
    assert "drawn 192 9 up to 1 2, 7" in page, "the table by way of asking"
    assert "80 were answered before and 79 of them still; lost: rows 4" in page
