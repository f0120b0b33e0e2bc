"""Tokenizers and chat formats of Baichuan and ChatGLM against what their authors' code does.

The SentencePiece models are trained here; the authors' steps around them are written out.
"""

import json

import pytest

from easyllm.models import load_tokenizer
from tokenizer_training import sentencepiece_file

BLANKS = [f"<|blank_{n}|>" for n in range(2, 81)]
ICE_SYMBOLS = ["<n>", "<|tab|>", *BLANKS]
TEXTS = ["hello world", "你好，世界\nids\tand    pieces   ", "a\n\n\nb", "x" + " " * 100 + "y"]
USER, ASSISTANT = "<reserved_106>", "<reserved_107>"
HISTORY = [
    {"role": "user", "content": "hello world"},
    {"role": "assistant", "content": "我们去公园散步"},
    {"role": "user", "content": "ids and pieces"},
]


def folder_of(tmp_path, kind, name, data, **config):
    (tmp_path / name).write_bytes(data)
    values = {"tokenizer_class": kind, **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.fixture(scope="module")
def ice():
    return sentencepiece_file(
        "bpe",
        vocab_size=600,
        user_defined_symbols=ICE_SYMBOLS,
        control_symbols=["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"],
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=3,
    )


@pytest.fixture(scope="module")
def plain():
    return sentencepiece_file(
        "bpe", remove_extra_whitespaces=False, normalization_rule_name="identity"
    )


def ice_ids(processor, text):
    """Returns the ids of ChatGLM-6B's tokenizer without special tokens."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for count in range(80, 1, -1):
        text = text.replace(" " * count, f"<|blank_{count}|>")
    return processor.encode(text)


def test_the_tokenizer_of_chatglm(tmp_path, ice):
    processor, data = ice
    tok = load_tokenizer(folder_of(tmp_path, "ChatGLMTokenizer", "ice_text.model", data))
    masks = [processor.piece_to_id(piece) for piece in ("[gMASK]", "<sop>")]
    for text in TEXTS:
        assert tok.encode(text, special_tokens=False) == ice_ids(processor, text)
        assert tok.encode(text) == ice_ids(processor, text) + masks
        assert tok.decode(tok.encode(text)) == text
    assert tok.special.eos == "<eop>"

    one = tok.encode_chat(HISTORY[:1], add_generation_prompt=True).token_ids
    assert one == ice_ids(processor, "hello world") + masks
    prompt = "[Round 0]\n问：hello world\n答：我们去公园散步\n[Round 1]\n问：ids and pieces\n答："
    ids = tok.encode_chat(HISTORY, add_generation_prompt=True).token_ids
    assert ids == ice_ids(processor, prompt) + masks
    answered = tok.encode_chat(HISTORY[:2]).token_ids
    assert answered[: len(one)] == one
    assert answered[-1] == tok.eos_id


@pytest.mark.parametrize("roles", [False, True], ids=["chatglm2", "chatglm3"])
def test_the_tokenizer_of_chatglm2_and_3(tmp_path, plain, roles):
    processor, data = plain
    size = processor.get_piece_size()
    named = {"additional_special_tokens": ["<|user|>", "<|observation|>"]} if roles else {}
    tok = load_tokenizer(folder_of(tmp_path, "ChatGLMTokenizer", "tokenizer.model", data, **named))
    start = [size + 1, size + 3]  # after [MASK]: [gMASK], [sMASK], sop, eop
    assert tok.encode("hello world") == start + processor.encode("hello world")
    assert tok.special.eos == "</s>"
    assert (tok.id_of("<|user|>") == size + 6) is roles
    ids = tok.encode_chat(HISTORY, add_generation_prompt=True).token_ids
    if not roles:
        prompt = "[Round 1]\n\n问：hello world\n\n答：我们去公园散步\n\n"
        prompt += "[Round 2]\n\n问：ids and pieces\n\n答："
        assert ids == start + processor.encode(prompt)
        return
    role_ids = {"system": size + 5, "user": size + 6, "assistant": size + 7}
    expected = list(start)
    for message in HISTORY:
        expected += [role_ids[message["role"]], *processor.encode("\n")]
        expected += processor.encode(message["content"])
    assert ids == [*expected, role_ids["assistant"]]


def test_the_chat_format_of_baichuan(tmp_path):
    processor, data = sentencepiece_file(
        "bpe",
        control_symbols=[USER, ASSISTANT],
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    )
    folder = folder_of(tmp_path, "BaichuanTokenizer", "tokenizer.model", data, add_bos_token=False)
    assert load_tokenizer(folder).chat_template is None  # a base model
    user, assistant = (processor.piece_to_id(piece) for piece in (USER, ASSISTANT))
    roles = {"user_token_id": user, "assistant_token_id": assistant}
    (folder / "generation_config.json").write_text(json.dumps(roles))
    tok = load_tokenizer(folder)
    expected = processor.encode("the lowest")
    for message in HISTORY:
        expected.append(roles[f"{message['role']}_token_id"])
        expected += processor.encode(message["content"])
    messages = [{"role": "system", "content": "the lowest"}, *HISTORY]
    ids = tok.encode_chat(messages, add_generation_prompt=True).token_ids
    assert ids == [*expected, assistant]
