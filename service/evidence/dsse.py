"""DSSE 1.0, the signing envelope of secure-systems-lab/dsse, with Ed25519.

Signed are the payload's bytes together with their type, so nothing is parsed before the signature holds, and no document can
be passed off as one of another type.
"""

import base64
from collections.abc import Mapping
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field

from service.evidence import canonical
from service.evidence.keys import SigningKey

MEDIA_TYPE = "application/vnd.dsse.envelope.v1+json"
STANDARD = str.maketrans("-_", "+/")  # a verifier has to accept both alphabets


class Signature(NamedTuple):
    keyid: str  # says which key to try; not signed itself
    sig: bytes


class Envelope(NamedTuple):
    payload_type: str
    payload: bytes
    signatures: tuple[Signature, ...]


def pae(payload_type: str, payload: bytes) -> bytes:
    """What is signed: the pre-authentication encoding. The specification's own example:

    >>> pae("http://example.com/HelloWorld", b"hello world")
    b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload_type: str, payload: bytes, key: SigningKey) -> Envelope:
    return Envelope(payload_type, payload, (Signature(key.id, key.private.sign(pae(payload_type, payload))),))


def verify(envelope: Envelope, keys: Mapping[str, Ed25519PublicKey]) -> bytes:
    """The payload, if `signers` finds one. Raises ValueError as it does."""
    signers(envelope, keys)
    return envelope.payload


def signers(envelope: Envelope, keys: Mapping[str, Ed25519PublicKey]) -> list[str]:
    """The ids of the known keys that signed it, at least one.

    Raises ValueError if a signature in a known key's name does not hold, or if all are by keys that are not known.
    """
    known = [signature for signature in envelope.signatures if signature.keyid in keys]
    for signature in known:
        try:
            keys[signature.keyid].verify(signature.sig, pae(envelope.payload_type, envelope.payload))
        except InvalidSignature:
            raise ValueError(f"the signature in the name of key {signature.keyid} does not hold") from None
    if not known:
        named = ", ".join(repr(signature.keyid) for signature in envelope.signatures)
        raise ValueError(f"it is signed by {named or 'nobody'}, which is none of the known keys")
    return [signature.keyid for signature in known]


def to_json(envelope: Envelope) -> bytes:
    """The one form in which the service writes an envelope: canonical JSON, standard base64."""
    return canonical.dumps(
        {
            "payloadType": envelope.payload_type,
            "payload": base64.b64encode(envelope.payload).decode(),
            "signatures": [{"keyid": key, "sig": base64.b64encode(sig).decode()} for key, sig in envelope.signatures],
        }
    )


def from_json(data: bytes) -> Envelope:
    """An envelope in any form that the specification allows. Raises ValueError for anything else."""
    wire = _Wire.model_validate(canonical.loads(data))
    signatures = tuple(Signature(one.keyid, _bytes(one.sig)) for one in wire.signatures)
    return Envelope(wire.payload_type, _bytes(wire.payload), signatures)


def _bytes(text: str) -> bytes:
    return base64.b64decode(text.translate(STANDARD), validate=True)


class _WireSignature(BaseModel):
    model_config = ConfigDict(strict=True)  # members that are not known are passed over, as the specification has it

    keyid: str = ""
    sig: str


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True)

    payload_type: str = Field(alias="payloadType")
    payload: str
    signatures: list[_WireSignature] = Field(min_length=1)
