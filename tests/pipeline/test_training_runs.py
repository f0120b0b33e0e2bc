"""Complete runs of small models: what they write, keep, report and refuse."""

import json
import math
import subprocess

import pytest
import torch
from typer.testing import CliRunner

from easyllm.cli.main import app
from easyllm.core.config import validate
from easyllm.core.errors import ConfigError, EasyllmError, OutputError
from easyllm.core.yaml_text import dump_yaml
from easyllm.corpus.shards import TokenShards, write_shards
from easyllm.corpus.token_bytes import token_bytes
from easyllm.models import load_model
from easyllm.pipeline.recipe import TrainStage
from easyllm.pipeline.stages import run_stage
from easyllm.reporting import reporting_callbacks
from easyllm.train import Callback, TrainConfig, train
from easyllm.train import loop as loop_module
from easyllm.train import run as run_module
from easyllm.train.loop import Diverged
from easyllm.train.metrics import MetricsLog, read_metrics
from easyllm.train.preflight import memory_advice
from easyllm.train.state import BEST, FOLDER, checkpoints
from tiny_models import CORPUS, tiny_config

ROWS = [
    {"prompt": f"{line[:12]} {i}", "completion": line[12 : 30 + i]}
    for i in range(4)
    for line in dict.fromkeys(CORPUS)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_tokenizer):
    """Training and evaluation rows, and token shards of the corpus."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rows in (("train", ROWS[:12]), ("eval", ROWS[12:])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    documents = [tiny_tokenizer.encode(line) for line in CORPUS * 2]
    write_shards(folder / "shards", documents, tiny_tokenizer)
    write_shards(folder / "shards" / "validation", documents[:3], tiny_tokenizer)
    return folder


def config_of(files, tiny_folder, **changes):
    values = {
        "model": str(tiny_folder),
        "data": {
            "train": [str(files / "train.jsonl")],
            "eval": [str(files / "eval.jsonl")],
            "max_seq_len": 128,
        },
        "optimizer": {"kind": "adamw", "learning_rate": 3e-3},
        "batch_size": 4,
        "epochs": 4,
        "save_every": 0,
        "precision": "fp32",
    }
    return TrainConfig.model_validate(values | changes)


def weights(output):
    return (output / "model" / "model.safetensors").read_bytes()


def losses(output, name="train/loss_nats"):
    return [line[name] for line in read_metrics(output) if name in line]


def test_a_run_writes_figures_a_report_and_a_loadable_model(files, tiny_folder, tmp_path):
    config = config_of(files, tiny_folder, eval_every=4, samples={"prompts": ["The quick"]})
    result = train(config, tmp_path / "run", callbacks=reporting_callbacks(config))
    assert losses(result.output)[-1] < losses(result.output)[0]
    assert result.figures["eval_loss_nats"] == losses(result.output, "eval/loss_nats")[-1]
    samples = [line["samples"] for line in read_metrics(result.output) if "samples" in line]
    assert len(samples) == 3
    assert samples[0][0]["prompt"] == "The quick"
    assert {"speed/mfu", "memory/peak_bytes"} <= read_metrics(result.output)[0].keys()
    page = (result.output / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    load_model(result.output / "model")


def test_a_run_without_reporting_callbacks_writes_metrics_and_results_only(
    files, tiny_folder, tmp_path
):
    result = train(config_of(files, tiny_folder, max_steps=2), tmp_path / "run")
    assert sorted(path.name for path in result.output.iterdir()) == [
        *("manifest.json", "metrics.jsonl", "model", "recipe.yaml")
    ]


def test_tensorboard_without_its_callback_is_refused(files, tiny_folder, tmp_path):
    config = config_of(files, tiny_folder, tensorboard=True, max_steps=2, eval_every=1)
    with pytest.raises(ConfigError, match="tensorboard=true needs a callback"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(config, tmp_path / "run", callbacks=reporting_callbacks(config))
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("way", ["command", "stage"])
def test_commands_write_the_page_and_the_event_files(files, tiny_folder, tmp_path, way):
    config = config_of(files, tiny_folder, tensorboard=True, max_steps=2)
    folder = tmp_path / "run"
    if way == "stage":
        stage = TrainStage.model_validate(config.model_dump() | {"kind": "train"})
        run_stage(stage, folder, "mine")
    else:
        (tmp_path / "recipe.yaml").write_text(dump_yaml(config), encoding="utf-8")
        words = ["train", str(tmp_path / "recipe.yaml"), f"output={folder}"]
        assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert 'data-state="finished"' in (folder / "report.html").read_text(encoding="utf-8")
    (events,) = (folder / "tensorboard").iterdir()
    assert b"train/loss_nats" in events.read_bytes()
    assert b"eval/loss_nats" in events.read_bytes()


class Recorder(Callback):
    """Records the hooks that are called; stops the run at a step, or fails in it."""

    def __init__(self, *, stop_at=None, fail_at=None):
        self.calls, self.stop_at, self.fail_at = [], stop_at, fail_at

    def on_start(self, run):
        self.calls.append(("start", run.progress.step))

    def after_backward(self, run, info):
        self.calls.append(("backward", info.step))

    def after_step(self, run, report):
        self.calls.append(("step", report.step))
        if report.step == self.stop_at:
            run.progress.stopped = "it has learned enough"
        if report.step == self.fail_at:
            raise KeyError("failed")

    def on_evaluate(self, run, figures):
        self.calls.append(("evaluate", run.progress.step))

    def on_event(self, run, kind, detail):
        self.calls.append((kind, run.progress.step))

    def on_end(self, run, results):
        self.calls.append(("end", run.progress.step))
        results["recorded"] = len(self.calls)

    def close(self, run):
        self.calls.append(("close", run.progress.step))


def test_hooks_are_called_in_their_documented_order(files, tiny_folder, tmp_path):
    seen = Recorder()
    config = config_of(files, tiny_folder, eval_every=1, max_steps=2)
    result = train(config, tmp_path / "run", callbacks=[seen])
    assert seen.calls == [
        ("start", 0),
        *[("backward", 0), ("step", 1), ("evaluate", 1)],
        *[("backward", 1), ("step", 2), ("end", 2), ("evaluate", 2)],
        ("close", 2),
    ]
    assert result.figures["recorded"] == 7


def test_a_callback_stops_a_run_for_good(files, tiny_folder, tmp_path):
    config = config_of(files, tiny_folder, save_every=100)
    whole = train(config, tmp_path / "run", callbacks=[Recorder(stop_at=3)])
    assert whole.figures["steps"] == 3
    assert (whole.output / "model").is_dir()
    (event,) = [line for line in read_metrics(whole.output) if "event" in line]
    assert event == {"step": 3, "event": "stopped", "detail": "it has learned enough"}
    (whole.output / "manifest.json").unlink()
    again = train(config, tmp_path / "run")  # the checkpoint contains the reason
    assert again.figures["steps"] == 3


def test_callbacks_are_closed_after_an_error(files, tiny_folder, tmp_path):
    seen = Recorder(fail_at=2)
    config = config_of(files, tiny_folder, save_every=1)
    reports = reporting_callbacks(config)
    with pytest.raises(KeyError, match="failed"):
        train(config, tmp_path / "run", callbacks=[*reports, seen])
    assert seen.calls[-1] == ("close", 2)
    assert 'data-state="running"' in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_keep_best_selects_the_weights_with_the_lowest_evaluation_loss(
    files, tiny_folder, tmp_path
):
    changes = {"optimizer": {"learning_rate": 0.03}, "eval_every": 2, "keep_best": True}
    changes["epochs"] = 30
    result = train(config_of(files, tiny_folder, **changes), tmp_path / "run")
    seen = losses(result.output, "eval/loss_nats")
    best = min(seen)
    assert best < seen[-1]  # the run continued past its best
    assert result.figures["best_step"] == 2 * (1 + seen.index(best))
    assert result.figures["eval_loss_nats"] == pytest.approx(best, rel=1e-6)
    assert (result.output / FOLDER / BEST).is_dir()


def test_early_stopping_ends_a_run_that_no_longer_improves(files, tiny_folder, tmp_path):
    changes = {
        "optimizer": {"learning_rate": 0.05},
        "epochs": 50,
        "eval_every": 1,
        "early_stopping": {"patience": 3},
    }
    result = train(config_of(files, tiny_folder, **changes), tmp_path / "run")
    assert result.figures["steps"] < 150
    (event,) = [line for line in read_metrics(result.output) if line.get("event") == "stopped"]
    assert "has not fallen for 3 evaluations" in event["detail"]


def test_a_run_stopped_early_and_killed_does_not_train_further(
    files, tiny_folder, tmp_path, monkeypatch
):
    changes = {
        "optimizer": {"learning_rate": 0.05},
        "epochs": 50,
        "eval_every": 1,
        "early_stopping": {"patience": 3},
        "save_every": 100,
    }
    whole = train(config_of(files, tiny_folder, **changes), tmp_path / "whole")
    with monkeypatch.context() as broken:
        broken.setattr(
            run_module, "_save_result", lambda *a: (_ for _ in ()).throw(KeyError("gone"))
        )
        with pytest.raises(KeyError, match="gone"):
            train(config_of(files, tiny_folder, **changes), tmp_path / "run")
    again = train(config_of(files, tiny_folder, **changes), tmp_path / "run")
    assert again.figures["steps"] == whole.figures["steps"]
    assert again.figures["eval_loss_nats"] == whole.figures["eval_loss_nats"]
    assert weights(again.output) == weights(whole.output)


def test_non_finite_weights_are_not_saved(files, tiny_folder, tmp_path, monkeypatch):
    real = loop_module.apply_gradients
    calls = []

    def apply_gradients(optimizer, *rest):
        norm = real(optimizer, *rest)
        calls.append(norm)
        if len(calls) == 6:
            next(iter(optimizer.masters.values())).data[0] = math.nan
        return norm

    monkeypatch.setattr(loop_module, "apply_gradients", apply_gradients)
    with pytest.raises(Diverged, match="NaN or infinite"):
        train(config_of(files, tiny_folder, save_every=2), tmp_path / "run")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-000004"]
    calls.clear()
    with pytest.raises(Diverged, match="a weight is NaN or infinite after step 6"):
        train(config_of(files, tiny_folder, save_every=2, max_steps=6), tmp_path / "short")
    assert not (tmp_path / "short" / "model").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_best": True}, "keep_best needs evaluations"),
        ({"early_stopping": {"patience": 1}}, "early_stopping needs evaluations"),
        ({"samples": {"prompts": [""]}}, r"samples.prompts\[0\] has 0 tokens"),
        ({"samples": {"prompts": ["word " * 600]}}, r"expected 1 to"),
    ],
)
def test_invalid_combinations_are_refused_before_training(
    files, tiny_folder, tmp_path, changes, message
):
    data = {"train": [str(files / "train.jsonl")], "max_seq_len": 128}
    with pytest.raises(ConfigError, match=message):
        train(config_of(files, tiny_folder, data=data, eval_every=2, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_empty_evaluations_are_warned_about(files, tiny_folder, tmp_path, capsys):
    data = {"train": [str(files / "train.jsonl")], "max_seq_len": 128}
    train(config_of(files, tiny_folder, data=data, eval_every=2, max_steps=1), tmp_path / "run")
    assert (
        "eval_every=2 has no effect without evaluation data; set data.eval"
        in capsys.readouterr().err
    )


def test_a_full_disk_is_reported_in_one_sentence(tmp_path):
    log = MetricsLog(tmp_path, after_step=0)
    log.close()
    log._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(OutputError, match=r"metrics\.jsonl"):
        log.write(step=1)
    log.close()


def test_only_the_newest_checkpoints_are_kept(files, tiny_folder, tmp_path):
    train(config_of(files, tiny_folder, save_every=2, keep_last=2), tmp_path / "run")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-000010", "step-000012"]


def test_the_same_seed_gives_the_same_run_and_another_a_different_one(files, tiny_folder, tmp_path):
    runs = [
        train(config_of(files, tiny_folder, seed=seed, dropout=0.1), tmp_path / str(i)).output
        for i, seed in enumerate((1, 1, 2))
    ]
    first, again, other = map(losses, runs)
    assert first == again
    assert first != other


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_is_bitwise_exact(files, tiny_folder, tmp_path, mode):
    plain = train(config_of(files, tiny_folder, dropout=0.1), tmp_path / "plain")
    again = train(
        config_of(files, tiny_folder, dropout=0.1, checkpoint_activations=mode), tmp_path / mode
    )
    assert losses(plain.output) == losses(again.output)


@pytest.mark.parametrize("precision", ["bf16", "bf16_autocast", "fp16"])
def test_low_precision_stays_close_to_fp32(files, tiny_folder, tmp_path, precision):
    wide = train(config_of(files, tiny_folder), tmp_path / "fp32")
    narrow = train(config_of(files, tiny_folder, precision=precision), tmp_path / precision)
    assert losses(narrow.output)[0] == pytest.approx(losses(wide.output)[0], rel=0.02)
    if narrow.figures["skipped_steps"]:  # the loss scale of fp16 is found by skipping steps
        assert losses(narrow.output)[-1] < 0.7 * losses(narrow.output)[0]
    else:
        assert losses(narrow.output)[-1] == pytest.approx(losses(wide.output)[-1], rel=0.1)
    assert load_model(narrow.output / "model").embed_tokens.weight.dtype == torch.float32


def test_pretraining_reports_bits_per_byte(files, tiny_folder, tiny_tokenizer, tmp_path):
    changes = {
        "model": {
            "tokenizer": str(tiny_folder),
            "config": tiny_config(num_hidden_layers=2),
            "max_seq_len": 64,
        },
        "data": {"kind": "corpus", "shards": str(files / "shards"), "max_seq_len": 32},
        "epochs": 3,
        "eval_every": 5,
    }
    result = train(config_of(files, tiny_folder, **changes), tmp_path / "run")
    bits = losses(result.output, "eval/bits_per_byte")
    assert bits[-1] < bits[0]
    nats = losses(result.output, "eval/loss_nats")
    shards = TokenShards(files / "shards" / "validation", tokenizer=tiny_tokenizer)
    labels = [shards.document(i)[1:] for i in range(shards.manifest.documents)]
    num_bytes = sum(int(token_bytes(tiny_tokenizer)[ids].sum()) for ids in labels)
    num_labels = sum(map(len, labels))
    assert bits[-1] == pytest.approx(nats[-1] * num_labels / math.log(2) / num_bytes, rel=1e-6)


@pytest.mark.filterwarnings("ignore")  # PyTorch's own warnings during compilation
def test_a_compiled_model_learns_the_same_and_reports_its_compile_time(
    files, tiny_folder, tmp_path, capsys
):
    plain = train(config_of(files, tiny_folder), tmp_path / "plain")
    made = train(config_of(files, tiny_folder, compile=True), tmp_path / "compiled")
    assert losses(made.output) == pytest.approx(losses(plain.output), rel=1e-4)
    (event,) = [line for line in read_metrics(made.output) if line.get("event") == "compiled"]
    assert "s longer than" in event["detail"]


def test_evaluating_on_training_rows_is_warned_about(files, tiny_folder, tmp_path, capsys):
    data = {"train": [str(files / "train.jsonl")], "eval": [str(files / "train.jsonl")]}
    data |= {"max_seq_len": 128}
    train(config_of(files, tiny_folder, data=data, max_steps=1), tmp_path / "run")
    said = capsys.readouterr().err
    assert "12 of 12 evaluation samples are also training samples" in " ".join(said.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"optimizer": {"learning_rate": -1}}, "learning_rate=-1"),
        ({"schedule": {"kind": "cosine", "warmup_ratio": 2}}, "warmup_ratio=2"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "betas"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"keep_best": True}, "keep_best needs evaluations"),
        ({"batch_tokens": 100}, "set one of batch_size and batch_tokens"),
        ({"optimizer": {"kind": "adamm"}}, "did you mean 'adamw'"),
        ({"optimizer": {"learning_rate": math.inf}}, "learning_rate=inf"),
        ({"epochs": math.inf, "max_steps": 3}, "epochs=inf"),
        (
            {
                "objective": {"kind": "classifier"},
                "data": {"kind": "labels", "train": ["-"]},
                "samples": {"prompts": ["a"]},
            },
            "a classifier generates no samples",
        ),
    ],
)
def test_values_out_of_range_are_refused(files, tiny_folder, tmp_path, changes, message):
    values = {"model": str(tiny_folder), "data": {"train": ["-"]}} | changes
    with pytest.raises(ConfigError) as raised:
        validate(TrainConfig, values, source="recipe.yaml")
    assert message in str(raised.value)


def test_rows_without_trained_labels_stop_before_the_first_step(files, tiny_folder, tmp_path):
    long = tmp_path / "long.jsonl"
    row = {"prompt": "word " * 200, "completion": "yes"}
    long.write_text(json.dumps(row) + "\n", encoding="utf-8")
    data = {"train": [str(long)], "max_seq_len": 64}
    with pytest.raises(EasyllmError) as raised:
        train(config_of(files, tiny_folder, data=data), tmp_path / "run")
    assert "no" in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_repeated(files, tiny_folder, tmp_path):
    config = config_of(files, tiny_folder, max_steps=1)
    train(config, tmp_path / "run")
    with pytest.raises(OutputError, match="finished"):
        train(config, tmp_path / "run")


def test_the_out_of_memory_error_says_what_to_lower(files, tiny_folder):
    config = config_of(files, tiny_folder)
    with pytest.raises(ConfigError, match="lower micro_batch_tokens=2048"), memory_advice(config):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(RuntimeError, match="other"), memory_advice(config):
        raise RuntimeError("other")


def test_the_report_opens_in_a_browser(files, tiny_folder, tmp_path):
    from shutil import which

    chromium = which("chromium") or which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    config = config_of(files, tiny_folder, eval_every=4)
    result = train(config, tmp_path / "run", callbacks=reporting_callbacks(config))
    picture = tmp_path / "report.png"
    subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"),
            *(
                f"--screenshot={picture}",
                "--window-size=1000,1400",
                f"file://{result.output}/report.html",
            ),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert picture.stat().st_size > 20_000
