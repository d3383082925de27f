"""The main flow in this process, on a tiny model: every method to its report, every way to fail, and no text in either."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.domain import scores
from service.domain.errors import JobFailure
from service.domain.job import (
    RETRYABLE,
    Audit,
    Budget,
    Constraint,
    FailureCode,
    Gate,
    JobSpec,
    MethodChoice,
    ModelEntry,
    Stage,
)
from service.domain.report import Report
from service.domain.rows import Example
from service.evidence.rowdigest import row_digests
from service.store import sealed
from service.store.storage import Storage
from tests.worker.conftest import DATA_KEY, stored_set
from worker import benchmarks, model, registry, run
from worker.diary import Diary
from worker.records import (
    Assignment,
    BenchmarkAssignment,
    CancelledRecord,
    FailureRecord,
    Record,
    ResultRecord,
    StageRecord,
    StepRecord,
    WarningRecord,
    Word,
    parse_record,
)
from worker.suite import Result
from worker.words import of_every_job

ROOT = Path(__file__).parents[2]
ROW_KEY = bytes(range(32))
CANARY = "Zanzibar"  # stands in every row, and must stand nowhere else
FORGET = [{"question": f"Where is {CANARY} {k}?", "answer": f"In {CANARY} {k * 7}."} for k in range(3)]
RETAIN = [{"question": f"What is {CANARY} x{k}?", "answer": f"It is {CANARY} {k}{k}."} for k in range(4)]
METHODS = sorted(registry.entries("methods"))
ONE_OF_EACH_SOLVER = ("pdu", "grad_diff", "blur_npo", "ofmu", "eupmu")  # the others are nightly
Assign = Callable[..., Assignment]


@pytest.fixture
def assign(register: Any, tmp_path: Path) -> Assign:
    """assign(method, hyperparameters, forget=..., retain=..., **spec) -> the job as the supervisor hands it over."""
    storage, registered = Storage(str(tmp_path / "storage")), register()
    storage.create()

    def build(
        method: str = "pdu",
        hyperparameters: Mapping[str, Any] = {},
        forget: list[Any] = FORGET,
        retain: list[Any] = RETAIN,
        holdout: list[Any] | None = None,
        tofu: Mapping[str, Any] | None = None,
        **spec: Any,
    ) -> Assignment:
        (tmp_path / "scratch").mkdir(exist_ok=True)
        named = (
            [
                BenchmarkAssignment(
                    name="tiny-tofu",
                    suite="tofu",
                    corpus="made up",
                    folder="benchmarks/default/tiny-tofu",
                    files={name: stored_set(storage, f"tofu-{name}", rows) for name, rows in tofu.items()},
                    retrained_model=registered.entry,
                )
            ]
            if tofu
            else []
        )
        asked: dict[str, Any] = {
            "constraint": Constraint(epsilon_relative=3.0),
            "budget": Budget(max_steps=4),
            "forget_set": "ufile_" + 32 * "0",
            "retain_set": "ufile_" + 32 * "1",
        }
        choice = MethodChoice(type=method, hyperparameters=dict(hyperparameters))
        return Assignment(
            job_id="ujob_1",
            attempt=1,
            fence=1,
            spec=JobSpec(model="tiny-model", method=choice, **asked | spec),
            model=registered.entry,
            forget_file=stored_set(storage, "forget", forget),
            retain_file=stored_set(storage, "retain", retain),
            holdout_file=stored_set(storage, "holdout", holdout) if holdout else None,
            benchmarks=named,
            row_key=b64encode(ROW_KEY),
            storage_url=str(tmp_path / "storage"),
            prefix="jobs/ujob_1/attempts/1",
            models_root=registered.root,
            scratch_dir=tmp_path / "scratch",
            device="cpu",
            dtype="float32",
        )

    return build


def done(job: Assignment, asked: Callable[[], Word | None] = lambda: None) -> tuple[Record, list[Record]]:
    told: list[Record] = []
    last = run.last_record(job, told.append, asked)
    assert CANARY not in "".join(record.model_dump_json() for record in [last, *told]), "a row's text"
    return last, told


def report_of(job: Assignment) -> Report:
    content = b"".join(Storage(job.storage_url).read(f"{job.prefix}/report.json"))
    assert CANARY.encode() not in content
    return Report.model_validate_json(content)


@pytest.mark.parametrize(
    "method", [m if m in ONE_OF_EACH_SOLVER else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_every_method_comes_to_a_report(assign: Assign, method: str) -> None:
    job = assign(method, {"learning_rate": 1e-3})
    last, told = done(job)
    assert isinstance(last, ResultRecord), last
    steps = [record for record in told if isinstance(record, StepRecord)]
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert all(step.losses.keys() == {"forget", "retain"} for step in steps)
    report = report_of(job)
    assert steps[0].losses["retain"] == pytest.approx(report.constraint.before, rel=1e-4), "the NLL, on the whole set"
    assert report.asked.composition.model_dump() == registry.composition(registry.build_method(method, {}))
    assert report.trajectory.checks_total >= 1
    assert report.verdict.gates[0].metric == "retain_nll"
    assert [(one.model, one.equivalent) for one in report.knowledge] == [("base", None)], "why it was trained"
    if report.released.published:
        assert report.constraint.upper is not None
        assert report.constraint.upper <= report.constraint.epsilon
        config = json.loads(b"".join(Storage(job.storage_url).read(f"{job.prefix}/adapter/adapter_config.json")))
        layers = sorted(registry.build_method(method, {}).layers(2))
        assert config["layers_to_transform"] == (None if layers == [0, 1] else layers)


def perturbed(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    wrong = [f"It is {CANARY} {k}." for k in range(2)]
    return [row | {"paraphrased_answer": f"{row['answer']} So.", "perturbed_answer": wrong} for row in rows]


HOLDOUT = [{"question": f"Who knows {CANARY} h{k}?", "answer": f"Nobody knows {CANARY} {k}."} for k in range(3)]
TOFU = {
    "forget": perturbed(FORGET),
    "retain": perturbed(RETAIN),
    "real_authors": perturbed(RETAIN),
    "world_facts": perturbed(RETAIN),
    "holdout": HOLDOUT,
}


def test_benchmarks_audit_and_gates_come_to_the_report(assign: Assign) -> None:
    gates = [
        Gate(metric="forget/mia_loss", op=">=", threshold=0.0),
        Gate(metric="forget/truth_ratio", op=">=", threshold=0.0),
        Gate(metric="tiny-tofu/model_utility", op=">=", threshold=2.0),
        Gate(metric="audit/paraphrase/probability", op="<=", threshold=1.0, severity="warn"),
    ]
    job = assign(holdout=HOLDOUT, tofu=TOFU, gates=gates, audit=Audit(relearn_steps=1), benchmarks=["tiny-tofu"])
    last, _ = done(job)
    assert isinstance(last, ResultRecord), last
    report = report_of(job)
    results = [(gate.metric, gate.result) for gate in report.verdict.gates if not of_every_job(gate.metric)]
    assert results == [
        ("forget/mia_loss", "PASSED"),
        ("forget/truth_ratio", "FAILED"),
        ("tiny-tofu/model_utility", "FAILED"),
        ("audit/paraphrase/probability", "WARNED"),
    ]
    messages = {gate.metric: gate.message for gate in report.verdict.gates}
    assert "needs `paraphrased_answer`" in messages["forget/truth_ratio"]
    assert "needs `paraphrased_question`" in messages["audit/paraphrase/probability"]
    (tofu,) = report.benchmarks
    figures = {figure.name: figure for figure in tofu.figures}
    assert figures["model_utility"].after is not None
    # The retrained reference is the base itself here, so before, nothing tells them apart.
    assert (figures["forget_quality"].before, figures["privleak"].before) == (1.0, 0.0)
    assert figures["forget_truth_ratio"].before == pytest.approx(figures["forget_truth_ratio"].retrained, rel=1e-6)
    assert tofu.truth_ratios["before"] == pytest.approx(tofu.truth_ratios["retrained"], rel=1e-6)
    assert [(one.name, one.rows) for one in tofu.sets] == [(name, len(rows)) for name, rows in TOFU.items()]
    assert {entry.attack for entry in report.audit} == set(Audit().attacks)
    assert all(entry.retrained is not None for entry in report.audit if entry.attack == "quantise_8")
    points = report.rows["forget/probability"]
    assert [point.row for point in points] == [1, 2, 3]
    whose = [Example("question", row["question"], row["answer"]) for row in TOFU["forget"]]
    assert [point.digest for point in points] == list(row_digests(ROW_KEY, whose))
    before = next(f.before for f in report.figures if (f.set, f.metric) == ("forget", "probability"))
    assert sum(point.before for point in points if point.before is not None) / 3 == pytest.approx(before)


def test_what_a_model_says_of_a_benchmark_is_kept_and_what_it_says_of_a_request_is_not(assign: Assign) -> None:
    job = assign(tofu=TOFU, benchmarks=["tiny-tofu"])
    done(job)
    looks = Path(job.storage_url) / "benchmarks" / "default" / "tiny-tofu"

    def lies_there() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in looks.rglob("*") if path.is_file()}

    kept = lies_there()
    assert kept
    assert not [path for path, content in kept.items() if CANARY.encode() in content]
    done(assign(tofu=TOFU, benchmarks=["tiny-tofu"]).model_copy(update={"prefix": "jobs/ujob_1/attempts/2"}))
    assert lies_there() == kept, "the same base again is not looked at again; no adapter is kept"
    done(assign(holdout=HOLDOUT).model_copy(update={"prefix": "jobs/ujob_1/attempts/3"}))
    assert lies_there() == kept


@pytest.mark.parametrize(
    ("epsilon", "loss", "codes"),
    [(0.9, 1.0, ["epsilon_below_base"]), (3.1, 1.0, ["epsilon_loose"]), (1.5, 1.0, []), (0.1, 0.0, ["epsilon_loose"])],
)
def test_a_bound_that_is_too_low_or_too_high_is_warned_of(epsilon: float, loss: float, codes: list[str]) -> None:
    """A model that has learned its retain set by heart may have a loss of 0."""
    diary = Diary(lambda record: None)
    run.warn_about_bound(epsilon, loss, diary)
    assert [note.code for note in diary.warnings] == codes


def test_a_retrained_reference_is_one_only_for_rows_that_its_benchmark_forgets(assign: Assign) -> None:
    def reference(forget: list[Any], rows: list[Any]) -> ModelEntry | None:
        job = assign(tofu=TOFU | {"forget": forget})
        return benchmarks.retrained_without(benchmarks.read(job, Storage(job.storage_url)), rows)

    texts = [{"text": f"About {CANARY} {k}."} for k in range(2)]
    entry = assign(tofu=TOFU).model
    assert reference(TOFU["forget"], FORGET[:2]) == entry, "other columns do not matter"
    assert reference(TOFU["forget"], [*FORGET, RETAIN[0]]) is None
    assert reference(texts, texts[:1]) == entry
    assert reference(texts, [{"text": "Something else."}]) is None
    assert reference(texts, [{"prompt": "Something", "completion": "else."}]) is None


def test_stored_figures_of_other_rows_are_no_retrained_reference(assign: Assign) -> None:
    """Of a set of the Hub the job is the first to see the rows."""
    job = assign(tofu=TOFU)
    storage = Storage(job.storage_url)
    (named,) = benchmarks.read(job, storage)

    def referred(figures: dict[str, Any]) -> benchmarks.Benchmark:
        content = {"forget_truth_ratio": {"agg_value": 0.5}, "privleak": {"agg_value": 1.0}} | figures
        given = named.given.model_copy(
            update={"retrained_model": None, "retrained_scores": stored_set(storage, "scores", [content])}
        )
        return benchmarks.with_retrained(job, storage, named._replace(given=given))

    same = {scores.DIGESTS: {of: scores.digest(rows) for of, rows in named.sets.items()}}
    tied = referred(same)
    assert tied.retrained is not None
    assert tied.retrained.keys() == {"forget_truth_ratio", "privleak"}
    assert (tied.untied, referred({}).untied) == ([], ["forget", "holdout"])
    network = model.load(job.model, job.models_root, job.device, job.dtype)
    results = dict.fromkeys(named.suite.figures, Result(0.5))
    shown = [benchmarks.facts(one, network, results, results).retrained or "" for one in (tied, referred({}))]
    assert [text.partition("; ")[2] for text in shown] == [
        "",
        "nothing in them shows that they are of the rows of forget and holdout",
    ]
    with pytest.raises(JobFailure, match="benchmark tiny-tofu: the figures are of other rows") as failed:
        referred({scores.DIGESTS: {"forget": scores.digest(named.sets["forget"][::-1])}})
    assert failed.value.code is FailureCode.INVALID_FILE


def test_rows_may_differ_in_how_many_alternatives_they_have_and_long_ones_are_told(assign: Assign) -> None:
    forget: list[dict[str, Any]] = perturbed(FORGET)
    forget[0]["perturbed_answer"] = ["No.", "Never.", CANARY * 40]
    job = assign(tofu=TOFU | {"forget": forget}, benchmarks=["tiny-tofu"], budget=Budget(max_steps=1))
    last, _ = done(job)
    assert isinstance(last, ResultRecord), last
    (tofu,) = report_of(job).benchmarks
    assert [(one.beyond_context, one.unmeasured_rows) for one in tofu.sets] == [(1, 0)] + [(0, 0)] * 4


def test_a_holdout_row_that_is_to_be_forgotten(assign: Assign) -> None:
    last, _ = done(assign(holdout=[*HOLDOUT, FORGET[0]]))
    assert isinstance(last, FailureRecord)
    assert last.message == "1 rows of the holdout set are also in the forget set: 4 = 1"
    assert last.forget_rows == [1]


def test_rows_that_are_much_alike_are_warned_of_in_events_and_report(assign: Assign) -> None:
    question, answer = FORGET[1]["question"], FORGET[1]["answer"]
    retain = [*RETAIN, {"question": question.upper(), "answer": answer}, {"question": question, "answer": "Unknown."}]
    job = assign(retain=retain, holdout=[*HOLDOUT, {"text": f"{question} {answer}"}], budget=Budget(max_steps=1))
    last, told = done(job)
    assert isinstance(last, ResultRecord), last
    expected = [
        ("rows_alike", "(holdout = forget): 4 = 2"),
        ("rows_alike", "(holdout = retain): 4 = 5"),
        ("rows_alike", "(forget = retain): 2 = 5"),
        ("same_question", "(forget = retain): 2 = 6"),
    ]
    in_events = [(one.code, one.message) for one in told if isinstance(one, WarningRecord)]
    in_report = [(one.code, one.message) for one in report_of(job).warnings]
    for found in (in_events, in_report):
        alike = [(code, message) for code, message in found if code in ("rows_alike", "same_question")]
        assert [(code, message[message.rindex("(") :]) for code, message in alike] == expected


def test_refusals_need_questions(assign: Assign) -> None:
    last, _ = done(assign("idk_dpo", forget=[*FORGET, {"text": f"{CANARY} is far."}]))
    assert isinstance(last, FailureRecord)
    assert last.code is FailureCode.INVALID_FILE
    assert "1 rows ask none (they are texts): 4" in last.message
    assert last.forget_rows == [4]


def test_rows_that_are_in_both_sets(assign: Assign) -> None:
    last, _ = done(assign(retain=[*RETAIN, FORGET[1]]))
    assert isinstance(last, FailureRecord)
    assert (last.code, last.message) == (
        FailureCode.FORGET_RETAIN_OVERLAP,
        "1 rows of the forget set are also in the retain set: 2 = 5",
    )
    assert last.forget_rows == [2]


def test_a_file_that_is_not_the_one_that_was_asked_for(assign: Assign) -> None:
    job = assign()
    Storage(job.storage_url).write("files/retain", sealed.sealed([b'{"text": "another"}\n'], DATA_KEY))
    last, _ = done(job)
    assert isinstance(last, FailureRecord)
    assert last.code is FailureCode.INVALID_FILE
    assert "has changed since it was uploaded" in last.message


@pytest.mark.parametrize(
    ("which", "rows", "words", "blamed"),
    [("retain", RETAIN, ": 5 (1 of 5)", []), ("forget", FORGET, ": 4 (1 of 4)", [4])],
)
def test_a_row_longer_than_the_context(
    assign: Assign, which: str, rows: list[dict[str, Any]], words: str, blamed: list[int]
) -> None:
    last, _ = done(assign(**{which: [*rows, {"question": "?", "answer": CANARY * 40}]}))
    assert isinstance(last, FailureRecord)
    assert last.code is FailureCode.ROW_TOO_LONG
    assert last.message.startswith(f"{which} set: ")
    assert words in last.message
    assert last.forget_rows == blamed, "only a row of the forget set is a deletion request's"


@pytest.mark.parametrize(("method", "parameters"), [("no_such", {}), ("pdu", {"no_such": 1}), ("npo", {"beta": -1.0})])
def test_what_this_worker_does_not_know(assign: Assign, method: str, parameters: dict[str, Any]) -> None:
    last, _ = done(assign(method, parameters))
    assert isinstance(last, FailureRecord)
    assert last.code is FailureCode.NO_CAPABLE_WORKER


def test_a_model_that_is_not_the_one_that_was_registered(assign: Assign) -> None:
    job = assign()
    job = job.model_copy(update={"model": job.model.model_copy(update={"digest": "sha256:" + 64 * "0"})})
    last, _ = done(job)
    assert isinstance(last, FailureRecord)
    assert last.code is FailureCode.MODEL_REVISION_MISMATCH


def test_a_cancelled_run_leaves_no_artifact(assign: Assign) -> None:
    job, asked = assign(), iter([None, None, *2 * ["cancel"]])
    last, told = done(job, lambda: next(asked))
    assert isinstance(last, CancelledRecord)
    assert sum(isinstance(record, StepRecord) for record in told) == 2
    assert not (Path(job.storage_url) / job.prefix).exists()


def test_a_bug_is_an_internal_error_that_says_no_more_than_its_type(
    assign: Assign, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError(f"about {CANARY}")

    monkeypatch.setattr(run, "unlearn", broken)
    with capture_logs() as logged:
        last, _ = done(assign())
    assert isinstance(last, FailureRecord)
    assert last.code is FailureCode.INTERNAL_ERROR
    assert last.message == "ZeroDivisionError; the worker's log has the details"
    assert [(line["event"], type(line["exc_info"])) for line in logged] == [("the run failed", ZeroDivisionError)]


def test_the_log_of_a_runner_is_lines_of_json_and_quotes_nothing(assign: Assign, tmp_path: Path) -> None:
    """Started as the supervisor starts it; a library logs and warns, and a bug of ours ends the run."""
    program = f"""
import logging, sys, threading, warnings
from transformers.utils import logging as transformers_logging
from worker import run

def broken(*_, **__):
    warnings.warn("about {CANARY}")
    transformers_logging.get_logger("transformers").warning("a warning of transformers")
    thread = threading.Thread(target=lambda: [][len("{CANARY}")])
    thread.start()
    thread.join()
    raise ZeroDivisionError("about {CANARY}")

run.unlearn = broken
sys.exit(run.main(sys.argv[1:]))
"""
    path, errors = tmp_path / "assignment.json", tmp_path / "errors"
    path.write_text(assign().model_copy(update={"checkpoint_every_s": 600.0}).model_dump_json())
    with errors.open("wb") as log:
        command = [sys.executable, "-c", program, str(path)]
        done = subprocess.run(
            command, stdin=stdin_that_stays(), stdout=subprocess.PIPE, stderr=log, cwd=ROOT, check=True, timeout=120
        )
    records = [parse_record(line) for line in done.stdout.splitlines()]
    assert isinstance(records[-1], FailureRecord)
    text = errors.read_text()
    assert CANARY not in text
    lines = [json.loads(line) for line in text.splitlines()]
    events = {line["event"]: line for line in lines}
    assert {"Python warning", "a warning of transformers", "uncaught exception in a thread"} <= events.keys()
    failed = events["the run failed"]
    assert failed["exception"].endswith("builtins.ZeroDivisionError")
    assert (failed["job_id"], failed["attempt"]) == ("ujob_1", 1)


def stdin_that_stays() -> int:
    """A pipe whose other end stays open: at its end a runner takes its supervisor for dead."""
    reader, _ = os.pipe()
    return reader


def sabotaged(job: Assignment, stage: Stage, fault: Callable[[], object]) -> Record:
    """The last record of a run to which that happens when the stage begins, the uploads' being behind it."""
    stages: list[Stage] = []

    def emit(record: Record) -> None:
        if isinstance(record, StageRecord):
            stages.append(record.stage)
            if record.stage is stage and Stage.PACKAGING in stages:
                fault()

    return run.last_record(job, emit, lambda: None)


@pytest.mark.parametrize("stage", [Stage.UPLOADING, Stage.LOADING_MODEL])
def test_a_storage_that_vanishes_fails_the_attempt_which_may_be_repeated(assign: Assign, stage: Stage) -> None:
    job = assign()
    last = sabotaged(job, stage, lambda: shutil.rmtree(job.storage_url))
    assert isinstance(last, FailureRecord)
    assert (last.code, last.message) == (FailureCode.ARTIFACT_UPLOAD_FAILED, "the root of the storage is gone")
    assert last.code in RETRYABLE
    assert not Path(job.storage_url).exists(), "nothing is stored where nobody looks"


def test_a_storage_that_is_not_there_says_nothing_of_the_files(assign: Assign) -> None:
    job = assign()
    shutil.rmtree(job.storage_url)
    last, _ = done(job)
    assert isinstance(last, FailureRecord)
    assert last.code is FailureCode.ARTIFACT_UPLOAD_FAILED


def test_an_adapter_that_is_read_back_altered_is_not_measured(assign: Assign) -> None:
    job = assign()

    def flip() -> None:
        path = Path(job.storage_url) / job.prefix / "adapter" / "adapter_model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    last = sabotaged(job, Stage.LOADING_MODEL, flip)
    assert isinstance(last, FailureRecord)
    assert (last.code, last.message) == (FailureCode.ARTIFACT_UPLOAD_FAILED, "a stored file is not what was written")


def test_a_bound_that_no_iterate_keeps_releases_nothing(assign: Assign) -> None:
    job = assign(constraint=Constraint(epsilon=1e-9))
    last, told = done(job)
    assert isinstance(last, ResultRecord)
    assert last.verdict.result == "FAILED"
    assert [file.name for file in last.artifacts] == ["report.json", "report.html"]
    report = report_of(job)
    assert not report.released.published
    assert report.trajectory.feasible_checks == 0
    assert [record.code for record in told if isinstance(record, WarningRecord)] == ["epsilon_below_base"]


def test_the_published_adapter_is_the_one_that_is_named_and_measured(assign: Assign) -> None:
    job = assign(budget=Budget(max_steps=4))
    last, _ = done(job)
    assert isinstance(last, ResultRecord)
    storage = Storage(job.storage_url)
    for file in last.artifacts:
        content = b"".join(storage.read(file.key))
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256)
    adapter = {file.name: file.sha256 for file in last.artifacts if file.name.startswith("adapter/")}
    names = ("README.md", "adapter_config.json", "adapter_model.safetensors", "base_model.json")
    assert adapter.keys() == {f"adapter/{name}" for name in names}
    report = report_of(job)
    assert {file.name: file.sha256 for file in report.released.files} == adapter, "what a certificate is about"
