"""The report of a chain as one HTML page, in the design of a job's report."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, get_args

from service.domain.job import VerdictResult
from service.domain.report import ChainReport, ChainSeries
from worker import chart, words
from worker.chart import FORGET, INK, RETAIN, SOFT, Frame, Picture, Scale
from worker.page import template

REQUEST = "request"  # the source of the requests' own figures
JOBS_PER_TABLE = 6  # as many columns as a sheet of paper holds
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 290, 56, 14, 58, 44
DRAWN = (  # of the figures, those whose course says most; every figure is in the tables
    "forget/probability",
    "forget/rouge_l_recall_unicode",
    "retain/probability",
    "retain/rouge_l_recall_unicode",
    "model_utility",
    "forget_quality",
    "forget_truth_ratio",
    "forget_knowmem_ROUGE",
    "forget_verbmem_ROUGE",
    "retain_knowmem_ROUGE",
    "extraction_strength",
    "privleak",
)


class Style(NamedTuple):
    """Told apart by dashes and by the marks' shape; the colour only helps."""

    color: str
    dashes: str
    mark: Callable[[float, float, str], str]


class Line(NamedTuple):
    name: str
    values: Sequence[float | None]  # one per job
    style: Style


BEFORE = Style(SOFT, "2 3", partial(chart.ring, radius=3.5))
AFTER = Style(FORGET, "", chart.disc)
BESIDE = Style(RETAIN, "7 4", chart.diamond)
BOUND = Style(INK, "7 4", chart.bar)


def render_html(chain: ChainReport) -> str:
    sizes = [job.forget_rows for job in chain.jobs]
    scaling = len({(job.base_digest, job.parent) for job in chain.jobs}) == 1 and len(set(sizes)) > 1
    count = len(chain.jobs)
    return template("chain.html").render(
        chain=chain,
        summary=summary(chain),
        over_jobs=_drawn(chain, list(range(1, count + 1)), "job", "jobs"),
        over_rows=_drawn(chain, sizes, "forget rows of the request", "rows") if scaling else [],
        chunks=[range(first, min(first + JOBS_PER_TABLE, count)) for first in range(0, count, JOBS_PER_TABLE)],
        sources=_by_source(chain.series),
    )


def summary(chain: ChainReport) -> str:
    """What happened, in one sentence."""
    results = [job.result for job in chain.jobs]
    told = [f"{results.count(r)} {r}" for r in get_args(VerdictResult) if r in results]
    sizes, first = [job.forget_rows for job in chain.jobs], chain.jobs[0].model
    rows = f"{min(sizes):,} to {max(sizes):,} rows" if len(set(sizes)) > 1 else words.rows(sizes[0])
    models = f"model {first}" if all(job.model == first for job in chain.jobs) else "several models"
    return f"{len(results)} jobs on {models}, each to forget {rows}: {', '.join(told)}."


def _by_source(series: Sequence[ChainSeries]) -> list[tuple[str, list[ChainSeries]]]:
    found: dict[str, list[ChainSeries]] = {}
    for one in series:
        found.setdefault(one.source, []).append(one)
    return list(found.items())


# --- the pictures


def _drawn(chain: ChainReport, places: Sequence[int], axis: str, kind: str) -> list[tuple[str, list[Picture]]]:
    """The bound's course, and that of the chosen figures, each over the same places; by source."""
    bound = [
        Line("after", [job.retain_after for job in chain.jobs], AFTER),
        Line("before", [job.retain_before for job in chain.jobs], BEFORE),
        Line("bound ε", [job.epsilon for job in chain.jobs], BOUND),
    ]
    found = {REQUEST: [_picture(f"{kind}-bound", "Retain loss, nats per token", bound, places, axis)]}
    for k, series in enumerate(chain.series):
        if series.figure not in DRAWN or sum(value is not None for value in series.after) < 2:
            continue
        lines = [
            Line("after", series.after, AFTER),
            Line("before", series.before, BEFORE),
            Line("retrained", series.retrained, BESIDE),
        ]
        found.setdefault(series.source, []).append(_picture(f"{kind}-{k}", series.figure, lines, places, axis))
    return list(found.items())


def _picture(key: str, title: str, lines: Sequence[Line], places: Sequence[int], axis: str) -> Picture:
    """Lines over the jobs or over the sizes of their requests; in the latter, jobs stand in order of size."""
    given = [line for line in lines if any(value is not None for value in line.values)]
    known = [value for line in given for value in line.values if value is not None]
    frame = Frame(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM, _whole(places), chart.positive(known))
    parts = [*chart.level_axis(frame, title), *chart.floor_axis(frame, axis)]
    for k, (name, values, style) in enumerate(given):
        at = LEFT + 112 * k
        parts.append(chart.line([(at, 14), (at + 30, 14)], style.color, style.dashes))
        parts.append(style.mark(at + 15, 14, style.color) + chart.text(at + 36, 18, name))
        ordered = sorted(zip(places, values, strict=True), key=lambda point: point[0])
        for run in chart.runs(ordered):
            points = [frame.at(*point) for point in run]
            parts += [chart.line(points, style.color, style.dashes)] if len(points) > 1 else []
            parts += [style.mark(*point, style.color) for point in points]
    said = _words(title, given, places, axis)
    return Picture(chart.svg(key, WIDTH, HEIGHT, title, said, *parts), said)


def _whole(places: Sequence[int]) -> Scale:
    """From the least place to the most, with ticks where a job is, as far as their numbers fit."""
    least, most = min(places), max(places)
    span = (most - least) or 1
    ticks = list[float]()
    for place in sorted(set(places)):
        if not ticks or place - ticks[-1] >= span / 10:
            ticks.append(float(place))
    return Scale(lambda v: 0.04 + 0.92 * (v - least) / span, ticks)


def _words(title: str, lines: Sequence[Line], places: Sequence[int], axis: str) -> str:
    """Of the first line, which is what the picture is about: where it begins and ends, and how far it goes."""
    main = lines[0]
    known = [(place, value) for place, value in zip(places, main.values, strict=True) if value is not None]
    if len({value for _, value in known}) == 1:
        return f"{title}, {main.name}: {words.number(known[0][1])} {_jobs(len(known))}."
    by_value = sorted(known, key=lambda point: point[1])
    where = "at job {}" if axis == "job" else "with {:,} rows"
    ends = (min(known), max(known), by_value[0], by_value[-1])
    shown = words.pair(*(value for _, value in ends))
    first, last, least, most = (f"{text} {where.format(place)}" for text, (place, _) in zip(shown, ends, strict=True))
    return f"{title}, {main.name}: {first}, {last}; least {least}, most {most}."


def _jobs(count: int) -> str:
    return "in the one job that has it" if count == 1 else f"in all {count} jobs that have it"
