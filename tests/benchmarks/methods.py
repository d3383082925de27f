"""Every method on the same request: TOFU's forget01, one model, one epsilon, equal seconds of solving, several seeds.

    python tests/benchmarks/methods.py --model MODEL --tofu DATA/tofu [--seconds 40] [--seeds 5] [--processes 2] [METHOD ...]

MODEL is a folder that save_pretrained wrote, of a model that knows TOFU; DATA/tofu has full.json and forget01_perturbed.json.
A method may carry hyperparameters: npo:learning_rate=0.002,beta=0.2. Every run goes the way of a job from its encoded rows to
its released iterate, with the same functions; only loading, generation and publication are left out. The figures are
those of the iterate that would be released or, where none kept the bound, of the last one, as in a report. Printed is a
Markdown table of means and, behind +-, standard deviations over seeds.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from service.domain.job import Budget, Constraint, JobSpec, MethodChoice, ModelEntry, PromptFormat
from service.domain.rows import Example
from service.store.sealed import SealedStorage
from service.store.storage import Storage
from worker import data, measure, model, registry, run, scoring
from worker.diary import Diary
from worker.model import Network
from worker.records import Assignment, FileRef
from worker.report import FORGET_RATIO
from worker.solve import Run
from worker.views import Term

METRICS = ("probability", "exact_memorization", "extraction_strength")
NO_FILE = "ufile_" + 32 * "0"


class Task(NamedTuple):
    method: str
    hyperparameters: Mapping[str, Any]
    seed: int
    options: argparse.Namespace


def job(task: Task, entry: ModelEntry, scratch: Path) -> Assignment:
    options = task.options
    spec = JobSpec(
        model=entry.name,
        method=MethodChoice(type=task.method, hyperparameters=dict(task.hyperparameters)),
        constraint=Constraint(epsilon_relative=options.epsilon_relative),
        budget=Budget(max_steps=options.steps, max_seconds=options.seconds),
        seed=task.seed,
        forget_set=NO_FILE,
        retain_set=NO_FILE,
    )
    file = FileRef(id=NO_FILE, key="unused", sha256="0", digest="0", data_key="", rows=1, bytes=1)
    return Assignment(
        job_id="benchmark",
        attempt=1,
        fence=1,
        spec=spec,
        model=entry,
        forget_file=file,
        retain_file=file,
        row_key=b64encode(bytes(32)),
        storage_url=str(scratch),
        prefix="jobs/benchmark/attempts/1",
        models_root=options.model.parent,
        scratch_dir=scratch,
        device=options.device,
        dtype=options.dtype,
    )


class Solved(NamedTuple):
    """A run's end: the adapter in the network is the one that would be released or, where none would be, the last iterate."""

    network: Network
    both: measure.Sets
    before: measure.Measurement
    after: measure.Measurement
    epsilon: float
    solution: Run
    diary: Diary
    seconds: float

    @property
    def passed(self) -> bool:
        forgotten = self.after.forget_probability <= FORGET_RATIO * self.before.forget_probability
        return self.solution.best is not None and forgotten


def run_one(task: Task) -> dict[str, Any]:
    """One run, in a process of its own."""
    torch.set_num_threads(task.options.threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as scratch:
        ended = solved(task, Path(scratch))
    checks = ended.diary.checks
    return {
        "method": label(task),
        "seed": task.seed,
        "verdict": "PASSED" if ended.passed else "FAILED",
        "released": ended.solution.best is not None,
        "steps": ended.solution.steps,
        "seconds": ended.seconds,
        "stop": ended.solution.stop.reason,
        "feasible_checks": sum(check.feasible for check in checks) / max(len(checks), 1),
        "retain_loss": ended.after.retain_loss,
        "epsilon": ended.epsilon,
        "truth_ratio": truth_ratio(ended.network, task.options),
        **figures(ended.network, ended.both),
    }


def load(options: argparse.Namespace, folder: Path) -> Network:
    prompt = PromptFormat(type="chat") if options.chat else PromptFormat()
    entry = ModelEntry(name="benchmark", source="path", location=folder.name, prompt_format=prompt)
    return model.load(entry, folder.parent, options.device, options.dtype)


def solved(task: Task, scratch: Path) -> Solved:
    """From the encoded rows to the released iterate."""
    base = load(task.options, task.options.model)
    assignment = job(task, base.entry, scratch)
    method = registry.build_method(task.method, task.hyperparameters)
    storage = Storage(str(scratch))
    forget_rows, retain_rows = sets(task.options)
    forget = Term(method.forget, run.forget_texts(assignment, storage, method, forget_rows, base))
    retain = run.retain_term(method, retain_rows, base)
    network = model.adapt(base, assignment.spec.lora, task.seed, method.layers)
    sealed = SealedStorage(str(scratch), bytes(32))
    both = measure.sets(*run.with_reference(assignment, sealed, network, method, forget, retain), task.seed)
    with model.adapter_off(network):
        before = measure.measure(network, both)
    epsilon = assignment.spec.constraint.bound(before.retain_loss)
    diary = Diary(lambda record: None)
    began = time.monotonic()
    solution = run.unlearn(
        assignment,
        method,
        network,
        model.trainable(network),
        both,
        epsilon,
        diary,
        asked=lambda: None,
        keep=lambda at: None,
        resumed=None,
    )
    seconds = time.monotonic() - began
    if solution.best_params is not None:
        model.assign(network, solution.best_params)
    after = measure.measure(network, both)
    return Solved(network, both, before, after, epsilon, solution, diary, seconds)


def sets(options: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """forget01's 40 rows, and rows of other authors: 400 and the 360 before forget01, or fewer from their end."""
    rows = [Example("question", row["question"], row["answer"]) for row in read(options.tofu / "full.json")]
    retain = rows[:400] + rows[3600:3960]
    return rows[3960:4000], retain[-options.retain_rows :]


def figures(network: Network, both: measure.Sets) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, term in (("forget", both.forget), ("retain", both.retain)):
        scores = scoring.score(network, [term.encoded.rows[p] for p in term.encoded.measured], frozenset({"hits"}))
        for metric in METRICS:
            value = registry.build("metrics", metric, {}).fn(scores).value
            found[f"{name}_{metric}"] = math.nan if value is None else value
    return found


def truth_ratio(network: Network, options: argparse.Namespace) -> float:
    """TOFU's forget truth ratio: mean over rows of min(tr, 1/tr), tr = wrong answers' likelihood over the right one's."""
    rows = read(options.tofu / "forget01_perturbed.json")
    right = losses(network, [Example("question", row["question"], row["paraphrased_answer"]) for row in rows])
    wrong = [
        losses(network, [Example("question", row["question"], row["perturbed_answer"][k]) for row in rows])
        for k in range(len(rows[0]["perturbed_answer"]))
    ]
    ratio = (-torch.stack(wrong).mean(0)).exp() / ((-right).exp() + 1e-10)
    return float(torch.minimum(ratio, 1 / (ratio + 1e-10)).mean())


def losses(network: Network, rows: Sequence[Example]) -> torch.Tensor:
    """Mean NLL per counted token of each row, [B]."""
    encoded = data.encode(rows, network.tokenizer, network.entry.prompt_format, network.context_tokens)
    scores = scoring.score(network, encoded.rows, frozenset())
    return scores.nll_B / scores.counted_B


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def label(task: Task) -> str:
    return task.method + "".join(f", {name}={value}" for name, value in task.hyperparameters.items())


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """npo:beta=0.2,learning_rate=0.002"""
    name, _, given = text.partition(":")
    pairs = [pair.partition("=") for pair in given.split(",") if pair]
    return name, {key: json.loads(value) if value[:1] in "-0123456789tf" else value for key, _, value in pairs}


COLUMNS = {
    "forget_probability": "forget prob.",
    "forget_exact_memorization": "EM",
    "forget_extraction_strength": "ES",
    "truth_ratio": "truth ratio",
    "retain_probability": "retain prob.",
    "retain_loss": "retain loss",
    "feasible_checks": "feasible checks",
    "steps": "steps",
    "seconds": "s",
}


def table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"| method | PASSED | {' | '.join(COLUMNS.values())} |"
    yield "|---" * (len(COLUMNS) + 2) + "|"
    for name in dict.fromkeys(result["method"] for result in results):
        runs = [result for result in results if result["method"] == name]
        passed = sum(result["verdict"] == "PASSED" for result in runs)
        cells = [spread([float(result[column]) for result in runs]) for column in COLUMNS]
        yield f"| {name} | {passed} of {len(runs)} | {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; what is below a thousandth is as good as nothing."""
    mean = statistics.fmean(values)
    shown = f"{mean:.3g}" if mean >= 1e-3 or mean == 0 else "< 0.001"
    return shown if len(values) == 1 or shown[0] == "<" else f"{shown} ± {statistics.stdev(values):.2g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="default: all but custom")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tofu", type=Path, required=True)
    parser.add_argument(
        "--chat", action="store_true", help="the tokeniser's chat template instead of TOFU's plain prompt"
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="of solving")
    parser.add_argument("--steps", type=int, default=100_000, help="at most")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epsilon-relative", type=float, default=0.1)
    parser.add_argument("--retain-rows", type=int, default=760)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="JSON Lines, one for each run")
    options = parser.parse_args()
    chosen = options.methods or [name for name in registry.entries("methods") if name != "custom"]
    tasks = [Task(*parsed(text), seed, options) for text in chosen for seed in range(options.seeds)]
    results = []
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for result in pool.map(run_one, tasks):
            results.append(result)
            print(json.dumps(result), file=options.out.open("a") if options.out else sys.stderr, flush=True)
    example = results[0]
    print(
        f"\nepsilon {example['epsilon']:.4g} nats per token, {options.seconds:g} s of solving, {options.seeds} seeds\n"
    )
    print("\n".join(table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
