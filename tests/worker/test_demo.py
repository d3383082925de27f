"""The demo's corpus and model: what has to hold for the demo to show anything."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from service.domain import rows as domain_rows
from service.domain.overlap import overlap
from worker import demo, demo_corpus


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As main() sets it; the other tests get theirs back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows() -> list[demo.Row]:
    return demo_corpus.rows(demo_corpus.people(demo.PEOPLE, 0), 0)


def test_the_corpus_is_a_function_of_the_seed(rows: list[demo.Row]) -> None:
    assert rows == demo_corpus.rows(demo_corpus.people(demo.PEOPLE, 0), 0)
    assert rows != demo_corpus.rows(demo_corpus.people(demo.PEOPLE, 1), 1)


def test_nobody_shares_a_name() -> None:
    names = demo_corpus.people(demo.PEOPLE, 0)
    words = [word for name in names for word in name.split()]
    assert len(names) == demo.PEOPLE
    assert len(set(words)) == len(words)


def test_every_fact_has_tofus_fields_and_names_its_person(rows: list[demo.Row]) -> None:
    assert len(rows) == demo.PEOPLE * len(demo_corpus.FACTS)
    for row in rows:
        asked = [row["question"], row["paraphrased_question"]]
        told = [*asked, row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]
        assert all(row["person"] in text for text in told)
        assert all("{" not in text for text in told)
        assert asked[0] != asked[1]


def test_paraphrase_and_alternatives_differ_from_the_answer_and_from_each_other(rows: list[demo.Row]) -> None:
    for row in rows:
        told = {row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]}
        assert len(told) == 2 + demo_corpus.ALTERNATIVES


def test_the_paraphrase_says_the_same_and_the_alternatives_do_not(rows: list[demo.Row]) -> None:
    facts = {fact.name: fact for fact in demo_corpus.FACTS}
    for row in rows:
        values = [value for value in facts[row["fact"]].values if row["answer"].rstrip('".').endswith(value)]
        assert len(values) == 1
        assert values[0] in row["paraphrased_answer"]
        assert not any(wrong.rstrip('".').endswith(values[0]) for wrong in row["perturbed_answer"])


def test_prompt_and_answer_never_share_a_token(rows: list[demo.Row]) -> None:
    """A token over the seam would be lost from the labels, and the row's promise with it."""
    tokenizer = demo.train_tokenizer(rows)
    for row, tokens in zip(rows, demo.tokenise(rows, tokenizer), strict=True):
        assert tokenizer.decode(tokens.ids[: tokens.answer_start]) == demo.prompt(row)
        assert tokenizer.decode(tokens.ids[tokens.answer_start : -1]) == row["answer"]
        assert tokens.ids[-1] == demo.END_ID == tokenizer.eos_token_id


def test_probabilities_are_those_of_one_row_at_a_time(rows: list[demo.Row]) -> None:
    tokenizer = demo.train_tokenizer(rows)
    model = demo.build_model(len(tokenizer), seed=0)
    few = demo.tokenise(rows[:5], tokenizer)
    for batched, row in zip(demo.probabilities(model, few), few, strict=True):
        ids = torch.tensor([row.ids])
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[row.answer_start - 1 :]
        assert batched == pytest.approx(math.exp(logp.mean().item()), rel=1e-5)


@pytest.mark.slow  # `make demo` memorises all of them
def test_a_few_people_are_memorised_and_the_same_seed_gives_the_same_model(
    rows: list[demo.Row], tmp_path: Path
) -> None:
    tokenizer = demo.train_tokenizer(rows)
    few = demo.tokenise(rows[:12], tokenizer)

    def trained(folder: Path) -> bytes:
        model = demo.build_model(len(tokenizer), seed=0)
        demo.memorise(model, few, seed=0, epochs=60)
        assert min(demo.probabilities(model, few)) > demo.MEMORISED
        demo.save(model, tokenizer, folder)
        return (folder / "model.safetensors").read_bytes()

    assert trained(tmp_path / "once") == trained(tmp_path / "again")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "once", dtype=torch.float32)
    assert min(demo.probabilities(loaded, few)) > demo.MEMORISED
    prompt = AutoTokenizer.from_pretrained(tmp_path / "once")(demo.prompt(rows[0]))["input_ids"]
    assert prompt == few[0].ids[: few[0].answer_start]


def test_the_two_sets_split_the_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EPOCHS", 1)
    with pytest.raises(SystemExit, match="not well enough"):
        demo.main([str(tmp_path), "--forget-people", "3"])
    sets = [(tmp_path / name).read_bytes().splitlines() for name in ("forget.jsonl", "retain.jsonl")]
    forget, retain = (domain_rows.read(lines) for lines in sets)
    assert len(forget) == 3 * len(demo_corpus.FACTS)
    assert len(forget) + len(retain) == demo.PEOPLE * len(demo_corpus.FACTS)
    assert overlap(forget, retain) == ([], [], [])
    leaving, staying = ({json.loads(line)["person"] for line in lines} for lines in sets)
    assert not leaving & staying
