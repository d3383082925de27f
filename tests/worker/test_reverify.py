"""A reverification: an earlier job's adapter is evaluated under the current verdict rules, and nothing is trained."""

from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.domain.job import VERDICT_RULES, Constraint, FailureCode, JobSpec, Lora, MethodChoice, Verdict
from service.domain.report import Report
from service.store.storage import Storage
from tests.worker import planted, reports, test_lineage, test_run
from tests.worker.conftest import stored_set
from tests.worker.reports import Page
from tests.worker.test_lineage import Ended, Jobs, published
from worker import demo_corpus, files, model, run
from worker.model import Network
from worker.records import (
    Assignment,
    CancelledRecord,
    CheckRecord,
    FailureRecord,
    Record,
    ReleasedAdapter,
    ResultRecord,
    StepRecord,
    Word,
)

assign, began, first, jobs = test_run.assign, test_lineage.began, test_lineage.first, test_lineage.jobs
ORIGINAL, NEW = "ujob_" + 32 * "d", "ujob_" + 32 * "e"


def reverification(job: Assignment, released: ReleasedAdapter) -> Assignment:
    """Of what that job released, as the supervisor hands it over."""
    scratch = job.scratch_dir.with_name("reverified")
    scratch.mkdir()
    update = {
        "job_id": NEW,
        "spec": job.spec.model_copy(update={"reverifies": released.job_id}),
        "reverified": released,
        "prefix": f"jobs/{NEW}/attempts/1",
        "scratch_dir": scratch,
    }
    return job.model_copy(update=update)


def judged(job: Assignment, word: Callable[[], Word | None] = lambda: None) -> tuple[Record, list[Record]]:
    records: list[Record] = []
    return run.last_record(job, records.append, word), records


def of(ended: Ended) -> ReleasedAdapter:
    released = ended.as_parent()
    return ReleasedAdapter(job_id=released.job_id, adapter=released.adapter, report=released.report)


def untouched(job: Assignment, network: Network, folder: Path) -> ReleasedAdapter:
    """An adapter that changes nothing, which an earlier version released with the verdict PASSED."""
    storage = Storage(job.storage_url)
    model.save(model.adapt(network, Lora(), 0), folder)
    made = reports.make(job_id=ORIGINAL, verdict=Verdict(result="PASSED", gates=[], message="passed"))
    made.base_model.digest = network.digest
    return ReleasedAdapter(
        job_id=ORIGINAL,
        adapter=files.publish(storage, f"jobs/{ORIGINAL}", folder, "adapter"),
        report=files.store_bytes(
            storage, f"jobs/{ORIGINAL}", "report.json", made.model_dump_json().encode(), "application/json"
        ),
    )


@pytest.mark.parametrize("chained", [False, True], ids=["alone", "chained"])
def test_the_same_adapter_has_the_same_figures_under_the_current_rules(jobs: Jobs, first: Ended, chained: bool) -> None:
    trained = published(jobs.assign(2, first.as_parent())) if chained else first
    job = trained.job.model_copy(
        update={"storage_url": str(jobs.root / "storage"), "scratch_dir": jobs.root / "scratch"}
    )
    job = reverification(job, of(trained))
    last, records = judged(job)
    assert isinstance(last, ResultRecord), last
    assert not any(isinstance(record, StepRecord | CheckRecord) for record in records)
    assert [file.name for file in last.artifacts] == ["report.json", "report.html"], "the adapter stays the other's"
    assert (last.stop_reason, last.verdict.rules) == ("reverified", VERDICT_RULES)

    before, now = trained.report, test_run.report_of(job)
    assert (now.job_id, now.reverifies, before.reverifies) == (NEW, trained.job.job_id, None)
    assert (now.parent is not None) == chained
    assert (now.released.published, now.released.files) == (True, before.released.files)
    assert (now.trajectory.steps_total, now.trajectory.checks_total) == (0, 0)
    assert figures(now).keys() == figures(before).keys()
    assert len(figures(now)) > 20
    for name, value in figures(before).items():
        assert figures(now)[name] == pytest.approx(value, rel=0, abs=1e-6), name
    assert now.disclosure == before.disclosure
    results = [[(gate.metric, gate.result) for gate in report.verdict.gates] for report in (before, now)]
    assert results[0] == results[1]
    page = b"".join(Storage(job.storage_url).read(f"{job.prefix}/report.html")).decode()
    assert f"a reverification of job {trained.job.job_id} under verdict rules {VERDICT_RULES}" in Page(page).text
    whose = f"the adapter that job {trained.job.job_id} released"
    assert f"This is a reverification: {whose}, evaluated again under verdict rules {VERDICT_RULES}." in Page(page).text
    assert f"No step was taken: this is a reverification of {whose}." in Page(page).text
    assert f"Nothing was trained: the adapter is the one that job {trained.job.job_id} released" in Page(page).text


def figures(report: Report) -> dict[str, float]:
    """All that was measured, by name, but for what could not be."""
    found: dict[str, float | None] = {"epsilon": report.constraint.epsilon, "retain": report.constraint.upper}
    for figure in report.figures:
        name = f"{figure.set}/{figure.metric}"
        found |= {f"{name} before": figure.before, f"{name} after": figure.after}
    found |= {f"{one.attack}/{one.metric}": one.attacked for one in report.audit}
    found |= {f"{gate.metric} of the verdict": gate.value for gate in report.verdict.gates}
    for name, points in report.rows.items():
        found |= {f"{name} of row {point.row}": point.after for point in points}
    return {name: value for name, value in found.items() if value is not None}


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Network:
    """It knows all people by heart."""
    rows = [row for of in planted.corpus() for row in of]
    return planted.memorised(tmp_path_factory.mktemp("models"), rows, rows)


def test_an_adapter_that_passed_by_earlier_rules_and_gives_rows_away_is_failed(
    knowing: Network, tmp_path: Path
) -> None:
    forget, retain = planted.corpus()
    storage = Storage(str(tmp_path / "storage"))
    storage.create()
    job = Assignment(
        job_id=ORIGINAL,
        attempt=1,
        fence=1,
        spec=JobSpec(
            model="planted",
            method=MethodChoice(type="pdu"),
            constraint=Constraint(epsilon_relative=0.5),
            forget_set="ufile_" + 32 * "0",
            retain_set="ufile_" + 32 * "1",
        ),
        model=knowing.entry,
        forget_file=stored_set(storage, "forget", forget),
        retain_file=stored_set(storage, "retain", retain),
        row_key=b64encode(bytes(32)),
        storage_url=str(tmp_path / "storage"),
        prefix=f"jobs/{ORIGINAL}/attempts/1",
        models_root=Path(knowing.causal.config.name_or_path).parent,
        scratch_dir=tmp_path / "scratch",
        device="cpu",
        dtype="float32",
    )
    last, _ = judged(reverification(job, untouched(job, planted.reloaded(knowing), tmp_path / "adapter")))
    assert isinstance(last, ResultRecord), last
    found = {gate.metric: gate.result for gate in last.verdict.gates}
    assert (last.verdict.result, last.verdict.rules) == ("FAILED", VERDICT_RULES)
    assert (found["retain_nll"], found["disclosure"], found["forget_probability"]) == ("PASSED", "FAILED", "FAILED")


def test_what_is_judged_is_the_adapter_also_where_the_model_does_not_know_the_rows(
    assign: Callable[..., Assignment], register: Any, tmp_path: Path
) -> None:
    """A job that trains would end NOT_KNOWN (tests/worker/test_untrained.py)."""
    rows = demo_corpus.rows(demo_corpus.people(3, 0), 0)
    job = assign(forget=rows[:12], retain=rows[12:])
    last, _ = judged(reverification(job, untouched(job, register().load("float32"), tmp_path / "adapter")))
    assert isinstance(last, ResultRecord), last
    assert "retain_nll" in {gate.metric for gate in last.verdict.gates}
    assert last.verdict.result != "NOT_KNOWN"


@pytest.mark.parametrize(
    ("spoilt", "code", "words"),
    [
        ("altered", FailureCode.MODEL_REVISION_MISMATCH, "is not what that job published"),
        ("missing", FailureCode.MODEL_NOT_FOUND, "is no longer in the storage"),
        ("other base", FailureCode.MODEL_REVISION_MISMATCH, "was made on a base of digest"),
    ],
)
def test_another_adapter_than_the_released_one_is_not_judged(
    assign: Callable[..., Assignment], register: Any, tmp_path: Path, spoilt: str, code: FailureCode, words: str
) -> None:
    job, network = assign(), register().load("float32")
    if spoilt == "other base":
        network = network._replace(digest="sha256:" + 64 * "0")
    released = untouched(job, network, tmp_path / "adapter")
    weights = next(file for file in released.adapter if file.name.endswith(".safetensors"))
    if spoilt == "altered":
        Storage(job.storage_url).write(weights.key, [b"other weights"])
    if spoilt == "missing":
        Storage(job.storage_url).delete(weights.key)
    last, _ = judged(reverification(job, released))
    assert isinstance(last, FailureRecord), last
    assert (last.code, ORIGINAL in last.message, words in last.message) == (code, True, True), last.message


def test_a_reverification_can_be_cancelled(assign: Callable[..., Assignment], register: Any, tmp_path: Path) -> None:
    job = assign()
    job = reverification(job, untouched(job, register().load("float32"), tmp_path / "adapter"))
    assert isinstance(judged(job, lambda: "cancel")[0], CancelledRecord)
    assert not (Path(job.storage_url) / job.prefix).exists()
