"""How robust is what a method forgot: the audit on its result for TOFU's forget01.

    python tests/benchmarks/audit.py --model MODEL --retrained MODEL --tofu DATA/tofu [--adapters FOLDER] METHOD[@SECONDS] ...

MODEL knows TOFU, the retrained one never saw its forget01; both are folders that save_pretrained wrote. A method is named as for
methods.py, which solves it, with its own seconds of solving behind an @. Relearning is tried at each learning rate that
is given. Printed is a Markdown table: an attack in a row, and of each model the mean probability and extraction strength of
the forgotten answers under it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from methods import Task, load, parsed, read, solved
from transformers.utils import logging

from service.domain.job import Audit
from service.domain.report import AuditEntry
from worker import audit, model
from worker.model import Network


def unlearned(task: Task) -> Network:
    """The model with what the method released or, where nothing kept the bound, with the last iterate."""
    kept = task.options.adapters / task.method if task.options.adapters else None
    if kept is not None and kept.is_dir():
        return model.load_adapter(load(task.options, task.options.model), kept)
    with tempfile.TemporaryDirectory() as scratch:
        ended = solved(task, Path(scratch))
    print(
        f"{task.method}: {'PASSED' if ended.passed else 'FAILED'} after {ended.solution.steps} steps in "
        f"{ended.seconds:.0f} s, retain loss {ended.after.retain_loss:.4f} against {ended.epsilon:.4f}",
        file=sys.stderr,
    )
    if kept is not None:
        model.save(ended.network, kept)
    return ended.network


def audited(task: Task, settings: Sequence[Audit], retrained: Network) -> Iterator[str]:
    """One method's lines of the table."""
    network = unlearned(task)
    rows = read(task.options.tofu / "forget01_perturbed.json")  # those of forget01, with their paraphrases
    for setting in settings:
        began = time.monotonic()
        entries = audit.audit(network, setting, rows, retrained, task.seed, lambda: False)
        print(f"audit of {task.method}: {time.monotonic() - began:.1f} s", file=sys.stderr)
        for of_attack in zip(entries[::2], entries[1::2], strict=True):
            print(f"  {of_attack[0].attack}: {of_attack[0].setting}", file=sys.stderr)
            yield line(task.method, of_attack, setting)


def line(method: str, of_attack: Sequence[AuditEntry], setting: Audit) -> str:
    entry = of_attack[0]
    rate = f", rate {setting.relearn_learning_rate:g}" if entry.attack.startswith("relearn") else ""
    cells = [
        " / ".join(shown(getattr(of_metric, who)) for of_metric in of_attack)
        for who in ("base", "retrained", "released", "attacked")
    ]
    return f"| `{method}` | {entry.attack}{rate} | {entry.rows} | {' | '.join(cells)} |"


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 1e-3 else "< 0.001"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("methods", nargs="+", metavar="METHOD[@SECONDS]")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--retrained", type=Path, required=True)
    parser.add_argument("--tofu", type=Path, required=True)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="of solving, for a method without its own")
    parser.add_argument("--steps", type=int, default=100_000, help="of solving, at most")
    parser.add_argument("--epsilon-relative", type=float, default=0.1)
    parser.add_argument("--retain-rows", type=int, default=760)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--adapters", type=Path, help="a folder that adapters are kept in; what is there is not solved again"
    )
    parser.add_argument("--relearn-steps", type=int, default=Audit().relearn_steps)
    parser.add_argument("--relearn-rate", type=float, action="append", help="may be given several times")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    retrained = load(options, options.retrained)
    first, *others = options.relearn_rate or [Audit().relearn_learning_rate]
    settings = [Audit(relearn_steps=options.relearn_steps, relearn_learning_rate=first)]
    for rate in others:  # it changes nothing else
        alone = {"quantise_bits": [], "paraphrases": False, "prefixes": False}
        settings.append(Audit(relearn_steps=options.relearn_steps, relearn_learning_rate=rate, **alone))
    lines: list[str] = []
    for given in options.methods:
        method, _, seconds = given.partition("@")
        own = argparse.Namespace(**{**vars(options), "seconds": float(seconds or options.seconds)})
        lines += audited(Task(*parsed(method), options.seed, own), settings, retrained)
    print("| method | attack | rows | base, attacked | retrained, attacked | released | released, attacked |")
    print("|---" * 7 + "|")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
