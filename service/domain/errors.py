"""One tree of errors. HTTP status codes for them live in service/api/errors.py alone.

UnlearnError
├── InvalidRequest        the request cannot be carried out as written; carries one or more FieldProblems
├── NotFound              no such job, file, model, artifact or report
├── InvalidTransition     the job's status does not allow that move
├── NotReady              it will exist, but not yet (a report before the job ended)
├── TooLarge              a file or a body over the limit
├── StorageFull           the disk or the bucket takes no more
├── StorageUnavailable    the storage root cannot be read or written
└── JobFailure            a job ended without a result; carries the closed failure code
"""

from typing import NamedTuple

from service.domain.job import FailureCode


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


class InvalidTransition(UnlearnError):
    pass


class NotReady(UnlearnError):
    pass


class TooLarge(UnlearnError):
    pass


class StorageFull(UnlearnError):
    pass


class StorageUnavailable(UnlearnError):
    pass


class JobFailure(UnlearnError):
    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code = code
