"""unlearn: what a compliance team does over HTTP: keys, deletion requests and their plans, evidence, purges."""

import shlex
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from service import printing
from service.client import Client, DeletionRequest, Key
from service.domain.deletion import DenialReason, RequestStatus
from service.domain.errors import UnlearnError
from service.domain.identity import ROLES
from service.terminal import DEFAULT_URL, Out, Rows, Url, connected, pair, show, stamp

app = typer.Typer(rich_markup_mode=None)
keys_app = typer.Typer(help="API keys of the tenant.", no_args_is_help=True, rich_markup_mode=None)
requests_app = typer.Typer(
    help="Deletion requests, from receipt to completion.", no_args_is_help=True, rich_markup_mode=None
)
plans_app = typer.Typer(
    help="How a model forgets what approved requests name, without anybody submitting a job.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(keys_app, name="keys")
app.add_typer(requests_app, name="requests")
app.add_typer(plans_app, name="plans")

AsJson = Annotated[bool, typer.Option("--json", help="the API's own objects, a line each")]
Reason = Annotated[str, typer.Option(help="for people to read; name nobody in it")]
LeaveOut = Annotated[
    bool, typer.Option("--leave-out-retained", help="jobs of plans leave its rows out of the plan's retain set")
]
RequestId = Annotated[str, typer.Argument(metavar="REQUEST")]


# --- keys


@keys_app.command("create")
def create_key(
    name: str,
    role: Annotated[str | None, typer.Option(help=", ".join(ROLES))] = None,
    scope: Annotated[list[str] | None, typer.Option(help="beside those of the role; again for more")] = None,
    expires: Annotated[datetime | None, typer.Option(help="default: never")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Make a key and print its secret: it is shown once. Its scopes are at most those of the key that makes it."""
    with connected(url) as api:
        printing.line(api.keys.create(name, role=role, scopes=scope or (), expires_at=expires).secret or "")


@keys_app.command("list")
def list_keys(as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """A line each, revoked ones too."""
    with connected(url) as api:
        show(api.keys.list(), as_json, _key_line)


@keys_app.command("revoke")
def revoke_key(key_id: str, url: Url = DEFAULT_URL) -> None:
    """At once and for ever."""
    with connected(url) as api:
        api.keys.revoke(key_id)


def _key_line(key: Key) -> str:
    state = "revoked" if key.revoked_at else f"used {stamp(key.last_used_at) if key.last_used_at else 'never'}"
    ends = f"  expires {stamp(key.expires_at)}" if key.expires_at else ""
    return f"{key.id}  {key.prefix}...  {key.name}  {state}{ends}  {' '.join(key.scopes)}"


# --- deletion requests


@requests_app.command("submit")
def submit_request(
    regulation: Annotated[str, typer.Option(help="gdpr, ccpa or other")],
    model: Annotated[list[str], typer.Option(help="that must forget; again for more")],
    forget: Annotated[Path, Rows],
    subject: Annotated[list[str] | None, typer.Option(help="who it is about; kept as a keyed digest alone")] = None,
    reference: Annotated[str | None, typer.Option(help="its number in your own system")] = None,
    received: Annotated[datetime | None, typer.Option(help="default: now")] = None,
    due: Annotated[datetime | None, typer.Option(help="default: what the regulation says")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Upload what is to be forgotten, submit the request, print its id."""
    with connected(url) as api:
        request = api.requests.submit(
            regulation=regulation,
            models=model,
            forget_set=forget,
            subjects=subject or (),
            external_reference=reference,
            received_at=received,
            due_at=due,
        )
        printing.line(request.id)
        for warning in request.warnings:
            printing.line(f"warning: {warning.message}", error=True)
        if reference:
            _warn_of_others(api, request.id, reference)


def _warn_of_others(api: Client, request_id: str, reference: str) -> None:
    """A form that is sent twice is two requests; told once the new one is there, to who may see the others."""
    with suppress(UnlearnError, httpx.TransportError):  # the new one is there, whatever becomes of the look
        for other in api.requests.list(external_reference=reference):
            if other.id != request_id and other.finished_at is None:
                printing.line(
                    f"warning: {other.id} ({other.status}) has the reference {reference}, too; "
                    "`unlearn requests cancel` takes one of them back",
                    error=True,
                )


@requests_app.command("list")
def list_requests(
    status: Annotated[str | None, typer.Option(help=", ".join(RequestStatus))] = None,
    due_before: datetime | None = None,
    subject: Annotated[str | None, typer.Option(help="an identifier as it was submitted")] = None,
    reference: Annotated[str | None, typer.Option(help="its number in your own system")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """The latest first, a line each."""
    with connected(url) as api:
        found = api.requests.list(status=status, due_before=due_before, subject=subject, external_reference=reference)
        show(found, as_json, _request_line)


@requests_app.command("show")
def show_request(request_id: RequestId, url: Url = DEFAULT_URL) -> None:
    """As JSON, with its jobs, approvals and deadlines."""
    with connected(url) as api:
        printing.as_json(api.requests.get(request_id).raw, indent=2)


@requests_app.command("rows")
def show_rows(request_id: RequestId, url: Url = DEFAULT_URL) -> None:
    """Number and keyed digest of each row, a line each; reports name their rows by it. Both outlast the purge."""
    with connected(url) as api:
        for number, digest in enumerate(api.requests.rows(request_id), 1):
            printing.line(f"{number}  {digest}")


@requests_app.command("approve")
def approve(request_id: RequestId, leave_out_retained: LeaveOut = False, url: Url = DEFAULT_URL) -> None:
    """As somebody else than who submitted it."""
    with connected(url) as api:
        printing.line(api.requests.approve(request_id, leave_out_retained=leave_out_retained).status)


@requests_app.command("deny")
def deny(
    request_id: RequestId,
    reason: Annotated[str, typer.Option(help=", ".join(DenialReason))],
    note: str | None = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Before a job serves it. Its rows are purged."""
    with connected(url) as api:
        printing.line(api.requests.deny(request_id, reason, note).status)


@requests_app.command("cancel")
def cancel(request_id: RequestId, url: Url = DEFAULT_URL) -> None:
    """Take it back. Its rows are purged."""
    with connected(url) as api:
        printing.line(api.requests.cancel(request_id).status)


@requests_app.command("extend")
def extend(request_id: RequestId, reason: Reason, url: Url = DEFAULT_URL) -> None:
    """Once, as far as the regulation allows; prints the new deadline."""
    with connected(url) as api:
        printing.line(stamp(api.requests.extend(request_id, reason).due_at))


@requests_app.command("requeue")
def requeue(request_id: RequestId, leave_out_retained: LeaveOut = False, url: Url = DEFAULT_URL) -> None:
    """Have a request that failed served again, by another job."""
    with connected(url) as api:
        printing.line(api.requests.requeue(request_id, leave_out_retained=leave_out_retained).status)


@requests_app.command("close")
def close(request_id: RequestId, reason: Reason, url: Url = DEFAULT_URL) -> None:
    """Call it completed, in your name, though no job has passed for each of its models."""
    with connected(url) as api:
        printing.line(api.requests.close(request_id, reason).status)


def _request_line(one: DeletionRequest) -> str:
    late = "  OVERDUE" if one.overdue else ""
    words = (one.id, one.status, f"due {stamp(one.due_at)}{late}", one.external_reference, one.status_reason)
    return "  ".join(word for word in words if word)


# --- plans


@plans_app.command("set")
def set_plan(
    model: str,
    retain: Annotated[Path, Rows],
    epsilon: Annotated[float | None, typer.Option(help="bound on the retain loss, nats per token")] = None,
    epsilon_relative: Annotated[float | None, typer.Option(help="the same, relative to the base model's")] = None,
    method: str = "pdu",
    hyperparameter: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE")] = None,
    max_steps: int | None = None,
    window: Annotated[int, typer.Option(metavar="SECONDS", help="how long the first request waits for others")] = 0,
    most: Annotated[int, typer.Option("--at-once", help="as many requests make a job at once")] = 16,
    url: Url = DEFAULT_URL,
) -> None:
    """From now on the service makes the jobs: one for the approved requests of the model that wait together."""
    constraint = {"epsilon": epsilon, "epsilon_relative": epsilon_relative}
    job: dict[str, Any] = {
        "method": {"type": method, "hyperparameters": dict(map(pair, hyperparameter or ()))},
        "constraint": {name: value for name, value in constraint.items() if value is not None},
        "budget": {} if max_steps is None else {"max_steps": max_steps},
    }
    with connected(url) as api:
        api.plans.set(model, job, retain, window_seconds=window, requests_max=most)


@plans_app.command("show")
def show_plan(model: str, url: Url = DEFAULT_URL) -> None:
    """As JSON; `status_reason`: what its next job waits for."""
    with connected(url) as api:
        printing.as_json(api.plans.get(model).raw, indent=2)


@plans_app.command("remove")
def remove_plan(model: str, url: Url = DEFAULT_URL) -> None:
    """Approved requests wait then for a job that somebody submits."""
    with connected(url) as api:
        api.plans.remove(model)


# --- evidence, and its absence


@app.command()
def report(job_id: str, out: Out, url: Url = DEFAULT_URL) -> None:
    """Fetch a job's report: the page if OUT ends in .html, else JSON."""
    with connected(url) as api:
        api.save_report(job_id, out)


@app.command()
def evidence(
    job_id: str,
    out: Annotated[Path, typer.Option(file_okay=False, help="a folder that is made")],
    url: Url = DEFAULT_URL,
) -> None:
    """Fetch all that a job proves anything with, and print the command that checks it offline. Wants an auditor's key."""
    with connected(url) as api:
        found = api.evidence(job_id, out)
    given = {name: path for name, path in found._asdict().items() if name != "certificate" and path is not None}
    options = [str(part) for name, path in given.items() for part in (f"--{name}", path)]
    printing.line(shlex.join(["unlearn", "verify", str(found.certificate), *options]))
    if found.adapter is None:
        printing.line("The certificate is about the base model's files: add --model FOLDER to check them.", error=True)


@app.command()
def purge(file_id: list[str], url: Url = DEFAULT_URL) -> None:
    """Make uploaded sets unreadable, for ever. Counts and keyed digests stay.

    Ids of sets stand in what `unlearn requests show`, `plans show` and `status JOB` print.
    """
    with connected(url) as api:
        for one in file_id:
            api.files.purge(one)
