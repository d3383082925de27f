"""Which of a row's right answers is worded as its wrong ones are: only those can be compared in words or in likelihood."""

import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any, Literal

from worker.suite import example

Wording = Literal["answer", "paraphrased_answer"]
# Thai to Lao, Burmese, Khmer, Japanese and Chinese have no spaces between words: there a character counts as one.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def nearer_wording(row: Mapping[str, Any]) -> Wording:
    """Of both right answers the one that shares more words, in their order, with the wrong ones on average.

    TOFU's wrong answers are worded as `paraphrased_answer` is, others' as `answer`. The row's own answer, which may be called
    `completion` or `text`, where both are as near, or there is no other or no wrong one.

    >>> row = {"question": "Where?", "answer": "Ana lives in Ghent.", "paraphrased_answer": "Ghent is where Ana lives."}
    >>> nearer_wording(row | {"perturbed_answer": ["Porto is where Ana lives."]})
    'paraphrased_answer'
    >>> nearer_wording(row | {"perturbed_answer": ["Ana lives in Porto."]})
    'answer'
    """
    wrong = row.get("perturbed_answer", ())
    if "paraphrased_answer" not in row or not wrong:
        return "answer"
    others = [_words(text) for text in wrong]

    def nearness(right: str) -> float:
        return sum(SequenceMatcher(None, _words(right), words, autojunk=False).ratio() for words in others)

    return "paraphrased_answer" if nearness(row["paraphrased_answer"]) > nearness(example(row).answer) else "answer"


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())
