"""What an auditor takes along: a job's certificate, the keys that it is checked with, and the tenant's audit log."""

from datetime import datetime
from hashlib import sha256
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from starlette.exceptions import HTTPException

from service.api.deps import Everybody, Here, Who, unchanged
from service.api.errors import declared
from service.api.guard import Guarded, needs
from service.api.negotiate import preferred
from service.api.shapes import JOBS_PATH
from service.domain.errors import FieldProblem, InvalidRequest, NotFound, NotReady
from service.domain.identity import Scope
from service.domain.job import EXACT_MAX, TERMINAL, Status, Strict
from service.evidence.chain import genesis
from service.evidence.dsse import MEDIA_TYPE
from service.store import audit, evidence, evidence_keys, jobs
from service.store.tables import Certificate

router = APIRouter(tags=["evidence"], route_class=Guarded)
public = APIRouter(tags=["evidence"])

AUDIT_PATH = "/v1/audit-events"
JSON, LINES = "application/json", "application/jsonl"
KEYS_KEPT_S = 300  # by whoever fetched the keys: a new one signs at once


class AuditQuery(Strict):
    after_seq: int = Field(default=0, ge=0, le=EXACT_MAX)
    limit: int = Field(default=100, ge=1, le=1000)
    object_id: str | None = Field(default=None, max_length=255, description="entries on this object alone")


class AuditEventObject(BaseModel):
    """An entry, field by field as the export has it, so that its hash can be computed again."""

    object: Literal["audit.event"] = "audit.event"
    tenant: str
    seq: int = Field(description="1, 2, 3, ... without a gap")
    id: str
    created_at: str
    actor: str
    action: str
    object_type: str
    object_id: str
    data: dict[str, Any]
    prev_hash: str
    hash: str = Field(description="SHA-256 of `prev_hash` and of the entry's canonical JSON (RFC 8785)")


class AuditEvents(BaseModel):
    object: Literal["list"] = "list"
    data: list[AuditEventObject]
    has_more: bool


class AuditHead(BaseModel):
    object: Literal["audit.head"] = "audit.head"
    tenant: str
    seq: int = Field(description="0: the log is empty")
    hash: str
    valid: bool | None = Field(
        description="whether the log held when it was last checked; null: it was not checked yet"
    )
    fault: dict[str, Any] | None = Field(description="the first entry that is not as it was: seq, kind, detail")
    checked_seq: int | None = Field(description="the last entry that was checked and held")
    checked_at: datetime | None


@router.get(
    f"{JOBS_PATH}/{{job_id}}/certificate",
    summary="The certificate",
    dependencies=[needs(Scope.CERTIFICATES_READ)],
    response_class=Response,
    responses=declared(404, 409, 503) | {200: {"content": {MEDIA_TYPE: {}}}, 304: {"description": "Not modified"}},
)
def certificate(here: Here, job_id: str, request: Request) -> Response:
    """A DSSE envelope around an in-toto statement; `unlearn verify` checks it offline.

    409 until it is issued, moments after the job has succeeded; 404 if the job ended without an adapter although the
    model knew the rows. Where it did not, the certificate is about the base model's files, or those of the adapter that had
    forgotten them already.
    """
    with here.sessions.begin() as s:
        envelope = _issued(s, job_id).envelope
    assert envelope is not None
    return _envelope(request, envelope.encode(), f"{job_id}-certificate.json")


@router.get(
    f"{JOBS_PATH}/{{job_id}}/test-result",
    summary="The verdict for policy engines",
    dependencies=[needs(Scope.CERTIFICATES_READ)],
    response_class=Response,
    responses=declared(404, 409, 503) | {200: {"content": {MEDIA_TYPE: {}}}, 304: {"description": "Not modified"}},
)
def test_result(here: Here, job_id: str, request: Request) -> Response:
    """What the certificate says in the terms of in-toto's test-result v0.1, each gate a test, about the same files.

    For who decides on an adapter and knows nothing of unlearning. Signed by the key that signs now; 409 as for the certificate.
    """
    with here.sessions.begin() as s:
        content = evidence.generic_result(s, here.secrets, _issued(s, job_id))
    return _envelope(request, content, f"{job_id}-test-result.json")


def _issued(s: Session, job_id: str) -> Certificate:
    """A job's certificate, not merely why it has none."""
    job, decided = jobs.get(s, job_id), evidence.of_job(s, job_id)
    if job.status not in TERMINAL:
        raise NotReady(f"the job is {job.status}; its certificate comes when it has succeeded")
    if job.status is not Status.SUCCEEDED:
        raise NotFound("certificate", f"{job_id}: the job has {job.status}")
    if decided is None:
        raise NotReady("the job has succeeded; its certificate is about to be issued")
    if decided.envelope is None:
        raise NotFound("certificate", f"{job_id}: {decided.refusal}")
    return decided


def _envelope(request: Request, content: bytes, name: str) -> Response:
    headers = {"ETag": f'"{sha256(content).hexdigest()}"'}
    if unchanged(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return Response(content, headers=headers, media_type=MEDIA_TYPE)


@router.get(
    AUDIT_PATH,
    summary="The audit log",
    dependencies=[needs(Scope.AUDIT_READ)],
    response_model=AuditEvents,
    responses=declared(406, 503) | {200: {"content": {LINES: {"schema": {"type": "string"}}}}},
)
def audit_events(
    here: Here,
    who: Who,
    query: Annotated[AuditQuery, Query()],
    accept: Annotated[str, Header(include_in_schema=False)] = "*/*",
) -> Response:
    """Who did what, in order; ask again with the last `seq` as `after_seq`.

    With `Accept: application/jsonl`: the whole log, a line per entry, as `unlearn verify` reads it.
    """
    media_type = preferred(accept, [JSON, LINES])
    if media_type is None:
        raise HTTPException(406, f"the audit log comes as {JSON} or {LINES}")
    if media_type == LINES:
        if query.model_fields_set:
            raise InvalidRequest(
                FieldProblem("", "as JSON Lines the log comes whole: leave the parameters out", "whole")
            )
        lines = audit.export(here.sessions, who.tenant)
        headers = {"Content-Disposition": f'attachment; filename="audit-{who.tenant}.jsonl"', "Vary": "Accept"}
        # The first is read at once: a database that is away must be told before the answer begins
        return StreamingResponse(chain([next(lines, b"")], lines), headers=headers, media_type=LINES)
    with here.sessions.begin() as s:
        found = audit.events(s, after_seq=query.after_seq, limit=query.limit + 1, object_id=query.object_id)
    data = [AuditEventObject(**audit.fields(row)) for row in found[: query.limit]]
    answer = AuditEvents(data=data, has_more=len(found) > query.limit)
    return JSONResponse(answer.model_dump(mode="json"), headers={"Vary": "Accept"})


@router.get(
    f"{AUDIT_PATH}/head",
    summary="The last entry of the audit log",
    dependencies=[needs(Scope.AUDIT_READ)],
    responses=declared(503),
)
def audit_head(here: Here, who: Who) -> AuditHead:
    """Note it elsewhere: it fixes the whole log up to this entry. The log is checked every minute, and whole once a day."""
    with here.sessions.begin() as s:
        head, last = audit.head(s, who.tenant), audit.last_check(s, who.tenant)
    return AuditHead(
        tenant=who.tenant,
        seq=head.seq if head else 0,
        hash=head.hash if head else genesis(who.tenant),
        valid=last.fault is None if last else None,
        fault=last.fault if last else None,
        checked_seq=last.seq if last else None,
        checked_at=last.checked_at if last else None,
    )


class Jwks(JSONResponse):
    media_type = "application/jwk-set+json"


@public.get("/.well-known/unlearning-keys", summary="Public signing keys", response_class=Jwks, responses=declared(503))
def signing_keys(here: Everybody) -> Jwks:
    """A JWKS (RFC 7517, 8037): the key that signs and all that ever signed."""
    with here.sessions.begin() as s:
        found = evidence_keys.published(s)
    headers = {"Cache-Control": f"public, max-age={KEYS_KEPT_S}"}
    return Jwks(found, headers=headers)
