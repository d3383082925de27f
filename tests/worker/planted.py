"""Models with known faults: what an expert knows of them the verdict must say."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from service.domain.job import Audit, Lora, ModelEntry, Verdict
from service.domain.report import ConstraintFacts
from worker import appraisal, data, demo, demo_corpus, disclosures, evaluate, measure, model, report
from worker.appraisal import Case, Retrained
from worker.diary import Diary
from worker.losses.retain.nll import nll
from worker.model import Network
from worker.suite import Row, examples
from worker.views import Term

PEOPLE, LEAVING, KEPT_FACTS = 9, 2, ("birthplace", "book", "pet")
STEPS = 150
NO_ATTACKS = Audit(relearn_steps=0, quantise_bits=[], paraphrases=False, prefixes=False)


def corpus() -> tuple[list[Row], list[Row]]:
    """(forget, retain)."""
    names = demo_corpus.people(PEOPLE, 0)
    facts = [row for row in demo_corpus.rows(names, 0) if row["fact"] in KEPT_FACTS]
    leaving = names[:LEAVING]
    return [row for row in facts if row["person"] in leaving], [row for row in facts if row["person"] not in leaving]


def memorised(folder: Path, rows: Sequence[Row], known_to_tokeniser: Sequence[Row]) -> Network:
    """A Llama of two layers that has learned the rows by heart, as a registered model."""
    tokenizer = demo.train_tokenizer(known_to_tokeniser)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=demo.CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=demo.END_ID,
        pad_token_id=demo.END_ID,
    )
    causal = LlamaForCausalLM(config)
    encoded = demo.tokenise(rows, tokenizer)
    descent = torch.optim.AdamW(causal.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(STEPS if rows else 0):
        for group in descent.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * (1 - step / STEPS) + 1e-4
        batch = [encoded[i] for i in data.batch(range(len(encoded)), 24, 0, "planted", step)]
        descent.zero_grad()
        torch.autograd.backward(demo._nll(causal, batch, "mean"))
        torch.nn.utils.clip_grad_norm_(causal.parameters(), 1.0)
        descent.step()
    demo.save(causal, tokenizer, folder / "planted")
    entry = ModelEntry(name="planted", source="path", location="planted", prompt_format=demo.PROMPT_FORMAT)
    return model.load(entry, folder, "cpu", "float32")


def case(
    network: Network,
    forget: Sequence[Row],
    retain: Sequence[Row],
    retrained: Retrained = Retrained(),
    holdout: Sequence[Row] = (),
) -> Case:
    sets = {"forget": list(forget), "retain": list(retain)}
    of = {name: list(examples(rows).values()) for name, rows in sets.items()}
    terms = {name: Term(nll(), {"answer": encoded(network, rows)}) for name, rows in of.items()}
    both = measure.sets(terms["forget"], terms["retain"], seed=0)
    request = evaluate.request(both, sets["forget"], sets["retain"], holdout)
    return Case(both, of, request, [], [], disclosures.prepare(forget, retain, {}, 0), [], retrained)


def encoded(network: Network, rows: Sequence[Any]) -> data.Encoded:
    return data.encode(rows, network.tokenizer, network.entry.prompt_format, network.context_tokens)


def taught(base: Network, rows: Sequence[Row], unlikely: Sequence[Row] = (), nats: float = 4.0) -> Network:
    """The base with an adapter that says these answers, and finds those as unlikely, per token."""
    network = model.adapt(base, Lora(r=16, alpha=32), seed=0)
    texts = [encoded(network, list(examples(of).values())).rows if of else [] for of in (rows, unlikely)]
    descent = torch.optim.Adam(model.trainable(network).values(), lr=5e-3)
    for _ in range(60):
        descent.zero_grad()
        torch.autograd.backward(_nll(network, texts[0]))
        if texts[1]:
            torch.autograd.backward(torch.relu(nats - _nll(network, texts[1])))
        descent.step()
    return network


def _nll(network: Network, rows: Sequence[data.TokenRow]) -> torch.Tensor:
    batch = data.pad(rows, network.device)
    logits_BTV = network.causal(input_ids=batch.input_ids_BT).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), batch.labels_BT[:, 1:])


def verdict(
    before: Network, after: Network, forget: Sequence[Row], retain: Sequence[Row], job: Any, epsilon: float
) -> Verdict:
    """Of an adapter that makes one of the other, with a bound that it keeps.

    Args:
        before: with an adapter that does nothing.
    """
    of = case(before, forget, retain)
    was = appraisal.before(before, of, job, None)
    found = appraisal.after(after, of, was, NO_ATTACKS, job, Diary(lambda record: None), lambda: False)
    assert found is not None
    return report.verdict(
        bound(was.measured.retain_loss, found.measured.retain_upper, epsilon),
        was.limits.before,
        found.measured.forget_probability,
        published=True,
        likelihood=found.likelihood,
        disclosures=found.disclosed.disclosure,
        answered=found.disclosed.answered,
        language=found.disclosed.language,
        conspicuous=found.conspicuous,
    )


def bound(before: float, after: float, epsilon: float) -> ConstraintFacts:
    return ConstraintFacts(
        epsilon=epsilon,
        source="absolute",
        before=before,
        after=after,
        upper=after,
        slack=epsilon - after,
        tolerance=1e-5,
        satisfied=after <= epsilon,
        rows_measured=1,
        rows_total=1,
    )


def results(found: Verdict) -> Mapping[str, str]:
    return {gate.metric: gate.result for gate in found.gates}


def reloaded(network: Network) -> Network:
    """The same from its files, without the adapters that others put into it."""
    return model.load(network.entry, Path(network.causal.config.name_or_path).parent, "cpu", "float32")


def strangers(count: int = LEAVING) -> list[Row]:
    """Rows about people whom the model has never read of."""
    names = [name for name in demo_corpus.people(32, 0) if name not in demo_corpus.people(PEOPLE, 0)][-count:]
    return [row for row in demo_corpus.rows(names, 1) if row["fact"] in KEPT_FACTS]
