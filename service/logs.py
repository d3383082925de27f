"""The log of every process: JSON lines on the standard error stream; the standard output belongs to the commands.

What a library logs or warns of, and what ends a thread or the process, is written the same way. An error is named by where it was
raised and by its kind, not by its message, which may quote a row or a subject; `reason` has the exceptions to that.
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

log = structlog.get_logger(__name__)


def configure(level: str = "INFO") -> None:
    """For the process as a whole; may be called again, as when the settings are known.

    Handlers that libraries have installed are removed: what they write is no JSON, and may quote data.
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
    """Where it was raised and of what kinds; without its message."""
    _, error, trace = exc_info
    if error is None:  # who logs with exc_info where nothing was raised
        return ""
    named = " from ".join(_kind(one) for one in _chain(error))
    return "".join(traceback.format_tb(trace)) + named


def reason(error: BaseException) -> str:
    """An error in a line: its kind; with its message where that is known to quote no data.

    Messages of this project's own errors are written for whoever reads them; those of a database or a broker that cannot be
    reached, and of the operating system, name hosts and files. Of a value that does not validate, the field is named.
    """
    if type(error).__module__.startswith(("service.", "worker.")):
        return _line(str(error))
    if isinstance(error, OSError):
        return f"{_kind(error)}: {error.strerror or _line(str(error))}"
    if fields := getattr(error, "errors", None):  # pydantic's
        with suppress(Exception):
            return f"{_kind(error)}: " + "; ".join(
                f"{'.'.join(map(str, one['loc']))}: {one['type']}" for one in fields()
            )
    cause = getattr(error, "orig", None) or error  # the driver's, of SQLAlchemy's
    if type(cause).__name__ == "OperationalError":  # psycopg's and kombu's: they do not come from a statement's values
        return f"{_kind(cause)}: {_line(str(cause))}"
    state = getattr(cause, "sqlstate", None)
    return f"{_kind(cause)} (SQLSTATE {state})" if state else _kind(cause)


class _Handler(logging.Handler):
    """Writes to what sys.stderr is at the time, and never fails: logging's own way of failing prints a record's arguments."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:
            line = json.dumps({"event": "a record cannot be rendered", "logger": record.name, "error": _kind(error)})
        with suppress(OSError, ValueError):  # a closed stream
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def _of_library(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """One line; where it comes with an error, or has one among its arguments, without that error's message."""
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
    """Fields that are errors: JSONRenderer would write their repr."""
    return {name: reason(value) if isinstance(value, BaseException) else value for name, value in event.items()}


def _process_ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    log.critical("the process ends", error=error, exc_info=(kind, error, trace))


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is None or issubclass(ended.exc_type, SystemExit):
        return
    name = ended.thread.name if ended.thread else None
    log.critical("a thread ends", thread=name, exc_info=(ended.exc_type, ended.exc_value, ended.exc_traceback))


def _not_raised(given: "sys.UnraisableHookArgs") -> None:
    if given.exc_value is not None:
        log.error("an error that nothing could raise", exc_info=(given.exc_type, given.exc_value, given.exc_traceback))


def _warned(message: object, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    """Its message is left out: pydantic's, for one, quotes values."""
    log.warning("a library warns", category=category.__name__, at=f"{filename}:{lineno}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    raised: BaseException | None = error
    while raised is not None:
        yield raised
        raised = raised.__cause__ or raised.__context__


def _kind(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def _line(text: str) -> str:
    return text.partition("\n")[0]
