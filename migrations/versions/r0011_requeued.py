"""Deletion requests can be requeued, are warned of rows that plans retain, and can have these left out."""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None
oldest_code = "0010"  # the version before does without the columns


def upgrade() -> None:
    op.execute("ALTER TABLE deletion_jobs ADD COLUMN requeued_at timestamptz")
    op.execute("ALTER TABLE deletion_requests ADD COLUMN warnings jsonb DEFAULT '[]' NOT NULL")
    op.execute("ALTER TABLE deletion_requests ADD COLUMN leave_out_retained boolean DEFAULT false NOT NULL")


def downgrade() -> None:
    op.execute("ALTER TABLE deletion_requests DROP COLUMN leave_out_retained")
    op.execute("ALTER TABLE deletion_requests DROP COLUMN warnings")
    op.execute("ALTER TABLE deletion_jobs DROP COLUMN requeued_at")
