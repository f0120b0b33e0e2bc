"""Every adapter method in the ordinary trainer: resume = uninterrupted, saved, loaded, served."""

import json

import pytest
import torch

from adapter_kinds import BIASES, SETTINGS
from easyllm.adapters import AdaLoRA, adapter_of, merge
from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, SamplingParams
from easyllm.models import load_model, save_model
from easyllm.train import dry_run
from tiny_models import CORPUS, build_tiny
from train_twice import run_config, train_twice

IDS = torch.arange(5, 45)
PROMPT = [5, 6, 7, 8]
SCHEDULE = {"warmup_steps": 1, "final_steps": 1}
"""AdaLoRA prunes after steps 2 and 3 of 4: before and after the resume."""
KINDS = [kind for kind in SETTINGS if kind not in ("lora", "lora, adapted biases")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """A model with biases, and rows to train on."""
    path = tmp_path_factory.mktemp("methods")
    save_model(build_tiny(**BIASES), path / "base", tokenizer=tiny_tokenizer)
    lines = dict.fromkeys(CORPUS)
    rows = [{"prompt": line[:12], "completion": line[12:30]} for line in lines for _ in range(2)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "tune.jsonl").write_text(text, encoding="utf-8")
    return path


def settings_of(kind):
    return SETTINGS[kind] | (SCHEDULE if kind == "adalora" else {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_is_trained_resumed_saved_loaded_served_and_merged(
    kind, folder, tmp_path, tiny_tokenizer
):
    rate = {"learning_rate": 3e-3 if kind.startswith(("lora", "dora")) else 3e-2}
    options = {"max_steps": 4, "save_every": 2, "optimizer": rate}
    config = run_config(folder, folder / "base", adapter=settings_of(kind), **options)
    plan = dry_run(config, None)
    saved = train_twice(config, tmp_path)
    base = load_model(folder / "base", dtype="float32").logits(IDS)
    model = load_model(folder / "base", dtype="float32", adapter=saved)
    adapted = model.logits(IDS)
    assert not torch.allclose(adapted, base, atol=1e-3)
    adapters = adapter_of(model)
    # files of the first two have other ranks than were trained; the third is read as LoRA
    if kind not in ("pissa", "adalora", "lora_fa"):
        trained = sum(p.numel() for p in adapters.trained_parameters(model).values())
        assert plan.trained_parameters == trained
    if kind == "adalora":
        ranks = [len(a.lora_A) for _, a in adapters.linears.values() if isinstance(a, AdaLoRA)]
        assert sum(ranks) == 2 * len(ranks)

    llm = LLM(model=model, tokenizer=tiny_tokenizer, max_running=4, cache_dtype="float32")
    done = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))[0]
    logits = model.logits([*PROMPT, *done.token_ids])[len(PROMPT) - 1 : -1]
    assert logits.argmax(-1).tolist() == done.token_ids
    expected = logits.log_softmax(-1).max(-1).values.tolist()
    assert done.logprobs == pytest.approx(expected, abs=2e-4)

    torch.testing.assert_close(merge(model).logits(IDS), adapted, atol=2e-5, rtol=2e-5)
    save_model(model, tmp_path / "merged", tokenizer=tiny_tokenizer)
    again = load_model(tmp_path / "merged", dtype="float32")
    assert torch.equal(again.logits(IDS), model.logits(IDS))


def test_a_schedule_longer_than_the_run_is_refused_before_training(folder):
    long = SETTINGS["adalora"] | {"warmup_steps": 3, "final_steps": 2}
    config = run_config(folder, folder / "base", adapter=long)
    with pytest.raises(ConfigError, match=r"warmup_steps=3 .* in a run of 5 steps"):
        dry_run(config, None)
