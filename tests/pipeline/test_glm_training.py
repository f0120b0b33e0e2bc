"""A ChatGLM is trained by blank infilling, saved and served; experts are made by a command."""

import json

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, SamplingParams
from easyllm.models import load_model
from easyllm.tokenizer import SpecialTokens, Tokenizer
from easyllm.train import TrainConfig, dry_run, train
from easyllm_command import easyllm
from tiny_models import CORPUS
from train_twice import losses

NAMES = ["[MASK]", "[sMASK]", "[gMASK]", "sop", "eop"]


@pytest.fixture
def recipe(tmp_path, tiny_tokenizer):
    backend = type(tiny_tokenizer.backend).from_str(tiny_tokenizer.backend.to_str())
    backend.add_special_tokens(NAMES)
    folder = tmp_path / "tok"
    folder.mkdir()
    Tokenizer(backend, SpecialTokens(bos="sop", eos="eop")).save(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    sizes = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
    return {
        "model": {"tokenizer": str(folder), "config": {"model_type": "chatglm", **sizes}},
        "objective": {"kind": "blank_infilling", "copies": 2, "sentences": 0.2},
        "data": {"kind": "texts", "train": [str(rows)], "max_seq_len": 128},
        "optimizer": {"learning_rate": 1e-2},
        "embedding_gradient": 0.1,
        "batch_size": 8,
        "max_steps": 12,
        "epochs": 20,
        "precision": "fp32",
    }


def test_blank_infilling_trains_a_model_that_generates_a_block(recipe, tmp_path):
    train(TrainConfig.model_validate(recipe), tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[-1] < 0.8 * found[0]
    model = load_model(tmp_path / "run" / "model")
    assert model.config.family == "chatglm"
    assert model.config.prompt_mask == "prefix_before_last"
    llm = LLM(tmp_path / "run" / "model")
    tok = llm.tokenizer
    prompt = [
        *tok.encode("The quick brown", special_tokens=False),
        *map(tok.id_of, ("[gMASK]", "sop")),
    ]
    (done,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    ids = torch.tensor([*prompt, *done.token_ids])
    best = model.logits(ids, prefix=len(prompt) - 1)[len(prompt) - 1 : -1].argmax(-1)
    assert best.tolist() == done.token_ids


def test_a_causal_model_and_one_with_other_positions_are_refused(recipe, tiny_folder):
    causal = TrainConfig.model_validate(recipe | {"model": str(tiny_folder)})
    with pytest.raises(
        ConfigError, match=r"needs the token \[MASK\]|prompt_mask=prefix_before_last"
    ):
        dry_run(causal, None)


def test_the_command_makes_and_merges_experts(tiny_folder, tmp_path):
    ids = torch.arange(5, 40)
    before = load_model(tiny_folder, dtype="float32").logits(ids)
    for source, target, words in (
        (tiny_folder, "moe", ["--experts", "3"]),
        (tmp_path / "moe", "two", ["--experts", "2"]),
        (tmp_path / "two", "dense", ["--experts", "1"]),
    ):
        done = easyllm("convert", source, tmp_path / target, *words)
        assert done.returncode == 0, done.stderr
        found = load_model(tmp_path / target, dtype="float32")
        torch.testing.assert_close(found.logits(ids), before, atol=1e-4, rtol=1e-4)
    refused = easyllm("convert", tiny_folder, tmp_path / "x", "--expert-noise", "0.1")
    assert refused.returncode == 2
    assert "need --experts" in refused.stderr
