"""unlearn verify: what a certificate proves, checked here, without the service and without a network."""

from pathlib import Path
from typing import Annotated

import typer

from service import printing
from service.evidence import verify as evidence
from service.evidence.certificate import Reverification, Unlearning
from service.evidence.verify import Verification

app = typer.Typer(rich_markup_mode=None)
File = typer.Option(exists=True, dir_okay=False)
WORDS = {"yes": "holds", "no": "FAILS", "not checked": "not checked"}
UNSIGNED = "No signature was proven: the files may match, but anybody could have written such a certificate."


@app.command()
def verify(
    certificate: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    adapter: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="the adapter's folder")] = None,
    model: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="the base model's folder")] = None,
    report: Annotated[Path | None, File] = None,
    keys: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="JWKS of the service, from a source that you trust"),
    ] = None,
    audit: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="the audit log as it was exported, JSON Lines")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Check offline what a certificate proves, whatever its verdict is.

    Exit status 0: all that was given holds, the signature too; 1: something does not; 3: no keys were given.
    """
    found = evidence.verify(evidence.Given(certificate, adapter, report, keys, audit, model))
    if as_json:
        says = found.says.model_dump() if found.says else None
        printing.as_json({"findings": [one._asdict() for one in found.findings], "certificate": says}, indent=2)
    else:
        for line in _lines(found):
            printing.line(line)
    raise typer.Exit(found.exit_status)


def _lines(found: Verification) -> list[str]:
    lines = [f"{WORDS[one.proven]:12} {one.what}: {one.detail}" for one in found.findings]
    if not found.signed:
        lines += ["", UNSIGNED]
    if found.says:
        lines += [
            "",
            *_said(found.says),
            "",
            "What it does not prove:",
            *(f"- {one}" for one in found.says.limitations),
        ]
    return lines


def _said(says: Unlearning) -> list[str]:
    """The certificate's own words, as good as its signature."""
    bound = says.constraint
    kept = {True: "kept", False: "broken", None: "not judged"}[bound.feasible]  # four digits of both may be the same
    again = (
        [f"a reverification of job {says.reverifies}: its adapter, under verdict rules {says.verdict.rules}"]
        if isinstance(says, Reverification)
        else []
    )
    measured = "not measured" if bound.measured is None else f"{bound.measured:.4g} (bound {kept})"
    return [
        "What the certificate says:",
        *again,
        f"job {says.job_id}, deletion requests {', '.join(says.deletion_requests) or 'none'}",
        f"base model {says.base_model.id}, revision {says.base_model.revision or 'none'}, {says.base_model.digest}",
        f"{says.forget_set.rows} rows to forget, {says.retain_set.rows} to keep; method {says.method.type}",
        f"retain loss {measured} with a bound of {bound.epsilon:.4g} nats per token",
        f"verdict {says.verdict.result}, by rules {says.verdict.rules}: {says.verdict.message}",
        f"from {says.started_at} to {says.finished_at}",
    ]
