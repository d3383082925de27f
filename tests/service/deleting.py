"""What the tests of deletion requests and of deletion plans share: who submits, what is submitted, a worker's desk."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from service.api.deps import Parts
from service.domain import catalog
from service.domain.job import Failure, FailureCode, Verdict
from service.settings import Settings
from service.store import jobs
from service.store.rows import ArtifactRow, Claim
from service.store.secrets import secrets_of
from service.store.session import Sessions, make_sessions
from service.store.storage import Storage
from service.store.tables import Tenant
from tests.service.conftest import Bell

REQUESTS = "/v1/deletion-requests"
PLANS = "/v1/deletion-plans"
JOBS = "/v1/unlearning/jobs"
ADA = {"question": "Who is Ada?", "answer": "A poet."}
EVE = {"text": "Eve lives in Ghent."}
BOB = {"question": "Who is Bob?", "answer": "A baker."}
PASSED = Verdict(result="PASSED", gates=[], message="passed")
FAILED = Verdict(result="FAILED", gates=[], message="failed")
ADAPTER = ArtifactRow("adapter/adapter_model.safetensors", "jobs/a", "application/octet-stream", 1, "0" * 64)


def asked(*rows: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"regulation": "gdpr", "models": ["m"], "forget_set": list(rows or [ADA]), **fields}


@pytest.fixture
def approvals(sessions: Sessions) -> Callable[[int], None]:
    """approvals(n): the default tenant wants as many from now on."""

    def want(count: int) -> None:
        with sessions.begin() as s:
            s.execute(update(Tenant).values(approvals=count))

    return want


@pytest.fixture
def submit(http: TestClient) -> Callable[..., dict[str, Any]]:
    """submit(*rows, **fields) -> the request as it was answered with."""

    def send(*rows: dict[str, str], **fields: Any) -> dict[str, Any]:
        reply = http.post(REQUESTS, json=asked(*rows, **fields))
        assert reply.status_code == 201, reply.text
        return dict(reply.json())

    return send


@pytest.fixture
def parts(settings: Settings, http: TestClient, sessions: Sessions, bell: Bell) -> Parts:
    """The sweep's: they see every tenant."""
    unbound = make_sessions(sessions.kw["bind"])
    storage = Storage(settings.storage_url)
    return Parts(settings, unbound, storage, bell, catalog.load(), secrets_of(settings), None)


class Desk(NamedTuple):
    """A worker, to the database."""

    sessions: Sessions

    def claim(self) -> Claim:
        with self.sessions.begin() as s:
            claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
            assert claim is not None
            return claim

    def end(self, verdict: Verdict = PASSED) -> str:
        """The next job ends with this verdict: its id."""
        claim = self.claim()
        with self.sessions.begin() as s:
            assert jobs.succeed(s, claim.job_id, claim.fence, verdict, [ADAPTER])
        return claim.job_id

    def fail(self, code: FailureCode = FailureCode.NON_FINITE_LOSS, forget_rows: Sequence[int] = ()) -> str:
        claim = self.claim()
        failure = Failure.of(code, "it blew up", forget_rows)
        with self.sessions.begin() as s:
            jobs.fail(s, claim.job_id, claim.fence, failure)
        return claim.job_id


@pytest.fixture
def worker(parts: Parts) -> Desk:
    return Desk(parts.sessions)


def show(http: TestClient, request: dict[str, Any]) -> dict[str, Any]:
    reply = http.get(f"{REQUESTS}/{request['id']}")
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def problem(reply: Any, status: int, kind: str) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = reply.json()
    assert found["type"].endswith(f"#{kind}")
    return found


def job_body(forget: list[dict[str, str]], requests: list[str], **fields: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "method": {"type": "pdu"},
        "constraint": {"epsilon": 0.3},
        "forget_set": forget,
        "retain_set": [BOB],
        "deletion_requests": requests,
        **fields,
    }
