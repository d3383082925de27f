"""What the OpenAPI document says beyond what FastAPI reads off the routes: problems, conditional headers, examples."""

from collections.abc import Iterator, Mapping
from typing import Any

from service.api import bodies, errors, headers
from service.api.examples import EXAMPLES

HEARD: Mapping[str, Mapping[str, str]] = {  # request headers, by the status that says that they are heard
    "304": {"If-None-Match": "ETags that the client has: 304 if one of them is still right"},
    "206": {
        "Range": "one range, such as bytes=0-1023",
        "If-Range": "the ETag that the range is of; of another, the whole is sent",
    },
}
ANNOTATIONS = frozenset({"title", "description", "default", "examples"})


def complete(openapi: dict[str, Any]) -> None:
    """In place. Raises KeyError for an operation that takes a body and has no example."""
    errors.declare(openapi)
    for method, path, operation in _operations(openapi):
        parameters = operation.get("parameters", []) + list(_conditional(operation["responses"]))
        if parameters:
            operation["parameters"] = parameters
        for parameter in parameters:
            parameter["schema"] = _not_null(parameter["schema"])
        if "requestBody" not in operation and all(_any_string(parameter["schema"]) for parameter in parameters):
            del operation["responses"]["422"]  # nothing can be wrong: an id that is any string is there, or is not
        for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
            content["example"] = EXAMPLES[method, path]
            if media_type == "application/json":
                operation["responses"]["413"]["description"] = bodies.BOUNDS
    headers.declare(openapi)


def _operations(openapi: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    return (
        (method, path, operation) for path, methods in openapi["paths"].items() for method, operation in methods.items()
    )


def _any_string(schema: Mapping[str, Any]) -> bool:
    """Or a list of such."""
    bare = {name: value for name, value in schema.items() if name not in ANNOTATIONS}
    return bare in ({"type": "string"}, {"type": "array", "items": {"type": "string"}})


def _conditional(responses: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for status, heard in HEARD.items():
        if status in responses:
            for name, description in heard.items():
                yield {"name": name, "in": "header", "schema": {"type": "string"}, "description": description}


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter that may be left out: a URL and a header have no null, which FastAPI allows there."""
    if "anyOf" not in schema:
        return schema
    [given] = (one for one in schema["anyOf"] if one != {"type": "null"})
    return {**{name: value for name, value in schema.items() if name != "anyOf"}, **given}
