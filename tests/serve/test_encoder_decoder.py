"""An encoder–decoder (T5) over HTTP: the prompt is the encoder's text, the completion follows."""

import json

import httpx
import pytest
import torch

from easyllm.engine import LLM
from easyllm.models.families import family_of
from easyllm.models.scratch import build_scratch
from running_server import running

SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def model():
    sizes = {"model_type": "t5", "vocab_size": 320, **SIZES}
    model = build_scratch(family_of("t5").read_config(sizes), seed=5).eval()
    with torch.no_grad():  # a new model repeats its start token, which has no text
        for name, weights in model.named_parameters():
            if "layers." in name and weights.ndim == 2:
                weights.mul_(8)
    return model


@pytest.fixture(scope="module")
def address(model, tiny_tokenizer):
    with running({"t5": LLM(model=model, tokenizer=tiny_tokenizer, source="")}) as address:
        yield address


def ask(address, **changes):
    body = {"model": "t5", "temperature": 0, "max_tokens": 6, "ignore_eos": True} | changes
    return httpx.post(f"{address}/v1/completions", json=body, timeout=60)


def test_completions_are_those_of_the_model(address, model, tiny_tokenizer):
    """Of a prompt as text and as ids, and as a stream."""
    ids = tiny_tokenizer.encode("The quick brown fox")
    start, expected = model.config.encoder.start_token_id, list[int]()
    for _ in range(6):
        tokens = torch.tensor([*ids, start, *expected])
        expected.append(int(model.logits(tokens, prefix=len(ids))[-1].argmax()))
    text = tiny_tokenizer.decode(expected)
    assert len(set(expected)) > 1
    assert text
    for prompt in ("The quick brown fox", ids):
        answer = ask(address, prompt=prompt)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == text
        assert answer.json()["usage"]["completion_tokens"] == 6
    lines = ask(address, prompt=ids, stream=True).text.splitlines()
    pieces = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    choices = [choice for piece in pieces for choice in piece["choices"]]
    assert len(choices) > 1
    assert "".join(choice["text"] for choice in choices) == text
    assert "data: [DONE]" in lines


def test_log_probabilities_of_a_prompt_are_refused(address):
    answer = ask(address, prompt="The quick", echo=True, logprobs=1)
    assert answer.status_code == 400
    assert "no log-probabilities of a prompt, which its encoder reads" in answer.text
