"""Deletion requests, their approvals, the jobs that serve them, and the plans by which jobs are made."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

TIME = sa.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.create_table(
        "deletion_requests",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("external_reference", sa.Text(), nullable=True),
        sa.Column("regulation", sa.Text(), nullable=False),
        sa.Column("received_at", TIME, nullable=False),
        sa.Column("due_at", TIME, nullable=False),
        sa.Column("approvals_required", sa.BigInteger(), nullable=False),
        sa.Column("approved_at", TIME, nullable=True),
        sa.Column("overdue_at", TIME, nullable=True),
        sa.Column("extension", JSONB(), nullable=True),
        sa.Column("models", JSONB(), nullable=False),
        sa.Column("forget_set", sa.Text(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("row_digests", JSONB(), nullable=False),
        sa.Column("subject_digests", JSONB(), nullable=False),
        sa.Column("denial", JSONB(), nullable=True),
        sa.Column("closing", JSONB(), nullable=True),
        sa.Column("unfit", JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("status_reason", sa.Text(), nullable=True),
        sa.Column("metadata", JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("finished_at", TIME, nullable=True),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.CheckConstraint("regulation IN ('ccpa', 'gdpr', 'other')", name=op.f("deletion_requests_regulation_check")),
        sa.CheckConstraint(
            "status IN ('approved', 'cancelled', 'completed', 'denied', 'failed', 'in_progress', 'pending_approval', 'received')",
            name=op.f("deletion_requests_status_check"),
        ),
        sa.ForeignKeyConstraint(["forget_set"], ["files.id"], name="deletion_requests_forget_set_fkey"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="deletion_requests_tenant_id_fkey"),
        sa.PrimaryKeyConstraint("id", name="deletion_requests_pkey"),
        sa.UniqueConstraint("id", "created_by", name="deletion_requests_id_created_by_key"),
    )
    op.create_index(
        "deletion_requests_subject_digests_idx",
        "deletion_requests",
        ["subject_digests"],
        unique=False,
        postgresql_using="gin",
    )
    op.create_index("deletion_requests_tenant_id_id_idx", "deletion_requests", ["tenant_id", "id"], unique=False)
    op.create_index(
        "deletion_requests_tenant_id_status_due_at_idx",
        "deletion_requests",
        ["tenant_id", "status", "due_at"],
        unique=False,
    )
    op.create_table(
        "deletion_approvals",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("approved_by", sa.Text(), nullable=False),
        sa.Column("submitted_by", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("approved_by <> submitted_by", name=op.f("deletion_approvals_four_eyes_check")),
        sa.ForeignKeyConstraint(
            ["request_id", "submitted_by"],
            ["deletion_requests.id", "deletion_requests.created_by"],
            name="deletion_approvals_request_id_fkey",
        ),
        sa.PrimaryKeyConstraint("request_id", "approved_by", name="deletion_approvals_pkey"),
    )
    op.create_table(
        "deletion_jobs",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("row_numbers", JSONB(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="deletion_jobs_job_id_fkey"),
        sa.ForeignKeyConstraint(["request_id"], ["deletion_requests.id"], name="deletion_jobs_request_id_fkey"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="deletion_jobs_tenant_id_fkey"),
        sa.PrimaryKeyConstraint("request_id", "job_id", name="deletion_jobs_pkey"),
    )
    op.create_index("deletion_jobs_job_id_idx", "deletion_jobs", ["job_id"], unique=False)
    op.create_table(
        "deletion_plans",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("job", JSONB(), nullable=False),
        sa.Column("window_seconds", sa.BigInteger(), nullable=False),
        sa.Column("requests_max", sa.BigInteger(), nullable=False),
        sa.Column("status_reason", sa.Text(), nullable=True),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("updated_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name="deletion_plans_model_fkey"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="deletion_plans_tenant_id_fkey"),
        sa.PrimaryKeyConstraint("tenant_id", "model", name="deletion_plans_pkey"),
    )


def downgrade() -> None:
    for table in ("deletion_plans", "deletion_jobs", "deletion_approvals", "deletion_requests"):
        op.drop_table(table)
