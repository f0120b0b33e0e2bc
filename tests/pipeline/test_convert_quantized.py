"""`easyllm convert` between quantized formats: the same codes, full weights, or a refusal."""

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.models import load_model, load_tokenizer, save_model
from easyllm.models.gguf_export import save_gguf
from easyllm.pipeline.relayout import relayout
from easyllm.quant import KEPT, quantize_weights
from easyllm.quant.formats import UNIFORM
from easyllm.quant.layers import LayerQuantizer
from easyllm.quant.methods import find_method
from easyllm.quant.spec import QuantSpec
from easyllm_command import easyllm
from tiny_models import build_tiny

IDS = torch.arange(5, 45)


def quantized(folder, tokenizer, format="gptq", **spec):
    model, layout = build_tiny(vocab_size=tokenizer.vocab_size), UNIFORM[format]
    spec = QuantSpec(**({"bits": 4, "group_size": 32} | spec))
    LayerQuantizer(
        method=find_method("rtn"),
        spec_of=lambda _: spec,
        store=lambda _, weight: layout.storage(weight, torch.float32),
    ).run(model, ())
    save_model(model, folder, tokenizer=tokenizer)
    return folder


def dense(path, **options):
    model = load_model(path, dtype="float32", **options)
    return {name: layer.storage.dense() for name, layer in model.weight_modules()}


@pytest.mark.parametrize("to", [*UNIFORM, "full"])
@pytest.mark.parametrize("source", UNIFORM)
def test_weights_are_equal_in_every_format(source, to, tmp_path, tiny_tokenizer):
    folder = quantized(tmp_path / "a", tiny_tokenizer, source, symmetric=source != "awq")
    done = easyllm("convert", str(folder), str(tmp_path / "b"), "--to", to)
    assert done.returncode == 0, done.stderr
    before, after = dense(folder), dense(tmp_path / "b")
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected = set() if to == "full" else {to}
    assert load_model(tmp_path / "b").packed_formats() == expected


@pytest.mark.parametrize("type", ["q4_0", "q8_0"])
def test_symmetric_gguf_blocks_are_a_grid_that_other_formats_hold(type, tmp_path):
    tokenizer = load_tokenizer("smollm2")
    model = build_tiny(hidden_size=64, intermediate_size=96, vocab_size=tokenizer.vocab_size)
    overrides = [("embed_tokens", "f32")]
    path = tmp_path / "m.gguf"
    save_gguf(model, path, type=type, tokenizer=tokenizer, overrides=overrides)
    relayout(str(path), tmp_path / "b", "gptq")
    before, after = dense(path, quantize=KEPT), dense(tmp_path / "b")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_full_weights_become_a_gguf_file(tmp_path):
    tokenizer = load_tokenizer("smollm2")
    model = build_tiny(vocab_size=tokenizer.vocab_size)
    save_model(model, tmp_path / "m", tokenizer=tokenizer)
    target = tmp_path / "m.gguf"
    assert easyllm("convert", str(tmp_path / "m"), str(target), "--type", "f32").returncode == 0
    assert torch.equal(load_model(target).logits(IDS), model.logits(IDS))
    done = easyllm("convert", str(tmp_path / "m"), str(tmp_path / "n.gguf"), "--type", "q4_0")
    assert done.returncode == 2
    assert "use easyllm quantize --type q4_0" in " ".join(done.stderr.split())
    done = easyllm("convert", str(tmp_path / "m"), str(tmp_path / "n.gguf"), "--type", "bf61")
    assert done.returncode == 2
    assert "no GGUF type 'bf61' (did you mean 'bf16'?)" in " ".join(done.stderr.split())
    assert not (tmp_path / "n.gguf").exists()


def test_what_would_be_rounded_again_is_refused(tmp_path, tiny_tokenizer):
    def reason(folder, to):
        with pytest.raises(ConfigError) as error:
            relayout(str(folder), tmp_path / "b", to)
        assert not (tmp_path / "b").exists()
        return str(error.value)

    three = quantized(tmp_path / "three", tiny_tokenizer, bits=3)
    assert "it has 4 bits, not 3" in reason(three, "awq")
    assert "format 'gpqt' is not known" in reason(three, "gpqt")
    save_model(build_tiny(), tmp_path / "full", tokenizer=tiny_tokenizer)
    assert "are not quantized" in reason(tmp_path / "full", "awq")
    model = quantize_weights(build_tiny(vocab_size=tiny_tokenizer.vocab_size), "nf4")
    save_model(model, tmp_path / "nf4", tokenizer=tiny_tokenizer)
    assert "stored as nf4, which is not a uniform grid" in reason(tmp_path / "nf4", "gptq")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--to", "awq", "--kv-heads", "1"], "--kv-heads and --to cannot be combined"),
        (["--type", "f16"], "--type is that of a GGUF file"),
    ],
)
def test_flags_that_do_not_fit_together(flags, words, tmp_path, tiny_folder):
    done = easyllm("convert", str(tiny_folder), str(tmp_path / "out"), *flags)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
