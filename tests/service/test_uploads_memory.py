"""What uploads cost the API's process while they arrive, and afterwards."""

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from service.settings import Settings
from tests.service.live import Live, served

MIB = 2**20
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nforget_set\r\n'
ROW = b'{"text": "' + b"x" * 1000 + b'"}\n'


def file_part(name: str = "file") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="f.jsonl"\r\n\r\n'.encode()


def field(name: str, value: bytes) -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"


class Memory(NamedTuple):
    now: int  # bytes that are resident
    most: int  # since the last reset


def memory(live: Live) -> Memory:
    status = Path(f"/proc/{live.pid}/status").read_text()
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.MULTILINE))
    return Memory(int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024)


def reset(live: Live) -> int:
    Path(f"/proc/{live.pid}/clear_refs").write_text("5")  # proc(5): the peak is what is resident now
    return memory(live).now


def temporary(live: Live) -> list[str]:
    """Open files that have no name, or lie where temporary files do."""
    links = [link for link in Path(f"/proc/{live.pid}/fd").iterdir() if link.is_symlink()]
    folder = str(live.log.with_name("tmp"))
    return [name for link in links if (name := os.readlink(link)).startswith(folder)]


@pytest.fixture
def live(settings: Settings, tmp_path: Path) -> Iterator[Live]:
    with served(settings, tmp_path, RATE_LIMIT_PER_MINUTE="0") as live:
        yield live


@pytest.fixture
def key(make_key: Callable[..., str]) -> str:
    return make_key("admin")


@pytest.fixture
def client(live: Live, key: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=live.url, headers=headers, timeout=120, trust_env=False) as client:
        yield client


def chunked(*parts: bytes) -> Iterator[bytes]:
    yield PURPOSE
    yield from parts
    yield b"--b--\r\n"


UNFINISHED = {
    "a second file": PURPOSE + file_part() + ROW + b"\r\n" + file_part(),
    "a second file of another name": PURPOSE + file_part() + ROW + b"\r\n" + file_part("other"),
    "a third field": PURPOSE + field("other", b"x") + field("third", b"x") + file_part(),
    "a field that comes again": PURPOSE * 3 + file_part(),
    "a long field": field("purpose", b"x" * 2000),
    "a long header of a part": b"--b\r\nContent-Disposition: form-data; name=" + b"x" * 5000,
    "many headers of a part": b"--b\r\n" + b"".join(b"X-%d: x\r\n" % number for number in range(20)),
}


def test_a_part_too_many_is_refused_before_the_rest_has_come(live: Live, key: str) -> None:
    for name, unfinished in UNFINISHED.items():
        head = f"POST /v1/files HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {key}\r\nTransfer-Encoding: chunked\r\n"
        head += f"Content-Type: {FORM['Content-Type']}\r\n\r\n{len(unfinished):x}\r\n"
        with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
            connection.sendall(head.encode() + unfinished + b"\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 400 "), name


@pytest.mark.slow
def test_what_large_bodies_take_is_bounded_and_given_back(client: httpx.Client, live: Live) -> None:
    def upload(content: Iterator[bytes]) -> int:
        return client.post("/v1/files", content=content, headers=FORM).status_code

    def honest(_: int) -> int:
        return upload(chunked(file_part(), *[ROW] * (16 * 1024), b"\r\n"))

    def parts(_: int) -> int:
        one = file_part() + b"x" * (MIB - 1000) + b"\r\n"
        return upload(chunked(*[one] * 64))

    def job(_: int) -> int:
        return client.post("/v1/unlearning/jobs", json={"model": "m", "other": "y" * 8_000_000}).status_code

    assert honest(0) == 201, "once before it is measured, for what is imported and made at first"
    before = reset(live)
    for send, status, most in ((parts, 400, 96), (honest, 201, 96), (job, 422, 256)):
        reset(live)
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(send, range(8))) == {status}
        until = time.monotonic() + 10
        while temporary(live) and time.monotonic() < until:
            time.sleep(0.05)
        assert temporary(live) == []
        now = memory(live)
        grown = (now.most - before) / MIB, (now.now - before) / MIB
        print(f"{send.__name__}: at most {grown[0]:+.0f} MiB, then {grown[1]:+.0f} MiB")
        assert grown[0] < most, send.__name__
        assert grown[1] < 128, send.__name__  # of 64 MiB that were sent at once; the allocator keeps what is in pieces
