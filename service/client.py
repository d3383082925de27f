"""The API as the command line uses it."""

import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import typer

from service.domain.errors import UnlearnError
from service.domain.job import TERMINAL

JOBS = "/v1/unlearning/jobs"
POLL_S = 1.0
HEAD_BYTES = 1024
NO_CONTENT = 204
RELEASED = ("PASSED", "WARNED")


def follow(client: httpx.Client, job_id: str) -> int:
    """One line that moves on a terminal; elsewhere one line per poll with news."""
    seen, shown = 0, ""
    while True:
        job = body_of(client.get(f"{JOBS}/{job_id}"))
        while True:  # to the end of the series
            steps = body_of(client.get(f"{JOBS}/{job_id}/steps", params={"after": seen}))
            seen = steps["data"][-1]["step"] if steps["data"] else seen
            shown = _progress(job, steps["data"][-1]) if steps["data"] else shown
            if not steps["has_more"]:
                break
        _show(shown if shown and job["stage"] == "unlearning" else f"{job['status']} {job['stage'] or ''}")
        if job["status"] in TERMINAL:
            break
        time.sleep(POLL_S)
    typer.echo()
    if job["failure"]:
        typer.echo(f"{job['failure']['code']}: {job['failure']['message']}")
    if job["verdict"]:
        typer.echo(f"{job['verdict']['result']}: {job['verdict']['message']}")
    return 0 if (job["verdict"] or {}).get("result") in RELEASED else 1


def _progress(job: dict[str, Any], step: dict[str, Any]) -> str:
    dual = " ".join(f"dual/{name} {_number(value)}" for name, value in step["dual"].items())
    losses = " ".join(f"{name} {_number(value)}" for name, value in step["losses"].items())
    violation = " ".join(f"violation {_number(value)}" for value in step["violation"].values())
    return f"step {step['step']}/{job['progress']['total']}  {losses}  {violation}  {dual}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _show(line: str) -> None:
    typer.echo(f"\r\x1b[K{line}" if sys.stdout.isatty() else line, nl=not sys.stdout.isatty())


def upload(client: httpx.Client, purpose: str, path: Path) -> str:
    """The id of the file. One JSON array goes up as JSON Lines."""
    with _as_lines(path) as file:
        reply = client.post("/v1/files", data={"purpose": purpose}, files={"file": (path.name, file)})
    return str(body_of(reply)["id"])


@contextmanager
def _as_lines(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        if not file.read(HEAD_BYTES).lstrip().startswith(b"["):
            file.seek(0)
            yield file
            return
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UnlearnError(f"{path} begins as a JSON array does, and is none") from None
    yield io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What is answered. In Python's JSON, in which a number that is not finite reaches the service, which refuses it by name."""
    return body_of(client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"}))


def pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"--set {text}: write NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def body_of(reply: httpx.Response) -> dict[str, Any]:
    """The body. Raises UnlearnError with the problem's own words."""
    if reply.status_code == NO_CONTENT:
        return {}
    try:
        body: dict[str, Any] = reply.json()
    except ValueError:
        raise UnlearnError(f"{reply.url} answered {reply.status_code}, and not in JSON") from None
    if reply.is_error:
        lines = [f"{body.get('title')} ({reply.status_code}): {body.get('detail')}"]
        lines += [f"  {error['pointer'] or '-'}: {error['detail']}" for error in body.get("errors", ())]
        raise UnlearnError("\n".join(lines))
    return body


def save(client: httpx.Client, path: str, accept: str, out: Path) -> None:
    """The answer's bytes as a file: whole, or not at all. Raises UnlearnError with the problem's own words."""
    part = out.with_name(f"{out.name}.part")
    with client.stream("GET", path, headers={"Accept": f"{accept}, application/problem+json"}) as reply:
        if reply.is_error:
            reply.read()
            body_of(reply)
        with part.open("wb") as file:
            for chunk in reply.iter_bytes():
                file.write(chunk)
    part.replace(out)


@contextmanager
def told() -> Iterator[None]:
    """An error that is meant for people: its sentence, and exit status 2."""
    try:
        yield
    except typer.Exit:  # a RuntimeError too, and none
        raise
    except (UnlearnError, RuntimeError, httpx.TransportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def connect(url: str) -> httpx.Client:
    """With the key of the environment. Raises UnlearnError where there is none."""
    key = os.environ.get("UNLEARN_API_KEY")
    if not key:
        raise UnlearnError("UNLEARN_API_KEY is not set: an API key, of `unlearn tenants key` or of an administrator")
    return httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"})
