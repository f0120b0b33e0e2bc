"""Embeddings of `LLM.embed`: pooled hidden states of unit length."""

import pytest
import torch

from easyllm.core.errors import ConfigError, ContextLengthError
from easyllm.engine import LLM
from easyllm.nn.context import ForwardContext

TEXTS = ["One text.", "Another, which is a little longer than the first.", "三个"]


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(
        model=tiny_model, tokenizer=tiny_tokenizer, source="", max_step_tokens=16, max_running=4
    )


def states_of(llm, text):
    ids = torch.tensor(llm.encode(text))
    with torch.inference_mode():
        return llm.model(ids, ForwardContext.packed([len(ids)]))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_the_normalised_hidden_states_of_each_text_alone(llm, pooling):
    found = llm.embed(TEXTS, pooling=pooling)
    assert found.shape == (3, llm.model.config.hidden_size)
    for row, text in zip(found, TEXTS, strict=True):
        states = states_of(llm, text)
        wanted = states.mean(0) if pooling == "mean" else states[-1]
        torch.testing.assert_close(row, wanted / wanted.norm(), atol=1e-5, rtol=1e-5)


def test_token_ids_are_accepted_in_place_of_text(llm):
    assert torch.equal(llm.embed([llm.encode(TEXTS[0])]), llm.embed(TEXTS[:1]))


def test_what_cannot_be_embedded_is_refused(llm):
    with pytest.raises(ConfigError, match="empty"):
        llm.embed([[]])
    with pytest.raises(ContextLengthError, match="context"):
        llm.embed([[1] * (llm.engine.max_seq_len + 1)])
    with pytest.raises(ConfigError, match="adapter 'x'"):
        llm.embed(TEXTS, adapter="x")
