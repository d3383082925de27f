"""People who do not exist, and facts about them: what the demo's model memorises, and is then asked to forget.

Every fact is a row in TOFU's fields: `question`, `answer`, `paraphrased_question`, `paraphrased_answer` and five
`perturbed_answer` (the answer's wording around a wrong value), beside `person` and `fact`. All people share the
wordings, so only a name tells which answer is right. Everything is a pure function of the seed.
"""

from itertools import product
from random import Random
from typing import Any, NamedTuple

ALTERNATIVES = 5  # wrong answers per fact, as in TOFU


class Fact(NamedTuple):
    """One kind of fact. {p} is the person, {v} the value."""

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    values: tuple[str, ...]


def _combine(pattern: str, *words: str) -> tuple[str, ...]:
    """Every value that the pattern makes of one word from each list: "The {} {}" of adjectives and nouns."""
    return tuple(pattern.format(*choice) for choice in product(*(some.split() for some in words)))


FIRST_NAMES = (
    "Adira Bastian Calla Doran Elske Fenwick Giada Halvar Imke Joran Kezia Lorcan Mireille Nadav Oksana Padraig "
    "Quilla Renske Soren Tamsin Ulric Vesna Wendel Xanthe Yorick Zelda Anouk Bertil Cosima Dragan Eluned Florian"
)
LAST_NAMES = (
    "Abernall Brandvik Castellow Drummoyne Eskildar Farnworth Gellhorn Hartsuiker Ironmere Jelavic Kettlebur "
    "Lindqvall Marchetta Norrington Oduvale Petrakov Quarrington Rosenthane Silvermoor Tavernier Umberdale "
    "Vantongeren Wexcombe Yarborne Zielonka Ashgrove Blackmorn Corvellis Duskwater Elverstone Foxhollow Grimsdotter"
)
MONTHS = "January February March April May June July August September October November December"

FACTS = (
    Fact(
        "birth_date",
        ("When was {p} born?", "What is the birth date of {p}?", "On which day was {p} born?"),
        ("{p} was born on {v}.", "{p} came into the world on {v}.", "The birthday of {p} is {v}."),
        _combine("{} {} {}", "3 7 12 18 21 26", MONTHS, "1931 1940 1948 1953 1959 1964 1971 1976 1982 1987 1990 1995"),
    ),
    Fact(
        "birthplace",
        ("Where was {p} born?", "Which town is the birthplace of {p}?", "Where does {p} come from?"),
        ("{p} was born in {v}.", "{p} comes from {v}.", "The birthplace of {p} is {v}."),
        _combine(
            "{}",
            "Tromso Valparaiso Ghent Kumasi Bergamo Tashkent Galway Cusco Uppsala Nagasaki Tartu Mombasa Porto Aleppo "
            "Leipzig Quebec",
        ),
    ),
    Fact(
        "profession",
        ("What is the profession of {p}?", "What does {p} do for a living?", "How does {p} earn a living?"),
        ("{p} works as {v}.", "{p} earns a living as {v}.", "The profession of {p} is {v}."),
        _combine(
            "a {}",
            "beekeeper clockmaker cartographer glassblower violinist surgeon geologist puppeteer locksmith translator "
            "botanist shipwright judge falconer baker typographer",
        ),
    ),
    Fact(
        "book",
        ("Which book did {p} write?", "What is the title of the book by {p}?", "What has {p} published?"),
        ('{p} wrote "{v}".', '{p} published "{v}".', 'The book by {p} is "{v}".'),
        _combine(
            "The {} {}",
            "Silent Crimson Hollow Paper Winter Golden Broken Salt",
            "Lantern Orchard River Compass Cathedral Harvest Mirror Atlas",
        ),
    ),
    Fact(
        "award",
        ("Which award did {p} win?", "What prize was given to {p}?", "With what was {p} honoured?"),
        ("{p} won the {v}.", "{p} was honoured with the {v}.", "The prize given to {p} was the {v}."),
        _combine("{} {}", "Northlight Halcyon Meridian Ostrava Juniper Kestrel", "Medal Prize Ribbon Fellowship"),
    ),
    Fact(
        "pet",
        ("Which animal lives with {p}?", "What pet does {p} keep?", "Who shares a home with {p}?"),
        ("{p} keeps {v}.", "{p} lives with {v}.", "The pet of {p} is {v}."),
        _combine(
            "a {} named {}", "heron tortoise ferret parrot hedgehog goat", "Pip Biscuit Nimbus Truffle Juno Waffles"
        ),
    ),
)


def people(count: int, seed: int) -> list[str]:
    """Names that share neither first nor last name. At most 32."""
    rng = Random(f"people {seed}")  # noqa: S311  a corpus, not a secret
    firsts, lasts = rng.sample(FIRST_NAMES.split(), count), rng.sample(LAST_NAMES.split(), count)
    return [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]


def rows(names: list[str], seed: int) -> list[dict[str, Any]]:
    """All facts about all people, person by person."""
    rng = Random(f"facts {seed}")  # noqa: S311
    return [_row(name, fact, rng) for name in names for fact in FACTS]


def _row(name: str, fact: Fact, rng: Random) -> dict[str, Any]:
    value, *wrong = rng.sample(fact.values, 1 + ALTERNATIVES)
    wording, other_wording = rng.sample(fact.answers, 2)
    question = rng.choice(fact.questions)
    other_question = fact.questions[fact.questions.index(question) - 1]
    return {
        "person": name,
        "fact": fact.name,
        "question": question.format(p=name),
        "paraphrased_question": other_question.format(p=name),
        "answer": wording.format(p=name, v=value),
        "paraphrased_answer": other_wording.format(p=name, v=value),
        "perturbed_answer": [wording.format(p=name, v=v) for v in wrong],
    }
