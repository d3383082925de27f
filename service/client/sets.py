"""Sets of rows on their way to the service."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import httpx

from service.client.shapes import File
from service.client.wire import Wire, at, once
from service.domain.errors import UnlearnError

FILES = "/v1/files"
HEAD_BYTES = 1024
Rows = Path | Iterable[Mapping[str, Any]]  # a file of JSON Lines, or of one JSON array; or the rows
Given = str | Rows  # or the id of one that is there


class Files:
    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def upload(self, purpose: str, rows: Rows) -> File:
        """Raises ApiError, with the number of the line, for rows that are not as the purpose wants them."""
        name = rows.name if isinstance(rows, Path) else f"{purpose}.jsonl"
        with _lines(rows) as content:
            form = {"data": {"purpose": purpose}, "files": {"file": (name, content)}}
            return File.of(self._wire.json("POST", FILES, headers=once(), **form))

    def get(self, file_id: str) -> File:
        return File.of(self._wire.json("GET", at(FILES, file_id)))

    def list(self) -> Iterator[File]:
        """The latest first, those that are purged too."""
        return map(File.of, self._wire.pages(FILES, {}))

    def purge(self, file_id: str) -> None:
        """For ever. Counts and a keyed digest stay."""
        self._wire.json("DELETE", at(FILES, file_id))

    @contextmanager
    def uploaded(self, given: Mapping[str, tuple[str, Given]], keep: bool = True) -> Iterator[dict[str, str]]:
        """name -> (purpose, set) becomes name -> id. What was uploaded is purged again where the block fails, or at its end."""
        made = dict[tuple[str, int | Path], str]()
        ids = dict[str, str]()
        with ExitStack() as undo:
            for name, (purpose, rows) in given.items():
                if isinstance(rows, str):
                    ids[name] = rows
                    continue
                source = (purpose, rows if isinstance(rows, Path) else id(rows))
                if source not in made:
                    made[source] = self.upload(purpose, rows).id
                    undo.callback(self.discard, made[source])
                ids[name] = made[source]
            yield ids
            if keep:
                undo.pop_all()

    def discard(self, file_id: str) -> None:
        """Purge it if that can be done: not where something needs it."""
        with suppress(UnlearnError, httpx.HTTPError):
            self.purge(file_id)


@contextmanager
def _lines(rows: Rows) -> Iterator[IO[bytes]]:
    """JSON Lines. One JSON array, which no line of theirs can be, becomes such."""
    if not isinstance(rows, Path):
        yield _written(rows)
        return
    with rows.open("rb") as file:
        array = file.read(HEAD_BYTES).lstrip().startswith(b"[")
        file.seek(0)
        if not array:
            yield file
            return
        try:
            found = json.load(file)
        except (ValueError, RecursionError):
            raise UnlearnError(f"{rows} begins as a JSON array does, and is none") from None
    yield _written(found)


def _written(rows: Iterable[Any]) -> IO[bytes]:
    return io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())
