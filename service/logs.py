"""Logging set-up of every process: JSON lines on standard error. Standard output is for the output of commands.

Log records and warnings of libraries and uncaught exceptions have the same form. An exception is logged with its type and its
stack frames, without its message, which may quote a row or a subject; see `reason` for the messages that are kept.
"""

import json
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import structlog
from structlog.typing import EventDict, ExcInfo, WrappedLogger

BROKER = frozenset({"redis", "kombu", "limits"})  # packages of its clients, to which no row is given

log = structlog.get_logger(__name__)


def configure(level: str = "INFO") -> None:
    """Applies to the whole process, and replaces an earlier call. Raises KeyError for an unknown level.

    Handlers that libraries have installed are removed: their output is not JSON and may quote data.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    common: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    structlog.configure(
        processors=[*common, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = _Handler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, _of_library],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _with_reasons,
                structlog.processors.ExceptionRenderer(frames),
                structlog.processors.JSONRenderer(),
            ],
            use_get_message=False,
            pass_foreign_args=True,
        )
    )
    for logger in list(logging.Logger.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(number)
    sys.excepthook = _process_ended
    threading.excepthook = _thread_ended
    sys.unraisablehook = _not_raised
    warnings.showwarning = _warned


def frames(exc_info: ExcInfo | tuple[None, None, None]) -> str:
    """Stack frames, and the types of the exception and of its causes; without messages."""
    _, error, trace = exc_info
    if error is None:  # exc_info=True outside an except block
        return ""
    named = " from ".join(_kind(one) for one in _chain(error))
    return "".join(traceback.format_tb(trace)) + named


def reason(error: BaseException) -> str:
    """One line for an exception: its type, and its message where that is known not to quote data.

    Kept are the messages of this project's own exceptions, of the operating system, and of a database or broker that cannot be
    reached (psycopg's OperationalError is not about values). Of a pydantic ValidationError, the fields and the types of its
    errors are kept.
    """
    if type(error).__module__.startswith(("service.", "worker.")):
        return _line(str(error))
    if isinstance(error, OSError):
        return f"{_kind(error)}: {error.strerror}" if error.strerror else _kind(error)
    if fields := getattr(error, "errors", None):  # pydantic's
        with suppress(Exception):
            return f"{_kind(error)}: " + "; ".join(
                f"{'.'.join(map(str, one['loc']))}: {one['type']}" for one in fields()
            )
    cause = getattr(error, "orig", None) or error  # the driver's, of SQLAlchemy's
    if type(cause).__name__ == "OperationalError" or type(cause).__module__.partition(".")[0] in BROKER:
        return f"{_kind(cause)}: {_line(str(cause))}"
    state = getattr(cause, "sqlstate", None)
    return f"{_kind(cause)} (SQLSTATE {state})" if state else _kind(cause)


class _Handler(logging.Handler):
    """Writes to the current sys.stderr and never raises: logging's default error handling prints a record's arguments."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:
            line = json.dumps(
                {"event": "log record could not be formatted", "logger": record.name, "error": _kind(error)}
            )
        with suppress(OSError, ValueError):  # a closed stream
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def _of_library(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Formats a record of the standard library in one line, without the message of an exception in exc_info or its arguments."""
    record: logging.LogRecord = event["_record"]
    arguments, text = event.pop("positional_args", None), str(event["event"])
    if record.exc_info and record.exc_info[1]:
        for error in _chain(record.exc_info[1]):
            for words in (repr(error), str(error)):
                text = text.replace(words, _kind(error)) if words else text
    elif arguments:
        with suppress(TypeError, ValueError, KeyError):
            text %= _by_kind(arguments)
    event["event"] = _line(text)
    return event


def _by_kind(arguments: Any) -> Any:
    if isinstance(arguments, Mapping):
        return {name: _by_kind(value) for name, value in arguments.items()}
    if isinstance(arguments, tuple):
        return tuple(_by_kind(value) for value in arguments)
    return reason(arguments) if isinstance(arguments, BaseException) else arguments


def _with_reasons(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replaces exceptions among the fields, of which JSONRenderer would write the repr."""
    return {name: reason(value) if isinstance(value, BaseException) else value for name, value in event.items()}


def _process_ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    log.critical("process ended by an uncaught exception", error=error, exc_info=(kind, error, trace))


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is None or issubclass(ended.exc_type, SystemExit):
        return
    name = ended.thread.name if ended.thread else None
    log.critical(
        "uncaught exception in a thread", thread=name, exc_info=(ended.exc_type, ended.exc_value, ended.exc_traceback)
    )


def _not_raised(given: "sys.UnraisableHookArgs") -> None:
    if given.exc_value is not None:
        log.error("unraisable exception", exc_info=(given.exc_type, given.exc_value, given.exc_traceback))


def _warned(message: object, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    """Without the message: pydantic's, for example, quotes values."""
    log.warning("Python warning", category=category.__name__, at=f"{filename}:{lineno}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    raised: BaseException | None = error
    while raised is not None:
        yield raised
        raised = raised.__cause__ or raised.__context__


def _kind(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def _line(text: str) -> str:
    return text.partition("\n")[0]
