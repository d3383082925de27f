"""What the role of the service and the workers may do in the database: work with rows, and take nothing back that is evidence.

Who owns a table can drop its triggers. So the role that migrates owns the tables, and whatever listens to a network or runs jobs
connects as another, which can neither alter a table nor change or delete what is appended only. Nor can it delete a row that
such an entry belongs to: what goes along by a cascade goes with the owner's rights.
"""

from sqlalchemy import Connection, text

APPEND_ONLY = ("audit_events", "certificates", "deletion_approvals", "job_events")
READ_ONLY = ("alembic_version",)
DELETED_FROM = (  # by the service itself; of all else it deletes nothing
    "benchmarks",
    "deletion_plans",
    "idempotency_keys",
    "job_checkpoints",
    "models",
    "webhook_endpoints",  # and with it what was sent there
    "webhook_messages",
    "workers",
)
ORDINARY = "SELECT, INSERT, UPDATE"


def grant(connection: Connection, role: str) -> None:
    """As the owner of the tables, after a migration. What was granted before and is not here is revoked.

    Raises RuntimeError where the role is not there, or where nothing can be kept from it.
    """
    of_role = text("SELECT pg_has_role(oid, current_user, 'MEMBER') FROM pg_roles WHERE rolname = :role")
    owns = connection.scalar(of_role, {"role": role})
    if owns is None:
        raise RuntimeError(f"there is no role {role}: CREATE ROLE {role} LOGIN PASSWORD '...', and migrate again")
    if owns:
        raise RuntimeError(f"role {role} owns the tables, or may do what their owner may: grant to another")
    to = connection.dialect.identifier_preparer.quote_identifier(role)
    for statement in (
        f"REVOKE CREATE ON SCHEMA public FROM PUBLIC, {to}",  # PUBLIC has it before Postgres 15
        f"GRANT USAGE ON SCHEMA public TO {to}",
        f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {to}",
        f"GRANT {ORDINARY} ON ALL TABLES IN SCHEMA public TO {to}",
        f"GRANT DELETE ON {', '.join(DELETED_FROM)} TO {to}",
        f"REVOKE UPDATE ON {', '.join(APPEND_ONLY)} FROM {to}",
        f"REVOKE INSERT, UPDATE ON {', '.join(READ_ONLY)} FROM {to}",
        f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {to}",
        # A later migration that is told of no role leaves the service able to work
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT {ORDINARY}, DELETE ON TABLES TO {to}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT USAGE ON SEQUENCES TO {to}",
    ):
        connection.exec_driver_sql(statement)
