"""What the jobs ask for: a small Llama of random weights, facts about people, three methods with a solver each."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from service import register
from service.client import Client
from service.local import Stack
from service.store import models
from service.store.session import make_engine, make_sessions
from worker import demo, demo_corpus

MODEL = "llama260K"
PEOPLE = 3
STEPS = 20
CONTEXT_TOKENS = 64  # a row has about 25; what random weights answer goes on to the end
METHODS = {  # each about as long as the others: a step of the last computes more gradients, many more with beta
    "pdu": {"forget_rows": 16, "retain_rows": 16},
    "blur_npo": {"forget_rows": 16, "retain_rows": 16},
    "ofmu": {"forget_rows": 8, "retain_rows": 8, "beta": 0},
}
SPECS: list[dict[str, Any]] = [
    {
        "model": MODEL,
        "method": {"type": name, "hyperparameters": hyperparameters},
        "constraint": {"epsilon_relative": 2.0},  # so loose that an adapter is released
        "budget": {"max_steps": STEPS},
        "seed": seed,
    }
    for seed in (0, 1)
    for name, hyperparameters in METHODS.items()
]


def prepare(here: Stack, api: Client) -> list[dict[str, Any]]:
    """The model registered, both sets uploaded. The requests, whole."""
    facts = demo_corpus.rows(demo_corpus.people(PEOPLE, 0), 0)
    _register(here, facts)
    rows = [
        (row["person"] == facts[0]["person"], {name: row[name] for name in ("question", "answer")}) for row in facts
    ]
    sets = {
        "forget_set": [row for leaves, row in rows if leaves],
        "retain_set": [row for leaves, row in rows if not leaves],
    }
    with TemporaryDirectory() as name:
        ids = {}
        for purpose, chosen in sets.items():
            path = Path(name) / f"{purpose}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
            ids[purpose] = api.files.upload(purpose, path).id
    return [spec | ids for spec in SPECS]


def _register(here: Stack, facts: list[dict[str, Any]]) -> None:
    folder = here.settings.models_root / MODEL
    tokenizer = demo.train_tokenizer(facts)
    torch.manual_seed(0)
    demo.save(LlamaForCausalLM(_config(len(tokenizer))), tokenizer, folder)
    entry = register.folder_entry(here.settings, MODEL, folder, demo.PROMPT_FORMAT)
    engine = make_engine(here.settings.database_url)
    with make_sessions(engine).begin() as s:
        models.add(s, entry)
    engine.dispose()


def _config(vocabulary: int) -> LlamaConfig:
    """276 thousand parameters: those of a model of 260 thousand, and a few more words."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=demo.END_ID,
        pad_token_id=demo.END_ID,
    )
