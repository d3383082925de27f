"""A client that stands still loses its connection; one that is slow, or waits for its answer, does not."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse

from service.connections import timed
from service.settings import Settings
from tests.service.conftest import JOBS
from tests.service.live import Live, served

LIMIT_S = 2.0
SOON_S = 15.0  # on a machine that others use too
GET = b"GET /livez HTTP/1.1\r\nHost: h\r\n"
EVER = 1000


class Ended:
    """What came before the server closed the connection, and when it did."""

    def __init__(self, answer: bytes, seconds: float) -> None:
        self.statuses = [int(part.split(b" ", 1)[0]) for part in answer.split(b"HTTP/1.1 ")[1:]]
        self.answer, self.seconds = answer, seconds


async def send(live: Live, pieces: Sequence[bytes], pause_s: float = 0) -> Ended:
    """The pieces, with pauses between; then the connection stays open until the server closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
    began = time.monotonic()

    async def write() -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    writing = asyncio.create_task(write())
    try:
        answer = await asyncio.wait_for(reader.read(), SOON_S)
    finally:
        writing.cancel()
        writer.close()
    return Ended(answer, time.monotonic() - began)


def post(key: str, length: int) -> bytes:
    head = f"POST {JOBS} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {key}\r\n"
    return (head + f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n").encode()


def bytewise(content: bytes) -> list[bytes]:
    return [content[at : at + 1] for at in range(len(content))]


def test_who_stands_still_is_closed_and_who_is_slow_is_served(
    settings: Settings,
    new_job: Callable[..., str],
    make_key: Callable[..., str],
    request_body: dict[str, Any],
    tmp_path: Path,
) -> None:
    wait = f"GET {JOBS}/{new_job()} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {make_key('admin')}\r\n".encode()
    key, body = make_key("admin"), json.dumps(request_body).encode()
    size = -(-len(body) // 8)
    slowly = [body[at : at + size] for at in range(0, len(body), size)]
    cases = {
        "nothing": ([], 0, []),
        "half a head": ([GET], 0, [408]),
        "a head without end, byte by byte": ([GET, *bytewise(b"X-Long: " + b"x" * EVER)], 0.2, [408]),
        "half a second head": ([GET + b"\r\n" + GET], 0, [200, 408]),
        "a line's end now and then": ([GET + b"\r\n", *[b"\r\n"] * EVER], 0.2, [200, 400]),
        "nothing more": ([GET + b"\r\n"], 0, [200]),
        "half a body": ([post(key, len(body)) + body[:50]], 0, [408]),
        "half a body that nobody reads": ([post("ulk_x", 1000) + body[:50]], 0, [401]),
        "the same, byte by byte": ([post("ulk_x", 1000), *bytewise(b" " * 999)], 0.2, [401]),
        "a slow body": ([post(key, len(body)), *slowly], LIMIT_S / 3, [201]),
        "a long poll": ([wait + b"Prefer: wait=5\r\n\r\n"], 0, [200]),
    }

    async def all_at_once(live: Live) -> tuple[list[Ended], int]:
        slow = asyncio.gather(*(send(live, pieces, pause_s) for pieces, pause_s, _ in cases.values()))
        unread = asyncio.to_thread(answers_unread, live, 50)
        return await asyncio.gather(slow, unread)

    limits = {"REQUEST_HEAD_S": str(LIMIT_S), "REQUEST_IDLE_S": str(LIMIT_S)}
    with served(settings, tmp_path, **limits) as live:
        found, whole_answers = asyncio.run(all_at_once(live))
        log = live.log.read_text()
    for (name, (_, _, statuses)), ended in zip(cases.items(), found, strict=True):
        print(f"{name}: {ended.statuses} after {ended.seconds:.1f} s")
        assert ended.statuses == statuses, name
        served_slowly = name in ("a slow body", "a long poll")
        assert ended.seconds > 2 * LIMIT_S if served_slowly else ended.seconds < SOON_S, name
    assert whole_answers < 50, "a client that reads nothing"
    assert "Traceback" not in log


def answers_unread(live: Live, asked: int) -> int:
    """How many whole answers come to a client that asks for many, and begins to read when the limit is over."""
    answer = httpx.get(f"{live.url}/openapi.json", trust_env=False).content
    came = bytearray()
    with socket.socket() as connection, suppress(ConnectionResetError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(SOON_S)
        connection.connect(("127.0.0.1", live.port))
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: h\r\n\r\n" * asked)
        time.sleep(2 * LIMIT_S)
        while more := connection.recv(2**16):
            came += more
    return came.count(answer)


@pytest.mark.slow
@pytest.mark.parametrize(("pause_s", "served_whole"), [(0.05, True), (2.0, False)])
def test_an_answer_is_broken_off_for_a_reader_who_stands_still_and_not_for_a_slow_one(
    pause_s: float, served_whole: bool
) -> None:
    """The slow one takes longer to read the server's buffer to its low mark than a reader may stand still."""
    idle_s, size, step = 1.0, 2**20, 2**14

    async def read_slowly() -> tuple[int, float]:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**13)  # else the kernel's would take all
        config = uvicorn.Config(PlainTextResponse(b"x" * size), http=timed(5, idle_s), lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            return await asyncio.to_thread(came, listening.getsockname()[1])
        finally:
            server.should_exit = True
            await serving

    def came(port: int) -> tuple[int, float]:
        began, count = time.monotonic(), 0
        with socket.socket() as connection, suppress(ConnectionResetError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**13)
            connection.settimeout(SOON_S)
            connection.connect(("127.0.0.1", port))
            connection.sendall(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            while more := connection.recv(step):
                count += len(more)
                time.sleep(pause_s)
        return count, time.monotonic() - began

    count, seconds = asyncio.run(read_slowly())
    assert (count > size) == served_whole
    assert seconds > 2 * idle_s
