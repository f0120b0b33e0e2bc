"""Extending a model's tokenizer and embeddings with tokens learned from texts, with its figures."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path

from easyllm.core.device import parse_dtype, pick_device
from easyllm.core.json_types import JsonObject
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_path
from easyllm.core.progress import console
from easyllm.models import open_source, save_model
from easyllm.models.resize import losses_of_text, resize_embeddings, resized_vocab_size
from easyllm.nn.decoder import Decoder
from easyllm.plan.parameters import count_parameters
from easyllm.tokenizer.extend import Script, extend_tokenizer
from easyllm.tokenizer.report import report

COMPARED_TEXTS = 1000
"""Number of leading texts on which fertility is measured."""
LOSS_CHARACTERS = 500
"""Number of leading characters of the texts on which losses are measured, which takes longest."""


class ModelExtension:
    """An extension of a model's tokenizer, to which the model is then resized.

    Args:
        model: source of the model.
        texts: returns the texts to learn from; called once for each pass over them.
        num_new: number of tokens to add.
        script: learn from all non-ASCII text, or from Han characters only.

    Raises:
        ConfigError: the tokenizer cannot be extended, or not by so many tokens.
        DataError: the texts contain nothing to learn from.
        SourceError, CheckpointError: the model cannot be read.
    """

    def __init__(
        self,
        model: str,
        texts: Callable[[], Iterable[str]],
        *,
        num_new: int,
        script: Script = "non_ascii",
    ) -> None:
        self.name, self.texts, self.script = model, texts, script
        self.opened = open_source(model)
        self.old = self.opened.tokenizer()
        _say(f"learning {num_new:,} tokens")
        learned = extend_tokenizer(self.old, texts(), num_new=num_new, script=script)
        self.tokenizer, self.old_pieces = learned.tokenizer, learned.old_pieces

    def growth(self) -> JsonObject:
        """Returns the sizes of the extended model, and tokens per word and bytes per token."""
        _say(f"comparing the tokenizers on up to {COMPARED_TEXTS:,} texts")
        config = self.opened.config
        size = resized_vocab_size(config, self.old_pieces)
        before = count_parameters(config).total
        texts = {"texts": islice(self.texts(), COMPARED_TEXTS)}
        was, now = report({"old": self.old, "new": self.tokenizer}, texts).texts
        return {
            "new_pieces": len(self.old_pieces),
            "tokenizer_ids": self.tokenizer.vocab_size,
            "model_vocab_size": size,
            "parameters": before,
            "parameters_added": count_parameters(config.changed(vocab_size=size)).total - before,
            "fertility_before": round(was.fertility, 4),
            "fertility_after": round(now.fertility, 4),
            "bytes_per_token_before": round(was.bytes_per_token, 4),
            "bytes_per_token_after": round(now.bytes_per_token, 4),
        }

    def save(
        self,
        folder: Path,
        *,
        inputs: Mapping[str, str],
        dtype: str | None = None,
        replace: bool = False,
    ) -> JsonObject:
        """Resizes the model, measures its losses and saves it as a Hugging Face folder.

        Args:
            folder: the folder to write.
            inputs: hashes of the files of the texts, for the manifest.
            dtype: dtype of the weights; None keeps the model's.
            replace: whether a non-empty folder may be replaced.

        Returns:
            The losses in nats per token and per byte, as in the manifest.
        """
        _say(f"reading the weights of {self.name}")
        model = self.opened.model(parse_dtype(dtype) if dtype else None, pick_device("cpu"))
        losses = self._resize(model)
        settings = {"num_new": len(self.old_pieces), "script": self.script, "dtype": dtype}
        manifest = Manifest.create(
            "extend",
            config={"model": self.name, **settings},
            inputs={"model": hash_path(self.opened.path), **inputs},
            results=losses,
        )
        extra = {MANIFEST_FILE: manifest.model_dump(mode="json")}
        save_model(model, folder, tokenizer=self.tokenizer, extra_files=extra, replace=replace)
        return {name: round(loss, 6) for name, loss in losses.items()}

    def _resize(self, model: Decoder) -> dict[str, float]:
        """Resizes the model in place; returns the losses before and after."""
        text = _opening(self.texts(), LOSS_CHARACTERS)
        old, new = self.old.encode(text), self.tokenizer.encode(text)
        measuring = f"measuring losses on the first {len(text)} characters"
        _say(f"{measuring}, 1/3: before")
        (before,) = losses_of_text(model, old)
        _say(f"resizing the embeddings, {model.config.vocab_size:,} rows before")
        resize_embeddings(model, self.old_pieces)
        first = min(self.old_pieces, default=self.tokenizer.vocab_size)
        _say(f"{measuring}, 2/3: after, in the old tokens")
        over_old, over_all = losses_of_text(model, old, (first, None))
        _say(f"{measuring}, 3/3: after, in the new tokens")
        (after,) = losses_of_text(model, new)
        size = len(text.encode("utf-8", "replace"))
        return {
            "loss_before_nats": before,
            "loss_over_old_ids_nats": over_old,
            "loss_over_all_ids_nats": over_all,
            "nats_per_byte_before": before * (len(old) - 1) / size,
            "nats_per_byte_after": after * (len(new) - 1) / size,
        }


def _opening(texts: Iterable[str], num_characters: int) -> str:
    """Returns the first characters of the texts, with a line break between two texts."""
    opening = ""
    for text in texts:
        opening += ("\n" if opening else "") + text
        if len(opening) >= num_characters:
            break
    return opening[:num_characters]


def _say(what: str) -> None:
    console().print(what, markup=False, soft_wrap=True)
