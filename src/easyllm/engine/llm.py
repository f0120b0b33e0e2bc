"""Offline (in-process) inference: prompts in, completions out."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from easyllm.core.config import validate
from easyllm.core.device import memory_free_bytes
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.engine.beam import Hypothesis, beam_search
from easyllm.engine.completion import Completion
from easyllm.engine.draft_model import ModelDrafter
from easyllm.engine.embedding import Pooling, check_length, embed
from easyllm.engine.engine import Engine
from easyllm.engine.guide_spec import GuideSpec, check_guided_params
from easyllm.engine.loading import load_generator
from easyllm.engine.memory_plan import plan_memory
from easyllm.engine.named_adapters import (
    attach_named,
    detach_named,
    load_served,
    read_named,
    unload_served,
)
from easyllm.engine.options import NGRAM, LLMOptions, refuse_loading_options
from easyllm.engine.params import BeamParams, SamplingParams
from easyllm.engine.prompts import Prompt, as_prompts, with_system
from easyllm.engine.request import MaskSource, Request, TokenEvent
from easyllm.engine.speculative import Drafter, NgramDrafter
from easyllm.models.adapted import load_adapted, split_adapter
from easyllm.models.context import ContextConfig
from easyllm.models.load import load_tokenizer
from easyllm.models.sampling_defaults import read_sampling_defaults
from easyllm.nn.decoder import Decoder
from easyllm.nn.deterministic import rowwise_logprobs
from easyllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from easyllm.engine.guided import Guides

Guide = GuideSpec | Sequence[GuideSpec | None] | None


class LLM:
    """A model with an inference engine, ready to generate.

    Args:
        source: the model, in any form that `load_model` accepts; or the folder of an adapter, whose
            base model is then loaded too.
        dtype: dtype of the weights; by default fp32 on a CPU, bf16 on an accelerator.
        device: `"cpu"`, `"cuda"`, `"auto"`.
        context: context extension beyond the length the model was trained on.
        quantize: quantizes the weights while they are loaded, to `"int8"` or `"int4"`; embedding
            and head are int8 in both.
        model: a model that is already loaded. It still belongs to the caller and is used unchanged,
            so the loading options `dtype`, `device`, `context` and `quantize` are refused
            (`quant.quantize_weights` quantizes a loaded model in place).
        tokenizer: a tokenizer that is already loaded, instead of the source's.
        adapter: the folder of an adapter (in peft's format) that applies to every request.
        adapters: adapter folders (in peft's format), by the names that requests use for them.
        draft: source of draft tokens for speculative decoding, which does not change greedy output
            or the distribution of sampled output: `"ngram"` looks them up in the text itself,
            anything else is a smaller model with the same tokenizer (a source or a loaded model).
        draft_tokens: maximum number of draft tokens per step.
        options: options of the engine, the fields of `EngineConfig`: page_size, num_pages or
            cache_gb, cache_dtype, max_running, max_step_tokens, prefix_caching ...; and
            weight_cache, as for `load_model`.

    Attributes:
        sampling_defaults: the sampling parameters that the model recommends, by the names of
            `SamplingParams`; they apply where no `params` are given.

    Raises:
        SourceError, CheckpointError: as for `load_model`.
        ConfigError: an option is wrong, or is a loading option for a model that is already loaded;
            or the model and the cache do not fit into memory.

    Example:
        >>> llm = LLM("smollm2", max_running=8)                                   # doctest: +SKIP
        >>> llm.chat([{"role": "user", "content": "Hi"}]).text                    # doctest: +SKIP
    """

    def __init__(
        self,
        source: str | Path = "smollm2",
        *,
        dtype: str | None = None,
        device: str | None = None,
        context: ContextConfig | None = None,
        quantize: str | None = None,
        model: Decoder | None = None,
        tokenizer: Tokenizer | None = None,
        adapter: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        draft: str | Path | Decoder | None = None,
        draft_tokens: int = 4,
        **options: Any,
    ) -> None:
        loading = {"dtype": dtype, "device": device, "quantize": quantize}
        values = {**options, **loading, "draft_tokens": draft_tokens}
        if isinstance(draft, str | Path):
            values["draft"] = str(draft)
        checked = validate(LLMOptions, values, source="engine options")
        named = read_named(adapters or {})
        if model is None:
            model, opened = load_generator(source, checked, adapter=adapter, context=context)
            tokenizer = tokenizer or opened.tokenizer()
            self.sampling_defaults = read_sampling_defaults(
                opened.path, None if opened.gguf is None else opened.gguf.metadata
            )
        else:
            refuse_loading_options(
                dtype=dtype, device=device, context=context, quantize=quantize, adapter=adapter
            )
            self.sampling_defaults = {}
        self.model = model
        added = attach_named(model, named)
        self.tokenizer = tokenizer or load_tokenizer(source)
        try:
            drafter = self._drafter(draft, checked)
            self.engine = Engine(self.model, self.tokenizer, checked, drafter=drafter)
        except BaseException:
            detach_named(model, added)  # leaves the caller's model unchanged
            raise

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Loads an adapter, in peft's format, by name, in the thread that runs the engine.

        Running requests are undisturbed.

        Raises:
            CheckpointError: the folder contains no adapter, or one for another model.
            ConfigError: the name is empty or taken, or the engine cannot serve the adapter.
        """
        load_served(self.engine, name, folder)

    def unload_adapter(self, name: str) -> None:
        """Removes a named adapter, in the thread that runs the engine.

        Its requests end as `cancelled`, and others are undisturbed.

        Raises:
            ConfigError: no adapter has this name.
        """
        unload_served(self.engine, name)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        adapter: str | Sequence[str] = "",
        guide: Guide = None,
    ) -> list[Completion]:
        """Returns the completions of plain prompts (text or token ids), in the same order.

        Args:
            prompts: the prompts; one alone gives a list of one completion.
            params: sampling parameters of all prompts; by default those the model recommends.
            adapter: the name of the adapter to use, or one name per prompt; empty for the base
                model.
            guide: the form that completions must have: a specification for all prompts, or one (or
                None) per prompt.

        Raises:
            ConfigError: the engine cannot serve a prompt or an adapter (see `Engine.add`).
            GuideError: a guide cannot be honoured (see `Guides.compile`).
        """
        params = params or self.default_params
        return self._run([self.encode(p) for p in as_prompts(prompts)], params, adapter, guide)

    @overload
    def chat(
        self,
        messages: list[JsonObject],
        params: SamplingParams | None = None,
        *,
        adapter: str | Sequence[str] = "",
        guide: Guide = None,
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: list[list[JsonObject]],
        params: SamplingParams | None = None,
        *,
        adapter: str | Sequence[str] = "",
        guide: Guide = None,
    ) -> list[Completion]: ...

    def chat(
        self,
        messages: list[JsonObject] | list[list[JsonObject]],
        params: SamplingParams | None = None,
        *,
        adapter: str | Sequence[str] = "",
        guide: Guide = None,
    ) -> Completion | list[Completion]:
        """Returns the assistant's next turn, using the model's chat template.

        Args:
            messages: one conversation, or a list of conversations.
            params: sampling parameters of all conversations; by default those the model recommends.
            adapter, guide: as in `generate`.

        Returns:
            A `Completion` for one conversation, a list of them for a list of conversations.

        Raises:
            ConfigError: the engine cannot serve a conversation or an adapter (see `Engine.add`).
            GuideError: a guide cannot be honoured (see `Guides.compile`).
            DataError: the conversation cannot be encoded (see `encode_chat`).
        """
        many = bool(messages) and isinstance(messages[0], list)
        chats: Any = messages if many else [messages]
        ids, params = [self.encode_chat(c) for c in chats], params or self.default_params
        done = self._run(ids, params, adapter, guide)
        return done if many else done[0]

    @property
    def default_params(self) -> SamplingParams:
        """The sampling parameters that apply where none are given: those the model recommends."""
        return SamplingParams(**self.sampling_defaults)

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, guide: GuideSpec | None = None
    ) -> Iterator[TokenEvent]:
        """Streams the events of one request; `guide` is the form that its text must have.

        Raises:
            GuideError: the guide cannot be honoured (see `Guides.compile`).
        """
        mask = self._mask_of(guide, params)
        return self.engine.run([Request(prompt_ids=tuple(prompt_ids), params=params, mask=mask)])

    @cached_property
    def guides(self) -> "Guides":
        """Compiles guides for this model; llguidance is loaded on first access."""
        from easyllm.engine.guided import Guides

        config = self.model.config
        return Guides(self.tokenizer, vocab_size=config.vocab_size, eos_ids=config.eos_token_ids)

    def _mask_of(self, guide: GuideSpec | None, params: SamplingParams) -> MaskSource | None:
        if guide is None:
            return None
        check_guided_params(params)
        return self.guides.compile(guide)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamParams | None = None
    ) -> list[Completion]:
        """Returns the best hypotheses of each prompt, found by beam search.

        Returns:
            For each prompt, the best hypothesis, with the next `params.n` - 1 as its `others`.

        Raises:
            ConfigError: a prompt or its beams are too long for the context or the cache.
        """
        params = params or BeamParams()
        results = []
        for prompt in as_prompts(prompts):
            best, *others = (
                self._completion(hypothesis)
                for hypothesis in beam_search(self.engine, tuple(self.encode(prompt)), params)
            )
            best.others = others
            results.append(best)
        return results

    @torch.inference_mode()
    def score(self, text: Prompt, *, adapter: str = "") -> list[float]:
        """Returns the log-probability in nats of each token after the first, given its prefix.

        Args:
            text: text or token ids.
            adapter: as in `generate`, one name.

        Raises:
            ConfigError: the text has no token, or one outside the vocabulary.
        """
        tokens = self.encode(text)
        self.engine.check_tokens(tokens)
        ids = torch.tensor(tokens, device=self.model.device)
        deterministic = self.engine.options.deterministic
        name = adapter if self.engine.adapter_names or adapter else None
        logits = self.model.logits(ids, deterministic=deterministic, adapter=name)[:-1]
        if deterministic:
            found = rowwise_logprobs(logits, ids[1:])
        else:
            found = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        return [float(each) for each in found.tolist()]

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: Pooling = "mean", adapter: str = ""
    ) -> Tensor:
        """Returns a vector of unit length for each prompt, [B, D] fp32.

        Args:
            prompts: texts or token ids.
            pooling: `mean` of the hidden states after the final norm, or that of the `last` token.
            adapter: as in `generate`, one name.

        Raises:
            ConfigError: a prompt is empty, longer than the context, or has an unknown token; or
                there is no such adapter.
        """
        engine = self.engine
        ids = [self.encode(prompt) for prompt in as_prompts(prompts)]
        self.check_embedded(ids)
        engine.check_adapter(adapter)
        return embed(
            self.model,
            [engine.prepend_virtual_tokens(tuple(each)) for each in ids],
            pooling=pooling,
            adapter=adapter if engine.adapter_names or adapter else None,
            num_virtual=self.model.num_virtual_tokens,
            max_step_tokens=engine.options.max_step_tokens,
            deterministic=engine.options.deterministic,
        )

    def check_embedded(self, ids: Sequence[Sequence[int]]) -> None:
        """Refuses token ids of texts that `embed` cannot embed.

        Raises:
            ConfigError: a text is empty, longer than the context, or has an unknown token.
        """
        for each in ids:
            self.engine.check_tokens(each)
            check_length(len(each) + self.model.num_virtual_tokens, self.engine.max_seq_len)

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of a plain prompt."""
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def encode_chat(
        self,
        messages: list[JsonObject],
        *,
        tools: list[JsonObject] | None = None,
        template_kwargs: JsonMapping | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Returns the token ids of a conversation, ending where the assistant's turn begins.

        Args:
            messages: the conversation.
            tools: the tools that the model may call.
            template_kwargs: further variables of the chat template, such as `enable_thinking`.
            continue_final_message: whether the ids end with the content of the last message.

        Raises:
            DataError: the model has no chat template; the template raises an error, or omits a
                message; or the conversation does not fit into the context.
        """
        messages = with_system(messages, self.engine.options.system)
        messages, tools = self.tokenizer.tool_format.prepare(messages, tools)
        return self.tokenizer.encode_chat(
            messages,
            tools=tools,
            template_kwargs=template_kwargs,
            add_generation_prompt=not continue_final_message,
            continue_final_message=continue_final_message,
            max_tokens=self.engine.max_seq_len,
            reject_unrendered=True,
        ).token_ids

    def _completion(self, hypothesis: Hypothesis) -> Completion:
        ids = list(hypothesis.token_ids)
        return Completion(
            text=self.tokenizer.decode(ids[:-1] if hypothesis.ended else ids),
            token_ids=ids,
            logprobs=list(hypothesis.logprobs),
            finish_reason="stop" if hypothesis.ended else "length",
            score=hypothesis.score,
        )

    def _drafter(self, draft: str | Path | Decoder | None, options: LLMOptions) -> Drafter | None:
        """Returns the drafter, or None without speculative decoding."""
        if draft is None:
            return None
        count = options.draft_tokens
        if options.draft == NGRAM:
            return NgramDrafter(count)
        if not isinstance(draft, Decoder):
            theirs = load_tokenizer(split_adapter(draft)[0])
            if theirs.fingerprint != self.tokenizer.fingerprint:
                raise ConfigError(
                    f"the draft model {str(draft)!r} has another vocabulary ({theirs.vocab_size} "
                    f"tokens, the model's tokenizer has {self.tokenizer.vocab_size}); use a draft "
                    "model with the same tokenizer"
                )
            draft = load_adapted(draft, dtype=self.model.dtype, device=str(self.model.device))
        pages = -(-self.model.config.max_seq_len // options.page_size)
        cache = plan_memory(
            draft.config,
            options.model_copy(update={"num_pages": None, "cache_gb": None}),
            weight_bytes=0,
            itemsize=draft.dtype.itemsize,
            free_bytes=memory_free_bytes(draft.device),
        )
        num_pages = min(cache.num_pages, pages * options.max_running)
        return ModelDrafter(draft, count, num_pages=num_pages, page_size=options.page_size)

    def _run(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        adapter: str | Sequence[str],
        guide: Guide,
    ) -> list[Completion]:
        names = [adapter] * len(prompts) if isinstance(adapter, str) else list(adapter)
        if guide is None or isinstance(guide, GuideSpec):
            guide = [guide] * len(prompts)
        for what, given in (("adapters", names), ("guides", guide)):
            if len(given) != len(prompts):
                raise ConfigError(
                    f"{len(given)} {what} are given for {len(prompts)} prompts; give one per prompt"
                )
        requests = [
            Request(
                prompt_ids=tuple(ids),
                params=params,
                adapter=name,
                mask=self._mask_of(spec, params),
            )
            for ids, name, spec in zip(prompts, names, guide, strict=True)
        ]
        results = {request.id: Completion() for request in requests}
        for event in self.engine.run(requests):
            if event.request_id in results:
                results[event.request_id].take(event)
        return [results[request.id] for request in requests]
