"""A row of a report and the same row of a deletion request have one digest, which only the service's key can make."""

import hashlib
import hmac
import json
from pathlib import Path
from typing import NamedTuple

import pytest

from service.domain.deletion import DeletionCreate
from service.domain.job import Constraint, JobSpec, MethodChoice, ModelEntry, PromptFormat
from service.domain.rows import Example
from service.evidence import canonical
from service.settings import Settings
from service.store import deletion_jobs, deletion_reads, deletions, digests, files, jobs, models
from service.store.secrets import Secrets, secrets_of
from service.store.session import Sessions
from service.store.storage import Storage
from service.store.tenants import DEFAULT
from tests.conftest import MASTER_KEY
from worker import evaluate, registry
from worker.assignment import assignment
from worker.files import read_set
from worker.records import Assignment
from worker.suite import Result

SUBJECT = "ada@example.org"
ROWS = [
    Example("question", "Who is Ada?", "A \u201cpoet\u201d,\nand no\tbaker."),
    Example("prompt", "Ada lives in", " Ghent."),
    Example("text", "", "Ada \\ \x01 \U0001f600 \u2028 \x7f"),
]
# The same three with a blank line between them, in other spellings, and beside columns that change nothing of the row
LINES = [
    b'{"answer": "A \\u201cpoet\\u201d,\\nand no\\tbaker.", "question": "Who is Ada?", "paraphrased_question": "Ada?"}\n',
    b"\n",
    b'{"prompt": "Ada lives in", "completion": " Ghent.", "source": 7}\n',
    json.dumps({"text": ROWS[2].answer}, ensure_ascii=False).encode() + b"\n",
]


class Told(NamedTuple):
    request: str
    file: files.Kept
    job: Assignment


@pytest.fixture
def told(sessions: Sessions, settings: Settings, tmp_path: Path) -> Told:
    """A request for two of the rows, a job that serves it, and what its runner is told."""
    storage, secrets = Storage(settings.storage_url), secrets_of(settings)
    forget = files.keep(storage, secrets, DEFAULT, "f.jsonl", LINES)
    retain = files.keep(storage, secrets, DEFAULT, "r.jsonl", [b'{"text": "Bob bakes."}\n'])
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="m", source="path", location="m", prompt_format=PromptFormat()))
        sets = {
            purpose: files.insert(s, kept, purpose=purpose, rows=rows).id
            for purpose, kept, rows in (("forget_set", forget, 3), ("retain_set", retain, 1))
        }
        asked = DeletionCreate.model_validate(
            {"regulation": "gdpr", "models": ["m"], "subjects": [SUBJECT], "forget_set": sets["forget_set"]}
        )
        found = digests.row_digests(secrets, DEFAULT, [ROWS[2], ROWS[0]])
        request = deletions.create(s, asked, forget_set=sets["forget_set"], rows=[*found], subjects=[])
        spec = JobSpec(model="m", method=MethodChoice(type="pdu"), constraint=Constraint(epsilon=1.0), **sets)
        deletion_jobs.serve(s, jobs.create(s, spec), {request.id: [1, 3]})
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        return Told(request.id, forget, assignment(s, claim, spec, settings, tmp_path, on_accelerator=False))


def reported(job: Assignment) -> dict[int, str | None]:
    """Row number -> digest, as the report has them when the runner could measure rows 1 and 3."""
    storage = Storage(job.storage_url)
    rows = {"forget": read_set(storage, job.forget_file), "retain": read_set(storage, job.retain_file)}
    places = {"forget": [0, 2], "retain": [0]}
    request = evaluate.Request(registry.build("suites", "request", {}), {}, places)
    seen = {f"{of}/probability": Result(0.5, dict.fromkeys(range(len(its)), 0.5)) for of, its in places.items()}
    points = evaluate.row_points(request, seen, seen, rows, job.row_key)["forget/probability"]
    return {point.row: point.digest for point in points}


def test_a_row_of_the_report_is_found_in_the_request_also_when_both_texts_are_gone(
    told: Told, sessions: Sessions, settings: Settings
) -> None:
    handed_over = Assignment.model_validate_json(told.job.model_dump_json())  # as a file, see worker.supervise
    of_report = reported(handed_over)
    with sessions.begin() as s:
        jobs.request_cancel(s, told.job.job_id)
        assert jobs.cancelled(s, told.job.job_id, told.job.fence)
        deletions.cancel(s, told.request)
        Storage(settings.storage_url).delete(files.purge(s, told.file.file_id))
    with sessions.begin() as s:
        of_request = deletion_reads.with_digests(s, told.request).row_digests
    assert of_request == [of_report[3], of_report[1]]
    assert of_report.keys() == {1, 3}


def test_the_runner_has_a_key_of_rows_alone(told: Told, settings: Settings) -> None:
    """Neither the master key, nor what people, files or another tenant's rows are digested with."""
    secrets, key = secrets_of(settings), told.job.row_key
    handed_over = told.job.model_dump_json()
    assert MASTER_KEY not in handed_over
    assert key.hex() not in repr(told.job)

    def mac(content: bytes) -> str:
        return hmac.new(key, content, hashlib.sha256).hexdigest()

    assert mac(canonical.dumps({"text": ROWS[2].answer})) == reported(told.job)[3], "it is the key of rows"
    assert mac(SUBJECT.encode()) != digests.subject_digest(secrets, DEFAULT, SUBJECT)
    assert told.file.digest != f"hmac-sha256:{mac(b''.join(LINES))}"
    assert key != digests.row_key(secrets, "other")


def test_another_master_key_gives_other_digests() -> None:
    ours, theirs = (Secrets(bytes([number]) * 32) for number in (1, 2))
    assert list(digests.row_digests(ours, DEFAULT, ROWS)) != list(digests.row_digests(theirs, DEFAULT, ROWS))
