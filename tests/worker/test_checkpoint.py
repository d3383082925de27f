"""A run that was ended at a step and goes on elsewhere: the same adapter, bit for bit, and a report that tells of all steps."""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.domain.errors import StorageFull, StorageUnavailable
from service.domain.job import Constraint
from service.store.storage import Storage
from tests.worker.test_run import Assign, assign, report_of
from worker import checkpoint, files, registry, run
from worker.diary import Diary
from worker.measure import Measurement
from worker.records import (
    Assignment,
    CheckpointRecord,
    CheckpointRef,
    CheckRecord,
    PausedRecord,
    Record,
    ResultRecord,
    ResumedRecord,
    StepRecord,
    WarningRecord,
    Word,
)
from worker.solve import Checked, Run, Stop, StopReason

__all__ = ["assign"]  # the fixture

STEPS = 5
METHODS = [  # one for each solver
    ("pdu", {}),
    ("grad_diff", {}),
    ("blur_npo", {}),
    ("ofmu", {"inner_steps": 2}),
    ("eupmu", {}),
    ("custom", {"solver": {"type": "augmented_lagrangian"}}),
    ("custom", {"solver": {"type": "alternating"}}),
]


class Killed(BaseException):
    """What a SIGKILL is to the code: no `except` sees it."""


def attempt(
    job: Assignment,
    scratch: Path,
    earlier: Sequence[Record] = (),
    *,
    fence: int = 1,
    killed_at: int | None = None,
    paused_at: int | None = None,
    every: int | None = 1,
    **changes: Any,
) -> tuple[Record | None, list[Record]]:
    """One attempt, as the supervisor hands it over: with the last two checkpoints that earlier ones told of."""
    folder = scratch / f"attempt-{fence}"
    folder.mkdir()
    saved = [record for record in earlier if isinstance(record, CheckpointRecord)][-2:]
    again = {
        "attempt": fence,
        "fence": fence,
        "prefix": f"{job.folder}/attempts/{fence}",
        "scratch_dir": folder,
        "checkpoints": [CheckpointRef(step=r.step, key=r.key, sha256=r.sha256) for r in reversed(saved)],
        "checkpoint_every_steps": every,
    }
    told: list[Record] = []

    def emit(record: Record) -> None:
        told.append(record)
        if isinstance(record, StepRecord) and record.step == killed_at:
            raise Killed

    def asked() -> Word | None:
        return "pause" if sum(isinstance(record, StepRecord) for record in told) == paused_at else None

    torch.manual_seed(fence)  # another process has drawn other numbers
    try:
        last = run.last_record(job.model_copy(update=again | changes), emit, asked)
    except Killed:
        return None, told
    return last, told


def adapter(last: Record | None) -> dict[str, str]:
    assert isinstance(last, ResultRecord), last
    found = {file.name: file.sha256 for file in last.artifacts if file.name.startswith("adapter/")}
    assert "adapter/adapter_model.safetensors" in found
    return found


def told_steps(told: Sequence[Record]) -> list[int]:
    return [record.step for record in told if isinstance(record, StepRecord)]


def asked_for(assign: Assign, method: str = "pdu", hyperparameters: Mapping[str, Any] = {}, **spec: Any) -> Assignment:
    return assign(method, {"learning_rate": 1e-3, "forget_rows": 2, "retain_rows": 2, **hyperparameters}, **spec)


@pytest.mark.parametrize(
    ("method", "hyperparameters"),
    [*METHODS[:4], *(pytest.param(*one, marks=pytest.mark.slow) for one in METHODS[4:])],
    ids=lambda v: str(v),
)
def test_killed_at_a_step_and_gone_on_with_it_is_the_same_adapter(
    assign: Assign, tmp_path: Path, method: str, hyperparameters: dict[str, Any]
) -> None:
    job = asked_for(assign, method, hyperparameters, budget={"max_steps": STEPS})
    whole, undisturbed = attempt(job, tmp_path, fence=9)
    none, before = attempt(job, tmp_path, killed_at=4)  # the steps after the second checkpoint are lost
    last, after = attempt(job, tmp_path, before, fence=2)
    assert none is None
    assert told_steps(before) == [1, 2, 3, 4]
    assert told_steps(after) == [4, 5]
    assert [record.step for record in after if isinstance(record, ResumedRecord)] == [3]
    assert adapter(last) == adapter(whole)
    alone = [r.model_copy(update={"elapsed_seconds": 0, "tokens_per_second": 0}) for r in undisturbed if is_step(r)]
    both = [
        r.model_copy(update={"elapsed_seconds": 0, "tokens_per_second": 0}) for r in before[:-1] + after if is_step(r)
    ]
    assert both == alone, "losses, duals and gradients of every step"


def is_step(record: Record) -> bool:
    return isinstance(record, StepRecord)


def test_every_solver_is_killed_once() -> None:
    def solver(method: str, hyperparameters: dict[str, Any]) -> str:
        return registry.composition(registry.build_method(method, hyperparameters))["solver"]

    assert {solver(*one) for one in METHODS} == set(registry.entries("solvers"))


def test_the_report_of_an_attempt_that_went_on_tells_of_all_steps(assign: Assign, tmp_path: Path) -> None:
    job = asked_for(assign, budget={"max_steps": STEPS})
    _, first = attempt(job, tmp_path, killed_at=3)
    _, second = attempt(job, tmp_path, first, fence=2, killed_at=4)
    last, _ = attempt(job, tmp_path, [*first, *second], fence=3)
    report = report_of(job.model_copy(update={"prefix": f"{job.folder}/attempts/3"}))
    assert [step.step for step in report.trajectory.steps] == [1, 2, 3, 4, 5]
    assert report.trajectory.resumed == [2, 3]
    assert report.stop.step == STEPS
    assert isinstance(last, ResultRecord)


def test_a_pause_saves_and_an_attempt_goes_on_after_it(assign: Assign, tmp_path: Path) -> None:
    job = asked_for(assign, budget={"max_steps": STEPS})
    whole, _ = attempt(job, tmp_path, fence=9, every=None)
    paused, before = attempt(job, tmp_path, paused_at=2, every=None)
    last, after = attempt(job, tmp_path, before, fence=2, every=None)
    assert isinstance(paused, PausedRecord)
    assert [record.step for record in before if isinstance(record, CheckpointRecord)] == [2], (
        "only because of the pause"
    )
    assert told_steps(after) == [3, 4, 5]
    assert adapter(last) == adapter(whole)


def test_after_the_solve_only_the_measuring_is_done_again(
    assign: Assign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = asked_for(assign, budget={"max_steps": 3})
    whole, told = attempt(job, tmp_path, every=None)
    monkeypatch.setattr(checkpoint.Keeper, "_due", lambda self, run: False)
    last, after = attempt(job, tmp_path, told, fence=2)
    assert told_steps(after) == []
    assert not any(isinstance(record, CheckRecord) for record in after), "the closing check was kept too"
    assert adapter(last) == adapter(whole)


@pytest.mark.parametrize("damage", ["torn", "altered", "gone"])
def test_a_torn_checkpoint_is_told_of_and_the_one_before_it_is_used(
    assign: Assign, tmp_path: Path, damage: str
) -> None:
    job = asked_for(assign, budget={"max_steps": STEPS})
    whole, _ = attempt(job, tmp_path, fence=9)
    _, before = attempt(job, tmp_path, killed_at=4)
    spoil(job, before, -1, damage)
    last, after = attempt(job, tmp_path, before, fence=2)
    assert [r.code for r in after if isinstance(r, WarningRecord)].count("checkpoint_unreadable") == 1
    assert told_steps(after) == [3, 4, 5]
    assert adapter(last) == adapter(whole)


def test_without_a_readable_one_it_begins_at_the_beginning(assign: Assign, tmp_path: Path) -> None:
    job = asked_for(assign, budget={"max_steps": STEPS})
    whole, _ = attempt(job, tmp_path, fence=9)
    _, before = attempt(job, tmp_path, killed_at=4)
    spoil(job, before, -1, "gone")
    spoil(job, before, -2, "altered")
    last, after = attempt(job, tmp_path, before, fence=2)
    assert told_steps(after) == [1, 2, 3, 4, 5]
    assert [record.step for record in after if isinstance(record, ResumedRecord)] == [0]
    assert adapter(last) == adapter(whole)


def spoil(job: Assignment, told: Sequence[Record], which: int, damage: str) -> None:
    record = [r for r in told if isinstance(r, CheckpointRecord)][which]
    path = Path(job.storage_url) / record.key
    content = bytearray(path.read_bytes())
    match damage:
        case "torn":
            path.write_bytes(content[: len(content) // 2])
        case "altered":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "gone":
            path.unlink()


def silent(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """What has this in its key is there, but the storage does not answer."""
    real = Storage.open

    def away(self: Storage, key: str) -> Any:
        if part in key:
            raise StorageUnavailable("the storage failed: Connection refused")
        return real(self, key)

    monkeypatch.setattr(Storage, "open", away)


def test_a_storage_that_does_not_answer_is_no_reason_to_begin_at_the_beginning(
    assign: Assign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = asked_for(assign, budget={"max_steps": STEPS})
    _, before = attempt(job, tmp_path, killed_at=4)
    silent(monkeypatch, "/checkpoints/")
    last, after = attempt(job, tmp_path, before, fence=2)
    assert last is not None
    assert getattr(last, "code", None) == "artifact_upload_failed", "worth another attempt, later"
    assert told_steps(after) == []


def test_one_that_was_not_saved_is_tried_again_when_the_run_is_paused(
    assign: Assign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = asked_for(assign, budget={"max_steps": STEPS})
    real, tries = Storage.put, []

    def full_once(self: Storage, key: str, source: Path) -> Any:
        tries.append(key)
        if len(tries) == 1:
            raise StorageFull("the storage takes no more")
        return real(self, key, source)

    monkeypatch.setattr(Storage, "put", full_once)
    last, told = attempt(job, tmp_path, paused_at=3, every=3)
    assert isinstance(last, PausedRecord)
    assert tries == 2 * ["jobs/ujob_1/checkpoints/1-3"]
    assert [record.step for record in told if isinstance(record, CheckpointRecord)] == [3]


def test_where_one_does_not_answer_the_one_before_it_is_used(
    assign: Assign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = asked_for(assign, budget={"max_steps": STEPS})
    _, before = attempt(job, tmp_path, killed_at=4)
    silent(monkeypatch, "/checkpoints/1-3")
    last, after = attempt(job, tmp_path, before, fence=2)
    assert isinstance(last, ResultRecord)
    assert told_steps(after) == [3, 4, 5]


def test_the_best_iterate_so_far_comes_along(assign: Assign, tmp_path: Path) -> None:
    """The bound is kept at first and broken later: what is released was checked before the kill."""
    sizes = {"forget_rows": 3, "retain_rows": 4, "learning_rate": 0.01}
    job = asked_for(
        assign, "grad_ascent", sizes, budget={"max_steps": 12}, constraint=Constraint(epsilon_relative=0.11)
    )
    whole, undisturbed = attempt(job, tmp_path, fence=9)
    best = [record.step for record in undisturbed if isinstance(record, CheckRecord) and record.best][-1]
    assert best < 8
    _, before = attempt(job, tmp_path, killed_at=10)
    last, after = attempt(job, tmp_path, before, fence=2)
    assert told_steps(after) == [10, 11, 12]
    assert not any(isinstance(record, CheckRecord) and record.best for record in after)
    assert adapter(last) == adapter(whole)


def test_as_many_threads_as_before_unless_the_worker_says_how_many() -> None:
    own = torch.get_num_threads()
    try:
        for asked, then in ((None, 2), (1, 1)):
            torch.set_num_threads(1)
            checkpoint.restore(example()._replace(threads=2), params(), Diary(lambda record: None), asked)
            assert torch.get_num_threads() == then
    finally:
        torch.set_num_threads(own)


def test_a_full_disk_at_a_checkpoint_is_told_of_once_and_the_run_goes_on(
    assign: Assign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = asked_for(assign, budget={"max_steps": STEPS})
    whole, _ = attempt(job, tmp_path, fence=9)
    real = Storage.put

    def full(self: Storage, key: str, source: Path) -> Any:
        if "/checkpoints/" in key:
            raise StorageFull("the storage takes no more")
        return real(self, key, source)

    monkeypatch.setattr(Storage, "put", full)
    last, told = attempt(job, tmp_path)
    assert [r.code for r in told if isinstance(r, WarningRecord)].count("checkpoint_not_saved") == 1
    assert adapter(last) == adapter(whole)
    assert list(tmp_path.glob("attempt-1/checkpoint*")) == []


@pytest.mark.slow
def test_smaller_micro_batches_give_the_same_numbers_up_to_rounding(assign: Assign, tmp_path: Path) -> None:
    job = asked_for(assign, budget={"max_steps": STEPS})
    _, whole = attempt(job, tmp_path, fence=9)
    _, before = attempt(job, tmp_path, killed_at=3)
    last, after = attempt(job, tmp_path, before, fence=2, micro_batch_tokens=8)
    assert isinstance(last, ResultRecord)
    steps = {record.step: record for record in whole if isinstance(record, StepRecord)}
    for record in after:
        if isinstance(record, StepRecord):
            assert record.losses == pytest.approx(steps[record.step].losses, rel=1e-4)
    bigger, again = attempt(job, tmp_path, after, fence=3, micro_batch_tokens=10**6)
    assert isinstance(bigger, ResultRecord)
    assert told_steps(again) == [], "what is known to fit is kept"


def test_purging_a_set_makes_its_checkpoints_noise(assign: Assign, tmp_path: Path) -> None:
    job = asked_for(assign, budget={"max_steps": STEPS})
    _, told = attempt(job, tmp_path, killed_at=3)
    record = next(record for record in told if isinstance(record, CheckpointRecord))
    stored = b"".join(Storage(job.storage_url).read(record.key))
    opened = b"".join(files.sealed_with(job.storage_url, [job.forget_file, job.retain_file]).read(record.key))
    assert b"lora_A" in opened
    assert b"lora_A" not in stored
    with pytest.raises(StorageUnavailable):
        b"".join(files.sealed_with(job.storage_url, [job.retain_file]).read(record.key))


# --- the file itself


def params() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}


def example() -> checkpoint.Kept:
    seen = Checked(2, Measurement(math.inf, 0.1, 0.25, 0.5, generation_tokens=70), True)
    state = {"primal": {"step": 2, "mean_P": torch.tensor([0.1, 1e-30, -3.0])}, "duals": {"retain": 1 / 3}, "step": 2}
    best = {name: p + 1 for name, p in params().items()}
    went = Run(state, 2, 64, 32, 1.5, (0.1, 0.2), seen, seen, best, Stop(StopReason.MAX_STEPS, "done"))
    return checkpoint.Kept(went, params(), Measurement(1.0, 0.9, math.nan, 0.2), [], [], [1], 4096, ["base"], 1)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "c", example())
    found = checkpoint.read(tmp_path / "c", params(), ["base"])
    one, other = found.run, example().run
    assert one._replace(state=None, best_params=None) == other._replace(state=None, best_params=None)
    assert one.state["duals"] == other.state["duals"]
    assert torch.equal(one.state["primal"]["mean_P"], other.state["primal"]["mean_P"])
    assert one.best_params is not None
    assert all(torch.equal(one.best_params[name], p + 1) for name, p in params().items())
    assert all(torch.equal(found.params[name], p) for name, p in params().items())
    assert math.isnan(found.before.retain_loss)
    assert (found.resumed, found.micro_batch_tokens) == ([1], 4096)


def test_one_of_another_version_or_another_adapter_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path / "c", example())
    with pytest.raises(checkpoint.UnreadableError, match="another adapter"):
        checkpoint.read(tmp_path / "c", {"a": torch.zeros(4)}, ["base"])
    with pytest.raises(checkpoint.UnreadableError, match="another base"):
        checkpoint.read(tmp_path / "c", params(), ["base", "bfloat16"])
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    with pytest.raises(checkpoint.UnreadableError, match="format 3, and this version's is 4"):
        checkpoint.read(tmp_path / "c", params(), ["base"])


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    draw()
    checkpoint.write(tmp_path / "c", example())
    expected = draw()
    draw()
    checkpoint.restore(
        checkpoint.read(tmp_path / "c", params(), ["base"]), params(), Diary(lambda record: None), threads=1
    )
    assert draw() == expected


def test_one_is_due_by_steps_by_the_clock_and_at_the_end(assign: Assign, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def steps_kept(every_s: float, every_steps: int | None, stop: Stop | None = None) -> list[int]:
        told: list[Record] = []
        job = assign().model_copy(update={"checkpoint_every_s": every_s, "checkpoint_every_steps": every_steps})
        sealed = files.sealed_with(job.storage_url, [job.forget_file])
        network: Any = type("N", (), {"tokens_at_once": 4096})
        monkeypatch.setattr(checkpoint, "runs_on", lambda network: [])
        now[0] = 0.0
        keeper = checkpoint.Keeper(
            job, sealed, Diary(told.append), params(), example().before, network, None, clock=lambda: now[0]
        )
        for step in range(1, 8):
            now[0] += 10.0
            keeper.keep(Run({}, step, stop=stop if step == 7 else None))
        return [record.step for record in told if isinstance(record, CheckpointRecord)]

    at_the_end = Stop(StopReason.MAX_STEPS, "")
    assert steps_kept(math.inf, 3) == [3, 6]
    assert steps_kept(25.0, None) == [3, 6]
    assert steps_kept(math.inf, None, at_the_end) == [7]
    assert steps_kept(math.inf, 3, at_the_end) == [3, 6, 7]
    assert steps_kept(math.inf, None, Stop(StopReason.CANCELLED, "")) == [], "nobody goes on with it"
