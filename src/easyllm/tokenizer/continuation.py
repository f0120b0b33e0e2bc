"""Prompts that end inside the last assistant message, which the model continues.

The meaning is that of `continue_final_message` in transformers and vLLM: the conversation is
rendered with a mark after the last message's content, and cut at the mark.
"""

from dataclasses import replace

from easyllm.core.errors import DataError
from easyllm.tokenizer.user_text import TemplateInput, unused_characters


def with_final_mark(given: TemplateInput, source: str) -> tuple[TemplateInput, str]:
    """Returns the input with a mark after the content of the last message, and the mark.

    Args:
        given: the input of the template.
        source: the template; the mark does not occur in it.

    Raises:
        DataError: the last message is not text of an assistant.
    """
    last = given.messages[-1] if given.messages else {"role": "missing"}
    if last["role"] != "assistant":
        raise DataError(
            f"only a final message from the assistant can be continued, but its role is "
            f"{last['role']!r}; add an assistant message, or remove continue_final_message"
        )
    if last.get("tool_calls"):
        raise DataError(
            "the final message cannot be continued, because it has tool calls, after which nothing "
            "is written; remove them, or remove continue_final_message"
        )
    mark = next(unused_characters(given, source), None)
    if mark is None:
        raise DataError("the messages use every private-use character; remove one of them")
    # the space shows whether the template strips the content
    final = last | {"content": f"{last['content']}{mark} "}
    return replace(given, messages=[*given.messages[:-1], final]), mark


def cut_at_mark(text: str, mark: str) -> str:
    """Returns the rendered text up to the mark.

    A template that strips the content would also strip the whitespace before the mark.

    Raises:
        DataError: the template does not write the last message's content.
    """
    at = text.rfind(mark)
    if at < 0:
        raise DataError(
            "the model's chat template does not write the content of the final message, so it "
            "cannot be continued; remove continue_final_message"
        )
    return text[:at] if text.startswith(f"{mark} ", at) else text[:at].rstrip()
