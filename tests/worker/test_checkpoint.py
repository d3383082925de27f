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


@pytest.mark.parametrize(("method", "hyperparameters"), METHODS, ids=lambda v: str(v))
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
    monkeypatch.setattr(run.checkpoint.Keeper, "_due", lambda self, run: False)
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
    assert not any(isinstance(record, ResumedRecord) for record in after)
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


def test_a_storage_that_does_not_answer_is_no_reason_to_begin_at_the_beginning(
    assign: Assign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = asked_for(assign, budget={"max_steps": STEPS})
    _, before = attempt(job, tmp_path, killed_at=4)
    real = Storage.open

    def away(self: Storage, key: str) -> Any:
        if "/checkpoints/" in key:
            raise StorageUnavailable("the storage failed: Connection refused")
        return real(self, key)

    monkeypatch.setattr(Storage, "open", away)
    last, after = attempt(job, tmp_path, before, fence=2)
    assert last is not None
    assert getattr(last, "code", None) == "artifact_upload_failed", "worth another attempt, later"
    assert told_steps(after) == []


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
    seen = Checked(2, Measurement(math.inf, 0.1, 0.25, 0.5), True)
    state = {"primal": {"step": 2, "mean_P": torch.rand(3)}, "duals": {"retain": 1 / 3}, "step": 2}
    went = Run(state, 2, 64, 32, 1.5, (0.1, 0.2), seen, seen, params(), Stop(StopReason.MAX_STEPS, "done"))
    return checkpoint.Kept(went, params(), Measurement(1.0, 0.9, math.nan, 0.2), [], [], [1], 4096)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "c", example())
    found = checkpoint.read(tmp_path / "c", params())
    one, other = found.run, example().run
    assert one._replace(state=None, best_params=None) == other._replace(state=None, best_params=None)
    assert one.state["duals"] == other.state["duals"]
    assert one.state["primal"]["mean_P"].shape == (3,)
    assert all(torch.equal(found.params[name], p) for name, p in params().items())
    assert math.isnan(found.before.retain_loss)
    assert (found.resumed, found.micro_batch_tokens) == ([1], 4096)


def test_one_of_another_version_or_another_adapter_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path / "c", example())
    with pytest.raises(checkpoint.UnreadableError, match="another adapter"):
        checkpoint.read(tmp_path / "c", {"a": torch.zeros(4)})
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(checkpoint.UnreadableError, match="format 1, and this version's is 2"):
        checkpoint.read(tmp_path / "c", params())


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    draw()
    checkpoint.write(tmp_path / "c", example())
    expected = draw()
    draw()
    checkpoint.restore(checkpoint.read(tmp_path / "c", params()), params(), Diary(lambda record: None))
    assert draw() == expected


def test_one_is_due_by_steps_by_the_clock_and_at_the_end(assign: Assign, tmp_path: Path) -> None:
    now = [0.0]

    def steps_kept(every_s: float, every_steps: int | None, stop: Stop | None = None) -> list[int]:
        told: list[Record] = []
        job = assign().model_copy(update={"checkpoint_every_s": every_s, "checkpoint_every_steps": every_steps})
        sealed = files.sealed_with(job.storage_url, [job.forget_file])
        network: Any = type("N", (), {"tokens_at_once": 4096})
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
