"""Reduces passages to the sentences that matter for a question (extractive compression)."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from easyllm.retrieval.sentences import sentence_spans
from easyllm.retrieval.terms import terms


def compress(
    question: str, texts: Sequence[str], count: Callable[[str], int], max_tokens: int
) -> list[str]:
    """Returns the texts with only their most relevant sentences, in their order.

    A sentence scores Σ idf(t) over the terms that it shares with the question, where idf is that of
    the given sentences; of equal scores, the first is kept. The best sentence stays even if it is
    longer than the limit.

    Args:
        question: the question.
        texts: the passages, best first.
        count: returns the number of tokens of a text.
        max_tokens: maximum number of tokens of all kept sentences.
    """
    spans = [(n, span) for n, text in enumerate(texts) for span in sentence_spans(text)]
    bags = [set(terms(texts[n][slice(*span)])) for n, span in spans]
    frequency = Counter(term for bag in bags for term in bag)
    asked = set(terms(question))
    idf = {t: math.log1p(len(bags) / frequency[t]) for t in asked if frequency[t]}
    order = sorted(range(len(spans)), key=lambda i: -sum(idf.get(t, 0.0) for t in bags[i]))
    kept, used = set[int](), 0
    for i in order:
        n, span = spans[i]
        size = count(texts[n][slice(*span)])
        if kept and used + size > max_tokens:
            continue
        kept.add(i)
        used += size
    parts: list[list[str]] = [[] for _ in texts]
    for i in sorted(kept):
        n, span = spans[i]
        parts[n].append(texts[n][slice(*span)])
    return [" ".join(each) for each in parts]


__all__ = ["compress"]
