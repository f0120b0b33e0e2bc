"""Loading the tokenizer of a Hugging Face folder.

The tokenizer itself is in `tokenizer.json` or in a SentencePiece (or tiktoken) `tokenizer.model`.
`tokenizer_config.json` may contain tokens, flags and templates that `tokenizer.json` lacks; older
folders have `special_tokens_map.json` and `added_tokens.json` for the same purpose. If no file
defines a special token, the default of the tokenizer's `transformers` class applies. All files are
interpreted as in transformers 5.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.processors import RobertaProcessing

from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.tokenizer.authors import ICE_FILE, AuthorsClass
from easyllm.tokenizer.bos_eos import add_bos_eos
from easyllm.tokenizer.sentencepiece import (
    PieceType,
    SentencePieceModel,
    build_backend,
    prefix_errors_with_path,
    read_model_file,
    special_tokens,
)
from easyllm.tokenizer.tiktoken_file import is_tiktoken, tiktoken_backend

TOKENIZER_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
CONFIG_FILE, MODEL_FILE = "tokenizer_config.json", "config.json"
SPECIAL_FILE, ADDED_FILE = "special_tokens_map.json", "added_tokens.json"
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
DEFAULT_TEMPLATE = "default"
_FILE_NAME = re.compile(r"[\w-](?:[\w. -]{0,60}[\w-])?", re.ASCII)
"""Matches template names that are valid file names on every system."""

_ROLES = ("bos", "eos", "pad", "unk")
_ALL_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""In the order in which transformers adds tokens that the vocabulary lacks."""
_NAMED = tuple(f"{role}_token" for role in _ALL_ROLES)
_FURTHER = ("additional_special_tokens", "extra_special_tokens")
_LLAMA = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
_END = "<|endoftext|>"
_ROBERTA = _LLAMA | {"sep": "</s>", "pad": "<pad>", "cls": "<s>", "mask": "<mask>"}
_CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "GPT2Tokenizer": {"unk": _END, "bos": _END, "eos": _END},
    "CodeGenTokenizer": {"unk": _END, "bos": _END, "eos": _END},
    "GPTNeoXTokenizer": {"unk": _END, "bos": _END, "eos": _END, "pad": "<|padding|>"},
    "Qwen2Tokenizer": {"unk": _END, "eos": _END, "pad": _END},
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "GemmaTokenizer": {"unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"},
    "CohereTokenizer": {
        "unk": "<UNK>",
        "bos": "<BOS_TOKEN>",
        "eos": "<|END_OF_TURN_TOKEN|>",
        "pad": "<PAD>",
        "cls": "<CLS>",
        "sep": "<SEP>",
        "mask": "<MASK_TOKEN>",
    },
    "RobertaTokenizer": _ROBERTA,
    "BartTokenizer": _ROBERTA,
}
"""Default special tokens by class, if no file defines them; the vocabulary is extended by those it
lacks."""
_CLASS_OF_MODEL = {
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "cohere": "CohereTokenizer",
    "roberta": "RobertaTokenizer",
    "starcoder2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
}
"""Tokenizer class by `model_type`, if `tokenizer_config.json` does not name one."""
_PREFIX_AT_START = ("LlamaTokenizer", "CodeLlamaTokenizer")
"""SentencePiece classes that prepend a space only at the start of a text, not also after control
tokens in it (as with `legacy`)."""
_NO_PREFIX = ("GemmaTokenizer",)
"""SentencePiece classes that do not prepend a space to a text."""
_SURROUND = ("RobertaTokenizer", "BartTokenizer")
"""Classes that put CLS before a text and SEP after it, whatever `tokenizer.json` says."""
_SPACE_BEFORE = ("GPT2Tokenizer", "Qwen2Tokenizer", *_SURROUND)
"""Classes whose `add_prefix_space` overrides `tokenizer.json`."""
_SENTENCEPIECE = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
"""Classes with a SentencePiece vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderTokenizer:
    """The parts of a tokenizer that were read from a folder.

    Attributes:
        backend: the `tokenizers` backend.
        special: texts of the BOS, EOS, PAD and UNK tokens by role; None for a missing one.
        templates: chat templates by name (`default`, `tool_use` ...).
        max_seq_len: maximum sequence length of the model; None if no file contains it.
    """

    backend: Backend
    special: dict[str, str | None]
    templates: dict[str, str]
    max_seq_len: int | None


def tokenizer_file(folder: Path) -> Path | None:
    """Returns the file that contains a folder's tokenizer, or None if there is none."""
    files = (folder / name for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE, ICE_FILE))
    return next((file for file in files if file.is_file()), None)


def read_folder(folder: Path) -> FolderTokenizer:
    """Reads the tokenizer of a folder.

    Raises:
        CheckpointError: there is none, or a file is damaged or contradicts another one.
    """
    file = tokenizer_file(folder)
    if file is None:
        raise CheckpointError(
            f"folder {str(folder)!r} contains neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE}; "
            "save the tokenizer next to the weights"
        )
    config = read_json(folder / CONFIG_FILE)
    added = _added_tokens(folder, config)
    kind = _class_of(folder, config)
    authors = AuthorsClass(kind, file.name)
    if file.name == TOKENIZER_FILE:
        backend = _read_backend(file)
        defaults = _class_tokens(kind, backend)
        if kind in _SPACE_BEFORE and isinstance(config.get("add_prefix_space"), bool):
            backend = _with_space_before(backend, config["add_prefix_space"])
    elif is_tiktoken(file):
        backend, defaults = tiktoken_backend(file, kind), {}
    else:
        backend, defaults = _from_sentencepiece(file, config, added, authors)
    named = {
        role: _token_text(config[f"{role}_token"])
        for role in _ALL_ROLES
        if f"{role}_token" in config
    }
    all_special = {role: named.get(role, defaults.get(role)) for role in _ALL_ROLES}
    special = {role: all_special[role] for role in _ROLES}
    _add_tokens(
        backend,
        added,
        [*filter(None, all_special.values()), *_further_texts(config, added)],
        folder,
    )
    if file.name == TOKENIZER_FILE and kind in _SURROUND:
        _surround_roberta(backend, all_special, config)
    if file.name != TOKENIZER_FILE:  # which already defines its post-processor
        bos, eos = (
            special[r] if config.get(f"add_{r}_token") is True else None for r in ("bos", "eos")
        )
        add_bos_eos(backend, bos=bos, eos=eos)
        authors.finish(backend)
    if config.get("split_special_tokens") is True:
        backend.encode_special_tokens = True
    length = config.get("model_max_length")
    return FolderTokenizer(
        backend=backend,
        special=special,
        templates=_templates(folder, config) or _authors_template(authors, folder, backend),
        max_seq_len=int(length) if isinstance(length, int | float) and length < 1e9 else None,
    )


def read_json(path: Path) -> JsonObject:
    """Returns the JSON object in a file; empty if there is no such file or it is not an object.

    Raises:
        CheckpointError: the file is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy it again") from None
    return content if isinstance(content, dict) else {}


# ---- the two file formats


def _read_backend(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the backend raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer ({error}); copy it again") from None


def _from_sentencepiece(
    path: Path, config: JsonMapping, added: Mapping[int, AddedToken], authors: AuthorsClass
) -> tuple[Backend, Mapping[str, str]]:
    """Returns the backend of a `tokenizer.model` and the special tokens that the file defines.

    An added token whose id belongs to a piece replaces that piece, which is how reserved pieces are
    named.
    """
    kind = authors.name
    model = _renamed(authors.prepared(read_model_file(path), config), added)
    own = special_tokens(model) | authors.special()
    prefix = False if kind in _NO_PREFIX else config.get("add_prefix_space")
    if isinstance(prefix, bool):
        model = replace(model, add_dummy_prefix=prefix)
    legacy = config.get("legacy", kind not in _PREFIX_AT_START)
    with prefix_errors_with_path(path):
        backend = build_backend(model, prefix_at_start_only=legacy is False)
    return backend, own


def _renamed(model: SentencePieceModel, added: Mapping[int, AddedToken]) -> SentencePieceModel:
    pieces = list(model.pieces)
    known = {piece.text for piece in pieces}
    for index, token in added.items():
        if 0 <= index < len(pieces) and token.content not in known:
            kind = PieceType.CONTROL if token.special else PieceType.USER_DEFINED
            pieces[index] = replace(pieces[index], text=token.content, type=kind)
    return replace(model, pieces=tuple(pieces))


def _class_of(folder: Path, config: JsonMapping) -> str:
    name = config.get("tokenizer_class")
    if not isinstance(name, str):
        model = read_json(folder / MODEL_FILE)
        name = model.get("tokenizer_class") or _CLASS_OF_MODEL.get(str(model.get("model_type")))
    return str(name or "").removesuffix("Fast")


def _class_tokens(kind: str, backend: Backend) -> Mapping[str, str]:
    """Returns the default special tokens of the class for a `tokenizer.json`.

    If the vocabulary is byte-level, transformers replaces the Llama class with the generic one,
    which has no default special tokens.
    """
    defaults = _CLASS_TOKENS.get(kind, {})
    if kind not in _SENTENCEPIECE or '"ByteLevel"' not in backend.to_str():
        return defaults
    vocab = {} if kind == "LlamaTokenizer" else backend.get_vocab(with_added_tokens=True)
    return {role: text for role, text in defaults.items() if text in vocab}


def _surround_roberta(
    backend: Backend, special: Mapping[str, str | None], config: JsonMapping
) -> None:
    """Makes encoding surround a text with the CLS and SEP tokens."""
    ends = [(text, backend.token_to_id(text)) for r in ("sep", "cls") if (text := special[r])]
    known = [(text, index) for text, index in ends if index is not None]
    if len(known) < 2:
        return
    sep, cls = known
    backend.post_processor = RobertaProcessing(
        sep,
        cls,
        trim_offsets=config.get("trim_offsets", True) is not False,
        add_prefix_space=config.get("add_prefix_space") is True,
    )


def _with_space_before(backend: Backend, wanted: bool) -> Backend:
    """Returns the backend with `add_prefix_space` of its byte-level pre-tokenizer overridden."""
    state = json.loads(backend.to_str())
    steps = [state["pre_tokenizer"] or {}]
    steps += steps[0].get("pretokenizers", [])
    for step in steps:
        if step.get("type") == "ByteLevel":
            step["add_prefix_space"] = wanted
    return Backend.from_str(json.dumps(state))


# ---- tokens defined in other files


def _added_tokens(folder: Path, config: JsonObject) -> dict[int, AddedToken]:
    """Returns the added tokens by id.

    They come from `added_tokens_decoder` or, without it, from the older files. In the latter case
    the special tokens of these files are added to `config`.

    Raises:
        CheckpointError: an entry is damaged.
    """
    if "added_tokens_decoder" in config:
        entries = config["added_tokens_decoder"]
        return {_number(i): _token(entry) for i, entry in _items(entries, CONFIG_FILE)}
    listed = [text for key, text in _named_texts(config) if key in _FURTHER]
    config |= read_json(folder / SPECIAL_FILE)
    special = {text for key, text in _named_texts(config) if key != "additional_special_tokens"}
    # a token that only the older file lists as additional stays plain text in transformers
    special.update(listed)
    entries = read_json(folder / ADDED_FILE)
    return {
        _number(i): AddedToken(str(t), normalized=t not in special, special=t in special)
        for t, i in entries.items()
    }


def _add_tokens(
    backend: Backend, added: Mapping[int, AddedToken], special: list[str], folder: Path
) -> None:
    """Adds missing tokens with their flags to the backend and marks the special ones as such.

    Raises:
        CheckpointError: the id of a new token is not the next free id.
    """
    present = backend.get_added_tokens_decoder()
    for index, token in sorted(added.items()):
        if index in present and repr(present[index]) == repr(token):
            continue
        if backend.token_to_id(token.content) is None and index != _next_id(backend):
            raise CheckpointError(
                f"{folder} assigns the id {index} to the token {token.content!r}, but the next "
                f"free id is {_next_id(backend)}; copy the {TOKENIZER_FILE} that belongs to it"
            )
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    control = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    for text in dict.fromkeys(special):
        if text not in control:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _next_id(backend: Backend) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _further_texts(config: JsonMapping, added: Mapping[int, AddedToken]) -> list[str]:
    """Returns the special tokens without a role, except those listed as plain added tokens."""
    plain = {token.content for token in added.values() if not token.special}
    return [text for key, text in _named_texts(config) if key in _FURTHER and text not in plain]


def _named_texts(config: JsonMapping) -> Iterator[tuple[str, str]]:
    """Yields the keys and texts of the special tokens in a configuration."""
    for key in _NAMED:
        if (text := _token_text(config.get(key))) is not None:
            yield key, text
    for key in _FURTHER:
        entries = config.get(key) or ()
        if not isinstance(entries, list | dict | tuple):
            raise CheckpointError(
                f"{CONFIG_FILE} sets {key}={entries!r}, expected a list of tokens"
            )
        for entry in entries.values() if isinstance(entries, dict) else entries:
            if (text := _token_text(entry)) is not None:
                yield key, text


def _token(entry: object) -> AddedToken:
    text = _token_text(entry)
    if text is None:
        raise CheckpointError(f"{CONFIG_FILE} lists the added token {entry!r}; copy it again")
    flags = entry if isinstance(entry, dict) else {}
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    given = {name: flags[name] for name in names if isinstance(flags.get(name), bool)}
    return AddedToken(text, **given)


def _items(entries: object, file: str) -> list[tuple[Any, Any]]:
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{file} lists added tokens as {type(entries).__name__}; copy it again"
        )
    return list(entries.items())


def _number(index: Json) -> int:
    try:
        return int(index)
    except (TypeError, ValueError):
        raise CheckpointError(
            f"an added token has the id {index!r}; copy the tokenizer again"
        ) from None


def _token_text(entry: object) -> str | None:
    """Returns the text of a token, which HF stores as a string or as a dict with `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) and entry else None


# ---- chat templates


def _authors_template(authors: AuthorsClass, folder: Path, backend: Backend) -> dict[str, str]:
    template = authors.template(folder, backend)
    return {} if template is None else {DEFAULT_TEMPLATE: template}


def _templates(folder: Path, config: JsonMapping) -> dict[str, str]:
    """Returns the chat templates by name.

    Separate template files take precedence over `tokenizer_config.json`.
    """
    files = {DEFAULT_TEMPLATE: folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).is_file() else {}
    files |= {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if files:
        return {name: _read_text(path) for name, path in files.items()}
    template = config.get("chat_template")
    if isinstance(template, str):
        return {DEFAULT_TEMPLATE: template}
    if isinstance(template, list):
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
    if not isinstance(template, dict):
        return {}
    return {k: v for k, v in template.items() if isinstance(k, str) and isinstance(v, str)}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 ({error}); copy it again") from None


def template_files(names: Iterable[str]) -> dict[str, str] | None:
    """Returns the relative path of the file for each template name.

    The result is None if a name is not a valid file name. In that case all templates must be saved
    only in `tokenizer_config.json`, which is read if there are no template files.
    """
    names = list(names)
    others = [name for name in names if name != DEFAULT_TEMPLATE]
    if not all(_FILE_NAME.fullmatch(name) for name in others):
        return None
    if len({name.casefold() for name in names}) < len(names):  # same file on some file systems
        return None
    named = {name: f"{TEMPLATE_FOLDER}/{name}.jinja" for name in others}
    return named | ({DEFAULT_TEMPLATE: TEMPLATE_FILE} if DEFAULT_TEMPLATE in names else {})
