"""Brings a database to a revision of the schema, one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text

import migrations
from service.domain.errors import UnlearnError
from service.grants import grant

LOCK = 0x756E6C6561726E  # "unlearn": any number, as long as it is always the same
LOCK_TIMEOUT_S = 30  # for a table that a transaction of the running service holds; behind us everybody else would wait
SEALED = "0005"  # from this revision on files are encrypted


class DataLoss(UnlearnError):
    """What would be lost was not agreed to."""


def upgrade(
    database_url: str, revision: str = "head", grant_to: str | None = None, *, accept_loss: bool = False
) -> None:
    """All in one transaction. Replicas that start together wait for the first, and then find nothing to do.

    Args:
        grant_to: the role of the service and the workers, where it is not the one that migrates. See service.grants.
        accept_loss: otherwise DataLoss is raised where files would be lost, and nothing is changed.
    """
    with _alone(database_url) as connection:
        config = _config(connection)
        if not accept_loss and (loss := _loss(connection, config, revision)):
            raise DataLoss(loss)
        command.upgrade(config, revision)
        _name_oldest_code(connection, config)
        if grant_to is not None:
            grant(connection, grant_to)


def downgrade(database_url: str, revision: str) -> None:
    with _alone(database_url) as connection:
        config = _config(connection)
        command.downgrade(config, revision)
        _name_oldest_code(connection, config)


def _loss(connection: Connection, config: Config, revision: str) -> str | None:
    current, scripts = _current(connection), ScriptDirectory.from_config(config)
    crossed = {script.revision for script in scripts.iterate_revisions(revision, current or "base")}
    if current is None or SEALED not in crossed:
        return None
    files: int = connection.execute(text("SELECT count(*) FROM files")).scalar_one()
    if not files:
        return None
    return (
        f"{files} uploaded files were stored unencrypted, before revision {SEALED}, and no later version reads them: "
        "they are marked as purged, and the sweep deletes their bytes. Download what is still needed first"
    )


def _name_oldest_code(connection: Connection, config: Config) -> None:
    """Which versions of the service can work with the schema, for those that are still running: see service.store.session.

    A revision that only adds what the code before it can do without names that code's own revision as `oldest_code`.
    """
    revision = _current(connection)
    if revision is None:
        return
    script = ScriptDirectory.from_config(config).get_revision(revision)
    oldest = getattr(script.module, "oldest_code", revision)
    connection.execute(text(f"COMMENT ON TABLE alembic_version IS '{oldest}'"))


def _current(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


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
            connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'"))
            yield connection
    finally:
        engine.dispose()
