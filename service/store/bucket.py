"""A storage in a bucket of S3, or of what speaks as it does. The bucket is the operator's to make.

An object appears whole, when its upload is completed: there is no other name to write under, and to move would be to copy.
Credentials and endpoint come from the environment, as every client of AWS reads them (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, ...) or as fsspec does (FSSPEC_S3_KEY, FSSPEC_S3_ENDPOINT_URL, ...).
"""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from hashlib import sha256
from typing import IO, Any

from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import BotoCoreError, ReadTimeoutError
from fsspec.config import conf
from fsspec.core import url_to_fs
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS

from service.store.place import Place

BLOCK_BYTES = 8 * 2**20  # of an upload's part, of which S3 takes 10,000, and of what is read ahead
TRIES = 2  # of s3fs, which asks again for a body that broke off; each with the attempts of botocore
REQUEST_S = 30.0  # and the time for a body, on the slowest line that we bear with
BYTES_PER_S = 2**16
COMPLETION_S = 300.0  # to put an upload's parts together, which "could take several minutes"
PART = re.compile(r"\.[0-9a-f]{32}\.part$")
ERRORS = (OSError, BotoCoreError, *S3_RETRYABLE_ERRORS)


class _Session(AIOHTTPSession):  # type: ignore[misc]
    """No request lasts for ever: aiohttp's own limits begin when the body is sent, and it waits for leave to send it."""

    async def send(self, request: Any) -> Any:
        sizes = (request.headers.get(name) for name in ("X-Amz-Decoded-Content-Length", "Content-Length"))
        limit_s = REQUEST_S + int(next(filter(None, sizes), 0)) / BYTES_PER_S
        if request.method == "POST" and "uploadId=" in request.url:
            limit_s = request.context["read_timeout"] = COMPLETION_S
        try:
            async with asyncio.timeout(limit_s):
                return await super().send(request)
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url=request.url, error=error) from error


KNOBS = {
    "default_block_size": BLOCK_BYTES,
    "use_listings_cache": False,  # others write and delete, too
}
CONFIG = {
    "connect_timeout": 5,  # seconds
    "read_timeout": 15,
    "retries": {"mode": "standard", "total_max_attempts": 3},
    "http_session_cls": _Session,
}


def bucket(url: str) -> Place:
    """`url`: "s3://bucket/prefix". What FSSPEC_S3_* says comes before our own knobs."""
    told = conf.get("s3", {})
    config = CONFIG | told.get("config_kwargs", {})
    fs, root = url_to_fs(url, **(KNOBS | told | {"config_kwargs": config}))
    fs.retries = TRIES
    name = root.partition("/")[0]
    return Place(
        fs,
        root,
        ERRORS,
        create=lambda: None,
        check=lambda: fs.call_s3("head_bucket", Bucket=name),
        new=partial(_new, fs),
        written=partial(_written, fs),
        remove=partial(_remove, fs),
    )


@contextmanager
def _new(fs: S3FileSystem, path: str) -> Iterator[IO[bytes]]:
    file = fs.open(path, "wb")
    try:
        yield file
        file.close()
    except BaseException:
        file.closed = True  # first of all: to close is to publish, and so is to be collected
        with suppress(*ERRORS):
            file.discard()
        raise


def _written(fs: S3FileSystem, path: str) -> Iterator[tuple[str, datetime]]:
    for name, told in fs.find(path, detail=True).items():
        if told["type"] == "file":  # what is empty may be told of as a folder
            yield name, told["LastModified"]
    for upload in _uploads(fs, path):
        yield f"{fs.split_path(path)[0]}/{_name(upload)}", upload["Initiated"]


def _remove(fs: S3FileSystem, path: str) -> None:
    """One by one: where several are deleted in one request, s3fs passes over those that the server refuses."""
    for name in {path, *fs.find(path)}:
        fs.rm_file(name)
    for upload in _uploads(fs, path):
        fs.abort_mpu(fs.split_path(path)[0], upload["Key"], upload["UploadId"])


def _uploads(fs: S3FileSystem, path: str) -> list[dict[str, Any]]:
    """Of whom was killed: begun, never completed. Nobody sees them, but they are kept, and paid for."""
    name, key, _ = fs.split_path(path)
    found: list[dict[str, Any]] = []
    more = {"Prefix": PART.sub("", key)}
    while more:
        told = fs.call_s3("list_multipart_uploads", Bucket=name, **more)
        found += told.get("Uploads", [])
        after = {"KeyMarker": told.get("NextKeyMarker"), "UploadIdMarker": told.get("NextUploadIdMarker")}
        more = more | after if told.get("IsTruncated") else {}
    return [one for one in found if key in (one["Key"], _name(one)) or one["Key"].startswith(f"{key}/")]


def _name(upload: dict[str, Any]) -> str:
    """As a half-written file has one in a folder: the object of the same key may be there, and a row may name it."""
    return f"{upload['Key']}.{sha256(upload['UploadId'].encode()).hexdigest()[:32]}.part"
