"""Builds the prompts of a task: system message, examples (shots), question; chat or plain text."""

from collections.abc import Sequence
from dataclasses import dataclass

from easyllm.core.errors import ConfigError
from easyllm.engine.llm import LLM
from easyllm.evaluate.task_config import TaskConfig
from easyllm.evaluate.task_items import Item, choices_of, fill, options_text, references_of
from easyllm.prompt.extract import LETTERS, without_reasoning
from easyllm.tokenizer.messages import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptForm:
    """How items are asked.

    Attributes:
        likelihood: whether choices are compared by their log-probabilities, else generated.
        chat: whether prompts are conversations, rendered by the model's chat template.
        thinking: whether the model reasons before it answers; None leaves it to the template.
    """

    likelihood: bool = False
    chat: bool = False
    thinking: bool | None = None


def check_form(llm: LLM, task: TaskConfig, form: PromptForm) -> None:
    """Refuses a form that the task or the model does not have.

    Raises:
        ConfigError: see the message.
    """
    check_form_of_task(task, form)
    if form.chat and llm.tokenizer.chat_template is None:
        raise ConfigError("the model has no chat template; leave out --chat")
    if form.thinking is None:
        return
    reasoning = llm.tokenizer.reasoning
    if not form.chat or reasoning is None or reasoning.template_kwargs(form.thinking) is None:
        raise ConfigError(
            "the model's chat template has no switch for thinking; leave out --thinking"
        )


def check_form_of_task(task: TaskConfig, form: PromptForm) -> None:
    """Refuses a form that the task does not have, whatever the model is.

    Raises:
        ConfigError: see the message.
    """
    if form.chat and (form.likelihood or task.kind == "text"):
        raise ConfigError(
            "likelihoods are those of plain text after a plain prompt; leave out --chat, or add "
            "--choices generated"
        )
    if form.thinking is not None and (form.likelihood or task.kind == "text"):
        raise ConfigError(
            f"task {task.name!r} scores given texts by their likelihood, so there is no response "
            "in which the model could think; leave out --thinking, or add --choices generated"
        )


def question(task: TaskConfig, item: Item, form: PromptForm) -> str:
    """Returns the text of the question itself."""
    text = fill(task.prompt, item.fields)
    if task.kind != "choice" or form.likelihood:
        return text
    choices, _ = choices_of(task, item)
    extra = {"prompt": text, "options": options_text(choices)}
    return fill(task.generated_prompt, {**item.fields, **extra})


def shot_answer(task: TaskConfig, item: Item, form: PromptForm) -> str:
    """Returns the answer of an example."""
    if task.kind == "choice":
        choices, gold = choices_of(task, item)
        return choices[gold] if form.likelihood else LETTERS[gold]
    return fill(task.shot, item.fields) if task.shot else references_of(task, item)[0]


def messages_of(
    task: TaskConfig, item: Item, shots: Sequence[Item], form: PromptForm
) -> list[Message]:
    """Returns the conversation that asks about an item; each example is a turn of its own."""
    system = fill(task.system, item.fields)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for shot in shots:
        messages.append({"role": "user", "content": question(task, shot, form)})
        messages.append({"role": "assistant", "content": shot_answer(task, shot, form)})
    return [*messages, {"role": "user", "content": question(task, item, form)}]


def plain_prompt(task: TaskConfig, item: Item, shots: Sequence[Item], form: PromptForm) -> str:
    """Returns the prompt as plain text, the examples separated by empty lines."""
    delimiter = task.delimiter if task.kind == "choice" else " "
    examples = [
        question(task, shot, form) + delimiter + shot_answer(task, shot, form) for shot in shots
    ]
    system = [fill(task.system, item.fields)] if task.system else []
    return "\n\n".join([*system, *examples, question(task, item, form)])


def encoded(
    llm: LLM, task: TaskConfig, item: Item, shots: Sequence[Item], form: PromptForm
) -> tuple[int, ...]:
    """Returns the token ids of an item's prompt."""
    if not form.chat:
        return tuple(llm.tokenizer.encode(plain_prompt(task, item, shots, form)))
    reasoning, kwargs = llm.tokenizer.reasoning, None
    if form.thinking is not None and reasoning is not None:
        kwargs = reasoning.template_kwargs(form.thinking)
    messages = messages_of(task, item, shots, form)
    return tuple(llm.encode_chat(messages, template_kwargs=kwargs))


def final_text(
    llm: LLM, prompt_ids: Sequence[int], token_ids: Sequence[int], text: str
) -> str | None:
    """Returns a response without its reasoning; None if the reasoning has not ended.

    Marks that are special tokens are not part of the text, so they are found among the tokens.
    """
    reasoning = llm.tokenizer.reasoning
    if reasoning is None:
        return text
    opened = reasoning.is_open(llm.tokenizer.decode(list(prompt_ids[-16:]), skip_special=False))
    if set(reasoning.ids.values()) & llm.tokenizer.special_ids:
        text = llm.tokenizer.decode(list(token_ids), skip_special=False)
    return without_reasoning(text, opened=opened, marks=(reasoning.open, reasoning.close))


__all__ = [
    "PromptForm",
    "check_form",
    "check_form_of_task",
    "encoded",
    "final_text",
    "messages_of",
    "plain_prompt",
    "question",
    "shot_answer",
]
