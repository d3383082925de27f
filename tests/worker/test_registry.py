"""One file is one thing: names, duplicates, parameters and the stale catalogue."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from worker import registry
from worker.registry import RegistryError

LOSS = '''"""Zero: {says}.

Reference: nobody.
"""
from typing import Annotated
from pydantic import Field
from worker.tokens import Loss

def {factory}(*, scale: Annotated[float, Field(gt=0, le=2, description="d")] = 1.0, rows: int = 3) -> Loss:
    return Loss(lambda views: views["answer"].now.logp_N() * scale, per="token")
'''
Plant = Callable[..., None]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Write a loss into packages beside the real ones."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry.PACKAGES, "losses", (*registry.PACKAGES["losses"], "planted.forget", "planted.retain"))
    for folder in ("planted", "planted/forget", "planted/retain"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    for module in [name for name in sys.modules if name.split(".")[0] == "planted"]:
        monkeypatch.delitem(sys.modules, module)

    def write(role: str, name: str, factory: str | None = None, says: str = "nothing") -> None:
        (tmp_path / "planted" / role / f"{name}.py").write_text(LOSS.format(factory=factory or name, says=says))

    return write


def test_a_new_file_is_found(plant: Plant) -> None:
    plant("forget", "zero")
    described = registry.catalog()["losses"]["zero"]
    assert described["summary"] == "Zero: nothing."
    assert described["reference"] == "nobody."
    assert described["role"] == "forget"
    assert described["parameters"]["properties"]["scale"] == {
        "default": 1.0,
        "description": "d",
        "exclusiveMinimum": 0,
        "maximum": 2,
        "type": "number",
    }


def test_a_duplicate_is_refused(plant: Plant) -> None:
    plant("forget", "zero")
    plant("retain", "zero")
    with pytest.raises(RegistryError, match=r"two files for losses 'zero': planted\.forget\.zero and planted\.retain"):
        registry.entries("losses")


def test_a_file_without_its_factory_is_refused(plant: Plant) -> None:
    plant("forget", "zero", factory="one")
    with pytest.raises(RegistryError, match=r"planted\.forget\.zero holds no factory 'zero'"):
        registry.entries("losses")


def test_an_unknown_name_is_answered_with_the_known_ones(plant: Plant) -> None:
    plant("forget", "zero")
    plant("retain", "two")
    with pytest.raises(RegistryError, match=r"no 'three' among losses; known: .*npo, .*two, .*zero"):
        registry.build("losses", "three", {})


@pytest.mark.parametrize(
    "parameters",
    [{"scale": 0.0}, {"scale": float("nan")}, {"scale": True}, {"scale": "1"}, {"rows": 2.5}, {"rows": True}, {"x": 1}],
    ids=str,
)
def test_parameters_are_checked_strictly(plant: Plant, parameters: dict[str, object]) -> None:
    plant("forget", "zero")
    with pytest.raises(RegistryError, match="losses zero"):
        registry.build("losses", "zero", parameters)


def test_the_check_names_what_is_stale(plant: Plant, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant("forget", "zero")
    file = tmp_path / "catalog.json"
    assert registry.main([]) == 0
    file.write_text(capsys.readouterr().out)
    assert registry.main(["--check", str(file)]) == 0
    stored = json.loads(file.read_text())
    stored["losses"]["zero"]["summary"] = "Another."
    stored["losses"]["gone"] = stored["losses"]["zero"]
    file.write_text(json.dumps(stored))
    assert registry.main(["--check", str(file)]) == 1
    told = capsys.readouterr().err
    assert "losses/zero: differs in summary" in told
    assert "losses/gone: no longer there" in told
    assert "make catalog" in told
    assert registry.main(["--check", str(tmp_path / "missing.json")]) == 1


def test_it_runs_as_a_program_without_transformers() -> None:
    code = "import sys; from worker import registry; registry.main([]); sys.exit('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == {"methods", "losses", "solvers", "metrics", "suites"}
