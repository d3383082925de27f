"""The report: its verdict, its two renderings, and what can never stand in it."""

import doctest
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from service.domain.job import VERDICT_RULES, Gate, GateResult, PromptFormat, Row, Verdict
from service.domain.report import NOT_FINITE, Forgotten, Logged, Note, Parent, Report, RowPoint
from tests.worker.reports import (
    AUDIT,
    INF,
    NAN,
    ROWS,
    Page,
    attack,
    benchmark,
    check,
    constraint,
    figure,
    knowledge,
    make,
    step,
    text_knowledge,
    untrained,
    whole,
)
from worker import report, words
from worker.page import render_html
from worker.records import RequestRows

# --- the verdict before any training


def test_what_the_model_does_not_know_is_not_known_and_anything_else_trains() -> None:
    def gate(upper: float | None, model: str = "base") -> GateResult:
        return report.knowledge_gate(knowledge(model, upper))

    told = report.not_known_verdict([gate(0.1)])
    assert told is not None
    assert (told.result, told.forgotten_by, told.rules) == ("NOT_KNOWN", None, VERDICT_RULES)
    assert (told.gates[0].value, told.gates[0].threshold, told.gates[0].result) == (0.1, 0.25, "PASSED")
    assert "at most 1.11 times as likely" in told.message
    assert "below 1.28 is" in told.message
    assert report.not_known_verdict([gate(0.3)]) is None
    assert report.not_known_verdict([gate(None)]) is None, "what could not be decided is trained"
    assert "2 rows are too few" in gate(None).message
    recited = report.knowledge_gate(knowledge("base", 0.1, equivalent=False, recited=[3, 7]))
    assert (recited.result, report.not_known_verdict([recited])) == ("FAILED", None)
    assert "of row 3 and 1 others it says a right answer nearly for certain" in recited.message
    disclosed = gate(0.1).model_copy(update={"metric": "disclosure", "result": "FAILED"})
    assert report.not_known_verdict([gate(0.1), disclosed]) is None


def test_of_texts_it_is_judged_beside_texts_that_it_never_saw() -> None:
    passed = report.text_knowledge_gate(text_knowledge())
    assert (passed.metric, passed.value, passed.threshold, passed.result) == ("base/auc", 0.6, 0.65, "PASSED")
    assert "in at most 60% of pairs" in passed.message
    assert report.not_known_verdict([passed]) is not None
    for found, sentence in (
        (text_knowledge("start", 0.7), "The model that the job starts from may know the texts: of 50 one is likelier"),
        (
            text_knowledge("start", 0.6, equivalent=False, likeliest=9, likeliest_of=11),
            "of the 11 likeliest of these and of the holdout texts 9 are texts to forget",
        ),
        (text_knowledge("start", None, recited=[2, 5]), "it says row 2 and 1 others nearly for certain"),
        (text_knowledge("start", None), "could not be decided: there is no holdout set."),
    ):
        gate = report.text_knowledge_gate(found)
        assert (gate.result, report.not_known_verdict([gate])) == ("FAILED", None)
        assert sentence in gate.message
    page = Page(render_html(untrained(text_knowledge=[text_knowledge()])))
    assert "likelier in 52% of pairs" in page.text
    page = Page(render_html(make(text_knowledge=[text_knowledge("start", None)])))
    assert "The model that the job started from, whether it knew the texts: there is no holdout set." in page.text


def test_what_the_base_alone_knows_was_forgotten_by_the_adapter_that_the_job_starts_from() -> None:
    start, knows, not_known = (
        report.knowledge_gate(knowledge(*one)) for one in (("start", 0.1), ("base", 0.3), ("base", 0.2))
    )
    told = report.not_known_verdict([start], [knows], "ujob_" + 32 * "2")
    assert told is not None
    assert (told.forgotten_by, told.gates) == ("ujob_" + 32 * "2", [start])
    assert told.message.startswith(f"The adapter of job {told.forgotten_by} had forgotten the rows already.")
    told = report.not_known_verdict([start], [not_known], "ujob_" + 32 * "2")
    assert told is not None
    assert (told.forgotten_by, told.gates) == (None, [start, not_known])
    assert report.not_known_verdict([knows], [not_known], "ujob_" + 32 * "2") is None, "the adapter taught them"


@pytest.mark.parametrize("parent", [None, Parent(job_id="ujob_" + 32 * "2", files=[], forgotten=[])])
def test_the_page_of_a_job_that_was_not_trained(parent: Parent | None) -> None:
    known = (knowledge("base", 0.3, mean=0.2), knowledge("start", 0.1)) if parent else (knowledge(),)
    made = untrained(*known, parent=parent)
    Report.model_validate_json(report.render_json(made))
    html = render_html(made)
    page = Page(html)
    assert "= NOT KNOWN" in page.text
    assert ("had forgotten them already" if parent else "By the measurements below it does not know them") in page.text
    assert "1.05 times as likely" in page.text
    assert "1.22 times as likely" not in page.text, "that is the base, where the job starts from another's adapter"
    assert "nothing was trained" in page.text
    assert "Adapter not released" in page.text
    assert "Bound ε" not in page.text, "nothing was measured that it could bound"
    assert "does both" not in page.text
    assert "at most 0.25" in page.text, "what a model that knows them would have led to"
    assert "on the whole sets" not in page.text, "no step was taken, so there was no check"


def test_of_a_job_that_was_trained_for_want_of_a_decision_the_page_says_so() -> None:
    page = Page(render_html(make(knowledge=[knowledge("start", None)])))
    assert "The model that the job started from, whether it knew the answers: 2 rows are too few." in page.text


def test_a_verdict_from_before_rules_had_numbers() -> None:
    stored = {"result": "PASSED", "gates": [], "message": "so it was"}
    assert Verdict.model_validate(stored).rules == 1
    assert report.verdict(constraint(), 1.0, 0.04, published=True).rules == VERDICT_RULES
    with pytest.raises(ValueError, match="forgotten already"):
        Verdict.model_validate(stored | {"forgotten_by": "ujob_" + 32 * "1"})


# --- the verdict


@pytest.mark.parametrize(
    ("upper", "after", "published", "result"),
    [
        (0.72, 0.04, True, "PASSED"),
        (0.75, 0.04, True, "WARNED"),  # the bound itself is kept, by nothing
        (0.75 - 5e-6, 0.04, True, "WARNED"),
        (0.75 - 2e-5, 0.04, True, "PASSED"),
        (0.7500001, 0.04, True, "FAILED"),
        (0.72, 0.1, True, "PASSED"),  # exactly a tenth
        (0.72, 0.1001, True, "FAILED"),
        (0.75, 0.1001, True, "FAILED"),  # a failure outweighs a warning
        (0.72, 1.0, True, "FAILED"),  # the untouched model
        (0.72, 0.04, False, "FAILED"),
        (NAN, 0.04, True, "FAILED"),
        (INF, 0.04, True, "FAILED"),
        (0.72, NAN, True, "FAILED"),
    ],
)
def test_it_passes_only_if_a_released_adapter_keeps_its_bound_and_has_forgotten(
    upper: float, after: float, published: bool, result: str
) -> None:
    told = report.verdict(constraint(upper), 1.0, after, published=published)
    assert told.result == result
    assert [gate.metric for gate in told.gates] == ["retain_nll", "forget_probability"]
    assert all(gate.message in told.message and gate.message.endswith(".") for gate in told.gates)
    json.dumps(told.model_dump(), allow_nan=False)


@pytest.mark.parametrize(("before", "after"), [(None, 0.1), (0.8, None), (None, None), (0.0, 0.0), (NAN, 0.0)])
def test_forgetting_that_cannot_be_judged_has_failed_and_says_why(before: float | None, after: float | None) -> None:
    told = report.verdict(constraint(), before, after, published=True)
    assert told.result == "FAILED"
    assert re.search("could not be measured|nothing to measure", told.gates[1].message)


@pytest.mark.parametrize(
    ("upper", "after", "published", "retain", "forget"),
    [
        (
            0.7212345678,
            0.0323456,
            True,
            "The retain loss went from 0.68 to 0.721 nats per token: within the bound of 0.75.",
            "The mean probability of the forget rows' answers, per token, went from 82% to 3.2%; at most 8.2%, a tenth of "
            "before, was required.",
        ),
        (0.749999, 0.08159, True, "to 0.749999 nats per token: below the bound of 0.75 by less than", "to 8.159%"),
        (
            0.75004,
            0.0817,
            True,
            "to 0.75004 nats per token: above the bound of 0.75.",
            "to 8.17%; at most 8.16%, a tenth",
        ),
        (0.9, 0.5, False, "to 0.9 nats per token: above the bound of 0.75.", "went from 82% to 50%; at most 8.2%"),
        (
            0.7,
            0.0,
            False,
            "to 0.7 nats per token: within the bound of 0.75, but no adapter was released.",
            "82% to 0%;",
        ),
    ],
)
def test_each_gate_names_both_numbers_with_as_many_digits_as_tell_them_apart(
    upper: float, after: float, published: bool, retain: str, forget: str
) -> None:
    """What people read is rounded; what machines read is not."""
    gates = report.verdict(constraint(upper), 0.816, after, published=published).gates
    assert retain in gates[0].message
    assert forget in gates[1].message
    assert [gate.value for gate in gates] == [upper, after]


# --- the request's own gates


def judged(metric: str, op: Any, threshold: float, severity: Any = "fail", **changes: Any) -> Any:
    made = whole(gates=[Gate(metric=metric, op=op, threshold=threshold, severity=severity)], **changes)
    return made.verdict.gates[-1], made.verdict


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("forget/probability", 0.04),
        ("retain/nll", 0.72),
        ("forget01/model_utility", 0.5),
        ("audit/relearn_forget/probability", 0.2),
        ("audit/prefix/extraction_strength", 0.06),
    ],
)
def test_a_gate_is_judged_on_the_figure_after_or_under_the_attack(metric: str, value: float) -> None:
    for op, threshold, met in (
        ("<=", value, True),
        (">=", value, True),
        ("<=", value - 1e-6, False),
        (">=", value + 1e-6, False),
        ("<=", value + 1e-6, True),
        (">=", value - 1e-6, True),
    ):
        gate, verdict = judged(metric, op, threshold)
        assert (gate.metric, gate.op, gate.threshold, gate.value) == (metric, op, threshold, value)
        assert gate.result == verdict.result == ("PASSED" if met else "FAILED")
        warned, verdict = judged(metric, op, threshold, "warn")
        assert warned.result == verdict.result == ("PASSED" if met else "WARNED")
        assert warned.message in verdict.message


def test_a_gate_on_what_was_not_measured_is_broken_with_the_reason() -> None:
    for metric, reason in (
        ("forget01/mia_loss", "needs the set holdout"),
        ("forget/rouge_l_recall", "a text has no prompt to answer"),
        ("other/figure", "the report has no such figure"),
    ):
        for op in ("<=", ">="):  # whichever way, so that a missing figure is never a good one
            gate, verdict = judged(metric, op, 0.0)
            assert (gate.result, gate.value, verdict.result) == ("FAILED", None, "FAILED")
            assert reason in gate.message
            gate, verdict = judged(metric, op, 0.0, "warn")
            assert (gate.result, verdict.result) == ("WARNED", "WARNED")
    missing = attack("paraphrase", 0.1, None, reason="needs `paraphrased_question`")
    gate, _ = judged("audit/paraphrase/probability", "<=", 1.0, audit=missing)
    assert gate.result == "FAILED"
    assert "needs `paraphrased_question`" in gate.message
    gate, _ = judged("forget/probability", "<=", 1.0, forget_after=NAN)
    assert gate.result == "FAILED"


def test_without_a_release_nothing_meets_a_gate() -> None:
    gate, verdict = judged("forget/probability", "<=", 1.0, published=False)
    assert (gate.result, verdict.result) == ("FAILED", "FAILED")
    assert "none was released" in gate.message
    gate, verdict = judged("forget/probability", "<=", 1.0, "warn", published=False)
    assert (gate.result, verdict.result) == ("WARNED", "FAILED")


def test_a_failure_outweighs_a_warning_and_both_are_told() -> None:
    gates = [
        Gate(metric="forget/probability", op="<=", threshold=0.01, severity="warn"),
        Gate(metric="forget01/model_utility", op=">=", threshold=0.9),
    ]
    made = whole(gates=gates)
    assert [gate.result for gate in made.verdict.gates] == ["PASSED", "PASSED", "WARNED", "FAILED"]
    assert made.verdict.result == "FAILED"
    said = words.summary(made)
    assert "as unlikely as required, but 2 further requirements are not met" in said
    assert "forget/probability, forget01/model_utility" in said
    assert "the adapter must not be relied on" in said
    neither = words.summary(whole(gates=gates, forget_after=0.5))
    assert "still likelier than allowed, 2 further requirements are not met" in neither
    warned = words.summary(whole(gates=gates[:1], upper=0.75 - 5e-6))
    assert "the bound is kept by less than the measurement can resolve, and 1 further requirement is" in warned


@pytest.mark.parametrize(("steps", "checks"), [(0, 0), (1, 1), (400, 5), (499, 90), (5000, 40), (5000, 1000)])
def test_thinning_keeps_the_first_the_last_the_released_and_every_checked_step(steps: int, checks: int) -> None:
    checked = [round((k + 1) * steps / checks) for k in range(checks)]
    released = checked[len(checked) // 3] if checked else None
    series = [step(k) for k in range(1, steps + 1)]
    thin = report.trajectory(series, [check(k, best=k == released) for k in checked])
    places = [point.step for point in thin.steps]
    marks = [mark.step for mark in thin.checks]
    assert len(places) == min(steps, report.POINTS_MAX) or report.POINTS_MAX - len(places) <= len(marks) + 2
    assert len(places) <= report.POINTS_MAX
    assert len(marks) <= report.CHECKS_MAX
    assert places == sorted(set(places))
    assert set(marks) <= set(places)
    assert (thin.steps_total, thin.checks_total, thin.feasible_checks) == (steps, checks, checks)
    if steps:
        assert (places[0], places[-1]) == (1, steps)
        assert max((b - a for a, b in pairwise(places)), default=1) <= 2 * steps / 300 + 1
    if checked:
        assert {checked[0], checked[-1], released} <= set(marks)


def test_a_run_that_blew_up_is_reported() -> None:
    steps = [step(1), step(2, losses={"forget": INF, "retain": NAN}, violation={"retain": NAN}, gradient_norm=NAN)]
    broken = check(2, NAN)
    made = make(steps, [broken], upper=NAN, forget_after=NAN, published=False)
    point = made.trajectory.steps[1]
    assert (point.forget_loss, point.retain_loss, point.violation, point.gradient_norm) == (None,) * 4
    assert made.trajectory.checks[0].retain_loss is None
    facts = made.constraint
    assert (facts.after, facts.upper, facts.slack, facts.satisfied, facts.reason) == (
        None,
        None,
        None,
        None,
        NOT_FINITE,
    )
    assert made.figures[0].reason == NOT_FINITE
    assert made.verdict.result == "FAILED"
    valid(made)
    text = Page(render_html(made)).text
    assert "The losses of 1 of the 2 steps in the picture: they were not finite." in text
    assert "Whether it meets what every job must meet could not be measured, and no adapter was released." in text


# --- the renderings


def valid(made: Report) -> Any:
    content = json.loads(report.render_json(made))
    jsonschema.Draft202012Validator(Report.model_json_schema()).validate(content)
    return content


def test_the_json_is_what_its_schema_says_and_reads_back() -> None:
    for made in (make(), make(published=False, upper=0.9, forget_after=0.5), make([], [], published=False)):
        content = valid(made)
        assert content["schema_version"] == "1"
        assert Report.model_validate(content) == made


def test_the_same_report_gives_the_same_bytes() -> None:
    one, other = make(), make()
    assert report.render_json(one) == report.render_json(other)
    assert render_html(one) == render_html(other)
    assert render_html(Report.model_validate_json(report.render_json(one))) == render_html(one)


def test_the_page_needs_nothing_from_anywhere() -> None:
    html = render_html(whole())
    page = Page(html)
    assert html.startswith("<!doctype html>")
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert "://" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert not {"script", "iframe", "img", "object", "embed", "form", "base"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not {"src", "srcset", "action", "xlink:href"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith(("#", "data:"))


def test_what_a_user_wrote_stays_text() -> None:
    hostile = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}"
    made = whole()
    made.asked.model = made.asked.method = made.base_model.name = made.base_model.source = hostile
    made.asked.hyperparameters = {hostile: hostile}
    made.base_model.prompt_format = PromptFormat(user_start=hostile, user_end=hostile)
    made.warnings = [Note(code=hostile, message=hostile)]
    made.stop.message = made.released.message = made.released.load = hostile
    made.timings_seconds = {hostile: 1.0}
    made.constraint.upper, made.constraint.slack, made.constraint.reason = None, None, hostile
    made.figures[1].reason = made.figures[0].definition = hostile
    made.environment.versions = {hostile: hostile}
    made.verdict.gates[0].message = made.verdict.gates[2].metric = hostile
    of, entry = made.benchmarks[0], made.audit[0]
    of.name = of.corpus = of.retrained = of.sets[0].name = of.figures[0].name = of.figures[1].definition = hostile
    of.figures[-1].reason = entry.attack = entry.setting = hostile
    html = render_html(made)
    page = Page(html)
    tags, plain = {tag for tag, _ in page.elements}, {tag for tag, _ in Page(render_html(whole())).elements}
    assert tags <= plain | {"pre", "span"}
    assert "<script" not in html
    assert "<img" not in html
    assert "49" not in page.text.split("Method")[1].split("Model and data")[0]


def test_what_a_chat_template_was_given_is_shown() -> None:
    made, day = whole(), date(2025, 3, 9)
    form = PromptFormat(type="chat", template_arguments={"enable_thinking": False}, template_date=day)
    made.base_model.prompt_format = form
    text = Page(render_html(made)).text
    assert "enable_thinking=false" in text
    assert "as of 2025-03-09 where it reads the clock" in text


def test_what_was_not_measured_is_said_with_its_reason_and_is_never_zero() -> None:
    page = Page(render_html(make()))
    assert "Forget set, rouge_l_recall: a text has no prompt to answer." in page.text
    row = page.text.split("Before and after")[1].split("rouge_l_recall")[1]
    assert "not measured: a text has no prompt to answer" in row.split("nll")[0]


@pytest.mark.parametrize(
    ("upper", "after", "published", "says"),
    [
        (
            0.72,
            0.04,
            True,
            "The model support-bot was to forget 40 rows and to keep 760 rows. With the adapter that was released, the words "
            "to be kept are predicted no worse than allowed and the exact words to be forgotten are as unlikely as required.",
        ),
        (0.749999, 0.04, True, "but the bound is kept by less than the measurement can resolve."),
        (
            0.72,
            0.5,
            True,
            "The exact words to be forgotten are still likelier than allowed, and the adapter must not be relied on.",
        ),
        (0.9, 0.04, False, "The words to be kept are predicted worse than allowed, and no adapter was released."),
        (
            0.9,
            0.5,
            False,
            "The words to be kept are predicted worse than allowed, the exact words to be forgotten are still likelier than "
            "allowed, and no adapter was released.",
        ),
        (
            0.72,
            0.04,
            False,
            "No checked iterate met the requirements, and what was measured after is not one that may be",
        ),
    ],
)
def test_the_first_thing_said_is_the_verdict_in_words(upper: float, after: float, published: bool, says: str) -> None:
    made = make(upper=upper, forget_after=after, published=published)
    text = Page(render_html(made)).text.split("</style>")[-1]
    body = text[text.index("Job ujob_") :]
    assert made.verdict.result in body[:120]
    assert says in body[:520]
    assert ("Adapter not released" in body) is not published


def test_numbers_that_differ_are_told_apart() -> None:
    assert "0.7499 after; the bound is 0.75, which is kept." in render_html(make(upper=0.7499))
    assert words.percents(0.5, None, 0.5000001) == ["50%", "not measured", "50.00001%"]
    assert doctest.testmod(words).attempted
    assert not doctest.testmod(words).failed


def test_tables_and_pictures_can_be_read_aloud() -> None:
    html = render_html(whole())
    page = Page(html)
    assert page.all("html") == [{"lang": "en"}]
    assert all(th.get("scope") in ("col", "row", "rowgroup") for th in page.all("th"))
    assert len(page.all("h1")) == 1
    headed = [table for table in re.findall(r"<table.*?</table>", html, re.S) if "<thead>" in table]
    assert len(headed) >= 5
    assert all("<caption>" in table for table in headed)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    pictures = page.all("svg")
    assert len(pictures) == 6, "the bound, two scatters, truth ratios, attacks, the course"
    for svg in pictures:
        assert svg["role"] == "img"
        assert set((svg["aria-labelledby"] or "").split()) <= set(ids)
    assert len(page.all("figcaption")) == len(pictures)


def test_no_row_of_a_table_has_more_cells_than_its_head() -> None:
    """With what spans several counted: a cell too many is clipped on paper, one too few shifts the rest."""
    for table in re.findall(r"<table>.*?</table>", render_html(whole()), re.S):
        head, *rows = re.findall(r"<tr.*?</tr>", table, re.S)
        left = 0
        for row in rows:
            spans = [int(n) for n in re.findall(r'colspan="(\d+)"', row)]
            width = len(re.findall("<t[dh]", row)) - len(spans) + sum(spans) + left
            assert width == len(re.findall("<th", head)), row
            left = 1 if "rowspan" in row else 0


def test_colours_have_contrast() -> None:
    """WCAG AA: 4.5 between a text and what it stands on."""
    html = render_html(whole(upper=0.9, published=False)) + render_html(whole())
    named = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", html.split("body {")[0]))
    assert contrast(named["soft"], named["wash"]) >= 4.5
    pairs = set(re.findall(r"\.\w+ \{ --tone: (#\w{6}); --tint: (#\w{6}); \}", html))
    assert len(pairs) == 4
    for tone, tint in pairs:
        assert min(contrast(tone, tint), contrast(tone, "#ffffff"), contrast("#0a558c", tint)) >= 4.5
    (behind,) = set(re.findall(r'<rect[^>]* fill="(#\w{6})"', html))  # what breaks the bound
    for color in set(re.findall(r'<text[^>]* fill="(#\w{6})"', html)):
        assert min(contrast(color, "#ffffff"), contrast(color, behind)) >= 4.5


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


# --- three numbers, and what was tried


def test_the_three_numbers_are_the_plainest_that_were_measured() -> None:
    said = [figure("forget", "rouge_l_recall", 0.5, 0.5), figure("forget", "rouge_l_recall_unicode", 0.97, 0.021)]
    likely = [figure("forget", "probability", 0.816, 0.04), figure("retain", "probability", 0.9, 0.88)]
    forgot, kept, back = words.three(whole(figures=[*said, *likely]))
    assert forgot.big == "97% → 2.1%", "the words of any script, where they were counted"
    assert (
        "Asked for 40 answers to be forgotten, the model gives 2.1% of the words, in their order; before"
        in forgot.sentences
    )
    assert "a probability of 4% (before, 82%); at most 8.2%" in forgot.sentences, (
        "what the verdict is on stands there too"
    )
    assert "How likely the same fact is in other words, these figures do not say." in forgot.sentences
    assert words.three(whole(figures=[said[0], *likely]))[0].big == "50% → 50%", "of an earlier version"
    assert kept.big == "50.7% → 48.7%", "no answers were asked for: e to the power of -0.68 and -0.72"
    assert "a typical probability of 48.7% (before, 50.7%); at least 47.2% was required." in kept.sentences
    asked = figure("retain", "rouge_l_recall_unicode", 1.0, 0.99)
    assert words.three(whole(figures=[*likely, asked]))[1].big == "100% → 99%"
    assert "at least 47.2% was required, which is not kept." in words.three(whole(upper=0.9))[1].sentences
    assert back.big == "20%, not 4%"
    assert "the strongest of 3 attacks (fine-tuning on a part of the forget set)" in back.sentences
    assert (
        "without it, 4%. That is more than the 8.2% allowed without an attack. The base model under the same attack gives 80%."
        in back.sentences
    )
    assert "more than" not in words.three(whole(audit=attack("prefix", 0.04, 0.08)))[2].sentences


# What no probability shows: that something is forgotten, that it is known, that a promise is kept.
OVERSTATED = re.compile(
    r"stays? forgotten|has forgotten|is forgotten|did forget|does both|did both|^Forgotten|^Kept", re.I
)
EARLIER_JOBS = [
    Forgotten(job_id="ujob_" + 32 * "2", rows=3, base=0.8, before=0.02, after=0.07),
    Forgotten(job_id="ujob_" + 32 * "3", rows=3, base=0.8, before=0.02, after=0.5),
    Forgotten(job_id="ujob_" + 32 * "4", rows=None, base=None, before=None, after=None, reason="no longer kept"),
]


@pytest.mark.parametrize("earlier", [[], EARLIER_JOBS[:1], EARLIER_JOBS])
@pytest.mark.parametrize(("upper", "after"), [(0.72, 0.04), (0.749999, 0.04), (0.9, 0.5), (NAN, NAN)])
@pytest.mark.parametrize("published", [True, False])
def test_no_sentence_says_more_than_its_figure(
    earlier: list[Forgotten], upper: float, after: float, published: bool
) -> None:
    gates = [Gate(metric="forget/probability", op="<=", threshold=0.05)]
    made = whole(upper=upper, forget_after=after, published=published, gates=gates)
    judged = report.verdict(
        made.constraint,
        0.816,
        after,
        published=published,
        earlier=earlier,
        gates=gates,
        figures=report.values(made.figures, [], []),
    )
    made = made.model_copy(update={"verdict": judged})
    told = [words.summary(made), judged.message, Page(render_html(made)).text.split("</style>")[-1]]
    told += [text for fact in words.three(made) for text in (fact.name, fact.sentences)]
    for text in told:
        assert not OVERSTATED.search(text), OVERSTATED.search(text)
    assert (judged.result == "PASSED") is ("every further requirement is met" in words.summary(made).lower())


def test_a_gate_of_an_unknown_name_is_named_and_not_explained() -> None:
    """A gate that a later version adds, as an older page reads it."""
    made = whole()
    for result, says in (("PASSED", "Every further requirement is met."), ("FAILED", "not met (disclosure/attack)")):
        more = GateResult(
            metric="disclosure/attack",
            op="<=",
            threshold=0.0,
            value=0.2,
            result=result,
            message="One row was disclosed.",
        )
        verdict = made.verdict.model_copy(update={"result": result, "gates": [*made.verdict.gates[:2], more]})
        assert says in words.summary(made.model_copy(update={"verdict": verdict}))


def test_the_first_screen_is_read_without_knowing_a_nat() -> None:
    """The verdict, what was asked, what the model says now; then what this does not prove, before the first picture."""
    html = render_html(whole(upper=0.7212345678, forget_after=0.0123456789))
    text = Page(html).text.split("</style>")[-1]
    first = text[text.index("UTC") : text.index("What this does not prove")]
    assert "nats" not in first
    numbers = re.findall(r"\d+(?:\.\d+)?%", first)
    assert len(numbers) >= 9
    assert not [n for n in numbers if len(n.strip("%0.").replace(".", "")) > 3], numbers
    assert html.index('id="limits"') < html.index("<svg")
    assert len(re.findall('id="limits"', html)) == 1


def test_a_number_that_is_not_there_is_not_a_good_one() -> None:
    missing = attack("paraphrase", 0.1, None, reason="needs `paraphrased_question`")
    forgot, kept, back = words.three(whole(figures=[], audit=missing, upper=NAN))
    assert forgot.big == kept.big == back.big == "not measured"
    assert "could not be measured" in kept.sentences
    assert "eeds `paraphrased_question`" in back.sentences
    assert words.three(whole(audit=[]))[2].big == "not tested"
    partly = words.three(whole(audit=[*attack("prefix", 0.1, 0.3, retrained=0.2), *missing]))[2]
    assert "the only attack tried" in partly.sentences
    assert "A model that never saw them gives 20%. 1 could not be tried." in partly.sentences


def test_the_caveats_follow_what_was_tried() -> None:
    def told(**changes: Any) -> str:
        return " ".join(whole(**changes).caveats)

    nothing = told(benchmarks=[], audit=[])
    assert "was not tested" in nothing
    assert "the retain set alone" in nothing
    assert "indirect questions, cleverer prompts were not tried" in nothing
    missing = attack("paraphrase", 0.1, None, reason="needs `paraphrased_question`")
    assert "was not tested" in told(audit=missing), "what could not be tried was not"
    some = told()
    assert "was not tested" not in some
    assert "Only the attacks in the table were tried" in some
    assert "Not tested: rephrased questions." in some
    assert "the retain set and the benchmarks named here" in some
    asked = told(audit=[*AUDIT, *attack("paraphrase", 0.1, 0.1)])
    assert "Not tested" not in asked


def test_a_benchmark_stands_by_its_parts_with_ours_marked_and_the_missing_named_once() -> None:
    html = render_html(whole())
    text = Page(html).text
    table = text.split("Benchmark forget01: TOFU on TOFU forget01")[1].split("Truth ratios")[0]
    order = ["The whole", "model_utility", "Forget set", "forget_Q_A_Prob", "extraction_strength_corrected ours"]
    order += ["Retain set", "retain_Q_A_Prob", "Real authors", "World facts", "Membership inference", "mia_min_k"]
    places = [table.index(word) for word in order]
    assert places == sorted(places)
    assert html.count('class="ours">ours</span>') == 2, "one figure, and what the mark means"
    assert "0.468 to 0.572" in table, "the interval of model_utility before"
    assert "Benchmark forget01, mia_min_k, mia_loss: needs the set holdout." in text
    alone = Page(render_html(whole(benchmarks=[benchmark(retrained=None)]))).text
    assert "There is no retrained reference." in alone
    assert "Retrained" not in alone.split("Benchmark forget01:")[1].split("Sets of")[0]


def test_a_report_of_an_earlier_version_still_reads() -> None:
    content = json.loads(report.render_json(make()))
    for name in ("rows", "benchmarks", "audit"):
        del content[name]
    for old in content["figures"]:
        del old["before_interval"], old["after_interval"]
    for gate in content["verdict"]["gates"]:
        del gate["severity"]
    assert Report.model_validate(content) == make()
    assert "PASSED" in render_html(Report.model_validate(content))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")
def test_a_browser_asks_the_network_for_nothing(tmp_path: Path) -> None:
    """A browser asks for things of its own; a blank page says which. A page with an image shows that asking is seen."""
    pages = {
        "blank": "<!doctype html><title>blank</title>",
        "image": "<!doctype html><img src='http://example.invalid/seen.png'>",
        "report": render_html(whole()),
    }
    with ThreadPoolExecutor(len(pages)) as pool:
        hosts = dict(zip(pages, pool.map(lambda name: asked(tmp_path / name, pages[name]), pages), strict=True))
    assert "example.invalid" in hosts["image"]
    assert hosts["report"] <= hosts["blank"]


NARROW = """<!doctype html><iframe src="page.html" style="width:{width}px;height:600px;border:0"></iframe><p>{width}</p>
<script>onload = () => {{ const page = document.querySelector("iframe").contentDocument.documentElement;
document.querySelector("p").textContent = `${{page.scrollWidth}} of ${{page.clientWidth}}` }}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")
@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_the_page_without_scrolling_sideways(tmp_path: Path, width: int) -> None:
    """What is wider than the page, as a table may be, scrolls in a region of its own."""
    (tmp_path / "page.html").write_text(render_html(whole()), encoding="utf-8")
    (tmp_path / "phone.html").write_text(NARROW.format(width=width), encoding="utf-8")
    shown = opened(tmp_path, "phone.html", "--allow-file-access-from-files")
    (measures,) = re.findall(r"(\d+) of (\d+)", shown)
    assert measures[0] == measures[1]


def asked(folder: Path, html: str) -> set[str]:
    """The hosts that a browser asked for something while it showed the page; none can answer."""
    folder.mkdir()
    (folder / "page.html").write_text(html, encoding="utf-8")
    opened(folder, "page.html", f"--log-net-log={folder / 'log.json'}")
    return set(re.findall(r'"url":"https?://([^/"]+)', (folder / "log.json").read_text(encoding="utf-8")))


def opened(folder: Path, page: str, *options: str) -> str:
    """The page as a browser has it after its load."""
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", *quiet, *options]
    command += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--dump-dom", str(folder / page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_each_deletion_request_has_the_figures_of_its_own_rows() -> None:
    served = [("dreq_a", [1, 3]), ("dreq_b", [10, 11]), ("dreq_c", [12])]
    requests = [RequestRows(request_id=name, row_numbers=numbers) for name, numbers in served]
    a, b, c = report.of_requests(requests, ROWS["forget/probability"])
    assert [a.rows, a.rows_measured, a.before, a.after] == pytest.approx([2, 2, 0.9, 0.04])
    assert [b.rows, b.rows_measured, b.after] == pytest.approx([2, 1, 0.2])
    assert (c.rows_measured, c.before, c.after, c.reason) == (0, None, None, "none of its rows could be measured")
    points = [RowPoint(row=1, before=0.9, after=0.1), RowPoint(row=3, before=0.9, after=NAN)]
    [blown] = report.of_requests(requests[:1], points)
    assert blown.before == pytest.approx(0.9)
    assert (blown.after, blown.reason) == (None, NOT_FINITE)
    page = Page(render_html(make(rows=ROWS, deletion_requests=[a, b, c]))).text
    assert "2, of which 1 measured" in page
    assert "Deletion requests, dreq_c: none of its rows could be measured." in page


# --- what can never stand in it


def test_a_report_has_no_place_for_a_row() -> None:
    """None of the words under which a row's text travels is a field, at any depth; free objects hold only parameters."""
    schema = Report.model_json_schema()
    names = set(_names(schema))
    assert not names & {*Row.model_fields, "rows_text", "texts", "examples", "samples", "generated", "answers"}
    free = [path for path, part in _objects(schema) if "properties" not in part]
    assert sorted(free) == [
        "Asked.hyperparameters",
        "BaseModelFacts.files",
        "BenchmarkFacts.truth_ratios",
        "Environment.versions",
        "PromptFormat.template_arguments",
        "Report.rows",
        "Report.timings_seconds",
        "Trajectory.logged",
    ]


def _objects(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for title, part in {"Report": schema, **schema["$defs"]}.items():
        for name, field in part.get("properties", {}).items():
            if field.get("type") == "object":
                yield f"{title}.{name}", field


def _names(schema: dict[str, Any]) -> Iterator[str]:
    for part in (schema, *schema["$defs"].values()):
        yield from part.get("properties", {})


def test_the_environment_names_no_machine_and_no_path() -> None:
    made = report.environment("cuda:0", 4)
    assert set(made.versions) >= {"torch", "transformers", "peft", "safetensors"}
    assert (made.device, made.threads) == ("cuda:0", 4)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", made.code_version)
    assert "/" not in made.model_dump_json()


def test_what_the_solver_logs_and_how_much_of_the_run_was_feasible() -> None:
    violations, extras = [0.5, 0.0, -0.1, NAN], [{"guard_fired": 1.0}, {}, {"guard_fired": 0.0}, {"guard_fired": 0.0}]
    course = report.trajectory(
        [step(k + 1, violation={"retain": violations[k]}, extra=extras[k]) for k in range(4)], []
    )
    assert course.feasible_steps == 2, "at the bound it is kept; what is not a number keeps nothing"
    assert course.logged == {"guard_fired": Logged(mean=1 / 3, least=0.0, most=1.0, last=0.0, steps=3)}
    page = render_html(make(trajectory=course))
    assert "2 of 4 steps" in page
    assert "guard_fired" in page
