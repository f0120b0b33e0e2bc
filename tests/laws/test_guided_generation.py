"""Guided decoding in the engine: every finished output has its form, whatever else happens."""

import json

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, Request, SamplingParams
from easyllm.engine.draft_model import ModelDrafter
from easyllm.engine.guide_spec import GuideError, GuideSpec
from easyllm.engine.guided import Guides
from easyllm.engine.speculative import NgramDrafter
from engine_requests import results
from guide_texts import is_valid
from random_logits import closing_ids, random_engine
from random_schemas import random_schema
from tiny_models import build_tiny

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "中"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PARAMS = {"temperature": 1.0, "max_tokens": 200, "seed": 1}


@pytest.fixture(scope="module")
def model():
    """In fp64: in fp32 the rounding of a row depends on the number of rows."""
    return build_tiny(seed=3, eos_token_id=2).double()


@pytest.fixture(scope="module")
def llm(model, tiny_tokenizer):
    return LLM(model=model, tokenizer=tiny_tokenizer)


# ---- a thousand schemas


@pytest.fixture(scope="module")
def smollm2_guides(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    return Guides(tokenizer, vocab_size=tokenizer.vocab_size, eos_ids=(tokenizer.eos_id,))


def outputs_of_schemas(tokenizer, guides, seeds, **options):
    """Returns random schemas, each with the output of an engine with random logits."""
    engine = random_engine(tokenizer, favoured=closing_ids(tokenizer), **options)
    schemas = [random_schema(seed) for seed in seeds]
    params = SamplingParams(temperature=0, max_tokens=600)
    requests = [
        Request(
            prompt_ids=(5 + number,),
            params=params,
            mask=guides.compile(GuideSpec(json_schema=schema)),
        )
        for number, schema in enumerate(schemas)
    ]
    return [(s, each) for s, (each,) in zip(schemas, results(engine, requests), strict=True)]


def check_outputs(pairs):
    for schema, output in pairs:
        assert output.finish_reason == "stop", (schema, output.text)
        assert is_valid(output.text, schema), (schema, output.text)


def test_outputs_of_random_schemas_and_random_logits_are_valid(smollm2_tokenizer, smollm2_guides):
    check_outputs(outputs_of_schemas(smollm2_tokenizer, smollm2_guides, range(200)))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 5))
def test_outputs_of_a_thousand_schemas_are_valid(smollm2_tokenizer, smollm2_guides, part):
    seeds = range(200 * part, 200 * (part + 1))
    check_outputs(outputs_of_schemas(smollm2_tokenizer, smollm2_guides, seeds))


def test_drafts_that_are_looked_up_leave_guided_outputs_unchanged(
    smollm2_tokenizer, smollm2_guides
):
    plain = outputs_of_schemas(smollm2_tokenizer, smollm2_guides, range(20))
    drafted = outputs_of_schemas(
        smollm2_tokenizer, smollm2_guides, range(20), drafter=NgramDrafter(4)
    )
    assert [o.token_ids for _, o in drafted] == [o.token_ids for _, o in plain]


# ---- the interface


def test_generate_and_chat_take_one_guide_or_one_per_prompt(llm):
    schema, choice = GuideSpec(json_schema=PERSON), GuideSpec(choice=("yes", "no"))
    params = SamplingParams(**PARAMS)
    both = llm.generate(["The", "quick"], params, guide=schema)
    assert all(is_valid(each.text, PERSON) for each in both)
    one, other, free = llm.generate(["The", "quick", "fox"], params, guide=[schema, choice, None])
    assert is_valid(one.text, PERSON)
    assert other.text in ("yes", "no")
    assert free.token_ids == llm.generate(["fox"], params)[0].token_ids
    answer = llm.chat([{"role": "user", "content": "Hi"}], params, guide=choice)
    assert answer.text in ("yes", "no")
    streamed = "".join(e.text for e in llm.stream(llm.encode("The"), params, guide=choice))
    assert streamed in ("yes", "no")


def test_a_guide_for_another_number_of_prompts_is_refused(llm):
    with pytest.raises(ConfigError, match="1 guides are given for 2 prompts"):
        llm.generate(["a", "b"], guide=[GuideSpec(choice=("a",))])


def test_an_invalid_guide_is_refused_and_the_engine_lives(llm):
    for bad in (GuideSpec(json_schema={"uniqueItems": True}), GuideSpec(regex="(?=a)")):
        with pytest.raises(GuideError):
            llm.generate(["a"], guide=bad)
    assert not llm.engine.busy
    with pytest.raises(GuideError, match="ignore_eos"):
        llm.generate(["a"], SamplingParams(ignore_eos=True), guide=GuideSpec(regex="a"))
    (done,) = llm.generate(["a"], SamplingParams(**PARAMS), guide=GuideSpec(regex="a"))
    assert done.text == "a"


# ---- with everything else that the engine does


def test_each_of_several_completions_has_its_form(llm):
    params = SamplingParams(**PARAMS, n=4)
    (first,) = llm.generate(["The"], params, guide=GuideSpec(json_schema=PERSON))
    every = [first, *first.others]
    assert all(is_valid(each.text, PERSON) for each in every)
    assert len({each.text for each in every}) > 1


def test_preempted_requests_give_the_same_guided_outputs(model, tiny_tokenizer):
    guide = GuideSpec(json_schema=PERSON)
    params = SamplingParams(**PARAMS | {"max_tokens": 120})
    plain = LLM(model=model, tokenizer=tiny_tokenizer)
    tight = LLM(model=model, tokenizer=tiny_tokenizer, page_size=2, num_pages=62, max_running=8)
    prompts = [[5 + i, 7, 9] for i in range(8)]
    expected = [each.token_ids for each in plain.generate(prompts, params, guide=guide)]
    assert [each.token_ids for each in tight.generate(prompts, params, guide=guide)] == expected
    assert tight.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_model_keeps_the_form(model, tiny_tokenizer, temperature):
    """The draft model knows nothing of the guide; its tokens are checked like all others."""
    params = SamplingParams(**PARAMS | {"temperature": temperature})
    guide = GuideSpec(json_schema=PERSON)
    drafted = LLM(model=model, tokenizer=tiny_tokenizer, draft=build_tiny(seed=9).double())
    assert isinstance(drafted.engine.drafter, ModelDrafter)
    found = drafted.generate([[5], [6], [7]], params, guide=guide)
    assert all(is_valid(each.text, PERSON) for each in found if each.finish_reason == "stop")
    assert any(each.finish_reason == "stop" for each in found)
    if temperature == 0:
        plain = LLM(model=model, tokenizer=tiny_tokenizer)
        expected = plain.generate([[5], [6], [7]], params, guide=guide)
        assert [e.token_ids for e in found] == [e.token_ids for e in expected]


def test_a_batch_of_guided_and_free_rows_equals_each_alone(llm):
    guides = [GuideSpec(json_schema=PERSON), None, GuideSpec(choice=("yes", "no")), None]
    prompts = ["The", "quick", "brown", "fox"]
    for changes in ({}, {"temperature": 0}, {"repetition_penalty": 1.2, "min_tokens": 2}):
        params = SamplingParams(**PARAMS | {"max_tokens": 60} | changes)
        together = llm.generate(prompts, params, guide=guides)
        alone = [
            llm.generate([p], params, guide=g)[0] for p, g in zip(prompts, guides, strict=True)
        ]
        assert [e.token_ids for e in together] == [e.token_ids for e in alone]


def test_deterministic_mode_gives_the_same_guided_outputs_in_any_batch(kernels, tiny_tokenizer):
    model = build_tiny(seed=3, eos_token_id=2)
    llm = LLM(model=model, tokenizer=tiny_tokenizer, deterministic=True)
    params = SamplingParams(**PARAMS, logprobs=2)
    guide = GuideSpec(json_schema=PERSON)
    prompts = [[5 + i, 7] for i in range(6)]
    together = llm.generate(prompts, params, guide=guide)
    alone = [llm.generate([prompt], params, guide=guide)[0] for prompt in prompts]
    assert together == alone
    assert all(is_valid(each.text, PERSON) for each in together)


def test_raw_logprobs_are_the_models_own_and_processed_ones_follow_the_mask(llm, model):
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=40, logprobs=3)
    (done,) = llm.generate([[5, 6]], params, guide=GuideSpec(regex="[ab]{3}"))
    ids = torch.tensor([5, 6, *done.token_ids])
    raw = model.logits(ids)[1:-1].log_softmax(-1).gather(1, ids[2:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(done.logprobs, dtype=raw.dtype), raw, atol=1e-6, rtol=0)
    for detail, value in zip(done.details, raw.tolist(), strict=True):
        assert detail.raw == pytest.approx(value, abs=1e-6)
        assert len(detail.top_raw) == 3
        assert detail.processed >= detail.raw
    assert done.details[-1].processed == pytest.approx(0.0)  # only EOS was allowed
    assert [i for i, _ in done.details[-1].top_processed] == [2]


def test_a_minimum_length_beyond_a_completed_guide_ends_without_eos(llm):
    params = SamplingParams(**PARAMS, min_tokens=30)
    (done,) = llm.generate(["a"], params, guide=GuideSpec(choice=("yes",)))
    assert (done.text, done.finish_reason) == ("yes", "stop")
    assert 2 not in done.token_ids
    params = SamplingParams(**PARAMS, min_tokens=10)
    (done,) = llm.generate(["a"], params, guide=GuideSpec(regex="[a-z]{1,40}"))
    assert len(done.token_ids) >= 10


def test_a_stop_string_ends_a_guided_text_anywhere(llm):
    params = SamplingParams(**PARAMS, stop=("b",))
    (done,) = llm.generate(["a"], params, guide=GuideSpec(choice=("aabaa",)))
    assert (done.text, done.finish_reason) == ("aa", "stop")


def test_a_cut_text_ends_by_length(llm):
    params = SamplingParams(**PARAMS | {"max_tokens": 3})
    (done,) = llm.generate(["a"], params, guide=GuideSpec(json_schema=PERSON))
    assert done.finish_reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(done.text)


def test_a_guide_whose_mask_fails_cancels_only_its_own_completion(tiny_tokenizer, caplog):
    """The limit of work for one mask is exceeded in the middle of a text."""
    engine = random_engine(tiny_tokenizer, vocab_size=320)
    guides = Guides(tiny_tokenizer, vocab_size=320, eos_ids=(2,))
    source = guides.compile(GuideSpec(regex="[a-z]{200}"))

    class Failing:
        def start(self):
            mask = source.start()
            mask.matcher.consume_token(1)  # puts llguidance's matcher into its error state
            return mask

    params = SamplingParams(temperature=0, max_tokens=20)
    requests = [Request(prompt_ids=(5,), params=params, mask=m) for m in (Failing(), source)]
    (broken,), (fine,) = results(engine, requests)
    assert broken.finish_reason == "cancelled"
    assert broken.token_ids == []
    assert fine.text.isalpha()
    assert "a token mask failed" in caplog.text
    assert engine.pool.available == engine.pool.num_pages
