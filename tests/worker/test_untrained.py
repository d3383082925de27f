"""A job whose model does not know the rows ends before any training, with a report of what was measured."""

from collections.abc import Callable
from typing import Any

from service.domain.report import NOT_TRAINED
from service.store.storage import Storage
from tests.worker import test_run
from tests.worker.reports import Page
from worker import demo_corpus
from worker.records import Assignment, RequestRows, ResultRecord, StepRecord

assign = test_run.assign


def test_it_has_what_was_measured_before_and_nothing_of_what_comes_after(assign: Callable[..., Assignment]) -> None:
    rows = demo_corpus.rows(demo_corpus.people(3, 0), 0)
    job = assign(forget=rows[:12], retain=rows[12:])
    job = job.model_copy(update={"deletion_requests": [RequestRows(request_id="dreq_1", row_numbers=[1, 2])]})
    last, records = test_run.done(job)
    assert isinstance(last, ResultRecord), last
    assert (last.verdict.result, last.stop_reason) == ("NOT_KNOWN", "not_known"), "its weights are random"
    assert not any(isinstance(record, StepRecord) for record in records)
    assert [file.name for file in last.artifacts] == ["report.json", "report.html"]

    made = test_run.report_of(job)
    assert (made.verdict, made.released.published, made.released.files) == (last.verdict, False, [])
    assert made.constraint.after is None
    assert (made.constraint.reason, made.constraint.satisfied) == (NOT_TRAINED, None)
    figure: Any = {f"{one.set}/{one.metric}": one for one in made.figures}
    likely = figure["forget/probability"]
    assert likely.before is not None
    assert (likely.after, likely.reason, likely.rows) == (None, NOT_TRAINED, 12)
    assert figure["forget/truth_ratio"].before is not None
    assert {(one.before is not None, one.after) for one in made.rows["forget/probability"]} == {(True, None)}
    [served] = made.deletion_requests
    assert (served.rows_measured, served.before is not None, served.reason) == (2, True, NOT_TRAINED)
    assert made.base_model.files.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert [(one.model, one.equivalent, one.rows, one.subjects) for one in made.knowledge] == [("base", True, 12, 2)]
    [asked] = made.disclosure
    assert (asked.model, asked.rows, asked.disclosed) == ("base", 12, [])
    assert [gate.metric for gate in made.verdict.gates] == ["base/log_ratio", "base/disclosure"]
    assert (made.trajectory.steps_total, made.stop.reason) == (0, "not_known")
    page = b"".join(Storage(job.storage_url).read(f"{job.prefix}/report.html")).decode()
    text = Page(page).text
    assert "= NOT KNOWN" in text
    assert "go on using it as it is" in text
