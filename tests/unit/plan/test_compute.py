"""FLOPs from the configuration, compared with PyTorch's counter and with published figures."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from easyllm.adapters import PTuningConfig, attach
from easyllm.adapters.lora import LoRAConfig
from easyllm.batches.packing import pack
from easyllm.core.errors import ConfigError
from easyllm.examples.sample import Sample
from easyllm.models.families import family_of
from easyllm.models.families.gpt2 import SIZES as GPT2_SIZES
from easyllm.models.families.gpt2 import read_config as read_gpt2
from easyllm.models.families.llama import SIZES, read_config
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.nn.encoder_decoder import build_model
from easyllm.plan.compute import (
    decode_flops,
    estimate_time,
    forward_flops,
    mfu,
    training_flops,
)
from easyllm.plan.kv_cache import cache_size
from easyllm.plan.parameters import count_parameters
from prompt_adapters import CONFIGS
from tiny_models import tiny_config


def config_of(**changes):
    return family_of("llama").read_config(tiny_config(**changes))


def linears_counted(model, ids, *, input_grad):
    """Returns the FLOPs of GEMMs with a weight, forward and backward, as counted by PyTorch."""
    context = pack([Sample(tuple(ids), tuple(ids))]).context()
    hidden = model.embed_tokens(torch.tensor(ids)).detach().requires_grad_(input_grad)
    added = None
    with FlopCounterMode(display=False) as forward:
        for layer in model.layers:
            hidden, added = layer(hidden, context, added)
        out = model.head(model.norm(hidden + added))
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return [sum(mode.get_flop_counts()["Global"].values()) for mode in (forward, backward)]


@pytest.mark.parametrize("input_grad", [True, False])
def test_the_backward_pass_of_linears_is_twice_the_forward(input_grad):
    """3F in total if the first input needs a gradient; otherwise without the first GEMMs' share."""
    config = config_of(tie_word_embeddings=False)
    model = Decoder(config)
    model.reset_parameters(generator=torch.Generator().manual_seed(0))
    if not input_grad:
        for parameter in model.layers[0].mixer_norm.parameters():
            parameter.requires_grad_(False)
    forward, backward = linears_counted(model, list(range(3, 40)), input_grad=input_grad)
    plan = training_flops(config, (37,), input_grad=input_grad)
    assert plan.forward.linears == forward  # PyTorch does not count the C kernels of attention
    assert plan.backward.linears == backward
    first = 2 * 37 * 32 * (64 + 32 + 32)  # q, k and v of the first layer
    assert backward == 2 * forward - (0 if input_grad else first)


def test_a_frozen_linear_has_half_a_backward_pass():
    config, lora = config_of(), LoRAConfig(rank=4)
    whole, thin = training_flops(config, (64,)), training_flops(config, (64,), adapter=lora)
    frozen = thin.backward.linears - thin.backward.adapters
    first = 2 * 64 * 32 * (64 + 32 + 32)
    assert frozen == whole.forward.linears - first
    assert thin.forward.adapters > 0
    assert thin.backward.adapters == 2 * thin.forward.adapters - 2 * 64 * 32 * 4 * 3


def test_gpt3_has_its_published_cost():
    """l(24bsh² + 4bs²h) + 2bshV per forward pass; training: 3 times that, 4 with checkpointing."""
    gpt3 = read_gpt2(
        GPT2_SIZES["gpt2"] | {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}
    )
    s, h, layers, vocab = 2048, 12288, 96, 50257
    plan = training_flops(gpt3, (s,), counting="full", recompute="none")
    assert plan.forward.total == layers * (24 * s * h * h + 4 * s * s * h) + 2 * s * h * vocab
    assert plan.model == 3 * plan.forward.total
    # attention's share of the layers' FLOPs: s / (6h + s)
    assert plan.forward.scores_share == pytest.approx(s / (6 * h + s))
    assert round(100 * plan.forward.scores_share, 2) == 2.70
    assert count_parameters(gpt3).total == 174_604_259_328


def test_training_days_of_gpt3_and_llama_equal_published_ones():
    """8TP / (n · peak · utilisation)."""
    day = 86400
    gpt3 = estimate_time(8 * 300e9 * 175e9, 1024 * 312e12, utilisation=0.45)
    llama = estimate_time(8 * 1.4e12 * 65e9, 2048 * 312e12, utilisation=0.6)
    assert (round(gpt3 / day, 2), round(llama / day, 2)) == (33.81, 21.98)
    assert pytest.approx(3.1428e23) == 6 * 174.6e9 * 300e9


def test_the_mfu_of_palm_equals_the_published_one():
    """tokens/s · (6N + 12LHQT) / peak, PaLM 540B."""
    per_token = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
    assert round(100 * mfu(238.3e3, per_token, 6144 * 275e12), 1) == 46.2
    assert round(100 * mfu(238.3e3, 6 * 540.35e9, 6144 * 275e12), 1) == 45.7


def test_decoding_a_token_costs_one_row_of_the_forward_pass():
    config = config_of()
    whole = forward_flops(config, [65], counting="causal")
    before = forward_flops(config, [64], counting="causal")
    assert decode_flops(config, 65).total == whole.total - before.total


def test_cache_bytes_per_token_equal_published_ones():
    """In 16 bits: Llama-7B 524,288 bytes per token, SmolLM2 23,040."""
    assert cache_size(read_config(SIZES["llama2-7b"]), context=1).bytes_per_token == 524_288
    assert cache_size(read_config(SIZES["smollm2-135m"]), context=1).bytes_per_token == 23_040


def test_full_activation_checkpointing_costs_a_second_forward_pass_of_the_layers():
    config = config_of()
    plan = training_flops(config, (64,), recompute="full")
    last = 2 * 64 * 64 * 32 * config.num_layers  # the last GEMM of a layer is not recomputed
    assert plan.recomputed.total == plan.forward.total - plan.forward.head - last
    assert plan.total == plan.model + plan.recomputed.total


T5 = {
    "model_type": "t5",
    "vocab_size": 97,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 80,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}


def test_each_token_of_an_encoder_decoder_is_counted_in_its_stack():
    config = family_of("t5").read_config(T5)
    model = build_model(config)
    model.reset_parameters(generator=torch.Generator().manual_seed(0))
    lengths, prefixes = (30, 41), (20, 11)
    ids = torch.randint(1, 97, (71,), generator=torch.Generator().manual_seed(1))
    context = ForwardContext.packed(lengths, prefix_lengths=prefixes)
    with FlopCounterMode(display=False) as forward:
        out = model.head(model(ids, context))
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    plan = training_flops(config, lengths, prefixes=prefixes)
    counted = [mode.get_flop_counts()["Global"] for mode in (forward, backward)]
    linears = [sum(n for op, n in each.items() if "bmm" not in str(op)) for each in counted]
    assert [plan.forward.linears, plan.backward.linears] == linears
    both = training_flops(config, lengths)
    assert plan.forward.feed_forward < 0.6 * both.forward.feed_forward
    assert plan.forward.scores < 0.5 * both.forward.scores


def test_a_rate_of_zero_is_refused():
    with pytest.raises(ConfigError, match="cannot estimate a time"):
        estimate_time(1e9, 0.0)


@pytest.mark.parametrize("name", ["prompt", "ptuning mlp", "prefix", "prefix mlp"])
def test_virtual_tokens_and_their_encoder_are_counted(name):
    """The virtual tokens are rows of every layer; with a prefix the first queries are frozen."""
    config, adapter = config_of(tie_word_embeddings=False), CONFIGS[name]
    model = Decoder(config)
    model.reset_parameters(generator=torch.Generator().manual_seed(0))
    attach(model, adapter)
    ids = list(range(3, 40))
    context = pack([Sample(tuple(ids), tuple(ids))]).context()
    with FlopCounterMode(display=False) as forward:
        out = model.head(model(torch.tensor(ids), context))
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    plan = training_flops(config, (37,), adapter=adapter)
    counted = [mode.get_total_flops() for mode in (forward, backward)]
    assert [plan.forward.linears, plan.backward.linears] == counted
    assert (plan.forward.adapters > 0) == name.endswith("mlp")


def test_the_gates_of_an_lstm_are_counted():
    config = config_of()
    adapter = PTuningConfig(num_virtual_tokens=5, encoder="lstm", encoder_hidden_size=8)
    gates = 2 * 5 * 2 * 4 * 8 * ((32 + 8) + (16 + 8))  # two layers, two directions
    linears = 2 * 5 * (16 * 16 + 16 * 32)
    plan = training_flops(config, (37,), adapter=adapter)
    assert plan.forward.adapters == gates + linears
    assert plan.backward.adapters == 2 * plan.forward.adapters
