"""Adapters trained on a quantized base (QLoRA): runs, their results, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from easyllm.core.errors import ConfigError, EasyllmError
from easyllm.models import load_model
from easyllm.reporting import reporting_callbacks
from easyllm.train import TrainConfig, train
from easyllm.train import run as run_module
from easyllm.train.metrics import read_metrics
from easyllm.train.run import dry_run
from tiny_models import CORPUS

LORA = {"kind": "lora", "rank": 4}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    found = [{"prompt": line[:12], "completion": line[12:40]} for line in dict.fromkeys(CORPUS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


@pytest.fixture
def config_of(rows, tiny_folder):
    def make(**changes):
        values = {
            "model": str(tiny_folder),
            "data": {"train": [str(rows)], "eval": [str(rows)], "max_seq_len": 128},
            "adapter": LORA,
            "quantize": "nf4",
            "optimizer": {"kind": "adamw", "learning_rate": 1e-2},
            "precision": "fp32",
            "batch_size": 4,
            "epochs": 6,
            "save_every": 0,
        }
        return TrainConfig.model_validate(values | changes)

    return make


def losses(output, name="train/loss_nats"):
    return [line[name] for line in read_metrics(output) if name in line]


def test_a_run_learns_evaluates_writes_samples_and_a_report(config_of, tmp_path):
    config = config_of(eval_every=3, samples={"prompts": ["The quick"]})
    result = train(config, tmp_path / "run", callbacks=reporting_callbacks(config))
    assert losses(result.output)[-1] < losses(result.output)[0]
    assert result.figures["eval_loss_nats"] == losses(result.output, "eval/loss_nats")[-1]
    assert any("samples" in line for line in read_metrics(result.output))
    assert (result.output / "report.html").is_file()


def test_the_result_is_a_plain_adapter_that_loads_on_the_quantized_base(
    config_of, tiny_folder, tmp_path
):
    ids, logits = torch.tensor([5, 9, 30, 17, 2]), {}
    for name, quantize in (("full", None), ("packed", "nf4")):
        train(config_of(quantize=quantize), tmp_path / name)
        folder = tmp_path / name / "adapter"
        model = load_model(tiny_folder, dtype="float32", quantize=quantize, adapter=folder)
        assert model.packed_formats() == ({quantize} if quantize else set())
        logits[name] = model.logits(ids)
    files = [tmp_path / name / "adapter" for name in logits]
    first, second = (load_file(file / "adapter_model.safetensors") for file in files)
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in second.items()}
    first, second = (json.loads((file / "adapter_config.json").read_text()) for file in files)
    assert first == second
    assert not torch.equal(logits["full"], logits["packed"])
    first, second = (losses(tmp_path / name)[0] for name in logits)
    assert first != second


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "bf16_autocast"},
        {"checkpoint_activations": "full"},
        {"adapter": LORA | {"also_trained": ["norm", "embed_tokens"]}},
        {"adapter": LORA | {"also_trained": ["norm"]}, "precision": "bf16"},
        {"quantize": "fp4-single"},
        {"quantize": "int4"},
        {"optimizer": {"kind": "adamw", "learning_rate": 1e-2, "paged": True}},
    ],
    ids=str,
)
def test_other_settings_work_on_a_quantized_base(config_of, tmp_path, changes):
    config = config_of(**changes)
    dry_run(config, tmp_path / "run")
    result = train(config, tmp_path / "run")
    assert losses(result.output)[-1] < losses(result.output)[0]


def test_a_paged_run_has_the_weights_of_a_plain_one(config_of, tmp_path):
    made = []
    for paged in (False, True):
        optimizer = {"kind": "adamw", "learning_rate": 1e-2, "paged": paged}
        config = config_of(adapter=None, quantize=None, optimizer=optimizer, save_every=2)
        train(config, tmp_path / str(paged))
        made.append((tmp_path / str(paged) / "model" / "model.safetensors").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": None}, "set adapter.kind=lora"),
        ({"quantize": "nf-4"}, "did you mean 'nf4'"),
        ({"model": {"tokenizer": "t", "depth": 2}}, "needs a pretrained model"),
    ],
)
def test_recipes_that_cannot_be_are_refused(config_of, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


@pytest.mark.parametrize("run", [train, dry_run])
def test_a_quantized_linear_cannot_be_trained_whole(config_of, tmp_path, run):
    config = config_of(adapter=LORA | {"also_trained": ["layers.0.mixer.q_proj"]})
    with pytest.raises(ConfigError, match="is quantized"):
        run(config, tmp_path / "run")


@pytest.mark.parametrize("run", [train, dry_run])
def test_a_resumed_run_keeps_its_format(config_of, tmp_path, run):
    train(config_of(save_every=1), tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(EasyllmError, match="quantize"):
        run(config_of(quantize="fp4", save_every=1), tmp_path / "run")


def test_the_plan_knows_the_packed_weights(config_of, tmp_path):
    full, packed = (dry_run(config_of(quantize=q), None).memory.weights for q in (None, "nf4"))
    assert packed < full


@pytest.mark.parametrize("run", [train, dry_run])
def test_a_paged_state_is_refused_on_a_gpu(config_of, tmp_path, monkeypatch, run):
    monkeypatch.setattr(run_module, "pick_device", lambda _: torch.device("cuda"))
    config = config_of(optimizer={"kind": "adamw", "paged": True})
    with pytest.raises(ConfigError, match=r"optimizer\.state=int8"):
        run(config, tmp_path / "run")
