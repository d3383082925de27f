"""What it costs to ask a model for its forget rows in every way, against all else that a job measures of it, in one process.

    python tests/benchmarks/disclosure.py --forget FILE --retain FILE [--prompt-format JSON] --threads 2 MODEL_FOLDER ...

    evaluation   the figures of a request's own sets and the constraint, as they are taken once before and once after
    attacks      those of every job: paraphrases, prefixes, weights rounded to 8 and to 4 bits
    disclosure   `worker.disclosures.after`: every way of asking, the neighbours, the rounded weights, the language

The model has an adapter that changes nothing, so it knows what it knew. Taken in turns; printed are the medians of CPU seconds,
for which what else the machine does counts little, and disclosure as a share of one evaluation and of all that a job measures
beside it: two evaluations and the attacks. The lower bound of generation is its tokens, each distinct one of the prompts once, at
the pace at which rows are scored.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.utils import logging

from service.domain.job import Audit, Lora, ModelEntry, PromptFormat
from worker import audit, data, disclosure, disclosures, evaluate, measure, model, scoring
from worker.losses.retain.nll import nll
from worker.model import Network
from worker.suite import Row, examples
from worker.views import Term


def parts(network: Network, forget: Sequence[Row], retain: Sequence[Row]) -> dict[str, Callable[[], Any]]:
    both = measure.sets(term(network, forget), term(network, retain), seed=0)
    request = evaluate.request(both, forget, retain, [])
    plan = disclosures.prepare(forget, retain, {}, seed=0)
    tried = Audit(relearn_steps=0)
    usual = disclosures.usual(network, plan)
    known = disclosures.Before([], [])

    given: dict[str, dict[int, list[int]]] = {}

    def evaluation() -> None:
        measure.measure(network, both.whole)
        seen = scoring.look(network, request.suite.asks(request.sets))
        request.suite.results(request.sets, seen, None)
        given.update(evaluate.given(request, seen))

    return {
        "evaluation": evaluation,
        "attacks": lambda: audit.audit(network, tried, request.sets["forget"], None, 0, lambda: False),
        "disclosure": lambda: disclosures.after(network, plan, given, known, usual, tried.quantise_bits, [], {}),
    }


def term(network: Network, rows: Sequence[Row]) -> Term:
    texts = list(examples(rows).values())
    encoded = data.encode(texts, network.tokenizer, network.entry.prompt_format, network.context_tokens)
    return Term(nll(), {"answer": encoded})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--forget", type=Path, required=True)
    parser.add_argument("--retain", type=Path, required=True)
    parser.add_argument("--prompt-format", default="{}", metavar="JSON")
    parser.add_argument("--retain-rows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("models", type=Path, nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    forget, retain = (read(path) for path in (options.forget, options.retain))
    for folder in options.models:
        folder = folder.resolve()
        form = PromptFormat.model_validate_json(options.prompt_format)
        entry = ModelEntry(name=folder.name, source="path", location=folder.name, prompt_format=form)
        network = model.adapt(model.load(entry, folder.parent, "cpu", "float32"), Lora(), seed=0)
        report(network, forget, retain[: options.retain_rows], options.repeats)


def report(network: Network, forget: Sequence[Row], retain: Sequence[Row], repeats: int) -> None:
    timed = parts(network, forget, retain)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, do in timed.items():
            start = time.process_time()
            do()
            seconds[name].append(time.process_time() - start)
    each = {name: median(values) for name, values in seconds.items()}
    plan = disclosures.prepare(forget, retain, {}, seed=0)
    answers = {
        name: len(disclosure.probes(network, targets, 0)) if name == "forget" else len(targets)
        for name, targets in plan.targets.items()
    }
    others = 2 * each["evaluation"] + each["attacks"]
    sys.stdout.write(
        f"{network.entry.name}: {len(forget)} + {len(retain)} rows; {answers['forget']} answers, {answers['retain']} neighbours\n"
        + "".join(f"  {name:12} {value:8.2f} s\n" for name, value in each.items())
        + f"  disclosure is {each['disclosure'] / each['evaluation']:.2f} of an evaluation, "
        f"{each['disclosure'] / others:.2f} of all else that a job measures\n"
    )


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
