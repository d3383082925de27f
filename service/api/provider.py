"""People: tokens of an identity provider, verified against the keys that it publishes (OpenID Connect)."""

import jwt
import structlog

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
KEYS_S = 300  # for which the provider's keys are kept
TIMEOUT_S = 5

log = structlog.get_logger(__name__)


class Provider:
    def __init__(self, settings: Settings) -> None:
        assert settings.oidc_jwks_url is not None
        self._settings = settings
        self._keys = jwt.PyJWKClient(settings.oidc_jwks_url, lifespan=KEYS_S, timeout=TIMEOUT_S)

    def recognise(self, token: str) -> Principal | None:
        """Whom it vouches for, with the scopes of the roles that it names and we know; None: the token is not good here.

        Raises ProviderUnavailable.
        """
        settings = self._settings
        try:
            claims = jwt.decode(
                token,
                self._keys.get_signing_key_from_jwt(token),
                algorithms=ALGORITHMS,
                audience=settings.oidc_audience,
                issuer=settings.oidc_issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "sub"]},
            )
        except jwt.PyJWKClientConnectionError as error:
            raise ProviderUnavailable("the identity provider's keys cannot be had now") from error
        except jwt.PyJWTError as error:
            log.info("a token was refused", reason=type(error).__name__)
            return None
        tenant, roles = claims.get(settings.oidc_tenant_claim), claims.get(settings.oidc_roles_claim)
        if not isinstance(tenant, str) or not isinstance(roles, list):
            return None
        scopes = frozenset[Scope]().union(*(ROLES.get(role, frozenset()) for role in roles if isinstance(role, str)))
        return Principal(f"oidc:{claims['sub']}", tenant, scopes)


def provider_of(settings: Settings) -> Provider | None:
    """Raises RuntimeError for half a configuration."""
    if settings.oidc_issuer is None and settings.oidc_jwks_url is None:
        return None
    if settings.oidc_issuer is None or settings.oidc_jwks_url is None:
        raise RuntimeError("OIDC_ISSUER and OIDC_JWKS_URL go together")
    return Provider(settings)
