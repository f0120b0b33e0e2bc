"""What lm-eval's options become; the comparison of scores is in `tests/interop/lm_eval`."""

import importlib.util

import pytest

from easyllm.core.errors import ConfigError
from easyllm.evaluate.harness import generation_params, run_lm_eval


def test_generation_options_become_sampling_parameters():
    params = generation_params({"until": ["\n", ""], "max_gen_toks": 500}, max_len=256)
    assert (params.stop, params.max_tokens, params.temperature) == (("\n",), 255, 0)
    sampled = generation_params({"until": "Q:", "temperature": 0.8, "top_p": 0.9}, max_len=4096)
    assert (sampled.stop, sampled.temperature, sampled.top_p) == (("Q:",), 0.8, 0.9)
    greedy = generation_params({"do_sample": False, "temperature": 1.0}, max_len=4096)
    assert (greedy.temperature, greedy.max_tokens) == (0, 256)


def test_options_that_the_engine_does_not_have_are_refused():
    with pytest.raises(ConfigError, match=r"'num_beams' in generation_kwargs.*supported"):
        generation_params({"num_beams": 4}, max_len=256)
    with pytest.raises(ConfigError, match="17 stop strings; at most 16"):
        generation_params({"until": list("abcdefghijklmnopq")}, max_len=256)


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed here"
)
def test_without_lm_eval_the_error_names_the_extra():
    with pytest.raises(ConfigError, match=r"lm-eval is not installed; .*\[lm-eval\]"):
        run_lm_eval(["x"], url="http://127.0.0.1:1")
