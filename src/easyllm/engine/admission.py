"""Admission of requests: whether a model generates, which ids it has, how long a prompt may be."""

from collections.abc import Iterable

from easyllm.core.errors import ConfigError, ContextLengthError
from easyllm.engine.scheduler import Scheduler
from easyllm.nn.config import ModelConfig


def check_generates(config: ModelConfig, *, prompt_rows: bool = False) -> None:
    """Refuses models that cannot generate text.

    Args:
        config: model configuration.
        prompt_rows: whether the log-probabilities of the prompt are wanted, too.

    Raises:
        ConfigError: the model has a classification head or a layer that is not causal, or its
            encoder reads the prompt, which then has no log-probabilities.
    """
    if prompt_rows and config.encoder is not None:
        raise ConfigError(
            "an encoder–decoder has no log-probabilities of a prompt, which its encoder reads; "
            "leave out prompt_logprobs"
        ).about("prompt_logprobs")
    if config.num_labels is not None:
        raise ConfigError(
            "a model with a classification head generates no tokens; use a language model"
        )
    if any(not layer.mixer.causal for layer in config.layers):
        raise ConfigError(
            "a layer of this model attends to later tokens, so it cannot generate; set causal to "
            "true"
        )


def check_ids(what: str, ids: Iterable[int], vocab_size: int) -> None:
    """Refuses ids outside the vocabulary, which would make the entire batch fail.

    Args:
        what: the field that contains the ids, or "the prompt".
        ids: the token ids.
        vocab_size: number of ids of the model.

    Raises:
        ConfigError: an id is outside the vocabulary.
    """
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"{what} contains token id {token}, but the model has ids 0 to "
                f"{vocab_size - 1}; check the tokenizer"
            ).about("messages" if what == "the prompt" else what)


def bound_new_tokens(
    prompt_tokens: int, max_tokens: int | None, max_seq_len: int, scheduler: Scheduler
) -> int:
    """Returns the maximum number of tokens that may be generated after a prompt.

    Args:
        prompt_tokens: length of the prompt, virtual tokens included.
        max_tokens: the requested maximum; None for as many as fit.
        max_seq_len: the model's context, in tokens.
        scheduler: the scheduler, whose page pool is the KV cache.

    Raises:
        ContextLengthError: the prompt, or the prompt plus `max_tokens`, is too long for the context
            or the cache.
    """
    space = max_seq_len - prompt_tokens
    if space <= 0:
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens, but the model's context of {max_seq_len} "
            "tokens must fit the prompt and at least one new token",
            "shorten the prompt, or extend the context (--rope) where the positions allow it",
        )
    bound = min(max_tokens or space, space)
    needed = prompt_tokens + bound - 1  # the keys of the last token are never stored
    pool = scheduler.pool
    if scheduler.pages_needed(needed) <= pool.num_pages:
        return bound
    held = pool.num_pages * pool.page_size
    if max_tokens is None and prompt_tokens <= held:
        return held - prompt_tokens + 1
    raise ContextLengthError(
        f"the request needs {needed} tokens of KV cache ({prompt_tokens} prompt tokens, {bound} to "
        f"generate), but the cache has space for {held}",
        "shorten the prompt, lower max_tokens, or raise num_pages or cache_gb",
    )
