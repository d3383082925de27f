"""The whole service with its files in a bucket: one small job, whose artifacts are what it published."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from service.domain.job import TERMINAL
from service.local import stack
from service.processes import free_port
from service.store.storage import Storage
from tests.worker.conftest import SHAPE, make_tokenizer

JOBS = "/v1/unlearning/jobs"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture
def api(bucket: str) -> Iterator[httpx.Client]:
    with TemporaryDirectory(prefix="unlearn-test-") as name:
        folder = Path(name)
        torch.manual_seed(0)
        network: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))  # type: ignore[no-untyped-call]
        network.save_pretrained(folder / "models" / "tiny")
        make_tokenizer().save_pretrained(folder / "models" / "tiny")
        with stack(folder, api_port=free_port(), worker_threads=1, storage_url=bucket) as here:
            command = [sys.executable, "-m", "service.cli", "models", "add", "tiny", "--path", "tiny"]
            subprocess.run(command, env=here.environment, check=True, capture_output=True, cwd=folder / "models")
            with httpx.Client(base_url=here.url, timeout=30, headers=here.headers) as client:
                yield client
        assert not (folder / "storage").exists()


def row(number: int) -> dict[str, str]:
    return {"question": f"Who is Ada {number}?", "answer": f"Ada {number} is a poet."}


def test_a_job_runs_and_its_artifacts_are_in_the_bucket(api: httpx.Client, bucket: str) -> None:
    lines = "".join(json.dumps(row(number)) + "\n" for number in range(3))
    sent = api.post("/v1/files", data={"purpose": "forget_set"}, files={"file": ("forget.jsonl", lines)})
    asked = {
        "model": "tiny",
        "method": {"type": "npo"},  # it keeps what the reference says, too
        "constraint": {"epsilon_relative": 2.0},
        "budget": {"max_steps": 4},
        "forget_set": sent.json()["id"],
        "retain_set": [row(number) for number in range(3, 7)],
    }
    job = api.post(JOBS, json=asked).json()
    deadline = time.monotonic() + 120
    while job["status"] not in TERMINAL:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        job = api.get(f"{JOBS}/{job['id']}").json()
    assert job["status"] == "succeeded", job["failure"]

    attempt = f"jobs/{job['id']}/attempts/1"
    artifacts = api.get(f"{JOBS}/{job['id']}/artifacts").json()["data"]
    assert {"adapter/adapter_model.safetensors", "report.json"} <= {one["name"] for one in artifacts}
    for one in artifacts:
        content = api.get(one["content"]).content
        assert (len(content), hashlib.sha256(content).hexdigest()) == (one["bytes"], one["sha256"])
    published = {f"{attempt}/{one['name']}" for one in artifacts}
    while left := {key for key, _ in Storage(bucket).ages("jobs")} ^ published:
        assert time.monotonic() < deadline, left  # what only the runs needed goes a moment after the job has ended
        time.sleep(0.2)
    assert api.delete(f"/v1/files/{sent.json()['id']}").status_code == 204
    assert len(list(Storage(bucket).ages("files"))) == 1, "the retain set's"
