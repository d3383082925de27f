"""People: tokens of an identity provider, verified against the keys that it publishes (OpenID Connect)."""

import asyncio
import json
import ssl
import time
from threading import Lock
from typing import TypeGuard

import httpx
import jwt
import structlog
from anyio import CapacityLimiter

from service.domain.errors import ProviderUnavailable
from service.domain.identity import ROLES, Principal, Scope
from service.settings import Settings

ALGORITHMS = [
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "ES256",
    "ES384",
    "EdDSA",
]  # asymmetric alone: a public key signs nothing
LEEWAY_S = 30  # of clocks
KEYS_S = 300  # after which the provider's keys are fetched again
STALE_S = 3600  # for which they are used while that fails
AGAIN_S = 10  # between two fetches, whatever tokens come: anybody can invent a key's name
WAIT_S = 1.0  # for a fetch that another token has begun
TIMEOUT_S = 5  # for all of a fetch
ANSWER_MAX_BYTES = 2**20
# It is away, or what answers in its place is something else.
UNUSABLE = (jwt.PyJWTError, httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError, RecursionError)
USES = ("sig", None)  # of a key (RFC 7517, section 4.2): one for encryption signs nothing
THREADS = 4  # of all tokens at once: a provider that hangs keeps no thread from API keys
SUBJECT_MAX = 255  # OpenID Connect Core 1.0, section 2

log = structlog.get_logger(__name__)


class Keys:
    """What the provider publishes, by `kid`; fetched by one thread at a time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._found: dict[str, jwt.PyJWK] = {}
        self._fetched_at = self._tried_at = -float("inf")
        self._failed = False  # the last time
        self._fetching = Lock()

    def of(self, token: str) -> jwt.PyJWK | None:
        """None: there is no such key. Raises ProviderUnavailable where that cannot be known, PyJWTError for what is no token."""
        kid = jwt.get_unverified_header(token).get("kid")
        if (key := self._known(kid, KEYS_S)) is not None:
            return key
        waited = self._fetching.acquire(timeout=WAIT_S)
        if waited:
            try:
                self._fetch()
            finally:
                self._fetching.release()
        key = self._known(kid, STALE_S)
        if key is None and (self._failed or not waited):
            raise ProviderUnavailable("the identity provider's keys cannot be had now")
        return key

    def _known(self, kid: str | None, seconds: float) -> jwt.PyJWK | None:
        fresh = time.monotonic() - self._fetched_at < seconds
        return self._found.get(kid) if kid is not None and fresh else None

    def _fetch(self) -> None:
        if time.monotonic() - self._tried_at < AGAIN_S:
            return
        try:
            published = json.loads(asyncio.run(_get(self._url)))
            if not isinstance(published, dict):
                raise ValueError("it is no set of keys")
            found = jwt.PyJWKSet.from_dict(published)
            self._found = {key.key_id: key for key in found.keys if key.key_id and key.public_key_use in USES}
        except UNUSABLE as error:
            log.warning("the identity provider's keys cannot be had", error=type(error).__name__)
            self._failed = True
        else:
            self._fetched_at, self._failed = time.monotonic(), False
        finally:
            self._tried_at = time.monotonic()  # its end: a provider that hangs is left alone for as long as any other


async def _get(url: str) -> bytes:
    """The whole answer within `TIMEOUT_S`: timeouts of single reads do not end one that trickles.

    Raises TimeoutError, httpx.HTTPError, ValueError for one that is too long.
    """
    answer = b""
    async with (
        asyncio.timeout(TIMEOUT_S),
        httpx.AsyncClient(verify=ssl.create_default_context()) as client,  # whom this machine trusts
        client.stream("GET", url) as response,
    ):
        response.raise_for_status()
        async for part in response.aiter_bytes():
            answer += part
            if len(answer) > ANSWER_MAX_BYTES:
                raise ValueError("it is too long for a set of keys")
    return answer


class Provider:
    def __init__(self, settings: Settings) -> None:
        assert settings.oidc_jwks_url is not None
        self._settings = settings
        self._keys = Keys(settings.oidc_jwks_url)
        self.threads = CapacityLimiter(THREADS)

    def recognise(self, token: str) -> Principal | None:
        """Whom it vouches for, with the scopes of the roles that it names and we know; None: the token is not good here.

        Raises ProviderUnavailable.
        """
        settings = self._settings
        try:
            if (key := self._keys.of(token)) is None:
                log.info("a token was refused", reason="unknown key")
                return None
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                audience=settings.oidc_audience,
                issuer=settings.oidc_issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "sub"]},
            )
        except jwt.PyJWTError as error:
            log.info("a token was refused", reason=type(error).__name__)
            return None
        subject, tenant = claims["sub"], claims.get(settings.oidc_tenant_claim)
        roles = claims.get(settings.oidc_roles_claim)
        if not _is_name(subject) or not _is_name(tenant) or not isinstance(roles, list):
            log.info("a token was refused", reason="claims")
            return None
        scopes = frozenset[Scope]().union(*(ROLES.get(role, frozenset()) for role in roles if isinstance(role, str)))
        return Principal(f"oidc:{subject}", tenant, scopes)


def _is_name(claim: object) -> TypeGuard[str]:
    """Something that stands in rows and logs: no control character, and no half of one."""
    return isinstance(claim, str) and 0 < len(claim) <= SUBJECT_MAX and claim.isprintable()


def provider_of(settings: Settings) -> Provider | None:
    """Raises RuntimeError for half a configuration."""
    if settings.oidc_issuer is None and settings.oidc_jwks_url is None:
        return None
    if settings.oidc_issuer is None or settings.oidc_jwks_url is None:
        raise RuntimeError("OIDC_ISSUER and OIDC_JWKS_URL go together")
    return Provider(settings)
