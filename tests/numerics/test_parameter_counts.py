"""Parameters of every named size against `transformers`, with two layers of each: counts are
linear in the number of layers, and `tests/unit/plan/test_parameters.py` counts all of ours."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from easyllm.models.describe import published_sizes
from easyllm.models.hf_config import read_config
from easyllm.plan import count_parameters

SIZES = published_sizes()
AS_LLAMA = ("internlm2", "Yi")
"""Types that are Llamas under other names."""
PUBLISHED = {
    "baichuan-7b": 7_000_559_616,
    "baichuan-13b": 13_264_901_120,
    "baichuan2-7b": 7_505_973_248,
    "baichuan2-13b": 13_896_668_160,
    "chatglm-6b": 6_173_286_400,
    "chatglm2-6b": 6_243_584_000,
    "chatglm3-6b": 6_243_584_000,
}
"""Counts of the authors' files; transformers has these models no more."""
T5 = ("t5-small", "t5-base", "flan-t5-small")
"""Published counts are in `tests/unit/plan/test_parameters.py`: transformers ties every head."""
OWN = (*PUBLISHED, *T5, "glm-10b")


@pytest.mark.parametrize("name", [name for name in SIZES if name not in OWN])
def test_two_layers_of_a_named_size_have_as_many_parameters_as_in_transformers(name):
    values = dict(SIZES[name])
    values["n_layer" if "n_layer" in values else "num_hidden_layers"] = 2
    kind = "llama" if values["model_type"] in AS_LLAMA else values["model_type"]
    given = {key: value for key, value in values.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(read_config(values)).total == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_that_transformers_lacks_has_the_published_count(name):
    assert count_parameters(read_config(SIZES[name])).total == PUBLISHED[name]
