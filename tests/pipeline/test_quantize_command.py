"""`easyllm quantize`: what it writes and prints, and what it refuses before any work."""

import json
import os

import pytest
import torch

from easyllm.adapters import LoRAConfig, attach, save_adapter
from easyllm.models import hf_module_name, load_model, save_model
from easyllm.models.load import OpenSource
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
        (["--method", "gptq-nf4"], "bitsandbytes", 4),
        (["--method", "llm.int8"], "bitsandbytes", 8),
        (["--method", "gptq", "--override", "*.down_proj=8"], "gptq", 4),
    ],
)
def test_a_folder_is_written_and_its_price_printed(flags, method, bits, folder, tmp_path):
    uses_text = flags[1].startswith(("gptq", "awq", "smoothquant"))
    if uses_text:
        flags += ["--data", str(text_file(tmp_path)), "--samples", "8", "--length", "32"]
    limit = ["--max-kl", "1000", "--json"]
    done = easyllm("quantize", str(folder), str(tmp_path / "out"), *flags, *limit)
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
        (["--type", "q4_9"], "there is no GGUF type 'q4_9'"),
        (["--format", "gguf"], "format gguf needs a type"),
        (["--type", "q4_0", "--format", "gptq"], "type q4_0 is GGUF's"),
        (["--samples", "9999"], "expected 9999"),
        (["--method", "nf4", "--format", "gptq"], "does not hold weights of method nf4"),
        (["--method", "gptq-nf4", "--group-size", "32"], "group_size has no effect on"),
        (["--method", "gptq", "--format", "bitsandbytes"], "does not hold weights of method gptq"),
        (["--method", "nf4", "--bits", "8"], "bits has no effect on method nf4"),
        (["--method", "rtn"], "data has no effect on method rtn"),
        (["--type", "q4_0", "--method", "awq"], "method has no effect on type q4_0"),
        (["--override", "*.down_prj=8"], "matches no weight of this model"),
        (["--override", "*.down_proj=7"], "is not PATTERN=VALUE"),
        (["--type", "q4_0", "--override", "*.down_proj=q9"], "there is no GGUF type 'q9'"),
        (["--method", "smoothquant", "--bits", "4"], "symmetric weights of 8 bits"),
        (["--compare", "rtn,gptq"], "give either OUT or --compare"),
        (["--override", "embed_tokens=8"], "matches no weight of this model"),
        (["--type", "q8_0"], "has no effect on type q8_0"),
        (["--dequantize"], "are not quantized; leave out --dequantize"),
        (["--length", "100000"], "longer than the model's context"),
        (["--data", "nosuch"], "matches no file"),
        (["--data", os.devnull], "matches no file"),
        (["--text", "nosuch"], "cannot be read"),
        (["--text", os.devnull], "is empty"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(
    flags, words, folder, tmp_path, monkeypatch
):
    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(OpenSource, "model", load)
    flags = ["--data", str(text_file(tmp_path)), "--length", "32", *flags]
    done = easyllm("quantize", str(folder), str(tmp_path / "out"), *flags)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_quantized_folder_is_not_quantized_again(folder, tmp_path):
    flags = ["--method", "rtn", "--format", "gptq", "--group-size", "32", "--max-kl", "1000"]
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
    assert [f"{name} ({i} of 4)" in done.stderr for i, name in enumerate(prices, 1)] == [True] * 4
    for flags, words in (
        (["rtn,gtpq"], "'gtpq' is neither a method nor a GGUF type"),
        ([","], "names nothing to compare"),
        (["rtn,nf4", "--samples", "4"], "samples has no effect on any of rtn, nf4"),
        (["rtn", "--type", "q4_0"], "type has no effect on any of rtn"),
        (["nf4,gptq", "--group-size", "48"], "a group size of 48 does not divide 64 inputs"),
        (["rtn", "--keep"], "--keep and --max-kl concern a result that is written"),
    ):
        done = easyllm("quantize", str(folder), "--compare", *flags)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert words in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("target", "flags", "words"),
    [
        ("out", ["--type", "q4_0"], "does not end in .gguf; add it"),
        ("out.gguf", ["--method", "rtn"], "ends in .gguf; name a folder"),
    ],
)
def test_a_target_has_the_name_that_its_format_needs(target, flags, words, folder, tmp_path):
    done = easyllm("quantize", str(folder), str(tmp_path / target), *flags)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())


def test_a_result_that_differs_too_much_is_kept_only_on_request(folder, tmp_path):
    flags = ["--method", "rtn", "--bits", "3", "--group-size", "0", "--max-kl", "0.001"]
    done = easyllm("quantize", str(folder), str(tmp_path / "out"), *flags)
    assert done.returncode == 1
    assert "KL divergence" in done.stderr
    assert "nothing was written" in " ".join(done.stderr.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    done = easyllm("quantize", str(folder), str(tmp_path / "out"), *flags, "--json")
    told = json.loads(done.stdout)
    assert told["path"] is None
    assert (
        max(row["kl_nats"] for row in told["gate"]["rows"] if row["name"] == "saved, reloaded") > 0
    )
    done = easyllm("quantize", str(folder), str(tmp_path / "out"), *flags, "--keep")
    assert done.returncode == 1
    assert "was kept" in " ".join(done.stderr.split())
    load_model(tmp_path / "out")


@pytest.mark.parametrize("method", [["gptq", "--group-size", "32"], ["gptq-nf4"]])
def test_finished_layers_are_kept_until_the_result_is_written(method, folder, tmp_path):
    data = ["--data", str(text_file(tmp_path)), "--samples", "4", "--length", "32"]
    flags = ["--method", *method, *data]
    failed = easyllm("quantize", str(folder), str(tmp_path / "out"), *flags, "--max-kl", "1e-9")
    assert failed.returncode == 1
    partial = tmp_path / "out.partial"
    assert len(list(partial.glob("layer-*"))) == 2
    (partial / "layer-0001.safetensors").write_bytes(b"damaged")
    done = easyllm("quantize", str(folder), str(tmp_path / "out"), *flags, "--max-kl", "1000")
    assert done.returncode == 0, done.stderr
    assert "resuming: 2 layers are finished" in " ".join(done.stderr.split())
    assert not partial.exists()
    plain = [*flags, "--max-kl", "1000"]
    assert easyllm("quantize", str(folder), str(tmp_path / "b"), *plain).returncode == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "b")]
    assert files[0] == files[1]


def test_a_folder_of_the_user_is_not_used_for_finished_layers(folder, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine.txt").write_text("mine")
    data = ["--data", str(text_file(tmp_path)), "--samples", "4", "--length", "32"]
    done = easyllm("quantize", str(folder), str(tmp_path / "out"), *data, "--group-size", "32")
    assert done.returncode == 2
    assert "out.partial" in done.stderr
    assert (tmp_path / "out.partial/mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("out", "flags"),
    [
        ("out", ["--method", "rtn", "--bits", "8", "--group-size", "32"]),
        ("out.gguf", ["--type", "q8_0"]),
    ],
)
def test_an_adapter_is_merged_and_what_the_result_is_compared_with(out, flags, folder, tmp_path):
    model = load_model(folder, dtype="float32")
    attach(model, LoRAConfig(rank=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    names = hf_module_name(model)
    save_adapter(model, tmp_path / "adapter", module_name=names, base=str(folder))
    adapter = ["--adapter", str(tmp_path / "adapter")]
    out = str(tmp_path / out)
    done = easyllm("quantize", str(folder), out, *flags, *adapter, "--json")
    assert done.returncode == 0, done.stderr
    gate = json.loads(done.stdout)["gate"]
    assert gate["reference"] == "the attached adapter"
    assert [row["name"] for row in gate["rows"]] == [
        "merged in memory",
        "saved, reloaded",
        "served, against saved",
    ]
    assert all(row["holds"] for row in gate["rows"])
