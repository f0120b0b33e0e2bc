"""`easyllm plan` with devices, budgets, memories and pages; `easyllm dtype`."""

import json

import pytest

from easyllm_command import easyllm


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """A machine with known rates."""
    monkeypatch.setattr("easyllm.plan.machine.matmul_rate", lambda *_, **__: 1e12)
    monkeypatch.setattr("easyllm.plan.machine.read_rate", lambda *_, **__: 1e11)


def answered(*words):
    done = easyllm(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ways_that_fit_are_listed_fastest_first_with_days_and_cost():
    words = ("plan", "llama2-7b", "--gpus", "8xH100-80GB", "--tokens", "1e12", "--price", "2")
    found = answered(*words)["gpus"]
    assert found["count"] == 8
    times = [way["step_seconds"] for way in found["training"]["fitting"]]
    assert times[0] == min(times)
    run = found["run"]
    assert run["price"] == pytest.approx(2 * run["gpu_hours"], rel=1e-3)
    best = found["training"]["fitting"][0]
    assert run["seconds"] == pytest.approx(1e12 / best["tokens_per_s"], rel=1e-3)
    table = easyllm(*words)
    assert "does not fit: DP8 needs 1" in table.stdout
    assert "device-hours" in table.stdout


def test_serving_has_ceilings_on_devices_and_here():
    here = answered("plan", "smollm2-135m", "--context", 512)["serving"]
    there = answered("plan", "smollm2-135m", "--context", 512, "--gpus", "A100-80GB")["serving"]
    assert there["tokens_per_s_one"] > here["tokens_per_s_one"] > 0
    assert there["most_requests"] > 1000


def test_what_fits_and_an_evening():
    fits = answered("plan", "smollm2-135m", "--fit", "4GB", "--context", 512)["fit"]
    assert {each["use"] for each in fits} == {"serving", "full", "lora", "qlora"}
    evening = answered("plan", "smollm2-135m", "--evening", "4h", "--context", 512)
    assert evening["seconds"] == 4 * 3600
    assert evening["runs"][0]["method"] == "full"


def test_a_page_has_plots_and_no_scripts(tmp_path):
    path = tmp_path / "pages" / "plan.html"
    done = easyllm("plan", "smollm2-135m", "--train", "--context", 512, "--html", path)
    assert done.returncode == 0, done.stderr
    page = path.read_text()
    assert page.count("<svg") == 3
    assert "KV cache of one sequence" in page
    assert "training, full" in page
    assert "<script" not in page


WRONG = {
    "a device": (("llama2-7b", "--gpus", "8xH101-80GB"), "--profile FILE"),
    "a number alone": (("llama2-7b", "--gpus", "8"), "8xH100-80GB"),
    "a price of nothing": (("llama2-7b", "--price", "2"), "name the devices with --gpus"),
    "degrees": (("llama2-7b", "--gpus", "8xA100-80GB", "--tensor", "3"), "does not divide 8 GPUs"),
    "heads": (("smollm2-135m", "--gpus", "8xA100-80GB", "--tensor", "8"), "use 1, 3, 9"),
    "tokens without devices": (("llama2-7b", "--tokens", "1T"), "add --gpus"),
    "a time without formulas": (("llama2-7b", "--step-seconds", "2"), "add --formulas"),
    "a price without a run": (
        ("llama2-7b", "--gpus", "8xT4-16GB", "--price", "2"),
        "say how long it is with --tokens",
    ),
    "a size without a unit": (("llama2-7b", "--fit", "24"), "write it as 24GB"),
    "a context of a number": (("7B", "--context", "4096"), "needs a model's shape"),
    "a rate of a number": (("7B", "--gpus", "8xT4-16GB", "--mfu", "0.4"), "with --tokens and"),
    "an option of DeepSpeed": (
        ("llama2-7b", "--ds-config", "ds.json", "--gpus", "8xT4-16GB"),
        "--gpus has no effect on --ds-config",
    ),
    "an evening to calibrate": (("--evening", "1h", "--calibrate"), "--calibrate has no effect"),
    "a size": (("llama2-7b", "--fit", "much"), "24GB"),
    "a duration": (("--evening", "late"), "4h, 90m"),
    "nothing": ((), "--evening 4h"),
    "an option of an evening": (("--evening", "1h", "--gpus", "4xT4-16GB"), "has no effect"),
    "an option of a model": (("7B", "--fit", "24GB"), "needs a model's shape"),
    "a shape": (("7B", "--shape", "layers=2"), "lacks hidden"),
    "a stage": (("llama2-7b", "--gpus", "8xA100-80GB", "--zero", "5"), "0, 1, 2 or 3"),
    "a model to calibrate": (("llama2-7b", "--calibrate"), "name a recipe"),
    "an option of devices for a recipe": (
        ("sft-lora", "--gpus", "8xT4-16GB"),
        "applies to a model",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_sentence(name):
    words, message = WRONG[name]
    done = easyllm("plan", *words)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr


# ---- easyllm dtype


def test_one_tenth_has_the_fixed_fields():
    found = answered("dtype", "0.1", "--as", "bf16,fp16")
    assert list(found) == ["bf16", "fp16"]
    bf16 = found["bf16"]
    assert (bf16["hex"], bf16["bits"]) == ("0x3DCD", "0011110111001101")
    assert bf16["value"] == 0.10009765625
    assert bf16["error"] == pytest.approx(9.765625e-5)
    assert bf16["truncated"] == {
        "hex": "0x3DCC",
        "value": 0.099609375,
        "error": pytest.approx(-0.000390625),
    }
    assert found["fp16"]["value"] == pytest.approx(0.0999755859, abs=1e-10)


def test_bits_negative_numbers_and_infinity_are_accepted():
    assert answered("dtype", "0x3DCD", "--from", "bf16", "--as", "fp32")["fp32"]["hex"] == (
        "0x3DCD0000"
    )
    assert answered("dtype", "-2.5", "--as", "int8")["int8"]["value"] == -2.0
    table = easyllm("dtype", "70000", "--as", "fp16")
    assert "overflow: larger than" in table.stdout
    assert easyllm("dtype", "inf", "--as", "fp16").returncode == 0
    beyond = answered("dtype", "1e400", "--as", "fp32,fp8e4m3")  # no fp64 is near it
    assert (beyond["fp32"]["status"], beyond["fp8e4m3"]["value"]) == ("overflow", 448.0)
    assert easyllm("dtype", "-1e400", "--as", "int8").returncode == 0


def test_casting_a_checkpoint_is_reported(tiny_folder):
    found = answered("dtype", tiny_folder, "--as", "fp32,bf16,fp8e4m3")
    assert found["fp32"]["changed"] == 0
    assert 0 < found["bf16"]["relative_error"] < 2**-8
    assert found["fp8e4m3"]["relative_error"] > 4 * found["bf16"]["relative_error"]
    assert easyllm("dtype", tiny_folder, "--as", "bf16").returncode == 0


DTYPE_WRONG = {
    "a format": (("0.1", "--as", "bf61"), "did you mean 'bf16'"),
    "bits without a format": (("0x3DCD",), "--from"),
    "too many bits": (("0x3DCDF", "--from", "bf16"), "more than the 16 bits"),
    "infinity as an integer": (("inf", "--as", "int8"), "cannot hold"),
    "an infinite scale": (
        ("2.7", "--as", "int8", "--absmax", "inf"),
        "give a finite number above 0",
    ),
    "a scale of zero": (("2.7", "--as", "int8", "--absmax", "0"), "give a finite number above 0"),
    "a model that is none": (("smolm2",), "did you mean 'smollm2'"),
    "a model as integers": (("smollm2", "--as", "int8"), "quantize"),
}


@pytest.mark.parametrize("name", DTYPE_WRONG)
def test_mistakes_are_one_sentence(name):
    words, message = DTYPE_WRONG[name]
    done = easyllm("dtype", *words)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
