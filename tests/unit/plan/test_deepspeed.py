"""Bytes and messages of a DeepSpeed configuration: the table of the ZeRO paper."""

import json

import pytest
from typer.testing import CliRunner

from easyllm.cli.main import app
from easyllm.parallel.deepspeed_config import RecipeValues, read_deepspeed
from easyllm.plan.deepspeed import plan_ranks


def plan(stage, *, world, accumulation=1, bucket=5e8):
    values = {
        "bf16": {"enabled": True},
        "gradient_accumulation_steps": accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket},
    }
    settings = read_deepspeed(values, RecipeValues(world=world))
    return plan_ranks(settings, 7_500_000_000, layers=32, world=world)


@pytest.mark.parametrize(
    ("stage", "world", "gigabytes"),
    [(0, 64, 120), (1, 64, 31.4), (2, 64, 16.6), (3, 64, 1.9), (1, 4, 52.5), (2, 4, 41.25)],
)
def test_bytes_are_those_of_the_paper(stage, world, gigabytes):
    """arXiv 1910.02054, table 1: 7.5 billion parameters."""
    assert plan(stage, world=world).total_bytes / 1e9 == pytest.approx(gigabytes, abs=0.06)


@pytest.mark.parametrize(("stage", "passes"), [(0, 2), (1, 2), (2, 4), (3, 9)])
def test_sent_elements_follow_the_formula(stage, passes):
    found = plan(stage, world=4, accumulation=3)
    assert found.sent_elements == passes * 7_500_000_000 * 3 // 4


def test_messages_are_counted():
    assert plan(2, world=4, accumulation=3).messages == {"reduce_scatter": 45, "all_gather": 15}
    assert plan(3, world=4).messages == {"all_gather": 66, "reduce_scatter": 33}
    assert plan(1, world=1).messages == {}


def test_the_command_prints_bytes_and_keys(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": True}}))
    words = ["plan", "smollm2", "--ds-config", str(file), "--processes", "4", "--json"]
    done = CliRunner().invoke(app, words)
    found = json.loads(done.stdout)
    assert found["ranks"] == 4
    assert found["weight_bytes"] == 2 * 134_515_008
    assert found["state_bytes"] == 12 * 134_515_008 // 4
    assert {"key": "zero_optimization.overlap_comm", "fate": "ignored"}.items() <= {
        k: v for each in found["keys"] if "overlap" in each["key"] for k, v in each.items()
    }.items()
