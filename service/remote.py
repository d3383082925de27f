"""unlearn: what a user does over HTTP."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from service import client
from service.domain.errors import UnlearnError

app = typer.Typer(rich_markup_mode=None)
benchmarks_app = typer.Typer(
    help="Data that a suite reads, registered once.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(benchmarks_app, name="benchmarks")
audit_app = typer.Typer(help="The log of who did what.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(audit_app, name="audit")

Url = Annotated[str, typer.Option("--url", envvar="UNLEARN_URL", help="where the API answers", show_default=True)]
Rows = typer.Option(exists=True, dir_okay=False, help="JSON Lines, or a JSON array")
Out = Annotated[Path, typer.Option(dir_okay=False, help="the file to write")]
DEFAULT_URL = "http://127.0.0.1:8000"
BENCHMARKS = "/v1/benchmarks"
REGISTER_TIMEOUT_S = 600.0  # the service reads every row, and fetches what is on the Hub
HUB = re.compile(r"hub:(?P<repo>[^/@]+/[^/@]+)@(?P<revision>[^/]+)/(?P<path>.+)")
GATE = re.compile(r"(?P<metric>[^<>=]+?)\s*(?P<op><=|>=)\s*(?P<threshold>[^:]+)(:(?P<severity>fail|warn))?")


@app.command()
def submit(
    model: Annotated[str, typer.Option()],
    forget: Annotated[Path, Rows],
    retain: Annotated[Path, Rows],
    refusals: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="JSON Lines of text, for a method that teaches them"),
    ] = None,
    holdout: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="rows like the forgotten that the model never saw")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="bound on the retain loss, nats per token")] = None,
    epsilon_relative: Annotated[
        float | None, typer.Option(help="the same, relative to that of the model it starts from")
    ] = None,
    method: str = "pdu",
    hyperparameter: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE")] = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
    parent: Annotated[str | None, typer.Option(metavar="JOB", help="start from this job's adapter")] = None,
    serves: Annotated[
        list[str] | None, typer.Option(metavar="REQUEST", help="a deletion request; again for more")
    ] = None,
    benchmark: Annotated[list[str] | None, typer.Option(help="a registered one; again for more")] = None,
    audit: Annotated[bool, typer.Option("--audit", help="try to bring back what was forgotten")] = False,
    gate: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC<=VALUE", help="or >=; with :warn it only warns; again for more"),
    ] = None,
    stay: Annotated[bool, typer.Option("--watch", help="stay until it has ended")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Ask a model to forget; prints the job's id."""
    budget = {"max_steps": max_steps, "max_seconds": max_seconds}
    constraint = {"epsilon": epsilon, "epsilon_relative": epsilon_relative}
    with client.told(), client.connect(url) as http:
        job = {
            "model": model,
            "method": {"type": method, "hyperparameters": dict(map(client.pair, hyperparameter or ()))},
            "constraint": {name: value for name, value in constraint.items() if value is not None},
            "budget": {name: value for name, value in budget.items() if value is not None},
            "seed": seed,
            "parent": parent,
            "deletion_requests": serves or [],
            "benchmarks": benchmark or [],
            "audit": {} if audit else None,
            "gates": [_gate(text) for text in gate or ()],
            "forget_set": client.upload(http, "forget_set", forget),
            "retain_set": client.upload(http, "retain_set", retain),
            "refusal_set": client.upload(http, "refusal_set", refusals) if refusals else None,
            "holdout_set": client.upload(http, "holdout_set", holdout) if holdout else None,
        }
        created = client.post(http, client.JOBS, job)
        for warning in created["warnings"]:
            typer.echo(f"warning: {warning['message']}", err=True)
        typer.echo(created["id"])
        if stay:
            raise typer.Exit(client.follow(http, created["id"]))


@app.command()
def watch(job_id: str, url: Url = DEFAULT_URL) -> None:
    """Follow a job to its end. Exit status 0: its model passed; 1: it did not, or the run failed."""
    with client.told(), client.connect(url) as http:
        raise typer.Exit(client.follow(http, job_id))


@app.command()
def status(job_id: Annotated[str | None, typer.Argument()] = None, url: Url = DEFAULT_URL) -> None:
    """Show one job as JSON, or the latest ones, a line each."""
    with client.told(), client.connect(url) as http:
        if job_id:
            typer.echo(json.dumps(client.body_of(http.get(f"{client.JOBS}/{job_id}")), indent=2))
            return
        for job in client.body_of(http.get(client.JOBS))["data"]:
            verdict = (job["verdict"] or {}).get("result", "")
            typer.echo(f"{job['id']}  {job['created_at'][:19]}Z  {job['model']:20} {job['status']:10} {verdict}")


@app.command()
def certificate(job_id: str, out: Out, url: Url = DEFAULT_URL) -> None:
    """Fetch the certificate of a job; `unlearn verify` checks it offline."""
    with client.told(), client.connect(url) as http:
        client.save(http, f"{client.JOBS}/{job_id}/certificate", "application/vnd.dsse.envelope.v1+json", out)


@audit_app.command("export")
def export_audit(out: Out, url: Url = DEFAULT_URL) -> None:
    """Fetch the whole audit log of the tenant, JSON Lines, as `unlearn verify --audit` reads it."""
    with client.told(), client.connect(url) as http:
        client.save(http, "/v1/audit-events", "application/jsonl", out)


@benchmarks_app.command("add")
def add(
    name: str,
    suite: Annotated[str, typer.Option(help="tofu or muse; `unlearn benchmarks suites` shows their sets")],
    corpus: Annotated[str, typer.Option(help="what the data is, for the report: 'TOFU forget01'")],
    sets: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="SET=FILE",
            help="JSON Lines, or a JSON array; one for each set. Or SET=hub:OWNER/NAME@SHA/PATH, which the service fetches",
        ),
    ],
    retrained_model: Annotated[
        str | None, typer.Option(help="a registered model that never saw the forget set")
    ] = None,
    retrained_scores: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="or what `unlearn evaluate` printed of one"),
    ] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Upload the sets and register them under a name."""
    given = dict(map(_set_source, sets))
    paths = {of: source for of, source in given.items() if isinstance(source, Path)}
    uploaded = dict[Path, str]()
    with client.told(), client.connect(url) as http:
        http.timeout = REGISTER_TIMEOUT_S
        try:
            for path in paths.values():
                if path not in uploaded:
                    uploaded[path] = client.upload(http, "eval_set", path)
            if retrained_scores is not None:
                uploaded[retrained_scores] = client.upload(http, "eval_scores", retrained_scores)
            asked = {
                "name": name,
                "suite": suite,
                "corpus": corpus,
                "sets": given | {of: uploaded[path] for of, path in paths.items()},
                "retrained_model": retrained_model,
                "retrained_scores": uploaded[retrained_scores] if retrained_scores else None,
            }
            created = client.post(http, BENCHMARKS, asked)
        except (UnlearnError, httpx.HTTPError):
            for file_id in uploaded.values():  # nobody would find them again
                http.delete(f"/v1/files/{file_id}")
            raise
    typer.echo(_benchmark_line(created))


@benchmarks_app.command("list")
def list_benchmarks(url: Url = DEFAULT_URL) -> None:
    """Show those that are registered."""
    with client.told(), client.connect(url) as http:
        for benchmark in client.body_of(http.get(BENCHMARKS))["data"]:
            typer.echo(_benchmark_line(benchmark))


@benchmarks_app.command("suites")
def suites(url: Url = DEFAULT_URL) -> None:
    """Show what the suites take: each set with its columns; those in brackets can be left out."""
    with client.told(), client.connect(url) as http:
        for suite in client.body_of(http.get("/v1/suites"))["data"]:
            typer.echo(f"{suite['id']}: {suite['summary']}")
            for name, form in suite["sets"].items():
                shown = name if form["required"] else f"[{name}]"
                columns = [*form["columns"], *(f"[{column}]" for column in form["optional"])]
                typer.echo(f"  {shown:20} {', '.join(columns)}: {form['what']}")


@benchmarks_app.command("remove")
def remove(name: str, url: Url = DEFAULT_URL) -> None:
    """Forget a benchmark and delete its files, but for those that another one needs."""
    with client.told(), client.connect(url) as http:
        benchmark = client.body_of(http.get(f"{BENCHMARKS}/{name}"))
        client.body_of(http.delete(f"{BENCHMARKS}/{name}"))
        for file_id in {*benchmark["sets"].values(), benchmark["retrained_scores"]} - {None}:
            http.delete(f"/v1/files/{file_id}")


def _benchmark_line(benchmark: dict[str, Any]) -> str:
    retrained = benchmark["retrained_model"] or benchmark["retrained_scores"] or "nothing retrained"
    sets = ", ".join(benchmark["sets"])
    return f"{benchmark['id']}  {benchmark['suite']}  {benchmark['corpus']}  sets {sets}; {retrained}"


def _set_source(text: str) -> tuple[str, Path | dict[str, str]]:
    """A file here, or one on the Hub as a request names it."""
    name, equals, source = text.partition("=")
    if equals and (on_hub := HUB.fullmatch(source)):
        return name, on_hub.groupdict()
    if not equals or not Path(source).is_file():
        raise typer.BadParameter(
            f"--set {text}: write SET=FILE, with a file that is there, or SET=hub:OWNER/NAME@SHA/PATH"
        )
    return name, Path(source)


def _gate(text: str) -> dict[str, Any]:
    """A gate as a request has it."""
    found = GATE.fullmatch(text.strip())
    if found is not None:
        with suppress(ValueError):
            gate = {name: value for name, value in found.groupdict().items() if value is not None}
            return gate | {"threshold": float(gate["threshold"])}
    raise typer.BadParameter(f"--gate {text}: write METRIC<=VALUE or METRIC>=VALUE, and :warn behind it or nothing")
