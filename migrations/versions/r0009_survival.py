"""Jobs have checkpoints to go on from, and a size of micro-batch that their memory had room for; tenants have quotas.

Workers say how many jobs they run at once.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

QUOTAS = ("max_running_jobs", "max_open_jobs")


def upgrade() -> None:
    op.create_table(
        "job_checkpoints",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "fence", "step", name="job_checkpoints_pkey"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="job_checkpoints_job_id_fkey", ondelete="CASCADE"),
    )
    op.add_column("jobs", sa.Column("micro_batch_tokens", sa.BigInteger(), nullable=True))
    for quota in QUOTAS:
        op.add_column("tenants", sa.Column(quota, sa.BigInteger(), nullable=True))
        op.create_check_constraint(op.f(f"tenants_{quota}_check"), "tenants", f"{quota} > 0")
    op.add_column("workers", sa.Column("slots", sa.BigInteger(), server_default=sa.text("1"), nullable=False))
    op.drop_index("jobs_claim_idx", "jobs")
    line = [sa.text("priority DESC"), "due_at", "queued_at", "id"]
    passed_over = [sa.text("COALESCE(min_vram_gib, 0)"), sa.text("COALESCE(not_before, '-infinity')")]
    _claim_index(["tenant_id", "gpu_class", *line, *passed_over])


def _claim_index(columns: list[Any]) -> None:
    op.create_index("jobs_claim_idx", "jobs", columns, postgresql_where=sa.text("status = 'queued'"))


def downgrade() -> None:
    op.drop_index("jobs_claim_idx", "jobs")
    _claim_index([sa.text("priority DESC"), "due_at", "queued_at", "id"])
    op.drop_column("workers", "slots")
    for quota in QUOTAS:
        op.drop_column("tenants", quota)
    op.drop_column("jobs", "micro_batch_tokens")
    op.drop_table("job_checkpoints")
