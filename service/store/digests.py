"""Keyed digests of rows and of people's identifiers: a plain hash of one could be found by trying."""

from collections.abc import Iterable, Iterator

from service.domain.deletion import plain_subject
from service.domain.rows import Example
from service.evidence import rowdigest
from service.store.files import digest_purpose
from service.store.secrets import Secrets


def row_digests(secrets: Secrets, tenant_id: str, rows: Iterable[Example]) -> Iterator[str]:
    return rowdigest.row_digests(row_key(secrets, tenant_id), rows)


def same_row_digests(secrets: Secrets, tenant_id: str, row: Example) -> set[str]:
    """Of the row, and of it without white space at its ends, as question and as prompt: one of them is kept of a request whose
    row is the same, by overlap.exact, and has no such white space itself."""
    plain = row._replace(prompt=row.prompt.strip(), answer=row.answer.strip())
    forms = [plain] if row.kind == "text" else [plain._replace(kind="question"), plain._replace(kind="prompt")]
    return set(row_digests(secrets, tenant_id, [row, *forms]))


def row_key(secrets: Secrets, tenant_id: str) -> bytes:
    """What a tenant's rows are digested with, and nothing else is: who runs a job has it, and reads the job's rows anyway."""
    return secrets.key(f"rows of {tenant_id}")


def subject_digest(secrets: Secrets, tenant_id: str, identifier: str) -> str:
    return secrets.digest(digest_purpose(tenant_id), plain_subject(identifier).encode())
