"""Parameter counts from configurations: published figures, and the actual modules."""

import pytest
import torch

from easyllm.adapters import LoRAConfig
from easyllm.models.families import FAMILIES, family_of
from easyllm.nn import build_model
from easyllm.plan import count_parameters
from easyllm.plan.parts import count_adapter_parameters
from tiny_models import tiny_config

SIZES = {name: size for family in FAMILIES.values() for name, size in family.sizes.items()}
PUBLISHED = {
    # Qwen1.5
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-7b": 7_721_324_544,
    "qwen1.5-14b": 14_167_290_880,
    "qwen1.5-32b": 32_512_218_112,
    "qwen1.5-72b": 72_287_920_128,
    # Mixtral, Mistral and Llama 2
    "mixtral-8x7b": 46_702_792_704,
    "mistral-7b": 7_241_732_096,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    # other models
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "gpt2": 124_439_808,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "flan-t5-small": 76_961_152,
    "gpt3-175b": 174_604_259_328,
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
}


def config_of(name):
    size = SIZES[name]
    return family_of(size["model_type"]).read_config(size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_ones(name):
    assert count_parameters(config_of(name)).total == PUBLISHED[name]


@pytest.mark.parametrize("name", SIZES)
def test_a_count_equals_that_of_the_modules(name):
    with torch.device("meta"):
        model = build_model(config_of(name))
    count = count_parameters(config_of(name))
    assert count.total == sum(p.numel() for p in model.parameters())
    norms = {n: p for n, p in model.named_parameters() if "norm" in n and ".mixer." not in n}
    assert count.norm == sum(p.numel() for p in norms.values())


def test_mixtral_is_not_56_billion():
    count = count_parameters(config_of("mixtral-8x7b"))
    assert count.active == 12_879_925_248
    assert count.inactive == 32 * 6 * 176_160_768  # six inactive experts in each layer


@pytest.mark.parametrize(("rank", "expected"), [(1, 4_718_592), (8, 37_748_736)])
def test_lora_on_queries_and_values_of_gpt3_has_the_published_size(rank, expected):
    """Hu et al. 2021 (arXiv 2106.09685), table 4: 4.7 M and 37.7 M parameters."""
    sizes = {"hidden_size": 12288, "num_hidden_layers": 96, "num_attention_heads": 96}
    sizes |= {"num_key_value_heads": 96, "head_dim": 128, "intermediate_size": 49152}
    config = family_of("llama").read_config(tiny_config(**sizes))
    adapter = LoRAConfig(rank=rank, targets=("q_proj", "v_proj"))
    assert count_adapter_parameters(config, adapter) == expected
