"""The form of a job's output, as masks: that of its text, of tool calls, of reasoning before it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from easyllm.core.errors import EasyllmError
from easyllm.core.json_types import JsonObject
from easyllm.engine.guide_grammar import with_checked_schemas
from easyllm.engine.llm import LLM
from easyllm.engine.reasoning_budget import ReasoningBudget
from easyllm.engine.request import MaskSource
from easyllm.serve.errors import APIError
from easyllm.serve.job import Job, ToolChoice
from easyllm.tokenizer.reasoning import ReasoningFormat
from easyllm.tokenizer.tool_calls import OneTool, after_reasoning
from easyllm.tokenizer.tool_calls import ToolChoice as ChoiceOfFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Compiles the masks of a job whose prompt is a conversation.

    Attributes:
        job: the job.
        tools: the tools of its conversation.
        llm: the model.
        starts_in_reasoning: whether the prompt ends inside the reasoning.
    """

    job: Job
    tools: Sequence[JsonObject]
    llm: LLM
    starts_in_reasoning: bool

    @property
    def reasoning(self) -> ReasoningFormat | None:
        """The model's reasoning."""
        return self.llm.tokenizer.reasoning

    @property
    def _before(self) -> ReasoningFormat | None:
        """The reasoning that may precede the answer; None if it is off and the prompt closed it."""
        off = self.job.reasoning.on is False and not self.starts_in_reasoning
        return None if off else self.reasoning

    def mask(self) -> MaskSource | None:
        """Returns what restricts the tokens; None if all are allowed.

        Raises:
            APIError: a schema or the form cannot be honoured; the error names its field.
        """
        inner, budget = self._answer(), self._budget()
        if self.reasoning is None or budget is None:
            return inner
        return ReasoningBudget(
            budget,
            self.reasoning,
            self.llm.tokenizer,
            starts_in_reasoning=self.starts_in_reasoning,
            inner=inner,
        )

    def _answer(self) -> MaskSource | None:
        """Returns the masks of the answer: tool calls, a guided text, or either of them."""
        mode, guide = self.job.tool_choice.mode, self.job.guide
        if self.tools and (guide is None or mode in ("required", "named")):
            with refused("tools"):
                calls = self._calls(_choice(self.job.tool_choice), with_reasoning=True)
                return None if calls is None else self.llm.guides.compile_lark(calls)
        if guide is None:
            return None
        may_call = bool(self.tools) and mode == "auto"
        with refused("tools"):
            calls = self._calls("required", with_reasoning=False) if may_call else None
            checked = None if calls is None else with_checked_schemas(calls)
        with refused(self.job.guide_field):
            if checked is None and self._before is None:
                return self.llm.guides.compile(guide)
            return self.llm.guides.compile(guide, wrap=lambda text: self._either(text, checked))

    def _calls(self, choice: ChoiceOfFormat, *, with_reasoning: bool) -> str | None:
        return self.llm.tokenizer.tool_format.grammar(
            list(self.tools),
            choice=choice,
            parallel=self.job.tool_choice.parallel,
            reasoning=self._before if with_reasoning else None,
            starts_in_reasoning=with_reasoning and self.starts_in_reasoning,
        )

    def _either(self, text: str, calls: str | None) -> str:
        """Returns a grammar of a text, or of tool calls in its place, after the reasoning."""
        named = [{"name": "text", "lark_grammar": text}]
        if calls is not None:
            named.append({"name": "calls", "lark_grammar": calls})
        start = "start: " + " | ".join(f"@{each['name']}" for each in named)
        before = self._before
        if before is None:
            grammars = [{"lark_grammar": start}]
        else:
            answer = {"lark_grammar": start}
            whole = after_reasoning(answer, before, self.starts_in_reasoning)
            grammars = json.loads(whole)["grammars"]
        return json.dumps({"grammars": [*grammars, *named]}, ensure_ascii=False)

    def _budget(self) -> int | None:
        """Returns the maximum number of reasoning tokens; None if there is no bound.

        If the chat template cannot switch the reasoning off, a budget of 0 closes it at once.
        """
        wanted = self.job.reasoning
        if wanted.on is not False or self.reasoning is None:
            return wanted.budget
        return 0 if self.reasoning.template_kwargs(False) is None else None


@contextmanager
def refused(param: str) -> Iterator[None]:
    """Reports what the engine refuses as an error about the request field `param`."""
    try:
        yield
    except EasyllmError as error:
        raise APIError(400, str(error), param=param, code="invalid_value") from None


def _choice(choice: ToolChoice) -> ChoiceOfFormat:
    if choice.mode == "named":
        assert choice.name is not None, "a named choice has a name"
        return OneTool(name=choice.name)
    return choice.mode
