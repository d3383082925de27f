"""MUSE: does a model still know, quote, or betray that it has read a text that it should have forgotten?

Figures have the names that OpenUnlearning's evaluator prints, and its values; a report names the corpus, since the real ones
are not free to give away. Rows longer than the model's context are run as they are, as the reference runs them.

Reference: Shi et al. 2024, MUSE, arXiv 2407.06460; as computed by OpenUnlearning, arXiv 2506.12618.
"""

from service.domain.rows import Example
from worker import figures, membership
from worker.figures import Figure, Missing, Reading
from worker.suite import Ask, Asks, Better, Convention, FigureForm, Result, Row, SetForm, Sets, Suite, examples

QUESTION = frozenset({"question", "answer"})
SETS = {
    "forget_knowmem": SetForm("questions on what is to be forgotten", QUESTION, required=False),
    "forget_knowmem_icl": SetForm(
        "answered questions that stand before each of forget_knowmem", QUESTION, required=False
    ),
    "retain_knowmem": SetForm("questions on what is to be kept", QUESTION, required=False),
    "retain_knowmem_icl": SetForm(
        "answered questions that stand before each of retain_knowmem", QUESTION, required=False
    ),
    "verbmem": SetForm(
        "passages of what is to be forgotten, each with its continuation", frozenset({"prompt", "gt"}), required=False
    ),
    "forget": SetForm("texts of what is to be forgotten", frozenset({"text"}), required=False),
    "holdout": SetForm("texts like them that were never trained on", frozenset({"text"}), required=False),
}
MEMBERSHIP = membership.VIEWS | membership.GRADIENT
STOPS = ("\n\n", "\nQuestion", "Question:")
KNOWMEM_TOKENS = 32  # of an answer
VERBMEM_TOKENS = 128
TEXT_TOKENS_MAX = 2_048  # of a text, or of what follows a passage
CORPUS = Convention(ends=False)


def muse() -> Suite:
    """A text without the others it needs.

    >>> muse().results({"verbmem": []}, {}, None)["extraction_strength"].reason
    'needs the set verbmem'
    """
    return figures.suite(SETS, _figures(), _asks)


def _asks(sets: Sets) -> Asks:
    asked = {}
    for of in ("forget_knowmem", "retain_knowmem"):
        if sets.get(of) and sets.get(f"{of}_icl"):
            shots = [(row["question"], row["answer"]) for row in sets[f"{of}_icl"]]
            texts, views = examples(sets[of]), frozenset({"generated"})
            asked[of, "answer"] = Ask(
                texts,
                views,
                KNOWMEM_TOKENS,
                STOPS,
                scored=False,
                beyond_context=True,
                convention=Convention(shots),
            )
    if sets.get("verbmem"):
        texts = {place: _passage(row) for place, row in enumerate(sets["verbmem"])}
        views = frozenset({"hits", "labels", "generated"})
        asked["verbmem", "gt"] = Ask(
            texts,
            views,
            VERBMEM_TOKENS,
            answer_tokens_max=TEXT_TOKENS_MAX,
            beyond_context=True,
            convention=CORPUS,
        )
    for of in ("forget", "holdout"):
        if sets.get(of):
            texts = examples(sets[of])
            asked[of, "answer"] = Ask(texts, MEMBERSHIP, answer_tokens_max=TEXT_TOKENS_MAX, convention=CORPUS)
    return asked


def _passage(row: Row) -> Example:
    return Example("prompt", row["prompt"], f" {row['gt']}")


def _figures() -> dict[str, Figure]:
    found = {
        "forget_knowmem_ROUGE": _knowmem("forget_knowmem", "lower"),
        "retain_knowmem_ROUGE": _knowmem("retain_knowmem", "higher"),
        "forget_verbmem_ROUGE": Figure(
            FigureForm("mean ROUGE-L F1 of 128 greedy tokens against the passage's own continuation", "lower"), _verbmem
        ),
        **figures.memorization_figures("verbmem", "gt", "the continuations"),
    }
    found |= membership.membership_figures() | membership.leak_figures()
    for of, text in (("forget_knowmem", "answer"), ("retain_knowmem", "answer"), ("verbmem", "gt")):
        found |= figures.gibberish_figures(f"{of}_", of, text)
    return found


def _knowmem(of: str, better: Better) -> Figure:
    def result(reading: Reading) -> Result:
        if reading.sets.get(of) and not reading.sets.get(f"{of}_icl"):
            raise Missing(f"needs the set {of}_icl")
        return figures.rouge(reading.scores(of), "rougeL_f1")

    form = FigureForm("mean ROUGE-L F1 of the greedy answers, answered questions standing before each", better)
    return Figure(form, result)


def _verbmem(reading: Reading) -> Result:
    """Against the continuation as it was scored: cut to 2,048 tokens."""
    scores = reading.scores("verbmem", "gt")
    assert scores.answers is not None
    return figures.rouge(scores._replace(answers={**scores.answers, **(scores.labels or {})}), "rougeL_f1")
