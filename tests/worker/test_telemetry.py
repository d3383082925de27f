"""The worker's figures: a job's gauges follow its last step, linger, and go; totals add up."""

import pytest
from prometheus_client import CollectorRegistry

from service.domain.job import Stage, Status
from worker.records import ConstraintRecord, ResumedRecord, StageRecord, StepRecord
from worker.telemetry import Telemetry


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def telemetry(registry: CollectorRegistry, clock: Clock) -> Telemetry:
    return Telemetry(registry, ["pdu"], ["any", "cpu"], linger_s=60, clock=clock)


def step(number: int, dual: float) -> StepRecord:
    return StepRecord(
        step=number,
        losses={"forget": 1.5, "retain": 0.4},
        dual={"retain": dual},
        violation={"retain": -0.2},
        learning_rate=0.01,
        gradient_norm=3.0,
        tokens=100 * number,
        tokens_per_second=10.0,
        elapsed_seconds=1.0,
    )


def series_of(registry: CollectorRegistry, job_id: str) -> dict[tuple[str, str], float]:
    """(name, second label) -> value"""
    return {
        (sample.name, next((v for k, v in sample.labels.items() if k != "job_id"), "")): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.labels.get("job_id") == job_id
    }


def test_tokens_count_once_however_many_attempts_tell_of_them(
    registry: CollectorRegistry, telemetry: Telemetry
) -> None:
    telemetry.claimed(("a", 1), "pdu")
    telemetry.record(("a", 1), step(10, 1.0))
    telemetry.ended(("a", 1), Status.QUEUED)
    telemetry.claimed(("a", 2), "pdu")
    telemetry.record(("a", 2), ResumedRecord(step=10, tokens=1000))
    telemetry.record(("a", 2), step(11, 1.0))
    assert registry.get_sample_value("unlearn_training_tokens_total", {"method": "pdu"}) == 1100


def test_the_gauges_of_a_job_are_those_of_its_last_step(registry: CollectorRegistry, telemetry: Telemetry) -> None:
    telemetry.claimed(("a", 1), "pdu")
    assert series_of(registry, "a") == {}
    telemetry.record(("a", 1), ConstraintRecord(epsilon=0.6, base_retain_loss=0.5))
    telemetry.record(("a", 1), step(1, dual=50.0))
    telemetry.record(("a", 1), step(2, dual=40.0))
    assert series_of(registry, "a") == {
        ("unlearn_solver_dual_variable", "retain"): 40.0,
        ("unlearn_solver_constraint_violation", "retain"): -0.2,
        ("unlearn_solver_loss", "forget"): 1.5,
        ("unlearn_solver_loss", "retain"): 0.4,
        ("unlearn_solver_step", ""): 2,
        ("unlearn_solver_gradient_norm", ""): 3.0,
        ("unlearn_solver_learning_rate", ""): 0.01,
        ("unlearn_solver_epsilon", "retain"): 0.6,
    }


def test_the_gauges_of_an_ended_job_can_be_scraped_for_a_while(
    registry: CollectorRegistry, telemetry: Telemetry, clock: Clock
) -> None:
    for job_id in ("a", "b"):
        telemetry.claimed((job_id, 1), "pdu")
        telemetry.record((job_id, 1), step(1, dual=50.0))
    telemetry.ended(("a", 1), Status.SUCCEEDED)
    clock.now += 59
    assert series_of(registry, "a")
    clock.now += 1
    assert not series_of(registry, "a")
    assert series_of(registry, "b")


def test_a_job_that_is_claimed_again_begins_anew(registry: CollectorRegistry, telemetry: Telemetry) -> None:
    for _ in range(2):
        telemetry.claimed(("a", 1), "pdu")
        assert not series_of(registry, "a")
        telemetry.record(("a", 1), step(3, dual=1.0))
        telemetry.ended(("a", 1), Status.QUEUED)
    assert registry.get_sample_value("unlearn_training_tokens_total", {"method": "pdu"}) == 600


def test_attempts_of_one_job_that_overlap_are_told_apart(
    registry: CollectorRegistry, telemetry: Telemetry, clock: Clock
) -> None:
    telemetry.claimed(("a", 10), "pdu")
    telemetry.claimed(("a", 2), "pdu")  # its thread was slower
    telemetry.record(("a", 10), step(3, dual=1.0))
    telemetry.record(("a", 2), step(9, dual=9.0))
    shown = [s for f in registry.collect() for s in f.samples if s.name == "unlearn_solver_step"]
    assert [(sample.labels["job_id"], sample.value) for sample in shown] == [("a", 3)], (
        "one series: the later attempt's"
    )
    telemetry.ended(("a", 2), None)
    clock.now += 61
    assert series_of(registry, "a")
    telemetry.record(("a", 10), step(3, dual=1.0))
    telemetry.ended(("a", 10), Status.SUCCEEDED)
    assert registry.get_sample_value("unlearn_training_tokens_total", {"method": "pdu"}) == 1200


def test_totals(registry: CollectorRegistry, telemetry: Telemetry, clock: Clock) -> None:
    value = registry.get_sample_value
    done = {"method": "pdu", "status": "succeeded"}
    assert value("unlearn_training_tokens_total", {"method": "pdu"}) == 0
    assert value("unlearn_job_duration_seconds_count", done) == 0

    telemetry.waited("cpu", 7.0)
    telemetry.claimed(("a", 1), "pdu")
    telemetry.record(("a", 1), StageRecord(stage=Stage.LOADING_MODEL))
    clock.now += 10
    telemetry.record(("a", 1), StageRecord(stage=Stage.UNLEARNING))
    for number in (1, 2, 3):
        telemetry.record(("a", 1), step(number, dual=1.0))
    clock.now += 90
    telemetry.ended(("a", 1), Status.SUCCEEDED)

    assert value("unlearn_job_queue_wait_seconds_bucket", {"queue": "cpu", "le": "15.0"}) == 1
    assert value("unlearn_job_queue_wait_seconds_bucket", {"queue": "cpu", "le": "5.0"}) == 0
    assert value("unlearn_stage_duration_seconds_sum", {"stage": "loading_model"}) == 10
    assert value("unlearn_stage_duration_seconds_sum", {"stage": "unlearning"}) == 90
    assert value("unlearn_job_duration_seconds_sum", done) == 100
    assert value("unlearn_training_tokens_total", {"method": "pdu"}) == 300
    assert any(sample.name == "unlearn_build_info" for family in registry.collect() for sample in family.samples)


def test_an_attempt_that_did_not_end_its_job_has_no_duration(registry: CollectorRegistry, telemetry: Telemetry) -> None:
    for status in (Status.QUEUED, None):
        telemetry.claimed(("a", 1), "pdu")
        telemetry.ended(("a", 1), status)
    counts = [
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "unlearn_job_duration_seconds_count"
    ]
    assert len(counts) == 3  # succeeded, failed, cancelled
    assert sum(counts) == 0


def test_fewer_series_than_the_budget(registry: CollectorRegistry, telemetry: Telemetry) -> None:
    for number in range(8):
        telemetry.claimed((str(number), 1), "pdu")
        telemetry.record((str(number), 1), step(1, dual=1.0))
    assert sum(len(family.samples) for family in registry.collect()) < 500
