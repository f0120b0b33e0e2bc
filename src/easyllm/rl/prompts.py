"""The prompts of a run: rows of files, or generated sums, tokenized once.

A row has a `prompt` (text, or a list of messages); all of its keys reach the reward functions, such
as `answer`. A prompt is rendered by the tokenizer's chat template if it has one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import Field

from easyllm.core.errors import ConfigError, DataError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.examples.data_file import read_rows
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import Sample
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.rl.arithmetic import SumsConfig, sums
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import GeneratedConfig, RowsConfig

Template = Literal["auto", "chat", "none"]
_TEMPLATE = (
    "Whether a prompt of plain text is rendered as a user's message by the chat template: `auto` "
    "if the tokenizer has one."
)


class PromptsConfig(RowsConfig):
    """Rows with a prompt, and whatever else the reward functions read, such as an answer."""

    kind: Literal["prompts"] = "prompts"
    prompt_key: str = Field(
        default="prompt", description="Key of the prompt in a row: a text, or a list of messages."
    )
    template: Template = Field(default="auto", description=_TEMPLATE)
    overlong: Literal["drop", "cut"] = Field(
        default="drop",
        description="Whether prompts that are too long are dropped, or lose their beginning "
        "(`cut`).",
    )


class ArithmeticConfig(GeneratedConfig):
    """Sums with a known answer, generated from a seed."""

    kind: Literal["arithmetic"] = "arithmetic"
    sums: SumsConfig = Field(default=SumsConfig(), description="Which sums.")
    template: Template = Field(default="auto", description=_TEMPLATE)


@dataclass(frozen=True, slots=True)
class PromptSample(Sample):
    """A tokenized prompt and its row.

    Attributes:
        text: the prompt as text: as in the row, or the content of its last message.
        cut: whether it lost its beginning, because it was too long.
        row: the row, for the reward functions.
    """

    text: str = ""
    cut: bool = False
    row: JsonMapping = field(default_factory=dict, hash=False)


def prepare_prompts(
    data: RowsConfig | GeneratedConfig,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    keys: Mapping[str, str] = MappingProxyType({}),
    held_out: bool = False,
) -> tuple[list[PromptSample], PreparationStats]:
    """Reads or generates the rows, and tokenizes their prompts.

    Args:
        data: a `PromptsConfig` or an `ArithmeticConfig`.
        files: the files of rows.
        tokenizer: the model's tokenizer.
        max_new_tokens: maximum length of an answer; prompt and answer fit into `data.max_seq_len`.
        keys: the keys that each row must have, with the name of the reward that reads them.
        held_out: whether to generate the rows to evaluate on, not those to train on.

    Raises:
        DataError: a row has no prompt or lacks a key that a reward reads (the message has its
            location), or no prompt remains.
        ConfigError: an answer alone would be longer than a sequence may be, or the tokenizer has no
            chat template but one is needed.
    """
    limit = data.max_seq_len - max_new_tokens
    if limit < 1:
        raise ConfigError(
            f"objective.rollout.max_tokens={max_new_tokens} leaves no token for the prompt in "
            f"data.max_seq_len={data.max_seq_len}; lower the one or raise the other"
        )
    samples, stats = list[PromptSample](), PreparationStats()
    cuts = isinstance(data, PromptsConfig) and data.overlong == "cut"
    for location, row in _rows(data, files, held_out=held_out):
        stats.rows += 1
        key = data.prompt_key if isinstance(data, PromptsConfig) else "prompt"
        _check_keys(row, keys, location)
        ids, text = _encoded(row.get(key), key, location, data, tokenizer)
        if len(ids) > limit and not cuts:
            stats.dropped_overlong += 1
            continue
        is_cut = len(ids) > limit
        stats.cut += is_cut
        ids = ids[-limit:]
        ignored = (IGNORE_INDEX,) * len(ids)
        samples.append(PromptSample(tuple(ids), ignored, {}, text=text, cut=is_cut, row=row))
        stats.samples += 1
        stats.tokens += len(ids) + max_new_tokens
        stats.trained_tokens += max_new_tokens
    if not samples:
        raise DataError(f"no prompts remain ({stats.summary()}); check the data files")
    return samples, stats


def _rows(
    data: RowsConfig | GeneratedConfig, files: Sequence[Path], *, held_out: bool
) -> Iterable[tuple[str, JsonObject]]:
    """Yields the rows, each with its location."""
    if isinstance(data, ArithmeticConfig):
        found = sums(data.sums, count=data.count, held_out=data.held_out, seed=data.seed)
        for number, row in enumerate(found[held_out]):
            yield f"generated row {number}", row
        return
    for file in files:
        for read in read_rows(file):
            yield str(read.location), read.values


def _check_keys(row: JsonObject, keys: Mapping[str, str], location: str) -> None:
    for key, reward in keys.items():
        if key not in row:
            raise DataError(
                f"{location} has no key {key!r}, which the reward {reward!r} reads (its keys are "
                f"{', '.join(row)}); add it, or name another in the reward's options ({{key: ...}})"
            )


def _encoded(
    prompt: object,
    key: str,
    location: str,
    data: RowsConfig | GeneratedConfig,
    tokenizer: Tokenizer,
) -> tuple[list[int], str]:
    """Returns the token ids of a prompt, and its text."""
    assert isinstance(data, PromptsConfig | ArithmeticConfig), "checked by the configuration"
    has_template = tokenizer.chat_template is not None
    if isinstance(prompt, str) and prompt:
        if data.template == "none" or (data.template == "auto" and not has_template):
            return tokenizer.encode(prompt), prompt
        messages: list[JsonObject] = [{"role": "user", "content": prompt}]
        text = prompt
    elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) for m in prompt):
        messages, text = prompt, str(prompt[-1].get("content") or "")
    else:
        raise DataError(
            f"{location} has {prompt!r} under {key!r}, expected a text or a list of messages; set "
            "data.prompt_key, or fix the row"
        )
    if not has_template:
        raise ConfigError(
            "the tokenizer has no chat template to render messages with; set data.template=none "
            "and give prompts as texts"
        )
    return list(tokenizer.encode_chat(messages, add_generation_prompt=True).token_ids), text


__all__ = ["ArithmeticConfig", "PromptSample", "PromptsConfig", "prepare_prompts"]
