"""A job's events as they happen: server-sent events (WHATWG HTML, section 9.2), resumed where a stream breaks off."""

import json
from collections.abc import Iterable, Iterator
from time import sleep

import httpx

from service.client.shapes import Event, Json
from service.client.wire import BROKEN, TRIES, Wire

AGAIN_S = 1.0
SILENCE_S = 45.0  # three times as long as the service is silent while the stream is alive
LOST = (*BROKEN, httpx.ReadTimeout)


def follow(wire: Wire, path: str, after: int) -> Iterator[Event]:
    """Those behind `after`, each once, until the job has ended, however often the connection breaks.

    Raises what the wire raises once three tries in a row have brought nothing.
    """
    broken = 0
    while True:
        before = after
        headers = {"Accept": "text/event-stream, application/problem+json", "Last-Event-ID": str(after)}
        try:
            with wire.opened("GET", path, headers=headers, timeout=httpx.Timeout(SILENCE_S)) as reply:
                if reply.status_code == httpx.codes.NO_CONTENT:
                    return
                for event in map(Event.of, read(reply.iter_lines())):
                    after, broken = event.seq, 0
                    yield event
            broken = 0
        except LOST:
            broken += 1
            if broken == TRIES:
                raise
        if broken or after == before:
            sleep(AGAIN_S)


def read(lines: Iterable[str]) -> Iterator[Json]:
    """The data of each whole event; one that broke off is not whole.

    >>> list(read(["retry: 3000", "", ": ping", "", "id: 1", 'data: {"seq":', "data: 1}", "", 'data: {"seq": 2}']))
    [{'seq': 1}]
    """
    data = list[str]()
    for line in lines:
        name, _, value = line.partition(":")
        if name == "data":
            data.append(value.removeprefix(" "))
        elif not line and data:
            yield json.loads("\n".join(data))
            data.clear()
