"""Child processes of ours, as context managers: a log each, no terminal, gone when we are gone."""

import ctypes
import errno
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_S = 15.0
TAIL_LINES = 15
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def running(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a session of its own, so that Ctrl-C reaches us alone and we stop what we started in order.

    At the end: SIGTERM, after 15 s SIGKILL, and SIGKILL to what is left of its group. If we die without getting there,
    the kernel kills it. The kernel watches the thread that started it: enter this in the main one.
    """
    libc = ctypes.CDLL(None)  # loaded here: between fork and exec is no place for it
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL)),
        )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def interruptible() -> Iterator[None]:
    """The first of SIGINT, SIGTERM, SIGHUP raises SystemExit(128 + its number); while we clean up, more are ignored."""

    def leave(number: int, _frame: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines, for whoever has to be told why a process ended."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens there now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do: what lingers of a closed one is no bar.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
