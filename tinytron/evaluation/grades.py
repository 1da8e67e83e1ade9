"""How much of a reference answer a generated text has, from 0 to 1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_ARTICLES = frozenset({"a", "an", "the"})
_CHRF_ORDER, _CHRF_BETA = 6, 2


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and articles, as SQuAD compares answers (arXiv:1606.05250,
    section 6.1)."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in _ARTICLES]


def word_f1(answer: str, given: str) -> float:
    """The harmonic mean of precision and recall of the words; 1 if both texts have none."""
    reference, found = words(answer), words(given)
    if not reference or not found:
        return float(not reference and not found)
    return _f_score(*_precision_and_recall(reference, found), beta=1)


def chrf(answer: str, given: str) -> float:
    """F2 score of the mean precision and mean recall of character n-grams up to six, without white space (chrF2: Popovic
    2015, doi 10.18653/v1/W15-3049)."""
    texts = ["".join(text.split()) for text in (answer, given)]
    longest = min(_CHRF_ORDER, *map(len, texts))
    if not longest:
        return float(texts[0] == texts[1])
    found = [_precision_and_recall(*(_grams(text, n) for text in texts)) for n in range(1, longest + 1)]
    precision, recall = (sum(values) / longest for values in zip(*found, strict=True))
    return _f_score(precision, recall, _CHRF_BETA)


def _grams(text: str, n: int) -> list[str]:
    return [text[i : i + n] for i in range(len(text) - n + 1)]


def _precision_and_recall(reference: Sequence[str], found: Sequence[str]) -> tuple[float, float]:
    common = (Counter(reference) & Counter(found)).total()
    return common / len(found), common / len(reference)


def _f_score(precision: float, recall: float, beta: float) -> float:
    both = beta**2 * precision + recall
    return (1 + beta**2) * precision * recall / both if both else 0.0
