"""What a run tells, sent on at once and kept for the report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.domain.job import Stage
from service.domain.report import Note
from worker.records import CheckRecord, Record, StageRecord, StepRecord, WarningRecord
from worker.solve import Checked, Progress

Emit = Callable[[Record], None]


class Diary:
    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.steps: list[StepRecord] = []
        self.checks: list[CheckRecord] = []
        self.warnings: list[Note] = []
        self.resumed: list[int] = []  # the steps after which an attempt went on from a checkpoint
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, stage: Stage, label: str | None = None) -> Iterator[None]:
        self.emit(StageRecord(stage=stage))
        began = time.monotonic()
        yield
        self.seconds[label or stage.value.replace("_", " ")] = round(time.monotonic() - began, 3)

    def warn(self, code: str, message: str) -> None:
        self.warnings.append(Note(code=code, message=message))
        self.emit(WarningRecord(code=code, message=message))

    def warn_once(self, code: str, message: str) -> None:
        if all(note.code != code for note in self.warnings):
            self.warn(code, message)

    def step(self, progress: Progress, epsilon: float) -> None:
        report = progress.report
        record = StepRecord(
            step=progress.step,
            losses=report.values,
            dual=report.duals,
            violation={"retain": report.values["retain"] - epsilon},
            learning_rate=report.learning_rate,
            gradient_norm=report.gradient_norm,
            tokens=progress.tokens,
            tokens_per_second=progress.step_tokens / max(progress.step_s, 1e-9),
            elapsed_seconds=progress.elapsed_s,
            extra=report.extra,
        )
        self.steps.append(record)
        self.emit(record)

    def check(self, checked: Checked, best: bool, seconds: float, epsilon: float, rows: int) -> None:
        measured = checked.measured
        record = CheckRecord(
            step=checked.step,
            forget_objective=measured.forget_objective,
            forget_probability=measured.forget_probability,
            retain_loss=measured.retain_loss,
            retain_upper=measured.retain_upper,
            epsilon=epsilon,
            feasible=checked.feasible,
            best=best,
            rows=rows,
            seconds=seconds,
        )
        self.checks.append(record)
        self.emit(record)
