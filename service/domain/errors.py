"""One tree of errors. HTTP status codes for them live in service/api/errors.py alone.

UnlearnError
├── InvalidRequest        the request cannot be carried out as written; carries one or more FieldProblems
├── NotFound              no such job, file, model, artifact or report
├── Unauthenticated       nobody knows who asks
├── Forbidden             who asks lacks scopes; carries them
├── Gone                  it was there, and was purged
├── InvalidTransition     the job's status does not allow that move
├── PreconditionFailed    the object is no longer at the version that the client has seen
├── KeyReused             an Idempotency-Key came again with another request
├── KeyInFlight           a request with the same Idempotency-Key is being answered
├── QuotaExceeded         who asks has asked too often, or for too much; carries the policy, and when to come back
├── NotReady              it will exist, but not yet (a report before the job ended)
├── TooLarge              a file or a body over the limit
├── StorageFull           the disk or the bucket takes no more
├── StorageUnavailable    the storage root cannot be read or written
│   └── StorageDamaged    what is read there is not what was written, or was sealed with another key
├── ProviderUnavailable   the identity provider does not give its keys
├── HubUnavailable        the Hugging Face Hub does not answer, or not as a Hub does
└── JobFailure            a job ended without a result; carries the closed failure code
"""

from collections.abc import Sequence
from typing import NamedTuple

from service.domain.job import FAILED_ROWS_MAX, FailureCode


class UnlearnError(Exception):
    """Base of every error that this project raises on purpose."""


class FieldProblem(NamedTuple):
    pointer: str  # JSON pointer into the request ("/method/type"), or "" for the whole
    detail: str
    code: str  # short and stable: "enum", "overlap", "line", ...


class InvalidRequest(UnlearnError):
    def __init__(self, *problems: FieldProblem) -> None:
        super().__init__("; ".join(p.detail for p in problems))
        self.problems = problems


class NotFound(UnlearnError):
    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"no {kind} {name!r}")


class Unauthenticated(UnlearnError):
    pass


class Forbidden(UnlearnError):
    def __init__(self, required: Sequence[str]) -> None:
        super().__init__(f"it needs: {', '.join(required)}")
        self.required_scopes = list(required)


class Gone(UnlearnError):
    pass


class InvalidTransition(UnlearnError):
    pass


class PreconditionFailed(UnlearnError):
    pass


class KeyReused(UnlearnError):
    pass


class KeyInFlight(UnlearnError):
    pass


class QuotaExceeded(UnlearnError):
    def __init__(self, policy: str, detail: str, retry_after_s: int) -> None:
        super().__init__(detail)
        self.policy = policy
        self.retry_after_s = retry_after_s


class NotReady(UnlearnError):
    pass


class Overloaded(UnlearnError):
    pass


class TooLarge(UnlearnError):
    pass


class StorageFull(UnlearnError):
    pass


class StorageUnavailable(UnlearnError):
    pass


class StorageDamaged(StorageUnavailable):
    pass


class ProviderUnavailable(UnlearnError):
    pass


class HubUnavailable(UnlearnError):
    pass


class JobFailure(UnlearnError):
    """Args:
    forget_rows: numbers of the rows of the job's forget set that are to blame, from 1; the first of them are kept.
    """

    def __init__(self, code: FailureCode, message: str, forget_rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.forget_rows = list(forget_rows[:FAILED_ROWS_MAX])
