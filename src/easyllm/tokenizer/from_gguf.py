"""Building a `tokenizers` backend from the metadata of a GGUF file.

`tokenizer.ggml.model` is the tokenizer type (`gpt2`: byte-level BPE; `llama`: SentencePiece BPE
with scores), and `tokenizer.ggml.pre` names the pre-tokenizer. An unknown pre-tokenizer is
rejected, because a wrong one would silently change token ids. Missing values have the defaults of
llama.cpp (`llama-vocab.cpp`).
"""

import logging
from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.tokenizer.bos_eos import add_bos_eos

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
"""llama.cpp's default: each pattern splits the pieces that the previous one produced."""
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CJK = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-"
    "ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ"
    "\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘"
    "-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    _DEEPSEEK_CJK,
    r"\p{N}+",
)
"""DeepSeek LLM and V2; the models' own files split numbers into digits, which is the same where no
token has two."""
_CONTROL, _USER_DEFINED = 3, 4
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""Default special ids of `llama` tokenizers whose file does not set them."""
_LIKE_LLAMA3 = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
)
END_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<｜end▁of▁sentence｜>",
        "<end_of_utterance>",
        "<|return|>",
        "<|call|>",
    }
)
"""Texts of tokens that are always treated as EOS and as control tokens, whatever the file says."""

logger = logging.getLogger(__name__)


def _byte_level(*, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, _byte_level(use_regex=False)])


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)]
    )


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": lambda: _split(*_DEFAULT),
    "gpt-2": lambda: _byte_level(use_regex=True),
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "refact": _single_digits,
    "command-r": _single_digits,
    **dict.fromkeys(_LIKE_LLAMA3, lambda: _split(_LLAMA3)),
    "glm4": lambda: _split(_LLAMA3),
    "chatglm-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
    "deepseek-r1-qwen": lambda: _split(_QWEN2),
    "tekken": lambda: _split(_TEKKEN),
    "deepseek-v3": lambda: _split(*_DEEPSEEK_V3),
    "deepseek-coder": lambda: _split(*_DEEPSEEK_CODER),
    "deepseek-llm": lambda: _split(*_DEEPSEEK_LLM),
}
_NFC = ("qwen2",)
_WHOLE_WORDS_FIRST = (*_LIKE_LLAMA3, "glm4", "chatglm-bpe", "tekken")
_ADD_BOS = (*_LIKE_LLAMA3, "tekken")


def backend_from_gguf(metadata: JsonObject) -> Tokenizer:
    """Builds the backend that the metadata describe.

    Raises:
        CheckpointError: there is no tokenizer, its type or pre-tokenizer is unknown, or it is
            damaged.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or set(map(type, tokens)) - {str}:
        raise CheckpointError("the GGUF file contains no tokenizer; use a file that contains one")
    if kind == "gpt2":
        backend = _byte_level_bpe(tokens, metadata)
    elif kind == "llama":
        backend = _sentencepiece_bpe(tokens, metadata)
    else:
        raise CheckpointError(
            f"GGUF tokenizer {kind!r} is not known; known types are gpt2 (byte-level BPE) and "
            "llama (SentencePiece BPE)"
        )
    _add_special(backend, tokens, metadata)
    return backend


def special_tokens_from_gguf(metadata: JsonMapping) -> dict[str, str | None]:
    """Returns the texts of the BOS, EOS, PAD and UNK tokens by role; None for a missing one."""
    tokens = metadata["tokenizer.ggml.tokens"]
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    found: dict[str, str | None] = {}
    for kind, key in keys.items():
        index = token_id_from_gguf(metadata, key)
        found[kind] = tokens[index] if index is not None and index < len(tokens) else None
    return found


def token_id_from_gguf(metadata: JsonMapping, kind: str) -> int | None:
    """Returns the id of a special token (`bos`, `eos`, `padding`, `unknown` ...), or None."""
    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    default = _SENTENCEPIECE_IDS.get(kind) if sentencepiece else None
    index = metadata.get(f"tokenizer.ggml.{kind}_token_id", default)
    return index if isinstance(index, int) else None


def templates_from_gguf(metadata: JsonMapping) -> dict[str, str]:
    """Returns the chat templates by name.

    `tokenizer.chat_template` is the default, `tokenizer.chat_template.NAME` the one named NAME.
    """
    key = "tokenizer.chat_template"
    named = {k.removeprefix(f"{key}."): v for k, v in metadata.items() if k.startswith(f"{key}.")}
    found = {"default": metadata.get(key), **named}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def end_ids_from_gguf(metadata: JsonMapping) -> list[int]:
    """Returns the ids that end a generation.

    These are the ids that the file sets as end of text, turn or message, followed by the ids of
    tokens in `END_TEXTS`.
    """
    named = [token_id_from_gguf(metadata, kind) for kind in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    by_text = [index for index, token in enumerate(tokens) if token in END_TEXTS]
    return list(dict.fromkeys(i for i in (*named, *by_text) if i is not None))


def _byte_level_bpe(tokens: list[str], metadata: JsonObject) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre") or "default"
    if "tokenizer.ggml.pre" not in metadata:
        logger.warning(
            "the GGUF file does not set its pre-tokenizer (tokenizer.ggml.pre); llama.cpp's "
            "default is used, which produces different ids if the model was trained with another "
            "one: convert the model again"
        )
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"GGUF pre-tokenizer {pre!r} is not known; known pre-tokenizers are "
            f"{', '.join(PRE_TOKENIZERS)}: load the model's own folder with tokenizer.json instead"
        )
    merges = [tuple(line.split(" ", 1)) for line in metadata.get("tokenizer.ggml.merges", [])]
    if set(map(len, merges)) - {2}:
        raise CheckpointError("the GGUF file's merges are damaged; download or convert it again")
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    except Exception as error:  # the backend raises plain Exception
        raise CheckpointError(
            f"the GGUF file's vocabulary and merges disagree ({error}); "
            "download or convert it again"
        ) from None
    backend = Tokenizer(model)
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(tokens: list[str], metadata: JsonObject) -> Tokenizer:
    """Builds a SentencePiece BPE backend.

    SentencePiece always merges the pair whose result has the best score. The equivalent ranked
    merges are all splits of a piece into two pieces, in the order of the score of the full piece.
    """
    scores = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise CheckpointError("the GGUF file's token scores are damaged; convert it again")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = []
    for piece, index in vocab.items():
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(a, b) for a, b in splits if a in vocab and b in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-scores[index], pair) for pair in known]
    merges.sort(key=lambda entry: entry[0])
    unknown = special_tokens_from_gguf(metadata)["unk"]
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[pair for _, pair in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _add_special(backend: Tokenizer, tokens: list[str], metadata: JsonObject) -> None:
    kinds = metadata.get("tokenizer.ggml.token_type") or [None] * len(tokens)
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(tokens, kinds, strict=False)
            if (_CONTROL if token in END_TEXTS else kind) == wanted
        ]
        if special:
            backend.add_special_tokens(added)
        else:
            backend.add_tokens(added)
    around = special_tokens_from_gguf(metadata)
    adds = (
        metadata.get("tokenizer.ggml.model") == "llama"
        or metadata.get("tokenizer.ggml.pre") in _ADD_BOS
    )
    bos = around["bos"] if metadata.get("tokenizer.ggml.add_bos_token", adds) else None
    eos = around["eos"] if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    add_bos_eos(backend, bos=bos, eos=eos)
