"""What every format of tool calls has: a reader, and the grammar of answers with calls."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from easyllm.core.json_types import JsonObject
from easyllm.tokenizer.reasoning import ReasoningFormat
from easyllm.tokenizer.tool_calls.lark import GAP, Lark, containing, pattern_of
from easyllm.tokenizer.tool_calls.reader import Calls
from easyllm.tokenizer.tool_calls.reasoning_grammar import reasoning_first
from easyllm.tokenizer.tool_calls.short_ids import with_short_ids
from easyllm.tokenizer.tool_calls.source import Steps
from easyllm.tokenizer.tool_calls.tools import Tool, ToolChoice, ToolDefinitions, chosen

Conversation = tuple[list[JsonObject], list[JsonObject] | None]


class ToolFormat(ABC):
    """The format in which a model writes tool calls.

    Args:
        added: ids of the tokenizer's added tokens by their names.

    Attributes:
        name: name of the format.
        native: whether the model's chat template shows the tools; otherwise `prepare` does.
        opening: the mark that opens a group of calls; "" if calls begin at the start of the answer.
        triggers: all marks after which calls are read.
        at_start: whether calls may begin at the start of the answer without a mark.
        repeats: whether an answer may contain several groups, and what is written between them.
        allows_many: whether the chat template accepts several calls in one message.
        short_ids: whether it accepts only ids of calls of nine letters or digits.
    """

    name: str
    native = True
    opening = ""
    triggers: tuple[str, ...] = ()
    at_start = False
    repeats: str | None = None
    allows_many = True
    short_ids = False

    def __init__(self, added: Mapping[str, int]) -> None:
        self.added = dict(added)

    def prepare(
        self, messages: Sequence[JsonObject], tools: Sequence[JsonObject] | None
    ) -> Conversation:
        """Returns the messages and tools as `encode_chat` takes them; call it before.

        They are unchanged if the chat template shows tools, except for ids it would reject.
        """
        found = with_short_ids(messages) if self.short_ids else list(messages)
        return found, None if tools is None else list(tools)

    @abstractmethod
    def read(self, calls: Calls, trigger: str) -> Steps[None]:
        """Reads a group of calls after one of the triggers, or "" at the start of the answer.

        Raises:
            Malformed: what follows is not a call.
        """

    @abstractmethod
    def group(self, lark: Lark, tools: Sequence[Tool], *, many: bool) -> str:
        """Adds the rules of a group of calls without its opening mark, and returns its expression.

        Args:
            lark: receives the rules.
            tools: the tools that may be called.
            many: whether the group may contain several calls.
        """

    def beginnings(self, tools: Sequence[Tool]) -> list[str]:
        """Returns regular expressions of all texts that begin or contain a call."""
        return [containing(trigger) for trigger in self.triggers if tools]

    def grammar(
        self,
        tools: ToolDefinitions,
        *,
        choice: ToolChoice = "auto",
        parallel: bool = True,
        reasoning: ReasoningFormat | None = None,
        starts_in_reasoning: bool = False,
    ) -> str | None:
        """Returns the grammar of an answer, in Lark for llguidance; None if any text is allowed.

        With `auto` it is free text in which a call that has begun must be a valid one; with `none`,
        free text in which no call can begin; otherwise calls alone. Arguments must satisfy the
        schema of the tool.

        Args:
            tools: the declared tools.
            choice: whether, and which, tools are called.
            parallel: whether there may be several calls, if the chat template accepts them.
            reasoning: the model's reasoning, which may precede the answer; None without.
            starts_in_reasoning: whether the prompt has opened the reasoning.

        Raises:
            DataError: no tool is declared, the chosen one is not, or a schema has a keyword that
                this format cannot honour.
        """
        if choice == "none" and not tools:
            return None
        many = parallel and self.allows_many
        lark = Lark(self.added)
        callable_ = chosen(tools, "auto" if choice == "none" else choice)
        excluded = self.beginnings(callable_)
        if reasoning is not None and not lark.is_token(reasoning.open):
            excluded.append(rf"\s*{pattern_of(reasoning.open)}(?s:.*)")
        lark.without("FREE", excluded)
        if choice == "none":
            lark.add("answer", "FREE")
        elif choice == "auto":
            self._mixed(lark, callable_, many=many)
        else:
            self._calls_alone(lark, callable_, many=many)
        return lark.text(reasoning_first(lark, reasoning, starts_in_reasoning, "answer"))

    def _mixed(self, lark: Lark, tools: Sequence[Tool], *, many: bool) -> None:
        """Adds the rule of free text with calls in it."""
        group = self.group(lark, tools, many=many)
        bare = f" | {group} {GAP}" if self.at_start else ""
        if not self.opening:
            lark.add("answer", f"FREE{bare}")
            return
        lark.up_to("head", self.opening, "FREE")
        if many and self.repeats is not None:
            lark.add("answer", f"calls* FREE{bare}")
            lark.add("calls", f"head {group}")
        else:
            lark.add("answer", f"FREE | head {group} {GAP}{bare}")

    def _calls_alone(self, lark: Lark, tools: Sequence[Tool], *, many: bool) -> None:
        """Adds the rule of an answer that consists of calls."""
        group = self.group(lark, tools, many=many)
        opening = lark.mark(self.opening) if self.opening else ""
        if self.at_start and opening:
            opening = f"{opening}?"
        lark.add("calls", f"{opening} {group}")
        if many and self.repeats is not None:
            between = lark.mark(self.repeats) if self.repeats else ""
            lark.add("answer", f"{GAP} calls ({between} calls)*")
        else:
            lark.add("answer", f"{GAP} calls")
