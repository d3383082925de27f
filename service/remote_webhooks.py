"""unlearn webhooks: where the service tells what happens."""

from typing import Annotated

import typer

from service import printing
from service.client import Delivery, Endpoint
from service.terminal import DEFAULT_URL, Url, connected, show, stamp

app = typer.Typer(
    help="Where the service tells what happens, by Standard Webhooks.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def add(
    endpoint: Annotated[str, typer.Argument(metavar="ENDPOINT", help="the URL to call")],
    event: Annotated[list[str] | None, typer.Option(help="a type to be told; again for more; none: all")] = None,
    description: str = "",
    url: Url = DEFAULT_URL,
) -> None:
    """Make an endpoint; prints its id and its secret, which is shown once."""
    with connected(url) as api:
        made = api.webhooks.add(endpoint, event_types=event or (), description=description)
    printing.line(f"{made.id}  {made.secret}")


@app.command("list")
def list_endpoints(url: Url = DEFAULT_URL) -> None:
    """A line each, the newest first."""
    with connected(url) as api:
        show(api.webhooks.list(), False, _endpoint_line)


@app.command()
def remove(endpoint_id: str, url: Url = DEFAULT_URL) -> None:
    """Delete an endpoint, with the log of its deliveries."""
    with connected(url) as api:
        api.webhooks.remove(endpoint_id)


@app.command()
def rotate(endpoint_id: str, url: Url = DEFAULT_URL) -> None:
    """Print a new secret. The old one signs beside it for a day."""
    with connected(url) as api:
        printing.line(api.webhooks.rotate(endpoint_id).secret or "")


@app.command()
def enable(endpoint_id: str, url: Url = DEFAULT_URL) -> None:
    """Send to one again that was disabled."""
    with connected(url) as api:
        api.webhooks.enable(endpoint_id)


@app.command("test")
def send_test(endpoint_id: str, url: Url = DEFAULT_URL) -> None:
    """Have a test sent; prints the delivery's id."""
    with connected(url) as api:
        printing.line(api.webhooks.test(endpoint_id).id)


@app.command()
def deliveries(
    endpoint_id: str,
    limit: int = 20,
    as_json: Annotated[bool, typer.Option("--json", help="with each attempt, and what was answered")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """What an endpoint was sent, the newest first."""
    with connected(url) as api:
        found = list(api.webhooks.deliveries(endpoint_id, limit))
    if as_json:
        printing.as_json([one.raw for one in found], indent=2)
    else:
        show(found, False, _delivery_line)


@app.command()
def replay(delivery_id: str, url: Url = DEFAULT_URL) -> None:
    """Deliver a message again; prints the new delivery's id."""
    with connected(url) as api:
        printing.line(api.webhooks.replay(delivery_id).id)


def _endpoint_line(one: Endpoint) -> str:
    status = one.status + (f" ({one.status_reason})" if one.status_reason else "")
    return f"{one.id}  {status}  {one.url}  {', '.join(one.event_types) or 'everything'}"


def _delivery_line(one: Delivery) -> str:
    error = one.attempts[-1].error if one.attempts else None
    when, why = stamp(one.created_at), f"  {error}" if error else ""
    return f"{one.id}  {when}  {one.type:28} {one.status:9} attempts {len(one.attempts)}{why}"
