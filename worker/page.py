"""The report as one HTML page that needs nothing else: no script, no font, no network."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment as Templates
from jinja2 import FileSystemLoader, StrictUndefined, Template

from service.domain.report import EARLIER, AuditEntry, BenchmarkFacts, BenchmarkFigure, Figure, Report
from worker import course, pictures, words

WHOLE = ("model_utility", "forget_quality", "forget_quality_ks_statistic", "privleak", "privleak_vs_chance")
MARKS = {"PASSED": "✓", "WARNED": "!", "FAILED": "✗", "NOT_KNOWN": "="}
PARTS = {  # of a benchmark, by how the names of its figures begin
    "retain_": "Retain set",
    "ra_": "Real authors",
    "wf_": "World facts",
    "mia_": "Membership inference: forget rows against holdout rows",
}


def render_html(report: Report) -> str:
    facts = report.constraint
    return template("report.html").render(
        report=report,
        summary=words.summary(report),
        three=words.three(report),
        bound=pictures.bound(facts) if report.verdict.result != "NOT_KNOWN" else None,
        course=course.picture(
            report.trajectory, facts.epsilon, report.released.step, released=report.released.published
        ),
        scatters=_pictures(pictures.scatter(name.partition("/")[0], points) for name, points in report.rows.items()),
        ratios=_pictures(
            pictures.distribution(f"ratios-{k}", of.name, of.truth_ratios) for k, of in enumerate(report.benchmarks)
        ),
        attacks=pictures.attacks(report.audit),
        groups=_named({"Forget set": _of(report, "forget"), "Retain set": _of(report, "retain")}),
        benchmarks=[(of, by_part(of)) for of in report.benchmarks],
        tried=_by_attack(report.audit),
        unmeasured=list(words.unmeasured(report)),
    )


def by_part(of: BenchmarkFacts) -> list[tuple[str, list[BenchmarkFigure]]]:
    """A benchmark's figures under the part of it that they are on: thirty in one list cannot be read."""
    groups: dict[str, list[BenchmarkFigure]] = {name: [] for name in ("The whole", "Forget set", *PARTS.values())}
    for figure in of.figures:
        part = next((part for start, part in PARTS.items() if figure.name.startswith(start)), "Forget set")
        groups["The whole" if figure.name in WHOLE else part].append(figure)
    return _named(groups)


@cache
def template(name: str) -> Template:
    """With the ways to write numbers that both pages use."""
    loader = FileSystemLoader(Path(__file__).parent)
    templates = Templates(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.globals |= {
        "number": words.number,
        "pair": words.pair,
        "interval": words.interval,
        "attack_words": words.ATTACKS,
        "gate_words": words.GATES,
    }
    templates.globals |= {"earlier": EARLIER, "marks": MARKS}
    return templates.get_template(name)


def _of(report: Report, which: str) -> list[Figure]:
    return [figure for figure in report.figures if figure.set == which]


def _named(groups: Mapping[str, Sequence[Any]]) -> list[tuple[str, Any]]:
    """Those that have something."""
    return [(name, figures) for name, figures in groups.items() if figures]


def _pictures(drawn: Any) -> list[Any]:
    return [picture for picture in drawn if picture is not None]


def _by_attack(audit: Sequence[AuditEntry]) -> list[tuple[str, list[AuditEntry]]]:
    found: dict[str, list[AuditEntry]] = {}
    for entry in audit:
        found.setdefault(entry.attack, []).append(entry)
    return list(found.items())
