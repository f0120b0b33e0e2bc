"""A model of every kind of part learns: on real English its loss falls far below chance level.

This detects what equality tests cannot: a gradient that does not reach a part, or has the wrong
sign.
"""

import inspect
import math
import random
import re
from collections import Counter

import pytest
import torch

from easyllm.batches.packing import pack
from easyllm.examples.sample import Sample
from easyllm.nn.config import (
    AttentionConfig,
    GLUConfig,
    LayerConfig,
    LayerNormConfig,
    LinearAttentionConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RMSNormConfig,
)
from easyllm.nn.decoder import Decoder
from easyllm.nn.moe import load_balancing_loss
from easyllm.nn.position_config import Alibi, Learned, NoPosition, Rope, Shaw, Sinusoidal, T5Bias
from easyllm.ops.cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")  # the models are too small to parallelise

VOCAB = 256
LENGTHS = (64, 64, 64, 40)
STEPS = 100
MARGIN_NATS = 0.15
EPS = 1e-5
GLU = GLUConfig(intermediate_size=64)


def layers(mixer, feed_forward=GLU, norm_placement="pre"):
    layer = LayerConfig(mixer=mixer, feed_forward=feed_forward, norm_placement=norm_placement)
    return {"layers": (layer,) * 4}


def softmax(**options):
    return AttentionConfig(**{"num_heads": 2, "num_kv_heads": 1, "head_dim": 16} | options)


def linear(**options):
    return LinearAttentionConfig(num_heads=2, head_dim=16, **options)


EXPERTS = MoEConfig(
    num_experts=4,
    experts_per_token=2,
    expert=GLUConfig(intermediate_size=32),
    shared=GLUConfig(intermediate_size=32),
    shared_gate=True,
)
VARIANTS = {
    "grouped heads, rope": layers(softmax()),
    "interleaved partial rope": layers(softmax(position=Rope(interleaved=True, rotary_dim=8))),
    "window": layers(softmax(window=16)),
    "window and sinks": layers(softmax(window=16, num_sinks=2)),
    "soft cap, qk norm": layers(softmax(softcap=10.0, qk_norm=RMSNormConfig())),
    "alibi": layers(softmax(position=Alibi())),
    "t5 bias": layers(softmax(position=T5Bias())),
    "shaw": layers(softmax(position=Shaw())),
    "no position": layers(softmax(position=NoPosition())),
    "learned": layers(softmax(position=NoPosition())) | {"embedding_position": Learned()},
    "sinusoidal": layers(softmax(position=NoPosition())) | {"embedding_position": Sinusoidal()},
    "linear attention, elu, rope": layers(linear(position=Rope())),
    "linear attention, softmax": layers(linear(features="softmax")),
    "linear attention, cosine": layers(linear(features="cosine")),
    "experts": layers(softmax(), EXPERTS),
    "mlp, layer norm": layers(softmax(), MLPConfig(intermediate_size=64))
    | {"norm": LayerNormConfig()},
    "post-norm": layers(softmax(), norm_placement="post") | {"final_norm": False},
    "sandwich": layers(softmax(), norm_placement="sandwich")
    | {"norm": RMSNormConfig(unit_offset=True)},
}


@pytest.fixture(scope="module")
def batches():
    """Bytes of English text from Python itself: packed sequences, one of them shorter."""
    text = inspect.getdoc(re).encode()
    generator = random.Random(0)

    def sample(length):
        start = generator.randrange(len(text) - length)
        return Sample.from_mask(text[start : start + length + 1])

    return [pack([sample(length) for length in LENGTHS]) for _ in range(STEPS)]


def build(name):
    values = {"family": "llama", "vocab_size": VOCAB, "hidden_size": 48, "max_seq_len": 64}
    model = Decoder(ModelConfig(**values | VARIANTS[name]))
    model.reset_parameters(std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def loss_of(model, batch):
    """Returns the mean loss per labelled token in nats, plus the routers' balancing loss."""
    routing = []
    hidden = model(batch.token_ids, batch.context(routing=routing))
    loss = linear_cross_entropy(hidden, model.head_weight, batch.labels)
    balance = sum(r.config.load_balancing * load_balancing_loss(r) for r in routing)
    return loss.sum / loss.num_tokens, balance


def entropy_of(batches):
    """Returns the entropy of the byte frequencies in nats per byte (a unigram model's loss)."""
    counts = Counter(label for batch in batches for label in batch.labels.tolist())
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_falls_from_chance_level_to_below_the_byte_entropy(name, batches):
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for batch in batches:
        loss, balance = loss_of(model, batch)
        (loss + balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.5)
    # 2.05 to 2.69 was measured; the byte entropy is 3.03
    assert sum(losses[-10:]) / 10 < entropy_of(batches) - MARGIN_NATS


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name, batches):
    model = build(name)
    sum(loss_of(model, batches[0])).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("name", VARIANTS)
def test_the_gradient_is_the_slope_of_the_loss(name, batches):
    """In fp64, in a random direction of all parameters, by central differences."""
    model, batch = build(name).double(), batches[0]
    sum(loss_of(model, batch)).backward()
    generator = torch.Generator().manual_seed(1)
    steps = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().std().clamp(min=0.1)
        for p in model.parameters()
    ]
    slope = sum((p.grad * s).sum() for p, s in zip(model.parameters(), steps, strict=True))

    @torch.no_grad()
    def moved(distance):
        for p, s in zip(model.parameters(), steps, strict=True):
            p.add_(s, alpha=distance)
        loss = sum(loss_of(model, batch))
        for p, s in zip(model.parameters(), steps, strict=True):
            p.add_(s, alpha=-distance)
        return loss

    difference = (moved(EPS) - moved(-EPS)) / (2 * EPS)
    torch.testing.assert_close(slope, difference, atol=1e-7, rtol=1e-6)
