"""The suites against the field's reference: every figure of every file that it printed, and TOFU's own published logs."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from service.domain.job import ModelEntry, PromptFormat
from worker import model, registry, scoring
from worker.scores import Scores
from worker.suite import Result, Row, Seen, Sets, Suite, for_retrained, from_reference_json, to_reference_json

FEW = 12  # rows of each of TOFU's retain sets, where all 617 would take half a minute
MUSE_ROWS = 12
MUSE_TEXTS, TEXT_CHARACTERS = 50, 800
CASES = {
    "tofu-full": ("tofu", "tofu260K_full", "tofu260K_full_forget01_TOFU_EVAL.json"),
    "tofu-retain": ("tofu", "tofu260K_retain", "tofu260K_retain_forget01_TOFU_EVAL.json"),
    "muse": ("muse", "tofu260K_full", "tofu260K_full_alice12_MUSE_EVAL.json"),
}
REFERENCE = "tofu-retain"  # what the figures of the other model are compared with


@pytest.fixture(scope="module")
def shared() -> Path:
    folder = Path(os.environ.get("UNLEARN_SHARED", "../shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder} (UNLEARN_SHARED)")
    return folder


def read(file: Path) -> list[Row]:
    text = file.read_text()
    return list(json.loads(text)) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def golden(shared: Path, case: str, few: bool = False) -> dict[str, Any]:
    """All figures; or, of those of TOFU's retain sets, the values of the first rows."""
    figures: dict[str, Any] = json.loads((shared / "golden" / CASES[case][2]).read_text())
    if few:
        del figures["model_utility"]
        for figure in (figure for name, figure in figures.items() if name.startswith(("retain_", "ra_", "wf_"))):
            del figure["agg_value"]
            figure["value_by_index"] = {str(k): figure["value_by_index"][str(k)] for k in range(FEW)}
    return figures


def sets(shared: Path, suite: str, few: bool) -> Sets:
    if suite == "tofu":
        tofu = shared / "data" / "tofu"
        retained = {
            name: read(tofu / f"{name}_perturbed.json")[: FEW if few else None]
            for name in ("retain", "real_authors", "world_facts")
        }
        return {"forget": read(tofu / "forget01_perturbed.json"), "holdout": read(tofu / "holdout01.json"), **retained}
    alice = shared / "data" / "muse" / "alice"
    passages, questions = read(alice / "verbmem.json"), read(alice / "knowmem_qa.json")[:MUSE_ROWS]
    known = {f"{of}_knowmem": questions for of in ("forget", "retain")}
    shots = {f"{of}_knowmem_icl": read(alice / "knowmem_qa_icl.json") for of in ("forget", "retain")}
    texts: list[Row] = [{"text": row["prompt"][:TEXT_CHARACTERS]} for row in passages]
    both = {"forget": texts[:MUSE_TEXTS], "holdout": texts[-MUSE_TEXTS:]}
    return {"verbmem": passages[:MUSE_ROWS], **known, **shots, **both}


def load(shared: Path, name: str) -> model.Network:
    entry = ModelEntry(name=name, source="path", location=name, prompt_format=PromptFormat())
    return model.load(entry, shared / "models", "cpu", "float32")


Looked = Callable[[str, bool], tuple[Suite, Sets, Seen]]


@pytest.fixture(scope="module")
def looked(shared: Path) -> Looked:
    """looked(case, few): its model looked at, once; with the first rows of TOFU's retain sets alone if few."""

    @cache
    def of(case: str, few: bool) -> tuple[Suite, Sets, Seen]:
        name, folder, _ = CASES[case]
        suite, rows = registry.build("suites", name, {}), sets(shared, name, few)
        return suite, rows, scoring.look(load(shared, folder), suite.asks(rows))

    return of


def printed(looked: Looked, case: str, retrained: Mapping[str, Result] | None, few: bool = False) -> Any:
    suite, rows, seen = looked(case, few)
    return json.loads(json.dumps(to_reference_json(suite.results(rows, seen, retrained)), allow_nan=False))


def differences(own: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """Where ours lacks something of theirs, or says it differently."""
    if isinstance(theirs, dict):
        for name in theirs:
            if isinstance(own, dict) and name in own:
                yield from differences(own[name], theirs[name], f"{where}/{name}")
            else:
                yield f"{where}/{name}: not there"
        if theirs.keys() != own.keys() and where.endswith("value_by_index"):
            yield f"{where}: other rows"
    elif isinstance(theirs, list):
        if len(own) != len(theirs):
            yield f"{where}: {len(own)} values, not {len(theirs)}"
        for k, (one, other) in enumerate(zip(own, theirs, strict=False)):
            yield from differences(one, other, f"{where}/{k}")
    elif isinstance(theirs, float) and isinstance(own, float):
        if not math.isclose(own, theirs, rel_tol=1e-4, abs_tol=1e-7):
            yield f"{where}: {own}, not {theirs}"
    elif own != theirs:
        yield f"{where}: {own!r}, not {theirs!r}"


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_all_of_the_models_figures_against_the_retrained_reference(shared: Path, looked: Looked, few: bool) -> None:
    expected = golden(shared, "tofu-full", few)
    assert len(expected) == (29 if few else 30)
    found = printed(looked, "tofu-full", from_reference_json(golden(shared, REFERENCE)), few)
    assert list(differences(found, expected)) == []
    assert found["mia_reference"]["reason"] == "the figures of the retrained reference have no mia_loss"


@pytest.mark.slow
@pytest.mark.parametrize("case", [REFERENCE, "muse"])
def test_all_figures_without_a_retrained_reference(shared: Path, looked: Looked, case: str) -> None:
    expected, found = golden(shared, case), printed(looked, case, None)
    leak = expected.pop("privleak")  # the reference compares with chance under the same name
    assert list(differences(found, expected)) == []
    assert list(differences(found["privleak_vs_chance"], leak)) == []
    assert found["privleak"]["agg_value"] is None
    assert found["privleak"]["reason"].startswith("needs a retrained reference")


def test_a_retrained_model_is_looked_at_only_for_what_is_compared(shared: Path, looked: Looked) -> None:
    suite, rows, _ = looked("tofu-full", True)
    asked = for_retrained(suite).asks(rows)
    assert {of for of, _ in asked} == {"forget", "holdout"}
    assert not any("generated" in ask.views for ask in asked.values())
    known = suite.results(rows, scoring.look(load(shared, CASES[REFERENCE][1]), asked), None)
    assert all(result.value is not None or result.reason for result in known.values())
    own = printed(looked, "tofu-full", known, few=True)
    assert list(differences(own, golden(shared, "tofu-full", few=True))) == []
    assert own["forget_quality"]["agg_value"] == pytest.approx(0.01430154804770646, rel=1e-6)
    # the retrained model finds both sets about as strange, so that what it loses on them takes nothing off
    assert own["mia_reference"]["agg_value"] == 1.0


# --- TOFU's own logs, of a Phi model


SHORT = {"eval_log.json": "retain", "eval_real_author_wo_options.json": "real_authors"}
SHORT |= {"eval_real_world_wo_options.json": "world_facts", "eval_log_forget.json": "forget"}


def logs(folder: Path, name: str) -> tuple[Sets, Seen]:
    """What TOFU's authors logged, as if it had been seen here; the answers and what was generated for them included."""
    log = json.loads((folder / "data" / "tofu_logs" / f"{name}.json").read_text())
    rows: dict[str, list[Row]] = {}
    seen: dict[tuple[str, str], Scores] = {}
    for file, of in SHORT.items():
        part = log[file]
        places = sorted(map(int, part["avg_gt_loss"]))
        rows[of] = [{"question": "?", "answer": "!", "paraphrased_answer": "!", "perturbed_answer": ["!"]}] * len(
            places
        )
        texts = {"answer": ("gt_loss", "num_token_gt")}
        if of in ("retain", "forget"):
            texts["paraphrased_answer"] = ("paraphrased_loss", "num_token_paraphrased")
        for text, (losses, counts) in texts.items():
            seen[of, text] = scores(places, [(part[losses][str(p)], part[counts][str(p)]) for p in places])
        for k in range(len(part["perturb_loss"][str(places[0])])):
            wrong = [(part["perturb_loss"][str(p)][k], part["num_token_perturb"][str(p)][k]) for p in places]
            seen[of, f"perturbed_answer.{k}"] = scores(places, wrong)
        said = {p: part["generated_text"][str(p)] for p in places}
        seen[of, "answer"] = seen[of, "answer"]._replace(
            generated={p: texts[1] for p, texts in said.items()}, answers={p: texts[2] for p, texts in said.items()}
        )
    return rows, seen


def logged(folder: Path, name: str) -> dict[str, Result]:
    suite: Suite = registry.build("suites", "tofu", {})
    return suite.results(*logs(folder, name), None)


def scores(places: list[int], rows: list[tuple[float, int]]) -> Scores:
    loss_B, counted_B = zip(*rows, strict=True)
    return Scores(places, torch.tensor(loss_B, dtype=torch.float64), torch.tensor(counted_B))


@pytest.fixture(scope="module")
def phi(shared: Path) -> dict[str, dict[str, Result]]:
    return {name: logged(shared, name) for name in ("phi_full", "phi_retain90")}


@pytest.mark.parametrize(("name", "utility"), [("phi_full", 0.5221), ("phi_retain90", 0.5320)])
def test_model_utility_as_published(phi: dict[str, dict[str, Result]], name: str, utility: float) -> None:
    found = phi[name]["model_utility"]
    assert found.value is not None
    assert round(found.value, 4) == utility
    assert found.interval is not None
    low, high = found.interval
    assert low < found.value < high
    assert found.rows == 300 + 100 + 117


@pytest.mark.parametrize("name", ["phi_full", "phi_retain90"])
def test_rouge_row_by_row_as_logged(shared: Path, phi: dict[str, dict[str, Result]], name: str) -> None:
    log = json.loads((shared / "data" / "tofu_logs" / f"{name}.json").read_text())
    prefixes = {"real_authors": "ra", "world_facts": "wf"}
    for file, of in SHORT.items():
        rows = phi[name][f"{prefixes.get(of, of)}_Q_A_ROUGE"].by_row
        for which in ("rougeL_recall", "rouge1_recall"):
            assert {str(place): row[which] for place, row in rows.items()} == pytest.approx(log[file][which], rel=1e-9)


def test_forget_quality_as_published(shared: Path) -> None:
    suite: Suite = registry.build("suites", "tofu", {})
    retrained = logged(shared, "phi_retain90")
    found = suite.results(*logs(shared, "phi_full"), retrained)
    assert found["forget_quality"].value == pytest.approx(2.194e-16, rel=1e-3)
    statistic = found["forget_quality_ks_statistic"].value
    assert statistic is not None
    assert 0 < statistic <= 1
    same = suite.results(*logs(shared, "phi_retain90"), retrained)
    assert (same["forget_quality"].value, same["forget_quality_ks_statistic"].value) == (1.0, 0.0)
