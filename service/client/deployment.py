"""What a deployment has: models, methods, workers; and what it notes of all that is done with it."""

from collections.abc import Iterator

from service.client.shapes import AuditEvent, AuditHead, Json, Method, Model, Worker
from service.client.wire import Wire

MODELS, METHODS, WORKERS, AUDIT = "/v1/models", "/v1/methods", "/v1/workers", "/v1/audit-events"
AUDIT_PAGE = 1000


class Deployment:
    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def models(self) -> list[Model]:
        """Those that a job can ask for."""
        return [Model.of(one) for one in self._wire.json("GET", MODELS)["data"]]

    def methods(self) -> list[Method]:
        return [Method.of(one) for one in self._wire.json("GET", METHODS)["data"]]

    def workers(self) -> list[Worker]:
        """They serve every tenant."""
        return [Worker.of(one) for one in self._wire.json("GET", WORKERS)["data"]]

    def report_schema(self) -> Json:
        """The JSON Schema of every report."""
        return self._wire.json("GET", "/v1/schemas/report")


class Audit:
    """The tenant's log of who did what; Client.audit_log fetches it whole, to be verified."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def events(self, after_seq: int = 0, object_id: str | None = None) -> Iterator[AuditEvent]:
        """The first first. `object_id`: those on this object alone."""
        asked = {"limit": AUDIT_PAGE} | ({} if object_id is None else {"object_id": object_id})
        while True:
            page = self._wire.json("GET", AUDIT, params={**asked, "after_seq": after_seq})
            for event in map(AuditEvent.of, page["data"]):
                after_seq = event.seq
                yield event
            if not page["has_more"]:
                return

    def head(self) -> AuditHead:
        """Noted elsewhere, it fixes the whole log up to this entry."""
        return AuditHead.of(self._wire.json("GET", f"{AUDIT}/head"))
