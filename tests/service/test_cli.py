"""The command line: the registry against the real database, and jobs over real HTTP."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from sqlalchemy import select
from typer.testing import CliRunner, Result

from service import terminal
from service.app import create_app
from service.cli import app
from service.client.shapes import SuiteSet
from service.domain import rows
from service.domain.job import Audit, Failure, FailureCode, Gate, JobSpec, ModelEntry, PromptFormat, Verdict
from service.domain.modelfiles import digest_at_the_top, digest_files, digest_model, digest_tokenizer, inspect, loaded
from service.settings import Settings
from service.store import benchmarks, files, jobs, models
from service.store.session import Sessions
from service.store.tables import File
from tests.service.conftest import Bell

CONFIG = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512, "vocab_size": 100}
SHA = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """run("models", "list") with these settings in the environment."""
    for name in ("database_url", "broker_url", "storage_url", "models_root"):
        monkeypatch.setenv(name.upper(), str(getattr(settings, name)))

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def folder(settings: Settings) -> Path:
    """A model's folder as far as the registry looks at it."""
    made = settings.models_root / "family" / "tiny"
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps(CONFIG))
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "tokenizer.json").write_text("{}")
    (made / "tokenizer_config.json").write_text("{}")
    return made


def test_a_folder_is_registered_shown_and_removed(run: Callable[..., Result], folder: Path, sessions: Sessions) -> None:
    for path in (folder, "family/tiny"):  # below the root, however it is written
        added = run("models", "add", "bot", "--path", path)
        assert added.exit_code == 0, added.output
        assert "ends in a space" in added.stderr
        with sessions.begin() as s:
            entry = models.get(s, "bot")
        assert (entry.source, entry.location, entry.prompt_format) == ("path", "family/tiny", PromptFormat())
        assert (entry.digest, entry.tokenizer_digest) == digest_model(folder)
        assert entry.info == {"architecture": "LlamaForCausalLM", "context_tokens": 512, "vocabulary": 100}
        assert "bot" in run("models", "list").stdout
        taken = run("models", "add", "bot", "--path", path)
        assert (taken.exit_code, "is registered" in taken.stderr) == (2, True)
        assert run("models", "remove", "bot").exit_code == 0
    assert run("models", "list").stdout == ""
    assert "no model 'bot'" in run("models", "remove", "bot").stderr


def test_the_prompt_format_is_chosen_or_found(run: Callable[..., Result], folder: Path, sessions: Sessions) -> None:
    plain = run(
        "models",
        "add",
        "plain",
        "--path",
        folder,
        "--user-start",
        "Q: ",
        "--user-end",
        "\\n",
        "--assistant-start",
        "A:",
    )
    assert (plain.exit_code, plain.stderr) == (0, "")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert run("models", "add", "chat", "--path", folder, "--system", "Be kind.").exit_code == 0
    with sessions.begin() as s:
        assert models.get(s, "plain").prompt_format == PromptFormat(
            user_start="Q: ", user_end="\n", assistant_start="A:"
        )
        today = datetime.now(UTC).date()
        expected = PromptFormat(type="chat", system="Be kind.", template_date=today)
        assert models.get(s, "chat").prompt_format == expected


def test_what_a_chat_template_is_given_is_registered(
    run: Callable[..., Result], folder: Path, sessions: Sessions
) -> None:
    template = "{% for m in messages %}{{ date_string }}{{ enable_thinking }}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    arguments = ["--template-argument", "enable_thinking=false", "--template-argument", "date_string=26 Jul 2024"]
    add = ["models", "add", "chat", "--path", folder, "--template-date", "2025-03-09"]
    added = run(*add, *arguments)
    assert added.exit_code == 0, added.output
    with sessions.begin() as s:
        form = models.get(s, "chat").prompt_format
    assert form.template_arguments == {"enable_thinking": False, "date_string": "26 Jul 2024"}
    assert form.template_date == date(2025, 3, 9)
    for wrong, why in (
        (["--template-argument", "enable_thinking"], "NAME=VALUE"),
        (["--template-argument", "unread=1"], "reads no argument 'unread'"),
        (["--template-argument", "a=1", "--user-start", "Q: "], "brings its own strings"),
        (["--system", "Hi.", "--prompt-format", "plain"], "go with a chat template"),
    ):
        refused = run(*add, *wrong)
        assert (refused.exit_code, why in refused.output) == (2, True), refused.output


def test_a_system_message_that_the_template_refuses_is_refused(
    run: Callable[..., Result], folder: Path, sessions: Sessions
) -> None:
    roles = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(roles + "{% for m in messages %}{{ m.content }}{% endfor %}")
    refused = run("models", "add", "chat", "--path", folder, "--system", "Be kind.")
    assert (refused.exit_code, "System role not supported" in refused.stderr) == (2, True)
    assert run("models", "add", "chat", "--path", folder).exit_code == 0


def test_a_hub_model_needs_its_commit_and_its_format(run: Callable[..., Result], sessions: Sessions) -> None:
    ok = run("models", "add", "hub", "--hub", f"owner/name@{SHA}", "--prompt-format", "chat")
    assert ok.exit_code == 0, ok.output
    with sessions.begin() as s:
        entry = models.get(s, "hub")
    assert (entry.source, entry.location, entry.revision, entry.digest) == ("hub", "owner/name", SHA, None)
    for reference in ("owner/name", "owner/name@main", f"owner/name@{SHA[:-1]}", f"../name@{SHA}", f"a/b/c@{SHA}"):
        refused = run("models", "add", "x", "--hub", reference, "--prompt-format", "chat")
        assert (refused.exit_code, "40 hex digits" in refused.stderr) == (2, True), reference
    assert "prompt format" in run("models", "add", "x", "--hub", f"owner/name@{SHA}").stderr


def spoil(name: str, folder: Path, tmp_path: Path) -> Path:
    """One thing is wrong with the folder; the path to register."""
    if name == "outside":
        return folder.rename(tmp_path / "outside")
    if name == "symlink outside":
        (folder.parent / "link").symlink_to(folder.rename(tmp_path / "outside"))
        return folder.parent / "link"
    if name == "dots":
        folder.rename(tmp_path / "outside")
        return Path("../outside")
    if name == "root itself":
        return folder.parent.parent
    if name == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if name == "no weights":
        (folder / "model.safetensors").unlink()
    if name == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    if name == "no config":
        (folder / "config.json").unlink()
    if name == "broken config":
        (folder / "config.json").write_text("{")
    if name == "remote code":
        (folder / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {"AutoModel": "m.M"}}))
    if name == "remote code of the tokeniser":
        (folder / "tokenizer_config.json").write_text('{"auto_map": {}}')
    if name == "tokeniser by version":
        (folder / "tokenizer_config.json").write_text('{"fast_tokenizer_files": ["tokenizer.4.0.json"]}')
    if name == "classifier":
        (folder / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["BertForSequenceClassification"]}))
    if name == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    return folder


def test_what_must_not_be_loaded_is_refused_by_name(
    run: Callable[..., Result], folder: Path, tmp_path: Path, sessions: Sessions
) -> None:
    import shutil

    for name, words in {
        "outside": "below the models root",
        "symlink outside": "below the models root",
        "dots": "below the models root",
        "root itself": "below the models root",
        "pickle": "pytorch_model.bin is a pickle",
        "no weights": "no *.safetensors",
        "no tokenizer": "no tokeniser",
        "no config": "no config.json",
        "broken config": "not JSON",
        "remote code": "auto_map",
        "remote code of the tokeniser": "auto_map",
        "tokeniser by version": "fast_tokenizer_files",
        "classifier": "BertForSequenceClassification",
        "adapter": "is an adapter",
    }.items():
        shutil.copytree(folder, tmp_path / "kept")
        refused = run("models", "add", "x", "--path", spoil(name, folder, tmp_path))
        assert (refused.exit_code, words in refused.stderr) == (2, True), (name, refused.output)
        for leftover in (folder, tmp_path / "outside"):
            shutil.rmtree(leftover, ignore_errors=True)
        (folder.parent / "link").unlink(missing_ok=True)
        shutil.move(tmp_path / "kept", folder)
    for name, option, words in (("a/b", (), "not a name"), ("x", ("--gpu-class", "h900"), "any, cpu")):
        refused = run("models", "add", name, "--path", folder, *option)
        assert (refused.exit_code, words in refused.stderr) == (2, True)
    assert run("models", "add", "x").exit_code == 2
    assert run("models", "add", "x", "--path", folder, "--hub", "a@b").exit_code == 2
    with sessions.begin() as s:
        assert models.every(s) == []


def test_a_chat_template_that_is_null_is_none(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for template, there in ((None, False), ("{{ messages }}", True)):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        assert inspect(folder).chat_template is there


def test_the_digest_is_of_what_is_loaded(folder: Path) -> None:
    before = digest_model(folder)
    (folder / "README.md").write_text("words")
    (folder / "pytorch_model.bin").write_bytes(b"beside safetensors it is not loaded")
    assert inspect(folder)[:2] == before
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert (digest_model(folder)[0] != before[0], digest_model(folder)[1] != before[1]) == (True, True)
    tokenizer = digest_model(folder)[1]
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert digest_model(folder)[1] == tokenizer
    assert digest_model(folder)[0] != before[0]


def shard(folder: Path, *names: str) -> None:
    """The weights under these names, which may lie in folders, and the index that names them."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = {"metadata": {}, "weight_map": {f"w{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in names:
        path = folder / name
        if ".." not in path.parts and not Path(name).is_absolute():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())


def test_weights_in_subfolders_are_part_of_the_digest(folder: Path) -> None:
    shard(folder, "a/one.safetensors", "two.safetensors")
    (folder / "a" / "unnamed.safetensors").write_bytes(b"no index names it")
    found = inspect(folder)
    named = {"a/one.safetensors", "two.safetensors", "model.safetensors.index.json", "config.json"}
    assert named < found.files.keys()
    assert "a/unnamed.safetensors" not in found.files
    lines = "".join(f"{sha}  {name}\n" for name, sha in sorted(found.files.items()))
    assert found.digest == "sha256:" + sha256(lines.encode()).hexdigest(), "what sha256sum prints, hashed"
    (folder / "a" / "one.safetensors").write_bytes(b"halved")
    assert digest_model(folder)[0] != found.digest


def test_weights_and_templates_that_configs_name_are_part_of_the_digest(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"transformers_weights": "a/other.safetensors.index.json"}))
    (folder / "a").mkdir()
    index = {"metadata": {}, "weight_map": {"w": "b/one.safetensors"}}
    (folder / "a" / "other.safetensors.index.json").write_text(json.dumps(index))
    (folder / "b").mkdir()
    (folder / "b" / "one.safetensors").write_bytes(b"weights")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for name, of_tokenizer in (
        ("a/other.safetensors.index.json", False),
        ("b/one.safetensors", False),
        ("additional_chat_templates/tools.jinja", True),
    ):
        before = digest_model(folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        after = digest_model(folder)
        assert (after[0] != before[0], after[1] != before[1]) == (True, of_tokenizer), name
    assert digest_tokenizer(folder) == digest_model(folder)[1]


def test_what_a_tokeniser_is_converted_from_is_part_of_the_digest_where_it_is_read(folder: Path) -> None:
    with_it = digest_model(folder)
    (folder / "tekken.json").write_text("{}")
    assert digest_model(folder) == with_it, "tokenizer.json is read in its place"
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"pieces")
    for name in ("tekken.json", "sentencepiece.bpe.model", "tokenizer.model.v3", "tokenizer.model"):
        before = digest_model(folder)
        (folder / name).write_bytes(b"other")
        after = digest_model(folder)
        assert (after[0] != before[0], after[1] != before[1]) == (True, True), name
        assert digest_tokenizer(folder) == after[1] == digest_files(inspect(folder).files)[1]


def test_the_digest_of_a_flat_folder_is_what_it_was(folder: Path) -> None:
    shard(folder, "model-1.safetensors", "model-2.safetensors")
    assert digest_model(folder)[0] == digest_at_the_top(folder)
    assert digest_model(folder)[0] == "sha256:2ee798813fe8675d3b4be848ccc3b6b44f0ee2640dd04f74c29064707ddec824"
    (folder / "consolidated.safetensors").write_bytes(b"the weights once more")
    assert digest_model(folder)[0] == "sha256:2ee798813fe8675d3b4be848ccc3b6b44f0ee2640dd04f74c29064707ddec824"


def test_weights_outside_the_folder_or_missing_are_refused(run: Callable[..., Result], folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(b"not of this model")
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "x.safetensors").write_bytes(b"not of this model")
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    for name, words in {
        "../outside.safetensors": "not a path below",
        str(outside): "not a path below",
        "a/../../outside.safetensors": "not a path below",
        "./one.safetensors": "not a path below",
        "gone.safetensors": "missing",
        "one.bin": "safetensors only",
        "new\nline.safetensors": "no path",
        "linked/x.safetensors": "a link that leaves",
        "link.safetensors": "a link that leaves",
    }.items():
        shard(folder, "one.safetensors")
        index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "one.bin").touch()
        refused = run("models", "add", "x", "--path", folder)
        assert (refused.exit_code, words in refused.stderr) == (2, True), (name, refused.output)
        assert "model.safetensors.index.json names" in refused.stderr


def test_the_links_of_the_hubs_cache_stay_within_the_model(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (tmp_path / "models--o--n" / "blobs").mkdir()
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    shard(snapshot, "a/one.safetensors")
    (snapshot / "a" / "one.safetensors").rename(tmp_path / "models--o--n" / "blobs" / "0a")
    (snapshot / "a" / "one.safetensors").symlink_to("../../../blobs/0a")
    assert "a/one.safetensors" in loaded(snapshot)


def test_without_a_database_the_command_says_so(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql+psycopg://u@/db?host=/nowhere")
    refused = run("models", "list")
    assert (refused.exit_code, refused.stderr.startswith("error: the database")) == (2, True)


# --- over HTTP


@pytest.fixture
def url(
    settings: Settings, sessions: Sessions, make_key: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The API on a port of its own, with one model, "m"; the environment has an administrator's key."""
    monkeypatch.setenv("UNLEARN_API_KEY", make_key("admin"))
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="m", source="path", location="m", prompt_format=PromptFormat()))
    server = uvicorn.Server(uvicorn.Config(create_app(settings, dispatcher=Bell()), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def sets(tmp_path: Path) -> list[object]:
    """The options that name a forget and a retain set."""
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": "q", "answer": name}) + "\n")
    return ["--forget", tmp_path / "forget.jsonl", "--retain", tmp_path / "retain.jsonl"]


def finish(sessions: Sessions, result: Any, job: dict[str, JobSpec]) -> None:
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        job["spec"] = JobSpec.model_validate(claim.spec)
        jobs.succeed(s, claim.job_id, claim.fence, Verdict(result=result, gates=[], message="so it is"))


def test_a_job_is_submitted_and_watched_to_its_end(
    run: Callable[..., Result], url: str, sets: list[object], sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "POLL_S", 0.02)
    options = ["--epsilon-relative", 0.1, "--max-steps", 7, "--set", "learning_rate=0.001", "--url", url]
    for result, code in (("PASSED", 0), ("WARNED", 0), ("FAILED", 1)):
        submitted = run("submit", "--model", "m", *sets, *options)
        assert submitted.exit_code == 0, submitted.output
        assert "ends in a space" in submitted.stderr
        job: dict[str, JobSpec] = {}
        worker = threading.Timer(0.2, finish, (sessions, result, job))
        worker.start()
        watched = run("watch", submitted.stdout.strip(), "--url", url)
        worker.join()
        assert (watched.exit_code, f"{result}: so it is" in watched.stdout) == (code, True), watched.output
        assert (job["spec"].budget.max_steps, job["spec"].method.hyperparameters["learning_rate"]) == (7, 0.001)
    assert run("status", "--url", url).stdout.count("succeeded") == 3
    assert json.loads(run("status", submitted.stdout.strip(), "--url", url).stdout)["verdict"]["result"] == "FAILED"


def test_a_job_is_paused_resumed_cancelled_and_tried_again(
    run: Callable[..., Result], url: str, sets: list[object], sessions: Sessions
) -> None:
    def submit() -> str:
        return run("submit", "--model", "m", *sets, "--epsilon-relative", 0.1, "--url", url).stdout.strip()

    def move(verb: str, job_id: str) -> str:
        return run(verb, job_id, "--url", url).output.strip()

    first = submit()
    with sessions.begin() as s:
        held = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
    assert held is not None
    assert move("pause", first) == "pausing"
    assert "only one that is paused can be resumed" in move("resume", first)
    with sessions.begin() as s:
        jobs.paused(s, first, held.fence)
    assert [move(verb, first) for verb in ("pause", "resume", "cancel")] == ["paused", "queued", "cancelled"]
    second = submit()
    with sessions.begin() as s:
        held = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert held is not None
        jobs.fail(s, second, held.fence, Failure.of(FailureCode.NON_FINITE_LOSS, "it blew up"))
    assert move("retry", second) == "queued"


def test_a_dry_run_is_told_and_keeps_no_rows(
    run: Callable[..., Result], url: str, sets: list[object], sessions: Sessions
) -> None:
    told = run("submit", "--model", "m", *sets, "--epsilon", 1, "--max-steps", 7, "--dry-run", "--url", url)
    assert told.exit_code == 0, told.output
    for words in ("forget_set: ", "steps: at most 7", "memory unknown: ", "jobs ahead: 0", "ends in a space"):
        assert words in told.stdout
    assert run("status", "--url", url).stdout == ""
    with sessions.begin() as s:
        kept = s.scalars(select(File)).all()
    assert (len(kept), all(file.purged_at for file in kept)) == (2, True)


def test_refusals_of_ones_own_are_sent_along(
    run: Callable[..., Result], url: str, sets: list[object], sessions: Sessions, tmp_path: Path
) -> None:
    (tmp_path / "refusals.jsonl").write_text('{"text": "I cannot say."}\n{"text": "No idea."}\n')
    options = ["--refusals", tmp_path / "refusals.jsonl", "--method", "idk_dpo", "--epsilon", 1, "--url", url]
    submitted = run("submit", "--model", "m", *sets, *options)
    assert submitted.exit_code == 0, submitted.output
    with sessions.begin() as s:
        refusals = files.get(s, jobs.get(s, submitted.stdout.strip()).refusal_set or "")
    assert (refusals.purpose, refusals.rows) == ("refusal_set", 2)


def test_a_refusal_is_told_in_the_services_words(run: Callable[..., Result], url: str, sets: list[object]) -> None:
    for options, words in (
        (["--epsilon", "nan"], "/constraint/epsilon: Input should be a finite number"),
        (["--epsilon", 1, "--set", "lr=1"], "/method/hyperparameters/lr"),
        ([], "/constraint: give exactly one"),
    ):
        refused = run("submit", "--model", "m", *sets, *options, "--url", url)
        assert (refused.exit_code, words in refused.stderr) == (2, True), refused.output
    assert run("watch", "ujob_x", "--url", url).exit_code == 2
    nobody = run("watch", "ujob_x", "--url", "http://127.0.0.1:1")
    assert (nobody.exit_code, nobody.stderr.startswith("error: ")) == (2, True)


# --- benchmarks, and what a request says of them


def suite_sets(url: str, name: str) -> dict[str, SuiteSet]:
    with terminal.connected(url) as api:
        (suite,) = [suite for suite in api.benchmarks.suites() if suite.id == name]
    return suite.sets


def tofu_sets(url: str, tmp_path: Path) -> list[object]:
    """The options that name the required sets of TOFU; the forget set's is one JSON array."""
    options: list[object] = []
    for name, form in suite_sets(url, "tofu").items():
        row = {column: ["\u2028"] if column in rows.LISTS else "\u2028" for column in form.columns}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([row, row], indent=1) if name == "forget" else json.dumps(row))
        options += ["--set", f"{name}={path}"] if form.required else []
    return options


@pytest.fixture
def tofu(url: str, tmp_path: Path) -> list[object]:
    return tofu_sets(url, tmp_path)


def test_a_benchmark_is_added_listed_and_removed_with_its_files(
    run: Callable[..., Result], url: str, tofu: list[object], sessions: Sessions, tmp_path: Path
) -> None:
    (tmp_path / "scores.json").write_text('{"forget_truth_ratio": {"agg_value": 0.5}}')
    options = ["--suite", "tofu", "--corpus", "TOFU forget01", *tofu, "--url", url]
    added = run("benchmarks", "add", "forget01", *options, "--retrained-scores", tmp_path / "scores.json")
    assert added.exit_code == 0, added.output
    with sessions.begin() as s:
        benchmark = benchmarks.get(s, "forget01")
        forget = files.get(s, benchmark.sets["forget"])
    assert (benchmark.corpus, forget.rows, forget.purpose) == ("TOFU forget01", 2, "eval_set")
    listed = run("benchmarks", "list", "--url", url).stdout
    assert listed == added.stdout
    assert "forget01  tofu  TOFU forget01  sets forget, " in listed
    taken = run("benchmarks", "add", "forget01", *options)
    assert (taken.exit_code, "is registered" in taken.stderr) == (2, True)
    assert run("benchmarks", "remove", "forget01", "--url", url).exit_code == 0
    assert run("benchmarks", "list", "--url", url).stdout == ""
    gone = run("benchmarks", "remove", "forget01", "--url", url)
    assert (gone.exit_code, "no benchmark 'forget01'" in gone.stderr) == (2, True)
    with sessions.begin() as s:
        assert all(file.purged_at for file in files.page(s)[0]), (
            "neither those of the benchmark nor those of the refused registration"
        )


def test_a_benchmark_that_is_refused_leaves_no_files(
    run: Callable[..., Result], url: str, tofu: list[str], sessions: Sessions, tmp_path: Path
) -> None:
    (tmp_path / "broken.json").write_text("[1,")
    for changes, words in (
        (["--set", f"forgot={tofu[1].partition('=')[2]}"], "has no set 'forgot'"),
        (["--set", "forget"], "write SET=FILE"),
        (["--set", f"holdout={tmp_path / 'none.json'}"], "with a file that is there"),
        (["--set", f"holdout={tmp_path / 'broken.json'}"], "begins as a JSON array does, and is none"),
        (["--retrained-model", "none"], "model 'none' is not registered"),
    ):
        refused = run("benchmarks", "add", "b", "--suite", "tofu", "--corpus", "c", *tofu, *changes, "--url", url)
        assert (refused.exit_code, words in re.sub(r"\s+[│|]?\s*", " ", refused.stderr)) == (2, True), refused.output
    with sessions.begin() as s:
        assert all(file.purged_at for file in files.page(s)[0])


def test_one_file_may_serve_as_two_sets(run: Callable[..., Result], url: str, tmp_path: Path) -> None:
    muse = suite_sets(url, "muse")
    row = {"question": "q", "answer": "a", "prompt": "p", "gt": "g", "text": "t"}
    sets = []
    for name, form in muse.items():
        path = tmp_path / f"{'-'.join(form.columns)}.json"
        path.write_text(json.dumps([{column: row[column] for column in form.columns}]))
        sets += ["--set", f"{name}={path}"]
    added = run("benchmarks", "add", "alice", "--suite", "muse", "--corpus", "Alice", *sets, "--url", url)
    assert added.exit_code == 0, added.output
    with terminal.connected(url) as api:
        assert len(list(api.files.list())) == len({tuple(form.columns) for form in muse.values()})
    assert set(muse) <= set(re.findall(r"\w+", run("benchmarks", "suites", "--url", url).stdout))


def test_a_request_names_benchmarks_gates_an_audit_and_a_holdout_set(
    run: Callable[..., Result], url: str, sets: list[object], tofu: list[object], sessions: Sessions, tmp_path: Path
) -> None:
    (tmp_path / "held.json").write_text('[{"question": "q", "answer": "held out"}]')
    assert run("benchmarks", "add", "b", "--suite", "tofu", "--corpus", "c", *tofu, "--url", url).exit_code == 0
    options = ["--epsilon", 1, "--benchmark", "b", "--audit", "--holdout", tmp_path / "held.json", "--url", url]
    gates = ["b/model_utility >= 0.5:warn", "forget/probability<=5e-2", "audit/prefix/probability<=.3:fail"]
    submitted = run("submit", "--model", "m", *sets, *options, *(part for gate in gates for part in ("--gate", gate)))
    assert submitted.exit_code == 0, submitted.output
    with sessions.begin() as s:
        spec = JobSpec.model_validate(jobs.get(s, submitted.stdout.strip()).spec)
        assert files.get(s, spec.holdout_set or "").rows == 1
    assert (spec.benchmarks, spec.audit) == (["b"], Audit())
    assert spec.gates == [
        Gate(metric="b/model_utility", op=">=", threshold=0.5, severity="warn"),
        Gate(metric="forget/probability", op="<=", threshold=0.05),
        Gate(metric="audit/prefix/probability", op="<=", threshold=0.3),
    ]
    for gate in ("forget/probability", "forget/probability<0.5", "a<=x", "a<=1:never", "<=1", "a>=<=1"):
        refused = run("submit", "--model", "m", *sets, "--epsilon", 1, "--gate", gate, "--url", url)
        assert (refused.exit_code, "--gate" in refused.stderr) == (2, True), gate
    refused = run("submit", "--model", "m", *sets, "--epsilon", 1, "--gate", "forget/x<=1", "--url", url)
    assert (refused.exit_code, "/gates/0/metric: forget has no figure" in refused.stderr) == (2, True)


# --- evaluation without the service


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that take this process's place."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
    return commands


def options_of(command: list[str]) -> list[tuple[str, str]]:
    assert command[:4] == [sys.executable, "-P", "-m", "worker.evaluate"]
    return list(zip(command[4::2], command[5::2], strict=True))


def test_an_evaluation_has_the_same_arguments(
    run: Callable[..., Result], folder: Path, started: list[list[str]], tmp_path: Path
) -> None:
    for name in ("f.json", "scores.json"):
        (tmp_path / name).write_text("{}")
    asked = ["--model", folder, "--suite", "tofu", "--data", "forget=f.json", "--data", "retain=r.json"]
    others = ["--adapter", tmp_path, "--retrained", tmp_path / "scores.json", "--device", "cpu", "--threads", 2]
    assert run("evaluate", *asked, *others, "--user-end", "\\n").exit_code == 0
    assert options_of(started[-1]) == [
        ("--model", str(folder)),
        ("--suite", "tofu"),
        ("--prompt-format", PromptFormat(user_end="\n").model_dump_json()),
        ("--data", "forget=f.json"),
        ("--data", "retain=r.json"),
        ("--adapter", str(tmp_path)),
        ("--retrained", str(tmp_path / "scores.json")),
        ("--device", "cpu"),
        ("--threads", "2"),
    ]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert run("evaluate", *asked).exit_code == 0
    assert dict(options_of(started[-1]))["--prompt-format"] == PromptFormat(type="chat").model_dump_json()
    assert run("evaluate", *asked, "--prompt-format", "chat", "--user-end", "x").exit_code == 2
    assert len(started) == 2


def test_a_registered_model_is_evaluated_as_it_is_registered(
    run: Callable[..., Result], folder: Path, started: list[list[str]], settings: Settings
) -> None:
    run("models", "add", "bot", "--path", folder, "--user-start", "Q: ")
    run("models", "add", "far", "--hub", f"owner/name@{SHA}", "--prompt-format", "chat")
    asked = ["--suite", "tofu", "--data", "forget=f.json"]
    assert run("evaluate", "--model", "bot", *asked).exit_code == 0
    told = dict(options_of(started[-1]))
    assert Path(told["--model"]) == settings.models_root / "family" / "tiny"
    assert PromptFormat.model_validate_json(told["--prompt-format"]) == PromptFormat(user_start="Q: ")
    for name, words in (
        ("far", "give the folder"),
        ("none", "no model 'none'"),
        ("./none", "there is no folder ./none"),
    ):
        refused = run("evaluate", "--model", name, *asked)
        assert (refused.exit_code, words in refused.stderr) == (2, True)
    assert len(started) == 1


def test_what_an_evaluation_prints_and_how_it_ends_is_passed_through(folder: Path, tmp_path: Path) -> None:
    program = "import sys; print(len(sys.argv)); print('why', file=sys.stderr); sys.exit(7)"
    for where, content in (("path", program), ("here", "raise SystemExit('not this one')")):
        (tmp_path / where / "worker").mkdir(parents=True)
        (tmp_path / where / "worker" / "__init__.py").touch()
        (tmp_path / where / "worker" / "evaluate.py").write_text(content)
    command = ["evaluate", "--model", str(folder), "--suite", "tofu", "--data", "forget=f"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "path")}
    ran = subprocess.run(
        [sys.executable, "-m", "service.cli", *command],
        cwd=tmp_path / "here",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, "9\n", "why\n")
