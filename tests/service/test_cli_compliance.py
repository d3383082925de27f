"""The command line as a compliance team uses it: who may, what is told of a mistake, what is found again later."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import Result

from service.domain.deletion import DenialReason
from service.domain.identity import ROLES
from service.store.session import Sessions
from tests.service import test_cli
from tests.service.deleting import FAILED, Desk, approvals  # noqa: F401  a fixture

run = test_cli.run
url = test_cli.url  # an API with one model, "m"; the environment has an administrator's key
sets = test_cli.sets
Run = Callable[..., Result]


@pytest.fixture
def over(run: Run, url: str) -> Run:
    """run(...) with the API's address."""
    return lambda *arguments: run(*arguments, "--url", url)


@pytest.fixture
def submit(over: Run, sets: list[object]) -> Run:
    return lambda *options: over("requests", "submit", "--regulation", "gdpr", "--model", "m", *sets[:2], *options)


def test_a_request_is_approved_by_somebody_else_and_its_rows_are_found_after_the_purge(
    over: Run,
    submit: Run,
    sets: list[object],
    approvals: Callable[[int], None],  # noqa: F811
    make_key: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    sessions: Sessions,
) -> None:
    approvals(1)
    request_id = submit("--reference", "DSR-1").stdout.strip()
    own = over("requests", "approve", request_id)
    assert (own.exit_code, "who submitted a request does not approve it" in own.stderr) == (2, True)
    monkeypatch.setenv("UNLEARN_API_KEY", make_key("compliance_submitter"))
    desk = over("requests", "approve", request_id)
    assert (desk.exit_code, "it needs: requests:approve" in desk.stderr) == (2, True)
    monkeypatch.setenv("UNLEARN_API_KEY", make_key("compliance_approver"))
    assert over("requests", "approve", request_id).stdout == "approved\n"
    rows = over("requests", "rows", request_id).stdout
    assert re.fullmatch(r"1  [0-9a-f]{64}\n", rows)
    monkeypatch.setenv("UNLEARN_API_KEY", make_key("mlops"))
    serving = over("submit", "--model", "m", *sets, "--epsilon", 1, "--serves", request_id)
    assert serving.exit_code == 0, serving.output
    Desk(sessions).end()
    monkeypatch.setenv("UNLEARN_API_KEY", make_key("compliance_approver"))
    assert over("requests", "list", "--reference", "DSR-1").stdout.split()[:2] == [request_id, "completed"]
    assert over("requests", "list", "--reference", "DSR-2").stdout == ""
    assert over("requests", "rows", request_id).stdout == rows


def test_a_reference_that_comes_twice_is_told_with_the_request_that_has_it(over: Run, submit: Run) -> None:
    first = submit("--reference", "DSR-1")
    assert first.stderr == ""
    second = submit("--reference", "DSR-1")
    assert f"warning: {first.stdout.strip()} (approved) has the reference DSR-1" in second.stderr
    assert second.stdout.strip() not in second.stderr
    for one in (first, second):
        over("requests", "cancel", one.stdout.strip())
    assert submit("--reference", "DSR-1").stderr == ""


def test_a_warning_that_cannot_be_had_costs_nobody_the_requests_id(
    over: Run, submit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    scopes = [option for scope in ("requests:create", "files:write") for option in ("--scope", scope)]
    monkeypatch.setenv("UNLEARN_API_KEY", over("keys", "create", "form", *scopes).stdout.strip())
    for _ in range(2):
        sent = submit("--reference", "DSR-1")
        assert (sent.exit_code, sent.stdout[:5], sent.stderr) == (0, "dreq_", "")


def test_a_request_that_failed_says_why_in_the_list(
    over: Run, submit: Run, sets: list[object], sessions: Sessions
) -> None:
    request_id = submit("--reference", "DSR-1").stdout.strip()
    job_id = over("submit", "--model", "m", *sets, "--epsilon", 1, "--serves", request_id).stdout.strip()
    Desk(sessions).end(FAILED)
    line = over("requests", "list").stdout
    assert re.fullmatch(rf"{request_id}  failed  due \S+  DSR-1  job {job_id} [^\n]*the verdict is FAILED\n", line)


def test_a_request_that_failed_is_requeued(over: Run, submit: Run, sets: list[object], sessions: Sessions) -> None:
    request_id = submit().stdout.strip()
    over("submit", "--model", "m", *sets, "--epsilon", 1, "--serves", request_id)
    Desk(sessions).end(FAILED)
    assert over("requests", "requeue", request_id).stdout == "approved\n"


def test_a_request_for_a_row_that_a_plan_retains_is_warned_of_it(
    over: Run, submit: Run, sets: list[object], tmp_path: Path
) -> None:
    assert submit().stderr == ""
    set_plan = over("plans", "set", "m", "--retain", tmp_path / "forget.jsonl", "--epsilon-relative", 1)
    assert set_plan.exit_code == 0, set_plan.output
    sent = submit()
    assert (sent.exit_code, sent.stdout[:5]) == (0, "dreq_")
    assert sent.stderr.startswith("warning: rows of the forget set that the deletion plan of model 'm' retains: 1 ")
    request_id = sent.stdout.strip()
    assert over("requests", "requeue", request_id, "--leave-out-retained").stdout == "approved\n"
    assert json.loads(over("requests", "show", request_id).stdout)["leave_out_retained"] is True


def test_a_deadline_is_extended_once_and_told(over: Run, submit: Run) -> None:
    request_id = submit().stdout.strip()
    due = json.loads(over("requests", "show", request_id).stdout)["due_at"]
    extended = over("requests", "extend", request_id, "--reason", "many rows").stdout.strip()
    assert datetime.fromisoformat(extended) > datetime.fromisoformat(due)
    again = over("requests", "extend", request_id, "--reason", "many rows")
    assert (again.exit_code, "can be once" in again.stderr) == (2, True)


def test_a_list_of_keys_says_which_ones_end(over: Run) -> None:
    ends = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    assert (
        over("keys", "create", "guest", "--role", "auditor", "--expires", f"{ends:%Y-%m-%dT%H:%M:%SZ}").exit_code == 0
    )
    lines = over("keys", "list").stdout.splitlines()
    assert [f"expires {ends:%Y-%m-%dT%H:%M:%SZ}" in line for line in lines] == ["guest" in line for line in lines]
    assert any("guest" in line for line in lines)


def test_help_names_every_role_and_every_reason(run: Run) -> None:
    for command, words in (
        (("keys", "create"), ROLES),
        (("tenants", "key"), ROLES),
        (("requests", "deny"), DenialReason),
    ):
        told = re.sub(r"\s+", " ", run(*command, "--help").stdout)
        assert ", ".join(words) in told


# --- mistakes


def test_each_fault_is_told_once(over: Run, submit: Run, tmp_path: Path) -> None:
    (tmp_path / "forget.jsonl").write_text("What is this?\n{}\n")
    refused = submit()
    assert refused.exit_code == 2
    assert refused.stderr.splitlines() == [
        "error: The request cannot be carried out as written (422)",
        "  /file: line 1: not JSON in UTF-8",
        "  /file: line 2: lacks question and answer, or prompt and completion, or text",
    ]
    unknown = over("requests", "list", "--status", "lost")
    assert re.fullmatch(r"error: [^\n]* \(422\)\n  status: [^\n]*\n", unknown.stderr)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:1", "Connection refused"),
        ("127.0.0.1:8000", "protocol"),
        ("http://localhost:port", "Invalid port"),
    ],
)
def test_where_nobody_answers_the_address_is_told_and_how_to_give_another(
    run: Run, address: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNLEARN_API_KEY", "ulk_x")
    refused = run("requests", "list", "--url", address)
    assert refused.exit_code == 2
    for part in (address, words, "--url or UNLEARN_URL"):
        assert part in refused.stderr


def test_a_key_with_a_line_end_is_read_and_one_that_cannot_be_sent_is_not_shown(
    over: Run, make_key: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make_key("auditor")
    monkeypatch.setenv("UNLEARN_API_KEY", f"{key}\n")
    assert over("requests", "list").exit_code == 0
    for spoilt in (f"{key}é", f"{key}\n{key}", f"{key} x"):
        monkeypatch.setenv("UNLEARN_API_KEY", spoilt)
        refused = over("requests", "list")
        assert (refused.exit_code, "UNLEARN_API_KEY" in refused.stderr, key in refused.output) == (2, True, False)
    monkeypatch.delenv("UNLEARN_API_KEY")
    assert "unlearn keys create" in over("requests", "list").stderr


def test_an_empty_id_is_told_before_anything_is_asked(over: Run) -> None:
    for command in (["requests", "approve", ""], ["keys", "revoke", ""], ["plans", "remove", ""]):
        refused = over(*command)
        assert (refused.exit_code, refused.stderr) == (2, "error: an id or a name is empty\n"), command


def test_what_cannot_be_fetched_leaves_nothing(
    over: Run, sets: list[object], make_key: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert over("evidence", "ujob_x", "--out", tmp_path / "evidence").exit_code == 2
    waits = over("submit", "--model", "m", *sets, "--epsilon", 1).stdout.strip()
    assert f"{waits} has no adapter" in over("evidence", waits, "--out", tmp_path / "evidence").stderr
    assert "there is no folder" in over("audit", "export", "--out", tmp_path / "none" / "audit.jsonl").stderr
    monkeypatch.setenv("UNLEARN_API_KEY", make_key("compliance_approver"))
    refused = over("audit", "export", "--out", tmp_path / "audit.jsonl")
    assert (refused.exit_code, "audit:read" in refused.stderr) == (2, True)
    assert not [path.name for path in tmp_path.iterdir() if path.name in ("evidence", "none") or "audit" in path.name]


def test_a_database_that_cannot_be_reached_is_told_with_the_setting_that_names_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in ("postgresql+psycopg://u@/db?host=/nowhere", "postgresql://u@/db", "nowhere"):
        monkeypatch.setenv("DATABASE_URL", address)
        refused = run("tenants", "list")
        assert (refused.exit_code, "DATABASE_URL" in refused.stderr) == (2, True), refused.output


def test_who_stops_watching_is_told_that_the_job_goes_on(over: Run, url: str, sets: list[object]) -> None:
    job_id = over("submit", "--model", "m", *sets, "--epsilon", 1).stdout.strip()
    command = [sys.executable, "-m", "service.cli", "watch", job_id, "--url", url]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    assert watching.stdout.readline()  # the job as it was found
    watching.send_signal(signal.SIGINT)
    told = watching.communicate(timeout=30)[1]
    assert (watching.returncode, f"{job_id} goes on" in told) == (130, True), told
    assert json.loads(over("status", job_id).stdout)["status"] == "queued"
