"""Initial values of virtual tokens that are taken from real ones: random tokens, or a text's."""

import logging
from collections.abc import Callable
from typing import Self

import torch
from pydantic import Field
from torch import Generator, Tensor

from easyllm.adapters.prompt_learning import PromptLearningConfig
from easyllm.core.errors import ConfigError
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder

logger = logging.getLogger(__name__)


class TokenStartConfig(PromptLearningConfig):
    """The text that virtual tokens start from."""

    init_text: str | None = Field(
        default=None,
        description="Text whose tokens the virtual tokens start from (init=text); repeated, or "
        "truncated, to num_virtual_tokens tokens.",
    )
    init_token_ids: tuple[int, ...] | None = Field(
        default=None,
        description="Token ids of init_text; a recipe computes them with the model's tokenizer.",
    )

    def check_text(self, init: str) -> None:
        """Checks that a text is set exactly if `init` is `text`.

        Raises:
            ValueError: it is not.
        """
        has_text = self.init_text is not None or self.init_token_ids is not None
        if init == "text" and not (self.init_text or self.init_token_ids):
            raise ValueError("init=text needs a text; set init_text, or use init=vocabulary")
        if init != "text" and has_text:
            raise ValueError(
                f"init_text has no effect with init={init}; set init=text, or remove init_text"
            )

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

    def start_ids(self, init: str, vocab_size: int, generator: Generator) -> Tensor:
        """Returns the token ids to start from, [n].

        Args:
            init: `vocabulary` for random tokens, or `text`.
            vocab_size: number of the model's token ids.
            generator: draws the random ones.

        Raises:
            ConfigError: the text has no token ids, or they are not the model's.
        """
        if init == "vocabulary":
            return torch.randint(vocab_size, (self.num_virtual_tokens,), generator=generator)
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


class _Recorder:
    """Takes the keys and values of every layer in a forward pass."""

    def __init__(self) -> None:
        self.slots = list[Tensor]()

    def keys_values(
        self,
        layer: int,  # noqa: ARG002 - of the interface
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Records k and v, [T, K, d]."""
        self.slots += [k.flatten(1).float(), v.flatten(1).float()]
        return k, v


@torch.no_grad()
def keys_values_of(model: Decoder, ids: Tensor) -> Tensor:
    """Returns the keys and values that tokens have at the start of a sequence.

    Args:
        model: the base model, without an adapter.
        ids: [n] token ids.

    Returns:
        [n, 2 · L · K · d] fp32: each layer's keys, then its values.
    """
    recorder, device = _Recorder(), model.device
    positions = torch.arange(len(ids), device=device)
    model(
        ids.to(device), ForwardContext(positions=positions, lengths=(len(ids),), virtual=recorder)
    )
    return torch.cat(recorder.slots, dim=1)


__all__ = ["TokenStartConfig", "keys_values_of"]
