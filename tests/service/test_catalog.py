"""Hyperparameters against the catalogue: defaults filled in, and a clear complaint about everything else."""

import subprocess
import sys
from typing import Any

import pytest

from service.domain.catalog import Catalog, load
from service.domain.errors import FieldProblem, InvalidRequest

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "rate": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 0.5, "description": "d"},
        "rows": {"type": "integer", "minimum": 1, "default": 8, "description": "d"},
        "mode": {"type": "string", "enum": ["a", "b"], "default": "a", "description": "d"},
        "cap": {"anyOf": [{"type": "number", "minimum": 0}, {"type": "null"}], "default": None, "description": "d"},
    },
}
CHOSEN = {
    "$defs": {
        "one": {"properties": {"type": {"const": "one"}, "beta": SCHEMA["properties"]["rate"]}, "required": ["type"]},  # type: ignore[index]
        "two": {"properties": {"type": {"const": "two"}, "rows": SCHEMA["properties"]["rows"]}, "required": ["type"]},  # type: ignore[index]
    },
    "properties": {
        "part": {
            "discriminator": {"propertyName": "type", "mapping": {"one": "#/$defs/one", "two": "#/$defs/two"}},
            "oneOf": [{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/two"}],
            "default": {"type": "two"},
        }
    },
}
THING = {"summary": "s", "reference": None, "parameters": SCHEMA, "composition": {}, "presets": {}}
CATALOG = Catalog.model_validate(
    {
        "methods": {"m": THING, "l": THING, "c": THING | {"parameters": CHOSEN}},
        "losses": {},
        "solvers": {},
        "metrics": {},
        "suites": {},
    }
)


def problems(method: str, hyperparameters: dict[str, Any]) -> list[FieldProblem]:
    with pytest.raises(InvalidRequest) as caught:
        CATALOG.complete(method, hyperparameters)
    return list(caught.value.problems)


def test_defaults_are_filled_in_and_what_is_given_is_kept() -> None:
    assert CATALOG.complete("m", {}) == {"rate": 0.5, "rows": 8, "mode": "a", "cap": None}
    given = {"rate": 1, "rows": 3, "mode": "b", "cap": 2.0}
    assert CATALOG.complete("m", given) == given


def test_a_whole_number_with_a_point_is_an_integer() -> None:
    rows = CATALOG.complete("m", {"rows": 4.0})["rows"]
    assert rows == 4
    assert isinstance(rows, int)


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    detail = "there is no method 'pdo'; the methods are: c, l, m"
    assert problems("pdo", {}) == [FieldProblem("/method/type", detail, "enum")]


def test_an_unknown_parameter_is_answered_with_the_known_ones() -> None:
    detail = "m has no hyperparameter 'ra/te'; it has: cap, mode, rate, rows"
    assert problems("m", {"ra/te": 1}) == [FieldProblem("/method/hyperparameters/ra~1te", detail, "unknown")]


@pytest.mark.parametrize(
    ("name", "value", "detail", "code"),
    [
        ("rate", 0, "rate must be a number > 0 and <= 1, not 0", "range"),
        ("rate", 1.5, "rate must be a number > 0 and <= 1, not 1.5", "range"),
        ("rate", "fast", 'rate must be a number > 0 and <= 1, not "fast"', "type"),
        ("rate", True, "rate must be a number > 0 and <= 1, not true", "type"),
        ("rate", None, "rate must be a number > 0 and <= 1, not null", "type"),
        ("rate", float("nan"), "rate must be a finite number", "finite"),
        ("rate", float("-inf"), "rate must be a finite number", "finite"),
        ("rate", 10**400, "rate must be a finite number", "finite"),
        ("rows", 2.5, "rows must be an integer >= 1, not 2.5", "type"),
        ("rows", False, "rows must be an integer >= 1, not false", "type"),
        ("rows", 0, "rows must be an integer >= 1, not 0", "range"),
        ("mode", "c", 'mode must be one of "a", "b", not "c"', "enum"),
        ("cap", -1, "cap must be a number >= 0 or null, not -1", "type"),
        ("cap", [1], "cap must be a number >= 0 or null, not [1]", "type"),
    ],
)
def test_a_wrong_value_is_told_what_is_right(name: str, value: Any, detail: str, code: str) -> None:
    assert problems("m", {name: value}) == [FieldProblem(f"/method/hyperparameters/{name}", detail, code)]


def test_every_problem_is_told_at_once() -> None:
    assert {p.pointer.split("/")[-1] for p in problems("m", {"rate": 2, "rows": 0, "other": 1})} == {
        "rate",
        "rows",
        "other",
    }


def test_the_catalogue_that_ships_has_pdu() -> None:
    assert load().methods["pdu"].composition == {
        "forget_loss": "margin_flattening",
        "retain_loss": "nll",
        "solver": "primal_dual",
    }
    assert load() is load()


def test_the_catalogue_that_ships_has_the_suites() -> None:
    suites = load().suites
    assert suites.keys() == {"tofu", "muse", "request"}
    forget = suites["tofu"].sets["forget"]
    assert forget.columns == ["answer", "paraphrased_answer", "perturbed_answer", "question"]
    assert {name for name, of in suites["tofu"].sets.items() if not of.required} == {"holdout"}
    assert not any(of.required for of in suites["muse"].sets.values())
    figures = suites["tofu"].figures
    assert (figures["model_utility"].better, figures["privleak"].better) == ("higher", None)
    assert {name for name, f in figures.items() if f.retrained and f.benchmark} == {
        "forget_quality",
        "privleak",
        "mia_reference",
    }
    assert not figures["extraction_strength_corrected"].benchmark
    assert all(name.partition("/")[0] in suites["request"].sets for name in suites["request"].figures)


def test_a_part_that_can_be_chosen_says_what_it_is_and_whose() -> None:
    catalog = load()
    parts = catalog.methods["custom"].parameters["$defs"]
    for name, part in parts.items():
        thing = catalog.losses.get(name) or catalog.solvers[name]
        assert (part["description"], part.get("reference")) == (thing.summary, thing.reference)
    assert parts.keys() == catalog.losses.keys() | catalog.solvers.keys()


def test_a_parameter_without_a_default_would_need_a_check_of_its_own() -> None:
    """`complete` fills in defaults and asks for nothing else; a part's `type` is looked at before its parameters are."""
    for method in load().methods.values():
        assert not method.parameters.get("required")
        assert all(part["required"] == ["type"] for part in method.parameters.get("$defs", {}).values())


def test_it_needs_no_torch() -> None:
    code = "import sys; from service.domain.catalog import load; load(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_parameters_of_a_chosen_part_are_completed() -> None:
    assert CATALOG.complete("c", {}) == {"part": {"type": "two", "rows": 8}}
    assert CATALOG.complete("c", {"part": {"type": "one"}}) == {"part": {"type": "one", "beta": 0.5}}
    rows = CATALOG.complete("c", {"part": {"type": "two", "rows": 4.0}})["part"]["rows"]
    assert isinstance(rows, int)


@pytest.mark.parametrize(
    ("part", "pointer", "detail", "code"),
    [
        ("one", "", 'part must be an object with a "type", one of: one, two', "type"),
        ({"beta": 1}, "", 'part must be an object with a "type", one of: one, two', "type"),
        ({"type": "three"}, "/type", "there is no part 'three'; there are: one, two", "enum"),
        ({"type": "one", "beta": 7}, "/beta", "beta must be a number > 0 and <= 1, not 7", "range"),
        ({"type": "one", "rows": 1}, "/rows", "one has no hyperparameter 'rows'; it has: beta, type", "unknown"),
    ],
)
def test_the_parameters_of_a_chosen_part_are_checked(part: Any, pointer: str, detail: str, code: str) -> None:
    assert problems("c", {"part": part}) == [FieldProblem("/method/hyperparameters/part" + pointer, detail, code)]
