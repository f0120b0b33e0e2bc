"""Which models cannot be gathered layer by layer, and the sentence that says so."""

import pytest

from easyllm.core.errors import ConfigError
from easyllm.models.families import family_of
from easyllm.nn.position_config import T5Bias
from easyllm.parallel.config import ParallelConfig
from easyllm.parallel.parallel import fully_sharded_reason, parallelize
from tiny_models import build_tiny

T5 = {
    "model_type": "t5",
    "vocab_size": 97,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 80,
    "num_heads": 4,
    "num_layers": 2,
    "decoder_start_token_id": 0,
}


def with_bias(*, shared):
    model = build_tiny().config
    layers = [
        layer.model_copy(
            update={"mixer": layer.mixer.model_copy(update={"position": T5Bias(shared=shared)})}
        )
        for layer in model.layers
    ]
    return model.model_copy(update={"layers": tuple(layers)})


@pytest.mark.parametrize("layout", ["zero3", "fsdp"])
def test_experts_are_refused_with_the_layouts_that_would_do(layout):
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    model = build_tiny(**experts)
    with pytest.raises(
        ConfigError, match=rf"{layout} does not train mixtures.*ddp, zero1 or zero2"
    ):
        parallelize(model, None, ParallelConfig(layout=layout))


def test_what_crosses_the_layers_is_named():
    encoder_decoder = family_of("t5").read_config(T5)
    assert "encoder–decoders" in fully_sharded_reason(encoder_decoder)
    assert "one table of positions" in fully_sharded_reason(with_bias(shared=True))
    assert fully_sharded_reason(with_bias(shared=False)) is None
    assert fully_sharded_reason(build_tiny().config) is None
