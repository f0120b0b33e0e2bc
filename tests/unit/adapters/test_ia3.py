"""IA³: what is scaled, biases included, and how files say it."""

import json

import pytest
import torch

from adapter_kinds import BIASES, model_with
from easyllm.adapters import IA3, IA3Config, attach, load_adapter, save_adapter
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.models import hf_module_name
from easyllm.nn.linear import BaseLinear, Linear
from tiny_models import build_tiny

IDS = torch.arange(5, 45)


@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_scaled_with_their_bias_and_inputs_without(of_input, bias):
    linear = Linear(10, 7, bias=bias).requires_grad_(False)
    for number, parameter in enumerate(linear.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    adapter = IA3(10 if of_input else 7, of_input=of_input)
    torch.nn.init.uniform_(adapter.ia3_l, 0.5, 2.0, generator=torch.Generator().manual_seed(8))
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(9))
    l, b = adapter.ia3_l.flatten(), linear.bias if bias else 0.0
    expected = (x * l) @ linear.weight.T + b if of_input else (x @ linear.weight.T + b) * l
    torch.testing.assert_close(adapter(x, BaseLinear(linear)), expected, atol=1e-5, rtol=1e-5)
    weight, merged = adapter.merged(linear.weight, linear.bias)
    torch.testing.assert_close(
        torch.nn.functional.linear(x, weight, merged), expected, atol=1e-5, rtol=1e-5
    )


def test_keys_and_values_are_scaled_after_and_the_last_linear_before_its_product():
    adapters = attach(build_tiny(), IA3Config())
    found = {n.removeprefix("layers.0."): a.of_input for n, (_, a) in adapters.linears.items()}
    assert len(found) == 3 + 3
    assert found["mixer.k_proj"] is found["mixer.v_proj"] is False
    assert found["feed_forward.down_proj"] is True


def test_linears_with_scaled_inputs_do_not_share_a_matrix_product():
    assert IA3(4, of_input=False).passes_input_unchanged
    assert not IA3(4, of_input=True).passes_input_unchanged


def saved(tmp_path, config):
    model, _ = model_with(config)
    where = hf_module_name(model)
    save_adapter(model, tmp_path / "a", module_name=where, base="tiny")
    return model, where, tmp_path / "a" / "adapter_config.json"


def test_a_file_names_the_modules_with_scaled_inputs(tmp_path):
    config = IA3Config(targets=("k_proj", "up_proj", "down_proj"), scaled_inputs=("up_proj",))
    model, where, path = saved(tmp_path, config)
    values = json.loads(path.read_text())
    assert values["feedforward_modules"] == [f"model.layers.{n}.mlp.up_proj" for n in (0, 1)]
    assert set(values["feedforward_modules"]) < set(values["target_modules"])
    again = build_tiny(**BIASES)
    adapters = load_adapter(again, tmp_path / "a", module_name=where)
    scaled = {n for n, (_, a) in adapters.linears.items() if a.of_input}
    assert scaled == {f"layers.{n}.feed_forward.up_proj" for n in (0, 1)}
    assert torch.equal(again.logits(IDS), model.logits(IDS))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"ia3_temperature": 2.0}, "ia3_temperature=2.0, which is not known"),
        ({"peft_type": "LORA", "r": 2, "lora_alpha": 2}, "feedforward_modules=.*is not known"),
    ],
)
def test_keys_that_change_the_result_are_refused(keys, words, tmp_path):
    _, where, path = saved(tmp_path, IA3Config())
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    with pytest.raises(CheckpointError, match=words):
        load_adapter(build_tiny(), tmp_path / "a", module_name=where)


def test_a_linear_with_one_output_is_scaled_after_its_product():
    """Its factors have the shape [1, 1], which could also be that of one input."""
    from easyllm.adapters import FileModule

    module = FileModule(name="gate", tensors={"ia3_l": torch.ones(1, 1)})
    config = IA3Config.from_peft({"peft_type": "IA3"}, {"layers.0.gate": module})
    assert not config.scales_input("layers.0.gate")


def test_a_target_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"adapter target 'vproj' .*'v_proj'"):
        attach(build_tiny(), IA3Config(targets=("k_proj", "vproj")))
