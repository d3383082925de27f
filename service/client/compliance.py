"""Deletion requests, the plans by which models forget them, and API keys."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from service.client.sets import Files, Given
from service.client.shapes import BatchItem, DeletionRequest, Json, Key, Plan
from service.client.wire import Wire, at, if_match, once

REQUESTS, PLANS, KEYS = "/v1/deletion-requests", "/v1/deletion-plans", "/v1/api-keys"


class Requests:
    """Of a decision, `version` lets it be made only on what was seen: else ApiError, status 412."""

    def __init__(self, wire: Wire, files: Files) -> None:
        self._wire, self._files = wire, files

    def submit(
        self,
        *,
        regulation: str,
        models: Sequence[str],
        forget_set: Given,
        subjects: Sequence[str] = (),
        external_reference: str | None = None,
        received_at: datetime | None = None,
        due_at: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> DeletionRequest:
        """Upload the rows, unless they are there, and submit. Where it is refused, they are purged again.

        Args:
            subjects: who it is about; kept as keyed digests alone.
            received_at, due_at: default: now, and what the regulation says.
            idempotency_key: as of Client.submit.
        """
        times = {"received_at": time(received_at), "due_at": time(due_at)}
        with self._files.uploaded({"forget_set": ("forget_set", forget_set)}) as ids:
            body = {
                "regulation": regulation,
                "models": list(models),
                "subjects": list(subjects),
                "external_reference": external_reference,
                "metadata": dict(metadata or {}),
                **{name: value for name, value in times.items() if value is not None},
                **ids,
            }
            headers = once(idempotency_key)
            return DeletionRequest.of(self._wire.json("POST", REQUESTS, body, headers=headers))

    def submit_batch(self, bodies: Sequence[Json], idempotency_key: str | None = None) -> list[BatchItem]:
        """Each by itself, in order: one that is refused leaves the others as they are. At most 100.

        Args:
            bodies: each that of POST /v1/deletion-requests.
            idempotency_key: who sends the same again within a day makes only what was not made. Default: a new one.
        """
        headers = once(idempotency_key)
        results = self._wire.json("POST", at(REQUESTS, "batch"), {"requests": [*bodies]}, headers=headers)["results"]
        return [
            BatchItem(
                index=one["index"],
                status=one["status"],
                request=DeletionRequest.of(one["object"]) if one["object"] else None,
                problem=one["problem"],
            )
            for one in results
        ]

    def get(self, request_id: str) -> DeletionRequest:
        return DeletionRequest.of(self._wire.json("GET", at(REQUESTS, request_id)))

    def rows(self, request_id: str) -> Iterator[str]:
        """The digests of its rows, in the order of its forget set."""
        after = 0
        while True:
            found = self._wire.json("GET", at(REQUESTS, request_id, "rows"), params={"after": after})
            yield from (row["digest"] for row in found["data"])
            after += len(found["data"])
            if not found["has_more"]:
                return

    def list(
        self,
        *,
        status: str | None = None,
        regulation: str | None = None,
        due_before: datetime | None = None,
        subject: str | None = None,
        external_reference: str | None = None,
    ) -> Iterator[DeletionRequest]:
        """The latest first. `subject`: an identifier as it was submitted, for who has the scope subjects:read."""
        asked = {
            "status": status,
            "regulation": regulation,
            "due_before": time(due_before),
            "subject": subject,
            "external_reference": external_reference,
        }
        pages = (
            self._wire.pages(REQUESTS, asked) if subject is None else self._wire.found(at(REQUESTS, "search"), asked)
        )
        return map(DeletionRequest.of, pages)

    def approve(
        self, request_id: str, version: int | None = None, *, leave_out_retained: bool = False
    ) -> DeletionRequest:
        """As somebody else than who submitted it.

        Args:
            leave_out_retained: jobs of plans leave out those of its rows that the plan's retain set has.
        """
        return self._decided(request_id, "approve", version, leave_out_retained=leave_out_retained)

    def deny(
        self, request_id: str, reason: str, note: str | None = None, version: int | None = None
    ) -> DeletionRequest:
        """Before a job serves it. Its rows are purged."""
        return self._decided(request_id, "deny", version, {"reason": reason, "note": note})

    def cancel(self, request_id: str, version: int | None = None) -> DeletionRequest:
        """Take it back. Its rows are purged."""
        return self._decided(request_id, "cancel", version)

    def extend(
        self, request_id: str, reason: str, due_at: datetime | None = None, version: int | None = None
    ) -> DeletionRequest:
        """Once; default: as far as the regulation allows."""
        return self._decided(request_id, "extend", version, {"reason": reason, "due_at": time(due_at)})

    def requeue(
        self, request_id: str, version: int | None = None, *, leave_out_retained: bool = False
    ) -> DeletionRequest:
        """Have one that failed served again, by another job on each of its models that may still know its rows.

        Args:
            leave_out_retained: as of approve.
        """
        return self._decided(request_id, "requeue", version, leave_out_retained=leave_out_retained)

    def close(self, request_id: str, reason: str, version: int | None = None) -> DeletionRequest:
        """Call it completed, though no job has passed for each of its models."""
        return self._decided(request_id, "close", version, {"reason": reason})

    def _decided(
        self, request_id: str, verb: str, version: int | None, body: Json | None = None, **params: bool
    ) -> DeletionRequest:
        path = at(REQUESTS, request_id, verb)
        return DeletionRequest.of(self._wire.json("POST", path, body, headers=if_match(version), params=params))


class Plans:
    def __init__(self, wire: Wire, files: Files) -> None:
        self._wire, self._files = wire, files

    def set(self, model: str, job: Json, retain_set: Given, *, window_seconds: int = 0, requests_max: int = 16) -> Plan:
        """From now on the service makes the jobs, one for the approved requests of the model that wait together.

        Args:
            job: method, constraint, budget, gates and so on, as of a job, without what differs from one to the next.
        """
        with self._files.uploaded({"retain_set": ("retain_set", retain_set)}) as ids:
            body = {"job": job | ids, "window_seconds": window_seconds, "requests_max": requests_max}
            return Plan.of(self._wire.json("PUT", at(PLANS, model), body))

    def get(self, model: str) -> Plan:
        return Plan.of(self._wire.json("GET", at(PLANS, model)))

    def remove(self, model: str) -> None:
        """Approved requests wait then for a job that somebody submits."""
        self._wire.json("DELETE", at(PLANS, model))


class Keys:
    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def create(
        self, name: str, *, role: str | None = None, scopes: Sequence[str] = (), expires_at: datetime | None = None
    ) -> Key:
        """Its `secret` is told now and never again. Its scopes are at most those of the key that makes it."""
        body = {"name": name, "role": role, "scopes": [*scopes], "expires_at": time(expires_at)}
        return Key.of(self._wire.json("POST", KEYS, body, headers=once()))

    def get(self, key_id: str) -> Key:
        return Key.of(self._wire.json("GET", at(KEYS, key_id)))

    def list(self) -> Iterator[Key]:
        """Revoked ones too."""
        return map(Key.of, self._wire.pages(KEYS, {}))

    def revoke(self, key_id: str) -> None:
        """At once and for ever."""
        self._wire.json("DELETE", at(KEYS, key_id))


def time(when: datetime | None) -> str | None:
    """As the service reads it; one without a zone is of this machine's."""
    return None if when is None else when.astimezone().isoformat()
