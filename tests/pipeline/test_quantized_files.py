"""A model quantized by each method, saved in each format, loaded again and served."""

import json

import pytest
import torch

from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.engine import LLM, SamplingParams
from easyllm.models import load_model
from easyllm.models.save import save_model
from easyllm.quant.formats import UNIFORM
from easyllm.quant.gptq import GPTQOptions
from easyllm.quant.gptq import gptq as quantize_gptq
from easyllm.quant.layers import LayerQuantizer
from easyllm.quant.methods import find_method
from easyllm.quant.spec import QuantSpec
from tiny_models import build_tiny

IDS = torch.arange(5, 45)
CASES = {
    "gptq, v1": ("gptq", "gptq", {"bits": 4, "group_size": 16}, {}),
    "gptq, v2": ("gptq", "gptq", {"bits": 4, "group_size": 16, "symmetric": False}, {}),
    "gptq, activation order": (
        "gptq",
        "gptq",
        {"bits": 4, "group_size": 16},
        {"static_groups": False},
    ),
    "gptq, 3 bits": ("gptq", "gptq", {"bits": 3, "group_size": 32}, {"static_groups": False}),
    "gptq, 2 bits": ("gptq", "gptq", {"bits": 2, "group_size": 16}, {}),
    "gptq, 8 bits, channels": ("gptq", "gptq", {"bits": 8}, {}),
    "awq": ("awq", "awq", {"bits": 4, "group_size": 16, "symmetric": False}, {}),
    "compressed": ("rtn", "compressed-tensors", {"bits": 4, "group_size": 32}, {}),
    "compressed, asymmetric": (
        "gptq",
        "compressed-tensors",
        {"bits": 4, "group_size": 16, "symmetric": False, "scale_dtype": "bfloat16"},
        {},
    ),
    "compressed, W8A8": (
        "smoothquant",
        "compressed-tensors",
        {"bits": 8, "activations": True},
        {},
    ),
    "compressed, 3 bits": ("awq", "compressed-tensors", {"bits": 3, "group_size": 16}, {}),
}


def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 250, (24,), generator=generator) for _ in range(8)]


def quantized(case, model=None, skip=()):
    method, format, spec, settings = CASES[case]
    grid, layout = QuantSpec(**spec), UNIFORM[format]
    model = model or build_tiny()
    quantizer = LayerQuantizer(
        method=find_method(method, **settings),
        spec_of=lambda name: None if name.endswith(tuple(skip)) else grid,
        store=lambda _, weight: layout.storage(weight, model.dtype),
    )
    return model, quantizer.run(model, sequences())


@pytest.mark.parametrize("case", CASES)
def test_a_quantized_model_is_the_same_after_saving_and_loading(case, tmp_path):
    plain = build_tiny().logits(IDS)
    model, report = quantized(case)
    logits = model.logits(IDS)
    assert len(report.linears) == 14
    assert not report.unreached
    drift = float((logits - plain).norm() / plain.norm())
    assert drift > 1e-4
    assert drift < 0.6 or CASES[case][2]["bits"] < 4
    save_model(model, tmp_path / "q")
    again = load_model(tmp_path / "q")
    assert again.packed_formats() == {CASES[case][1]}
    assert torch.equal(again.logits(IDS), logits)
    # saving what was loaded writes the same file
    save_model(again, tmp_path / "r")
    first, second = (tmp_path / n / "model.safetensors" for n in "qr")
    assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "q/config.json").read_text() == (tmp_path / "r/config.json").read_text()


@pytest.mark.parametrize("case", ["gptq, v1", "awq", "compressed"])
def test_linears_in_full_precision_are_named_in_the_configuration(case, tmp_path):
    model, report = quantized(case, skip=["1.feed_forward.down_proj", "0.mixer.q_proj"])
    assert len(report.linears) == 12
    save_model(model, tmp_path / "q")
    config = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    text = json.dumps(config).replace("\\\\", "")
    assert "model.layers.1.mlp.down_proj" in text
    assert "model.layers.0.self_attn.q_proj" in text
    assert torch.equal(load_model(tmp_path / "q").logits(IDS), model.logits(IDS))


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_linears_with_other_grids_are_read_by_the_shapes_of_their_tensors(format, tmp_path):
    model, layout = build_tiny(), UNIFORM[format]
    specs = {"down_proj": QuantSpec(bits=8, group_size=16), "o_proj": QuantSpec(bits=3)}
    LayerQuantizer(
        method=find_method("rtn"),
        spec_of=lambda name: specs.get(name.rpartition(".")[2], QuantSpec(bits=4, group_size=16)),
        store=lambda _, weight: layout.storage(weight, model.dtype),
    ).run(model, ())
    logits = model.logits(IDS)
    save_model(model, tmp_path / "q")
    again = load_model(tmp_path / "q")
    assert torch.equal(again.logits(IDS), logits)
    assert again.layers[1].feed_forward.down_proj.storage.spec == specs["down_proj"]
    assert again.layers[0].mixer.o_proj.storage.spec.bits == 3


@pytest.mark.parametrize("case", ["gptq, v1", "awq"])
def test_the_engine_serves_a_quantized_folder(case, tmp_path, tiny_tokenizer):
    model, _ = quantized(case)
    save_model(model, tmp_path / "q", tokenizer=tiny_tokenizer)
    llm = LLM(str(tmp_path / "q"))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (found,) = llm.generate([IDS.tolist()], params)
    ids = IDS.tolist()
    for token in found.token_ids:
        assert token == int(model.logits(ids)[-1].argmax())
        ids.append(token)


def test_an_expert_that_no_token_reaches_is_rounded_to_nearest_and_named():
    model = build_tiny(model_type="mixtral", num_local_experts=4, num_experts_per_tok=1)
    with torch.no_grad():
        model.layers[0].feed_forward.router.weight[2] = 0  # never the largest of four
        model.layers[0].feed_forward.router.weight[:2] = model.layers[0].feed_forward.router.weight[
            0
        ]
        model.layers[0].feed_forward.router.weight[1] *= -1
    model.requires_grad_(False)
    _, report = quantized("gptq, v1", model)
    assert {name for name in report.unreached if name.startswith("layers.0.")} >= {
        f"layers.0.feed_forward.experts.2.{leaf}_proj" for leaf in ("gate", "up", "down")
    }


def test_calibration_and_widths_are_checked_before_any_work():
    model = build_tiny()
    quantizer = LayerQuantizer(
        method=find_method("gptq"),
        spec_of=lambda _: QuantSpec(bits=4, group_size=48),
        store=lambda _, weight: UNIFORM["gptq"].storage(weight, model.dtype),
    )
    with pytest.raises(ConfigError, match=r"q_proj cannot be quantized: .* does not divide 32"):
        quantizer.run(model, sequences())
    with pytest.raises(ConfigError, match="method 'gtpq' is not known"):
        find_method("gtpq")
    assert not model.packed_formats()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("bits", 5, "bits"),
        ("bits", 8, "qweight has shape"),
        ("group_size", 8, "has shape"),
        ("checkpoint_format", "gptq_v3", "checkpoint_format='gptq_v3'"),
        ("checkpoint_format", "gptq_p", "checkpoint_format='gptq_p'"),
        ("format", "gptq_v2", "must be equal"),
        ("method", "qqq", "method='qqq'"),
        ("dynamic", True, "dynamic=True, expected an object"),
        ("dynamic", {"+:x": None}, "dynamic="),
        ("new_rounding", "half", "new_rounding='half', which is not known"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(key, value, words, tmp_path):
    model, _ = quantized("gptq, v1")
    save_model(model, tmp_path / "q")
    path = tmp_path / "q/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path / "q")


@pytest.mark.parametrize(
    ("case", "keys"),
    [
        ("gptq, v1", {"method": "gptq", "format": "gptq", "lm_head": False, "meta": {"mse": 0.0}}),
        (
            "awq",
            {
                "method": "awq",
                "format": "gemm",
                "checkpoint_format": "gemm",
                "zero_point": False,
                "sym": True,
                "desc_act": False,
                "pack_dtype": "int32",
            },
        ),
    ],
)
def test_the_additional_keys_of_gptqmodel_are_read(case, keys, tmp_path):
    model, _ = quantized(case)
    save_model(model, tmp_path / "q")
    path = tmp_path / "q/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= keys
    path.write_text(json.dumps(config))
    again = load_model(tmp_path / "q")
    assert torch.equal(again.logits(IDS), model.logits(IDS))


@pytest.mark.parametrize(
    ("key", "value"),
    [("desc_act", True), ("lm_head", True), ("pack_dtype", "int16"), ("version", "gemv")],
)
def test_an_awq_file_of_another_kind_is_refused(key, value, tmp_path):
    model, _ = quantized("awq")
    save_model(model, tmp_path / "q")
    path = tmp_path / "q/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"quantization_config.{key}={value!r}"):
        load_model(tmp_path / "q")


def test_a_layout_without_a_place_for_the_order_of_inputs_refuses_it():
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    model = build_tiny()
    weight = model.layers[0].mixer.q_proj.weight
    order = GPTQOptions(static_groups=False)
    spec = QuantSpec(bits=4, group_size=16, symmetric=False)
    moved = quantize_gptq(weight, x.T @ x, spec, order)
    for name in ("awq", "compressed-tensors"):
        with pytest.raises(ConfigError, match=f"{name} cannot hold activation order"):
            UNIFORM[name].storage(moved, torch.float32)
