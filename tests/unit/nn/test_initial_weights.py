"""A model's initial weights are determined by the seed, whatever was drawn before."""

import pytest
import torch

from easyllm.models.families import family_of
from easyllm.nn.config import AttentionConfig
from easyllm.nn.encoder_decoder import build_model
from easyllm.nn.position_config import DebertaRelative, Shaw, T5Bias, TransformerXL
from tiny_models import build_tiny

HF = {
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50},
    "t5": {
        "model_type": "t5",
        "vocab_size": 50,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_heads": 2,
        "num_layers": 2,
        "decoder_start_token_id": 0,
    },
}
POSITIONS = (T5Bias(), Shaw(max_distance=3), TransformerXL(), DebertaRelative(max_distance=5))


def configurations():
    yield from ((name, family_of(name).read_config(hf)) for name, hf in HF.items())
    plain = build_tiny().config
    for position in POSITIONS:
        mixer = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=8, position=position)
        layers = tuple(layer.model_copy(update={"mixer": mixer}) for layer in plain.layers)
        yield position.kind, plain.model_copy(update={"layers": layers})


CONFIGURATIONS = dict(configurations())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_weights_depend_on_the_seed_alone(name):
    weights = []
    for before in (0, 1):
        torch.manual_seed(before)
        model = build_model(CONFIGURATIONS[name])
        model.reset_parameters(generator=torch.Generator().manual_seed(5))
        weights.append(dict(model.named_parameters()))
    first, second = weights
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert different == []
