"""Figures of jobs, read from Postgres when they are scraped, so that every replica of the API tells the same."""

import math
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from threading import Lock
from typing import get_args

import structlog
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.api.deps import Parts
from service.domain.deletion import Regulation, RequestStatus
from service.domain.job import FailureCode, Status, VerdictResult
from service.store.metrics import (
    ATTEMPTS_LOST,
    FENCED_WRITES,
    JOB_VERDICTS,
    JOBS_FINISHED,
    LEASES_EXPIRED,
    WEBHOOK_DELIVERIES,
    AuditFigures,
    Count,
    Figures,
    Outbox,
    Requests,
    audit_figures,
    counters,
    figures,
)
from service.store.session import at_most

log = structlog.get_logger(__name__)

TIMEOUT_S = 2.0
VERDICTS: tuple[str, ...] = get_args(VerdictResult)
DELIVERIES = ("delivered", "retried", "failed")
COUNTERS = {
    JOBS_FINISHED: "Jobs that ended",
    JOB_VERDICTS: "Verdicts of succeeded jobs",
    ATTEMPTS_LOST: "Attempts that ended without a result, whether or not another followed",
    LEASES_EXPIRED: "Leases that expired because their worker fell silent",
    WEBHOOK_DELIVERIES: "Attempts to deliver a webhook: delivered, to be retried, or failed for good",
    FENCED_WRITES: "Writes refused because their attempt no longer held the job",
}


def build_info(registry: CollectorRegistry) -> None:
    info = Gauge("unlearn_build_info", "Which code runs", ["version"], registry=registry)
    info.labels(version("unlearning-service")).set(1)


class JobFigures(Collector):
    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._lock = Lock()
        self._read_at = float("-inf")
        self._metrics: list[Metric] = []

    def describe(self) -> Iterable[Metric]:
        return ()  # else registering would ask the database

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            if time.monotonic() - self._read_at >= self._parts.settings.metrics_cache_s:
                self._metrics = list(self._read())
                self._read_at = time.monotonic()
            return self._metrics

    def _read(self) -> Iterator[Metric]:
        success = GaugeMetricFamily("unlearn_collector_success", "1: the figures of jobs below are there")
        try:
            with self._parts.sessions.begin() as s:
                at_most(s, TIMEOUT_S)
                gauges, counts, logs = figures(s), counters(s), audit_figures(s)
        except Exception as error:
            log.warning("no figures of jobs", error=error)
            success.add_metric([], 0)
            yield success
            return
        success.add_metric([], 1)
        yield success
        yield from self._gauges(gauges)
        yield from _requests(gauges.requests)
        yield from _outbox(gauges.outbox)
        yield from _audit(logs)
        yield from self._counters(counts)

    def _gauges(self, found: Figures) -> Iterator[Metric]:
        queues = sorted({*self._parts.settings.gpu_classes, *(queue for _, queue in found.jobs)})
        jobs = GaugeMetricFamily("unlearn_jobs", "Jobs by status", labels=["status", "queue"])
        waiting = GaugeMetricFamily(
            "unlearn_queue_oldest_age_seconds", "How long the job that waits longest has waited", labels=["queue"]
        )
        stalled = GaugeMetricFamily(
            "unlearn_queue_stalled_age_seconds",
            "How long the job has waited longest that neither workers without a free slot nor its tenant's limit keep waiting",
            labels=["queue"],
        )
        silence = GaugeMetricFamily(
            "unlearn_running_heartbeat_age_seconds_max", "Since the most silent worker was heard of", labels=["queue"]
        )
        workers = GaugeMetricFamily(
            "unlearn_workers", "Workers heard of in the last minutes, by the queues that they hear", labels=["queue"]
        )
        for queue in queues:
            for status in Status:
                jobs.add_metric([status, queue], found.jobs.get((status, queue), 0))
            waiting.add_metric([queue], found.queue_oldest_age_s.get(queue, 0.0))
            stalled.add_metric([queue], found.queue_stalled_age_s.get(queue, 0.0))
            silence.add_metric([queue], found.heartbeat_age_max_s.get(queue, 0.0))
            workers.add_metric([queue], found.workers.get(queue, 0))
        yield from (jobs, waiting, stalled, silence, workers)

    def _counters(self, counts: list[Count]) -> Iterator[Metric]:
        """Every set of labels from the start, at 0: else the first increase of each would be invisible to rate()."""
        values = dict.fromkeys(self._expected(), 0)
        values |= {(count.name, tuple(sorted(count.labels.items()))): count.value for count in counts}
        for name, documentation in COUNTERS.items():
            of_name = {dict_: value for (found, dict_), value in values.items() if found == name}
            labels = sorted({label for pairs in of_name for label, _ in pairs})
            family = CounterMetricFamily(name, documentation, labels=labels)
            for pairs, value in of_name.items():
                family.add_metric([dict(pairs).get(label, "") for label in labels], value)
            yield family

    def _expected(self) -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
        yield FENCED_WRITES, ()
        for queue in self._parts.settings.gpu_classes:
            yield LEASES_EXPIRED, (("queue", queue),)
        for failure in FailureCode:
            yield ATTEMPTS_LOST, (("code", str(failure)),)
        for result in VERDICTS:
            yield JOB_VERDICTS, (("result", result),)
        for result in DELIVERIES:
            yield WEBHOOK_DELIVERIES, (("result", result),)
        for method in self._parts.catalog.methods:
            ends = [(Status.SUCCEEDED, ""), (Status.CANCELLED, ""), *((Status.FAILED, code) for code in FailureCode)]
            for status, code in ends:
                labels = {"status": str(status), "method": method, "failure_code": str(code)}
                yield JOBS_FINISHED, tuple(sorted(labels.items()))


def _requests(found: Requests) -> Iterator[Metric]:
    count = GaugeMetricFamily(
        "unlearn_deletion_requests", "Deletion requests by status", labels=["status", "regulation"]
    )
    for status in RequestStatus:
        for regulation in Regulation:
            count.add_metric([status, regulation], found.by_kind.get((status, regulation), 0))
    overdue = GaugeMetricFamily("unlearn_deletion_requests_overdue", "Open deletion requests whose time has run out")
    overdue.add_metric([], found.overdue)
    due = GaugeMetricFamily(
        "unlearn_deletion_request_next_due_timestamp_seconds",
        "When the open deletion request that is due first is due; +Inf: none is open",
    )
    due.add_metric([], math.inf if found.next_due_s is None else found.next_due_s)
    yield from (count, overdue, due)


def _outbox(found: Outbox) -> Iterator[Metric]:
    pending = GaugeMetricFamily("unlearn_outbox_pending", "Messages that are still to be delivered", labels=["kind"])
    pending.add_metric(["webhook"], found.pending)
    oldest = GaugeMetricFamily(
        "unlearn_outbox_oldest_age_seconds",
        "How long a message that is due has waited without anybody turning to its receiver",
        labels=["kind"],
    )
    oldest.add_metric(["webhook"], found.oldest_age_s)
    yield from (pending, oldest)


def _audit(found: AuditFigures) -> Iterator[Metric]:
    """A log that nobody checks is told by its age: the last outcome alone would stay good for ever."""
    yield CounterMetricFamily("unlearn_audit_events_total", "Entries of the audit logs", value=found.events)
    yield GaugeMetricFamily(
        "unlearn_audit_chain_valid", "1: the audit log of every tenant held when it was last checked", value=found.valid
    )
    yield GaugeMetricFamily(
        "unlearn_audit_check_age_seconds",
        "Since the audit log that was not checked for longest was checked",
        value=found.check_age_s,
    )
