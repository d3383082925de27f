"""Where the service tells what happens."""

from collections.abc import Iterator, Sequence
from itertools import islice

from service.client.shapes import Delivery, Endpoint
from service.client.wire import Wire, at, once

ENDPOINTS, DELIVERIES = "/v1/webhook-endpoints", "/v1/webhook-deliveries"


class Webhooks:
    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def add(self, url: str, *, event_types: Sequence[str] = (), description: str = "") -> Endpoint:
        """Its `secret` is told now and never again. `event_types`: none are all."""
        body = {"url": url, "description": description, "event_types": [*event_types]}
        return Endpoint.of(self._wire.json("POST", ENDPOINTS, body, headers=once()))

    def get(self, endpoint_id: str) -> Endpoint:
        return Endpoint.of(self._wire.json("GET", at(ENDPOINTS, endpoint_id)))

    def list(self) -> Iterator[Endpoint]:
        """The latest first."""
        return map(Endpoint.of, self._wire.pages(ENDPOINTS, {}))

    def remove(self, endpoint_id: str) -> None:
        """With the log of its deliveries."""
        self._wire.json("DELETE", at(ENDPOINTS, endpoint_id))

    def rotate(self, endpoint_id: str) -> Endpoint:
        """With another `secret`; the old one signs beside it for a day."""
        return Endpoint.of(self._wire.json("POST", at(ENDPOINTS, endpoint_id, "rotate-secret"), headers=once()))

    def enable(self, endpoint_id: str) -> Endpoint:
        """Send to one again that was disabled."""
        return Endpoint.of(self._wire.json("POST", at(ENDPOINTS, endpoint_id, "enable")))

    def test(self, endpoint_id: str) -> Delivery:
        return Delivery.of(self._wire.json("POST", at(ENDPOINTS, endpoint_id, "test"), headers=once()))

    def deliveries(self, endpoint_id: str, limit: int | None = None) -> Iterator[Delivery]:
        """What an endpoint was sent, the latest first; `limit`: no more than so many."""
        return islice(map(Delivery.of, self._wire.pages(at(ENDPOINTS, endpoint_id, "deliveries"), {})), limit)

    def replay(self, delivery_id: str) -> Delivery:
        """Another delivery of the same message."""
        return Delivery.of(self._wire.json("POST", at(DELIVERIES, delivery_id, "replay"), headers=once()))
