"""A classifier tuned with LoRA: its head is trained, saved, loaded, merged and read by peft."""

import json

import pytest
import torch

from easyllm.core.config import validate
from easyllm.core.errors import ConfigError
from easyllm.engine import LLM
from easyllm.models import load_model, save_model, to_classifier
from easyllm.pipeline.merge import merge_adapter
from easyllm.train import TrainConfig, train
from easyllm.train.metrics import read_metrics
from easyllm_command import easyllm
from tiny_models import CORPUS

IDS = torch.arange(5, 45)


def tuned(tiny_folder, tmp_path, labels, num_labels, **changes):
    rows = [
        {"text": f"{line} {i}", "label": labels(i)}
        for i in range(4)
        for line in dict.fromkeys(CORPUS)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "model": str(tiny_folder),
        "data": {"kind": "labels", "train": [str(data)], "eval": [str(data)], "max_seq_len": 128},
        "objective": {"kind": "classifier", "num_labels": num_labels},
        "adapter": {"kind": "lora", "rank": 4},
        "optimizer": {"learning_rate": 1e-2},
        "batch_size": 16,
        "epochs": 25,
        "precision": "fp32",
    }
    config = validate(TrainConfig, values | changes, source="test")
    figures = train(config, tmp_path / "run").figures
    return tmp_path / "run" / "adapter", figures


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_head_is_saved_with_the_adapter_and_read_by_peft(tiny_folder, tmp_path, precision):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    adapter, figures = tuned(tiny_folder, tmp_path, lambda i: i % 3, 3, precision=precision)
    assert figures["eval_accuracy"] > 0.9
    described = json.loads((adapter / "adapter_config.json").read_text())
    assert described["task_type"] == "SEQ_CLS"
    assert described["modules_to_save"] == ["score"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].dtype == torch.float32  # not the compute copy

    model = load_model(tiny_folder, dtype="float32", adapter=adapter)
    scores = model.logits(IDS)
    assert scores.shape == (len(IDS), 3)
    reference = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=3)
    reference.config.pad_token_id = 0
    with torch.no_grad():
        expected = PeftModel.from_pretrained(reference, adapter)(IDS[None]).logits[0]
    torch.testing.assert_close(scores[-1], expected, atol=2e-5, rtol=1e-4)

    merge_adapter(str(tiny_folder), adapter, tmp_path / "merged")
    torch.testing.assert_close(
        load_model(tmp_path / "merged").logits(IDS), scores, atol=1e-4, rtol=1e-4
    )
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        again = merged(IDS[None]).logits[0]
    torch.testing.assert_close(again, scores[-1], atol=1e-4, rtol=1e-4)


def test_regression_targets_are_learned_as_numbers(tiny_folder, tmp_path):
    adapter, figures = tuned(tiny_folder, tmp_path, lambda i: 0.25 * i - 0.4, 1)
    first = read_metrics(tmp_path / "run")[0]["train/loss_nats"]
    assert figures["eval_loss_nats"] < 0.1 * first
    assert load_model(tiny_folder, dtype="float32", adapter=adapter).logits(IDS).shape == (40, 1)


def test_a_classifier_is_refused_for_text_generation(tiny_folder, tmp_path):
    folder = save_model(to_classifier(load_model(tiny_folder), 2), tmp_path / "labels")
    with pytest.raises(ConfigError, match="generates no tokens"):  # thus `serve` will not start
        LLM(folder)
    for words in (("chat", folder), ("generate", folder, "Hi")):
        done = easyllm(*words)
        assert done.returncode == 2, words
        assert "generates no tokens" in done.stderr
