"""`easyllm merge` keeps a result only if it gives the logits of the attached adapter."""

import json

import pytest
import torch
import yaml

from easyllm.adapters import (
    LoRAConfig,
    attach,
    register_adapter,
    save_adapter,
    unregister_adapter,
)
from easyllm.adapters.lora import LoRA
from easyllm.core.manifest import MANIFEST_FILE
from easyllm.engine.runner import DecoderRunner
from easyllm.models import hf_module_name, load_model, save_model, to_classifier
from easyllm.pipeline import merge as pipeline_merge
from easyllm_command import easyllm
from registered_parts import PromptConfig
from trained_adapters import METHODS, attached, train

BOUNDED = ("merged in memory", "saved, reloaded", "served")


def saved(folder, base, config, **options):
    model = attached(load_model(base), config, **options)
    return save_adapter(model, folder, module_name=hf_module_name(model), base=str(base))


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("adapter") / "a", tiny_folder, METHODS["lora"])


@pytest.fixture
def out(tmp_path):
    return tmp_path / "result" / "out"


def figures(done):
    """Returns the rows of a command's JSON output by their names."""
    found = json.loads(done.stdout)
    return found, {row["name"]: row for row in found["rows"]}


def failed(done):
    return [name for name, row in figures(done)[1].items() if not row["holds"]]


def is_gone(out):
    """Returns whether a command has left neither its result nor a part of it."""
    return not out.parent.exists() or not list(out.parent.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_and_the_table_shows_each_form(tiny_folder, tmp_path, out, method):
    folder = saved(tmp_path / "a", tiny_folder, METHODS[method])
    done = easyllm("merge", tiny_folder, folder, out, "--json")
    assert done.returncode == 0, done.stderr
    found, rows = figures(done)
    assert (found["folder"], found["passed"], found["text"]) == (str(out), True, "built-in text")
    assert list(rows) == ["base alone", *BOUNDED]
    assert all(rows[name]["drift"] < 1e-5 and rows[name]["bound"] == 1e-4 for name in BOUNDED)
    assert all(rows[name]["kl_nats"] < 1e-8 for name in BOUNDED)
    assert rows["base alone"]["kl_nats"] > 1e-2
    assert rows["base alone"]["bound"] is None
    results = json.loads((out / MANIFEST_FILE).read_text())["results"]
    assert results["passed"]
    assert len(results["rows"]) == 4
    shown = easyllm("merge", tiny_folder, folder, out.with_name("again"))
    assert shown.returncode == 0, shown.stderr
    assert all(name in shown.stdout for name in rows)
    assert shown.stdout.endswith(f"\n{out.with_name('again')}\n")


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 5e-2), ("float16", 6e-3)])
def test_a_rounded_result_has_its_own_bound(tiny_folder, adapter, out, dtype, bound):
    _, rows = figures(easyllm("merge", tiny_folder, adapter, out, "--dtype", dtype, "--json"))
    assert rows["merged in memory"]["drift"] < 1e-5
    for name in ("saved, reloaded", "served"):
        assert 1e-5 < rows[name]["drift"] < bound == rows[name]["bound"]
    assert load_model(out).dtype == getattr(torch, dtype)


def wrong_scale(patch):
    merged = LoRA.merged

    def doubled(self, weight, bias):
        right, bias = merged(self, weight, bias)
        return right + 0.01 * (right - weight), bias  # an update that is 1% too large

    patch.setattr(LoRA, "merged", doubled)


def wrong_save(patch):
    save = pipeline_merge.save_model

    def damaged(model, folder, **options):
        model.layers[1].feed_forward.down_proj.weight.data[3, 5] += 0.5
        return save(model, folder, **options)

    patch.setattr(pipeline_merge, "save_model", damaged)


def wrong_engine(patch):
    run = DecoderRunner.run
    patch.setattr(DecoderRunner, "run", lambda self, step: run(self, step) + torch.arange(320.0))


BROKEN = {wrong_scale: 3, wrong_save: 2, wrong_engine: 1}
"""How a program may be broken, and how many of the last rows show it."""


@pytest.mark.parametrize("breaks", BROKEN)
def test_a_broken_result_is_exit_code_1_and_not_kept(
    tiny_folder, adapter, out, monkeypatch, breaks
):
    breaks(monkeypatch)
    done = easyllm("merge", tiny_folder, adapter, out, "--json")
    assert done.returncode == 1
    assert failed(done) == list(BOUNDED[-BROKEN[breaks] :])
    assert figures(done)[0]["folder"] is None
    assert done.stderr.count("\n") == 1
    assert f"{failed(done)[0]} differs from the attached adapter by" in done.stderr
    assert f"nothing was written to {str(out)!r}" in done.stderr
    assert is_gone(out)
    shown = easyllm("merge", tiny_folder, adapter, out)
    assert shown.returncode == 1
    assert "NO" in shown.stdout
    assert str(out) not in shown.stdout
    assert is_gone(out)


def test_a_result_that_fails_is_kept_or_allowed_if_asked(tiny_folder, adapter, out, monkeypatch):
    wrong_scale(monkeypatch)
    kept = easyllm("merge", tiny_folder, adapter, out, "--keep")
    assert kept.returncode == 1
    assert f"{str(out)!r} was kept" in kept.stderr
    assert not json.loads((out / MANIFEST_FILE).read_text())["results"]["passed"]
    assert load_model(out).config.vocab_size == 320
    again = out.with_name("allowed")
    allowed = easyllm("merge", tiny_folder, adapter, again, "--max-drift", 0.5, "--json")
    assert allowed.returncode == 0
    assert figures(allowed)[1]["served"]["bound"] == 0.5
    strict = ("--max-drift", "0", "--json")
    assert easyllm("merge", tiny_folder, adapter, out.with_name("s"), *strict).returncode == 1


def test_without_the_check_the_model_is_the_same(tiny_folder, adapter, out):
    done = easyllm("merge", tiny_folder, adapter, out, "--no-check")
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    easyllm("merge", tiny_folder, adapter, out.with_name("checked"))
    one, other = load_model(out), load_model(out.with_name("checked"))
    assert all(torch.equal(one.state_dict()[n], t) for n, t in other.state_dict().items())
    refused = easyllm("merge", tiny_folder, adapter, out.with_name("x"), "--no-check", "--keep")
    assert refused.returncode == 2
    assert "--keep concerns the comparison, which --no-check leaves out" in refused.stderr


def test_an_adapter_that_cannot_be_merged_is_refused_before_anything_is_written(
    tiny_folder, tmp_path, out
):
    register_adapter(PromptConfig, peft_type="TEST_PROMPT")
    try:
        folder = saved(tmp_path / "p", tiny_folder, PromptConfig())
        done = easyllm("merge", tiny_folder, folder, out)
        assert done.returncode == 2
        assert "kind test_prompt cannot be merged: virtual tokens are no weights" in done.stderr
        assert not done.stdout
        assert is_gone(out)
    finally:
        unregister_adapter("test_prompt")


def test_a_text_is_read_and_random_ids_are_announced(tiny_folder, adapter, tmp_path, out):
    text = tmp_path / "t.txt"
    text.write_text("The quick brown fox. " * 20)
    done = easyllm("merge", tiny_folder, adapter, out, "--text", text, "--json")
    assert figures(done)[0]["text"] == str(text)
    missing = easyllm("merge", tiny_folder, adapter, out.with_name("m"), "--text", "missing.txt")
    assert missing.returncode == 2
    assert "missing.txt" in missing.stderr
    assert not out.with_name("m").exists()
    bare = save_model(load_model(tiny_folder), tmp_path / "bare")
    done = easyllm("merge", bare, adapter, out.with_name("bare"))
    assert done.returncode == 0, done.stderr
    assert "random token ids (seed 0): the base has no tokenizer" in done.stdout
    assert "served: not measured, an engine needs a tokenizer" in done.stdout


def test_a_classifier_is_compared_on_its_scores(tiny_folder, tmp_path, out):
    model = to_classifier(load_model(tiny_folder), 3)
    train(attach(model, LoRAConfig(rank=2), also_trained=("score",)), model)
    save_adapter(model, tmp_path / "c", module_name=hf_module_name(model), base=str(tiny_folder))
    done = easyllm("merge", tiny_folder, tmp_path / "c", out, "--json")
    assert done.returncode == 0, done.stderr
    _, rows = figures(done)
    assert rows["served"]["skipped"] == "a classifier generates no tokens"
    assert rows["base alone"]["skipped"] == "the adapter has its own classification head"
    assert rows["saved, reloaded"]["drift"] < 1e-4


def test_the_stage_of_a_recipe_uses_the_gate(tiny_folder, adapter, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    stage = {"kind": "merge", "model": str(tiny_folder), "adapter": str(adapter)}
    values = {"name": "m", "output": str(tmp_path / "run"), "stages": {"merged": stage}}
    recipe.write_text(yaml.safe_dump(values))
    found = json.loads(easyllm("run", recipe, "--json").stdout)
    assert found["merged"]["passed"]
    wrong_scale(monkeypatch)
    broken = easyllm("run", recipe, f"output={tmp_path / 'broken'}")
    assert broken.returncode == 1
    assert "merged in memory differs" in broken.stderr
    assert not (tmp_path / "broken" / "merged").exists()
    unchecked = easyllm(
        "run", recipe, f"output={tmp_path / 'unchecked'}", "stages.merged.check=false", "--json"
    )
    assert "passed" not in json.loads(unchecked.stdout)["merged"]
