"""Which figures a request's gates can be on, and what is wrong with those that are not on one."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from service.domain.catalog import Catalog
from service.domain.errors import FieldProblem
from service.domain.job import Audit, Recipe

AUDIT = "audit"
AUDITED = ("probability", "extraction_strength")
SETS = ("forget", "retain", "holdout")  # of the request, whose figures have names that begin so
RESERVED = frozenset({AUDIT, *SETS})  # names that a benchmark cannot have, since its figures' names would begin so too


class Named(NamedTuple):
    """A benchmark that the request asks for."""

    suite: str
    retrained: bool  # whether it has a retrained reference


def problems(asked: Recipe, catalog: Catalog, benchmarks: Mapping[str, Named]) -> Iterator[FieldProblem]:
    """Of the gates: on no figure that there will be, or twice the same.

    A figure can still turn out to be unmeasurable on the rows; then its gate fails.
    """
    known = _figures(asked.attacks, catalog, benchmarks)
    seen = set[tuple[str, str, str]]()
    for index, gate in enumerate(asked.gates):
        pointer, (of, _, figure) = f"/gates/{index}", gate.metric.partition("/")
        if of not in known:
            yield FieldProblem(f"{pointer}/metric", _unknown(of, sorted(known)), "enum")
        elif figure not in known[of]:
            detail = f"{of} has no figure {figure!r}; it has: {', '.join(known[of])}"
            yield FieldProblem(f"{pointer}/metric", detail, "enum")
        elif of in benchmarks and not _measurable(figure, benchmarks[of], catalog):
            detail = f"{figure} needs a retrained reference, and benchmark {of!r} was registered without one"
            yield FieldProblem(f"{pointer}/metric", detail, "retrained")
        elif (gate.metric, gate.op, gate.severity) in seen:
            yield FieldProblem(pointer, f"there is a gate {gate.metric} {gate.op} already", "duplicate")
        seen.add((gate.metric, gate.op, gate.severity))


def _figures(audit: Audit, catalog: Catalog, benchmarks: Mapping[str, Named]) -> dict[str, list[str]]:
    """By the first part of a gate's metric, what may stand behind it."""
    figures: dict[str, list[str]] = {}
    for name in catalog.suites["request"].figures:
        of, _, figure = name.partition("/")
        figures.setdefault(of, []).append(figure)
    for name, benchmark in benchmarks.items():
        figures[name] = list(catalog.suites[benchmark.suite].figures)
    figures[AUDIT] = [f"{attack}/{metric}" for attack in audit.attacks for metric in AUDITED]
    return figures


def _measurable(figure: str, benchmark: Named, catalog: Catalog) -> bool:
    return benchmark.retrained or not catalog.suites[benchmark.suite].figures[figure].retrained


def _unknown(of: str, known: list[str]) -> str:
    return f"{of!r} is neither a set nor a benchmark that is asked for; there are: {', '.join(known)}"
