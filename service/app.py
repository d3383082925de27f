"""The one place where the parts of the API meet."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import structlog
from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CollectorRegistry

from service.api import (
    benchmarks,
    bodies,
    concurrency,
    deletion_plans,
    deletions,
    docs,
    document,
    errors,
    evidence,
    files,
    health,
    jobs,
    keys,
    metrics,
    models,
    once,
    reports,
    webhooks,
    workers,
)
from service.api.deps import Parts
from service.api.edge import Edge, HttpFigures
from service.api.limits import Limiter
from service.api.provider import provider_of
from service.dispatch import CeleryDispatcher, Dispatcher
from service.domain import catalog
from service.settings import Settings
from service.store import evidence_keys
from service.store.secrets import secrets_of
from service.store.session import make_engine, make_looks, make_sessions
from service.store.storage import Storage

log = structlog.get_logger(__name__)

DESCRIPTION = (
    "Removes named data from a language model on request: a job trains an adapter under a bound on what must be kept, "
    "measures it, and gives a report. `status` says whether the run finished, `verdict` whether the model passed. "
    "Times are UTC. Unknown fields in a request are errors; ignore those that you do not know in an answer."
)


def create_app(settings: Settings, *, dispatcher: Dispatcher | None = None) -> FastAPI:
    """The API. It connects when it starts; a dispatcher that is given is the caller's to close.

    Raises RuntimeError for a deployment without a master key, or with half an identity provider; at the start WrongMasterKey for
    one with another deployment's.
    """
    registry = CollectorRegistry()
    secrets, provider = secrets_of(settings), provider_of(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = make_engine(settings.database_url)
        looks = make_looks(settings.database_url)  # who asks
        polls = make_looks(settings.database_url)  # who polls, and his job's row
        lines = make_looks(settings.database_url)  # where jobs stand: to count many keeps no other poll waiting
        bell = dispatcher or CeleryDispatcher(settings)
        storage = Storage(settings.storage_url)
        parts = Parts(
            settings,
            make_sessions(engine),
            storage,
            bell,
            catalog.load(),
            secrets,
            provider,
        )
        try:
            storage.create()
            evidence_keys.check_master_key(parts.sessions, secrets)
        except Exception as error:
            log.critical("the API cannot start", error=error, exc_info=True)
            raise
        app.state.parts, app.state.registry, app.state.limiter = parts, registry, Limiter(settings)
        app.state.concurrency = concurrency.limits()
        app.state.looks, app.state.polls, app.state.lines = looks, polls, lines
        collectors = [metrics.JobFigures(parts), concurrency.ConcurrencyFigures(app.state.concurrency)]
        for collector in collectors:
            registry.register(collector)
        yield
        for collector in collectors:
            registry.unregister(collector)
        if isinstance(bell, CeleryDispatcher) and bell is not dispatcher:
            bell.close()
        engine.dispose()
        for connections in (looks, polls, lines):
            await connections.dispose()

    app = FastAPI(
        title="Unlearning as a service",
        version=version("unlearning-service"),
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(concurrency.slot, scope="function")],
    )
    app.add_middleware(Edge, settings=settings, figures=HttpFigures(registry))
    metrics.build_info(registry)
    errors.install(app)
    once.install(app)
    bodies.install(app)
    app.state.stopping = lambda: False  # who runs the server may know better
    for module in (
        jobs,
        deletions,
        deletion_plans,
        reports,
        evidence,
        files,
        benchmarks,
        models,
        keys,
        webhooks,
        workers,
        health,
        docs,
    ):
        app.include_router(module.router)
    for router in (models.public, evidence.public, health.figures_router):
        app.include_router(router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, and what it cannot know of us."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        document.complete(schema)
        app.openapi_schema = schema
    return app.openapi_schema
