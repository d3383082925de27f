"""The schema: up, down, up again, and the migrations make exactly what the tables declare, wherever they start."""

import hashlib
import importlib
import threading
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

import migrations
from service import migrate
from service.store import tables
from service.store.session import Sessions, make_engine, make_sessions, schema_fits, schema_revision
from service.store.tables import HEAD, Base
from tests.conftest import owner

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


def test_a_revision_that_has_landed_is_not_changed() -> None:
    """Databases that went through it would lack the change. A new revision's line is added to the list."""
    folder = Path(migrations.__path__[0])
    listed = dict(line.split()[::-1] for line in (folder / "versions.sha256").read_text().splitlines())
    files = {file.name: file.read_bytes() for file in (folder / "versions").glob("r*.py")}
    assert {name: hashlib.sha256(content).hexdigest() for name, content in files.items()} == listed


@pytest.mark.parametrize("dump", sorted((Path(__file__).parent / "schemas").glob("*.sql")), ids=lambda path: path.stem)
def test_a_database_of_an_earlier_version_is_upgraded_and_used(
    dump: Path, engine: Engine, empty_database_url: str
) -> None:
    """Its rows, too: a job, a file, a worker and a deletion request of the time."""
    old = make_engine(empty_database_url)
    with psycopg.connect(
        make_url(empty_database_url).set(drivername="postgresql").render_as_string(False)
    ) as connection:
        connection.execute(dump.read_bytes())
    migrate.upgrade(empty_database_url)
    with old.connect() as upgraded, engine.connect() as fresh:
        assert definitions(upgraded) == definitions(fresh)
    with make_sessions(old)() as s:
        counts = {mapper.class_: len(s.scalars(select(mapper.class_)).all()) for mapper in Base.registry.mappers}
    assert all(counts[table] == 1 for table in (tables.Job, tables.File, tables.Worker, tables.DeletionRequest))
    old.dispose()


@pytest.mark.parametrize(
    ("revision", "oldest_code", "fits"),
    [
        (HEAD, HEAD, True),
        ("9999", HEAD, True),  # of a rolling upgrade: the next version's, which this code can work with
        ("9999", "0001", True),
        ("9999", "9998", False),
        ("9999", None, False),
        ("0001", "0001", False),
    ],
)
def test_code_works_with_its_own_schema_and_later_ones_that_say_so(
    engine: Engine, sessions: Sessions, revision: str, oldest_code: str | None, fits: bool
) -> None:
    comment = "NULL" if oldest_code is None else f"'{oldest_code}'"
    with owner(sessions).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
        connection.execute(text(f"COMMENT ON TABLE alembic_version IS {comment}"))
    with sessions() as s:
        assert schema_fits(s, HEAD) is fits


def test_a_migration_names_the_oldest_code_that_works_with_it(sessions: Sessions) -> None:
    with sessions() as s:
        comment = s.scalar(text("SELECT obj_description('alembic_version'::regclass, 'pg_class')"))
    assert comment == getattr(scripts().get_revision(HEAD).module, "oldest_code", HEAD)


def test_it_does_not_wait_for_a_table_that_is_in_use(empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statements of everybody else would queue up behind it."""
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT_S", 1)
    migrate.upgrade(empty_database_url, "0009")
    engine = make_engine(empty_database_url)
    with engine.begin() as connection:
        connection.execute(text("LOCK TABLE workers"))
        with pytest.raises(OperationalError, match="lock timeout"):
            migrate.upgrade(empty_database_url)
    migrate.upgrade(empty_database_url)
    engine.dispose()


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
    with pytest.raises(migrate.DataLoss, match="3 uploaded files were stored unencrypted"):
        migrate.upgrade(empty_database_url)
    with make_sessions(engine)() as s:
        assert schema_revision(s) == "0003", "nothing was changed"
    migrate.upgrade(empty_database_url, accept_loss=True)
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
