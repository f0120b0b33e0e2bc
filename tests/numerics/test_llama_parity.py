"""Llama models here and in `transformers`: the same logits from the same weights, in both directions."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from easyllm.models import load_model, save_model

VARIANTS = {
    "mha untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "gqa tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mqa with biases": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32, "rope_theta": 500000.0},
}


def tiny_hf(**changes):
    """A tiny random model of `transformers`, biases and norm weights random too."""
    values = {
        "vocab_size": 211,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    } | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_transformers_and_the_saved_folder_loads_there(changes, tmp_path):
    reference = tiny_hf(**changes)
    reference.save_pretrained(tmp_path / "hf")
    ids = torch.randint(0, 211, (60,))
    expected = reference(ids[None]).logits[0]

    model = load_model(tmp_path / "hf")
    torch.testing.assert_close(model.logits(ids), expected, atol=3e-5, rtol=0)

    save_model(model, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(again(ids[None]).logits[0], expected, atol=0, rtol=0)


def test_smollm2_is_no_further_from_fp64_than_twice_transformers(smollm2, smollm2_folder):
    """Law 1: both fp32 forwards are compared with the fp64 one on 512 tokens."""
    ids = torch.randint(0, 49152, (512,), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = reference(ids[None]).logits[0].double()
        exact = reference.double()(ids[None]).logits[0]
    ours = smollm2.logits(ids).double()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    agree = (ours.argmax(-1) == exact.argmax(-1)).double().mean()
    assert agree > 0.99


def test_fp64_forward_equals_transformers_fp64_forward(smollm2_folder):
    ids = torch.arange(1000, 1064)
    reference = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    model = load_model(smollm2_folder, dtype="float64")
    # transformers computes its rotary tables and norms in fp32 whatever the model's dtype
    torch.testing.assert_close(model.logits(ids), expected, atol=2e-3, rtol=0)
