"""Texts and types of tokenizers to train, with this package and with sentencepiece."""

import io
import unicodedata

from easyllm.tokenizer.train_config import (
    BPEConfig,
    CharactersConfig,
    UnigramConfig,
    WordLevelConfig,
    WordPieceConfig,
)

CORPUS = [
    "The tokenizer is trained on 2,048 lines; each line isn't long, and some lines repeat.",
    "Lower, slower, newest, widest: the lowest and the newest were slower than the lower ones.",
    "Prices rose from 1999 to 2024 by 37.5% — from $12 to $16.50, says Mr. O'Neill's café naïvely.",
    "我们从头训练一个分词器，语料里有中文和英文。分词器把文本切成词元，词元再变成编号。",
    "今天的天气很好，我们去公园散步；明天的天气不好，我们在家训练模型。",
    "def train(texts):\n    for text in texts:\n        yield text.split()  # 注释 😀👩\u200d💻\n",
    "Ünïcödé wörds, ÀÉÎÕÜ, Ελληνικά, русский язык, हिन्दी, 한국어, العربية, ไทย.",
] * 4


KINDS = {
    "bpe": BPEConfig(),
    "wordpiece": WordPieceConfig(),
    "unigram": UnigramConfig(),
    "unigram without bytes": UnigramConfig(byte_fallback=False),
    "wordlevel": WordLevelConfig(),
    "characters": CharactersConfig(),
}


SP_CORPUS = [
    "the lowest and the newest were slower than the lower ones, says the café",
    "hello world, hello tokenizer: pieces, scores and ids; ids and pieces <abcdefx0123456789>",
    "我们从头训练一个分词器，语料里有中文和英文，我们去公园散步，今天的天气很好",
    "分词器把文本切成词元，词元再变成编号，明天的天气不好，我们在家训练模型",
    "emoji 😀 and 👩\u200d💻 and 🇨🇳, prices of $12 and 37.5% — Ｆｕｌｌ ｗｉｄｔｈ ﬁ ½",
] * 6


SP_TEXTS = [
    "the lowest and the newest, ids and pieces; 我们去公园散步，今天的天气很好",
    "The newest emoji 😀😀 ☃ are slower, 你好世界！我们明天去公园。",
    "  spaces   inside and around  ",
    "",
    " ",
    "tab\tand\nnew line\r\n",
    "ＡＢＣ　①㎏ ｶﾞ か\u3099 e\u0301 " + unicodedata.normalize("NFD", "ấ tiếng Việt"),
    "👩\u200d💻🇨🇳1️⃣ unseen: ქართული",
    "▁lower▁",
    "x" * 300 + "训练" * 100,
]


def sentencepiece_file(kind, **options):
    """Returns a model trained by sentencepiece itself: its processor, and the file's bytes."""
    import sentencepiece

    out = io.BytesIO()
    options = {"byte_fallback": True, "vocab_size": 420, "hard_vocab_limit": False} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SP_CORPUS),
        model_writer=out,
        model_type=kind,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue()), out.getvalue()
