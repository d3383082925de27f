"""Faults of what the service needs, on a live stack: what a second client sees meanwhile, and what is left of them after.

With -s it prints what the second client saw.
"""

import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from sqlalchemy import make_url

from service.local import ROLE
from tests.abuse.live import (
    ALONE_S,
    CHEAP,
    LIST,
    READYZ,
    UNSERVED,
    Live,
    Seen,
    Submissions,
    live,
    statuses,
    struck,
    timed,
    until,
    upload,
)
from tests.abuse.proxy import REFUSED, SILENT, Fault
from tests.conftest import Cluster, _database
from tests.service.test_read_only import read_only

FULL_BYTES = 2**18


@pytest.fixture(scope="module")
def database_url(cluster: Cluster) -> Iterator[str]:
    for url in _database(cluster, "migrated"):
        yield make_url(url).set(username=ROLE).render_as_string(hide_password=False)


@pytest.fixture(scope="module")
def here(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(database_url, tmp_path_factory.mktemp("live")) as started:
        yield started


# --- the identity provider


def asked_with_invented_keys(here: Live, count: int) -> Seen:
    seen = Seen()

    def ask(number: int) -> tuple[httpx.Response | None, float]:
        headers = {"Authorization": f"Bearer {here.identity.token(f'invented-{number}')}"}
        return timed(lambda: httpx.get(f"{here.url}{LIST}", headers=headers, timeout=60, **CHEAP))

    with ThreadPoolExecutor(count) as pool:
        for answer, seconds in pool.map(ask, range(count)):
            seen.note(answer, seconds)
    return seen


def test_a_provider_that_hangs_keeps_no_api_key_waiting_and_serves_when_it_heals(here: Live) -> None:
    before = here.provider.connections
    with struck(here, "provider hangs", here.provider.fault(SILENT)) as (sent, seen):
        sent.send(UNSERVED)
        tokens = asked_with_invented_keys(here, 46)
    print(f"    tokens with invented keys      {tokens}")
    assert statuses(tokens) == {503}
    assert tokens.headers[503]["retry-after"]
    assert statuses(sent.answers()) == {201}
    assert statuses(seen[LIST]) == {200}
    assert seen[LIST].longest_s < ALONE_S
    assert here.provider.connections == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hangs", "garbage", "is cut", "trickles", "refuses", "is delayed"])
def test_whatever_a_provider_does_api_keys_are_answered_and_tokens_are_when_it_heals(here: Live, kind: str) -> None:
    fault = {
        "hangs": SILENT,
        "garbage": Fault(),
        "is cut": Fault(answer_bytes=200),
        "trickles": Fault(bytes_per_s=5),
        "refuses": REFUSED,
        "is delayed": Fault(delay_s=1),
    }[kind]
    time.sleep(11)  # since the last fetch: there is one at most in 10 s
    here.identity.published = b"<html>" if kind == "garbage" else here.identity.keys
    tokens = Seen()
    with struck(here, f"provider {kind}", here.provider.fault(fault)) as (sent, seen):
        sent.send(UNSERVED)
        asked_with_invented_keys(here, 46)
        time.sleep(5)
        tokens = asked_with_invented_keys(here, 8)
    here.identity.published = here.identity.keys
    print(f"    tokens with invented keys      {tokens}")
    assert statuses(tokens) == ({401} if kind == "is delayed" else {503})
    assert statuses(sent.answers()) == {201}
    assert statuses(seen[LIST]) == {200}
    assert seen[LIST].longest_s < ALONE_S
    headers = {"Authorization": f"Bearer {here.identity.token()}"}
    url = f"{here.url}{LIST}"
    until(lambda: httpx.get(url, headers=headers, timeout=60, **CHEAP).status_code == 200, "a token", 20)


# --- the database


def test_without_a_database_it_says_so_soon_and_goes_on_when_it_is_back(here: Live) -> None:
    with struck(here, "database refuses", here.database.fault(REFUSED)) as (sent, seen):
        for _ in range(5):
            sent.send(UNSERVED)
            time.sleep(0.3)
        answers = sent.answers()
    assert statuses(answers) == {201, 503}, "of the one before, and of those meanwhile"
    assert answers.headers[503]["retry-after"]
    assert answers.longest_s < ALONE_S
    assert {503} <= statuses(seen[LIST]) <= {200, 503}
    assert {503} <= statuses(seen[READYZ]) <= {200, 503}
    assert seen[LIST].longest_s < ALONE_S


@pytest.mark.parametrize("side", ["answer_bytes", pytest.param("request_bytes", marks=pytest.mark.slow)])
def test_a_job_whose_connection_is_cut_anywhere_is_there_once_when_it_is_sent_again(here: Live, side: str) -> None:
    """Also where the commit was carried out and the answer to it was lost: the search ends there."""
    sent = Submissions(here)

    def cut_after(passed: int) -> bool:
        with here.database.fault(REFUSED):
            pass  # so that each time the connections are new, and the same bytes pass
        before = sent.answers().statuses
        with here.database.fault(Fault(**{side: passed})):
            sent.send(UNSERVED)
            new = sent.answers().statuses - before
        assert set(new) <= {201, 503}
        return 503 in new

    cut, whole = 0, 2**16
    assert cut_after(cut)
    assert not cut_after(whole)
    while whole - cut > 4:
        middle = (cut + whole) // 2
        cut, whole = (middle, whole) if cut_after(middle) else (cut, middle)
    replayed = sent.settle()
    print(
        f"\ndatabase is cut, {side}: {sent.answers()}; {replayed} were there all the same; the last cut is after {cut} bytes"
    )
    assert (replayed > 0) == (side == "answer_bytes")


@pytest.mark.slow
def test_jobs_that_run_while_every_connection_to_the_database_is_cut_end_once(here: Live) -> None:
    """Of the API, the sweep and the worker, each after so much that some transactions pass."""
    with struck(here, "database is cut again and again", here.database.fault(Fault(answer_bytes=12_000))) as (
        sent,
        seen,
    ):
        for _ in range(8):
            sent.send(steps="10", step_s="0.1")
            time.sleep(1)
        answers = sent.answers()
    assert statuses(answers) <= {201, 503}
    assert statuses(seen[LIST]) <= {200, 503}
    assert here.database.connections > 20


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_database_that_falls_silent_is_given_up(here: Live) -> None:
    """Longer than the timeouts of the connections: the server's own cannot help."""
    with struck(here, "database silent", here.database.fault(SILENT)) as (sent, seen):
        for _ in range(50):
            sent.send(UNSERVED)
            time.sleep(1)
    assert {503} <= statuses(seen[LIST]) <= {200, 503}
    assert seen[LIST].longest_s < 45
    assert sent.answers().longest_s < 55
    assert seen[READYZ].longest_s < ALONE_S + 1


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.05, 0.3])
def test_a_slow_database_makes_it_slow_and_nothing_else(here: Live, delay_s: float) -> None:
    with struck(here, f"database delayed by {delay_s} s", here.database.fault(Fault(delay_s=delay_s))) as (sent, seen):
        for _ in range(5):
            sent.send(UNSERVED)
            time.sleep(1)
    assert statuses(sent.answers()) == {201}
    assert statuses(seen[LIST]) == {200}


@pytest.mark.slow
def test_a_database_that_takes_no_writes_is_read_from(here: Live) -> None:
    with struck(here, "database read-only", read_only(here.sessions)) as (sent, seen):
        for _ in range(5):
            sent.send(UNSERVED)
            time.sleep(0.3)
        meanwhile = sent.answers()
    assert statuses(meanwhile) == {201, 503}
    assert {503} <= statuses(seen[READYZ]) <= {200, 503}
    assert seen[LIST].statuses[503] <= 2 < seen[LIST].statuses[200], "whose connection just ended"


# --- the broker


@contextmanager
def full(here: Live) -> Iterator[None]:
    with here.valkey() as valkey:
        valkey.config_set("maxmemory", 1)
        try:
            yield
        finally:
            valkey.config_set("maxmemory", 0)


@pytest.mark.parametrize(
    "kind", ["silent", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("full", "refused", "slow"))]
)
def test_without_a_broker_jobs_are_taken_and_run(here: Live, kind: str) -> None:
    faults = {"silent": SILENT, "refused": REFUSED, "slow": Fault(delay_s=0.3)}
    fault = full(here) if kind == "full" else here.broker.fault(faults[kind])
    with struck(here, f"broker {kind}", fault) as (sent, seen):
        for _ in range(40):
            sent.send(UNSERVED)
        sent.answers()
    answers = sent.answers()
    assert {201} <= statuses(answers) <= {201, 503}, (
        "a machine too slow for 40 at once refuses some, and takes them again"
    )
    assert statuses(seen[LIST]) == {200}
    assert answers.longest_s < 2 * ALONE_S


# --- the storage


@contextmanager
def full_disk(here: Live) -> Iterator[None]:
    """No file of the API's may grow beyond a few hundred KiB."""
    before = resource.prlimit(here.api, resource.RLIMIT_FSIZE)
    resource.prlimit(here.api, resource.RLIMIT_FSIZE, (FULL_BYTES, before[1]))
    try:
        yield
    finally:
        resource.prlimit(here.api, resource.RLIMIT_FSIZE, before)


@contextmanager
def gone(here: Live) -> Iterator[None]:
    away = here.storage.rename(here.storage.with_name("away"))
    try:
        yield
    finally:
        away.rename(here.storage)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "status"), [("full", 507), ("gone", 503)])
def test_a_storage_that_takes_nothing_is_told_and_what_is_sent_again_is_kept(
    here: Live, kind: str, status: int
) -> None:
    fault = full_disk(here) if kind == "full" else gone(here)
    with struck(here, f"storage {kind}", fault) as (_, seen):
        refused, seconds = upload(here, kind, 2 * FULL_BYTES)
    assert refused is not None
    assert (refused.status_code, seconds < ALONE_S) == (status, True)
    assert statuses(seen[LIST]) == {200}
    assert 200 in statuses(seen[READYZ]), "but where the machine is too busy to say so within its second"
    kept, _ = upload(here, kind, 2 * FULL_BYTES)
    assert kept is not None
    assert kept.status_code == 201
    assert [path.name for path in here.storage.rglob("*.part")] == []
