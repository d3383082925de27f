"""ROUGE-L recall over the words of any script, where the benchmark's `rouge_l_recall` sees a-z and 0-9 alone.

Words after NFKC and case folding, unstemmed; characters where a script has no spaces between words.

Reference: Lin 2004, ROUGE; word boundaries after Unicode TR 18.
"""

from worker.rouge import unicode_recall
from worker.scores import FORGOTTEN_LOWER, Metric


def rouge_l_recall_unicode() -> Metric:
    """The true answer has four Russian words (she lived in Lima), and the first two are said, in capitals: 2/4.

    >>> import torch
    >>> from worker.scores import Scores
    >>> true = {0: "\u041e\u043d\u0430 \u0436\u0438\u043b\u0430 \u0432 \u041b\u0438\u043c\u0435."}
    >>> scores = Scores([0], torch.ones(1), torch.tensor([5]), None, {0: "\u041e\u041d\u0410 \u0416\u0418\u041b\u0410"}, true)
    >>> rouge_l_recall_unicode().fn(scores).value
    0.5
    >>> rouge_l_recall_unicode().fn(scores._replace(answers={0: "?"})).reason
    'no answer has a word'
    """
    return Metric(
        unicode_recall,
        frozenset({"generated"}),
        FORGOTTEN_LOWER,
        "mean over rows of the share of the true answer's words, of any script, that the greedy answer has in their order "
        "(ROUGE-L recall after NFKC and case folding, unstemmed)",
    )
