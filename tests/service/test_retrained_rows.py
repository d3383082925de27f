"""Whether stored figures of a retrained model are of a benchmark's very rows, and not of as many others."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.domain import scores
from service.domain.errors import InvalidRequest

Rows = list[dict[str, Any]]


def split(first: int, rows: int = 40) -> Rows:
    return [
        {
            "question": f"Who is {k}?",
            "answer": f"Caf\u00e9 number {k}, \u041b\u0438\u043c\u0430.",
            "paraphrased_answer": f"It is {k}.",
            "perturbed_answer": [f"It is {k + 1}."],
        }
        for k in range(first, first + rows)
    ]


def digests(rows: Rows) -> dict[str, Any]:
    """As `unlearn evaluate` prints them."""
    return {scores.DIGESTS: {"forget": scores.digest(rows)}}


def answers(said: Sequence[str], figure: str = "forget_Q_A_ROUGE") -> dict[str, Any]:
    """As the reference prints them."""
    by_row = {str(k): {"rougeL_recall": 0.5, "ground_truth": text, "score": None} for k, text in enumerate(said)}
    return {figure: {"agg_value": 0.5, "value_by_index": by_row}}


def min_k(forget: int, holdout: int) -> dict[str, Any]:
    parts = {
        of: {"agg_value": 0.1, "value_by_index": {str(k): {"score": 0.1} for k in range(rows)}}
        for of, rows in (("forget", forget), ("holdout", holdout))
    }
    return {"mia_min_k": {"agg_value": 0.5, **parts}}


HERE, OTHER = split(0), split(40)
TEXTS = [row["answer"] for row in HERE]
SAID_OTHER = [row["answer"] for row in OTHER]


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        (digests(HERE), None),
        (digests([row | {"source": "x"} for row in HERE]), None),  # a column without a meaning
        (digests([dict(reversed(row.items())) for row in HERE]), None),  # written in another order
        (digests(OTHER), "of other rows than the set 'forget', by the digest"),
        (digests(HERE[::-1]), "by the digest"),  # rows are joined by their number
        (digests([*HERE[:-1], HERE[-1] | {"perturbed_answer": ["Nobody."]}]), "by the digest"),  # another truth ratio
        (digests(OTHER) | answers(TEXTS), "by the digest"),  # the digest is the stronger one
        (answers(TEXTS), None),
        (answers([text.upper() for text in TEXTS]), None),  # a tokeniser without small letters
        (answers([text.replace("\u00e9", "").replace(" ,", ",") for text in TEXTS]), None),  # one that lacks a letter
        (answers([text[:8] for text in TEXTS]), None),  # cut
        (answers(["", *TEXTS[1:]]), None),  # merged into the prompt
        (answers(SAID_OTHER), "the answer of row 1 is another one there"),
        (answers([*TEXTS[:-1], SAID_OTHER[0]]), "the answer of row 40 is another one there"),
        (answers([*TEXTS, "more"]), "of more rows than the 40"),
        (answers(SAID_OTHER, "retain_Q_A_ROUGE"), None),  # of another set
        (min_k(40, 40), None),
        (min_k(39, 40), "the figures are of 39 rows, and the set 'forget' has 40"),
        ({"model_utility": {"agg_value": 0.5}}, None),
    ],
)
def test_figures_of_other_rows_are_found_by_digest_or_by_answer(figures: dict[str, Any], says: str | None) -> None:
    stored = scores.read(json.dumps({"privleak": {"agg_value": 1.0}} | figures).encode())
    found = scores.mismatch(stored, "forget", HERE)
    assert (found is None) is (says is None), found
    assert says is None or says in (found or "")
    assert not any(text in (found or "") for text in [*TEXTS, *SAID_OTHER]), "no row is quoted"


@pytest.mark.parametrize(
    ("figures", "unknown"),
    [
        ({}, ["forget", "holdout"]),
        (min_k(40, 40), ["forget", "holdout"]),  # as many rows are not the same rows
        (answers(TEXTS), ["holdout"]),
        (digests(HERE), ["holdout"]),
        ({scores.DIGESTS: {"forget": 64 * "0", "holdout": 64 * "1"}}, []),
    ],
)
def test_what_cannot_be_compared_is_named(figures: dict[str, Any], unknown: list[str]) -> None:
    stored = scores.read(json.dumps({"privleak": {"agg_value": 1.0}} | figures).encode())
    assert scores.untied(stored, ["forget", "holdout"]) == unknown


@pytest.mark.parametrize("wrong", [[], {"forget": 3}, {"forget": "abc"}, {"forget": 64 * "G"}])
def test_digests_are_digests(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="SHA-256"):
        scores.read(json.dumps({"a": {"agg_value": 0.5}, scores.DIGESTS: wrong}).encode())


def test_the_references_own_figures_of_another_split_are_refused(shared: Path) -> None:
    """Both of 40 rows: TOFU's forget01, and the first 40 of the questions that are kept."""
    stored = scores.read((shared / "golden/tofu260K_retain_forget01_TOFU_EVAL.json").read_bytes())
    lines = {
        name: (shared / f"data/tofu/{name}.json").read_text(encoding="utf-8").splitlines()
        for name in ("forget01_perturbed", "retain_perturbed", "forget05_perturbed")
    }
    rows = {name: [json.loads(line) for line in of] for name, of in lines.items()}
    assert scores.mismatch(stored, "forget", rows["forget01_perturbed"]) is None
    assert scores.mismatch(stored, "retain", rows["retain_perturbed"]) is None
    for other in ("retain_perturbed", "forget05_perturbed"):
        assert "the answer of row 1 is another one" in str(scores.mismatch(stored, "forget", rows[other][:40])), other


def test_a_wrong_reference_is_refused_where_it_is_registered(http: TestClient, upload: Callable[..., str]) -> None:
    sets = {name: upload("eval_set", HERE) for name in ("forget", "retain", "real_authors", "world_facts")}
    body = {"suite": "tofu", "corpus": "c", "sets": sets}

    def register(name: str, figures: dict[str, Any]) -> Any:
        content = json.dumps({"forget_truth_ratio": {"agg_value": 0.5}} | figures)
        file = http.post("/v1/files", data={"purpose": "eval_scores"}, files={"file": ("f", content)})
        assert file.status_code == 201, file.text
        return http.post("/v1/benchmarks", json=body | {"name": name, "retrained_scores": file.json()["id"]})

    for name, figures in (("a", digests(OTHER)), ("b", answers(SAID_OTHER)), ("c", min_k(20, 20))):
        refused = register(name, figures)
        assert refused.status_code == 422, refused.text
        (problem,) = refused.json()["errors"]
        assert (problem["pointer"], problem["code"]) == ("/retrained_scores", "rows")
        assert "must be evaluated on these very files" in problem["detail"]
        assert not any(text in refused.text for text in SAID_OTHER)
    for name, figures in (("d", digests(HERE)), ("e", answers(TEXTS)), ("f", {})):
        assert register(name, figures).status_code == 201, name
