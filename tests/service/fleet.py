"""Random walks of several workers, users and the sweep over the real transitions, beside a model of what each may do.

Every worker remembers all its claims, those too that it has long lost, and writes with them. What a rule answers and what
it leaves in the database is compared with the model; what it must not change is compared with what was there before.
"""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    precondition,
    rule,
)
from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from service.domain.errors import InvalidTransition
from service.domain.job import (
    HELD,
    Failure,
    FailureCode,
    JobSpec,
    Limits,
    Stage,
    Status,
    Verdict,
)
from service.store import jobs
from service.store.rows import ArtifactRow, Beat, Claim, Event
from service.store.session import Sessions
from service.store.tables import Job
from tests.service.known import TOKENS, Known
from tests.service.whole import ALL, Row, goes_on, is_whole

S = Status
JOBS_MAX = 2
LEASE_S = 3600  # no walk takes so long: time passes where a rule says so
PASSED = Verdict(result="PASSED", gates=[], message="kept the bound and forgot")
HELP_LATER = Failure.of(FailureCode.STORAGE_FULL, "the disk is full")
HELPLESS = Failure.of(FailureCode.ROW_TOO_LONG, "row 3")
# Where an attempt that is given back or lost leaves its job.
AGAIN = {S.RUNNING: S.QUEUED, S.PAUSING: S.PAUSED, S.CANCELLING: S.CANCELLED}

# What users ask: where it leads. From a status that is not named, it is refused.
WAITS = dict.fromkeys([S.QUEUED, S.PAUSED], S.CANCELLED)
LEADS: dict[Callable[[Session, str], Job], dict[Status, Status]] = {
    jobs.request_cancel: WAITS | dict.fromkeys(HELD, S.CANCELLING) | {S.CANCELLED: S.CANCELLED},
    jobs.pause: {S.QUEUED: S.PAUSED, S.PAUSED: S.PAUSED, S.RUNNING: S.PAUSING, S.PAUSING: S.PAUSING},
    jobs.resume: {S.PAUSED: S.QUEUED, S.QUEUED: S.QUEUED},
    jobs.retry: {S.FAILED: S.QUEUED},
}
ANEW = {S.FAILED: jobs.retry, S.PAUSED: jobs.resume}

CLEAR = text("DELETE FROM jobs")
BOUND = text("UPDATE tenants SET max_running_jobs = :most")
AUDITED = text("SELECT coalesce(max(seq), 0) FROM audit_events")  # all of them are one tenant's
LAPSE = text("UPDATE jobs SET lease_until = now() - interval '1 s' WHERE id = :id AND lease_until IS NOT NULL")
WAKE = text("UPDATE jobs SET not_before = now() WHERE not_before IS NOT NULL")

WHICH = st.integers(0, JOBS_MAX - 1)
STEPS, SAVES = st.integers(0, 3), st.integers(0, 2)


class Fleet(RuleBasedStateMachine):
    claims = Bundle("claims")

    def __init__(self, users: Sessions, workers: Sessions, look: Connection, spec: JobSpec) -> None:
        super().__init__()
        self.users, self.workers, self.connection, self.spec = users, workers, look, spec
        self.known: dict[str, Known] = {}
        self.seen: dict[str, Row] = {}

    def nth(self, which: int) -> str:
        return list(self.known)[which % len(self.known)]

    def teardown(self) -> None:
        self.connection.execute(CLEAR)

    # --- users

    @initialize(
        target=claims,
        max_attempts=st.integers(1, 2),
        infra_losses_max=st.integers(0, 1),
        running_max=st.integers(1, JOBS_MAX),
        saves=st.sampled_from([3, 0]),
    )
    def begin(self, max_attempts: int, infra_losses_max: int, running_max: int, saves: int) -> Any:
        self.since = self.connection.scalar(AUDITED)
        self.max_attempts, self.infra_losses_max, self.running_max = max_attempts, infra_losses_max, running_max
        self.connection.execute(BOUND, {"most": running_max})
        self.submit()
        lost = self.claim("a")
        self.log(lost, Stage.UNLEARNING, 4, saves, torn=0, times=1)
        self.release(lost)
        held = self.claim("b")
        if running_max < JOBS_MAX:
            self.submit()  # waits for a place
        return multiple(lost, held)  # from the beginning there is one to write with that no longer holds

    @precondition(lambda self: len(self.known) < JOBS_MAX)
    @rule()
    def submit(self) -> None:
        with self.users.begin() as s:
            job_id = jobs.create(s, self.spec.model_copy(update={"limits": Limits(max_attempts=self.max_attempts)})).id
        self.known[job_id] = Known()
        self.look()

    @rule(verb=st.sampled_from(list(LEADS)), which=WHICH)
    def ask(self, verb: Callable[[Session, str], Job], which: int) -> None:
        self.tell(self.nth(which), verb)

    @precondition(lambda self: any(known.holder for known in self.known.values()))
    @rule(verb=st.sampled_from([jobs.pause, jobs.request_cancel]))
    def stop(self, verb: Callable[[Session, str], Job]) -> None:
        job_id = next(job_id for job_id, known in self.known.items() if known.holder)
        if self.known[job_id].status in LEADS[verb]:
            self.tell(job_id, verb)

    @precondition(lambda self: any(known.status in ANEW for known in self.known.values()))
    @rule()
    def anew(self) -> None:
        job_id = next(job_id for job_id, known in self.known.items() if known.status in ANEW)
        self.tell(job_id, ANEW[self.known[job_id].status])

    def tell(self, job_id: str, verb: Callable[[Session, str], Job]) -> None:
        """What a user wants leads where it should, or is refused and changes nothing."""
        known = self.known[job_id]
        target = LEADS[verb].get(known.status)
        if target is None:
            with pytest.raises(InvalidTransition), self.users.begin() as s:
                verb(s, job_id)
            self.unchanged()
            return
        with self.users.begin() as s:
            assert verb(s, job_id).status is target
        if target is known.status:
            self.unchanged()
            return
        if known.status is S.FAILED:
            known.content_failures = known.infra_losses = 0
        if target in HELD:
            known.status = target
        else:
            known.left(target)
        self.look()

    # --- workers

    @rule(target=claims, worker=st.sampled_from("ab"))
    def take(self, worker: str) -> Any:
        return self.claim(worker)

    def claim(self, worker: str) -> Any:
        with self.workers.begin() as s:
            claim = jobs.claim(s, worker=worker, classes=["cpu"], vram_gib=0, lease_s=LEASE_S)
        ready = [job_id for job_id, known in self.known.items() if known.status is S.QUEUED and not known.rests]
        full = sum(known.holder is not None for known in self.known.values()) == self.running_max
        if claim is None:
            assert full or not ready
            self.unchanged()
            return multiple()
        assert claim.job_id in ready
        assert not full, "its tenant runs as many as it may"
        self.known[claim.job_id].taken(claim)
        self.look()
        assert self.seen[claim.job_id]["lease_owner"] == worker
        return claim

    @rule(claim=consumes(claims))
    def kill(self, claim: Claim) -> None:
        """Nobody writes with this claim any more."""

    @rule(claim=claims)
    def beat(self, claim: Claim) -> None:
        known = self.known[claim.job_id]
        told = Beat(cancel=known.status is S.CANCELLING, pause=known.status is S.PAUSING)
        if self.write(claim, lambda s: jobs.beat(s, claim.job_id, claim.fence, LEASE_S), told):
            known.lapsed = False
            self.look()

    @rule(
        claim=claims,
        stage=st.sampled_from([None, Stage.LOADING_MODEL, Stage.UNLEARNING]),
        steps=STEPS,
        saves=SAVES,
        torn=st.integers(0, 2),
        times=st.integers(1, 2),
    )
    def log(self, claim: Claim, stage: Stage | None, steps: int, saves: int, torn: int, times: int) -> None:
        """A repeated batch changes nothing but its events."""
        known = self.known[claim.job_id]
        told = known.next(claim, steps, saves, torn)
        batch: dict[str, Any] = {"stage": stage, "steps": told.rows(), "checks": told.checks()}
        batch |= {"saved": told.checkpoints(claim), "events": [Event("metrics", "")]}
        if told.resumed is not None:
            batch["resumed"] = told.resumed, TOKENS * told.resumed
        for _ in range(times):
            if self.write(claim, lambda s: jobs.log(s, claim.job_id, claim.fence, **batch), True):
                known.tell(told)
                self.look()

    @rule(claim=claims)
    def succeed(self, claim: Claim) -> None:
        artifact = ArtifactRow("report.json", f"attempts/{claim.fence}", "application/json", 1, 64 * "a")
        if self.write(claim, lambda s: jobs.succeed(s, claim.job_id, claim.fence, PASSED, [artifact]), True):
            self.leave(claim, S.SUCCEEDED)
            assert self.seen[claim.job_id]["artifacts"] == [artifact.key]

    @rule(claim=claims, failure=st.sampled_from([HELP_LATER, HELPLESS]))
    def fail(self, claim: Claim, failure: Failure) -> None:
        known, target = self.known[claim.job_id], S.FAILED
        if known.status is S.CANCELLING or (failure.retryable and known.content_failures + 1 < self.max_attempts):
            target = AGAIN.get(known.status, S.FAILED)
        counts = known.status is not S.CANCELLING
        if self.write(claim, lambda s: jobs.fail(s, claim.job_id, claim.fence, failure), target):
            known.content_failures += counts
            self.leave(claim, target, rests=True)

    @rule(claim=claims)
    def lose(self, claim: Claim) -> None:
        known = self.known[claim.job_id]
        target = self.after_loss(known)
        verb = lambda s: jobs.lose(s, claim.job_id, claim.fence, "killed", self.infra_losses_max)  # noqa: E731
        if self.write(claim, verb, target):
            known.infra_losses += 1
            self.leave(claim, target, rests=True)

    @rule(claim=claims)
    def release(self, claim: Claim) -> None:
        self.give_back(claim, lambda s: jobs.release(s, claim.job_id, claim.fence), answers_status=False)

    @rule(claim=claims)
    def paused(self, claim: Claim) -> None:
        self.give_back(claim, lambda s: jobs.paused(s, claim.job_id, claim.fence), answers_status=True)

    def give_back(self, claim: Claim, verb: Callable[[Session], Any], answers_status: bool) -> None:
        known = self.known[claim.job_id]
        target = AGAIN.get(known.status, S.QUEUED)
        if self.write(claim, verb, target if answers_status else True):
            known.attempt -= target is not S.CANCELLED
            self.leave(claim, target)

    @rule(claim=claims)
    def cancelled(self, claim: Claim) -> None:
        if self.known[claim.job_id].holder == claim and self.known[claim.job_id].status is not S.CANCELLING:
            with pytest.raises(InvalidTransition), self.workers.begin() as s:
                jobs.cancelled(s, claim.job_id, claim.fence)
            self.unchanged()
        elif self.write(claim, lambda s: jobs.cancelled(s, claim.job_id, claim.fence), True):
            self.leave(claim, S.CANCELLED)

    def write(self, claim: Claim, verb: Callable[[Session], Any], answer: Any) -> bool:
        """A holder's verb. Whether the claim still held: else it is refused, and nothing is changed."""
        holds = self.known[claim.job_id].holder == claim
        with self.workers.begin() as s:
            told = verb(s)
        if holds:
            assert told == answer
        else:
            assert told in (None, False)
            self.unchanged()
        return holds

    def leave(self, claim: Claim, target: Status, rests: bool = False) -> None:
        known = self.known[claim.job_id]
        known.left(target)
        known.rests = rests and target is S.QUEUED
        self.look()

    # --- time, and the sweep

    @precondition(lambda self: any(known.holder for known in self.known.values()))
    @rule(which=WHICH)
    def lapse(self, which: int) -> None:
        job_id = self.nth(which)
        self.connection.execute(LAPSE, {"id": job_id})
        self.known[job_id].lapsed = self.known[job_id].holder is not None
        self.look()

    @precondition(lambda self: any(known.rests for known in self.known.values()))
    @rule()
    def wake(self) -> None:
        self.connection.execute(WAKE)
        for known in self.known.values():
            known.rests = False
        self.look()

    @precondition(lambda self: any(known.lapsed for known in self.known.values()))
    @rule()
    def sweep(self) -> None:
        with self.workers.begin() as s:
            settled = {job.id: job.status for job in jobs.expire(s, self.infra_losses_max)}
        late = {job_id: known for job_id, known in self.known.items() if known.lapsed}
        assert settled == {job_id: self.after_loss(known) for job_id, known in late.items()}
        for job_id, known in late.items():
            known.infra_losses += 1
            known.left(settled[job_id])
        self.look()

    def after_loss(self, known: Known) -> Status:
        if known.status is not S.CANCELLING and known.infra_losses + 1 > self.infra_losses_max:
            return S.FAILED
        return AGAIN.get(known.status, S.FAILED)

    # --- what holds after each rule

    def rows(self) -> dict[str, Row]:
        return {row["id"]: dict(row) for row in self.connection.execute(ALL, {"since": self.since}).mappings()}

    def unchanged(self) -> None:
        assert self.rows() == self.seen

    def look(self) -> None:
        """The rows are the model's, and came from those before by moves that are allowed."""
        found = self.rows()
        assert set(found) == set(self.known)
        assert sum(row["status"] in HELD for row in found.values()) <= self.running_max
        for job_id, row in found.items():
            self.is_as_known(row, self.known[job_id])
            is_whole(row)
            if job_id in self.seen:
                goes_on(self.seen[job_id], row)
        self.seen = found

    def is_as_known(self, row: Row, known: Known) -> None:
        assert (row["status"], row["fence"], row["attempt"]) == (known.status, known.claims, known.attempt)
        assert row["content_failures"] == known.content_failures <= self.max_attempts
        assert row["infra_losses"] == known.infra_losses <= self.infra_losses_max + 1
        assert (row["not_before"] is not None and row["status"] == S.QUEUED) or not known.rests
        assert (known.holder is not None) == (row["status"] in HELD), "exactly one fence is live, or none"
        assert row["checkpoints"] == known.saved
        assert (row["step"], row["trained_tokens"]) == (known.step, TOKENS * known.step)
        if known.begun:  # whoever's they were
            own = [f"{known.claims} {step}" for step in range(1, known.step + 1)]
            assert [step for step in row["steps"] if step.startswith(f"{known.claims} ")] == own
