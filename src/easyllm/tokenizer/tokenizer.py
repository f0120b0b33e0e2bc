"""The tokenizer: a `tokenizers` backend, its special tokens and its chat template."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from easyllm.core.atomic import write_atomic, write_json
from easyllm.core.errors import CheckpointError, DataError
from easyllm.tokenizer.chat import ChatTemplate, EncodedChat
from easyllm.tokenizer.from_gguf import backend_from_gguf, special_tokens_from_gguf
from easyllm.tokenizer.token_bytes import TokenBytes

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"


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
        chat_template: jinja source, or None.
        max_seq_len: longest sequence of the model, written to `tokenizer_config.json`.

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
        chat_template: str | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.special, self.max_seq_len = backend, special, max_seq_len
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """The tokenizer in a Hugging Face folder.

        Raises:
            CheckpointError: `tokenizer.json` is missing or damaged.
        """
        folder = Path(folder)
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(
                f"folder {str(folder)!r} holds no {TOKENIZER_FILE}; save the tokenizer beside the weights"
            )
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the backend raises plain Exception
            raise CheckpointError(f"{path} is not a tokenizer ({error}); copy it again") from None
        config = _read_config(folder / CONFIG_FILE)
        special = SpecialTokens(
            **{
                kind: _token_text(config.get(f"{kind}_token"))
                for kind in ("bos", "eos", "pad", "unk")
            }
        )
        length = config.get("model_max_length")
        return cls(
            backend,
            special,
            chat_template=_template_of(config, folder / TEMPLATE_FILE),
            max_seq_len=int(length) if isinstance(length, int | float) and length < 1e9 else None,
        )

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any]) -> "Tokenizer":
        """The tokenizer a GGUF file's metadata describes.

        Raises:
            CheckpointError: the metadata hold no tokenizer, or one of an unknown kind.
        """
        template = metadata.get("tokenizer.chat_template")
        architecture = metadata.get("general.architecture", "")
        return cls(
            backend_from_gguf(metadata),
            SpecialTokens(**special_tokens_from_gguf(metadata)),
            chat_template=template if isinstance(template, str) else None,
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
    ) -> EncodedChat:
        """Ids of a conversation under the model's chat template, and with `with_mask` which tokens are trained.

        Args:
            num_prompt: messages at the beginning that are not trained, whoever speaks in them.
            max_tokens: a text that is longer than so many of the longest tokens is refused before it is encoded (text that
                encoding would drop counts, too). What passes may still have more tokens.

        Raises:
            DataError: the model has no chat template, the template refuses the messages, or the text is too long.
        """
        if self.chat_template is None:
            raise DataError(
                "this model has no chat template; give plain prompts, or a model tuned for chat"
            )
        return self.chat_template.encode(
            self,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            with_mask=with_mask,
            num_prompt=num_prompt,
            max_chars=None if max_tokens is None else max_tokens * self.longest_token,
        )

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` (as `AutoTokenizer` reads them)."""
        folder = Path(folder)
        write_atomic(folder / TOKENIZER_FILE, self.backend.to_str(pretty=True))
        config: dict[str, Any] = {
            f"{kind}_token": text for kind, text in asdict(self.special).items() if text is not None
        }
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self.max_seq_len is not None:
            config["model_max_length"] = self.max_seq_len
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template.source
            write_atomic(folder / TEMPLATE_FILE, self.chat_template.source)
        write_json(folder / CONFIG_FILE, config)


def _valid(text: str) -> str:
    """`text` with lone surrogates (which no UTF-8 holds) replaced."""
    if text.isascii():
        return text
    return text.encode("utf-8", "replace").decode("utf-8") if _has_surrogate(text) else text


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy it again") from None
    return config if isinstance(config, dict) else {}


def _token_text(entry: Any) -> str | None:
    """HF writes a token as text or as a dict with `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _template_of(config: dict[str, Any], file: Path) -> str | None:
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
