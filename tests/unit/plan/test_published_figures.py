"""Published figures of the planner, each by the command that prints it: one test a figure.

The sources are named in `easyllm.plan.published`.
"""

import json
from functools import cache

import pytest

from easyllm_command import easyllm

GPT3 = ("gpt3-175b", "--formulas")
TABLE_2 = (*GPT3, "--tensor", "8")
REAL = {
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "gpt2": 124_439_808,
    "gpt3-175b": 174_604_259_328,
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_241_732_096,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-7b": 7_721_324_544,
    "qwen1.5-14b": 14_167_290_880,
    "qwen1.5-32b": 32_512_218_112,
    "qwen1.5-72b": 72_287_920_128,
    "mixtral-8x7b": 46_702_792_704,
}
MEGATRON = {
    "1.7b": 1.652,
    "3.6b": 3.562,
    "7.5b": 7.468,
    "18b": 18.450,
    "39b": 39.096,
    "76b": 76.051,
    "145b": 145.622,
    "310b": 310.131,
    "530b": 529.601,
    "1t": 1008.039,
}
LAYERS = {
    "none": 2_868_903_936,
    "tp": 578_813_952,
    "tp+sp": 358_612_992,
    "tp+selective": 327_155_712,
    "tp+sp+selective": 106_954_752,
    "full": 50_331_648,
}
ZERO = {  # GB per GPU of 7.5B parameters under stages 1, 2 and 3
    4: (52.5, 41.25, 30.0),
    16: (35.625, 21.5625, 7.5),
    64: (31.40625, 16.640625, 1.875),
    256: (30.3515625, 15.41015625, 0.46875),
    1024: (30.087890625, 15.1025390625, 0.1171875),
}
ZERO_LARGE = {  # rounded as published
    ("128B", 64): (536, 284, 32),
    ("128B", 1024): (513.5, 257.75, 2),
    ("1T", 64): (4187.5, 2218.75, 250),
    ("1T", 1024): (4011.7, 2013.7, 15.6),
}
UTILISATION = {  # sequences, GPUs, seconds of a step; MFU and HFU with selective recomputation
    "22b": (4, 8, 1.10, 41.7, 43.8),
    "175b": (64, 64, 13.75, 51.4, 52.8),
    "530b": (280, 280, 37.83, 56.0, 57.0),
    "1t": (512, 512, 71.49, 56.3, 57.0),
}


def figures():
    """Yields name, command, keys, published value and the decimals that are published."""
    for name, count in REAL.items():
        yield f"{name} parameters", (name,), "parameters_total", count, None
    mixtral = ("mixtral-8x7b",)
    yield "mixtral active", mixtral, "parameters_active", 12_879_925_248, None
    sizes = (6_442_450_944, 12_582_912_000, 31_897_681_920, 64_424_509_440)
    for name, count in zip(("7b", "13b", "33b", "65b"), sizes, strict=True):
        words = (f"llama-{name}", "--formulas")
        yield f"llama-{name} 12lh2", words, "formulas.parameters.12lh2", count, None
    for name, count in MEGATRON.items():
        words, key = (f"megatron-{name}", "--formulas"), "formulas.parameters.megatron"
        yield f"megatron {name}", words, key, count * 1e9, -6
    yield from activations()
    yield from runs()
    for gpus, stages in ZERO.items():
        for stage, size in enumerate(stages, 1):
            words = ("7.5B", "--gpus", f"{gpus}xV100-32GB")
            yield f"ZeRO-{stage} on {gpus}", words, f"zero_bytes.{stage}", size * 1e9, 0
    yield "ZeRO base", ("7.5B", "--gpus", "64xV100-32GB"), "zero_bytes.0", 120e9, 0
    for (size, gpus), stages in ZERO_LARGE.items():
        for stage, published in enumerate(stages, 1):
            words = (size, "--gpus", f"{gpus}xV100-32GB")
            digits = -8 if published == round(published, 1) else -7
            yield (
                f"{size} ZeRO-{stage} on {gpus}",
                words,
                f"zero_bytes.{stage}",
                (published * 1e9),
                digits,
            )
    for name, (batch, gpus, seconds, mfu, hfu) in UTILISATION.items():
        words = (f"megatron-{name}", "--formulas", "--batch", str(batch))
        words += ("--gpus", f"{gpus}xA100-80GB", "--step-seconds", str(seconds))
        yield f"MFU of {name}", words, "formulas.mfu", mfu / 100, 3
        yield f"HFU of {name}", words, "formulas.hfu_selective", hfu / 100, 3


def activations():
    """Yields the figures of activations and KV caches."""
    total, batches = "formulas.activation_bytes.total", (1, 64, 128)
    sizes = (275_414_777_856, 17_626_545_782_784, 35_253_091_565_568)
    for batch, size in zip(batches, sizes, strict=True):
        yield f"activations, b={batch}", (*GPT3, "--batch", str(batch)), total, size, None
    for policy, size in LAYERS.items():
        key = f"formulas.layer_activation_bytes.{policy}"
        yield f"layer activations, {policy}", TABLE_2, key, size, None
    for name, share in (("gpt3-175b", 0.70), ("megatron-530b", 0.65)):
        words = (name, "--formulas")
        yield f"selective saving, {name}", words, "formulas.selective_saving", share, 2
    prompts = (*GPT3, "--batch", "64", "--context", "544")
    yield "KV cache", prompts, "formulas.kv_cache_bytes", 164_282_499_072, None
    yield "KV cache a token", GPT3, "cache_bytes_per_token", 4_718_592, None
    yield "Llama-7B KV", ("llama-7b",), "cache_bytes_per_token", 524_288, None
    yield "Llama-2-70B KV", ("llama2-70b",), "cache_bytes_per_token", 327_680, None
    yield "SmolLM2 KV", ("smollm2-135m",), "cache_bytes_per_token", 23_040, None
    window = ("mistral-7b", "--context", "32768")
    yield "Mistral's window", window, "cache_bytes", 512 * 2**20, None
    for name, share in ((2048, 2.70), (32768, 30.77)):
        words = (*GPT3, "--context", str(name))
        yield f"attention share at {name}", words, "formulas.attention_share", share / 100, 4
    sizes = {"float32": 26.95, "bfloat16": 13.48}
    for dtype, size in sizes.items():
        key = f"weight_bytes_by_format.{dtype}"
        yield f"Llama-2-7B as {dtype}", ("llama2-7b",), key, size * 1e9, -7


def runs():
    """Yields FLOPs, days, bubbles and utilisation of complete runs."""
    gpt3 = ("174.6B", "--tokens", "300e9")
    yield "GPT-3 FLOPs", gpt3, "run_flops.training", 3.1428e23, -19
    full = ("--recompute", "full", "--tokens")
    days = {
        "GPT-3": (("175B", *full, "300B", "--gpus", "1024xA100-80GB", "--mfu", "0.45"), 33.81, 2),
        "LLaMA-65B": (("65B", *full, "1.4T", "--gpus", "2048xA100-80GB", "--mfu", "0.6"), 21.98, 2),
        "Megatron 175B": (
            ("175B", *full, "300B", "--gpus", "1024xA100-80GB", "--mfu", str(140 / 312)),
            33.9,
            1,
        ),
        "Megatron 1T": (
            ("1008B", *full, "450B", "--gpus", "3072xA100-80GB", "--mfu", str(163 / 312)),
            83.9,
            1,
        ),
    }
    for name, (words, published, digits) in days.items():
        yield f"days of {name}", words, "run.days", published, digits
    yield "states of 20 bytes", ("1B",), "training_bytes.fp32_gradients", 20 * 10**9, None
    yield "states of 16 bytes", ("1B",), "training_bytes.mixed_precision", 16 * 10**9, None
    yield "inference", ("1B",), "inference_bytes", 2 * 10**9, None
    for stage, factor in enumerate((2, 2, 2, 3)):
        sent = factor * 1e9 * 63 / 64
        words = ("1B", "--gpus", "64xV100-32GB")
        yield f"traffic of ZeRO-{stage}", words, f"sent_elements.{stage}", sent, 0
    palm = ("540.35B", "--tokens-per-s", "238.3k", "--gpus", "6144xTPUv4-32GB")
    shape = ("--shape", "layers=118,hidden=12288,heads=48")
    yield "PaLM MFU", (*palm, *shape), "mfu", 0.462, 3
    yield "PaLM without attention", palm, "mfu_without_attention", 0.457, 3
    pipeline = ("megatron-1t", "--formulas", "--pipeline", "8", "--batch", "32")
    yield "bubble", pipeline, "formulas.bubble", 7 / 32, 6
    interleaved = (*pipeline, "--interleave", "2")
    yield "interleaved bubble", interleaved, "formulas.bubble", 7 / 64, 6


FIGURES = {name: rest for name, *rest in figures()}


@cache
def planned(*words):
    """Returns the JSON of a plan; figures of one command share it."""
    done = easyllm("plan", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """A machine with known rates."""
    monkeypatch.setattr("easyllm.plan.machine.matmul_rate", lambda *_, **__: 1e12)
    monkeypatch.setattr("easyllm.plan.machine.read_rate", lambda *_, **__: 1e11)


@pytest.mark.parametrize("name", FIGURES)
def test_the_command_prints_the_published_figure(name):
    words, key, published, digits = FIGURES[name]
    value = planned(*words)
    for part in key.split("."):
        value = value[part]
    if digits is None:
        assert value == published
    else:
        assert abs(value - published) <= 0.5 * 10.0**-digits * (1 + 1e-9)
