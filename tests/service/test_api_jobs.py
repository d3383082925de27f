"""Jobs over HTTP: what is accepted, what is refused and how, what is shown."""

import io
import json
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import event, func, select, text
from starlette.testclient import TestClient

from service.domain import rows
from service.domain.job import Failure, FailureCode, ModelEntry, PromptFormat, Stage, Verdict
from service.settings import Settings
from service.store import jobs, models, workers
from service.store.rows import ArtifactRow, CheckRow, Claim, ConstraintRow, StepRow
from service.store.session import Sessions
from service.store.tables import File, Job
from tests.service.conftest import JOBS, Bell, ClientOf

Body = dict[str, Any]


def changed(body: Body, path: str, value: Any) -> Body:
    """The body with one field changed: changed(body, "budget/max_steps", 1)."""
    *parents, last = path.split("/")
    body = json.loads(json.dumps(body))
    at = body
    for name in parents:
        at = at.setdefault(name, {})
    at[last] = value
    return body


def claim(sessions: Sessions) -> Claim:
    with sessions.begin() as s:
        found = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
    assert found is not None
    return found


def step_row(step: int) -> StepRow:
    return StepRow(
        step, {"forget": 3.0, "retain": 0.2}, {"retain": 50.0}, {"retain": -0.1}, 2e-3, 1.0, step * 10, 9.0, 1.0
    )


def kept(settings: Settings, sessions: Sessions) -> tuple[int, int, int]:
    """Jobs, files, stored objects."""
    with sessions.begin() as s:
        rows = [s.scalars(select(func.count()).select_from(table)).one() for table in (Job, File)]
    return rows[0], rows[1], sum(path.is_file() for path in Path(settings.storage_url).rglob("*"))


def test_a_job_is_created_with_its_inline_rows_as_files(
    http: TestClient,
    sessions: Sessions,
    bell: Bell,
    request_body: Body,
    content_of: Callable[[str], bytes],
) -> None:
    visible: list[int] = []

    def look() -> None:
        with sessions.begin() as s:
            visible.append(s.scalars(select(func.count()).select_from(Job)).one())

    bell.on_ring = look
    reply = http.post(JOBS, json=request_body)
    assert reply.status_code == 201, reply.text
    job = reply.json()
    assert reply.headers["Location"] == job["links"]["self"] == f"{JOBS}/{job['id']}"
    assert reply.headers["Retry-After"] == "10"
    assert (job["object"], job["status"], job["verdict"], job["failure"]) == ("unlearning.job", "queued", None, None)
    assert (job["progress"]["queue_position"], job["progress"]["percent"], job["progress"]["total"]) == (1, 0, 300)
    assert job["created_at"].endswith("Z")
    assert job["method"]["hyperparameters"]["learning_rate"] > 0  # completed with defaults
    assert (bell.rung, visible) == (["any"], [1]), "rung once, after the commit"
    assert http.get(job["links"]["self"]).json() == job

    file = http.get(f"/v1/files/{job['forget_set']}").json()
    assert (file["purpose"], file["rows"]) == ("forget_set", 2)
    assert [json.loads(line) for line in content_of(file["id"]).splitlines()] == request_body["forget_set"]


def test_uploaded_files_serve_as_sets_and_a_time_is_shown_in_utc(
    http: TestClient, upload: Callable[..., str], request_body: Body
) -> None:
    request_body |= {
        "forget_set": upload("forget_set", [{"text": "a"}]),
        "retain_set": upload("retain_set", [{"text": "b"}]),
        "due_at": "2027-03-01T12:00:00+02:00",
        "metadata": {"ticket": "T-1"},
        "external_id": "x",
    }
    job = http.post(JOBS, json=request_body).json()
    assert job["due_at"] == "2027-03-01T10:00:00Z"
    assert (job["forget_set"], job["external_id"]) == (request_body["forget_set"], "x")
    assert job["warnings"] == [], "texts have no prompt"


def test_a_template_that_ends_in_a_space_is_warned_of(http: TestClient, sessions: Sessions, request_body: Body) -> None:
    assert [w["code"] for w in http.post(JOBS, json=request_body).json()["warnings"]] == ["prompt_ends_in_space"]
    form = PromptFormat(user_end="\n", assistant_start="Answer:")
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="tight", source="path", location="t", prompt_format=form, gpu_class="cpu"))
    job = http.post(JOBS, json=request_body | {"model": "tight"}).json()
    assert job["warnings"] == []
    assert job["resources"]["gpu_class"] == "cpu", "the model's class, where the request leaves it open"


SPACE = "prompt_ends_in_space"  # what the model of these tests is warned of
ADA: Body = {"question": "Who is Ada?", "answer": "A poet."}
EXTRAS: Body = {
    "paraphrased_question": "What does Ada do?",
    "paraphrased_answer": "She writes poems.",
    "perturbed_answer": ["A baker.", "A smith."],
}


def test_inline_rows_have_the_columns_that_uploaded_rows_may_have(
    http: TestClient, upload: Callable[..., str], request_body: Body, content_of: Callable[[str], bytes]
) -> None:
    forget = [ADA | EXTRAS, {"text": "Ada lives in Ghent."}]
    job = http.post(JOBS, json=request_body | {"forget_set": forget}).json()
    uploaded = upload("forget_set", forget)
    for file_id in (job["forget_set"], uploaded):
        assert [json.loads(line) for line in content_of(file_id).splitlines()] == forget


REFUSED: list[tuple[str, Any, str, str]] = [  # field, value, pointer, words of the complaint
    ("model", "unknown", "/model", "not registered"),
    ("model", "../m", "/model", "pattern"),
    ("model", "/etc/model", "/model", "pattern"),
    ("model", "https://x/m", "/model", "pattern"),
    ("model", "owner/name", "/model", "pattern"),
    ("model", None, "/model", "string"),
    ("method/type", "sgd", "/method/type", "pdu"),
    ("method/hyperparameters/lr", 1, "/method/hyperparameters/lr", "learning_rate"),
    ("method/hyperparameters/learning_rate", "x", "/method/hyperparameters/learning_rate", "number"),
    ("method/hyperparameters/learning_rate", float("nan"), "/method/hyperparameters/learning_rate", "finite"),
    ("method/hyperparameters/forget_rows", 10**30, "/method/hyperparameters/forget_rows", "4096"),
    ("constraint", {}, "/constraint", "exactly one"),
    ("constraint", {"epsilon": 1, "epsilon_relative": 1}, "/constraint", "exactly one"),
    ("constraint/epsilon", -0.1, "/constraint/epsilon", "greater than or equal to 0"),
    ("constraint/epsilon", float("nan"), "/constraint/epsilon", "finite"),
    ("constraint/epsilon", float("inf"), "/constraint/epsilon", "finite"),
    ("budget/max_steps", 0, "/budget/max_steps", "greater"),
    ("budget/max_steps", 10**99, "/budget/max_steps", "less"),
    ("lora/target_modules", ["q_proj", "model.embed_tokens"], "/lora/target_modules/1", "head"),
    ("lora/target_modules", ["lm_head"], "/lora/target_modules/0", "head"),
    ("lora/alpha", 10**30, "/lora/alpha", "less"),
    ("resources/gpu_class", "h900", "/resources/gpu_class", "any, cpu"),
    ("due_at", "2027-01-01T00:00:00", "/due_at", "timezone"),
    ("due_at", "9999-12-31T23:59:59-12:00", "/due_at", "years"),
    ("metadata", {"k": "\ud800"}, "/metadata/k", "unicode"),
    ("trust_remote_code", True, "/trust_remote_code", "not permitted"),
    ("model_path", "/m", "/model_path", "not permitted"),
    ("forget_set", [], "/forget_set", "at least 1"),
    ("forget_set", [{"text": "x"}] * 1001, "/forget_set", "at most 1000"),
    ("forget_set", "ufile_" + "0" * 32, "/forget_set", "no file"),
    ("forget_set", "../../x", "/forget_set", "pattern"),
    ("forget_set", {"path": "x"}, "/forget_set", "string"),
    ("forget_set", [{"text": "x", "y": 1}], "/forget_set/0/y", "not permitted"),
    ("forget_set", [{"text": "x"}, {"question": "q"}], "/forget_set/1", "question and answer"),
    ("forget_set", [{"paraphrased_question": "q", "paraphrased_answer": "a"}], "/forget_set/0", "question and answer"),
    ("forget_set", [ADA | {"paraphrased_question": ["q"]}], "/forget_set/0/paraphrased_question", "string"),
    ("forget_set", [ADA | {"perturbed_answer": "a"}], "/forget_set/0/perturbed_answer", "list"),
    ("forget_set", [ADA | {"perturbed_answer": []}], "/forget_set/0/perturbed_answer", "at least 1"),
    ("forget_set", [ADA | {"perturbed_answer": ["a", 1]}], "/forget_set/0/perturbed_answer/1", "string"),
    ("forget_set", [{"text": "x"}, {"text": "  "}], "/forget_set/1", "row 2: text is empty"),
]


def test_what_cannot_be_carried_out_is_refused_by_name_and_nothing_is_kept(
    http: TestClient, settings: Settings, sessions: Sessions, bell: Bell, request_body: Body
) -> None:
    for path, value, pointer, words in REFUSED:
        content = json.dumps(changed(request_body, path, value))  # it writes NaN, as Python's clients do
        reply = http.post(JOBS, content=content, headers={"Content-Type": "application/json"})
        case = f"{path} = {str(value)[:60]}: {reply.text[:500]}"
        assert reply.status_code == 422, case
        problem = reply.json()
        assert problem["type"].endswith("validation-error"), case
        assert [error["pointer"] for error in problem["errors"]] == [pointer], case
        assert words in problem["errors"][0]["detail"], case
    assert kept(settings, sessions) == (0, 0, 0)
    assert bell.rung == []


def test_a_name_that_is_no_text_is_answered_all_the_same(http: TestClient, request_body: Body) -> None:
    for path, pointer in (
        ("method/hyperparameters/a\udfffb", "/method/hyperparameters/a?b"),
        ("method/type", "/method/type"),
        ("\ud800", ""),
    ):
        content = json.dumps(changed(request_body, path, "\ud800"))
        reply = http.post(JOBS, content=content, headers={"Content-Type": "application/json"})
        assert reply.status_code == 422, f"{path!r}: {reply.text[:500]}"
        assert [error["pointer"] for error in reply.json()["errors"]] == [pointer]


def test_a_great_many_problems_are_told_in_few_words(http: TestClient, request_body: Body) -> None:
    many: Body = {f"{number}{'x' * 50}": 1 for number in range(50_000)} | {"y" * 100_000: 1}
    few: Body = {"y" * 100_000: 1, "z" * 100_000: 1}
    for given, count in ((many, 100), (few, 2)):
        reply = http.post(JOBS, json=changed(request_body, "method/hyperparameters", given))
        problem = reply.json()
        assert (reply.status_code, len(problem["errors"])) == (422, count)
        assert max(len(error["pointer"]) for error in problem["errors"]) <= 200
        assert len(reply.content) < 100_000
        assert problem["detail"].endswith("; and 49998 more") is (given is many)


def test_rows_in_both_sets_are_named_by_their_numbers(
    http: TestClient, settings: Settings, sessions: Sessions, upload: Callable[..., str], request_body: Body
) -> None:
    request_body["forget_set"] = [{"text": "a"}, {"text": "shared "}, {"question": "q", "answer": "r"}]
    request_body["retain_set"] = upload(
        "retain_set", [{"text": "b"}, {"question": "q", "answer": "r"}, {"text": "c"}, {"text": "shared"}]
    )
    reply = http.post(JOBS, json=request_body)
    assert reply.status_code == 422
    assert [(error["pointer"], error["detail"], error["code"]) for error in reply.json()["errors"]] == [
        ("/forget_set", "forget row 2 is retain row 4", "overlap"),
        ("/forget_set", "forget row 3 is retain row 2", "overlap"),
    ]
    assert kept(settings, sessions) == (0, 1, 1)

    rows = [{"text": str(number)} for number in range(500)]
    errors = http.post(JOBS, json=request_body | {"forget_set": rows, "retain_set": rows}).json()["errors"]
    assert (len(errors), errors[-1]["detail"]) == (21, "and 480 more")


ALIKE: list[tuple[Body, Body, str | None]] = [  # a forget row, a retain row, the warning
    ({"text": "Ada  lives\tin Ghent."}, {"text": "ada lives in GHENT."}, "rows_alike"),
    ({"text": "\uff21da lives in Ghent."}, {"text": "Ada lives in Ghent."}, "rows_alike"),  # a full-width A
    ({"text": "Jose\u0301 lives in Ghent."}, {"text": "Jos\u00e9 lives in Ghent."}, "rows_alike"),
    ({"text": "Ada wohnt in der Hauptstra\u00dfe."}, {"text": "Ada wohnt in der HAUPTSTRASSE."}, "rows_alike"),
    (ADA, ADA | {"answer": "a Poet."}, "rows_alike"),
    (ADA, {"text": "Who is Ada? A poet."}, "rows_alike"),
    ({"text": "Who is Ada?\nA poet."}, {"prompt": "Who is Ada?", "completion": " A poet."}, "rows_alike"),
    ({"question": "\u8c01\uff1f", "answer": "\u8bd7\u4eba"}, {"text": "\u8c01\uff1f\u8bd7\u4eba"}, "rows_alike"),
    (ADA, ADA | {"answer": "A baker."}, "same_question"),
    (ADA, {"question": "who is  ADA?", "answer": "A baker."}, "same_question"),
    (ADA, {"prompt": "Who is Ada?", "completion": "A baker."}, "same_question"),
    (ADA, {"question": "Who is Bob?", "answer": "A poet."}, None),
    ({"text": "Ada lives in Ghent."}, {"text": "Ada lives in Lima."}, None),
]


def test_rows_that_are_much_alike_are_warned_of_by_number(
    http: TestClient, upload: Callable[..., str], request_body: Body
) -> None:
    for number, (forget, retain, code) in enumerate(ALIKE):
        sets = {"forget_set": [{"text": "x"}, forget], "retain_set": [{"text": "y"}, {"text": "z"}, retain]}
        reply = http.post(JOBS, json=request_body | sets, params={"dry_run": True})
        warned = {one["code"]: one["message"] for one in reply.json()["warnings"] if one["code"] != SPACE}
        assert list(warned) == ([code] if code else []), f"pair {number}"
        assert all(message.endswith("(forget = retain): 2 = 3") for message in warned.values())
        assert not any(word in message for message in warned.values() for word in ("Ada", "Ghent", "poet"))

    kept_words = [{"text": f"Row {number}"} for number in range(25)]
    holdout = upload("holdout_set", [{"text": row["text"].upper()} for row in kept_words])
    sets = {"forget_set": [{"text": "x"}], "retain_set": kept_words, "holdout_set": holdout}
    job = http.post(JOBS, json=request_body | sets).json()
    (message,) = [one["message"] for one in job["warnings"] if one["code"] != SPACE]
    assert message.startswith("25 rows of the retain set have the words of a row of the holdout set")
    assert message.endswith("19 = 19, 20 = 20, ...")
    same = http.post(JOBS, json=request_body | {"forget_set": [ADA], "retain_set": [{"text": "b"}, ADA]})
    assert (same.status_code, same.json()["errors"][0]["code"]) == (422, "overlap"), "the very same row is an error"


def test_the_longest_row_that_is_admitted_is_one_that_the_worker_reads(
    http: TestClient, upload: Callable[..., str], request_body: Body, content_of: Callable[[str], bytes]
) -> None:
    def row(length: int) -> dict[str, str]:
        return {"text": "x" * (length - len(json.dumps({"text": ""})))}

    longest, longer = row(rows.LINE_MAX_BYTES), row(rows.LINE_MAX_BYTES + 1)
    uploaded = upload("forget_set", [longest, {"text": "y"}])
    for forget_set in (uploaded, [longest, {"text": "y"}]):
        job = http.post(JOBS, json=request_body | {"forget_set": forget_set}).json()
        lines = rows.lines(io.BytesIO(content_of(job["forget_set"])))
        assert [example.answer for example in rows.read(lines)] == [longest["text"], "y"]
    refused = http.post(JOBS, json=request_body | {"forget_set": [{"text": "y"}, longer]})
    assert [(error["pointer"], error["detail"]) for error in refused.json()["errors"]] == [
        ("/forget_set/1", "row 2: longer than 1048576 bytes")
    ]


def test_a_file_serves_the_purpose_that_it_was_uploaded_for(
    http: TestClient, upload: Callable[..., str], request_body: Body
) -> None:
    request_body["forget_set"] = upload("retain_set", [{"text": "keep me"}])
    reply = http.post(JOBS, json=request_body)
    assert (reply.status_code, reply.json()["errors"][0]["code"]) == (422, "purpose")


@pytest.mark.parametrize("room_for", range(4))  # of two sets: the bytes and the name of each
def test_a_full_disk_is_said_and_leaves_nothing(
    http: TestClient,
    settings: Settings,
    sessions: Sessions,
    request_body: Body,
    monkeypatch: pytest.MonkeyPatch,
    room_for: int,
) -> None:
    import os

    calls = iter([*[None] * room_for, OSError(28, "No space left on device")])

    def fsync(_: int) -> None:
        if error := next(calls, None):
            raise error

    monkeypatch.setattr(os, "fsync", fsync)
    reply = http.post(JOBS, json=request_body)
    assert (reply.status_code, reply.json()["type"]) == (507, "/docs#storage-full")
    assert kept(settings, sessions) == (0, 0, 0)


def test_a_dead_broker_does_not_fail_the_request(
    settings: Settings, sessions: Sessions, request_body: Body, client_of: ClientOf
) -> None:
    deaf = settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="m", source="path", location="m", prompt_format=PromptFormat()))
    with client_of(deaf) as http:
        assert http.post(JOBS, json=request_body).status_code == 201
        ready = http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")


def test_the_real_bell_rings_in_the_queue_of_the_class(
    settings: Settings, sessions: Sessions, request_body: Body, client_of: ClientOf
) -> None:
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="m", source="path", location="m", prompt_format=PromptFormat()))
    with client_of(settings) as http:
        assert http.post(JOBS, json=changed(request_body, "resources/gpu_class", "cpu")).status_code == 201
    with redis.Redis.from_url(settings.broker_url) as client:
        assert client.llen("wake.cpu") == 1


def test_cancel_ends_a_waiting_job_and_asks_a_running_one(
    http: TestClient, sessions: Sessions, request_body: Body
) -> None:
    waiting = http.post(JOBS, json=request_body).json()
    reply = http.post(waiting["links"]["cancel"])
    assert (reply.status_code, reply.json()["status"]) == (202, "cancelled")
    assert "Retry-After" not in reply.headers
    assert http.post(waiting["links"]["cancel"]).json()["version"] == reply.json()["version"], "asking twice is once"

    running = http.post(JOBS, json=request_body).json()
    found = claim(sessions)
    assert http.post(running["links"]["cancel"]).json()["status"] == "cancelling"
    with sessions.begin() as s:
        jobs.fail(s, found.job_id, found.fence, Failure.of(FailureCode.NON_FINITE_LOSS, "x"))
    failed = http.post(JOBS, json=request_body).json()
    found = claim(sessions)
    with sessions.begin() as s:
        jobs.fail(s, found.job_id, found.fence, Failure.of(FailureCode.NON_FINITE_LOSS, "the loss is nan"))
    refused = http.post(failed["links"]["cancel"])
    assert (refused.status_code, refused.json()["type"]) == (409, "/docs#invalid-transition")
    assert http.get(failed["links"]["self"]).json()["failure"]["fault"] == "client"
    assert http.post(f"{JOBS}/ujob_{'0' * 32}/cancel").status_code == 404


def test_a_running_job_shows_its_stage_pace_and_series(
    http: TestClient, sessions: Sessions, request_body: Body
) -> None:
    created = http.post(JOBS, json=request_body | {"budget": {"max_steps": 100}}).json()
    job_id, _, fence, _, _ = claim(sessions)
    with sessions.begin() as s:
        jobs.log(s, job_id, fence, stage=Stage.UNLEARNING)
        s.get_one(Job, job_id).stage_history = [_earlier(entry) for entry in s.get_one(Job, job_id).stage_history]
    bad = step_row(3)._replace(losses={"forget": float("nan"), "retain": 0.2})
    with sessions.begin() as s:
        check = CheckRow(0, 5.0, 0.9, 0.2, 0.2, 0.3, True, False, 3, 0.1)
        jobs.log(
            s, job_id, fence, steps=[step_row(1), step_row(2), bad], checks=[check], constraint=ConstraintRow(0.3, 0.2)
        )

    reply = http.get(created["links"]["self"])
    job = reply.json()
    assert (job["status"], job["stage"], job["attempt"]) == ("running", "unlearning", 1)
    assert (job["epsilon"], job["base_retain_loss"]) == (0.3, 0.2)
    progress = job["progress"]
    assert (progress["completed"], progress["percent"], progress["trained_tokens"]) == (3, 3.0, 30)
    assert progress["eta_seconds"] == pytest.approx(97 * 30 / 3, rel=0.05)  # three steps in thirty seconds
    estimated = datetime.fromisoformat(job["estimated_finish_at"]) - datetime.fromisoformat(job["updated_at"])
    assert estimated == timedelta(seconds=progress["eta_seconds"])
    assert reply.headers["Retry-After"] == "30"

    steps = http.get(job["links"]["steps"], params={"after": 1, "limit": 1}).json()
    assert ([row["step"] for row in steps["data"]], steps["has_more"], steps["attempt"]) == ([2], True, 1)
    assert steps["data"][0]["dual"] == {"retain": 50.0}
    last = http.get(job["links"]["steps"], params={"after": 2}).json()
    assert (last["data"][0]["losses"], last["has_more"]) == ({"forget": None, "retain": 0.2}, False)
    assert [row["step"] for row in http.get(job["links"]["steps"]).json()["checks"]] == [0]

    events = http.get(job["links"]["events"]).json()["data"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["type"] for event in events][:3] == ["job.created", "job.queued", "job.started"]
    rest = http.get(job["links"]["events"], params={"after_seq": 1, "limit": 1}).json()
    assert (rest["data"], rest["has_more"]) == ([events[1]], True)


def _earlier(entry: Mapping[str, Any]) -> dict[str, Any]:
    began = datetime.fromisoformat(entry["started_at"]) - timedelta(seconds=30)
    return {**entry, "started_at": began.isoformat()}


def test_a_run_that_ended_early_is_complete_and_names_its_results(
    http: TestClient, sessions: Sessions, request_body: Body
) -> None:
    created = http.post(JOBS, json=request_body).json()
    job_id, _, fence, _, _ = claim(sessions)
    names = ("adapter/adapter_model.safetensors", "report.json")
    rows = [ArtifactRow(name, f"jobs/{name}", "application/octet-stream", 1, "0" * 64) for name in names]
    with sessions.begin() as s:
        jobs.log(s, job_id, fence, steps=[step_row(1)])
        jobs.succeed(s, job_id, fence, Verdict(result="FAILED", gates=[], message="nothing was forgotten"), rows)
    reply = http.get(created["links"]["self"])
    job = reply.json()
    assert (job["status"], job["verdict"]["result"], job["progress"]["percent"]) == ("succeeded", "FAILED", 100)
    ids = {artifact["name"]: artifact["id"] for artifact in http.get(job["links"]["artifacts"]).json()["data"]}
    assert job["result"] == {"adapter": ids[names[0]], "report": ids[names[1]], "certificate": None}
    assert "Retry-After" not in reply.headers
    with sessions.begin() as s:
        models.remove(s, "m")
    assert http.get(created["links"]["self"]).json()["base_model"] is None


def test_jobs_are_listed_by_pages_status_and_model(http: TestClient, request_body: Body) -> None:
    ids = [http.post(JOBS, json=request_body | {"priority": priority}).json()["id"] for priority in (1, 9, 5)]
    listed = http.get(JOBS).json()
    assert [job["id"] for job in listed["data"]] == ids[::-1]
    assert [job["progress"]["queue_position"] for job in listed["data"]] == [2, 1, 3]
    http.post(f"{JOBS}/{ids[0]}/cancel")
    assert [job["id"] for job in http.get(JOBS, params={"status": "cancelled"}).json()["data"]] == ids[:1]
    assert http.get(JOBS, params={"model": "other"}).json()["data"] == []
    first = http.get(JOBS, params={"limit": 2, "status": "queued", "order": "asc"})
    assert (len(first.json()["data"]), first.json()["has_more"]) == (2, False)
    assert "Link" not in first.headers
    for wrong in ({"status": "done"}, {"model": "../x"}, {"stauts": "queued"}):
        assert http.get(JOBS, params=wrong).status_code == 422, wrong


def stored_spec(sessions: Sessions, job_id: str, change: str) -> None:
    with sessions.begin() as s:
        s.execute(text(f"UPDATE jobs SET spec = {change} WHERE id = :id"), {"id": job_id})


@pytest.mark.filterwarnings("error")  # pydantic's would print what is stored
def test_a_job_that_another_version_stored_is_shown_as_far_as_it_is_understood(
    http: TestClient, sessions: Sessions, request_body: Body
) -> None:
    newer, broken, older, plain = (http.post(JOBS, json=request_body).json() for _ in range(4))
    stored_spec(sessions, newer["id"], """spec || '{"novel": 1}' || jsonb_build_object('budget', '{"x": 1}'::jsonb)""")
    stored_spec(sessions, broken["id"], """spec || '{"constraint": {"kind": "quantile"}, "lora": 3}'""")
    stored_spec(sessions, older["id"], """spec - 'lora'""")
    with sessions.begin() as s:
        s.execute(
            text("UPDATE jobs SET status = 'failed', finished_at = now(), failure = :told WHERE id = :id"),
            {"id": broken["id"], "told": json.dumps({"code": "novel", "message": "m"})},
        )
    listed = {job["id"]: job for job in http.get(JOBS).json()["data"]}
    assert listed.keys() == {job["id"] for job in (newer, broken, older, plain)}
    assert listed[newer["id"]]["budget"]["max_steps"] == 300, "unknown fields passed over, defaults for missing ones"
    assert listed[older["id"]]["lora"] == plain["lora"]
    assert listed[plain["id"]] == http.get(plain["links"]["self"]).json()
    shown = http.get(broken["links"]["self"])
    assert shown.status_code == 200
    assert shown.json() == listed[broken["id"]]
    assert (shown.json()["constraint"], shown.json()["lora"]) == ({"kind": "quantile"}, 3), "as it is stored"
    assert (shown.json()["status"], shown.json()["failure"]["code"]) == ("failed", "novel")
    assert shown.json()["links"] == broken["links"]


def test_a_client_that_has_the_job_already_is_told_so(http: TestClient, sessions: Sessions, request_body: Body) -> None:
    created = http.post(JOBS, json=request_body)
    url, etag = created.json()["links"]["self"], created.headers["ETag"]
    for given in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        reply = http.get(url, headers={"If-None-Match": given})
        assert (reply.status_code, reply.content, reply.headers["ETag"]) == (304, b"", etag), given
        assert reply.headers["Retry-After"] == "10"
    assert http.get(url, headers={"If-None-Match": '"other"'}).status_code == 200
    with sessions.begin() as s:
        workers.seen(s, "w", ["cpu"], 0)  # changes what is shown, though not the job's version
    changed_ = http.get(url, headers={"If-None-Match": etag})
    assert (changed_.status_code, changed_.json()["version"]) == (200, created.json()["version"])
    http.post(created.json()["links"]["cancel"])
    assert http.get(url, headers={"If-None-Match": changed_.headers["ETag"]}).json()["status"] == "cancelled"


def test_a_job_that_nobody_can_run_says_so(http: TestClient, sessions: Sessions, request_body: Body) -> None:
    job = http.post(JOBS, json=changed(request_body, "resources/gpu_class", "cpu")).json()
    assert job["status_reason"] == "no worker that hears GPU class cpu has been seen in the last 5 minutes"
    with sessions.begin() as s:
        workers.seen(s, "w", ["cpu"], 0)
    assert http.get(job["links"]["self"]).json()["status_reason"] is None
    found = claim(sessions)
    with sessions.begin() as s:
        jobs.fail(s, found.job_id, found.fence, Failure.of(FailureCode.STORAGE_FULL, "full"))
        workers.gone(s, "w")
    reason = http.get(job["links"]["self"]).json()["status_reason"]
    assert reason.startswith("no worker")
    assert "; storage_full: full; the next attempt begins at " in reason


@pytest.mark.parametrize("how", ["fail", "lose"])
def test_a_job_that_rests_says_until_when_and_is_not_in_the_line(
    how: str, http: TestClient, sessions: Sessions, request_body: Body
) -> None:
    rests, waits = (http.post(JOBS, json=request_body | {"priority": priority}).json() for priority in (9, 1))
    with sessions.begin() as s:
        workers.seen(s, "w", ["cpu"], 0)
    found = claim(sessions)
    with sessions.begin() as s:
        if how == "fail":
            jobs.fail(s, found.job_id, found.fence, Failure.of(FailureCode.STORAGE_FULL, "full"))
        else:
            jobs.lose(s, found.job_id, found.fence, "full", 10)
    job, other = (http.get(one["links"]["self"]).json() for one in (rests, waits))
    assert (job["status"], job["progress"]["queue_position"]) == ("queued", None)
    until = datetime.fromisoformat(job["not_before"])
    assert (until - datetime.fromisoformat(job["updated_at"])).total_seconds() == 10
    assert job["status_reason"].endswith(f"full; the next attempt begins at {until:%Y-%m-%d %H:%M:%S} UTC or later")
    assert (other["progress"]["queue_position"], other["not_before"], other["status_reason"]) == (1, None, None)

    with sessions.begin() as s:
        s.execute(text("UPDATE jobs SET not_before = now() WHERE not_before IS NOT NULL"))
    job = http.get(rests["links"]["self"]).json()
    assert job["progress"]["queue_position"] == 1
    assert job["status_reason"].endswith("full"), "what is over is not told"
    assert http.post(rests["links"]["cancel"]).json()["not_before"] is None


def test_a_page_of_jobs_costs_as_many_queries_as_one(http: TestClient, sessions: Sessions, request_body: Body) -> None:
    def queries() -> int:
        ran: list[str] = []
        on = http.app.state.parts.sessions.kw["bind"]  # type: ignore[attr-defined]

        def note(*arguments: Any) -> None:
            ran.append(arguments[2])

        event.listen(on, "before_cursor_execute", note)
        assert http.get(JOBS).status_code == 200
        event.remove(on, "before_cursor_execute", note)
        return len(ran)

    for _ in range(2):
        http.post(JOBS, json=request_body)
    found = claim(sessions)
    with sessions.begin() as s:
        jobs.succeed(s, found.job_id, found.fence, Verdict(result="PASSED", gates=[], message="m"))
    few = queries()
    for _ in range(4):
        http.post(JOBS, json=request_body)
    assert queries() == few


def test_the_answer_to_a_request_is_made_before_its_commit(
    http: TestClient, settings: Settings, sessions: Sessions, request_body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that hears of an error may ask again; the first request must not have made a job as well."""
    monkeypatch.setattr("service.api.shapes.job_object", lambda *_: 1 / 0)
    assert http.post(JOBS, json=request_body).status_code == 500
    assert kept(settings, sessions)[:2] == (0, 0)


def test_unknown_jobs_are_not_found_whatever_their_name(http: TestClient) -> None:
    for name in (f"ujob_{'0' * 32}", "x", "%00", "..%2F..%2Fetc", "%ff"):
        for path in ("", "/events", "/steps", "/report", "/artifacts", "/artifacts/x/content"):
            for tag in ({}, {"If-None-Match": "*"}):
                reply = http.get(f"{JOBS}/{name}{path}", headers=tag)
                told = (reply.status_code, reply.headers["Content-Type"])
                assert told == (404, "application/problem+json"), name + path


# --- refusals


REFUSAL = [{"text": "I don't know."}, {"text": "No idea."}]
QUESTIONS = {"forget_set": [{"question": "Who is Ada?", "answer": "A poet."}]}
TEACHES = {"method": {"type": "idk_dpo"}} | QUESTIONS


def test_refusals_of_the_requests_own_are_kept_as_a_file(
    http: TestClient, request_body: dict[str, Any], upload: Callable[..., str]
) -> None:
    inline = http.post(JOBS, json=request_body | TEACHES | {"refusal_set": REFUSAL}).json()
    file = http.get(f"/v1/files/{inline['refusal_set']}").json()
    assert (file["purpose"], file["rows"]) == ("refusal_set", 2)
    uploaded = upload("refusal_set", REFUSAL)
    job = http.post(JOBS, json=request_body | TEACHES | {"refusal_set": uploaded}).json()
    assert job["refusal_set"] == uploaded
    assert http.delete(f"/v1/files/{uploaded}").status_code == 409, "the job needs it"
    assert http.post(JOBS, json=request_body | TEACHES).json()["refusal_set"] is None


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"refusal_set": REFUSAL}, "pdu does not teach a refusal"),
        (
            {"method": {"type": "custom", "hyperparameters": {"forget": {"type": "npo"}}}, "refusal_set": REFUSAL},
            "custom does not teach a refusal",
        ),
        (TEACHES | {"refusal_set": [*REFUSAL, {"question": "q", "answer": "a"}]}, "row 3 is not"),
        (TEACHES | {"refusal_set": []}, "at least 1"),
    ],
)
def test_refusals_that_cannot_be_used(
    http: TestClient, request_body: dict[str, Any], changes: dict[str, Any], detail: str
) -> None:
    reply = http.post(JOBS, json=request_body | changes)
    assert reply.status_code == 422
    (error,) = reply.json()["errors"]
    assert error["pointer"] == "/refusal_set"
    assert detail in error["detail"]


@pytest.mark.parametrize(
    "method", [{"type": "idk_dpo"}, {"type": "custom", "hyperparameters": {"forget": {"type": "dpo"}}}]
)
def test_a_text_asks_nothing_that_could_be_refused(
    method: Body, http: TestClient, settings: Settings, sessions: Sessions, request_body: Body
) -> None:
    reply = http.post(JOBS, json=request_body | {"method": method})
    assert reply.status_code == 422
    (error,) = reply.json()["errors"]
    assert (error["pointer"], error["code"], "row 2 is a text" in error["detail"]) == ("/forget_set", "kind", True)
    assert kept(settings, sessions) == (0, 0, 0)
    texts_kept = QUESTIONS | {"method": method, "retain_set": [{"text": "Bob bakes."}]}
    assert http.post(JOBS, json=request_body | texts_kept).status_code == 201, "what is retained is not refused"


def test_a_composition_of_ones_own_may_teach_refusals(http: TestClient, request_body: dict[str, Any]) -> None:
    own = {"method": {"type": "custom", "hyperparameters": {"forget": {"type": "dpo"}}}, "refusal_set": REFUSAL}
    job = http.post(JOBS, json=request_body | QUESTIONS | own)
    assert job.status_code == 201, job.text
    assert job.json()["method"]["hyperparameters"]["forget"] == {"type": "dpo", "beta": 0.1}
