"""Merging an adapter into its base: a checkpoint folder that is kept only if it passes the gate."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from easyllm.adapters import check_mergeable, detach, merge
from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.device import parse_dtype
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_path
from easyllm.engine import LLM
from easyllm.models import add_adapter, load_model, load_tokenizer, locate, save_model
from easyllm.models.hf_config import read_end_ids
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.folder import tokenizer_file
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.verify.export_gate import (
    BOUNDS,
    COMPUTED_IN_BF16,
    Gate,
    GateError,
    LogitsOf,
    Variant,
    direct,
    run_gate,
    served,
)
from easyllm.verify.gate_text import gate_text, read_text

PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Merged:
    """The result of `merge_adapter`.

    Attributes:
        folder: the folder of the merged model.
        gate: how far it is from the adapter; None if it was not compared.
    """

    folder: Path
    gate: Gate | None


def merge_adapter(
    source: str,
    adapter: Path,
    folder: Path,
    *,
    dtype: str = "float32",
    check: bool = True,
    text: Path | None = None,
    max_drift: float | None = None,
    keep: bool = False,
) -> Merged:
    """Merges an adapter into its base in fp32 and saves the model as a Hugging Face folder.

    The attached adapter is the reference for the merged model in memory, for the saved files loaded
    again, and for an engine that serves them. If one of them differs by more than its bound,
    `folder` is not written.

    Args:
        source: the base model's source.
        adapter: the adapter's folder.
        folder: the folder to write.
        dtype: dtype of the saved weights, to which the merged weights are rounded once.
        check: whether the result is compared.
        text: a text file to compare on; None uses the built-in text.
        max_drift: bound on the drift; None uses that of the dtype (`export_gate.BOUNDS`).
        keep: whether `folder` is written even if the result differs; its `manifest.json` says so.

    Raises:
        GateError: the result differs from the adapter, and `keep` is not set.
        ConfigError: the adapter cannot be merged; nothing is written then.
        DataError: the text cannot be read.
        OutputError: `folder` is not empty or cannot be written.
    """
    weights = parse_dtype(dtype)
    if text is not None:
        read_text(text)  # a wrong path is reported before the model is loaded
    with atomic_directory(folder) as work:
        state = _Merge(source, adapter, work, weights)
        check_mergeable(state.model)
        gate = None
        if check:
            gate = _compare(state, text, max_drift)
            if not gate.passed and not keep:
                remedy = (
                    f"nothing was written to {str(folder)!r}; keep the result with --keep, or "
                    "allow the difference with --max-drift"
                )
                raise GateError(f"{gate.complaint}; {remedy}", gate)
        else:
            merge(state.model)
            state.save()
        manifest = Manifest.create(
            "merge",
            config={"model": source, "adapter": str(adapter), "dtype": dtype},
            inputs={"model": hash_path(locate(source)), "adapter": hash_path(adapter)},
            results=None if gate is None else gate.as_dict(),
        )
        write_json(work / MANIFEST_FILE, manifest.model_dump(mode="json"))
    return Merged(folder, gate)


@dataclass(slots=True)
class _Merge:
    """The forms that a model takes while an adapter is merged into it, one at a time in memory.

    Attributes:
        source, adapter: as for `merge_adapter`.
        folder: the folder that the merged model is saved to.
        dtype: dtype of the saved weights.
        model: the model in its present form; None once it has been saved.
        config: its configuration with the adapter.
        tokenizer: the base's tokenizer, if it has one.
    """

    source: str
    adapter: Path
    folder: Path
    dtype: torch.dtype
    tokenizer: Tokenizer | None = field(init=False)
    config: ModelConfig = field(init=False)
    _model: Decoder | None = field(init=False)

    def __post_init__(self) -> None:
        self._model = load_model(self.source, dtype="float32", adapter=self.adapter)
        self.config = self._model.config
        path = locate(self.source)
        has_tokenizer = path.is_file() or tokenizer_file(path) is not None
        self.tokenizer = load_tokenizer(self.source) if has_tokenizer else None

    @property
    def model(self) -> Decoder:
        """The model in its present form."""
        assert self._model is not None, "the model has been saved"
        return self._model

    def variants(self, num_pages: int) -> tuple[Variant, list[Variant]]:
        """Returns the reference and the other forms, which must be opened in this order.

        Args:
            num_pages: size of the KV cache of the form that is served.
        """
        packed = bool(self.model.packed_formats())
        # kernels of quantized weights round rows, which amplifies the last bits of anything else
        bound = COMPUTED_IN_BF16 if packed else BOUNDS[self.dtype]
        # an engine computes in bf16 on an accelerator
        of_engine = COMPUTED_IN_BF16 if torch.cuda.is_available() else bound
        return Variant(name="the attached adapter", open=lambda: direct(self.model)), [
            Variant(name="base alone", open=self._base),
            Variant(name="merged in memory", open=self._merged, bound=BOUNDS[torch.float32]),
            Variant(name="saved, reloaded", open=self._reloaded, bound=bound),
            Variant(name="served", open=lambda: self._served(num_pages), bound=of_engine),
        ]

    def save(self) -> None:
        """Saves the merged model and frees it."""
        save_model(
            self.model.to(self.dtype),
            self.folder,
            tokenizer=self.tokenizer,
            end_ids=read_end_ids(self.adapter),
        )
        self._model = None

    def _base(self) -> LogitsOf | str:
        detach(self.model)
        if self.model.config.num_labels != self.config.num_labels:
            return "the adapter has its own classification head"
        return direct(self.model)

    def _merged(self) -> LogitsOf:
        return direct(merge(add_adapter(self.model, self.adapter)))

    def _reloaded(self) -> LogitsOf:
        self.save()
        return direct(load_model(self.folder, dtype="float32"))

    def _served(self, num_pages: int) -> LogitsOf | str:
        if self.config.num_labels is not None:
            return "a classifier generates no tokens"
        if self.config.has_prefix:
            return "prompts of a prefix LM are not causal"
        if self.tokenizer is None:
            return "an engine needs a tokenizer"
        return served(LLM(self.folder, page_size=PAGE_TOKENS, num_pages=num_pages))


def _compare(state: _Merge, path: Path | None, max_drift: float | None) -> Gate:
    """Merges, saves, and compares all forms of the model."""
    text = gate_text(
        state.tokenizer,
        vocab_size=state.config.vocab_size,
        max_seq_len=state.config.max_seq_len,
        path=path,
    )
    pages = sum(-(-(len(ids) + 1) // PAGE_TOKENS) for ids in text.sequences)
    reference, variants = state.variants(pages)
    return run_gate(reference, variants, text, max_drift=max_drift)


__all__ = ["Merged", "merge_adapter"]
