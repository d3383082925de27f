"""Evidence in the running service: the audit log in the database, certificates by the sweep, and what an auditor fetches."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn
from sqlalchemy import text, update
from sqlalchemy.exc import DBAPIError
from starlette.testclient import TestClient
from typer.testing import CliRunner, Result

from service import attest
from service.app import create_app
from service.cli import app
from service.client import Client
from service.domain.identity import SYSTEM
from service.domain.job import Failure, FailureCode
from service.domain.report import AdapterFile, Released
from service.evidence import canonical, certificate, chain, dsse, keys
from service.settings import Settings
from service.store import audit, evidence, evidence_keys, files, jobs, tables, tenancy, tenants
from service.store.rows import ArtifactRow
from service.store.secrets import SealBroken, Secrets, secrets_of
from service.store.session import Sessions
from service.store.storage import Storage
from service.store.tenants import DEFAULT
from tests.conftest import MASTER_KEY, owner
from tests.service.conftest import JOBS, Bell, ClientOf
from tests.worker import reports

ADAPTER = {"README.md": b"# card\n", "adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": bytes(range(64))}
LOG = "/v1/audit-events"
LINES = {"Accept": "application/jsonl"}
NewJob = Callable[..., str]


@pytest.fixture
def sweep(sessions: Sessions, settings: Settings) -> Sessions:
    """As the sweep has them: they see every tenant."""
    return unbound(sessions)


def unbound(sessions: Sessions) -> Sessions:
    return Sessions(**sessions.kw | {"class_": tenancy.TenantSession, "info": {}})


def noted(sessions: Sessions, count: int = 1, **data: Any) -> None:
    with sessions.begin() as s:
        for _ in range(count):
            audit.write(s, "tried", "test", "test_1", data)


def checked(sessions: Sessions, tenant: str = DEFAULT) -> chain.Checked:
    return chain.verify(audit.export(unbound(sessions), tenant))


def forge(sessions: Sessions, statement: str) -> None:
    """What only the owner of the database can do."""
    with owner(sessions).begin() as s:
        s.execute(text("ALTER TABLE audit_events DISABLE TRIGGER audit_events_append_only"))
        s.execute(text(statement))
        s.execute(text("ALTER TABLE audit_events ENABLE TRIGGER audit_events_append_only"))


def succeed(sessions: Sessions, settings: Settings, job_id: str, /, **changes: Any) -> None:
    """The job ran and published an adapter and its report, whose bytes are in the storage."""
    storage = Storage(settings.storage_url)
    rows = []

    def publish(name: str, content: bytes) -> ArtifactRow:
        key = f"jobs/{job_id}/attempts/1/{name}"
        rows.append(ArtifactRow(name, key, "application/octet-stream", *storage.write(key, [content])))
        return rows[-1]

    adapter = [publish(f"adapter/{name}", content) for name, content in ADAPTER.items()]
    named = [AdapterFile(name=one.name, bytes=one.bytes, sha256=one.sha256) for one in adapter]
    released = Released(published=True, step=30, files=named, message="As measured.", load=None)
    parts: dict[str, Any] = {"job_id": job_id, "released": released} | changes
    report = reports.make(**parts)
    publish("report.json", report.model_dump_json().encode())
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        assert claim.job_id == job_id
        assert jobs.succeed(s, job_id, claim.fence, report.verdict, rows)


def issue(sessions: Sessions, settings: Settings) -> int:
    return attest.issue_due(unbound(sessions), Storage(settings.storage_url), secrets_of(settings))


# --- the log


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_events SET actor = 'nobody'",
        "UPDATE audit_events SET actor = 'nobody' WHERE false",
        "DELETE FROM audit_events",
        "TRUNCATE audit_events",
        "INSERT INTO audit_events SELECT * FROM audit_events ON CONFLICT (id) DO UPDATE SET actor = 'nobody'",
    ],
)
def test_the_database_refuses_to_change_an_entry(sessions: Sessions, statement: str) -> None:
    noted(sessions)
    with pytest.raises(DBAPIError, match="append-only"), owner(sessions).begin() as s:
        s.execute(text(statement))
    assert checked(sessions)[::2] == (1, None)


def test_the_life_of_a_job_is_a_chain_that_holds(
    sessions: Sessions, settings: Settings, new_job: NewJob, http: TestClient
) -> None:
    job_id = new_job()
    succeed(sessions, settings, job_id)
    issue(sessions, settings)
    told = http.get(LOG, params={"object_id": job_id}).json()["data"]
    life = [(one["action"], one["actor"]) for one in told]
    assert life == [
        ("job.created", "tester"),
        ("job.running", "tester"),
        ("job.succeeded", "tester"),
        ("certificate.issued", SYSTEM),
    ]
    found = checked(sessions)
    assert found.fault is None
    assert found.head is not None
    head = http.get(f"{LOG}/head").json()
    assert (head["seq"], head["hash"], head["valid"]) == (found.head.seq, found.head.hash, None)


def test_two_tenants_have_two_chains(sessions: Sessions, make_key: Callable[..., str]) -> None:
    make_key("auditor", "other")
    other = tenancy.bound(sessions, "other", "somebody")
    for _ in range(3):
        noted(sessions)
        noted(other)
    assert [checked(sessions, tenant).entries for tenant in (DEFAULT, "other")] == [3, 5]
    assert checked(sessions, "other").fault is None
    assert list(audit.export(other, DEFAULT)) == [], "of another tenant there is nothing"


def test_commits_at_once_make_neither_a_gap_nor_a_fork(sessions: Sessions) -> None:
    def work(number: int) -> None:
        for turn in range(10):
            s = sessions()
            audit.write(s, "tried", "test", f"test_{number}", {"turn": turn})
            audit.write(s, "tried again", "test", f"test_{number}", {"turn": turn})
            s.rollback() if turn % 3 == 2 else s.commit()
            s.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    found = checked(sessions)
    assert (found.entries, found.fault) == (6 * 7 * 2, None)


def test_what_the_database_cannot_store_is_not_in_the_hash_either(sessions: Sessions) -> None:
    noted(sessions, name="nu\0l", half="\N{EURO SIGN}", large=2**53 - 1, nested={"x": ["\0"]})
    assert checked(sessions).fault is None


def test_pages_of_the_log_are_its_export(sessions: Sessions, http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    noted(sessions, 8)
    monkeypatch.setattr(audit, "PAGE", 4)  # the export's own pages, of which the last one is empty
    export = http.get(LOG, headers=LINES)
    assert export.headers["Content-Type"] == "application/jsonl"
    lines = export.content.splitlines(keepends=True)
    paged, after = [], 0
    while True:
        page = http.get(LOG, params={"after_seq": after, "limit": 3}).json()
        paged += page["data"]
        if not page["has_more"]:
            break
        after = page["data"][-1]["seq"]
    shown = [{name: value for name, value in one.items() if name != "object"} for one in paged]
    assert [canonical.dumps(one) + b"\n" for one in shown] == lines
    assert [one["seq"] for one in shown] == list(range(1, len(lines) + 1))
    assert http.get(LOG, params={"limit": 3}, headers=LINES).status_code == 422
    assert http.get(LOG, headers={"Accept": "text/csv"}).status_code == 406


# --- its checks


def test_a_check_looks_at_what_is_new_and_once_a_day_at_all(
    sessions: Sessions, sweep: Sessions, http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted(sessions, 3)
    assert attest.check_logs(sweep) == 0
    before = http.get(f"{LOG}/head").json()
    assert (before["valid"], before["checked_seq"]) == (True, before["seq"])
    assert attest.check_logs(sweep) == 0, "not again within the minute"
    monkeypatch.setattr(attest, "CHECK_EVERY", timedelta(0))
    read = list[int]()
    export = audit.export

    def reading(sessions: Sessions, tenant_id: str, after_seq: int = 0) -> Iterator[bytes]:
        read.append(after_seq)
        return export(sessions, tenant_id, after_seq)

    monkeypatch.setattr(audit, "export", reading)
    noted(sessions)
    assert attest.check_logs(sweep) == 0
    assert read == [before["seq"]], "what came since alone"
    assert http.get(f"{LOG}/head").json()["checked_seq"] == before["seq"] + 1

    forge(sessions, "UPDATE audit_events SET actor = 'nobody' WHERE seq = 2")
    assert attest.check_logs(sweep) == 0, "it was checked before, and will be again within a day"
    with sessions.begin() as s:
        s.execute(text("UPDATE audit_checks SET whole_at = whole_at - interval '25 hours'"))
    for _ in range(2):  # and a fault stays one
        assert attest.check_logs(sweep) == 1
        head = http.get(f"{LOG}/head").json()
        assert (head["valid"], head["fault"]["seq"], head["fault"]["kind"]) == (False, 2, "altered")
    forge(sessions, "UPDATE audit_events SET actor = 'tester' WHERE seq = 2")
    assert attest.check_logs(sweep) == 0, "put back as it was"
    assert http.get(f"{LOG}/head").json()["valid"] is True


@pytest.mark.parametrize(
    ("statement", "seq", "kind"),
    [
        ("DELETE FROM audit_events WHERE seq = 5", 5, "truncated"),
        ("DELETE FROM audit_events", 1, "truncated"),
        ("UPDATE audit_events SET hash = 'none' WHERE seq = 5", 5, "altered"),
        ("DELETE FROM audit_events WHERE seq = 2", 2, "missing"),
        ("UPDATE audit_events SET data = '[1]' WHERE seq = 1", 1, "altered"),
    ],
)
def test_what_somebody_did_to_the_log_is_named(
    sessions: Sessions, sweep: Sessions, statement: str, seq: int, kind: str
) -> None:
    noted(sessions, 5)
    assert audit.check(sweep, DEFAULT).fault is None
    forge(sessions, statement)
    with sessions.begin() as s:
        s.execute(text("UPDATE audit_checks SET whole_at = whole_at - interval '25 hours'"))
    fault = audit.check(sweep, DEFAULT).fault
    assert fault is not None
    assert fault[:2] == (seq, kind)


def test_an_end_that_was_cut_and_grown_again_is_found_at_once(sessions: Sessions, sweep: Sessions) -> None:
    noted(sessions, 5)
    assert audit.check(sweep, DEFAULT).fault is None
    forge(sessions, "DELETE FROM audit_events WHERE seq = 5")
    noted(sessions)
    assert checked(sessions).fault is None, "the log by itself is sound"
    fault = audit.check(sweep, DEFAULT).fault
    assert fault is not None
    assert fault[:2] == (5, "altered")


def test_the_figures_tell_of_all_logs(
    sessions: Sessions, sweep: Sessions, settings: Settings, client_of: ClientOf
) -> None:
    def figures(http: TestClient) -> dict[str, float]:
        lines = (line.split(" ") for line in http.get("/metrics").text.splitlines() if line.startswith("unlearn_audit"))
        return {name.removeprefix("unlearn_audit_"): float(value) for name, value in lines}

    noted(sessions, 2)
    attest.check_logs(sweep)
    forge(sessions, "DELETE FROM audit_events WHERE seq = 1")
    with sessions.begin() as s:
        tenants.add(s, "quiet")
        s.execute(text("UPDATE audit_checks SET checked_at = now() - interval '2 hours', whole_at = '2026-01-01'"))
    with client_of(settings.model_copy(update={"metrics_cache_s": 0})) as http:
        found = figures(http)
        assert (found["events_total"], found["chain_valid"]) == (2 + 2, 1)
        assert found["check_age_seconds"] == pytest.approx(7200, abs=60)
        attest.check_logs(sweep)
        found = figures(http)
        assert found["chain_valid"] == 0
        assert found["check_age_seconds"] < 60


# --- certificates


class Fetched(NamedTuple):
    """What an auditor has on his disk."""

    certificate: Path
    adapter: Path
    report: Path
    keys: Path
    audit: Path

    def verify(self, *more: object) -> Result:
        given: list[object] = [self.certificate]
        for name in ("adapter", "report", "keys", "audit"):
            given += [f"--{name}", getattr(self, name)]
        return CliRunner().invoke(app, ["verify", *map(str, given), *map(str, more)])

    def failing(self) -> list[str]:
        """What `unlearn verify` says does not hold."""
        found = self.verify("--json")
        assert found.exit_code in (0, 1), found.output
        failing = [one["what"] for one in json.loads(found.stdout)["findings"] if one["proven"] != "yes"]
        assert bool(failing) == (found.exit_code == 1)
        return failing


@pytest.fixture
def url(settings: Settings, make_key: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The API on a port of its own; the environment has an auditor's key."""
    monkeypatch.setenv("UNLEARN_API_KEY", make_key("auditor"))
    server = uvicorn.Server(uvicorn.Config(create_app(settings, dispatcher=Bell()), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def fetch(job_id: str, url: str, http: TestClient, folder: Path) -> Fetched:
    """By the commands, and what they do not fetch over HTTP."""
    there = Fetched(
        *(folder / name for name in ("certificate.json", "adapter", "report.json", "keys.json", "log.jsonl"))
    )
    for command in (["certificate", job_id, "--out", there.certificate], ["audit", "export", "--out", there.audit]):
        done = CliRunner().invoke(app, [*map(str, command), "--url", url])
        assert done.exit_code == 0, done.output
    there.keys.write_bytes(http.get("/.well-known/unlearning-keys").content)
    there.report.write_bytes(http.get(f"{JOBS}/{job_id}/report").content)
    there.adapter.mkdir()
    for artifact in http.get(f"{JOBS}/{job_id}/artifacts").json()["data"]:
        if artifact["name"].startswith("adapter/"):
            (folder / artifact["name"]).write_bytes(http.get(artifact["content"]).content)
    return there


def flipped(path: Path, place: int) -> bytes:
    content = path.read_bytes()
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_certificate_holds_offline_and_one_byte_is_named(
    sessions: Sessions, settings: Settings, new_job: NewJob, http: TestClient, url: str, tmp_path: Path
) -> None:
    job_id = new_job()
    succeed(sessions, settings, job_id)
    assert issue(sessions, settings) == 1
    noted(sessions, 2)
    there = fetch(job_id, url, http, tmp_path)
    said = there.verify()
    assert said.exit_code == 0, said.output
    assert "What it does not prove" in said.stdout
    assert there.failing() == []
    assert sorted(path.name for path in tmp_path.glob("*.part")) == []

    says = certificate.read(dsse.from_json(there.certificate.read_bytes())).predicate
    with sessions.begin() as s:
        job = jobs.get(s, job_id)
        digests = [files.get(s, file_id).digest for file_id in (job.forget_set, job.retain_set)]
        own = [one.seq for one in audit.events(s, object_id=job_id)]
    assert [says.forget_set.digest, says.retain_set.digest] == digests
    assert own[-2] <= says.audit_head.seq == own[-1] - 1, "behind the job's own entries, before that of the certificate"
    assert says.environment.lock_digest is not None

    adapter = there.adapter / "adapter_model.safetensors"
    for path, what, place in (
        (adapter, "adapter file adapter_model.safetensors", 7),
        (there.report, "report", 40),
        (there.certificate, "certificate", 60),
        (there.audit, "audit log", 200),
    ):
        whole = path.read_bytes()
        path.write_bytes(flipped(path, place))
        assert what in there.failing(), what
        path.write_bytes(whole)
    there.audit.write_bytes(b"".join(there.audit.read_bytes().splitlines(keepends=True)[: says.audit_head.seq - 1]))
    assert there.failing() == ["audit log"]


def test_a_certificate_is_given_as_it_was_issued_and_not_sent_twice(
    sessions: Sessions, settings: Settings, new_job: NewJob, http: TestClient
) -> None:
    job_id = new_job()
    path = f"{JOBS}/{job_id}/certificate"
    early = http.get(path)
    assert (early.status_code, early.json()["type"]) == (409, "/docs#not-ready")
    succeed(sessions, settings, job_id)
    late = http.get(path)
    assert (late.status_code, late.json()["type"]) == (409, "/docs#not-ready")
    before = http.get(f"{JOBS}/{job_id}").json()
    assert before["result"]["certificate"] is None
    assert (issue(sessions, settings), issue(sessions, settings)) == (1, 0)

    reply = http.get(path)
    assert reply.headers["Content-Type"] == "application/vnd.dsse.envelope.v1+json"
    assert dsse.to_json(dsse.from_json(reply.content)) == reply.content
    again = http.get(path, headers={"If-None-Match": reply.headers["ETag"]})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", reply.headers["ETag"])
    job = http.get(f"{JOBS}/{job_id}").json()
    assert job["links"]["certificate"] == path
    assert job["version"] == before["version"] + 1
    events = http.get(f"{JOBS}/{job_id}/events").json()["data"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert (events[-1]["type"], events[-1]["data"]["certificate"]) == (
        "certificate.issued",
        job["result"]["certificate"],
    )
    listed = http.get(JOBS).json()["data"]
    assert listed[0]["result"] == job["result"]


def test_sweeps_at_once_issue_one(sessions: Sessions, settings: Settings, new_job: NewJob) -> None:
    job_ids = [new_job() for _ in range(2)]
    for job_id in job_ids:
        succeed(sessions, settings, job_id)
    with ThreadPoolExecutor(4) as pool:
        issued = list(pool.map(lambda _: issue(sessions, settings), range(4)))
    assert sum(issued) == len(job_ids)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"released": reports.make(published=False).released}, "no adapter was released"),
        ({"job_id": "ujob_2"}, "its report is that of job ujob_2"),
        ({"released": reports.make().released}, "the adapter that the report names is not the one that was published"),
    ],
)
def test_a_job_that_gets_none_is_asked_about_once(
    sessions: Sessions, settings: Settings, new_job: NewJob, http: TestClient, changes: dict[str, Any], why: str
) -> None:
    job_id = new_job()
    succeed(sessions, settings, job_id, **changes)
    assert issue(sessions, settings) == 0
    reply = http.get(f"{JOBS}/{job_id}/certificate")
    assert reply.status_code == 404
    assert why in reply.json()["detail"]
    Storage(settings.storage_url).delete(f"jobs/{job_id}")
    assert issue(sessions, settings) == 0, "nobody reads the report again"
    assert http.get(f"{JOBS}/{job_id}").json()["result"]["certificate"] is None


def test_a_storage_that_is_away_keeps_one_job_waiting_and_not_the_others(
    sessions: Sessions, settings: Settings, new_job: NewJob, http: TestClient
) -> None:
    waits, other = new_job(), new_job()
    for job_id in (waits, other):
        succeed(sessions, settings, job_id)
    report = Path(settings.storage_url) / f"jobs/{waits}/attempts/1/report.json"
    report.rename(report.with_suffix(".away"))
    assert issue(sessions, settings) == 1
    assert [http.get(f"{JOBS}/{job_id}/certificate").status_code for job_id in (waits, other)] == [409, 200]
    report.with_suffix(".away").rename(report)
    assert issue(sessions, settings) == 1


def test_a_failed_job_has_none(sessions: Sessions, new_job: NewJob, http: TestClient) -> None:
    job_id = new_job()
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        jobs.fail(s, job_id, claim.fence, Failure.of(FailureCode.ROW_TOO_LONG, "row 7"))
    assert http.get(f"{JOBS}/{job_id}/certificate").status_code == 404


def test_another_tenant_sees_nothing_of_it(
    sessions: Sessions, settings: Settings, new_job: NewJob, http: TestClient, make_key: Callable[..., str]
) -> None:
    job_id = new_job()
    succeed(sessions, settings, job_id)
    issue(sessions, settings)
    stranger = {"Authorization": f"Bearer {make_key('auditor', 'other')}"}
    assert http.get(f"{JOBS}/{job_id}/certificate", headers=stranger).status_code == 404
    assert http.get(LOG, params={"object_id": job_id}, headers=stranger).json()["data"] == []
    export = http.get(LOG, headers=stranger | LINES).content
    assert job_id.encode() not in export
    assert {json.loads(line)["tenant"] for line in export.splitlines()} == {"other"}
    assert http.get(f"{LOG}/head", headers=stranger).json()["seq"] == 2
    mlops = {"Authorization": f"Bearer {make_key('mlops')}"}
    for path in (LOG, f"{LOG}/head"):
        assert http.get(path, headers=mlops).json()["required_scopes"] == ["audit:read"]


@pytest.mark.parametrize("error", [ValueError("beyond 2**53"), RuntimeError("unforeseen")])
def test_a_job_that_cannot_be_certified_keeps_nobody_waiting(
    sessions: Sessions, settings: Settings, new_job: NewJob, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    ids = []
    for _ in range(2):
        ids.append(new_job())
        succeed(sessions, settings, ids[-1])
    first, second = ids
    whole = certificate.issue

    def issue_but_one(statement: certificate.Certificate, key: Any) -> Any:
        if statement.predicate.job_id == first:
            raise error
        return whole(statement, key)

    monkeypatch.setattr(certificate, "issue", issue_but_one)
    assert issue(sessions, settings) == 1
    with sessions.begin() as s:
        row, other = evidence.of_job(s, first), evidence.of_job(s, second)
        assert other is not None
        assert other.envelope is not None
        assert (row.refusal if row else None) == ("beyond 2**53" if isinstance(error, ValueError) else None)


# --- the same for policy engines


def test_the_verdict_is_attested_in_in_totos_terms_for_the_files_of_the_certificate(
    sessions: Sessions, settings: Settings, new_job: NewJob, http: TestClient, url: str, tmp_path: Path
) -> None:
    job_id = new_job()
    path, told = f"{JOBS}/{job_id}/test-result", tmp_path / "told.json"
    assert http.get(path).json()["type"] == "/docs#not-ready"
    succeed(sessions, settings, job_id)
    assert http.get(path).status_code == 409
    issue(sessions, settings)
    with sessions.begin() as s:
        evidence_keys.rotate(s, secrets_of(settings))
    with Client(url, os.environ["UNLEARN_API_KEY"]) as auditor:
        auditor.test_result(job_id, told)
    published = keys.parse_jwks(http.get("/.well-known/unlearning-keys").content)
    envelope = dsse.from_json(told.read_bytes())
    assert dsse.signers(envelope, published) == [list(published)[-1]], "by the key that signs now"
    assert envelope.payload_type == "application/vnd.in-toto+json"
    of_certificate = json.loads(dsse.from_json(http.get(f"{JOBS}/{job_id}/certificate").content).payload)
    said = json.loads(envelope.payload)
    assert said["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert said["subject"] == of_certificate["subject"]
    assert said["predicate"]["result"] == of_certificate["predicate"]["verdict"]["result"]
    reply = http.get(path)
    assert reply.content == told.read_bytes()
    assert http.get(path, headers={"If-None-Match": reply.headers["ETag"]}).status_code == 304


def test_what_somebody_put_in_a_certificates_place_is_not_attested(
    sessions: Sessions, settings: Settings, new_job: NewJob, http: TestClient
) -> None:
    """Not with a key of his own, either, that he published as ours."""
    job_id = new_job()
    succeed(sessions, settings, job_id)
    issue(sessions, settings)
    theirs = keys.generate()
    real = dsse.from_json(http.get(f"{JOBS}/{job_id}/certificate").content)
    forged = certificate.issue(certificate.read(real), theirs)
    assert http.get(f"{JOBS}/{job_id}/test-result").status_code == 200
    with sessions.begin() as s:
        s.execute(update(tables.SigningKey).values(public_jwk=keys.jwk(theirs.private.public_key())))
    for envelope in (
        forged,
        forged._replace(signatures=(forged.signatures[0]._replace(keyid=real.signatures[0].keyid),)),
    ):
        with owner(sessions).begin() as s:
            s.execute(update(tables.Certificate).values(envelope=dsse.to_json(envelope).decode()))
        reply = http.get(f"{JOBS}/{job_id}/test-result")
        assert reply.status_code == 503


# --- keys


def test_after_a_rotation_both_certificates_hold(
    sessions: Sessions,
    settings: Settings,
    new_job: NewJob,
    http: TestClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.database_url)
    monkeypatch.setenv("MASTER_KEY", MASTER_KEY)
    first = http.get("/.well-known/unlearning-keys", headers={"Authorization": ""}).json()["keys"]
    assert len(first) == 1, "made when the service first starts, published to everybody"
    signed = []
    for _ in range(2):
        job_id = new_job()
        succeed(sessions, settings, job_id)
        issue(sessions, settings)
        signed.append(dsse.from_json(http.get(f"{JOBS}/{job_id}/certificate").content))
        rotated = CliRunner().invoke(app, ["signing-keys", "rotate"])
        assert rotated.exit_code == 0, rotated.output
    published = keys.parse_jwks(http.get("/.well-known/unlearning-keys").content)
    ids = [dsse.signers(envelope, published)[0] for envelope in signed]
    assert list(published) == [*ids, rotated.stdout.strip()], "the oldest first"
    listed = CliRunner().invoke(app, ["signing-keys", "list"]).stdout.splitlines()
    assert ["retired" in line for line in listed] == [True, True, False]


def test_many_that_find_no_key_make_one(sessions: Sessions, settings: Settings) -> None:
    start = threading.Barrier(4)

    def sign(_: int) -> str:
        with sessions.begin() as s:
            evidence_keys.every(s)  # connected
            start.wait()
            return evidence_keys.active(s, secrets_of(settings)).id

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(sign, range(4)))) == 1


def test_a_private_key_is_of_use_only_with_the_master_key_and_under_its_own_name(
    sessions: Sessions, settings: Settings
) -> None:
    secrets = secrets_of(settings)
    with sessions.begin() as s:
        key = evidence_keys.active(s, secrets)
        assert evidence_keys.active(s, secrets).id == key.id
        [row] = evidence_keys.every(s)
        assert key.private.private_bytes_raw() not in row.sealed_private.encode()
        with pytest.raises(SealBroken):
            evidence_keys.active(s, Secrets(bytes(32)))
        row.id = "another"
        s.flush()
        with pytest.raises(SealBroken):
            evidence_keys.active(s, secrets)
        s.rollback()
