"""No string of a request is a server error, or kept otherwise than it was sent: all that the OpenAPI document has are tried."""

import json
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import service
from service.api.errors import escaped
from service.api.examples import EXAMPLES, MODEL
from service.api.shapes import REQUESTS_PATH
from service.domain.job import ModelEntry, PromptFormat
from service.store import models
from service.store.session import Sessions

JSON = {"Content-Type": "application/json"}
HOSTILE = {"half a surrogate pair": "a\ud800", "NUL": "a\0b"}
NAMED = "named"  # a key of an object whose keys may be any

DOCUMENT: dict[str, Any] = json.loads((Path(service.__path__[0]) / "openapi.json").read_text())
Place = tuple[str | int, ...]  # the steps from a body to one of its values


def resolved(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Its alternatives, each without references."""
    if "$ref" in schema:
        yield from resolved(DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    elif alternatives := schema.get("anyOf") or schema.get("oneOf"):
        for one in alternatives:
            yield from resolved(one)
    else:
        yield schema


def strings(schema: dict[str, Any], place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Where a body may have a string: its place, and whether it is a value there or the key of one."""
    for one in resolved(schema):
        if (
            one.get("type") == "string" or not {"type", "const", "enum", "properties"} & one.keys()
        ):  # or anything at all
            yield place, "value"
        if "items" in one:
            yield from strings(one["items"], (*place, 0))
        for name, inner in one.get("properties", {}).items():
            yield from strings(inner, (*place, name))
        inner = one.get("additionalProperties", False)
        if inner is not False:  # True: any
            yield place, "key"
            yield from strings({} if inner is True else inner, (*place, NAMED))


def planted(body: Any, place: Place, kind: str, hostile: str) -> Any:
    """The body with the string at that place, in objects and lists that are made for it."""
    body = deepcopy(body)
    steps: Sequence[str | int] = (*place, hostile) if kind == "key" else place
    value: Any = "v" if kind == "key" else hostile
    for step in reversed(steps[1:]):
        value = {step: value} if isinstance(step, str) else [value]
    first = steps[0]
    inner = body.get(first)
    if isinstance(inner, dict) and isinstance(value, dict):
        value = merged(inner, value)
    return body | {first: value}


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = {name: merged(one[name], other[name]) for name in one.keys() & other.keys() if isinstance(one[name], dict)}
    return one | other | both


def bodies() -> Iterator[tuple[str, str, Any, Place, str]]:
    for (method, path), example in EXAMPLES.items():
        content = DOCUMENT["paths"][path][method]["requestBody"]["content"]
        if "application/json" in content:
            found = set(strings(content["application/json"]["schema"]))
            for place, kind in sorted(found, key=str):
                yield method, path, example, place, kind


CASES = list(bodies())


@pytest.fixture
def known(http: TestClient, sessions: Sessions) -> TestClient:
    with sessions.begin() as s:
        models.add(s, ModelEntry(name=MODEL, source="path", location="m", prompt_format=PromptFormat()))
    return http


def test_the_document_has_the_strings_that_are_known() -> None:
    """The next test tries what this finds: it must not come to nothing unseen."""
    tried = {(path, place, kind) for _, path, _, place, kind in CASES}
    assert ("/v1/unlearning/jobs", ("lora", "target_modules", 0), "value") in tried
    assert ("/v1/unlearning/jobs", ("metadata",), "key") in tried
    assert ("/v1/unlearning/jobs", ("forget_set", 0, "perturbed_answer", 0), "value") in tried
    assert ("/v1/deletion-plans/{model}", ("job", "metadata", NAMED), "value") in tried
    assert ("/v1/deletion-requests/{request_id}/close", ("reason",), "value") in tried
    assert {path for path, *_ in tried} >= {path for (_, path) in EXAMPLES if path != "/v1/files"}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_string_that_no_database_takes_is_refused_wherever_it_stands(known: TestClient, what: str) -> None:
    """But NUL in the texts of a row, which are kept in files: what a model was trained on must be possible to forget."""
    wrong = list[str]()
    for method, path, example, place, kind in CASES:
        body = planted(example, place, kind, HOSTILE[what])
        at = path.replace("{model}", MODEL).replace("{request_id}", "dreq_" + "0" * 32)
        reply = known.request(method, at, content=json.dumps(body), headers=JSON)
        if what == "NUL" and len(place) > 1 and str(place[0]).endswith("_set"):
            refused = reply.status_code < 500
        elif path.endswith("/batch") and reply.status_code == 200:
            refused = {one["status"] for one in reply.json()["results"]} <= {400, 422}
        else:
            pointers = [error["pointer"] for error in reply.json().get("errors", ())]
            refused = reply.status_code in (400, 422) and any(
                pointer.startswith(escaped(place[0])) for pointer in pointers
            )
        if not refused:
            wrong.append(f"{method} {path} {place} {kind}: {reply.status_code} {reply.text[:300]}")
    assert wrong == []


@pytest.mark.parametrize("what", HOSTILE)
def test_it_is_refused_in_a_batch_too_that_can_be_sent_again(known: TestClient, what: str) -> None:
    example = EXAMPLES["post", REQUESTS_PATH]
    places = [(place, kind) for _, path, _, place, kind in CASES if path == REQUESTS_PATH and place[0] != "forget_set"]
    requests = [planted(example, place, kind, HOSTILE[what]) for place, kind in places]
    content = json.dumps({"requests": [*requests, example]})
    for _ in range(2):
        reply = known.post(f"{REQUESTS_PATH}/batch", content=content, headers=JSON | {"Idempotency-Key": "k"})
        assert reply.status_code == 200, reply.text
        assert [one["status"] for one in reply.json()["results"]] == [422] * len(requests) + [201], reply.text


@pytest.mark.parametrize("hostile", ["%00", "a%00b", "%ED%A0%80", "%FF"])
def test_no_parameter_is_a_server_error(known: TestClient, hostile: str) -> None:
    for path, operations in DOCUMENT["paths"].items():
        parameters = operations.get("get", {}).get("parameters", ())
        in_query = [one["name"] for one in parameters if one["in"] == "query"]
        anything = f"ujob_{'0' * 32}"
        plain = re.sub(r"{.*?}", anything, path)
        in_path = [path.replace(name, hostile) for name in re.findall(r"{.*?}", path)]
        for one in [*in_path, *(f"{plain}?{name}={hostile}" for name in in_query)]:
            assert known.get(re.sub(r"{.*?}", anything, one)).status_code < 500, one
