"""The report of a job that was not trained, put together from what a model was measured to say, as a run has it."""

from collections.abc import Callable
from typing import Any

from service.domain.report import NOT_TRAINED, Report
from service.store.storage import Storage
from tests.worker import test_run
from tests.worker.reports import Page
from worker import demo_corpus, equivalence, evaluate, measure, model, page, report, run, scoring
from worker.assemble import Found, assemble_untrained
from worker.diary import Diary
from worker.records import Assignment, RequestRows
from worker.suite import examples
from worker.views import Term

assign = test_run.assign


def test_it_has_what_was_measured_before_and_nothing_of_what_comes_after(assign: Callable[..., Assignment]) -> None:
    rows = demo_corpus.rows(demo_corpus.people(3, 0), 0)
    job = assign(forget=rows[:12], retain=rows[12:])
    job = job.model_copy(update={"deletion_requests": [RequestRows(request_id="dreq_1", row_numbers=[1, 2])]})
    storage, method = Storage(job.storage_url), run.build_method(job.spec.method)
    base = model.load(job.model, job.models_root, job.device, job.dtype)
    forget, retain = (list(examples(of).values()) for of in (rows[:12], rows[12:]))
    both = measure.sets(
        Term(method.forget, run.forget_texts(job, storage, method, forget, base)),
        run.retain_term(method, retain, base),
        seed=0,
    )
    request = run.requested(job, storage, both)
    before = measure.measure(base, both.whole)
    said = evaluate.run(base, request.suite, request.sets)
    found = equivalence.known(rows[:12], scoring.look(base, equivalence.asks(rows[:12])))
    known = report.knowledge("base", found)
    verdict = report.not_known_verdict([report.knowledge_gate(known)])
    assert verdict is not None, "its weights are random"

    points = evaluate.row_points(request, said, None, {"forget": forget, "retain": retain}, job.row_key)
    figures = evaluate.figures(request, said, None)
    diary = Diary(lambda record: None)
    measured = Found(before, None, figures, points, [], [], None, None, [known])
    epsilon = job.spec.constraint.bound(before.retain_loss)
    made = assemble_untrained(job, method, base, both, epsilon, verdict, measured, diary)
    made = Report.model_validate_json(report.render_json(made))

    assert (made.verdict, made.released.published, made.released.files) == (verdict, False, [])
    assert (made.constraint.before, made.constraint.after) == (before.retain_loss, None)
    assert (made.constraint.reason, made.constraint.satisfied) == (NOT_TRAINED, None)
    figure: Any = {f"{one.set}/{one.metric}": one for one in made.figures}
    likely = figure["forget/probability"]
    assert (likely.before, likely.after, likely.reason, likely.rows) == (
        said["forget/probability"].value,
        None,
        NOT_TRAINED,
        12,
    )
    assert figure["forget/truth_ratio"].before is not None
    assert {(one.before is not None, one.after) for one in made.rows["forget/probability"]} == {(True, None)}
    [served] = made.deletion_requests
    assert (served.rows_measured, served.before is not None, served.reason) == (2, True, NOT_TRAINED)
    assert made.base_model.files.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert [(one.equivalent, one.rows, one.subjects) for one in made.knowledge] == [(True, 12, 2)]
    assert made.knowledge[0].upper == found.upper
    assert (made.trajectory.steps_total, made.stop.reason) == (0, "not_known")
    text = Page(page.render_html(made)).text
    assert "= NOT KNOWN" in text
    assert "go on using it as it is" in text
