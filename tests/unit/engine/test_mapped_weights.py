"""Engines whose weights are mapped from the weight cache: the same tokens, and when they move."""

import pytest
import torch

from easyllm.engine import LLM, SamplingParams, compiled_step
from easyllm.models import save_model, weight_cache
from easyllm.ops.kernels import kernels_for
from tiny_models import build_tiny

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = [5, 6, 7, 8]


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_tokenizer, kernels):
    """A model whose quantized weights are in the cache."""
    kernels_for(torch.zeros(1))  # found or built in the usual cache folder
    monkeypatch.setenv("EASYLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EASYLLM_WEIGHT_CACHE_GB", "1")
    monkeypatch.setattr(weight_cache, "MIN_BYTES", 0)
    monkeypatch.setattr(weight_cache, "SETTLED_S", 0)
    monkeypatch.setattr(compiled_step, "MAPPED_STEPS", 5)
    return save_model(build_tiny(), tmp_path / "model", tokenizer=tiny_tokenizer)


@pytest.fixture
def expected(folder):
    """The tokens without the cache."""
    return LLM(folder, quantize="int4", weight_cache=False).generate([PROMPT], PARAMS)[0].token_ids


def weight_of(llm):
    return llm.model.layers[0].mixer.q_proj.storage.payload


@pytest.mark.parametrize(("huge", "stays"), [(True, True), (False, False)])
def test_mapped_weights_move_after_some_steps_unless_their_pages_are_huge(
    folder, expected, monkeypatch, huge, stays
):
    monkeypatch.setattr(compiled_step, "in_huge_pages", lambda _: huge)
    for _ in range(2):  # stored by the first, read by the second
        llm = LLM(folder, quantize="int4")
        mapped = weight_of(llm).data_ptr()
        assert llm.model.maps_weights
        assert llm.generate([PROMPT], PARAMS)[0].token_ids == expected
        assert (weight_of(llm).data_ptr() == mapped) == stays
        assert llm.model.maps_weights == stays
        assert llm.generate([PROMPT], PARAMS)[0].token_ids == expected


def test_mapped_weights_are_used_where_they_are_in_short_runs(folder, monkeypatch):
    monkeypatch.setattr(compiled_step, "in_huge_pages", lambda _: False)
    llm = LLM(folder, quantize="int4")
    mapped = weight_of(llm).data_ptr()
    llm.generate([PROMPT], PARAMS.model_copy(update={"max_tokens": 4}))
    assert weight_of(llm).data_ptr() == mapped


def test_two_engines_on_one_model_move_its_weights_once(folder, expected, monkeypatch):
    monkeypatch.setattr(compiled_step, "in_huge_pages", lambda _: False)
    first = LLM(folder, quantize="int4")
    second = LLM(model=first.model, tokenizer=first.tokenizer)
    short = PARAMS.model_copy(update={"max_tokens": 3})
    assert first.generate([PROMPT], short)[0].token_ids == expected[:3]
    assert second.generate([PROMPT], PARAMS)[0].token_ids == expected
    moved = weight_of(first).data_ptr()
    for llm in (first, second, first):
        assert llm.generate([PROMPT], PARAMS)[0].token_ids == expected
    assert weight_of(first).data_ptr() == moved
