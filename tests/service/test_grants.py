"""The role of the service: it does all of the service's work, and cannot rewrite what is evidence."""

import hashlib
import hmac
import os
import re
import subprocess
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

from service import cli, embedded, local, migrate
from service.domain.job import Constraint, JobSpec, MethodChoice, ModelEntry, PromptFormat, Status, Verdict
from service.grants import APPEND_ONLY, DELETED_FROM, READ_ONLY
from service.settings import Settings
from service.store import audit, files, jobs, models, tenancy
from service.store.session import Sessions, make_engine, make_sessions
from service.store.tables import Base
from service.store.tenants import DEFAULT
from tests.conftest import Cluster, kept

ROOT = Path(__file__).parents[2]
OWNER = "test_owner"
CHANGED = {  # whose rows the service may change, and not delete; a new table belongs here, or in service.grants
    "api_keys",
    "artifacts",
    "audit_checks",
    "counters",
    "deletion_jobs",
    "deletion_requests",
    "files",
    "job_checks",
    "job_steps",
    "jobs",
    "signing_keys",
    "tenants",
    "webhook_attempts",
    "webhook_deliveries",
}
REFUSED = "InsufficientPrivilege"
PASSWORD = "it's \\ $HOME"


class Roles(NamedTuple):
    owner: Engine
    owner_url: str
    service: Engine
    service_url: str


@pytest.fixture(scope="module")
def roles(cluster: Cluster) -> Iterator[Roles]:
    """A database whose owner is no superuser, as a managed Postgres gives one: migrated by him, with what the service is granted.

    One for all tests, which leave it as it was.
    """
    with cluster.admin.connect() as connection:
        connection.execute(text(f"CREATE ROLE {OWNER} LOGIN"))
        connection.execute(text(f"CREATE DATABASE test_grants OWNER {OWNER} TEMPLATE template0"))
    url = cluster.database("test_grants")
    owner_url = make_url(url).set(username=OWNER).render_as_string(hide_password=False)
    service_url = embedded.role(url, local.ROLE)
    migrate.upgrade(owner_url, grant_to=local.ROLE)
    engines = create_engine(owner_url), make_engine(service_url)
    yield Roles(engines[0], owner_url, engines[1], service_url)
    for engine in engines:
        engine.dispose()


@pytest.fixture
def sessions(roles: Roles) -> Sessions:
    return tenancy.bound(make_sessions(roles.service), DEFAULT, "tester")


def refusal(engine: Engine, statement: str) -> str | None:
    """The name of Postgres' error; None: it was done."""
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)
    except DBAPIError as error:
        return type(error.orig).__name__
    return None


def held(engine: Engine) -> dict[str, set[str]]:
    """Table -> what the role may do with it."""
    asked = text(
        """
        SELECT relname, privilege FROM pg_class,
            unnest(ARRAY['SELECT','INSERT','UPDATE','DELETE','TRUNCATE','REFERENCES','TRIGGER','MAINTAIN']) privilege
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm')
            AND (has_table_privilege(:role, pg_class.oid, privilege)
                 OR privilege IN ('SELECT','INSERT','UPDATE','REFERENCES')
                 AND has_any_column_privilege(:role, pg_class.oid, privilege))
        """
    )
    found: dict[str, set[str]] = {}
    with engine.connect() as connection:
        for table, privilege in connection.execute(asked, {"role": local.ROLE}):
            found.setdefault(table, set()).add(privilege)
    return found


def test_every_table_is_granted_as_it_is_listed(roles: Roles) -> None:
    """A table that is in neither list fails: whoever adds one says whether the service may rewrite it."""
    changed = {"SELECT", "INSERT", "UPDATE"}
    expected = dict.fromkeys(CHANGED, changed) | dict.fromkeys(DELETED_FROM, changed | {"DELETE"})
    expected |= {table: {"SELECT", "INSERT"} for table in APPEND_ONLY} | {table: {"SELECT"} for table in READ_ONLY}
    assert held(roles.owner) == expected
    assert set(Base.metadata.tables) | set(READ_ONLY) == expected.keys()
    with roles.owner.connect() as connection:
        owners = text(
            "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        )
        assert connection.scalars(owners).all() == [OWNER]


def test_nothing_is_granted_to_be_deleted_that_the_service_does_not_delete() -> None:
    """By its source: `delete(Table)`, under either name that it is imported by."""
    source = "".join(path.read_text() for part in ("service", "worker") for path in (ROOT / part).rglob("*.py"))
    tables = {mapper.class_.__name__: mapper.class_.__tablename__ for mapper in Base.registry.mappers}
    assert {tables[name] for name in re.findall(r"\bdeleted?\((\w+)\)\.where", source)} == set(DELETED_FROM)


@pytest.fixture
def written(sessions: Sessions) -> Sessions:
    """With an entry in the audit log."""
    with sessions.begin() as s:
        audit.write(s, "test", "test", "test")
    return sessions


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_events SET actor = 'nobody'",
        "UPDATE audit_events SET data = '{}' WHERE seq = 1",
        "DELETE FROM audit_events",
        "TRUNCATE audit_events",
        "DROP TABLE audit_events",
        "DROP TRIGGER audit_events_append_only ON audit_events",
        "ALTER TABLE audit_events DISABLE TRIGGER audit_events_append_only",
        "ALTER TABLE audit_events DISABLE TRIGGER ALL",
        "ALTER TABLE audit_events OWNER TO unlearn_service",
        "ALTER TABLE audit_events RENAME TO forgotten",
        "CREATE RULE hidden AS ON INSERT TO audit_events DO INSTEAD NOTHING",
        "CREATE TRIGGER mine BEFORE INSERT ON audit_events FOR EACH ROW EXECUTE FUNCTION audit_is_append_only()",
        "CREATE OR REPLACE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "CREATE TABLE mine (n int)",
        "SET session_replication_role = replica",
        "SELECT set_config('session_replication_role', 'replica', false)",
        f"SET ROLE {OWNER}",
        "UPDATE certificates SET envelope = NULL",
        "DELETE FROM deletion_approvals",
        "DELETE FROM job_events",
        "DELETE FROM jobs WHERE NOT EXISTS (SELECT FROM certificates WHERE job_id = jobs.id)",
        "UPDATE alembic_version SET version_num = '0001'",
        "TRUNCATE jobs CASCADE",
        "DROP SCHEMA public CASCADE",
    ],
)
def test_a_stolen_connection_cannot_rewrite_evidence(roles: Roles, written: Sessions, statement: str) -> None:
    assert refusal(roles.service, statement) == REFUSED
    assert audit.check(written, DEFAULT).fault is None


def test_the_owner_is_refused_by_the_trigger_alone(roles: Roles, written: Sessions) -> None:
    """Which he can take away: hence two roles."""
    assert refusal(roles.owner, "DELETE FROM audit_events") == "RaiseException"
    with roles.owner.connect() as connection:  # rolled back
        connection.execute(text("ALTER TABLE audit_events DISABLE TRIGGER USER"))
        assert connection.execute(text("DELETE FROM audit_events")).rowcount > 0


def test_the_service_does_its_work(roles: Roles, sessions: Sessions, settings: Settings) -> None:
    """The small life of a job. That every part does, test_local.py and tests/e2e show: the local stack connects as this role."""
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="m", source="path", location="m", prompt_format=PromptFormat()))
        sets = {of: files.insert(s, kept(settings), purpose=of, rows=1).id for of in ("forget_set", "retain_set")}
        spec = JobSpec(model="m", method=MethodChoice(type="pdu"), constraint=Constraint(epsilon=1.0), **sets)
        job_id = jobs.create(s, spec).id
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        assert jobs.beat(s, job_id, claim.fence, lease_s=60) is not None
    verdict = Verdict(result="PASSED", gates=[], message="the bound was kept")
    with sessions.begin() as s:
        assert jobs.succeed(s, job_id, claim.fence, verdict, [], {})
    with sessions.begin() as s:
        assert jobs.get(s, job_id).status is Status.SUCCEEDED
        files.purge(s, sets["forget_set"])
    assert audit.check(sessions, DEFAULT).fault is None
    with sessions.begin() as s:
        last = audit.last_check(s, DEFAULT)
        assert last is not None
        assert (last.fault, last.seq > 3) == (None, True)


# --- what migrations do


def test_a_table_of_a_migration_that_was_told_of_no_role_can_be_used_and_not_altered(roles: Roles) -> None:
    assert refusal(roles.owner, "CREATE TABLE later (n int GENERATED ALWAYS AS IDENTITY, m int)") is None
    assert refusal(roles.service, "INSERT INTO later (m) VALUES (1); UPDATE later SET m = 2; DELETE FROM later") is None
    assert refusal(roles.service, "TRUNCATE later") == REFUSED
    assert refusal(roles.owner, "DROP TABLE later") is None


def test_each_migration_takes_back_what_is_not_to_be_granted(roles: Roles) -> None:
    before = held(roles.owner)
    assert refusal(roles.owner, f"GRANT ALL ON audit_events, jobs TO {local.ROLE}") is None
    assert refusal(roles.owner, f"GRANT UPDATE (actor) ON audit_events TO {local.ROLE}") is None
    assert refusal(roles.owner, "GRANT CREATE ON SCHEMA public TO PUBLIC") is None
    migrate.upgrade(roles.owner_url, grant_to=local.ROLE)
    assert held(roles.owner) == before
    assert refusal(roles.service, "CREATE TABLE mine (n int)") == REFUSED


def test_a_role_from_which_nothing_can_be_kept_is_refused(
    cluster: Cluster, roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    for role, why in (
        ("nobody_of_that_name", "there is no role"),
        (OWNER, "owns the tables"),
        ("postgres", "owns the tables"),
    ):
        with pytest.raises(RuntimeError, match=why):
            migrate.upgrade(roles.owner_url, grant_to=role)
    monkeypatch.setenv("DATABASE_URL", roles.owner_url)
    told = CliRunner().invoke(cli.app, ["migrate", "--grant-to", OWNER])
    assert (told.exit_code, "owns the tables" in told.stderr) == (2, True)
    assert CliRunner().invoke(cli.app, ["migrate", "--grant-to", local.ROLE]).exit_code == 0


def test_the_script_of_the_image_makes_the_role_with_its_password(cluster: Cluster, tmp_path: Path) -> None:
    """Whatever signs the password has. Psql comes with the server."""
    with cluster.admin.connect() as connection:
        psql = Path(connection.execute(text("SELECT setting FROM pg_config() WHERE name = 'BINDIR'")).scalar_one())
        connection.execute(text("CREATE DATABASE of_the_image"))
    sockets = make_url(cluster.url).query["host"]
    environment = {"POSTGRES_USER": "postgres", "POSTGRES_DB": "of_the_image", "SERVICE_PASSWORD": PASSWORD}
    script = (ROOT / "docker/postgres/service_role.sh").read_text().replace("unlearn_service", "role_of_the_image")
    done = subprocess.run(
        ["sh", "-c", script],
        env={"PATH": f"{psql}:{os.environ['PATH']}", "PGHOST": str(sockets), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with cluster.admin.connect() as connection:
        attributes = "rolsuper, rolcreaterole, rolcreatedb, rolbypassrls, rolcanlogin, rolpassword"
        found = connection.execute(text(f"SELECT {attributes} FROM pg_authid WHERE rolname = 'role_of_the_image'"))
        *may, logs_in, secret = found.one()
    assert (may, logs_in) == ([False] * 4, True)
    _, work, keys = secret.split("$")  # SCRAM-SHA-256$ITERATIONS:SALT$STORED:SERVER, RFC 5803
    iterations, salt = work.split(":")
    salted = hashlib.pbkdf2_hmac("sha256", PASSWORD.encode(), b64decode(salt), int(iterations))
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    assert b64decode(keys.split(":")[0]) == stored
