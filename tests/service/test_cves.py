"""What users of other services complain of, and their CVEs: each by its name, with the tests that show it not to be so here.

The table names tests wherever they stand; what is proven nowhere else is proven below. A test that is renamed, removed
or switched off takes its row with it.
"""

import ast
import gzip
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import time_machine
from celery import states
from sqlalchemy import Engine, event, make_url, text, update
from starlette.testclient import TestClient

from service.domain import deletion, job
from service.settings import Settings
from service.store import deletion_reads, deletions, jobs
from service.store.session import Sessions
from service.store.tables import Tenant
from tests.conftest import MASTER_KEY
from tests.service.conftest import JOBS, ClientOf
from tests.service.test_identity import routes, the_app

TESTS = Path(__file__).parents[1]
REQUESTS = "/v1/deletion-requests"


class Complaint(NamedTuple):
    row: int  # of the table of complaints in the contract
    name: str
    shown_by: tuple[str, ...]  # file::test, below tests/


HERE = "service/test_cves.py::"
API = "service/test_api_jobs.py::"
CONVENTIONS = "service/test_api_conventions.py::"
DELETIONS = "service/test_deletions.py::"
DELETION_PLANS = "service/test_deletion_plans.py::"
IDENTITY = "service/test_identity.py::"
STORE = "service/test_store_jobs.py::"
SWEEP = "service/test_sweep.py::"
WEBHOOKS = "service/test_webhooks.py::"
SENDING = "service/test_webhooks_sending.py::"

COMPLAINTS = (
    Complaint(
        1,
        "fides-4817-stuck-in-processing",
        (
            HERE + "test_fides_4817_every_status_leads_to_an_end",
            STORE + "test_lost_workers_are_bounded_and_are_not_the_jobs_fault",
            SWEEP + "test_a_lost_job_is_queued_and_rung_in_one_turn",
            API + "test_a_job_that_nobody_can_run_says_so",
        ),
    ),
    Complaint(1, "fides-6396-requeued-indefinitely", (STORE + "test_attempts_are_bounded",)),
    Complaint(
        1,
        "fides-6469-fides-6471-fidesops-1388-stuck-waiting-for-input",
        (
            DELETIONS + "test_what_is_denied_or_taken_back_is_purged",
            DELETIONS + "test_what_is_overdue_is_noted_once_and_counted",
            DELETION_PLANS + "test_a_plan_of_which_no_job_can_be_made_is_suspended_until_it_is_put_anew",
        ),
    ),
    Complaint(
        2,
        "fides-7525-fides-7684-watchdog-cancels-what-runs",
        (
            STORE + "test_a_beat_extends_the_lease_and_tells_of_a_cancel",
            "worker/test_supervise.py::test_an_attempt_outlives_a_database_that_is_away_for_less_than_the_lease",
            "service/test_store_transitions.py::test_where_each_verb_leads",
        ),
    ),
    Complaint(
        2,
        "fides-7785-watchdog-makes-duplicates",
        (
            SWEEP + "test_a_claim_in_the_making_is_passed_over",
            STORE + "test_many_workers_drain_the_queue_once",
            STORE + "test_who_lost_the_lease_writes_nothing",
            DELETION_PLANS + "test_two_sweeps_make_one_job",
        ),
    ),
    Complaint(
        3,
        "fides-8062-watchdog-loads-what-is-large",
        (
            HERE + "test_fides_8062_lists_and_the_sweep_read_no_large_column",
            API + "test_a_page_of_jobs_costs_as_many_queries_as_one",
            SWEEP + "test_leases_expire_while_the_storage_hangs_and_after_it_broke",
        ),
    ),
    Complaint(
        3,
        "fides-6975-fides-6304-fides-6375-out-of-memory",
        (
            "service/test_api_files.py::test_a_long_line_is_never_read_whole",
            "service/test_api_edge.py::test_a_body_over_the_limit_is_refused_while_it_arrives",
            "worker/test_supervise.py::test_a_kill_that_the_kernel_counted_as_want_of_memory",
        ),
    ),
    Complaint(
        4,
        "fides-8253-the-cause-is-in-the-servers-log-alone",
        (
            "worker/test_supervise.py::test_a_failure_with_its_reason",
            CONVENTIONS + "test_each_attempt_is_told_with_its_end",
        ),
    ),
    Complaint(4, "fides-2635-log-not-updated-after-a-retry", (CONVENTIONS + "test_a_job_that_failed_is_tried_again",)),
    Complaint(
        5,
        "fides-2311-fides-2079-fides-1203-cannot-reprocess",
        (
            CONVENTIONS + "test_a_job_that_failed_is_tried_again",
            DELETIONS + "test_a_job_that_is_tried_again_takes_its_request_along",
        ),
    ),
    Complaint(
        6,
        "fides-5500-session-lost-and-wrong-times",
        (
            HERE + "test_fides_5500_times_are_the_databases",
            "worker/test_supervise.py::test_an_attempt_outlives_a_database_that_is_away_for_less_than_the_lease",
            SWEEP + "test_the_process_survives_outages_and_stops_when_told",
            WEBHOOKS + "test_no_transaction_is_open_while_it_sends",
        ),
    ),
    Complaint(
        7, "fides-4905-403-without-the-scope", (IDENTITY + "test_a_role_reaches_the_routes_of_its_scopes_alone",)
    ),
    Complaint(
        8,
        "fides-3026-the-chart-does-not-work",
        (
            "service/test_compose.py::test_the_settings_accept_what_a_service_is_given",
            "service/test_compose.py::test_what_a_service_mounts_and_waits_for_exists",
            "service/test_compose.py::test_the_command_of_a_service_exists",
        ),
    ),
    Complaint(
        8,
        "fides-1587-health-of-the-workers",
        (
            "service/test_compose.py::test_every_process_that_exports_figures_is_a_target",
            "service/test_alerts.py::test_every_alert_is_tried_both_ways",
            CONVENTIONS + "test_workers_are_shown_with_what_they_do",
        ),
    ),
    Complaint(
        9,
        "cve-2025-57817-scope-escalation",
        (IDENTITY + "test_cve_2025_57817_a_key_makes_only_keys_with_scopes_of_its_own",),
    ),
    Complaint(
        9,
        "cve-2025-57816-rate-limit-bypass",
        (CONVENTIONS + "test_cve_2025_57816_no_header_of_the_client_opens_another_quota",),
    ),
    Complaint(9, "cve-2025-57815-brute-force", (CONVENTIONS + "test_cve_2025_57815_whoever_guesses_keys_is_stopped",)),
    Complaint(
        9,
        "cve-2025-57766-sessions-outlive-their-end",
        (
            IDENTITY + "test_a_revoked_or_expired_key_opens_nothing",
            IDENTITY + "test_a_token_that_is_not_meant_for_us_is_nobodys",
        ),
    ),
    Complaint(
        9,
        "cve-2023-46124-ssrf",
        (
            WEBHOOKS + "test_hostile_urls_are_refused_by_name",
            WEBHOOKS + "test_an_address_that_was_allowed_is_judged_again_when_it_is_called",
            SENDING + "test_an_address_that_is_not_public_is_refused_however_it_is_given",
            SENDING + "test_a_url_that_means_something_else_is_refused_before_anybody_is_asked",
            SENDING + "test_a_name_is_resolved_once_and_that_address_connected_to",
            SENDING + "test_a_redirect_is_a_failure_and_not_followed",
        ),
    ),
    Complaint(
        9,
        "cve-2024-45053-template-rce",
        (
            HERE + "test_cve_2024_45053_what_looks_like_a_template_is_text",
            "worker/test_report.py::test_what_a_user_wrote_stays_text",
            "worker/test_data.py::test_prompt_and_completion_are_literal",
            "test_boundaries.py::test_a_module_names_only_what_its_place_allows",
        ),
    ),
    Complaint(9, "cve-2023-37480-zip-bomb", (HERE + "test_cve_2023_37480_nothing_that_is_sent_is_unpacked",)),
    Complaint(
        9,
        "cve-2023-37481-yaml",
        (
            HERE + "test_cve_2023_37481_yaml_is_not_read",
            "service/test_api_edge.py::test_deep_nesting_is_no_server_error",
            "service/test_evidence.py::test_what_is_nested_too_deeply_is_refused",
        ),
    ),
    Complaint(
        9,
        "cve-2023-36827-path-traversal",
        (
            HERE + "test_cve_2023_36827_a_path_leads_to_no_file",
            "service/test_api_files.py::test_a_file_name_is_words_never_a_path",
            "service/test_store_storage.py::test_a_key_stays_below_the_root",
            "service/test_evidence.py::test_a_certificate_names_files_of_its_folder_alone",
            "worker/test_model.py::test_only_folders_below_the_models_root_are_read",
        ),
    ),
    Complaint(
        9,
        "cve-2023-46125-config-leak",
        (
            HERE + "test_cve_2023_46125_no_route_serves_the_configuration",
            "service/test_api_edge.py::test_a_failure_of_ours_tells_nothing_but_its_request_id",
        ),
    ),
    Complaint(
        9,
        "html-injection-in-reports",
        (
            "worker/test_report.py::test_what_a_user_wrote_stays_text",
            "worker/test_report.py::test_the_page_needs_nothing_from_anywhere",
            "service/test_api_results.py::test_the_report_comes_as_json_or_as_html_that_can_do_nothing",
            "service/test_api_edge.py::test_every_answer_carries_the_security_headers",
        ),
    ),
    Complaint(
        9,
        "ghsa-qx5f-a-duplicate-skips-verification",
        (
            HERE + "test_ghsa_qx5f_a_duplicate_waits_for_an_approval_of_its_own",
            DELETIONS + "test_the_database_refuses_the_submitter",
        ),
    ),
    Complaint(
        10,
        "openai-python-173-openai-python-293-pending-for-ever",
        (
            CONVENTIONS + "test_a_place_in_the_line_is_that_of_the_claim",
            API + "test_a_job_that_nobody_can_run_says_so",
            API + "test_a_job_that_rests_says_until_when_and_is_not_in_the_line",
        ),
    ),
    Complaint(
        10,
        "openai-python-461-openai-python-658-stream-interrupted",
        (
            CONVENTIONS + "test_a_stream_goes_on_where_it_broke_off",
            CONVENTIONS + "test_events_are_streamed_until_the_job_has_ended",
        ),
    ),
    Complaint(
        11, "openai-66085-statuses-not-documented", (HERE + "test_openai_66085_every_status_is_in_the_specification",)
    ),
    Complaint(
        12,
        "openai-polling-eats-the-rate-limit",
        (
            CONVENTIONS + "test_a_poll_may_wait_for_a_change",
            CONVENTIONS + "test_what_has_not_changed_is_not_sent_again",
            CONVENTIONS + "test_a_stream_comes_at_once_is_counted_and_holds_nobody_up",
        ),
    ),
    Complaint(12, "openai-no-priority", (STORE + "test_claims_go_by_priority_then_due_date_then_age",)),
    Complaint(
        13,
        "openai-the-service-is-being-closed",
        (
            "service/test_local.py::test_it_comes_up_whole_and_ctrl_c_leaves_nothing",
            "service/test_api_edge.py::test_the_documentation_opens_without_network_and_names_everything",
        ),
    ),
    Complaint(
        14,
        "celery-duplicates",
        (
            STORE + "test_two_workers_at_once_get_different_jobs",
            "worker/test_supervise.py::test_who_is_fenced_out_kills_its_runner_and_writes_nothing_more",
        ),
    ),
    Complaint(
        14,
        "celery-lost-tasks",
        (
            SWEEP + "test_it_rings_what_waits_and_not_at_every_turn",
            "service/test_crash_points.py::test_a_job_is_there_with_all_that_belongs_to_it_or_not_at_all",
        ),
    ),
    Complaint(
        14,
        "celery-deaf-workers",
        (
            "worker/test_worker_app.py::test_without_a_broker_it_polls_and_still_hears_signals",
            SWEEP + "test_a_broker_that_came_back_is_rung_again",
        ),
    ),
    Complaint(
        14,
        "celery-lost-revokes",
        (
            STORE + "test_cancel_against_success",
            "worker/test_supervise.py::test_a_runner_that_ignores_the_cancel",
        ),
    ),
    Complaint(
        15,
        "nemo-percentage-never-reaches-100",
        (API + "test_a_run_that_ended_early_is_complete_and_names_its_results",),
    ),
    Complaint(
        16,
        "opendsr-no-failed-no-partial-no-pages",
        (
            DELETIONS + "test_it_is_completed_when_a_job_has_passed_for_every_model",
            DELETIONS + "test_a_person_closes_what_failed",
            DELETIONS + "test_a_batch_answers_for_each",
            DELETIONS + "test_lists_have_filters_and_pages",
        ),
    ),
    Complaint(
        16,
        "opendsr-signature-tied-to-a-certificate-authority",
        (
            "service/test_evidence.py::test_it_needs_neither_a_database_nor_a_server_nor_a_network",
            "service/test_evidence.py::test_another_library_reads_our_keys_and_finds_our_signature",
        ),
    ),
    Complaint(
        17,
        "hirundo-states-of-celery-leak",
        (HERE + "test_hirundo_no_state_of_celery_is_in_the_specification", SWEEP + "test_a_bell_carries_nothing"),
    ),
    Complaint(
        17,
        "hirundo-no-evidence",
        ("service/test_evidence_routes.py::test_a_certificate_holds_offline_and_one_byte_is_named",),
    ),
)


@pytest.mark.parametrize("complaint", COMPLAINTS, ids=lambda complaint: complaint.name)
def test_it_is_shown_by_tests_that_run(complaint: Complaint) -> None:
    assert complaint.shown_by
    for name in complaint.shown_by:
        file, _, test = name.partition("::")
        marks = functions_of(TESTS / file).get(test)
        assert marks is not None, f"{name} is not there"
        assert not marks & {"skip", "xfail", "slow"}, f"{name} is switched off"


def test_every_row_of_the_table_is_there_under_names_of_its_own() -> None:
    assert {complaint.row for complaint in COMPLAINTS} == set(range(1, 18))
    assert len({complaint.name for complaint in COMPLAINTS}) == len(COMPLAINTS)
    named = {test for complaint in COMPLAINTS for test in complaint.shown_by if test.startswith(HERE)}
    by_name = {
        test for test in functions_of(Path(__file__)) if test.startswith(("test_cve", "test_fides", "test_ghsa"))
    }
    assert {HERE + test for test in by_name} <= named, "what is proven here has its row"


@cache
def functions_of(file: Path) -> Mapping[str, frozenset[str]]:
    """The test functions of a file, read and not imported: name -> the marks upon it."""
    tree = ast.parse(file.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {function.name: frozenset(_marks(function)) for function in functions}


def _marks(function: ast.FunctionDef) -> Iterator[str]:
    for decorator in function.decorator_list:
        yield from (node.attr for node in ast.walk(decorator) if isinstance(node, ast.Attribute))


# --- what is shown nowhere else


@pytest.mark.parametrize(
    ("moves", "ends"),
    [(job.TRANSITIONS, job.TERMINAL), (deletion.TRANSITIONS, deletion.CLOSED)],
    ids=["job", "request"],
)
def test_fides_4817_every_status_leads_to_an_end(
    moves: Mapping[StrEnum, frozenset[StrEnum]], ends: frozenset[StrEnum]
) -> None:
    for status in moves:
        reached, before = {status}, set[StrEnum]()
        while reached != before:
            before = reached
            reached = reached | {target for one in reached for target in moves[one]}
        assert reached & ends, status
    assert {status for status in moves if not moves[status]} <= ends, "no dead end that is no end"


@pytest.fixture
def statements(engine: Engine) -> Iterator[list[str]]:
    """What is asked of the database of `sessions`, as it is asked."""
    told: list[str] = []

    def tell(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        told.append(statement)

    event.listen(engine, "before_cursor_execute", tell)
    yield told
    event.remove(engine, "before_cursor_execute", tell)


def test_fides_8062_lists_and_the_sweep_read_no_large_column(
    http: TestClient, sessions: Sessions, statements: list[str], request_body: dict[str, Any]
) -> None:
    asked = {"regulation": "gdpr", "models": ["m"], "forget_set": request_body["forget_set"]}
    assert http.post(REQUESTS, json=asked).status_code == 201
    assert http.post(JOBS, json=request_body).status_code == 201
    statements.clear()
    with sessions.begin() as s:
        s.execute(text("UPDATE deletion_requests SET due_at = now() - interval '1 s'"))
        assert len(deletions.note_overdue(s)) == 1
        assert len(deletion_reads.page(s)[0]) == 1
        assert jobs.expire(s, 10) == []
        assert jobs.due_classes(s, 1e-6) == ["any"]
    read = [statement for statement in statements if statement.startswith("SELECT")]
    assert len(read) > 4
    for column in ("row_digests", "subject_digests"):  # one per row of the set
        assert not any(column in statement.partition("FROM")[0] for statement in read), column


def test_fides_5500_times_are_the_databases(http: TestClient, request_body: dict[str, Any]) -> None:
    with time_machine.travel(datetime(2001, 1, 1, tzinfo=UTC)):  # a machine whose clock stands wrong
        shown = http.post(JOBS, json=request_body).json()
        shown = http.post(shown["links"]["cancel"]).json()
    times = [datetime.fromisoformat(shown[name]) for name in ("created_at", "updated_at", "finished_at")]
    events = http.get(shown["links"]["events"]).json()["data"]
    times += [datetime.fromisoformat(one["created_at"]) for one in events]
    assert all(abs(datetime.now(UTC) - when) < timedelta(minutes=1) for when in times), times


HOSTILE = "{{7*7}} ${7*7} #{7*7} <%= 7*7 %> {0.__class__} %(x)s {% for x in ().__class__.__base__.__subclasses__() %}"


def test_cve_2024_45053_what_looks_like_a_template_is_text(http: TestClient, request_body: dict[str, Any]) -> None:
    body = request_body | {"metadata": {"note": HOSTILE}, "external_id": HOSTILE[:64]}
    body["forget_set"] = [{"question": HOSTILE, "answer": HOSTILE}]
    made = http.post(JOBS, json=body)
    assert (made.status_code, made.json()["metadata"], made.json()["external_id"]) == (
        201,
        body["metadata"],
        HOSTILE[:64],
    )
    refused = http.post(JOBS, json=body | {"model": HOSTILE[:20]})
    assert refused.status_code == 422
    problem = {
        name: value for name, value in refused.json().items() if name != "request_id"
    }  # which may have any digits
    assert "49" not in json.dumps(problem)


def test_cve_2023_37480_nothing_that_is_sent_is_unpacked(http: TestClient, request_body: dict[str, Any]) -> None:
    body = json.dumps(request_body).encode()
    for media in ("gzip", "deflate"):
        packed = {"Content-Type": "application/json", "Content-Encoding": media}
        assert http.post(JOBS, content=gzip.compress(body), headers=packed).status_code == 400, "it is not what it says"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packer:
        packer.writestr("forget.jsonl", b'{"text": "a"}\n' * 500_000)
    for name, content in (("f.zip", archive.getvalue()), ("f.jsonl.gz", gzip.compress(b'{"text": "a"}\n'))):
        for media in ("application/zip", "application/gzip", "application/x-ndjson"):
            sent = {"file": (name, content, media)}
            assert http.post("/v1/files", data={"purpose": "forget_set"}, files=sent).status_code == 422, name
    assert http.get("/v1/files").json()["data"] == []


def test_cve_2023_37481_yaml_is_not_read(http: TestClient) -> None:
    bomb = b"a: &a [x, x]\nb: &b [*a, *a]\nc: !!python/object/apply:os.system [id]\n"
    for media in ("application/yaml", "application/x-yaml", "text/yaml"):
        assert http.post(JOBS, content=bomb, headers={"Content-Type": media}).status_code == 415
    assert http.post(JOBS, content=bomb, headers={"Content-Type": "application/json"}).status_code == 400
    sent = {"file": ("f.yaml", bomb, "application/yaml")}
    assert http.post("/v1/files", data={"purpose": "forget_set"}, files=sent).status_code == 422


TRAVERSALS = ("../../../../etc/passwd", "..%2f..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "..%5c..%5cetc")


def test_cve_2023_36827_a_path_leads_to_no_file(http: TestClient) -> None:
    gets = [path for method, path, _ in routes(the_app(http)) if method == "GET" and "{" in path]
    assert len(gets) > 10
    for path in gets:
        before, _, rest = path.partition("{")
        after = rest.partition("}")[2]
        for hostile in TRAVERSALS:
            reply = http.get(f"{before}{hostile}{after}")
            assert reply.status_code in (404, 422), f"{path} with {hostile}: {reply.status_code}"
            assert "root:" not in reply.text


def test_cve_2023_46125_no_route_serves_the_configuration(settings: Settings, client_of: ClientOf) -> None:
    """To an administrator, who may do anything, and where the database is away, neither."""
    url = make_url(settings.database_url).set(password="hunter2-of-the-database")
    there = settings.model_copy(update={"database_url": url.render_as_string(hide_password=False)})
    away = there.model_copy(update={"database_url": str(there.database_url).replace("host=", "host=/nowhere")})
    secret = (MASTER_KEY, "hunter2", settings.broker_url, settings.broker_url.rpartition("/")[0], settings.storage_url)
    for configured in (there, away):
        with client_of(configured) as http:
            paths = sorted({path for method, path, _ in routes(the_app(http)) if method == "GET"})
            assert {"/readyz", "/metrics", "/openapi.json", "/v1/api-keys"} <= set(paths)
            for path in (*paths, "/v1/config", "/api/v1/config", "/.env", "/debug"):
                reply = http.get(path)
                told = f"{dict(reply.headers)} {reply.text}"
                assert not [one for one in secret if one in told], path
                assert reply.status_code != 500, path


def test_ghsa_qx5f_a_duplicate_waits_for_an_approval_of_its_own(
    http: TestClient, sessions: Sessions, make_key: Any, request_body: dict[str, Any]
) -> None:
    with sessions.begin() as s:
        s.execute(update(Tenant).values(approvals=1))
    asked = {"regulation": "gdpr", "models": ["m"], "forget_set": request_body["forget_set"]}
    asked |= {"subjects": ["ada@example.org"], "external_reference": "T-1"}
    approver = {"Authorization": f"Bearer {make_key('compliance_approver')}"}
    first = http.post(REQUESTS, json=asked).json()
    approved = http.post(f"{REQUESTS}/{first['id']}/approve", headers=approver).json()
    duplicate = http.post(REQUESTS, json=asked).json()
    assert (approved["status"], duplicate["status"], duplicate["approvals"]) == ("approved", "pending_approval", [])
    body = request_body | {"deletion_requests": [duplicate["id"]]}
    assert http.post(JOBS, json=body).status_code == 422, "no job serves it"


@pytest.fixture
def specification(http: TestClient) -> dict[str, Any]:
    return dict(http.get("/openapi.json").json())


def enums(schema: Any) -> Iterator[frozenset[str]]:
    if isinstance(schema, dict):
        values = schema.get("enum", [schema["const"]] if isinstance(schema.get("const"), str) else [])
        yield frozenset(value for value in values if isinstance(value, str))
        for below in schema.values():
            yield from enums(below)
    elif isinstance(schema, list):
        for below in schema:
            yield from enums(below)


@pytest.mark.parametrize(("table", "status"), [("jobs", job.Status), ("deletion_requests", deletion.RequestStatus)])
def test_openai_66085_every_status_is_in_the_specification(
    table: str, status: type[StrEnum], specification: dict[str, Any], sessions: Sessions
) -> None:
    assert frozenset(map(str, status)) in set(enums(specification["components"]["schemas"]))
    named = (
        f"SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = '{table}'::regclass AND contype = 'c'"
    )
    with sessions() as s:
        [check] = [one for one in s.scalars(text(named)) if one.startswith("CHECK ((status = ANY")]
    assert set(check.split("'")[1::2]) == set(map(str, status)), "and nothing else can be stored"


def test_hirundo_no_state_of_celery_is_in_the_specification(specification: dict[str, Any]) -> None:
    told = {value for values in enums(specification) for value in values}
    assert "succeeded" in told
    assert not told & (states.ALL_STATES | {state.lower() for state in states.ALL_STATES} - {"pending", "received"})
