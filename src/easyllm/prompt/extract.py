"""Reads the answer from a model's response: a number, the letter of a choice, code, or text.

This is the only reader of answers in the project: evaluations, rule rewards and reasoning use it,
so that an answer that counts in one counts in the others. None means that a response contains no
answer of the wanted kind; callers count such responses as unparsed.
"""

import re
import unicodedata
from fractions import Fraction
from typing import Literal

AnswerKind = Literal["text", "line", "number", "choice", "code"]
"""text: the whole response; line: its first line that is not empty; number, choice: see `extract`;
code: the last fenced block, or everything."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CODE_BLOCK = re.compile(r"```[\w+.-]*[ \t]*\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"(?:(?<![\w.)\]])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
"""A decimal number; a minus after a digit or bracket is a subtraction and no part of it."""
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_HASHES = re.compile(r"####\s*([^\n]*)")
_MARK = re.compile(
    r"(?:\banswer|答案|\bresult|结果)\s*(?:\bis\b|\bare\b|应该是|应为|等于|是|为)?\s*[:=]?|答\s*[:]",
    re.IGNORECASE,
)
_CHOICE_MARK = (
    r"(?:\b(?:answer|choice|option)|答案|选项|选择|选|答)"
    r"\s*(?:\bis\b|应该是|应为|是|为)?\s*:?\s*(?:\boption\b|\bchoice\b|选项)?\s*"
)
_BEFORE, _AFTER = r"[*(\[\"“'`$]*", r"(?![A-Za-z0-9'’])"


def extract(kind: AnswerKind, text: str, *, num_choices: int = 4) -> str | None:
    """Returns the answer in a response, or None if it has none of this kind.

    A number is the last one in `\\boxed{...}`, else after `####`, else the first one after the last
    "answer is" (答案是), else the last of the text. A choice is the letter in the last box or after
    the last "answer is", else a letter that begins the text and is marked as a label (`B.`, `(B)`,
    `B` alone), else the only letter in parentheses.

    >>> extract("number", "3 + 4 = 7. The answer is 7,000."), extract("number", "no idea")
    ('7000', None)
    >>> extract("choice", "答案：(C)"), extract("choice", "A dog barks.")
    ('C', None)

    Args:
        kind: what the answer is.
        text: the response, without reasoning (see `without_reasoning`).
        num_choices: number of choices, from A on.
    """
    match kind:
        case "text":
            return text.strip() or None
        case "line":
            return next((line.strip() for line in text.splitlines() if line.strip()), None)
        case "code":
            return code_of(text) if text.strip() else None
        case "number":
            return _number(_folded(text))
        case "choice":
            return _choice(_folded(text), LETTERS[:num_choices])


def numbers(text: str) -> list[str]:
    """Returns the decimal numbers of a text, without thousands separators.

    >>> numbers("It costs $1,250.50, i.e. 10-3 units at −5 °C")
    ['1250.50', '10', '3', '-5']
    """
    return [found.replace(",", "") for found in NUMBER.findall(_folded(text))]


def same_number(first: str, second: str) -> bool:
    """Whether two texts are the same number: exactly, not as floats; False if one is none.

    >>> same_number("1,000.0", "1000"), same_number("0.1", "0.10000000000000001")
    (True, False)
    """
    values = [numbers(each) for each in (first, second)]
    if any(len(each) != 1 for each in values):
        return False
    return Fraction(values[0][0]) == Fraction(values[1][0])


def code_of(text: str) -> str:
    """Returns the last fenced block of code in a text, or all of the text."""
    blocks: list[str] = CODE_BLOCK.findall(text)
    return blocks[-1] if blocks else text


def without_reasoning(
    text: str, *, opened: bool = False, marks: tuple[str, str] = ("<think>", "</think>")
) -> str | None:
    """Returns a response without its reasoning; None if the reasoning has not ended.

    >>> without_reasoning("<think>6 or 7?</think> 7"), without_reasoning("<think>6 or")
    (' 7', None)

    Args:
        text: the response.
        opened: whether the prompt ends inside the reasoning.
        marks: the marks before and after the reasoning.
    """
    start, end = marks
    _, closed, after = text.rpartition(end)
    if closed:
        return after
    return None if opened or start in text else text


def _folded(text: str) -> str:
    """Returns the text with full-width characters and the minus sign in their ASCII forms."""
    return unicodedata.normalize("NFKC", text).replace("−", "-")


def _number(text: str) -> str | None:
    """Returns the number that a text gives as its answer."""
    for pattern in (_BOXED, _HASHES):
        places = pattern.findall(text)
        if places and (found := numbers(places[-1])):
            return found[-1]
    every = numbers(text)
    marks = list(_MARK.finditer(text))
    for mark in reversed(marks):
        if found := numbers(text[mark.end() :]):
            return found[0]
    return every[-1] if every else None


def _choice(text: str, letters: str) -> str | None:
    """Returns the letter that a text gives as its answer; words are matched in any case."""
    letter = f"([{letters}])"
    boxed = re.findall(rf"\\boxed\s*\{{(?:\\text\s*\{{)?\s*\(?{letter}\)?\s*\}}", text)
    if boxed:
        return str(boxed[-1])
    after = re.findall(rf"(?i:{_CHOICE_MARK}){_BEFORE}{letter}{_AFTER}", text)
    if after:
        return str(after[-1])
    first = re.match(rf"\s*{_BEFORE}{letter}(?:\s*[).\]:、*]|\s*$|\s*\n)", text)
    if first:
        return first[1]
    named = set(re.findall(rf"\({letter}\)", text))
    return named.pop() if len(named) == 1 else None


__all__ = [
    "CODE_BLOCK",
    "LETTERS",
    "NUMBER",
    "AnswerKind",
    "code_of",
    "extract",
    "numbers",
    "same_number",
    "without_reasoning",
]
