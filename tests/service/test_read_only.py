"""A database that takes no writes, as after a failover: away for whoever writes, and no reason to lose what runs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import exc, text

from service.settings import Settings
from service.store import jobs
from service.store.session import Sessions
from tests.conftest import owner
from worker.lease import DatabaseAway, Lease

NewJob = Callable[..., str]


@contextmanager
def read_only(sessions: Sessions) -> Iterator[None]:
    """Its connections are ended, as a server's that is demoted are; new ones find the standby."""
    with owner(sessions).connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        name = connection.scalar(text("SELECT current_database()"))
        others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        connection.execute(text(f"SELECT pg_terminate_backend(pid) {others}"))
        while connection.scalar(text(f"SELECT count(*) {others}")):
            time.sleep(0.01)
        try:
            yield
        finally:
            connection.execute(text("SET default_transaction_read_only = off"))
            connection.execute(text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))


def test_its_connections_are_given_up_and_a_new_one_may_write(sessions: Sessions, new_job: NewJob) -> None:
    job_id = new_job()
    statement = text("UPDATE jobs SET step = step + 1 WHERE id = :id")
    with read_only(sessions), pytest.raises(exc.OperationalError) as raised, sessions.begin() as s:
        s.execute(statement, {"id": job_id})
    assert raised.value.connection_invalidated
    with sessions.begin() as s:  # in no pool there is one of the standby's
        s.execute(statement, {"id": job_id})


def test_a_runner_outlives_it(sessions: Sessions, new_job: NewJob) -> None:
    new_job()
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0.0, lease_s=60.0)
    assert claim is not None
    lease = Lease(sessions, claim, lease_s=60.0)
    with read_only(sessions), pytest.raises(DatabaseAway):
        lease.keep(lambda s: True)
    assert lease.keep(lambda s: True) is not None


def test_the_api_reads_and_says_why_it_does_not_write(
    settings: Settings, sessions: Sessions, new_job: NewJob, client_of: Callable[..., Any]
) -> None:
    job_id = new_job()
    with client_of(settings) as http:
        assert http.get("/readyz").status_code == 200
        with read_only(sessions):
            ready = http.get("/readyz")
            assert (ready.status_code, ready.json()["checks"]["database"]) == (503, "takes no writes")
            assert http.get(f"/v1/unlearning/jobs/{job_id}").status_code == 200
            refused = http.post(f"/v1/unlearning/jobs/{job_id}/cancel")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert refused.json()["type"].endswith("service-unavailable")
        assert http.post(f"/v1/unlearning/jobs/{job_id}/cancel").status_code == 202
        assert http.get("/readyz").status_code == 200
