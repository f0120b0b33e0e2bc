"""Checks that schemathesis runs besides its own; loaded through `SCHEMATHESIS_HOOKS`."""

import json
import re

import schemathesis

LIMITS = re.compile(
    "|".join(
        (
            "the prompt is too long",  # the context of a model
            "the model has ids",  # its vocabulary
            "the prompt is empty",  # a tokenizer without BOS
            "only a final message from the assistant can be continued",  # the last of a list
            "is not among the tools",  # two lists that belong together
            "a tool call is required",
            "tool_calls without name and JSON arguments",  # text that is JSON
            "the template variable",
            "two tools are named",
            "min_tokens is more than max_tokens",  # two numbers to compare
            "best_of is less than n",
            "the best completions are known only at the end",
            "are more than .* choices",
            "give response_format or structured_outputs",
            "vectors have 32 dimensions",
            "nested more than",
            "cannot be (reloaded|unloaded|loaded)",  # how the server was started
            "was started without --adapters-folder",
        )
    )
)
"""Refusals of bodies that JSON Schema cannot exclude."""
GUIDES = ("tools", "response_format", "structured_outputs", "text.format", "output_config.format")
"""Fields with schemas, expressions and grammars, of which only some can be honoured."""


@schemathesis.check
def valid_bodies_are_accepted(
    _ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """As `positive_data_acceptance`, but for limits that no schema can express."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if response.status_code != 400:
        return
    error = json.loads(response.text)["error"]
    of_a_guide = str(error.get("param") or "").startswith(GUIDES)
    if not (of_a_guide or LIMITS.search(error["message"])):
        raise AssertionError(f"a valid body was refused: {error['message']}")
