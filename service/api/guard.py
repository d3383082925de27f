"""Who asks, and may he? Told before a byte of the body is read."""

from collections.abc import Awaitable, Callable, Coroutine
from functools import cached_property
from typing import Any

from anyio.to_thread import run_sync
from fastapi import Request, Response, params
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from service.api import bodies, concurrency, limits
from service.api.bodies import JsonRequest
from service.api.deps import Parts, revalidated
from service.domain.errors import Forbidden, ProviderUnavailable, Unauthenticated
from service.domain.identity import Principal, Scope
from service.settings import Settings
from service.store import keys, tenants
from service.store.session import look

Recognise = Callable[[Request, str], Awaitable[Principal | None]]

BEARER = HTTPBearer(
    auto_error=False,
    scheme_name="bearer",
    description="An API key (ulk_...), or a token of the identity provider that the deployment trusts",
)


def needs(*scopes: Scope) -> params.Security:
    """Of a route's `dependencies`: who asks must have these. The route's class must be Guarded."""
    return params.Security(BEARER, scopes=[str(scope) for scope in scopes])


class Guarded(APIRoute):
    """A route that only a principal with its scopes reaches. One that names no scope is reached by nobody."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(received: Request) -> Response:
            request = JsonRequest(received.scope, received.receive)
            if self.open(request.app.state.parts.settings):
                return await handle(request)
            if limit := concurrency.limit_of(request):
                limit.check()  # before its body is received
            request.state.principal = principal = await admit(request, self.recognise)
            lacking = principal.lacks(self.scopes) if self.scopes else frozenset(Scope)
            if lacking:
                raise Forbidden(sorted(lacking))
            if known := await self.known(request):
                return known
            if not bodies.is_large(request):
                return revalidated(request, await handle(request))
            large: concurrency.ConcurrencyLimit = request.app.state.concurrency["large_bodies"]
            async with large.slot():  # here, where Overloaded is a 503: what is raised while FastAPI reads is a 400
                return revalidated(request, await handle(request))

        return guarded

    async def recognise(self, request: Request, secret: str) -> Principal | None:
        """Whose API key it is; None: nobody's, or no longer."""
        state = request.app.state
        found = await look(state.looks, keys.recognise, state.parts.secrets, secret)
        return found and found.principal

    async def known(self, request: Request) -> Response | None:
        """304, where a glance shows that the client has the answer already; None: the route is to answer."""
        return None

    def open(self, settings: Settings) -> bool:
        """Whether this deployment leaves it open."""
        return False

    @cached_property
    def scopes(self) -> frozenset[Scope]:
        declared = (one for one in self.dependencies if isinstance(one, params.Security))
        return frozenset(Scope(scope) for one in declared for scope in one.scopes or ())


async def admit(request: Request, recognise: Recognise) -> Principal:
    """Raises Unauthenticated; QuotaExceeded for somebody who asks too often, or an address that guesses."""
    limiter: limits.Limiter = request.app.state.limiter
    address = limits.network(request)
    try:
        principal = await authenticate(request, recognise)
    except (Unauthenticated, ProviderUnavailable):  # who is known is never kept out by those who share his address
        await limiter.count(request.state, limiter.failures, address)
        raise
    await limiter.count(request.state, limiter.default, limits.of(principal))
    return principal


async def authenticate(request: Request, recognise: Recognise) -> Principal:
    """Raises Unauthenticated, which does not say what was wrong with the credentials."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("send `Authorization: Bearer` with an API key or a token")
    parts: Parts = request.app.state.parts
    if token.startswith("ulk_"):
        principal = await recognise(request, token) if keys.well_formed(token) else None
    else:
        provider = parts.provider
        principal = await run_sync(provider.recognise, token, limiter=provider.threads) if provider else None
        if principal is not None and not await look(request.app.state.looks, tenants.exists, principal.tenant):
            principal = None
    if principal is None:
        raise Unauthenticated("the key or token is not valid here, or no longer")
    return principal
