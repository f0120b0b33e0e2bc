"""A run's manifest keeps what was predicted beside what was measured."""

import json

from easyllm_command import GOOD, RECIPE, easyllm


def test_a_manifest_keeps_both_sides_by_component(tiny_folder, tmp_path):
    rows, recipe = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    rows.write_text(GOOD * 4)
    recipe.write_text(
        RECIPE.format(model=tiny_folder, data=rows, output=tmp_path / "run"), encoding="utf-8"
    )
    assert easyllm("train", recipe, "max_steps=2").returncode == 0
    results = json.loads((tmp_path / "run" / "manifest.json").read_text())["results"]
    parts, measured = results["predicted_bytes"], results["measured_bytes"]
    assert results["predicted_peak_bytes"] >= parts["process"] > 10 * 2**20
    assert results["peak_rss_bytes"] > 10 * 2**20
    assert parts["weights"] == measured["weights"]
    # AdamW counts its steps in a tensor for each parameter
    assert parts["optimizer"] <= measured["optimizer"] <= parts["optimizer"] + 64 * 64
    assert results["predicted_seconds"] >= 0
    assert results["seconds"] > 0
