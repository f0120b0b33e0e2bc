"""A request to generate, in the one form that all dialects of the API are translated to."""

from dataclasses import dataclass, field
from typing import Literal

from easyllm.core.json_types import Json, JsonObject
from easyllm.engine.guide_spec import GuideSpec
from easyllm.engine.params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages for the chat template.

    Attributes:
        messages: the messages, as `normalise_messages` returns them.
        tools: definitions of the tools.
        variables: further variables of the template.
        add_generation_prompt: whether the header of an assistant turn follows.
        continue_final_message: whether the last message is continued instead.
    """

    messages: list[JsonObject]
    tools: list[JsonObject] = field(default_factory=list)
    variables: JsonObject = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Which tools may be called.

    Attributes:
        mode: `auto`, `none`, `required` (at least one call), or `named` (a call of one tool).
        name: name of the tool, with `named`.
        parallel: whether one answer may contain several calls.
    """

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str | None = None
    parallel: bool = True

    @classmethod
    def of(cls, choice: Json, parallel: bool | None) -> "ToolChoice":
        """Returns the choice of a request, as `read_tool_choice` reads it."""
        on = parallel is not False
        if isinstance(choice, tuple):
            return cls(mode="named", name=choice[0], parallel=on)
        return cls(mode=choice or "auto", parallel=on)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoning:
    """Whether and how long the model reasons before it answers.

    Attributes:
        on: whether it reasons; None leaves it to the chat template.
        budget: maximum number of reasoning tokens; None sets no bound.
    """

    on: bool | None = None
    budget: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request to generate.

    Attributes:
        model: name of the served model.
        prompt: a conversation, or token ids.
        params: how tokens are chosen.
        guide: the form of the text.
        guide_field: the request field with that form, for errors.
        tool_choice: which tools may be called.
        reasoning: whether and how long the model reasons.
        salt: cached prefixes are shared only among jobs with the same salt.
    """

    model: str
    prompt: Conversation | tuple[int, ...]
    params: SamplingParams
    guide: GuideSpec | None = None
    guide_field: str = "response_format"
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    reasoning: Reasoning = field(default_factory=Reasoning)
    salt: str = ""
