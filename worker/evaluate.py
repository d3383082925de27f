"""Suites run on a model: the figures of a report.

    python -m worker.evaluate --suite tofu --model FOLDER --data forget=forget01_perturbed.json ...

prints those of one suite as JSON in the shape of the field's reference, without the service.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from transformers.utils import logging as transformers_logging

from service.domain.errors import FieldProblem, InvalidRequest, JobFailure
from service.domain.job import ModelEntry, PromptFormat
from service.domain.report import Figure, RowPoint
from service.store.storage import Storage
from worker import model, registry, scoring
from worker.measure import Sets
from worker.model import Network
from worker.suite import Result, Row, Suite, from_reference_json, to_reference_json
from worker.suite import Sets as SuiteSets

Results = Mapping[str, Result]


def run(
    network: Network,
    suite: Suite,
    sets: SuiteSets,
    retrained: Results | None = None,
    cache: Storage | None = None,
) -> dict[str, Result]:
    """Every figure of the suite.

    Args:
        retrained: those of a model that never saw the forget set.
        cache: where what the model says of the texts is kept, for the next job that asks for it; never of a customer's rows.
    """
    return suite.results(sets, scoring.look(network, suite.asks(sets), cache), retrained)


# --- a request's own sets


class Request(NamedTuple):
    """The rows of a request that its figures are taken over, with all their columns."""

    suite: Suite
    sets: SuiteSets
    places: Mapping[str, Sequence[int]]  # set -> 0-based place in its file of each row here


def request(both: Sets, forget: Sequence[Row], retain: Sequence[Row], holdout: Sequence[Row]) -> Request:
    """Of sets of usual size all rows that can be measured; of larger ones the sample that the checks measure, too."""
    places = {"forget": both.forget_places, "retain": both.retain_places, "holdout": range(len(holdout))}
    rows = {"forget": forget, "retain": retain, "holdout": holdout}
    sets = {name: [rows[name][place] for place in places[name]] for name in rows if rows[name]}
    return Request(registry.build("suites", "request", {}), sets, places)


def figures(request: Request, before: Results, after: Results) -> list[Figure]:
    """The before/after table, in the suite's order."""
    table = []
    for name, form in request.suite.figures.items():
        of, _, metric = name.partition("/")
        old, new = before[name], after[name]
        table.append(
            Figure(
                set=of,
                metric=metric,
                better=form.better,
                definition=form.definition,
                before=old.value,
                after=new.value,
                before_interval=old.interval,
                after_interval=new.interval,
                rows=new.rows,
                reason=old.reason or new.reason,
            )
        )
    return table


def row_points(request: Request, before: Results, after: Results) -> dict[str, list[RowPoint]]:
    """The probability of each row's answer, before and after, by the row's number in its file."""
    points = {}
    for of in ("forget", "retain"):
        name = f"{of}/probability"
        old, new = before[name].by_row, after[name].by_row
        points[name] = [
            RowPoint(row=request.places[of][i] + 1, before=old[i], after=new[i])
            for i in sorted(old.keys() & new.keys())
        ]
    return points


# --- without the service


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.evaluate", description="Run a suite on a model.")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="safetensors and tokeniser")
    parser.add_argument("--prompt-format", default="{}", metavar="JSON", help="of the registered model")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="LoRA, as PEFT saves it")
    parser.add_argument("--suite", required=True, choices=sorted(registry.entries("suites")))
    parser.add_argument("--data", action="append", default=[], metavar="SET=FILE", help="JSON Lines, or a JSON array")
    parser.add_argument("--retrained", type=Path, metavar="FILE", help="what this printed for the retrained model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    suite: Suite = registry.build("suites", options.suite, {})
    try:
        sets = _read_sets(suite, options.data)
        known = None if options.retrained is None else from_reference_json(_json(options.retrained))
        network = model.load(_entry(options), options.model.resolve().parent, options.device, options.dtype)
        if options.adapter is not None:
            network = model.load_adapter(network, options.adapter)
        results = run(network, suite, sets, known)
    except (JobFailure, InvalidRequest, ValidationError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    json.dump(to_reference_json(results), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")
    return 0


def _entry(options: argparse.Namespace) -> ModelEntry:
    folder: Path = options.model.resolve()
    prompt_format = PromptFormat.model_validate_json(options.prompt_format)
    return ModelEntry(name=folder.name, source="path", location=folder.name, prompt_format=prompt_format)


def _read_sets(suite: Suite, given: Sequence[str]) -> SuiteSets:
    """Raises InvalidRequest for a set that the suite does not take or lacks, and for rows without a column that it needs."""
    files = dict(pair.partition("=")[::2] for pair in given)
    problems = [
        *(f"there is no set {name!r}; there are: {', '.join(suite.sets)}" for name in files if name not in suite.sets),
        *(f"set {name!r} is missing" for name, form in suite.sets.items() if form.required and name not in files),
    ]
    sets: dict[str, list[Row]] = {}
    for name in files if not problems else ():
        sets[name] = _rows(Path(files[name]))
        lacking = {
            column
            for row in sets[name]
            for column in suite.sets[name].columns
            if not isinstance(row, dict) or column not in row
        }
        if lacking or not sets[name]:
            problems.append(f"{files[name]}: " + (f"rows lack {', '.join(sorted(lacking))}" if lacking else "no rows"))
    if problems:
        raise InvalidRequest(*(FieldProblem("", problem, "data") for problem in problems))
    return sets


def _rows(path: Path) -> list[Row]:
    text = _text(path)
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except ValueError as error:
        raise InvalidRequest(FieldProblem("", f"{path} is neither JSON Lines nor a JSON array", "data")) from error
    return list(rows)


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise InvalidRequest(FieldProblem("", f"{path} is not JSON", "data")) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(FieldProblem("", f"{path} cannot be read: {error}", "data")) from error


if __name__ == "__main__":
    sys.exit(main())
