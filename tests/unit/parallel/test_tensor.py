"""Which models can be divided by tensor parallelism, and the divided vocabulary's loss."""

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.ops.cross_entropy import linear_cross_entropy
from easyllm.parallel.mesh import Group
from easyllm.parallel.tensor import check_tensor_parallel, tensor_degrees
from easyllm.parallel.vocabulary import Vocabulary
from tiny_models import build_tiny


def test_the_degrees_that_would_do_are_named():
    model = build_tiny(
        num_attention_heads=9,
        num_key_value_heads=3,
        hidden_size=36,
        intermediate_size=96,
        head_dim=4,
        vocab_size=384,
    )
    assert tensor_degrees(model.config) == [3]
    check_tensor_parallel(model.config, 3)
    with pytest.raises(ConfigError, match=r"num_heads=9, num_kv_heads=3; degrees that do: 3"):
        check_tensor_parallel(model.config, 2)


def test_a_model_that_cannot_be_divided_is_refused_with_layouts_that_can():
    model = build_tiny(vocab_size=321)
    with pytest.raises(ConfigError, match=r"vocab_size=321; degrees that do: no degree above 1"):
        check_tensor_parallel(model.config, 2)
    labelled = build_tiny().config.changed(num_labels=2, tie_embeddings=True)
    with pytest.raises(ConfigError, match=r"a score head; .*zero1, zero2, zero3 or fsdp"):
        check_tensor_parallel(labelled, 2)


@pytest.mark.parametrize(
    "terms",
    [
        {},
        {"softcap": 5.0},
        {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 8.0, "max_z_loss": 0.02},
    ],
)
def test_loss_of_a_divided_vocabulary_equals_the_plain_one(terms):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 30, (13,), generator=generator)
    labels[[2, 7]] = -100
    whole = Vocabulary(Group(None, 0, 1), 0, 30)
    mine = whole.cross_entropy(hidden, weight, labels, **terms)
    plain = linear_cross_entropy(hidden, weight, labels, **terms)
    assert mine.num_tokens == plain.num_tokens == 11
    torch.testing.assert_close(mine.sum, plain.sum)
    for mine_grad, plain_grad in zip(
        torch.autograd.grad(mine.sum, (hidden, weight)),
        torch.autograd.grad(plain.sum, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine_grad, plain_grad)
