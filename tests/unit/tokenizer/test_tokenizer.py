"""The tokenizer: ids of llama.cpp and Hugging Face, round trips, GGUF metadata and folders."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easyllm.core.errors import CheckpointError
from easyllm.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "smollm2_tokens.jsonl"
ROWS = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SPACE = "▁"
BYTES = [f"<0x{value:02X}>" for value in range(256)]
SCORES = (
    "▁:-100 h:-101 e:-102 l:-103 o:-104 w:-105 he:-1 ll:-0.6 lo:-0.8 el:-1.5 hell:-3 hello:-0.1 "
    "▁he:-3.5 ▁hello:-4 ow:-6 ▁w:-5 ▁▁:-7"
)
PIECES = {piece: float(score) for piece, score in (entry.split(":") for entry in SCORES.split())}


def sentencepiece_metadata(**changes):
    """Returns GGUF metadata of a small sentencepiece vocabulary."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * (3 + 256) + list(PIECES.values()),
        "tokenizer.ggml.token_type": [2, 3, 3, *([6] * 256), *([1] * len(PIECES))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def byte_level_metadata(**changes):
    """Returns GGUF metadata of a byte-level vocabulary without merges."""
    from tokenizers import pre_tokenizers

    tokens = ["<|end|>", "<|start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *([1] * 256)],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def merged_by_score(text):
    """Runs sentencepiece's algorithm: merges the adjacent pair of best score, leftmost first."""
    parts = list((SPACE + text).replace(" ", SPACE)) if text else []
    while True:
        pairs = [(PIECES[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in PIECES]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    pieces = []
    for part in parts:
        known = part in PIECES
        pieces += [part] if known else [BYTES[value] for value in part.encode("utf-8")]
    return pieces


def pieces_of(tokenizer, text):
    ids = tokenizer.encode(text, special_tokens=False)
    return [tokenizer.backend.id_to_token(i) for i in ids]


def test_ids_equal_llama_cpp(smollm2_tokenizer):
    assert len(ROWS) == 300
    wrong = [r["text"] for r in ROWS if smollm2_tokenizer.encode(r["text"]) != r["ids"]]
    assert not wrong


def test_an_exported_tokenizer_gives_transformers_the_same_ids(smollm2_folder):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(smollm2_folder)
    assert [reference(r["text"])["input_ids"] for r in ROWS] == [r["ids"] for r in ROWS]


def test_a_batch_encodes_as_its_texts_one_by_one(smollm2_tokenizer):
    texts = [row["text"] for row in ROWS[:50]]
    assert smollm2_tokenizer.encode_batch(texts) == [smollm2_tokenizer.encode(t) for t in texts]


@settings(deadline=None, max_examples=100)
@given(text=TEXTS)
def test_decoding_inverts_encoding(tiny_tokenizer, text):
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.sampled_from("aé ß世界한हिन😀👩\u200d💻🇨🇳\u0301\n\t0'<|>"), max_size=60))
def test_decoding_inverts_encoding_with_a_vocabulary_that_lacks_some_bytes(smollm2_tokenizer, text):
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=100)
@given(text=TEXTS)
def test_offsets_cover_the_text_in_order(tiny_tokenizer, text):
    ids, offsets = tiny_tokenizer.encode_with_offsets(text)
    assert len(ids) == len(offsets)
    covered = {i for a, b in offsets for i in range(a, b)}
    assert covered == set(range(len(text)))
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("text", ["\ud83d", "a\udfffb", "\udc00\ud800", "é\ud83d 世界"])
def test_lone_surrogates_become_question_marks(smollm2_tokenizer, text):
    expected = "".join("?" if "\ud800" <= c <= "\udfff" else c for c in text)
    ids = smollm2_tokenizer.encode(text)
    assert smollm2_tokenizer.decode(ids) == expected
    assert smollm2_tokenizer.encode_batch([text]) == [ids]
    assert smollm2_tokenizer.encode_with_offsets(text)[1][-1][1] == len(text)


def test_special_tokens_are_omitted_from_decoded_text_unless_requested(smollm2_tokenizer):
    ids = smollm2_tokenizer.encode("<|im_start|>user<|im_end|>")
    assert ids[0] in smollm2_tokenizer.special_ids
    assert smollm2_tokenizer.decode(ids) == "user"
    assert smollm2_tokenizer.decode(ids, skip_special=False) == "<|im_start|>user<|im_end|>"


@pytest.mark.parametrize("name", ["smollm2_tokenizer", "tiny_tokenizer"])
def test_a_saved_tokenizer_loads_back_equal(request, tmp_path, name):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    texts = [row["text"] for row in ROWS]
    assert again.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.special == tokenizer.special
    assert again.special_ids == tokenizer.special_ids
    assert again.max_seq_len == tokenizer.max_seq_len
    assert again.chat_template.source == tokenizer.chat_template.source


def test_different_tokenizers_have_different_fingerprints(smollm2_tokenizer, tiny_tokenizer):
    assert smollm2_tokenizer.fingerprint != tiny_tokenizer.fingerprint


def test_an_unknown_pre_tokenizer_is_refused_and_the_known_ones_named():
    with pytest.raises(
        CheckpointError,
        match=r"'deepseek-v9' is not known; known pre-tokenizers are .*smollm.*qwen2",
    ):
        Tokenizer.from_gguf(byte_level_metadata(pre="deepseek-v9"))


def test_an_unknown_kind_is_refused_and_the_known_ones_named():
    with pytest.raises(
        CheckpointError, match=r"'wordpiece' is not known; known types are gpt2 .* llama"
    ):
        Tokenizer.from_gguf(byte_level_metadata(model="wordpiece"))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "contains no tokenizer"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [1]}, "contains no tokenizer"),
        (byte_level_metadata(merges=["a"]), "merges are damaged"),
        (byte_level_metadata(merges=["a b"]), "vocabulary and merges disagree"),
        (sentencepiece_metadata(scores=[0.0]), "scores are damaged"),
    ],
)
def test_damaged_metadata_are_refused(metadata, message):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_gguf(metadata)


@settings(deadline=None, max_examples=100)
@given(text=TEXTS)
def test_bytes_without_merges_are_one_token_each(text):
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    assert len(tokenizer.encode(text)) == len(text.encode("utf-8"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("hello", [SPACE + "hello"]),
        ("hello hello", [SPACE + "hello", SPACE + "hello"]),
        ("hellohe", [SPACE + "hello", "he"]),
        ("ell", [SPACE, "e", "ll"]),
        ("é", [SPACE, "<0xC3>", "<0xA9>"]),
        ("h\n😀", [SPACE, "h", "<0x0A>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]),
        ("  w", [SPACE * 2, SPACE + "w"]),
        ("", []),
    ],
)
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(text, pieces):
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    assert pieces_of(tokenizer, text) == pieces
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from("helow é\n世"), max_size=24))
def test_sentencepiece_matches_a_naive_implementation(text):
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    assert pieces_of(tokenizer, text) == merged_by_score(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_without_a_space_prefix_adds_none():
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix=False))
    assert pieces_of(tokenizer, "hello") == ["hello"]
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


def test_sentencepiece_prepends_bos_by_default():
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    assert tokenizer.encode("hello")[0] == tokenizer.bos_id == 1
    assert 1 not in tokenizer.encode("hello", special_tokens=False)


@pytest.mark.parametrize("metadata", [sentencepiece_metadata, byte_level_metadata])
def test_bos_and_eos_are_added_once_if_the_file_requests_them(metadata):
    tokenizer = Tokenizer.from_gguf(metadata(add_bos_token=True, add_eos_token=True))
    plain = tokenizer.encode("hello", special_tokens=False)
    assert tokenizer.encode("hello") == [tokenizer.bos_id, *plain, tokenizer.eos_id]
    assert tokenizer.encode_batch(["hello"]) == [tokenizer.encode("hello")]
    none = Tokenizer.from_gguf(metadata(add_bos_token=False))
    assert none.encode("hello") == plain


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"])
def test_a_pre_tokenizer_may_imply_bos(pre):
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre=pre))
    plain = tokenizer.encode("Hello", special_tokens=False)
    assert tokenizer.encode("Hello") == [tokenizer.bos_id, *plain]
    without = Tokenizer.from_gguf(byte_level_metadata(pre=pre, add_bos_token=False))
    assert without.encode("Hello") == plain


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "smollm", "default", "chatglm-bpe"])
def test_most_pre_tokenizers_imply_no_bos(pre):
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre=pre))
    assert tokenizer.bos_id not in tokenizer.encode("Hello")


def words_of(tokenizer, text):
    return [word for word, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("changes", [{}, {"pre": "default"}])
def test_without_a_named_pre_tokenizer_text_is_split_like_llama_cpp(caplog, changes):
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(**changes))
    assert words_of(tokenizer, "Hello 12345!") == ["Hello", "Ġ", "123", "45", "!"]
    assert words_of(tokenizer, "x=1 a$b") == ["x", "=", "1", "Ġa", "$", "b"]
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == (0 if changes else 1)
    assert all("tokenizer.ggml.pre" in message for message in warned)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["ab", "Ġ12345"]),
        ("smollm", ["ab", "Ġ", "1", "2", "3", "4", "5"]),
        ("llama-bpe", ["ab", "Ġ", "123", "45"]),
        ("deepseek-r1-qwen", ["ab", "Ġ", "1", "2", "3", "4", "5"]),
        ("tekken", ["ab", "Ġ", "1", "2", "3", "4", "5"]),
    ],
)
def test_each_pre_tokenizer_has_its_own_splitting_of_digits(pre, words):
    assert words_of(Tokenizer.from_gguf(byte_level_metadata(pre=pre)), "ab 12345") == words


def test_tekken_splits_at_a_change_of_case():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre="tekken"))
    assert words_of(tokenizer, "aBc DE/f") == ["a", "Bc", "ĠDE", "/f"]


def test_ids_omitted_by_a_sentencepiece_file_get_their_defaults():
    metadata = sentencepiece_metadata()
    for kind in ("bos", "eos", "unknown"):
        del metadata[f"tokenizer.ggml.{kind}_token_id"]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert (tokenizer.special.bos, tokenizer.special.eos, tokenizer.special.unk) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    assert tokenizer.encode("hello")[0] == 1


@pytest.mark.parametrize("text", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"])
def test_an_end_of_turn_is_a_special_token_regardless_of_the_file(text):
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], text]
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.token_type": [3, 3, *[1] * 257]})
    (index,) = tokenizer.encode(text)
    assert index in tokenizer.special_ids


def test_a_gguf_file_may_contain_several_chat_templates():
    templates = {"": "plain", ".tool_use": "tools", ".rag": "rag"}
    metadata = {f"tokenizer.chat_template{name}": text for name, text in templates.items()}
    tokenizer = Tokenizer.from_gguf(byte_level_metadata() | metadata)
    tools = [{"type": "function", "function": {"name": "look"}}]
    messages = [{"role": "user", "content": "go"}]
    assert tokenizer.encode_chat(messages).text == "plain"
    assert tokenizer.encode_chat(messages, tools=tools).text == "tools"
    assert tokenizer.template_sources == {"default": "plain", "tool_use": "tools", "rag": "rag"}
    assert Tokenizer.from_gguf(byte_level_metadata()).chat_template is None


def test_an_added_bos_survives_saving(tmp_path):
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(add_bos_token=True))
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode("hello") == tokenizer.encode("hello")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"contains neither tokenizer\.json nor tokenizer\.model"
    ):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(tiny_tokenizer, tmp_path, name):
    tiny_tokenizer.save(tmp_path)
    (tmp_path / name).write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_tokenizer_config_has_no_special_tokens(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_id is None
    assert tokenizer.encode("hello") == tiny_tokenizer.encode("hello")


def test_special_tokens_written_as_dicts_are_read(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path)
    config = {
        "eos_token": {"content": "<|im_end|>", "lstrip": False, "special": True},
        "bos_token": "<|im_start|>",
        "unk_token": None,
        "model_max_length": 1e30,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special.eos == "<|im_end|>"
    assert tokenizer.eos_id == tiny_tokenizer.eos_id
    assert tokenizer.special.bos == "<|im_start|>"
    assert tokenizer.special.unk is None
    assert tokenizer.max_seq_len is None


def test_the_default_of_several_named_templates_is_used(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    config = json.dumps({"chat_template": named})
    (tmp_path / "tokenizer_config.json").write_text(config, encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).chat_template.source == "yes"


def test_truncation_and_padding_stored_in_a_file_are_ignored(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(saved), encoding="utf-8")
    text = "hello world good morning"
    assert Tokenizer.from_folder(tmp_path).encode(text) == tiny_tokenizer.encode(text)
