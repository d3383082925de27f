"""The sets that a request brings: ids of uploaded files, or rows in its own body, which become files."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from sqlalchemy.orm import Session

from service.api.deps import Parts, uploaded
from service.domain import rows
from service.domain.errors import FieldProblem, InvalidRequest, UnlearnError
from service.domain.identity import Principal
from service.domain.job import Row
from service.domain.rows import Example
from service.store import files
from service.store.files import Kept

Given = str | list[Row] | None


class Inline(NamedTuple):
    """Rows of the request, on their way to becoming a file."""

    purpose: str
    rows: int
    kept: Kept


@contextmanager
def opened(here: Parts, given: Given, purpose: str) -> Iterator[Iterator[Example]]:
    """The rows of a set. Raises InvalidRequest where it cannot be had; reading it, where rows are wrong or there are none."""
    if isinstance(given, list):
        yield _inline_rows(given, purpose)
        return
    assert given is not None
    with uploaded(here, given, purpose, f"/{purpose}") as content:
        yield rows.each(rows.lines(content), f"/{purpose}")


@contextmanager
def inline_files(here: Parts, who: Principal, given: Mapping[str, Given]) -> Iterator[list[Inline]]:
    """The bytes of those sets that are rows, by purpose, stored; gone again if the request is refused.

    An error that is not a refusal may hide a commit that took place: then the bytes stay, for somebody may need them.
    """
    inline: list[Inline] = []
    try:
        for purpose, rows_given in given.items():
            if isinstance(rows_given, list):
                kept = files.keep(
                    here.storage, here.secrets, who.tenant, f"{purpose}.jsonl", (line(row) for row in rows_given)
                )
                inline.append(Inline(purpose, len(rows_given), kept))
        yield inline
    except UnlearnError:
        for one in inline:
            here.storage.delete(files.file_key(one.kept.file_id))
        raise


def insert(s: Session, inline: list[Inline]) -> None:
    """The rows in the database that make files of them, with the caller's commit."""
    for one in inline:
        files.insert(s, one.kept, purpose=one.purpose, rows=one.rows)


def _inline_rows(given: list[Row], purpose: str) -> Iterator[Example]:
    problems = []
    for index, row in enumerate(given):
        try:
            yield rows.parse(rows.capped(line(row).removesuffix(b"\n")))
        except ValueError as error:
            problems.append(FieldProblem(f"/{purpose}/{index}", f"row {index + 1}: {error}", "line"))
    if problems:
        raise InvalidRequest(*problems)


def line(row: Row) -> bytes:
    return json.dumps(row.model_dump(exclude_none=True), ensure_ascii=False).encode() + b"\n"
