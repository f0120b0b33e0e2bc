"""A tokenizer as the metadata of a GGUF file: the inverse of `from_gguf`.

llama.cpp splits text with rules of its own, selected by name (`tokenizer.ggml.pre`). A tokenizer
whose rules are not among the known names is refused: under another name the file would load, and
give other token ids in silence.
"""

import json
import re

from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.tokenizer.from_gguf import PRE_TOKENIZERS
from easyllm.tokenizer.sentencepiece_to_gguf import sentencepiece_metadata
from easyllm.tokenizer.tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_TWO_DIGITS = re.compile(r"\d\d")
_DIGITS = ("Split", r"\p{N}", "Isolated", False)
_NUMBERS = ("Split", r"\p{N}+", "Isolated", False)
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> JsonObject:
    """Returns the `tokenizer.*` keys of a GGUF file.

    Args:
        tokenizer: a byte-level BPE tokenizer, or SentencePiece BPE with byte fallback.
        vocab_size: rows of the model's embedding; ids beyond the tokenizer's are unused tokens.

    Raises:
        CheckpointError: the tokenizer is of another type, or splits or normalises text by rules
            that llama.cpp does not have.
    """
    state = json.loads(tokenizer.backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"a GGUF file is written with a BPE tokenizer, got {model.get('type')}; save the model "
            "as a Hugging Face folder"
        )
    tokens, kinds = _tokens(tokenizer, state, vocab_size)
    found: JsonObject = {"tokenizer.ggml.tokens": tokens}
    if model.get("byte_fallback"):
        found |= sentencepiece_metadata(state, tokens, kinds)
    else:
        pre = pre_tokenizer_name(state)
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        found |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.merges": merges,
        }
    for role, name in ROLES.items():
        text = getattr(tokenizer.special, role)
        index = None if text is None else tokenizer.backend.token_to_id(text)
        if index is not None:
            found[f"tokenizer.ggml.{name}_token_id"] = index
    ids = tokenizer.encode("a")
    bos = found.get("tokenizer.ggml.bos_token_id")
    eos = found.get("tokenizer.ggml.eos_token_id")
    found["tokenizer.ggml.add_bos_token"] = bos is not None and ids[:1] == [bos]
    found["tokenizer.ggml.add_eos_token"] = eos is not None and ids[1:] != [] and ids[-1] == eos
    for name, text in tokenizer.template_sources.items():
        key = "tokenizer.chat_template"
        found[key if name == "default" else f"{key}.{name}"] = text
    return found


def pre_tokenizer_name(state: JsonMapping) -> str:
    """Returns llama.cpp's name of the rules by which a tokenizer splits text.

    Args:
        state: the parsed `tokenizer.json`.

    Raises:
        CheckpointError: the rules are not known.
    """
    rules = _rules(state.get("pre_tokenizer"))
    same = [rules]
    if not any(map(_TWO_DIGITS.search, state.get("model", {}).get("vocab", {}))):
        # numbers become digits whether or not they are split (DeepSeek LLM)
        same.append([_NUMBERS if rule == _DIGITS else rule for rule in rules])
    normalizer = (state.get("normalizer") or {}).get("type")
    for name, build in PRE_TOKENIZERS.items():
        known = json.loads(build().__getstate__())
        if _rules(known) in same and (normalizer == "NFC") == (name == "qwen2"):
            return name
    raise CheckpointError(
        "the tokenizer splits text by rules that llama.cpp has no name for, so a GGUF file would "
        "give other token ids; save the model as a Hugging Face folder"
    )


def _rules(pre_tokenizer: Json) -> list[tuple[object, ...]]:
    """Returns what a pre-tokenizer does, step by step, without settings that do not matter."""
    steps = pre_tokenizer or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    found: list[tuple[object, ...]] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split":
            pattern = step["pattern"]
            found.append(
                (kind, str(pattern.get("Regex", pattern)), step["behavior"], step["invert"])
            )
        elif kind == "Digits" and step["individual_digits"]:
            found.append(_DIGITS)
        elif kind == "ByteLevel":
            found.append((kind, step["add_prefix_space"], step.get("use_regex", True)))
        else:
            found.append((kind, json.dumps(step, sort_keys=True)))
    return found


def _tokens(
    tokenizer: Tokenizer, state: JsonMapping, vocab_size: int
) -> tuple[list[str], list[int]]:
    """Returns the text and the type of each id."""
    added = {token["id"]: token for token in state.get("added_tokens", [])}
    by_id = {index: text for text, index in tokenizer.backend.get_vocab().items()}
    tokens, kinds = list[str](), list[int]()
    for index in range(max(vocab_size, len(by_id))):
        text = by_id.get(index)
        tokens.append(f"[PAD{index}]" if text is None else text)
        if text is None:
            kinds.append(UNUSED)
        elif index in added:
            kinds.append(CONTROL if added[index]["special"] else USER_DEFINED)
        else:
            kinds.append(NORMAL)
    return tokens, kinds


__all__ = ["pre_tokenizer_name", "tokenizer_metadata"]
