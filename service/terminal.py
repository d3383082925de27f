"""What the commands over HTTP share: where and as whom they ask, how errors and lists are told, how a job is followed."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
import typer

from service import printing
from service.client import ApiError, Client, Job, Step
from service.client.shapes import Answer
from service.domain.errors import UnlearnError
from service.printing import visible

A = TypeVar("A", bound=Answer)

DEFAULT_URL = "http://127.0.0.1:8000"
POLL_S = 1.0
VISIBLE = re.compile(r"[!-~]+")
TOLD = (UnlearnError, RuntimeError, OSError, httpx.TransportError, httpx.InvalidURL)

Url = Annotated[str, typer.Option("--url", envvar="UNLEARN_URL", help="where the API answers", show_default=True)]
Rows = typer.Option(exists=True, dir_okay=False, help="JSON Lines, or a JSON array")
Out = Annotated[Path, typer.Option(dir_okay=False, help="the file to write")]


@contextmanager
def connected(url: str) -> Iterator[Client]:
    """A client with the key of the environment; its errors are told, and those of the block."""
    with told():
        try:
            with Client(url, _key()) as api:
                yield api
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise UnlearnError(
                f"no answer from the API at {url}: {str(error).rstrip('.')}. Is it up? --url or UNLEARN_URL says where it is"
            ) from error


def _key() -> str:
    """Never part of an error: what is told is written down."""
    key = os.environ.get("UNLEARN_API_KEY", "").strip()
    if not key:
        raise UnlearnError(
            "UNLEARN_API_KEY is not set: an API key, of an administrator's `unlearn keys create`, or, after `unlearn up`, "
            "of `. .unlearn/environment`"
        )
    if not VISIBLE.fullmatch(key):
        raise UnlearnError("UNLEARN_API_KEY is no API key: it has other characters than visible ASCII")
    return key


@contextmanager
def told() -> Iterator[None]:
    """An error that is meant for people: its sentence, and exit status 2."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):  # no errors of ours: whoever reads may stop reading
        raise
    except TOLD as error:
        first, *others = error.lines if isinstance(error, ApiError) else str(error).split("\n")
        for text in (f"error: {first}", *others):
            printing.line(text, error=True)
        raise typer.Exit(2) from error


def pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"--set {text}: write NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def show(found: Iterable[A], as_json: bool, line: Callable[[A], str]) -> None:
    """One by one, as the pages come."""
    for one in found:
        if as_json:
            printing.as_json(one.raw)
        else:
            printing.line(line(one))


def stamp(when: datetime) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%dT%H:%M:%S}Z"


def follow(api: Client, job_id: str, as_json: bool = False) -> int:
    """To its end: a bar on a terminal, elsewhere a line per look with news, or each event as JSON. The exit status."""
    try:
        return _followed(api, job_id, as_json)
    except KeyboardInterrupt:
        printing.line(f"{job_id} goes on: `unlearn watch` follows it again, `unlearn cancel` ends it", error=True)
        raise


def _followed(api: Client, job_id: str, as_json: bool) -> int:
    if as_json:
        for event in api.events(job_id):
            printing.as_json(event.raw)
        return 0 if api.job(job_id).forgotten else 1
    looks = api.watch(job_id, POLL_S)
    job = bar(looks) if sys.stdout.isatty() else lines(looks)
    if job.failure:
        printing.line(f"{job.failure.code}: {job.failure.message}")
    if job.verdict:
        printing.line(f"{job.verdict.result}: {job.verdict.message}")
    return 0 if job.forgotten else 1


def bar(looks: Iterator[tuple[Job, list[Step]]]) -> Job:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    where = TextColumn("{task.description}", markup=False)
    figures = TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=False))
    with Progress(where, BarColumn(20), MofNCompleteColumn(), figures) as progress:
        task = progress.add_task("", total=None, figures="")
        for job, steps in looks:
            done = job.progress
            progress.update(
                task, description=visible(job.stage or job.status), completed=done.completed, total=done.total
            )
            if steps:
                progress.update(task, figures=visible(_figures(job, steps[-1])))
    return job


def lines(looks: Iterator[tuple[Job, list[Step]]]) -> Job:
    shown = ""
    for job, steps in looks:
        line = f"{job.status} {job.stage or ''}".rstrip()
        if job.stage == "unlearning" and (steps or shown.startswith("step")):
            line = f"step {steps[-1].step}/{job.progress.total}  {_figures(job, steps[-1])}" if steps else shown
        if line != shown:
            printing.line(line)
            shown = line
    return job


def _figures(job: Job, step: Step) -> str:
    """The losses, the retain loss beside its bound, how far it is from it, and the dual variable."""
    bounds = {} if job.epsilon is None else {"retain": f" (bound {_number(job.epsilon)})"}
    losses = " ".join(f"{name} {_number(value)}{bounds.get(name, '')}" for name, value in step.losses.items())
    violation = " ".join(f"violation {_number(value)}" for value in step.violation.values())
    dual = " ".join(f"dual/{name} {_number(value)}" for name, value in step.dual.items())
    return f"{losses}  {violation}  {dual}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
