"""New tokens and tied heads survive a merge, here and in transformers.

The vocabulary is extended, an adapter is trained with rows of the embedding or all of it, saved,
loaded, merged, saved and loaded again: equal logits, those of the new tokens included
(huggingface/transformers#45127).
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from easyllm.adapters import DoRAConfig, LoRAConfig, merge, save_adapter
from easyllm.models import add_adapter, hf_module_name, load_model, save_model
from easyllm.models.resize import resize_embeddings
from easyllm.pipeline.merge import merge_adapter
from tiny_models import build_tiny
from trained_adapters import attached

OLD, NEW = 320, 384
IDS = torch.tensor([5, 320, 6, 321, 325, 7, 320, 40, 322, 323, 324, 9])
ROWS = tuple(range(320, 326))
CASES = {
    "rows": LoRAConfig(rank=2, trained_tokens=ROWS),
    "rows with dora": DoRAConfig(rank=2, trained_tokens=ROWS),
    "embedding": LoRAConfig(rank=2, also_trained=("embed_tokens",)),
    "embedding and norm": LoRAConfig(rank=2, also_trained=("embed_tokens", "norm")),
    "low rank": LoRAConfig(rank=2, targets=("q_proj", "embed_tokens")),
}


def extended(folder, tied, tokenizer=None):
    """Saves a tiny model whose vocabulary has six more tokens, padded to 384."""
    model = build_tiny(tie_word_embeddings=tied)
    resize_embeddings(model, {token: (token - 300, 7) for token in ROWS})
    assert model.config.vocab_size == NEW
    return save_model(model, folder, tokenizer=tokenizer)


def transformers_logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(IDS[None]).logits[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_new_tokens_survive_a_merge(tmp_path, tiny_tokenizer, case, tied):
    base = extended(tmp_path / "base", tied, tiny_tokenizer)
    model = attached(load_model(base), CASES[case])
    trained, before = model.logits(IDS), load_model(base).logits(IDS)
    assert (trained - before)[:, OLD:326].abs().max() > 0.1
    save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base=str(base))
    loaded = load_model(base, adapter=tmp_path / "a")
    torch.testing.assert_close(loaded.logits(IDS), trained, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merge(loaded).logits(IDS), trained, atol=2e-4, rtol=1e-4)

    merged = merge_adapter(str(base), tmp_path / "a", tmp_path / "merged")
    assert merged.gate.passed
    again = load_model(tmp_path / "merged")
    torch.testing.assert_close(again.logits(IDS), trained, atol=2e-4, rtol=1e-4)
    found = transformers_logits(tmp_path / "merged")
    torch.testing.assert_close(found, trained, atol=3e-4, rtol=1e-4)
    stays_tied = tied and case != "low rank"  # a low-rank update moves the embedding alone
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is stays_tied
    assert (again.lm_head is None) is stays_tied


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("modules", [["embed_tokens"], ["embed_tokens", "lm_head"], ["lm_head"]])
@pytest.mark.parametrize("tied", [True, False])
def test_what_peft_trained_survives_a_merge(tmp_path, tiny_tokenizer, tied, modules):
    """peft trains copies, so embedding and head of a tied model are two matrices afterwards."""
    from peft import LoraConfig, get_peft_model

    base = extended(tmp_path / "base", tied, tiny_tokenizer)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        trained = theirs.eval()(IDS[None]).logits[0]
    theirs.save_pretrained(tmp_path / "a")
    attached_here = add_adapter(load_model(base), tmp_path / "a")
    torch.testing.assert_close(attached_here.logits(IDS), trained, atol=3e-4, rtol=1e-4)
    assert merge_adapter(str(base), tmp_path / "a", tmp_path / "merged").gate.passed
    for found in (
        load_model(tmp_path / "merged").logits(IDS),
        transformers_logits(tmp_path / "merged"),
    ):
        torch.testing.assert_close(found, trained, atol=3e-4, rtol=1e-4)
