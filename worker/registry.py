"""Finds methods, losses, solvers, metrics and suites by file name, and says what there is: python -m worker.registry

One file is one thing: the file's name is its name in the API and the name of the factory in it. The catalogue that is
printed here is service/catalog.json, which is all that the service knows of this package.

    python -m worker.registry                 prints the catalogue
    python -m worker.registry --check FILE    exits with 1 and says what differs if FILE is not that
"""

import argparse
import importlib
import inspect
import json
import pkgutil
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from worker.hyperparameters import Choice
from worker.problem import Method
from worker.suite import Suite
from worker.tokens import Loss

PACKAGES = {
    "methods": ("worker.methods",),
    "losses": ("worker.losses.forget", "worker.losses.retain"),
    "solvers": ("worker.solvers",),
    "metrics": ("worker.metrics",),
    "suites": ("worker.suites",),
}

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=())


class RegistryError(Exception):
    """A file that does not hold what its name says, a name that two files claim, or one that nobody has."""


class Entry(NamedTuple):
    name: str
    module: str
    summary: str  # first sentence of the module's docstring
    reference: str | None
    factory: Callable[..., Any]
    presets: Mapping[str, Mapping[str, Any]]
    parameters: type[BaseModel]  # the factory's keyword-only arguments, strict


def entries(kind: str) -> dict[str, Entry]:
    """All things of a kind, as `PACKAGES` has them, by name.

    Raises:
        RegistryError: two files of the same name, or a file without a factory of its name.
    """
    found: dict[str, Entry] = {}
    for package in PACKAGES[kind]:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if module.name in found:
                raise RegistryError(f"two files for {kind} {module.name!r}: {found[module.name].module} and {package}")
            found[module.name] = _entry(f"{package}.{module.name}", module.name)
    return found


def entry(kind: str, name: str) -> Entry:
    """One thing by name.

    Raises:
        RegistryError: nothing has that name; the message lists what there is.
    """
    known = entries(kind)
    if name not in known:
        raise RegistryError(f"no {name!r} among {kind}; known: {', '.join(sorted(known))}")
    return known[name]


def build_method(name: str, hyperparameters: Mapping[str, Any]) -> Method:
    """The method of that name with these hyperparameters, defaults for the rest.

    Raises:
        RegistryError: no such method, or hyperparameters that it does not take.
    """
    method = build("methods", name, hyperparameters)
    assert isinstance(method, Method)
    return method


def build(kind: str, name: str, parameters: Mapping[str, Any], *collaborators: Any) -> Any:
    """Call the factory: collaborators (a solver's descent) by position, validated parameters by keyword."""
    found = entry(kind, name)
    try:
        checked = found.parameters.model_validate(dict(parameters))
    except ValidationError as error:
        raise RegistryError(f"{kind} {name}: {error}") from error
    return found.factory(*collaborators, **checked.model_dump())


def build_choice(kind: str, choice: Mapping[str, Any], *collaborators: Any) -> Any:
    """Build what a worker.hyperparameters.Choice names."""
    parameters = {name: value for name, value in choice.items() if name != "type"}
    return build(kind, choice["type"], parameters, *collaborators)


def composition(method: Method) -> dict[str, str]:
    """The names of a method's parts. One file is one thing, so a function's module is the name of its part."""
    parts = {"forget_loss": method.forget.fn, "retain_loss": method.retain.fn, "solver": method.solver.step}
    return {part: fn.__module__.rpartition(".")[2] for part, fn in parts.items()}


def catalog() -> dict[str, Any]:
    """What there is, as plain JSON values: kind -> name -> description."""
    return {kind: {name: _describe(kind, e) for name, e in sorted(entries(kind).items())} for kind in PACKAGES}


def _describe(kind: str, e: Entry) -> dict[str, Any]:
    described: dict[str, Any] = {"summary": e.summary, "reference": e.reference}
    if kind == "suites":
        return described | _describe_suite(e.factory())
    described["parameters"] = e.parameters.model_json_schema(schema_generator=_Untitled)
    if kind == "methods":
        described |= {"composition": composition(e.factory()), "presets": e.presets}
    if kind == "losses":
        loss: Loss = e.factory()
        described |= {"per": loss.per, "needs": sorted(loss.needs), "lowers": loss.lowers}
        described |= {"role": e.module.split(".")[-2]}
    return described


def _describe_suite(suite: Suite) -> dict[str, Any]:
    sets = {
        name: form._asdict() | {"columns": sorted(form.columns), "optional": sorted(form.optional)}
        for name, form in suite.sets.items()
    }
    return {"sets": sets, "figures": {name: form._asdict() for name, form in suite.figures.items()}}


class _Untitled(GenerateJsonSchema):
    """A parameter's name is its title."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _entry(module_name: str, name: str) -> Entry:
    module = importlib.import_module(module_name)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise RegistryError(f"{module_name} holds no factory {name!r}")
    paragraphs = [" ".join(p.split()) for p in inspect.cleandoc(module.__doc__ or "").split("\n\n")]
    references = [p.removeprefix("Reference: ") for p in paragraphs if p.startswith("Reference: ")]
    return Entry(
        name,
        module_name,
        summary=paragraphs[0],
        reference=references[0] if references else None,
        factory=factory,
        presets=getattr(module, "PRESETS", {}),
        parameters=_parameters(name, factory),
    )


def _parameters(name: str, factory: Callable[..., Any]) -> type[BaseModel]:
    """The keyword-only arguments as a pydantic model: unknown names, wrong types and non-finite numbers are refused."""
    hints = typing.get_type_hints(factory, include_extras=True)
    named = [p for p in inspect.signature(factory).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields: dict[str, Any] = {
        p.name: (_type(hints[p.name]), ... if p.default is inspect.Parameter.empty else p.default) for p in named
    }
    return create_model(name, __config__=STRICT, **fields)


def _type(hint: Any) -> Any:
    """The hint itself or, of a Choice, one model for each part that can be chosen, told apart by `type`."""
    extras = getattr(hint, "__metadata__", ())
    choice = next((extra for extra in extras if isinstance(extra, Choice)), None)
    if choice is None:
        return hint
    described = next(extra for extra in extras if isinstance(extra, FieldInfo)).description
    parts = [e for e in entries(choice.kind).values() if choice.role in ("", e.module.split(".")[-2])]
    models = tuple(map(_chosen, parts))
    return typing.Annotated[typing.Union[models], Field(discriminator="type", description=described)]  # noqa: UP007


def _chosen(e: Entry) -> type[BaseModel]:
    """A part's parameters with its `type` beside them; the schema says what the part is, and whose."""
    about = {} if e.reference is None else {"json_schema_extra": {"reference": e.reference}}
    named: Any = (typing.Literal[e.name], ...)
    return create_model(e.name, __base__=e.parameters, __doc__=e.summary, __cls_kwargs__=about, type=named)


def _rendered() -> str:
    return json.dumps(catalog(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[str]:
    for kind in sorted(stored.keys() | current.keys()):
        old, new = stored.get(kind, {}), current.get(kind, {})
        for name in sorted(old.keys() | new.keys()):
            if name not in new:
                yield f"{kind}/{name}: no longer there"
            elif name not in old:
                yield f"{kind}/{name}: new"
            elif old[name] != new[name]:
                fields = [
                    f for f in sorted(old[name].keys() | new[name].keys()) if old[name].get(f) != new[name].get(f)
                ]
                yield f"{kind}/{name}: differs in {', '.join(fields)}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.registry", description="Print or check the catalogue.")
    parser.add_argument("--check", type=Path, metavar="FILE", help="exit with 1 if FILE is not the current catalogue")
    options = parser.parse_args(arguments)
    current = _rendered()
    if options.check is None:
        sys.stdout.write(current)
        return 0
    stored = options.check.read_text(encoding="utf-8") if options.check.exists() else "{}"
    if stored == current:
        return 0
    lines = list(_differences(json.loads(stored), json.loads(current))) or ["the same content, formatted differently"]
    sys.stderr.write("\n".join([f"{options.check} is stale (run `make catalog`):", *lines]) + "\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
