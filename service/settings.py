"""Where we run: every knob, from the environment (empty: not set), its unit in its name. What is asked is in the job's spec."""

import os
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

IN_FILES = ("database_url", "broker_url", "master_key")


class Files(PydanticBaseSettingsSource):
    """What has a secret in it may be the content of a file: MASTER_KEY_FILE=/run/secrets/master_key."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[str | None, str, bool]:
        path = os.environ.get(f"{field_name.upper()}_FILE") if field_name in IN_FILES else None
        try:
            return Path(path).read_text(encoding="utf-8").strip() if path else None, field_name, False
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise SettingsError(f"{field_name.upper()}_FILE: {path} cannot be read: {why}") from error

    def __call__(self) -> dict[str, str]:
        found = {name: self.get_field_value(FieldInfo(), name)[0] for name in IN_FILES}
        return {name: value for name, value in found.items() if value is not None}


class Settings(BaseSettings):
    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is given in the code, the environment, then files."""
        return init_settings, env_settings, Files(settings_cls)

    database_url: str = Field(
        default="postgresql+psycopg://unlearn@localhost/unlearn", description="SQLAlchemy URL of Postgres"
    )
    broker_url: str = Field(
        default="redis://localhost:6379/0", description="Redis or Valkey; carries bells, nothing else"
    )
    storage_url: str = Field(
        default="./.unlearn/storage", description="root of files and artifacts: a folder, or s3://bucket/prefix"
    )
    models_root: Path = Field(default=Path("./.unlearn/models"), description="folder below which registered models lie")
    master_key: SecretStr | None = Field(
        default=None, description="32 bytes in base64; what is stored is encrypted with keys derived from it"
    )
    log_level: str = "INFO"

    # API
    api_host: str = "127.0.0.1"
    api_port: int = 8000
    trusted_proxies: str = Field(default="", description="addresses whose X-Forwarded-For is believed, with commas")
    request_head_s: float = Field(default=10.0, gt=0, description="for a request's head to arrive; then 408")
    request_idle_s: float = Field(
        default=30.0, gt=0, description="without a byte of a request's body, or of an answer that a client reads"
    )
    upload_max_bytes: int = Field(default=256 * 2**20, gt=0)
    body_max_bytes: int = Field(default=8 * 2**20, gt=0, description="of a JSON request body")
    rate_limit_per_minute: int = Field(default=600, ge=0, description="requests of a principal; 0: no limit")
    rate_limit_jobs_per_hour: int = Field(default=200, ge=0, description="created by a principal; 0: no limit")
    rate_limit_failures_per_minute: int = Field(
        default=120, ge=0, description="of an address that nobody is known by; 0: no limit"
    )
    events_streams_per_principal: int = Field(default=8, ge=0, description="open at once, per API process; 0: no limit")
    metrics_public: bool = Field(default=False, description="/metrics without credentials, for a private network")
    metrics_cache_s: float = Field(default=5.0, ge=0)
    hub_datasets: bool = Field(default=False, description="fetch the sets of a benchmark from the Hub, if asked to")
    hub_endpoint: str = Field(
        default="https://huggingface.co", description="the Hub, or a mirror that speaks as it does"
    )

    # people: tokens of an identity provider (OpenID Connect), beside API keys
    oidc_issuer: str | None = Field(default=None, description="as `iss` has it; null: no tokens, keys alone")
    oidc_audience: str = "unlearning-service"
    oidc_jwks_url: str | None = Field(default=None, description="where the issuer publishes its keys")
    oidc_tenant_claim: str = "tenant"
    oidc_roles_claim: str = Field(default="roles", description="a list with names of roles (see README)")
    oidc_key_max_s: float = Field(
        default=86400.0, ge=0, description="longest life of an API key that a token makes; 0: tokens make none"
    )

    # queue: one bell queue per class. A job of class "any" may run anywhere; a worker hears its own classes and "any".
    gpu_classes: list[str] = ["any", "cpu"]

    # job machine
    lease_s: float = Field(default=60.0, gt=0)
    heartbeat_s: float = Field(default=15.0, gt=0)
    infra_losses_max: int = Field(
        default=10, ge=0, description="lost workers and killed runners of a job, before it fails"
    )
    sweep_interval_s: float = Field(default=5.0, gt=0)
    ring_again_s: float = Field(
        default=15.0, gt=0, description="a queue with due jobs is rung again after this silence"
    )

    sweep_metrics_port: int = Field(default=9101, description="0: any free port")
    sweep_metrics_host: str = "127.0.0.1"

    # webhooks
    webhook_threads: int = Field(default=4, ge=1, description="calls of endpoints at once, per sweep")
    webhook_timeout_s: float = Field(default=15.0, gt=0)
    webhook_allow_http: bool = Field(default=False, description="endpoints without TLS, beside those with it")
    webhook_networks: list[IPv4Network | IPv6Network] = Field(
        default=[], description="networks of your own that endpoints may lie in; all others must be public"
    )

    # worker
    worker_gpu_classes: list[str] = ["cpu"]
    worker_slots: int = Field(default=1, ge=1, description="jobs at once; more than accelerators share them")
    worker_vram_gib: float = Field(default=0.0, ge=0)
    worker_poll_s: float = Field(
        default=30.0, gt=0, description="look for due jobs without a bell, should the broker be deaf"
    )
    worker_metrics_port: int = Field(default=9100, description="0: any free port")
    worker_metrics_host: str = "127.0.0.1"
    worker_scratch_dir: Path = Field(
        default=Path("./.unlearn/scratch"), description="assignments and adapters in the making"
    )
    worker_device: str = Field(default="auto", description="auto, cpu or cuda; slots take turns at the accelerators")
    worker_threads: int | None = Field(
        default=None, ge=1, description="torch threads of a runner; null: torch's own choice"
    )
    worker_dtype: str = Field(
        default="auto", description="auto (bfloat16 on an accelerator, else float32), float32, bfloat16"
    )
    checkpoint_every_s: float = Field(default=300.0, gt=0, description="about what a lost worker costs, of solving")
    checkpoint_every_steps: int | None = Field(default=None, ge=1, description="or after so many; null: by the clock")
    drain_grace_s: float = Field(
        default=60.0, gt=0, description="for a checkpoint, when a job is paused or its worker stops; then SIGTERM"
    )
    cancel_grace_s: float = Field(default=20.0, gt=0, description="cooperative stop, then SIGTERM")
    term_grace_s: float = Field(default=5.0, gt=0, description="SIGTERM, then SIGKILL")
    gauge_linger_s: float = Field(
        default=60.0, ge=0, description="a finished job's gauges stay this long, to be scraped"
    )
