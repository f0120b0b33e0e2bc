"""User-defined parts, each registered with one call, work everywhere.

They are trained, resumed, saved, loaded, merged, planned, served and compiled, or refused with a
reason.
"""

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file

from easyllm.adapters import (
    adapter_of,
    attach,
    detach,
    merge,
    register_adapter,
    unregister_adapter,
)
from easyllm.batches.packing import pack
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.core.json_schema import json_schema
from easyllm.engine import LLM, SamplingParams
from easyllm.engine.compiled_step import CompiledStep
from easyllm.examples.sample import Sample
from easyllm.models import add_adapter, hf_module_name, load_model, load_tokenizer, save_model
from easyllm.models.families import register_family
from easyllm.nn.context import ForwardContext
from easyllm.nn.linear import BaseLinear
from easyllm.plan.memory import estimate_training
from easyllm.quant import FORMATS, StorageFormat, quantize_weights, register_storage, weight_bytes
from easyllm.train import TrainConfig, dry_run, train
from easyllm.train.metrics import read_metrics
from easyllm.train.objectives import (
    register_objective,
    unregister_objective,
)
from registered_parts import (
    ADAPTERS,
    TEST_FAMILY,
    CountingSet,
    InputScaleConfig,
    PairLoss,
    PairLossConfig,
    PairsData,
    PromptConfig,
    WeightNormConfig,
    from_float8_file,
    to_float8,
)
from tiny_models import CORPUS
from train_twice import run_config, train_twice

IDS = torch.arange(5, 45)


PROMPTS = [[5, 6, 7, 8], [40, 41, 42, 43, 44, 45, 46]]


GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(autouse=True)
def _registered():
    register_adapter(WeightNormConfig, peft_type="TEST_WEIGHT_NORM")
    register_adapter(InputScaleConfig, peft_type="TEST_INPUT_SCALE", adapter_set=CountingSet)
    register_adapter(PromptConfig, peft_type="TEST_PROMPT")
    register_objective(PairLossConfig, build=PairLoss, data=(PairsData,))
    register_storage(
        StorageFormat(
            name="test_float8",
            num_bytes=lambda shape: shape[0] * shape[1] + 4 * shape[0],
            quantize=to_float8,
            table="test_float8",
            file_tensors=("weight", "weight_scale", "weight_shape"),
            from_file=from_float8_file,
            file_config={"fmt": "e4m3"},
        )
    )
    yield
    for kind in ("test_weight_norm", "test_input_scale", "test_prompt"):
        unregister_adapter(kind)
    unregister_objective("test_pair_loss")
    del FORMATS["test_float8"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seams")
    lines = list(dict.fromkeys(CORPUS))
    tune = [{"prompt": line[:12], "completion": line[12:30]} for line in lines for _ in range(2)]
    pairs = [
        {"prompt": line[:10], "chosen": line[10:24], "rejected": line[24:40], "weight": 1.0 + i}
        for i, line in enumerate(lines)
    ]
    for name, values in (("tune", tune), ("pairs", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in values)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("base", ["full", "packed"])
def test_a_registered_adapter_works_everywhere(
    kind, base, rows, tiny_folder, tmp_path, tiny_tokenizer
):
    folder = tiny_folder
    if base == "packed":
        model = quantize_weights(load_model(tiny_folder, dtype="float32"), "test_float8")
        folder = save_model(model, tmp_path / "packed", tokenizer=tiny_tokenizer)
    rate = {"learning_rate": 0.2 if kind == "test_prompt" else 3e-2}
    config = run_config(rows, folder, adapter=ADAPTERS[kind], optimizer=rate)
    saved = train_twice(config, tmp_path)

    # loaded: logits differ from the base, and are the same after saving again
    plain = load_model(folder, dtype="float32").logits(IDS)
    model = load_model(folder, dtype="float32", adapter=saved)
    adapted = model.logits(IDS)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    batch = pack([Sample.from_mask(list(range(3, 20))), Sample.from_mask(IDS.tolist())])
    packed = model.head(model(batch.token_ids, batch.context()))
    torch.testing.assert_close(packed[16:], adapted[:-1], atol=1e-5, rtol=1e-5)

    # served: the engine's log-probabilities equal those of the forward pass
    engine = {"tokenizer": tiny_tokenizer, "max_running": 4, "cache_dtype": "float32"}
    llm = LLM(model=model, **engine)
    for prompt, done in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
        scores = llm.score([*prompt, *done.token_ids])[len(prompt) - 1 :]
        assert done.logprobs == pytest.approx(scores, abs=2e-4)
        logits = model.logits([*prompt, *done.token_ids])[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == done.token_ids

    # loaded by name in addition to the base: each row uses its own, or the reason is given
    held = load_model(folder, dtype="float32")
    if kind == "test_prompt":
        with pytest.raises(ConfigError, match="prepends virtual tokens to every sequence"):
            add_adapter(held, saved, name="mine")
    else:
        add_adapter(held, saved, name="mine")
        two = LLM(model=held, **engine)
        mixed = two.generate([PROMPTS[0]] * 2, GREEDY, adapter=["mine", ""])
        base_llm = LLM(model=load_model(folder, dtype="float32"), **engine)
        expected = [
            llm.generate([PROMPTS[0]], GREEDY)[0],
            base_llm.generate([PROMPTS[0]], GREEDY)[0],
        ]
        assert [m.token_ids for m in mixed] == [e.token_ids for e in expected]
        with pytest.raises(ConfigError, match="'other', which is not served"):
            two.generate([PROMPTS[0]], GREEDY, adapter="other")

    # compiled: refused with the reason
    assert CompiledStep.unsupported_reason(model) == "it has adapters; merge them"

    # merged, or refused with the reason
    if kind == "test_prompt":
        with pytest.raises(ConfigError, match="cannot be merged: virtual tokens are no weights"):
            merge(model)
    elif base == "packed":
        with pytest.raises(ConfigError, match="stored as test_float8"):
            merge(model)
    else:
        torch.testing.assert_close(merge(model).logits(IDS), adapted, atol=2e-5, rtol=1e-4)
        assert not model.is_adapted
        save_model(model, tmp_path / "merged")
    # detached: equals the base
    again = load_model(folder, dtype="float32", adapter=saved)
    assert torch.equal(detach(again).logits(IDS), plain)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_starts_at_the_base_and_is_planned(kind, tiny_folder):
    model = load_model(tiny_folder, dtype="float32")
    before = model.logits(IDS)
    config = run_config(tiny_folder, tiny_folder, adapter=ADAPTERS[kind]).adapter
    adapters = attach(model, config)
    if kind != "test_prompt":  # virtual tokens change the sequence by being there
        assert torch.equal(model.logits(IDS), before)
    trained = sum(p.numel() for p in adapters.trained_parameters(model).values())
    options = {"micro_batch_tokens": 64, "dtype": torch.float32}
    plan = estimate_training(model.config, adapter=config, **options)
    assert plan.gradients == trained * 4
    assert plan.optimizer == trained * 8
    full = sum(p.numel() for p in load_model(tiny_folder).parameters())
    assert plan.weights == (full + trained) * 4


def test_fully_trained_modules_are_planned_and_start_unrounded(rows, tiny_folder, tmp_path):
    """Even in bf16 they start from the file's own values, and the plan counts them once."""
    adapter = {"kind": "lora", "rank": 2, "also_trained": ["norm", "layers.0", "layers.0.mixer"]}
    config = run_config(rows, tiny_folder, adapter=adapter)
    model = load_model(tiny_folder, dtype="float32")
    adapters = attach(model, config.adapter)
    trained = sum(p.numel() for p in adapters.trained_parameters(model).values())
    plan = estimate_training(
        model.config, adapter=config.adapter, micro_batch_tokens=64, dtype=torch.float32
    )
    assert plan.gradients == trained * 4
    assert plan.weights == sum(p.numel() for p in model.parameters()) * 4

    still = {"kind": "sgd", "learning_rate": 1e-30}
    values = {"adapter": {"kind": "lora", "rank": 2, "also_trained": ["norm"]}}
    train(
        run_config(rows, tiny_folder, precision="bf16", optimizer=still, max_steps=1, **values),
        tmp_path / "run",
    )
    loaded = load_model(tiny_folder, dtype="float32", adapter=tmp_path / "run" / "adapter")
    assert torch.equal(loaded.norm.weight, load_model(tiny_folder, dtype="float32").norm.weight)


def test_virtual_tokens_count_against_the_context_and_sample_prompts_must_fit(
    rows, tiny_folder, tmp_path
):
    long = {"kind": "test_prompt", "tokens": 200}
    with pytest.raises(ConfigError, match="longer than the model's context of 56"):
        dry_run(run_config(rows, tiny_folder, adapter=long), None)
    shown = {"prompts": ["hello world"], "max_tokens": 8}
    adapter = {"kind": "test_prompt", "tokens": 40}
    config = run_config(
        rows, tiny_folder, adapter=adapter, samples=shown, eval_every=1, max_steps=1
    )
    train(config, tmp_path / "run")
    assert any("samples" in line for line in read_metrics(tmp_path / "run"))


def test_a_dry_run_of_a_packed_checkpoint_refuses_what_the_run_refuses(rows, tiny_folder, tmp_path):
    packed = quantize_weights(load_model(tiny_folder, dtype="float32"), "test_float8")
    tokenizer = load_tokenizer(tiny_folder)
    folder = save_model(packed, tmp_path / "packed", tokenizer=tokenizer)
    dry_run(run_config(rows, folder, adapter={"kind": "lora", "rank": 2}), None)
    with pytest.raises(ConfigError, match="cannot all be trained"):
        dry_run(run_config(rows, folder), None)


def test_an_input_side_adapter_keeps_one_gemm_per_layer(tiny_folder, monkeypatch):
    """Its base is called once, even if layers that share an input would be fused."""
    model = load_model(tiny_folder, dtype="float32")
    attach(model, InputScaleConfig())
    calls, plain = [], BaseLinear.__call__

    def counted(self, x):
        calls.append(self.layer)
        return plain(self, x)

    monkeypatch.setattr(BaseLinear, "__call__", counted)
    model(IDS, ForwardContext.packed([len(IDS)]))
    adapted = {linear for linear, _ in adapter_of(model).linears.values()}
    assert [calls.count(linear) for linear in adapted] == [1] * len(adapted)


def test_the_hooks_are_called_and_their_state_is_saved(rows, tiny_folder, tmp_path):
    config = run_config(rows, tiny_folder, adapter=ADAPTERS["test_input_scale"])
    train(config, tmp_path / "run")
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    kept = load_file(newest / "state.safetensors")
    assert kept["adapter.steps"] == 5
    total, steps = kept["adapter.seen"].tolist()
    assert total > 0
    assert steps == 0 + 1 + 2 + 3 + 4
    terms = [line.get("train/adapter_loss_nats") for line in read_metrics(tmp_path / "run")]
    assert terms[:2] == [0, 0]  # the first step of a warm-up has a learning rate of 0
    assert all(term > 0 for term in terms[2:5])


def test_a_registered_storage_format_works_everywhere(tiny_folder, tmp_path, tiny_tokenizer):
    full = load_model(tiny_folder, dtype="float32")
    read = load_model(tiny_folder, dtype="float32", quantize="test_float8")
    after = quantize_weights(load_model(tiny_folder, dtype="float32"), "test_float8")
    logits = read.logits(IDS)
    assert torch.equal(after.logits(IDS), logits)
    assert read.packed_formats() == {"test_float8"}
    assert not torch.allclose(logits, full.logits(IDS), atol=1e-3)
    for (_, holder), (_, packed) in zip(full.weight_modules(), read.weight_modules(), strict=True):
        holder.weight.copy_(packed.storage.dense())
    torch.testing.assert_close(logits, full.logits(IDS), atol=1e-5, rtol=1e-5)

    # planned: the stored size equals the counted one
    held = sum(t.nbytes for t in (*read.parameters(), *read.buffers()))
    assert weight_bytes(full, torch.float32, "test_float8") == held
    assert weight_bytes(read, torch.float32) == held

    # cast to another dtype: codes and scales stay
    half = load_model(tiny_folder, dtype="float32", quantize="test_float8").to(torch.bfloat16)
    storage = half.layers[0].mixer.q_proj.storage
    assert storage.codes.dtype == torch.float8_e4m3fn
    assert storage.scale.dtype == torch.float32
    assert half.dtype == torch.bfloat16

    # saved and loaded: three tensors per weight
    save_model(read, tmp_path / "out", tokenizer=tiny_tokenizer)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stem = "model.layers.0.self_attn.q_proj."
    names = {n.removeprefix(stem) for n in tensors if n.startswith(stem)}
    assert names == {"weight", "weight_scale", "weight_shape"}
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described == {"quant_method": "test_float8", "fmt": "e4m3"}
    again = load_model(tmp_path / "out")
    assert again.packed_formats() == {"test_float8"}
    assert torch.equal(again.logits(IDS), logits)
    with pytest.raises(ConfigError, match="already quantized as test_float8"):
        load_model(tmp_path / "out", quantize="int8")

    # served, but not by the compiled step
    assert "test_float8, which the kernels do not read" in CompiledStep.unsupported_reason(again)
    llm = LLM(model=again, tokenizer=tiny_tokenizer, max_running=4, cache_dtype="float32")
    for prompt, done in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
        chosen = again.logits([*prompt, *done.token_ids])[len(prompt) - 1 : -1].argmax(-1)
        assert chosen.tolist() == done.token_ids

    # not all weights can be trained
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a b", "completion": "c d"}\n', encoding="utf-8")
    config = run_config(tmp_path, tmp_path / "out", data={"train": [str(rows)], "max_seq_len": 64})
    with pytest.raises(ConfigError, match="cannot all be trained; train an adapter"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_an_unknown_format_or_setting_is_refused(tiny_folder, tmp_path):
    model = load_model(tiny_folder, dtype="float32", quantize="test_float8")
    save_model(model, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    for changed, words in (
        ({"quant_method": "test_float9"}, "'test_float9', which cannot be read"),
        ({"quant_method": "test_float8", "fmt": "e5m2"}, r"quantization_config.fmt='e5m2'"),
        ({"quant_method": "test_float8", "fmt": "e4m3", "new": 1}, r"quantization_config.new=1"),
    ):
        path.write_text(json.dumps(values | {"quantization_config": changed}))
        with pytest.raises(CheckpointError, match=words):
            load_model(tmp_path / "out")
    # a missing tensor is named
    path.write_text(json.dumps(values))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight_scale"
    from safetensors.torch import save_file

    save_file(
        {n: t for n, t in tensors.items() if n != lost}, tmp_path / "out" / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=lost):
        load_model(tmp_path / "out")


@pytest.mark.parametrize(
    "adapter", [None, {"kind": "lora", "rank": 2}, ADAPTERS["test_weight_norm"]]
)
def test_a_registered_objective_works_everywhere(adapter, rows, tiny_folder, tmp_path):
    config = run_config(
        rows,
        tiny_folder,
        objective={"kind": "test_pair_loss", "beta": 0.3},
        data={
            "kind": "test_pairs",
            "train": [str(rows / "pairs.jsonl")],
            "eval": [str(rows / "pairs.jsonl")],
            "max_seq_len": 64,
        },
        adapter=adapter,
        optimizer={"learning_rate": 3e-3 if adapter is None else 3e-2},
        schedule={"kind": "constant"},
        max_steps=6,
    )
    train_twice(config, tmp_path)
    lines = read_metrics(tmp_path / "whole")
    steps = [line for line in lines if "train/margin" in line]
    # the reference is the initial model: no margin, ln 2 (times the weights)
    assert steps[0]["train/margin"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["train/margin"] > 0
    evaluated = next(line for line in lines if "eval/loss_nats" in line)
    assert evaluated["eval/margin"] > 0


def test_an_objective_refuses_unsuitable_data_and_samples(rows, tiny_folder):
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match="needs data of kind test_pairs"):
        run_config(rows, tiny_folder, objective={"kind": "test_pair_loss"})


def test_a_registered_family_works_everywhere_from_its_gguf_file(
    rows, tiny_folder, tmp_path, tiny_tokenizer, families_restored
):
    register_family(TEST_FAMILY)
    expected = load_model(tiny_folder, dtype="float32")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "testarch")
    for key, value in {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "width": 32,
        "inner": 64,
        "layers": 2,
        "context_length": 256,
        "vocab_size": 320,
    }.items():
        writer.add_uint32(f"testarch.{key}", value)
    writer.add_float32("testarch.eps", 1e-5)
    ours = {p: f"mixer.{p}_proj" for p in "qkvo"}
    ours |= {p: f"feed_forward.{p}_proj" for p in ("gate", "up", "down")}
    ours |= {"n1": "mixer_norm", "n2": "feed_forward_norm"}
    state = expected.state_dict()
    writer.add_tensor("words.weight", state["embed_tokens.weight"].numpy())
    writer.add_tensor("last.weight", state["norm.weight"].numpy())
    for layer in range(2):
        for theirs, name in ours.items():
            tensor = state[f"layers.{layer}.{name}.weight"] * (2 if theirs == "down" else 1)
            writer.add_tensor(f"t.{layer}.{theirs}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = load_model(tmp_path / "m.gguf")
    assert model.config.family == "test_family"
    assert torch.equal(model.logits(IDS), expected.logits(IDS))
    save_model(model, tmp_path / "hf", tokenizer=tiny_tokenizer)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "test_family"
    saved = train_twice(
        run_config(rows, tmp_path / "hf", adapter={"kind": "lora", "rank": 2}),
        tmp_path,
    )
    adapted = load_model(tmp_path / "hf", adapter=saved)
    logits = adapted.logits(IDS)
    torch.testing.assert_close(merge(adapted).logits(IDS), logits, atol=1e-4, rtol=1e-4)
    assert CompiledStep.unsupported_reason(adapted) is None
    options = {"micro_batch_tokens": 64, "dtype": torch.float32}
    assert estimate_training(model.config, **options).weights == 4 * sum(
        p.numel() for p in model.parameters()
    )
    done = LLM(model=adapted, tokenizer=tiny_tokenizer, max_running=4).generate(PROMPTS, GREEDY)
    chosen = adapted.logits([*PROMPTS[0], *done[0].token_ids])[len(PROMPTS[0]) - 1 : -1].argmax(-1)
    assert chosen.tolist() == done[0].token_ids
    with pytest.raises(ConfigError, match="already registered"):
        register_family(TEST_FAMILY)


def test_registered_kinds_are_in_error_messages_and_the_schema(rows, tiny_folder):
    from easyllm.core.config import validate

    values = {"data": {"train": ["x"]}, "adapter": {"kind": "test_input_scal"}}
    with pytest.raises(ConfigError, match="did you mean 'test_input_scale'"):
        validate(TrainConfig, values, source="recipe")
    text = json.dumps(json_schema(TrainConfig))
    for kind in (*ADAPTERS, "test_pair_loss", "test_pairs", "lora", "classifier", "corpus"):
        assert f'"{kind}"' in text
    with pytest.raises(ValueError, match="already registered"):
        register_adapter(InputScaleConfig, peft_type="OTHER")
    with pytest.raises(ValueError, match="already registered"):
        register_storage(StorageFormat(name="int8", num_bytes=lambda shape: 0))


def test_a_saved_adapter_with_an_unknown_key_is_refused(rows, tiny_folder, tmp_path):
    config = run_config(rows, tiny_folder, adapter=ADAPTERS["test_input_scale"], max_steps=1)
    train(config, tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"scale_squared": True}))
    with pytest.raises(CheckpointError, match="scale_squared=True, which is not known"):
        load_model(tiny_folder, adapter=tmp_path / "run" / "adapter")
    path.write_text(json.dumps(values | {"scale_squared": False}))
    model = load_model(tiny_folder, adapter=tmp_path / "run" / "adapter")
    assert hf_module_name(model)("layers.0.mixer.q_proj") == "model.layers.0.self_attn.q_proj"
