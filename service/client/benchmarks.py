"""Data that a suite reads, registered once."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from service.client.sets import Files, Given
from service.client.shapes import Benchmark, Suite
from service.client.wire import Wire, at, once

BENCHMARKS, SUITES = "/v1/benchmarks", "/v1/suites"
REGISTER_TIMEOUT_S = 600.0  # the service reads every row, and fetches what is on the Hub


class HubSet(NamedTuple):
    """A file of a public data set on the Hugging Face Hub, at one commit, which the service fetches."""

    repo: str  # owner/name
    revision: str  # 40 hex digits
    path: str


class Benchmarks:
    def __init__(self, wire: Wire, files: Files) -> None:
        self._wire, self._files = wire, files

    def add(
        self,
        name: str,
        *,
        suite: str,
        corpus: str,
        sets: Mapping[str, Given | HubSet],
        retrained_model: str | None = None,
        retrained_scores: Given | None = None,
    ) -> Benchmark:
        """Upload the sets, each file once, and register them. Where it is refused, they are purged again.

        Args:
            corpus: what the data is, for the report.
            retrained_model: a registered model that never saw the forget set; or `retrained_scores`, its figures.
        """
        on_hub = {of: one._asdict() for of, one in sets.items() if isinstance(one, HubSet)}
        given = {f"sets {of}": ("eval_set", one) for of, one in sets.items() if not isinstance(one, HubSet)}
        if retrained_scores is not None:
            given["scores"] = ("eval_scores", retrained_scores)
        with self._files.uploaded(given) as ids:
            body = {
                "name": name,
                "suite": suite,
                "corpus": corpus,
                "sets": {of: on_hub.get(of) or ids[f"sets {of}"] for of in sets},
                "retrained_model": retrained_model,
                "retrained_scores": ids.get("scores"),
            }
            headers = once()
            return Benchmark.of(self._wire.json("POST", BENCHMARKS, body, headers=headers, timeout=REGISTER_TIMEOUT_S))

    def get(self, name: str) -> Benchmark:
        return Benchmark.of(self._wire.json("GET", at(BENCHMARKS, name)))

    def list(self) -> Iterator[Benchmark]:
        return map(Benchmark.of, self._wire.json("GET", BENCHMARKS)["data"])

    def remove(self, name: str) -> None:
        """With its files, but for those that another benchmark needs."""
        benchmark = self.get(name)
        self._wire.json("DELETE", at(BENCHMARKS, name))
        for file_id in {*benchmark.sets.values(), benchmark.retrained_scores}:
            if file_id is not None:
                self._files.discard(file_id)

    def suites(self) -> Iterator[Suite]:
        """What they take."""
        return map(Suite.of, self._wire.json("GET", SUITES)["data"])
