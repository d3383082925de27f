"""Keyed digests of rows and of people's identifiers: a plain hash of one could be found by trying."""

from collections.abc import Iterable, Iterator

from service.domain.deletion import plain_subject
from service.domain.rows import FORMS, Example
from service.evidence import canonical
from service.store.files import digest_purpose
from service.store.secrets import Secrets


def row_digests(secrets: Secrets, tenant_id: str, rows: Iterable[Example]) -> Iterator[str]:
    """Of each row's canonical JSON, its form's fields alone: what else a row has changes nothing of what is forgotten."""
    keyed = secrets.mac(digest_purpose(tenant_id))
    for row in rows:
        mac = keyed.copy()
        said = (row.answer,) if row.kind == "text" else (row.prompt, row.answer)
        mac.update(canonical.dumps(dict(zip(FORMS[row.kind], said, strict=True))))
        yield mac.hexdigest()


def subject_digest(secrets: Secrets, tenant_id: str, identifier: str) -> str:
    return secrets.digest(digest_purpose(tenant_id), plain_subject(identifier).encode())
