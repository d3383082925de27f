"""Takes what is due from the outbox to its receivers: a thread of the sweep's process runs `keep_sending`, several do.

Between the two transactions of a turn, none is open: a receiver may take as long as it is given.
"""

import ssl
import time
from threading import Event
from typing import NamedTuple

import httpx
import structlog
from sqlalchemy.exc import SQLAlchemyError

from service.settings import Settings
from service.store import outbox, webhooks
from service.store.outbox import Turn
from service.store.secrets import SealBroken, Secrets, secrets_of
from service.store.session import Sessions
from service.webhooks import guard, signing
from service.webhooks.sender import Delivery, deliver

POLL_S = 1.0

log = structlog.get_logger(__name__)


class Sender(NamedTuple):
    sessions: Sessions
    secrets: Secrets
    rules: guard.Rules
    tls: ssl.SSLContext
    timeout_s: float


def sender_of(settings: Settings, sessions: Sessions) -> Sender:
    """Raises RuntimeError for a deployment without a master key: it could sign nothing."""
    rules = guard.Rules(settings.webhook_allow_http, tuple(settings.webhook_networks))
    return Sender(sessions, secrets_of(settings), rules, httpx.create_ssl_context(), settings.webhook_timeout_s)


def send_next(sender: Sender) -> bool:
    """The delivery whose turn it is, once. False: none is due."""
    with sender.sessions.begin() as s:
        turn = outbox.take(s, sender.timeout_s)
    if turn is None:
        return False
    sent = _send(sender, turn)
    with sender.sessions.begin() as s:
        recorded = outbox.record(s, turn, **sent._asdict())
    tell = log.info if sent.error is None else log.warning
    tell("webhook", delivery_id=turn.delivery_id, status=sent.status, latency_ms=sent.latency_ms, recorded=recorded)
    return True


def _send(sender: Sender, turn: Turn) -> Delivery:
    try:
        signed_with = webhooks.opened(sender.secrets, turn.endpoint_id, turn.sealed_secrets)
    except SealBroken as error:
        return Delivery(None, 0, "", str(error), None, disables=False)
    body = turn.body.encode()
    headers = signing.headers(turn.message_id, int(time.time()), body, signed_with)
    return deliver(turn.url, headers, body, rules=sender.rules, tls=sender.tls, timeout_s=sender.timeout_s)


def keep_sending(settings: Settings, sessions: Sessions, stop: Event) -> None:
    while not stop.is_set():
        try:
            sender = sender_of(settings, sessions)
            while not stop.is_set():
                if not send_next(sender):
                    stop.wait(POLL_S)
        except Exception as error:
            trace = not isinstance(error, SQLAlchemyError)
            log.error("no webhook was sent", error=error, exc_info=trace)
        stop.wait(settings.sweep_interval_s)
