"""Is the process alive, can it work, and its figures."""

from typing import Any, Literal

import anyio
import structlog
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from service.api.deps import Everybody, Parts
from service.api.errors import declared
from service.api.guard import Guarded, needs
from service.domain.identity import Scope
from service.settings import Settings
from service.store import evidence_keys
from service.store.secrets import SealBroken
from service.store.session import at_most, schema_fits, schema_revision, takes_writes
from service.store.tables import HEAD

router = APIRouter(tags=["operation"])
log = structlog.get_logger(__name__)

DATABASE_TIMEOUT_S = 1.0
BROKER_TIMEOUT_S = 1.0
# Of their own, as service.api.concurrency leaves them connections: busy threads are no reason not to be ready. A check that hangs
# keeps its thread for as long as a silent database is waited for, and others must show meanwhile whether it answers again.
DATABASE_THREADS, BROKER_THREADS = anyio.CapacityLimiter(40), anyio.CapacityLimiter(40)


class Live(BaseModel):
    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    status: Literal["ready", "degraded", "unready"]
    checks: dict[str, str]


@router.get("/livez", summary="Is the process alive?", responses=declared())
async def livez() -> Live:
    """Touches neither database nor broker: their outage is no reason to restart this."""
    return Live()


@router.get("/readyz", summary="Can it work?", responses=declared() | {503: {"model": Ready}})
async def readyz(here: Everybody, response: Response) -> Ready:
    """503 without the database or with another schema. Without the broker: degraded; jobs wait in the database."""
    database = await _within(DATABASE_TIMEOUT_S, _database, here, DATABASE_THREADS) or "does not answer"
    broker = await _within(BROKER_TIMEOUT_S, _broker, here, BROKER_THREADS) or "does not answer"
    status: Literal["ready", "degraded", "unready"] = "ready" if broker == "ok" else "degraded"
    if database != "ok":
        response.status_code, status = 503, "unready"
    return Ready(status=status, checks={"database": database, "broker": broker})


class MetricsRoute(Guarded):
    def open(self, settings: Settings) -> bool:
        return settings.metrics_public


figures_router = APIRouter(tags=["operation"], route_class=MetricsRoute)


@figures_router.get(
    "/metrics",
    summary="Prometheus metrics",
    dependencies=[needs(Scope.METRICS_READ)],
    response_class=Response,
    responses=declared(503) | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    figures = await anyio.to_thread.run_sync(generate_latest, request.app.state.registry)
    return Response(figures, media_type=CONTENT_TYPE_LATEST)


async def _within(seconds: float, check: Any, here: Parts, threads: anyio.CapacityLimiter) -> str | None:
    with anyio.move_on_after(seconds):
        return str(await anyio.to_thread.run_sync(check, here, abandon_on_cancel=True, limiter=threads))
    return None


def _database(here: Parts) -> str:
    try:
        with here.sessions.begin() as s:
            at_most(s, DATABASE_TIMEOUT_S)
            fits, revision = schema_fits(s, HEAD), schema_revision(s)
            if not takes_writes(s):
                return "takes no writes"
            if fits:
                evidence_keys.active(s, here.secrets)
    except SealBroken:
        return "was used with another MASTER_KEY"
    except Exception as error:
        log.warning("the database does not answer", error=error)
        return "does not answer"
    return "ok" if fits else f"schema {revision or 'missing'}, expected {HEAD}: run `unlearn migrate`"


def _broker(here: Parts) -> str:
    return "ok" if here.dispatcher.reachable() else "does not answer"
