"""Small tokenizers of every kind whose added tokens have every combination of options."""

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from easyllm.tokenizer import SpecialTokens, Tokenizer

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<think>", "</think>")
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and im_start comes before im_end.",
    "<tool_call> a call of a tool </tool_call> <think> | <|> user assistant system",
    "0123456789 你好，世界 hello world good morning\n\nwhat which where how many",
] * 4


def _byte_level():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _ignoring_merges():
    """Like Llama 3's: a whole word of the vocabulary is not built by merges."""
    backend = _byte_level()
    backend.model.ignore_merges = True
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    return backend


def _legacy_llama():
    """Like Llama 2's: each stretch between special tokens begins with a space."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL), show_progress=False)
    backend.train_from_iterator([t.replace(" ", "▁") for t in TEXTS], trainer)
    return backend


def _first_space():
    """Like Mistral's: only the beginning of the text begins with a space."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL), show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _unigram():
    """Like T5's: the names of special tokens are pieces of the model, too."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _word_piece():
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=list(SPECIAL), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


BACKENDS = {
    "byte-level": _byte_level,
    "ignoring merges": _ignoring_merges,
    "legacy llama": _legacy_llama,
    "first space": _first_space,
    "unigram": _unigram,
    "word piece": _word_piece,
}
OPTIONS = {
    "plain": {},
    "normalized": {"normalized": True},
    "stripping": {"lstrip": True, "rstrip": True, "normalized": False},
    "single word": {"single_word": True, "normalized": False},
}


def build(kind, options="plain", *, template=None):
    """Returns a tokenizer whose special tokens and markup have the given options."""
    backend = BACKENDS[kind]()
    chosen = OPTIONS[options]
    backend.add_special_tokens([AddedToken(t, special=True, **chosen) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, **chosen) for t in MARKUP])
    backend.add_tokens(["morning", "<h1>", AddedToken("\n\n", normalized=False)])
    special = SpecialTokens(bos="<s>", eos="<|im_end|>", unk="<unk>")
    return Tokenizer(backend, special, chat_template=template)
