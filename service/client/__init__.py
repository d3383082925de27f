"""The service from Python, over HTTP.

    with Client("https://unlearn.example", key) as api:
        job = api.submit(model="m", forget_set=Path("forget.jsonl"), retain_set=Path("retain.jsonl"), epsilon_relative=0.1)
        for job, steps in api.watch(job.id):
            print(job.status, job.stage, steps[-1:])
        api.evidence(job.id, Path("evidence"))

Nothing of the service itself is imported: no database, no web framework, no torch.
"""

from service.client.api import Client, Evidence, Steps
from service.client.benchmarks import HubSet
from service.client.shapes import (
    Artifact,
    Attempt,
    AuditEvent,
    AuditHead,
    BatchItem,
    Benchmark,
    Checkpoint,
    DeletionRequest,
    Delivery,
    Endpoint,
    Event,
    File,
    Job,
    Key,
    Method,
    Model,
    Plan,
    Step,
    Suite,
    Worker,
)
from service.client.wire import ApiError

__all__ = [
    "ApiError",
    "Artifact",
    "Attempt",
    "AuditEvent",
    "AuditHead",
    "BatchItem",
    "Benchmark",
    "Checkpoint",
    "Client",
    "DeletionRequest",
    "Delivery",
    "Endpoint",
    "Event",
    "Evidence",
    "File",
    "HubSet",
    "Job",
    "Key",
    "Method",
    "Model",
    "Plan",
    "Step",
    "Steps",
    "Suite",
    "Worker",
]
