"""Every pair of statuses, and every verb on every status, against the real table."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.domain.errors import InvalidTransition
from service.domain.job import HELD, TERMINAL, TRANSITIONS, Failure, FailureCode, Status, Verdict
from service.store import jobs, moves, reads
from service.store.rows import Event
from service.store.session import Sessions
from service.store.tables import Job

S = Status
PASSED = Verdict(result="PASSED", gates=[], message="kept the bound and forgot")
FAILURE = Failure.of(FailureCode.INTERNAL_ERROR, "it broke").model_dump(mode="json")
PLACE = text(
    """
    UPDATE jobs SET status = :status, fence = 1, attempt = 1,
        lease_until = CASE WHEN :held THEN now() + interval '1 minute' END,
        finished_at = CASE WHEN :ended THEN now() END,
        failure = CASE WHEN :failed THEN CAST('{"code": "internal_error"}' AS jsonb) END
     WHERE id = :id
    """
)


def place(s: Session, job_id: str, status: Status) -> None:
    flags = {"held": status in HELD, "ended": status in TERMINAL, "failed": status is S.FAILED}
    s.execute(PLACE, {"id": job_id, "status": str(status), **flags})
    s.expire_all()


def expire(s: Session, infra_losses_max: int) -> list[Job]:
    s.execute(text("UPDATE jobs SET lease_until = now() - interval '1 s' WHERE lease_until IS NOT NULL"))
    return jobs.expire(s, infra_losses_max)


NEEDED: dict[Status, dict[str, Any]] = {status: {"lease_until": text("now()")} for status in HELD}
NEEDED[S.FAILED] = {"failure": FAILURE}


@pytest.mark.parametrize("source", Status)
def test_a_move_is_made_exactly_if_the_table_allows_it(
    source: Status, new_job: Callable[..., str], sessions: Sessions
) -> None:
    job_id = new_job()
    for target in Status:
        with sessions() as s:  # rolled back
            place(s, job_id, source)
            job = moves.locked(s, job_id)
            seq, version = job.last_seq, job.version
            if target in TRANSITIONS[source]:
                moves.move(s, job, target, Event("metrics", "moved"), **NEEDED.get(target, {}))
                assert (job.status, job.last_seq, job.version) == (target, seq + 1, version + 1)
                assert [event.message for event in reads.events(s, job_id, after_seq=seq)] == ["moved"]
            else:
                with pytest.raises(InvalidTransition, match=f"{source}.*{target}"):
                    moves.move(s, job, target, Event("metrics", "moved"), **NEEDED.get(target, {}))
                assert jobs.get(s, job_id).status is source
                assert not reads.events(s, job_id, after_seq=seq)


VERBS: dict[str, Callable[[Session, str], Any]] = {
    "request_cancel": jobs.request_cancel,
    "claim": lambda s, _: jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60),
    "beat": lambda s, job_id: jobs.beat(s, job_id, 1, 60),
    "log": lambda s, job_id: jobs.log(s, job_id, 1, events=[Event("metrics", "")]),
    "succeed": lambda s, job_id: jobs.succeed(s, job_id, 1, PASSED),
    "cancelled": lambda s, job_id: jobs.cancelled(s, job_id, 1),
    "paused": lambda s, job_id: jobs.paused(s, job_id, 1),
    "pause": jobs.pause,
    "resume": jobs.resume,
    "retry": jobs.retry,
    "fail": lambda s, job_id: jobs.fail(s, job_id, 1, Failure.of(FailureCode.ROW_TOO_LONG, "row 3")),
    "fail, again": lambda s, job_id: jobs.fail(s, job_id, 1, Failure.of(FailureCode.OUT_OF_MEMORY, "no room")),
    "lose": lambda s, job_id: jobs.lose(s, job_id, 1, "killed", 10),
    "release": lambda s, job_id: jobs.release(s, job_id, 1),
    "expire": lambda s, _: expire(s, 10),
    "expire, once too often": lambda s, _: expire(s, 0),
}
# Where each verb leads; a status that is not named stays, and the verb tells that it did nothing.
LEADS: dict[str, dict[Status, Status]] = {
    "request_cancel": dict.fromkeys([S.QUEUED, S.PAUSED, S.PENDING_APPROVAL, S.CANCELLED], S.CANCELLED)
    | dict.fromkeys(HELD, S.CANCELLING),
    "claim": {S.QUEUED: S.RUNNING},
    "beat": {status: status for status in HELD},
    "log": {status: status for status in HELD},
    "succeed": dict.fromkeys(HELD, S.SUCCEEDED),
    "cancelled": {S.CANCELLING: S.CANCELLED},
    "paused": {S.RUNNING: S.QUEUED, S.PAUSING: S.PAUSED, S.CANCELLING: S.CANCELLED},
    "pause": {S.QUEUED: S.PAUSED, S.PAUSED: S.PAUSED, S.RUNNING: S.PAUSING, S.PAUSING: S.PAUSING},
    "resume": {S.PAUSED: S.QUEUED, S.QUEUED: S.QUEUED},
    "retry": {S.FAILED: S.QUEUED},
    "fail": {S.RUNNING: S.FAILED, S.PAUSING: S.FAILED, S.CANCELLING: S.CANCELLED},
    "fail, again": {S.RUNNING: S.QUEUED, S.PAUSING: S.PAUSED, S.CANCELLING: S.CANCELLED},
    "lose": {S.RUNNING: S.QUEUED, S.PAUSING: S.PAUSED, S.CANCELLING: S.CANCELLED},
    "release": {S.RUNNING: S.QUEUED, S.PAUSING: S.PAUSED, S.CANCELLING: S.CANCELLED},
    "expire": {S.RUNNING: S.QUEUED, S.PAUSING: S.PAUSED, S.CANCELLING: S.CANCELLED},
    "expire, once too often": {S.RUNNING: S.FAILED, S.PAUSING: S.FAILED, S.CANCELLING: S.CANCELLED},
}


@pytest.mark.parametrize("verb", VERBS)
def test_where_each_verb_leads(verb: str, new_job: Callable[..., str], sessions: Sessions) -> None:
    job_id = new_job()
    for source in Status:
        with sessions() as s:  # rolled back
            place(s, job_id, source)
            try:
                answer = VERBS[verb](s, job_id)
            except InvalidTransition:
                answer = None
            s.expire_all()
            job = jobs.get(s, job_id)
            assert job.status is LEADS[verb].get(source, source), source
            assert bool(answer) == (source in LEADS[verb]), source
            seqs = [event.seq for event in reads.events(s, job_id)]
            assert seqs == list(range(1, job.last_seq + 1))


@pytest.mark.parametrize(
    "change",
    [
        "status = 'done'",
        "status = 'running'",  # without a lease
        "lease_until = now()",  # without running
        "status = 'succeeded'",  # without an end
        "finished_at = now()",
        "status = 'failed', finished_at = now()",  # without a failure
        "stage = 'thinking'",
    ],
)
def test_the_database_refuses_a_row_that_contradicts_itself(
    change: str, new_job: Callable[..., str], session: Session
) -> None:
    new_job()
    with pytest.raises(IntegrityError):
        session.execute(text(f"UPDATE jobs SET {change}"))
