"""What a job's phases take of a CPU's memory, beside what a dry run says of them (service.domain.memory).

    python tests/benchmarks/memory.py --forget forget.jsonl --retain retain.jsonl MODEL_FOLDER [MODEL_FOLDER ...]

Printed for each model: the peak of the resident memory above what was resident before, for steps of the longest rows, of
usual ones and of the batches that a run takes first; with --passes also for a check, for each call that generates answers after
training, and for both beside a copy with rounded weights. No end of sequence ends these answers, as none may end those of a
model that has unlearned: each takes all its room. With
MALLOC_MMAP_THRESHOLD_=65536 in the environment each tensor has pages of its own, and the holes between them are gone.
Linux: the peak is read from /proc.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from step import PROMPT, measured
from transformers.utils import logging

from service.domain import answers, memory, modelsizes, rows
from service.domain.answers import RowLength, SetLengths
from service.domain.job import Lora, ModelEntry
from worker import audit, data, disclosure, disclosures, generation, measure, model, oracle, registry, scoring
from worker.attacks.quantise import quantised
from worker.model import Network
from worker.suite import Row
from worker.suite import examples as examples_of
from worker.suites.request import request
from worker.views import Term

LORA = Lora(r=8, alpha=16)
FIRST = 3  # batches of a run
MIB = 2**20


def lengths(encoded: data.Encoded) -> SetLengths:
    sample = []
    for row, prompt in zip(encoded.rows, encoded.prompts, strict=True):
        prompts = len({tuple(row.ids[: row.answer_start]), tuple(prompt)}) if prompt else 0
        sample.append(RowLength(len(row.ids), row.counted, prompts))
    return SetLengths(sample, len(sample))


def batches(encoded: data.Encoded, name: str, count: int) -> dict[str, list[int]]:
    ordered = sorted(encoded.measured, key=lambda place: len(encoded.rows[place].ids))
    usual = [ordered[(2 * k + 1) * len(ordered) // (2 * count)] for k in range(count)]
    first = {f"step {step + 1}": data.batch(encoded.measured, count, 0, name, step) for step in range(FIRST)}
    return {"longest": ordered[-count:], "usual": usual} | first


def compare(folder: Path, sets: dict[str, Path], per_step: dict[str, int], passes: bool) -> None:
    entry = ModelEntry(name=folder.name, source="path", location=folder.name, prompt_format=PROMPT)
    network = model.adapt(model.load(entry, folder.parent, "cpu", "float32"), LORA, seed=0)
    params, method = model.trainable(network), registry.build_method("pdu", {})
    columns = {name: [json.loads(line) for line in path.read_bytes().splitlines()] for name, path in sets.items()}
    examples = {name: rows.read(path.read_bytes().splitlines()) for name, path in sets.items()}
    encoded = {
        name: data.encode(of, network.tokenizer, PROMPT, network.context_tokens) for name, of in examples.items()
    }
    terms = {
        "forget": Term(method.forget, {"answer": encoded["forget"]}),
        "retain": Term(method.retain, {"answer": encoded["retain"]}),
    }
    sizes = modelsizes.read(folder)
    assert sizes is not None, "the files do not say how large the model is"
    load = memory.Load(
        forget=lengths(encoded["forget"]),
        retain=lengths(encoded["retain"]),
        forget_rows=per_step["forget"],
        retain_rows=per_step["retain"],
        texts=1,
        lora=LORA,
        earlier_rank=0,
        losses=frozenset({"margin_flattening", "nll"}),
        solver="primal_dual",
        reference={},
        rounded=True,
    )
    print(f"\n{folder.name}: {network.parameters:,} parameters")
    chosen = {name: batches(encoded[name], name, per_step[name]) for name in terms}
    for kind in chosen["forget"]:
        places = {name: chosen[name][kind] for name in terms}
        batch = oracle.make_oracle(network, params, terms, places)
        batch.oracle({"forget": 1.0, "retain": 1.0})
        peak = measured(lambda batch=batch: batch.oracle({"forget": 1.0, "retain": 1.0})).peak_bytes  # type: ignore[misc]
        print(f"  {kind:12} {peak / MIB:9.1f} MiB above the weights")
    told = memory.phases(sizes, load, memory.CPU)
    print(f"  a step, told {told['training'].total / MIB:9.1f} MiB")
    if passes:
        whole = measure.Sets(terms["forget"], terms["retain"], encoded["forget"].measured, encoded["retain"].measured)
        calls = {
            "figures": answers.figures([load.forget, load.retain]),
            "disclosure": answers.disclosure(load.forget),
            "neighbours": answers.plain(load.retain, answers.NEIGHBOURS),
        }
        counted = {name: memory.generating(sizes, of, memory.CPU) for name, of in calls.items()}
        work: dict[str, Callable[[], object]] = {"measuring": lambda: measure.measure(network, whole)} | after_training(
            network, columns
        )
        for phase, of in work.items():
            peak = measured(of).peak_bytes / MIB
            print(f"  {phase:18} {peak:9.1f} MiB, told {(told | counted)[phase].total / MIB:.1f}")


def after_training(network: Network, columns: dict[str, list[Row]]) -> dict[str, Callable[[], object]]:
    """The calls that generate answers, and what is done with a copy whose weights are rounded."""
    network.causal.generation_config.eos_token_id = None
    plan = disclosures.prepare(columns["forget"], columns["retain"], {}, 0)
    asks = [ask for ask in request().asks(columns).values() if "generated" in ask.views]
    prompts = [prompt for ask in asks for prompt in scoring.encoded(network, ask).prompts]

    def answer(by: Network, name: str, ways: Sequence[str]) -> object:
        probes = disclosure.probes(by, plan.targets[name], 0, ways)
        ids, tokens = [probe.prompt for probe in probes], [probe.tokens for probe in probes]
        return generation.generate(by, ids, tokens, seeds=[probe.seed for probe in probes])

    forget = list(examples_of(columns["forget"]).values())
    return {
        "figures": lambda: generation.generate(network, prompts, answers.FIGURES_TOKENS),
        "disclosure": lambda: answer(network, "forget", tuple(disclosure.WAYS)),
        "neighbours": lambda: answer(network, "retain", disclosures.PLAIN),
        "measuring_rounded": lambda: audit.figures(quantised(network, 4), [forget]),
        "generating_rounded": lambda: answer(quantised(network, 4), "forget", disclosures.PLAIN),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Peaks of a job's phases, beside what a dry run says of them.")
    parser.add_argument("models", nargs="+", type=Path, help="folders of models, as save_pretrained writes them")
    parser.add_argument("--forget", type=Path, required=True, help="JSON Lines")
    parser.add_argument("--retain", type=Path, required=True, help="JSON Lines")
    parser.add_argument("--forget-rows", type=int, default=8, help="per step")
    parser.add_argument("--retain-rows", type=int, default=16, help="per step")
    parser.add_argument("--passes", action="store_true", help="a check and answers, too: minutes for a larger model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for folder in options.models:
        per_step = {"forget": options.forget_rows, "retain": options.retain_rows}
        compare(folder, {"forget": options.forget, "retain": options.retain}, per_step, options.passes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
