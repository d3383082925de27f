"""The tables, a module per subject."""

from service.store.tables.base import Base, Json, Owned
from service.store.tables.evidence import AuditCheck, AuditEvent, Certificate, SigningKey
from service.store.tables.files import File
from service.store.tables.identity import ApiKey, IdempotencyKey, Tenant
from service.store.tables.jobs import Artifact, Job, JobCheck, JobCheckpoint, JobEvent, JobStep
from service.store.tables.operations import Counter, Worker
from service.store.tables.registry import Benchmark, Model
from service.store.tables.requests import DeletionApproval, DeletionJob, DeletionPlan, DeletionRequest
from service.store.tables.webhooks import WebhookAttempt, WebhookDelivery, WebhookEndpoint, WebhookMessage

HEAD = "0011"  # the revision of migrations/ that makes these tables; a test holds the two together

__all__ = [
    "HEAD",
    "ApiKey",
    "Artifact",
    "AuditCheck",
    "AuditEvent",
    "Base",
    "Benchmark",
    "Certificate",
    "Counter",
    "DeletionApproval",
    "DeletionJob",
    "DeletionPlan",
    "DeletionRequest",
    "File",
    "IdempotencyKey",
    "Job",
    "JobCheck",
    "JobCheckpoint",
    "JobEvent",
    "JobStep",
    "Json",
    "Model",
    "Owned",
    "SigningKey",
    "Tenant",
    "WebhookAttempt",
    "WebhookDelivery",
    "WebhookEndpoint",
    "WebhookMessage",
    "Worker",
]
