"""Benchmarks over HTTP: what is registered, what is refused and how, and what a job can name."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from service.domain import rows, scores
from service.domain.errors import InvalidRequest, JobFailure
from service.domain.job import JobSpec, ModelEntry, PromptFormat
from service.settings import Settings
from service.store import jobs, models
from service.store.session import Sessions
from service.store.storage import Storage
from tests.conftest import owner
from tests.service.conftest import JOBS
from worker.assignment import assignment

BENCHMARKS = "/v1/benchmarks"
NOBODY = "ufile_" + "0" * 32
Body = dict[str, Any]


def row(columns: list[str], number: int = 0) -> Body:
    return {name: [f"{name} {number}"] if name in rows.LISTS else f"{name} {number}" for name in columns}


def tofu(http: TestClient) -> Body:
    """The suite, as the API tells it."""
    return next(suite for suite in http.get("/v1/suites").json()["data"] if suite["id"] == "tofu")


def send_scores(http: TestClient, content: str) -> str:
    reply = http.post("/v1/files", data={"purpose": "eval_scores"}, files={"file": ("scores.json", content)})
    assert reply.status_code == 201, reply.text
    return str(reply.json()["id"])


@pytest.fixture
def body(http: TestClient, upload: Callable[..., str]) -> Body:
    """A benchmark that can be registered as it stands: every required set, with two rows."""
    sets = {
        name: upload("eval_set", [row(form["columns"], number) for number in range(2)])
        for name, form in tofu(http)["sets"].items()
        if form["required"]
    }
    return {"name": "forget01", "suite": "tofu", "sets": sets, "corpus": "TOFU forget01"}


def problems(reply: Any) -> list[tuple[str, str, str]]:
    assert reply.status_code == 422, reply.text
    return [(error["pointer"], error["detail"], error["code"]) for error in reply.json()["errors"]]


def test_the_suites_are_told_with_their_columns_and_figures(http: TestClient) -> None:
    suites = {suite["id"]: suite for suite in http.get("/v1/suites").json()["data"]}
    assert {"tofu", "muse", "request"} <= suites.keys()
    assert suites["tofu"]["object"] == "suite"
    assert {"question", "answer", "perturbed_answer"} <= set(suites["tofu"]["sets"]["forget"]["columns"])
    assert all(suites["tofu"]["figures"][name]["definition"] for name in ("forget_quality", "model_utility"))
    assert all("/" in figure for figure in suites["request"]["figures"])


def test_a_benchmark_is_registered_shown_and_forgotten(http: TestClient, body: Body) -> None:
    reply = http.post(BENCHMARKS, json=body)
    assert reply.status_code == 201, reply.text
    benchmark = reply.json()
    assert reply.headers["Location"] == f"{BENCHMARKS}/forget01"
    expected = {"id": "forget01", "object": "benchmark", "retrained_model": None, "retrained_scores": None}
    assert {name: benchmark[name] for name in expected} == expected
    assert (benchmark["sets"], benchmark["suite"], benchmark["corpus"]) == (body["sets"], "tofu", "TOFU forget01")
    assert benchmark["created_at"].endswith("Z")
    assert http.get(f"{BENCHMARKS}/forget01").json() == benchmark
    assert http.get(BENCHMARKS).json()["data"] == [benchmark]
    taken = http.post(BENCHMARKS, json=body)
    assert (taken.status_code, "is registered" in taken.json()["detail"]) == (409, True)
    assert http.delete(f"{BENCHMARKS}/forget01").status_code == 204
    assert http.get(BENCHMARKS).json()["data"] == []
    for method in (http.get, http.delete):
        assert method(f"{BENCHMARKS}/forget01").status_code == 404
    assert http.post(BENCHMARKS, json=body).status_code == 201, "the name is free again, the files are there"


def test_what_models_said_of_a_benchmark_goes_with_it(http: TestClient, body: Body, settings: Settings) -> None:
    storage = Storage(settings.storage_url)
    assert http.post(BENCHMARKS, json=body | {"name": "tofu-1.0"}).status_code == 201
    said = [f"benchmarks/default/{name}/looks/0a/1b.safetensors" for name in ("tofu-1.0", "tofu-1.0.1")]
    for key in said:
        storage.write(key, [b"the answers"])
    assert http.delete(f"{BENCHMARKS}/tofu-1.0").status_code == 204
    assert [key for key, _ in storage.ages("benchmarks")] == said[1:]


def test_what_a_benchmark_needs_stays(http: TestClient, body: Body, sessions: Sessions) -> None:
    stored = send_scores(http, '{"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {"0": {"score": 0.5}}}}')
    assert http.post(BENCHMARKS, json=body | {"retrained_scores": stored}).status_code == 201
    for file_id in {*body["sets"].values(), stored}:
        refused = http.delete(f"/v1/files/{file_id}")
        assert (refused.status_code, "benchmark 'forget01' still needs" in refused.json()["detail"]) == (409, True)
    second = {key: value for key, value in body.items() if key != "name"} | {"name": "other", "retrained_model": "m"}
    assert http.post(BENCHMARKS, json=second).status_code == 201
    with sessions.begin() as s, pytest.raises(Exception, match="benchmark 'other' still needs model 'm'"):
        models.remove(s, "m")
    http.delete(f"{BENCHMARKS}/forget01")
    assert http.delete(f"/v1/files/{stored}").status_code == 204
    assert http.delete(f"/v1/files/{body['sets']['forget']}").status_code == 409, "the other one needs it"
    http.delete(f"{BENCHMARKS}/other")
    assert http.delete(f"/v1/files/{body['sets']['forget']}").status_code == 204
    with sessions.begin() as s:
        models.remove(s, "m")


def test_sets_are_those_of_the_suite(http: TestClient, body: Body) -> None:
    some = body["sets"]["forget"]
    (unknown,) = problems(http.post(BENCHMARKS, json=body | {"sets": body["sets"] | {"forgot/~": some}}))
    assert (unknown[0], unknown[2]) == ("/sets/forgot~1~0", "enum")
    assert "world_facts" in unknown[1]
    missing = problems(http.post(BENCHMARKS, json=body | {"sets": {"forget": some}}))
    required = {name for name, form in tofu(http)["sets"].items() if form["required"]} - {"forget"}
    assert [(pointer, code) for pointer, _, code in missing] == [("/sets", "missing")] * len(required)
    assert all(any(f"'{name}'" in detail for _, detail, _ in missing) for name in required)
    assert problems(http.post(BENCHMARKS, json=body | {"sets": {}}))[0][0] == "/sets"


def test_files_are_uploaded_as_what_they_serve_for(http: TestClient, body: Body, upload: Callable[..., str]) -> None:
    wrong = upload("forget_set", [row(["question", "answer"])])
    stored = send_scores(http, '{"model_utility": {"agg_value": 0.5}}')
    for changes, expected in (
        ({"sets": body["sets"] | {"forget": NOBODY}}, ("/sets/forget", "file_not_found")),
        ({"sets": body["sets"] | {"forget": wrong}}, ("/sets/forget", "purpose")),
        ({"sets": body["sets"] | {"forget": stored}}, ("/sets/forget", "purpose")),
        ({"retrained_scores": NOBODY}, ("/retrained_scores", "file_not_found")),
        ({"retrained_scores": body["sets"]["forget"]}, ("/retrained_scores", "purpose")),
        ({"retrained_model": "unknown"}, ("/retrained_model", "model_not_found")),
        ({"retrained_scores": stored, "retrained_model": "m"}, ("", "value_error")),
        ({"name": "audit"}, ("/name", "reserved")),
        ({"name": "forget"}, ("/name", "reserved")),
        ({"name": "a/b"}, ("/name", "string_pattern_mismatch")),
        ({"suite": "request"}, ("/suite", "literal_error")),
        ({"sets": body["sets"] | {"forget": "../x"}}, ("/sets/forget", "string_pattern_mismatch")),
        ({"path": "/data"}, ("/path", "extra_forbidden")),
    ):
        found = problems(http.post(BENCHMARKS, json=body | changes))
        assert [(pointer, code) for pointer, _, code in found] == [expected], changes
    assert http.get(BENCHMARKS).json()["data"] == []


def test_a_row_without_its_columns_is_named_by_its_line_and_not_quoted(
    http: TestClient, body: Body, upload: Callable[..., str]
) -> None:
    columns = tofu(http)["sets"]["forget"]["columns"]
    good, secret = row(columns), {"question": "who is the secret", "answer": "a"}
    body["sets"]["forget"] = upload("eval_set", [good, secret, good, {"text": "secret too"}])
    found = problems(http.post(BENCHMARKS, json=body))
    assert [(pointer, detail.partition(":")[0], code) for pointer, detail, code in found] == [
        ("/sets/forget", "line 2", "line"),
        ("/sets/forget", "line 4", "line"),
    ]
    assert "lacks" in found[0][1]
    assert "perturbed_answer" in found[0][1]
    assert "secret" not in json.dumps(found)


def test_stored_figures_are_some_of_the_suites(http: TestClient, body: Body) -> None:
    stored = send_scores(http, '{"accuracy": {"agg_value": 0.5}}')
    ((pointer, detail, code),) = problems(http.post(BENCHMARKS, json=body | {"retrained_scores": stored}))
    assert (pointer, code, "forget_truth_ratio" in detail) == ("/retrained_scores", "figures", True)


# --- what is uploaded for them


OF_A_SUITE = [
    '{"question": "q", "answer": "a", "perturbed_answer": ["x", "y"], "option1": 3}',
    '{"prompt": "p", "gt": "g"}',
    '{"text": "t"}',
    '{"question": "q", "answer": ""}',
]


def test_an_evaluation_set_has_the_columns_of_its_suite(http: TestClient) -> None:
    content = "\n".join(OF_A_SUITE)
    reply = http.post("/v1/files", data={"purpose": "eval_set"}, files={"file": ("f", content)})
    assert (reply.status_code, reply.json().get("rows")) == (201, len(OF_A_SUITE)), reply.text


OF_THE_WRONG_TYPE = [
    ('{"question": "q", "answer": "a", "perturbed_answer": "x"}', "perturbed_answer is not a list of strings"),
    ('{"question": "q", "answer": "a", "perturbed_answer": []}', "perturbed_answer is not a list of strings"),
    ('{"question": "q", "answer": "a", "perturbed_answer": ["x", 1]}', "perturbed_answer is not a list of strings"),
    ('{"question": "q", "answer": "a", "paraphrased_answer": ["x"]}', "paraphrased_answer is not a string"),
    ('{"question": "q", "answer": "a", "paraphrased_question": null}', "paraphrased_question is not a string"),
    ('{"question": "q", "answer": "a", "paraphrased_answer": "\\ud800"}', "half a surrogate pair"),
]


def test_columns_with_a_meaning_are_of_their_type(http: TestClient) -> None:
    good = '{"question": "q", "answer": "a", "paraphrased_answer": "b", "perturbed_answer": ["c"]}\n'
    purposes = ("forget_set", "retain_set", "holdout_set", "eval_set")
    for purpose, (line, words) in product(purposes, OF_THE_WRONG_TYPE):
        reply = http.post("/v1/files", data={"purpose": purpose}, files={"file": ("f", good + line)})
        ((pointer, detail, code),) = problems(reply)
        assert (pointer, code, detail.startswith("line 2: "), words in detail) == ("/file", "line", True, True), detail
    for purpose in purposes:
        assert http.post("/v1/files", data={"purpose": purpose}, files={"file": ("f", good)}).status_code == 201


def test_an_evaluation_set_without_a_known_column_is_refused(http: TestClient) -> None:
    reply = http.post("/v1/files", data={"purpose": "eval_set"}, files={"file": ("f", '{"option1": "x"}')})
    assert "line 1: has none of the columns question, answer" in problems(reply)[0][1]


def test_objects_keep_all_their_columns() -> None:
    given = [{"question": "q", "answer": "a", "other": {"x": 1}}, {"text": "t"}]
    lines = [json.dumps(one).encode() for one in given]
    assert list(rows.each_object(lines)) == given
    with pytest.raises(InvalidRequest, match="line 2: lacks answer and question"):
        list(rows.each_object(lines, required={"question", "answer"}))


NO_FIGURES = [
    ("no json", "not one JSON document"),
    ('{"a": {"agg_value": 1}}\n{"b": {"agg_value": 1}}', "not one JSON document"),
    ("[" * 100_000, "not one JSON document"),
    ("[1]", "not a JSON object"),
    ("{}", "not a JSON object"),
    ('{"a": 1}', "'a' is no figure"),
    ('{"a": {"agg_value": true}}', "'a' is no figure"),
    ('{"a": {"agg_value": "0.5"}}', "'a' is no figure"),
    ('{"a": {"agg_value": 0.5, "value_by_index": []}}', "'a' is no figure"),
    ('{"a": {"agg_value": null}, "b": {"score": 1}}', "'b' is no figure"),
    ('{"a": {"agg_value": NaN}}', "'a' is no figure"),
    ('{"a": {"agg_value": 0.5, "value_by_index": {"x": {"score": 1}}}}', "'a' is no figure"),
    ('{"a": {"agg_value": 0.5, "value_by_index": {"0": 1}}}', "'a' is no figure"),
    ('{"a": {"agg_value": 0.5, "value_by_index": {"0": {"score": "1"}}}}', "'a' is no figure"),
    ('{"a": {"agg_value": 0.5, "interval_95": 3}}', "'a' is no figure"),
    ('{"a": {"agg_value": 0.5, "forget": {}}}', "'a' is no figure"),
    (" " * (scores.BYTES_MAX + 1), "at most"),
]


def test_stored_figures_are_one_document(http: TestClient) -> None:
    for content, words in NO_FIGURES:
        reply = http.post("/v1/files", data={"purpose": "eval_scores"}, files={"file": ("f", content)})
        ((pointer, detail, _),) = problems(reply)
        assert (pointer, words in detail) == ("/file", True), detail


def test_what_the_reference_prints_is_taken(http: TestClient, shared: Path) -> None:
    for path in (shared / "golden").glob("*.json"):
        content = path.read_bytes()
        reply = http.post("/v1/files", data={"purpose": "eval_scores"}, files={"file": (path.name, content)})
        assert (reply.status_code, reply.json()["rows"]) == (201, len(json.loads(content)))


def test_tofus_own_files_make_a_benchmark(http: TestClient, shared: Path) -> None:
    def send(name: str) -> str:
        content = (shared / "data/tofu" / name).read_bytes()
        reply = http.post("/v1/files", data={"purpose": "eval_set"}, files={"file": (name, content)})
        assert reply.status_code == 201, reply.text
        return str(reply.json()["id"])

    sets = {
        "forget": send("forget01_perturbed.json"),
        "retain": send("retain_perturbed.json"),
        "real_authors": send("real_authors_perturbed.json"),
        "world_facts": send("world_facts_perturbed.json"),
        "holdout": send("holdout01.json"),
    }
    golden = (shared / "golden/tofu260K_retain_forget01_TOFU_EVAL.json").read_text()
    body = {"name": "t", "suite": "tofu", "corpus": "c", "sets": sets, "retrained_scores": send_scores(http, golden)}
    reply = http.post(BENCHMARKS, json=body)
    assert reply.status_code == 201, reply.text


# --- what a job names


@pytest.fixture
def registered(http: TestClient, body: Body) -> str:
    assert http.post(BENCHMARKS, json=body).status_code == 201
    return str(body["name"])


GATES = [
    {"metric": "forget/probability", "op": "<=", "threshold": 0.05},
    {"metric": "forget01/model_utility", "op": ">=", "threshold": 0.5, "severity": "warn"},
    {"metric": "audit/relearn_forget/probability", "op": "<=", "threshold": 0.2},
]


def test_a_job_names_benchmarks_an_audit_gates_and_a_holdout_set(
    http: TestClient, registered: str, request_body: Body, settings: Settings, sessions: Sessions
) -> None:
    asked = {
        "benchmarks": [registered],
        "audit": {"relearn_steps": 5},
        "gates": GATES,
        "holdout_set": [{"question": "Who is Cy?", "answer": "A cook."}],
    }
    reply = http.post(JOBS, json=request_body | asked)
    assert reply.status_code == 201, reply.text
    job = reply.json()
    assert (job["benchmarks"], job["audit"]["relearn_steps"], job["audit"]["prefixes"]) == ([registered], 5, True)
    assert job["gates"] == [{"severity": "fail"} | gate for gate in GATES]
    assert http.get(f"/v1/files/{job['holdout_set']}").json()["purpose"] == "holdout_set"
    assert http.delete(f"/v1/files/{job['holdout_set']}").status_code == 409
    assert http.get(job["links"]["self"]).json() == job

    refused = http.delete(f"{BENCHMARKS}/{registered}")
    assert (refused.status_code, f"job {job['id']} still needs" in refused.json()["detail"]) == (409, True)
    http.post(job["links"]["cancel"])
    assert http.delete(f"{BENCHMARKS}/{registered}").status_code == 204
    assert http.get(job["links"]["self"]).json()["benchmarks"] == [registered], "what was asked stays"


def test_a_plain_job_says_that_it_asked_for_none_of_it(http: TestClient, request_body: Body) -> None:
    job = http.post(JOBS, json=request_body).json()
    assert (job["benchmarks"], job["audit"], job["gates"], job["holdout_set"]) == ([], None, [], None)


REFUSED: list[tuple[Body, str, str]] = [  # what is asked, pointer, words of the complaint
    ({"benchmarks": ["forget01", "none"]}, "/benchmarks/1", "'none' is not registered"),
    ({"benchmarks": ["forget01", "forget01"]}, "/benchmarks/1", "named twice"),
    ({"gates": [GATES[1]]}, "/gates/0/metric", "'forget01' is neither a set nor a benchmark"),
    ({"gates": [GATES[2]]}, "/gates/0/metric", "it has: quantise_8/probability, "),
    ({"gates": [GATES[0], GATES[0]]}, "/gates/1", "already"),
    ({"gates": [GATES[0] | {"metric": "forget/nothing"}]}, "/gates/0/metric", "rouge_l_recall"),
    ({"gates": [GATES[0] | {"metric": "probability"}]}, "/gates/0/metric", "'probability'"),
    ({"gates": [GATES[0] | {"metric": "forget"}]}, "/gates/0/metric", "rouge_l_recall"),
    ({"gates": [GATES[0] | {"op": "<"}]}, "/gates/0/op", "'<='"),
    ({"gates": [GATES[0] | {"threshold": float("inf")}]}, "/gates/0/threshold", "finite"),
    (
        {"benchmarks": ["forget01"], "gates": [GATES[1] | {"metric": "forget01/utility"}]},
        "/gates/0/metric",
        "forget01 has no figure 'utility'; it has: exact_memorization, ",
    ),
    (
        {"benchmarks": ["forget01"], "gates": [GATES[1] | {"metric": "forget01/forget_quality"}]},
        "/gates/0/metric",
        "forget_quality needs a retrained reference",
    ),
    ({"audit": {"relearn_steps": 0}, "gates": [GATES[2]]}, "/gates/0/metric", "it has: quantise_8/probability, "),
    (
        {"audit": {"quantise_bits": [8]}, "gates": [GATES[2] | {"metric": "audit/quantise_4/probability"}]},
        "/gates/0/metric",
        "it has: relearn_forget/probability, ",
    ),
    ({"audit": {"relearn_share": 1}}, "/audit/relearn_share", "less than 1"),
    ({"holdout_set": []}, "/holdout_set", "at least 1"),
    ({"holdout_set": [{"question": "q", "answer": " "}]}, "/holdout_set/0", "answer is empty"),
    ({"holdout_set": [{"text": "x"}, {"text": " Ada lives in Ghent."}]}, "/holdout_set", "holdout row 2 is forget"),
    ({"holdout_set": [{"question": "Who is Bob?", "answer": "A baker."}]}, "/holdout_set", "1 is retain row 1"),
    ({"holdout_set": NOBODY}, "/holdout_set", "no file"),
]


def test_what_cannot_be_measured_is_refused_by_name(http: TestClient, registered: str, request_body: Body) -> None:
    for changes, pointer, words in REFUSED:
        content = json.dumps(request_body | changes)  # it writes Infinity, as Python's clients do
        reply = http.post(JOBS, content=content, headers={"Content-Type": "application/json"})
        ((found, detail, _),) = problems(reply)
        assert (found, words in detail) == (pointer, True), (changes, found, detail)
    assert http.get(JOBS).json()["data"] == []


def test_a_gate_may_be_on_what_a_retrained_reference_gives(http: TestClient, body: Body, request_body: Body) -> None:
    assert http.post(BENCHMARKS, json=body | {"retrained_model": "m"}).status_code == 201
    gate = {"metric": "forget01/forget_quality", "op": ">=", "threshold": 0.05}
    reply = http.post(JOBS, json=request_body | {"benchmarks": ["forget01"], "gates": [gate]})
    assert reply.status_code == 201, reply.text


def test_the_same_figure_may_warn_at_one_value_and_fail_at_another(http: TestClient, request_body: Body) -> None:
    gates = [GATES[0], GATES[0] | {"threshold": 0.01, "severity": "warn"}, GATES[0] | {"op": ">="}]
    assert http.post(JOBS, json=request_body | {"gates": gates}).status_code == 201


# --- what the worker is told


def test_the_assignment_has_the_benchmarks_with_their_files(
    http: TestClient,
    body: Body,
    upload: Callable[..., str],
    request_body: Body,
    settings: Settings,
    sessions: Sessions,
    tmp_path: Path,
) -> None:
    stored = send_scores(http, '{"forget_truth_ratio": {"agg_value": 0.5}}')
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="clean", source="path", location="c", prompt_format=PromptFormat()))
    for name, retrained in (("b1", {"retrained_model": "clean"}), ("b2", {"retrained_scores": stored}), ("b3", {})):
        assert http.post(BENCHMARKS, json=body | {"name": name} | retrained).status_code == 201
    holdout = upload("holdout_set", [{"text": "h"}])
    asked = {"benchmarks": ["b2", "b1", "b3"], "holdout_set": holdout}
    assert http.post(JOBS, json=request_body | asked).status_code == 201

    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        told = assignment(s, claim, JobSpec.model_validate(claim.spec), settings, tmp_path, False)
    told = type(told).model_validate_json(told.model_dump_json())  # as the runner reads it
    assert told.holdout_file is not None
    assert (told.holdout_file.id, told.refusal_file) == (holdout, None)
    scores_first, model_second, alone = told.benchmarks
    assert (scores_first.name, scores_first.suite, scores_first.corpus) == ("b2", "tofu", "TOFU forget01")
    assert {of: file.id for of, file in scores_first.files.items()} == body["sets"]
    assert scores_first.retrained_scores is not None
    assert (scores_first.retrained_scores.id, scores_first.retrained_model) == (stored, None)
    assert model_second.retrained_model is not None
    assert (model_second.retrained_model.name, model_second.retrained_scores) == ("clean", None)
    assert (alone.retrained_model, alone.retrained_scores) == (None, None)


def test_a_benchmark_that_is_gone_fails_the_job_with_its_name(
    http: TestClient, registered: str, request_body: Body, settings: Settings, sessions: Sessions, tmp_path: Path
) -> None:
    """Nothing of the API takes it away from a waiting job; somebody with the database can."""
    assert http.post(JOBS, json=request_body | {"benchmarks": [registered]}).status_code == 201
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
    spec = JobSpec.model_validate(claim.spec)
    file_id = http.get(f"{BENCHMARKS}/{registered}").json()["sets"]["retain"]
    for statement, code, words in (
        (f"DELETE FROM files WHERE id = '{file_id}'", "invalid_file", f"benchmark 'forget01': no file '{file_id}'"),
        ("UPDATE benchmarks SET sets = '{}', retrained_model = 'x'", "model_not_found", "'forget01': no model 'x'"),
        ("DELETE FROM benchmarks", "invalid_file", "no benchmark 'forget01'"),
    ):
        with owner(sessions).begin() as database:
            database.execute(text(statement))
        with sessions.begin() as s, pytest.raises(JobFailure, match=words) as caught:
            assignment(s, claim, spec, settings, tmp_path, False)
        assert caught.value.code == code
