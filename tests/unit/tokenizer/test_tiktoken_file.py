"""Vocabularies of tiktoken, as GLM-4-9B has them, against the algorithm written out."""

import base64
import itertools
import json

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from easyllm.core.errors import CheckpointError
from easyllm.models import load_tokenizer
from easyllm.tokenizer.to_gguf import tokenizer_metadata
from easyllm.tokenizer.token_bytes import byte_values
from easyllm.tokenizer.train import train_tokenizer
from easyllm.tokenizer.train_config import BPEConfig, TokenizerConfig
from tokenizer_training import CORPUS

PATTERN = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|user|>"]
TEXTS = [*CORPUS[:7], "  two  spaces\n\n", "x86_64 v2.0.1 1234567", "it's I'LL", "", "\r\n\t"]


def ranks_of():
    """Ranks of the single bytes and of the merges of a tokenizer that is trained here."""
    trained = train_tokenizer(CORPUS, TokenizerConfig(model=BPEConfig(), vocab_size=600))
    letters = byte_values()
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in json.loads(trained.backend.to_str())["model"]["merges"]:
        token = bytes(letters[c] for c in left + right)
        ranks.setdefault(token, len(ranks))
    return ranks


def pieces_of(text, ranks):
    """The ids of a text, by the algorithm of tiktoken."""
    found = []
    for piece in PATTERN.findall(text):
        whole = piece.encode()
        parts = [whole] if whole in ranks else [whole[i : i + 1] for i in range(len(whole))]
        while len(parts) > 1:
            joined = [ranks.get(a + b, 1 << 30) for a, b in itertools.pairwise(parts)]
            at = joined.index(min(joined))
            if joined[at] == 1 << 30:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found += [ranks[part] for part in parts]
    return found


def written(folder, ranks, **config):
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items())
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    first = len(ranks)
    values = {
        "tokenizer_class": "ChatGLM4Tokenizer",
        "added_tokens_decoder": {
            str(first + n): {"content": text, "special": True} for n, text in enumerate(SPECIAL)
        },
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": "[gMASK]<sop>{% for m in messages %}<|user|>\n{{ m.content }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values | config))
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    ranks = ranks_of()
    return ranks, load_tokenizer(written(tmp_path_factory.mktemp("glm4"), ranks))


def test_the_tokenizer_of_glm4(both, tmp_path):
    ranks, tok = both
    assert len(ranks) > 500
    masks = [tok.id_of("[gMASK]"), tok.id_of("<sop>")]
    assert masks == [len(ranks) + 2, len(ranks) + 4]
    for text in TEXTS:
        assert tok.encode(text, special_tokens=False) == pieces_of(text, ranks)
        assert tok.encode(text) == masks + pieces_of(text, ranks)
        assert tok.decode(tok.encode(text)) == text
    assert (tok.special.eos, tok.vocab_size) == ("<|endoftext|>", len(ranks) + len(SPECIAL))
    ids = tok.encode_chat([{"role": "user", "content": "hello"}]).token_ids
    assert ids == [*masks, tok.id_of("<|user|>"), *pieces_of("\nhello", ranks)]
    tok.save(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert [again.encode(text) for text in TEXTS] == [tok.encode(text) for text in TEXTS]
    assert tokenizer_metadata(tok, tok.vocab_size)["tokenizer.ggml.pre"] in ("llama-bpe", "glm4")


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from("the lowr我们训练公园😀é①  \t\n,.'s12"), max_size=40))
def test_any_text_has_the_ids_of_the_algorithm(both, text):
    ranks, tok = both
    assert tok.encode(text, special_tokens=False) == pieces_of(text, ranks)


def test_damaged_files_and_unknown_classes_are_refused(tmp_path):
    ranks = ranks_of()
    with pytest.raises(CheckpointError, match="does not say how text is split"):
        load_tokenizer(written(tmp_path, ranks, tokenizer_class="OtherTokenizer"))
    file = written(tmp_path, ranks) / "tokenizer.model"
    lines = file.read_bytes().splitlines(keepends=True)
    for damaged, words in (
        ([*lines[:9], b"???\n", *lines[10:]], "line 10 of .* is damaged"),
        ([*lines[:9], *lines[10:]], "line 10 of .* is damaged"),
        ([lines[0], lines[0], *lines[2:]], "line 2 of .* is damaged"),
        (lines[:200], "lacks 56 of the 256 single bytes"),
    ):
        file.write_bytes(b"".join(damaged))
        with pytest.raises(CheckpointError, match=words):
            load_tokenizer(tmp_path)
