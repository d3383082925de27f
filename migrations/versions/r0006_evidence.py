"""The audit log, which nothing changes once it is written; signing keys and certificates."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TIME = sa.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.create_table(
        "audit_events",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("object_type", sa.Text(), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("data", JSONB(), nullable=False),
        sa.Column("prev_hash", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="audit_events_tenant_id_fkey"),
        sa.PrimaryKeyConstraint("tenant_id", "seq", name="audit_events_pkey"),
        sa.UniqueConstraint("id", name="audit_events_id_key"),
    )
    op.create_index(
        "audit_events_tenant_id_object_id_seq_idx", "audit_events", ["tenant_id", "object_id", "seq"], unique=False
    )
    op.create_table(
        "audit_checks",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("checked_at", TIME, nullable=False),
        sa.Column("whole_at", TIME, nullable=False),
        sa.Column("fault", JSONB(), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="audit_checks_tenant_id_fkey"),
        sa.PrimaryKeyConstraint("tenant_id", name="audit_checks_pkey"),
    )
    op.create_table(
        "signing_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("public_jwk", JSONB(), nullable=False),
        sa.Column("sealed_private", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("retired_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="signing_keys_pkey"),
    )
    op.create_index(
        "signing_keys_active_idx",
        "signing_keys",
        [sa.literal_column("(true)")],
        unique=True,
        postgresql_where=sa.text("retired_at IS NULL"),
    )
    op.create_table(
        "certificates",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("envelope", sa.Text(), nullable=True),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("audit_seq", sa.BigInteger(), nullable=True),
        sa.Column("refusal", sa.Text(), nullable=True),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="certificates_job_id_fkey"),
        sa.ForeignKeyConstraint(["key_id"], ["signing_keys.id"], name="certificates_key_id_fkey"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="certificates_tenant_id_fkey"),
        sa.PrimaryKeyConstraint("id", name="certificates_pkey"),
        sa.UniqueConstraint("job_id", name="certificates_job_id_key"),
        sa.CheckConstraint(
            "num_nulls(envelope, key_id, audit_seq) = CASE WHEN refusal IS NULL THEN 0 ELSE 3 END",
            name=op.f("certificates_decided_check"),
        ),
    )
    op.execute(
        """
        CREATE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'audit_events is append-only: % is refused', TG_OP; END $$
        """
    )
    op.execute(
        """
        CREATE TRIGGER audit_events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events
        FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()
        """
    )


def downgrade() -> None:
    for table in ("certificates", "signing_keys", "audit_checks", "audit_events"):
        op.drop_table(table)
    op.execute("DROP FUNCTION audit_is_append_only")
