"""A poll that is answered from the job's version and little more: never stale, nobody else's, and for nobody unknown."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import Engine, event, text
from starlette.testclient import TestClient

from service.api import shown
from service.domain.job import Failure, FailureCode, Stage, Verdict
from service.settings import Settings
from service.store import evidence_keys, jobs, keys, workers
from service.store.secrets import secrets_of
from service.store.session import Sessions
from tests.conftest import owner
from tests.service.conftest import JOBS
from tests.service.test_store_jobs import claimed, step, wait

BLOCKED = text("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = CAST(:table AS regclass)")
NewJob = Callable[..., str]
PASSED = Verdict(result="PASSED", gates=[], message="kept the bound and forgot")


CERTIFICATE = """
INSERT INTO certificates (id, tenant_id, job_id, envelope, key_id, audit_seq)
VALUES ('ucert_1', 'default', :job, '{}', :key, 1)
"""


def test_whatever_changes_the_answer_changes_its_tag(
    http: TestClient, new_job: NewJob, sessions: Sessions, settings: Settings
) -> None:
    path = f"{JOBS}/{new_job()}"
    job_id = path.rpartition("/")[2]
    held: list[Any] = []
    with sessions.begin() as s:
        key_id = evidence_keys.rotate(s, secrets_of(settings))

    def does(verb: Callable[..., Any], *values: Any, **named: Any) -> Callable[[], Any]:
        def act() -> None:
            with sessions.begin() as s:
                verb(s, *values, **named)

        return act

    def runs(verb: Callable[..., Any], *values: Any, **named: Any) -> Callable[[], Any]:
        return lambda: does(verb, job_id, held[-1].fence, *values, **named)()

    course: list[tuple[str, Callable[[], Any]]] = [
        ("a worker comes", does(workers.seen, "w", ["cpu"], 0)),
        ("another job comes before it", lambda: new_job(priority=9)),
        ("that one is taken", lambda: claimed(sessions)),
        ("its tenant has a bound", does(lambda s: s.execute(text("UPDATE tenants SET max_running_jobs = 1")))),
        ("it has none", does(lambda s: s.execute(text("UPDATE tenants SET max_running_jobs = NULL")))),
        ("the worker goes", does(workers.gone, "w")),
        ("it rests", does(jobs.pause, job_id)),
        ("it waits again", does(jobs.resume, job_id)),
        ("it is taken", lambda: held.append(claimed(sessions))),
        ("it loads", runs(jobs.log, stage=Stage.LOADING_MODEL)),
        ("it solves", runs(jobs.log, stage=Stage.UNLEARNING, steps=[step(3)])),
        ("it goes on", runs(jobs.log, steps=[step(4)])),
        ("it fails", runs(jobs.fail, Failure.of(FailureCode.STORAGE_FULL, "full"))),
        ("it may be tried", lambda: wait(sessions)),
        ("it is taken once more", lambda: held.append(claimed(sessions))),
        ("it is over", runs(jobs.succeed, PASSED)),
        ("it is certified", does(lambda s: s.execute(text(CERTIFICATE), {"job": job_id, "key": key_id}))),
        ("its model is removed", does(lambda s: s.execute(text("DELETE FROM models")))),
    ]
    before = http.get(path)
    for name, act in course:
        act()
        tag = {"If-None-Match": before.headers["ETag"]}
        after = http.get(path)
        assert after.content != before.content, name
        assert after.headers["ETag"] != before.headers["ETag"], name
        assert http.get(path, headers=tag).content == after.content, name
        same = http.get(path, headers={"If-None-Match": after.headers["ETag"]})
        assert (same.status_code, same.content) == (304, b""), name
        told = ("ETag", "Retry-After", "Vary", "Cache-Control")
        assert [same.headers.get(one) for one in told] == [after.headers.get(one) for one in told], name
        before = after


def test_what_leaves_the_answer_as_it_is_is_a_304(http: TestClient, new_job: NewJob, sessions: Sessions) -> None:
    new_job()
    held = claimed(sessions)
    path = f"{JOBS}/{held.job_id}"
    before = http.get(path)
    with sessions.begin() as s:
        assert jobs.beat(s, held.job_id, held.fence, 60)
    new_job(priority=9)
    assert http.get(path).content == before.content
    assert http.get(path, headers={"If-None-Match": before.headers["ETag"]}).status_code == 304


def test_a_poll_that_finds_what_it_knows_asks_with_one_statement_who_it_is_and_how_the_job_is(
    http: TestClient, new_job: NewJob, sessions: Sessions
) -> None:
    path = f"{JOBS}/{new_job()}"
    claimed(sessions)
    tag = {"If-None-Match": http.get(path).headers["ETag"]}
    asked: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        assert http.get(path, headers=tag).status_code == 304
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert [one.partition("FROM ")[2].split()[0] for one in asked] == ["api_keys"]


def test_another_tenants_job_is_not_there_for_who_has_its_tag(
    http: TestClient, new_job: NewJob, make_key: Callable[..., str]
) -> None:
    path = f"{JOBS}/{new_job()}"
    other = {"Authorization": f"Bearer {make_key('admin', tenant='other')}"}
    for tag in (http.get(path).headers["ETag"], "*"):
        assert http.get(path, headers={"If-None-Match": tag}).status_code == 304
        assert http.get(path, headers=other | {"If-None-Match": tag}).status_code == 404
        assert http.get(path, headers=other | {"If-None-Match": tag, "Prefer": "wait=1"}).status_code == 404


def test_a_key_that_is_revoked_polls_no_more(
    http: TestClient, new_job: NewJob, make_key: Callable[..., str], sessions: Sessions
) -> None:
    path, secret = f"{JOBS}/{new_job()}", make_key("auditor")
    tag = http.get(path).headers["ETag"]
    asked = {"Authorization": f"Bearer {secret}", "If-None-Match": tag}
    assert http.get(path, headers=asked).status_code == 304
    expires = text("UPDATE api_keys SET expires_at = now() + :rest * interval '1 s' WHERE name = 'auditor'")
    for rest, status in ((-1, 401), (3600, 304)):
        with sessions.begin() as s:
            s.execute(expires, {"rest": rest})
        assert http.get(path, headers=asked).status_code == status
    with sessions.begin() as s:
        keys.revoke(s, next(row.id for row in keys.page(s)[0] if row.name == "auditor"))
    assert http.get(path, headers=asked).status_code == 401


def test_who_knows_the_beginning_of_a_key_polls_nothing(http: TestClient, new_job: NewJob) -> None:
    path, secret = f"{JOBS}/{new_job()}", http.headers["Authorization"].removeprefix("Bearer ")
    body = f"{secret[:12]}_{'x' * 43}"
    guessed = f"{body}_{keys._check(body)}"
    assert keys.well_formed(secret)
    assert keys.well_formed(guessed)
    for tag in ({}, {"If-None-Match": "*"}):
        assert http.get(path, headers={"Authorization": f"Bearer {guessed}", **tag}).status_code == 401


def test_who_may_not_see_jobs_or_asks_too_often_does_not_learn_which_there_are(
    client_of: Callable[..., Any], settings: Settings, new_job: NewJob, make_key: Callable[..., str]
) -> None:
    asked = {"Authorization": f"Bearer {make_key('dashboard')}", "If-None-Match": "*"}
    paths = [f"{JOBS}/{new_job()}", f"{JOBS}/ujob_{'0' * 32}"]
    with client_of(settings.model_copy(update={"rate_limit_per_minute": 2})) as http:
        assert [http.get(path, headers=asked).status_code for path in paths * 2] == [403, 403, 429, 429]


def test_what_is_asked_of_the_key_and_of_the_job_has_names_of_its_own() -> None:
    names = [column.key for column in shown.OF_KEY.selected_columns]
    assert len({*names}) == len(names)


def test_a_key_is_noted_as_used_once_a_minute(http: TestClient, new_job: NewJob, sessions: Sessions) -> None:
    path = f"{JOBS}/{new_job()}"
    poll = {"If-None-Match": http.get(path).headers["ETag"]}

    def used(path: str, headers: dict[str, str], back: str) -> object:
        with sessions.begin() as s:
            s.execute(text(f"UPDATE api_keys SET last_used_at = last_used_at - interval '{back}'"))
            before = s.scalar(text("SELECT max(last_used_at) FROM api_keys"))
        assert http.get(path, headers=headers).status_code in {200, 304}
        with sessions() as s:
            return s.scalar(text("SELECT max(last_used_at) FROM api_keys")) != before

    for asked in ((JOBS, {}), (path, poll)):
        used(*asked, "1 hour")
        assert [used(*asked, "0 s"), used(*asked, "50 s"), used(*asked, "20 s")] == [False, False, True]


def test_a_key_whose_row_is_held_is_good_all_the_same(http: TestClient, sessions: Sessions) -> None:
    http.get(JOBS)
    with sessions.begin() as s:
        s.execute(text("UPDATE api_keys SET last_used_at = last_used_at - interval '1 hour'"))
    with sessions.begin() as s:
        s.execute(text("SELECT 1 FROM api_keys FOR UPDATE"))
        assert http.get(JOBS).status_code == 200


def test_polls_that_wait_for_the_database_keep_nobody_from_being_known(
    http: TestClient, new_job: NewJob, sessions: Sessions
) -> None:
    over = f"{JOBS}/{new_job()}"
    held = claimed(sessions)
    with sessions.begin() as s:
        assert jobs.succeed(s, held.job_id, held.fence, PASSED)
    runs = f"{JOBS}/{new_job()}"
    claimed(sessions)
    waits = f"{JOBS}/{new_job()}"
    tags = {path: {"If-None-Match": http.get(path).headers["ETag"]} for path in (runs, waits, over)}

    def others_are_answered(waiting: str, table: str, headers: dict[str, str], answered: dict[str, int]) -> None:
        with ThreadPoolExecutor(20) as pool, owner(sessions).connect() as connection:
            connection.execute(text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
            polls = [pool.submit(http.get, waiting, headers=headers) for _ in range(20)]
            while connection.scalars(BLOCKED, {"table": table}).one() < 5:
                time.sleep(0.01)
            assert {path: http.get(path, headers=tags.get(path)).status_code for path in answered} == answered
            assert not any(poll.done() for poll in polls)
            connection.rollback()
            assert {poll.result().status_code for poll in polls} == {304}

    others_are_answered(runs, "jobs", tags[runs], {"/v1/models": 200})
    # counting the places of a long line takes as long as this lock; `workers` is asked for along with them
    for headers in (tags[waits], tags[waits] | {"Prefer": "wait=1"}):
        others_are_answered(waits, "workers", headers, {"/v1/models": 200, runs: 304, over: 304})
