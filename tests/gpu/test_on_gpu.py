"""Models, training and the engine on a GPU, compared with the CPU and checked for the same laws."""

import itertools
import json

import pytest
import torch

from easyllm.batches.packing import pack
from easyllm.engine import LLM, SamplingParams
from easyllm.engine.graph_step import GraphStep
from easyllm.engine.runner import logits_in_passes
from easyllm.examples.sample import Sample
from easyllm.nn.context import ForwardContext
from easyllm.nn.deterministic import check_deterministic
from easyllm.ops.attention import attention, explicit_attention
from easyllm.ops.attention_rule import AttentionRule
from easyllm.train import TrainConfig, loop, train
from easyllm.train.loop import accumulate
from easyllm.train.objectives import LanguageModel
from tiny_models import build_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]
CUDA = torch.device("cuda")
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def samples(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in lengths:
        ids = torch.randint(3, 320, (n + 1,), generator=generator).tolist()
        made.append(
            Sample.from_mask(ids, [*(torch.rand(n, generator=generator) < 0.6).tolist(), True])
        )
    return made


def gradients(device, dtype=torch.float32, lengths=(3, 50, 8, 21)):
    model = build_tiny(seed=1).to(device, dtype).requires_grad_(True)
    loss, _ = accumulate(model, LanguageModel(), [pack(samples(lengths))])
    return loss, {name: p.grad.cpu().double() for name, p in model.named_parameters()}


def distance(x, exact):
    return float((x.double().cpu() - exact).norm() / exact.norm())


def test_loss_and_gradients_match_the_cpu():
    exact_loss, exact = gradients("cpu", torch.float64)
    loss, found = gradients(CUDA)
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    for name, grad in exact.items():
        assert distance(found[name], grad) < 1e-4, name


def test_bf16_gradients_are_accurate_to_bf16_and_bitwise_reproducible():
    exact_loss, exact = gradients("cpu", torch.float64)
    loss, found = gradients(CUDA, torch.bfloat16)
    again_loss, again = gradients(CUDA, torch.bfloat16)
    assert loss == pytest.approx(exact_loss, rel=2e-2)
    assert loss == again_loss
    for name, grad in exact.items():
        assert distance(found[name], grad) < 0.1, name
        assert torch.equal(found[name], again[name]), name


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4)])
def test_flash_attention_matches_fp64(window, heads, kv_heads):
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 30, 5, 64)
    shapes = [(sum(lengths), h, 64) for h in (heads, kv_heads, kv_heads)]
    wide = [
        torch.randn(s, generator=generator).bfloat16().double().requires_grad_() for s in shapes
    ]
    narrow = [x.detach().to(CUDA, torch.bfloat16).requires_grad_() for x in wide]
    rule = AttentionRule(scale=0.125, window=window)
    out = attention(*narrow, rule, lengths)
    grad = torch.randn(shapes[0], generator=generator)
    out.backward(grad.to(CUDA, torch.bfloat16))
    parts = []
    for q, k, v in zip(*(x.split(lengths) for x in wide), strict=True):
        at = torch.arange(len(q))
        parts.append(explicit_attention(q, k, v, rule, at, at))
    exact = torch.cat(parts)
    exact.backward(grad.double())
    assert distance(out.detach(), exact.detach()) < 1e-2
    for x, y in zip(narrow, wide, strict=True):
        assert distance(x.grad, y.grad) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_separate_sequences(dtype):
    model = build_tiny(seed=2).to(CUDA, dtype)
    sequences = [torch.tensor(s.token_ids, device=CUDA) for s in samples([9, 40, 1, 17])]
    with torch.no_grad():
        lengths = [len(s) for s in sequences]
        context = ForwardContext.packed(lengths, device=CUDA)
        packed = model.head(model(torch.cat(sequences), context)).split(lengths)
        for ids, rows in zip(sequences, packed, strict=True):
            assert distance(rows, model.logits(ids).double().cpu()) < 1e-5 * (
                1 if dtype == torch.float32 else 2000
            )


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_equals_uncached(dtype, fast):
    model = build_tiny(seed=3).to(CUDA, dtype)
    sequences = [list(s.token_ids) for s in samples([40, 23, 64])]
    passes = [[16] + [1] * 24, [23], [30, 30] + [1] * 4]
    with torch.inference_mode():
        found = logits_in_passes(model, sequences, passes, page_size=8, compiled=fast)
        for ids, rows in zip(sequences, found, strict=True):
            exact = model.logits(ids).double().cpu()
            assert distance(rows, exact) < (2e-5 if dtype == torch.float32 else 3e-2)


def test_recorded_steps_generate_the_same_tokens_as_the_decoder(tiny_tokenizer):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 320, (5 + 7 * i,), generator=generator).tolist() for i in range(20)]
    plain, fast = (
        LLM(model=build_tiny(seed=4).to(CUDA), tokenizer=tiny_tokenizer, compiled_step=on)
        for on in (False, True)
    )
    assert isinstance(fast.engine.runner.fast_step, GraphStep)
    assert plain.engine.runner.fast_step is None
    cpu = LLM(model=build_tiny(seed=4), tokenizer=tiny_tokenizer)
    for a, b, c in zip(*(x.generate(prompts, GREEDY) for x in (plain, fast, cpu)), strict=True):
        assert a.token_ids == b.token_ids == c.token_ids
        assert b.logprobs == pytest.approx(c.logprobs, abs=1e-3)


def test_a_request_gets_the_same_tokens_in_any_batch(tiny_tokenizer):
    llm = LLM(model=build_tiny(seed=4).to(CUDA), tokenizer=tiny_tokenizer, max_running=8)
    prompts = [list(s.token_ids) for s in samples(range(3, 40, 2), seed=5)]
    alone = [llm.generate([p], GREEDY)[0].token_ids for p in prompts]
    together = [done.token_ids for done in llm.generate(prompts, GREEDY)]
    assert together == alone


def test_recorded_steps_follow_replaced_weights(tiny_tokenizer):
    model = build_tiny(seed=4).to(CUDA)
    llm = LLM(model=model, tokenizer=tiny_tokenizer, prefix_caching=False)
    llm.generate([[5, 6, 7]], GREEDY)
    other = build_tiny(seed=9).to(CUDA)
    model.load_state_dict(other.state_dict(), assign=True)
    fresh = LLM(model=other, tokenizer=tiny_tokenizer, prefix_caching=False)
    prompt = [[5, 6, 7, 8]]
    assert llm.generate(prompt, GREEDY)[0].token_ids == fresh.generate(prompt, GREEDY)[0].token_ids


def test_quantized_weights_and_caches_run(tiny_tokenizer):
    from easyllm.quant import quantize_weights

    prompt = [list(range(3, 30))]
    for scheme in ("int8", "int4"):
        on_cpu = LLM(model=quantize_weights(build_tiny(seed=4), scheme), tokenizer=tiny_tokenizer)
        on_gpu = LLM(
            model=quantize_weights(build_tiny(seed=4), scheme).to(CUDA),
            tokenizer=tiny_tokenizer,
            cache_dtype="int8",
        )
        few = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        a, b = (x.generate(prompt, few)[0] for x in (on_cpu, on_gpu))
        assert a.logprobs == pytest.approx(b.logprobs, abs=0.3)


def test_deterministic_mode_is_refused_on_a_gpu():
    from easyllm.core.errors import ConfigError

    with pytest.raises(ConfigError, match="CPU"):
        check_deterministic(build_tiny().to(CUDA))


def test_a_gpu_run_learns_and_resumes_bitwise_exactly(tmp_path, tiny_folder, monkeypatch):
    said = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * 9}]
        for i in range(24)
    ]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"messages": messages} for messages in said]))
    config = TrainConfig(
        model=str(tiny_folder),
        data={"train": [str(rows)], "max_seq_len": 128},
        batch_size=4,
        epochs=3,
        optimizer={"learning_rate": 1e-2},
        precision="bf16",
        save_every=5,
    )
    whole = train(config, tmp_path / "whole")
    taken = itertools.count()
    real = loop.apply_gradients

    def power_cut(*args):
        if next(taken) == 8:
            raise RuntimeError("power cut")
        return real(*args)

    monkeypatch.setattr(loop, "apply_gradients", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(config, tmp_path / "cut")
    monkeypatch.undo()
    resumed = train(config, tmp_path / "cut")
    weights = [next((x.output / "model").glob("*.safetensors")) for x in (whole, resumed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    lines = (whole.output / "metrics.jsonl").read_text().splitlines()
    losses = [x["train/loss_nats"] for x in map(json.loads, lines) if "train/loss_nats" in x]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert whole.figures["peak_device_bytes"] > 0
