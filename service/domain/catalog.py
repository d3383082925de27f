"""What the worker can do, as the service knows it: methods, losses, solvers and metrics with their parameters,
and suites with what they take and give.

catalog.json is written by `make catalog` from worker/, reviewed in diffs and checked in CI, so that a request is validated
here, without torch, against the same types that the worker's factories declare.
"""

import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from pydantic import BaseModel, ConfigDict, Field

from service.domain.errors import FieldProblem, InvalidRequest
from service.domain.job import EXACT_MAX

CODES = {"type": "type", "anyOf": "type", "enum": "enum"}  # of a FieldProblem, by the schema's keyword that failed


class Thing(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    summary: str
    reference: str | None
    parameters: dict[str, Any] = Field(description="JSON Schema (2020-12) of its parameters, with defaults")


class Method(Thing):
    composition: dict[str, str] = Field(description="forget_loss, retain_loss and solver by name")
    presets: dict[str, dict[str, Any]] = Field(description="named hyperparameters, e.g. those of the paper")


class Loss(Thing):
    role: Literal["forget", "retain"]
    per: Literal["token", "row"]
    needs: list[str] = Field(description="beside the answer: reference, reference_states, refusal")
    lowers: str = Field(description="the quantity that descent on it moves down")


class SuiteSet(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    columns: list[str] = Field(description="that every row must have")
    optional: list[str] = Field(description="that are used where a row has them")
    required: bool


class SuiteFigure(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    definition: str
    better: Literal["lower", "higher"] | None = Field(description="which way unlearning wants it; null: neither")
    benchmark: bool = Field(description="computed as the reference does, under its name; false: ours, beside it")
    retrained: bool = Field(description="needs a retrained reference")


class Suite(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    summary: str
    reference: str | None
    sets: dict[str, SuiteSet]
    figures: dict[str, SuiteFigure]


class Catalog(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: dict[str, Method]
    losses: dict[str, Loss]
    solvers: dict[str, Thing]
    metrics: dict[str, Thing]
    suites: dict[str, Suite]

    def complete(self, method: str, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
        """The method's hyperparameters, defaults filled in.

        Raises:
            InvalidRequest: an unknown method, or hyperparameters that it does not take; one problem for each.
        """
        if method not in self.methods:
            known = ", ".join(sorted(self.methods))
            raise InvalidRequest(
                FieldProblem("/method/type", f"there is no method {method!r}; the methods are: {known}", "enum")
            )
        schema = self.methods[method].parameters
        problems = list(_problems(method, schema, hyperparameters, "/method/hyperparameters", schema))
        wrong = {problem.pointer for problem in problems}
        for name, value in hyperparameters.items():
            pointer = f"/method/hyperparameters/{name}"
            if isinstance(value, int) and abs(value) > EXACT_MAX and pointer not in wrong:
                problems.append(FieldProblem(pointer, f"is beyond {EXACT_MAX:,}, up to which JSON counts", "range"))
        if problems:
            raise InvalidRequest(*problems)
        return _completed(schema, hyperparameters, schema)

    def composition(self, method: str, hyperparameters: Mapping[str, Any]) -> dict[str, str]:
        """forget_loss, retain_loss and solver by name, also of a composition of the user's own."""
        parts = {"forget": "forget_loss", "retain": "retain_loss", "solver": "solver"}
        given = {part: hyperparameters.get(name) for name, part in parts.items()}
        chosen = {part: choice["type"] for part, choice in given.items() if isinstance(choice, Mapping)}
        return self.methods[method].composition | chosen

    def teaches_refusals(self, method: str, hyperparameters: Mapping[str, Any]) -> bool:
        """Whether its forget loss needs a refusal of each question."""
        return "refusal" in self.losses[self.composition(method, hyperparameters)["forget_loss"]].needs


@cache
def load() -> Catalog:
    """The catalogue that this service was built with."""
    text = resources.files("service").joinpath("catalog.json").read_text(encoding="utf-8")
    return Catalog.model_validate(json.loads(text))


Schema = Mapping[str, Any]


def _completed(schema: Schema, given: Mapping[str, Any], root: Schema) -> dict[str, Any]:
    """What is given, with defaults for the rest, also within the choices."""
    properties = schema["properties"]
    values = {name: p["default"] for name, p in properties.items() if "default" in p}
    values |= {name: _canonical(value, properties[name]) for name, value in given.items()}
    for name, value in values.items():
        if "discriminator" in properties[name]:
            values[name] = _completed(_options(properties[name], root)[value["type"]], value, root)
    return values


def _options(choice: Schema, root: Schema) -> dict[str, Schema]:
    """The schemas that a choice is among, by the name that their `type` has."""
    mapping = choice["discriminator"]["mapping"]
    return {name: root["$defs"][ref.removeprefix("#/$defs/")] for name, ref in mapping.items()}


def _problems(
    owner: str, schema: Schema, given: Mapping[str, Any], pointer: str, root: Schema
) -> Iterator[FieldProblem]:
    properties = schema["properties"]
    for name, value in given.items():
        here = f"{pointer}/{_escaped(name)}"
        if name not in properties:
            known = ", ".join(sorted(properties)) or "none"
            yield FieldProblem(here, f"{owner} has no hyperparameter {name!r}; it has: {known}", "unknown")
        elif not _finite(value):
            yield FieldProblem(here, f"{name} must be a finite number", "finite")
        elif "discriminator" in properties[name]:
            yield from _choice_problems(name, _options(properties[name], root), value, here, root)
        elif error := _first_error(value, properties[name]):
            detail = f"{name} must be {_expected(properties[name])}, not {json.dumps(value)[:80]}"
            yield FieldProblem(here, detail, CODES.get(error.validator, "range"))


def _choice_problems(
    name: str, options: Mapping[str, Schema], value: Any, pointer: str, root: Schema
) -> Iterator[FieldProblem]:
    """Of a part that is chosen by its `type`, with its own parameters beside that."""
    known = ", ".join(sorted(options))
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        yield FieldProblem(pointer, f'{name} must be an object with a "type", one of: {known}', "type")
    elif value["type"] not in options:
        yield FieldProblem(f"{pointer}/type", f"there is no {name} {value['type']!r}; there are: {known}", "enum")
    else:
        yield from _problems(value["type"], options[value["type"]], value, pointer, root)


def _finite(value: Any) -> bool:
    try:
        return not isinstance(value, int | float) or math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a double
        return False


def _first_error(value: Any, schema: Mapping[str, Any]) -> ValidationError | None:
    error: ValidationError | None = next(Draft202012Validator(schema).iter_errors(value), None)
    return error


def _expected(schema: Mapping[str, Any]) -> str:
    """What a parameter takes, in words: "a number > 0 and <= 1"."""
    if "anyOf" in schema:
        return " or ".join(_expected(s) for s in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(v) for v in schema["enum"])
    names = {"integer": "an integer", "number": "a number", "string": "a string", "boolean": "true or false"}
    bounds = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))
    limits = " and ".join(f"{sign} {schema[key]}" for key, sign in bounds if key in schema)
    kind = schema.get("type", "something else")
    return f"{names.get(kind, kind)} {limits}".rstrip()


def _canonical(value: Any, schema: Mapping[str, Any]) -> Any:
    """To JSON Schema 5.0 is an integer; to the worker's factories only 5 is."""
    return int(value) if schema.get("type") == "integer" and isinstance(value, float) else value


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
