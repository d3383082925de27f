"""Ed25519 signing keys, and their public form: JWKs of RFC 8037, named by their RFC 7638 thumbprints.

A key's id is computed from the key, so a JWKS cannot give one key the name of another. Rotation is a second key: certificates
name the key that signed them, and a key once used stays in the published set.
"""

import base64
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from service.evidence import canonical

KEY_BYTES = 32


class SigningKey(NamedTuple):
    id: str
    private: Ed25519PrivateKey


def generate() -> SigningKey:
    return from_private_bytes(Ed25519PrivateKey.generate().private_bytes_raw())


def from_private_bytes(secret: bytes) -> SigningKey:
    """The key of 32 secret bytes, as `key.private.private_bytes_raw()` gives them. Raises ValueError for another length."""
    private = Ed25519PrivateKey.from_private_bytes(secret)
    return SigningKey(key_id(private.public_key()), private)


def key_id(key: Ed25519PublicKey) -> str:
    """The JWK thumbprint: base64url of SHA-256 over the canonical JSON of the required members.

    >>> x = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"  # RFC 8037, appendix A.3
    >>> key_id(Ed25519PublicKey.from_public_bytes(_decoded(x)))
    'kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k'
    """
    members = canonical.dumps({"crv": "Ed25519", "kty": "OKP", "x": _encoded(key.public_bytes_raw())})
    return _encoded(bytes.fromhex(canonical.sha256(members)))


def jwk(key: Ed25519PublicKey) -> dict[str, str]:
    """The public key as a JWK."""
    x = _encoded(key.public_bytes_raw())
    return {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": key_id(key), "use": "sig", "alg": "EdDSA"}


def jwks(published: Iterable[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    """The set of these JWKs: that of the key in use and those of every earlier one."""
    return {"keys": list(published)}


def parse_jwks(data: bytes) -> dict[str, Ed25519PublicKey]:
    """By id, the Ed25519 keys of a set; keys of other kinds are passed over (RFC 7517, 5).

    Raises ValueError for what is no set of keys, and for a key whose id is not its thumbprint.
    """
    found = canonical.loads(data)
    if not isinstance(found, Mapping) or not isinstance(found.get("keys"), list):
        raise ValueError("it is no JWKS: an object with a list `keys`")
    return dict(_parsed(one) for one in found["keys"] if _ours(one))


def _ours(one: Any) -> bool:
    return isinstance(one, Mapping) and (one.get("kty"), one.get("crv")) == ("OKP", "Ed25519")


def _parsed(one: Mapping[str, Any]) -> tuple[str, Ed25519PublicKey]:
    x = one.get("x")
    raw = _decoded(x) if isinstance(x, str) else b""
    if len(raw) != KEY_BYTES or _encoded(raw) != x:
        raise ValueError(f"key {one.get('kid')!r}: x is not {KEY_BYTES} bytes in base64url")
    key = Ed25519PublicKey.from_public_bytes(raw)
    if one.get("kid", key_id(key)) != key_id(key):
        raise ValueError(f"key {one['kid']!r} is not its own thumbprint, which is {key_id(key)!r}")
    return key_id(key), key


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
