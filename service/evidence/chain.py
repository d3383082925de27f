"""The audit log as a chain of hashes: an entry cannot be altered, left out or moved without every later hash changing.

    hash(n) = SHA-256(hash(n - 1) || canonical JSON of entry n),     hash(0) = genesis of the tenant

The export is JSON Lines in canonical JSON, one line per entry with `prev_hash` and `hash`. Whoever holds the whole log could
compute a new chain; what prevents it is an anchor that left the house, such as the head in a certificate.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, JsonValue, ValidationError

from service.evidence import canonical
from service.evidence.canonical import Instant, Sha256, Strict

Kind = Literal["altered", "missing", "reordered", "truncated"]
REASON_CHARS = 300
NAME = "urn:unlearning-service:audit:v1"


class AuditEntry(Strict):
    tenant: str
    seq: Annotated[int, Field(ge=1)]  # per tenant, without gaps
    id: str
    created_at: Instant
    actor: str
    action: str
    object_type: str
    object_id: str
    data: dict[str, JsonValue]


class AuditRow(AuditEntry):
    """An entry in its place in the chain."""

    prev_hash: Sha256
    hash: Sha256


class Head(Strict):
    """An entry that fixes itself and everything before it."""

    seq: Annotated[int, Field(ge=1)]
    hash: Sha256


class Fault(NamedTuple):
    seq: int  # of the first entry that is not as it was
    kind: Kind
    detail: str


class Checked(NamedTuple):
    entries: int  # that hold: all of them, or those before the fault
    head: Head | None  # the last one; null of an empty log, and where there is a fault
    fault: Fault | None


def genesis(tenant: str) -> str:
    """What a tenant's first entry is chained to: so one tenant's log is not another's."""
    return canonical.sha256(canonical.dumps({"chain": NAME, "tenant": tenant}))


def row_hash(prev_hash: str, entry: AuditEntry) -> str:
    """64 hex digits. Raises ValueError for data that has no canonical form."""
    fields = entry.model_dump(include=set(AuditEntry.model_fields))
    return canonical.sha256(bytes.fromhex(prev_hash) + canonical.dumps(fields))


def chained(prev_hash: str, entry: AuditEntry) -> AuditRow:
    """The row to store behind the one with `prev_hash`."""
    return AuditRow(**entry.model_dump(), prev_hash=prev_hash, hash=row_hash(prev_hash, entry))


def line(row: AuditRow | Mapping[str, Any]) -> bytes:
    """A row as the export has it; as a mapping one that may be none: who reads the export judges it."""
    return canonical.dumps(row) + b"\n"


def verify(lines: Iterable[bytes], anchor: Head | None = None, after: Head | None = None) -> Checked:
    """Walk an export from its first entry on; stop at the first fault.

    Args:
        lines: with their ends, as an opened file gives them.
        anchor: from outside the log; without it a log that was cut short, or written anew, passes.
        after: an entry that is known to hold, behind which the lines begin; None: they begin with entry 1.
    """
    head = after
    tenant: str | None = None
    rest = iter(lines)
    for text in rest:
        seq = head.seq + 1 if head else 1
        try:
            row = _read(text)
        except ValueError as error:
            return _broken(seq, "altered", f"line {seq} is not as it was exported: {reason(error)}")
        tenant = tenant or row.tenant
        fault = _fault(row, tenant, head, rest)
        if fault:
            return _broken(*fault)
        if anchor and row.seq == anchor.seq and row.hash != anchor.hash:
            return _broken(seq, "altered", f"entry {seq} or one before it was rewritten: its hash is not the anchor's")
        head = Head(seq=row.seq, hash=row.hash)
    last = head.seq if head else 0
    if anchor and last < anchor.seq:
        return _broken(last + 1, "truncated", f"it ends with entry {last}, and the anchor is entry {anchor.seq}")
    return Checked(last, head, None)


def reason(error: ValueError) -> str:
    """An error in one short line; of pydantic's, the first field with what is wrong there, never the value there."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"[:REASON_CHARS]
    return str(error).partition("\n")[0][:REASON_CHARS]


def _read(text: bytes) -> AuditRow:
    row = AuditRow.model_validate(canonical.loads(text))
    if line(row) != text:
        raise ValueError("it says the same in other bytes")
    return row


def _fault(row: AuditRow, tenant: str, head: Head | None, rest: Iterator[bytes]) -> Fault | None:
    """What is wrong with a row behind the entries up to `head`."""
    seq, before = (head.seq + 1, head.hash) if head else (1, genesis(tenant))
    if row_hash(row.prev_hash, row) != row.hash:
        return Fault(seq, "altered", f"entry {seq} does not have the hash that stands beside it")
    if row.tenant != tenant:
        return Fault(seq, "altered", f"entry {seq} is another tenant's")
    if row.seq < seq:
        return Fault(seq, "reordered", f"where entry {seq} belongs stands entry {row.seq} once more")
    if row.seq > seq:
        moved = any(_seq(text) == seq for text in rest)
        where = "which stands further on" if moved else "which is nowhere"
        detail = f"entry {row.seq} stands in the place of entry {seq}, {where}"
        return Fault(seq, "reordered" if moved else "missing", detail)
    if row.prev_hash != before:
        if head is None:
            return Fault(1, "altered", "entry 1 does not begin its tenant's chain")
        return Fault(head.seq, "altered", f"entry {head.seq} was rewritten: entry {seq} is chained to another one")
    return None


def _seq(text: bytes) -> int | None:
    try:
        return _read(text).seq
    except ValueError:
        return None


def _broken(seq: int, kind: Kind, detail: str) -> Checked:
    return Checked(seq - 1, None, Fault(seq, kind, detail))
