"""Who may do what: keys, roles, tenants, tokens. Generated from the routes, so that a new one cannot be forgotten."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
import werkzeug
from cryptography.hazmat.primitives.asymmetric import rsa
from fastapi import FastAPI
from httpx import Response
from pytest_httpserver import HTTPServer
from sqlalchemy import text
from starlette.routing import BaseRoute
from starlette.testclient import TestClient

from service.api import provider as provider_module
from service.api.guard import Guarded
from service.app import create_app
from service.domain.errors import NotFound, ProviderUnavailable
from service.domain.identity import ALL, ROLES, Scope
from service.processes import free_port
from service.settings import Settings
from service.store import audit, files, jobs, keys, reads, tenancy, tenants
from service.store.secrets import secrets_of
from service.store.session import Sessions
from service.store.tables import AuditEvent, Job
from service.store.tenants import DEFAULT
from tests.abuse.proxy import SILENT, Fault, proxy
from tests.service.conftest import JOBS, ClientOf

PUBLIC = {"/livez", "/readyz", "/docs", "/openapi.json", "/v1/schemas/report", "/.well-known/unlearning-keys"}
MakeKey = Callable[..., str]


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def routes(app: FastAPI) -> list[tuple[str, str, BaseRoute]]:
    """(method, path, route) of everything that answers, in routers too."""

    def below(found: list[BaseRoute]) -> Iterator[BaseRoute]:
        for route in found:
            router = getattr(route, "original_router", None)  # of an included router
            yield from below(router.routes) if router is not None else [route]

    answering = [
        (method, str(getattr(route, "path", None)), route)
        for route in below(app.routes)
        for method in sorted(getattr(route, "methods", None) or ())
        if method != "HEAD"
    ]
    documented = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    assert documented <= {(method, path) for method, path, _ in answering}, "none was overlooked"
    return answering


def the_app(http: TestClient) -> FastAPI:
    app = http.app
    assert isinstance(app, FastAPI)
    return app


def test_every_route_asks_for_a_scope_or_is_on_the_short_list(http: TestClient) -> None:
    for method, path, route in routes(the_app(http)):
        if path in PUBLIC:
            assert not isinstance(route, Guarded), path
        else:
            assert isinstance(route, Guarded), f"{method} {path}"
            assert route.scopes, f"{method} {path} names no scope"


def test_nobody_enters_without_credentials_or_with_wrong_ones(
    settings: Settings, client_of: ClientOf, make_key: MakeKey
) -> None:
    secret = make_key("admin")
    wrong = (
        "",
        "Bearer",
        "Bearer ulk_x",
        f"Basic {secret}",
        f"Bearer {secret[:-1]}0",
        f"Bearer {secret}x",
        "Bearer a.b.c",
    )
    with client_of(settings.model_copy(update={"rate_limit_failures_per_minute": 0})) as http:
        for method, path, _ in routes(the_app(http)):
            if path not in PUBLIC:
                replies = [http.request(method, path, headers={"Authorization": header}) for header in wrong[:2]]
                for reply in replies:
                    assert (reply.status_code, reply.headers["WWW-Authenticate"]) == (401, "Bearer"), path
        for header in wrong:
            reply = http.get(JOBS, headers={"Authorization": header})
            assert (reply.status_code, reply.json()["type"]) == (401, "/docs#unauthenticated"), header
            assert secret not in reply.text


@pytest.mark.parametrize("role", sorted(ROLES))
def test_a_role_reaches_the_routes_of_its_scopes_alone(http: TestClient, make_key: MakeKey, role: str) -> None:
    headers = bearer(make_key(role))
    for method, path, route in routes(the_app(http)):
        if path in PUBLIC:
            continue
        assert isinstance(route, Guarded)
        reply = http.request(method, path, headers=headers)  # the braces of the path stand for an id that is not there
        if ROLES[role] >= route.scopes:
            assert reply.status_code not in (401, 403), f"{role}: {method} {path}"
        else:
            assert reply.status_code == 403, f"{role}: {method} {path}"
            problem = reply.json()
            assert problem["type"] == "/docs#insufficient-scope"
            assert set(problem["required_scopes"]) == {str(scope) for scope in route.scopes - ROLES[role]}


def test_the_roles_are_what_their_names_say() -> None:
    assert ROLES["admin"] == ALL
    assert ROLES["dashboard"] == {Scope.METRICS_READ}
    assert Scope.REQUESTS_APPROVE not in ROLES["compliance_submitter"], "who submits does not approve"
    assert Scope.REQUESTS_CREATE not in ROLES["compliance_approver"]
    assert all(scope.endswith(":read") for scope in ROLES["auditor"])


def test_another_tenants_things_are_not_there(
    http: TestClient, make_key: MakeKey, request_body: dict[str, Any], sessions: Sessions
) -> None:
    job = http.post(JOBS, json=request_body).json()
    with sessions.begin() as s:
        key_id = keys.page(s)[0][0].id
    ids = {"job_id": job["id"], "file_id": job["forget_set"], "key_id": key_id}
    other = bearer(make_key("admin", "other"))
    asked = 0
    for method, path, _ in routes(the_app(http)):
        names = [name for name in ids if f"{{{name}}}" in path]
        if not names:
            continue
        url = path
        for name in names:
            url = url.replace(f"{{{name}}}", ids[name])
        reply = http.request(method, url, headers=other)
        assert reply.status_code in (404, 422) or (reply.status_code, method) == (415, "POST"), f"{method} {path}"
        asked += reply.status_code == 404
    assert asked >= 8
    for path in (JOBS, "/v1/files", "/v1/api-keys", "/v1/benchmarks"):
        mine = {row["id"] for row in http.get(path).json()["data"]}
        theirs = {row["id"] for row in http.get(path, headers=other).json()["data"]}
        assert not mine & theirs, path
    assert http.get(f"{JOBS}/{job['id']}").json()["status"] == "queued", "nothing of it was cancelled"
    stolen = http.post(JOBS, json=request_body | {"forget_set": job["forget_set"]}, headers=other)
    assert [error["code"] for error in stolen.json()["errors"]] == ["file_not_found"]


def test_a_bound_session_sees_its_tenant_alone_however_it_asks(sessions: Sessions, new_job: Callable[..., str]) -> None:
    job_id = new_job()
    with sessions.begin() as s:
        tenants.add(s, "other")
    with sessions.begin() as s:
        tenancy.bind(s, "other", "x")
        with pytest.raises(NotFound):
            jobs.get(s, job_id)
        with pytest.raises(NotFound):
            jobs.request_cancel(s, job_id)
        assert reads.page(s) == ([], False)
        assert files.page(s) == ([], False)
        assert reads.statuses(s, [job_id]) == {}
        changed = s.execute(
            text("SELECT 1")
        ).rowcount  # raw SQL is not ours to bind: nothing of the API uses it on rows
        assert changed is not None
        assert reads.places(s, [job_id]) == {job_id: 1}, "the line is everybody's"
    with sessions.begin() as s:
        assert jobs.get(s, job_id).tenant_id == DEFAULT


def test_a_row_belongs_to_the_tenant_of_its_session(sessions: Sessions, settings: Settings) -> None:
    with sessions.begin() as s:
        tenants.add(s, "other")
    with sessions.begin() as s:
        tenancy.bind(s, "other", "x")
        made = keys.create(s, secrets_of(settings), name="n", scopes=[Scope.JOBS_READ])
        assert (made.row.tenant_id, made.row.created_by) == ("other", "x")
    with sessions.begin() as s:
        chain = s.scalars(audit.select(AuditEvent), execution_options=tenancy.EVERYBODYS).all()
        assert [(row.tenant_id, row.action) for row in chain] == [
            ("other", "tenant.added"),
            ("other", "key.created"),
        ]


# --- keys


def test_a_key_is_shown_once_and_kept_nowhere(http: TestClient, sessions: Sessions) -> None:
    reply = http.post("/v1/api-keys", json={"name": "ci", "role": "mlops"})
    assert (reply.status_code, reply.headers["Cache-Control"]) == (201, "no-store")
    made = reply.json()
    assert made["secret"].startswith(made["prefix"] + "_")
    shown = http.get(reply.headers["Location"]).json()
    assert shown == {name: value for name, value in made.items() if name != "secret"}
    with sessions.begin() as s:
        for table in ("api_keys", "audit_events"):
            rows = s.execute(text(f"SELECT * FROM {table}")).all()
            assert made["secret"][13:50] not in str(rows)
    assert http.get(JOBS, headers=bearer(made["secret"])).status_code == 200
    used = http.get(reply.headers["Location"]).json()["last_used_at"]
    assert used is not None


def test_a_revoked_or_expired_key_opens_nothing(http: TestClient, sessions: Sessions) -> None:
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    made = [http.post("/v1/api-keys", json={"name": "x", "role": "mlops", "expires_at": soon}).json() for _ in range(2)]
    assert [http.get(JOBS, headers=bearer(key["secret"])).status_code for key in made] == [200, 200]
    for _ in range(2):
        assert http.delete(f"/v1/api-keys/{made[0]['id']}").status_code == 204
    with sessions.begin() as s:
        s.execute(text("UPDATE api_keys SET expires_at = now() WHERE id = :id"), {"id": made[1]["id"]})
    assert [http.get(JOBS, headers=bearer(key["secret"])).status_code for key in made] == [401, 401]
    past = http.post("/v1/api-keys", json={"name": "x", "role": "mlops", "expires_at": "2020-01-01T00:00:00Z"})
    assert [error["pointer"] for error in past.json()["errors"]] == ["/expires_at"]


def test_cve_2025_57817_a_key_makes_only_keys_with_scopes_of_its_own(http: TestClient) -> None:
    maker = http.post("/v1/api-keys", json={"name": "m", "scopes": ["keys:manage", "jobs:read"]}).json()
    headers = bearer(maker["secret"])
    assert http.post("/v1/api-keys", json={"name": "a", "scopes": ["jobs:read"]}, headers=headers).status_code == 201
    for wanted in ({"scopes": ["admin"]}, {"role": "admin"}, {"scopes": ["jobs:read", "files:read"]}):
        refused = http.post("/v1/api-keys", json={"name": "a", **wanted}, headers=headers)
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/scopes"), wanted
    assert http.post("/v1/api-keys", json={"name": "a"}, headers=headers).status_code == 422


def test_a_key_of_another_master_key_is_nobodys(sessions: Sessions, settings: Settings, make_key: MakeKey) -> None:
    secret = make_key("admin")
    with sessions.begin() as s:
        ours, theirs = (secrets_of(settings), type(secrets_of(settings))(bytes(32)))
        assert isinstance(keys.recognise(s.connection(), ours, secret), keys.Recognised)
        assert keys.recognise(s.connection(), theirs, secret) is None


def test_a_key_makes_only_keys_that_expire_no_later_than_itself(http: TestClient) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)
    body = {"name": "m", "scopes": ["keys:manage"], "expires_at": soon.isoformat()}
    maker = bearer(http.post("/v1/api-keys", json=body).json()["secret"])
    for later in (None, (soon + timedelta(seconds=1)).isoformat()):
        refused = http.post("/v1/api-keys", json=body | {"expires_at": later}, headers=maker)
        assert [error["pointer"] for error in refused.json()["errors"]] == ["/expires_at"]
    assert http.post("/v1/api-keys", json=body, headers=maker).status_code == 201


def test_a_change_of_a_tenants_rules_changes_what_is_given_and_is_in_its_log(sessions: Sessions) -> None:
    with sessions.begin() as s:
        tenants.add(s, "other", approvals=2, keep_files_days=30)
    with sessions.begin() as s:
        changed = tenants.change(s, "other", keep_files_days=None)
        assert (changed.approvals, changed.keep_files_days) == (2, None)
    with sessions.begin() as s:
        tenancy.bind(s, "other", "x")
        told = [(row.action, row.data) for row in audit.events(s)]
    unbounded = {"max_running_jobs": None, "max_open_jobs": None}
    assert told == [
        ("tenant.added", {"approvals": 2, "keep_files_days": 30, "keep_forgotten_days": 0} | unbounded),
        ("tenant.changed", {"keep_files_days": None}),
    ]


def test_without_a_master_key_nothing_starts(settings: Settings) -> None:
    with pytest.raises(RuntimeError, match="MASTER_KEY is not set"):
        create_app(settings.model_copy(update={"master_key": None}))


# --- people


@pytest.fixture
def provider(httpserver: HTTPServer, settings: Settings) -> tuple[Settings, Callable[..., str]]:
    """(settings that trust it, token(**claims) -> one that it signed)."""
    private = rsa.generate_private_key(65537, 2048)
    jwk = jwt.algorithms.RSAAlgorithm.to_jwk(private.public_key(), as_dict=True) | {
        "kid": "k1",
        "use": "sig",
        "alg": "RS256",
    }
    httpserver.expect_request("/jwks").respond_with_json({"keys": [jwk]})

    def token(**claims: Any) -> str:
        standard = {"iss": "https://id.example", "aud": "unlearning-service", "exp": time.time() + 60, "sub": "ada"}
        standard |= {"tenant": DEFAULT, "roles": ["auditor"]}
        return jwt.encode(standard | claims, private, "RS256", headers={"kid": "k1"})

    trusting = {"oidc_issuer": "https://id.example", "oidc_jwks_url": httpserver.url_for("/jwks")}
    return settings.model_copy(update=trusting), token


def test_a_token_of_the_provider_is_a_person_with_the_scopes_of_his_roles(
    provider: tuple[Settings, Callable[..., str]], client_of: ClientOf, sessions: Sessions, new_job: Callable[..., str]
) -> None:
    settings, token = provider
    job_id = new_job()
    with sessions.begin() as s:
        tenants.add(s, "other")
    with client_of(settings) as http:
        answer = http.get(f"{JOBS}/{job_id}", headers=bearer(token()))
        assert answer.status_code == 200
        same = {"If-None-Match": answer.headers["ETag"]}
        assert http.get(f"{JOBS}/{job_id}", headers=bearer(token()) | same).status_code == 304
        assert http.post(f"{JOBS}/{job_id}/cancel", headers=bearer(token())).status_code == 403
        both = bearer(token(roles=["auditor", "mlops", "nobody"]))
        assert http.post(f"{JOBS}/{job_id}/cancel", headers=both).status_code == 202
        assert http.get(f"{JOBS}/{job_id}", headers=bearer(token(tenant="other"))).status_code == 404
        whatever = {"If-None-Match": "*"}
        assert http.get(f"{JOBS}/{job_id}", headers=bearer(token(tenant="other")) | whatever).status_code == 404
    with sessions.begin() as s:
        last = s.scalars(audit.select(AuditEvent).order_by(AuditEvent.seq.desc())).first()
        assert last is not None
        assert (last.actor, last.action, last.object_id) == ("oidc:ada", "job.cancelled", job_id)
        assert s.get(Job, job_id) is not None


def test_a_key_that_a_token_makes_ends_within_what_the_deployment_sets(
    provider: tuple[Settings, Callable[..., str]], client_of: ClientOf
) -> None:
    settings, token = provider
    admin = bearer(token(roles=["admin"]))

    def at(hours: float) -> str:
        return (datetime.now(UTC) + timedelta(hours=hours)).isoformat()

    def make(http: TestClient, expires_at: str | None, headers: dict[str, str] = admin) -> Response:
        return http.post("/v1/api-keys", json={"name": "k", "role": "admin", "expires_at": expires_at}, headers=headers)

    with client_of(settings) as http:
        for late in (None, at(24.1), at(10_000)):
            refused = make(http, late)
            assert refused.status_code == 422
            assert [(one["pointer"], one["code"]) for one in refused.json()["errors"]] == [("/expires_at", "late")]
            assert "expire within 24 h (OIDC_KEY_MAX_S)" in refused.json()["errors"][0]["detail"]
        made = make(http, at(23.9))
        assert made.status_code == 201
        own = bearer(made.json()["secret"])
        assert make(http, None, own).status_code == 422, "nor does what it made make one without an end"
        assert make(http, at(23.95), own).status_code == 422
        assert make(http, at(1), own).status_code == 201
    with client_of(settings.model_copy(update={"oidc_key_max_s": 3600})) as http:
        assert [make(http, at(hours)).status_code for hours in (0.9, 1.1)] == [201, 422]
    with client_of(settings.model_copy(update={"oidc_key_max_s": 0})) as http:
        refused = make(http, at(0.1))
        assert (refused.status_code, refused.json()["errors"][0]["code"]) == (422, "token")


WRONG_CLAIMS: list[dict[str, Any]] = [
    {"iss": "https://evil.example"},
    {"aud": "another-service"},
    {"exp": 1},
    {"nbf": 4_000_000_000},
    {"tenant": None},
    {"tenant": "nobody"},
    {"tenant": ["default"]},
    {"roles": "admin"},
]


@pytest.mark.parametrize("claims", WRONG_CLAIMS, ids=lambda claims: "-".join(claims))
def test_a_token_that_is_not_meant_for_us_is_nobodys(
    provider: tuple[Settings, Callable[..., str]], client_of: ClientOf, claims: dict[str, Any]
) -> None:
    settings, token = provider
    with client_of(settings) as http:
        assert http.get(JOBS, headers=bearer(token(**claims))).status_code == 401


def test_a_provider_that_is_away_is_no_guess(settings: Settings, client_of: ClientOf) -> None:
    away = {"oidc_issuer": "https://id.example", "oidc_jwks_url": f"http://127.0.0.1:{free_port()}/"}
    token = jwt.encode({"sub": "ada"}, "s" * 32, "HS256", headers={"kid": "k1"})
    with client_of(settings.model_copy(update=away | {"rate_limit_failures_per_minute": 1})) as http:
        assert [http.get(JOBS, headers=bearer(token)).status_code for _ in range(3)] == [503, 429, 429]


def test_a_provider_that_hangs_keeps_no_api_key_waiting(
    settings: Settings, client_of: ClientOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever invents names of keys makes it fetch once, and waits alone."""
    monkeypatch.setattr(provider_module, "WAIT_S", 0.1)
    monkeypatch.setattr(provider_module, "TIMEOUT_S", 2)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        trusting = {"oidc_issuer": "https://id.example", "rate_limit_failures_per_minute": 0}
        trusting |= {"oidc_jwks_url": f"http://127.0.0.1:{silent.getsockname()[1]}/"}
        tokens = [jwt.encode({"sub": "ada"}, "s" * 32, "HS256", headers={"kid": f"k{n}"}) for n in range(46)]
        with client_of(settings.model_copy(update=trusting)) as http, ThreadPoolExecutor(46) as pool:
            invented = [pool.submit(http.get, JOBS, headers=bearer(token)) for token in tokens]
            time.sleep(0.2)
            began = time.monotonic()
            assert http.get(JOBS).status_code == 200
            assert time.monotonic() - began < 1
            assert {one.result().status_code for one in invented} == {503}
        silent.settimeout(0.1)
        silent.accept()[0].close()
        with pytest.raises(TimeoutError):
            silent.accept()


def test_a_key_that_the_provider_publishes_later_is_found(
    provider: tuple[Settings, Callable[..., str]], httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, token = provider
    assert settings.oidc_jwks_url is not None
    keys = provider_module.Keys(settings.oidc_jwks_url)
    later = jwt.encode({"sub": "ada"}, "s" * 32, "HS256", headers={"kid": "k2"})
    assert keys.of(token()) is not None
    assert [keys.of(later) for _ in range(5)] == [None] * 5
    assert len(httpserver.log) == 1, "names that nobody published are not asked for again and again"
    private = rsa.generate_private_key(65537, 2048)
    jwk = jwt.algorithms.RSAAlgorithm.to_jwk(private.public_key(), as_dict=True) | {"kid": "k2", "use": "sig"}
    httpserver.clear_all_handlers()
    httpserver.expect_request("/jwks").respond_with_json({"keys": [jwk]})
    monkeypatch.setattr(provider_module, "AGAIN_S", 0)
    assert keys.of(later) is not None


@pytest.mark.parametrize("answer", ["<html>502</html>", '{"keys": []}'])
def test_known_keys_serve_while_something_else_answers_for_the_provider(
    provider: tuple[Settings, Callable[..., str]], httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    settings, token = provider
    assert settings.oidc_jwks_url is not None
    keys = provider_module.Keys(settings.oidc_jwks_url)
    assert keys.of(token()) is not None
    httpserver.clear_all_handlers()
    httpserver.expect_request("/jwks").respond_with_data(answer)
    for name in ("KEYS_S", "AGAIN_S"):
        monkeypatch.setattr(provider_module, name, 0)
    assert keys.of(token()) is not None
    with pytest.raises(ProviderUnavailable):  # that there is no such key is not known
        keys.of(jwt.encode({"sub": "ada"}, "s" * 32, "HS256", headers={"kid": "k2"}))


@pytest.mark.parametrize(
    "fault", [Fault(bytes_per_s=5), Fault(answer_bytes=300), SILENT], ids=["trickles", "is cut", "hangs"]
)
def test_a_provider_whose_answer_does_not_arrive_is_away_within_its_time(
    provider: tuple[Settings, Callable[..., str]],
    httpserver: HTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    monkeypatch.setattr(provider_module, "TIMEOUT_S", 1)
    _, token = provider
    with proxy((httpserver.host, httpserver.port)) as between:
        keys = provider_module.Keys(f"http://127.0.0.1:{between.port}/jwks")
        began = time.monotonic()
        with between.fault(fault), pytest.raises(ProviderUnavailable):
            keys.of(token())
        assert time.monotonic() - began < 3
        monkeypatch.setattr(provider_module, "AGAIN_S", 0)
        assert keys.of(token()) is not None


def test_a_fetch_that_took_long_is_not_tried_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    async def hang(_: str) -> bytes:
        nonlocal tries
        tries += 1
        await asyncio.sleep(0.6)
        raise TimeoutError

    monkeypatch.setattr(provider_module, "_get", hang)
    monkeypatch.setattr(provider_module, "AGAIN_S", 0.5)
    published = provider_module.Keys("https://idp.example/keys")
    token = jwt.encode({"sub": "a"}, "k" * 32, headers={"kid": "k"})
    for _ in range(2):
        with pytest.raises(ProviderUnavailable):
            published.of(token)
    assert tries == 1


def test_what_a_provider_says_without_end_is_no_set_of_keys(
    provider: tuple[Settings, Callable[..., str]], httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, token = provider
    assert settings.oidc_jwks_url is not None
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 2**26:
            sent += 2**16
            yield b" " * 2**16

    httpserver.clear_all_handlers()
    httpserver.expect_request("/jwks").respond_with_handler(lambda _: werkzeug.Response(endless()))
    with pytest.raises(ProviderUnavailable):
        provider_module.Keys(settings.oidc_jwks_url).of(token())
    assert sent < 2**26


@pytest.mark.parametrize("subject", ["", "a\0b", "\ud800", "\x1b[2J", "a" * 256])
def test_a_subject_that_is_no_name_is_nobody(
    provider: tuple[Settings, Callable[..., str]], client_of: ClientOf, subject: str
) -> None:
    settings, token = provider
    with client_of(settings) as http:
        assert http.get(JOBS, headers=bearer(token(sub=subject))).status_code == 401


def test_a_token_that_the_provider_did_not_sign_is_nobodys(
    provider: tuple[Settings, Callable[..., str]], client_of: ClientOf
) -> None:
    settings, token = provider
    claims = jwt.decode(token(), options={"verify_signature": False})
    other = rsa.generate_private_key(65537, 2048)
    forged = [
        jwt.encode(claims, other, "RS256", headers={"kid": "k1"}),
        jwt.encode(claims, other, "RS256", headers={"kid": "k2"}),
        jwt.encode(claims, None, "none", headers={"kid": "k1"}),
        jwt.encode(claims, "s" * 32, "HS256", headers={"kid": "k1"}),
    ]
    with client_of(settings) as http:
        assert [http.get(JOBS, headers=bearer(one)).status_code for one in forged] == [401] * 4
