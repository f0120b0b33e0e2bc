"""`easyllm verify` on checkpoints, and with an implementation that violates a law."""

import json

import pytest
import torch
from typer.testing import CliRunner

from easyllm.cli.main import app
from easyllm.core.errors import ConfigError
from easyllm.models import save_model, to_classifier
from easyllm.ops import paged_attention
from easyllm.ops.attention_backends import SDPA
from easyllm.ops.kernels.build import _library
from easyllm.quant import QuantSpec, quantize_weights
from easyllm.quant.formats import UNIFORM
from easyllm.quant.layers import LayerQuantizer
from easyllm.quant.methods import find_method
from easyllm.verify import verify
from tiny_models import build_tiny

FAST = [3, 6] if _library() is not None else []
"""Checks of the compiled step and of deterministic mode, if there are kernels."""


def test_every_law_holds_on_a_checkpoint_with_a_tokenizer(tiny_folder):
    result = CliRunner().invoke(
        app, ["verify", str(tiny_folder), "--against", "transformers", "--tokens", "60", "--json"]
    )
    assert result.exit_code == 0, result.output
    findings = json.loads(result.stdout)
    assert [f["law"] for f in findings] == [1, 7, 1, 2, 3, 3, *FAST]
    assert all(f["holds"] for f in findings)
    assert all(f["bound"] < 1e-2 for f in findings)


def test_every_law_holds_on_quantized_files(tmp_path):
    save_model(quantize_weights(build_tiny(), "nf4"), tmp_path / "q")
    findings = verify(str(tmp_path / "q"), num_tokens=60)
    assert all(f.holds for f in findings)
    assert all(f.bound < 1e-2 for f in findings)


@pytest.mark.parametrize("format", ["gptq", "llm.int8"])
def test_law_3_of_kernels_that_round_rows_has_a_bound_of_its_own(format, tmp_path):
    model = build_tiny()
    if format == "gptq":
        LayerQuantizer(
            method=find_method("rtn"),
            spec_of=lambda _: QuantSpec(bits=4, group_size=32),
            store=lambda _, weight: UNIFORM["gptq"].storage(weight, torch.float32),
        ).run(model, ())
    else:
        quantize_weights(model, format)
    save_model(model, tmp_path / "q")
    findings = verify(str(tmp_path / "q"), num_tokens=60)
    assert all(f.holds for f in findings)
    assert {f.law for f in findings if f.bound > 1e-2} == {3}


def test_a_broken_cache_is_detected_with_exit_code_1(tiny_folder, monkeypatch):
    whole = paged_attention.attend_segment

    def forgetful(q, k, v, rule, *, key_positions=None, **rest):
        """Attends only to the new tokens."""
        return whole(q, k[-len(q) :], v[-len(q) :], rule, **rest)

    monkeypatch.setattr(paged_attention, "attend_segment", forgetful)
    monkeypatch.setattr(paged_attention, "pick_backend", lambda call: SDPA)
    result = CliRunner().invoke(app, ["verify", str(tiny_folder), "--json"])
    assert result.exit_code == 1
    assert [f["law"] for f in json.loads(result.stdout) if not f["holds"]] == [3, 3, *FAST[1:]]


def test_too_few_tokens_and_models_without_logits_are_refused(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="4 tokens are too few to compare; give at least 16"):
        verify(tiny_folder, num_tokens=4)
    folder = save_model(to_classifier(build_tiny(), 2), tmp_path / "labels")
    assert all(finding.holds for finding in verify(folder, num_tokens=32))
    with pytest.raises(ConfigError, match="classification head has no logits"):
        verify(folder, against="transformers")


def test_a_model_unknown_to_transformers_is_named(tmp_path):
    model = build_tiny()
    model.config = model.config.changed(family="easyllm")
    folder = save_model(model, tmp_path / "m")
    with pytest.raises(ConfigError, match="transformers cannot load this model"):
        verify(folder, against="transformers", num_tokens=32)
