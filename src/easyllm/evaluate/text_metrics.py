"""Metrics of generated text: exact match, F1, numbers, BLEU, chrF, ROUGE, and of programs.

BLEU and chrF are sacrebleu's (Post 2018, arXiv 1804.08771), ROUGE is rouge-score's. An unparsed
answer counts as an empty one: it is wrong, and its n-grams are missing.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from easyllm.core.errors import ConfigError, install
from easyllm.core.json_types import JsonObject
from easyllm.evaluate.metric import Floats, Metric, Outcome, mean_metric
from easyllm.evaluate.normalize import HAN, KANA, answer_tokens, normalize_answer
from easyllm.prompt.extract import same_number

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.metrics.bleu import BLEUScore

Language = Literal["en", "zh"]
RougeTokens = Literal["characters", "words"]
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
BLEU_ORDER = 4
_SENTENCE_END = re.compile(r"(?<=[。！？；!?])(?=[^\n])")


def text_metrics(
    language: Language = "en", *, rouge_tokens: RougeTokens = "characters"
) -> dict[str, Metric]:
    """Returns the metrics of generated text by name.

    Args:
        language: of the references: BLEU's tokenizer is sacrebleu's `13a` or `zh`; ROUGE's is
            rouge-score's own for English, ours for Chinese.
        rouge_tokens: tokens of Chinese text in ROUGE: single Han characters, or words (jieba's
            dictionary).
    """
    found = [
        mean_metric("exact_match", "text", _best(_exact)),
        mean_metric("f1", "text", _best(_f1)),
        mean_metric("number", "text", _best(_equal_numbers)),
        mean_metric("contains", "text", _best(_contains)),
        mean_metric("pass@1", "tests", lambda outcome: float(outcome.passed)),
        Metric(
            name="bleu",
            needs="text",
            statistics=partial(_bleu_statistics, language),
            value=_each_row(partial(_bleu_value, language)),
            is_mean=False,
        ),
        Metric(
            name="chrf",
            needs="text",
            statistics=_chrf_statistics,
            value=_each_row(_chrf_value),
            is_mean=False,
        ),
    ]
    for name in ROUGE:
        of = partial(_rouge, name, language, rouge_tokens)
        found.append(mean_metric(name, "text", of))
    return {metric.name: metric for metric in found}


def bleu_details(statistics: Floats, language: Language = "en") -> JsonObject:
    """Returns BLEU's n-gram precisions in percent, brevity penalty and lengths.

    Args:
        statistics: [n, 10], of each item.
    """
    total = statistics.sum(0)
    found = _bleu_of(language, total)
    return {
        "precisions": [round(p, 4) for p in found.precisions],
        "brevity_penalty": found.bp,
        "length": int(total[0]),
        "reference_length": int(total[1]),
    }


def modified_precision(answer: str, references: Sequence[str], order: int) -> tuple[int, int]:
    """Returns the clipped count of an answer's n-grams in the references, and their number.

    >>> modified_precision("the the the the the the the", ["The cat is on the mat"], 1)
    (1, 7)

    Source: Papineni et al. 2002, section 2.1; case matters, so that `The` is another word.

    Args:
        answer: the answer.
        references: one or more references; an n-gram counts at most as often as in one of them.
        order: n, from 1 to 4.
    """
    found = _bleu("en").sentence_score(answer, list(references))
    return int(found.counts[order - 1]), int(found.totals[order - 1])


class MixedTokenizer:
    """Tokens of Chinese and mixed text for rouge-score: Han characters or words, and Latin words.

    Args:
        words: whether Chinese text is segmented into words, else each Han character is a token.

    Raises:
        ConfigError: the segmenter is not installed.
    """

    def __init__(self, *, words: bool = False) -> None:
        self._pattern = re.compile(rf"[a-z0-9]+|[{HAN}{KANA}]{'+' if words else ''}")
        self._cut: Callable[[str], list[str]] | None = None
        if words:
            try:
                import rjieba
            except ImportError:
                raise ConfigError(
                    "words of Chinese text need the package rjieba, which is not installed; "
                    f"{install('eval')}, or use rouge_tokens=characters"
                ) from None
            self._cut = rjieba.cut

    def tokenize(self, text: str) -> list[str]:
        """Returns the tokens of a text, lowercase; punctuation is dropped."""
        found = self._pattern.findall(text.lower())
        if self._cut is None:
            return found
        return [word for run in found for word in ([run] if run.isascii() else self._cut(run))]


def _best(of: Callable[[str, str], float]) -> Callable[[Outcome], float]:
    """Returns the maximum over the references, 0 for an unparsed answer."""

    def value(outcome: Outcome) -> float:
        if outcome.answer is None:
            return 0.0
        return max((of(outcome.answer, right) for right in outcome.references), default=0.0)

    return value


def _exact(answer: str, right: str) -> float:
    return float(normalize_answer(answer) == normalize_answer(right))


def _f1(answer: str, right: str) -> float:
    """Returns the harmonic mean of precision and recall of the tokens."""
    first, second = answer_tokens(answer), answer_tokens(right)
    if not first or not second:
        return float(first == second)
    common = (Counter(first) & Counter(second)).total()
    return 2 * common / (len(first) + len(second))


def _equal_numbers(answer: str, right: str) -> float:
    return float(same_number(answer, right))


def _contains(answer: str, right: str) -> float:
    return float(normalize_answer(right) in normalize_answer(answer))


def _each_row(of: Callable[[Floats], float]) -> Callable[[Floats], Floats]:
    def value(sums: Floats) -> Floats:
        return np.array([of(row) for row in sums])

    return value


@cache
def _bleu(language: Language) -> "BLEU":
    """Returns sacrebleu's BLEU; `effective_order` silences a warning about single segments."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise _missing("bleu", "sacrebleu") from None
    return BLEU(tokenize="zh" if language == "zh" else "13a", effective_order=True)


def _bleu_statistics(language: Language, outcome: Outcome) -> list[float]:
    """Returns the lengths of answer and closest reference, and counts and totals of n-grams."""
    found = _bleu(language).sentence_score(outcome.answer or "", list(outcome.references))
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def _bleu_of(language: Language, sums: Floats) -> "BLEUScore":
    """Returns the corpus BLEU of summed statistics, as `sacrebleu.corpus_bleu` does."""
    numbers = [round(each) for each in sums]
    counts, totals = numbers[2 : 2 + BLEU_ORDER], numbers[2 + BLEU_ORDER :]
    return _bleu(language).compute_bleu(
        counts, totals, numbers[0], numbers[1], smooth_method="exp", effective_order=False
    )


def _bleu_value(language: Language, sums: Floats) -> float:
    return float(_bleu_of(language, sums).score)


@cache
def _chrf() -> "CHRF":
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise _missing("chrf", "sacrebleu") from None
    return CHRF()


def _chrf_statistics(outcome: Outcome) -> list[float]:
    """Returns the n-grams of answer and reference and their matches, of orders 1 to 6."""
    references = [[right] for right in outcome.references]
    (found,) = _chrf()._extract_corpus_statistics([outcome.answer or ""], references)
    return [float(each) for each in found]


def _chrf_value(sums: Floats) -> float:
    return float(_chrf()._compute_score_from_stats([round(each) for each in sums]).score)


@cache
def _scorer(name: str, language: Language, tokens: RougeTokens) -> "RougeScorer":
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing(name, "rouge-score") from None
    if language == "zh":
        return RougeScorer([name], tokenizer=MixedTokenizer(words=tokens == "words"))
    return RougeScorer([name])


def _rouge(name: str, language: Language, tokens: RougeTokens, outcome: Outcome) -> float:
    """Returns the F-measure with the best reference.

    rougeLsum compares sentences, which rouge-score expects on lines of their own: Chinese text is
    split after its sentence-final punctuation.
    """

    def prepared(text: str) -> str:
        split = name == "rougeLsum" and language == "zh"
        return _SENTENCE_END.sub("\n", text) if split else text

    scorer, answer = _scorer(name, language, tokens), prepared(outcome.answer or "")
    return max(
        (scorer.score(prepared(right), answer)[name].fmeasure for right in outcome.references),
        default=0.0,
    )


def _missing(metric: str, package: str) -> ConfigError:
    return ConfigError(
        f"the metric {metric} needs the package {package}, which is not installed; "
        f"{install('eval')}"
    )


__all__ = [
    "ROUGE",
    "Language",
    "MixedTokenizer",
    "RougeTokens",
    "bleu_details",
    "modified_precision",
    "text_metrics",
]
