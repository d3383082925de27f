"""uvicorn's connections by h11, closed where a client stands still. httptools is faster, and keeps a head of any length.

uvicorn itself has a limit only between two requests: half a head, or half a body, would hold a connection for ever.
"""

import asyncio
from typing import Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

TIMED_OUT = b"the request did not arrive in time"

# What a client is to send next: the head of a request, its body, or the rest of a body that has been answered already.
Awaited = Literal["head", "body", "rest"]


class TimedProtocol(H11Protocol):
    """Closes a connection after `head_s` for a whole head, and after `idle_s` without a byte of a body or of an answer.

    A head and the rest of an answered body have their time in all, for a byte now and then would hold them for ever.
    """

    head_s: float
    idle_s: float
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _awaited: Awaited | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._timer, self._stalled):
            if timer:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled:
            self._stalled.cancel()

    def _watch_reader(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(self.idle_s, self._unread, left)

    def _unread(self, left: int) -> None:
        """`left` bytes waited for the client to read on, `idle_s` ago."""
        if self.transport.get_write_buffer_size() < left:
            self._watch_reader()
        else:
            self.transport.abort()

    def _watch(self) -> None:
        before, self._awaited = self._awaited, self._next()
        if self._awaited == before != "body":
            return
        if self._timer:
            self._timer.cancel()
        if self._awaited and not self.transport.is_closing():
            seconds = self.idle_s if self._awaited == "body" else self.head_s
            self._timer = self.loop.call_later(seconds, self._expired)

    def _next(self) -> Awaited | None:
        """None: a whole request is there."""
        if self.conn.their_state is h11.IDLE:
            return "head"
        if self.conn.their_state is h11.SEND_BODY:
            return "rest" if self.cycle.response_complete else "body"
        return None

    def _expired(self) -> None:
        if self._awaited == "body" and self.flow.read_paused:  # it is us who do not read
            self._watch()
            return
        begun = self._awaited == "body" or bool(self.conn.trailing_data[0])
        if begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # to a request alone, and only once
            headers = [("Content-Type", "text/plain"), ("Connection", "close")]
            answer = [h11.Response(status_code=408, headers=headers), h11.Data(data=TIMED_OUT), h11.EndOfMessage()]
            for event in answer:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def timed(head_s: float, idle_s: float) -> type[TimedProtocol]:
    """With these limits, in seconds."""
    return type("TimedProtocol", (TimedProtocol,), {"head_s": head_s, "idle_s": idle_s})
