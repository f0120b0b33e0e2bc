"""Ceilings of serving, and what fits into a memory or an evening."""

import pytest
import torch

from easyllm.models.describe import describe
from easyllm.ops.huge_memory import FIRST_BYTES, HUGE
from easyllm.plan.fit import evening_runs, fits_into
from easyllm.plan.hardware import find_hardware
from easyllm.plan.inference import estimate_inference
from easyllm.plan.kv_cache import huge_page_bytes, prefill_tokens
from easyllm.plan.memory import estimate_training
from easyllm.plan.serving import paged_bytes, serving_ceiling

LLAMA, A100 = describe("llama2-7b"), find_hardware("A100-80GB")


def test_one_sequence_is_bound_by_reading_and_many_by_computing():
    found = serving_ceiling(LLAMA, A100, context=16)
    reading = (found.weight_bytes + found.cache_bytes) / A100.read_bytes_per_s
    assert found.step_seconds(1) == reading
    many = 10**6
    assert found.step_seconds(many) == pytest.approx(many * found.token_flops / A100.flops_per_s)


def test_both_take_as_long_at_the_crossover():
    found = serving_ceiling(LLAMA, A100, context=16)
    batch = found.crossover
    read = (found.weight_bytes + batch * found.cache_bytes) / A100.read_bytes_per_s
    assert batch * found.token_flops / A100.flops_per_s == pytest.approx(read, rel=2 / batch)


def test_a_long_cache_is_never_compute_bound():
    assert serving_ceiling(LLAMA, A100, context=4096).crossover is None


def test_the_requests_that_fit_fill_the_memory():
    found = serving_ceiling(LLAMA, A100, context=4096)
    most = found.most_requests
    used = found.memory.weights + found.memory.workspace + most * found.request_bytes
    assert used <= A100.usable_bytes < used + found.request_bytes
    assert serving_ceiling(LLAMA, A100, gpus=2, context=4096).most_requests > 2 * most


def test_a_sequence_takes_whole_pages_and_a_window_one_more():
    per_token = 524_288
    assert paged_bytes(LLAMA, 17, 2, 16) == 32 * per_token
    mistral = describe("mistral-7b")
    assert paged_bytes(mistral, 32_768, 2, 16) == (4096 + 16) * 131_072


def test_few_tokens_take_whole_huge_pages_of_each_layer():
    config = describe("smollm2-135m")  # 768 bytes of keys per token and layer in fp32
    assert huge_page_bytes(config, 256, 4) == 60 * 256 * 768
    assert huge_page_bytes(config, 1024, 4) == 60 * (FIRST_BYTES + HUGE)
    assert huge_page_bytes(config, 4096, 4) == 60 * (FIRST_BYTES + 2 * HUGE)


def test_a_step_stores_its_tokens_before_those_outside_the_window_are_freed():
    mistral, full = describe("mistral-7b"), describe("smollm2-135m")
    assert prefill_tokens(mistral, context=32_768, sequences=2, step=2048) == 2 * 4096 + 2048
    assert prefill_tokens(full, context=256, sequences=4, step=896) == 1024


def test_only_a_cpu_holds_freed_memory():
    config, setup = describe("smollm2-135m"), {"context": 256, "sequences": 4}
    on_gpu = estimate_inference(config, **setup)
    on_cpu = estimate_inference(config, **setup, device_type="cpu")
    assert on_gpu.heap == 0
    huge = huge_page_bytes(config, 1024, 2)
    assert on_cpu.total - on_gpu.total == on_cpu.heap
    assert on_cpu.heap > huge - on_cpu.kv_cache


def test_what_fits_is_the_largest():
    memory = 3 * 10**9
    config = describe("smollm2-135m")
    found = {(x.use, x.recompute): x for x in fits_into(config, memory, context=1024)}
    serving, full = found["serving", None], found["full", "none"]
    sizes = [
        estimate_inference(config, context=1024, sequences=n).total
        for n in (serving.sequences, serving.sequences + 1)
    ]
    assert sizes[0] <= memory < sizes[1]
    sizes = [
        estimate_training(config, micro_batch_tokens=1024 * n, row_tokens=1024).total
        for n in (full.sequences, full.sequences + 1)
    ]
    assert sizes[0] <= memory < sizes[1]
    assert found["full", "full"].sequences > full.sequences
    assert found["qlora", "none"].needed < found["lora", "none"].needed < full.needed


def test_nothing_fits_into_too_little():
    found = list(fits_into(LLAMA, 10**9, context=1024))
    assert {(x.sequences, x.longest) for x in found} == {(0, 0)}


def test_an_evening_has_as_many_tokens_as_its_flops():
    models = {"small": describe("smollm2-135m"), "large": LLAMA}
    runs = list(
        evening_runs(
            models,
            seconds=3600,
            flops_per_s=1e11,
            memory_bytes=10**10,
            context=512,
            dtype=torch.float32,
            utilisation=0.5,
        )
    )
    assert {run.model for run in runs if run.method != "qlora"} == {"small"}
    full = next(run for run in runs if run.method == "full")
    assert full.tokens == pytest.approx(3600 * 1e11 * 0.5 / (6 * 134.5e6), rel=0.1)
    lora = next(run for run in runs if run.method == "lora" and run.model == "small")
    assert lora.tokens > full.tokens
    assert all(run.memory_bytes <= 10**10 for run in runs)
