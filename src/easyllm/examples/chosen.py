"""Preference data as conversations: the chosen or good responses, for supervised fine-tuning."""

from collections.abc import Iterable, Iterator

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonObject
from easyllm.corpus.files.row import Row
from easyllm.examples.conversations import conversations, row_kind
from easyllm.examples.preferences import labelled, preferences
from easyllm.tokenizer.messages import Message


def chosen_rows(rows: Iterable[Row]) -> Iterator[JsonObject]:
    """Yields the better response of each row as a row of `messages`.

    Of a pair, the chosen response; of a labelled response, the response if its label is true; other
    rows are left out. Assistant turns of the prompt have weight 0, as in preference training, which
    trains the response only.

    Raises:
        DataError: a row is malformed, or is neither a pair nor labelled; the message gives its
            location.
    """
    for row in rows:
        kind = row_kind(row.values)
        if kind == "preference":
            (pair,) = preferences([row])
            yield _conversation(pair.prompt, pair.chosen, pair.tools)
        elif kind == "labelled":
            (single,) = labelled([row])
            if single.label:
                yield _conversation(single.prompt, single.completion, single.tools)
        else:
            next(conversations([row]))  # a malformed row has an error of its own
            raise DataError(
                f"{row.location} is a conversation, expected a pair (chosen, rejected) or a "
                "labelled response (completion, label); a file of conversations can be trained on "
                "as it is"
            )


def _conversation(
    prompt: list[Message], response: list[Message], tools: list[JsonObject] | None
) -> JsonObject:
    """Returns a row of messages in which only the response is trained."""
    asked = [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt]
    row: JsonObject = {"messages": [*asked, *response]}
    return row if tools is None else row | {"tools": tools}
