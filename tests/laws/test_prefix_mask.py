"""Prefix language models: bidirectional attention in the prompt, in training and serving."""

import pytest
import torch

from easyllm.batches.packing import pack
from easyllm.core.errors import CheckpointError
from easyllm.engine import Engine, Request, SamplingParams
from easyllm.examples.sample import Sample
from easyllm.models import load_model, save_model
from easyllm.models.hf_config import read_config, write_config
from easyllm.nn.config import LinearAttentionConfig
from easyllm.nn.context import ForwardContext
from tiny_models import build_tiny


@pytest.fixture
def prefix_model():
    model = build_tiny(seed=4)
    model.config = model.config.changed(prompt_mask="prefix")
    return model


def ids_of(n, seed=0):
    return torch.randint(3, 320, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_the_prefix_of_a_sample_ends_where_its_first_label_is_predicted():
    prompt, answer = [5, 6, 7], [8, 9, 10]
    sample = Sample.from_mask(prompt + answer, [False] * 3 + [True] * 3)
    batch, config = pack([sample, sample]), build_tiny().config
    for mask, length in (("prefix", 3), ("prefix_before_last", 2)):
        context = batch.context(mask=config.changed(prompt_mask=mask))
        assert context.prefix_lengths == (length, length)
    assert batch.context().prefix_lengths is None


def test_a_prompt_token_sees_later_prompt_tokens_but_no_completion_token(prefix_model):
    prompt, answer = ids_of(9), ids_of(6, seed=1)

    def hidden(prompt, answer):
        context = ForwardContext.packed([15], prefix_lengths=(9,))
        return prefix_model(torch.tensor(prompt + answer), context)

    base = hidden(prompt, answer)
    other_prompt = hidden([*prompt[:8], 300], answer)
    other_answer = hidden(prompt, [*answer[:-1], 300])
    assert not torch.allclose(base[0], other_prompt[0])
    assert torch.equal(base[:14], other_answer[:14])


def test_engine_logprobs_equal_those_of_the_training_forward_under_the_prefix_mask(
    prefix_model, tiny_tokenizer
):
    prompts = [ids_of(15, seed=6), ids_of(4, seed=7)]
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=12, ignore_eos=True)
    requests = [Request(prompt_ids=tuple(p), params=params) for p in prompts]
    events = list(Engine(prefix_model, tiny_tokenizer).run(requests))
    for prompt, request in zip(prompts, requests, strict=True):
        mine = [e for e in events if e.request_id == request.id]
        ids = prompt + [e.token_id for e in mine]
        context = ForwardContext.packed([len(ids)], prefix_lengths=(len(prompt),))
        logprobs = prefix_model.head(prefix_model(torch.tensor(ids), context)).log_softmax(-1)
        causal = prefix_model.logits(ids).log_softmax(-1)
        for offset, event in enumerate(mine):
            row = len(prompt) + offset - 1
            assert event.logprob == pytest.approx(logprobs[row, event.token_id].item(), abs=3e-5)
        assert not torch.allclose(causal, logprobs, atol=1e-2)


def test_the_mask_is_stored_in_the_checkpoint(prefix_model, tmp_path):
    folder = save_model(prefix_model, tmp_path / "m")
    assert load_model(folder).config.prompt_mask == "prefix"


def test_linear_attention_is_refused_when_the_configuration_is_created():
    config = build_tiny().config
    linear = LinearAttentionConfig(num_heads=2, head_dim=16)
    layers = (config.layers[0].model_copy(update={"mixer": linear}),)
    with pytest.raises(ValueError, match="prompt_mask=prefix needs softmax attention"):
        config.changed(layers=layers, prompt_mask="prefix")


def test_an_unknown_mask_in_a_checkpoint_is_refused(tmp_path, prefix_model):
    hf = write_config(prefix_model.config) | {"prompt_mask": "sideways"}
    with pytest.raises(ValueError, match="prompt_mask"):
        read_config(hf)
    folder = save_model(prefix_model, tmp_path / "m")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"prefix"', '"sideways"'))
    with pytest.raises(CheckpointError, match="prompt_mask"):
        load_model(folder)
