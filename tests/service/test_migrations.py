"""The schema: up, down, up again, and the migrations make exactly what the tables declare."""

import importlib
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, text

import migrations
from service import migrate
from service.store.session import make_engine, make_sessions, schema_revision
from service.store.tables import HEAD, Base

DEFINITIONS = """
SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid)
  FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT 'index', tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL
SELECT 'column', table_name, column_name, concat_ws(' ', data_type, is_nullable, column_default)
  FROM information_schema.columns WHERE table_schema = 'public'
"""


def definitions(connection: Connection) -> set[tuple[str, ...]]:
    """Everything that Postgres knows of our tables; what autogenerate does not compare, such as CHECKs, included."""
    return {tuple(row) for row in connection.execute(text(DEFINITIONS)) if row[1] != "alembic_version"}


def scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", migrations.__path__[0])
    return ScriptDirectory.from_config(config)


def test_the_tables_name_the_last_revision() -> None:
    assert scripts().get_heads() == [HEAD]


def test_a_revision_file_is_a_module_of_the_package() -> None:
    for revision in scripts().walk_revisions():
        assert importlib.import_module(f"migrations.versions.{Path(revision.path).stem}").revision == revision.revision


def test_models_equal_migrations(engine: Engine, empty_database_url: str) -> None:
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        migrated = definitions(connection)
    declared = create_engine(empty_database_url)
    Base.metadata.create_all(declared)
    with declared.connect() as connection:
        assert definitions(connection) == migrated
    declared.dispose()
    assert {kind for kind, *_ in migrated} == {"constraint", "index", "column"}


def test_down_and_up_again(empty_database_url: str) -> None:
    engine = make_engine(empty_database_url)
    found = []
    for _ in range(2):
        migrate.upgrade(empty_database_url)
        with engine.connect() as connection:
            found.append(definitions(connection))
        migrate.downgrade(empty_database_url, "base")
        with engine.connect() as connection:
            assert definitions(connection) == set()
    assert found[0] == found[1]
    assert found[0]
    engine.dispose()


def test_a_version_without_refusals_can_read_the_specs_that_it_finds(empty_database_url: str) -> None:
    migrate.upgrade(empty_database_url)
    engine = make_engine(empty_database_url)
    with engine.begin() as connection:
        connection.execute(text(JOB_WITH_REFUSALS))
    migrate.downgrade(empty_database_url, "0002")
    with engine.connect() as connection:
        assert connection.execute(text("SELECT spec FROM jobs")).scalar_one() == {"seed": 3}
    migrate.upgrade(empty_database_url)
    engine.dispose()


JOB_WITH_REFUSALS = """
INSERT INTO jobs (id, status, spec, model, method, forget_set, retain_set, priority, gpu_class, refusal_set,
                  tenant_id, created_by)
VALUES ('ujob_1', 'queued', '{"seed": 3, "refusal_set": "ufile_1"}', 'm', 'idk_dpo', 'f', 'r', 5, 'any', 'ufile_1',
        'default', 'system')
"""


def test_a_version_without_benchmarks_can_read_what_it_finds(empty_database_url: str) -> None:
    migrate.upgrade(empty_database_url)
    engine = make_engine(empty_database_url)
    with engine.begin() as connection:
        connection.execute(text(JOB_WITH_BENCHMARKS))
    migrate.downgrade(empty_database_url, "0004")
    with engine.begin() as connection:
        for purpose in ("eval_scores", "holdout_set", "retain_set"):
            connection.execute(text(FILE), {"id": purpose, "purpose": purpose})
    migrate.downgrade(empty_database_url, "0003")
    with engine.connect() as connection:
        assert connection.execute(text("SELECT spec FROM jobs")).scalar_one() == {"seed": 3}
        purposes = connection.execute(text("SELECT id, purpose FROM files")).all()
        assert {id_: purpose for id_, purpose in purposes if id_ != purpose} == {
            "eval_scores": "eval_set",
            "holdout_set": "eval_set",
        }
    migrate.upgrade(empty_database_url)
    with engine.connect() as connection:  # what was stored in the clear is not read any more
        assert set(connection.execute(text("SELECT sealed, purged_at IS NULL, tenant_id FROM files")).all()) == {
            (None, False, "default")
        }
    engine.dispose()


FILE = "INSERT INTO files (id, purpose, name, key, bytes, sha256, rows) VALUES (:id, :purpose, 'n', 'k', 1, '', 1)"
JOB_WITH_BENCHMARKS = """
INSERT INTO jobs (id, status, spec, model, method, forget_set, retain_set, priority, gpu_class, holdout_set,
                  tenant_id, created_by)
VALUES ('ujob_1', 'queued',
        '{"seed": 3, "holdout_set": "ufile_1", "benchmarks": ["b"], "audit": {"relearn_steps": 3}, "gates": []}',
        'm', 'pdu', 'f', 'r', 5, 'any', 'ufile_1', 'default', 'system')
"""


def test_revision_of_a_database(empty_database_url: str) -> None:
    engine = make_engine(empty_database_url)
    with make_sessions(engine)() as s:
        assert schema_revision(s) is None
    migrate.upgrade(empty_database_url)
    with make_sessions(engine)() as s:
        assert schema_revision(s) == HEAD
    engine.dispose()


@pytest.mark.timeout(60)
def test_replicas_that_start_together_migrate_once(empty_database_url: str) -> None:
    failures: list[BaseException] = []

    def start() -> None:
        try:
            migrate.upgrade(empty_database_url)
        except BaseException as error:  # a thread's exception would go unnoticed
            failures.append(error)

    replicas = [threading.Thread(target=start) for _ in range(4)]
    for replica in replicas:
        replica.start()
    for replica in replicas:
        replica.join()
    assert failures == []
