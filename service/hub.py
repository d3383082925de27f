"""Files of public data sets on the Hugging Face Hub, at one commit: fetched, and read as JSON Lines.

No token is sent, so nobody reads through the service what its operator alone may read.
"""

import json
from codecs import BOM_UTF8, getreader
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from functools import partial
from http import HTTPStatus
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from httpx2 import HTTPError
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from service.domain import rows
from service.domain.errors import FieldProblem, HubUnavailable, InvalidRequest, StorageFull
from service.domain.job import HubFile

PARQUET = b"PAR1"  # how such a file begins
HEAD_BYTES = 2**10
READ_CHARS = 2**14
TRY_AGAIN = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})


@contextmanager
def fetched(asked: HubFile, endpoint: str, max_bytes: int, pointer: str) -> Iterator[Path]:
    """The file as it is in the repository, until the context ends.

    Raises InvalidRequest, its pointers below `pointer`, for what is not there, is no commit, or is larger than `max_bytes`:
    nothing is fetched then. Raises HubUnavailable, and StorageFull when the disk for temporary files is.
    """
    endpoint = endpoint.rstrip("/")
    with TemporaryDirectory(prefix="unlearn-hub-") as folder:
        with _in_our_words(asked, endpoint, pointer):
            _judge(asked, endpoint, max_bytes, pointer)
            path = hf_hub_download(
                asked.repo,
                asked.path,
                repo_type="dataset",
                revision=asked.revision,
                endpoint=endpoint,
                cache_dir=folder,
                token=False,
            )
        yield Path(path)


def lines(content: IO[bytes], columns: Mapping[str, str], max_bytes: int, pointer: str) -> Iterator[bytes]:
    """The rows as JSON Lines, columns renamed (ours -> theirs); those of JSON Lines that keep their names, as they are.

    A line that is no row is passed on: whoever judges it names its number. Raises InvalidRequest for a file that is no
    array or no Parquet though it begins as one, for a row that lacks a column that is to be renamed, and for more than
    `max_bytes` of lines: Parquet can say the same a million times in a few bytes.
    """
    left = max_bytes
    for line in _renamed(_found(content, pointer), columns, pointer):
        left -= len(line) + 1
        if left < 0:
            raise _too_large(pointer, max_bytes, "becomes more than that as JSON Lines")
        yield line


def _found(content: IO[bytes], pointer: str) -> Iterator[bytes]:
    content.seek(0)
    head = content.read(HEAD_BYTES)
    content.seek(0)
    if head.startswith(PARQUET):
        return _of_parquet(content, pointer)
    if head.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
        return _of_array(content, pointer)
    return rows.lines(content)


def _judge(asked: HubFile, endpoint: str, max_bytes: int, pointer: str) -> None:
    url = hf_hub_url(asked.repo, asked.path, repo_type="dataset", revision=asked.revision, endpoint=endpoint)
    metadata = get_hf_file_metadata(url, token=False, endpoint=endpoint)
    if metadata.commit_hash is None or metadata.size is None:
        raise HubUnavailable(f"{endpoint} does not answer as a Hub does: it tells no commit, or no size")
    if metadata.commit_hash != asked.revision:  # a branch or a tag may be named like a commit
        detail = f"{asked.revision} is not a commit of {asked.repo}, but a name for {metadata.commit_hash}"
        raise InvalidRequest(FieldProblem(f"{pointer}/revision", detail, "revision"))
    if metadata.size > max_bytes:
        raise _too_large(pointer, max_bytes, f"has {metadata.size}")


def _too_large(pointer: str, max_bytes: int, what: str) -> InvalidRequest:
    return InvalidRequest(
        FieldProblem(f"{pointer}/path", f"at most {max_bytes} bytes are taken; it {what}", "too_large")
    )


@contextmanager
def _in_our_words(asked: HubFile, endpoint: str, pointer: str) -> Iterator[None]:
    """Errors of the Hub's client: those of the request name the field that is wrong."""

    def refused(field: str, detail: str) -> InvalidRequest:
        return InvalidRequest(FieldProblem(f"{pointer}/{field}", detail, "hub_not_found"))

    try:
        yield
    except GatedRepoError as error:
        raise refused("repo", f"{asked.repo} is gated; upload the file instead (POST /v1/files)") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise refused("repo", f"the Hub has no public data set {asked.repo!r}") from error
    except RevisionNotFoundError as error:
        raise refused("revision", f"{asked.repo} has no commit {asked.revision}") from error
    except LocalEntryNotFoundError as error:  # what the client makes of a Hub that fell silent
        raise HubUnavailable(f"the Hub at {endpoint} does not answer") from error
    except EntryNotFoundError as error:
        raise refused("path", f"{asked.repo} has no file {asked.path!r} at {asked.revision}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in TRY_AGAIN:
            raise refused("path", f"the Hub refuses {asked}, with status {status}") from error
        raise HubUnavailable(f"the Hub at {endpoint} fails, with status {status}") from error
    except (HTTPError, FileMetadataError, XetDownloadError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
            raise StorageFull("no room for a file of the Hub, on its way to the storage") from error
        raise HubUnavailable(f"the Hub at {endpoint} does not answer ({type(error).__name__})") from error


# --- other forms, as lines


def _of_array(content: IO[bytes], pointer: str) -> Iterator[bytes]:
    """The elements of one JSON array, which need not fit into memory."""
    read = partial(getreader("utf-8-sig")(content).read, READ_CHARS)
    try:
        rest = _to_text(_to_text("", read)[1:], read)
        separated = True
        while rest[0] != "]":
            if not separated:
                raise ValueError("two elements without a comma")
            element, rest = _element(rest, read)
            yield _line(element)
            rest = _to_text(rest, read)
            if separated := rest[0] == ",":
                rest = _after_comma(rest, read)
        if rest[1:].strip() or any(chunk.strip() for chunk in iter(read, "")):
            raise ValueError("more than the array")
    except (ValueError, RecursionError) as error:
        detail = f"begins as a JSON array does, and is not one of rows below {rows.LINE_MAX_BYTES} bytes"
        raise InvalidRequest(FieldProblem(pointer, detail, "array")) from error


def _to_text(rest: str, read: Callable[[], str]) -> str:
    """What follows white space. Raises ValueError at the end of the file."""
    while not (rest := rest.lstrip()):
        if not (rest := read()):
            raise ValueError("the array does not end")
    return rest


def _after_comma(rest: str, read: Callable[[], str]) -> str:
    rest = _to_text(rest[1:], read)
    if rest[0] == "]":
        raise ValueError("a comma behind the last element")
    return rest


def _element(rest: str, read: Callable[[], str]) -> tuple[Any, str]:
    """The value that the text begins with, read on until it is whole or too long, and what comes after it."""
    decoder = json.JSONDecoder()
    while True:
        try:
            value, end = decoder.raw_decode(rest)
            return value, rest[end:]
        except json.JSONDecodeError:
            more = read() if len(rest) <= rows.LINE_MAX_BYTES else ""
            if not more:
                raise
            rest += more


def _of_parquet(content: IO[bytes], pointer: str) -> Iterator[bytes]:
    try:
        # What installs us does not bring it.
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        detail = "a Parquet file, which this deployment cannot read (no pyarrow); upload the rows as JSON Lines instead"
        raise InvalidRequest(FieldProblem(f"{pointer}/path", detail, "parquet")) from error
    try:
        # A row at a time: a file of kilobytes may say the same hundred megabytes again in each.
        for row in parquet.ParquetFile(content).iter_batches(batch_size=1):
            yield from map(_line, row.to_pylist())
    except (arrow.ArrowException, OSError) as error:
        detail = "begins as a Parquet file does, and cannot be read as one"
        raise InvalidRequest(FieldProblem(f"{pointer}/path", detail, "parquet")) from error


def _renamed(found: Iterable[bytes], columns: Mapping[str, str], pointer: str) -> Iterator[bytes]:
    if not columns:
        yield from found
        return
    theirs = set(columns.values())
    for number, line in enumerate(found, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            yield line
            continue
        if missing := sorted(theirs - row.keys()):
            detail = f"line {number}: lacks {' and '.join(missing)}"
            raise InvalidRequest(FieldProblem(f"{pointer}/columns", detail, "line"))
        kept = {name: value for name, value in row.items() if name not in theirs}
        yield _line(kept | {ours: row[name] for ours, name in columns.items()})


def _line(row: Any) -> bytes:
    # Half a surrogate pair comes out as JSON's reader takes it in: it is for the judge to refuse. Parquet has types that
    # JSON lacks, in columns that nobody here reads.
    return json.dumps(row, ensure_ascii=False, default=str).encode(errors="surrogatepass")
