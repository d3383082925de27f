"""The report of a chain: which figures stand under each other, what is said of comparing them, and what is refused."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from service.domain.job import Constraint
from service.domain.report import BenchmarkSet, ChainReport, ChainSeries, Parent, Report
from tests.worker.reports import NAN, Page, benchmark, figure, measured, untrained, whole
from worker import chain, report
from worker.chain_page import render_html

UTILITY = (0.5, 0.45, 0.3)  # after each job


def job(number: int, *, base: str = "sha256:base", rows: int = 40, **changes: Any) -> Report:
    """The n-th of a chain: its own forget rows, the same retain set, the same benchmark."""
    made = whole(
        benchmarks=[benchmark(figures=[measured("model_utility", 0.52, UTILITY[number - 1], 0.53)])], **changes
    )
    made.job_id = f"ujob_{number:032d}"
    made.created_at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=number)
    made.base_model.digest = base
    made.forget_set.rows, made.forget_set.digest = rows, f"{number:064d}"
    return made


SAME_BASE = [job(1, rows=10), job(2, rows=40), job(3, rows=20)]
GROWN = [job(number, base=f"sha256:{number}") for number in (1, 2, 3)]


def series(made: ChainReport, name: str) -> ChainSeries:
    (found,) = [one for one in made.series if f"{one.source}/{one.figure}" == name]
    return found


def test_a_figure_has_one_value_per_job_in_the_order_given() -> None:
    made = chain.chain(SAME_BASE)
    assert [each.job_id[-1] for each in made.jobs] == ["1", "2", "3"]
    utility = series(made, "forget01/model_utility")
    assert (utility.before, utility.after, utility.retrained) == ([0.52] * 3, list(UTILITY), [0.53] * 3)
    assert (utility.better, utility.benchmark, utility.definition) == (None, True, "what model_utility is")
    assert series(chain.chain(SAME_BASE[::-1]), "forget01/model_utility").after == list(UTILITY[::-1])
    own = series(made, "request/forget/probability")
    assert (own.before, own.after, own.retrained) == ([0.816] * 3, [0.04] * 3, [None] * 3)
    jsonschema.Draft202012Validator(ChainReport.model_json_schema()).validate(json.loads(made.model_dump_json()))


def test_what_a_job_did_not_measure_is_null_in_its_place() -> None:
    first, second, third = (one.model_copy(deep=True) for one in SAME_BASE)
    second.benchmarks = []
    third.figures = [figure("forget", "probability", 0.8, None, reason="not finite")]
    made = chain.chain([first, second, third])
    assert series(made, "forget01/model_utility").after == [0.5, None, 0.3]
    assert series(made, "request/forget/probability").after == [0.04, 0.04, None]
    assert series(made, "request/retain/nll").after == [0.72, 0.72, None]
    assert not [one for one in made.series if one.figure == "forget/rouge_l_recall"], "nobody has measured it"
    table = Page(render_html(made)).text.split("Benchmark forget01")[-1]
    assert "0.5 before 0.52 not measured 0.3 before 0.52" in table


def test_one_base_shows_scaling_and_says_that_it_is_not_sustainability() -> None:
    made = chain.chain(SAME_BASE)
    assert "does not show how a model fares that has been through all of them (sustainability)" in made.comparable[0]
    assert "10 to 40 forget rows: figures over that number show scaling" in made.comparable[1]
    assert "Benchmark forget01: the same sets in 3 of 3 jobs, by their digests." in made.comparable
    assert made.not_comparable == ["Figures of the forget sets: each job's are of its own rows."]
    html = render_html(made)
    assert "3 jobs on model support-bot, each to forget 10 to 40 rows: 2 PASSED, 1 FAILED." in Page(html).text
    (over_rows,) = re.findall(
        r'aria-labelledby="rows-\d+-title[^>]*>.*?<title[^>]*>model_utility</title>.*?</svg>', html
    )
    line = re.findall(r'<polyline points="([^"]*)"', over_rows)
    places = [tuple(map(float, point.split(","))) for point in line[1].split()]  # the first is the legend's
    assert [x for x, _ in places] == sorted(x for x, _ in places), "jobs in order of their size, not of the chain"
    (_, least), (_, middle), (_, most) = places
    assert least < middle, "0.5 of 10 rows is above 0.3 of 20"
    assert middle > most, "0.45 of 40 rows is above 0.3 of 20"
    assert "0.5 with 10 rows, 0.45 with 40 rows; least 0.3 with 20 rows" in html
    assert "0.5 at job 1, 0.3 at job 3; least 0.3 at job 3, most 0.5 at job 1" in html


@pytest.mark.parametrize(
    ("uppers", "says"),
    [
        ((0.72, 0.72, 0.72), "Retain loss, nats per token, after: 0.72 in all 3 jobs that have it."),
        ((0.72, NAN, 0.72), "Retain loss, nats per token, after: 0.72 in all 2 jobs that have it."),
        ((NAN, 0.72, NAN), "Retain loss, nats per token, after: 0.72 in the one job that has it."),
        ((0.72, 0.7, 0.72), "after: 0.72 at job 1, 0.72 at job 3; least 0.7 at job 2, most 0.72 at job 3."),
        (
            (0.72, 0.72, 0.720001),
            "after: 0.72 at job 1, 0.720001 at job 3; least 0.72 at job 1, most 0.720001 at job 3.",
        ),
    ],
)
def test_of_jobs_that_are_alike_none_is_said_to_be_the_least(uppers: Sequence[float], says: str) -> None:
    jobs = [job(number, upper=upper) for number, upper in enumerate(uppers, 1)]
    assert says in Page(render_html(chain.chain(jobs))).text


def test_of_requests_of_one_size_there_is_no_scaling() -> None:
    made = chain.chain([job(1), job(2)])
    assert not [sentence for sentence in made.comparable if "show scaling" in sentence]
    assert "Over the size of the request" not in Page(render_html(made)).text


def test_different_bases_may_show_sustainability_and_what_is_before_is_not_comparable() -> None:
    made = chain.chain(GROWN)
    assert "figures over the jobs show sustainability" in made.comparable[0]
    assert "not where they come from" in made.comparable[0]
    assert "Figures before: they are of different models." in made.not_comparable
    assert "Over the size of the request" not in Page(render_html(made)).text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: setattr(r.constraint, "epsilon", 0.8), "bounds ε differ"),
        (lambda r: setattr(r.retain_set, "digest", 64 * "9"), "Figures of the retain sets, the bound's included"),
        (lambda r: setattr(r.asked, "method", "npo"), "methods or their settings differ"),
        (lambda r: r.asked.hyperparameters.update(dual_step=1.0), "methods or their settings differ"),
        (lambda r: setattr(r.base_model, "dtype", "bfloat16"), "precision differs"),
        (lambda r: setattr(r.environment, "code_version", "0"), "versions of the service differ"),
        (lambda r: setattr(r.released, "published", False), "no adapter was released"),
        (lambda r: setattr(r.benchmarks[0], "retrained", None), "a retrained reference, which was not the same"),
    ],
)
def test_what_differs_is_named(change: Any, said: str) -> None:
    other = job(2)
    assert not any(said in sentence for sentence in chain.chain([job(1), other]).not_comparable)
    change(other)
    assert any(said in sentence for sentence in chain.chain([job(1), other]).not_comparable)


def test_figures_of_other_sets_are_not_joined() -> None:
    other = job(2)
    other.benchmarks[0].sets = [
        BenchmarkSet(name="forget", digest=64 * "f", rows=9, beyond_context=0, unmeasured_rows=0)
    ]
    made = chain.chain([job(1), other, job(3)])
    assert series(made, "forget01 (sets 1)/model_utility").after == [0.5, None, 0.3]
    assert series(made, "forget01 (sets 2)/model_utility").after == [None, 0.45, None]
    assert (
        "Benchmark forget01: its sets were not the same in all jobs, so it is listed once for each."
        in made.not_comparable
    )
    assert not [sentence for sentence in made.comparable if "forget01" in sentence]


def test_a_job_whose_rows_the_model_did_not_know_is_passed_over_in_a_chain() -> None:
    """The next one starts from the adapter before it."""
    first, third = job(1), job(3)
    between = untrained().model_copy(update={"job_id": f"ujob_{2:032d}", "created_at": first.created_at})
    for one in (between, third):
        one.parent = Parent(job_id=first.job_id, files=[], forgotten=[])
    made = chain.chain([first, between, third])
    assert made.comparable[0].startswith("By the reports, each job started from the adapter of the one before it")
    assert [(one.result, one.retain_after is None) for one in made.jobs][1] == ("NOT_KNOWN", True)
    said = [sentence for sentence in made.not_comparable if between.job_id in sentence]
    assert said == [
        f"The model did not know the rows of {between.job_id}: nothing was trained, so there are no figures after."
    ]
    assert not any("gates differ" in sentence for sentence in made.not_comparable)
    page = Page(render_html(made))
    assert ", 1 NOT_KNOWN." in page.text
    assert "not released" not in page.text
    third.parent = Parent(job_id=between.job_id, files=[], forgotten=[])
    assert "did not all start" in chain.chain([first, between, third]).comparable[0], "it made no adapter"
    assert "= 0 of 2 PASSED" in Page(render_html(chain.chain([untrained(), between]))).text


# --- the page


def test_the_page_says_how_the_jobs_ended_and_needs_nothing() -> None:
    jobs = [job(1), job(2, forget_after=0.5), job(3, upper=0.9, published=False)]
    html = render_html(chain.chain(jobs))
    page = Page(html)
    assert "✗ 1 of 3 PASSED" in page.text
    assert "each to forget 40 rows: 1 PASSED, 2 FAILED." in page.text
    assert page.text.count("not released") == 1
    assert "://" not in html
    assert "url(" not in html
    assert "<script" not in html
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert len(page.all("figcaption")) == len(page.all("svg"))


def test_long_chains_are_cut_into_tables_that_a_sheet_holds() -> None:
    jobs = [job(k % 3 + 1) for k in range(14)]
    html = render_html(chain.chain(jobs))
    for table in re.findall(r"<table>.*?</table>", html, re.S):
        assert len(re.findall('<th scope="col"', table)) <= 8
    assert "jobs 1 to 6" in html
    assert "jobs 13 to 14" in html


def test_what_a_user_wrote_stays_text() -> None:
    hostile = "\"'><script>alert(1)</script><img src=x>{{7*7}}"
    jobs: Sequence[Report] = [job(1), job(2)]
    for each in jobs:
        each.asked.model = each.asked.method = each.benchmarks[0].name = each.benchmarks[0].figures[0].definition = (
            hostile
        )
        each.figures[0].metric = each.job_id = hostile
    html = render_html(chain.chain(jobs))
    Page(html)
    assert "<script" not in html
    assert "<img" not in html


# --- from a shell


def test_from_files_to_files(tmp_path: Path) -> None:
    paths = []
    for number, made in enumerate(SAME_BASE):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_bytes(report.render_json(made))
    html, made_json = tmp_path / "out.html", tmp_path / "out.json"
    assert chain.main([*map(str, paths), "--html", str(html), "--json", str(made_json)]) == 0
    made = ChainReport.model_validate_json(made_json.read_bytes())
    assert made == chain.chain(SAME_BASE)
    assert html.read_text(encoding="utf-8") == render_html(made)


def test_every_file_that_is_no_report_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.loads(report.render_json(SAME_BASE[0]))
    files = {
        "good.json": json.dumps(good),
        "later.json": json.dumps(good | {"schema_version": "2"}),
        "other.json": json.dumps({"figures": []}),
        "no.json": "not JSON",
        "again.json": json.dumps(good | {"job_id": "ujob_again", "reverifies": "ujob_first"}),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    out = tmp_path / "out.json"
    paths = [str(tmp_path / name) for name in (*files, "absent.json")]
    assert chain.main([*paths, "--json", str(out)]) == 2
    told = capsys.readouterr().err
    assert "later.json has a schema version that this does not know" in told
    assert "other.json is not a report" in told
    assert "no.json is not a report" in told
    assert "job ujob_again is a reverification of job ujob_first: leave its report out" in told
    assert "absent.json cannot be read: No such file or directory" in told
    assert "good.json" not in told
    assert not out.exists()
    assert chain.main([paths[0], "--json", str(out)]) == 2
    assert "a chain has at least 2 reports" in capsys.readouterr().err


def test_an_absolute_bound_and_a_relative_one_are_compared_by_what_they_came_to() -> None:
    other = job(2)
    other.asked.constraint = Constraint(epsilon=0.75)
    assert not [sentence for sentence in chain.chain([job(1), other]).not_comparable if "ε" in sentence]
