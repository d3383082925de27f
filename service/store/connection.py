"""Connections that give a server up which has fallen silent.

TCP notices a peer that vanished. It does not notice a server process that hangs, a disk that does, or a proxy between us: those
acknowledge what is sent, and answer nothing. The server's own timeouts do not help then, and psycopg waits for ever.
"""

import time
from collections.abc import Generator
from typing import Any, TypeVar

import psycopg

T = TypeVar("T")
Exchange = Generator[Any, Any, T]  # yields what it waits for at the socket; gets whether that came, each 0.1 s

SILENT_S = 35.0  # above the server's statement_timeout, which ends what merely takes long
LOOK_S = 7.0  # so, too, for what asks within the event loop


class Connection(psycopg.Connection[Any]):
    """OperationalError where an exchange with the server takes longer than `SILENT_S`; it is closed then."""

    def wait(self, gen: Exchange[T], *args: Any, **options: Any) -> T:
        return super().wait(_within(SILENT_S, gen, self), *args, **options)


class LookConnection(psycopg.AsyncConnection[Any]):
    """So, too, after `LOOK_S`."""

    async def wait(self, gen: Exchange[T], *args: Any, **options: Any) -> T:
        return await super().wait(_within(LOOK_S, gen, self), *args, **options)


def _within(seconds: float, gen: Exchange[T], connection: Connection | LookConnection) -> Exchange[T]:
    deadline = time.monotonic() + seconds
    try:
        wanted = next(gen)
        while True:
            came = yield wanted
            if time.monotonic() > deadline:
                connection.pgconn.finish()  # a cancellation would wait for an answer, too
                raise psycopg.OperationalError(f"the server did not answer within {seconds:g} s")
            wanted = gen.send(came)
    except StopIteration as end:
        answer: T = end.value
        return answer
