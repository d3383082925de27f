"""The registered benchmarks that a request names: their rows, their retrained reference, and what a report says of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

from service.domain.job import ModelEntry
from service.domain.report import BenchmarkFacts, BenchmarkFigure, BenchmarkSet
from service.store.storage import Storage
from worker import data, evaluate, files, model, registry
from worker.model import Network
from worker.records import Assignment, BenchmarkAssignment
from worker.suite import Result, Row, Sets, Suite, for_retrained, from_reference_json

Results = Mapping[str, Result]
TRUTH_RATIO = "forget_truth_ratio"


class Benchmark(NamedTuple):
    given: BenchmarkAssignment
    suite: Suite
    sets: Sets
    retrained: Results | None = None  # figures of a model that never saw the forget set

    def run(self, network: Network, cache: Storage | None = None) -> dict[str, Result]:
        return evaluate.run(network, self.suite, self.sets, self.retrained, cache)


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
    """The benchmark with the figures of its retrained reference: stored ones, or measured on that model, if there is either."""
    given, asked = benchmark.given, for_retrained(benchmark.suite)
    if given.retrained_scores is not None:
        stored = json.loads(files.read_bytes(storage, given.retrained_scores))
        return benchmark._replace(retrained=from_reference_json(stored))
    if given.retrained_model is not None:
        with other_model(job, given.retrained_model) as network:
            return benchmark._replace(retrained=evaluate.run(network, asked, benchmark.sets, cache=storage))
    return benchmark


@contextmanager
def other_model(job: Assignment, entry: ModelEntry) -> Iterator[Network]:
    """A second model, for as long as the block lasts: both are in memory then."""
    yield model.load(entry, job.models_root, job.device, job.dtype)


def retrained_without(named: Sequence[Benchmark], forget: Sequence[Row]) -> ModelEntry | None:
    """The retrained model of a benchmark whose forget set has all these rows: a model that never saw them."""
    for benchmark in named:
        known = {(row.get("question"), row.get("answer")) for row in benchmark.sets.get("forget", ())}
        if benchmark.given.retrained_model and all((r.get("question"), r.get("answer")) in known for r in forget):
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
                reason=new.reason,
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
        retrained=_named(given),
        figures=figures,
        truth_ratios={
            when: [row["score"] for row in results[TRUTH_RATIO].by_row.values()]
            for when, results in ratios.items()
            if TRUTH_RATIO in results
        },
    )


def _set_facts(benchmark: Benchmark, name: str, network: Network) -> BenchmarkSet:
    """Of its answers, as this model's tokeniser cuts them."""
    file, encoded = benchmark.given.files[name], []
    for (of, _), ask in benchmark.suite.asks(benchmark.sets).items():
        if of == name and ask.scored:
            texts = [ask.texts[place] for place in sorted(ask.texts)]
            encoded.append(data.encode(texts, network.tokenizer, network.entry.prompt_format, None))
    lengths = [[len(row.ids) for row in one.rows] for one in encoded]
    return BenchmarkSet(
        name=name,
        sha256=file.sha256,
        rows=file.rows,
        beyond_context=sum(max(row) > network.context_tokens for row in zip(*lengths, strict=True)),
        unmeasured_rows=len(encoded[0].unmeasured) if encoded else 0,
    )


def _named(given: BenchmarkAssignment) -> str | None:
    if given.retrained_model is not None:
        return f"the registered model {given.retrained_model.name}"
    if given.retrained_scores is not None:
        return f"stored figures, sha256:{given.retrained_scores.sha256}"
    return None
