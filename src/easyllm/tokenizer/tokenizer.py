"""The tokenizer: a `tokenizers` backend, its special tokens and its chat template."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from easyllm.core.atomic import write_atomic, write_json
from easyllm.core.errors import DataError
from easyllm.tokenizer.chat import ChatTemplate, EncodedChat
from easyllm.tokenizer.folder import (
    CONFIG_FILE,
    DEFAULT_TEMPLATE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    TOKENIZER_FILE,
    read_folder,
    template_files,
)
from easyllm.tokenizer.from_gguf import (
    backend_from_gguf,
    special_tokens_from_gguf,
    templates_from_gguf,
)
from easyllm.tokenizer.sentencepiece import build_backend, naming, read_model_file, special_tokens
from easyllm.tokenizer.token_bytes import TokenBytes

TOOL_TEMPLATE = "tool_use"
"""The name of the template that conversations with tools are rendered with, where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The texts of the special tokens a model uses; None where it has none."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None


class Tokenizer:
    """Encodes text, decodes ids, renders chats.

    Args:
        backend: a `tokenizers.Tokenizer`.
        special: bos, eos, pad and unk.
        chat_template: jinja source, several sources by name (`default`, `tool_use` ...), or None.
        max_seq_len: longest sequence of the model, written to `tokenizer_config.json`.

    Attributes:
        chat_template: the default template, compiled.
        template_sources: the sources of all templates by name.

    Example:
        >>> tok = easyllm.load_tokenizer("smollm2")             # doctest: +SKIP
        >>> tok.decode(tok.encode("Hello"))                     # doctest: +SKIP
        'Hello'
    """

    def __init__(
        self,
        backend: Backend,
        special: SpecialTokens,
        *,
        chat_template: str | Mapping[str, str] | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.special, self.max_seq_len = backend, special, max_seq_len
        if isinstance(chat_template, str):
            chat_template = {DEFAULT_TEMPLATE: chat_template}
        self.template_sources = dict(chat_template or {})
        default = self.template_sources.get(DEFAULT_TEMPLATE)
        self.chat_template = None if default is None else ChatTemplate(default)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """The tokenizer in a Hugging Face folder.

        Raises:
            CheckpointError: `tokenizer.json` and `tokenizer.model` are missing, or a file is damaged.
        """
        found = read_folder(Path(folder))
        return cls(
            found.backend,
            SpecialTokens(**found.special),
            chat_template=found.templates,
            max_seq_len=found.max_seq_len,
        )

    @classmethod
    def from_sentencepiece(
        cls, path: Path, *, add_bos: bool = False, add_eos: bool = False
    ) -> "Tokenizer":
        """The tokenizer in a sentencepiece `.model` file.

        Args:
            add_bos, add_eos: whether encoding adds them (the file does not say; Llama adds bos, T5 eos).

        Raises:
            SourceError: there is no such file.
            CheckpointError: it is damaged, or asks for what is not implemented.
        """
        model = read_model_file(Path(path))
        with naming(Path(path)):
            backend = build_backend(model, add_bos=add_bos, add_eos=add_eos)
        return cls(backend, SpecialTokens(**special_tokens(model)))

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any]) -> "Tokenizer":
        """The tokenizer a GGUF file's metadata describes.

        Raises:
            CheckpointError: the metadata hold no tokenizer, or one of an unknown kind.
        """
        architecture = metadata.get("general.architecture", "")
        return cls(
            backend_from_gguf(metadata),
            SpecialTokens(**special_tokens_from_gguf(metadata)),
            chat_template=templates_from_gguf(metadata),
            max_seq_len=metadata.get(f"{architecture}.context_length"),
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's own serialisation: equal for equal tokenizers."""
        return hashlib.sha256(self.backend.to_str().encode("utf-8")).hexdigest()

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, as the vocabulary writes it."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=0)

    @property
    def eos_id(self) -> int | None:
        return self.id_of(self.special.eos)

    @property
    def bos_id(self) -> int | None:
        return self.id_of(self.special.bos)

    @property
    def pad_id(self) -> int | None:
        return self.id_of(self.special.pad)

    def id_of(self, token: str | None) -> int | None:
        """The id of a token's text, or None."""
        return None if token is None else self.backend.token_to_id(token)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the control tokens, which decoding leaves out by default."""
        return frozenset(i for i, t in self.backend.get_added_tokens_decoder().items() if t.special)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `special_tokens` adds what the model expects around it (a BOS)."""
        return self.backend.encode(_valid(text), add_special_tokens=special_tokens).ids

    def encode_batch(self, texts: list[str], *, special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts at once, in parallel."""
        batch = self.backend.encode_batch_fast(
            [_valid(text) for text in texts], add_special_tokens=special_tokens
        )
        return [encoding.ids for encoding in batch]

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts found somewhere, in which the name of a control token is plain text without power."""
        batch = self._powerless.encode_batch_fast(
            [_valid(text) for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in batch]

    @cached_property
    def _powerless(self) -> Backend:
        backend = Backend.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids without added special tokens, and for each the characters of `text` it covers."""
        encoding = self.backend.encode(_valid(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def token_text(self, token_id: int) -> str:
        """The text of a single token, special ones included."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """Called with an id: the bytes the token adds to a text, a piece of a character included; None without one."""
        return TokenBytes(self.backend)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        with_mask: bool = False,
        num_prompt: int = 0,
        max_tokens: int | None = None,
        check_words: bool = False,
        refuse_unwritten: bool = False,
    ) -> EncodedChat:
        """Ids of a conversation under the model's chat template, and with `with_mask` which tokens are trained.

        Args:
            num_prompt: messages at the beginning that are not trained, whoever speaks in them.
            tools: with which the template `tool_use` is taken, where the model has one.
            check_words: whether it is looked at which messages' words the template wrote (`EncodedChat.unwritten`); one whose
                role it does not know is then refused.
            refuse_unwritten: of a prompt, whether the template must write the words of every message but the assistant's.
            max_tokens: a text that is longer than so many of the longest tokens is refused before it is encoded (text that
                encoding would drop counts, too). What passes may still have more tokens.

        Raises:
            DataError: the model has no chat template, the template refuses the messages, or the text is too long.
        """
        return self._template_for(tools).encode(
            self,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            with_mask=with_mask,
            num_prompt=num_prompt,
            max_chars=None if max_tokens is None else max_tokens * self.longest_token,
            check_words=check_words,
            refuse_unwritten=refuse_unwritten,
        )

    @cached_property
    def _tool_template(self) -> ChatTemplate | None:
        """Compiled when it is needed: a template that is not used may be one that cannot be read here."""
        source = self.template_sources.get(TOOL_TEMPLATE)
        return None if source is None else ChatTemplate(source)

    def _template_for(self, tools: list[dict[str, Any]] | None) -> ChatTemplate:
        if tools and self._tool_template is not None:
            return self._tool_template
        if self.chat_template is not None:
            return self.chat_template
        if self.template_sources:
            raise DataError(
                f"this model has chat templates named {', '.join(self.template_sources)} and none named "
                f"{DEFAULT_TEMPLATE}; name the one to use {DEFAULT_TEMPLATE} in its {CONFIG_FILE}"
            )
        raise DataError(
            "this model has no chat template; give plain prompts, or a model tuned for chat"
        )

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and the chat templates (as `AutoTokenizer` reads them)."""
        folder = Path(folder)
        write_atomic(folder / TOKENIZER_FILE, self.backend.to_str(pretty=True))
        config: dict[str, Any] = {
            f"{kind}_token": text for kind, text in asdict(self.special).items() if text is not None
        }
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self.backend.encode_special_tokens:
            config["split_special_tokens"] = True
        if self.max_seq_len is not None:
            config["model_max_length"] = self.max_seq_len
        sources = self.template_sources
        if sources.keys() == {DEFAULT_TEMPLATE}:
            config["chat_template"] = sources[DEFAULT_TEMPLATE]
        elif (
            sources
        ):  # transformers 4 reads the list, 5 the files, or the list where there are none
            config["chat_template"] = [{"name": n, "template": t} for n, t in sources.items()]
        files = template_files(sources) or {}
        for stale in (folder / TEMPLATE_FILE, *(folder / TEMPLATE_FOLDER).glob("*.jinja")):
            if stale.relative_to(folder).as_posix() not in files.values():
                stale.unlink(missing_ok=True)  # it would be read instead
        for name, file in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            write_atomic(folder / file, sources[name])
        write_json(folder / CONFIG_FILE, config)


def _valid(text: str) -> str:
    """`text` with lone surrogates (which no UTF-8 holds) replaced."""
    if text.isascii():
        return text
    return text.encode("utf-8", "replace").decode("utf-8") if _has_surrogate(text) else text


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)
