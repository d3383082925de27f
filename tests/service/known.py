"""What the model of the random walks knows of a job: what its row must show, and what its worker would tell next."""

from dataclasses import dataclass, field
from typing import NamedTuple

from service.domain.job import Status
from service.store.rows import CheckpointRow, CheckRow, Claim, StepRow

S = Status
TOKENS = 100  # of each step


class Told(NamedTuple):
    """A batch of an attempt: where it goes on from, the steps it made, and how many of them, from the first, it saved."""

    resumed: int | None
    steps: range
    saves: int

    def rows(self) -> list[StepRow]:
        return [StepRow(step, {}, {}, {}, 0.1, 1.0, TOKENS * step, 10.0, 1.0) for step in self.steps]

    def checks(self) -> list[CheckRow]:
        return [CheckRow(step, 1.0, 0.5, 1.0, 1.1, 1.2, True, True, 1, 0.1) for step in self.steps]

    def checkpoints(self, claim: Claim) -> list[CheckpointRow]:
        folder = f"jobs/{claim.job_id}/checkpoints"
        return [CheckpointRow(step, f"{folder}/{claim.fence}-{step}", 1, 64 * "a") for step in self.steps[: self.saves]]


@dataclass
class Known:
    status: Status = S.QUEUED
    holder: Claim | None = None
    lapsed: bool = False  # its lease is over, and no sweep has seen it
    rests: bool = False
    claims: int = 0
    attempt: int = 0
    content_failures: int = 0
    infra_losses: int = 0
    step: int = 0
    begun: bool = False  # the current attempt told where it goes on from
    saved: list[str] = field(default_factory=list)  # "fence step" of its checkpoints, the newest first

    def taken(self, claim: Claim) -> None:
        self.status, self.holder, self.lapsed, self.begun = S.RUNNING, claim, False, False
        self.claims += 1
        self.attempt += 1

    def next(self, claim: Claim, steps: int, saves: int, torn: int) -> Told:
        """What this claim would tell, if the newest `torn` checkpoints could not be read. One that was lost begins anew."""
        start, resumed = self.step, None
        if self.saved and not (self.begun and self.holder == claim):
            start = resumed = step_of(self.saved[torn:])
        return Told(resumed, range(start + 1, start + 1 + steps), saves)

    def tell(self, told: Told) -> None:
        """By its holder."""
        self.begun = True
        if told.resumed is not None:
            self.step = told.resumed
            while self.saved and step_of(self.saved) != told.resumed:
                del self.saved[0]
        if told.steps:
            self.step = told.steps[-1]
        if new := [f"{self.claims} {step}" for step in reversed(told.steps[: told.saves])]:
            self.saved = [*new, *(one for one in self.saved if one not in new)][:2]
            self.infra_losses = 0

    def left(self, target: Status) -> None:
        """By whoever held it, or waiting no longer."""
        self.status, self.holder, self.lapsed, self.rests = target, None, False, False
        self.begun &= target is S.SUCCEEDED
        if target in {S.SUCCEEDED, S.CANCELLED}:
            self.saved = []
        if target in {S.QUEUED, S.PAUSED}:
            self.step = step_of(self.saved)


def step_of(saved: list[str]) -> int:
    """From which the next attempt goes on."""
    return int(saved[0].split()[1]) if saved else 0
