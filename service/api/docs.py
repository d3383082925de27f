"""/docs: the API on one page, made from its OpenAPI document. No script and no network: it opens anywhere."""

import json
import re
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from service.api.errors import KINDS

router = APIRouter(include_in_schema=False)

CSP = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc }
h2::first-letter { text-transform: uppercase }
details { border: 1px solid #ddd; border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem }
summary { cursor: pointer } pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: 13px }
code { font-family: ui-monospace, monospace; font-size: .92em } b { display: inline-block; min-width: 4.2rem }
table { border-collapse: collapse; margin: .6rem 0 }
td, th { border: 1px solid #ddd; padding: .2rem .6rem; text-align: left; vertical-align: top }
small { color: #555 }
"""


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    return HTMLResponse(page(request.app.openapi()), headers={"Content-Security-Policy": CSP})


def page(api: dict[str, Any]) -> str:
    info = api["info"]
    return "".join(
        (
            '<!doctype html><html lang="en"><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(info['title'])}</title><style>{STYLE}</style>",
            f"<h1>{escape(info['title'])} <small>{escape(info['version'])}</small></h1><p>{_prose(info['description'])}</p>",
            '<p>The same for programs: <a href="/openapi.json">/openapi.json</a></p>',
            *_operations(api),
            "<h2>Problems</h2><p>Every error is an <code>application/problem+json</code> (RFC 9457) of one of these types.</p>",
            "<table><tr><th>type<th>status<th>title",
            *(f'<tr id="{k.name}"><td><code>{k.uri}</code><td>{k.status}<td>{escape(k.title)}' for k in KINDS),
            "</table><h2>Schemas</h2>",
            *(_schema(name, schema) for name, schema in sorted(api["components"]["schemas"].items())),
            "</html>",
        )
    )


def _operations(api: dict[str, Any]) -> Iterator[str]:
    by_tag: dict[str, list[str]] = {}
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            by_tag.setdefault(operation["tags"][0], []).append(_operation(path, method, operation))
    for tag, shown in by_tag.items():
        yield f"<h2>{escape(tag)}</h2>"
        yield from shown


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [f"<p>{_prose(operation.get('description', ''))}</p>"]
    if scopes := [scope for scheme in operation.get("security", ()) for names in scheme.values() for scope in names]:
        parts.append(f"<p>Needs {' and '.join(f'<code>{escape(scope)}</code>' for scope in scopes)}</p>")
    if operation.get("parameters"):
        rows = (
            f"<tr><td><code>{escape(p['name'])}</code><td>{p['in']}<td>{_type(p['schema'])}"
            f"<td>{escape(p.get('description', ''))}"
            for p in operation["parameters"]
        )
        parts.append(f"<table><tr><th>parameter<th>in<th>type<th>{''.join(rows)}</table>")
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body: <code>{escape(media_type)}</code>, {_type(content['schema'])}, such as</p>")
        parts.append(f"<pre>{escape(json.dumps(content['example'], indent=2, ensure_ascii=False))}</pre>")
    rows = (
        f"<tr><td>{code}<td>{escape(answer['description'])}<td>"
        + ", ".join(
            f"<code>{escape(media_type)}</code> {_type(content.get('schema', {}))}"
            for media_type, content in answer.get("content", {}).items()
        )
        for code, answer in operation["responses"].items()
    )
    parts.append(f"<table><tr><th>answer<th><th>{''.join(rows)}</table>")
    head = f"<b>{method.upper()}</b> <code>{escape(path)}</code> &nbsp; {escape(operation['summary'])}"
    return f"<details><summary>{head}</summary>{''.join(parts)}</details>"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#schema-{name}">{name}</a>'
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(_type(one) for one in schema[union])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    known = [str(schema[key]) for key in ("type", "pattern") if key in schema]
    if schema.get("default") is not None:
        known.append(f"default {schema['default']}")
    return escape(", ".join(known))


def _prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _schema(name: str, schema: dict[str, Any]) -> str:
    text = escape(json.dumps(schema, indent=2, ensure_ascii=False))
    return (
        f'<details><summary><code>{escape(name)}</code></summary><pre id="schema-{escape(name)}">{text}</pre></details>'
    )
