"""Beam search: one beam is greedy, enough beams are exhaustive, others match `transformers`."""

import itertools

import pytest
import torch
from transformers import LlamaForCausalLM

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, BeamParams, Request, SamplingParams
from easyllm.engine.beam import beam_search
from easyllm.models import save_model
from tiny_models import build_tiny

EOS = 2


def small_model(seed=5, **changes):
    """A model with few tokens, so that beams end, and end early."""
    values = {"vocab_size": 24, "max_position_embeddings": 64} | changes
    return build_tiny(seed=seed, **values).double()


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    folder = save_model(model, tmp_path_factory.mktemp("beams") / "m")
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture
def llm(model, tiny_tokenizer):
    return LLM(model=model, tokenizer=tiny_tokenizer, page_size=4, num_pages=400)


def prompts(count=4):
    generator = torch.Generator().manual_seed(3)
    lengths = range(3, 3 + 2 * count, 2)
    return [torch.randint(3, 24, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_beam_search_equals_transformers(llm, reference, num_beams, length_penalty, early_stopping):
    params = BeamParams(
        num_beams=num_beams,
        max_tokens=18,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        n=num_beams,
    )
    ended = 0
    for prompt, best in zip(prompts(), llm.beam_search(prompts(), params), strict=True):
        with torch.no_grad():
            theirs = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                num_beams=num_beams,
                num_return_sequences=num_beams,
                max_new_tokens=18,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                do_sample=False,
                eos_token_id=EOS,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
            )
        ours = [best, *best.others]
        rows = theirs.sequences[:, len(prompt) :].tolist()
        rows = [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]
        assert [each.token_ids for each in ours] == rows
        # the scores of transformers are summed in fp32
        scores = [each.score for each in ours]
        assert scores == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)
        ended += sum(each.finish_reason == "stop" for each in ours)
    assert ended or length_penalty > 1  # a larger exponent prefers long beams here


def test_one_beam_is_greedy(llm):
    greedy = llm.generate(prompts(), SamplingParams(temperature=0, max_tokens=20))
    beams = llm.beam_search(prompts(), BeamParams(num_beams=1, max_tokens=20))
    assert [b.token_ids for b in beams] == [g.token_ids for g in greedy]
    for one, other in zip(beams, greedy, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)
        assert one.text == other.text
        assert one.finish_reason == other.finish_reason


def exhaustive(model, prompt, length, score):
    """Returns the best of all continuations that end or reach the length."""
    vocab = range(model.config.vocab_size)
    best = None
    for tokens in itertools.product(vocab, repeat=length):
        end = tokens.index(EOS) + 1 if EOS in tokens else length
        if any(tokens[end:]):
            continue  # this prefix has already been visited
        tokens = tokens[:end]
        logprobs = model.logits([*prompt, *tokens]).log_softmax(-1)
        total = sum(logprobs[len(prompt) - 1 + i, t].item() for i, t in enumerate(tokens))
        if best is None or score(total, end) > best[0]:
            best = (score(total, end), tokens)
    return best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("normalization", "alpha"), [("power", 1.0), ("power", 0.0), ("gnmt", 0.8)]
)
def test_as_many_beams_as_continuations_find_the_global_optimum(
    tiny_tokenizer, seed, normalization, alpha
):
    """4 tokens, length 3: 4³ continuations."""
    model = small_model(seed=seed, vocab_size=4)
    llm = LLM(model=model, tokenizer=tiny_tokenizer, page_size=2, num_pages=400)

    def score(total, length):
        return total / ((5 + length) / 6 if normalization == "gnmt" else length) ** alpha

    params = BeamParams(
        num_beams=4**3,
        max_tokens=3,
        length_penalty=alpha,
        normalization=normalization,
        early_stopping="never",
    )
    (found,) = llm.beam_search([[1, 3, 0]], params)
    best_score, best = exhaustive(model, [1, 3, 0], 3, score)
    assert tuple(found.token_ids) == best
    assert found.score == pytest.approx(best_score, abs=1e-9)


def test_gnmt_and_power_length_penalties_follow_their_formulas(llm):
    for normalization, base in (("gnmt", lambda n: (5 + n) / 6), ("power", lambda n: n)):
        params = BeamParams(
            num_beams=4, max_tokens=12, length_penalty=0.6, normalization=normalization, n=4
        )
        (best,) = llm.beam_search(prompts(1), params)
        for each in (best, *best.others):
            expected = sum(each.logprobs) / base(len(each.token_ids)) ** 0.6
            assert each.score == pytest.approx(expected, abs=1e-9)
        assert [best.score, *(o.score for o in best.others)] == sorted(
            (c.score for c in (best, *best.others)), reverse=True
        )


def test_beams_share_pages_and_free_all_of_them(llm, monkeypatch):
    pool, most, steps = llm.engine.pool, 0, []
    run = llm.engine.runner.run

    def watched(step):
        nonlocal most
        most = max(most, pool.num_pages - pool.available)
        steps.append(step)
        return run(step)

    monkeypatch.setattr(llm.engine.runner, "run", watched)
    prompt = prompts(4)[3] * 4  # 36 tokens, 9 pages
    llm.beam_search([prompt], BeamParams(num_beams=6, max_tokens=10))
    assert 9 < most <= 9 + 6 * 4 + 1  # without sharing, each beam would need 9 + 3
    assert any(step.copies for step in steps)
    assert pool.available == pool.num_pages
    pool.check([])


def test_beams_work_with_recurrent_states_and_sliding_windows(tiny_tokenizer):
    """One beam is greedy there as well, and scores match the full forward pass."""
    from easyllm.nn.config import AttentionConfig, LinearAttentionConfig

    base = small_model()
    window = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, window=3)
    linear = LinearAttentionConfig(num_heads=2, head_dim=16)
    for mixers in ((window, window), (linear, linear), (linear, window)):
        layers = tuple(base.config.layers[0].model_copy(update={"mixer": m}) for m in mixers)
        model = type(base)(base.config.changed(layers=layers)).double()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.uniform_(parameter, -0.4, 0.6, generator=generator)
        llm = LLM(model=model.requires_grad_(False).eval(), tokenizer=tiny_tokenizer, page_size=4)
        (best,) = llm.beam_search(prompts(1), BeamParams(num_beams=4, max_tokens=9, n=4))
        for each in (best, *best.others):
            ids = [*prompts(1)[0], *each.token_ids]
            logprobs = model.logits(ids).log_softmax(-1)
            start = len(prompts(1)[0])
            expected = [logprobs[i - 1, ids[i]].item() for i in range(start, len(ids))]
            assert each.logprobs == pytest.approx(expected, abs=1e-9)


def test_beams_that_do_not_fit_are_refused(model, tiny_tokenizer):
    llm = LLM(model=model, tokenizer=tiny_tokenizer, page_size=4, num_pages=12)
    with pytest.raises(ConfigError, match=r"8 beams of 20 tokens .* the cache has 12; lower num_"):
        llm.beam_search([[5, 6, 7]], BeamParams(num_beams=8, max_tokens=20))
    with pytest.raises(ValueError, match="n=5 is more than num_beams=4"):
        BeamParams(n=5)
    for values in ({"num_beams": 0}, {"length_penalty": 11}, {"early_stopping": "soon"}):
        with pytest.raises(ValueError, match=next(iter(values))):
            BeamParams(**values)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        llm.beam_search([[]])
    llm.engine.add(Request(prompt_ids=(5,), params=SamplingParams(max_tokens=3)))
    with pytest.raises(ConfigError, match="engine without running requests"):
        beam_search(llm.engine, (5, 6), BeamParams())
