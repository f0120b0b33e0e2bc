"""One prompt alone is one prompt, not a sequence of its characters."""

import pytest
import torch

from easyllm.engine import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")


def test_a_text_or_ids_alone_are_one_prompt(llm):
    (expected,) = llm.generate(["hello"], GREEDY)
    for alone in ("hello", llm.encode("hello"), tuple(llm.encode("hello"))):
        (found,) = llm.generate(alone, GREEDY)
        assert found.token_ids == expected.token_ids
    assert llm.generate([], GREEDY) == []


def test_an_embedding_of_one_text_has_one_row(llm):
    assert torch.equal(llm.embed("hello"), llm.embed(["hello"]))


def test_beams_of_one_text_are_those_of_a_list(llm):
    expected, found = llm.beam_search(["hello"]), llm.beam_search("hello")
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
