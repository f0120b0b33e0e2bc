"""`easyllm quantize`: what it writes and prints, and what it refuses before any work."""

import json

import pytest
import torch

from easyllm.models import load_model, save_model
from easyllm_command import easyllm
from tiny_models import build_tiny


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    model = build_tiny(vocab_size=tiny_tokenizer.vocab_size, hidden_size=64, intermediate_size=128)
    save_model(model, tmp_path / "model", tokenizer=tiny_tokenizer)
    return tmp_path / "model"


def text_file(tmp_path, rows=400):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * rows)
    return path


@pytest.mark.parametrize(
    ("flags", "method", "bits"),
    [
        (["--method", "gptq", "--act-order"], "gptq", 4),
        (["--method", "gptq", "--bits", "3", "--group-size", "32"], "gptq", 3),
        (["--method", "awq", "--asymmetric", "--group-size", "32"], "awq", 4),
        (["--method", "rtn", "--bits", "8", "--group-size", "0"], "compressed-tensors", 8),
        (["--method", "smoothquant"], "compressed-tensors", 8),
        (["--method", "nf4"], "bitsandbytes", 4),
        (["--method", "llm.int8"], "bitsandbytes", 8),
        (["--method", "gptq", "--override", "*.down_proj=8"], "gptq", 4),
    ],
)
def test_a_folder_is_written_and_its_price_printed(flags, method, bits, folder, tmp_path):
    uses_text = method in ("gptq", "awq") or "smoothquant" in flags
    if uses_text:
        flags += ["--data", str(text_file(tmp_path)), "--samples", "8", "--length", "32"]
    done = easyllm("quantize", str(folder), str(tmp_path / "out"), *flags, "--keep", "--json")
    assert done.returncode == 0, done.stderr
    price = json.loads(done.stdout)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == method
    assert config["torch_dtype"] == "float16"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert len(manifest["results"]["linears"]) == 14
    calibrated = manifest["config"]["calibration"]
    assert (calibrated is None) == (not uses_text)
    assert price["tokens_per_s"] > 0
    assert price["kl_nats"] >= 0
    assert price["bits_per_weight"] > bits
    assert load_model(tmp_path / "out").logits(torch.arange(5, 20)).isfinite().all()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--group-size", "48"], "a group size of 48 does not divide 64 inputs"),
        (["--bits", "5"], "bits"),
        (["--method", "gtpq"], "method"),
        (["--format", "awq", "--act-order"], "only format gptq can hold"),
        (["--format", "awq", "--bits", "8"], "it has 4 bits, not 8"),
        (["--format", "compressed-tensors", "--bits", "2"], "3, 4 or 8 bits, not 2"),
        (["--type", "q4_9"], "GGUF type 'q4_9' is not known"),
        (["--format", "gguf"], "format gguf needs a type"),
        (["--type", "q4_0", "--format", "gptq"], "type q4_0 is GGUF's"),
        (["--samples", "9999"], "expected 9999"),
        (["--method", "nf4", "--format", "gptq"], "does not hold weights of method nf4"),
        (["--method", "gptq", "--format", "bitsandbytes"], "does not hold weights of method gptq"),
        (["--method", "nf4", "--bits", "8"], "bits has no effect on method nf4"),
        (["--method", "rtn"], "data has no effect on method rtn"),
        (["--type", "q4_0", "--method", "awq"], "method has no effect on type q4_0"),
        (["--override", "*.down_prj=8"], "matches no weight of this model"),
        (["--override", "*.down_proj=7"], "is not PATTERN=VALUE"),
        (["--type", "q4_0", "--override", "*.down_proj=q9"], "GGUF type 'q9' is not known"),
        (["--method", "smoothquant", "--bits", "4"], "symmetric weights of 8 bits"),
        (["--compare", "rtn,gptq"], "give either OUT or --compare"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(flags, words, folder, tmp_path):
    flags += ["--data", str(text_file(tmp_path)), "--length", "32"]
    done = easyllm("quantize", str(folder), str(tmp_path / "out"), *flags)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_quantized_folder_is_not_quantized_again(folder, tmp_path):
    flags = ["--method", "rtn", "--format", "gptq", "--group-size", "32", "--keep"]
    assert easyllm("quantize", str(folder), str(tmp_path / "a"), *flags).returncode == 0
    done = easyllm("quantize", str(tmp_path / "a"), str(tmp_path / "b"), *flags)
    assert done.returncode == 2
    assert "already quantized as gptq" in " ".join(done.stderr.split())
    assert not (tmp_path / "b").exists()
    done = easyllm("quantize", str(tmp_path / "a"), str(tmp_path / "b"), *flags, "--dequantize")
    assert done.returncode == 0, done.stderr
    assert "weights of" in done.stdout
    assert "were dequantized" in " ".join(done.stdout.split())


def test_several_ways_are_compared_in_one_run(folder, tmp_path):
    names = "rtn,gptq,nf4,q8_0"
    data = ["--data", str(text_file(tmp_path)), "--samples", "4", "--length", "32"]
    done = easyllm(
        "quantize", str(folder), "--compare", names, "--group-size", "32", *data, "--json"
    )
    assert done.returncode == 0, done.stderr
    prices = json.loads(done.stdout)
    assert list(prices) == names.split(",")
    assert prices["q8_0"]["kl_nats"] < prices["rtn"]["kl_nats"]
    done = easyllm("quantize", str(folder), "--compare", "rtn,gtpq")
    assert done.returncode == 2
    assert "'gtpq' is neither a method nor a GGUF type" in " ".join(done.stderr.split())
