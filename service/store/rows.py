"""What the worker hands to the store, and gets from it: plain rows."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Event(NamedTuple):
    type: str
    message: str
    data: Mapping[str, Any] = {}
    level: str = "info"  # warn, error


class StepRow(NamedTuple):
    step: int
    losses: Mapping[str, float]
    dual: Mapping[str, float]
    violation: Mapping[str, float]
    learning_rate: float
    gradient_norm: float
    tokens: int  # trained so far
    tokens_per_second: float
    elapsed_seconds: float
    extra: Mapping[str, float] = {}


class CheckRow(NamedTuple):
    step: int
    forget_objective: float
    forget_probability: float
    retain_loss: float
    retain_upper: float
    epsilon: float
    feasible: bool
    best: bool
    rows: int
    seconds: float


class ConstraintRow(NamedTuple):
    epsilon: float  # absolute, nats per token
    base_retain_loss: float


class ArtifactRow(NamedTuple):
    name: str
    key: str
    media_type: str
    bytes: int
    sha256: str


class CheckpointRow(NamedTuple):
    step: int
    key: str
    bytes: int
    sha256: str


class WarningRow(NamedTuple):
    code: str
    message: str


class Claim(NamedTuple):
    job_id: str
    tenant_id: str
    fence: int
    attempt: int
    spec: Mapping[str, Any]  # as stored: another version of this code may have written it


class Beat(NamedTuple):
    """What the runner is asked for."""

    cancel: bool = False
    pause: bool = False
