"""The loss on a retention set is measured before and after training."""

import json

import pytest
import torch

from easyllm.core.errors import ConfigError, DataError, SourceError
from easyllm.models import load_model, load_tokenizer
from easyllm.models.adapted import load_adapted
from easyllm.pipeline.recipe import load_train_recipe
from easyllm.train import Callback, TrainConfig, dry_run, train
from easyllm.train.callbacks import retention_samples
from easyllm.train.metrics import read_metrics

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen jugs."]


class Killed(Exception):
    pass


class KillInStepThree(Callback):
    def after_backward(self, run, info):
        if info.step == 2:
            raise Killed


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    rows = [{"prompt": "a b c", "completion": "d e f " * 4} for _ in range(8)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))

    def build(**changes):
        return TrainConfig.model_validate(
            {
                "model": str(tiny_folder),
                "data": {"train": [str(tmp_path / "task.jsonl")], "max_seq_len": 64},
                "adapter": {"rank": 4},
                "precision": "fp32",
                "optimizer": {"learning_rate": 0.02},
                "batch_size": 2,
                "save_every": 2,
                "retention": [str(tmp_path / "kept.jsonl")],
            }
            | changes
        )

    return build


def loss_of(model, tokenizer):
    """The mean cross-entropy of all tokens but the first of each text."""
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor(tokenizer.encode(text))
        log_probs = model.logits(ids)[:-1].log_softmax(-1)
        total -= float(log_probs.gather(1, ids[1:, None]).sum())
        count += len(ids) - 1
    return total / count


def test_the_loss_before_and_after_is_that_of_the_base_and_of_the_result(
    recipe, tmp_path, tiny_folder
):
    result = train(recipe(), tmp_path / "run").figures
    tokenizer = load_tokenizer(tiny_folder)
    base = load_model(tiny_folder, dtype="float32")
    tuned = load_adapted(tmp_path / "run" / "adapter", dtype="float32")
    assert result["retention_loss_nats_before"] == pytest.approx(loss_of(base, tokenizer), abs=1e-4)
    assert result["retention_loss_nats"] == pytest.approx(loss_of(tuned, tokenizer), abs=1e-4)
    assert abs(result["retention_loss_nats"] - result["retention_loss_nats_before"]) > 0.01
    lines = [line for line in read_metrics(tmp_path / "run") if "retention/loss_nats" in line]
    assert [line["step"] for line in lines] == [0, 4]


def test_the_loss_before_training_survives_a_resume_and_changes_nothing_else(recipe, tmp_path):
    whole = train(recipe(), tmp_path / "whole").figures
    with pytest.raises(Killed):
        train(recipe(), tmp_path / "broken", callbacks=[KillInStepThree()])
    resumed = train(recipe(), tmp_path / "broken").figures
    for key in ("retention_loss_nats", "retention_loss_nats_before"):
        assert resumed[key] == whole[key]
    train(recipe(retention=()), tmp_path / "without")
    files = [tmp_path / run / "adapter/adapter_model.safetensors" for run in ("whole", "without")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_long_texts_are_measured_in_windows_and_conversations_with_their_template(
    recipe, tmp_path, tiny_folder
):
    tokenizer = load_tokenizer(tiny_folder)
    text = " ".join(TEXTS * 5)
    (tmp_path / "long.txt").write_text(text)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    files = [str(tmp_path / name) for name in ("long.txt", "chat.jsonl")]
    *windows, chat = retention_samples(recipe(retention=files), tokenizer)
    ids = tokenizer.encode(text)
    assert max(sample.num_tokens for sample in windows) == 64
    assert [label for sample in windows for label in sample.labels] == ids[1:]
    assert [token for sample in windows for token in sample.token_ids] == ids[:-1]
    assert chat.num_trained == chat.num_tokens == len(tokenizer.encode_chat(turns).token_ids) - 1


def test_an_unusable_retention_set_is_refused_before_the_first_step(recipe, tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        dry_run(recipe(retention=[str(tmp_path / "none.jsonl")]), None)
    (tmp_path / "labels.jsonl").write_text(
        '{"text": "a b", "label": 1}\n{"text": "c", "label": 0}\n'
    )
    data = {"kind": "labels", "train": [str(tmp_path / "labels.jsonl")], "max_seq_len": 32}
    objective = {"kind": "classifier", "num_labels": 2}
    with pytest.raises(ConfigError, match="has no head for tokens; remove retention"):
        dry_run(recipe(data=data, objective=objective), None)


def test_paths_are_relative_to_the_recipe(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "kept.jsonl").write_text('{"text": "a b"}\n')
    (folder / "mine.yaml").write_text("data: {train: [task.jsonl]}\nretention: [kept.jsonl]\n")
    monkeypatch.chdir(tmp_path)
    config = load_train_recipe(folder / "mine.yaml", [])
    assert config.retention == (str(folder / "kept.jsonl"),)


def test_a_mistake_in_the_set_is_told_before_the_training_data_is_prepared(
    recipe, tmp_path, monkeypatch
):
    def prepare(*_, **__):
        raise AssertionError("the training data was prepared")

    monkeypatch.setattr("easyllm.train.run.load_training_data", prepare)
    with pytest.raises(SourceError, match=r"gone\.txt' matches no file"):
        train(recipe(retention=[str(tmp_path / "gone.txt")]), tmp_path / "run")
