"""Logs as JSON lines on the standard error stream: the standard output belongs to the commands."""

import logging
import sys
import traceback

import structlog
from structlog.typing import ExcInfo


def frames(exc_info: ExcInfo) -> str:
    """Where it was raised and of what kinds; not its own words, which may quote a row or a subject."""
    kind, error, trace = exc_info
    kinds = [kind]
    raised = error.__cause__ or error.__context__
    while raised is not None:
        kinds.append(type(raised))
        raised = raised.__cause__ or raised.__context__
    named = " from ".join(f"{one.__module__}.{one.__qualname__}" for one in kinds)
    return "".join(traceback.format_tb(trace)) + named


def configure(level: str) -> None:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.ExceptionRenderer(frames),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
