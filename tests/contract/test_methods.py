"""What every file that the API names keeps: a docstring with its source, a worked example, documented parameters."""

import inspect
import json
from pathlib import Path

import pytest

from service.domain import catalog
from worker import registry
from worker.problem import Method, Solver
from worker.tokens import Loss

METHODS = sorted(registry.entries("methods"))
THINGS = [(kind, name) for kind in registry.PACKAGES for name in sorted(registry.entries(kind))]


@pytest.mark.parametrize(("kind", "name"), THINGS)
def test_says_what_it_is_where_it_comes_from_and_works_an_example(kind: str, name: str) -> None:
    entry = registry.entry(kind, name)
    assert entry.summary
    assert entry.reference, 'its module docstring has no paragraph "Reference: ..."'
    assert ">>>" in (inspect.getdoc(entry.factory) or "")


@pytest.mark.parametrize(("kind", "name"), THINGS)
def test_every_parameter_is_described_and_has_a_default(kind: str, name: str) -> None:
    for parameter, schema in registry.entry(kind, name).parameters.model_json_schema()["properties"].items():
        assert schema.get("description"), parameter
        assert "default" in schema, parameter


@pytest.mark.parametrize("name", METHODS)
def test_a_method_builds_with_its_defaults_and_presets_from_registered_parts(name: str) -> None:
    for hyperparameters in [{}, *registry.entry("methods", name).presets.values()]:
        method = registry.build_method(name, hyperparameters)
        assert isinstance(method, Method)
        assert isinstance(method.forget, Loss)
        assert isinstance(method.retain, Loss)
        assert isinstance(method.solver, Solver)
        assert min(method.forget_rows, method.retain_rows) > 0
        parts = registry.composition(method)
        assert parts["forget_loss"] in registry.entries("losses")
        assert parts["retain_loss"] in registry.entries("losses")
        assert parts["solver"] in registry.entries("solvers")


@pytest.mark.parametrize("name", METHODS)
def test_what_the_service_completes_the_worker_takes(name: str) -> None:
    """The catalogue's defaults are the factory's, and they survive JSON."""
    completed = json.loads(json.dumps(catalog.load().complete(name, {})))
    assert completed == registry.entry("methods", name).parameters().model_dump()
    registry.build_method(name, completed)
    for preset in catalog.load().methods[name].presets.values():
        registry.build_method(name, catalog.load().complete(name, preset))


def test_the_catalogue_in_service_is_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    stale = registry.main(["--check", str(Path(catalog.__file__).parents[1] / "catalog.json")])
    assert not stale, capsys.readouterr().err
