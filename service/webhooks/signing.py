"""The signature of Standard Webhooks 1.0, symmetric: HMAC-SHA256 of "{id}.{timestamp}.{body}".

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence

PREFIX = "whsec_"
NEW_BYTES = 32
ALLOWED_BYTES = range(24, 65)


def new_secret() -> str:
    return PREFIX + base64.b64encode(secrets.token_bytes(NEW_BYTES)).decode()


def headers(message_id: str, sent_at: int, body: bytes, signed_with: Sequence[str]) -> dict[str, str]:
    """Headers of one attempt.

    message_id: the same at every attempt, by it a receiver knows a repetition. sent_at: Unix seconds of this attempt, a
    receiver refuses what is older than its tolerance. signed_with: the endpoint's secrets; during a rotation the new and
    the old one, so that a receiver that has either accepts.
    """
    content = b"%s.%d.%s" % (message_id.encode(), sent_at, body)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(sent_at),
        "webhook-signature": " ".join(_signature(secret, content) for secret in signed_with),
    }


def _signature(secret: str, content: bytes) -> str:
    return "v1," + base64.b64encode(hmac.digest(_key(secret), content, hashlib.sha256)).decode()


def _key(secret: str) -> bytes:
    """ValueError, without the secret in its text, where it is none."""
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith(PREFIX) or len(key) not in ALLOWED_BYTES:
        raise ValueError(f"a webhook secret is {PREFIX} and base64 of 24 to 64 bytes")
    return key
