"""Relearning: a few steps of fine-tuning bring back what was only hidden.

On a small part of the forget set, other rows of it being measured, or on texts that have nothing to do with it. References: Hu et
al. 2024, "Jogging the Memory of Unlearned LLMs Through Targeted Relearning Attacks", arXiv 2406.13356; Lynch et al. 2024,
"Eight Methods to Evaluate Robust Unlearning in LLMs", arXiv 2402.16835.

What is trained is a fresh LoRA adapter on the merged model, not all weights: gradients and AdamW's state of all weights take
many times the memory of a base of billions of parameters that runs in bfloat16, and steps of that type round small updates away.
An attacker with the memory for it may get further.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from service.domain.job import Audit, Lora
from service.domain.rows import Example
from worker import data, model
from worker.attacks.attack import Attack, encode, merged
from worker.attacks.unrelated import UNRELATED
from worker.descent import adamw
from worker.losses.retain.nll import nll
from worker.model import Network
from worker.oracle import make_oracle
from worker.views import Term

LORA = Lora()  # every linear layer but the head
ROWS_PER_STEP = 8


def relearn_forget(
    rows: Sequence[Example], most: int, settings: Audit, seed: int, cancelled: Callable[[], bool]
) -> Attack:
    """Of the forget set a random share is trained on, a function of the seed; up to `most` of the others are measured.

    A row that stands in the set again is not measured if one like it is trained on.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(settings.relearn_share * len(rows)))
    trained = [rows[i] for i in sorted(order[:count])]
    seen = set(trained)
    others = [i for i in order[count:] if rows[i] not in seen]
    if not others:
        reason = "needs rows to fine-tune on and different ones to measure"
        return Attack("relearn_forget", _training(settings), reason=reason)
    measured = [rows[i] for i in sorted(others[:most])]
    return Attack(
        "relearn_forget",
        f"{_training(settings)} on {count} of {len(rows)} rows of the forget set; others are measured",
        measured,
        [measured],
        partial(fine_tune, rows=trained, settings=settings, seed=seed, cancelled=cancelled),
        trained,
    )


def relearn_unrelated(rows: Sequence[Example], settings: Audit, seed: int, cancelled: Callable[[], bool]) -> Attack:
    """Fine-tuning on texts of ours that have nothing to do with the forget set, all given rows of which are measured."""
    trained = [Example("question", question, answer) for question, answer in UNRELATED]
    return Attack(
        "relearn_unrelated",
        f"{_training(settings)} on {len(trained)} unrelated questions and answers",
        rows,
        [rows],
        partial(fine_tune, rows=trained, settings=settings, seed=seed, cancelled=cancelled),
        trained,
    )


def fine_tune(
    network: Network, rows: Sequence[Example], settings: Audit, seed: int, cancelled: Callable[[], bool]
) -> Network:
    """A copy with its adapter merged and a fresh one trained by AdamW on the mean NLL per token of the rows' answers.

    A function of the seed. Ends before its last step once `cancelled` says so.
    """
    copy = model.adapt(merged(network), LORA, seed)
    params, descent = model.trainable(copy), adamw(learning_rate=settings.relearn_learning_rate)
    (encoded,), places = encode(copy, [rows])
    terms, state = {"relearned": Term(nll(), {"answer": encoded})}, descent.init(params)
    for step in range(settings.relearn_steps):
        if cancelled():
            break
        chosen = data.batch(places, ROWS_PER_STEP, seed, "relearned", step)
        found = make_oracle(copy, params, terms, {"relearned": chosen}).oracle({"relearned": 1.0})
        state, _, _ = descent.apply(state, params, found.grads)
    return copy


def _training(settings: Audit) -> str:
    return (
        f"{settings.relearn_steps} steps of fine-tuning (a fresh LoRA adapter of rank {LORA.r} on the merged model, AdamW, "
        f"learning rate {settings.relearn_learning_rate:g}, up to {ROWS_PER_STEP} rows a step)"
    )
