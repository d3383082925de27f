"""Keys derived from the deployment's master key, one per purpose (HKDF, RFC 5869); what they digest, and what they seal.

The master key is the one secret to keep: without it no stored set can be read and no API key recognised.
"""

import hmac
import os
from base64 import b64decode, urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as NotBase64
from functools import lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from service.settings import Settings

KEY_BYTES = 32
NONCE_BYTES = 12
VERSION = "v1."  # of the sealed form


class SealBroken(Exception):
    """What was sealed was altered, or sealed for another purpose or under another master key."""


class Secrets:
    def __init__(self, master_key: bytes) -> None:
        if len(master_key) != KEY_BYTES:
            raise ValueError(f"a master key has {KEY_BYTES} bytes, not {len(master_key)}")
        self._master = master_key

    def mac(self, purpose: str) -> hmac.HMAC:
        """An HMAC-SHA-256 to be fed; for what is too long to hold."""
        return hmac.new(self.key(purpose), digestmod="sha256")

    def digest(self, purpose: str, content: bytes) -> str:
        """64 hex digits. Who lacks the key cannot try what was digested."""
        return hmac.digest(_kept(self, purpose), content, "sha256").hex()

    def seal(self, purpose: str, content: bytes) -> str:
        """AES-256-GCM with a random nonce; only `open` with the same purpose reads it."""
        nonce = os.urandom(NONCE_BYTES)
        sealed = AESGCM(self.key(purpose)).encrypt(nonce, content, VERSION.encode())
        return VERSION + urlsafe_b64encode(nonce + sealed).decode()

    def open(self, purpose: str, sealed: str) -> bytes:
        """Raises SealBroken."""
        try:
            raw = urlsafe_b64decode(sealed.removeprefix(VERSION))
            return AESGCM(self.key(purpose)).decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], VERSION.encode())
        except (InvalidTag, ValueError) as error:
            raise SealBroken(f"a sealed {purpose} cannot be opened: altered, or of another MASTER_KEY") from error

    def key(self, purpose: str) -> bytes:
        """32 bytes, from which neither the master key nor another purpose's can be computed."""
        return HKDF(SHA256(), KEY_BYTES, salt=None, info=f"unlearning-service:{purpose}".encode()).derive(self._master)


@lru_cache(maxsize=64)
def _kept(secrets: Secrets, purpose: str) -> bytes:
    """Of digests alone, which have few purposes: each request wants one, and to derive the key takes longer than the digest."""
    return secrets.key(purpose)


def secrets_of(settings: Settings) -> Secrets:
    """Raises RuntimeError where the deployment has no master key, or one that is none."""
    if settings.master_key is None:
        raise RuntimeError("MASTER_KEY is not set: 32 random bytes in base64 (openssl rand -base64 32), kept secret")
    try:
        return Secrets(b64decode(settings.master_key.get_secret_value(), validate=True))
    except (NotBase64, ValueError) as error:
        raise RuntimeError(f"MASTER_KEY is not {KEY_BYTES} bytes in base64") from error
