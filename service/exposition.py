"""The figures of a process that serves nothing else, over HTTP."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

log = structlog.get_logger(__name__)


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def get_stderr(self) -> Any:  # to which a traceback is printed
        return StringIO()


class _Server(ThreadingWSGIServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("metrics response could not be sent", exc_info=True)


@contextmanager
def exposed(host: str, port: int, registry: CollectorRegistry) -> Iterator[str]:
    """Serves /metrics, and /livez, which says that this process answers and nothing else. Yields the address of the former.

    Args:
        port: 0: any free one.
    """
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        match environ["PATH_INFO"]:
            case "/metrics":
                try:
                    return metrics(environ, start_response)
                except Exception:
                    log.exception("metrics collection failed")
                    start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
                    return [b"see the log\n"]
            case "/livez":
                start_response("200 OK", [("Content-Type", "text/plain")])
                return [b"ok\n"]
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"here are /metrics and /livez\n"]

    with make_server(host, port, answer, _Server, _Quiet) as server:
        Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        try:
            yield f"http://{host}:{server.server_port}/metrics"
        finally:
            server.shutdown()
