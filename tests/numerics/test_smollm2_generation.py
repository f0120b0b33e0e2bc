"""SmolLM2 in the engine."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from easyllm.engine import LLM, BeamParams, SamplingParams

pytestmark = pytest.mark.slow
PROMPTS = [
    "The capital of France is",
    "In the beginning of the story, the old man and his dog",
    "Water is made of hydrogen and",
]


@pytest.fixture(scope="module")
def llm(smollm2, smollm2_tokenizer):
    return LLM(model=smollm2, tokenizer=smollm2_tokenizer, num_pages=256)


def rep_4(ids):
    """Returns the share of 4-grams that occurred earlier in the text."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams)


def test_greedy_text_is_more_repetitive_than_nucleus_sampled_text(llm):
    """rep-4 of 96 tokens on three prompts."""
    greedy = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True)
    nucleus = greedy.model_copy(update={"temperature": 1.0, "top_p": 0.95, "seed": 0})
    shares = [
        sum(rep_4(done.token_ids) for done in llm.generate(PROMPTS, params)) / len(PROMPTS)
        for params in (greedy, nucleus)
    ]
    assert shares[0] > shares[1] + 0.1


def test_greedy_and_beam_search_output_equal_generate(llm, smollm2_folder):
    """In fp32, near ties could be decided by rounding; these prompts have none."""
    reference = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    greedy = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24))
    beams = llm.beam_search(PROMPTS[:1], BeamParams(num_beams=3, max_tokens=16))
    for prompt, done, options in (
        *((p, d, {"max_new_tokens": 24}) for p, d in zip(PROMPTS, greedy, strict=True)),
        (PROMPTS[0], beams[0], {"max_new_tokens": 16, "num_beams": 3}),
    ):
        ids = torch.tensor([llm.encode(prompt)])
        with torch.no_grad():
            out = reference.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, **options
            )
        theirs = out[0, ids.shape[1] :].tolist()
        assert done.token_ids[: len(theirs)] == theirs[: len(done.token_ids)]
        assert len(done.token_ids) >= 16 or done.finish_reason == "stop"


def test_ngram_drafts_copy_from_the_prompt_without_changing_the_output(smollm2, smollm2_tokenizer):
    """A list that is to be repeated: fewer passes, the same tokens."""
    text = "apples, pears, plums, cherries, quinces, medlars"
    prompt = f"List: {text}\nThe same list again: {text}\nThe same list again: apples,"
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    tokens, passes = [], []
    for draft in (None, "ngram"):
        llm = LLM(model=smollm2, tokenizer=smollm2_tokenizer, num_pages=64, draft=draft)
        runner, count = llm.engine.runner, [0]

        class Counting:
            def run(self, step, runner=runner, count=count):
                count[0] += 1
                return runner.run(step)

        llm.engine._runner = Counting()
        tokens.append(llm.generate([prompt], params)[0].token_ids)
        passes += count
    assert tokens[0] == tokens[1]
    assert passes[1] < 0.6 * passes[0]
