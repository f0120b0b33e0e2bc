"""Classification heads: scores equal `transformers`' sequence classifiers, in both directions."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from easyllm.models import load_model, save_model, to_classifier
from easyllm.plan.parameters import count_parameters
from tiny_models import build_tiny

BASE = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 211, "pad_token_id": 0}


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize(
    ("kind", "values"), [("llama", BASE), ("qwen2", BASE), ("gpt2", GPT2)], ids=lambda v: str(v)[:6]
)
def test_scores_equal_transformers_and_the_saved_folder_loads_there(
    kind, values, num_labels, tmp_path
):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **values, num_labels=num_labels)
    reference = AutoModelForSequenceClassification.from_config(config).eval()
    reference.save_pretrained(tmp_path / "hf")
    ids = torch.randint(1, 211, (20,))
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]

    model = load_model(tmp_path / "hf")
    assert model.config.num_labels == num_labels
    assert model.lm_head is None
    torch.testing.assert_close(model.logits(ids)[-1], expected, atol=3e-5, rtol=0)
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())

    save_model(model, tmp_path / "ours")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids[None]).logits[0], expected, atol=1e-6, rtol=0)


def test_a_language_model_becomes_a_reward_model_with_initial_scores_near_unit_size():
    model = to_classifier(build_tiny(tie_word_embeddings=False, hidden_size=64), 1, seed=3)
    scores = model.logits(torch.arange(3, 300))
    assert scores.shape == (297, 1)
    assert 0.2 < scores.std() < 5
    again = to_classifier(build_tiny(tie_word_embeddings=False, hidden_size=64), 1, seed=3)
    assert torch.equal(again.score.weight, model.score.weight)
