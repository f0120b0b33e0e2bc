"""SentencePiece BPE as the metadata of a GGUF file (`tokenizer.ggml.model` = `llama`).

The file has a score for each piece instead of merges: of all neighbours that form a piece,
llama.cpp merges those whose piece has the highest score. Merges of a `tokenizer.json` have the same
effect if all merges that form one piece have adjacent ranks, and every division of a piece into two
pieces is a merge. Both hold for merges that were made from scores; other ones are refused.
"""

import re
from collections.abc import Sequence

from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import Json, JsonMapping, JsonObject

SPACE = "▁"
UNKNOWN, NORMAL, BYTE = 2, 1, 6
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_ADDED_SCORE = -1000.0
"""Score of tokens that no merge forms, below those of pieces, as llama.cpp's converter writes."""
_PREFIX = {"type": "Prepend", "prepend": SPACE}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_REMEDY = "save the model as a Hugging Face folder"


def sentencepiece_metadata(
    state: JsonMapping, tokens: Sequence[str], kinds: Sequence[int]
) -> JsonObject:
    """Returns the keys of a GGUF file in which SentencePiece BPE differs from byte-level BPE.

    Args:
        state: the parsed `tokenizer.json`.
        tokens: the text of each id.
        kinds: the type of each id, by its role as an added token.

    Raises:
        CheckpointError: llama.cpp would produce other ids.
    """
    model = state["model"]
    unknown = model.get("unk_token")
    missing = 256 - sum(bool(BYTE_PIECE.fullmatch(token)) for token in tokens)
    if missing:
        raise CheckpointError(
            f"a GGUF file of a SentencePiece tokenizer needs a piece for each of the 256 bytes, "
            f"but {missing} are missing; {_REMEDY}"
        )
    if model.get("ignore_merges") or model.get("dropout") or not _splits_nothing(state):
        raise CheckpointError(
            "the SentencePiece tokenizer looks up or splits words before it merges, which "
            f"llama.cpp does not do, so a GGUF file would give other token ids; {_REMEDY}"
        )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": _scores(model, tokens, kinds),
        "tokenizer.ggml.token_type": [
            UNKNOWN if token == unknown else BYTE if BYTE_PIECE.fullmatch(token) else kind
            for token, kind in zip(tokens, kinds, strict=True)
        ],
        "tokenizer.ggml.add_space_prefix": _adds_prefix(state.get("normalizer")),
    }


def _adds_prefix(normalizer: Json) -> bool:
    """Returns whether text starts with ▁, given a normalizer that does nothing but mark spaces.

    Raises:
        CheckpointError: it does something else.
    """
    steps = normalizer or {}
    steps = steps["normalizers"] if steps.get("type") == "Sequence" else [steps]
    if steps in ([_SPACES], [_PREFIX, _SPACES]):
        return len(steps) == 2
    kinds = ", ".join(str(step.get("type", "none")) for step in steps)
    raise CheckpointError(
        f"the SentencePiece tokenizer normalises text ({kinds}), and llama.cpp only marks spaces, "
        f"so a GGUF file would give other token ids; {_REMEDY}"
    )


def _splits_nothing(state: JsonMapping) -> bool:
    """Returns whether the pre-tokenizer has no effect on ids.

    A cut at spaces has none: normalised text has no space, and if the cut is in front of ▁, no
    piece extends across it (`sentencepiece.build_backend`).
    """
    pre = state.get("pre_tokenizer")
    if pre is None:
        return True
    if pre.get("type") != "Split" or pre.get("invert"):
        return False
    at = pre["pattern"].get("String")
    across = any(SPACE in token[1:] for token in state["model"]["vocab"])
    return at == " " or (at == SPACE and pre["behavior"] == "MergedWithNext" and not across)


def _scores(model: JsonMapping, tokens: Sequence[str], kinds: Sequence[int]) -> list[float]:
    """Returns the score of each id: minus the rank of its piece among those that merges form.

    Raises:
        CheckpointError: no scores have the effect of the merges.
    """
    pairs = [tuple(p.split(" ", 1)) if isinstance(p, str) else tuple(p) for p in model["merges"]]
    rank, last, merges = dict[str, int](), "", set(pairs)
    for left, right in pairs:
        piece = left + right
        if piece != last and piece in rank:
            raise _unequal(f"the merges that form {piece!r} do not have adjacent ranks")
        rank.setdefault(piece, len(rank))
        last = piece
    vocab = model["vocab"]
    for token, kind in zip(tokens, kinds, strict=True):
        if kind != NORMAL or BYTE_PIECE.fullmatch(token):
            continue
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in vocab and pair[1] in vocab and pair not in merges:
                raise _unequal(f"{pair[0]!r} and {pair[1]!r} are pieces, and never merged")
    return [-float(rank[token]) if token in rank else _ADDED_SCORE for token in tokens]


def _unequal(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer's merges are not those of SentencePiece ({reason}), so a GGUF file would "
        f"give other token ids; {_REMEDY}"
    )


__all__ = ["sentencepiece_metadata"]
