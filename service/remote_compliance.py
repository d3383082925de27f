"""unlearn: what a compliance team does over HTTP: keys, deletion requests and their plans, evidence, purges."""

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from service import client
from service.remote import DEFAULT_URL, Out, Rows, Url

KEYS, REQUESTS, PLANS, FILES = "/v1/api-keys", "/v1/deletion-requests", "/v1/deletion-plans", "/v1/files"
PUBLISHED_KEYS = "/.well-known/unlearning-keys"

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
RequestId = Annotated[str, typer.Argument(metavar="REQUEST")]


# --- keys


@keys_app.command("create")
def create_key(
    name: str,
    role: Annotated[str | None, typer.Option(help="compliance_submitter, compliance_approver, mlops, ...")] = None,
    scope: Annotated[list[str] | None, typer.Option(help="beside those of the role; again for more")] = None,
    expires: Annotated[datetime | None, typer.Option(help="default: never")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Make a key and print its secret: it is shown once. Its scopes are at most those of the key that makes it."""
    body: dict[str, Any] = {"name": name, "role": role, "scopes": scope or []}
    body["expires_at"] = expires.astimezone().isoformat() if expires else None
    with client.told(), client.connect(url) as http:
        typer.echo(client.post(http, KEYS, body)["secret"])


@keys_app.command("list")
def list_keys(as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """A line each, revoked ones too."""

    def line(key: dict[str, Any]) -> str:
        state = "revoked" if key["revoked_at"] else f"used {key['last_used_at'] or 'never'}"
        return f"{key['id']}  {key['prefix']}...  {key['name']}  {state}  {' '.join(key['scopes'])}"

    _show_list(url, KEYS, {}, as_json, line)


@keys_app.command("revoke")
def revoke_key(key_id: str, url: Url = DEFAULT_URL) -> None:
    """At once and for ever."""
    with client.told(), client.connect(url) as http:
        client.body_of(http.delete(f"{KEYS}/{key_id}"))


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
    with client.told(), client.connect(url) as http:
        body: dict[str, Any] = {"regulation": regulation, "models": model, "subjects": subject or []}
        body |= {"external_reference": reference, "forget_set": client.upload(http, "forget_set", forget)}
        for name, time in (("received_at", received), ("due_at", due)):
            if time is not None:
                body[name] = time.astimezone().isoformat()
        try:
            typer.echo(client.post(http, REQUESTS, body)["id"])
        except Exception:
            http.delete(f"{FILES}/{body['forget_set']}")  # what nobody asked for is not kept
            raise


@requests_app.command("list")
def list_requests(
    status: str | None = None,
    due_before: datetime | None = None,
    subject: Annotated[str | None, typer.Option(help="an identifier as it was submitted")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """The latest first, a line each."""
    asked = {"status": status, "subject": subject}
    asked["due_before"] = due_before.astimezone().isoformat() if due_before else None

    def line(one: dict[str, Any]) -> str:
        late = "  OVERDUE" if one["overdue"] else ""
        return f"{one['id']}  {one['status']}  due {one['due_at']}{late}  {one['external_reference'] or ''}".rstrip()

    _show_list(url, REQUESTS, {name: value for name, value in asked.items() if value is not None}, as_json, line)


@requests_app.command("show")
def show_request(request_id: RequestId, url: Url = DEFAULT_URL) -> None:
    """As JSON, with its jobs, approvals and deadlines."""
    with client.told(), client.connect(url) as http:
        typer.echo(json.dumps(client.body_of(http.get(f"{REQUESTS}/{request_id}")), indent=2))


@requests_app.command("approve")
def approve(request_id: RequestId, url: Url = DEFAULT_URL) -> None:
    """As somebody else than who submitted it."""
    _decide(url, request_id, "approve")


@requests_app.command("deny")
def deny(
    request_id: RequestId,
    reason: Annotated[str, typer.Option(help="suspected_fraud, insuf_verification, no_match, ... or other")],
    note: str | None = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Before a job serves it. Its rows are purged."""
    _decide(url, request_id, "deny", {"reason": reason, "note": note})


@requests_app.command("cancel")
def cancel(request_id: RequestId, url: Url = DEFAULT_URL) -> None:
    """Take it back. Its rows are purged."""
    _decide(url, request_id, "cancel")


@requests_app.command("extend")
def extend(request_id: RequestId, reason: Reason, url: Url = DEFAULT_URL) -> None:
    """Once, as far as the regulation allows."""
    _decide(url, request_id, "extend", {"reason": reason})


@requests_app.command("close")
def close(request_id: RequestId, reason: Reason, url: Url = DEFAULT_URL) -> None:
    """Call it completed, in your name, though no job has passed for each of its models."""
    _decide(url, request_id, "close", {"reason": reason})


def _decide(url: str, request_id: str, verb: str, body: dict[str, Any] | None = None) -> None:
    path = f"{REQUESTS}/{request_id}/{verb}"
    with client.told(), client.connect(url) as http:
        decided = client.body_of(http.post(path)) if body is None else client.post(http, path, body)
        typer.echo(decided["status"])


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
    with client.told(), client.connect(url) as http:
        job: dict[str, Any] = {
            "method": {"type": method, "hyperparameters": dict(map(client.pair, hyperparameter or ()))},
            "constraint": {name: value for name, value in constraint.items() if value is not None},
            "budget": {} if max_steps is None else {"max_steps": max_steps},
            "retain_set": client.upload(http, "retain_set", retain),
        }
        plan = {"job": job, "window_seconds": window, "requests_max": most}
        client.body_of(http.put(f"{PLANS}/{model}", json=plan))


@plans_app.command("show")
def show_plan(model: str, url: Url = DEFAULT_URL) -> None:
    with client.told(), client.connect(url) as http:
        typer.echo(json.dumps(client.body_of(http.get(f"{PLANS}/{model}")), indent=2))


@plans_app.command("remove")
def remove_plan(model: str, url: Url = DEFAULT_URL) -> None:
    """Approved requests wait then for a job that somebody submits."""
    with client.told(), client.connect(url) as http:
        client.body_of(http.delete(f"{PLANS}/{model}"))


# --- evidence, and its absence


@app.command()
def report(job_id: str, out: Out, url: Url = DEFAULT_URL) -> None:
    """Fetch a job's report: the page if OUT ends in .html, else JSON."""
    media_type = "text/html" if out.suffix == ".html" else "application/json"
    with client.told(), client.connect(url) as http:
        _save(http, f"{client.JOBS}/{job_id}/report", out, media_type)


@app.command()
def evidence(
    job_id: str,
    out: Annotated[Path, typer.Option(file_okay=False, help="a folder that is made")],
    url: Url = DEFAULT_URL,
) -> None:
    """Fetch all that a job proves anything with, and print the command that checks it offline."""
    with client.told(), client.connect(url) as http:
        (out / "adapter").mkdir(parents=True, exist_ok=True)
        job = f"{client.JOBS}/{job_id}"
        _save(http, f"{job}/certificate", out / "certificate.json")
        _save(http, f"{job}/report", out / "report.json", "application/json")
        _save(http, PUBLISHED_KEYS, out / "keys.json")
        _save(http, "/v1/audit-events", out / "audit.jsonl", "application/jsonl")
        for artifact in client.body_of(http.get(f"{job}/artifacts"))["data"]:
            folder, _, name = artifact["name"].rpartition("/")
            if folder == "adapter":
                _save(http, artifact["content"], out / "adapter" / Path(name).name)
    typer.echo(
        f"unlearn verify {out}/certificate.json --adapter {out}/adapter --report {out}/report.json "
        f"--keys {out}/keys.json --audit {out}/audit.jsonl"
    )


@app.command()
def purge(file_id: list[str], url: Url = DEFAULT_URL) -> None:
    """Make uploaded sets unreadable, for ever. Counts and keyed digests stay."""
    with client.told(), client.connect(url) as http:
        for one in file_id:
            client.body_of(http.delete(f"{FILES}/{one}"))


def _save(http: httpx.Client, path: str, out: Path, accept: str = "*/*") -> None:
    """Raises UnlearnError with the problem's own words."""
    reply = http.get(path, headers={"Accept": accept})
    if reply.is_error:
        client.body_of(reply)
    out.write_bytes(reply.content)


def _show_list(url: str, path: str, asked: dict[str, Any], as_json: bool, line: Any) -> None:
    """All pages of it."""
    with client.told(), client.connect(url) as http:
        while True:
            found = client.body_of(http.get(path, params={"limit": 100, **asked}))
            for one in found["data"]:
                typer.echo(json.dumps(one) if as_json else line(one))
            if not found["has_more"]:
                return
            asked = asked | {"after": found["last_id"]}
