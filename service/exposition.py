"""The figures of a process that serves nothing else, over HTTP."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


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
                return metrics(environ, start_response)
            case "/livez":
                start_response("200 OK", [("Content-Type", "text/plain")])
                return [b"ok\n"]
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"here are /metrics and /livez\n"]

    with make_server(host, port, answer, ThreadingWSGIServer, _Quiet) as server:
        Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        try:
            yield f"http://{host}:{server.server_port}/metrics"
        finally:
            server.shutdown()
