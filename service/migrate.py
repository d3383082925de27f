"""Brings a database to a revision of the schema, one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, text

import migrations
from service.grants import grant

LOCK = 0x756E6C6561726E  # "unlearn": any number, as long as it is always the same


def upgrade(database_url: str, revision: str = "head", grant_to: str | None = None) -> None:
    """All in one transaction. Replicas that start together wait for the first, and then find nothing to do.

    Args:
        grant_to: the role of the service and the workers, where it is not the one that migrates. See service.grants.
    """
    with _alone(database_url) as connection:
        command.upgrade(_config(connection), revision)
        if grant_to is not None:
            grant(connection, grant_to)


def downgrade(database_url: str, revision: str) -> None:
    with _alone(database_url) as connection:
        command.downgrade(_config(connection), revision)


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", migrations.__path__[0].replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


@contextmanager
def _alone(database_url: str) -> Iterator[Connection]:
    """A lock of the transaction, not of the session: those do not survive a pooler between us and Postgres."""
    engine = create_engine(database_url)
    try:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
            yield connection
    finally:
        engine.dispose()
