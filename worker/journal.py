"""What the runner told, as rows and events on their way to the database. No I/O but the one write."""

from typing import Any

from sqlalchemy.orm import Session

from service.store import jobs
from service.store.rows import CheckpointRow, CheckRow, Claim, ConstraintRow, Event, StepRow, WarningRow
from worker.records import (
    AnyRecord,
    CheckpointRecord,
    CheckRecord,
    ConstraintRecord,
    ResumedRecord,
    StageRecord,
    StepRecord,
    WarningRecord,
)

PROGRESS_EVERY_S = 2.0


class Journal:
    """Records in; entries, each the arguments of one `jobs.log`, out. They stay until their write is known to be done."""

    def __init__(self, steps_total: int) -> None:
        self._steps_total = steps_total
        self._entries: list[dict[str, Any]] = []
        self.saved: list[CheckpointRecord | ResumedRecord] = []  # what it has of checkpoints
        self._told_progress_at = float("-inf")
        self.urgent = False  # a stage began, whose times are those of the write; or a checkpoint waits for its row

    def __bool__(self) -> bool:
        return bool(self._entries)

    def add(self, record: AnyRecord, now: float) -> None:
        """A last record is not for the journal: it is the outcome."""
        match record:
            case StageRecord():
                self._entries.append({"stage": record.stage})  # an entry holds one stage, and what followed it
                self.urgent = True
            case StepRecord():
                self._put("steps", StepRow(**record.model_dump(exclude={"type"})))
                if now - self._told_progress_at >= PROGRESS_EVERY_S or record.step == self._steps_total:
                    self._told_progress_at = now
                    self._put("events", _progress(record, self._steps_total))
            case CheckRecord():
                self._put("checks", CheckRow(**record.model_dump(exclude={"type"})))
                self._put("events", _checked(record))
            case ConstraintRecord():
                self._entry()["constraint"] = ConstraintRow(record.epsilon, record.base_retain_loss)
                self._put("events", _bound(record))
            case CheckpointRecord():
                self._put("saved", CheckpointRow(**record.model_dump(exclude={"type"})))
                told = record.model_dump(include={"step", "bytes", "sha256"})
                self._put("events", Event("checkpoint.saved", f"checkpoint after step {record.step}", told))
                self.saved.append(record)
                self.urgent = True  # it is one once its row is written
            case ResumedRecord():
                self._entry()["resumed"] = (record.step, record.tokens)
                self.saved.append(record)
                message = f"goes on after step {record.step}, from a checkpoint"
                if record.step:
                    self._put("events", Event("checkpoint.resumed", message, {"step": record.step}))
            case WarningRecord():
                self._put("warnings", WarningRow(record.code, record.message))
                self._put("events", Event("warning", record.message, {"code": record.code}, "warn"))

    def write(self, s: Session, claim: Claim) -> bool:
        """Everything so far, in the caller's transaction; after its commit, `clear`. False: fenced out."""
        return all(jobs.log(s, claim.job_id, claim.fence, **entry) for entry in self._entries)

    def clear(self) -> None:
        self._entries.clear()
        self.saved.clear()
        self.urgent = False

    def _entry(self) -> dict[str, Any]:
        if not self._entries:
            self._entries.append({})
        return self._entries[-1]

    def _put(self, kind: str, row: object) -> None:
        self._entry().setdefault(kind, []).append(row)


def _progress(step: StepRecord, total: int) -> Event:
    told = {"step", "losses", "dual", "violation", "tokens", "tokens_per_second", "elapsed_seconds"}
    return Event("job.progress", f"step {step.step} of at most {total}", step.model_dump(include=told))


def _checked(check: CheckRecord) -> Event:
    kept = "within" if check.feasible else "over"
    message = (
        f"check at step {check.step}: forget probability {check.forget_probability:.4g}, "
        f"retain loss {check.retain_loss:.4g}, {kept} {check.epsilon:.4g}"
    )
    return Event("metrics", message, check.model_dump(exclude={"type"}))


def _bound(constraint: ConstraintRecord) -> Event:
    message = (
        f"the retain loss was {constraint.base_retain_loss:.4g} nats per token, epsilon is {constraint.epsilon:.4g}"
    )
    return Event("metrics", message, constraint.model_dump(exclude={"type"}))
