"""A TCP proxy that fails as networks do: it delays, cuts, refuses, falls silent, or lets bytes trickle.

It stands between a part of the service and what that part needs. A fault holds for connections that are open, and for new ones,
from the moment at which it is set.
"""

import asyncio
import socket
import struct
from asyncio import StreamReader, StreamWriter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, TypeVar

CHUNK_BYTES = 2**16
TICK_S = 0.02  # how often a connection that stands still looks whether it may go on
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close is a reset, and what was not sent is lost

T = TypeVar("T")
Target = tuple[str, int] | Path  # of TCP, or of a Unix socket


class Fault(NamedTuple):
    refuses: bool = False  # nobody listens; what was open is reset
    silent: bool = False  # connections are made and nothing passes, not even their ends: the peer has vanished
    delay_s: float = 0.0  # of each chunk, in both directions
    bytes_per_s: float | None = None  # of the answer; None: as fast as they come
    request_bytes: int | None = None  # after which the connection is reset; None: never
    answer_bytes: int | None = None


NONE = Fault()
REFUSED = Fault(refuses=True)
SILENT = Fault(silent=True)


class Proxy:
    """Listens on a port of the loopback interface from `start` to `stop`; `fault` is what it does to whoever connects."""

    def __init__(self, target: Target) -> None:
        self.port = 0
        self.connections = 0  # made, in all
        self.answered = 0  # bytes of answers, since the last fault was set
        self._target = target
        self._now = NONE
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._listener: socket.socket | None = None
        self._open: dict[asyncio.Task[None], socket.socket] = {}  # with the client's end

    def start(self) -> None:
        self._thread.start()
        self._call(self._listen())

    def stop(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @contextmanager
    def fault(self, fault: Fault) -> Iterator[None]:
        """While the context is open."""
        self._call(self._set(fault))
        try:
            yield
        finally:
            self._call(self._set(NONE))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _set(self, fault: Fault) -> None:
        self._now, self.answered = fault, 0
        if fault.refuses:
            await self._close()
        elif self._listener is None:
            await self._listen()

    async def _listen(self) -> None:
        # Not asyncio's server: a connection that it takes while it closes stays open.
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=1000)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._loop.add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            accepted, _ = listener.accept()
            accepted.setblocking(False)
            self.connections += 1
            task = self._loop.create_task(self._serve(accepted))
            self._open[task] = accepted
            task.add_done_callback(self._open.pop)

    async def _close(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        opened = dict(self._open)
        for task, accepted in opened.items():
            _resets(accepted)
            task.cancel()
        await asyncio.gather(*opened, return_exceptions=True)
        for accepted in opened.values():
            accepted.close()

    async def _serve(self, accepted: socket.socket) -> None:
        ends = list[StreamWriter]()
        try:
            from_client, to_client = await asyncio.open_connection(sock=accepted)
            ends.append(to_client)
            await self._pass_on()
            if isinstance(self._target, Path):
                from_server, to_server = await asyncio.open_unix_connection(str(self._target))
            else:
                from_server, to_server = await asyncio.open_connection(*self._target)
            ends.append(to_server)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._requests(from_client, to_server))
                both.create_task(self._answers(from_server, to_client))
            for end in ends:
                end.close()
        except* (OSError, _Cut):
            _resets(accepted)
        finally:
            for end in ends:
                if not end.is_closing():
                    end.transport.abort()

    async def _requests(self, source: StreamReader, sink: StreamWriter) -> None:
        fault, passed = self._now, 0
        while chunk := await source.read(CHUNK_BYTES):
            await self._pass_on()
            if fault is not self._now:
                fault, passed = self._now, 0
            await self._write(sink, chunk[: _left(fault.request_bytes, passed)])
            passed += len(chunk)
            if fault.request_bytes is not None and passed > fault.request_bytes:
                raise _Cut
        await self._end(sink)

    async def _answers(self, source: StreamReader, sink: StreamWriter) -> None:
        fault, passed = self._now, 0
        while chunk := await source.read(CHUNK_BYTES):
            await self._pass_on()
            if fault is not self._now:
                fault, passed = self._now, 0
            self.answered += len(chunk)
            await self._write(sink, chunk[: _left(fault.answer_bytes, passed)], fault.bytes_per_s)
            passed += len(chunk)
            if fault.answer_bytes is not None and passed > fault.answer_bytes:
                raise _Cut
        await self._end(sink)

    async def _pass_on(self) -> None:
        """Returns when the fault lets something pass."""
        await asyncio.sleep(self._now.delay_s)
        while self._now.silent:
            await asyncio.sleep(TICK_S)

    async def _write(self, sink: StreamWriter, chunk: bytes, bytes_per_s: float | None = None) -> None:
        if bytes_per_s is None:
            sink.write(chunk)
            await sink.drain()
            return
        for at in range(len(chunk)):
            if self._now.bytes_per_s is None:  # it has healed meanwhile
                sink.write(chunk[at:])
                break
            sink.write(chunk[at : at + 1])
            await asyncio.sleep(1 / bytes_per_s)
        await sink.drain()

    async def _end(self, sink: StreamWriter) -> None:
        await self._pass_on()
        with suppress(OSError):
            sink.write_eof()


class _Cut(Exception):
    pass


def _left(limit: int | None, passed: int) -> int | None:
    return None if limit is None else max(0, limit - passed)


def _resets(accepted: socket.socket) -> None:
    """From now on, its close is a reset."""
    with suppress(OSError):  # it is closed
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


@contextmanager
def proxy(target: Target) -> Iterator[Proxy]:
    """One that listens."""
    made = Proxy(target)
    made.start()
    try:
        yield made
    finally:
        made.stop()
