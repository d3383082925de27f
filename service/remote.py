"""unlearn: what a user does over HTTP."""

import re
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from service import planned, printing
from service.client import Benchmark, HubSet, Job
from service.terminal import DEFAULT_URL, Out, Rows, Url, connected, follow, pair, show, stamp

app = typer.Typer(rich_markup_mode=None)
benchmarks_app = typer.Typer(
    help="Data that a suite reads, registered once.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(benchmarks_app, name="benchmarks")
audit_app = typer.Typer(help="The log of who did what.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(audit_app, name="audit")

LATEST = 20
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="tell what it would be; what is uploaded for that is purged again")
    ] = False,
    stay: Annotated[bool, typer.Option("--watch", help="stay until it has ended")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Ask a model to forget; prints the job's id."""
    bound = {"epsilon": epsilon, "epsilon_relative": epsilon_relative}
    budget = {"max_steps": max_steps, "max_seconds": max_seconds}
    body = {
        "model": model,
        "method": {"type": method, "hyperparameters": dict(map(pair, hyperparameter or ()))},
        "constraint": {name: value for name, value in bound.items() if value is not None},
        "budget": {name: value for name, value in budget.items() if value is not None},
        "seed": seed,
        "parent": parent,
        "deletion_requests": serves or [],
        "benchmarks": benchmark or [],
        "audit": {} if audit else None,
        "gates": [_gate(text) for text in gate or ()],
    }
    paths = {"forget_set": forget, "retain_set": retain, "refusal_set": refusals, "holdout_set": holdout}
    given = {name: (name, path) for name, path in paths.items() if path is not None}
    with connected(url) as api, api.files.uploaded(given, keep=not dry_run) as ids:
        if dry_run:
            for line in planned.lines(api.dry_run(body | ids)):
                printing.line(line)
            return
        job = api.create_job(body | ids)
        for warning in job.warnings:
            printing.line(f"warning: {warning.message}", error=True)
        printing.line(job.id)
    if stay:
        with connected(url) as api:
            raise typer.Exit(follow(api, job.id))


@app.command()
def watch(
    job_id: str,
    as_json: Annotated[bool, typer.Option("--json", help="the job's events, a line each")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Follow a job to its end. Exit status 0: its model passed; 1: it did not, or the run failed."""
    with connected(url) as api:
        raise typer.Exit(follow(api, job_id, as_json))


@app.command()
def status(
    job_id: Annotated[str | None, typer.Argument()] = None,
    as_json: Annotated[bool, typer.Option("--json", help="without JOB_ID: the API's own objects, a line each")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Show one job as JSON, or the latest ones, a line each."""
    with connected(url) as api:
        if job_id:
            printing.as_json(api.job(job_id).raw, indent=2)
            return
        show(islice(api.jobs(), LATEST), as_json, _job_line)


@app.command()
def cancel(job_id: str, url: Url = DEFAULT_URL) -> None:
    """End a job that waits, or ask one that runs to stop; prints its status."""
    with connected(url) as api:
        printing.line(api.cancel(job_id).status)


@app.command()
def pause(job_id: str, url: Url = DEFAULT_URL) -> None:
    """Keep a job until it is resumed; one that runs saves a checkpoint first. Prints its status."""
    with connected(url) as api:
        printing.line(api.pause(job_id).status)


@app.command()
def resume(job_id: str, url: Url = DEFAULT_URL) -> None:
    """Put a paused job back into the line, at its old place; prints its status."""
    with connected(url) as api:
        printing.line(api.resume(job_id).status)


@app.command()
def retry(job_id: str, url: Url = DEFAULT_URL) -> None:
    """Put a job that failed at the end of the line; prints its status."""
    with connected(url) as api:
        printing.line(api.retry(job_id).status)


@app.command()
def reverify(
    job_id: str,
    stay: Annotated[bool, typer.Option("--watch", help="stay until it has ended")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Evaluate a job's adapter again, under the current verdict rules, while its rows are kept; prints the new job's id."""
    with connected(url) as api:
        job = api.reverify(job_id)
        printing.line(job.id)
        if stay:
            raise typer.Exit(follow(api, job.id))


@app.command()
def certificate(job_id: str, out: Out, url: Url = DEFAULT_URL) -> None:
    """Fetch the certificate of a job; `unlearn verify` checks it offline."""
    with connected(url) as api:
        api.certificate(job_id, out)


@audit_app.command("export")
def export_audit(out: Out, url: Url = DEFAULT_URL) -> None:
    """Fetch the whole audit log of the tenant, JSON Lines, as `unlearn verify --audit` reads it."""
    with connected(url) as api:
        api.audit_log(out)


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
    with connected(url) as api:
        added = api.benchmarks.add(
            name,
            suite=suite,
            corpus=corpus,
            sets=given,
            retrained_model=retrained_model,
            retrained_scores=retrained_scores,
        )
    printing.line(_benchmark_line(added))


@benchmarks_app.command("list")
def list_benchmarks(url: Url = DEFAULT_URL) -> None:
    """Show those that are registered."""
    with connected(url) as api:
        for benchmark in api.benchmarks.list():
            printing.line(_benchmark_line(benchmark))


@benchmarks_app.command("suites")
def suites(url: Url = DEFAULT_URL) -> None:
    """Show what the suites take: each set with its columns; those in brackets can be left out."""
    with connected(url) as api:
        for suite in api.benchmarks.suites():
            printing.line(f"{suite.id}: {suite.summary}")
            for name, form in suite.sets.items():
                shown = name if form.required else f"[{name}]"
                columns = [*form.columns, *(f"[{column}]" for column in form.optional)]
                printing.line(f"  {shown:20} {', '.join(columns)}: {form.what}")


@benchmarks_app.command("remove")
def remove(name: str, url: Url = DEFAULT_URL) -> None:
    """Forget a benchmark and delete its files, but for those that another one needs."""
    with connected(url) as api:
        api.benchmarks.remove(name)


def _job_line(job: Job) -> str:
    verdict = job.verdict.result if job.verdict else ""
    return f"{job.id}  {stamp(job.created_at)}  {job.model:20} {job.status:10} {verdict}"


def _benchmark_line(benchmark: Benchmark) -> str:
    retrained = benchmark.retrained_model or benchmark.retrained_scores or "nothing retrained"
    return f"{benchmark.id}  {benchmark.suite}  {benchmark.corpus}  sets {', '.join(benchmark.sets)}; {retrained}"


def _set_source(text: str) -> tuple[str, Path | HubSet]:
    """A file here, or one on the Hub as a request names it."""
    name, equals, source = text.partition("=")
    if equals and (on_hub := HUB.fullmatch(source)):
        return name, HubSet(**on_hub.groupdict())
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
