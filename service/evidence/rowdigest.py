"""The keyed digest by which evidence names a row: a plain hash of one could be found by trying.

A deletion request keeps those of its rows, and a report gives that of each row that it measured: equal digests are the same row,
also when the text is long gone.
"""

import hmac
from collections.abc import Iterable, Iterator

from service.domain.rows import FORMS, Example
from service.evidence import canonical


def row_digests(key: bytes, rows: Iterable[Example]) -> Iterator[str]:
    """64 hex digits each: HMAC-SHA-256 of the row's canonical JSON, its form's fields alone, since what else a row has changes
    nothing of what is forgotten."""
    keyed = hmac.new(key, digestmod="sha256")
    for row in rows:
        mac = keyed.copy()
        said = (row.answer,) if row.kind == "text" else (row.prompt, row.answer)
        mac.update(canonical.dumps(dict(zip(FORMS[row.kind], said, strict=True))))
        yield mac.hexdigest()
