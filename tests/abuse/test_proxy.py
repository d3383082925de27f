"""The proxy does to a plain echo server what its faults say."""

import socket
import time
from collections.abc import Iterator
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Thread

import pytest

from tests.abuse.proxy import REFUSED, SILENT, Fault, Proxy, proxy


class Echo(BaseRequestHandler):
    def handle(self) -> None:
        while chunk := self.request.recv(2**16):
            self.request.sendall(chunk)


@pytest.fixture
def through() -> Iterator[Proxy]:
    with ThreadingTCPServer(("127.0.0.1", 0), Echo) as echo:
        echo.daemon_threads = True
        Thread(target=echo.serve_forever, args=(0.02,), daemon=True).start()
        with proxy(("127.0.0.1", echo.server_address[1])) as made:
            yield made
        echo.shutdown()


def connected(through: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", through.port), timeout=10)


def echoed(client: socket.socket, sent: bytes) -> bytes:
    client.sendall(sent)
    received = b""
    while len(received) < len(sent) and (chunk := client.recv(2**16)):
        received += chunk
    return received


def test_without_a_fault_everything_passes_and_an_end_is_passed_on(through: Proxy) -> None:
    sent = bytes(range(256)) * 4096
    with connected(through) as client:
        assert echoed(client, sent) == sent
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert (through.connections, through.answered) == (1, len(sent))


def test_a_delay_holds_for_each_direction(through: Proxy) -> None:
    with connected(through) as client, through.fault(Fault(delay_s=0.2)):
        began = time.monotonic()
        assert echoed(client, b"x") == b"x"
        assert time.monotonic() - began >= 0.4


def test_what_refuses_resets_what_is_open_and_listens_again_where_it_did(through: Proxy) -> None:
    with connected(through) as client:
        with through.fault(REFUSED):
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            with pytest.raises(ConnectionRefusedError):
                connected(through)
        with connected(through) as again:
            assert echoed(again, b"x") == b"x"


def test_silence_takes_connections_and_lets_nothing_pass_until_it_heals(through: Proxy) -> None:
    with connected(through) as opened:
        with through.fault(SILENT):
            late = connected(through)
            for client in (opened, late):
                client.settimeout(0.2)
                client.sendall(b"x")
                with pytest.raises(TimeoutError):
                    client.recv(1)
                client.settimeout(10)
        assert opened.recv(1) == late.recv(1) == b"x"
        late.close()


@pytest.mark.parametrize("side", ["request_bytes", "answer_bytes"])
def test_a_cut_comes_after_so_many_bytes_of_each_connection_since_the_fault(through: Proxy, side: str) -> None:
    with connected(through) as opened:
        assert echoed(opened, b"before") == b"before"
        with through.fault(Fault(**{side: 3})):
            for client in (opened, connected(through)):
                assert echoed(client, b"abc") == b"abc"
                client.sendall(b"d")
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
                client.close()


def test_an_answer_trickles_and_the_rest_comes_at_once_when_it_heals(through: Proxy) -> None:
    with connected(through) as client:
        with through.fault(Fault(bytes_per_s=20)):
            client.sendall(b"x" * 1000)
            time.sleep(0.5)
            assert 1 <= len(client.recv(1000)) <= 20
        received = 0
        while received < 900:
            received += len(client.recv(1000))


def test_a_server_that_is_away_is_a_reset(through: Proxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with proxy(("127.0.0.1", port)) as made, pytest.raises(ConnectionResetError), connected(made) as client:
        client.recv(1)
