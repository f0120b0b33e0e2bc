"""Law 10: one process = DDP = ZeRO-1 = 2 = 3 = FSDP = TP, packed sequences of mixed lengths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import easyllm
from easyllm.parallel.mesh import world_size

SUPPORT = Path(__file__).parents[1] / "support"
SOME = ("ddp", "zero2", "fsdp")
LAYOUTS = ("ddp", "zero1", "zero2", "zero3", "fsdp")
TENSOR = (
    {"label": "tp2", "tensor": 2},
    {"label": "tp2-sequence", "tensor": 2, "sequence": True},
)
FULL = {"optimizer": {"kind": "sgd", "learning_rate": 0.1}, "max_steps": 20}
LORA = {"adapter": {"kind": "lora", "rank": 3, "alpha": 6}, "max_steps": 4}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Seven rows of very different lengths; one has no token to train on after truncation."""
    texts = ["a b", "what is it", "0123456789 " * 5, "hello world " * 4, "good", "x " * 30, "dog"]
    lines = [json.dumps({"prompt": text[:4], "completion": text * 2}) + "\n" for text in texts]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(lines))
    return file


def recipe(model, rows, **changes):
    return {
        "model": str(model),
        "data": {"train": [str(rows)], "max_seq_len": 96},
        "batch_size": 3,
        "micro_batch_tokens": 96,
        "precision": "fp32",
        "epochs": 100,
        "schedule": {"kind": "constant"},
        "clip_norm": 0.5,
    } | changes


def plans(*more, layouts=LAYOUTS, fault=None):
    found = [{"label": layout, "layout": layout} for layout in layouts] + list(more)
    return [dict(plan) | ({"fault": fault} if fault else {}) for plan in found]


def two_rank_checks(model, rows):
    fault = {"max_steps": 2} | {"optimizer": FULL["optimizer"]}
    adapter_fault = LORA | {"max_steps": 2}
    recipes = {
        "full": {"values": recipe(model, rows, **FULL), "plans": plans(*TENSOR)},
        "lora": {"values": recipe(model, rows, **LORA), "plans": plans(*TENSOR)},
        "qlora": {
            "values": recipe(model, rows, **LORA, quantize="nf4"),
            "plans": plans(layouts=SOME),
        },
        "adamw": {
            "values": recipe(model, rows, max_steps=20),
            "plans": [{"label": "zero2", "layout": "zero2"}],
        },
    }
    for name, values in (("mean", fault), ("no-reduce", fault), ("local-adapter", adapter_fault)):
        recipes[name] = {
            "values": recipe(model, rows, **values),
            "plans": plans(TENSOR[0], layouts=SOME, fault=name),
        }
    return {"ranks": 2, "parts": ["equalities", "collectives"], "recipes": recipes, "tensor": 2}


def four_rank_checks(model, rows):
    plan = {"label": "tp2-dp2", "tensor": 2, "layout": "zero2"}
    values = recipe(model, rows, **FULL | {"max_steps": 4})
    recipes = {"full": {"values": values, "plans": [plan]}}
    return {"ranks": 4, "parts": ["equalities", "persistent_bytes"], "recipes": recipes}


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_folder, rows):
    """Everything that two and then four ranks compute, in one launch."""
    folders = []
    for make in (two_rank_checks, four_rank_checks):
        folders.append(tmp_path_factory.mktemp("ranks"))
        (folders[-1] / "spec.json").write_text(json.dumps(make(tiny_folder, rows)))
    paths = [str(Path(easyllm.__file__).parents[1]), str(SUPPORT), str(SUPPORT.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SUPPORT / "rank_checks.py"), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / "results.json").read_text()) for folder in folders]


@pytest.fixture(scope="module")
def two_ranks(results):
    return results[0]


@pytest.fixture(scope="module")
def four_ranks(results):
    return results[1]


def assert_equal(finding, *, weight):
    assert finding["loss"] <= 1e-5, finding
    assert finding["gradient"] <= 2e-6, finding
    assert finding["norm"] <= 1e-5, finding
    assert finding["weights"] <= weight, finding
    assert finding["weight"] <= max(1e-3, weight), finding


@pytest.mark.parametrize("label", [*LAYOUTS, "tp2", "tp2-sequence"])
def test_full_fine_tuning_equals_one_process(two_ranks, label):
    assert_equal(two_ranks["equalities"][f"full/{label}"], weight=1e-5)


@pytest.mark.parametrize("label", [*LAYOUTS, "tp2", "tp2-sequence"])
def test_lora_equals_one_process(two_ranks, label):
    assert_equal(two_ranks["equalities"][f"lora/{label}"], weight=1e-3)


@pytest.mark.parametrize("label", SOME)
def test_qlora_equals_one_process(two_ranks, label):
    assert_equal(two_ranks["equalities"][f"qlora/{label}"], weight=1e-3)


def test_adamw_on_shards_equals_one_process(two_ranks):
    assert_equal(two_ranks["equalities"]["adamw/zero2"], weight=1e-3)


@pytest.mark.parametrize("label", [*SOME, "tp2"])
@pytest.mark.parametrize("fault", ["mean", "no-reduce", "local-adapter"])
def test_a_planted_fault_is_found(two_ranks, fault, label):
    finding = two_ranks["equalities"][f"{fault}/{label}"]
    assert not finding["holds"]
    assert finding["note"]


def test_tensor_parallel_makes_four_all_reduces_a_layer(two_ranks):
    assert two_ranks["collectives"]["plain"]["all_reduce"] == 4


def test_sequence_parallel_makes_four_pairs_a_layer(two_ranks):
    counts = two_ranks["collectives"]["sequence"]
    assert counts["reduce_scatter"] == counts["all_gather"] == 4
    assert counts.get("all_reduce", 0) == 0


def test_tensor_and_data_parallel_together_equal_one_process(four_ranks):
    assert_equal(four_ranks["equalities"]["full/tp2-dp2"], weight=1e-5)


def test_ranks_hold_the_shares_of_zero(four_ranks):
    """arXiv 1910.02054, figure 1: weights Ψ, gradients Ψ and moments 2 Ψ, divided by 4 or not."""
    expected = {"ddp": (1, 1, 2), "zero1": (1, 0.25, 0.5), "zero2": (1, 0.25, 0.5)}
    expected["zero3"] = (0.25, 0.25, 0.5)
    for layout, shares in expected.items():
        held = four_ranks["persistent_bytes"][layout]
        for key, share in zip(("weights", "gradients", "state"), shares, strict=True):
            assert held[key] / held["parameters"] == pytest.approx(share, rel=0.02), (layout, key)


def test_ranks_send_what_the_formula_says(four_ranks):
    """2 Ψ (W-1)/W in all; after the update ZeRO-1 and ZeRO-2 gather the weights."""
    share = 0.75
    found = four_ranks["persistent_bytes"]
    assert found["ddp"]["sent"] == pytest.approx(2 * share, rel=0.02)
    for layout in ("zero1", "zero2"):
        assert found[layout]["sent_before_update"] == pytest.approx(share, rel=0.02)
        assert found[layout]["sent"] == pytest.approx(2 * share, rel=0.02)


def test_this_process_is_no_rank():
    assert world_size() == 1
