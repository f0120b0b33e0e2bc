"""P-Tuning: the encoders are peft's, and are used in training alone."""

import pytest
import torch
from pydantic import ValidationError

from easyllm.adapters import PTuningConfig, attach
from prompt_adapters import adapted, save
from tiny_models import build_tiny


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_the_encoder_computes_what_that_of_peft_does(encoder):
    from peft import PromptEncoder, PromptEncoderConfig

    config = PTuningConfig(num_virtual_tokens=6, encoder=encoder, encoder_hidden_size=24)
    theirs = PromptEncoder(
        PromptEncoderConfig(
            num_virtual_tokens=6,
            token_dim=32,
            num_transformer_submodules=1,
            encoder_reparameterization_type=encoder.upper(),
            encoder_hidden_size=24,
        )
    )
    adapter = attach(build_tiny(), config).model_adapter
    ours = dict(adapter.table.encoder.named_parameters())
    values = dict(theirs.named_parameters())
    assert len(values) == len(ours) + 1
    with torch.no_grad():
        adapter.table.embedding.copy_(values.pop("embedding.weight"))
        for name, value in values.items():
            head, _, rest = name.partition(".")
            ours[rest if encoder == "mlp" else f"{head.removesuffix('_head')}.{rest}"].copy_(value)
    expected = theirs(torch.arange(6)[None])[0]
    torch.testing.assert_close(adapter.vectors(), expected, atol=1e-6, rtol=0)


def test_initial_values_have_the_distribution_of_pytorch():
    torch.manual_seed(0)
    config = PTuningConfig(num_virtual_tokens=64, encoder="lstm", encoder_hidden_size=48)
    table = attach(build_tiny(), config).model_adapter.table.requires_grad_(False)
    reference = config.build_model_adapter(build_tiny().config).table.requires_grad_(False)
    assert float(table.embedding.std()) == pytest.approx(1, abs=0.1)
    for ours, theirs in zip(
        table.encoder.parameters(), reference.encoder.parameters(), strict=True
    ):
        assert float(ours.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=0.1)
        if ours.ndim > 1:
            assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.05)


def test_dropout_acts_in_training_and_not_in_the_file(tmp_path):
    config = PTuningConfig(encoder="lstm", encoder_hidden_size=8, encoder_dropout=0.5)
    model = adapted(build_tiny(), config)
    table = model.model_adapter.table
    with torch.no_grad():  # PyTorch's LSTM has other last bits with gradients
        once = model.model_adapter.vectors()
    with_gradient = model.model_adapter.vectors()
    torch.testing.assert_close(with_gradient, once, atol=1e-6, rtol=0)
    model.train()
    assert not torch.equal(model.model_adapter.vectors(), model.model_adapter.vectors())
    assert torch.equal(table.folded(), once)
    assert table.encoder.training  # saving in the middle of a run changes nothing
    save(model, tmp_path / "a")
    assert table.encoder.training


@pytest.mark.parametrize("values", [{"encoder_num_layers": 3}, {"encoder_dropout": 0.1}])
def test_settings_of_the_lstm_are_refused_for_the_mlp(values):
    with pytest.raises(ValidationError, match="have no effect with encoder=mlp; set encoder=lstm"):
        PTuningConfig(**values)
