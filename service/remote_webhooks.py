"""unlearn webhooks: where the service tells what happens."""

import json
from typing import Annotated

import typer

from service import client
from service.remote import DEFAULT_URL, Url

app = typer.Typer(
    help="Where the service tells what happens, by Standard Webhooks.", no_args_is_help=True, rich_markup_mode=None
)
ENDPOINTS = "/v1/webhook-endpoints"


@app.command()
def add(
    endpoint: Annotated[str, typer.Argument(metavar="ENDPOINT", help="the URL to call")],
    event: Annotated[list[str] | None, typer.Option(help="a type to be told; again for more; none: all")] = None,
    description: str = "",
    url: Url = DEFAULT_URL,
) -> None:
    """Make an endpoint; prints its id and its secret, which is shown once."""
    with client.told(), client.connect(url) as http:
        asked = {"url": endpoint, "description": description, "event_types": event or []}
        made = client.post(http, ENDPOINTS, asked)
    typer.echo(f"{made['id']}  {made['secret']}")


@app.command("list")
def list_endpoints(url: Url = DEFAULT_URL) -> None:
    """A line each, the newest first."""
    with client.told(), client.connect(url) as http:
        for one in client.body_of(http.get(ENDPOINTS, params={"limit": 100}))["data"]:
            told = ", ".join(one["event_types"]) or "everything"
            status = one["status"] + (f" ({one['status_reason']})" if one["status_reason"] else "")
            typer.echo(f"{one['id']}  {status}  {one['url']}  {told}")


@app.command()
def remove(endpoint_id: str, url: Url = DEFAULT_URL) -> None:
    """Delete an endpoint, with the log of its deliveries."""
    with client.told(), client.connect(url) as http:
        client.body_of(http.delete(f"{ENDPOINTS}/{endpoint_id}"))


@app.command()
def rotate(endpoint_id: str, url: Url = DEFAULT_URL) -> None:
    """Print a new secret. The old one signs beside it for a day."""
    with client.told(), client.connect(url) as http:
        typer.echo(client.body_of(http.post(f"{ENDPOINTS}/{endpoint_id}/rotate-secret"))["secret"])


@app.command()
def enable(endpoint_id: str, url: Url = DEFAULT_URL) -> None:
    """Send to one again that was disabled."""
    with client.told(), client.connect(url) as http:
        client.body_of(http.post(f"{ENDPOINTS}/{endpoint_id}/enable"))


@app.command("test")
def send_test(endpoint_id: str, url: Url = DEFAULT_URL) -> None:
    """Have a test sent; prints the delivery's id."""
    with client.told(), client.connect(url) as http:
        typer.echo(client.body_of(http.post(f"{ENDPOINTS}/{endpoint_id}/test"))["id"])


@app.command()
def deliveries(
    endpoint_id: str,
    limit: int = 20,
    as_json: Annotated[bool, typer.Option("--json", help="with each attempt, and what was answered")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """What an endpoint was sent, the newest first."""
    with client.told(), client.connect(url) as http:
        found = client.body_of(http.get(f"{ENDPOINTS}/{endpoint_id}/deliveries", params={"limit": limit}))["data"]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for one in found:
        last = one["attempts"][-1] if one["attempts"] else {}
        why = f"  {last['error']}" if last.get("error") else ""
        told = f"{one['type']:28} {one['status']:9} attempts {len(one['attempts'])}"
        typer.echo(f"{one['id']}  {one['created_at'][:19]}Z  {told}{why}")


@app.command()
def replay(delivery_id: str, url: Url = DEFAULT_URL) -> None:
    """Deliver a message again; prints the new delivery's id."""
    with client.told(), client.connect(url) as http:
        typer.echo(client.body_of(http.post(f"/v1/webhook-deliveries/{delivery_id}/replay"))["id"])
