"""Token sequences on which an exported model is compared with what it was made from.

The built-in passages were written for this purpose, so no model was trained on them: prose in
English and in Chinese, code, numbers and a conversation.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from easyllm.core.errors import DataError, read_failure
from easyllm.tokenizer.tokenizer import Tokenizer

PASSAGES = (
    "The ferry left the harbour at half past six, when the last of the fog had lifted from the "
    "breakwater. Two engineers stood at the rail and argued about the bridge that would replace "
    "it: one had measured the tides for eleven years, the other had only seen the drawings. “A "
    "bridge does not wait for the weather,” said the younger one. “No,” answered the other, “but "
    "the weather will not wait for a bridge either.” Below them the water turned from grey to "
    "green, and a child counted the gulls aloud until there were too many of them.",
    "清晨的集市比往常安静。卖豆腐的老人把木板擦了两遍，才发现忘了带秤。邻摊的姑娘笑着把自己的借给他，"
    "说：“今天先用我的，明天记得还。”河对岸的工厂已经停产三年，烟囱上住着一窝白鹭。据镇上的记录，"
    "二〇一九年这里还有四千二百名工人，如今只剩下不到三百人看守设备、修理管道。雨停以后，孩子们沿着"
    "铁轨往学校走，一边走一边背昨天学的课文。",
    "def moving_average(values: list[float], width: int) -> list[float]:\n"
    '    """Returns the mean of each window of `width` values."""\n'
    "    if width < 1 or width > len(values):\n"
    '        raise ValueError(f"width={width} is not between 1 and {len(values)}")\n'
    "    total = sum(values[:width])\n"
    "    means = [total / width]\n"
    "    for old, new in zip(values, values[width:]):\n"
    "        total += new - old\n"
    "        means.append(total / width)\n"
    "    return means\n",
    "Quarter, revenue (million), change\nQ1, 12.75, +3.1%\nQ2, 13.02, +2.1%\nQ3, 11.48, -11.8%\n"
    "Q4, 14.96, +30.3%\n\nThe third quarter was weak because a warehouse was closed for 19 days; "
    "without it, revenue would have been about 13.4 million.",
    "User: How do I keep bread from going stale?\nAssistant: Wrap it in a cloth and keep it at "
    "20 °C or so; the refrigerator makes it stale faster, because starch recrystallises "
    "quickly at about 4 °C. Slices can be frozen and toasted directly.\nUser: 那馒头呢？\n"
    "Assistant: 馒头可以冷冻保存，吃之前直接上锅蒸八到十分钟，不用解冻。",
)
MAX_TOKENS, LONGEST, SHORT = 2048, 256, 64
"""The most tokens of a comparison, of a sequence, and of a single passage."""
MAX_CHARACTERS = 2**18
"""The most characters that are read of a file: far more than the tokens above have."""
MAX_LOGIT_BYTES = 2**28
"""The logits of two models are kept in memory, in fp32; with a large vocabulary, fewer tokens are
compared."""


@dataclass(frozen=True, slots=True)
class GateText:
    """The sequences of a comparison.

    Attributes:
        sequences: token ids of each sequence.
        source: where they come from, with the reason if they are random.
    """

    sequences: tuple[tuple[int, ...], ...]
    source: str

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences."""
        return sum(map(len, self.sequences))


def gate_text(
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    max_seq_len: int,
    path: Path | None = None,
    seed: int = 0,
) -> GateText:
    """Returns the sequences to compare models on.

    Random token ids are used without a tokenizer, or if over half of the text is unknown to it.

    Args:
        tokenizer: the models' tokenizer.
        vocab_size: number of the models' token ids.
        max_seq_len: longest sequence that the models support.
        path: a text file in UTF-8, of which the first 2,048 tokens are used; None uses the
            built-in passages.
        seed: seed of random token ids.

    Raises:
        DataError: the file cannot be read as text, or is empty.
    """
    longest = max(1, min(LONGEST, max_seq_len - 1))  # an engine needs space for one more token
    limit = max(longest, min(MAX_TOKENS, MAX_LOGIT_BYTES // (4 * vocab_size)))
    passages = PASSAGES if path is None else (read_text(path),)
    source = "built-in text" if path is None else str(path)
    if tokenizer is None:
        return _random(limit, longest, vocab_size, seed, "the base has no tokenizer")
    encoded = [tokenizer.encode(passage) for passage in passages]
    every = [token for ids in encoded for token in ids]
    unknown = tokenizer.id_of(tokenizer.special.unk)
    if not every or 2 * sum(token == unknown for token in every) > len(every):
        reason = f"the tokenizer does not know over half of {source}"
        return _random(limit, longest, vocab_size, seed, reason)
    if max(every) >= vocab_size:
        reason = f"the tokenizer has ids that the model lacks, such as {max(every)}"
        return _random(limit, longest, vocab_size, seed, reason)
    if path is None:  # one long sequence of all passages, and each of them alone
        ids = [every[:longest], *(ids[: min(SHORT, longest)] for ids in encoded)]
    else:
        ids = [every[i : i + longest] for i in range(0, len(every), longest)]
    return GateText(_cut(ids, limit), source)


def _cut(sequences: list[list[int]], limit: int) -> tuple[tuple[int, ...], ...]:
    """Returns the first `limit` tokens, without empty sequences."""
    found, left = [], limit
    for ids in sequences:
        if part := tuple(ids[:left]):
            found.append(part)
        left -= len(part)
    return tuple(found)


def _random(limit: int, longest: int, vocab_size: int, seed: int, reason: str) -> GateText:
    generator = torch.Generator().manual_seed(seed)
    count = min(limit, 2 * longest)
    ids = torch.randint(0, vocab_size, (count,), generator=generator).split(longest)
    return GateText(
        tuple(tuple(part.tolist()) for part in ids), f"random token ids (seed {seed}): {reason}"
    )


def read_text(path: Path) -> str:
    """Returns the beginning of a text file, of which no more is compared.

    Raises:
        DataError: the file cannot be read as text, or is empty.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the text {str(path)!r} cannot be read ({read_failure(error)}); give a text file in "
            "UTF-8"
        ) from None
    if not text.strip():
        raise DataError(f"the text {str(path)!r} is empty; give a file with some paragraphs")
    return text


__all__ = ["GateText", "gate_text", "read_text"]
