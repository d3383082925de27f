import errno

import pytest
import torch
from safetensors import SafetensorError

from service.domain.errors import JobFailure, NotFound, StorageFull, StorageUnavailable
from service.domain.job import FailureCode
from worker.failures import failure


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (JobFailure(FailureCode.ROW_TOO_LONG, "too long"), FailureCode.ROW_TOO_LONG),
        (MemoryError(), FailureCode.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), FailureCode.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, "No space left on device"), FailureCode.STORAGE_FULL),
        (SafetensorError("I/O error: No space left on device (os error 28)"), FailureCode.STORAGE_FULL),
        (StorageFull("full"), FailureCode.STORAGE_FULL),
        (StorageUnavailable("away"), FailureCode.ARTIFACT_UPLOAD_FAILED),
        (NotFound("stored file", "x"), FailureCode.ARTIFACT_UPLOAD_FAILED),
    ],
)
def test_the_outside_world_has_codes_of_its_own(error: Exception, code: FailureCode) -> None:
    known = failure(error)
    assert known is not None
    assert known.code is code


def test_what_torch_raises_when_the_cpu_has_no_memory_left_is_recognised() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    known = failure(raised.value)
    assert known is not None
    assert known.code is FailureCode.OUT_OF_MEMORY


def test_an_error_of_ours_is_not_explained_away() -> None:
    assert failure(ValueError("a row of the forget set")) is None
