"""The report of a chain of jobs, from their reports: what holds on from job to job, and what changes with the size of a request.

    python -m worker.chain REPORT.json REPORT.json ... --html OUT.html --json OUT.json

MUSE asks both of an unlearning method: sustainability (one request after the other, each on the model that the last one left)
and scaling (one request, of more and more rows). Which of the two a chain shows is read from the jobs' parents and from the
models' digests, and said.

Reference: Shi et al. 2024, MUSE, arXiv 2407.06460.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from service.domain.errors import FieldProblem, InvalidRequest
from service.domain.report import (
    EARLIER,
    BenchmarkFacts,
    BenchmarkFigure,
    ChainJob,
    ChainReport,
    ChainSeries,
    Figure,
    Report,
)
from worker.chain_page import render_html
from worker.words import of_every_job

JOBS_MIN = 2


def read(paths: Sequence[Path]) -> list[Report]:
    """Raises InvalidRequest that names every file that is not a report of this version, and those of reverifications."""
    found, problems = [], []
    for path in paths:
        try:
            found.append(Report.model_validate_json(path.read_bytes()))
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            version = place == "schema_version"
            what = "has a schema version that this does not know" if version else "is not a report"
            problems.append(f"{path} {what}: {place + ': ' if place and not version else ''}{first['msg']}")
    problems += [
        f"job {report.job_id} is a reverification of job {report.reverifies}: leave its report out"
        for report in found
        if report.reverifies
    ]
    if len(paths) < JOBS_MIN:
        problems.append(f"a chain has at least {JOBS_MIN} reports")
    if problems:
        raise InvalidRequest(*(FieldProblem("", problem, "report") for problem in problems))
    return found


def chain(reports: Sequence[Report]) -> ChainReport:
    """In the order given."""
    return ChainReport(
        jobs=[_job(report) for report in reports],
        series=[*_own_series(reports), *_benchmark_series(reports)],
        comparable=list(_comparable(reports)),
        not_comparable=list(_not_comparable(reports)),
    )


def _job(report: Report) -> ChainJob:
    return ChainJob(
        job_id=report.job_id,
        created_at=report.created_at,
        model=report.asked.model,
        base_digest=report.base_model.digest,
        parent=report.parent.job_id if report.parent else None,
        method=report.asked.method,
        result=report.verdict.result,
        released=report.released.published,
        forget_rows=report.forget_set.rows,
        forget_digest=report.forget_set.digest,
        retain_digest=report.retain_set.digest,
        epsilon=report.constraint.epsilon,
        retain_before=report.constraint.before,
        retain_after=report.constraint.upper,
    )


# --- figures over the jobs


def _own_series(reports: Sequence[Report]) -> Iterator[ChainSeries]:
    tables = [{f"{figure.set}/{figure.metric}": figure for figure in report.figures} for report in reports]
    yield from _series("request", tables)


def _benchmark_series(reports: Sequence[Report]) -> Iterator[ChainSeries]:
    """A benchmark whose sets were others is another one, even under the same name."""
    for name in _benchmarks(reports):
        versions = dict.fromkeys(_sets(of) for report in reports for of in report.benchmarks if of.name == name)
        for number, sets in enumerate(versions, 1):
            tables = [
                {
                    figure.name: figure
                    for of in report.benchmarks
                    if of.name == name and _sets(of) == sets
                    for figure in of.figures
                }
                for report in reports
            ]
            yield from _series(name if len(versions) == 1 else f"{name} (sets {number})", tables)


def _series(source: str, tables: Sequence[dict[str, Figure] | dict[str, BenchmarkFigure]]) -> Iterator[ChainSeries]:
    """Of every figure that a job could measure."""
    for name in dict.fromkeys(name for table in tables for name in table):
        found = [table.get(name) for table in tables]
        form = next(figure for figure in found if figure is not None)
        if all(figure is None or figure.after is None for figure in found):
            continue
        yield ChainSeries(
            source=source,
            figure=name,
            definition=form.definition,
            better=form.better,
            benchmark=getattr(form, "benchmark", False),
            before=[None if figure is None else figure.before for figure in found],
            after=[None if figure is None else figure.after for figure in found],
            retrained=[getattr(figure, "retrained", None) for figure in found],
        )


def _benchmarks(reports: Sequence[Report]) -> list[str]:
    return list(dict.fromkeys(of.name for report in reports for of in report.benchmarks))


def _sets(of: BenchmarkFacts) -> tuple[tuple[str, str], ...]:
    return tuple((each.name, each.digest) for each in of.sets)


# --- what may be compared


def one_start(jobs: Sequence[ChainJob]) -> bool:
    """Whether all jobs started from the same model."""
    return len({(job.base_digest, job.parent) for job in jobs}) == 1


def each_from_the_last(jobs: Sequence[ChainJob]) -> bool:
    """Whether each job started from the adapter of the one before it. One whose rows the model did not know made none."""
    start = jobs[0].parent
    for job in jobs:
        if job.parent != start:
            return False
        start = start if job.result == "NOT_KNOWN" else job.job_id
    return True


def _comparable(reports: Sequence[Report]) -> Iterator[str]:
    jobs = [_job(report) for report in reports]
    sizes = {job.forget_rows for job in jobs}
    if each_from_the_last(jobs):
        yield (
            "By the reports, each job started from the adapter of the one before it: figures over the jobs show how a model "
            "fares that has been through all of them (sustainability)."
        )
    elif one_start(jobs):
        yield (
            "Every job started from the same model, so each job's figures are of its own request alone. That is a series of "
            "separate requests: it does not show how a model fares that has been through all of them (sustainability)."
        )
        if len(sizes) > 1:
            yield f"The requests are of {min(sizes):,} to {max(sizes):,} forget rows: figures over that number show scaling."
    else:
        yield (
            "The jobs did not all start from the same model, nor each from the adapter of the one before it. Where each base is "
            "the model that the job before it left, figures over the jobs show sustainability; the reports hold the digests of "
            "the bases, not where they come from."
        )
    for name in _benchmarks(reports):
        asked = [any(of.name == name for of in report.benchmarks) for report in reports]
        versions = {_sets(of) for report in reports for of in report.benchmarks if of.name == name}
        if len(versions) == 1 and sum(asked) > 1:
            yield f"Benchmark {name}: the same sets in {sum(asked)} of {len(jobs)} jobs, by their digests."


def _not_comparable(reports: Sequence[Report]) -> Iterator[str]:
    if _differ(reports, lambda report: report.forget_set.digest):
        yield "Figures of the forget sets: each job's are of its own rows."
    if _differ(reports, lambda report: report.retain_set.digest):
        yield "Figures of the retain sets, the bound's included: the jobs had different ones."
    jobs = [_job(report) for report in reports]
    if each_from_the_last(jobs):
        yield "Figures before: each job's are of the model that the job before it left, and so is what its relative bound is on."
    elif not one_start(jobs):
        yield "Figures before: they are of different models."
    told: tuple[tuple[str, Callable[[Report], object]], ...] = (
        ("The bounds ε differ, and with them what a verdict required", lambda report: report.constraint.epsilon),
        (
            "The methods or their settings differ",
            lambda report: (report.asked.method, repr(report.asked.hyperparameters)),
        ),
        ("The budgets differ", lambda report: report.asked.budget),
        ("The adapters' shapes differ", lambda report: report.asked.lora),
        ("The seeds differ", lambda report: report.asked.seed),
        ("Not all jobs were attacked in the same ways", lambda report: [(e.attack, e.setting) for e in report.audit]),
        ("Not all jobs ran the same benchmarks", lambda report: [of.name for of in report.benchmarks]),
        ("The prompt formats differ", lambda report: report.base_model.prompt_format),
        ("The numbers' precision differs", lambda report: report.base_model.dtype),
        ("The versions of the service differ", lambda report: report.environment.code_version),
    )
    yield from (f"{words}." for words, of in told if _differ(reports, of))
    if _differ([report for report in reports if report.verdict.result != "NOT_KNOWN"], _gates):
        yield "The requests' own gates differ."
    untrained = [report.job_id for report in reports if report.verdict.result == "NOT_KNOWN"]
    if untrained:
        yield f"The model did not know the rows of {', '.join(untrained)}: nothing was trained, so there are no figures after."
    unreleased = [report.job_id for report in reports if not report.released.published]
    unreleased = [job_id for job_id in unreleased if job_id not in untrained]
    if unreleased:
        yield f"Of {', '.join(unreleased)} no adapter was released: the figures after are of the last iterate."
    for name in _benchmarks(reports):
        found = [of for report in reports for of in report.benchmarks if of.name == name]
        if len({_sets(of) for of in found}) > 1:
            yield f"Benchmark {name}: its sets were not the same in all jobs, so it is listed once for each."
        if len({of.retrained for of in found}) > 1:
            yield f"Benchmark {name}: figures against a retrained reference, which was not the same in all jobs."


def _gates(report: Report) -> list[tuple[object, ...]]:
    """Beside those of every job and earlier jobs', whose thresholds follow from the model."""
    asked = [g for g in report.verdict.gates if not of_every_job(g.metric) and not g.metric.startswith(EARLIER)]
    return [(gate.metric, gate.op, gate.threshold, gate.severity) for gate in asked]


def _differ(reports: Sequence[Report], of: Callable[[Report], object]) -> bool:
    return any(of(report) != of(reports[0]) for report in reports[1:])


# --- from a shell


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.chain", description="Make one report of several, in order.")
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json")
    parser.add_argument("--html", type=Path, metavar="OUT.html")
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    options = parser.parse_args(arguments)
    if options.html is None and options.json is None:
        parser.error("give --html, --json or both")
    try:
        made = chain(read(options.reports))
        if options.json is not None:
            options.json.write_text(made.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if options.html is not None:
            options.html.write_text(render_html(made), encoding="utf-8")
    except (InvalidRequest, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
