"""The service as it runs: API, sweep and a worker, each a process of its own, and what they need behind proxies.

The worker's runner is tests/worker/fake_runner.py, which does without a model.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import jwt
import redis
from cryptography.hazmat.primitives.asymmetric import rsa
from sqlalchemy import make_url

from service import embedded, processes
from service.domain.identity import ROLES
from service.domain.job import TERMINAL, ModelEntry, PromptFormat, Status
from service.processes import free_port, running, tail
from service.settings import Settings
from service.store import keys, models, tenancy
from service.store.secrets import secrets_of
from service.store.session import Sessions, make_engine, make_sessions
from service.store.tenants import DEFAULT
from tests.abuse.proxy import Proxy, Target, proxy
from tests.conftest import MASTER_KEY
from tests.service.whole import ALL, is_whole

JOBS = "/v1/unlearning/jobs"
ISSUER = "https://id.example"
UNSERVED = "gpu"  # a class that no worker hears: its jobs wait
WORKER = """
import sys
from service.settings import Settings
from worker.app import run
sys.exit(run(Settings(), runner=(sys.executable, sys.argv[1])))
"""
FAKE = str(Path(__file__).parents[1] / "worker" / "fake_runner.py")
PARTS = {
    "api": ("-m", "service.cli", "api"),
    "sweep": ("-m", "service.sweep"),
    "worker": ("-c", WORKER, FAKE),
}
KNOBS: dict[str, Any] = {  # so that seconds show what takes minutes elsewhere; quotas are counted, and never reached
    "lease_s": 20.0,
    "heartbeat_s": 0.5,
    "sweep_interval_s": 0.5,
    "ring_again_s": 1.0,
    "worker_poll_s": 1.0,
    "worker_slots": 2,
    "gpu_classes": ["any", "cpu", UNSERVED],
    "rate_limit_per_minute": 10**6,
    "rate_limit_jobs_per_hour": 10**6,
    "rate_limit_failures_per_minute": 10**6,
}
CHEAP: dict[str, Any] = {
    "trust_env": False,
    "verify": False,
}  # of clients: each would read certificates that none needs
PATIENCE_S = 60.0
Timed = tuple[httpx.Response | None, float]
ASK_AGAIN_S = 0.05
LIVEZ, READYZ, LIST = "/livez", "/readyz", f"{JOBS}?limit=1"
PATHS = (LIVEZ, READYZ, LIST)
ALONE_S = 2.0  # longest wait for what does not need what fails; generous, for a loaded machine
RECOVERS_S = 15.0


class Live(NamedTuple):
    url: str
    headers: Mapping[str, str]  # of an administrator's API key
    database: Proxy
    broker: Proxy
    provider: Proxy
    identity: "Identity"
    storage: Path
    api: int  # its process
    bucket: Proxy | None  # where the storage is one
    settings: Settings  # with addresses past the proxies
    sessions: Sessions  # so, too

    def valkey(self) -> redis.Redis:
        return redis.Redis.from_url(self.settings.broker_url)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=PATIENCE_S, **CHEAP)


class Identity:
    """An identity provider: what it publishes, and tokens that it signs."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(65537, 2048)
        public = jwt.algorithms.RSAAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        self.keys = json.dumps({"keys": [public | {"kid": "k1", "use": "sig", "alg": "RS256"}]}).encode()
        self.published = self.keys

    def token(self, kid: str = "k1") -> str:
        claims = {"iss": ISSUER, "aud": "unlearning-service", "exp": time.time() + 3600, "sub": "ada"}
        claims |= {"tenant": DEFAULT, "roles": ["auditor"]}
        return jwt.encode(claims, self._key, "RS256", headers={"kid": kid})

    @contextmanager
    def serve(self) -> Iterator[Target]:
        published = self

        class Publish(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(published.published)))
                self.end_headers()
                self.wfile.write(published.published)

            def log_message(self, *_: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Publish) as server:
            server.daemon_threads = True
            Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            yield ("127.0.0.1", server.server_address[1])
            server.shutdown()


@contextmanager
def live(database_url: str, folder: Path, s3: str | None = None, **knobs: Any) -> Iterator[Live]:
    """Everything started and ready.

    Args:
        database_url: of a migrated database, through a Unix socket.
        s3: the endpoint of a server that speaks S3, for a storage there, behind a proxy.
        knobs: fields of Settings beside KNOBS.
    """
    with ExitStack() as opened:
        there = make_url(database_url)
        socket = Path(str(there.query["host"])) / ".s.PGSQL.5432"
        database = opened.enter_context(proxy(socket))
        broker_url = opened.enter_context(embedded.valkey(folder))
        broker = opened.enter_context(proxy(("127.0.0.1", int(make_url(broker_url).port or 0))))
        identity = Identity()
        provider = opened.enter_context(proxy(opened.enter_context(identity.serve())))
        for name in ("storage", "models"):
            (folder / name).mkdir()
        behind = Settings(
            **KNOBS
            | {
                "database_url": there.set(host="127.0.0.1", port=database.port, query={}).render_as_string(False),
                "broker_url": f"redis://127.0.0.1:{broker.port}/0",
                "storage_url": str(folder / "storage"),
                "models_root": folder / "models",
                "master_key": MASTER_KEY,
                "worker_scratch_dir": folder / "scratch",
                "worker_metrics_port": free_port(),
                "sweep_metrics_port": free_port(),
                "api_port": free_port(),
                "oidc_issuer": ISSUER,
                "oidc_jwks_url": f"http://127.0.0.1:{provider.port}/jwks",
            }
            | knobs
        )
        settings = behind.model_copy(update={"database_url": database_url, "broker_url": broker_url})
        engine = make_engine(database_url)
        opened.callback(engine.dispose)
        sessions = tenancy.bound(make_sessions(engine), DEFAULT, "tester")
        with sessions.begin() as s:
            models.add(s, ModelEntry(name="m", source="path", location="m", prompt_format=PromptFormat()))
            secret = keys.create(s, secrets_of(settings), name="n", scopes=ROLES["admin"]).secret
        url = f"http://127.0.0.1:{settings.api_port}"
        ready = {
            "api": f"{url}/readyz",
            "sweep": f"http://127.0.0.1:{settings.sweep_metrics_port}/livez",
            "worker": f"http://127.0.0.1:{settings.worker_metrics_port}/livez",
        }
        logs = {name: folder / f"{name}.log" for name in PARTS}
        environment = os.environ | _as_environment(behind)
        bucket = None
        if s3 is not None:
            bucket = opened.enter_context(proxy((str(make_url(s3).host), int(make_url(s3).port or 0))))
            environment |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{bucket.port}"}
        started = {
            name: opened.enter_context(running([sys.executable, *arguments], logs[name], environment))
            for name, arguments in PARTS.items()
        }
        for name, process in started.items():
            processes.wait(process, name, lambda name=name: _state(ready[name]), embedded.nothing)  # type: ignore[misc]
        yield Live(
            url=url,
            headers={"Authorization": f"Bearer {secret}"},
            database=database,
            broker=broker,
            provider=provider,
            identity=identity,
            storage=folder / "storage",
            api=started["api"].pid,
            bucket=bucket,
            settings=settings,
            sessions=sessions,
        )
        for name, process in started.items():
            assert process.poll() is None, f"{name} has ended: {tail(logs[name])}"


def _as_environment(settings: Settings) -> dict[str, str]:
    told = settings.model_dump(mode="json", exclude_none=True) | {"master_key": MASTER_KEY}
    return {name.upper(): one if isinstance(one, str) else json.dumps(one) for name, one in told.items()}


def _state(url: str) -> str | None:
    try:
        answer = httpx.get(url, timeout=5, trust_env=False)
    except httpx.TransportError:
        return ""
    return None if answer.status_code == httpx.codes.OK else str(answer.status_code)


# --- a second client


class Seen:
    """What it was answered by one path."""

    def __init__(self) -> None:
        self.statuses = Counter[int]()  # 0: no answer at all
        self.longest_s = 0.0
        self.headers: dict[int, httpx.Headers] = {}  # of the last answer with each status

    def note(self, answer: httpx.Response | None, seconds: float) -> None:
        status = 0 if answer is None else answer.status_code
        self.statuses[status] += 1
        self.longest_s = max(self.longest_s, seconds)
        if answer is not None:
            self.headers[status] = answer.headers

    def __repr__(self) -> str:
        return f"{dict(self.statuses)}, at most {self.longest_s:.2f} s"


@contextmanager
def watching(here: Live, *paths: str) -> Iterator[dict[str, Seen]]:
    """A client that asks for each of the paths again and again while the context is open, whatever becomes of the others."""
    seen, stop = {path: Seen() for path in paths}, Event()

    def watch(path: str) -> None:
        with here.client() as client:
            while not stop.is_set():
                seen[path].note(*timed(lambda: client.get(path)))
                stop.wait(ASK_AGAIN_S)

    threads = [Thread(target=watch, args=(path,), daemon=True) for path in paths]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def timed(ask: Callable[[], httpx.Response]) -> Timed:
    """The answer, None where there was none, and how many seconds it took."""
    began = time.monotonic()
    try:
        answer = ask()
    except httpx.TransportError:
        answer = None
    return answer, time.monotonic() - began


def until(true: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> float:
    """How many seconds it took. Raises AssertionError when it does not come true."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"waited in vain: {what}"
        time.sleep(ASK_AGAIN_S)
    return time.monotonic() - began


# --- jobs


class Sent(NamedTuple):
    gpu_class: str
    ask: Callable[[], httpx.Response]
    answer: Future[Timed]


class Submissions:
    """Jobs, each submitted under an Idempotency-Key of its own by a thread of its own, so that none waits for another."""

    def __init__(self, here: Live) -> None:
        self._here = here
        self._pool = ThreadPoolExecutor(64)
        self._sent: dict[str, Sent] = {}  # by the name in the job's metadata

    def send(self, gpu_class: str = "any", **metadata: str) -> None:
        """One that a worker runs, or that waits where its class is `UNSERVED`."""
        name = uuid4().hex
        ask = partial(self._post, name, gpu_class, metadata)
        self._sent[name] = Sent(gpu_class, ask, self._pool.submit(timed, ask))

    def _post(self, name: str, gpu_class: str, metadata: Mapping[str, str]) -> httpx.Response:
        body = {
            "model": "m",
            "method": {"type": "pdu"},
            "constraint": {"epsilon": 0.3},
            "forget_set": [{"question": "Who is Ada?", "answer": "A poet."}],
            "retain_set": [{"question": "Who is Bob?", "answer": "A baker."}],
            "resources": {"gpu_class": gpu_class},
            "metadata": {"name": name, **metadata},
        }
        with self._here.client() as client:
            return client.post(JOBS, json=body, headers={"Idempotency-Key": name})

    def answers(self) -> Seen:
        """What they were answered, when all are."""
        seen = Seen()
        for one in self._sent.values():
            seen.note(*one.answer.result())
        return seen

    def settle(self) -> int:
        """Each is sent again until it is created, as a client does; then each is one job, which succeeds, or waits.

        How many were created before, though the client was told of a failure. Raises AssertionError where one is lost, is
        there twice, or is not whole.
        """
        self._pool.shutdown()
        replayed = 0
        for one in self._sent.values():
            first, _ = one.answer.result()
            again = self._created(one)
            if first is None or first.status_code != httpx.codes.CREATED:
                replayed += "idempotent-replayed" in again.headers
        until(lambda: all(row["status"] in TERMINAL for row in self._rows() if row["gpu_class"] != UNSERVED), "all end")
        rows = self._rows()
        assert sorted(row["metadata"]["name"] for row in rows) == sorted(self._sent), "each once"
        for row in rows:
            assert row["status"] == (Status.QUEUED if row["gpu_class"] == UNSERVED else Status.SUCCEEDED)
            is_whole(row)
        return replayed

    def _created(self, one: Sent) -> httpx.Response:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            answer, _ = timed(one.ask)
            if answer is not None and answer.status_code == httpx.codes.CREATED:
                return answer
            assert time.monotonic() < deadline, f"it is not created: {answer}"
            time.sleep(ASK_AGAIN_S)

    def _rows(self) -> list[dict[str, Any]]:
        with self._here.sessions.begin() as s:
            rows = [dict(row) for row in s.execute(ALL, {"since": 0}).mappings()]
        return [row for row in rows if row["metadata"].get("name") in self._sent]


# --- a fault


@contextmanager
def struck(here: Live, name: str, fault: AbstractContextManager[None]) -> Iterator[tuple[Submissions, dict[str, Seen]]]:
    """While the fault is there: a job that began before it, whatever else is submitted, and what a second client sees.

    Afterwards the service is ready again, and each job succeeds, once.
    """
    sent = Submissions(here)
    sent.send(steps="20", step_s="0.1")
    sent.answers()
    with watching(here, *PATHS) as seen:
        with fault:
            yield sent, seen
        began = time.monotonic()
        with here.client() as client:
            until(lambda: client.get(READYZ).json()["status"] == "ready", "it is ready", RECOVERS_S)
            until(lambda: client.get(LIST).status_code == httpx.codes.OK, "it answers", RECOVERS_S)
        recovered_s = time.monotonic() - began
    print(f"\n{name}: submitted {sent.answers()}; ready {recovered_s:.1f} s after")
    for path, what in seen.items():
        print(f"    {path:30} {what}")
    sent.settle()
    assert set(seen[LIVEZ].statuses) == {200}
    assert seen[LIVEZ].longest_s < ALONE_S


def statuses(seen: Seen) -> set[int]:
    return set(seen.statuses)


def upload(here: Live, key: str, size: int) -> Timed:
    """A set of about so many bytes, under that Idempotency-Key."""
    row = b'{"text": "Ada lives in Ghent."}\n'
    with here.client() as client:
        return timed(
            lambda: client.post(
                "/v1/files",
                data={"purpose": "forget_set"},
                files={"file": ("f.jsonl", row * (size // len(row)))},
                headers={"Idempotency-Key": key},
            )
        )
