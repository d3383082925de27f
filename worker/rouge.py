"""ROUGE of greedy answers (Lin 2004): as the field's reference computes it, words stemmed, and over the words of any script.

The reference's words are runs of a-z and 0-9: of other scripts it sees digits at most.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import regex
from rouge_score import rouge_scorer

from worker.scores import Score, Scores, mean

REFERENCE_WORD = re.compile("[a-z0-9]")  # all that rouge-score sees; an answer without one would score a silent 0
UNSEEN = "no answer has a word in Latin letters or digits, and the reference counts no others"
WORDLESS = "no answer has a word"
# Scripts that put no spaces between words: each character with its marks is a word.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[\w--[_{UNSPACED}]]+", regex.V1)  # re's \w splits at vowel signs


def rouge(scores: Scores, kind: Literal["rouge1", "rougeL"], of: Literal["recall", "fmeasure"]) -> Score:
    """Of each greedy answer against the row's own. Rows whose own has no word that the reference sees are left out."""

    def seen(answer: str) -> bool:
        return REFERENCE_WORD.search(answer.lower()) is not None

    return _each(scores, seen, lambda answer, said: getattr(_scored(answer.strip(), said.strip())[kind], of), UNSEEN)


def unicode_recall(scores: Scores) -> Score:
    """ROUGE-L recall of each greedy answer over `unicode_words`, unstemmed. Rows whose own answer has none are left out."""

    def seen(answer: str) -> bool:
        return bool(unicode_words(answer))

    return _each(scores, seen, lambda answer, said: _unicode_scorer().score(answer, said)["rougeL"].recall, WORDLESS)


def unicode_words(text: str) -> list[str]:
    """Runs of letters, marks and digits after NFKC and case folding; single characters where a script has no spaces.

    >>> unicode_words("Don't \\uff32\\uff35\\uff2e, STRASSE Stra\\u00dfe")
    ['don', 't', 'run', 'strasse', 'strasse']
    >>> len(unicode_words("\\u6771\\u4eac\\u3067 1985"))  # Tokyo, in Japanese, and a particle
    4
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    found: list[str] = WORD.findall(folded)
    return found


def _each(scores: Scores, seen: Callable[[str], bool], of: Callable[[str, str], float], unseen: str) -> Score:
    assert scores.generated is not None
    assert scores.answers is not None
    by_row = {
        place: float(of(scores.answers[place], said))
        for place, said in scores.generated.items()
        if seen(scores.answers[place])
    }
    return mean(by_row, empty=unseen if scores.generated else "no row has a prompt that could be answered")


@lru_cache(maxsize=1_024)  # one pair serves several figures
def _scored(answer: str, text: str) -> dict[str, rouge_scorer.scoring.Score]:
    scored: dict[str, rouge_scorer.scoring.Score] = _scorer().score(answer, text)
    return scored


@lru_cache(maxsize=1)
def _scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


class _UnicodeTokenizer:
    """As rouge-score calls it."""

    def tokenize(self, text: str) -> list[str]:
        return unicode_words(text)


@lru_cache(maxsize=1)
def _unicode_scorer() -> Any:
    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=_UnicodeTokenizer())
