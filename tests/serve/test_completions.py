"""`/v1/completions`: the official client, echo and log-probabilities, several prompts."""

import httpx
import openai
import pytest
import torch

from easyllm.engine import LLM, SamplingParams
from running_server import running

PATH = "/v1/completions"
PROMPT = "Once upon a time"
GREEDY = {"model": "m", "temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")


@pytest.fixture(scope="module")
def address(tiny_model, tiny_tokenizer):
    """A server with an engine of its own: `llm` generates in the thread of the test."""
    served = LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")
    with running({"m": served}) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(address, **fields):
    return httpx.post(f"{address}{PATH}", json={**GREEDY, **fields}, timeout=60)


def test_the_text_is_that_of_the_engine(client, llm):
    answer = client.completions.create(**GREEDY, prompt=PROMPT)
    wanted = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=6))[0]
    assert answer.choices[0].text == wanted.text
    assert answer.choices[0].finish_reason == wanted.finish_reason
    assert answer.usage.prompt_tokens == len(llm.encode(PROMPT))


def test_token_ids_and_lists_of_prompts_give_a_choice_for_each(client, llm):
    ids = llm.encode(PROMPT)
    texts = [PROMPT, "Two"]
    answer = client.completions.create(**GREEDY, prompt=texts, n=2, best_of=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    alone = [client.completions.create(**GREEDY, prompt=text).choices[0].text for text in texts]
    assert [choice.text for choice in answer.choices] == [alone[0]] * 2 + [alone[1]] * 2
    by_id = client.completions.create(**GREEDY, prompt=ids)
    assert by_id.choices[0].text == alone[0]
    both = client.completions.create(**GREEDY, prompt=[ids, llm.encode("Two")])
    assert [choice.text for choice in both.choices] == alone


def test_a_stream_of_several_prompts_gives_the_same_texts(client):
    prompts = [PROMPT, "Two", "三"]
    whole = client.completions.create(**GREEDY, prompt=prompts)
    texts, reasons = {}, {}
    for chunk in client.completions.create(**GREEDY, prompt=prompts, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}


def test_echo_with_logprobs_scores_the_prompt_as_lm_eval_reads_it(address, llm):
    context, continuation = llm.encode(PROMPT), llm.encode(" there was")
    ids = context + continuation
    request = {"prompt": [ids, ids], "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    answer = ask(address, **request).json()
    with torch.inference_mode():
        logprobs = llm.model.logits(ids).log_softmax(-1)
    for choice in answer["choices"]:
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None
        assert len(found["tokens"]) == len(ids) + 1  # the generated token is in the lists
        values = found["token_logprobs"][len(context) : -1]
        tops = found["top_logprobs"][len(context) : -1]
        assert None not in found["token_logprobs"][1:]
        for place, (value, top) in enumerate(zip(values, tops, strict=True), len(context)):
            row = logprobs[place - 1]
            assert value == pytest.approx(row[ids[place]].item(), abs=1e-4)
            greedy = int(row.argmax()) == ids[place]
            assert (value == max(top.values())) == greedy


def test_the_greedy_continuation_has_exactly_the_top_value(address, llm):
    ids = llm.encode(PROMPT)
    done = llm.generate([ids], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))[0]
    request = {"prompt": [ids + done.token_ids], "max_tokens": 1, "logprobs": 1, "echo": True}
    found = ask(address, **request).json()["choices"][0]["logprobs"]
    values = found["token_logprobs"][len(ids) : -1]
    tops = found["top_logprobs"][len(ids) : -1]
    assert [max(top.values()) for top in tops] == values


def test_echo_begins_the_text_with_the_prompt_and_offsets_point_into_it(address, llm):
    answer = ask(address, prompt=PROMPT, echo=True, logprobs=0, max_tokens=4).json()
    text = answer["choices"][0]["text"]
    plain = ask(address, prompt=PROMPT, max_tokens=4).json()["choices"][0]["text"]
    assert text == PROMPT + plain
    offsets = answer["choices"][0]["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    tokens = answer["choices"][0]["logprobs"]["tokens"][: len(llm.encode(PROMPT))]
    assert all(text[at:].startswith(own) for at, own in zip(offsets, tokens, strict=False))
    assert offsets[len(tokens)] == len(PROMPT)


def test_no_tokens_with_echo_only_reads_the_prompt(address, llm):
    answer = ask(address, prompt=PROMPT, echo=True, logprobs=1, max_tokens=0).json()
    assert answer["choices"][0]["text"] == PROMPT
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(llm.encode(PROMPT))
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "two"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": [2**30]}, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "suffix": "end"}, "suffix"),
        ({"prompt": "x", "best_of": 1, "n": 2}, "best_of"),
        ({"prompt": "x", "best_of": 3, "stream": True}, "best_of"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "x", "min_tokens": 9}, "min_tokens"),
        ({"prompt": "x", "messages": []}, "messages"),
        ({"prompt": "long " * 500}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(address, fields, param):
    answer = ask(address, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_neutral_values_change_nothing(address):
    plain = ask(address, prompt=PROMPT).json()["choices"]
    neutral = {"suffix": "", "user": "ada", "logit_bias": {}, "stop": None, "echo": False}
    assert ask(address, prompt=PROMPT, **neutral).json()["choices"] == plain
