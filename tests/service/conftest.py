"""The API in this process, in front of the real database."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from starlette.testclient import TestClient

from service import logs
from service.app import create_app
from service.dispatch import Dispatcher
from service.domain.identity import ROLES
from service.domain.job import ModelEntry, PromptFormat
from service.settings import Settings
from service.store import files, keys, models, tenancy, tenants
from service.store.secrets import secrets_of
from service.store.session import Sessions
from service.store.storage import Storage
from service.store.tenants import DEFAULT

JOBS = "/v1/unlearning/jobs"
ClientOf = Callable[..., AbstractContextManager[TestClient]]


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
def log(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[dict[str, Any]]]:
    """log() -> what was logged since it was last asked for, as the service's processes write it."""
    logs.configure("INFO")
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.fixture
def bell() -> Bell:
    return Bell()


@pytest.fixture
def make_key(settings: Settings, sessions: Sessions) -> Callable[..., str]:
    """make_key(role, tenant=...) -> the secret of a new key; a tenant that is not there is made, too."""

    def make(role: str, tenant: str = DEFAULT) -> str:
        with sessions.begin() as s:
            if tenant not in {one.id for one in tenants.every(s)}:
                tenants.add(s, tenant)
            tenancy.bind(s, tenant, "tester")
            return keys.create(s, secrets_of(settings), name=role, scopes=ROLES[role]).secret

    return make


@pytest.fixture
def http(settings: Settings, sessions: Sessions, bell: Bell, client_of: ClientOf) -> Iterator[TestClient]:
    """With one registered model, "m"; who asks is the default tenant's administrator."""
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="m", source="path", location="m", prompt_format=PromptFormat()))
    with client_of(settings, bell) as client:
        yield client


@pytest.fixture
def content_of(settings: Settings, sessions: Sessions) -> Callable[[str], bytes]:
    """content_of(file_id) -> what was uploaded, as its key reads it."""

    def read(file_id: str) -> bytes:
        with sessions.begin() as s:
            file = files.get(s, file_id)
        with files.content(Storage(settings.storage_url), secrets_of(settings), file) as opened:
            return opened.read()

    return read


@pytest.fixture
def client_of(make_key: Callable[..., str]) -> ClientOf:
    """client_of(settings) -> a client of an API with these settings; who asks is the default tenant's administrator."""

    @contextmanager
    def client(settings: Settings, dispatcher: Dispatcher | None = None) -> Iterator[TestClient]:
        headers = {"Authorization": f"Bearer {make_key('admin')}"}
        app = create_app(settings, dispatcher=dispatcher)
        with TestClient(app, raise_server_exceptions=False, headers=headers) as http:
            yield http

    return client


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
