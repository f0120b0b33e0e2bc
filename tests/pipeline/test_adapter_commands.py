"""An adapter's folder is a model for every command that generates, evaluates or serves."""

import json
import math
import shutil

import pytest
import torch
from fastapi.testclient import TestClient

from easyllm.adapters import LoRAConfig, attach, save_adapter
from easyllm.checkpoint.store import read_tensors, write_tensors
from easyllm.cli.adapter import load_served
from easyllm.core.errors import CheckpointError, ConfigError, SourceError
from easyllm.engine import LLM, SamplingParams
from easyllm.models import hf_module_name, load_model, split_adapter
from easyllm.models.load import OpenSource
from easyllm.serve.app import create_app
from easyllm_command import easyllm
from prompt_adapters import CONFIGS, adapted

GREEDY = ("--temperature", 0, "--max-tokens", 12)


def adapter_of(base, folder, *, seed=1, recorded=None, also_trained=()):
    """Saves an adapter that changes the tiny model's text."""
    model = load_model(base)
    adapters = attach(model, LoRAConfig(rank=4, alpha=64), seed=seed, also_trained=also_trained)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, adapter in adapters.linears.values():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.2, generator=generator)
    base = str(base) if recorded is None else recorded
    return save_adapter(model, folder, module_name=hf_module_name(model), base=base)


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    return adapter_of(tiny_folder, tmp_path_factory.mktemp("adapters") / "adapter")


@pytest.fixture(scope="module")
def merged(tiny_folder, adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "model"
    assert easyllm("merge", tiny_folder, adapter, folder).returncode == 0
    return folder


def said(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_chat_with_an_adapter_gives_the_text_of_the_merged_model(tiny_folder, adapter, merged):
    words, turns = ("chat", *GREEDY), "hello\nagain\n"
    expected = said(easyllm("chat", merged, *words[1:], stdin=turns))
    assert said(easyllm("chat", adapter, *words[1:], stdin=turns)) == expected
    explicit = ("chat", tiny_folder, "--adapter", adapter, *words[1:])
    assert said(easyllm(*explicit, stdin=turns)) == expected
    assert said(easyllm("chat", tiny_folder, *words[1:], stdin=turns)) != expected


def test_generate_and_eval_take_an_adapter(tiny_folder, adapter, merged, tmp_path):
    words = ("hello", *GREEDY)
    assert said(easyllm("generate", adapter, *words)) == said(easyllm("generate", merged, *words))
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b", "key": "b"}) + "\n")
    reports = [
        json.loads(said(easyllm("eval", *model, data, "--json")))
        for model in ((adapter,), (merged,), ("--adapter", adapter, tiny_folder))
    ]
    assert reports[0] == reports[1] == reports[2]


def test_compare_finds_no_difference_between_an_adapter_and_the_merged_model(
    tiny_folder, adapter, merged
):
    words = ("--prompt", "hello", "--max-tokens", 8, "--json")
    (row,) = json.loads(said(easyllm("compare", merged, adapter, *words)))
    assert row["parts_at"] is None
    named = ("--adapter", adapter)
    assert json.loads(said(easyllm("compare", merged, tiny_folder, *named, *words))) == [row]
    (row,) = json.loads(said(easyllm("compare", tiny_folder, adapter, *words)))
    assert row["mean_kl_nats"] > 1e-3


def test_an_adapter_is_applied_to_a_quantized_base(tiny_folder, adapter):
    words = ("hello", *GREEDY, "--quantize", "int8")
    assert said(easyllm("generate", adapter, *words)) != said(
        easyllm("generate", tiny_folder, *words)
    )


def answers(models, adapters, names):
    """Returns the greedy answer of each served name."""
    with TestClient(create_app(models, adapters=adapters), base_url="http://localhost") as client:
        found = {}
        for name in names:
            messages = [{"role": "user", "content": "hello"}]
            body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 12}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            found[name] = answer.json()["choices"][0]["message"]["content"]
    return found


def test_a_server_shares_the_weights_of_a_base_and_its_adapters(
    tiny_folder, adapter, merged, tmp_path
):
    other = adapter_of(tiny_folder, tmp_path / "other", seed=2)
    named = {"base": str(tiny_folder), "a": str(adapter), "b": str(other)}
    served = load_served(named)
    models, adapters = served.models, served.adapters
    assert list(models) == ["base", "a", "b"]
    assert models["base"] is models["a"] is models["b"]
    assert adapters == {"a": "a", "b": "b"}
    found = answers(models, adapters, named)
    params, hello = (
        SamplingParams(temperature=0, max_tokens=12),
        [{"role": "user", "content": "hello"}],
    )
    alone = {name: LLM(source).chat(hello, params).text for name, source in named.items()}
    assert found == alone
    assert found["a"] == LLM(merged).chat(hello, params).text
    assert len(set(found.values())) == 3


def test_an_adapter_with_trained_modules_of_the_base_is_served_from_its_own_copy(
    tiny_folder, tmp_path
):
    own = adapter_of(tiny_folder, tmp_path / "own", also_trained=("norm",))
    served = load_served({"base": str(tiny_folder), "own": str(own)})
    models, adapters = served.models, served.adapters
    assert models["base"] is not models["own"]
    assert adapters == {}


def test_an_adapter_with_virtual_tokens_is_served_from_its_own_copy(tiny_folder, adapter, tmp_path):
    """Beside a base and another adapter, which share theirs."""
    model = adapted(load_model(tiny_folder), CONFIGS["prefix"])
    where = hf_module_name(model)
    prefix = save_adapter(model, tmp_path / "own", module_name=where, base=str(tiny_folder))
    named = {"base": str(tiny_folder), "a": str(adapter), "prefix": str(prefix)}
    served = load_served(named)
    models, adapters = served.models, served.adapters
    assert models["base"] is models["a"]
    assert models["base"] is not models["prefix"]
    assert adapters == {"a": "a"}
    found = answers(models, adapters, named)
    assert len(set(found.values())) == 3
    params = SamplingParams(temperature=0, max_tokens=12)
    hello = [{"role": "user", "content": "hello"}]
    assert found["prefix"] == LLM(prefix).chat(hello, params).text
    assert said(easyllm("chat", prefix, *GREEDY, stdin="hello\n")).strip()


def test_one_adapter_option_for_several_models_is_refused(tiny_folder, adapter):
    done = easyllm("serve", f"a={tiny_folder}", f"b={tiny_folder}", "--adapter", adapter)
    assert done.returncode == 2
    assert "--adapter applies to one model, but 2 are served" in done.stderr


def test_a_missing_base_is_named_with_the_option_that_replaces_it(
    tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    gone = adapter_of(tiny_folder, tmp_path / "gone", recorded="runs/base")
    done = easyllm("chat", gone)
    assert done.returncode == 2
    assert (
        f"is 'runs/base', which does not exist here; give the base model and --adapter {gone}"
        in (done.stderr)
    )
    assert said(easyllm("generate", tiny_folder, "x", "--adapter", gone, *GREEDY))
    hub = adapter_of(tiny_folder, tmp_path / "hub", recorded="HuggingFaceTB/SmolLM2")
    assert split_adapter(hub) == ("hf:HuggingFaceTB/SmolLM2", hub)


def test_two_adapters_at_once_and_an_adapter_of_a_loaded_model_are_refused(tiny_model, adapter):
    with pytest.raises(SourceError, match="give the base model and one adapter"):
        LLM(adapter, adapter=adapter)
    with pytest.raises(ConfigError, match="adapter would change the model"):
        LLM(model=tiny_model, adapter=adapter)
    done = easyllm("convert", adapter, "out")
    assert done.returncode == 2
    assert "is an adapter, without the weights of its base; merge it first" in done.stderr


DAMAGE = {
    "weights": "is damaged or truncated",
    "config": "is not JSON",
    "nan": "contains NaN",
}


def damaged(adapter, folder, damage):
    """A copy of an adapter with half of a file, or with a value that is NaN."""
    shutil.copytree(adapter, folder)
    path = folder / ("adapter_config.json" if damage == "config" else "adapter_model.safetensors")
    if damage != "nan":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        return folder
    tensors, metadata = read_tensors(path)
    next(iter(tensors.values()))[0] = math.nan
    write_tensors(path, tensors, metadata)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_told_before_its_base_is_loaded(
    adapter, tiny_folder, tmp_path, monkeypatch, damage
):
    broken, text = damaged(adapter, tmp_path / "broken", damage), tmp_path / "text.jsonl"
    text.write_text(json.dumps({"prompt": "The quick", "completion": "brown fox."}) + "\n")

    def load(*_, **__):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(OpenSource, "model", load)
    for words in (
        ("merge", tiny_folder, broken, tmp_path / "out"),
        ("generate", tiny_folder, "x", "--adapter", broken),
        ("compare", tiny_folder, broken),
        ("quantize", tiny_folder, tmp_path / "out", "--group-size", 32, "--adapter", broken),
        ("serve", f"a={tiny_folder}", f"b={broken}"),
        ("serve", f"a={adapter}", f"b={broken}"),
        ("eval", tiny_folder, "--data", text, "--adapter", broken),
    ):
        done = easyllm(*words)
        assert done.returncode == 2, done.stderr
        assert DAMAGE[damage] in done.stderr, done.stderr
    with pytest.raises(CheckpointError, match=DAMAGE[damage]):
        LLM(tiny_folder, adapters={"a": adapter, "b": broken})
    assert not (tmp_path / "out").exists()


def test_paths_that_hold_no_adapter_are_told(tiny_folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    said = {"file": "is a file", "gone": "does not exist", "empty": "no adapter_config.json"}
    for name, reason in said.items():
        done = easyllm("merge", tiny_folder, tmp_path / name, tmp_path / "out")
        assert done.returncode == 2
        assert f"{name}' {reason}" in done.stderr or f"{name}' contains {reason}" in done.stderr
    done = easyllm("convert", tmp_path / "gone", tmp_path / "out", "--lora-rank", 4)
    assert done.returncode == 2
    assert "gone' does not exist" in done.stderr
