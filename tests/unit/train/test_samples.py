"""Sample generations during a run."""

import torch

from easyllm.engine import LLM, SamplingParams
from easyllm.train.callbacks.samples import build_sampler
from easyllm.train.config import SamplesConfig
from tiny_models import build_tiny


def test_samples_are_generated_with_the_current_weights(tiny_tokenizer):
    """No cache entries of older weights are used, and the model is left in training mode."""
    model = build_tiny(seed=2).double().train()
    prompts = ("The quick brown fox jumps over the lazy dog. " * 3, "hello")
    show = build_sampler(SamplesConfig(prompts=prompts, max_tokens=8), model, tiny_tokenizer)

    def expected():
        llm = LLM(model=model, tokenizer=tiny_tokenizer)
        done = llm.generate(list(prompts), SamplingParams(temperature=0, max_tokens=8))
        return [each.text for each in done]

    seen = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).double()
        samples = show()
        assert [sample["text"] for sample in samples] == expected()
        assert [sample["prompt"] for sample in samples] == list(prompts)
        assert model.training
        seen.append(samples[0]["text"])
    assert len(set(seen)) > 1
