"""The registered benchmarks that a request names: their rows, their retrained reference, and what a report says of them."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from service.domain import scores
from service.domain.errors import JobFailure
from service.domain.job import FailureCode, ModelEntry
from service.domain.report import BenchmarkFacts, BenchmarkFigure, BenchmarkSet
from service.store.storage import Storage
from worker import evaluate, files, model, registry, scoring
from worker.model import Network
from worker.records import Assignment, BenchmarkAssignment
from worker.suite import Result, Row, Sets, Suite, example, for_retrained, from_reference_json

Results = Mapping[str, Result]
TRUTH_RATIO = "forget_truth_ratio"


class Benchmark(NamedTuple):
    given: BenchmarkAssignment
    suite: Suite
    sets: Sets
    retrained: Results | None = None  # figures of a model that never saw the forget set
    untied: Sequence[str] = ()  # the sets of which nothing shows that those figures are of their rows

    def run(self, network: Network, cache: Storage | None = None) -> dict[str, Result]:
        return evaluate.run(network, self.suite, self.sets, self.retrained, cache)

    def cache(self, job: Assignment) -> Storage:
        """Where what a registered model says of its texts is kept; DELETE /v1/benchmarks/NAME removes it with the rest."""
        return files.sealed_with(job.storage_url, self.given.files.values(), below=self.given.folder)


def read(job: Assignment, storage: Storage) -> list[Benchmark]:
    """The rows of the request's benchmarks, from the files that they were registered with."""
    return [
        Benchmark(
            given,
            registry.build("suites", given.suite, {}),
            {name: files.read_rows(storage, file) for name, file in given.files.items()},
        )
        for given in job.benchmarks
    ]


def with_retrained(job: Assignment, storage: Storage, benchmark: Benchmark) -> Benchmark:
    """The benchmark with the figures of its retrained reference: stored ones, or measured on that model, if there is either.

    While it is measured two models are in memory. Raises JobFailure where stored figures are of other rows than the sets'.
    """
    given, asked = benchmark.given, for_retrained(benchmark.suite)
    if given.retrained_scores is not None:
        stored = scores.read(files.read_bytes(storage, given.retrained_scores))
        for name, rows in benchmark.sets.items():
            if found := scores.mismatch(stored, name, rows):
                raise JobFailure(
                    FailureCode.INVALID_FILE, f"the retrained reference of benchmark {given.name}: {found}"
                )
        compared = [name for name in scores.PARTS if name in benchmark.sets]
        return benchmark._replace(retrained=from_reference_json(stored.figures), untied=scores.untied(stored, compared))
    if given.retrained_model is not None:
        network = model.load(given.retrained_model, job.models_root, job.device, job.dtype)
        retrained = evaluate.run(network, asked, benchmark.sets, cache=benchmark.cache(job))
        return benchmark._replace(retrained=retrained)
    return benchmark


def retrained_without(named: Sequence[Benchmark], forget: Sequence[Row]) -> ModelEntry | None:
    """The retrained model of a benchmark whose forget set has all these rows: a model that never saw them."""
    wanted = {example(row) for row in forget}
    for benchmark in named:
        if benchmark.given.retrained_model and wanted <= {example(row) for row in benchmark.sets.get("forget", ())}:
            return benchmark.given.retrained_model
    return None


def facts(benchmark: Benchmark, network: Network, before: Results, after: Results) -> BenchmarkFacts:
    """What the report says of it. Figures that are None before and after have the reason of after."""
    given, retrained = benchmark.given, benchmark.retrained or {}
    figures = []
    for name, form in benchmark.suite.figures.items():
        old, new = before[name], after[name]
        figures.append(
            BenchmarkFigure(
                name=name,
                definition=form.definition,
                better=form.better,
                benchmark=form.benchmark,
                before=old.value,
                after=new.value,
                retrained=retrained[name].value if name in retrained else None,
                before_interval=old.interval,
                after_interval=new.interval,
                rows=new.rows,
                reason=new.reason or old.reason,
            )
        )
    ratios: dict[Literal["before", "after", "retrained"], Results] = {"before": before, "after": after}
    if TRUTH_RATIO in retrained:
        ratios["retrained"] = retrained
    return BenchmarkFacts(
        name=given.name,
        suite=given.suite,
        corpus=given.corpus,
        sets=[_set_facts(benchmark, name, network) for name in benchmark.sets],
        retrained=_named(benchmark),
        figures=figures,
        truth_ratios={
            when: [row["score"] for row in results[TRUTH_RATIO].by_row.values()]
            for when, results in ratios.items()
            if TRUTH_RATIO in results
        },
    )


def _set_facts(benchmark: Benchmark, name: str, network: Network) -> BenchmarkSet:
    """As this model's tokeniser cuts its texts, shots and all."""
    file, beyond, unmeasured = benchmark.given.files[name], set[int](), set[int]()
    for (of, _), ask in benchmark.suite.asks(benchmark.sets).items():
        if of != name:
            continue
        places, encoded = sorted(ask.texts), scoring.encoded(network, ask)
        beyond |= {
            place for place, row in zip(places, encoded.rows, strict=True) if len(row.ids) > network.context_tokens
        }
        unmeasured |= {places[number - 1] for number in encoded.unmeasured if ask.scored}
    return BenchmarkSet(
        name=name, digest=file.digest, rows=file.rows, beyond_context=len(beyond), unmeasured_rows=len(unmeasured)
    )


def _named(benchmark: Benchmark) -> str | None:
    given = benchmark.given
    if given.retrained_model is not None:
        return f"the registered model {given.retrained_model.name}"
    if given.retrained_scores is None:
        return None
    named = f"stored figures, {given.retrained_scores.digest}"
    if benchmark.untied:
        named += f"; nothing in them shows that they are of the rows of {' and '.join(benchmark.untied)}"
    return named
