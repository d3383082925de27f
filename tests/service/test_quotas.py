"""What a tenant may run at once, and have open: passed over, refused, told; also when two ask at the same moment."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, text
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service.cli import app
from service.domain.errors import QuotaExceeded
from service.domain.job import Failure, FailureCode, Limits, Resources, Status, Verdict
from service.settings import Settings
from service.store import jobs, quotas, tenants, workers
from service.store.rows import Claim
from service.store.session import Sessions, make_sessions
from service.store.tenants import DEFAULT
from tests.conftest import MASTER_KEY
from tests.service.conftest import JOBS
from tests.service.test_store_jobs import claim, claimed, in_thread, read

NewJob = Callable[..., str]
PASSED = Verdict(result="PASSED", gates=[], message="kept the bound and forgot")


def bound(sessions: Sessions, tenant: str = DEFAULT, **quotas: int | None) -> None:
    with sessions.begin() as s:
        if tenant not in {one.id for one in tenants.every(s)}:
            tenants.add(s, tenant)
        tenants.change(s, tenant, **quotas)


def of(sessions: Sessions, tenant: str, job_id: str) -> str:
    with sessions.begin() as s:
        s.execute(text("UPDATE jobs SET tenant_id = :tenant WHERE id = :id"), {"tenant": tenant, "id": job_id})
    return job_id


@pytest.fixture
def anyones(engine: Engine) -> Sessions:
    """As a worker has them: bound to no tenant."""
    return make_sessions(engine)


def test_a_tenant_at_its_bound_is_passed_over_until_one_of_its_jobs_ends(
    new_job: NewJob, sessions: Sessions, anyones: Sessions
) -> None:
    bound(sessions, "acme", max_running_jobs=2)
    theirs = [of(sessions, "acme", new_job(priority=9)) for _ in range(3)]
    ours = new_job(priority=1)
    running = [claimed(anyones), claimed(anyones)]
    assert [one.job_id for one in running] == theirs[:2]
    assert claimed(anyones).job_id == ours, "it waits behind them, and is taken before the third"
    assert claim(anyones) is None
    with anyones.begin() as s:
        assert jobs.succeed(s, running[0].job_id, running[0].fence, PASSED)
    assert claimed(anyones).job_id == theirs[2]


@pytest.mark.parametrize("first_commits", [True, False])
def test_two_workers_at_once_do_not_take_the_last_place_twice(
    new_job: NewJob, sessions: Sessions, anyones: Sessions, first_commits: bool
) -> None:
    bound(sessions, "acme", max_running_jobs=1)
    theirs = [of(sessions, "acme", new_job(priority=9)) for _ in range(2)]
    ours = new_job()
    with anyones() as first:
        taken = jobs.claim(first, worker="w1", classes=["cpu"], vram_gib=0, lease_s=60)
        assert taken is not None
        assert taken.job_id == theirs[0]
        thread, answers = in_thread(lambda: claim(anyones))
        thread.join(0.3)
        assert thread.is_alive(), "it waits to hear whether there is a place"
        first.commit() if first_commits else first.rollback()
        thread.join()
    [second] = answers
    assert isinstance(second, Claim)
    assert second.job_id == (ours if first_commits else theirs[1])
    with anyones() as s:
        assert s.scalar(text("SELECT count(*) FROM jobs WHERE status = 'running' AND tenant_id = 'acme'")) == 1


def test_a_tenant_that_was_found_full_is_not_kept_from_others(
    new_job: NewJob, sessions: Sessions, anyones: Sessions
) -> None:
    bound(sessions, "acme", max_running_jobs=1)
    of(sessions, "acme", new_job())
    assert claimed(anyones)

    def may_run() -> bool:
        with anyones.begin() as s:
            return quotas.may_run(s, "acme")

    with anyones.begin() as s:
        assert not quotas.may_run(s, "acme")
        thread, answers = in_thread(may_run)
        thread.join(5)
        assert answers == [False], "two claims could each hold what the other waits for"


def test_many_claims_at_once_look_further_than_the_first_few(
    new_job: NewJob, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "AT_ONCE", 1)
    waiting = [new_job() for _ in range(3)]
    with sessions.begin() as a, sessions.begin() as b, sessions.begin() as c, sessions.begin() as d:
        got = [jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60) for s in (a, b, c, d)]
    assert [one and one.job_id for one in got] == [*waiting, None]


def test_a_bell_is_noted_with_few_rows_however_many_wait(new_job: NewJob, sessions: Sessions) -> None:
    for _ in range(4):
        new_job()
    with sessions.begin() as s:
        s.execute(text("UPDATE jobs SET rung_at = now() - interval '20 s'"))
        assert (jobs.due_classes(s, 15), jobs.due_classes(s, 30)) == (["any"], [])
        jobs.rung(s, ["any"])
        assert s.scalar(text("SELECT count(*) FROM jobs WHERE rung_at = now()")) == 1
        assert jobs.due_classes(s, 15) == []
        s.execute(text("UPDATE jobs SET rung_at = NULL WHERE id = (SELECT max(id) FROM jobs)"))
        assert jobs.due_classes(s, 15) == ["any"], "of what has lost its worker, none has rung"
        jobs.rung(s, ["any"])
        assert jobs.due_classes(s, 15) == []


# --- jobs that have not ended


def test_more_open_jobs_than_allowed_are_refused_until_one_ends(new_job: NewJob, sessions: Sessions) -> None:
    bound(sessions, max_open_jobs=2)
    first, _ = new_job(limits=Limits(max_attempts=1)), new_job()
    with pytest.raises(QuotaExceeded, match="2 jobs that have not ended are allowed"):
        new_job()
    held = claimed(sessions)
    with pytest.raises(QuotaExceeded):
        new_job()
    with sessions.begin() as s:
        jobs.fail(s, held.job_id, held.fence, Failure.of(FailureCode.STORAGE_FULL, "the disk takes no more"))
    assert read(sessions, first).status is Status.FAILED
    new_job()
    with sessions.begin() as s, pytest.raises(QuotaExceeded):
        jobs.retry(s, first)
    bound(sessions, max_open_jobs=None)
    with sessions.begin() as s:
        jobs.retry(s, first)
    assert len({new_job(), new_job()}) == 2


def test_two_creations_at_once_do_not_take_the_last_place_twice(new_job: NewJob, sessions: Sessions) -> None:
    new_job()
    bound(sessions, max_open_jobs=2)
    with sessions.begin() as s:
        quotas.take_place(s, DEFAULT)
        thread, answers = in_thread(new_job)
        thread.join(0.3)
        assert thread.is_alive()
        s.execute(text(COPY))
    thread.join()
    assert [type(answer) for answer in answers] == [QuotaExceeded]


COPY = """
INSERT INTO jobs (id, status, spec, model, method, forget_set, retain_set, priority, gpu_class, tenant_id, created_by)
SELECT 'ujob_2', status, spec, model, method, forget_set, retain_set, priority, gpu_class, tenant_id, created_by FROM jobs
"""


def test_over_http_it_is_a_429_that_names_the_quota(
    http: TestClient, sessions: Sessions, request_body: dict[str, Any]
) -> None:
    bound(sessions, max_open_jobs=1)
    created = http.post(JOBS, json=request_body)
    assert created.status_code == 201
    key = {"Idempotency-Key": '"again"'}
    refused = http.post(JOBS, json=request_body, headers=key)
    assert (refused.status_code, refused.json()["violated-policies"]) == (429, ["open-jobs"])
    assert refused.headers["Retry-After"] == "60"
    assert len(http.get(JOBS).json()["data"]) == 1
    http.post(created.json()["links"]["cancel"])
    assert http.post(JOBS, json=request_body, headers=key).status_code == 201, "a refusal is not an answer to be kept"


def test_a_job_that_waits_for_its_tenants_bound_says_so(http: TestClient, new_job: NewJob, sessions: Sessions) -> None:
    with sessions.begin() as s:
        workers.seen(s, "w", ["cpu"], 0)
    bound(sessions, max_running_jobs=1)
    new_job()
    held, path = claimed(sessions), f"{JOBS}/{new_job()}"
    reason = "the tenant runs as many jobs at once as it may: 1"
    before = http.get(path)
    assert before.json()["status_reason"] == http.get(JOBS).json()["data"][0]["status_reason"] == reason
    of_class = new_job(resources=Resources(gpu_class="h200"))
    assert http.get(f"{JOBS}/{of_class}").json()["status_reason"].startswith("no worker"), "which would not help it"
    with sessions.begin() as s:
        jobs.succeed(s, held.job_id, held.fence, PASSED)
    after = http.get(path, headers={"If-None-Match": before.headers["ETag"]})
    assert (after.status_code, after.json()["status_reason"]) == (200, None)


def test_an_administrator_sets_both(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DATABASE_URL": settings.database_url, "MASTER_KEY": MASTER_KEY}.items():
        monkeypatch.setenv(name, value)

    def unlearn(*words: str) -> str:
        done = CliRunner().invoke(app, ["tenants", *words])
        assert done.exit_code == 0, done.output
        return done.output

    unlearn("add", "acme", "--max-running", "2", "--max-open", "30")
    assert "jobs running 2, open 30" in unlearn("list")
    unlearn("change", "acme", "--max-running", "0")
    assert "jobs running any, open 30" in unlearn("list"), "what is not given stays"
