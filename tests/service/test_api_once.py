"""Every creation that is sent again with its Idempotency-Key: one thing, one answer, nothing left over."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update
from starlette.testclient import TestClient

from service.api.examples import EXAMPLES, MODEL, RETAIN
from service.domain.job import ModelEntry, PromptFormat
from service.settings import Settings
from service.store import idempotency, keys, models
from service.store.session import Sessions
from service.store.tables import Base, WebhookDelivery
from tests.service.test_contract import DOCUMENT, with_ids
from tests.service.test_evidence_routes import succeed

FILES, ENDPOINTS = "/v1/files", "/v1/webhook-endpoints"
JOBS, REQUESTS, BATCH = "/v1/unlearning/jobs", "/v1/deletion-requests", "/v1/deletion-requests/batch"
OTHERWISE: dict[str, dict[str, Any]] = {  # what makes another request of the example's; {}: there is no body
    JOBS: {"seed": 7},
    f"{JOBS}/{{job_id}}/reverify": {},
    REQUESTS: {"external_reference": "another"},
    FILES: {"purpose": "retain_set"},
    "/v1/benchmarks": {"corpus": "another"},
    "/v1/api-keys": {"name": "another"},
    ENDPOINTS: {"description": "another"},
    f"{ENDPOINTS}/{{endpoint_id}}/rotate-secret": {},
    f"{ENDPOINTS}/{{endpoint_id}}/test": {},
    "/v1/webhook-deliveries/{delivery_id}/replay": {},
}
Send = Callable[..., Any]


def heard() -> Iterator[tuple[str, str, bool, set[str]]]:
    """(method, path, whether it has an Idempotency-Key, statuses) of each operation."""
    for path, operations in json.loads(DOCUMENT.read_text())["paths"].items():
        for method, operation in operations.items():
            names = {parameter["name"] for parameter in operation.get("parameters", ())}
            yield method, path, "Idempotency-Key" in names, set(operation["responses"])


def test_whatever_creates_hears_the_key() -> None:
    for method, path, has_key, statuses in heard():
        assert has_key or "201" not in statuses, f"{method} {path}"
        assert not has_key or {"409", "422"} <= statuses or path == BATCH, f"{method} {path}"
    assert {path for _, path, has_key, _ in heard() if has_key} == {*OTHERWISE, BATCH}


@pytest.fixture
def send(http: TestClient, sessions: Sessions, settings: Settings, upload: Callable[..., str]) -> Send:
    """send(path, key, **changes of the body) -> the answer."""
    with sessions.begin() as s:
        models.add(s, ModelEntry(name=MODEL, source="path", location="m", prompt_format=PromptFormat()))
    files = {"retain_set": upload("retain_set", [RETAIN]), "sets": upload("eval_set", [{"text": RETAIN["answer"]}])}
    endpoint = http.post(ENDPOINTS, json=EXAMPLES["post", ENDPOINTS]).json()["id"]
    ids = {"endpoint_id": endpoint, "delivery_id": http.post(f"{ENDPOINTS}/{endpoint}/test").json()["id"]}
    ids["job_id"] = http.post(JOBS, json=EXAMPLES["post", JOBS]).json()["id"]
    succeed(sessions, settings, ids["job_id"])
    with sessions.begin() as s:  # what is still to be sent is not sent again
        s.execute(update(WebhookDelivery).values(status="failed", next_at=None, finished_at=func.now()))

    def sent(path: str, key: str, filename: str = "rows.jsonl", **changes: Any) -> Any:
        url, headers = path.format(**ids), {"Idempotency-Key": f'"{key}"'}
        if ("post", path) not in EXAMPLES:
            return http.post(url, headers=headers)
        body = with_ids(EXAMPLES["post", path], files) | changes
        if path == FILES:
            parts = {"file": (filename, body["file"])}
            return http.post(url, data={"purpose": body["purpose"]}, files=parts, headers=headers)
        return http.post(url, json=body, headers=headers)

    return sent


@pytest.fixture
def kept(sessions: Sessions, settings: Settings) -> Callable[[], tuple[dict[str, int], list[Path]]]:
    """kept() -> how many rows each table has, and the files of the storage."""

    def look() -> tuple[dict[str, int], list[Path]]:
        with sessions.begin() as s:
            rows = {
                table.name: s.scalars(select(func.count()).select_from(table)).one()
                for table in Base.metadata.sorted_tables
            }
        return rows, sorted(Path(settings.storage_url).rglob("*.sealed"))

    return look


def test_each_creation_that_is_sent_twice_is_carried_out_once(send: Send, kept: Callable[[], Any]) -> None:
    for path, changes in OTHERWISE.items():
        before, first = kept(), send(path, "k")
        assert first.is_success, f"{path}: {first.text}"
        assert "Idempotent-Replayed" not in first.headers
        after = kept()
        assert after != before, path
        again = send(path, "k")
        assert (again.status_code, again.json()) == (first.status_code, first.json()), path
        assert again.headers["Idempotent-Replayed"] == "true"
        for name in ("Location", "ETag", "Cache-Control"):
            assert again.headers.get(name) == first.headers.get(name), f"{path}: {name}"
        assert kept() == after, f"{path}: the second left something"
        if changes:
            other = send(path, "k", **changes)
            assert (other.status_code, other.json()["type"]) == (422, "/docs#idempotency-key-reused"), path
            assert kept() == after, path
        assert "Idempotent-Replayed" not in send(path, "l", **changes).headers, f"{path}: another key"


def test_a_secret_is_shown_again_to_who_made_it_alone(
    send: Send, http: TestClient, make_key: Callable[..., str]
) -> None:
    for path in ("/v1/api-keys", ENDPOINTS, f"{ENDPOINTS}/{{endpoint_id}}/rotate-secret"):
        secret = send(path, "k").json()["secret"]
        assert send(path, "k").json()["secret"] == secret
        mine = http.headers["Authorization"]
        http.headers["Authorization"] = f"Bearer {make_key('admin')}"
        assert send(path, "k").json()["secret"] != secret, path
        http.headers["Authorization"] = mine


def test_of_an_upload_the_name_the_purpose_and_the_bytes_are_what_is_compared(send: Send) -> None:
    """However it is cut into parts: each has another boundary."""
    first = send(FILES, "k", file='{"text": "a"}\n')
    for change in ({"file": '{"text": "b"}\n'}, {"filename": "other.jsonl"}, {"purpose": "eval_set"}):
        reply = send(FILES, "k", **{"file": '{"text": "a"}\n'} | change)
        assert (reply.status_code, reply.json()["type"]) == (422, "/docs#idempotency-key-reused"), change
    assert send(FILES, "k", file='{"text": "a"}\n').json() == first.json()


def test_with_a_purged_file_the_answer_that_has_its_name_is_gone(send: Send, http: TestClient, kept: Send) -> None:
    first = send(FILES, "k").json()
    answers = kept()[0]["idempotency_keys"]
    other = send(FILES, "l").json()
    assert http.delete(f"{FILES}/{first['id']}").status_code == 204
    assert kept()[0]["idempotency_keys"] == answers
    assert send(FILES, "l").json() == other
    again = send(FILES, "k")
    assert (again.status_code, "Idempotent-Replayed" in again.headers, again.json()["id"] != first["id"]) == (
        201,
        False,
        True,
    )


def test_with_what_it_made_the_answer_is_gone_and_the_secret_in_it(send: Send, http: TestClient, kept: Send) -> None:
    other_name = {"name": "other"}
    for path, changes in (("/v1/benchmarks", other_name), ("/v1/api-keys", other_name), (ENDPOINTS, {})):
        first, other = send(path, "k"), send(path, "l", **changes)
        answers = kept()[0]["idempotency_keys"]
        assert http.delete(first.headers["Location"]).status_code == 204
        assert kept()[0]["idempotency_keys"] == answers - 1, path
        assert send(path, "l", **changes).json() == other.json()
        again = send(path, "k")
        assert (again.status_code, "Idempotent-Replayed" in again.headers) == (201, False), path
        assert http.get(again.headers["Location"]).status_code == 200


def test_an_answer_with_a_secret_that_signs_no_more_is_gone(send: Send, http: TestClient) -> None:
    made = send(ENDPOINTS, "k")
    rotate = f"{made.headers['Location']}/rotate-secret"

    def rotated(key: str) -> Any:
        return http.post(rotate, headers={"Idempotency-Key": f'"{key}"'})

    first = rotated("first")
    assert send(ENDPOINTS, "k").json() == made.json(), "its secret signs for a day"
    second = rotated("second")
    assert rotated("second").json() == second.json()
    assert "Idempotent-Replayed" not in send(ENDPOINTS, "k").headers
    third = rotated("first")
    assert "Idempotent-Replayed" not in third.headers
    assert len({one.json()["secret"] for one in (made, first, second, third)}) == 4
    assert http.delete(made.headers["Location"]).status_code == 204
    assert rotated("first").status_code == 404


def test_what_is_made_and_the_answer_are_there_together_or_not_at_all(
    send: Send, kept: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = idempotency.keep

    def cut(*given: Any) -> None:
        keep(*given)
        raise RuntimeError("cut before the commit")

    for path in OTHERWISE:
        before = kept()
        with monkeypatch.context() as patched:
            patched.setattr(idempotency, "keep", cut)
            assert send(path, "k").status_code == 500
        assert kept()[0] == before[0], path
        assert path in (JOBS, REQUESTS) or kept()[1] == before[1], path  # of those two the sweep deletes the bytes
        assert "Idempotent-Replayed" not in send(path, "k").headers, path


def test_while_the_first_is_being_answered_the_second_leaves_nothing(
    send: Send, http: TestClient, sessions: Sessions, kept: Callable[[], Any]
) -> None:
    for path in OTHERWISE:
        url = send(path, "another").request.url.path
        with sessions.begin() as s:
            who = keys.page(s)[0][-1].id
            idempotency.begin(s, idempotency.Asked(who, f"POST {url}", "k", "of another process"))
            before = kept()
            reply = send(path, "k", **OTHERWISE[path])
            assert (reply.status_code, reply.json()["type"]) == (409, "/docs#idempotency-in-flight"), path
            assert int(reply.headers["Retry-After"]) > 0
            assert kept() == before, path
