"""Training tokenizers: bytes per token by vocabulary size, and what normalisation loses."""

from typing import ClassVar

from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_texts import small_texts
from easyllm.tokenizer.report import report
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.tokenizer.train import train_tokenizer
from easyllm.tokenizer.train_config import (
    BPEConfig,
    NormalizerConfig,
    TokenizerConfig,
    UnigramConfig,
    WordPieceConfig,
)

HARD = ("Café déjà vu", "emoji 🙂 and 👩‍👩‍👧", "混合 text 2024", "\u0000\u200bodd", "Ångström  two")


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"texts": 20, "sizes": (300, 400)}

    texts: PositiveInt = Field(default=400, ge=10, le=20000, description="Training texts.")
    sizes: tuple[PositiveInt, ...] = Field(
        default=(300, 350, 400, 500, 600, 800),
        min_length=2,
        max_length=10,
        description="Vocabulary sizes to train, each at least 270.",
    )


def run(parameters: Parameters) -> Result:
    """Trains tokenizers of several sizes and kinds, and encodes texts that they have not seen."""
    english = small_texts(parameters.texts, parameters.seed)
    chinese = small_texts(parameters.texts, parameters.seed, chinese=True)
    both = [*english, *chinese]
    unseen = {
        "English": small_texts(40, parameters.seed + 1),
        "Chinese": small_texts(40, parameters.seed + 1, chinese=True),
    }
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in unseen}
    for size in parameters.sizes:
        tokenizer = train_tokenizer(both, TokenizerConfig(vocab_size=size))
        found = report({"bpe": tokenizer}, unseen)
        for figures in found.texts:
            curves[figures.domain].append((float(size), figures.bytes_per_token))
    largest = max(parameters.sizes)
    plain = train_tokenizer(both, TokenizerConfig(vocab_size=largest))
    article = train_tokenizer(
        both,
        TokenizerConfig(
            vocab_size=largest,
            normalizer=NormalizerConfig(form="nfd", strip_accents=True),
            model=BPEConfig(whitespace=True, punctuation=True, digits="individual", pattern=None),
        ),
    )
    kinds = {
        "wordpiece": train_tokenizer(
            english, TokenizerConfig(vocab_size=largest, model=WordPieceConfig())
        ),
        "unigram": train_tokenizer(
            english, TokenizerConfig(vocab_size=largest, model=UnigramConfig())
        ),
    }
    hard = [*HARD, *unseen["Chinese"][:5]]
    kept = {"byte-level BPE": _kept(plain, hard), "the article's chain": _kept(article, hard)}
    kept |= {name: _kept(tokenizer, hard) for name, tokenizer in kinds.items()}
    last = {name: points[-1][1] for name, points in curves.items()}
    return Result(
        numbers=[
            *(
                number(
                    f"bytes_per_token_{name.lower()}",
                    value,
                    f"bytes per token with {largest} tokens, {name}",
                    f"词表 {largest} 时的字节/词元，{'英文' if name == 'English' else '中文'}",
                )
                for name, value in last.items()
            ),
            *(
                number(
                    f"kept_{name.replace(' ', '_').lower()}",
                    value,
                    f"of {len(hard)} hard texts decoded unchanged, {name}",
                    f"{len(hard)} 段困难文本中原样解码的个数，{_ZH[name]}",
                )
                for name, value in kept.items()
            ),
        ],
        figures=[
            Lines(
                title="Byte-level BPE by vocabulary size",
                x="vocabulary",
                y="bytes per token",
                lines=curves,
                marks=True,
            )
        ],
        claims=[
            claim(
                (
                    "The article (zhihu 625715830): byte-level BPE has 256 bytes as its alphabet, "
                    "so no text is unknown; its chain is NFD, StripAccents, Whitespace, "
                    "Punctuation, Digits, ByteLevel.",
                    "文章（知乎 625715830）：字节级 BPE 以 256 个字节为字母表，没有未知文本；"
                    "其流程为 NFD、StripAccents、Whitespace、Punctuation、Digits、ByteLevel。",
                ),
                (
                    f"Byte-level BPE restores {kept['byte-level BPE']} of {len(hard)} hard texts, "
                    f"the article's chain {kept[_ARTICLE]}: it drops accents and white space.",
                    f"字节级 BPE 还原 {len(hard)} 段中的 {kept['byte-level BPE']} 段，"
                    "文章的流程还原 "
                    f"{kept[_ARTICLE]} 段：它丢弃重音与空白。",
                ),
                "reproduced" if kept["byte-level BPE"] == len(hard) > kept[_ARTICLE] else "not",
            )
        ],
    )


_ARTICLE = "the article's chain"
_ZH = {
    "byte-level BPE": "字节级 BPE",
    _ARTICLE: "文章的流程",
    "wordpiece": "WordPiece",
    "unigram": "unigram",
}


def _kept(tokenizer: Tokenizer, texts: list[str]) -> int:
    return sum(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)


LAB = Lab(
    name="tokenizer-training",
    rows=(3,),
    chapter="tokens",
    title=Text("Training a tokenizer", "从头训练分词器"),
    seconds=10,
    parameters=Parameters,
    run=run,
)
