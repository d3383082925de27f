"""The demo's model forgets people in two jobs, the second from the first's adapter: does it still say what it was to forget?

Likelihood alone called both jobs PASSED ("stays forgotten"), while answers gave birth dates and pets away in other words.
"""

import json
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from service.domain.job import Budget, Constraint, JobSpec, MethodChoice, ModelEntry
from service.domain.report import Disclosure, Report
from service.store.storage import Storage
from tests.worker.conftest import stored_set
from worker import demo, run
from worker.demo import PROMPT_FORMAT, Row
from worker.records import Assignment, EarlierJob, ParentAssignment, ResultRecord

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FIRST, SECOND = "ujob_" + 32 * "1", "ujob_" + 32 * "2"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that knows all of them, and the two sets."""
    folder, threads = tmp_path_factory.mktemp("demo"), torch.get_num_threads()
    demo.main([str(folder)])
    torch.set_num_threads(threads)
    return folder


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assignment(
    folder: Path, scratch: Path, job_id: str, forget: Sequence[Row], retain: Sequence[Row], steps: int, **more: Any
) -> Assignment:
    storage = Storage(str(folder / "storage"))
    storage.create()
    scratch.mkdir()
    spec = JobSpec(
        model="people",
        method=MethodChoice(type="pdu"),
        constraint=Constraint(epsilon_relative=0.25),
        budget=Budget(max_steps=steps, forget_target=None),
        forget_set="ufile_" + 32 * "0",
        retain_set="ufile_" + 32 * "1",
    )
    return Assignment(
        job_id=job_id,
        attempt=1,
        fence=1,
        spec=spec,
        model=ModelEntry(name="people", source="path", location="people", prompt_format=PROMPT_FORMAT),
        forget_file=stored_set(storage, f"{job_id}-forget", forget),
        retain_file=stored_set(storage, f"{job_id}-retain", retain),
        row_key=b64encode(bytes(32)),
        storage_url=str(folder / "storage"),
        prefix=f"jobs/{job_id}/attempts/1",
        models_root=folder / "models",
        scratch_dir=scratch,
        device="cpu",
        dtype="float32",
        threads=1,
        **more,
    )


def done(job: Assignment) -> tuple[ResultRecord, Report]:
    last = run.run(job, lambda _: None, lambda: None)
    assert isinstance(last, ResultRecord)
    content = b"".join(Storage(job.storage_url).read(f"{job.prefix}/report.json"))
    return last, Report.model_validate_json(content)


def released(report: Report, of: str) -> Disclosure:
    (found,) = (one for one in report.disclosure if (one.of, one.model) == (of, "released"))
    return found


def test_what_comes_out_behind_a_prefix_fails_both_jobs(made: Path, tmp_path: Path) -> None:
    forget, retain = (rows(made / f"{name}.jsonl") for name in ("forget", "retain"))
    job = assignment(made, tmp_path / "first", FIRST, forget, retain, steps=60)
    last, report = done(job)
    assert report.figures[0].after is not None
    likely = {gate.metric: gate for gate in report.verdict.gates}["forget_probability"]
    assert likely.result == "PASSED", "by the likelihood of the exact words alone"
    assert report.verdict.result == "FAILED"
    own = released(report, "forget")
    assert len(own.disclosed) > len(forget) / 4
    assert max(own.ways, key=lambda way: way.disclosing).way == "prefix"

    parent = ParentAssignment(
        job_id=FIRST,
        adapter=[file for file in last.artifacts if file.name.startswith("adapter/")],
        report=next(file for file in last.artifacts if file.name == "report.json"),
        chain=[EarlierJob(job_id=FIRST, forget_file=job.forget_file)],
    )
    _, report = done(assignment(made, tmp_path / "second", SECOND, retain[:6], retain[6:], steps=40, parent=parent))
    assert report.verdict.result == "FAILED"
    again = released(report, FIRST)
    assert again.disclosed, "the first job's rows are asked for again"
    assert next(way for way in again.ways if way.way == "question").disclosing, "some answer the plain question"
    failed = [gate.message for gate in report.verdict.gates if gate.result == "FAILED"]
    assert any(FIRST in message for message in failed)
    assert not any("forgotten" in message and "stays" in message for message in failed)
