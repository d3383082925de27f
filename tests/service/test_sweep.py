"""The bell and the sweep, with a real Valkey, a silent one and none; the sweep's process under outages and signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import redis
from celery import Celery
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from service import dispatch, embedded, sweep
from service.api.deps import Parts
from service.dispatch import WAKE, CeleryDispatcher, celery_config, queue_name
from service.domain import catalog
from service.domain.job import Resources, Status, Verdict
from service.orphans import delete_orphans
from service.settings import Settings
from service.store import files, jobs
from service.store.rows import ArtifactRow
from service.store.secrets import secrets_of
from service.store.session import Sessions
from service.store.storage import Storage
from service.sweep import Figures, Swept, certify, purge_due, sweep_once
from tests.conftest import MASTER_KEY

NewJob = Callable[..., str]


def bells(broker_url: str) -> dict[str, int]:
    with redis.Redis.from_url(broker_url) as client:
        return {key.decode(): client.llen(key) for key in client.scan_iter("wake.*") if client.type(key) == b"list"}


class Heard(list[str]):
    """A dispatcher that writes down which bells it rang."""

    def ring(self, gpu_class: str) -> bool:
        self.append(gpu_class)
        return True

    def reachable(self) -> bool:
        return True


def test_a_bell_carries_nothing(settings: Settings) -> None:
    assert CeleryDispatcher(settings).ring("cpu")
    with redis.Redis.from_url(settings.broker_url) as client:
        message = json.loads(client.lindex(queue_name("cpu"), 0))
    assert message["headers"]["task"] == WAKE
    assert (message["headers"]["argsrepr"], message["headers"]["kwargsrepr"]) == ("()", "{}")


def test_a_worker_with_the_shared_configuration_hears_it(settings: Settings) -> None:
    CeleryDispatcher(settings).ring("any")
    app = Celery(set_as_current=False)
    app.conf.update(celery_config(settings))
    heard: list[Any] = []
    with app.connection_for_read() as connection, app.amqp.TaskConsumer(connection.channel(), on_message=heard.append):
        connection.drain_events(timeout=5)
    assert [message.headers["task"] for message in heard] == [WAKE]


@pytest.fixture
def silent_broker() -> Iterator[str]:
    """It accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


def test_without_a_broker_the_bell_fails_softly_and_soon(silent_broker: str) -> None:
    for url, within_s in (("redis://127.0.0.1:1/0", 1.0), (silent_broker, 4.0)):
        started = time.monotonic()
        assert not CeleryDispatcher(Settings(broker_url=url)).ring("any")
        assert time.monotonic() - started < within_s
        assert not CeleryDispatcher(Settings(broker_url=url)).reachable()


def test_a_broker_that_was_silent_is_not_waited_for_again_at_once(silent_broker: str) -> None:
    """Each request would, and hold one of the few threads."""
    dispatcher = CeleryDispatcher(Settings(broker_url=silent_broker))
    assert not dispatcher.ring("any")
    started = time.monotonic()
    assert not any(dispatcher.ring("any") for _ in range(20))
    assert time.monotonic() - started < 1


def test_a_class_without_a_queue_does_not_ring(settings: Settings) -> None:
    assert not CeleryDispatcher(settings).ring("tpu")


def test_a_broker_that_came_back_is_rung_again(tmp_path: Path) -> None:
    with embedded.valkey(tmp_path) as url:
        dispatcher = CeleryDispatcher(Settings(broker_url=url))
        assert dispatcher.ring("any")
        with redis.Redis.from_url(url) as client:
            client.client_kill_filter(_type="normal", skipme=True)
        assert dispatcher.ring("any") or dispatcher.ring("any")  # the first may find out on its dead connection
        assert dispatcher.reachable()
    assert not dispatcher.ring("any")
    assert not dispatcher.reachable()


def test_it_rings_what_waits_and_not_at_every_turn(new_job: NewJob, sessions: Sessions, settings: Settings) -> None:
    new_job()
    new_job()
    new_job(resources=Resources(gpu_class="cpu"))
    dispatcher = CeleryDispatcher(settings)
    assert sweep_once(sessions, dispatcher, settings) == Swept(0, ["any", "cpu"])
    assert bells(settings.broker_url) == {"wake.any": 1, "wake.cpu": 1}
    assert sweep_once(sessions, dispatcher, settings) == Swept(0, [])
    with sessions.begin() as s:
        s.execute(text("UPDATE jobs SET rung_at = rung_at - interval '16 s' WHERE gpu_class = 'cpu'"))
    assert sweep_once(sessions, dispatcher, settings) == Swept(0, ["cpu"])


def test_bells_do_not_pile_up_where_nobody_listens(
    new_job: NewJob, sessions: Sessions, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "UNREAD_MAX", 3)
    dispatcher = CeleryDispatcher(settings)
    new_job()
    impatient = settings.model_copy(update={"ring_again_s": 1e-6})
    for _ in range(6):
        assert sweep_once(sessions, dispatcher, impatient) == Swept(0, ["any"])
    assert bells(settings.broker_url) == {"wake.any": 3}
    assert dispatcher.ring("cpu")
    assert bells(settings.broker_url) == {"wake.any": 3, "wake.cpu": 1}, "each queue by itself"


def aged(storage: Storage, key: str, days: float) -> str:
    storage.write(key, [b"text of a forget set"])
    then = time.time() - days * 86_400
    os.utime(Path(storage.root) / key, (then, then))
    return key


def test_stored_files_that_no_row_names_are_deleted_a_day_later(
    new_job: NewJob, sessions: Sessions, settings: Settings
) -> None:
    storage = Storage(settings.storage_url)
    assert delete_orphans(sessions, storage) == 0, "nothing was ever stored"
    new_job()
    with sessions() as s:
        named = [aged(storage, file.key, 9) for file in files.page(s)[0]]
    orphans = [aged(storage, key, 1.1) for key in (files.file_key("ufile_1"), files.file_key("ufile_2") + ".ab.part")]
    young = aged(storage, files.file_key("ufile_3"), 0.9)
    (Path(storage.root) / "files" / ".strange").write_text("not ours")
    assert delete_orphans(sessions, storage) == len(orphans)
    assert left(storage) == {*named, young, "files/.strange"}
    assert delete_orphans(sessions, storage) == 0


def left(storage: Storage) -> set[str]:
    return {str(path.relative_to(storage.root)) for path in Path(storage.root).rglob("*") if path.is_file()}


def test_what_a_job_stored_and_did_not_publish_goes_when_it_has_ended(
    new_job: NewJob, sessions: Sessions, settings: Settings
) -> None:
    storage = Storage(settings.storage_url)
    ended, live = new_job(priority=9), new_job()
    stored = {
        job_id: [aged(storage, f"jobs/{job_id}/{name}", 0) for name in ("reference/ab.safetensors", "attempts/1/part")]
        for job_id in (ended, live)
    }
    artifact = aged(storage, f"jobs/{ended}/attempts/2/report.json", 9)
    forgotten, young = aged(storage, "jobs/ujob_1/attempts/1/report.json", 1.1), aged(storage, "jobs/ujob_2/x", 0.9)
    assert delete_orphans(sessions, storage) == 1, "of a job that nobody knows of"
    assert forgotten not in left(storage)
    with sessions.begin() as s:
        held = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert held is not None
        assert held.job_id == ended
        passed = Verdict(result="PASSED", gates=[], message="so it is")
        published = ArtifactRow("report.json", artifact, "application/json", 1, "0" * 64)
        assert jobs.succeed(s, ended, held.fence, passed, [published])
    assert delete_orphans(sessions, storage) == 2
    assert left(storage) == {*stored[live], artifact, young}
    with sessions.begin() as s:
        jobs.request_cancel(s, live)
    assert delete_orphans(sessions, storage) == 2
    assert left(storage) == {artifact, young}


def test_certificates_that_wait_are_counted(new_job: NewJob, sessions: Sessions, settings: Settings) -> None:
    """A report whose bytes cannot be read waits; once it is decided on that there is no certificate, it does not."""
    storage = Storage(settings.storage_url)
    report = "jobs/ujob_1/attempts/1/report.json"
    new_job()
    with sessions.begin() as s:
        assert (held := jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)) is not None
        passed = Verdict(result="PASSED", gates=[], message="so it is")
        published = ArtifactRow("report.json", report, "application/json", 2, "0" * 64)
        assert jobs.succeed(s, held.job_id, held.fence, passed, [published])
    registry = CollectorRegistry()
    figures = Figures(registry)
    here = Parts(settings, sessions, storage, Heard(), catalog.load(), secrets_of(settings), None)

    def waiting() -> float | None:
        certify(here, figures)
        return registry.get_sample_value("unlearn_certificates_waiting")

    assert waiting() == 1
    storage.write(report, iter([b"{}"]))
    assert waiting() == 0


def test_a_database_made_anew_does_not_empty_the_storage(sessions: Sessions, settings: Settings) -> None:
    storage = Storage(settings.storage_url)
    stored = {aged(storage, files.file_key("ufile_1"), 9), aged(storage, "jobs/ujob_1/attempts/1/report.json", 9)}
    assert delete_orphans(sessions, storage) == 0
    assert left(storage) == stored


def test_leases_expire_while_the_storage_hangs_and_after_it_broke(
    new_job: NewJob, sessions: Sessions, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first deletion breaks with an error that nobody foresaw, the next one hangs until the end."""
    job_id, stop, hangs = new_job(), threading.Event(), threading.Event()
    with sessions.begin() as s:
        jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)

    def delete(*_: object) -> int:
        if not hangs.is_set():
            hangs.set()
            raise RuntimeError("unforeseen")
        stop.wait(20)
        return 0

    monkeypatch.setattr(sweep, "delete_orphans", delete)
    often = settings.model_copy(update={"sweep_interval_s": 0.02})
    running = threading.Thread(target=sweep.run, args=(often, stop))
    running.start()
    try:
        assert hangs.wait(10)
        with sessions.begin() as s:
            s.execute(text("UPDATE jobs SET lease_until = now() - interval '1 s'"))
        deadline = time.monotonic() + 10
        while status(sessions, job_id) is not Status.QUEUED:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        stop.set()
        running.join(10)


def status(sessions: Sessions, job_id: str) -> Status:
    with sessions() as s:
        return jobs.get(s, job_id).status


def test_it_does_not_ring_for_what_does_not_wait(new_job: NewJob, sessions: Sessions, settings: Settings) -> None:
    new_job()
    with sessions.begin() as s:
        jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
    assert sweep_once(sessions, Heard(), settings) == Swept(0, [])


def test_a_lost_job_is_queued_and_rung_in_one_turn(new_job: NewJob, sessions: Sessions, settings: Settings) -> None:
    job_id = new_job()
    heard = Heard()
    sweep_once(sessions, heard, settings)
    with sessions.begin() as s:
        jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        s.execute(text("UPDATE jobs SET lease_until = now() - interval '1 s'"))
    assert sweep_once(sessions, heard, settings) == Swept(1, ["any"])
    assert heard == ["any", "any"]
    with sessions() as s:
        assert jobs.get(s, job_id).status is Status.QUEUED


def test_a_claim_in_the_making_is_passed_over(new_job: NewJob, sessions: Sessions, settings: Settings) -> None:
    new_job()
    with sessions.begin() as s:
        assert jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        sweep_once(sessions, Heard(), settings)  # does not wait for the row
    with sessions() as s:
        assert s.execute(text("SELECT status, rung_at FROM jobs")).one() == ("running", None)


class Duty(NamedTuple):
    done: float  # when, last
    failures: float
    due_age_s: float


def duties(url: str) -> dict[str, Duty]:
    samples = [one for family in text_string_to_metric_families(httpx.get(url).text) for one in family.samples]
    by_name = {
        name: {one.labels["duty"]: one.value for one in samples if one.name == f"unlearn_sweep_duty_{name}"}
        for name in ("last_success_timestamp_seconds", "failures_total", "due_age_seconds")
    }
    done, failures, due_age_s = by_name.values()
    assert done.keys() == failures.keys() == due_age_s.keys()
    return {name: Duty(done[name], failures[name], due_age_s[name]) for name in done}


@pytest.mark.timeout(60)
def test_the_process_survives_outages_and_stops_when_told(
    new_job: NewJob, settings: Settings, tmp_path: Path, broker_url: str
) -> None:
    """It starts before its database is there (the socket's folder comes later), and goes on when it is."""
    link = tmp_path / "sockets"
    there = settings.database_url.partition("host=")[2].replace("%2F", "/")
    late = settings.database_url.partition("host=")[0] + f"host={link}"
    environment = os.environ | {"DATABASE_URL": late, "BROKER_URL": broker_url, "SWEEP_INTERVAL_S": "0.1"}
    environment |= {"STORAGE_URL": settings.storage_url, "MASTER_KEY": MASTER_KEY, "SWEEP_METRICS_PORT": "0"}
    orphan = aged(Storage(settings.storage_url), files.file_key("ufile_1"), 2)
    new_job()
    process = subprocess.Popen(
        [sys.executable, "-m", "service.sweep"], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        started = json.loads(process.stderr.readline())
        assert started["event"] == "sweep started"
        url = started["metrics"]
        assert httpx.get(url.replace("/metrics", "/livez")).text == "ok\n"
        assert json.loads(process.stderr.readline())["event"] == "waiting for the database, to check MASTER_KEY"
        away = duties(url)
        assert {(duty.done, duty.due_age_s > 0) for duty in away.values()} == {(0, True)}, "late from here on"
        link.symlink_to(there)
        deadline = time.monotonic() + 20
        while not bells(broker_url) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert bells(broker_url) == {"wake.any": 1}
        while (Path(settings.storage_url) / orphan).exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        while not all(duty.done for duty in duties(url).values()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        here = duties(url)
        while duties(url)["jobs"].done == here["jobs"].done:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        orphans = duties(url)["orphans"]
        assert (orphans.done, orphans.due_age_s) == (here["orphans"].done, 0), (
            "it is due in an hour, and was not done again"
        )
        process.send_signal(signal.SIGTERM)
        asked_at = time.monotonic()
        rest = process.stderr.read().splitlines()
        assert process.wait(10) == 0
        assert time.monotonic() - asked_at < 3
        assert json.loads(rest[-1])["event"] == "sweep stopped"
    finally:
        process.kill()
        process.wait()


def test_files_that_are_needed_do_not_keep_others_from_being_purged(
    new_job: NewJob, sessions: Sessions, settings: Settings
) -> None:
    """However many of them there are, and however long they have been due."""
    needed = {jobs_file for job_id in (new_job(), new_job()) for jobs_file in sets_of(sessions, job_id)}
    free = sets_of(sessions, over := new_job())
    with sessions.begin() as s:
        jobs.request_cancel(s, over)
        s.execute(text("UPDATE files SET purge_at = now() - interval '1 day'"))
        s.execute(text("UPDATE files SET purge_at = now() - interval '1 hour' WHERE id = ANY(:free)"), {"free": free})
        assert sorted(files.due(s, limit=len(needed))) == sorted(free)
    assert purge_due(sessions, Storage(settings.storage_url)) == 2
    with sessions.begin() as s:
        assert {file.id for file in files.page(s)[0] if file.purged_at is None} == needed


def sets_of(sessions: Sessions, job_id: str) -> list[str]:
    with sessions() as s:
        job = jobs.get(s, job_id)
        return [job.forget_set, job.retain_set]
