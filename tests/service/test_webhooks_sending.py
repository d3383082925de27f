"""Webhooks without a database: what is said, that it is signed, where it may go, how it is sent, when again."""

import gzip
import json
import socket
import ssl
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from service.webhooks import events, schedule, signing
from service.webhooks.events import EventType, Subject
from service.webhooks.guard import AddressRefused, Rules, pin
from service.webhooks.sender import REPLY_MAX_BYTES, RETRY_AFTER_MAX_S, Delivery, deliver

PUBLIC = "93.184.215.14"
PUBLIC_6 = "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
LOOPBACK = Rules(allow_http=True, networks=(IPv4Network("127.0.0.0/8"),))
MESSAGE = "whmsg_0198a6f0c0de7000800000000000000a"
JOB = Subject("ujob_0198a6f0c0de7000800000000000000a", "unlearning.job", "succeeded")
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


# What is said.


def test_a_body_is_thin() -> None:
    at = datetime(2026, 3, 1, 13, 0, 0, 250_000, timezone(timedelta(hours=1)))
    assert json.loads(events.body(EventType.JOB_SUCCEEDED, at, JOB)) == {
        "type": "unlearning.job.succeeded",
        "timestamp": "2026-03-01T12:00:00.250000Z",
        "data": {"id": JOB.id, "object": "unlearning.job", "status": "succeeded"},
    }


def test_a_body_stays_below_20_kb_and_has_a_zone() -> None:
    with pytest.raises(ValueError, match="20000"):
        events.body(EventType.TEST, NOW, JOB._replace(status="s" * 20_000))
    with pytest.raises(ValueError, match="zone"):
        events.body(EventType.TEST, NOW.replace(tzinfo=None), JOB)


def test_the_events_are_those_of_the_contract() -> None:
    contract = {
        "deletion_request": "received approved denied completed failed requeued overdue",
        "unlearning.job": "queued started paused succeeded failed cancelled",
        "certificate": "issued",
        "webhook": "test",
    }
    assert set(EventType) == {f"{of}.{verb}" for of, verbs in contract.items() for verb in verbs.split()}


# That it is signed: the reference library is the judge.


def now() -> int:
    return int(time.time())


def test_the_reference_library_accepts_a_signature() -> None:
    secret, body = signing.new_secret(), events.body(EventType.JOB_SUCCEEDED, NOW, JOB)
    assert Webhook(secret).verify(body, signing.headers(MESSAGE, now(), body, [secret]))["data"]["id"] == JOB.id


def test_it_refuses_another_body_time_id_or_secret() -> None:
    secret, body = signing.new_secret(), b'{"status":"failed"}'
    signed = signing.headers(MESSAGE, now(), body, [secret])
    forged: list[tuple[str, bytes, dict[str, str]]] = [
        (secret, b'{"status":"succeeded"}', signed),
        (secret, body, signed | {"webhook-timestamp": str(now() + 60)}),
        (secret, body, signed | {"webhook-id": "whmsg_other"}),
        (signing.new_secret(), body, signed),
        (secret, body, signing.headers(MESSAGE, now() - 301, body, [secret])),
    ]
    for with_secret, received, headers in forged:
        with pytest.raises(WebhookVerificationError):
            Webhook(with_secret).verify(received, headers)


def test_during_a_rotation_the_old_and_the_new_secret_verify_and_no_other() -> None:
    old, new, other = (signing.new_secret() for _ in range(3))
    headers = signing.headers(MESSAGE, now(), b"{}", [new, old])
    for secret in (old, new):
        assert Webhook(secret).verify(b"{}", headers) == {}
    with pytest.raises(WebhookVerificationError):
        Webhook(other).verify(b"{}", headers)


def test_a_secret_is_32_random_bytes() -> None:
    secrets = {signing.new_secret() for _ in range(8)}
    assert len(secrets) == 8
    assert {len(b64decode(secret.removeprefix("whsec_"), validate=True)) for secret in secrets} == {32}


NO_KEYS = ["", "c2hvcnQ=", "!" + b64encode(bytes(32)).decode(), *(b64encode(bytes(n)).decode() for n in (23, 65))]


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_is_no_secret_does_not_sign_and_is_not_repeated(key: str) -> None:
    for secret in (f"whsec_{key}", b64encode(bytes(32)).decode()):
        with pytest.raises(ValueError, match="24 to 64 bytes") as raised:
            signing.headers(MESSAGE, now(), b"{}", [secret])
        assert not key or key not in str(raised.value)


# Where it may go.


class Answers:
    """A resolver with prepared answers, one for each time that it is asked; it notes the names."""

    def __init__(self, *answers: Iterable[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, host: str, _port: object, **_: object) -> list[tuple[Any, ...]]:
        self.asked.append(host)
        return [(None, None, 6, "", (address, 0)) for address in self.answers[len(self.asked) - 1]]


def fails(*_: object, **__: object) -> Iterable[tuple[Any, ...]]:
    raise socket.gaierror(socket.EAI_NONAME, "10.0.0.53 says that db.internal is not there")


PRIVATE = {
    "unspecified, private, loopback": "0.0.0.0 0.1.2.3 10.0.0.1 127.0.0.1 127.255.255.255 172.16.0.1 172.31.255.255 192.168.0.1",
    "a provider's inner network": "100.64.0.1 100.127.255.254 198.18.0.1",
    "metadata of clouds": "169.254.169.254 100.100.100.200 192.0.0.192 168.63.129.16 fd00:ec2::254 fe80::a9fe:a9fe",
    "for protocols": "192.0.0.1 192.88.99.1 2001:10::1 100::1 5f00::1",
    "for books": "192.0.2.1 198.51.100.1 203.0.113.1 2001:db8::1",
    "to many, and to nobody": "224.0.0.1 224.0.1.1 239.255.255.250 240.0.0.1 255.255.255.255 ff02::1 ff0e::1",
    "the same in IPv6": ":: ::1 fe80::1 fc00::1 fec0::1",
    "IPv4 within": "::127.0.0.1 ::8.8.8.8 ::ffff:0:127.0.0.1",
    "IPv4 mapped": "::ffff:127.0.0.1 ::ffff:169.254.169.254 ::ffff:10.0.0.1 ::ffff:224.0.1.1",
    "translated": "64:ff9b::127.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b:1::8.8.8.8",
    "6to4": "2002:7f00:1:: 2002:a9fe:a9fe::1 2002:a00:1::",
    "Teredo": "2001:0:808:808:0:0:80ff:fffe 2001:0:7f00:1:0:0:f7f7:f7f7",
}
GLOBAL = [PUBLIC, "8.8.8.8", "100.63.255.255", "100.128.0.1", "172.32.0.1", PUBLIC_6]
CARRIED = ["::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"]


@pytest.mark.parametrize("address", " ".join(PRIVATE.values()).split())
def test_an_address_that_is_not_public_is_refused_however_it_is_given(address: str) -> None:
    for answer in ([address], [PUBLIC, address], [PUBLIC_6, address]):
        with pytest.raises(AddressRefused, match="public") as refused:
            pin("https://hooks.example/", Rules(), Answers(answer))
        assert address not in str(refused.value)  # what our name servers know is not the user's business
    literal = f"[{address}]" if ":" in address else address
    for url in (f"https://{literal}/", f"https://{literal}:8443/x?y"):
        with pytest.raises(AddressRefused, match="public"):
            pin(url, Rules(), Answers())


@pytest.mark.parametrize("address", GLOBAL + CARRIED)
def test_a_public_address_is_pinned(address: str) -> None:
    resolve = Answers([address])
    assert ip_address(pin("https://hooks.example/", Rules(), resolve).address) == ip_address(address)
    assert resolve.asked == ["hooks.example"]


@settings(max_examples=200, deadline=None)
@given(st.ip_addresses(v=4))
def test_an_address_within_another_is_judged_like_itself(inner: IPv4Address) -> None:
    def goes(address: IPv4Address | IPv6Address) -> bool:
        with suppress(AddressRefused):
            return bool(pin("https://hooks.example/", Rules(), Answers([str(address)])))
        return False

    carriers = [0xFFFF << 32, int(IPv6Address("64:ff9b::"))]
    outer = [IPv6Address(carrier | int(inner)) for carrier in carriers]
    outer.append(IPv6Address(0x2002 << 112 | int(inner) << 80))
    assert {goes(address) for address in outer} == {goes(inner)}
    assert inner.is_global or not goes(inner)


SPELLINGS = {
    "short": "https://127.1/ https://127.0.1/ https://127.1./ https://0/ https://127.0.0.1./",
    "decimal": "https://2130706433/ https://134744072/ https://256.1.1.1/ https://1.1.1.1.1/",
    "octal": "https://017700000001/ https://0177.0.0.1/ https://127.0.0.01/ https://010.8.8.8/",
    "hexadecimal": "https://0x7f000001/ https://0x7f.1/ https://0x7f.0.0.0x1/ https://8.8.8.0x8/ https://0x/",
    "brackets": "https://[::ffff:7f00:1]/ https://[0:0::0:1]/ https://[::1].example/ https://[fe80::1%25eth0]/ https://[fe80::1%eth0]/",
    "encoded": "https://%31%32%37.0.0.1/ https://hooks%2eexample/ https://①②⑦.⓪.⓪.①/ https://１２７.0.0.1/ https://127。0。0。1/",
    "no host": "https:///x https://./ https://../ https://a..example/ https://.example/ https://a*b.example/ https:hooks.example",
    "no port": "https://hooks.example:99999/ https://hooks.example:0/ https://hooks.example:y/",
    "user": "https://user@hooks.example/ https://user:secret@hooks.example/",
    "user, nearly none": "https://:@hooks.example/ https://hooks.example@127.0.0.1/",
    "backslash": r"https://hooks.example\@127.0.0.1/ https://127.0.0.1\.hooks.example/",
    "fragment": "https://hooks.example/#part https://hooks.example#@127.0.0.1/",
    "scheme": "http://hooks.example/ ftp://hooks.example/ file:///etc/passwd //hooks.example/ hooks.example",
    "no web": "gopher://127.0.0.1:6379/_x unix:///var/run/docker.sock javascript:alert(1) data:,x",
}
SPACED = [
    "",
    " https://hooks.example/",
    "https://hooks .example/",
    "https://hooks.example\n/",
    "https://hooks.example\r\nHost: x/",
    "https://hooks.example\0.x/",
    "https://hooks.example\t/",
    f"https://{'a' * 64}.example/",
    f"https://{'a.' * 127}example/",
]


@pytest.mark.parametrize("url", [*" ".join(SPELLINGS.values()).split(), *SPACED])
def test_a_url_that_means_something_else_is_refused_before_anybody_is_asked(url: str) -> None:
    resolve = Answers([PUBLIC])
    with pytest.raises(AddressRefused) as refused:
        pin(url, Rules(), resolve)
    assert str(refused.value)
    assert resolve.asked == []


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "localhost.", "ip6-localhost", "a.localhost", "127.0.0.1.nip.io"]
)
def test_names_of_this_machine_are_refused(host: str) -> None:
    for address in ("127.0.0.1", "::1"):
        with pytest.raises(AddressRefused, match="public"):
            pin(f"https://{host}/", Rules(), Answers([address]))
    with pytest.raises(AddressRefused):
        pin("https://localhost/", Rules())  # by the real resolver


@pytest.mark.parametrize(
    ("written", "meant"),
    [("BÜCHER.example.", "xn--bcher-kva.example"), ("Hooks_1.Example", "hooks_1.example"), ("a。example", "a.example")],
)
def test_a_host_is_made_ascii_lower_case_and_without_its_dot(written: str, meant: str) -> None:
    resolve = Answers([PUBLIC])
    target = pin(f"https://{written}:8443/a%20b?c=d", Rules(), resolve)
    assert (target.url.netloc.decode(), target.url.raw_path) == (f"{meant}:8443", b"/a%20b?c=d")
    assert resolve.asked == [meant]


def test_a_name_without_an_address_is_refused_and_the_resolver_not_quoted() -> None:
    for resolve in (fails, Answers([])):
        with pytest.raises(AddressRefused, match=r"^hooks\.example has no address$"):
            pin("https://hooks.example/", Rules(), resolve)


def test_own_networks_are_reached_when_allowed_and_only_these() -> None:
    rules = Rules(networks=(ip_network("10.1.0.0/16"), ip_network("fd12::/16")))
    for address in ("10.1.2.3", "fd12::1", "::ffff:10.1.2.3", PUBLIC):
        assert pin("https://hooks.internal/", rules, Answers([address, PUBLIC])).address == str(ip_address(address))
    for address in ("10.2.0.1", "fd13::1", "::ffff:10.2.0.1", "127.0.0.1", "64:ff9b::10.2.0.1"):
        with pytest.raises(AddressRefused):
            pin("https://hooks.internal/", rules, Answers(["10.1.2.3", address]))
    with pytest.raises(AddressRefused, match="https://"):
        pin("http://hooks.internal/", rules, Answers(["10.1.2.3"]))
    assert pin("http://hooks.internal/", rules._replace(allow_http=True), Answers(["10.1.2.3"])).address == "10.1.2.3"


# How it is sent.


class Server(NamedTuple):
    port: int
    heard: list[bytes]  # one request each


Talk = Callable[[socket.socket], None]


def says(*lines: str, body: bytes = b"") -> Talk:
    head = "\r\n".join([f"HTTP/1.1 {lines[0]}", *lines[1:], f"Content-Length: {len(body)}", "", ""])
    return lambda connection: connection.sendall(head.encode() + body)


@contextmanager
def serving(talk: Talk, tls: ssl.SSLContext | None = None, address: str = "127.0.0.1") -> Iterator[Server]:
    """Hears a request, then talks; one after the other."""
    listener = socket.create_server((address, 0))
    server = Server(listener.getsockname()[1], [])

    def attend() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with suppress(OSError), connection:
                connection.settimeout(5)
                stream = tls.wrap_socket(connection, server_side=True) if tls else connection
                with stream:
                    server.heard.append(_hear(stream))
                    talk(stream)

    thread = threading.Thread(target=attend)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        assert not thread.is_alive()


def _hear(stream: socket.socket) -> bytes:
    heard = b""
    while b"\r\n\r\n" not in heard or len(heard) < _length(heard):
        part = stream.recv(65536)
        if not part:
            break
        heard += part
    return heard


def _length(heard: bytes) -> int:
    head, _, _ = heard.partition(b"\r\n\r\n")
    return len(head) + 4 + int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])


@pytest.fixture(scope="module")
def trust() -> ssl.SSLContext:
    return httpx.create_ssl_context()


@pytest.fixture
def send(trust: ssl.SSLContext) -> Callable[..., Delivery]:
    def sent(url: str, rules: Rules = LOOPBACK, tls: ssl.SSLContext = trust, **others: Any) -> Delivery:
        return deliver(url, {"webhook-id": MESSAGE}, b'{"a":1}', rules=rules, tls=tls, **others)

    return sent


Send = Callable[..., Delivery]


def test_a_message_arrives_signed_and_whole(trust: ssl.SSLContext) -> None:
    secret, body = signing.new_secret(), events.body(EventType.JOB_SUCCEEDED, NOW, JOB)
    with serving(says("202 Accepted", body=b"thanks")) as server:
        url = f"http://127.0.0.1:{server.port}/in%20box?key=%2F"
        answer = deliver(url, signing.headers(MESSAGE, now(), body, [secret]), body, rules=LOOPBACK, tls=trust)
    assert answer == Delivery(202, answer.latency_ms, "thanks", None, None, disables=False)
    assert 0 <= answer.latency_ms < 2000
    head, _, received = server.heard[0].partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) if "signature" not in line else line.split(": ", 1) for line in lines)
    assert first == "POST /in%20box?key=%2F HTTP/1.1"
    assert (headers["host"], headers["content-type"]) == (f"127.0.0.1:{server.port}", "application/json")
    assert Webhook(secret).verify(received, headers)["type"] == "unlearning.job.succeeded"


def test_refused_addresses_are_not_connected_to(send: Send) -> None:
    with serving(says("200 OK")) as server:
        for rules in (Rules(allow_http=True), Rules(networks=LOOPBACK.networks)):
            answer = send(f"http://127.0.0.1:{server.port}/", rules)
            assert (answer.status, answer.reply, answer.disables) == (None, "", False)
            assert answer.error
    assert server.heard == []


def test_a_name_is_resolved_once_and_that_address_connected_to(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the second answer would be another machine."""
    resolve = Answers(["127.0.0.1"], ["127.0.0.2"])
    monkeypatch.setattr(socket, "getaddrinfo", fails)  # and nobody below resolves anything
    with serving(says("200 OK")) as server:
        answer = send(f"http://hooks.example:{server.port}/", resolve=resolve)
    assert (answer.status, answer.error) == (200, None)
    assert resolve.asked == ["hooks.example"]
    assert f"host: hooks.example:{server.port}\r\n" in server.heard[0].decode().lower()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_failure_and_not_followed(status: int, send: Send) -> None:
    with ExitStack() as stack:
        inside = stack.enter_context(serving(says("200 OK")))
        moved = says(f"{status} Moved", f"Location: http://127.0.0.1:{inside.port}/admin")
        server = stack.enter_context(serving(moved))
        answer = send(f"http://127.0.0.1:{server.port}/")
    assert (answer.status, answer.error, answer.disables) == (
        status,
        f"answered {status}, and is not redirected",
        False,
    )
    assert (len(server.heard), inside.heard) == (1, [])


@pytest.mark.parametrize("status", [200, 201, 204, 299, 304, 400, 404, 410, 429, 500, 503])
def test_success_is_2xx_and_410_disables(status: int, send: Send) -> None:
    with serving(says(f"{status} x")) as server:
        answer = send(f"http://127.0.0.1:{server.port}/")
    assert (answer.status, answer.error is None, answer.disables) == (status, 200 <= status < 300, status == 410)


def test_proxies_of_the_environment_are_not_used(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with serving(says("200 OK")) as server:
        assert send(f"http://127.0.0.1:{server.port}/").status == 200


def drips(first: bytes) -> Talk:
    def talk(connection: socket.socket) -> None:
        connection.sendall(first)
        for _ in range(100):
            time.sleep(0.02)
            connection.sendall(b"x")

    return talk


def test_a_server_that_drips_its_headers_holds_nobody(send: Send) -> None:
    with serving(drips(b"HTTP/1.1 200 OK\r\nX-Slow: ")) as server:
        answer = send(f"http://127.0.0.1:{server.port}/", timeout_s=0.4)
    assert (answer.status, answer.error) == (None, "no answer within 0.4 s")
    assert 390 <= answer.latency_ms < 1500


def test_once_the_status_is_there_a_slow_or_broken_rest_changes_nothing(send: Send) -> None:
    with serving(drips(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")) as server:
        answer = send(f"http://127.0.0.1:{server.port}/", timeout_s=0.4)
    assert (answer.status, answer.error) == (200, None)
    assert answer.latency_ms < 1500
    assert 1 <= len(answer.reply) < 100
    with serving(lambda connection: connection.sendall(b"HTTP/1.1 500 x\r\nContent-Length: 9\r\n\r\ncut")) as server:
        answer = send(f"http://127.0.0.1:{server.port}/")
    assert (answer.status, answer.reply) == (500, "cut")


def test_a_slow_resolver_holds_nobody(send: Send) -> None:
    released = threading.Event()

    def slow(*_: object, **__: object) -> list[tuple[Any, ...]]:
        released.wait(5)
        return []

    answer = send("https://hooks.example/", resolve=slow, timeout_s=0.1)
    released.set()
    assert (answer.status, answer.error) == (None, "no answer within 0.1 s")
    assert answer.latency_ms < 2000


def test_resolver_and_server_share_the_time(send: Send) -> None:
    def slow(*_: object, **__: object) -> list[tuple[Any, ...]]:
        time.sleep(0.5)
        return [(None, None, 6, "", ("127.0.0.1", 0))]

    with serving(drips(b"HTTP/1.1 200 OK\r\nX-Slow: ")) as server:
        answer = send(f"http://hooks.example:{server.port}/", resolve=slow, timeout_s=0.6)
    assert answer.status is None
    assert answer.latency_ms < 1000


def test_a_flood_is_cut_off(send: Send) -> None:
    sent = 0

    def flood(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            sent += connection.send(b"y" * 65536)

    with serving(flood) as server:
        answer = send(f"http://127.0.0.1:{server.port}/", timeout_s=3)
    assert (answer.status, answer.reply) == (200, "y" * REPLY_MAX_BYTES)
    assert answer.latency_ms < 2000
    assert sent < 64 * 2**20


def test_a_reply_is_not_unpacked_and_always_text(send: Send) -> None:
    packed = gzip.compress(bytes(10**5))
    assert len(packed) < REPLY_MAX_BYTES
    with serving(says("200 OK", "Content-Encoding: gzip", body=packed)) as server:
        assert send(f"http://127.0.0.1:{server.port}/").reply == packed.decode(errors="replace").replace("\0", "\ufffd")
    with serving(says("500 x", body=b"caf\xc3\xa9 \xff \0 " + "é".encode() * 1000)) as server:
        reply = send(f"http://127.0.0.1:{server.port}/").reply
    assert reply.startswith("café \ufffd \ufffd ")
    assert "\0" not in reply
    assert len(reply.encode()) < 3 * REPLY_MAX_BYTES


def test_what_is_not_http_and_what_is_not_there_is_told(send: Send) -> None:
    with serving(lambda connection: connection.sendall(b"220 mail.example ESMTP\r\n")) as server:
        assert send(f"http://127.0.0.1:{server.port}/").error == "no answer in HTTP"
    with serving(lambda _: None) as server:
        assert send(f"http://127.0.0.1:{server.port}/").error == "no answer in HTTP"
    assert send(f"http://127.0.0.1:{server.port}/").error == "no connection"  # it has been closed


NO_SECONDS = ["9" * 400, "-1", "1.5", "soon", "\u0663", "", f"Sun, 01 Mar 2026 12:00:00 +{'9' * 40}"]


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [("0", 0), ("120", 120), ("999999", RETRY_AFTER_MAX_S), *((value, None) for value in NO_SECONDS)],
)
def test_retry_after_in_seconds(value: str, wait_s: float | None, send: Send) -> None:
    with serving(says("503 x", f"Retry-After: {value}")) as server:
        assert send(f"http://127.0.0.1:{server.port}/").retry_after_s == wait_s


@pytest.mark.parametrize(("from_now_s", "wait_s"), [(90, 90), (-90, 0), (10**6, RETRY_AFTER_MAX_S)])
def test_retry_after_as_a_date(from_now_s: int, wait_s: float, send: Send) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=from_now_s), usegmt=True)
    with serving(says("429 x", f"Retry-After: {date}")) as server:
        assert send(f"http://127.0.0.1:{server.port}/").retry_after_s == pytest.approx(wait_s, abs=2)


def test_a_success_asks_for_no_retry(send: Send) -> None:
    with serving(says("200 OK", "Retry-After: 60")) as server:
        assert send(f"http://127.0.0.1:{server.port}/").retry_after_s is None


# TLS: the address is pinned, the certificate is checked by the name.


class Certified(NamedTuple):
    server: ssl.SSLContext
    client: ssl.SSLContext  # trusts the certificate
    names: list[str | None]  # that clients asked for


def certified(folder: Path, *names: x509.GeneralName) -> Certified:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "webhooks test")])
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(hours=1))
        .not_valid_after(datetime.now(UTC) + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    asked: list[str | None] = []
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem)
    server.sni_callback = lambda _, name, __: asked.append(name)
    return Certified(
        server, ssl.create_default_context(cadata=certificate.public_bytes(serialization.Encoding.PEM).decode()), asked
    )


def test_a_certificate_for_the_name_is_accepted_and_for_another_not(tmp_path: Path, send: Send) -> None:
    made = certified(tmp_path, x509.DNSName("hooks.example"), x509.DNSName("xn--bcher-kva.example"))
    resolve = Answers(*[["127.0.0.1"]] * 4)
    with serving(says("200 OK"), made.server) as server:
        for host in ("hooks.example", "HOOKS.example.", "bücher.example"):
            answer = send(f"https://{host}:{server.port}/", tls=made.client, resolve=resolve)
            assert (answer.status, answer.error) == (200, None)
        refused = send(f"https://other.example:{server.port}/", tls=made.client, resolve=resolve)
    assert made.names == ["hooks.example", "hooks.example", "xn--bcher-kva.example", "other.example"]
    assert (refused.status, len(server.heard)) == (None, 3)
    assert "certificate is not valid for 'other.example'" in str(refused.error)


def test_a_certificate_for_the_address_does_not_stand_for_the_name(tmp_path: Path, send: Send) -> None:
    made = certified(tmp_path, x509.IPAddress(IPv4Address("127.0.0.1")))
    with serving(says("200 OK"), made.server) as server:
        named = send(f"https://hooks.example:{server.port}/", tls=made.client, resolve=Answers(["127.0.0.1"]))
        literal = send(f"https://127.0.0.1:{server.port}/", tls=made.client)
    assert "its certificate is not accepted" in str(named.error)
    assert literal.status == 200  # here the address is what the URL names


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path, send: Send) -> None:
    made = certified(tmp_path, x509.DNSName("hooks.example"))
    with serving(says("200 OK"), made.server) as server:
        answer = send(f"https://hooks.example:{server.port}/", resolve=Answers(["127.0.0.1"]))
    assert (answer.status, server.heard) == (None, [])
    assert "self-signed certificate" in str(answer.error)


def test_a_silent_handshake_ends_in_time(send: Send) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        answer = send(f"https://127.0.0.1:{listener.getsockname()[1]}/", timeout_s=0.2)
    assert answer.error == "no answer within 0.2 s"


# When again.


def test_the_attempts_are_those_of_the_contract() -> None:
    waits = [schedule.next_attempt(made, chance=0) for made in range(11)]
    minute, hour = 60, 3600
    contract = [0, 5, 5 * minute, 30 * minute, 2 * hour, 5 * hour, 10 * hour, 14 * hour, 20 * hour, 24 * hour, None]
    assert waits == contract


@given(st.integers(0, 9), st.floats(0, 1, exclude_max=True), st.none() | st.floats(0, RETRY_AFTER_MAX_S))
def test_jitter_only_lengthens_and_retry_after_is_kept(made: int, chance: float, retry_after_s: float | None) -> None:
    least = max(schedule.DELAYS_S[made], retry_after_s or 0)
    wait = schedule.next_attempt(made, chance, retry_after_s)
    assert wait is not None
    assert least <= wait <= 1.1 * least


def test_retry_after_buys_no_further_attempt() -> None:
    assert schedule.next_attempt(10, 0.5, retry_after_s=1) is None
