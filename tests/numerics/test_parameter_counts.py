"""Parameters of every named size against `transformers`, with two layers of each: counts are
linear in the number of layers, and `tests/unit/plan/test_parameters.py` counts all of ours."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from easyllm.models.describe import published_sizes
from easyllm.models.hf_config import read_config
from easyllm.plan import count_parameters

SIZES = published_sizes()


@pytest.mark.parametrize("name", SIZES)
def test_two_layers_of_a_named_size_have_as_many_parameters_as_in_transformers(name):
    values = dict(SIZES[name])
    values["n_layer" if "n_layer" in values else "num_hidden_layers"] = 2
    kind = values["model_type"]
    given = {key: value for key, value in values.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(read_config(values)).total == expected
