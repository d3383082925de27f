"""What the worker process shows to Prometheus: the solver's figures of each running job, and totals over all jobs.

The solver's gauges are made at scrape time of the latest record of each job, so a job's series go when it goes: there
are never many more than jobs that run, or ended within the last `linger_s`.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from threading import Lock
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from service.domain.job import TERMINAL, Stage, Status
from worker.records import AnyRecord, ConstraintRecord, ResumedRecord, StageRecord, StepRecord

Key = tuple[str, int]  # of an attempt: job_id, fence
BUCKETS_S = (1, 5, 15, 60, 300, 900, 1800, 3600, 7200, 14_400, 28_800, 86_400)


class _Gauge(NamedTuple):
    help: str
    label: str | None  # beside job_id: what the keys of the values are
    values: Callable[[StepRecord], Mapping[str, float]]


STEP_GAUGES = {
    "dual_variable": _Gauge("Multiplier that the latest step used", "constraint", lambda step: step.dual),
    "constraint_violation": _Gauge(
        "Loss minus bound on the latest batch; positive: violated", "constraint", lambda step: step.violation
    ),
    "loss": _Gauge("On the latest batch; retain: nats per token", "term", lambda step: step.losses),
    "step": _Gauge("Latest step", None, lambda step: {"": step.step}),
    "gradient_norm": _Gauge("Of the composed direction, before clipping", None, lambda step: {"": step.gradient_norm}),
    "learning_rate": _Gauge("Of the latest step", None, lambda step: {"": step.learning_rate}),
}


@dataclass
class _Attempt:
    method: str
    began: float
    stage: tuple[Stage, float] | None = None  # and since when
    step: StepRecord | None = None
    tokens: int = 0  # trained until then
    epsilon: float | None = None
    ended: float | None = None


class Telemetry(Collector):
    """Methods may be called from any thread. `key` is the attempt's (job_id, fence).

    Args:
        methods, gpu_classes: the values that these labels can take. Their series begin at 0, so that rate() sees the
            first rise.
        clock: seconds.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        methods: Collection[str],
        gpu_classes: Collection[str],
        linger_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._linger_s = linger_s
        self._clock = clock
        self._attempts: dict[Key, _Attempt] = {}  # a job's attempt may begin here before the one that it lost has ended
        self._lock = Lock()

        def histogram(name: str, help_: str, **labels: Collection[str]) -> Histogram:
            made = Histogram(name, help_, list(labels), buckets=BUCKETS_S, registry=registry)
            for values in product(*labels.values()):
                made.labels(*values)
            return made

        ends = sorted(TERMINAL)
        self._job_s = histogram(
            "unlearn_job_duration_seconds", "Of the attempt that ended a job", method=methods, status=ends
        )
        self._wait_s = histogram("unlearn_job_queue_wait_seconds", "From queued to the first claim", queue=gpu_classes)
        self._stage_s = histogram("unlearn_stage_duration_seconds", "Of a stage of a job", stage=list(Stage))
        self._tokens = Counter(
            "unlearn_training_tokens_total", "Positions trained on, both sets", ["method"], registry=registry
        )
        for method in methods:
            self._tokens.labels(method)
        registry.register(self)

    def waited(self, gpu_class: str, seconds: float) -> None:
        """A job was claimed for the first time."""
        self._wait_s.labels(gpu_class).observe(seconds)

    def claimed(self, key: Key, method: str) -> None:
        """An attempt begins."""
        with self._lock:
            self._attempts[key] = _Attempt(method, self._clock())

    def record(self, key: Key, record: AnyRecord) -> None:
        """The runner said this."""
        with self._lock:
            attempt = self._attempts[key]
            match record:
                case StageRecord():
                    self._end_stage(attempt)
                    attempt.stage = (record.stage, self._clock())
                case StepRecord():
                    self._tokens.labels(attempt.method).inc(max(0, record.tokens - attempt.tokens))
                    attempt.step, attempt.tokens = record, record.tokens
                case ResumedRecord():
                    attempt.tokens = record.tokens  # an earlier attempt told of them
                case ConstraintRecord():
                    attempt.epsilon = record.epsilon

    def ended(self, key: Key, status: Status | None) -> None:
        """The attempt is over, and the job has gone to `status`; None: somebody else has it."""
        with self._lock:
            attempt = self._attempts[key]
            self._end_stage(attempt)
            attempt.ended = self._clock()
        if status in TERMINAL:
            self._job_s.labels(attempt.method, status).observe(attempt.ended - attempt.began)

    def _end_stage(self, attempt: _Attempt) -> None:
        if attempt.stage is not None:
            stage, since = attempt.stage
            self._stage_s.labels(stage).observe(self._clock() - since)
            attempt.stage = None

    def collect(self) -> Iterator[GaugeMetricFamily | InfoMetricFamily]:
        with self._lock:
            forgotten = self._clock() - self._linger_s
            self._attempts = {
                key: attempt
                for key, attempt in sorted(self._attempts.items())
                if attempt.ended is None or attempt.ended > forgotten
            }
            latest = {
                job_id: attempt for (job_id, _), attempt in self._attempts.items()
            }  # the highest fence comes last
            steps = {job_id: attempt.step for job_id, attempt in latest.items() if attempt.step is not None}
            epsilons = {job_id: attempt.epsilon for job_id, attempt in latest.items() if attempt.epsilon is not None}
        for name, gauge in STEP_GAUGES.items():
            labels = ["job_id", gauge.label] if gauge.label else ["job_id"]
            family = GaugeMetricFamily(f"unlearn_solver_{name}", gauge.help, labels=labels)
            for job_id, step in steps.items():
                for key, value in gauge.values(step).items():
                    family.add_metric([job_id, key][: len(labels)], value)
            yield family
        family = GaugeMetricFamily("unlearn_solver_epsilon", "Bound, nats per token", labels=["job_id", "constraint"])
        for job_id, epsilon in epsilons.items():
            family.add_metric([job_id, "retain"], epsilon)
        yield family
        yield InfoMetricFamily("unlearn_build", "What runs here", {"version": version("unlearning-service")})
