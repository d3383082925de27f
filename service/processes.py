"""Child processes of ours, as context managers: a log each, no terminal, gone when we are gone."""

import ctypes
import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_S = 15.0
IDLE_S = 60.0  # a process that starts and for so long uses no processor has stopped
MOST_S = 900.0  # in all, for one that starts
LOOK_S = 1.0  # how often the use of the processor is read
NEWS_S = 5.0  # how often progress is shown
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


def wait(
    process: subprocess.Popen[bytes], name: str, state: Callable[[], str | None], show: Callable[[str], None]
) -> None:
    """Until `state` is None, for as long as the process is at work: a loaded machine starts slowly, and is not given up.

    Args:
        state: None when it is ready; "" while it does not answer; else why it is not ready, from its answer.
        show: gets a line when it is ready, and every few seconds before.

    Raises RuntimeError, which says what was waited for: it ended, it used no processor for 60 s, it answered for 60 s that it
    is not ready, or 15 minutes are over.
    """
    began = moved = looked = shown = time.monotonic()
    ticks = -1
    while (says := state()) is not None:
        now = time.monotonic()
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with exit status {process.returncode} before it was ready")
        if not says and now - looked > LOOK_S:
            looked, before, ticks = now, ticks, _ticks(process.pid)
            moved = moved if ticks == before else now
        if now - moved > IDLE_S or now - began > MOST_S:
            why = says or "no answer yet"
            raise RuntimeError(f"{name} is not ready after {now - began:.0f} s: {why}")
        if now - shown > NEWS_S:
            shown = now
            show(f"{name} is starting, {now - began:.0f} s" + (f": {says}" if says else ""))
        time.sleep(0.05)
    show(f"{name} is ready ({time.monotonic() - began:.1f} s)")


def _ticks(pid: int) -> int:
    """What the process and all below it have used of processors, in the kernel's ticks."""
    used, parents = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            behind_the_name = stat.read_text().rpartition(")")[2]  # which may have spaces
            _state, parent, *rest = behind_the_name.split()
            parents[int(stat.parent.name)] = int(parent)
            used[int(stat.parent.name)] = int(rest[9]) + int(rest[10])
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return sum(used.get(one, 0) for one in below)


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
