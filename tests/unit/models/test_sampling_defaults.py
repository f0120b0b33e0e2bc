"""Sampling parameters that a model recommends are read and applied where none are given."""

import json

import pytest

from easyllm import save_model
from easyllm.core.errors import CheckpointError
from easyllm.engine import LLM, SamplingParams
from easyllm.models.sampling_defaults import read_sampling_defaults


def write(folder, values):
    (folder / "generation_config.json").write_text(json.dumps(values))
    return read_sampling_defaults(folder)


def test_valid_values_are_kept_with_their_types(tmp_path):
    given = {"temperature": 1, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    found = write(tmp_path, {**given, "do_sample": False, "max_length": 10})
    assert found == given
    assert isinstance(found["temperature"], float)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": "hot"},
        {"temperature": True},
        {"temperature": -1},
        {"top_k": 2.5},
        {"top_p": 0},
        {"min_p": 2},
    ],
)
def test_values_that_cannot_apply_are_left_out(tmp_path, values):
    assert write(tmp_path, values) == {}


def test_no_file_recommends_nothing(tmp_path):
    assert read_sampling_defaults(tmp_path) == {}


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError):
        read_sampling_defaults(tmp_path)


def test_gguf_metadata_have_their_own_names(tmp_path):
    metadata = {"general.sampling.temp": 0.7, "general.sampling.top_k": 20}
    assert read_sampling_defaults(tmp_path, metadata) == {"temperature": 0.7, "top_k": 20}


def test_they_apply_only_where_no_parameters_are_given(tmp_path, tiny_model, tiny_tokenizer):
    save_model(tiny_model, tmp_path, tokenizer=tiny_tokenizer)
    values = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**values, "top_k": 1}))
    llm = LLM(tmp_path)
    assert llm.default_params == SamplingParams(top_k=1)
    greedy = llm.generate(["Once upon"], SamplingParams(temperature=0, max_tokens=12))[0]
    alike = llm.generate(["Once upon"])[0].token_ids[:12]
    assert alike == greedy.token_ids[: len(alike)]
    assert llm.generate(["Once upon"], SamplingParams(max_tokens=12, seed=1))[0] != greedy
