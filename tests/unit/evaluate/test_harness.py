"""What lm-eval's options become; the comparison of scores is in `tests/interop/lm_eval`."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from easyllm.core.errors import ConfigError
from easyllm.evaluate import harness
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


@pytest.mark.parametrize("bos", [0, 7, None])
def test_the_client_of_a_server_gets_the_key_and_the_id_of_bos(monkeypatch, bos):
    """lm-eval's client sends no key to the tokenizer's routes, and takes BOS 0 for none."""
    asked = []

    def tokenizer(address, auth_token):
        asked.append((address, auth_token))
        return SimpleNamespace(bos_token_id=bos)

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.utils", SimpleNamespace(RemoteTokenizer=tokenizer))
    monkeypatch.setattr(harness, "_first_model", lambda base: "m")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    arguments = harness._client("http://host:1/v1")["model_args"]
    assert asked == [("http://host:1", "secret")]
    assert arguments["auth_token"] == "secret"
    assert arguments.get("custom_prefix_token_id") == bos


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed here"
)
def test_without_lm_eval_the_error_names_the_extra():
    with pytest.raises(ConfigError, match=r"lm-eval is not installed; .*\[lm-eval\]"):
        run_lm_eval(["x"], url="http://127.0.0.1:1")
