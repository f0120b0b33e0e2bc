"""Tokenizer folders are read like transformers: `tokenizer.json`, other files, sentencepiece."""

import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from easyllm.core.errors import CheckpointError, DataError
from easyllm.models import load_model, load_tokenizer, save_model
from easyllm.tokenizer import SpecialTokens, Tokenizer
from tokenizer_training import SP_TEXTS, sentencepiece_file

FAST = "PreTrainedTokenizerFast"
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
TEXTS = [
    "hello <|tool|> world",
    "a<|tool|>b <s>c</s> ",
    "good morning<|endoftext|><|im_end|>",
    " the quick <|x|> brown ",
    "",
]


@pytest.fixture
def plain(tiny_tokenizer):
    """A copy of the tiny tokenizer's backend with `<s>` and `</s>` as plain tokens."""
    backend = Backend.from_str(tiny_tokenizer.backend.to_str())
    backend.add_tokens(["<s>", "</s>"])
    return backend


@pytest.fixture
def folder(tmp_path, plain):
    """Writes a folder: the backend, `config` as tokenizer_config.json, and other files by name."""

    def write(tokenizer_config, **files):
        plain.save(str(tmp_path / "tokenizer.json"))
        files["tokenizer_config"] = tokenizer_config
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return write


def agree(folder):
    """Returns both tokenizers after checking that ids and special tokens are equal."""
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.encode(text, special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(ours.special, role) == getattr(theirs, f"{role}_token"), role
    assert ours.vocab_size == len(theirs)
    return ours, theirs


# ---- tokens and flags outside tokenizer.json


def test_an_added_token_outside_tokenizer_json_is_one_id(folder, plain):
    number = plain.get_vocab_size()
    token = {"content": "<|tool|>", "special": True, **FLAGS}
    path = folder({"tokenizer_class": FAST, "added_tokens_decoder": {str(number): token}})
    ours, _ = agree(path)
    assert ours.encode("<|tool|>") == [number]
    assert number in ours.special_ids
    assert ours.decode([number]) == ""
    ours.save(path / "again")
    again = Tokenizer.from_folder(path / "again")
    assert again.encode("<|tool|>") == [number]
    assert again.fingerprint == ours.fingerprint


def test_flags_of_an_added_token_are_honoured(folder, plain):
    number = plain.get_vocab_size()
    token = {"content": "<|tool|>", "special": False, **FLAGS, "lstrip": True, "rstrip": True}
    changed = {"content": "<|im_end|>", "special": False, **FLAGS}
    decoder = {str(number): token, str(plain.token_to_id("<|im_end|>")): changed}
    ours, _ = agree(folder({"tokenizer_class": FAST, "added_tokens_decoder": decoder}))
    assert ours.encode("a <|tool|> b") == [*ours.encode("a"), number, *ours.encode("b")]
    assert plain.token_to_id("<|im_end|>") not in ours.special_ids


def test_the_older_files_also_define_tokens(folder, plain):
    number = plain.get_vocab_size()
    added = {"<|tool|>": number, "<|x|>": number + 1}
    special = {"eos_token": "</s>", "additional_special_tokens": ["<|x|>"]}
    ours, _ = agree(
        folder({"tokenizer_class": FAST}, added_tokens=added, special_tokens_map=special)
    )
    assert ours.encode("<|tool|><|x|>") == [number, number + 1]
    assert number + 1 not in ours.special_ids  # as in transformers, which shows it
    assert number not in ours.special_ids


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_additional_special_tokens_of_the_configuration_are_added(folder, plain, key):
    number = plain.get_vocab_size()
    ours, _ = agree(folder({"tokenizer_class": FAST, key: ["<|tool|>", "<|x|>"]}))
    assert ours.encode("<|x|><|tool|>") == [number + 1, number]


def test_a_pad_token_missing_from_the_vocabulary_is_added(folder, plain):
    ours, _ = agree(folder({"tokenizer_class": FAST, "pad_token": "[PAD]"}))
    assert ours.pad_id == plain.get_vocab_size()


def test_an_added_token_with_another_id_is_refused(folder, plain):
    number = plain.get_vocab_size()
    token = {"content": "<|tool|>", "special": True, **FLAGS}
    path = folder({"added_tokens_decoder": {str(number + 5): token}})
    with pytest.raises(CheckpointError, match=f"'<|tool|>' the id {number + 5}.*{number}"):
        Tokenizer.from_folder(path)


@pytest.mark.parametrize(
    "entries", [["<|tool|>"], {"400": 7}, {"x": {"content": "<|tool|>"}}, {"400": {}}]
)
def test_damaged_added_tokens_are_refused(folder, entries):
    with pytest.raises(CheckpointError, match="copy"):
        Tokenizer.from_folder(folder({"added_tokens_decoder": entries}))


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_tokenizer_json_determines_what_encoding_adds(folder, plain, flags):
    plain.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", plain.token_to_id("<s>"))]
    )
    config = {"tokenizer_class": FAST, "bos_token": "<s>", "eos_token": "</s>"}
    ours, _ = agree(folder(config | flags))
    assert ours.encode("hello") == [ours.bos_id, *ours.encode("hello", special_tokens=False)]


def test_a_prefix_space_and_plain_special_tokens_are_supported(folder, tmp_path):
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    ours = Tokenizer.from_folder(folder(config))
    assert ours.encode("hello") == ours.encode(" hello")
    ours = Tokenizer.from_folder(folder({"tokenizer_class": FAST, "split_special_tokens": True}))
    assert len(ours.encode("<|im_end|>")) > 1
    ours.save(tmp_path / "again")
    again = Tokenizer.from_folder(tmp_path / "again")
    assert again.encode("<|im_end|>") == ours.encode("<|im_end|>")


# ---- special tokens in other files and by class


def test_special_tokens_in_a_separate_file_are_read(folder):
    config = {"tokenizer_class": FAST, "chat_template": "{{ messages[0].content }}{{ eos_token }}"}
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>", **FLAGS}}
    ours, _ = agree(folder(config, special_tokens_map=special))
    assert ours.special == SpecialTokens(bos="<s>", eos="</s>")
    assert {ours.bos_id, ours.eos_id} <= ours.special_ids
    chat = ours.encode_chat([{"role": "user", "content": "hi"}])
    assert chat.text == "hi</s>"
    assert chat.token_ids[-1] == ours.eos_id


def test_the_special_tokens_file_takes_precedence_unless_the_configuration_lists_added_tokens(
    folder,
):
    config = {"tokenizer_class": FAST, "eos_token": "<|im_end|>"}
    ours, _ = agree(folder(config, special_tokens_map={"eos_token": "</s>"}))
    assert ours.special.eos == "</s>"
    config |= {"added_tokens_decoder": {}}
    ours, _ = agree(folder(config, special_tokens_map={"eos_token": "</s>"}))
    assert ours.special.eos == "<|im_end|>"


@pytest.mark.parametrize(
    ("config", "model", "expected"),
    [
        (
            {"model_max_length": 1024},
            {"model_type": "gpt2"},
            SpecialTokens(bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>"),
        ),
        (
            {"tokenizer_class": "GPT2TokenizerFast"},
            {},
            SpecialTokens(bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>"),
        ),
        (
            {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"},
            {},
            SpecialTokens(eos="<|im_end|>", unk="<|endoftext|>", pad="<|endoftext|>"),
        ),
        (
            {},
            {"model_type": "qwen3"},
            SpecialTokens(eos="<|endoftext|>", unk="<|endoftext|>", pad="<|endoftext|>"),
        ),
        (
            {"tokenizer_class": "GPT2Tokenizer", "bos_token": None},
            {},
            SpecialTokens(eos="<|endoftext|>", unk="<|endoftext|>"),
        ),
        ({"tokenizer_class": FAST}, {"model_type": "llama"}, SpecialTokens()),
        ({}, {"model_type": "glm4"}, SpecialTokens()),
    ],
)
def test_a_class_has_its_own_special_tokens(folder, config, model, expected):
    files = {"config": model} if model else {}
    path = folder(config, **files)
    assert Tokenizer.from_folder(path).special == expected
    theirs = AutoTokenizer.from_pretrained(path)
    assert [theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.unk_token] == [
        expected.bos,
        expected.eos,
        expected.pad,
        expected.unk,
    ]


def byte_level(*special):
    """Returns a byte-level backend whose vocabulary has only these special tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world hello there"] * 5, trainer)
    return backend


BYTE_LEVEL_CLASSES = {
    "GPT2Tokenizer": SpecialTokens(bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>"),
    "CodeGenTokenizer": SpecialTokens(
        bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>"
    ),
    "GPTNeoXTokenizerFast": SpecialTokens(
        bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>", pad="<|padding|>"
    ),
    "Qwen2TokenizerFast": SpecialTokens(
        eos="<|endoftext|>", unk="<|endoftext|>", pad="<|endoftext|>"
    ),
    "CohereTokenizerFast": SpecialTokens(
        bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", unk="<UNK>", pad="<PAD>"
    ),
    "RobertaTokenizerFast": SpecialTokens(bos="<s>", eos="</s>", unk="<unk>", pad="<pad>"),
    "BartTokenizer": SpecialTokens(bos="<s>", eos="</s>", unk="<unk>", pad="<pad>"),
    "LlamaTokenizer": SpecialTokens(),
    "LlamaTokenizerFast": SpecialTokens(),
}


@pytest.mark.parametrize("present", [(), ("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>")])
@pytest.mark.parametrize("kind", BYTE_LEVEL_CLASSES)
def test_a_class_adds_the_tokens_missing_from_its_vocabulary(tmp_path, kind, present):
    byte_level(*present).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    ours, theirs = agree(tmp_path)
    assert ours.special == BYTE_LEVEL_CLASSES[kind]
    for token in {*theirs.all_special_tokens, "<s>", "</s>"}:
        text = f"hello {token} world"
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "config", [{"add_prefix_space": True}, {"cls_token": "[C]"}, {"sep_token": "hello"}]
)
def test_the_tokens_a_class_adds_around_a_text_follow_the_configuration(tmp_path, config):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    written = json.dumps({"tokenizer_class": "RobertaTokenizer", **config})
    (tmp_path / "tokenizer_config.json").write_text(written)
    ours, theirs = agree(tmp_path)
    ids = ours.encode("world")
    assert [ids[0], ids[-1]] == [theirs.cls_token_id, theirs.sep_token_id]


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ({"additional_special_tokens": ["[TOK]"]}, True),
        ({"extra_special_tokens": ["[TOK]"]}, False),
        ({"pad_token": "[TOK]"}, False),
        ({"mask_token": "[TOK]"}, False),
        ({}, True),
    ],
)
def test_an_added_token_of_older_files_is_shown_as_transformers_shows_it(
    folder, plain, names, shown
):
    number = plain.get_vocab_size()
    path = folder(
        {"tokenizer_class": FAST}, added_tokens={"[TOK]": number}, special_tokens_map=names
    )
    ours, theirs = agree(path)
    ids = ours.encode("hello [TOK] world")
    assert number in ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ("[TOK]" in ours.decode(ids)) == shown


# ---- several chat templates

NAMED = [
    {"name": "default", "template": "{{ messages[0].content }} plain"},
    {"name": "tool_use", "template": "{{ messages[0].content }} {{ tools[0].function.name }}"},
    {"name": "rag", "template": "rag"},
]
CALL = [{"role": "user", "content": "go"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def test_the_tool_template_is_used_with_tools_and_all_are_preserved(folder, tmp_path):
    path = folder({"tokenizer_class": FAST, "chat_template": NAMED})
    theirs = AutoTokenizer.from_pretrained(path)
    ours = Tokenizer.from_folder(path)
    ours.save(path / "again")
    readers = [ours, Tokenizer.from_folder(path / "again")]
    readers.append(Tokenizer(ours.backend, ours.special, chat_template=ours.template_sources))
    for reader in readers:
        assert reader.encode_chat(CALL).text == "go plain"
        assert reader.encode_chat(CALL, tools=TOOLS).text == "go look"
        assert reader.encode_chat(CALL, tools=[]).text == "go plain"
        assert set(reader.template_sources) == {"default", "tool_use", "rag"}
    for reader in (theirs, AutoTokenizer.from_pretrained(path / "again")):
        assert reader.apply_chat_template(CALL, tokenize=False) == "go plain"
        assert reader.apply_chat_template(CALL, tools=TOOLS, tokenize=False) == "go look"
        assert set(reader.chat_template) == {"default", "tool_use", "rag"}


def test_an_unused_template_may_be_invalid(folder):
    broken = [
        NAMED[0],
        {"name": "rag", "template": "{% if %}"},
        {"name": "tool_use", "template": "{{"},
    ]
    ours = Tokenizer.from_folder(folder({"chat_template": broken}))
    assert ours.encode_chat(CALL).text == "go plain"
    with pytest.raises(DataError, match="not valid Jinja"):
        ours.encode_chat(CALL, tools=TOOLS)


def test_templates_in_separate_files_are_read(folder):
    path = folder({"tokenizer_class": FAST, "chat_template": "old"})
    (path / "chat_template.jinja").write_text("new", encoding="utf-8")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools", encoding="utf-8")
    ours = Tokenizer.from_folder(path)
    assert ours.template_sources == {"default": "new", "tool_use": "tools"}
    assert ours.encode_chat(CALL, tools=TOOLS).text == "tools"


def test_without_a_default_template_the_error_lists_the_names(folder):
    ours = Tokenizer.from_folder(folder({"chat_template": NAMED[1:]}))
    assert ours.encode_chat(CALL, tools=TOOLS).text == "go look"
    with pytest.raises(DataError, match="templates named tool_use, rag but none named default"):
        ours.encode_chat(CALL)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["tool use"], True),
        (["rag.v2"], True),
        (["tool use", "rag.v2", "tool_use"], True),
        (["a/b"], False),
        (["检索"], False),
        (["rag.", "tool_use"], False),
        (["RAG", "rag"], False),
        (["x" * 300], False),
        ([".."], False),
    ],
)
def test_templates_of_any_name_are_preserved(folder, tmp_path, names, files, named):
    sources = {name: f"{number} {{{{ messages[0].content }}}}" for number, name in enumerate(names)}
    sources |= {"default": "plain"} if named else {}
    listed = [{"name": name, "template": source} for name, source in sources.items()]
    ours = Tokenizer.from_folder(folder({"tokenizer_class": FAST, "chat_template": listed}))
    saved = tmp_path / "saved"
    saved.mkdir()
    Tokenizer(ours.backend, ours.special, chat_template={"default": "old", "old": "old"}).save(
        saved
    )
    ours.save(saved)
    assert Tokenizer.from_folder(saved).template_sources == sources
    assert AutoTokenizer.from_pretrained(saved).chat_template == sources
    written = {str(path.relative_to(saved)) for path in saved.rglob("*.jinja")}
    expected = {f"additional_chat_templates/{name}.jinja" for name in names if files}
    assert written == expected | ({"chat_template.jinja"} if named and files else set())


def test_the_name_of_a_template_cannot_escape_the_folder(folder, tmp_path):
    evil = [*NAMED, {"name": "../../evil", "template": "x"}]
    ours = Tokenizer.from_folder(folder({"chat_template": evil}))
    ours.save(tmp_path / "deep" / "deeper")
    assert not list(tmp_path.rglob("evil*"))
    written = json.loads((tmp_path / "deep" / "deeper" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == evil


# ---- tokenizer.model

IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LLAMA_TEXTS = [
    "hello low",
    "  the lowest ",
    "</s> low",
    "low</s>low </s> er",
    "<s>a <unk>b",
    "a<tool>b <tool> c",
    "你好 the",
    "",
]


@pytest.fixture(scope="module")
def sentencepieces():
    return {kind: sentencepiece_file(kind, **IDENTITY) for kind in ("bpe", "unigram")}


def sentencepiece_folder(path, data, config, model=None):
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(data)
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if model is not None:
        (path / "config.json").write_text(json.dumps(model), encoding="utf-8")
    return path


LLAMA = {"tokenizer_class": "LlamaTokenizer"}
TOOL = {"content": "<tool>", "special": True, **FLAGS}


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        LLAMA | {"legacy": False, "add_bos_token": True},
        LLAMA | {"legacy": False, "add_bos_token": True, "add_eos_token": True},
        LLAMA | {"add_bos_token": False, "model_max_length": 2048},
        LLAMA
        | {"bos_token": {"__type": "AddedToken", "content": "<s>", **FLAGS}, "eos_token": "</s>"},
        LLAMA | {"added_tokens_decoder": {"420": TOOL}},
        LLAMA | {"additional_special_tokens": ["<tool>"]},
        LLAMA | {"pad_token": "<tool>"},
        {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>"},
    ],
    ids=str,
)
def test_a_tokenizer_model_gives_the_same_ids_as_transformers(tmp_path, sentencepieces, config):
    _, data = sentencepieces["bpe"]
    path = sentencepiece_folder(tmp_path / "m", data, config, {"model_type": "llama"})
    theirs = AutoTokenizer.from_pretrained(path)
    ours = load_tokenizer(path)
    assert [ours.encode(t) for t in LLAMA_TEXTS] == [theirs(t)["input_ids"] for t in LLAMA_TEXTS]
    assert (ours.special.bos, ours.special.eos) == (theirs.bos_token, theirs.eos_token)
    ours.save(tmp_path / "again")
    again = Tokenizer.from_folder(tmp_path / "again")
    assert [again.encode(t) for t in LLAMA_TEXTS] == [ours.encode(t) for t in LLAMA_TEXTS]
    assert again.special == ours.special


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("config", [{}, LLAMA | {"legacy": True}, {"tokenizer_class": "Own"}])
def test_a_tokenizer_model_gives_the_same_ids_as_sentencepiece(
    tmp_path, sentencepieces, kind, config
):
    theirs, data = sentencepieces[kind]
    ours = load_tokenizer(sentencepiece_folder(tmp_path / "m", data, config))
    assert [ours.encode(t) for t in SP_TEXTS] == [theirs.encode(t) for t in SP_TEXTS]
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())


def test_a_reserved_token_gets_the_name_of_the_added_token_with_its_id(tmp_path):
    _, data = sentencepiece_file("bpe", **IDENTITY, control_symbols="<reserved>")
    index = Tokenizer.from_folder(sentencepiece_folder(tmp_path / "a", data, LLAMA)).id_of(
        "<reserved>"
    )
    config = LLAMA | {"added_tokens_decoder": {str(index): TOOL}}
    ours = Tokenizer.from_folder(sentencepiece_folder(tmp_path / "b", data, config))
    assert ours.encode("<tool>") == [index]
    assert ours.id_of("<reserved>") is None


def test_a_model_with_only_a_tokenizer_model_is_loaded_and_saved(
    tmp_path, sentencepieces, tiny_model
):
    theirs, data = sentencepieces["bpe"]
    folder = save_model(tiny_model, tmp_path / "m")
    sentencepiece_folder(folder, data, LLAMA | {"legacy": True, "add_bos_token": True})
    assert load_tokenizer(folder).encode("hello") == [theirs.bos_id(), *theirs.encode("hello")]
    save_model(load_model(folder), tmp_path / "out", tokenizer=load_tokenizer(folder))
    assert load_tokenizer(tmp_path / "out").encode("hello")[1:] == theirs.encode("hello")


def test_a_damaged_tokenizer_model_is_named(tmp_path):
    path = sentencepiece_folder(tmp_path / "m", b"not a model", LLAMA)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        Tokenizer.from_folder(path)


def test_tokenizer_json_takes_precedence_over_tokenizer_model(folder, sentencepieces):
    path = folder({"tokenizer_class": FAST})
    (path / "tokenizer.model").write_bytes(b"not a model")
    assert Tokenizer.from_folder(path).encode("hello")


def test_added_tokens_keep_their_flags_when_they_are_special_already(folder, plain):
    plain.add_special_tokens([AddedToken("<|tool|>", lstrip=True, special=True, normalized=False)])
    ours, _ = agree(folder({"tokenizer_class": FAST, "eos_token": "<|tool|>"}))
    assert ours.encode("a <|tool|>") == [*ours.encode("a"), ours.eos_id]


@pytest.mark.parametrize("value", [7, "<|tool|>", True])
def test_additional_special_tokens_must_be_a_list(folder, value):
    with pytest.raises(CheckpointError, match="expected a list of tokens"):
        Tokenizer.from_folder(folder({"additional_special_tokens": value}))


def test_a_template_that_is_not_text_is_named(folder):
    path = folder({"tokenizer_class": FAST})
    (path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8"):
        Tokenizer.from_folder(path)
