"""Every method that GET /v1/methods lists, asked for over HTTP, comes to a report; on a tiny model with random weights."""

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from service.domain import catalog
from service.domain.job import TERMINAL, VERDICT_RULES
from service.local import stack
from service.processes import free_port
from tests.worker.conftest import SHAPE, make_tokenizer

JOBS = "/v1/unlearning/jobs"
OWN = {"forget": {"type": "undial", "strength": 5.0}, "retain": {"type": "kl"}, "solver": {"type": "alternating"}}
OWN_COMPOSITION = {"forget_loss": "undial", "retain_loss": "kl", "solver": "alternating"}
REQUESTS: Mapping[str, dict[str, Any]] = {name: {} for name in sorted(catalog.load().methods)} | {
    "custom": {"method": {"type": "custom", "hyperparameters": OWN}},
    "idk_dpo": {"refusal_set": [{"text": "I cannot say."}, {"text": "Nobody told me."}]},
}
ROWS = [{"question": f"Who is {name}?", "answer": f"{name} is a poet."} for name in ("Ada", "Bo", "Cy", "Di", "Eve")]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def api() -> Iterator[httpx.Client]:
    with TemporaryDirectory(prefix="unlearn-test-") as name:
        folder = Path(name)
        torch.manual_seed(0)
        network: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))  # type: ignore[no-untyped-call]
        network.save_pretrained(folder / "models" / "tiny")
        make_tokenizer().save_pretrained(folder / "models" / "tiny")
        with stack(folder, api_port=free_port(), worker_slots=2, worker_threads=1) as running:
            subprocess.run(
                [sys.executable, "-m", "service.cli", "models", "add", "tiny", "--path", "tiny"],
                env=running.environment,
                check=True,
                capture_output=True,
                cwd=folder / "models",
            )
            with httpx.Client(base_url=running.url, timeout=30, headers=running.headers) as client:
                yield client


def ended(api: httpx.Client, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 280
    while True:
        job: dict[str, Any] = api.get(f"{JOBS}/{job_id}").raise_for_status().json()
        if job["status"] in TERMINAL:
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_request_with_every_method(api: httpx.Client) -> None:
    listed = {method["id"]: method for method in api.get("/v1/methods").raise_for_status().json()["data"]}
    created = {}
    for name, own in REQUESTS.items():
        body = {
            "model": "tiny",
            "method": {"type": name},
            "constraint": {"epsilon_relative": 1.0},
            "budget": {"max_steps": 3},
            "forget_set": ROWS[:2],
            "retain_set": ROWS[2:],
        }
        reply = api.post(JOBS, json=body | own)
        assert reply.status_code == 201, reply.text
        created[name] = reply.json()["id"]
    jobs = {name: ended(api, job_id) for name, job_id in created.items()}
    for name, job in jobs.items():
        assert job["status"] == "succeeded", (name, job["failure"])
        report = api.get(f"{JOBS}/{job['id']}/report", headers={"Accept": "application/json"}).json()
        assert report["trajectory"]["steps_total"] == 3
        assert report["asked"]["hyperparameters"].keys() == listed[name]["parameters"]["properties"].keys()
        composition = OWN_COMPOSITION if name == "custom" else listed[name]["composition"]
        assert report["asked"]["composition"] == composition
        assert "Before and after" in api.get(f"{JOBS}/{job['id']}/report", headers={"Accept": "text/html"}).text


@pytest.mark.slow
def test_a_released_adapter_is_reverified(api: httpx.Client) -> None:
    body = {
        "model": "tiny",
        "method": {"type": "pdu"},
        "constraint": {"epsilon_relative": 1.0},
        "budget": {"max_steps": 3},
        "forget_set": ROWS[:2],
        "retain_set": ROWS[2:],
    }
    first = ended(api, api.post(JOBS, json=body).raise_for_status().json()["id"])
    assert first["result"]["adapter"] is not None, first
    again = ended(api, api.post(f"{JOBS}/{first['id']}/reverify").raise_for_status().json()["id"])
    assert (again["status"], again["reverifies"], again["verdict"]["rules"]) == (
        "succeeded",
        first["id"],
        VERDICT_RULES,
    )
    assert again["epsilon"] == pytest.approx(first["epsilon"], abs=1e-6)
    values = [{gate["metric"]: gate["value"] for gate in job["verdict"]["gates"]} for job in (first, again)]
    assert values[1] == pytest.approx(values[0], abs=1e-6)
    report = api.get(f"{JOBS}/{again['id']}/report", headers={"Accept": "text/html"}).raise_for_status().text
    assert f"a reverification of job <code>{first['id']}</code>" in report
    deadline = time.monotonic() + 120  # the sweep issues its certificate
    while "job.reverified" not in (types := [event["type"] for event in events(api, first["id"])]):
        assert time.monotonic() < deadline, types
        time.sleep(1)
    certificates = [api.get(f"{JOBS}/{job['id']}/certificate").raise_for_status() for job in (first, again)]
    statements = [json.loads(base64.b64decode(one.json()["payload"])) for one in certificates]
    assert statements[1]["subject"] == statements[0]["subject"]
    assert statements[1]["predicate"]["reverifies"] == first["id"]


def events(api: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.get(f"{JOBS}/{job_id}/events").raise_for_status().json()["data"]
    return found


def test_methods_are_listed_with_their_parameters_and_papers(api: httpx.Client) -> None:
    listed = api.get("/v1/methods").raise_for_status().json()["data"]
    assert [method["id"] for method in listed] == sorted(REQUESTS)
    for method in listed:
        assert method["reference"], method["id"]
        for name, schema in method["parameters"]["properties"].items():
            assert "default" in schema, (method["id"], name)
            assert schema.get("description"), (method["id"], name)


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_wrong_parameters_are_named(api: httpx.Client, name: str) -> None:
    wrong = {"type": name, "hyperparameters": {"learning_rate": -1, "no_such": 1}}
    body = {
        "model": "tiny",
        "method": wrong,
        "constraint": {"epsilon": 1},
        "forget_set": ROWS[:1],
        "retain_set": ROWS[1:],
    }
    reply = api.post(JOBS, json=body)
    assert reply.status_code == 422
    pointers = {error["pointer"] for error in reply.json()["errors"]}
    assert pointers == {"/method/hyperparameters/learning_rate", "/method/hyperparameters/no_such"}
