"""The runner's process as its supervisor holds it: started in a group of its own, spoken to over two pipes, ended.

Linux. The runner asks the kernel to be killed with the *thread* that started it (worker.pipe), so whoever calls `start`
must stay in that thread until the runner has ended.
"""

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import IO

import structlog

from worker.records import RECORDS_FD, Word

CREDENTIALS = frozenset({"DATABASE_URL", "BROKER_URL", "PGPASSWORD", "PGPASSFILE", "PGSERVICEFILE", "MASTER_KEY"})
LINE_MAX_BYTES = 2**20
READ_BYTES = 2**16
LEFTOVER_GONE_S = 10.0
LOG_READ_S = 2.0  # after its end; a child that left its group may hold the pipe open
ACCELERATORS_TOLD_S = 120.0  # a cold import of torch takes long
PR_SET_DUMPABLE = 4  # linux/prctl.h

log = structlog.get_logger(__name__)


class MalformedLine(Exception):
    """A line longer than LINE_MAX_BYTES."""


class Runner:
    """A started runner. Not for several threads."""

    def __init__(self, process: subprocess.Popen[bytes], records_fd: int) -> None:
        self._process = process
        self._records_fd = records_fd
        self._partial = b""
        self._open = True
        self._selector = selectors.DefaultSelector()
        self._selector.register(records_fd, selectors.EVENT_READ)

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it lives; negative: the signal that ended it."""
        return self._process.poll()

    def lines(self, wait_s: float) -> Iterator[bytes]:
        """What it has written meanwhile, without a line's end; waits at most so long. Raises MalformedLine."""
        if not self._open:  # it closed its pipe, but lives
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
        elif self._selector.select(wait_s):
            chunk = os.read(self._records_fd, READ_BYTES)
            self._open = bool(chunk)
            *whole, self._partial = (self._partial + chunk).split(b"\n")
            yield from whole
            if len(self._partial) > LINE_MAX_BYTES:
                raise MalformedLine

    def rest(self) -> Iterator[bytes]:
        """After its end: what is still in the pipe. A child that it left behind may hold the pipe open, so no waiting."""
        while self._open and self._selector.select(0):
            yield from self.lines(0)

    def ask(self, word: Word) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{word}\n".encode())
            self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """To its whole group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def close(self) -> None:
        """Kills whatever is left of its group, and reaps it."""
        self.signal(signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        os.close(self._records_fd)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


@contextmanager
def started(command: Sequence[str], extra_environment: Mapping[str, str], pid_file: Path) -> Iterator[Runner]:
    """A fresh interpreter without our credentials; at the end nothing of its group is alive.

    The log that it writes goes to ours: see `_pass_on`. `pid_file` is for `kill_leftover`.
    """
    read_fd, write_fd = os.pipe()
    try:
        process = subprocess.Popen(  # noqa: S603
            command,
            env=_without_credentials() | {RECORDS_FD: str(write_fd)} | dict(extra_environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write_fd,),
            start_new_session=True,
        )
    except BaseException:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
    assert process.stdout is not None
    logged = Thread(target=_pass_on, args=(process.stdout,), name="runner's log", daemon=True)
    logged.start()
    runner = Runner(process, read_fd)
    try:
        pid_file.write_text(f"{process.pid} {_started_at(process.pid)}")
        yield runner
    finally:
        runner.close()
        logged.join(LOG_READ_S)
        pid_file.unlink(missing_ok=True)


def _pass_on(printed: IO[bytes]) -> None:
    """Copies log lines to our log. Of other output, such as that of C++ libraries, only the length: it may quote a row."""
    with printed:
        while line := printed.readline(LINE_MAX_BYTES):
            if _is_event(line):
                with suppress(OSError, ValueError):  # our own stderr is closed; the runner must not block
                    sys.stderr.write(line.decode())
                    sys.stderr.flush()
            elif not line.isspace():
                log.warning("unstructured runner output omitted", bytes=len(line))


def _is_event(line: bytes) -> bool:
    with suppress(ValueError, RecursionError):
        found = json.loads(line)
        return line.endswith(b"\n") and isinstance(found, dict) and "event" in found
    return False


def kill_leftover(pid_file: Path) -> None:
    """A runner that outlived its supervisor (both were stopped, say) still holds the accelerator: end it.

    The time at which a process started tells it from a later one with the same number.
    """
    with suppress(FileNotFoundError, ValueError):
        pid, started_at = (int(word) for word in pid_file.read_text().split())
        deadline = time.monotonic() + LEFTOVER_GONE_S
        while _started_at(pid) == started_at and time.monotonic() < deadline:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.02)
    pid_file.unlink(missing_ok=True)


def _started_at(pid: int) -> int | None:
    """Clock ticks since boot; None: no such process, or only its entry waits to be reaped."""
    with suppress(FileNotFoundError, ProcessLookupError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else int(fields[18])  # proc(5): field 22 of the line
    return None


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory: in our control group, or where that is not told, at all."""
    for path in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        with suppress(OSError):
            counts = dict(line.split() for line in path.read_text().splitlines())
            return int(counts["oom_kill"])
    return 0


def count_accelerators() -> int:
    """How many CUDA devices torch finds, asked in a process of its own. Raises RuntimeError if it does not say."""
    try:
        asked = subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
            env=_without_credentials(),
            capture_output=True,
            text=True,
            check=True,
            timeout=ACCELERATORS_TOLD_S,
        )
    except subprocess.SubprocessError as error:
        raise RuntimeError(f"torch does not say how many CUDA devices there are: {error}") from error
    return int(asked.stdout)


def keep_secrets() -> None:
    """No process of the same user, so no runner, reads our environment or memory through /proc; unless that user is root.

    Raises OSError if the kernel refuses.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")


def _without_credentials() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.upper() not in CREDENTIALS}
