"""BLEU for the learning curve, on a machine that may lack sacrebleu; evaluate.py reports sacrebleu's own."""

from __future__ import annotations

import math
import re
from collections import Counter

_TOKENS = re.compile(r"\w+|[^\w\s]")


def bleu(hypotheses: list[str], references: list[str]) -> float:
    """Corpus BLEU of 0 to 100 with one reference: words and signs apart, 1 to 4 tokens, case counts (Papineni 2002)."""
    right, given = [0] * 4, [0] * 4
    ours, theirs = 0, 0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        one, other = _TOKENS.findall(hypothesis), _TOKENS.findall(reference)
        ours, theirs = ours + len(one), theirs + len(other)
        for order in range(4):
            grams, known = _grams(one, order + 1), _grams(other, order + 1)
            right[order] += sum((grams & known).values())
            given[order] += sum(grams.values())
    if min(right) == 0:
        return 0.0
    precision = sum(math.log(one / all_) for one, all_ in zip(right, given, strict=True)) / 4
    return 100 * math.exp(precision + min(0.0, 1 - theirs / ours))


def _grams(tokens: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))
