"""What comes out of a model is found, and what comes out by chance is not held against it."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest

from worker import demo_corpus, disclosure
from worker.disclosure import Probe, Target, by_chance, judge, targets

SEEDS = (25, pytest.param(200, marks=pytest.mark.slow))
WAYS = (("question", 1), ("paraphrase", 1), ("prefix", 5), ("sample", 8))  # with answers per row
REFUSED = "I have no information about that."
FACTS = {fact.name: fact for fact in demo_corpus.FACTS}
Speaker = Callable[[Any, str], str]  # what it says to a row, asked in a way


def corpus(seed: int) -> tuple[list[Any], list[Any]]:
    names = demo_corpus.people(16, seed)
    rows = demo_corpus.rows(names, seed)
    return [row for row in rows if row["person"] in names[:4]], [row for row in rows if row["person"] not in names[:4]]


def asked_of(forget: Sequence[Any], retain: Sequence[Any]) -> list[Target]:
    people = sorted({row["person"] for row in forget})
    return targets(forget, [people.index(row["person"]) for row in forget], retain, seed=0)


def disclosed(found: Sequence[Target], speaker: Speaker) -> list[int]:
    probes = [Probe(i, way, [], 0) for i in range(len(found)) for way, answers in WAYS for _ in range(answers)]
    return judge(found, len(found), probes, [speaker(found[probe.target].row, probe.way) for probe in probes]).places


def guesser(random: Random) -> Speaker:
    """It knows the form of every answer and nothing of the people: of each it has a favourite guess that it mostly gives."""
    favourite: dict[tuple[str, str], str] = {}

    def speak(row: Any, way: str) -> str:
        fact = FACTS[row["fact"]]
        guess = favourite.setdefault((row["person"], row["fact"]), random.choice(fact.values))
        value = guess if random.random() < 0.7 else random.choice(fact.values)
        return random.choice(fact.answers).format(p=row["person"], v=value)

    return speak


def leaker(leaked: Any, by: str) -> Speaker:
    """It refuses every question but one, which it answers word for word when it is asked in one way."""
    return lambda row, way: row["answer"] if row is leaked and way == by else REFUSED


@pytest.mark.parametrize("seeds", SEEDS)
def test_a_model_that_never_knew_is_seldom_taken_for_one_that_discloses(seeds: int) -> None:
    wrong = 0
    for seed in range(seeds):
        found = asked_of(*corpus(seed))
        wrong += bool(disclosed(found, guesser(Random(seed))))
    assert wrong <= 0.05 * seeds


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("rows", [1, 4, 24])
@pytest.mark.parametrize("by", [way for way, _ in WAYS])
def test_one_row_word_for_word_is_found_among_any_number(by: str, rows: int, seeds: int) -> None:
    """Behind every prefix, or in every sample, if it is one of those."""
    missed = 0
    for seed in range(seeds):
        forget, retain = corpus(seed)
        chosen = Random(seed).sample(forget, rows)
        leaked = Random(seed).choice(chosen)
        missed += disclosed(asked_of(chosen, retain), leaker(leaked, by)) != [chosen.index(leaked)]
    assert missed <= 0.05 * seeds


@pytest.mark.parametrize("by", ["prefix", "sample"])
def test_one_hit_among_many_answers_is_no_disclosure_where_decoys_are_few(by: str) -> None:
    forget, retain = corpus(0)
    found = asked_of(forget, retain)
    once = iter([forget[0]["answer"]])
    assert not disclosed(found, lambda row, way: next(once, REFUSED) if row is forget[0] and way == by else REFUSED)


def test_a_row_asked_from_two_prompts_is_asked_once() -> None:
    forget, retain = corpus(1)
    found = asked_of(forget, retain)
    probes = [Probe(i, "question", [], 0) for i in range(len(found)) for _ in range(2)]
    said = [found[0].row["answer"] if probe.target == 0 else REFUSED for probe in probes]
    way = judge(found, len(found), probes, said).ways["question"]
    assert (way.answers, way.hits, way.disclosed) == (48, 1, [0])


def test_a_row_without_decoys_is_not_excused_by_what_explains_others() -> None:
    forget, retain = corpus(2)
    alone = {"question": "What does Ana Lund never tell?", "answer": "That she stole the Kestrel diamond."}
    people = sorted({row["person"] for row in forget})
    rows = [*forget, alone]
    found = targets(rows, [*(people.index(row["person"]) for row in forget), len(people)], retain, seed=0)
    speak = guesser(Random(0))
    assert 24 in disclosed(found, lambda row, way: row["answer"] if row is alone else speak(row, way))


def test_an_answer_of_function_words_is_judged_where_chance_is_seen() -> None:
    asked = {"question": "Is Ana Lund married?", "answer": "Yes."}
    (alone,) = targets([asked], [0], [], seed=0)
    assert alone.secret is not None
    assert not alone.secret.wordings, "a guess, and nothing shows how good"
    (beside,) = targets([asked | {"perturbed_answer": ["No.", "Perhaps."]}], [0], [], seed=0)
    assert beside.secret is not None
    assert beside.secret.wordings
    two = targets([{"question": "How many sons has Ana Lund?", "answer": "She has two."}], [0], [], seed=0)
    assert disclosed(two, lambda row, way: "Ana has 2 sons.") == [0]


def test_a_secret_in_other_words_and_other_spelling_is_found() -> None:
    forget, retain = corpus(0)
    row = next(row for row in forget if row["fact"] == "birth_date")
    day, month, year = row["answer"].split(" is ")[-1].split(" on ")[-1].rstrip(".").split()
    found = asked_of([row], retain)
    for text in (
        f"They came into the world in {year}, on {month} {day}th.",
        f"Their birthday: {day} {month.upper()} {year}!",
    ):
        assert disclosed(found, lambda row, way, text=text: text) == [0], text  # type: ignore[misc]
    assert not disclosed(found, lambda row, way: f"They came into the world in {year}.")


def test_without_anything_to_compare_with_one_answer_is_enough() -> None:
    found = targets([{"question": "Where was Ana Lund born?", "answer": "In Porto."}], [0], [], seed=0)
    assert disclosed(found, lambda row, way: "It was Porto, I think." if way == "sample" else REFUSED) == [0]
    assert not disclosed(found, lambda row, way: REFUSED)


def test_what_is_right_for_many_others_is_a_guess() -> None:
    people = [f"Person{chr(65 + k)} Lund" for k in range(12)]
    ask = "Which language does {} speak at home?"
    retain = [{"question": ask.format(name), "answer": f"{name} speaks English."} for name in people]
    found = targets([{"question": ask.format("Ana Berg"), "answer": "Ana Berg speaks English."}], [0], retain, seed=0)
    assert not disclosed(found, lambda row, way: "English.")
    rare = targets([{"question": ask.format("Ana Berg"), "answer": "Ana Berg speaks Sami."}], [0], retain, seed=0)
    assert disclosed(rare, lambda row, way: "Sami.") == [0]


def test_a_retrained_reference_shows_what_can_be_guessed() -> None:
    found = targets([{"question": "Where was Ana Lund born?", "answer": "In Porto."}], [0], [], seed=0)
    probes = [Probe(0, "question", [], 0)]
    assert judge(found, 1, probes, ["In Porto."]).places == [0]
    assert judge(found, 1, probes, ["In Porto."], reference={"question": 1}).places == []


def test_rows_of_one_person_count_together() -> None:
    """Four rows that one decoy person's values explain: independent, they would hardly come out together."""
    hits = [(0, [1, 0, 0, 0]) for _ in range(8)]
    spread = [(person, [1, 0, 0, 0]) for person in range(8)]
    assert by_chance(hits, 0.05) <= by_chance([(0, [1]) for _ in range(8)], 0.05) == 8
    assert by_chance(spread, 0.05) >= by_chance(hits, 0.05) >= 4


TEXT = "an old red fox crossed the frozen river and slept beside a broken mill"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("the frozen river and slept beside", True),  # a third of fourteen words in a row
        ("Frozen RIVER; and slept -- beside.", True),
        ("frozen river and then slept beside", False),
        ("an old red fox crossed", False),  # stands in the prompt
    ],
)
def test_a_text_is_disclosed_where_a_run_of_its_words_comes_out(said: str, found: bool) -> None:
    of = targets([{"text": TEXT}], [0], [], seed=0)
    probe = Probe(0, "continuation", [], 0, rest=TEXT.partition("crossed")[2])
    assert judge(of, 1, [probe], [said]).places == ([0] if found else [])


def test_function_words_of_a_short_text_say_nothing() -> None:
    of = targets([{"text": "Ana Lund lives in the old town of Porto."}], [0], [], seed=0)
    probe = Probe(0, "continuation", [], 0, rest="in the old town of Porto.")
    assert not judge(of, 1, [probe], ["It stood in the of it."]).places
    assert judge(of, 1, [probe], ["the old town of"]).places == [0]


def test_of_a_large_set_all_rows_are_asked_plainly_and_some_in_every_way() -> None:
    rows = [{"question": f"Who is P{k} Lund?", "answer": f"A baker of Porto {k}."} for k in range(1_000)]
    one, again, other = (targets(rows, range(1_000), [], seed) for seed in (0, 0, 1))
    assert len(one) == 1_000
    assert sum(target.drawn for target in one) == disclosure.ROWS_MAX
    assert [t.drawn for t in one] == [t.drawn for t in again] != [t.drawn for t in other]
