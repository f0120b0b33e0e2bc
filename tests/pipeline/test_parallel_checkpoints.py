"""Checkpoints of divided runs: other numbers of ranks, other layouts, a killed rank, HF files."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from easyllm.checkpoint.store import INDEX, TensorFolder
from easyllm.checkpoint.stream import stream_model_weights
from easyllm.cli.main import app
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.models import load_model
from easyllm.train.consolidate import consolidate
from stage_runs import losses, run_stages, stage

STEPS = 12
ADAPTER = {"kind": "lora", "rank": 3, "alpha": 6, "also_trained": ["norm"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder):
    """The folder of all runs, and how their stages ended."""
    folder = tmp_path_factory.mktemp("runs")
    texts = ["hello", "what is it", "0123456789 " * 3, "good morning " * 2, "dog", "fox " * 6]
    rows = [{"prompt": text[:3], "completion": text} for text in texts]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": str(tiny_folder),
        "data": {"train": [str(file)], "max_seq_len": 64},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
        "batch_size": 4,
        "micro_batch_tokens": 64,
        "max_steps": STEPS,
        "epochs": 50,
        "precision": "fp32",
        "save_every": 2,
        "keep_last": 2,
    }
    zero2, ddp, fsdp = {"layout": "zero2"}, {"layout": "ddp"}, {"layout": "fsdp"}
    stages = {
        "one": stage(values, folder / "one", 1),
        "four": stage(values, folder / "ranks", 4, zero2, stop=5),
        "two": stage(values, folder / "ranks", 2, zero2, stop=9),
        "last": stage(values, folder / "ranks", 1),
        "ddp": stage(values, folder / "layouts", 2, ddp, stop=5),
        "fsdp": stage(values, folder / "layouts", 2, fsdp, stop=9),
        "tensor": stage(values, folder / "layouts", 2, {"tensor": 2}),
        "whole": stage(values, folder / "whole", 2, zero2),
        "killed": stage(values, folder / "killed", 2, zero2, kill=7),
        "restarted": stage(values, folder / "killed", 2, zero2),
        "hung": stage(values, folder / "hung", 2, {"layout": "ddp", "timeout_s": 4}, hang=3),
        "lora": stage(values, folder / "lora", 2, zero2, more={"adapter": ADAPTER, "max_steps": 4}),
    }
    ends, errors = run_stages(folder, stages)
    return folder, ends, errors


def test_all_stages_end_as_planned(runs):
    _, ends, errors = runs
    for name, end in ends.items():
        if name in ("killed", "hung"):
            continue
        # 1: a rank that was still waiting for one which had killed itself already
        expected = {-9, 1} if name in ("four", "two", "ddp", "fsdp") else {0}
        assert set(end["codes"]) <= expected, (name, end, errors)


@pytest.mark.parametrize("name", ["ranks", "layouts"])
def test_a_run_resumes_with_other_ranks_and_layouts_to_the_same_losses(runs, name):
    """4, then 2, then 1 rank; DDP, then FSDP, then tensor parallel."""
    folder, _, _ = runs
    one = losses(folder / "one")
    assert len(one) == STEPS
    assert losses(folder / name) == pytest.approx(one, abs=1e-5)


def test_the_other_ranks_of_a_killed_one_end_by_themselves(runs):
    _, ends, errors = runs
    codes = ends["killed"]["codes"]
    assert codes[1] == -9
    assert codes[0] == 1
    assert ends["killed"]["seconds"] < ends["whole"]["seconds"] + 30
    assert "another rank has ended" in errors


def test_a_rank_that_hangs_is_named_after_the_timeout(runs):
    _, ends, errors = runs
    assert ends["hung"]["codes"][0] == 1
    assert "rank 1 did not join a collective within 4 s" in errors


def test_restarting_after_a_killed_rank_is_bit_identical(runs):
    folder, _, _ = runs
    assert losses(folder / "killed") == losses(folder / "whole")
    mine = load_file(folder / "killed" / "model" / "model.safetensors")
    theirs = load_file(folder / "whole" / "model" / "model.safetensors")
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("name", ["whole", "layouts", "one"])
def test_a_checkpoint_becomes_the_model_that_the_run_saved(runs, tmp_path, name):
    folder, _, _ = runs
    checkpoint = folder / name / "checkpoints" / f"step-{STEPS:06d}"
    done = CliRunner().invoke(app, ["convert", str(checkpoint), str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        written = (tmp_path / "out" / file).read_bytes()
        if file.endswith(".safetensors"):
            mine = load_file(tmp_path / "out" / file)
            theirs = load_file(folder / name / "model" / file)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], tensor) for key, tensor in theirs.items())
        else:
            assert written == (folder / name / "model" / file).read_bytes()
    assert load_model(tmp_path / "out").dtype == torch.float32


def test_a_checkpoint_of_the_middle_differs_and_takes_a_dtype(runs, tmp_path):
    folder, _, _ = runs
    earlier = sorted((folder / "whole" / "checkpoints").iterdir())[-2]
    model = load_model(consolidate(earlier, tmp_path / "out", dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    last = load_model(folder / "whole" / "model")
    gap = (model.embed_tokens.weight.float() - last.embed_tokens.weight).abs().max()
    assert 0 < gap < 0.1


def test_a_checkpoint_of_an_adapter_becomes_the_adapter_that_the_run_saved(runs, tmp_path):
    folder, _, _ = runs
    checkpoint = folder / "lora" / "checkpoints" / "step-000004"
    consolidate(checkpoint, tmp_path / "out")
    mine = load_file(tmp_path / "out" / "adapter_model.safetensors")
    theirs = load_file(folder / "lora" / "adapter" / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], tensor) for key, tensor in theirs.items())
    config = "adapter_config.json"
    assert (tmp_path / "out" / config).read_text() == (
        folder / "lora" / "adapter" / config
    ).read_text()
    with pytest.raises(ConfigError, match="--dtype"):
        consolidate(checkpoint, tmp_path / "other", dtype="bfloat16")


def test_what_cannot_be_consolidated_is_refused_and_leaves_nothing(runs, tmp_path):
    folder, _, _ = runs
    checkpoint = folder / "whole" / "checkpoints" / f"step-{STEPS:06d}"
    for words, part in (
        (("--kv-heads", "1"), "--kv-heads cannot be used on a checkpoint"),
        (("--to", "gptq"), "--to cannot be used on a checkpoint"),
    ):
        done = CliRunner().invoke(app, ["convert", str(checkpoint), str(tmp_path / "no"), *words])
        assert isinstance(done.exception, ConfigError)
        assert part in str(done.exception)
    done = CliRunner().invoke(app, ["convert", str(checkpoint), str(tmp_path / "no.gguf")])
    assert "convert it to a folder first" in str(done.exception)
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match="not in the folder of its run"):
        consolidate(moved, tmp_path / "no")
    part = tmp_path / "run" / "checkpoints" / "step-1"
    part.mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text((folder / "whole" / "recipe.yaml").read_text())
    for name in ("state.json", "state-00000-of-00002.safetensors"):
        (part / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(CheckpointError, match="does not exist"):
        consolidate(part, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert not (tmp_path / "no.gguf").exists()


def test_streamed_weights_are_read_one_at_a_time_into_shards(tmp_path):
    values = {f"w{n}": torch.randn(10, n + 1) for n in range(5)}
    alive = []

    def read(name):
        alive.append(name)
        return values[name].clone()

    forms = {name: tensor.to("meta") for name, tensor in values.items()}
    stream_model_weights(tmp_path, forms, read, max_shard_bytes=200)
    assert (tmp_path / INDEX).is_file()
    assert sorted(alive) == sorted(values)
    with TensorFolder(tmp_path) as tensors:
        for name, tensor in values.items():
            assert torch.equal(tensors.load(name), tensor)
