"""The bounds of a JSON body: what is counted, on every route, and that honest requests stay within."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from service.api import bodies
from service.domain.job import ERRORS_MAX, INLINE_ROWS_MAX
from service.settings import Settings
from tests.service.conftest import JOBS
from tests.service.test_contract import DOCUMENT

JSON = {"Content-Type": "application/json"}
REQUESTS = "/v1/deletion-requests"
TEXTS = st.text(st.sampled_from('a,:[]{}"\\/\n\u00e9\u2028'), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
)


def size(value: Any) -> int:
    """Values and names in it; an empty list or object counts as two."""
    match value:
        case list():
            return 1 + (sum(map(size, value)) or 1)
        case dict():
            return 1 + (sum(1 + size(one) for one in value.values()) or 1)
        case _:
            return 1


def depth(value: Any) -> int:
    match value:
        case list() | dict():
            inner = value.values() if isinstance(value, dict) else value
            return 1 + max(map(depth, inner), default=0)
        case _:
            return 0


def accepted(body: bytes, values_max: int, depth_max: int) -> bool:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bodies, "VALUES_MAX", values_max)
        patched.setattr(bodies, "DEPTH_MAX", depth_max)
        try:
            bodies.judge(body)
        except HTTPException:
            return False
        return True


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_values_and_names_are_counted_whatever_strings_hold(value: Any, ascii_only: bool, indent: int | None) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    count, deep = size(value), depth(value)
    assert accepted(body, count, deep)
    assert not accepted(body, count - 1, deep)
    assert deep == 0 or not accepted(body, count, deep - 1)


@given(VALUES, st.integers(min_value=0))
def test_a_body_that_breaks_off_is_counted_as_far_as_it_goes(value: Any, cut: int) -> None:
    whole = json.dumps([value]).encode()
    body = whole[: cut % len(whole)]
    built = 0

    def count(pairs: list[tuple[str, Any]]) -> None:
        nonlocal built
        built += 2 * len(pairs) or 1

    with pytest.raises(json.JSONDecodeError):
        json.loads(body, object_pairs_hook=count)
    assert built == 0 or not accepted(body, built - 1, 100)


def test_every_route_with_a_json_body_has_the_bounds(http: TestClient) -> None:
    many, deep = b"[" + b"1," * bodies.VALUES_MAX + b"1]", b"[" * (bodies.DEPTH_MAX + 1)
    long = b'{"seed": ' + b"9" * (bodies.DIGITS_MAX + 1) + b"}"
    seen = 0
    for path, operations in json.loads(DOCUMENT.read_text())["paths"].items():
        for method, operation in operations.items():
            if "application/json" not in operation.get("requestBody", {}).get("content", {}):
                continue
            seen += 1
            assert f"{bodies.VALUES_MAX:,}" in operation["responses"]["413"]["description"], path
            for body in (many, deep, long):
                for key in ({}, {"Idempotency-Key": "k"}):
                    reply = http.request(method, path, content=body, headers=JSON | key)
                    kind = reply.status_code, reply.json()["type"]
                    assert kind == (413, "/docs#payload-too-large"), f"{method} {path}"
    assert seen >= 10


def test_the_largest_job_is_accepted(http: TestClient, request_body: dict[str, Any]) -> None:
    """All sets in the body, with as many rows as may be and all that a row may have."""
    room = Settings.model_fields["body_max_bytes"].default // (4 * INLINE_ROWS_MAX) - 10
    beside = {"paraphrased_question": "q?", "paraphrased_answer": "b", "answer": "a"}
    for name in ("forget_set", "retain_set", "refusal_set", "holdout_set"):
        row = {"text": ""} if name == "refusal_set" else {**beside, "question": "", "perturbed_answer": ["wrong"] * 40}
        filler = "x" * (room - len(json.dumps(row)) - len(f"{name} 1000"))
        asked = "text" if name == "refusal_set" else "question"
        request_body[name] = [row | {asked: f"{name} {number} {filler}"} for number in range(INLINE_ROWS_MAX)]
    request_body["method"] = {"type": "idk_dpo"}
    content = json.dumps(request_body).encode()
    assert len(content) > 0.95 * Settings.model_fields["body_max_bytes"].default
    reply = http.post(JOBS, content=content, headers=JSON, params={"dry_run": True})
    assert reply.status_code == 200, reply.text[:1000]


def test_errors_are_named_as_far_as_they_are_read(http: TestClient, request_body: dict[str, Any]) -> None:
    def errors(**changes: Any) -> tuple[str, list[dict[str, str]]]:
        reply = http.post(JOBS, json=request_body | changes)
        assert (reply.status_code, reply.json()["type"]) == (422, "/docs#validation-error")
        return reply.json()["detail"], reply.json()["errors"]

    detail, named = errors(forget_set=[{"questions": "q", "answers": "a"}] * INLINE_ROWS_MAX)
    assert len(named) == 100
    assert (named[99]["pointer"], named[99]["code"]) == ("/forget_set/49/answers", "extra_forbidden")
    assert detail.endswith(f"and {2 * INLINE_ROWS_MAX - 3} more")
    _, [one] = errors(**{f"k{number}": 1 for number in range(ERRORS_MAX + 1)})
    assert (one["pointer"], "too many" in one["detail"]) == ("", True)
    _, [one] = errors(lora={f"k{number}": 1 for number in range(ERRORS_MAX + 1)})
    assert (one["pointer"], "too many" in one["detail"]) == ("/lora", True)


def test_a_batch_names_each_ones_errors(http: TestClient) -> None:
    wrong: Callable[[int], dict[str, int]] = lambda count: {f"k{number}": 1 for number in range(count)}  # noqa: E731
    reply = http.post(f"{REQUESTS}/batch", json={"requests": [wrong(ERRORS_MAX + 1), wrong(1)]})
    first, second = (one["problem"]["errors"] for one in reply.json()["results"])
    assert ["too many" in one["detail"] for one in first] == [True]
    assert "/k0" in [one["pointer"] for one in second]
