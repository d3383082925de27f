"""The runner's side of worker.records: one record a line to the supervisor, and its two words back."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable

from worker.records import RECORDS_FD, Record

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def open_pipe() -> Callable[[Record], None]:
    """Where records go: the descriptor in UNLEARN_RECORDS_FD, or standard output when run by hand."""
    stream = os.fdopen(int(os.environ.get(RECORDS_FD, "1")), "w", buffering=1, encoding="utf-8")

    def emit(record: Record) -> None:
        stream.write(record.model_dump_json() + "\n")
        stream.flush()

    return emit


def listen() -> Callable[[], bool]:
    """Watch standard input from a thread. Returns whether "cancel" was said; at end of file the process is gone.

    An orphan would keep the accelerator, and could write late. os.read, because a thread that waits in
    sys.stdin.buffer aborts the interpreter when the main thread ends by an exception.
    """
    said = threading.Event()

    def watch() -> None:
        while word := os.read(0, 4096):
            if b"cancel" in word:
                said.set()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    return said.is_set


def die_with_parent() -> None:
    """Linux: SIGKILL when the thread that started this process ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
