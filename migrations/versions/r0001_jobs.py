"""Jobs with their events, steps and checks; files, artifacts, models, counters."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.create_table(
        "counters",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("labels", JSONB(), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", "labels", name="counters_pkey"),
    )
    op.create_table(
        "files",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("purpose IN ('eval_set', 'forget_set', 'retain_set')", name=op.f("files_purpose_check")),
        sa.PrimaryKeyConstraint("id", name="files_pkey"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("status_reason", sa.Text(), nullable=True),
        sa.Column("stage", sa.Text(), nullable=True),
        sa.Column("stage_history", JSONB(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("version", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("spec", JSONB(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("forget_set", sa.Text(), nullable=False),
        sa.Column("retain_set", sa.Text(), nullable=False),
        sa.Column("priority", sa.BigInteger(), nullable=False),
        sa.Column("due_at", TIME, nullable=True),
        sa.Column("gpu_class", sa.Text(), nullable=False),
        sa.Column("min_vram_gib", sa.DOUBLE_PRECISION(), nullable=True),
        sa.Column("external_id", sa.Text(), nullable=True),
        sa.Column("metadata", JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("queued_at", TIME, nullable=True),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("finished_at", TIME, nullable=True),
        sa.Column("cancel_requested_at", TIME, nullable=True),
        sa.Column("pause_requested_at", TIME, nullable=True),
        sa.Column("attempt", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("content_failures", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("infra_losses", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("fence", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("lease_until", TIME, nullable=True),
        sa.Column("beat_at", TIME, nullable=True),
        sa.Column("rung_at", TIME, nullable=True),
        sa.Column("step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("steps_total", sa.BigInteger(), nullable=True),
        sa.Column("trained_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("epsilon", sa.DOUBLE_PRECISION(), nullable=True),
        sa.Column("base_retain_loss", sa.DOUBLE_PRECISION(), nullable=True),
        sa.Column("verdict", JSONB(), nullable=True),
        sa.Column("failure", JSONB(), nullable=True),
        sa.Column("warnings", JSONB(), server_default=sa.text("'[]'"), nullable=False),
        sa.CheckConstraint("(status = 'failed') = (failure IS NOT NULL)", name=op.f("jobs_failure_check")),
        sa.CheckConstraint(
            "(status IN ('cancelled', 'failed', 'succeeded')) = (finished_at IS NOT NULL)",
            name=op.f("jobs_finished_check"),
        ),
        sa.CheckConstraint(
            "(status IN ('cancelling', 'pausing', 'running')) = (lease_until IS NOT NULL)",
            name=op.f("jobs_lease_check"),
        ),
        sa.CheckConstraint(
            "stage IS NULL OR stage IN ('evaluating', 'loading_model', 'packaging', 'preparing', "
            "'signing', 'unlearning', 'uploading')",
            name=op.f("jobs_stage_check"),
        ),
        sa.CheckConstraint(
            "status IN ('cancelled', 'cancelling', 'failed', 'paused', 'pausing', "
            "'pending_approval', 'queued', 'running', 'succeeded')",
            name=op.f("jobs_status_check"),
        ),
        sa.PrimaryKeyConstraint("id", name="jobs_pkey"),
    )
    op.create_index(
        "jobs_claim_idx",
        "jobs",
        [sa.text("priority DESC"), "due_at", "queued_at", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'queued'"),
    )
    op.create_index(
        "jobs_lease_idx",
        "jobs",
        ["lease_until"],
        unique=False,
        postgresql_where=sa.text("status IN ('cancelling', 'pausing', 'running')"),
    )
    op.create_index("jobs_model_id_idx", "jobs", ["model", "id"], unique=False)
    op.create_index("jobs_status_gpu_class_idx", "jobs", ["status", "gpu_class"], unique=False)
    op.create_index("jobs_status_id_idx", "jobs", ["status", "id"], unique=False)
    op.create_table(
        "models",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=True),
        sa.Column("digest", sa.Text(), nullable=True),
        sa.Column("tokenizer_digest", sa.Text(), nullable=True),
        sa.Column("prompt_format", JSONB(), nullable=False),
        sa.Column("gpu_class", sa.Text(), nullable=False),
        sa.Column("info", JSONB(), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("source IN ('hub', 'path')", name=op.f("models_source_check")),
        sa.PrimaryKeyConstraint("name", name="models_pkey"),
    )
    op.create_table(
        "artifacts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("media_type", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="artifacts_job_id_fkey", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="artifacts_pkey"),
    )
    op.create_index("artifacts_job_id_name_idx", "artifacts", ["job_id", "name"], unique=True)
    op.create_table(
        "job_checks",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("fence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("forget_objective", sa.DOUBLE_PRECISION(), nullable=True),
        sa.Column("forget_probability", sa.DOUBLE_PRECISION(), nullable=True),
        sa.Column("retain_loss", sa.DOUBLE_PRECISION(), nullable=True),
        sa.Column("retain_upper", sa.DOUBLE_PRECISION(), nullable=True),
        sa.Column("epsilon", sa.DOUBLE_PRECISION(), nullable=True),
        sa.Column("feasible", sa.Boolean(), nullable=False),
        sa.Column("best", sa.Boolean(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.DOUBLE_PRECISION(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="job_checks_job_id_fkey", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "fence", "step", name="job_checks_pkey"),
    )
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("level", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", JSONB(), nullable=False),
        sa.CheckConstraint("level IN ('error', 'info', 'warn')", name=op.f("job_events_level_check")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="job_events_job_id_fkey", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "seq", name="job_events_pkey"),
        sa.UniqueConstraint("id", name="job_events_id_key"),
    )
    op.create_table(
        "job_steps",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("fence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("losses", JSONB(), nullable=False),
        sa.Column("dual", JSONB(), nullable=False),
        sa.Column("violation", JSONB(), nullable=False),
        sa.Column("learning_rate", sa.DOUBLE_PRECISION(), nullable=True),
        sa.Column("gradient_norm", sa.DOUBLE_PRECISION(), nullable=True),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("tokens_per_second", sa.DOUBLE_PRECISION(), nullable=True),
        sa.Column("elapsed_seconds", sa.DOUBLE_PRECISION(), nullable=False),
        sa.Column("extra", JSONB(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="job_steps_job_id_fkey", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "fence", "step", name="job_steps_pkey"),
    )


def downgrade() -> None:
    op.drop_table("job_steps")
    op.drop_table("job_events")
    op.drop_table("job_checks")
    op.drop_table("artifacts")
    op.drop_table("models")
    op.drop_table("jobs")
    op.drop_table("files")
    op.drop_table("counters")
