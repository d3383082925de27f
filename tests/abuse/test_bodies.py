"""Request bodies that cost the server as much as they can, sent to `unlearn api` while a second client asks for other things.

With `-s` a table of each body and the second client's longest wait is printed.
"""

import http.client
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from service.domain.identity import ROLES
from service.processes import free_port, running
from service.settings import Settings
from service.store import keys
from service.store.secrets import secrets_of
from service.store.session import Sessions
from tests.conftest import MASTER_KEY
from tests.service.conftest import JOBS

LIMIT_BYTES = Settings.model_fields["body_max_bytes"].default
BOUND_S = 0.25  # that another request may wait longer than it does without
TRIES = 3  # what a busy machine does once, the body would do each time
PAUSE_S = 0.005  # of the second client between two requests
GONE_S = 60.0  # a second client without an answer for so long has failed
ALONE_S = 0.2  # for which the second client is watched before the body is sent
JOB = {"model": "m", "method": {"type": "pdu"}, "constraint": {"epsilon": 1.0}}


class Body(NamedTuple):
    name: str
    content: Callable[[], bytes]
    status: int
    path: str = JOBS


class Wait(NamedTuple):
    """In seconds."""

    alone: float  # the second client's longest, before
    beside: float  # the same while the body was received and answered
    answer: float  # until the body was answered


def names(count: int) -> str:
    return ", ".join(f'"k{number}": 1' for number in range(count))


def job(**changes: str) -> bytes:
    """A request in which some members are JSON that was written by hand."""
    members = {name: json.dumps(value) for name, value in JOB.items()} | changes
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in members.items()) + "}").encode()


def hyperparameters(value: str) -> bytes:
    return job(method=f'{{"type": "pdu", "hyperparameters": {{"x": {value}}}}}')


def full(piece: bytes) -> bytes:
    """A list of as many of them as a body has room for."""
    count = LIMIT_BYTES // (len(piece) + 1) - 1
    return b"[" + b",".join([piece] * count) + b"]"


def string(piece: str) -> bytes:
    return job(external_id='"' + piece * ((LIMIT_BYTES - 200) // len(piece)) + '"')


def rows(count: int, row: Any) -> str:
    return json.dumps([row] * count)


def batch(requests: int, rows_each: int) -> bytes:
    row = {
        "question": "Where does Ada live, and since when?",
        "answer": "In Ghent, " + "as far as anybody knows. " * 4,
    }
    one = {"regulation": "gdpr", "models": ["nobody"], "forget_set": [row] * rows_each}
    return json.dumps({"requests": [one] * requests}).encode()


FIRST = (  # of each kind one
    Body("650,000 unknown names", lambda: b"{" + names(650_000).replace(" ", "").encode() + b"}", 413),
    Body("1.9 million numbers", lambda: hyperparameters("[" + "1.5," * 1_900_000 + "1.5]"), 413),
    Body("as many empty lists as fit", lambda: full(b"[]"), 413),
    Body("98,000 unknown names", lambda: b"{" + names(98_000).encode() + b"}", 422),
    Body("195,000 numbers", lambda: hyperparameters("[" + "1.5," * 195_000 + "1.5]"), 422),
    Body("98,000 empty lists", lambda: hyperparameters("[" + "[]," * 98_000 + "[]]"), 422),
    Body("one string of 8 MiB", lambda: string("x"), 422),
)
OTHERS = (
    Body("as many empty strings as fit", lambda: full(b'""'), 413),
    Body("as many empty objects as fit", lambda: full(b"{}"), 413),
    Body("as many objects of one member as fit", lambda: full(b'{"a":1}'), 413),
    Body("lists in lists, 100,000 deep", lambda: hyperparameters("[" * 100_000 + "]" * 100_000), 413),
    Body("objects in objects, 100,000 deep", lambda: hyperparameters('{"a":' * 100_000 + "1" + "}" * 100_000), 413),
    Body("an integer of a million digits", lambda: job(seed="9" * 1_000_000), 413),
    Body("integers of 4,300 digits", lambda: full(b"9" * 4300), 413),
    Body("numbers of 4,300 decimals", lambda: full(b"1." + b"9" * 4300), 422),
    Body("escapes: \\\\", lambda: string("\\\\"), 422),
    Body('escapes: \\"', lambda: string('\\"'), 422),
    Body("escapes: \\u0041", lambda: string("\\u0041"), 422),
    Body("escapes: surrogates", lambda: string("\\ud83d\\ude00"), 422),
    Body("a string of commas", lambda: string(","), 422),
    Body("a string of brackets", lambda: string("["), 422),
    Body("8 MiB of spaces", lambda: b" " * (LIMIT_BYTES - 2) + b"{}", 422),
    Body("not closed", lambda: b'{"a": [' + b"1," * 98_000, 400),
    Body("98,000 empty objects", lambda: hyperparameters("[" + "{}," * 98_000 + "{}]"), 422),
    Body("metadata of 98,000 names", lambda: job(metadata="{" + names(98_000) + "}"), 422),
    Body("hyperparameters of 98,000 names", lambda: hyperparameters("{" + names(98_000) + "}"), 422),
    Body("50,000 wrong rows", lambda: job(forget_set=rows(50_000, {"nope": 1})), 422),
    Body(
        "4,000 wrong rows of 24 names",
        lambda: job(
            **{
                f"{name}_set": rows(1000, dict.fromkeys("abcdefghijklmnopqrstuvwx", 1))
                for name in ("forget", "retain", "refusal", "holdout")
            }
        ),
        422,
    ),
    Body(
        "rows in which 195,000 texts are numbers",
        lambda: job(forget_set=json.dumps([{"text": "t", "perturbed_answer": [1] * 195_000}])),
        422,
    ),
    Body(
        "a batch of 100 requests, 98,000 unknown names",
        lambda: b'{"requests": [' + b", ".join([b"{" + names(980).encode() + b"}"] * 100) + b"]}",
        200,
        "/v1/deletion-requests/batch",
    ),
    Body("a batch of 100 requests, 39,000 rows", lambda: batch(100, 390), 200, "/v1/deletion-requests/batch"),
)


class Api(NamedTuple):
    port: int
    headers: dict[str, str]

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, self.headers | {"Content-Type": "application/json"} | headers)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()


@pytest.fixture
def api(settings: Settings, sessions: Sessions, tmp_path: Path) -> Iterator[Api]:
    """`unlearn api` itself, without quotas."""
    port = free_port()
    environment = os.environ | {"DATABASE_URL": settings.database_url, "BROKER_URL": settings.broker_url}
    environment |= {"STORAGE_URL": settings.storage_url, "MASTER_KEY": MASTER_KEY, "API_PORT": str(port)}
    environment |= {"RATE_LIMIT_PER_MINUTE": "0", "RATE_LIMIT_JOBS_PER_HOUR": "0"}
    with sessions.begin() as s:
        key = keys.create(s, secrets_of(settings), name="admin", scopes=ROLES["admin"]).secret
    log, until = tmp_path / "api.log", time.monotonic() + 60
    with running([sys.executable, "-m", "service.cli", "api"], log, environment) as server:
        served = Api(port, {"Authorization": f"Bearer {key}"})
        while not alive(served):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        yield served


def alive(api: Api) -> bool:
    try:
        return api.send("GET", "/livez")[0] == 200
    except OSError:
        return False


class Second:
    """A client that asks for other things all the time; its longest wait since `restart`, in seconds."""

    def __init__(self, api: Api) -> None:
        self.longest, self.answered, self.stop = 0.0, 0, False
        self._api = api

    def restart(self) -> None:
        self.longest = 0.0

    def run(self) -> None:
        while not self.stop:
            for path in ("/livez", "/v1/models"):
                began = time.perf_counter()
                status, _ = self._api.send("GET", path)
                assert status == 200
                self.longest = max(self.longest, time.perf_counter() - began)
                self.answered += 1
                time.sleep(PAUSE_S)


@contextmanager
def asking(api: Api) -> Iterator[Second]:
    second = Second(api)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(second.run)
        try:
            yield second
        finally:
            second.stop = True
        asked.result()  # raises what was raised there


def waits(api: Api, second: Second, body: Body, content: bytes, **headers: str) -> Wait:
    second.restart()
    time.sleep(ALONE_S)
    alone = second.longest
    second.restart()
    began = time.perf_counter()
    status, answer = api.send("POST", body.path, content, **headers)
    took = time.perf_counter() - began
    asked = second.answered
    while second.answered < asked + 2 and time.perf_counter() < began + took + GONE_S:  # those that were on their way
        time.sleep(PAUSE_S)
    assert status == body.status, (body.name, answer)
    assert status < 400 or len(json.dumps(answer)) < 100_000, body.name
    return Wait(alone, second.longest, took)


def holds_nobody_up(api: Api, bodies: Sequence[Body]) -> None:
    late = []
    with asking(api) as second:
        for number, body in enumerate(bodies):
            content = body.content()
            for keyed in (False, True):
                for again in range(TRIES):
                    headers = {"Idempotency-Key": f'"{number}-{again}"'} if keyed else {}
                    wait = waits(api, second, body, content, **headers)
                    if wait.beside <= wait.alone + BOUND_S:
                        break
                else:
                    late.append(f"{body.name}: {wait.beside:.2f} s, {wait.alone:.2f} s without")
                told = (
                    f"{wait.alone * 1e3:6.0f} ms alone, {wait.beside * 1e3:6.0f} ms beside, {wait.answer:6.2f} s answer"
                )
                print(f"{body.name:45s} {'key' if keyed else '   '} {body.status} {len(content):8d} bytes  {told}")
    assert not late, "\n".join(late)


def test_no_body_keeps_other_requests_waiting(api: Api) -> None:
    holds_nobody_up(api, FIRST)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_none_of_many_more_does(api: Api) -> None:
    holds_nobody_up(api, OTHERS)
