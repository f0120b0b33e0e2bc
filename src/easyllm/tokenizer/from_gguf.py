"""A `tokenizers` backend from the metadata of a GGUF file.

`tokenizer.ggml.model` says the kind (`gpt2`: byte-level BPE; `llama`: sentencepiece BPE with scores),
`tokenizer.ggml.pre` how text is cut before the merges. A cut we do not know is refused: guessing it would
change token ids silently.
"""

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from easyllm.core.errors import CheckpointError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTROL, _USER_DEFINED = 3, 4


def _byte_level(*, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), _byte_level(use_regex=False)]
    )


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)]
    )


PRE_TOKENIZERS = {
    "default": lambda: _byte_level(use_regex=True),
    "gpt-2": lambda: _byte_level(use_regex=True),
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "refact": _single_digits,
    "command-r": _single_digits,
    "llama-bpe": lambda: _split(_LLAMA3),
    "llama3": lambda: _split(_LLAMA3),
    "glm4": lambda: _split(_LLAMA3),
    "chatglm-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}
_NFC = ("qwen2",)
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "glm4", "chatglm-bpe")


def backend_from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    """The backend the metadata describe.

    Raises:
        CheckpointError: there is no tokenizer, or one of an unknown kind.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise CheckpointError("the GGUF file holds no tokenizer; use a file that carries one")
    if kind == "gpt2":
        backend = _byte_level_bpe(tokens, metadata)
    elif kind == "llama":
        backend = _sentencepiece_bpe(tokens, metadata)
    else:
        raise CheckpointError(
            f"GGUF tokenizer {kind!r} is not known; known are gpt2 (byte-level BPE) and llama (sentencepiece BPE)"
        )
    _add_special(backend, tokens, metadata)
    return backend


def special_tokens_from_gguf(metadata: dict[str, Any]) -> dict[str, str | None]:
    """Texts of bos, eos, pad and unk."""
    tokens = metadata["tokenizer.ggml.tokens"]
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    found: dict[str, str | None] = {}
    for kind, key in keys.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        found[kind] = tokens[index] if isinstance(index, int) and index < len(tokens) else None
    return found


def _byte_level_bpe(tokens: list[str], metadata: dict[str, Any]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"GGUF pre-tokenizer {pre!r} is not known; known are {', '.join(PRE_TOKENIZERS)}: "
            "load the model's own folder with tokenizer.json instead"
        )
    merges = [tuple(line.split(" ", 1)) for line in metadata.get("tokenizer.ggml.merges", [])]
    if any(len(pair) != 2 for pair in merges):
        raise CheckpointError("the GGUF file's merges are damaged; download or convert it again")
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    except Exception as error:  # the backend raises plain Exception
        raise CheckpointError(
            f"the GGUF file's vocabulary and merges disagree ({error}); download or convert it again"
        ) from None
    backend = Tokenizer(model)
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(tokens: list[str], metadata: dict[str, Any]) -> Tokenizer:
    """Sentencepiece's BPE merges whatever pair has the best score; as ranked merges that is every
    split of a piece into two pieces, in the order of the whole piece's score."""
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


def _add_special(backend: Tokenizer, tokens: list[str], metadata: dict[str, Any]) -> None:
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind == wanted
        ]
        if special:
            backend.add_special_tokens(added)
        else:
            backend.add_tokens(added)
    around = special_tokens_from_gguf(metadata)
    sepiece = metadata.get("tokenizer.ggml.model") == "llama"
    bos = around["bos"] if metadata.get("tokenizer.ggml.add_bos_token", sepiece) else None
    eos = around["eos"] if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if bos or eos:
        pieces = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        ids = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(pieces), special_tokens=ids
        )
