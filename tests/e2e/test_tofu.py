"""The whole path over HTTP on a real pretrained model and the real TOFU data: an author of a 260K Llama that learned them.

The stack is the local one: API, worker and sweep as processes, a real Postgres and a real Valkey. Both jobs run at once.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import jsonschema
import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.domain.job import TERMINAL
from service.local import Stack, stack
from service.processes import free_port

Json = dict[str, Any]
JOBS = "/v1/unlearning/jobs"
EPSILON_RELATIVE = 0.15
PROMISED = ("retain_nll", "forget_probability", "disclosure", "disclosure/quantise_8", "disclosure/quantise_4")
PROMPT = ("--user-start", "Question: ", "--user-end", "\n", "--assistant-start", "Answer: ")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def tofu(request: pytest.FixtureRequest) -> Path:
    folder = Path(os.environ.get("UNLEARN_SHARED", Path(__file__).parents[3] / "shared"))
    if not (folder / "models" / "tofu260K_full").is_dir():
        pytest.skip(f"needs the shared folder with models/tofu260K_full and data/tofu; none at {folder}")
    return folder


@pytest.fixture(scope="module")
def here(tofu: Path) -> Iterator[Stack]:
    with TemporaryDirectory(prefix="unlearn-test-") as name:
        folder = Path(name)
        copytree(tofu / "models" / "tofu260K_full", folder / "models" / "tofu260K_full")
        with stack(folder, api_port=free_port(), worker_slots=2, worker_threads=1) as running:
            subprocess.run(  # the way an administrator registers a model
                [sys.executable, "-m", "service.cli", "models", "add", "tofu260K", "--path", "tofu260K_full", *PROMPT],
                env=running.environment,
                check=True,
                capture_output=True,
                cwd=folder / "models",
            )
            yield running


@pytest.fixture(scope="module")
def api(here: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=here.url, timeout=30, headers=here.headers) as client:
        yield client


@pytest.fixture(scope="module")
def full(tofu: Path) -> list[Json]:
    return [json.loads(line) for line in (tofu / "data" / "tofu" / "full.json").read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(full: list[Json]) -> dict[str, list[Json]]:
    """One of forget01's two authors, and others."""
    return {"forget_set": full[3980:], "retain_set": full[:50] + full[3860:3910]}


def uploaded(api: httpx.Client, rows: dict[str, list[Json]]) -> dict[str, str]:
    ids = {}
    for purpose, of_set in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in of_set)
        reply = api.post("/v1/files", data={"purpose": purpose}, files={"file": (f"{purpose}.jsonl", lines)})
        assert reply.status_code == 201, reply.text
        ids[purpose] = reply.json()["id"]
    return ids


def created(api: httpx.Client, body: Json) -> str:
    reply = api.post(JOBS, json=body)
    assert reply.status_code == 201, reply.text
    return str(reply.json()["id"])


@pytest.fixture(scope="module")
def jobs(api: httpx.Client, rows: dict[str, list[Json]]) -> dict[str, Json]:
    """The request that must pass and the one that cannot, both ended."""
    both = {"model": "tofu260K", "constraint": {"epsilon_relative": EPSILON_RELATIVE}, **uploaded(api, rows)}
    passes = both | {"method": {"type": "pdu"}, "budget": {"max_steps": 180, "forget_target": 0.05}}
    timid = both | {
        **uploaded(
            api, {"forget_set": rows["forget_set"][:8], "retain_set": rows["retain_set"][:24]}
        ),  # takes less time
        "method": {"type": "pdu", "hyperparameters": {"learning_rate": 1e-6}},
        "budget": {"max_steps": 10},
    }
    ids = {name: created(api, body) for name, body in {"passes": passes, "timid": timid}.items()}
    with ThreadPoolExecutor() as pool:
        return dict(zip(ids, pool.map(lambda job_id: ended(api, job_id), ids.values()), strict=True))


def ended(api: httpx.Client, job_id: str) -> Json:
    deadline = time.monotonic() + 400
    while True:
        job: Json = api.get(f"{JOBS}/{job_id}").raise_for_status().json()
        if job["status"] in TERMINAL:
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.5)


def report_of(api: httpx.Client, job: Json) -> Json:
    return api.get(f"{JOBS}/{job['id']}/report", headers={"Accept": "application/json"}).raise_for_status().json()  # type: ignore[no-any-return]


def figure(report: Json, of: str, metric: str) -> Json:
    return next(f for f in report["figures"] if f["set"] == of and f["metric"] == metric)


def test_the_request_passes_and_keeps_its_bound(api: httpx.Client, jobs: dict[str, Json]) -> None:
    job = jobs["passes"]
    assert job["status"] == "succeeded", job
    gates = {gate["metric"]: gate["result"] for gate in job["verdict"]["gates"]}
    assert {gates[name] for name in PROMISED} == {"PASSED"}, job["verdict"]
    assert (job["verdict"]["result"], gates["language"]) == ("WARNED", "WARNED"), "pdu answers with noise"
    report = report_of(api, job)
    probability = figure(report, "forget", "probability")
    assert probability["after"] < 0.05 < probability["before"]
    bound = report["constraint"]
    assert bound["rows_measured"] == bound["rows_total"] == 100
    assert bound["epsilon"] == pytest.approx((1 + EPSILON_RELATIVE) * bound["before"])
    assert bound["after"] == bound["upper"] <= bound["epsilon"]
    assert report["stop"]["reason"] == "target_reached"
    assert report["released"]["published"]


def test_a_request_that_forgets_nothing_fails_although_it_keeps_the_bound(
    api: httpx.Client, jobs: dict[str, Json]
) -> None:
    job = jobs["timid"]
    assert job["status"] == "succeeded"
    assert job["verdict"]["result"] == "FAILED"
    gates = {gate["metric"]: gate for gate in job["verdict"]["gates"]}
    assert gates["retain_nll"]["result"] == "PASSED"
    assert gates["forget_probability"]["result"] == "FAILED"
    assert gates["forget_probability"]["value"] > 0.5


def test_the_published_adapter_reproduces_the_report(
    api: httpx.Client, jobs: dict[str, Json], tofu: Path, rows: dict[str, list[Json]], tmp_path: Path
) -> None:
    """As somebody who has the files and nothing of ours."""
    job, folder = jobs["passes"], tmp_path / "adapter"
    folder.mkdir()
    for artifact in api.get(f"{JOBS}/{job['id']}/artifacts").json()["data"]:
        if artifact["name"].startswith("adapter/"):
            content = api.get(f"{JOBS}/{job['id']}/artifacts/{artifact['id']}/content").raise_for_status().content
            assert hashlib.sha256(content).hexdigest() == artifact["sha256"]
            (folder / artifact["name"].removeprefix("adapter/")).write_bytes(content)
    base = tofu / "models" / "tofu260K_full"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    report = report_of(api, job)
    for when, acting in (("before", model.disable_adapter()), ("after", nullcontext())):
        with acting, torch.no_grad():
            for of in ("forget", "retain"):
                losses = [plain_losses(model, tokenizer, row) for row in rows[f"{of}_set"]]
                probabilities = [math.exp(-float(loss_n.mean())) for loss_n in losses]
                found = figure(report, of, "probability")[when]
                assert sum(probabilities) / len(losses) == pytest.approx(found, abs=1e-4)
                mean = float(torch.cat(losses).mean())
                assert mean == pytest.approx(figure(report, of, "nll")[when], rel=1e-4)
    assert mean <= report["constraint"]["epsilon"], "the retain set's, after"


def plain_losses(model: PeftModel, tokenizer: Any, row: Json) -> torch.Tensor:
    """Of the answer's tokens, the end of sequence included."""
    prompt = f"Question: {row['question']}\nAnswer: "
    whole = tokenizer(prompt + row["answer"], return_offsets_mapping=True)
    start = next(k for k, (_, end) in enumerate(whole["offset_mapping"]) if end > len(prompt))
    ids = torch.tensor([[*whole["input_ids"], tokenizer.eos_token_id]])
    return cross_entropy(model(input_ids=ids).logits[0, start - 1 : -1], ids[0, start:], reduction="none")


def test_steps_events_and_gauges_show_the_dual_variable(api: httpx.Client, jobs: dict[str, Json], here: Stack) -> None:
    job = jobs["passes"]
    steps = api.get(f"{JOBS}/{job['id']}/steps", params={"limit": 1000}).json()["data"]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert job["progress"]["completed"] == len(steps)
    for before, after in pairwise(steps):  # the published update rule, from the stored series alone
        expected = min(max(before["dual"]["retain"] + 50.0 * before["violation"]["retain"], 0.0), 10_000.0)
        assert after["dual"]["retain"] == pytest.approx(expected)
    types = [event["type"] for event in api.get(f"{JOBS}/{job['id']}/events", params={"limit": 100}).json()["data"]]
    assert types[:3] == ["job.created", "job.queued", "job.started"]
    assert [one for one in types if one != "certificate.issued"][-1] == "job.succeeded"
    assert "job.progress" in types
    exposed = httpx.get(here.worker_metrics_url).text
    assert f'unlearn_solver_dual_variable{{constraint="retain",job_id="{job["id"]}"}}' in exposed
    assert 'unlearn_job_verdicts_total{result="WARNED"}' in api.get("/metrics").text


def test_the_report_is_valid_and_holds_no_text_of_the_data(
    api: httpx.Client, jobs: dict[str, Json], rows: dict[str, list[Json]]
) -> None:
    schema = api.get("/v1/schemas/report").json()
    for job in jobs.values():
        report = report_of(api, job)
        jsonschema.Draft202012Validator(schema).validate(report)
        page = api.get(f"{JOBS}/{job['id']}/report", headers={"Accept": "text/html"}).raise_for_status().text
        assert report["verdict"]["result"] in page
        for told in (json.dumps(report, ensure_ascii=False), page):
            for row in rows["forget_set"] + rows["retain_set"]:
                assert row["answer"] not in told
                assert row["question"] not in told


def submit(api: httpx.Client, rows: dict[str, list[Json]], **changes: Any) -> str:
    """A small request with inline rows."""
    few = {
        purpose: [{"question": row["question"], "answer": row["answer"]} for row in content[:8]]
        for purpose, content in rows.items()
    }
    return created(
        api, {"model": "tofu260K", "method": {"type": "pdu"}, "constraint": {"epsilon": 0.5}} | few | changes
    )


def test_a_running_job_stops_at_its_next_step_when_it_is_cancelled(
    api: httpx.Client, jobs: dict[str, Json], rows: dict[str, list[Json]]
) -> None:
    job_id = submit(api, rows, budget={"max_steps": 1_000_000})
    deadline = time.monotonic() + 60
    while not api.get(f"{JOBS}/{job_id}/steps").json()["data"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert api.post(f"{JOBS}/{job_id}/cancel").status_code == 202
    job = ended(api, job_id)
    assert job["status"] == "cancelled"
    assert api.get(f"{JOBS}/{job_id}/report").status_code == 404
    assert api.get(f"{JOBS}/{job_id}/artifacts").json()["data"] == []


def test_a_row_longer_than_the_context_is_refused_by_its_number(
    api: httpx.Client, jobs: dict[str, Json], rows: dict[str, list[Json]]
) -> None:
    long = {"question": "How long?", "answer": "It goes on and on. " * 200}
    short = {"question": "How short?", "answer": "Very."}
    body = {
        "model": "tofu260K",
        "method": {"type": "pdu"},
        "constraint": {"epsilon_relative": 0.1},
        **uploaded(api, rows | {"forget_set": [short, long]}),
    }
    reply = api.post(JOBS, json=body)
    [error] = reply.json()["errors"]
    assert (reply.status_code, error["code"], error["pointer"]) == (422, "row_too_long", "/forget_set")
    assert "512 tokens: rows 2" in error["detail"]


def test_forget01_is_forgotten_within_a_tenth_of_the_loss_on_760_rows(api: httpx.Client, full: list[Json]) -> None:
    body = {
        "model": "tofu260K",
        "method": {"type": "pdu"},
        "constraint": {"epsilon_relative": 0.10},
        "budget": {"max_steps": 180, "forget_target": 0.05},
        **uploaded(api, {"forget_set": full[3960:], "retain_set": full[:400] + full[3600:3960]}),
    }
    job = ended(api, created(api, body))
    gates = {gate["metric"]: gate["result"] for gate in job["verdict"]["gates"]}
    assert {gates[name] for name in PROMISED} == {"PASSED"}, job["verdict"]
    bound = report_of(api, job)["constraint"]
    assert bound["rows_measured"] == bound["rows_total"] == 760
    assert bound["after"] <= bound["epsilon"] == pytest.approx(1.1 * bound["before"])
