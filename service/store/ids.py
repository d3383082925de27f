"""Ids: a prefix that tells the kind, and a UUIDv7 as 32 hex digits, so that ids sort by time."""

from uuid_utils import uuid7


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid7().hex}"
