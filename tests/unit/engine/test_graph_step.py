"""Why a model or a cache cannot be captured as a CUDA graph, checked without a GPU."""

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.engine import graph_step
from easyllm.engine.graph_step import GraphStep
from easyllm.engine.kv_cache import KVCache
from easyllm.nn import AttentionConfig, Decoder
from easyllm.nn.config import LinearAttentionConfig, MoEConfig
from easyllm.nn.position_config import Alibi, DynamicNTKScaling, Rope
from easyllm.ops import attention_backends
from easyllm.quant import quantize_weights
from tiny_models import build_tiny


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
    """Makes the Triton kernels accept tensors on the CPU."""
    monkeypatch.setattr(graph_step, "triton_unsupported_reason", lambda *tensors: None)
    monkeypatch.setattr(
        attention_backends, "triton_dtype_unsupported_reason", lambda device_type, dtype: None
    )


def reason(model: Decoder, dtype: torch.dtype | str = torch.float32) -> str | None:
    cache = KVCache(model.config, 2, 16, dtype, model.device)
    cache.spare_page = 1
    return GraphStep.unsupported_reason(model.eval().requires_grad_(False), cache)


def changed(*, feed_forward=None, mixer=None, **attention) -> Decoder:
    """Returns a model of one layer with other parts or other settings of its attention."""
    config = build_tiny().config
    layer = config.layers[0]
    mixer = mixer or AttentionConfig.model_validate(layer.mixer.model_dump() | attention)
    parts = {"mixer": mixer, "feed_forward": feed_forward or layer.feed_forward}
    return Decoder(config.changed(layers=(layer.model_copy(update=parts),)))


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_plain_decoder_can_be_captured():
    assert reason(build_tiny()) is None


def _experts() -> Decoder:
    expert = build_tiny().config.layers[0].feed_forward
    return changed(feed_forward=MoEConfig(num_experts=2, experts_per_token=1, expert=expert))


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (_experts, "layer 0: a mixture of experts"),
        (
            lambda: changed(mixer=LinearAttentionConfig(num_heads=2, head_dim=16)),
            "layer 0: linear attention",
        ),
        (lambda: changed(softcap=5.0), "layer 0: attention with a soft cap"),
        (lambda: changed(window=8, num_sinks=2), "attention with sinks"),
        (lambda: changed(position=Alibi()), "attention with positions that change the scores"),
        (lambda: changed(causal=False), "attention with no causal mask"),
        (
            lambda: changed(
                position=Rope(scaling=DynamicNTKScaling(factor=2.0, original_max_seq_len=64))
            ),
            "dynamic NTK",
        ),
        (lambda: quantize_weights(build_tiny(), "int8"), r"its weights are quantized (int8)"),
    ],
)
def test_unsupported_parts_are_named(build, words):
    assert words in reason(build())


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_quantized_pages_are_named():
    assert reason(build_tiny(), "int8") == "layer 0: attention with quantized keys and values"


def test_a_cpu_is_named_in_the_error():
    model = build_tiny()
    cache = KVCache(model.config, 2, 16, torch.float32, model.device)
    with pytest.raises(ConfigError, match="do not support a device other than a CUDA GPU"):
        GraphStep(model.eval(), cache)
