"""What a token event reports beside its token: the end's cause, special tokens, cached tokens."""

import pytest

from easyllm.engine import LLM, SamplingParams


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="", page_size=4)


def events_of(llm, prompt, **params):
    wanted = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params})
    return list(llm.stream(llm.encode(prompt), wanted))


def text_of(events):
    return "".join(event.text for event in events)


def test_the_last_event_names_the_stop_string_that_ended_the_completion(llm):
    text = text_of(events_of(llm, "Once upon"))
    stop = text[3:5]
    events = events_of(llm, "Once upon", stop=("not in the text", stop))
    assert text_of(events) == text[: text.index(stop)]
    assert (events[-1].finish_reason, events[-1].stop) == ("stop", stop)
    assert {event.stop for event in events[:-1]} <= {None}


def test_include_stop_ends_the_text_with_the_stop_string(llm):
    text = text_of(events_of(llm, "Once upon"))
    stop = text[3:5]
    found = text_of(events_of(llm, "Once upon", stop=(stop,), include_stop=True))
    assert found == text[: text.index(stop) + len(stop)]


def test_the_last_event_names_the_token_id_that_ended_the_completion(llm):
    ids = [event.token_id for event in events_of(llm, "Once upon")]
    events = events_of(llm, "Once upon", stop_token_ids=(ids[4],))
    assert events[-1].stop == ids[4]
    assert events[-1].finish_reason == "stop"


def test_no_stop_is_named_when_the_length_ended_the_completion(llm):
    assert events_of(llm, "Once upon")[-1].stop is None


def test_special_tokens_are_in_the_text_only_if_asked_for(llm):
    special = min(llm.tokenizer.special_ids)
    bias = {"logit_bias": {special: 100.0}, "max_tokens": 2}
    assert text_of(events_of(llm, "Once upon", **bias)) == ""
    shown = text_of(events_of(llm, "Once upon", skip_special_tokens=False, **bias))
    assert shown == llm.tokenizer.decode([special, special], skip_special=False)


def test_the_first_event_counts_the_prompt_tokens_found_in_the_prefix_cache(llm):
    llm.engine.clear_prefix_cache()
    prompt = "A prompt of more than a few pages, which is asked twice in a row."
    cold, warm = events_of(llm, prompt), events_of(llm, prompt)
    length = len(llm.encode(prompt))
    assert cold[0].cached_tokens == 0
    assert warm[0].cached_tokens == (length - 1) // 4 * 4
    assert all(event.cached_tokens == 0 for event in warm[1:])
