"""Bands of recipes: making, comparing, and the causes that are named for planted faults."""

import json
import math

import pytest

from easyllm.core.errors import DataError
from easyllm.reporting import expected
from easyllm.reporting.callbacks import reporting_callbacks
from easyllm.reporting.expected import Watch, load_band, make_band
from easyllm.reporting.expected_callback import ExpectedBand, verdict
from easyllm.train import TrainConfig

CONFIG = {
    "model": "smollm2",
    "data": {"train": ["a.jsonl"], "train_on": "answers"},
    "optimizer": {"learning_rate": 1e-3},
    "output": "runs/x",
}


def run(start=3.0, end=1.0, norm=1.0, speed=0.5, memory=2e9, steps=40):
    """Returns the logged steps of a run whose loss falls from `start` to `end`."""
    return [
        {
            "step": i + 1,
            "train/loss_nats": end + (start - end) * math.exp(-4 * i / steps),
            "train/grad_norm": norm,
            "speed/mfu": speed,
            "memory/peak_bytes": memory,
        }
        for i in range(steps)
    ]


BAND = make_band("sft", CONFIG, [run(3.0), run(3.05), run(2.95)])


def said(lines, config=CONFIG, skipped=0):
    watch = Watch(BAND)
    for line in lines:
        watch.add(line)
    return verdict(watch, config, skipped=skipped)


def test_a_run_like_the_others_is_as_expected():
    (line,) = said(run(3.02))
    assert line.startswith("as expected of sft: loss 1.0")
    assert "usual" in line
    # seed, folder and intervals are no changes; speed and memory may be better than usual
    better = said(run(3.02, speed=2.0, memory=1e9), {**CONFIG, "output": "elsewhere", "seed": 7})
    assert better[0].startswith("as expected")


def test_a_band_covers_its_runs_at_each_step_and_is_kept_by_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(expected, "recipes_folder", lambda: tmp_path)
    path = expected.band_file("sft")
    path.parent.mkdir()
    path.write_text(json.dumps(BAND.as_dict()))
    assert load_band("sft").as_dict() == BAND.as_dict()
    assert load_band("other") is None
    assert BAND.steps == [2, 4, 8, 16, 24, 32, 40]
    for upto in range(1, 41):
        assert not said(run(3.0)[:upto]) or said(run(3.0)[:upto])[0].startswith("as expected")
    path.write_text(path.read_text().replace('"runs": 3', '"runs": "x"'))
    with pytest.raises(DataError, match=r"expected values .* is damaged"):
        load_band("sft")


@pytest.mark.parametrize(
    ("lines", "change", "skipped", "cause"),
    [
        (run(3.0, 5.0, norm=9.0), {"optimizer": {"learning_rate": 0.1}}, 0, "100 times the recipe"),
        (run(3.0, 2.95), {"optimizer": {"learning_rate": 1e-5}}, 0, "100 times smaller"),
        (run(3.0, 2.99, norm=0.01), {}, 0, "frozen or masked"),
        (run(3.0, 2.99), {}, 0, "has not fallen"),
        (run(9.0, 6.0), {}, 0, "chat template, the tokenizer and the rows"),
        (run(3.0, 1.8), {}, 0, "answers do not follow from their prompts"),
        (run(3.0, 0.1), {}, 0, "answers are in the prompts"),
        (run(3.0, 0.4), {"data": {**CONFIG["data"], "train_on": "all"}}, 0, "data.train_on"),
        ([*run(3.0)[:30], *run(9.0)[:10]], {}, 0, "was usual before and rose"),
        ([*run(3.0)[:39], {**run(3.0)[39], "train/loss_nats": math.nan}], {}, 1, "not finite"),
        (run(3.0, speed=0.05), {}, 0, "slow for this machine"),
        (run(3.0, memory=9e9), {}, 0, "more memory than usual"),
        (run(3.0, 2.0), {"batch_size": 4}, 0, "batch_size was changed"),
    ],
)
def test_a_planted_fault_is_named_first(lines, change, skipped, cause):
    lines = [{**line, "step": i + 1} for i, line in enumerate(lines)]
    first, *causes = said(lines, {**CONFIG, **change}, skipped)
    assert first.startswith("not as expected of sft")
    assert any(cause in each for each in causes[: 1 if "batch" not in cause else 3])


def test_other_data_is_compared_in_speed_and_memory_only():
    mine = {**CONFIG, "data": {**CONFIG["data"], "train": ["mine.jsonl"]}}
    (line,) = said(run(9.0, 8.0), mine)
    assert line.startswith("as expected")
    assert "loss" not in line
    assert "slow" in " ".join(said(run(9.0, 8.0, speed=0.01), mine))


def test_only_a_shipped_recipe_with_a_band_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(expected, "recipes_folder", lambda: tmp_path)
    expected.band_file("sft").parent.mkdir()
    expected.band_file("sft").write_text(json.dumps(BAND.as_dict()))
    config = TrainConfig.model_validate({"model": "smollm2", "data": {"train": ["a.jsonl"]}})
    kinds = [type(each) for each in reporting_callbacks(config, "sft")]
    assert ExpectedBand in kinds
    for name in (None, "mine"):
        assert ExpectedBand not in [type(each) for each in reporting_callbacks(config, name)]


def test_a_stage_is_compared_wherever_its_recipe_writes(tmp_path, monkeypatch):
    """The models and shards of stages before it are in the output folder, which may be another."""
    monkeypatch.setattr(expected, "recipes_folder", lambda: tmp_path)

    def config(root):
        return {
            **CONFIG,
            "model": f"{root}/pretrain/model",
            "data": {"train": [f"{tmp_path}/data/a.jsonl"], "train_on": "answers"},
        }

    made = expected.portable(config(tmp_path / "runs"), tmp_path / "runs")
    band = make_band("whole/sft", made, [run(), run(3.1)])
    path = expected.band_file("whole/sft")
    assert path == tmp_path / "expected" / "whole.sft.json"
    path.parent.mkdir()
    path.write_text(json.dumps(band.as_dict()))
    assert str(tmp_path) not in path.read_text()

    here = tmp_path / "elsewhere"
    assert not expected.changes(config(here), load_band("whole/sft"), here)
    (change,) = expected.changes(config("other"), load_band("whole/sft"), here)
    assert change[0] == "model"
    loaded = TrainConfig.model_validate({"model": "smollm2", "data": {"train": ["a.jsonl"]}})
    kinds = [type(each) for each in reporting_callbacks(loaded, "whole/sft", root=here)]
    assert ExpectedBand in kinds


def test_what_is_never_negative_is_not_expected_to_be():
    band = make_band("sft", CONFIG, [run(3.0, 0.01), run(3.0, 0.5)])
    assert band.by_step["train/loss_nats"][-1].low == 0
    assert make_band("rl", CONFIG, [run(3.0, -0.4)]).by_step["train/loss_nats"][-1].low < 0
