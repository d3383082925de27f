"""The whole TOFU suite with all membership inference, ours against a plain implementation, in one process.

    python tests/benchmarks/evaluate.py --tofu FOLDER --rows 16 --threads 2 MODEL_FOLDER [MODEL_FOLDER ...]

    plain   batches of 32 rows, padded, whole logits; one forward pass for each figure that needs one (probability, exact
            memorisation, extraction strength, each membership inference); `generate` with 200 new tokens. Gradient norms
            are taken one row at a time, which is kinder than the reference: it runs backward through the whole batch
            for every row of it.
    ours    worker.scoring

Both sides end in the same suite, and must give the same figures, row by row. Printed for each model: seconds for
scoring, gradient norms and generation, the ratios, and the peak of resident memory above what was resident before each of them
(Linux: from /proc, in this process). The lower bound is what the arithmetic alone would take: the operations of every
distinct token once, at the rate of a large float32 product in the same process.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from step import measured, product_rate
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

from service.domain.job import ModelEntry, PromptFormat
from worker import data, model, registry, scoring, trees
from worker.data import TokenRow
from worker.model import Network
from worker.scores import Scores
from worker.suite import Ask, Asks, Key, Seen, Sets, Suite

SETS = ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed", "holdout01")
NAMES = ("forget", "retain", "real_authors", "world_facts", "holdout")
BATCH = 32
MEMBERSHIP = ("logp", "standardised", "labels")  # of an ask with them: loss, zlib, min-k, min-k++
Parts = dict[str, Callable[[], Any]]  # scoring, gradient norms, generation


# --- plain


def plain_parts(network: Network, asks: Asks) -> Parts:
    generated = {key: ask for key, ask in asks.items() if "generated" in ask.views}
    attacked = {key: ask for key, ask in asks.items() if "gradient_norm" in ask.views}
    return {
        "scoring": lambda: {
            key: plain_scores(network, ask, scoring.encoded(network, ask)) for key, ask in asks.items()
        },
        "gradient norms": lambda: {
            key: [plain_gradient_norm(network, row) for row in scoring.encoded(network, ask).rows]
            for key, ask in attacked.items()
        },
        "generation": lambda: {
            key: plain_generation(network, scoring.encoded(network, ask).prompts, ask.max_new_tokens)
            for key, ask in generated.items()
        },
    }


def plain_scores(network: Network, ask: Ask, encoded: data.Encoded) -> dict[str, Any]:
    rows = encoded.rows
    views: dict[str, Any] = {}
    if "generated" in ask.views or "hits" not in ask.views:
        views["nll"] = [-float(row.sum()) for row in in_batches(network, rows, logp)]  # probability
    if "hits" in ask.views:
        for _ in ("exact memorisation", "extraction strength"):
            views["hits"] = in_batches(network, rows, hits)
    if all(name in ask.views for name in MEMBERSHIP):
        for _ in ("loss", "zlib", "min-k"):
            views["logp"] = in_batches(network, rows, logp)
        views["standardised"] = in_batches(network, rows, standardised)
    return views


@torch.no_grad()
def in_batches(network: Network, rows: Sequence[TokenRow], view: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """One forward pass over the rows; the view of (logits [n, V], labels [n]) of each."""
    found = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        batch = data.pad(part, network.device)
        logits_BTV = network.causal(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_BT, use_cache=False
        ).logits
        for b, row in enumerate(part):
            end = len(row.ids)
            labels_n = batch.input_ids_BT[b, row.answer_start : end]
            found.append(view(logits_BTV[b, row.answer_start - 1 : end - 1, : network.vocabulary].float(), labels_n))
    return found


def logp(z_nV: Tensor, y_n: Tensor) -> Tensor:
    return z_nV.log_softmax(-1).gather(1, y_n[:, None])[:, 0].double()


def hits(z_nV: Tensor, y_n: Tensor) -> Tensor:
    return z_nV.argmax(-1) == y_n


def standardised(z_nV: Tensor, y_n: Tensor) -> Tensor:
    logp_nV = z_nV.log_softmax(-1)
    p_nV = logp_nV.exp()
    mean_n = (p_nV * logp_nV).sum(-1)
    variance_n = (p_nV * logp_nV.square()).sum(-1) - mean_n.square()
    return (logp_nV.gather(1, y_n[:, None])[:, 0] - mean_n) / variance_n.clamp(min=1e-6).sqrt()


def plain_gradient_norm(network: Network, row: TokenRow) -> float:
    parameters = list(network.causal.parameters())
    for p in parameters:
        p.requires_grad_(True)
    z_TV = network.causal(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :, : network.vocabulary].float()
    logp_n = (
        z_TV[row.answer_start - 1 : -2].log_softmax(-1).gather(1, torch.tensor(row.ids[row.answer_start : -1])[:, None])
    )
    logp_n.mean().backward()  # type: ignore[no-untyped-call]
    norms = [float(p.grad.norm()) for p in parameters if p.grad is not None]
    for p in parameters:
        p.grad = None
        p.requires_grad_(False)
    return sum(norms) / len(norms)


@torch.no_grad()
def plain_generation(network: Network, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    texts = []
    pad = network.tokenizer.eos_token_id
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        longest = max(map(len, part))
        ids_BT = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in part])
        mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part])
        out_BT = network.causal.generate(
            input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
        )
        texts += network.tokenizer.batch_decode(out_BT[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def plain_seen(network: Network, asks: Asks, done: Mapping[str, Any]) -> Seen:
    seen = dict[Key, Scores]()
    for key, ask in asks.items():
        places, encoded = sorted(ask.texts), scoring.encoded(network, ask)
        views = done["scoring"][key]
        nll = views["nll"] if "nll" in views else [-float(row.sum()) for row in views["logp"]]
        texts = done["generation"].get(key)
        seen[key] = Scores(
            places,
            torch.tensor(nll, dtype=torch.float64),
            torch.tensor([row.counted for row in encoded.rows]),
            hits=[row[:-1] for row in views["hits"]] if "hits" in views else None,
            logp=[row[:-1] for row in views["logp"]] if "logp" in views else None,
            standardised=[row[:-1] for row in views["standardised"]] if "standardised" in views else None,
            gradient_norm_B=torch.tensor(done["gradient norms"][key], dtype=torch.float64)
            if key in done["gradient norms"]
            else None,
            labels={
                place: network.tokenizer.decode(row.ids[row.answer_start :], skip_special_tokens=True)
                for place, row in zip(places, encoded.rows, strict=True)
            },
            generated=dict(zip(places, texts, strict=True)) if texts else None,
            answers={place: ask.texts[place].answer for place in places} if texts else None,
            generated_ids={
                place: network.tokenizer(text, add_special_tokens=False)["input_ids"]
                for place, text in zip(places, texts, strict=True)
            }
            if texts
            else None,
        )
    return seen


# --- ours: one look, taken apart to time its parts


def our_parts(network: Network, asks: Asks) -> Parts:
    scored = {key: ask._replace(views=ask.views - {"generated", "gradient_norm"}) for key, ask in asks.items()}
    attacked = {key: ask for key, ask in asks.items() if "gradient_norm" in ask.views}
    asked = {
        key: ask._replace(views=frozenset({"generated"}), scored=False)
        for key, ask in asks.items()
        if "generated" in ask.views
    }
    return {
        "scoring": lambda: scoring.look(network, scored),
        "gradient norms": lambda: {
            key: scoring.gradient_norms(network, scoring.encoded(network, ask).rows) for key, ask in attacked.items()
        },
        "generation": lambda: scoring.look(network, asked),
    }


def our_seen(done: Mapping[str, Any]) -> Seen:
    seen: dict[Key, Scores] = dict(done["scoring"])
    for key, norms in done["gradient norms"].items():
        seen[key] = seen[key]._replace(gradient_norm_B=norms)
    for key, said in done["generation"].items():
        seen[key] = seen[key]._replace(generated=said.generated, generated_ids=said.generated_ids, answers=said.answers)
    return seen


# --- both


class Run(NamedTuple):
    done: dict[str, Any]
    seconds: dict[str, float]
    peak_bytes: int


def run(parts: Parts) -> Run:
    done, seconds, peak = dict[str, Any](), dict[str, float](), 0
    for name, work in parts.items():
        used = measured(lambda name=name, work=work: done.__setitem__(name, work()))  # type: ignore[misc]
        seconds[name], peak = used.seconds, max(peak, used.peak_bytes)
    return Run(done, seconds, peak)


def differences(suite: Suite, sets: Sets, ours: Seen, plain: Seen) -> tuple[list[str], float]:
    """Figures that are not the same, and by how much the others differ at most."""
    apart, largest = [], 0.0
    a, b = (suite.results(sets, seen, None) for seen in (ours, plain))
    for name, form in suite.figures.items():
        if not form.benchmark:
            continue
        if (a[name].value is None) is not (b[name].value is None):
            apart.append(f"{name}: {a[name].value} against {b[name].value}")
            continue
        pairs = [(a[name].value, b[name].value), *_numbers(a[name].by_row, b[name].by_row)]
        for part in a[name].parts:
            pairs += _numbers(a[name].parts[part].by_row, b[name].parts[part].by_row)
        for x, y in pairs:
            if isinstance(x, str) and x != y:
                apart.append(f"{name}: {x!r} against {y!r}")
            elif isinstance(x, float | int):
                off = abs(x - y) / max(abs(y), 1e-3)
                largest = max(largest, off)
                if off > 1e-3:
                    apart.append(f"{name}: {x} against {y}")
    return apart, largest


def _numbers(a: Mapping[int, Any], b: Mapping[int, Any]) -> list[tuple[Any, Any]]:
    assert a.keys() == b.keys()
    found = []
    for place in a:
        both = (
            zip(a[place].values(), b[place].values(), strict=True)
            if isinstance(a[place], dict)
            else [(a[place], b[place])]
        )
        found += list(both)
    return found


def least_seconds(network: Network, asks: Asks, seen: Seen, rate: float) -> dict[str, float]:
    """Operations of every distinct token once, over the rate: 2 for a weight, 4 with the gradient of every state.

    The norm of a weight's gradient needs few more (worker.gradients). Nothing is asked of the state at a row's last token.
    """
    width = network.causal.config.get_text_config().hidden_size
    body = network.parameters - network.causal.get_input_embeddings().weight.numel()
    if network.causal.get_output_embeddings().weight is not network.causal.get_input_embeddings().weight:
        body -= network.causal.get_output_embeddings().weight.numel()
    head = network.vocabulary * width
    encoded = {key: scoring.encoded(network, ask) for key, ask in asks.items()}
    rows = [row for key in asks for row in encoded[key].rows]
    (tree_tokens,) = [sum(len(t.ids) for t in trees.grow([row.ids[:-1] for row in rows], float("inf"), 10**9))]
    counted = len({(tuple(row.ids[:t])) for row in rows for t in range(row.answer_start, len(row.ids))})
    attacked = [row for key, ask in asks.items() if "gradient_norm" in ask.views for row in encoded[key].rows]
    said = [(key, ids) for key in asks for ids in (seen[key].generated_ids or {}).values()]
    prompts = [prompt for key, ask in asks.items() if "generated" in ask.views for prompt in encoded[key].prompts]
    prompt_tokens = sum(len(t.ids) for t in trees.grow(prompts, float("inf"), 10**9))
    new = sum(len(ids) for _, ids in said)
    return {
        "scoring": 2 * (tree_tokens * body + counted * head) / rate,
        "gradient norms": 4 * sum((len(row.ids) - 1) * body + row.counted * head for row in attacked) / rate,
        "generation": 2 * ((prompt_tokens + new) * body + (new + len(said)) * head) / rate,
    }


def compare(folder: Path, sets: Sets, rate: float) -> None:
    chat = AutoTokenizer.from_pretrained(folder).chat_template is not None
    prompt_format = PromptFormat(type="chat" if chat else "plain")
    entry = ModelEntry(name=folder.name, source="path", location=folder.name, prompt_format=prompt_format)
    network = model.load(entry, folder.resolve().parent, "cpu", "float32")
    suite: Suite = registry.build("suites", "tofu", {})
    asks = suite.asks(sets)
    first = {key: ask._replace(texts=dict(list(ask.texts.items())[:1]), max_new_tokens=2) for key, ask in asks.items()}
    run(our_parts(network, first)), run(plain_parts(network, first))  # what is set up once is not timed
    ours, plain = run(our_parts(network, asks)), run(plain_parts(network, asks))
    seen = our_seen(ours.done)
    apart, largest = differences(suite, sets, seen, plain_seen(network, asks, plain.done))
    if apart:
        raise SystemExit("the two sides differ:\n" + "\n".join(apart[:20]))
    least = least_seconds(network, asks, seen, rate)
    print(f"\n{folder.name}: {network.parameters:,} parameters, {'chat template' if chat else 'plain prompt'}")
    print(f"  the same figures: they differ by at most {largest:.1e}")
    print(f"  {'':16}{'plain, s':>10}{'ours, s':>10}{'ratio':>8}{'lower bound, s':>16}")
    totals = [{**of, "together": sum(of.values())} for of in (plain.seconds, ours.seconds, least)]
    for name in totals[0]:
        p, o, bound = (of[name] for of in totals)
        print(f"  {name:16}{p:10.2f}{o:10.2f}{p / o:8.2f}{bound:16.2f}")
    print(f"  peak above the weights, MiB: plain {plain.peak_bytes / 2**20:.0f}, ours {ours.peak_bytes / 2**20:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The TOFU suite, ours against a plain implementation.")
    parser.add_argument("models", nargs="+", type=Path, help="folders of models, as save_pretrained writes them")
    parser.add_argument("--tofu", type=Path, required=True, help="folder with TOFU's files")
    parser.add_argument("--rows", type=int, default=16, help="of each set")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    sets = {
        name: [
            json.loads(line) for line in (options.tofu / f"{file}.json").read_text("utf-8").splitlines()[: options.rows]
        ]
        for name, file in zip(NAMES, SETS, strict=True)
    }
    rate = product_rate()
    print(f"torch {torch.__version__}, {options.threads} threads, {rate / 1e9:.0f} GFLOP/s in a float32 product")
    for folder in options.models:
        compare(folder, sets, rate)


if __name__ == "__main__":
    sys.exit(main())
