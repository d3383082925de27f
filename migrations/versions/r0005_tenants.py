"""Tenants own jobs, files and benchmarks; API keys; what was answered to repeated requests; files are encrypted."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TIME = sa.TIMESTAMP(timezone=True)

CHANGED = ("jobs", "files", "benchmarks")  # rows of before are the default tenant's


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("approvals", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("keep_files_days", sa.BigInteger(), nullable=True),
        sa.Column("keep_forgotten_days", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint("approvals BETWEEN 0 AND 2", name=op.f("tenants_approvals_check")),
        sa.CheckConstraint("keep_files_days >= 0", name=op.f("tenants_keep_files_days_check")),
        sa.CheckConstraint("keep_forgotten_days >= 0", name=op.f("tenants_keep_forgotten_days_check")),
        sa.PrimaryKeyConstraint("id", name="tenants_pkey"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("scopes", JSONB(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", TIME, nullable=True),
        sa.Column("revoked_at", TIME, nullable=True),
        sa.Column("last_used_at", TIME, nullable=True),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="api_keys_tenant_id_fkey"),
        sa.PrimaryKeyConstraint("id", name="api_keys_pkey"),
        sa.UniqueConstraint("prefix", name="api_keys_prefix_key"),
    )
    op.create_index("api_keys_tenant_id_id_idx", "api_keys", ["tenant_id", "id"], unique=False)
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("headers", JSONB(), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="idempotency_keys_tenant_id_fkey"),
        sa.PrimaryKeyConstraint("tenant_id", "principal", "route", "key", name="idempotency_keys_pkey"),
    )
    op.create_index("idempotency_keys_created_at_idx", "idempotency_keys", ["created_at"], unique=False)
    op.execute("INSERT INTO tenants (id) VALUES ('default')")
    for table in CHANGED:
        op.add_column(table, sa.Column("tenant_id", sa.Text(), server_default="default", nullable=False))
        op.alter_column(table, "tenant_id", server_default=None)
        op.create_foreign_key(f"{table}_tenant_id_fkey", table, "tenants", ["tenant_id"], ["id"])
    for table in ("jobs", "files"):
        op.add_column(table, sa.Column("created_by", sa.Text(), server_default="system", nullable=False))
        op.alter_column(table, "created_by", server_default=None)
        op.create_index(f"{table}_tenant_id_id_idx", table, ["tenant_id", "id"])

    op.drop_constraint("benchmarks_pkey", "benchmarks")
    op.create_primary_key("benchmarks_pkey", "benchmarks", ["tenant_id", "name"])

    for column in ("status", "model"):
        op.drop_index(f"jobs_{column}_id_idx", table_name="jobs")
        op.create_index(f"jobs_tenant_id_{column}_id_idx", "jobs", ["tenant_id", column, "id"])

    # Files of before lie there as they were uploaded. Their rows say that they are purged, and the sweep deletes the bytes.
    op.add_column("files", sa.Column("digest", sa.Text(), server_default="", nullable=False))
    op.alter_column("files", "digest", server_default=None)
    op.add_column("files", sa.Column("sealed", sa.Text(), nullable=True))
    op.add_column("files", sa.Column("purge_at", TIME, nullable=True))
    op.add_column("files", sa.Column("purged_at", TIME, nullable=True))
    op.execute("UPDATE files SET purged_at = now()")
    for column in ("sha256", "name"):
        op.drop_column("files", column)
    op.create_check_constraint(op.f("files_purged_check"), "files", "(purged_at IS NULL) = (sealed IS NOT NULL)")
    due = sa.text("purged_at IS NULL AND purge_at IS NOT NULL")
    op.create_index("files_purge_at_idx", "files", ["purge_at"], postgresql_where=due)


def downgrade() -> None:
    """What another tenant owns, nobody could keep from the others any more: it goes. Files are encrypted: all go."""
    op.execute("DELETE FROM jobs WHERE tenant_id <> 'default'")
    op.execute("DELETE FROM benchmarks WHERE tenant_id <> 'default'")
    op.execute("DELETE FROM files")
    op.execute(
        "UPDATE jobs SET spec = spec - '{parent,deletion_requests}'::text[]"
    )  # fields that the version before does not know
    op.drop_index("files_purge_at_idx", table_name="files")
    op.drop_constraint(op.f("files_purged_check"), "files", type_="check")
    for column in ("sha256", "name"):
        op.add_column("files", sa.Column(column, sa.Text(), nullable=False))
    for column in ("purged_at", "purge_at", "sealed", "digest"):
        op.drop_column("files", column)
    for column in ("status", "model"):
        op.drop_index(f"jobs_tenant_id_{column}_id_idx", table_name="jobs")
        op.create_index(f"jobs_{column}_id_idx", "jobs", [column, "id"])
    op.drop_constraint("benchmarks_pkey", "benchmarks")
    op.create_primary_key("benchmarks_pkey", "benchmarks", ["name"])
    for table in ("jobs", "files"):
        op.drop_index(f"{table}_tenant_id_id_idx", table_name=table)
        op.drop_column(table, "created_by")
    for table in CHANGED:
        op.drop_column(table, "tenant_id")
    for table in ("idempotency_keys", "api_keys", "tenants"):
        op.drop_table(table)
