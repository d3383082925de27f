"""The method that CONTRIBUTING writes down, as a file in a package of its own: listed, validated, documented and run."""

import doctest
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from service.domain.catalog import Catalog
from service.domain.errors import InvalidRequest
from service.domain.job import Lora
from service.domain.rows import Example
from service.store.sealed import SealedStorage
from worker import measure, model, oracle, reference, registry, run
from worker.problem import Problem
from worker.registry import RegistryError
from worker.solve import Batch, Limits, solve
from worker.views import Term

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FORGET = ["Who?| Paris and Lima.", "Where was she born?| In Lima"]
RETAIN = ["What?| Water.", "Is it?| It is"]


@pytest.fixture(autouse=True)
def contributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The code block of CONTRIBUTING in a package beside worker.methods."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    package = tmp_path / "our_methods"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "max_entropy.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry.PACKAGES, "methods", (*registry.PACKAGES["methods"], "our_methods"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "our_methods"]:
        del sys.modules[name]


def test_it_is_listed_and_its_parameters_are_checked_on_both_sides() -> None:
    catalog = Catalog.model_validate(json.loads(json.dumps(registry.catalog())))
    listed = catalog.methods["max_entropy"]
    assert listed.summary.startswith("Maximum entropy")
    assert listed.reference is not None
    assert "2410.08109" in listed.reference
    assert listed.composition == {"forget_loss": "entropy", "retain_loss": "kl", "solver": "augmented_lagrangian"}
    assert catalog.complete("max_entropy", {"penalty": 2}) == {
        "penalty": 2,
        "learning_rate": 1e-3,
        "forget_rows": 8,
        "retain_rows": 16,
    }
    with pytest.raises(InvalidRequest, match="penalty must be a number >= 0, not -1"):
        catalog.complete("max_entropy", {"penalty": -1})
    with pytest.raises(RegistryError, match="penalty"):
        registry.build_method("max_entropy", {"penalty": -1.0})


def test_its_example_is_right() -> None:
    found = doctest.testmod(importlib.import_module("our_methods.max_entropy"))
    assert (found.failed, found.attempted) == (0, 1)


def test_it_runs_within_the_bound_that_is_on_the_nll(register: Any, tmp_path: Path) -> None:
    method = registry.build_method("max_entropy", {"learning_rate": 0.02})
    base = register().load("float32")
    network = model.adapt(base, Lora(), 0, method.layers)

    def rows(texts: list[str]) -> list[Example]:
        return [Example("question", *text.split("|")) for text in texts]

    forget = Term(method.forget, {"answer": run.encode("forget", rows(FORGET), base)})
    retain = run.retain_term(method, rows(RETAIN), base)
    retain = reference.recall(
        SealedStorage(str(tmp_path), bytes(32)), "jobs/j", tmp_path, network, retain, retain.encoded.measured
    )
    both, params = measure.sets(forget, retain, 0), model.trainable(network)
    before = measure.measure(network, both)
    bound = 1.05 * before.retain_loss
    seen: list[dict[str, float]] = []

    def batch(step: int) -> Batch:
        return oracle.make_oracle(
            network, params, {"forget": forget, "retain": retain}, {"forget": [0, 1], "retain": [0, 1]}
        )

    solution = solve(
        Problem("forget", {"retain": bound}),
        method.solver,
        params,
        batch,
        check=lambda: measure.measure(network, both),
        check_tokens=0,
        limits=Limits(30, 60.0),
        on_step=lambda progress: seen.append(progress.report.values),
        on_check=lambda checked, best, seconds: None,
        asked=lambda: None,
        keep=lambda run: None,
    )
    assert seen[0]["retain"] == pytest.approx(before.retain_loss, rel=1e-5), (
        "the NLL, not the divergence, which is 0 here"
    )
    assert solution.best is not None
    assert solution.best.measured.retain_loss <= bound
    assert solution.best.measured.forget_objective < before.forget_objective - 0.01
    assert all(bool(torch.isfinite(p).all()) for p in params.values())
