"""Benchmarks are registered, and a job may name some, with a holdout set, an audit and gates."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

CHECK = "files_purpose_check"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("holdout_set", sa.Text(), nullable=True))
    op.create_table(
        "benchmarks",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("suite", sa.Text(), nullable=False),
        sa.Column("corpus", sa.Text(), nullable=False),
        sa.Column("sets", JSONB(), nullable=False),
        sa.Column("retrained_model", sa.Text(), nullable=True),
        sa.Column("retrained_scores", sa.Text(), nullable=True),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("name", name="benchmarks_pkey"),
    )
    op.drop_constraint(op.f(CHECK), "files", type_="check")
    op.create_check_constraint(
        op.f(CHECK),
        "files",
        "purpose IN ('eval_scores', 'eval_set', 'forget_set', 'holdout_set', 'refusal_set', 'retain_set')",
    )


def downgrade() -> None:
    op.drop_constraint(op.f(CHECK), "files", type_="check")
    op.execute("UPDATE files SET purpose = 'eval_set' WHERE purpose IN ('eval_scores', 'holdout_set')")
    op.create_check_constraint(
        op.f(CHECK), "files", "purpose IN ('eval_set', 'forget_set', 'refusal_set', 'retain_set')"
    )
    # fields that the version before does not know
    op.execute("UPDATE jobs SET spec = spec - '{holdout_set,benchmarks,audit,gates}'::text[]")
    op.drop_table("benchmarks")
    op.drop_column("jobs", "holdout_set")
