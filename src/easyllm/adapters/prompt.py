"""Prompt tuning: n trained vectors before the embedded tokens of every sequence.

    input of the first layer = [p_1 ... p_n, e(x_1) ... e(x_T)],   p: [n, D] trained
    (Lester et al. 2021, arXiv 2104.08691, section 2)

The paper's comparison of initial values (section 3.2) favours embeddings of real tokens over random
ones: `init: vocabulary` and `init: text`. `init: random` is N(0, 1), as in peft.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Generator, nn

from easyllm.adapters.file_module import FileModule
from easyllm.adapters.peft_keys import check_keys
from easyllm.adapters.prompt_learning import (
    NEUTRAL,
    READ_BY_ALL,
    PromptLearningConfig,
    PromptLearningSet,
    Table,
    VirtualVectors,
)
from easyllm.adapters.registry import register_adapter
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonMapping
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder

logger = logging.getLogger(__name__)


class PromptTuningConfig(PromptLearningConfig):
    """Number and initial values of the trained input vectors."""

    kind: Literal["prompt"] = "prompt"
    init: Literal["random", "text", "vocabulary"] = Field(
        default="vocabulary",
        description="Initial vectors: `random` from N(0, 1) (peft's default), `text` the "
        "embeddings of init_text, `vocabulary` those of randomly chosen tokens.",
    )
    init_text: str | None = Field(
        default=None,
        description="Text whose embeddings are the initial vectors (init=text); repeated, or "
        "truncated, to num_virtual_tokens tokens.",
    )
    init_token_ids: tuple[int, ...] | None = Field(
        default=None,
        description="Token ids of init_text; a recipe computes them with the model's tokenizer.",
    )

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        has_text = self.init_text is not None or self.init_token_ids is not None
        if self.init == "text" and not (self.init_text or self.init_token_ids):
            raise ValueError("init=text needs a text; set init_text, or use init=vocabulary")
        if self.init != "text" and has_text:
            raise ValueError(
                f"init_text has no effect with init={self.init}; set init=text, or remove init_text"
            )
        return self

    def with_token_ids(self, encode: Callable[[str], list[int]]) -> Self:
        """Returns the configuration with the token ids of `init_text`.

        Raises:
            ConfigError: the text has no tokens.
        """
        if self.init_text is None or self.init_token_ids is not None:
            return self
        ids = encode(self.init_text)
        if not ids:
            raise ConfigError(
                f"init_text={self.init_text!r} has no tokens; write a longer text, or use "
                "init=vocabulary"
            )
        if len(ids) > self.num_virtual_tokens:
            logger.warning(
                "init_text has %d tokens, of which the first %d are used; "
                "num_virtual_tokens=%d would use all",
                len(ids),
                self.num_virtual_tokens,
                len(ids),
            )
        return self.model_copy(update={"init_token_ids": tuple(ids)})

    def build_model_adapter(self, model: ModelConfig) -> VirtualVectors:
        """Builds the vectors [n, D].

        Raises:
            ConfigError: the model's context is too short.
        """
        self.check_context(model)
        return VirtualVectors(Table(self.num_virtual_tokens, model.hidden_size))

    @torch.no_grad()
    def start_from_base(self, adapter: nn.Module, model: Decoder, generator: Generator) -> None:
        """Initialises the vectors with embeddings of the base model, unless they are random.

        Raises:
            ConfigError: the text has no token ids, or they are not the model's.
        """
        assert isinstance(adapter, VirtualVectors), "it is built above"
        n, size = self.num_virtual_tokens, model.config.vocab_size
        match self.init:
            case "random":
                return
            case "vocabulary":
                ids = torch.randint(size, (n,), generator=generator)
            case "text":
                ids = self._text_ids(size)
        rows = model.embed_tokens(ids.to(model.device))
        adapter.table.embedding.copy_(rows.float() * model.config.embedding_scale)

    def _text_ids(self, vocab_size: int) -> torch.Tensor:
        """Returns the token ids of the text, [n]."""
        ids = self.init_token_ids
        if not ids:
            raise ConfigError(
                "init=text has no token ids; call config.with_token_ids(tokenizer.encode) before "
                "attach, as a training recipe does"
            )
        if max(ids) >= vocab_size or min(ids) < 0:
            raise ConfigError(
                f"init_token_ids contains {max(ids)}, but the model has {vocab_size} tokens; "
                "encode init_text with the model's tokenizer"
            )
        n = self.num_virtual_tokens
        return torch.tensor(ids).repeat(-(-n // len(ids)))[:n]

    @classmethod
    def from_peft(
        cls,
        description: JsonMapping,
        modules: Mapping[str, FileModule],  # noqa: ARG003 - of the interface
    ) -> Self:
        """Returns the configuration of a file; initial values do not matter to it."""
        # peft's keys of the initial values, irrelevant once the vectors are loaded
        start = ("init", "init_text")
        neutral = NEUTRAL | {f"prompt_tuning_{key}": None for key in start}
        neutral |= {"tokenizer_name_or_path": None, "tokenizer_kwargs": None}
        check_keys(description, honoured=READ_BY_ALL, neutral=neutral)
        return cls(num_virtual_tokens=description["num_virtual_tokens"])


register_adapter(PromptTuningConfig, peft_type="PROMPT_TUNING", adapter_set=PromptLearningSet)

__all__ = ["PromptTuningConfig"]
