"""Importing takes seconds, and nothing has begun: Ctrl-C ends the process then, as any program, without a traceback."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread


@contextmanager
def importing() -> Iterator[None]:
    """Within it SIGINT has its default effect. Where somebody ignores or handles it, and off the main thread, nothing changes."""
    if current_thread() is not main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
