"""Claims, fences, retries and races, by real sessions against a real Postgres."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from service.domain.errors import InvalidTransition, NotFound
from service.domain.job import (
    BenchmarkSpec,
    Failure,
    FailureCode,
    GateResult,
    JobSpec,
    Limits,
    Resources,
    Stage,
    Status,
    Verdict,
)
from service.store import artifacts, benchmarks, files, jobs, metrics, models, reads, workers
from service.store.rows import ArtifactRow, Beat, CheckRow, Claim, ConstraintRow, Event, StepRow, WarningRow
from service.store.session import Sessions
from service.store.tables import Job

NewJob = Callable[..., str]
PASSED = Verdict(result="PASSED", gates=[], message="kept the bound and forgot")
NO_ROOM = Failure.of(FailureCode.OUT_OF_MEMORY, "no room for the batch")
DISK_FULL = Failure.of(FailureCode.STORAGE_FULL, "the disk takes no more")
ADAPTER = ArtifactRow(
    "adapter/adapter_model.safetensors", "jobs/x/attempts/1/a", "application/octet-stream", 3, "0" * 64
)


def claim(sessions: Sessions, classes: tuple[str, ...] = ("cpu",), vram_gib: float = 0.0) -> Claim | None:
    with sessions.begin() as s:
        return jobs.claim(s, worker="w1", classes=classes, vram_gib=vram_gib, lease_s=60)


def claimed(sessions: Sessions) -> Claim:
    found = claim(sessions)
    assert found is not None
    return found


def read(sessions: Sessions, job_id: str) -> Job:
    with sessions() as s:
        return jobs.get(s, job_id)


def lapse(sessions: Sessions) -> None:
    with sessions.begin() as s:
        s.execute(text("UPDATE jobs SET lease_until = now() - interval '1 s' WHERE lease_until IS NOT NULL"))


def expire(sessions: Sessions, infra_losses_max: int = 10) -> list[Job]:
    lapse(sessions)
    with sessions.begin() as s:
        return jobs.expire(s, infra_losses_max)


def wait(sessions: Sessions) -> None:
    """Until the next attempt of every job may begin."""
    with sessions.begin() as s:
        s.execute(text("UPDATE jobs SET not_before = now() WHERE not_before IS NOT NULL"))


def counted(sessions: Sessions, name: str) -> dict[str, int]:
    """By the only label, "" where there is none."""
    with sessions() as s:
        return {"".join(c.labels.values()): c.value for c in metrics.counters(s) if c.name == name}


def types(sessions: Sessions, job_id: str) -> list[str]:
    with sessions() as s:
        return [event.type for event in reads.events(s, job_id)]


def step(number: int, **values: Any) -> StepRow:
    told = {"losses": {"forget": 2.0, "retain": 1.0}, "dual": {"retain": 0.5}, "violation": {"retain": -0.1}}
    numbers = {"learning_rate": 1e-3, "gradient_norm": 1.0, "tokens": 100 * number, "tokens_per_second": 50.0}
    return StepRow(**{"step": number, **told, **numbers, "elapsed_seconds": 1.0 * number, **values})


def check(number: int, retain_loss: float = 1.0) -> CheckRow:
    return CheckRow(number, 0.1, 0.02, retain_loss, retain_loss, 1.2, True, True, 40, 0.3)


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """`work`, started; its answer, or the exception that it raised, appears in the list."""
    answers: list[object] = []

    def run() -> None:
        try:
            answers.append(work())
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, answers


def test_a_new_job_waits(new_job: NewJob, sessions: Sessions) -> None:
    job = read(sessions, new_job(metadata={"ticket": "7"}, external_id="dsr-1"))
    assert (job.status, job.version, job.attempt, job.metadata_) == (Status.QUEUED, 1, 0, {"ticket": "7"})
    assert job.created_at.utcoffset() == timedelta(0)
    assert types(sessions, job.id) == ["job.created", "job.queued"]


def test_a_job_needs_its_files_and_its_model(new_job: NewJob) -> None:
    with pytest.raises(NotFound, match="ufile_"):
        new_job(forget_set="ufile_" + "0" * 32)
    with pytest.raises(NotFound, match="nobody"):
        new_job(model="nobody")


def test_claims_go_by_priority_then_due_date_then_age(new_job: NewJob, sessions: Sessions) -> None:
    soon, later = (datetime.now(UTC) + timedelta(days=days) for days in (1, 9))
    order = ["urgent", "due soon", "due later", "old", "young", "low"]
    made = {
        "low": new_job(priority=1, due_at=soon),
        "old": new_job(),
        "young": new_job(),
        "due later": new_job(due_at=later),
        "due soon": new_job(due_at=soon),
        "urgent": new_job(priority=9),
    }
    with sessions() as s:
        places = reads.places(s, list(made.values()))
    assert sorted(made, key=lambda name: places[made[name]]) == order
    assert sorted(places.values()) == [1, 2, 3, 4, 5, 6]
    names = {job_id: name for name, job_id in made.items()}
    assert [names[claimed(sessions).job_id] for _ in order] == order
    assert claim(sessions) is None


def test_a_worker_claims_what_it_can_run(new_job: NewJob, sessions: Sessions) -> None:
    large = new_job(resources=Resources(gpu_class="h200", min_vram_gib=100))
    anywhere = new_job()
    assert claimed(sessions).job_id == anywhere
    assert claim(sessions, ("cpu",), vram_gib=141) is None
    assert claim(sessions, ("h200",), vram_gib=80) is None
    last = claim(sessions, ("h200",), vram_gib=141)
    assert last is not None
    assert last.job_id == large


def test_two_workers_at_once_get_different_jobs(new_job: NewJob, sessions: Sessions) -> None:
    waiting = {new_job(), new_job()}
    with sessions.begin() as a, sessions.begin() as b, sessions.begin() as c:
        got = [jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60) for s in (a, b, c)]
    assert got[2] is None
    assert {one.job_id for one in got if one} == waiting


def test_many_workers_drain_the_queue_once(new_job: NewJob, sessions: Sessions) -> None:
    waiting = [new_job() for _ in range(12)]

    def drain() -> list[str]:
        found = []
        while (one := claim(sessions)) is not None:
            found.append(one.job_id)
        return found

    running = [in_thread(drain) for _ in range(4)]
    for thread, _ in running:
        thread.join()
    got = [job_id for _, [found] in running for job_id in found]  # type: ignore[attr-defined]
    assert sorted(got) == sorted(waiting)


def test_a_beat_extends_the_lease_and_tells_of_a_cancel(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job()
    held = claimed(sessions)
    lapse(sessions)
    with sessions.begin() as s:
        assert jobs.beat(s, job_id, held.fence, 60) == Beat(cancel=False)
    with sessions.begin() as s:
        assert jobs.expire(s, 10) == []
        jobs.request_cancel(s, job_id)
    with sessions.begin() as s:
        assert jobs.beat(s, job_id, held.fence, 60) == Beat(cancel=True)


def test_who_lost_the_lease_writes_nothing(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job()
    zombie = claimed(sessions)
    expire(sessions)

    def nothing_is_written() -> None:
        before = read(sessions, job_id)
        with sessions.begin() as s:
            assert jobs.beat(s, job_id, zombie.fence, 60) is None
            assert not jobs.log(
                s, job_id, zombie.fence, stage=Stage.UNLEARNING, steps=[step(1)], events=[Event("metrics", "")]
            )
            assert not jobs.succeed(s, job_id, zombie.fence, PASSED, [ADAPTER])
            assert not jobs.cancelled(s, job_id, zombie.fence)
            assert jobs.fail(s, job_id, zombie.fence, NO_ROOM) is None
            assert not jobs.release(s, job_id, zombie.fence)
        after = read(sessions, job_id)
        assert (after.status, after.version, after.last_seq) == (before.status, before.version, before.last_seq)
        with sessions() as s:
            assert not reads.steps(s, job_id)
            assert not artifacts.of_job(s, job_id)

    nothing_is_written()  # while the job waits
    assert counted(sessions, metrics.FENCED_WRITES) == {"": 6}
    successor = claimed(sessions)
    assert successor.fence > zombie.fence
    nothing_is_written()  # while another runs it
    with sessions.begin() as s:
        assert jobs.succeed(s, job_id, successor.fence, PASSED, [ADAPTER])
    with sessions() as s:
        assert [artifact.name for artifact in artifacts.of_job(s, job_id)] == [ADAPTER.name]
        assert artifacts.named(s, job_id, ADAPTER.name).key == ADAPTER.key


def test_event_numbers_have_no_gaps_under_concurrency(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job()
    fence = claimed(sessions).fence

    def tell() -> None:
        for number in range(10):
            with sessions() as s:
                jobs.log(s, job_id, fence, events=[Event("metrics", str(number)), Event("metrics", "again")])
                s.rollback() if number % 3 == 0 else s.commit()

    running = [in_thread(tell) for _ in range(4)]
    for thread, _ in running:
        thread.join()
    assert [answers for _, answers in running] == [[None]] * 4
    with sessions() as s:
        seqs = [event.seq for event in reads.events(s, job_id, limit=1000)]
    assert seqs == list(range(1, 3 + 4 * 6 * 2 + 1))
    assert read(sessions, job_id).last_seq == seqs[-1]


def test_attempts_are_bounded(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job(limits=Limits(max_attempts=3))
    for attempt, expected in ((1, Status.QUEUED), (2, Status.QUEUED), (3, Status.FAILED)):
        held = claimed(sessions)
        assert held.attempt == attempt
        with sessions.begin() as s:
            assert jobs.fail(s, job_id, held.fence, DISK_FULL) is expected
        wait(sessions)
    job = read(sessions, job_id)
    assert job.failure is not None
    assert (job.failure["code"], job.failure["fault"]) == (FailureCode.STORAGE_FULL, "platform"), "the last one's own"
    assert job.failure["message"] == "the disk takes no more; 3 of 3 attempts failed"
    assert types(sessions, job_id)[-1] == "job.failed"
    assert types(sessions, job_id).count("attempt.lost") == 2
    assert claim(sessions) is None


def test_a_failed_job_waits_longer_each_time_and_lets_others_pass(new_job: NewJob, sessions: Sessions) -> None:
    job_id, other = new_job(priority=9, limits=Limits(max_attempts=10)), new_job()
    for wait_s in (10, 40, 160, 600, 600):
        fence = claimed(sessions).fence
        with sessions.begin() as s:
            jobs.fail(s, job_id, fence, DISK_FULL)
        with sessions.begin() as s:
            waits = s.scalars(text("SELECT extract(epoch FROM not_before - updated_at) FROM jobs ORDER BY id")).all()
            assert [float(waits[0]), waits[1]] == [wait_s, None]
            passed = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
            assert passed is not None
            assert passed.job_id == other
            assert jobs.due_classes(s, 15) == [], "no bell before its time"
            jobs.release(s, other, passed.fence)
            assert reads.places(s, [job_id, other]) == {other: 1}, "what rests has no place in the line"
            lost = [event.message for event in reads.events(s, job_id) if event.type == "attempt.lost"]
        assert lost[-1] == f"storage_full: the disk takes no more; again in {wait_s} s"
        assert read(sessions, job_id).status_reason == "storage_full: the disk takes no more", "which stays true"
        wait(sessions)
    with sessions() as s:
        assert reads.places(s, [job_id, other]) == {job_id: 1, other: 2}
    with sessions() as s:
        assert jobs.due_classes(s, 15) == ["any"], "and one then"
    assert claimed(sessions).job_id == job_id
    assert read(sessions, job_id).not_before is None


def test_want_of_memory_makes_the_micro_batches_smaller_until_they_cannot_be(
    new_job: NewJob, sessions: Sessions
) -> None:
    alike, other = new_job(limits=Limits(max_attempts=9)), new_job(limits=Limits(max_attempts=2))
    for job_id, last_steps, expected in (
        (alike, (7, 7, 7, 7), Status.FAILED),
        (other, (7, 7, 7, 8), Status.QUEUED),
    ):
        tried = []
        for last_step in last_steps:
            held = claimed(sessions)
            assert held.job_id == job_id
            tried.append(read(sessions, job_id).micro_batch_tokens)
            with sessions.begin() as s:
                jobs.log(s, job_id, held.fence, stage=Stage.UNLEARNING, steps=[step(last_step)])
                jobs.fail(s, job_id, held.fence, NO_ROOM)
            wait(sessions)
        assert tried == [None, 4096, 1024, 256]
        assert read(sessions, job_id).status is expected
    failure = read(sessions, alike).failure
    assert failure is not None
    assert failure["code"] == FailureCode.OUT_OF_MEMORY
    assert counted(sessions, metrics.ATTEMPTS_LOST) == {"out_of_memory": 8}
    assert "1 of 9 attempts failed, the last two alike at step 7" in failure["message"]


def test_want_of_memory_while_loading_may_be_anothers_doing(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job(limits=Limits(max_attempts=4))
    for expected in (Status.QUEUED, Status.QUEUED, Status.QUEUED, Status.FAILED):
        held = claimed(sessions)
        with sessions.begin() as s:
            jobs.log(s, job_id, held.fence, stage=Stage.LOADING_MODEL)
            assert jobs.fail(s, job_id, held.fence, NO_ROOM) is expected
        wait(sessions)
    assert read(sessions, job_id).micro_batch_tokens is None, "the weights take the same room in any case"


def test_an_attempt_that_was_ended_from_outside_is_not_the_jobs_fault(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job(limits=Limits(max_attempts=1))
    for expected in (Status.QUEUED, Status.QUEUED, Status.FAILED):
        fence = claimed(sessions).fence
        with sessions.begin() as s:
            assert jobs.lose(s, job_id, fence, "ended by SIGKILL", 2) is expected
        assert claim(sessions) is None, "it waits"
        wait(sessions)
    job = read(sessions, job_id)
    assert (job.infra_losses, job.content_failures) == (3, 0)
    assert counted(sessions, metrics.ATTEMPTS_LOST) == {"worker_lost": 3}
    assert job.failure is not None
    assert (job.failure["code"], "SIGKILL" in job.failure["message"]) == (FailureCode.WORKER_LOST, True)


@pytest.mark.parametrize("spec", ["{}", """{"limits": 3}""", """{"limits": {"max_attempts": 3, "new": 1}}"""])
def test_a_spec_of_another_version_does_not_block_those_behind_it(
    spec: str, new_job: NewJob, sessions: Sessions
) -> None:
    strange, behind = new_job(priority=9), new_job()
    with sessions.begin() as s:
        s.execute(text("UPDATE jobs SET spec = CAST(:spec AS jsonb) WHERE id = :id"), {"spec": spec, "id": strange})
    for attempt in (1, 2, 3):
        held = claimed(sessions)
        assert (held.job_id, held.attempt) == (strange, attempt)
        with sessions.begin() as s:
            jobs.fail(s, strange, held.fence, Failure.of(FailureCode.INTERNAL_ERROR, "cannot be read"))
        wait(sessions)
    assert read(sessions, strange).status is Status.FAILED
    assert claimed(sessions).job_id == behind


def test_a_stored_spec_has_no_field_that_was_not_asked_for(new_job: NewJob, sessions: Sessions) -> None:
    """A worker of an older version refuses fields that it does not know."""
    chosen = {"type": "custom", "hyperparameters": {"part": {"type": "x", "cap": None}}}
    spec = read(sessions, new_job(method=chosen)).spec
    assert not {"refusal_set", "holdout_set", "due_at", "external_id", "benchmarks", "audit", "gates"} & spec.keys()
    assert spec["method"] == chosen, "a hyperparameter that is null is asked for"
    assert JobSpec.model_validate(spec).refusal_set is None


def test_two_sweeps_bump_counters_in_the_same_order(
    new_job: NewJob, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each might hold what the other waits for. The first lease to lapse is of the class that comes last."""
    for gpu_class in ("gpu", "cpu", "any"):
        new_job(resources=Resources(gpu_class=gpu_class))
        claim(sessions, ("gpu", "cpu"))
    bumped: list[str] = []
    bump = metrics.bump

    def noted(s: Session, name: str, labels: dict[str, str], by: int = 1) -> None:
        bumped.extend(labels[name] for name in labels if name == "queue")
        bump(s, name, labels, by)

    monkeypatch.setattr(jobs, "bump", noted)
    with sessions.begin() as s:
        s.execute(text("UPDATE jobs SET lease_until = started_at - interval '1 h'"))
        assert [job.gpu_class for job in jobs.expire(s, 10)] == ["gpu", "cpu", "any"]
    assert bumped == ["any", "cpu", "gpu"]


def test_a_job_that_rings_leaves_the_others_alone(new_job: NewJob, sessions: Sessions) -> None:
    job = read(sessions, new_job())
    with sessions.begin() as s:
        rang = jobs.create(s, JobSpec.model_validate(job.spec), rings=True)
        assert s.execute(text("SELECT id, rung_at IS NOT NULL FROM jobs ORDER BY id")).all() == [
            (job.id, False),
            (rang.id, True),
        ]


def test_workers_say_what_they_can_run(new_job: NewJob, sessions: Sessions) -> None:
    waiting = {name: new_job(resources=Resources(**asked)) for name, asked in ASKED.items()}

    def in_vain() -> set[str]:
        with sessions.begin() as s:
            heard = workers.heard(s)
            return {name for name, job_id in waiting.items() if workers.nobody_runs(jobs.get(s, job_id), heard)}

    assert in_vain() == {"any", "cpu", "gpu", "large"}
    with sessions.begin() as s:
        workers.seen(s, "a", ["cpu"], 0)
        workers.seen(s, "b", ["gpu", "other"], 24)
    assert in_vain() == {"large"}
    with sessions.begin() as s:
        reason = workers.nobody_runs(jobs.get(s, waiting["large"]), workers.heard(s))
        s.execute(text("UPDATE workers SET seen_at = seen_at - interval '6 min' WHERE name = 'a'"))
        workers.seen(s, "b", ["gpu", "other"], 80)
    assert reason == "no worker that hears GPU class gpu with 80 GiB has been seen in the last 5 minutes"
    assert in_vain() == {"cpu"}
    with sessions.begin() as s:
        workers.gone(s, "b")
        s.execute(text("UPDATE workers SET seen_at = seen_at - interval '2 days'"))
        workers.seen(s, "c", ["cpu"], 0)
        assert s.scalars(text("SELECT name FROM workers")).all() == ["c"]
    with sessions.begin() as s:
        jobs.request_cancel(s, waiting["gpu"])
    assert in_vain() == {"large"}, "what has ended does not wait"


ASKED: dict[str, dict[str, Any]] = {
    "any": {},
    "cpu": {"gpu_class": "cpu"},
    "gpu": {"gpu_class": "gpu"},
    "large": {"gpu_class": "gpu", "min_vram_gib": 80},
}


def test_what_cannot_end_otherwise_is_not_tried_again(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job()
    with sessions.begin() as s:
        assert jobs.fail(s, job_id, 0, NO_ROOM) is None  # nobody holds it
    held = claimed(sessions)
    with sessions.begin() as s:
        assert jobs.fail(s, job_id, held.fence, Failure.of(FailureCode.ROW_TOO_LONG, "row 3")) is Status.FAILED
    failure = read(sessions, job_id).failure
    assert failure is not None
    assert (failure["code"], failure["fault"]) == ("row_too_long", "client")


def test_lost_workers_are_bounded_and_are_not_the_jobs_fault(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job(limits=Limits(max_attempts=1))
    for expected in (Status.QUEUED, Status.QUEUED, Status.FAILED):
        claimed(sessions)
        assert [job.status for job in expire(sessions, infra_losses_max=2)] == [expected]
    job = read(sessions, job_id)
    assert (job.infra_losses, job.content_failures, job.attempt) == (3, 0, 3)
    assert job.failure is not None
    assert job.failure["code"] == FailureCode.WORKER_LOST
    assert "w1" in job.failure["message"]
    assert counted(sessions, metrics.LEASES_EXPIRED) == {"any": 3}
    assert counted(sessions, metrics.ATTEMPTS_LOST) == {"worker_lost": 3}, "also where the job goes on"


def test_a_lost_job_keeps_its_place_and_forgets_its_progress(new_job: NewJob, sessions: Sessions) -> None:
    first, _ = new_job(), new_job()
    held = claimed(sessions)
    with sessions.begin() as s:
        jobs.log(s, first, held.fence, stage=Stage.UNLEARNING, steps=[step(1), step(2)])
    expire(sessions)
    job = read(sessions, first)
    assert (job.stage, job.step, job.trained_tokens, job.lease_owner) == (None, 0, 0, None)
    assert job.stage_history[0]["finished_at"] is not None
    assert claimed(sessions).job_id == first


def test_a_released_attempt_is_given_back(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job()
    held = claimed(sessions)
    with sessions.begin() as s:
        assert jobs.release(s, job_id, held.fence)
    job = read(sessions, job_id)
    assert (job.attempt, job.content_failures, job.infra_losses) == (0, 0, 0)
    with sessions() as s:
        assert [(e.type, e.attempt) for e in reads.events(s, job_id)][-2:] == [
            ("attempt.requeued", 1),
            ("job.queued", 1),
        ]
    again = claimed(sessions)
    assert (again.attempt, again.fence) == (1, 2)


def test_cancel_twice_is_cancel_once(new_job: NewJob, sessions: Sessions) -> None:
    waiting, running = new_job(priority=1), new_job()
    claimed(sessions)
    for _ in range(2):
        with sessions.begin() as s:
            assert jobs.request_cancel(s, waiting).status is Status.CANCELLED
            assert jobs.request_cancel(s, running).status is Status.CANCELLING
    assert types(sessions, waiting).count("job.cancelled") == 1
    assert types(sessions, running).count("cancel.requested") == 1
    with pytest.raises(NotFound), sessions() as s:
        jobs.request_cancel(s, "ujob_" + "0" * 32)


def test_cancel_against_success(new_job: NewJob, sessions: Sessions) -> None:
    """Whoever locks the row first; the other sees what it did, not what it expected."""
    job_id = new_job()
    fence = claimed(sessions).fence

    def succeed() -> bool:
        with sessions.begin() as s:
            return jobs.succeed(s, job_id, fence, PASSED)

    with sessions.begin() as s:
        jobs.request_cancel(s, job_id)
        thread, answers = in_thread(succeed)
        thread.join(0.2)
        assert thread.is_alive()  # waits for the row
    thread.join()
    assert answers == [True]  # finished first: allowed from cancelling
    assert read(sessions, job_id).status is Status.SUCCEEDED
    with pytest.raises(InvalidTransition, match="succeeded"), sessions.begin() as s:
        jobs.request_cancel(s, job_id)


def test_success_against_cancel(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job()
    fence = claimed(sessions).fence

    def cancel() -> Job:
        with sessions.begin() as s:
            return jobs.request_cancel(s, job_id)

    with sessions.begin() as s:
        jobs.succeed(s, job_id, fence, PASSED)
        thread, answers = in_thread(cancel)
        thread.join(0.2)
        assert thread.is_alive()
    thread.join()
    assert [type(answer) for answer in answers] == [InvalidTransition]
    assert read(sessions, job_id).status is Status.SUCCEEDED


def test_a_batch_of_records(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job()
    fence = claimed(sessions).fence

    def tell(stage: Stage, *numbers: int) -> None:
        with sessions.begin() as s:
            assert jobs.log(
                s,
                job_id,
                fence,
                stage=stage,
                steps=[step(number) for number in numbers],
                checks=[check(2)],
                events=[Event("metrics", "step", {"dual": float("nan")})],
                constraint=ConstraintRow(epsilon=1.2, base_retain_loss=1.1),
                warnings=[WarningRow("trailing_space", "the prompt ends in a space")],
            )

    tell(Stage.LOADING_MODEL)
    tell(Stage.UNLEARNING, 1, 2)
    tell(Stage.UNLEARNING, 2, 3)  # a repeated record changes nothing
    job = read(sessions, job_id)
    assert (job.stage, job.step, job.trained_tokens) == ("unlearning", 3, 300)
    assert (job.epsilon, job.base_retain_loss) == (1.2, 1.1)
    assert job.warnings == [{"code": "trailing_space", "message": "the prompt ends in a space"}]
    assert [(entry["stage"], entry["finished_at"] is None) for entry in job.stage_history] == [
        ("loading_model", False),
        ("unlearning", True),
    ]
    told = ["stage.started", "metrics", "stage.finished", "stage.started", "metrics", "metrics"]
    assert types(sessions, job_id)[3:] == told
    with sessions() as s:
        assert [row.step for row in reads.steps(s, job_id)] == [1, 2, 3]
        assert [row.step for row in reads.steps(s, job_id, after=1, limit=1)] == [2]
        assert [row.step for row in reads.checks(s, job_id)] == [2]
        assert reads.events(s, job_id)[-1].data == {"dual": None}


def test_numbers_that_blew_up_are_null(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job()
    fence = claimed(sessions).fence
    with sessions.begin() as s:
        wild = step(1, losses={"forget": float("inf"), "retain": float("nan")}, gradient_norm=float("inf"))
        assert jobs.log(s, job_id, fence, steps=[wild], checks=[check(1, retain_loss=float("nan"))])
    with sessions() as s:
        row = reads.steps(s, job_id)[0]
        assert (row.losses, row.gradient_norm, row.learning_rate) == ({"forget": None, "retain": None}, None, 1e-3)
        assert reads.checks(s, job_id)[0].retain_loss is None


def test_the_series_is_of_the_current_attempt(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job()
    for steps in ([step(1), step(2)], [step(1)]):
        fence = claimed(sessions).fence
        with sessions.begin() as s:
            jobs.log(s, job_id, fence, steps=steps, checks=[check(one.step) for one in steps])
        with sessions() as s:
            assert [row.step for row in reads.steps(s, job_id)] == [one.step for one in steps]
            assert [row.step for row in reads.checks(s, job_id)] == [one.step for one in steps]
        expire(sessions)


def test_a_verdict_is_counted_and_its_failed_gates_are_told(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job()
    fence = claimed(sessions).fence
    gate = GateResult(
        metric="probability", op="<=", threshold=0.08, value=0.8, result="FAILED", message="not forgotten"
    )
    with sessions.begin() as s:
        assert jobs.succeed(s, job_id, fence, Verdict(result="FAILED", gates=[gate], message="forgot too little"))
    assert types(sessions, job_id)[-2:] == ["gate.failed", "job.succeeded"]
    job = read(sessions, job_id)
    assert job.verdict is not None
    assert (job.status, job.verdict["result"], job.failure, job.stage) == (Status.SUCCEEDED, "FAILED", None, None)
    with sessions() as s:
        assert {(c.name, *sorted(c.labels.items()), c.value) for c in metrics.counters(s)} == {
            (metrics.JOB_VERDICTS, ("result", "FAILED"), 1),
            (metrics.JOBS_FINISHED, ("failure_code", ""), ("method", "pdu"), ("status", "succeeded"), 1),
        }


def test_figures_for_the_dashboard(new_job: NewJob, sessions: Sessions) -> None:
    new_job(resources=Resources(gpu_class="cpu"))
    new_job()
    claimed(sessions)
    with sessions() as s:
        figures = metrics.figures(s)
    assert figures.jobs == {(Status.RUNNING, "cpu"): 1, (Status.QUEUED, "any"): 1}
    assert figures.queue_oldest_age_s.keys() == {"any"}
    assert 0 <= figures.heartbeat_age_max_s["cpu"] < 10


def test_pages_walk_the_list_in_both_directions(new_job: NewJob, sessions: Sessions) -> None:
    made = [new_job() for _ in range(5)]
    with sessions() as s:
        rows, more = reads.page(s, limit=2)
        assert ([row.id for row in rows], more) == (made[:2:-1], True)
        rows, more = reads.page(s, limit=3, after=rows[-1].id)
        assert ([row.id for row in rows], more) == (made[2::-1], False)
        rows, more = reads.page(s, limit=1, before=rows[0].id)
        assert ([row.id for row in rows], more) == ([made[3]], True)
        rows, more = reads.page(s, limit=2, order="asc", after=made[0])
        assert ([row.id for row in rows], more) == (made[1:3], True)
        rows, more = reads.page(s, limit=2, order="asc", before=made[3])
        assert ([row.id for row in rows], more) == (made[1:3], True)
        assert reads.page(s, status=Status.RUNNING) == ([], False)
        assert len(reads.page(s, model="m", status=Status.QUEUED)[0]) == 5
        assert reads.page(s, model="other") == ([], False)


def test_files_and_models_stay_while_a_job_needs_them(new_job: NewJob, sessions: Sessions) -> None:
    job_id = new_job()
    file_id = read(sessions, job_id).retain_set
    with pytest.raises(InvalidTransition, match=job_id), sessions.begin() as s:
        files.purge(s, file_id)
    with pytest.raises(InvalidTransition, match=job_id), sessions.begin() as s:
        models.remove(s, "m")
    with pytest.raises(InvalidTransition, match="'m'"), sessions.begin() as s:
        models.add(s, models.get(s, "m"))
    with sessions.begin() as s:
        jobs.request_cancel(s, job_id)
    with sessions.begin() as s:
        assert files.purge(s, file_id) == files.file_key(file_id)
        models.remove(s, "m")
    with sessions() as s:
        assert files.get(s, file_id).purged_at is not None
        with pytest.raises(NotFound):
            models.get(s, "m")
        assert len(files.page(s)[0]) == 2


def test_a_file_cannot_vanish_under_a_job_in_the_making(new_job: NewJob, sessions: Sessions) -> None:
    job = read(sessions, new_job())
    with sessions.begin() as s:
        jobs.request_cancel(s, job.id)

    def delete() -> str:
        with sessions.begin() as s:
            return files.purge(s, job.forget_set)

    with sessions.begin() as s:
        jobs.create(s, JobSpec.model_validate(job.spec))
        thread, answers = in_thread(delete)
        thread.join(0.2)
        assert thread.is_alive()
    thread.join()
    assert [type(answer) for answer in answers] == [InvalidTransition]


def test_a_benchmark_cannot_vanish_under_a_job_in_the_making_nor_its_files_under_it(
    new_job: NewJob, sessions: Sessions
) -> None:
    job = read(sessions, new_job())
    with sessions.begin() as s:
        jobs.request_cancel(s, job.id)
    asked = BenchmarkSpec(name="b", suite="tofu", sets={"forget": job.forget_set}, corpus="c", retrained_model="m")

    def refused(hold: Callable[[Session], object], take: Callable[[Session], object]) -> None:
        """`take` waits for `hold` to commit, and is refused then."""

        def taken() -> object:
            with sessions.begin() as s:
                return take(s)

        with sessions.begin() as s:
            hold(s)
            thread, answers = in_thread(taken)
            thread.join(0.2)
            assert thread.is_alive()
        thread.join()
        assert [type(answer) for answer in answers] == [InvalidTransition]

    refused(lambda s: benchmarks.add(s, asked), lambda s: files.purge(s, job.forget_set))
    with pytest.raises(InvalidTransition, match="benchmark 'b' still needs model 'm'"), sessions.begin() as s:
        models.remove(s, "m")
    naming = JobSpec.model_validate(job.spec | {"benchmarks": ["b"]})
    refused(lambda s: jobs.create(s, naming), lambda s: benchmarks.remove(s, "b"))


def test_a_job_and_a_benchmark_need_what_they_name(new_job: NewJob, sessions: Sessions) -> None:
    with pytest.raises(NotFound, match="benchmark 'b'"):
        new_job(benchmarks=["b"])
    nothing = BenchmarkSpec(name="b", suite="tofu", sets={"forget": "ufile_" + "0" * 32}, corpus="c")
    with pytest.raises(NotFound, match="ufile_"), sessions.begin() as s:
        benchmarks.add(s, nothing)
    sets = {"forget": read(sessions, new_job()).forget_set}
    nobody = BenchmarkSpec(name="b", suite="tofu", sets=sets, corpus="c", retrained_model="nobody")
    with pytest.raises(NotFound, match="nobody"), sessions.begin() as s:
        benchmarks.add(s, nobody)


def test_a_nul_in_what_a_run_says_is_no_server_error(new_job: NewJob, sessions: Sessions) -> None:
    spec = JobSpec.model_validate(read(sessions, new_job()).spec)
    with sessions.begin() as s:
        job_id = jobs.create(s, spec, [WarningRow("c\0", "a\0b")]).id
    assert read(sessions, job_id).warnings == [{"code": "c\ufffd", "message": "a\ufffdb"}]
    with pytest.raises(NotFound), sessions() as s:
        jobs.get(s, "ujob_\0")
