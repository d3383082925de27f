"""What an attempt can go on from when the one before it was ended: a run between two steps, whole.

In it are the adapter, the solver's state with the multipliers and the optimiser's moments, the best iterate so far, the random
states, how the model measured before anything was trained, and what the report will tell of the steps. The order of the data
is a function of the step. On processors of one kind, with as many threads, a run that goes on comes to the same adapter bit
for bit; on an accelerator up to what two undisturbed runs of it differ by. Where the base, its type, the kind of device or
the adapter that the job starts from is another, it does not go on: what was promised was measured there.

One is written under a name of its own, and is one once the supervisor has written its row, with its digest, under the
attempt's fence: a runner that has lost its job can leave bytes behind, but no checkpoint. The last two stay. Sealed as what
models say of the sets is: who purges one of them has made it noise.
"""

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from service.domain.errors import NotFound, StorageFull, StorageUnavailable
from service.store.sealed import SealedStorage
from service.store.storage import CHUNK_BYTES
from worker.diary import Diary
from worker.looks import adapter_digest
from worker.measure import Measurement
from worker.model import Network, adapter_off
from worker.problem import Params
from worker.records import Assignment, CheckpointRecord, CheckpointRef, CheckRecord, ResumedRecord, StepRecord
from worker.solve import Checked, Run, Stop, StopReason

FORMAT = 3  # raise it when what is written, or how rows are read, changes: a checkpoint of another format is none


class Kept(NamedTuple):
    run: Run
    params: Params
    before: Measurement
    steps: list[StepRecord]
    checks: list[CheckRecord]
    resumed: list[int]  # the steps after which earlier attempts went on
    micro_batch_tokens: int
    ran_on: list[str]
    threads: int
    random: dict[str, Any] | None = None  # None: those of now


class UnreadableError(Exception):
    """Not what was written, or written by a version that keeps other things."""


class Keeper:
    """Writes a checkpoint when one is due; `keep` is for worker.solve.

    Args:
        storage: sealed for the job's sets.
        params: the live ones.
        before: what they measured at the start.
        network: says in what micro-batches it runs.
        resumed: what the run went on from, if it did.
    """

    def __init__(
        self,
        job: Assignment,
        storage: SealedStorage,
        diary: Diary,
        params: Params,
        before: Measurement,
        network: Network,
        resumed: Kept | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job = job
        self._storage = storage
        self._diary = diary
        self._params = params
        self._before = before
        self._network = network
        self._clock = clock
        self._runs_on = runs_on(network)
        self._saved_step = self._tried_step = resumed.run.steps if resumed else 0
        self._tried_at = clock()

    def keep(self, run: Run) -> None:
        """A storage that takes nothing does not end the run: only what it did since the last one would be lost."""
        if not self._due(run):
            return
        asked = run.stop is not None and run.stop.reason is StopReason.PAUSED
        kept = Kept(
            run._replace(stop=None) if asked else run,
            self._params,
            self._before,
            self._diary.steps,
            self._diary.checks,
            self._diary.resumed,
            self._network.tokens_at_once,
            self._runs_on,
            torch.get_num_threads(),
        )
        path = self._job.scratch_dir / "checkpoint"
        key = f"{self._job.folder}/checkpoints/{self._job.fence}-{run.steps}"
        try:
            write(path, kept)
            stored = self._storage.put(key, path)
        except (OSError, RuntimeError, StorageFull, StorageUnavailable) as error:  # torch.save has no type of its own
            self._diary.warn_once("checkpoint_not_saved", f"a checkpoint could not be saved: {type(error).__name__}")
        else:
            self._saved_step = run.steps
            self._diary.emit(CheckpointRecord(step=run.steps, key=key, bytes=stored.bytes, sha256=stored.sha256))
        finally:
            path.unlink(missing_ok=True)
            self._tried_step, self._tried_at = run.steps, self._clock()

    def _due(self, run: Run) -> bool:
        if run.steps == self._saved_step or (run.stop is not None and run.stop.reason is StopReason.CANCELLED):
            return False
        every_steps = self._job.checkpoint_every_steps
        by_steps = every_steps is not None and run.steps - self._tried_step >= every_steps
        return run.stop is not None or by_steps or self._clock() - self._tried_at >= self._job.checkpoint_every_s


def last_readable(
    storage: SealedStorage,
    refs: Sequence[CheckpointRef],
    scratch: Path,
    params: Params,
    network: Network,
    diary: Diary,
) -> Kept | None:
    """The newest that is what was written; a torn one is told of, and the one before it taken. None: from the beginning.

    Args:
        refs: newest first.
        params: that it must fit.
        network: with its adapter, as the run would go on with it.

    Raises StorageUnavailable where the storage gives none: that it does not answer is no reason to begin at the beginning.
    """
    path, away = scratch / "checkpoint", None
    for ref in refs:
        try:
            _fetch(storage, ref, path)
            return read(path, params, runs_on(network))
        except UnreadableError as error:
            diary.warn("checkpoint_unreadable", f"the checkpoint of step {ref.step} is not used: {error}")
        except StorageUnavailable as error:
            away = error
            diary.warn("checkpoint_unreadable", f"the checkpoint of step {ref.step} is not used: {error}")
        finally:
            path.unlink(missing_ok=True)
    if away is not None:
        raise away
    if refs:
        diary.emit(ResumedRecord(step=0, tokens=0))
    return None


def runs_on(network: Network) -> list[str]:
    """What a run must find again to go on: the base, how it computes, and the adapter that the job starts from."""
    with adapter_off(network):
        parent = adapter_digest(network)
    return [network.digest, network.tokenizer_digest, network.dtype, network.device.type, parent]


def _fetch(storage: SealedStorage, ref: CheckpointRef, path: Path) -> None:
    sealed, said = path.with_suffix(".sealed"), hashlib.sha256()
    try:
        with storage.open(ref.key) as source, sealed.open("wb") as file:
            while chunk := source.read(CHUNK_BYTES):
                said.update(chunk)
                file.write(chunk)
        if said.hexdigest() != ref.sha256:
            raise UnreadableError("its bytes are not those that were written")
        with sealed.open("rb") as source, path.open("wb") as file:
            file.writelines(storage.unsealed(source))
    except NotFound as error:
        raise UnreadableError("it is no longer in the storage") from error
    finally:
        sealed.unlink(missing_ok=True)


@torch.no_grad()
def restore(kept: Kept, params: Params, diary: Diary, threads: int | None) -> Run:
    """The parameters, the random states and the diary as they were then.

    Args:
        threads: that the worker wants; None: as many as then.
    """
    if threads is None:
        torch.set_num_threads(kept.threads)
    for name, p in params.items():
        p.copy_(kept.params[name])
    if kept.random is not None:
        _set_random(kept.random)
    diary.steps, diary.checks, diary.resumed = [*kept.steps], [*kept.checks], [*kept.resumed, kept.run.steps]
    diary.emit(ResumedRecord(step=kept.run.steps, tokens=kept.run.tokens))
    return kept.run


def write(path: Path, kept: Kept) -> None:
    """A file that `torch.load` reads with weights_only: tensors, numbers and strings."""
    run = kept.run
    torch.save(
        {
            "format": FORMAT,
            "params": {name: p.detach() for name, p in kept.params.items()},
            "run": run._replace(last=None, best=None, stop=None)._asdict(),
            "last": _plain(run.last),
            "best": _plain(run.best),
            "stop": None if run.stop is None else (run.stop.reason.value, run.stop.message),
            "before": kept.before._asdict(),
            "steps": [step.model_dump() for step in kept.steps],
            "checks": [check.model_dump() for check in kept.checks],
            "resumed": kept.resumed,
            "micro_batch_tokens": kept.micro_batch_tokens,
            "ran_on": kept.ran_on,
            "threads": kept.threads,
            "random": kept.random or _random(),
        },
        path,
    )


def read(path: Path, params: Params, on: Sequence[str]) -> Kept:
    """What `write` wrote. Raises UnreadableError."""
    try:
        device = next(iter(params.values())).device
        found: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        if found["format"] != FORMAT:
            raise UnreadableError(f"it has format {found['format']}, and this version's is {FORMAT}")
        if {name: p.shape for name, p in found["params"].items()} != {name: p.shape for name, p in params.items()}:
            raise UnreadableError("it is of another adapter")
        if found["ran_on"] != list(on):
            raise UnreadableError("its run was on another base, type or kind of device")
        stop = found["stop"]
        run = Run(**found["run"])._replace(
            last=_checked(found["last"]),
            best=_checked(found["best"]),
            stop=None if stop is None else Stop(StopReason(stop[0]), stop[1]),
        )
        kept = Kept(
            run,
            found["params"],
            Measurement(**found["before"]),
            [StepRecord(**step) for step in found["steps"]],
            [CheckRecord(**check) for check in found["checks"]],
            found["resumed"],
            found["micro_batch_tokens"],
            found["ran_on"],
            found["threads"],
            found["random"],
        )
    except UnreadableError:
        raise
    except Exception as error:  # whatever a file of another version makes torch and us stumble over
        raise UnreadableError(f"another version wrote it ({type(error).__name__})") from error
    return kept


def _plain(checked: Checked | None) -> dict[str, Any] | None:
    if checked is None:
        return None
    assert isinstance(checked.measured, Measurement)
    return {"step": checked.step, "measured": checked.measured._asdict(), "feasible": checked.feasible}


def _checked(plain: dict[str, Any] | None) -> Checked | None:
    return None if plain is None else Checked(plain["step"], Measurement(**plain["measured"]), plain["feasible"])


def _random() -> dict[str, Any]:
    numbers: Any = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": numbers | {"state": {"key": numbers["state"]["key"].tolist(), "pos": numbers["state"]["pos"]}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numbers = states["numpy"]
    key = np.array(numbers["state"]["key"], dtype=np.uint32)
    np.random.set_state(numbers | {"state": {"key": key, "pos": numbers["state"]["pos"]}})
    torch.set_rng_state(states["torch"].cpu())
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
