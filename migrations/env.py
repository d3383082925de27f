"""Alembic's environment: the connection comes from service.migrate, or from DATABASE_URL on alembic's own command line."""

import os

from alembic import context
from sqlalchemy import Connection, create_engine

from service.store.tables import Base


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata, compare_server_default=True)
    with context.begin_transaction():
        context.run_migrations()


given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with create_engine(os.environ["DATABASE_URL"]).connect() as opened:
        run(opened)
