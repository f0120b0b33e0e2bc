"""`easyllm compare` finds where two sides diverge, on a tiny model."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from easyllm.checkpoint.store import read_tensors, write_tensors
from easyllm.core.errors import ConfigError
from easyllm.models import load_model, save_model
from easyllm.models.load import OpenSource
from easyllm.verify.compare import compare
from easyllm_command import easyllm

PROMPTS = ("The quick brown", "hello world", "what is the")


@pytest.fixture(scope="module")
def nudged(tiny_folder, tiny_tokenizer, tmp_path_factory):
    """The same model with one weight changed by a lot."""
    model = load_model(tiny_folder)
    with torch.no_grad():
        model.layers[1].feed_forward.down_proj.weight.mul_(1.5)
    return save_model(model, tmp_path_factory.mktemp("nudged") / "m", tokenizer=tiny_tokenizer)


def test_a_model_never_diverges_from_itself(tiny_folder):
    for each in compare(str(tiny_folder), str(tiny_folder), PROMPTS, max_tokens=24):
        assert (each.parts_at, each.agreement, each.generated) == (None, 1.0, 24)
        assert each.mean_kl_nats < 1e-9


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_engine_generates_the_same_tokens_as_transformers(tiny_folder, penalty):
    """Includes a repetition penalty, which must cover prompt and output on both sides."""
    found = compare(
        f"{tiny_folder}@float32",
        f"{tiny_folder}@transformers",
        PROMPTS,
        max_tokens=24,
        repetition_penalty=penalty,
    )
    assert all(each.parts_at is None or each.is_near_tie for each in found)
    assert max(each.max_logprob_difference for each in found) < 1e-4


def test_the_first_different_token_is_found(tiny_folder, nudged):
    (each,) = compare(str(tiny_folder), str(nudged), PROMPTS[:1], max_tokens=24)
    assert each.parts_at is not None
    a, b = each.chosen_a, each.chosen_b
    assert a.token_id != b.token_id
    assert (a.rank_a, b.rank_b) == (0, 0)
    assert a.logprob_a >= b.logprob_a
    assert each.mean_kl_nats > 1e-3


def test_int4_differs_more_than_int8(tiny_folder):
    kl = {
        scheme: sum(
            each.mean_kl_nats
            for each in compare(str(tiny_folder), f"{tiny_folder}@{scheme}", PROMPTS, max_tokens=16)
        )
        for scheme in ("int8", "int4")
    }
    assert 0 < kl["int8"] < kl["int4"]


def test_an_unknown_variant_is_refused(tiny_folder):
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        compare(str(tiny_folder), f"{tiny_folder}@bfloat", PROMPTS)


def test_a_damaged_second_model_is_told_before_the_first_is_loaded(
    tiny_folder, tmp_path, monkeypatch
):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    weights = broken / "model.safetensors"

    def load(*_, **__):
        raise AssertionError("the first model was loaded")

    monkeypatch.setattr(OpenSource, "model", load)
    tensors, metadata = read_tensors(weights)
    write_tensors(weights, dict(list(tensors.items())[1:]), metadata)
    done = easyllm("compare", tiny_folder, broken)
    assert done.returncode == 2
    assert next(iter(tensors)) in done.stderr
    weights.write_bytes(weights.read_bytes()[:5000])
    done = easyllm("compare", tiny_folder, broken)
    assert done.returncode == 2
    assert "is damaged or truncated" in done.stderr


def test_the_command_prints_json(tiny_folder):
    command = [
        sys.executable,
        "-m",
        "easyllm",
        "compare",
        str(tiny_folder),
        f"{tiny_folder}@bfloat16",
    ]
    done = subprocess.run(
        [*command, "--prompt", "hello", "--max-tokens", "8", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = json.loads(done.stdout)
    assert row["prompt"] == "hello"
    assert "near_tie" in row
