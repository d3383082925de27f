"""The queue under load: submissions and polls over HTTP, claims at the store, open event streams; each beside its bound.

    python tests/benchmarks/job_queue.py [--only floor,submit,poll,claim,streams] [--seconds 5] [--depths 10,1000,100000]

It starts its own Postgres and Valkey, and `unlearn api` processes with rate limits off: one, and two on two ports, which
is what a proxy in front of two replicas spreads its clients over. The clients are threads of one more process with
keep-alive sockets and requests that are built once, so that they take little from the cores that they share with the rest.

    floor     a round trip of SELECT 1; a commit of one UPDATE with one INSERT; /livez, which touches nothing
    submit    POST of a job whose sets are uploaded, small, and judged each time
    poll      GET of a job that runs, and of one that waits behind others; whole, and with If-None-Match (304)
    claim     line.first, the lock, the move, its events, its audit row and the commit, by processes that claim and
              finish, each one's first and those after it got warm; then the same with 100,000 jobs, of one kind each,
              before the only ones that can be claimed
    streams   resident memory of the API process before and under open event streams

Rates are of answers with the expected status; any other ends the program. Linux.
"""

import argparse
import json
import os
import re
import socket
import statistics
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import httpx
from sqlalchemy import create_engine, text

from service import embedded, migrate, register
from service.domain.job import Constraint, JobSpec, MethodChoice, ModelEntry, PromptFormat, Verdict
from service.processes import free_port, running
from service.settings import Settings
from service.store import jobs, models, tenancy
from service.store.session import Sessions, make_engine, make_sessions
from service.store.tenants import DEFAULT

JOBS = "/v1/unlearning/jobs"
OFF = {"RATE_LIMIT_PER_MINUTE": "0", "RATE_LIMIT_JOBS_PER_HOUR": "0", "RATE_LIMIT_FAILURES_PER_MINUTE": "0"}
SECTIONS = ("floor", "submit", "poll", "claim", "streams")
PASSED = Verdict(result="PASSED", gates=[], message="")
WARM = 12  # claims of each worker before those that count: by then SQLAlchemy, psycopg and Postgres keep its statements' plans
BEFORE = 100_000  # jobs that cannot be claimed, before those that can
COPIES = """
INSERT INTO jobs (id, status, spec, model, method, forget_set, retain_set, priority, gpu_class, min_vram_gib,
                  not_before, queued_at, rung_at, tenant_id, created_by)
SELECT 'ujob_' || :tag || lpad(n::text, 24, '0'), 'queued', spec, model, method, forget_set, retain_set, :priority,
       :gpu_class, :vram, now() + :rest * interval '1 s', now() + n * interval '1 ms', now(), :tenant, created_by
FROM jobs, generate_series(1, :count) AS n WHERE jobs.id = :template
"""
MEANWHILE = "; ".join(
    (
        "INSERT INTO tenants (id, max_running_jobs) VALUES ('full', 1) ON CONFLICT DO NOTHING",
        "DELETE FROM jobs WHERE id <> :template",
    )
)


class Place(NamedTuple):
    """What everything runs on."""

    settings: Settings
    sessions: Sessions  # of the default tenant
    key: str
    environment: dict[str, str]
    template: str  # id of a job that runs; the others are its copies
    sets: dict[str, str]  # purpose -> id of an uploaded file
    folder: Path


# --- the place


@contextmanager
def place(folder: Path) -> Iterator[Place]:
    with ExitStack() as opened:
        knobs: dict[str, Any] = {
            "database_url": opened.enter_context(embedded.postgres(folder)),
            "broker_url": opened.enter_context(embedded.valkey(folder)),
            "storage_url": str(folder / "storage"),
            "master_key": b64encode(os.urandom(32)).decode(),
        }
        settings = Settings(**knobs)
        migrate.upgrade(settings.database_url)
        engine = make_engine(settings.database_url)
        opened.callback(engine.dispose)
        sessions = tenancy.bound(make_sessions(engine), DEFAULT, "benchmark")
        with sessions.begin() as s:
            models.add(s, ModelEntry(name="m", source="path", location="m", prompt_format=PromptFormat()))
        environment = os.environ | {name.upper(): value for name, value in knobs.items()} | OFF
        environment |= {"EVENTS_STREAMS_PER_PRINCIPAL": "0", "LOG_LEVEL": "WARNING"}
        here = Place(settings, sessions, register.first_key(settings), environment, "", {}, folder)
        with apis(here, 1) as [port], httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=bearer(here)) as http:
            sets = {purpose: uploaded(http, purpose) for purpose in ("forget_set", "retain_set")}
        asked = {"model": "m", "method": MethodChoice(type="pdu"), "constraint": Constraint(epsilon=1.0)}
        with sessions.begin() as s:
            template = jobs.create(s, JobSpec.model_validate(asked | sets)).id
        with sessions.begin() as s:
            assert jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=1e6) is not None
        yield here._replace(template=template, sets=sets)


def bearer(here: Place) -> dict[str, str]:
    return {"Authorization": f"Bearer {here.key}"}


def uploaded(http: httpx.Client, purpose: str) -> str:
    content = "".join(json.dumps({"question": f"{purpose} {n}?", "answer": str(n)}) + "\n" for n in range(8))
    reply = http.post("/v1/files", data={"purpose": purpose}, files={"file": ("f.jsonl", content)})
    return str(reply.raise_for_status().json()["id"])


@contextmanager
def apis(here: Place, count: int) -> Iterator[list[int]]:
    """`unlearn api`, so often; their ports. The process of the first is in `api.pid` of the folder."""
    with ExitStack() as opened:
        ports = [free_port() for _ in range(count)]
        for port in ports:
            environment = here.environment | {"API_PORT": str(port)}
            command = [sys.executable, "-m", "service.cli", "api"]
            process = opened.enter_context(running(command, here.folder / f"api-{port}.log", environment))
            (here.folder / "api.pid").write_text(str(process.pid))
            while not answers(port):
                if process.poll() is not None:
                    raise SystemExit((here.folder / f"api-{port}.log").read_text()[-2000:])
                time.sleep(0.05)
        yield ports


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def empty(here: Place) -> None:
    """But for the job that runs."""
    with here.sessions.begin() as s:
        for statement in MEANWHILE.split("; "):
            s.execute(text(statement), {"template": here.template} if ":" in statement else {})


def filled(here: Place, count: int, tag: str = "a", tenant: str = DEFAULT, **values: Any) -> None:
    """So many copies of the template that wait."""
    told = {"priority": 5, "gpu_class": "cpu", "vram": None, "rest": None} | values
    with here.sessions.begin() as s:
        told |= {"tag": tag, "tenant": tenant, "count": count, "template": here.template}
        s.execute(text(COPIES.replace(":vram", "CAST(:vram AS float8)").replace(":rest", "CAST(:rest AS int)")), told)
    vacuum(here)


def vacuum(here: Place) -> None:
    """As autovacuum would have done after such a load."""
    engine = create_engine(here.settings.database_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("VACUUM ANALYZE jobs"))
    engine.dispose()


# --- clients


def request(here: Place, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    told = bearer(here) | {"Host": "localhost", "Content-Length": str(len(body))} | headers
    if body:
        told["Content-Type"] = "application/json"
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in told.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def rate(ports: Sequence[int], sent: bytes, status: int, seconds: float, clients: int) -> float:
    """Answers per second, by clients in a process of their own."""
    with get_context("spawn").Pool(1) as pool:
        return float(pool.apply(_rate, (list(ports), sent, status, seconds, clients)))


def received(connection: socket.socket) -> bytes:
    part = connection.recv(65536)
    if not part:
        raise SystemExit("the server hung up")
    return part


def _rate(ports: list[int], sent: bytes, status: int, seconds: float, clients: int) -> float:
    counts: list[int] = []
    wrong: list[bytes] = []

    def client(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            count, until = 0, time.perf_counter() + seconds
            while time.perf_counter() < until and not wrong:
                connection.sendall(sent)
                head, _, body = received(connection).partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: *(\d+)", head)
                missing = (int(length[1]) if length else 0) - len(body)
                while missing > 0:
                    missing -= len(received(connection))
                if not head.startswith(b"HTTP/1.1 %d" % status):
                    wrong.append(head + body)
                count += 1
            counts.append(count)

    threads = [Thread(target=client, args=(port,)) for _, port in zip(range(clients), cycle(ports), strict=False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise SystemExit(f"an answer was not {status}: {wrong[0][:500]!r}")
    return sum(counts) / seconds


# --- sections


def floor(here: Place, options: argparse.Namespace) -> None:
    engine = create_engine(here.settings.database_url)
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.autocommit = True
        look = each(lambda: driver.execute("SELECT 1").fetchone(), 2000)
        driver.autocommit = False
        driver.execute("CREATE TABLE floor (n int PRIMARY KEY, v int); CREATE TABLE told (n int, v int)")
        driver.execute("INSERT INTO floor VALUES (1, 0)")
        driver.commit()

        def write() -> None:
            driver.execute("UPDATE floor SET v = v + 1 WHERE n = 1")
            driver.execute("INSERT INTO told VALUES (1, 1)")
            driver.commit()

        commit = each(write, 500)
    engine.dispose()
    table("lower bounds", "ms median", "ms p99")
    row("SELECT 1, a round trip", *ms(look))
    row("UPDATE and INSERT, committed", *ms(commit))
    table("requests per second", "1 process", "2 processes", "2 : 1")
    rates(here, options, "GET /livez", request(here, "GET", "/livez"), 200)


def submit(here: Place, options: argparse.Namespace) -> None:
    asked = {"model": "m", "method": {"type": "pdu"}, "constraint": {"epsilon": 0.3}} | here.sets
    table("submissions per second", "1 process", "2 processes", "2 : 1")
    rates(here, options, "POST job", request(here, "POST", JOBS, json.dumps(asked).encode()), 201)
    empty(here)


def poll(here: Place, options: argparse.Namespace) -> None:
    table("polls per second", "1 process", "2 processes", "2 : 1")
    polls(here, options, "runs", here.template)
    for depth in options.depths:
        filled(here, depth)
        polls(here, options, f"last of {depth:,} that wait", f"ujob_a{depth:024}")
        empty(here)


def polls(here: Place, options: argparse.Namespace, name: str, job_id: str) -> None:
    path = f"{JOBS}/{job_id}"
    with apis(here, 1) as [port]:
        etag = httpx.get(f"http://127.0.0.1:{port}{path}", headers=bearer(here)).raise_for_status().headers["ETag"]
    rates(here, options, f"{name}, whole", request(here, "GET", path), 200)
    rates(here, options, f"{name}, If-None-Match", request(here, "GET", path, If_None_Match=etag), 304)


def rates(here: Place, options: argparse.Namespace, name: str, sent: bytes, status: int) -> None:
    found = []
    for count in (1, 2):
        with apis(here, count) as ports:
            rate(ports, sent, status, 1.0, options.clients)
            found.append(rate(ports, sent, status, options.seconds, options.clients))
    row(name, *(f"{one:,.0f}" for one in found), f"{found[1] / found[0]:.2f}")


def claim(here: Place, options: argparse.Namespace) -> None:
    table("claims", "workers", "ms first", "ms median", "ms p99", "claims/s", "below 10 ms")
    for depth in options.depths:
        for workers in (1, 50) if depth > WARM * 50 else (1,):
            empty(here)
            filled(here, depth + WARM * workers)
            claims(here, f"{depth:,} queued", workers, min(depth, 200 if workers == 1 else 1000))
    kinds: dict[str, dict[str, Any]] = {
        "of a GPU class not served": {"gpu_class": "h200"},
        "of a tenant at its bound": {"tenant": "full"},
        "that rest": {"rest": 86_400},
        "that need more memory": {"vram": 80.0},
    }
    for name, values in kinds.items():
        empty(here)
        filled(here, BEFORE, priority=9, **values)
        if "tenant" in values:
            filled(here, 1, "b", "full", priority=10)
            _claims(here.settings.database_url, 1, finish=False)
        filled(here, 100 + WARM, "c")
        claims(here, f"{BEFORE:,} before, {name}", 1, 100)
    empty(here)
    with here.sessions.begin() as s:
        s.execute(text("INSERT INTO tenants (id) SELECT 't' || n FROM generate_series(1, 100) AS n"))
    for number in range(1, 101):
        with here.sessions.begin() as s:
            told = {"tag": f"t{number}_", "tenant": f"t{number}", "count": BEFORE // 100, "template": here.template}
            s.execute(text(COPIES.replace(":vram", "NULL").replace(":rest", "NULL").replace(":gpu_class", "'cpu'")),
                      told | {"priority": 5})  # fmt: skip
    vacuum(here)
    claims(here, f"{BEFORE:,} queued, of 100 tenants", 1, 200)
    empty(here)


def claims(here: Place, name: str, workers: int, count: int) -> None:
    """So many in all, after those by which a worker gets warm."""
    share = WARM + max(1, count // workers)
    began = time.perf_counter()
    with get_context("spawn").Pool(min(workers, 10)) as pool:  # five workers of a process take turns, as its slots do
        ready = pool.map(len, ["x"] * 10)  # they have started, and imported
        assert ready
        began = time.perf_counter()
        parts = pool.starmap(_claims, [(here.settings.database_url, share)] * workers, chunksize=1)
        seconds = time.perf_counter() - began
    first, _ = ms([latency for part in parts for latency in part[:1]])
    median, p99 = ms([latency for part in parts for latency in part[WARM:]])
    pace = sum(map(len, parts)) / seconds
    below = "p99" if float(p99) < 10 else "median" if float(median) < 10 else "none"
    row(name, str(workers), first, median, p99, f"{pace:,.0f}", below)


def _claims(database_url: str, share: int, finish: bool = True) -> list[float]:
    """Seconds of each claim, of a worker that finishes what it claims."""
    engine = make_engine(database_url)
    sessions = make_sessions(engine)
    found = []
    with sessions.begin() as s:
        s.execute(text("SELECT 1"))  # connected
    for _ in range(share):
        began = time.perf_counter()
        with sessions.begin() as s:
            one = jobs.claim(s, worker=str(os.getpid()), classes=["cpu"], vram_gib=10, lease_s=600)
        if one is None:
            break
        found.append(time.perf_counter() - began)
        if finish:
            with sessions.begin() as s:
                assert jobs.succeed(s, one.job_id, one.fence, PASSED)
    engine.dispose()
    return found


def streams(here: Place, options: argparse.Namespace) -> None:
    sent = request(here, "GET", f"{JOBS}/{here.template}/events", Accept="text/event-stream")
    with apis(here, 1) as [port]:
        rate([port], request(here, "GET", f"{JOBS}/{here.template}"), 200, 1.0, options.clients)
        before = resident(here)
        opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(options.streams)]
        for one in opened:
            one.sendall(sent)
        for one in opened:
            while b"id: 1" not in received(one):
                pass
        time.sleep(options.seconds)
        after = resident(here)
        for one in opened:
            one.close()
    table("memory of the API process", "MiB before", f"MiB with {options.streams}", "KiB each")
    row("event streams", f"{before:.0f}", f"{after:.0f}", f"{(after - before) * 1024 / options.streams:.0f}")


def resident(here: Place) -> float:
    """MiB."""
    status = Path(f"/proc/{(here.folder / 'api.pid').read_text()}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


# --- figures


def each(work: Callable[[], object], times: int) -> list[float]:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return found


def ms(seconds: Sequence[float]) -> tuple[str, str]:
    """Median, 99th percentile."""
    p99 = statistics.quantiles(seconds, n=100, method="inclusive")[98] if len(seconds) > 1 else seconds[0]
    return f"{statistics.median(seconds) * 1e3:.2f}", f"{p99 * 1e3:.2f}"


def table(title: str, *columns: str) -> None:
    print(f"\n| {title} | {' | '.join(columns)} |\n|---{'|--:' * len(columns)}|", flush=True)


def row(name: str, *cells: str) -> None:
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", type=lambda given: given.split(","), default=SECTIONS, help="of " + ",".join(SECTIONS)
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of each rate")
    parser.add_argument("--clients", type=int, default=8, help="at once")
    parser.add_argument("--depths", type=lambda given: [*map(int, given.split(","))], default=[10, 1000, 100_000])
    parser.add_argument("--streams", type=int, default=200)
    options = parser.parse_args()
    sections = {"floor": floor, "submit": submit, "poll": poll, "claim": claim, "streams": streams}
    with tempfile.TemporaryDirectory(prefix="unlearn-queue-") as folder, place(Path(folder)) as here:
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        for name in options.only:
            sections[name](here, options)
        print(f"\nload {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
