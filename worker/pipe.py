"""The runner's side of worker.records: one record a line to the supervisor, and its two words back."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable

from worker.records import RECORDS_FD, Record, Word

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def open_pipe() -> Callable[[Record], None]:
    """Where records go: the descriptor in UNLEARN_RECORDS_FD, or standard output when run by hand."""
    stream = os.fdopen(int(os.environ.get(RECORDS_FD, "1")), "w", buffering=1, encoding="utf-8")

    def emit(record: Record) -> None:
        stream.write(record.model_dump_json() + "\n")
        stream.flush()

    return emit


def listen() -> Callable[[], Word | None]:
    """Watch standard input from a thread. Returns what was asked for, if anything; at end of file the process is gone.

    Who has been asked to cancel cannot be asked to pause any more. An orphan would keep the accelerator, and could write
    late. os.read, because a thread that waits in sys.stdin.buffer aborts the interpreter when the main thread ends by an
    exception.
    """
    said: set[str] = set()

    def watch() -> None:
        while words := os.read(0, 4096):
            said.update(words.decode().split())
        os.kill(os.getpid(), signal.SIGKILL)

    def asked() -> Word | None:
        return "cancel" if "cancel" in said else "pause" if "pause" in said else None

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    return asked


def die_with_parent() -> None:
    """Linux: SIGKILL when the thread that started this process ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
