"""SmolLM2 here and in `transformers` (test_families has tiny models of every family)."""

import torch
from transformers import AutoModelForCausalLM

from easyllm.models import load_model


def test_smollm2_is_no_further_from_fp64_than_twice_transformers(smollm2, smollm2_folder):
    """Law 1: both fp32 forward passes are compared with the fp64 one on 512 tokens."""
    ids = torch.randint(0, 49152, (512,), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = reference(ids[None]).logits[0].double()
        exact = reference.double()(ids[None]).logits[0]
    ours = smollm2.logits(ids).double()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    agree = (ours.argmax(-1) == exact.argmax(-1)).double().mean()
    assert agree > 0.99


def test_the_fp64_forward_pass_equals_transformers(smollm2_folder):
    ids = torch.arange(1000, 1064)
    reference = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    model = load_model(smollm2_folder, dtype="float64")
    # transformers computes its rotary tables and norms in fp32 for any model dtype
    torch.testing.assert_close(model.logits(ids), expected, atol=2e-3, rtol=0)
