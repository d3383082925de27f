"""Make what the demo needs: python -m worker.demo FOLDER [--seed N] [--forget-people N]

A small Llama and its tokeniser, trained from scratch until the model has memorised fictitious people, and the two sets
of a deletion request about some of them:

FOLDER/models/people/         config.json, model.safetensors, tokenizer.json, tokenizer_config.json
FOLDER/forget.jsonl           the facts about the people who want to be forgotten, in TOFU's fields
FOLDER/retain.jsonl           the facts about the others
FOLDER/prompt_format.json     how the model was asked while it learned

The same seed gives the same bytes on the same machine. One thread on purpose: matrices of this size gain nothing from
a second one, and on a busy machine two threads that wait for each other take several times as long.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from service.domain.job import PromptFormat
from service.domain.rows import Example
from worker import demo_corpus
from worker.data import TokenRow, encode, pad

PEOPLE = 32
VOCABULARY = 1024
CONTEXT_TOKENS = 256
END, END_ID = "<|end|>", 0  # the first special token has the first id
EPOCHS = 25
ROWS_PER_STEP = 24
LEARNING_RATE = 4e-3
WARM_UP_STEPS = 20
MEMORISED = 0.9  # probability per answer token, of every row; below it there would be nothing to forget
# The answer starts on a line of its own, so that no token straddles the seam between prompt and answer.
PROMPT_FORMAT = PromptFormat(user_start="Question: ", user_end="\n", assistant_start="Answer:\n")

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m worker.demo", description="Make the demo's model and data.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forget-people", type=int, default=4)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    names = demo_corpus.people(PEOPLE, options.seed)
    facts = demo_corpus.rows(names, options.seed)
    leaving = set(names[: options.forget_people])
    options.folder.mkdir(parents=True, exist_ok=True)
    _write_jsonl(options.folder / "forget.jsonl", (row for row in facts if row["person"] in leaving))
    _write_jsonl(options.folder / "retain.jsonl", (row for row in facts if row["person"] not in leaving))
    (options.folder / "prompt_format.json").write_text(PROMPT_FORMAT.model_dump_json(indent=2))

    tokenizer = train_tokenizer(facts)
    rows = tokenise(facts, tokenizer)
    model = build_model(len(tokenizer), options.seed)
    parameters = sum(p.numel() for p in model.parameters())
    _say(f"{len(facts)} facts about {PEOPLE} people; a Llama of {parameters:,} parameters learns them")
    memorise(model, rows, options.seed, EPOCHS)

    known = probabilities(model, rows)
    _say(f"it has learned them: probability per answer token {sum(known) / len(known):.3f}, at worst {min(known):.3f}")
    if min(known) < MEMORISED:
        raise SystemExit(f"but not well enough: {MEMORISED} is needed, of every answer")
    save(model, tokenizer, options.folder / "models" / "people")


def train_tokenizer(facts: Iterable[Row]) -> PreTrainedTokenizerFast:
    """Byte-level BPE on prompts, answers, paraphrases and wrong alternatives: no text of the demo is cut badly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (
        text
        for row in facts
        for text in (prompt(row), row["answer"], row["paraphrased_answer"], *row["perturbed_answer"])
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)  # type: ignore[no-untyped-call]


def prompt(row: Row) -> str:
    form = PROMPT_FORMAT
    return form.user_start + str(row["question"]) + form.user_end + form.assistant_start


def tokenise(facts: Iterable[Row], tokenizer: PreTrainedTokenizerFast) -> list[TokenRow]:
    """As the product does it for a request."""
    examples = [Example("question", row["question"], row["answer"]) for row in facts]
    return encode(examples, tokenizer, PROMPT_FORMAT, CONTEXT_TOKENS).rows


def build_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """Just under a million parameters; the head is not tied to the embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )
    return LlamaForCausalLM(config)


def memorise(model: LlamaForCausalLM, rows: Sequence[TokenRow], seed: int, epochs: int) -> None:
    """AdamW with warm-up and a cosine to a fiftieth of the rate."""
    steps = epochs * math.ceil(len(rows) / ROWS_PER_STEP)
    descent = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        descent, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
    )
    shuffled, rng, start = list(rows), random.Random(seed), time.monotonic()  # noqa: S311
    model.train()
    for epoch in range(1, epochs + 1):
        rng.shuffle(shuffled)
        total = 0.0
        for first in range(0, len(shuffled), ROWS_PER_STEP):
            batch = shuffled[first : first + ROWS_PER_STEP]
            loss = _nll(model, batch, "mean")
            descent.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            descent.step()
            schedule.step()
            total += loss.item() * len(batch) / len(rows)
        _say(f"epoch {epoch:2}/{epochs}  loss {total:6.3f} nats per token  {time.monotonic() - start:5.1f} s")


@torch.no_grad()
def probabilities(model: LlamaForCausalLM, rows: Sequence[TokenRow]) -> list[float]:
    """exp(-mean NLL per answer token) of each row, end of sequence included."""
    model.train(False)
    nlls: list[float] = []
    for first in range(0, len(rows), ROWS_PER_STEP):
        nlls += _nll(model, rows[first : first + ROWS_PER_STEP], "none").sum(1).tolist()
    return [math.exp(-nll / row.counted) for nll, row in zip(nlls, rows, strict=True)]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _nll(model: LlamaForCausalLM, rows: Sequence[TokenRow], reduction: str) -> Tensor:
    """Next-token cross entropy on the answers: [B, T-1] with zeros where nothing counts, or the token mean."""
    batch = pad(rows, torch.device("cpu"))
    logits_BTV = model(input_ids=batch.input_ids_BT).logits[:, :-1]
    return cross_entropy(logits_BTV.transpose(1, 2), batch.labels_BT[:, 1:], reduction=reduction)


def _write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
