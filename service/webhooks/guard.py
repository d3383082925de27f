"""Where a webhook may go. A tenant writes the URL and our server calls it: unguarded, that is a way to talk to whatever
our server reaches (server-side request forgery; CVE-2023-46124 is one of fides).

The decision is made on addresses, not on names, and on the very address that is then connected to: a name that resolves
to something else a moment later (DNS rebinding) is not asked again. One public address among private ones does not help.
"""

import re
import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, NamedTuple

import httpx

from service.domain.errors import UnlearnError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolver = Callable[..., Iterable[tuple[Any, ...]]]  # as socket.getaddrinfo

NAME = re.compile(r"(?!.{254})[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
NUMBER = re.compile(r"(.*\.)?(\d+|0x[0-9a-f]*)")  # resolvers read 127.1, 2130706433 and 0x7f.1 as addresses
GLOBAL_UNICAST = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")
PORT_MAX = 65535
NOT_FOR_US = (  # global by the registry's letter
    IPv4Network("192.0.0.0/24"),  # IETF protocols; 192.0.0.192 is a cloud's metadata service
    IPv4Network("192.88.99.0/24"),  # relays of 6to4, withdrawn
    IPv4Network("168.63.129.16/32"),  # a cloud's host, as its guests see it
)


class AddressRefused(UnlearnError):
    """Its text is for the user who gave the URL; it does not tell what our name servers answered."""


class Rules(NamedTuple):
    allow_http: bool = False  # otherwise https only
    networks: tuple[Network, ...] = ()  # our own that may be called, though they are not public


class Target(NamedTuple):
    url: httpx.URL  # its host is ASCII, without a trailing dot
    address: str  # the one to connect to


def pin(url: str, rules: Rules, resolve: Resolver = socket.getaddrinfo) -> Target:
    """Asks `resolve` once, or never where the host is an address. AddressRefused where we do not go."""
    parsed = _parsed(url, rules)
    host = parsed.raw_host.decode("ascii")
    addresses = [_literal(host)] if _is_literal(host) else _resolved(host, resolve)
    if not all(_allowed(address, rules) for address in addresses):
        raise AddressRefused(f"{host} does not lead to public addresses only")
    return Target(parsed, str(addresses[0]))


def _parsed(url: str, rules: Rules) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise AddressRefused(f"this is not a URL: {error}") from None
    schemes = ("https", "http") if rules.allow_http else ("https",)
    if parsed.scheme not in schemes:
        raise AddressRefused(f"a webhook's URL begins with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    if parsed.userinfo:
        raise AddressRefused("a webhook's URL has no user name and no password: its calls are signed")
    if parsed.fragment:
        raise AddressRefused("a webhook's URL has no fragment: it would not be sent")
    if parsed.port is not None and not 1 <= parsed.port <= PORT_MAX:
        raise AddressRefused(f"a port is between 1 and {PORT_MAX}")
    return parsed.copy_with(host=parsed.raw_host.decode("ascii").removesuffix("."))


def _is_literal(host: str) -> bool:
    return ":" in host or NUMBER.fullmatch(host) is not None


def _literal(host: str) -> Address:
    try:
        return ip_address(host)
    except ValueError:
        raise AddressRefused("an address is written as 192.0.2.1 or [2001:db8::1]") from None


def _resolved(host: str, resolve: Resolver) -> list[Address]:
    """In the order of the resolver, which knows what can be reached from here."""
    if NAME.fullmatch(host) is None:
        raise AddressRefused("a webhook's URL has no valid host name")
    try:
        answers = resolve(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        answers = ()
    addresses = [ip_address(answer[4][0]) for answer in answers]
    if not addresses:
        raise AddressRefused(f"{host} has no address")
    return addresses


def _allowed(address: Address, rules: Rules) -> bool:
    return all(
        _is_public(part) or any(part in network for network in rules.networks) for part in _what_it_reaches(address)
    )


def _what_it_reaches(address: Address) -> list[Address]:
    """An IPv6 address may carry an IPv4 one, to which a translator or a tunnel leads."""
    if isinstance(address, IPv4Address):
        return [address]
    if address.ipv4_mapped:
        return [address.ipv4_mapped]
    if address in NAT64:
        return [IPv4Address(address.packed[-4:])]
    return [address, address.sixtofour] if address.sixtofour else [address]  # of Teredo, none is global


def _is_public(address: Address) -> bool:
    if address.version == 6 and address not in GLOBAL_UNICAST:
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in NOT_FOR_US)
