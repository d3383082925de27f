"""Keyed digests of rows and of people's identifiers: a plain hash of one could be found by trying."""

from collections.abc import Iterable, Iterator

from service.domain.deletion import plain_subject
from service.domain.rows import Example
from service.evidence import rowdigest
from service.store.files import digest_purpose
from service.store.secrets import Secrets


def row_digests(secrets: Secrets, tenant_id: str, rows: Iterable[Example]) -> Iterator[str]:
    return rowdigest.row_digests(row_key(secrets, tenant_id), rows)


def row_key(secrets: Secrets, tenant_id: str) -> bytes:
    """What a tenant's rows are digested with, and nothing else is: who runs a job has it, and reads the job's rows anyway."""
    return secrets.key(f"rows of {tenant_id}")


def subject_digest(secrets: Secrets, tenant_id: str, identifier: str) -> str:
    return secrets.digest(digest_purpose(tenant_id), plain_subject(identifier).encode())
