"""The bell: a message by name that carries nothing. The job's row is the truth; what is not heard is rung again."""

import time
from typing import Any, Protocol

import structlog
from celery import Celery
from kombu.exceptions import ChannelError

from service.settings import Settings

WAKE = "worker.wake"
RING_TIMEOUT_S = 2.0
PAUSE_S = 5.0  # for which nobody rings, after a broker took longer: each ring holds a thread
UNREAD_MAX = 100  # as many wake everybody; more would pile up for as long as nobody listens

log = structlog.get_logger(__name__)


class Dispatcher(Protocol):
    def ring(self, gpu_class: str) -> bool:
        """Wakes whoever hears this class, if enough bells do not lie there unread. Never raises; False: it surely failed."""
        ...

    def reachable(self) -> bool:
        """Whether the broker answers now. Never raises."""
        ...


def queue_name(gpu_class: str) -> str:
    return f"wake.{gpu_class}"


def celery_config(settings: Settings) -> dict[str, Any]:
    """What the side that rings and the side that hears must agree on."""
    direct = {"exchange": "wake", "exchange_type": "direct"}
    return {
        "broker_url": settings.broker_url,
        "task_queues": {queue_name(name): direct | {"routing_key": name} for name in settings.gpu_classes},
        "task_default_queue": queue_name("any"),
        "task_create_missing_queues": False,
        "task_serializer": "json",
        "accept_content": ["json"],
        "result_backend": None,
        "task_ignore_result": True,
        "task_acks_late": False,  # a visibility timeout must not decide whether an hours-long job runs twice
        "task_always_eager": False,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,
        "worker_send_task_events": False,
        "worker_hijack_root_logger": False,
        "broker_connection_retry_on_startup": True,
        "broker_transport_options": {
            "socket_keepalive": True,
            "socket_connect_timeout": RING_TIMEOUT_S,
            "socket_timeout": 30,  # above the second for which a consumer blocks; below it lies a dead connection
            "health_check_interval": 25,
            "visibility_timeout": 3600,
        },
    }


class CeleryDispatcher:
    def __init__(self, settings: Settings) -> None:
        config = celery_config(settings)
        # No second try, which is the sweep's work, and no waiting on a broker that fell silent.
        config["broker_transport_options"] |= {"max_retries": 0, "socket_timeout": RING_TIMEOUT_S}
        self._celery = Celery("unlearn", set_as_current=False)
        self._celery.conf.update(config)
        self._pause_until = 0.0

    def ring(self, gpu_class: str) -> bool:
        began = time.monotonic()
        try:
            with self._celery.producer_or_acquire() as producer:
                if time.monotonic() < self._pause_until:  # here: to get a producer may have been a wait
                    return False
                if _unread(producer.channel, queue_name(gpu_class)) < UNREAD_MAX:
                    self._celery.send_task(
                        WAKE, queue=queue_name(gpu_class), producer=producer, retry=False, ignore_result=True
                    )
        except Exception as error:  # whatever the broker's client thinks of: the job is safe in its row
            log.warning("the bell did not ring", gpu_class=gpu_class, error=error)
            return False
        finally:
            if time.monotonic() - began > RING_TIMEOUT_S:
                self._pause_until = time.monotonic() + PAUSE_S
        return True

    def reachable(self) -> bool:
        try:
            with self._celery.connection_for_write() as connection:
                connection.ensure_connection(max_retries=0, timeout=RING_TIMEOUT_S)
        except Exception:
            return False
        return True

    def close(self) -> None:
        self._celery.close()


def _unread(channel: Any, queue: str) -> int:
    """A queue without messages is not there at all."""
    try:
        return int(channel.queue_declare(queue, passive=True).message_count)
    except ChannelError:
        return 0
