"""Prompt tuning: n trained vectors before the embedded tokens of every sequence.

    input of the first layer = [p_1 ... p_n, e(x_1) ... e(x_T)],   p: [n, D] trained
    (Lester et al. 2021, arXiv 2104.08691, section 2)

The paper's comparison of initial values (section 3.2) favours embeddings of real tokens over random
ones: `init: vocabulary` and `init: text`. `init: random` is N(0, 1), as in peft.
"""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Generator, nn

from easyllm.adapters.file_module import FileModule
from easyllm.adapters.peft_keys import check_keys
from easyllm.adapters.prompt_learning import (
    NEUTRAL,
    READ_BY_ALL,
    PromptLearningSet,
    Table,
    VirtualVectors,
)
from easyllm.adapters.prompt_start import TokenStartConfig
from easyllm.adapters.registry import register_adapter
from easyllm.core.json_types import JsonMapping
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder


class PromptTuningConfig(TokenStartConfig):
    """Number and initial values of the trained input vectors."""

    kind: Literal["prompt"] = "prompt"
    init: Literal["random", "text", "vocabulary"] = Field(
        default="vocabulary",
        description="Initial vectors: `random` from N(0, 1) (peft's default), `text` the "
        "embeddings of init_text, `vocabulary` those of randomly chosen tokens.",
    )

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        self.check_text(self.init)
        return self

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
        if self.init == "random":
            return
        ids = self.start_ids(self.init, model.config.vocab_size, generator)
        rows = model.embed_tokens(ids.to(model.device))
        adapter.table.embedding.copy_(rows.float() * model.config.embedding_scale)

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
