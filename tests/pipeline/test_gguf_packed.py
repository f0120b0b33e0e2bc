"""GGUF files that keep their blocks in memory: values, memory, the engine, adapters."""

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, SamplingParams
from easyllm.engine.compiled_step import CompiledStep
from easyllm.models import load_model, load_tokenizer, open_source
from easyllm.models.gguf_export import save_gguf
from easyllm.ops.paged_attention import new_pages
from easyllm.quant import KEPT
from easyllm_command import easyllm
from tiny_models import build_tiny

IDS = torch.arange(5, 45)
KINDS = {
    "llama": {},
    "llama, untied": {"tie_word_embeddings": False},
    "llama, biases": {"attention_bias": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {},
}
TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q6_k", "q5_k", "q4_k")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2")


def written(kind, type, tokenizer, path, **changes):
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 64, "intermediate_size": 96}
    values = sizes | KINDS[kind] | changes
    model = build_tiny(model_type=kind.partition(",")[0], **values)
    save_gguf(model, path, type=type, tokenizer=tokenizer)
    return path


def wide(type, tokenizer, path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    return written("llama", type, tokenizer, path, **sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_blocks_have_the_values_of_dequantized_ones(kind, tokenizer, tmp_path):
    path = written(kind, "q4_0", tokenizer, tmp_path / "m.gguf")
    full, kept = load_model(path), load_model(path, quantize=KEPT)
    assert kept.packed_formats() == {"gguf-q4_0", "gguf-q8_0"}
    for (name, a), (_, b) in zip(full.weight_modules(), kept.weight_modules(), strict=True):
        assert torch.equal(a.storage.dense(), b.storage.dense()), name
    drift = (kept.logits(IDS) - full.logits(IDS)).norm() / full.logits(IDS).norm()
    # rows are quantized while they are multiplied, which may change the experts of a token
    assert 0 < drift < (0.5 if kind == "mixtral" else 0.1)


@pytest.mark.parametrize("type", TYPES)
def test_the_compiled_step_reads_every_type(type, tokenizer, tmp_path):
    model = load_model(wide(type, tokenizer, tmp_path / "m.gguf"), quantize=KEPT)
    assert CompiledStep.unsupported_reason(model) is None
    shape = (1, model.config.layers[0].mixer.num_kv_heads, 16, 64)
    keys, values = ([new_pages(shape, torch.float32) for _ in model.layers] for _ in "kv")
    step = CompiledStep(model, keys, values)
    table, drifts = torch.zeros(1, 1, dtype=torch.int32), []
    for token in range(5, 300, 20):
        found = step.run([token], [0], table, [1])[0]
        expected = model.logits([token])[0]
        drifts.append(float((found - expected).abs().max() / expected.abs().max()))
    # sums in another order, after which a code of a row may round to its neighbour
    assert sorted(drifts)[len(drifts) // 2] < 1e-5
    assert max(drifts) < 0.1


def test_an_engine_serves_kept_blocks(tokenizer, tmp_path):
    path = wide("q8_0", tokenizer, tmp_path / "m.gguf")
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    ids = [IDS.tolist(), IDS.tolist()[:7]]
    found = LLM(path, dtype="float32", quantize=KEPT).generate(ids, params)
    model = load_model(path, quantize=KEPT)
    for prompt, one in zip(ids, found, strict=True):
        first = int(model.logits(prompt)[-1].argmax())
        assert one.token_ids[0] == first
        assert len(one.token_ids) == 6


def test_memory_is_that_of_the_file(tokenizer, tmp_path):
    path = wide("q4_k", tokenizer, tmp_path / "m.gguf")
    kept = load_model(path, quantize=KEPT)
    held = sum(layer.storage.num_bytes for _, layer in kept.weight_modules())
    assert held < 1.03 * path.stat().st_size
    planned = open_source(path).weight_bytes(torch.float32, KEPT)
    assert planned == sum(t.nbytes for t in (*kept.parameters(), *kept.buffers()))


def test_a_type_that_the_kernels_do_not_read_is_dequantized_for_a_product(tokenizer, tmp_path):
    import gguf
    import numpy as np

    path = tmp_path / "m.gguf"
    model = build_tiny(hidden_size=256, intermediate_size=256, vocab_size=tokenizer.vocab_size)
    save_gguf(model, path, type="f32", tokenizer=tokenizer)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            kinds = field.types
            writer.add_key_value(
                name, field.contents(), kinds[0], kinds[1] if len(kinds) > 1 else None
            )
    ternary = gguf.GGMLQuantizationType.TQ2_0
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if tensor.name.endswith("ffn_up.weight"):
            raw = gguf.quants.quantize(data, ternary)
            writer.add_tensor(tensor.name, raw, raw_dtype=ternary)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    full = load_model(tmp_path / "t.gguf")
    kept = load_model(tmp_path / "t.gguf", quantize=KEPT)
    assert kept.packed_formats() == {"gguf-tq2_0"}
    torch.testing.assert_close(kept.logits(IDS), full.logits(IDS))
    assert LLM(model=kept, tokenizer=tokenizer).generate([[5, 6]])[0].token_ids


def test_sources_without_blocks_are_refused(tiny_folder, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="keeps the blocks of a GGUF file, but"):
        load_model(tiny_folder, quantize=KEPT)
    path = written("llama", "f16", tokenizer, tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match="keeps the blocks of a GGUF file, but"):
        LLM(path, quantize=KEPT)


def test_lora_trains_on_kept_blocks(tokenizer, tmp_path):
    path = written("llama", "q4_0", tokenizer, tmp_path / "m.gguf")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n' * 8)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {path}\ndata: {{train: [{rows}], max_seq_len: 64}}\nadapter: {{kind: lora}}\n"
        "optimizer: {kind: adamw, learning_rate: 1e-2}\nbatch_size: 4\nepochs: 4\n"
        f"quantize: gguf\noutput: {tmp_path / 'run'}\n"
    )
    done = easyllm("train", str(tmp_path / "recipe.yaml"), "--json")
    assert done.returncode == 0, done.stderr
    model = load_model(path, quantize=KEPT, adapter=tmp_path / "run/adapter")
    assert model.is_adapted
    assert model.packed_formats() == {"gguf-q4_0", "gguf-q8_0"}
