"""Errors of the outside world in the words of a job's failure: what a user is told, and whether it is worth another attempt."""

from service.domain.errors import JobFailure, NotFound, StorageFull, StorageUnavailable
from service.domain.job import FailureCode
from service.store.storage import FULL

# Of a plain RuntimeError (torch, on the CPU) and of safetensors: they have no types of their own for it.
OUT_OF_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")
FULL_WORDS = tuple(f"os error {number})" for number in sorted(FULL))


def failure(error: Exception) -> JobFailure | None:
    """None: an error of ours. The message never quotes the error's own text, which may quote data."""
    words = str(error).lower()
    if isinstance(error, JobFailure):
        return error
    if isinstance(error, MemoryError) or any(sign in words for sign in OUT_OF_MEMORY_WORDS):
        return JobFailure(FailureCode.OUT_OF_MEMORY, f"out of memory ({type(error).__name__})")
    full = isinstance(error, OSError) and error.errno in FULL
    if full or isinstance(error, StorageFull) or any(sign in words for sign in FULL_WORDS):
        return JobFailure(FailureCode.STORAGE_FULL, "the disk or the storage takes no more")
    if isinstance(error, StorageUnavailable | NotFound):
        return JobFailure(FailureCode.ARTIFACT_UPLOAD_FAILED, str(error))
    return None
