"""Suites run on a model: the figures of a report.

    python -m worker.evaluate --suite tofu --model FOLDER --data forget=forget01_perturbed.json ...

prints those of one suite as JSON in the shape of the field's reference, without the service.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from transformers.utils import logging as transformers_logging

from service.domain import rows, scores
from service.domain.errors import FieldProblem, InvalidRequest, JobFailure
from service.domain.job import ModelEntry, PromptFormat
from service.domain.report import NOT_TRAINED, Figure, RowPoint
from service.evidence.rowdigest import row_digests
from service.store.storage import Storage
from worker import model, registry, scoring
from worker.figures import SAID
from worker.measure import Sets
from worker.model import Network
from worker.suite import Result, Row, Seen, Suite, from_reference_json, to_reference_json
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
    """All rows that can be measured, however many: figures and gates are promises too."""
    whole = both.whole
    places = {"forget": whole.forget_places, "retain": whole.retain_places, "holdout": range(len(holdout))}
    given = {"forget": forget, "retain": retain, "holdout": holdout}
    sets = {name: [given[name][place] for place in places[name]] for name in given if given[name]}
    return Request(registry.build("suites", "request", {}), sets, places)


def given(request: Request, seen: Seen) -> dict[str, dict[int, list[int]]]:
    """Set -> place in its file -> the tokens that the model answered to the row's question."""
    found: dict[str, dict[int, list[int]]] = {}
    for (of, text), look in seen.items():
        if text == SAID and look.generated_ids is not None:
            found[of] = {request.places[of][i]: ids for i, ids in look.generated_ids.items()}
    return found


def figures(request: Request, before: Results, after: Results | None) -> list[Figure]:
    """The before/after table, in the suite's order. `after` is None where nothing was trained."""
    table = []
    for name, form in request.suite.figures.items():
        of, _, metric = name.partition("/")
        old = before[name]
        new = after[name] if after is not None else Result(None, reason=NOT_TRAINED, rows=old.rows)
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


def row_points(
    request: Request,
    before: Results,
    after: Results | None,
    examples: Mapping[str, Sequence[rows.Example]],
    row_key: bytes,
) -> dict[str, list[RowPoint]]:
    """The probability of each row's answer, before and after, by the row's number in its file and by its digest.

    Args:
        after: None: nothing was trained.
        examples: all rows of both files.
        row_key: what they are digested with.
    """
    points = {}
    for of in ("forget", "retain"):
        name = f"{of}/probability"
        old = before[name].by_row
        new = after[name].by_row if after is not None else dict.fromkeys(old)
        shared = sorted(old.keys() & new.keys())
        places = [request.places[of][i] for i in shared]
        digests = row_digests(row_key, (examples[of][place] for place in places))
        points[name] = [
            RowPoint(row=place + 1, digest=digest, before=old[i], after=new[i])
            for i, place, digest in zip(shared, places, digests, strict=True)
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
        known = _retrained(options.retrained, sets) if options.retrained else None
        network = model.load(_entry(options), options.model.resolve().parent, options.device, options.dtype)
        if options.adapter is not None:
            network = _with_adapter(network, options.adapter)
        results = run(network, suite, sets, known)
    except (JobFailure, InvalidRequest) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    printed = to_reference_json(results) | {scores.DIGESTS: {name: scores.digest(rows) for name, rows in sets.items()}}
    json.dump(printed, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")
    return 0


def _retrained(path: Path, sets: SuiteSets) -> Results:
    """Raises InvalidRequest for figures of other rows than the sets'."""
    stored = scores.read(_text(path).encode())
    for name, of in sets.items():
        if found := scores.mismatch(stored, name, of):
            raise _refused(f"{path}: {found}")
    return from_reference_json(stored.figures)


def _entry(options: argparse.Namespace) -> ModelEntry:
    folder: Path = options.model.resolve()
    try:
        prompt_format = PromptFormat.model_validate_json(options.prompt_format)
    except ValidationError as error:
        raise _refused("--prompt-format is not the JSON of a prompt format") from error
    return ModelEntry(name=folder.name, source="path", location=folder.name, prompt_format=prompt_format)


def _with_adapter(network: Network, folder: Path) -> Network:
    try:
        return model.load_adapter(network, folder)
    except (ValueError, OSError, RuntimeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise _refused(f"{folder} is no adapter of this model: {why}") from error


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(FieldProblem("", message, "data"))


def _read_sets(suite: Suite, given: Sequence[str]) -> SuiteSets:
    """Raises InvalidRequest for a set that the suite does not take or lacks, and for rows that are not as it needs them."""
    files = [pair.partition("=")[::2] for pair in given]
    names = [name for name, _ in files]
    problems = [
        *(f"there is no set {name!r}; there are: {', '.join(suite.sets)}" for name in names if name not in suite.sets),
        *(f"set {name!r} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1),
        *(f"set {name!r} is missing" for name, form in suite.sets.items() if form.required and name not in names),
    ]
    if problems:
        raise InvalidRequest(*(FieldProblem("", problem, "data") for problem in problems))
    sets = {}
    for name, file in files:
        sets[name] = list(rows.each_object(_lines(Path(file)), file, suite.sets[name].columns))
        for number, row in enumerate(sets[name], start=1):
            if not any(all(field in row for field in fields) for fields in rows.FORMS.values()) and "gt" not in row:
                raise _refused(
                    f"{file}: row {number} has no question and answer, no prompt and completion, and no text"
                )
    return sets


def _lines(path: Path) -> Iterator[bytes]:
    """Of JSON Lines, or of an array as if it were."""
    text = _text(path)
    if text.lstrip().startswith("["):
        return (json.dumps(row).encode() for row in _json(path))
    return rows.lines(io.BytesIO(text.encode()))


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise _refused(f"{path} is not JSON") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(f"{path} cannot be read: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
