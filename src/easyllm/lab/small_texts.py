"""Small texts for labs: sentences of a few templates, and tokenizer and model trained on them."""

import random

from easyllm.examples.sample import Sample
from easyllm.lab.small_models import new_model, small_config, train_small
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.tokenizer.train import train_tokenizer
from easyllm.tokenizer.train_config import TokenizerConfig

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo")
PLACES = ("the river", "the old bridge", "the market", "the library", "the hill", "the harbour")
THINGS = ("a red apple", "a small boat", "an old book", "a green coat", "a bright lamp", "a map")
ACTIONS = ("found", "bought", "carried", "lost", "painted", "borrowed")
TIMES = ("In the morning", "After lunch", "At night", "On Monday", "Last winter", "Every day")
CHINESE = (
    "{name}今天早上在图书馆里读了一本关于河流的书。",
    "晚上{name}和朋友一起走过旧桥，去市场买苹果。",
    "语言模型根据前面的词元预测下一个词元，{name}觉得很有趣。",
    "{name}把绿色的外套放在灯旁边，然后开始画地图。",
)
CHINESE_NAMES = ("小明", "小红", "李雷", "王芳", "张伟")


def small_texts(count: int, seed: int, *, chinese: bool = False) -> list[str]:
    """Returns `count` texts of three sentences each."""
    draw = random.Random(seed)
    if chinese:
        return [
            "".join(draw.choice(CHINESE).format(name=draw.choice(CHINESE_NAMES)) for _ in range(3))
            for _ in range(count)
        ]
    found = []
    for _ in range(count):
        name = draw.choice(NAMES)
        found.append(
            f"{draw.choice(TIMES)} {name} {draw.choice(ACTIONS)} {draw.choice(THINGS)} near "
            f"{draw.choice(PLACES)}. {name} gave {draw.choice(THINGS)} to {draw.choice(NAMES)}. "
            f"They walked to {draw.choice(PLACES)} and {draw.choice(ACTIONS)} "
            f"{draw.choice(THINGS)}."
        )
    return found


def small_language_model(
    *, steps: int, seed: int, width: int = 64, vocab_size: int = 400
) -> tuple[Decoder, Tokenizer, list[Sample]]:
    """Returns a model trained on `small_texts` for some steps, its tokenizer and held-out texts."""
    texts = small_texts(64 + 8 * steps, seed)
    tokenizer = train_tokenizer(texts[:200], TokenizerConfig(vocab_size=vocab_size))
    end = tokenizer.eos_id
    assert end is not None, "the default configuration has an end token"
    samples = [Sample.from_mask([*ids, end]) for ids in tokenizer.encode_batch(texts)]
    config = small_config(vocab_size=tokenizer.vocab_size, width=width)
    model = new_model(config.changed(eos_token_ids=(end,)), seed)
    train_small(model, samples[64:], steps=steps, batch_size=8, warmup=5, seed=seed)
    return model.requires_grad_(False).eval(), tokenizer, samples[:64]


__all__ = ["small_language_model", "small_texts"]
