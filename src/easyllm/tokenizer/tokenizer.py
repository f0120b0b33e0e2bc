"""The `Tokenizer` class: a `tokenizers` backend, its special tokens and its chat templates."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend

from easyllm.core.atomic import write_atomic, write_json
from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.tokenizer.chat import ChatTemplate, EncodedChat, token_variables
from easyllm.tokenizer.control_tokens import ControlTokens, without_special_tokens
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
from easyllm.tokenizer.reasoning import ReasoningFormat, detect_reasoning
from easyllm.tokenizer.sentencepiece import (
    build_backend,
    prefix_errors_with_path,
    read_model_file,
    special_tokens,
)
from easyllm.tokenizer.special_tokens import SpecialTokens
from easyllm.tokenizer.token_bytes import TokenBytes
from easyllm.tokenizer.tool_calls import ToolFormat, detect_tool_format

TOOL_TEMPLATE = "tool_use"
"""Name of the chat template used for conversations with tools, if the model has one."""


class Tokenizer:
    """Encodes text, decodes ids and renders chats.

    Args:
        backend: a `tokenizers.Tokenizer`.
        special: the BOS, EOS, PAD and UNK tokens.
        chat_template: a Jinja source, several sources by name (`default`, `tool_use` ...), or None.
        max_seq_len: maximum sequence length of the model, written to `tokenizer_config.json`.

    Attributes:
        chat_template: the compiled default template, or None.
        template_sources: the Jinja sources of all templates by name.

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
        """Loads the tokenizer of a Hugging Face folder.

        Raises:
            CheckpointError: there is neither a `tokenizer.json` nor a `tokenizer.model`, or a file
                is damaged.
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
        """Loads a tokenizer from a SentencePiece `.model` file.

        Args:
            path: the `.model` file.
            add_bos: whether encoding prepends BOS, as for Llama; the file does not store this.
            add_eos: whether encoding appends EOS, as for T5; the file does not store this.

        Raises:
            SourceError: there is no such file.
            CheckpointError: it is damaged, or requires a feature that is not implemented.
        """
        model = read_model_file(Path(path))
        with prefix_errors_with_path(Path(path)):
            backend = build_backend(model, add_bos=add_bos, add_eos=add_eos)
        return cls(backend, SpecialTokens(**special_tokens(model)))

    @classmethod
    def from_gguf(cls, metadata: JsonObject) -> "Tokenizer":
        """Builds the tokenizer that the metadata of a GGUF file describe.

        Raises:
            CheckpointError: the metadata contain no tokenizer, or its type is unknown.
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
        """Number of ids, including added tokens."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the serialised tokenizer in hexadecimal; equal for equal tokenizers."""
        return hashlib.sha256(self.backend.to_str().encode("utf-8")).hexdigest()

    @cached_property
    def longest_token(self) -> int:
        """Length in characters of the longest token, as spelled in the vocabulary."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=0)

    @property
    def eos_id(self) -> int | None:
        """The id of the EOS token, or None."""
        return self.id_of(self.special.eos)

    @property
    def bos_id(self) -> int | None:
        """The id of the BOS token, or None."""
        return self.id_of(self.special.bos)

    @property
    def pad_id(self) -> int | None:
        """The id of the PAD token, or None."""
        return self.id_of(self.special.pad)

    def id_of(self, token: str | None) -> int | None:
        """Returns the id of the token with this text, or None if there is none."""
        return None if token is None else self.backend.token_to_id(token)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special (control) tokens, which decoding skips by default."""
        return frozenset(i for i, t in self.backend.get_added_tokens_decoder().items() if t.special)

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """The control tokens; chat messages that contain their names are encoded as text."""
        return ControlTokens(self.backend)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Returns the token ids of `text`.

        Args:
            text: the text; the names of special tokens in it are encoded as these tokens.
            special_tokens: whether to add the special tokens that the model expects around a text
                (such as BOS).
        """
        return self.backend.encode(_valid(text), add_special_tokens=special_tokens).ids

    def encode_batch(self, texts: list[str], *, special_tokens: bool = True) -> list[list[int]]:
        """Returns the token ids of several texts, encoded in parallel."""
        batch = self.backend.encode_batch_fast(
            [_valid(text) for text in texts], add_special_tokens=special_tokens
        )
        return [encoding.ids for encoding in batch]

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of untrusted documents.

        The name of a special token in a document is encoded as plain text, and no BOS or EOS is
        added.
        """
        batch = self._without_special_tokens.encode_batch_fast(
            [_valid(text) for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in batch]

    @cached_property
    def _without_special_tokens(self) -> Backend:
        return without_special_tokens(self.backend)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids without BOS or EOS, and for each id its character span in `text`."""
        encoding = self.backend.encode(_valid(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def token_text(self, token_id: int) -> str:
        """Returns the text of a single token, including special tokens."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """Maps an id to the bytes that its token adds to a text, which may be part of a character.

        The result is None for an id without a token.
        """
        return TokenBytes(self.backend)

    def encode_chat(
        self,
        messages: list[JsonObject],
        *,
        tools: list[JsonObject] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        template_kwargs: JsonMapping | None = None,
        with_mask: bool = False,
        num_prompt: int = 0,
        max_tokens: int | None = None,
        find_unrendered: bool = False,
        reject_unrendered: bool = False,
    ) -> EncodedChat:
        """Encodes a conversation with the model's chat template.

        The text of messages and tools never becomes a control token: `<|im_end|>` in it is encoded
        as these ten characters.

        Args:
            messages: the conversation, in any form that `normalise_messages` reads.
            tools: definitions of the available tools; if given, the template `tool_use` is used
                where the model has one.
            add_generation_prompt: whether to append the header of an assistant turn.
            continue_final_message: whether the ids end with the content of the last message, an
                assistant's, which the model continues; not with `add_generation_prompt`.
            template_kwargs: further variables of the template, plain JSON; the template must read
                them (`ChatTemplate.variables`).
            with_mask: whether to return the loss mask, which marks the tokens that are trained.
            num_prompt: number of messages at the beginning that are masked, whatever their role.
            max_tokens: rejects, before encoding, a text with more characters than this many of the
                longest token (characters that encoding would drop count too). A text that passes
                may still have more tokens.
            find_unrendered: whether to find messages whose content the template did not render
                (`EncodedChat.unrendered`); one with a role unknown to the template is an error.
            reject_unrendered: for prompts, whether it is an error if the template does not render
                the content of a message, except for assistant messages.

        Raises:
            DataError: the model has no chat template, the template rejects the messages, or a check
                above failed.
            ContextLengthError: the text is too long for `max_tokens`.
        """
        return self._template_for(tools).encode(
            self,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            with_mask=with_mask,
            num_prompt=num_prompt,
            max_tokens=max_tokens,
            find_unrendered=find_unrendered,
            reject_unrendered=reject_unrendered,
        )

    @property
    def special_names(self) -> tuple[str, ...]:
        """The names of the special tokens."""
        return self.control_tokens.names

    @cached_property
    def _added_ids(self) -> dict[str, int]:
        """Ids of the added tokens by their names."""
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items()}

    @cached_property
    def reasoning(self) -> ReasoningFormat | None:
        """The marks of the model's reasoning, and its switch; None if its template knows none."""
        if self.chat_template is None:
            return None
        return detect_reasoning(self.chat_template, self._added_ids, token_variables(self))

    @cached_property
    def tool_format(self) -> ToolFormat:
        """The format in which the model writes tool calls.

        If its chat template does not show tools, `ToolFormat.prepare` describes them in a message.
        """
        try:
            template = self._tool_template or self.chat_template
        except DataError:  # it is not supported, which matters only to those who use it
            template = self.chat_template
        return detect_tool_format(
            template,
            self._added_ids,
            token_variables(self),
            special_names=self.special_names,
            reasoning=self.reasoning,
        )

    @cached_property
    def _tool_template(self) -> ChatTemplate | None:
        """The template `tool_use`, compiled lazily because an unused one may be unsupported."""
        source = self.template_sources.get(TOOL_TEMPLATE)
        return None if source is None else ChatTemplate(source)

    def _template_for(self, tools: list[JsonObject] | None) -> ChatTemplate:
        if tools and self._tool_template is not None:
            return self._tool_template
        if self.chat_template is not None:
            return self.chat_template
        if self.template_sources:
            raise DataError(
                f"this model has chat templates named {', '.join(self.template_sources)} but none "
                f"named {DEFAULT_TEMPLATE}; rename the one to use to {DEFAULT_TEMPLATE} in its "
                f"{CONFIG_FILE}"
            )
        raise DataError(
            "this model has no chat template; give plain prompts, or use a model tuned for chat"
        )

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and the chat templates to a folder.

        `AutoTokenizer` of transformers can read the result.
        """
        folder = Path(folder)
        write_atomic(folder / TOKENIZER_FILE, self.backend.to_str(pretty=True))
        config: JsonObject = {
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
        elif sources:
            # transformers 4 reads this list; transformers 5 reads the files, or else the list
            config["chat_template"] = [{"name": n, "template": t} for n, t in sources.items()]
        files = template_files(sources) or {}
        for stale in (folder / TEMPLATE_FILE, *(folder / TEMPLATE_FOLDER).glob("*.jinja")):
            if stale.relative_to(folder).as_posix() not in files.values():
                stale.unlink(missing_ok=True)  # a stale file would take precedence
        for name, file in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            write_atomic(folder / file, sources[name])
        write_json(folder / CONFIG_FILE, config)


def _valid(text: str) -> str:
    """Returns `text` with lone surrogates, which UTF-8 cannot encode, replaced."""
    if text.isascii():
        return text
    return text.encode("utf-8", "replace").decode("utf-8") if _has_surrogate(text) else text


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)
