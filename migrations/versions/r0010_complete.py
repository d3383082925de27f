"""What an older start lacks: r0005, r0008 and r0009 were changed after some databases had been through them.

A database that went through the changed ones has all of this already.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

CLAIM_INDEX = (
    "CREATE INDEX jobs_claim_idx ON jobs (tenant_id, gpu_class, priority DESC, due_at, queued_at, id, "
    "COALESCE(min_vram_gib, 0), COALESCE(not_before, '-infinity')) WHERE status = 'queued'"
)


def upgrade() -> None:
    op.execute("ALTER TABLE tenants ADD COLUMN IF NOT EXISTS keep_forgotten_days bigint DEFAULT 0 NOT NULL")
    op.execute("ALTER TABLE tenants DROP CONSTRAINT IF EXISTS tenants_keep_forgotten_days_check")
    op.execute("ALTER TABLE tenants ADD CONSTRAINT tenants_keep_forgotten_days_check CHECK (keep_forgotten_days >= 0)")
    op.execute("ALTER TABLE deletion_requests ADD COLUMN IF NOT EXISTS unfit jsonb DEFAULT '{}' NOT NULL")
    op.execute("ALTER TABLE workers ADD COLUMN IF NOT EXISTS slots bigint DEFAULT 1 NOT NULL")
    op.execute("DROP INDEX IF EXISTS jobs_claim_idx")
    op.execute(CLAIM_INDEX)


def downgrade() -> None:
    """It is the schema that 0009 is meant to have."""
