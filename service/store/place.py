"""Where a storage lies: what a folder and a bucket do not have in common. Here the folder; `bucket` has the other."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple
from uuid import uuid4

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs


class Place(NamedTuple):
    """Paths are whole ones, "root/key". What is missing is a FileNotFoundError; what else may be raised is in `errors`."""

    fs: AbstractFileSystem
    root: str  # a folder, or "bucket/prefix"
    errors: tuple[type[Exception], ...]
    create: Callable[[], None]  # the root, where that is ours to make
    check: Callable[[], None]  # raises FileNotFoundError where the root is gone
    new: Callable[[str], AbstractContextManager[IO[bytes]]]  # for writing: there at the end, whole, or not at all
    written: Callable[[str], Iterator[tuple[str, datetime]]]  # files below and when; half-written ones by other names
    remove: Callable[[str], None]  # with all below; what is not there is no error


def folder(url: str) -> Place:
    fs, root = url_to_fs(url)
    return Place(
        fs,
        root,
        (OSError,),
        create=partial(os.makedirs, root, exist_ok=True),
        check=partial(_check, root),
        new=partial(_new, root),
        written=partial(_written, root),
        remove=partial(_remove, root),
    )


def _check(root: str) -> None:
    """A volume that is not mounted leaves an empty folder in its place, which nobody can tell from a new root."""
    os.stat(root)


@contextmanager
def _new(root: str, path: str) -> Iterator[IO[bytes]]:
    """Written under another name, moved into place when the disk has it."""
    _check(root)  # else a root that was deleted would silently come back empty
    parent = os.path.dirname(path)
    os.makedirs(parent, exist_ok=True)
    ours = f"{path}.{uuid4().hex}.part"
    try:
        with open(ours, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a crash may leave the new name on an empty file
        os.replace(ours, path)
        ours = path
        _keep_names(parent)  # else a crash may lose the new name, after a row has told of it
    except BaseException:
        with suppress(OSError):
            os.unlink(ours)
        raise


def _keep_names(folder: str) -> None:
    entries = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entries)
    finally:
        os.close(entries)


def _written(root: str, path: str) -> Iterator[tuple[str, datetime]]:
    _check(root)
    for file in Path(path).rglob("*"):
        with suppress(FileNotFoundError):  # somebody deletes it just now
            if file.is_file():
                yield str(file), datetime.fromtimestamp(file.stat().st_mtime, UTC)


def _remove(root: str, path: str) -> None:
    _check(root)
    with suppress(FileNotFoundError):
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
