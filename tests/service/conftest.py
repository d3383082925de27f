"""The API in this process, in front of the real database."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.domain.job import ModelEntry, PromptFormat
from service.settings import Settings
from service.store import models
from service.store.session import Sessions

JOBS = "/v1/unlearning/jobs"


class Bell:
    """A dispatcher that notes when it was rung, and what the database showed at that moment."""

    def __init__(self) -> None:
        self.rung: list[str] = []
        self.on_ring: Callable[[], Any] = lambda: None

    def ring(self, gpu_class: str) -> bool:
        self.rung.append(gpu_class)
        self.on_ring()
        return True

    def reachable(self) -> bool:
        return True


@pytest.fixture
def bell() -> Bell:
    return Bell()


@pytest.fixture
def http(settings: Settings, sessions: Sessions, bell: Bell) -> Iterator[TestClient]:
    """With one registered model, "m"."""
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="m", source="path", location="m", prompt_format=PromptFormat()))
    app = create_app(settings, dispatcher=bell)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def upload(http: TestClient) -> Callable[..., str]:
    """upload(purpose, rows) -> the file's id."""

    def send(purpose: str, rows: list[dict[str, str]]) -> str:
        content = "".join(json.dumps(row) + "\n" for row in rows)
        reply = http.post("/v1/files", data={"purpose": purpose}, files={"file": (f"{purpose}.jsonl", content)})
        assert reply.status_code == 201, reply.text
        return str(reply.json()["id"])

    return send


@pytest.fixture
def request_body() -> dict[str, Any]:
    """A job that can be created as it stands."""
    return {
        "model": "m",
        "method": {"type": "pdu"},
        "constraint": {"epsilon": 0.3},
        "forget_set": [{"question": "Who is Ada?", "answer": "A poet."}, {"text": "Ada lives in Ghent."}],
        "retain_set": [{"question": "Who is Bob?", "answer": "A baker."}],
    }
