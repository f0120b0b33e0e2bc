"""Grammars of answers that a model's reasoning may precede."""

import json

from easyllm.core.json_types import JsonMapping
from easyllm.tokenizer.reasoning import ReasoningFormat
from easyllm.tokenizer.tool_calls.lark import GAP, Lark, containing


def reasoning_first(
    lark: Lark,
    reasoning: ReasoningFormat | None,
    starts_in_reasoning: bool,
    answer: str,
    *,
    gap: str = "",
) -> str:
    """Adds the rules of the reasoning, and returns the expression of it with the answer.

    Args:
        lark: receives the rules.
        reasoning: the reasoning; None for the answer alone.
        starts_in_reasoning: whether the prompt has opened the reasoning, which is then closed.
        answer: the expression of the answer.
        gap: the expression of what may separate the reasoning from it.
    """
    if reasoning is None:
        return answer
    free = "TEXT"
    if lark.is_token(reasoning.close):
        free = lark.without("THOUGHTS", [containing(reasoning.close)])
    lark.up_to("thoughts", reasoning.close, free)
    thoughts = f"thoughts {gap}"
    if starts_in_reasoning:
        return f"{thoughts} {answer}"
    if lark.is_token(reasoning.open):
        return f"({GAP} {lark.mark(reasoning.open)} {thoughts})? {answer}"
    return f"({lark.first('OPEN', reasoning.open)} {thoughts})? {answer}"


def after_reasoning(
    answer: JsonMapping, reasoning: ReasoningFormat, starts_in_reasoning: bool
) -> str:
    """Returns a grammar of the reasoning, followed by an answer with a grammar of its own.

    Args:
        answer: the grammar of the answer as an object of llguidance: `{"lark_grammar": ...}` or
            `{"json_schema": ...}`.
        reasoning: the model's reasoning.
        starts_in_reasoning: whether the prompt has opened the reasoning.
    """
    lark = Lark(reasoning.ids)
    # only newlines, which `OutputParser` removes: any other whitespace would be part of the answer
    lark.add("NEWLINES", r"/[\r\n]{1,16}/")
    start = reasoning_first(lark, reasoning, starts_in_reasoning, "@answer", gap="NEWLINES?")
    grammars = [{"lark_grammar": lark.text(start)}, {"name": "answer", **answer}]
    return json.dumps({"grammars": grammars}, ensure_ascii=False)
