"""A job that starts from an earlier one's adapter: when it may, what its runner is told, and what stays for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service import sweep
from service.domain.errors import JobFailure
from service.domain.job import Failure, FailureCode, JobSpec, ModelEntry, PromptFormat, Verdict
from service.settings import Settings
from service.store import files, jobs, lineage, models, tenancy
from service.store.rows import ArtifactRow
from service.store.session import Sessions
from service.store.storage import Storage
from tests.service.conftest import JOBS
from worker.assignment import assignment
from worker.records import Assignment

NewJob = Callable[..., str]
Run = Callable[..., None]
VERDICT = Verdict(result="PASSED", gates=[], message="")
FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "report.json")


@pytest.fixture
def run(sessions: Sessions) -> Run:
    """run(job_id, *names) -> the job has succeeded, and published files of these names."""

    def end(job_id: str, *names: str) -> None:
        rows = [
            ArtifactRow(name, f"jobs/{job_id}/attempts/1/{name}", "application/json", 1, 64 * "a") for name in names
        ]
        with sessions.begin() as s:
            claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
            assert claim is not None
            assert claim.job_id == job_id
            assert jobs.succeed(s, job_id, claim.fence, VERDICT, rows)

    return end


def assigned(sessions: Sessions, settings: Settings, scratch: Path) -> Assignment:
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        told = assignment(s, claim, JobSpec.model_validate(claim.spec), settings, scratch, False)
    return Assignment.model_validate_json(told.model_dump_json())  # as the runner reads it


def test_a_runner_is_told_the_parents_adapter_and_the_forget_sets_of_the_chain(
    new_job: NewJob, run: Run, sessions: Sessions, settings: Settings, tmp_path: Path
) -> None:
    first = new_job()
    run(first, *FILES)
    second = new_job(parent=first)
    run(second, *FILES)
    third = new_job(parent=second)
    run(third, *FILES)
    new_job(parent=third)
    with sessions.begin() as s:
        sets = {job: jobs.get(s, job).forget_set for job in (first, second, third)}
        files.purge(s, sets[first])
    told = assigned(sessions, settings, tmp_path)
    assert told.parent is not None
    assert told.parent.job_id == third
    assert [file.name for file in told.parent.adapter] == list(FILES[:2])
    assert told.parent.adapter[1].key == f"jobs/{third}/attempts/1/{FILES[1]}"
    assert told.parent.report.name == "report.json"
    chain = [(one.job_id, one.forget_file and one.forget_file.id) for one in told.parent.chain]
    assert chain == [(third, sets[third]), (second, sets[second]), (first, None)], "the first one's rows are gone"


def test_a_job_without_a_parent_has_none(
    new_job: NewJob, sessions: Sessions, settings: Settings, tmp_path: Path
) -> None:
    new_job()
    assert assigned(sessions, settings, tmp_path).parent is None


def test_a_parent_that_cannot_be_one(
    new_job: NewJob, run: Run, sessions: Sessions, settings: Settings, tmp_path: Path
) -> None:
    bare = new_job()
    run(bare, "report.json")
    failed = new_job()
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        jobs.fail(s, failed, claim.fence, Failure.of(FailureCode.INVALID_FILE, "no"))
    good = new_job()
    run(good, *FILES)
    nobody = "ujob_" + 32 * "0"
    with sessions.begin() as s:
        assert lineage.why_not(s, good, "m") is None
        reasons = [lineage.why_not(s, parent, "m") for parent in (nobody, failed, bare)]
        reasons.append(lineage.why_not(s, good, "other"))
    with sessions.begin() as s:
        tenancy.bind(s, "another", "tester")
        reasons.append(lineage.why_not(s, good, "m"))
    expected = [
        f"no job '{nobody}'",
        f"job {failed} is failed; a job starts from the adapter of one that has succeeded",
        f"job {bare} released no adapter to start from",
        f"job {good} was on model 'm': its adapter is of no use to 'other'",
        f"no job '{good}'",
    ]
    assert reasons == expected
    new_job(parent=bare)  # as another version may have let it in
    with pytest.raises(JobFailure, match="released no adapter to start from") as caught:
        assigned(sessions, settings, tmp_path)
    assert caught.value.code is FailureCode.MODEL_NOT_FOUND


def test_over_http_a_parent_is_judged_before_the_job_exists(
    http: TestClient, request_body: dict[str, Any], run: Run, sessions: Sessions
) -> None:
    def asked(**changes: Any) -> tuple[int, Any]:
        reply = http.post(JOBS, json=request_body | changes)
        return reply.status_code, reply.json()

    status, first = asked()
    assert (status, first["parent"]) == (201, None)
    status, refused = asked(parent=first["id"])
    assert (status, refused["errors"][0]["pointer"]) == (422, "/parent")
    assert "is queued; a job starts from the adapter of one that has succeeded" in refused["errors"][0]["detail"]
    run(first["id"], *FILES)
    status, second = asked(parent=first["id"])
    assert (status, second["parent"]) == (201, first["id"])
    assert http.get(f"{JOBS}/{second['id']}").json()["parent"] == first["id"]
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="m2", source="path", location="m2", prompt_format=PromptFormat()))
    status, refused = asked(model="m2", parent=first["id"])
    assert (status, refused["errors"][0]["pointer"]) == (422, "/parent")
    assert asked(parent="ujob_1")[0] == 422


def test_the_sweep_leaves_the_adapter_of_a_job_that_has_ended(
    new_job: NewJob, run: Run, sessions: Sessions, settings: Settings
) -> None:
    storage, first = Storage(settings.storage_url), new_job()
    for name in (*FILES, "scrap"):
        storage.write(f"jobs/{first}/attempts/1/{name}", [b"x"])
    run(first, *FILES)
    sweep.delete_orphans(sessions, storage)
    assert {key.rpartition("attempts/1/")[2] for key, _ in storage.ages("jobs")} == set(FILES)
