"""ROUGE of greedy answers (Lin 2004), words stemmed, as the field's reference computes it."""

import re
from functools import lru_cache
from typing import Literal

from rouge_score import rouge_scorer

from worker.scores import Score, Scores, mean

WORD = re.compile("[a-z0-9]")  # all that rouge-score sees; an answer without one would score a silent 0
UNSEEN = "no answer has a word in Latin letters or digits, and the reference counts no others"


def rouge(scores: Scores, kind: Literal["rouge1", "rougeL"], of: Literal["recall", "fmeasure"]) -> Score:
    """Of each greedy answer against the row's own. Rows whose own has no word that is seen are left out."""
    assert scores.generated is not None
    assert scores.answers is not None
    by_row = {
        place: float(getattr(_scored(scores.answers[place].strip(), text.strip())[kind], of))
        for place, text in scores.generated.items()
        if WORD.search(scores.answers[place].lower())
    }
    return mean(by_row, empty=UNSEEN if scores.generated else "no row has a prompt that could be answered")


@lru_cache(maxsize=1_024)  # one pair serves several figures
def _scored(answer: str, text: str) -> dict[str, rouge_scorer.scoring.Score]:
    scored: dict[str, rouge_scorer.scoring.Score] = _scorer().score(answer, text)
    return scored


@lru_cache(maxsize=1)
def _scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
