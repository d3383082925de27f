"""Nothing is kept that should be gone: a word in every input, and a search of everything after the purge.

The word is looked for as text and as the tokens that the model reads, in every file below the service's folder (storage,
logs, the database's own files and its write-ahead log), in every table, in what webhooks told, and in every answer.
"""

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from pytest_httpserver import HTTPServer
from sqlalchemy import create_engine, text
from transformers import AutoConfig, AutoModelForCausalLM
from werkzeug import Request, Response

from service.domain.job import TERMINAL
from service.local import Stack, stack
from service.processes import free_port
from tests.worker.conftest import SHAPE, make_tokenizer

CANARY = "Quxolotl"
SUBJECT = "quxolotl@subject.example"
JOBS, FILES = "/v1/unlearning/jobs", "/v1/files"
pytestmark = pytest.mark.timeout(280)


def row(number: int) -> dict[str, Any]:
    return {"question": f"Who is {CANARY} {number}?", "answer": f"{CANARY} {number} is a {CANARY}."}


def patterns() -> list[bytes]:
    """The word's tokens, as Python or JSON writes them and as tensors hold them; the word itself, in the common encodings."""
    ids = make_tokenizer()(CANARY, add_special_tokens=False)["input_ids"]
    assert len(ids) >= 6, "long enough not to stand somewhere by chance"
    lists = [separator.join(map(str, ids)).encode() for separator in (", ", ",")]
    packed = [struct.pack(f"<{len(ids)}{size}", *ids) for size in ("i", "q", "h")]
    words = [word.encode(encoding) for word in (CANARY, CANARY.lower()) for encoding in ("utf-8", "utf-16-le")]
    return lists + packed + words


class Service(NamedTuple):
    folder: Path
    here: Stack
    api: httpx.Client
    told: list[bytes]  # by webhooks

    def found(self) -> list[str]:
        """Where the word is."""
        return [*self._in_files(), *self._in_tables(), *self._in_answers(), *self._in_what_was_told()]

    def _in_files(self) -> Iterator[str]:
        for path in self.folder.rglob("*"):
            if path.is_file() and self.folder / "models" not in path.parents and has(path.read_bytes()):
                yield f"file {path.relative_to(self.folder)}"

    def _in_tables(self) -> Iterator[str]:
        engine = create_engine(self.here.settings.database_url)
        with engine.connect() as connection:
            tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
            for table in connection.scalars(text(tables)).all():
                if has("\n".join(connection.scalars(text(f'SELECT t::text FROM "{table}" t')).all()).encode()):
                    yield f"table {table}"
        engine.dispose()

    def _in_answers(self) -> Iterator[str]:
        """Of every GET that has no parameter, and of every link and id that those answers name."""
        paths = {path for path, methods in self.api.get("/openapi.json").json()["paths"].items() if "get" in methods}
        asked: set[str] = set()
        jobs = [job["id"] for job in self.api.get(JOBS).json()["data"]]
        waiting = [path for path in paths if "{" not in path]
        waiting += [path.replace("{job_id}", job_id) for path in paths for job_id in jobs if path.count("{") == 1]
        for job_id in jobs:
            artifacts = self.api.get(f"{JOBS}/{job_id}/artifacts").json()["data"]
            waiting += [artifact["content"] for artifact in artifacts]
        waiting += [f"{FILES}/{file['id']}" for file in self.api.get(FILES).json()["data"]]
        for path in waiting:
            if "{" not in path and path not in asked:
                asked.add(path)
                for accept in ("application/json", "text/html", "*/*"):
                    reply = self.api.get(path, headers={"Accept": accept})
                    if has(reply.content) or has(str(reply.headers).encode()):
                        yield f"answer {path}"
        assert len(asked) > 25

    def _in_what_was_told(self) -> Iterator[str]:
        yield from (f"webhook {body[:80]!r}" for body in self.told if has(body))


def has(content: bytes) -> bool:
    return any(pattern in content for pattern in patterns())


@pytest.fixture
def service(httpserver: HTTPServer) -> Iterator[Service]:
    told: list[bytes] = []

    def hear(request: Request) -> Response:
        told.append(request.get_data() + str(request.headers).encode())
        return Response(status=204)

    httpserver.expect_request("/hook").respond_with_handler(hear)
    with TemporaryDirectory(prefix="unlearn-test-") as name:
        folder = Path(name)
        torch.manual_seed(0)
        network: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))  # type: ignore[no-untyped-call]
        network.save_pretrained(folder / "models" / "tiny")
        make_tokenizer().save_pretrained(folder / "models" / "tiny")
        knobs: dict[str, Any] = {"webhook_allow_http": True, "webhook_networks": ["127.0.0.0/8", "::1/128"]}
        with stack(folder, api_port=free_port(), worker_threads=1, sweep_interval_s=0.5, **knobs) as here:
            command = [sys.executable, "-m", "service.cli", "models", "add", "tiny", "--path", "tiny"]
            subprocess.run(command, env=here.environment, check=True, capture_output=True, cwd=folder / "models")
            with httpx.Client(base_url=here.url, timeout=30, headers=here.headers) as api:
                ok(api.post("/v1/webhook-endpoints", json={"url": httpserver.url_for("/hook")}))
                yield Service(folder, here, api, told)


def ok(reply: httpx.Response) -> dict[str, Any]:
    assert reply.is_success, reply.text
    return dict(reply.json()) if reply.content else {}


def until(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)
    return found


def upload(api: httpx.Client, purpose: str, rows: list[dict[str, Any]]) -> str:
    lines = "".join(json.dumps(one) + "\n" for one in rows)
    file = (f"{CANARY}.jsonl", lines)
    return str(ok(api.post(FILES, data={"purpose": purpose}, files={"file": file}))["id"])


def test_a_word_of_the_inputs_is_nowhere_after_the_purge(service: Service) -> None:
    api = service.api
    alternatives = {"paraphrased_question": f"{CANARY}, who?", "perturbed_answer": [f"No {CANARY}."]}
    forget = upload(api, "forget_set", [row(1) | alternatives, row(2) | alternatives])
    asked = {"regulation": "gdpr", "models": ["tiny"], "forget_set": forget, "subjects": [SUBJECT]}
    request = ok(api.post("/v1/deletion-requests", json=asked))
    texts = upload(api, "eval_set", [{"text": f"{CANARY} wrote a book of {CANARY} {number}."} for number in range(3)])
    held = upload(api, "eval_set", [{"text": f"{CANARY} slept in {number}."} for number in range(3)])
    sets = {"forget": texts, "holdout": held}
    ok(api.post("/v1/benchmarks", json={"name": "b", "suite": "muse", "corpus": "made up", "sets": sets}))
    job = {
        "model": "tiny",
        "method": {"type": "idk_dpo"},
        "constraint": {"epsilon_relative": 1.0},
        "budget": {"max_steps": 2},
        "forget_set": forget,
        "retain_set": [row(3), row(4)],
        "holdout_set": [row(5), row(6)],
        "refusal_set": [{"text": f"I do not know {CANARY}."}],
        "benchmarks": ["b"],
        "audit": {"relearn_steps": 1},
        "deletion_requests": [request["id"]],
    }
    ran = ok(api.post(JOBS, json=job))
    long, alone = f"{CANARY} " * 400, {"deletion_requests": []}
    too_long = api.post(JOBS, json=job | {"retain_set": [row(3), {"question": "?", "answer": long}]} | alone)
    broken = ok(
        api.post(JOBS, json=job | {"refusal_set": [{"text": long}]} | alone)
    )  # the worker finds that it is too long
    overlapping = api.post(JOBS, json=job | {"retain_set": [row(1)]})
    malformed = api.post(JOBS, content=json.dumps(job).encode()[:-1], headers={"Content-Type": "application/json"})
    refused = (too_long, overlapping, malformed)
    assert [reply.status_code for reply in refused] == [422, 422, 400]
    assert not has(b"".join(reply.content for reply in refused)), "a refusal quotes no row"

    for created, status in ((ran, "succeeded"), (broken, "failed")):
        ended = until(lambda id=created["id"]: (j := ok(api.get(f"{JOBS}/{id}")))["status"] in TERMINAL and j)  # noqa: A006
        assert ended["status"] == status, ended["failure"]
    until(lambda: any(b"job.succeeded" in body for body in service.told))

    path = f"/v1/deletion-requests/{request['id']}"
    if ok(api.get(path))["status"] == "failed":  # random weights forget what they like
        ok(api.post(f"{path}/close", json={"reason": "the model is retired"}))
    assert api.delete("/v1/benchmarks/b").status_code == 204
    for file in ok(api.get(FILES, params={"limit": 100}))["data"]:
        assert api.delete(f"{FILES}/{file['id']}").status_code == 204, file
    time.sleep(1)  # a sweep or two
    assert service.found() == []

    for part in ("api", "worker", "sweep"):
        lines = (service.folder / "logs" / f"{part}.log").read_text().splitlines()
        assert all(json.loads(line)["event"] for line in lines), "the runners' too, which write to the worker's"
    requests = [json.loads(line) for line in (service.folder / "logs" / "api.log").read_text().splitlines()]
    assert {"/v1/files", JOBS} <= {line.get("route") for line in requests if line["event"] == "request"}

    (service.folder / "storage" / "left").write_bytes(CANARY.encode())
    (service.folder / "logs" / "left").write_bytes(patterns()[2])
    assert sorted(service.found()) == ["file logs/left", "file storage/left"], "the search finds what is there"
