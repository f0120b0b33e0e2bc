"""Extending a tokenizer and its model keeps old ids and logits, and shortens new text."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from easyllm.core.errors import ConfigError, DataError
from easyllm.models import load_model, load_tokenizer, save_model
from easyllm.models.resize import loss_of_text, resize_embeddings
from easyllm.nn import Decoder
from easyllm.nn.context import ForwardContext
from easyllm.ops.cross_entropy import linear_cross_entropy
from easyllm.tokenizer import SpecialTokens, Tokenizer
from easyllm.tokenizer.extend import extend_tokenizer
from easyllm.tokenizer.report import HAN, report
from easyllm.tokenizer.train import train_tokenizer
from easyllm.tokenizer.train_config import BPEConfig, TokenizerConfig, UnigramConfig
from tiny_models import build_tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2_tokens.jsonl"
ROWS = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
CHINESE = """
语言模型根据前面的词元预测下一个词元，训练的目标是让预测更准确。
训练语言模型需要大量的文本，文本要先清洗、去重，再切成词元。
分词器把文本切成词元，每个词元对应一个编号，模型只看得到编号。
如果分词器不认识一个汉字，就要用三个字节来表示它，序列会变得很长。
扩充词表以后，同样的中文文本需要的词元更少，训练和推理都更快。
新词元的向量取旧词元向量的平均值，这样模型一开始就知道一点意思。
我们今天去公园散步，公园里有很多人，孩子们在草地上跑来跑去。
天气预报说明天有雨，所以我们今天就把衣服洗好，晾在阳台上。
妈妈在厨房做饭，爸爸在客厅看报纸，弟弟在房间里写作业。
这家饭店的菜很好吃，价格也不贵，我们每个周末都来这里吃饭。
他每天早上六点起床，先跑步半个小时，然后吃早饭，再去上班。
图书馆里很安静，大家都在看书，没有人大声说话。
这本书讲的是一个年轻人离开家乡，到大城市工作和生活的故事。
中国的历史很长，有很多有名的诗人，他们写了很多美丽的诗。
春天来了，花园里的花都开了，红的、黄的、白的，非常好看。
秋天是收获的季节，农民们在田里忙着收割，脸上都是笑容。
火车站里人很多，请大家看好自己的行李，不要忘记拿车票。
医生说他的身体没有问题，只是工作太忙，需要好好休息几天。
老师让我们用自己的话回答问题，不要把书上的话抄下来。
数学是科学的基础，物理、化学和生物都要用到数学。
机器学习的模型有很多参数，参数越多，需要的数据和计算就越多。
深度学习使用很多层的神经网络，每一层都把上一层的结果变成新的表示。
注意力机制让模型在生成每一个词元的时候，都可以看到前面所有的词元。
大语言模型可以回答问题、翻译文本、写代码，也可以总结文章的主要内容。
把模型的参数从十六位变成四位，可以节省很多内存，速度也会更快。
评估一个模型的时候，要用它没有见过的数据，不然结果没有意义。
如果学习率太大，训练就不稳定；如果学习率太小，训练就很慢。
请用一句话回答下面的问题：水在多少度的时候会变成冰？
水在零度的时候会变成冰，在一百度的时候会变成水蒸气。
地球绕着太阳转一圈需要一年的时间，月亮绕着地球转一圈大约需要一个月。
北京是中国的首都，上海是中国最大的城市，广州在中国的南方。
他的普通话说得很好，可是写汉字对他来说还是有一点难。
学习一门新的语言需要时间，每天学一点，一年以后就会有很大的进步。
小猫在沙发上睡觉，小狗在门口等主人回家。
电影晚上七点半开始，我们七点在电影院门口见面，好不好？
超市里的水果又新鲜又便宜，我买了苹果、香蕉和西瓜。
这个问题的答案很简单，但是要把原因说清楚就不简单了。
时间过得真快，一年又要过去了，希望新的一年大家都身体健康。
请注意，模型的回答不一定正确，重要的事情要自己检查。
开放源代码的软件让大家可以一起学习，一起改进，一起使用。
"""
HELD_OUT = """
模型看不到文本，它看到的是词元的编号。训练的数据越多，模型的回答就越准确。
明天我们去图书馆看书，后天去饭店吃饭，周末在家休息。
学习数学需要时间，每天学一点，就会有进步。
"""
MIXTURE = [*CHINESE.splitlines(), *["Detokenizers quuxified zorblaxes."] * 20]
ASCII = st.text(st.characters(max_codepoint=127), max_size=80)
MIXED = st.text(st.sampled_from("语言模型词元的，训练ab é€—😀русский \n한がで1."), max_size=40)


@pytest.fixture(scope="module")
def chinese(smollm2_tokenizer):
    """SmolLM2's tokenizer extended with a thousand Chinese tokens."""
    return extend_tokenizer(smollm2_tokenizer, MIXTURE, num_new=1000, min_frequency=1)


def written_in_old(extension, ids):
    """Replaces every new id by its old tokens."""
    return [old for i in ids for old in extension.old_pieces.get(i, (i,))]


# ---- the tokenizer


@settings(deadline=None, max_examples=200)
@given(text=MIXED | st.text(max_size=30))
def test_new_ids_expand_to_the_old_ids(smollm2_tokenizer, chinese, text):
    assert written_in_old(chinese, chinese.tokenizer.encode(text)) == smollm2_tokenizer.encode(text)


@settings(deadline=None, max_examples=200)
@given(text=ASCII)
def test_text_in_ascii_keeps_its_ids(smollm2_tokenizer, chinese, text):
    for sample in (text, MIXTURE[-1]):
        assert chinese.tokenizer.encode(sample) == smollm2_tokenizer.encode(sample)


def test_texts_of_all_kinds_expand_to_the_old_ids(smollm2_tokenizer, chinese):
    for row in ROWS:
        ids = chinese.tokenizer.encode(row["text"])
        assert written_in_old(chinese, ids) == row["ids"]
        assert ids == row["ids"] or max(ids) >= smollm2_tokenizer.vocab_size
        assert chinese.tokenizer.decode(ids) == smollm2_tokenizer.decode(row["ids"])
    assert sum(row["text"].isascii() for row in ROWS) > 20


def test_the_law_holds_if_the_old_vocabulary_contains_a_token_that_no_merge_produces():
    """Learning would otherwise add that token a second time."""
    trained = train_tokenizer(["é", "è", "ê"] * 9, TokenizerConfig(vocab_size=259, eos=None))
    state = json.loads(trained.backend.to_str())
    state["model"]["vocab"]["Ã©Ã¨"] = 259  # é è
    old = Tokenizer(Backend.from_str(json.dumps(state)), SpecialTokens())
    assert old.decode([259]) == "éè"
    assert len(old.encode("éè")) == 2
    extension = extend_tokenizer(old, ["éèéè", "éèê", "êéê"] * 9, num_new=20)
    assert min(extension.old_pieces) == 260
    assert extension.tokenizer.decode([259]) == "éè"
    used = set()
    for length in range(1, 7):
        for letters in product("éèê", repeat=length):
            text = "".join(letters)
            ids = extension.tokenizer.encode(text)
            assert written_in_old(extension, ids) == old.encode(text)
            used |= set(ids)
    assert extension.num_new > 0
    assert set(extension.old_pieces) <= used


@settings(deadline=None, max_examples=60)
@given(
    before=st.lists(st.text("éèê", min_size=1, max_size=8), min_size=1, max_size=6),
    after=st.lists(st.text("éèê", min_size=2, max_size=8), min_size=1, max_size=6),
    text=st.text("éèê", max_size=12),
)
def test_the_law_holds_for_any_two_corpora(before, after, text):
    config = TokenizerConfig(vocab_size=275, eos=None, model=BPEConfig(min_frequency=1))
    old = train_tokenizer(before, config)
    try:
        extension = extend_tokenizer(old, after, num_new=40, min_frequency=1)
    except DataError:  # the old tokenizer already has a token for each of the texts
        return
    for sample in [text, *after]:
        ids = extension.tokenizer.encode(sample)
        assert written_in_old(extension, ids) == old.encode(sample)


def test_new_ids_follow_the_old_and_each_merges_two_tokens(smollm2_tokenizer, chinese):
    first = smollm2_tokenizer.vocab_size
    assert list(chinese.old_pieces) == list(range(first, first + chinese.num_new))
    assert chinese.tokenizer.vocab_size == first + chinese.num_new
    made = {
        **{(i,): None for i in range(first)},
        **{old: i for i, old in chinese.old_pieces.items()},
    }
    for old in chinese.old_pieces.values():
        assert any(old[:cut] in made and old[cut:] in made for cut in range(1, len(old)))
    assert len(set(chinese.old_pieces.values())) == chinese.num_new


def test_special_tokens_roles_and_template_are_preserved(smollm2_tokenizer, chinese):
    tokenizer = chinese.tokenizer
    assert tokenizer.special == smollm2_tokenizer.special
    assert tokenizer.special_ids == smollm2_tokenizer.special_ids
    assert tokenizer.chat_template.source == smollm2_tokenizer.chat_template.source
    assert tokenizer.max_seq_len == smollm2_tokenizer.max_seq_len
    assert tokenizer.encode("<|im_end|>") == smollm2_tokenizer.encode("<|im_end|>")


def test_fertility_at_least_halves_on_chinese_and_is_unchanged_on_english(
    smollm2_tokenizer, chinese
):
    english = [row["text"] for row in ROWS if row["text"].isascii()]
    texts = {"learned": CHINESE.split(), "held out": HELD_OUT.split(), "english": english}
    rows = report({"old": smollm2_tokenizer, "new": chinese.tokenizer}, texts).texts
    fertility = {(row.domain, row.tokenizer): row.fertility for row in rows}
    assert fertility["learned", "new"] < fertility["learned", "old"] / 2
    assert fertility["held out", "new"] < fertility["held out", "old"] / 2
    assert fertility["english", "new"] == fertility["english", "old"]
    assert all(row.num_failures == 0 for row in rows if row.domain != "english")


def test_the_same_texts_give_the_same_tokenizer(smollm2_tokenizer, chinese):
    again = extend_tokenizer(smollm2_tokenizer, iter(MIXTURE), num_new=1000, min_frequency=1)
    assert again.tokenizer.fingerprint == chinese.tokenizer.fingerprint
    assert again.old_pieces == chinese.old_pieces


def test_words_are_learned_with_their_leading_space(smollm2_tokenizer):
    russian = ["русский язык и русский текст", "язык модели и текст модели"] * 3
    extension = extend_tokenizer(smollm2_tokenizer, russian, num_new=200)
    pieces = {extension.tokenizer.token_text(i) for i in extension.old_pieces}
    assert " текст" in pieces
    spaced = extend_tokenizer(smollm2_tokenizer, ["a 语言 b 语言"] * 9, num_new=20)
    assert " 语言" in {spaced.tokenizer.token_text(i) for i in spaced.old_pieces}


def test_runs_of_spaces_inside_words_are_not_learned():
    config = TokenizerConfig(vocab_size=256, eos=None, model=BPEConfig(pattern=None))
    old = train_tokenizer(["x"], config)
    extension = extend_tokenizer(old, ["你  好  吗", "我  们", "他  语  言"] * 9, num_new=100)
    assert extension.num_new > 5
    assert extension.tokenizer.encode("a  b  ") == old.encode("a  b  ")
    assert not any(extension.tokenizer.token_text(i).isascii() for i in extension.old_pieces)


def test_only_han_is_learned_on_request(smollm2_tokenizer):
    texts = [
        "русский текст",
        "使用模型训练，模型很大，我们的模型。",
        "naïve café “quoted” — ok",
        "한국어 문장",
    ] * 3
    extension = extend_tokenizer(smollm2_tokenizer, texts, num_new=300, script="han")
    for index in extension.old_pieces:
        whole = extension.tokenizer.token_text(index).strip("\ufffd")
        assert all(HAN.match(character) for character in whole)
    both = extend_tokenizer(smollm2_tokenizer, texts, num_new=300)
    assert both.num_new > extension.num_new
    assert "模型" in {extension.tokenizer.token_text(i) for i in extension.old_pieces}


def test_a_smaller_number_of_tokens_is_a_prefix_of_a_larger_one(smollm2_tokenizer, chinese):
    size = smollm2_tokenizer.vocab_size + 100
    some = extend_tokenizer(smollm2_tokenizer, MIXTURE, vocab_size=size, min_frequency=1)
    assert some.num_new == 100
    assert list(some.old_pieces.items()) == list(chinese.old_pieces.items())[:100]


def test_transformers_gives_the_same_ids(chinese, tmp_path):
    from transformers import AutoTokenizer

    chinese.tokenizer.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*CHINESE.split(), *HELD_OUT.split(), "mixed 语言模型 text<|im_end|>"]
    expected = [chinese.tokenizer.encode(text) for text in texts]
    assert [reference(text)["input_ids"] for text in texts] == expected


def test_added_tokens_after_the_vocabulary_leave_no_gap():
    """As in Qwen's tokenizer, whose special tokens are not in the vocabulary of the BPE model."""
    plain = train_tokenizer(["low lower"], TokenizerConfig(vocab_size=258, eos=None))
    plain.backend.add_special_tokens(["<|end|>"])
    old = Tokenizer(plain.backend, SpecialTokens(eos="<|end|>"))
    extension = extend_tokenizer(old, CHINESE.split(), num_new=50)
    assert min(extension.old_pieces) == old.eos_id + 1
    assert extension.tokenizer.eos_id == old.eos_id
    assert extension.tokenizer.encode("low<|end|>") == old.encode("low<|end|>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_new": 0}, "num_new=0 adds nothing to 49152 ids"),
        ({"vocab_size": 49152}, "vocab_size=49152 adds nothing"),
        ({}, "give exactly one of num_new and vocab_size"),
        ({"num_new": 1, "vocab_size": 60000}, "give exactly one of num_new and vocab_size"),
        ({"num_new": 999_999_999}, "the 49,152 existing ids exceed the maximum of 4,194,304 ids"),
        ({"vocab_size": 2**22 + 1}, "exceed the maximum of 4,194,304 ids"),
    ],
)
def test_numbers_that_add_nothing_are_refused(smollm2_tokenizer, change, message):
    with pytest.raises(ConfigError, match=message):
        extend_tokenizer(smollm2_tokenizer, [CHINESE], **change)


def test_texts_without_new_tokens_are_refused(smollm2_tokenizer):
    with pytest.raises(DataError, match="no non-ASCII text to learn from"):
        extend_tokenizer(smollm2_tokenizer, ["plain English"], num_new=10)
    with pytest.raises(DataError, match="no Han characters to learn from"):
        extend_tokenizer(smollm2_tokenizer, ["русский текст"], num_new=10, script="han")


def test_other_kinds_of_tokenizer_are_refused():
    config = TokenizerConfig(model=UnigramConfig(), vocab_size=1000)
    unigram = train_tokenizer(CHINESE.split(), config)
    with pytest.raises(ConfigError, match=r"a Unigram tokenizer .* only byte-level BPE"):
        extend_tokenizer(unigram, [CHINESE], num_new=10)


# ---- the model

OLD_PIECES = {300: (5, 7), 301: (5, 7, 9, 9), 302: (299,)}


def tiny(**changes) -> Decoder:
    return build_tiny(seed=3, **{"vocab_size": 300} | changes)


@pytest.mark.parametrize("tied", [True, False])
def test_old_ids_keep_their_logits_and_loss_and_both_matrices_are_resized(tied):
    ids = list(range(3, 290, 7))
    before, model = tiny(tie_word_embeddings=tied), tiny(tie_word_embeddings=tied)
    assert resize_embeddings(model, OLD_PIECES) is model
    assert model.config.vocab_size == 320
    assert model.embed_tokens.weight.shape == model.head_weight.shape == (320, 32)
    assert (model.lm_head is None) is tied
    old, new = before.logits(ids), model.logits(ids)
    torch.testing.assert_close(new[:, :300], old, rtol=0, atol=1e-6)
    labels = torch.tensor(ids)
    was, now = (x[:, :300].log_softmax(-1)[range(len(ids)), labels].mean() for x in (old, new))
    assert abs(float(was - now)) <= 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_row_is_the_mean_of_its_old_tokens_in_both_matrices(tied):
    before, model = tiny(tie_word_embeddings=tied), tiny(tie_word_embeddings=tied)
    resize_embeddings(model, OLD_PIECES)
    for old, new in (
        (before.embed_tokens.weight, model.embed_tokens.weight),
        (before.head_weight, model.head_weight),
    ):
        assert torch.equal(new[:300], old)
        torch.testing.assert_close(new[300], (old[5] + old[7]) / 2)
        torch.testing.assert_close(new[301], (old[5] + old[7] + 2 * old[9]) / 4)
        assert torch.equal(new[302], old[299])
        torch.testing.assert_close(new[303:], old.mean(0).expand(17, -1))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_no_added_id_is_the_most_likely_before_training(softcap):
    model = tiny(tie_word_embeddings=False)
    resize_embeddings(model, {k: v for k, v in OLD_PIECES.items() if len(v) > 1 or k == 302})
    hidden = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0)) * 10
    if softcap:
        model.config = model.config.changed(logit_softcap=softcap)
    logits = model.head(hidden)
    best_old = logits[:, :300].max(-1).values
    assert bool((logits[:, 300:].max(-1).values <= best_old + 1e-4).all())
    for index, old in OLD_PIECES.items():
        assert bool((logits[:, index] <= logits[:, list(old)].max(-1).values + 1e-4).all())


def test_the_loss_is_reported_over_old_ids_and_over_all_ids():
    ids = list(range(3, 290, 2))
    before, model = tiny(), resize_embeddings(tiny(), OLD_PIECES)
    hidden = model(torch.tensor(ids), ForwardContext.packed([len(ids)]))
    labels = torch.tensor([*ids[1:], -100])
    whole = linear_cross_entropy(hidden, model.head_weight, labels)
    assert math.isclose(loss_of_text(model, ids), float(whole.sum) / whole.num_tokens, rel_tol=1e-5)
    assert abs(loss_of_text(model, ids, num_ids=300) - loss_of_text(before, ids)) <= 1e-6
    assert loss_of_text(model, ids) > loss_of_text(before, ids)


def test_unused_rows_are_taken_first():
    before, model = tiny(vocab_size=384), tiny(vocab_size=384)
    resize_embeddings(model, OLD_PIECES)
    assert model.config.vocab_size == 384
    rows = before.embed_tokens.weight
    assert torch.equal(model.embed_tokens.weight[303:], rows[303:])
    torch.testing.assert_close(model.embed_tokens.weight[300], (rows[5] + rows[7]) / 2)


def test_dtype_and_requires_grad_are_preserved():
    model = tiny(tie_word_embeddings=False).to(torch.bfloat16)
    model.lm_head.weight.requires_grad_(True)
    resize_embeddings(model, OLD_PIECES)
    assert model.embed_tokens.weight.dtype == model.head_weight.dtype == torch.bfloat16
    assert model.lm_head.weight.requires_grad
    assert not model.embed_tokens.weight.requires_grad


def test_without_new_tokens_the_vocabulary_is_only_padded():
    model = resize_embeddings(tiny(), {})
    assert model.config.vocab_size == 320


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ({301: (1,)}, "new ids 301 to 301 do not directly follow the model's 300 ids"),
        ({300: (1,), 302: (2,)}, "do not directly follow"),
        ({300: (1, 300)}, "ids outside the old range 0 to 299"),
        ({300: ()}, "ids outside the old range"),
        ({300: (-1,)}, "ids outside the old range"),
    ],
)
def test_ids_that_do_not_fit_the_model_are_refused_and_leave_it_unchanged(pieces, message):
    model = tiny()
    with pytest.raises(ConfigError, match=message):
        resize_embeddings(model, pieces)
    assert model.config.vocab_size == len(model.embed_tokens.weight) == 300


def test_an_extended_smollm2_keeps_its_english_loss_and_is_saved_completely(
    smollm2_tokenizer, chinese, tmp_path
):
    """On the real model, the loss of English over the old ids is unchanged to 1e-6."""
    from transformers import AutoModelForCausalLM

    before, model = load_model("smollm2", dtype="float32"), load_model("smollm2", dtype="float32")
    resize_embeddings(model, chinese.old_pieces)
    text = "The library opens at nine in the morning, and the first readers are already waiting."
    ids = chinese.tokenizer.encode(text)
    assert ids == smollm2_tokenizer.encode(text)
    num_old = smollm2_tokenizer.vocab_size
    losses = [
        torch.nn.functional.cross_entropy(m.logits(ids)[:-1, :num_old], torch.tensor(ids[1:]))
        for m in (before, model)
    ]
    assert abs(float(losses[0] - losses[1])) <= 1e-6
    assert abs(loss_of_text(model, ids, num_ids=num_old) - float(losses[0])) <= 1e-6
    assert 0 <= loss_of_text(model, ids) - float(losses[0]) < 0.01
    folder = save_model(model, tmp_path / "out", tokenizer=chinese.tokenizer)
    again = load_model(folder)
    assert again.config.vocab_size % 64 == 0
    assert torch.equal(again.head_weight, model.head_weight)
    new = chinese.tokenizer.encode("语言模型")
    assert max(new) >= num_old
    torch.testing.assert_close(again.logits(new), model.logits(new), rtol=0, atol=1e-3)
    assert load_tokenizer(folder).encode("语言模型") == new
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = reference(torch.tensor([new])).logits[0]
    torch.testing.assert_close(again.logits(new), theirs, rtol=0, atol=1e-3)
